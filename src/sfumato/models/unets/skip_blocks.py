"""Blocks of score networks that carry the picture itself beside the features (arXiv:2011.13456, appendix C, "NCSN++")."""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import nn

from ..layers.attention import Attention
from .blocks import Conditions, Kind, Level, Shared, make_resnet, pixel_attention
from .k_blocks import BinomialResample


def _groups(channels: int) -> int:
    return min(channels // 4, 32)


def _skip_resnet(shared: Shared, in_channels: int, out_channels: int, groups: int | None = None, **options: bool) -> nn.Module:
    norms = {"groups": groups or _groups(in_channels), "groups_out": _groups(out_channels)}
    resnet = make_resnet(shared, in_channels, out_channels, math.sqrt(2.0), **norms, **options)
    if options:
        resnet.resample = BinomialResample(up=bool(options.get("up")), padding="constant")
    return resnet


def _skip_attention(channels: int, level: Level, shared: Shared) -> Attention:
    return pixel_attention(channels, level.head_dim, 32, shared.norm_eps, rescale_output_factor=math.sqrt(2.0))


class SkipDownBlock(nn.Module):
    """Layers, then halving, with the halved picture added through a 1x1 convolution."""

    carries_picture = True

    def __init__(
        self, kind: Kind, shared: Shared, level: Level, in_channels: int, out_channels: int, layers: int, resample: bool
    ) -> None:
        super().__init__()
        self.resnets = nn.ModuleList(_skip_resnet(shared, out_channels if i else in_channels, out_channels) for i in range(layers))
        self.attentions: nn.ModuleList | None = None
        if kind.attention is not None:
            self.attentions = nn.ModuleList(_skip_attention(out_channels, level, shared) for _ in range(layers))
        self.state_channels = [out_channels] * (layers + resample)
        self.resnet_down: nn.Module | None = None
        if resample:
            self.resnet_down = _skip_resnet(shared, out_channels, out_channels, down=True, use_in_shortcut=True)
            self.downsamplers = nn.ModuleList([BinomialResample(up=False, padding="constant")])
            self.skip_conv = nn.Conv2d(3, out_channels, 1)

    def forward(
        self, x: torch.Tensor, c: Conditions, picture: torch.Tensor
    ) -> tuple[torch.Tensor, list[torch.Tensor], torch.Tensor]:
        """``x`` (B, C, H, W), ``picture`` (B, 3, H, W) -> both at half the size, and the states for the up blocks."""
        states = []
        for i, resnet in enumerate(self.resnets):
            x = resnet(x, c.activated)
            if self.attentions is not None:
                x = self.attentions[i](x)
            states.append(x)
        if self.resnet_down is not None:
            x = self.resnet_down(x, c.activated)
            picture = self.downsamplers[0](picture)
            x = self.skip_conv(picture) + x
            states.append(x)
        return x, states, picture


class SkipUpBlock(nn.Module):
    """Layers, one attention, then doubling; each block adds a picture made from its features to the doubled one."""

    carries_picture = True
    takes_size = False

    def __init__(
        self, kind: Kind, shared: Shared, level: Level, in_channels: int, out_channels: int, next_channels: int,
        state_channels: Sequence[int], layers: int, resample: bool,
    ) -> None:  # fmt: skip
        super().__init__()
        self.out_channels, self.num_states = out_channels, len(state_channels)
        inputs = [in_channels] + [out_channels] * (layers - 1)
        pairs = list(zip(inputs, state_channels, strict=True))
        # with attention the checkpoints were trained with more groups: 32, but for narrow layers
        groups = [min(i + s // 4, 32) if kind.attention else None for i, s in pairs]
        self.resnets = nn.ModuleList(_skip_resnet(shared, i + s, out_channels, g) for (i, s), g in zip(pairs, groups, strict=True))
        self.attentions: nn.ModuleList | None = None
        if kind.attention is not None:
            self.attentions = nn.ModuleList([_skip_attention(out_channels, level, shared)])
        self.upsampler = BinomialResample(up=True, padding="constant")
        self.resnet_up: nn.Module | None = None
        if resample:
            self.resnet_up = _skip_resnet(shared, out_channels, out_channels, up=True, use_in_shortcut=True)
            self.skip_norm = nn.GroupNorm(_groups(out_channels), out_channels, eps=shared.norm_eps)
            self.skip_conv = nn.Conv2d(out_channels, 3, 3, padding=1)

    def forward(
        self, x: torch.Tensor, states: list[torch.Tensor], c: Conditions, picture: torch.Tensor | None
    ) -> tuple[torch.Tensor, torch.Tensor | None]:
        """``x`` (B, C, H, W), ``picture`` (B, 3, H/2, W/2) or ``None`` -> ``x`` doubled, ``picture`` (B, 3, H, W)."""
        for resnet, state in zip(self.resnets, reversed(states), strict=True):
            x = resnet(torch.cat([x, state], dim=1), c.activated)
        if self.attentions is not None:
            x = self.attentions[0](x)
        if picture is not None:
            picture = self.upsampler(picture)
        if self.resnet_up is not None:
            made = self.skip_conv(F.silu(self.skip_norm(x)))
            picture = made if picture is None else picture + made
            x = self.resnet_up(x, c.activated)
        return x, picture
