"""What one call asks of a network beside tokens and masks: of its attention, for the most part."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import nn


@dataclass(frozen=True)
class Perturbation:
    """How a denoiser is weakened on purpose, for guidance away from the weaker prediction.

    Attributes:
        kind: ``"identity"``: self-attention returns the values as they are, each pixel looks at itself alone (PAG,
            arXiv:2403.17377, eq. 16). ``"blur"``: queries are blurred over the picture (SEG, arXiv:2408.00760, section 4).
            ``"skip"``: whole blocks are left out.
        layers: The modules that it acts on: attention layers, or for ``"skip"`` blocks.
        blur_sigma: Standard deviation of the blur in pixels of the layer; above 9999 the mean of all pixels.
    """

    kind: str
    layers: frozenset[nn.Module]
    blur_sigma: float = 0.0


@dataclass(frozen=True)
class AttentionOptions:
    """Passed to networks as ``cross_attention_kwargs``, ``joint_attention_kwargs`` or ``attention_kwargs``.

    Attributes:
        perturbation: How to weaken the network.
        regions: Where each of R prompts holds, (B, R, H, W) of 0 and 1 at any resolution; the text tokens are those of the R
            prompts one after the other, M = R * N. Each pixel attends to the prompts that hold there.
        image_tokens: Encoded picture prompts, one (B, pictures, K, C) for each IP-Adapter.
        image_scales: Weight of each picture in each of the L layers that IP-Adapters reach, (B, L, pictures of all adapters).
        image_masks: Where the pictures of each IP-Adapter act, (B, pictures, H, W) at any resolution; empty for everywhere.
        freeu: Factors (B, 2, 2) of the first two stages of a U-Net's way up: of the skip connection and of the features.
        size: Height and width of the picture in tokens, for a network that reads a sequence (FLUX.1), where anything above needs
            them; without it the network counts its tokens' places, which breaks the graph of a compiled one.
        image_times: What IP-Adapters that are told the time make of it, one (B, T) for each; empty for others.
    """

    perturbation: Perturbation | None = None
    regions: torch.Tensor | None = None
    image_tokens: tuple[torch.Tensor, ...] = ()
    image_scales: torch.Tensor | None = None
    image_masks: tuple[torch.Tensor, ...] = ()
    freeu: torch.Tensor | None = None
    size: tuple[int, int] | None = None
    image_times: tuple[torch.Tensor, ...] = ()

    def perturbs(self, layer: nn.Module, kind: str) -> bool:
        """Whether ``layer`` is weakened in the way of ``kind``."""
        return self.perturbation is not None and self.perturbation.kind == kind and layer in self.perturbation.layers


NO_OPTIONS = AttentionOptions()


def read_options(name: str, value: Any) -> AttentionOptions:
    """The options that a network was given under the keyword ``name``; a ``ValueError`` for anything else but nothing."""
    if isinstance(value, AttentionOptions):
        return value
    if value:
        raise ValueError(f"{name}={value!r} is not read: scale adapters where they are loaded; pass AttentionOptions, or nothing")
    return NO_OPTIONS


def region_mask(regions: torch.Tensor, height: int, width: int, tokens: int) -> torch.Tensor:
    """Which text tokens a pixel may attend to: ``regions`` (B, R, H, W) -> (B, height * width, tokens), boolean.

    Where no region holds, all prompts do.
    """
    count = regions.shape[1]
    if tokens % count:
        raise ValueError(f"{tokens} text tokens are no whole number for each of {count} regions: pass the regions' prompts joined")
    held = F.interpolate(regions.float(), (height, width), mode="nearest") > 0.5  # (B, R, h, w)
    held = held.flatten(2).transpose(1, 2)  # (B, hw, R)
    held = held | ~held.any(dim=2, keepdim=True)
    return held.repeat_interleave(tokens // count, dim=2)


def joint_region_mask(regions: torch.Tensor, height: int, width: int, tokens: int) -> torch.Tensor:
    """The mask of attention over text and pixels together, (B, 1, S, S) with S = tokens + height * width, text first.

    Pixels attend to all pixels and to the prompts of their regions, a prompt to itself and to the pixels of its region.
    """
    pixels = height * width
    to_text = region_mask(regions, height, width, tokens)  # (B, hw, M)
    prompt = torch.arange(tokens, device=regions.device) // (tokens // regions.shape[1])
    own = (prompt[:, None] == prompt[None, :]).expand(len(regions), -1, -1)  # (B, M, M)
    among = torch.ones(len(regions), pixels, pixels, dtype=torch.bool, device=regions.device)
    rows = torch.cat([own, to_text.transpose(1, 2)], dim=2), torch.cat([to_text, among], dim=2)
    return torch.cat(rows, dim=1).unsqueeze(1)


def blur_queries(query: torch.Tensor, height: int, width: int, sigma: float) -> torch.Tensor:
    """Blurs queries (B, N, C) of ``height`` x ``width`` pixels with a Gaussian; above a ``sigma`` of 9999 by their mean."""
    if sigma > 9999:
        return query.mean(dim=1, keepdim=True).expand_as(query)
    pixels = query.transpose(1, 2).unflatten(2, (height, width))  # (B, C, h, w)
    for dim, size in ((2, height), (3, width)):
        radius = min(int(3 * sigma) or 1, size - 1)
        offsets = torch.arange(-radius, radius + 1, device=query.device, dtype=torch.float32)
        line = torch.exp(-0.5 * (offsets / sigma) ** 2)
        line = (line / line.sum()).to(query.dtype)
        shape = [1, 1, 1, 1]
        shape[dim] = len(line)
        pad = (0, 0, radius, radius) if dim == 2 else (radius, radius, 0, 0)
        kernel = line.view(shape).expand(pixels.shape[1], 1, -1, -1)
        pixels = F.conv2d(F.pad(pixels, pad, mode="reflect"), kernel, groups=pixels.shape[1])
    return pixels.flatten(2).transpose(1, 2)
