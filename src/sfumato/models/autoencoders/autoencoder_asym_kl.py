"""Autoencoder for inpainting whose larger decoder sees the unmasked part of the picture (Asymmetric VQGAN, arXiv:2306.04632)."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import nn

from ...random import Generators
from ..layers.compute import pixels_last
from ..layers.resnet import activate
from .distribution import DiagonalGaussianDistribution
from .outputs import AutoencoderKLOutput, DecoderOutput
from .vae import Autoencoder, Coder, Layers, RunBlock, call_block, check_input

Features = dict[torch.Size, torch.Tensor]


class MaskConditionEncoder(nn.Module):
    """Features of the unmasked picture, one per resolution of the decoder (figure 3), whose ``widths`` are given."""

    def __init__(self, in_channels: int, widths: Sequence[int]) -> None:
        super().__init__()
        layers, width = [], min(widths[0], widths[-1])
        for level in range(5):
            # two layers at full resolution, then three that halve it
            size: Any = {"kernel_size": 3} if level < 2 else {"kernel_size": 4, "stride": 2}
            layers.append(nn.Conv2d(in_channels, width, padding=1, **size))
            in_channels, width = width, min(2 * width, widths[-1])
        self.layers = nn.Sequential(*layers)

    def forward(self, x: torch.Tensor) -> Features:
        """``(B, C, H, W)`` -> features by their shape."""
        features: Features = {}
        for layer in self.layers:
            x = layer(x)
            features[x.shape] = x
            x = F.relu(x)
        return features


class MaskConditionDecoder(Coder):
    """A decoder that takes the features of the picture wherever the mask is 0."""

    def __init__(self, channels: tuple[int, int], kinds: Sequence[str], widths: Sequence[int], count: int, layers: Layers) -> None:
        super().__init__(False, channels, kinds, widths, count, layers, True)
        self.condition_encoder = MaskConditionEncoder(channels[1], widths[::-1])

    def forward(  # type: ignore[override]
        self, z: torch.Tensor, image: torch.Tensor | None, mask: torch.Tensor | None, run: RunBlock = call_block
    ) -> torch.Tensor:
        """``z`` (B, L, h, w), ``image`` (B, C, H, W), ``mask`` (B, 1, H, W) -> (B, C, H, W)."""
        if image is None or mask is None:
            return super().forward(z, run=run)
        features = self.condition_encoder((1 - mask) * image)
        x = run(self.mid_block, self.conv_in(pixels_last(z)))
        for block in self.up_blocks:
            x = run(block, _fill(x, features, mask))
        return self.conv_out(activate(self.conv_act, self.conv_norm_out(_fill(x, features, mask))))


def _fill(x: torch.Tensor, features: Features, mask: torch.Tensor) -> torch.Tensor:
    """Keeps ``x`` where the mask is 1 and takes the picture's features where it is 0."""
    known = features.get(x.shape)
    if known is None:
        raise ValueError(
            f"the mask encoder gives no features of shape {tuple(x.shape)}, only {[tuple(s) for s in features]}: "
            "image must be the decoded size, and up_block_out_channels four widths that double up to the last"
        )
    mask = F.interpolate(mask, size=x.shape[-2:], mode="nearest")
    return x * mask + known * (1 - mask)


class AsymmetricAutoencoderKL(Autoencoder):
    """Variational autoencoder with a larger decoder that keeps the unmasked part of a picture (arXiv:2306.04632).

    Args:
        in_channels, out_channels, latent_channels: Of the picture, of the decoded picture, of the latents.
        down_block_types, down_block_out_channels, layers_per_down_block: Block, width, residual blocks of the encoder's levels.
        up_block_types, up_block_out_channels, layers_per_up_block: The same of the decoder, which has one residual block more.
        act_fn, norm_num_groups: Activation name; groups of the normalisations.
        sample_size, scaling_factor: For pipelines.

    Raises:
        ValueError: A block type is unknown, or the numbers of block types and widths differ.
    """

    def __init__(
        self, in_channels: int = 3, out_channels: int = 3, down_block_types: tuple[str, ...] = ("DownEncoderBlock2D",),
        down_block_out_channels: tuple[int, ...] = (64,), layers_per_down_block: int = 1,
        up_block_types: tuple[str, ...] = ("UpDecoderBlock2D",), up_block_out_channels: tuple[int, ...] = (64,),
        layers_per_up_block: int = 1, act_fn: str = "silu", latent_channels: int = 4, norm_num_groups: int = 32,
        sample_size: int = 32, scaling_factor: float = 0.18215,
    ) -> None:  # fmt: skip
        super().__init__()
        layers, ends = Layers(norm_num_groups, act_fn), ((in_channels, 2 * latent_channels), (latent_channels, out_channels))
        self.encoder = Coder(True, ends[0], down_block_types, down_block_out_channels, layers_per_down_block, layers, True)
        self.decoder = MaskConditionDecoder(ends[1], up_block_types, up_block_out_channels[::-1], layers_per_up_block + 1, layers)
        self.quant_conv = nn.Conv2d(2 * latent_channels, 2 * latent_channels, 1)
        self.post_quant_conv = nn.Conv2d(latent_channels, latent_channels, 1)
        self.register_to_config(block_out_channels=list(up_block_out_channels), force_upcast=False)

    def _encode(self, x: torch.Tensor) -> AutoencoderKLOutput:
        return AutoencoderKLOutput(DiagonalGaussianDistribution(self._features(x)))

    def decode(
        self, z: torch.Tensor, generator: torch.Generator | None = None, image: torch.Tensor | None = None,
        mask: torch.Tensor | None = None, return_dict: bool = True,
    ) -> DecoderOutput | tuple[torch.Tensor]:  # fmt: skip
        """Decodes latents ``z`` (B, L, h, w), the scaling undone, keeping what the mask leaves of a picture.

        Args:
            generator: Taken for the sake of a common call; decoding draws nothing.
            image: Picture in -1..1, ``(B, C, H, W)``; without it, or without ``mask``, decoding is plain.
            mask: ``(B, 1, H, W)``: 1 where the latents decide, 0 where ``image`` is kept.

        Returns:
            Pictures about -1..1, ``(B, C, h*f, w*f)``.
        """
        check_input(z, "z", self.config.latent_channels)
        sample = self.decoder(self.post_quant_conv(z), image, mask, run=self.run_block)
        return DecoderOutput(sample) if return_dict else (sample,)

    def forward(
        self, sample: torch.Tensor, mask: torch.Tensor | None = None, sample_posterior: bool = False, return_dict: bool = True,
        generator: Generators = None,
    ) -> DecoderOutput | tuple[torch.Tensor]:  # fmt: skip
        """Encodes and decodes pictures, which themselves are what ``mask`` keeps, as in :meth:`decode`.

        ``sample_posterior`` draws the latents rather than take their mean.
        """
        posterior = self.encode(sample)[0]
        z = posterior.sample(generator) if sample_posterior else posterior.mode()
        return self.decode(z, image=sample, mask=mask, return_dict=return_dict)
