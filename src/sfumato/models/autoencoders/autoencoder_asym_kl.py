"""Autoencoder for inpainting whose larger decoder sees the unmasked part of the picture (Asymmetric VQGAN, arXiv:2306.04632)."""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import nn

from ...random import Generators
from ..base import ModelMixin
from ..layers.attention import upgrade_attention_names
from ..layers.resnet import activate
from .distribution import DiagonalGaussianDistribution
from .outputs import AutoencoderKLOutput, DecoderOutput
from .vae import Decoder, Encoder, RunBlock, call_block, check_input

Features = dict[torch.Size, torch.Tensor]


class MaskConditionEncoder(nn.Module):
    """Features of the unmasked picture, one per resolution of the decoder (figure 3).

    Args:
        in_channels: Channels of the picture.
        widths: Width of each level of the decoder, highest resolution first.
    """

    def __init__(self, in_channels: int, widths: Sequence[int]) -> None:
        super().__init__()
        layers = []
        width = min(widths[0], widths[-1])
        for level in range(5):
            # two layers at full resolution, then three that halve it
            layers.append(
                nn.Conv2d(in_channels, width, 3, padding=1) if level < 2 else nn.Conv2d(in_channels, width, 4, stride=2, padding=1)
            )
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


class MaskConditionDecoder(Decoder):
    """A decoder that takes the features of the picture wherever the mask is 0."""

    def __init__(
        self,
        in_channels: int,
        out_channels: int,
        up_block_types: Sequence[str],
        block_out_channels: Sequence[int],
        layers_per_block: int = 2,
        norm_num_groups: int = 32,
        act_fn: str = "silu",
    ) -> None:
        super().__init__(in_channels, out_channels, up_block_types, block_out_channels, layers_per_block, norm_num_groups, act_fn)
        self.condition_encoder = MaskConditionEncoder(out_channels, block_out_channels)

    def forward(  # type: ignore[override]
        self, z: torch.Tensor, image: torch.Tensor | None = None, mask: torch.Tensor | None = None, run: RunBlock = call_block
    ) -> torch.Tensor:
        """``z`` (B, L, h, w), ``image`` (B, C, H, W), ``mask`` (B, 1, H, W) -> (B, C, H, W)."""
        if image is None or mask is None:
            return super().forward(z, run=run)
        features = self.condition_encoder((1 - mask) * image)
        x = run(self.mid_block, self.conv_in(z))
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


class AsymmetricAutoencoderKL(ModelMixin):
    """Variational autoencoder with a larger decoder that keeps the unmasked part of a picture (arXiv:2306.04632).

    Args:
        in_channels: Channels of the picture.
        out_channels: Channels of the decoded picture.
        down_block_types: Block of each level of the encoder.
        down_block_out_channels: Width of each level of the encoder.
        layers_per_down_block: Residual blocks of each level of the encoder.
        up_block_types: Block of each level of the decoder.
        up_block_out_channels: Width of each level of the decoder.
        layers_per_up_block: Residual blocks of each level of the decoder, less one.
        act_fn: Activation name.
        latent_channels: Channels of the latents.
        norm_num_groups: Groups of the normalisations.
        sample_size: Edge of the training pictures.
        scaling_factor: For pipelines: latents times this have unit variance.

    Raises:
        ValueError: A block type is unknown, or the numbers of block types and widths differ.
    """

    def __init__(
        self,
        in_channels: int = 3,
        out_channels: int = 3,
        down_block_types: tuple[str, ...] = ("DownEncoderBlock2D",),
        down_block_out_channels: tuple[int, ...] = (64,),
        layers_per_down_block: int = 1,
        up_block_types: tuple[str, ...] = ("UpDecoderBlock2D",),
        up_block_out_channels: tuple[int, ...] = (64,),
        layers_per_up_block: int = 1,
        act_fn: str = "silu",
        latent_channels: int = 4,
        norm_num_groups: int = 32,
        sample_size: int = 32,
        scaling_factor: float = 0.18215,
    ) -> None:
        super().__init__()
        self.encoder = Encoder(
            in_channels, latent_channels, down_block_types, down_block_out_channels, layers_per_down_block, norm_num_groups, act_fn
        )
        self.decoder = MaskConditionDecoder(
            latent_channels, out_channels, up_block_types, up_block_out_channels, layers_per_up_block, norm_num_groups, act_fn
        )
        self.quant_conv = nn.Conv2d(2 * latent_channels, 2 * latent_channels, 1)
        self.post_quant_conv = nn.Conv2d(latent_channels, latent_channels, 1)
        self.register_to_config(block_out_channels=list(up_block_out_channels), force_upcast=False)

    @classmethod
    def upgrade_state_dict(cls, tensors: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
        """Renames the attention projections of early checkpoints."""
        return upgrade_attention_names(tensors)

    def encode(self, x: torch.Tensor, return_dict: bool = True) -> AutoencoderKLOutput | tuple[DiagonalGaussianDistribution]:
        """Encodes pictures.

        Args:
            x: Pictures in -1..1, ``(B, C, H, W)``.
            return_dict: Return an output object rather than a tuple.

        Returns:
            The distribution of the latents ``(B, L, H/f, W/f)``.
        """
        check_input(x, "x", self.config.in_channels)
        posterior = DiagonalGaussianDistribution(self.quant_conv(self.encoder(x, self.run_block)))
        return AutoencoderKLOutput(posterior) if return_dict else (posterior,)

    def decode(
        self,
        z: torch.Tensor,
        generator: torch.Generator | None = None,
        image: torch.Tensor | None = None,
        mask: torch.Tensor | None = None,
        return_dict: bool = True,
    ) -> DecoderOutput | tuple[torch.Tensor]:
        """Decodes latents, keeping what the mask leaves of a picture.

        Args:
            z: Latents ``(B, L, h, w)``, with the scaling undone.
            generator: Taken for the sake of a common call; decoding draws nothing.
            image: Picture in -1..1, ``(B, C, H, W)``; without it, or without ``mask``, decoding is plain.
            mask: ``(B, 1, H, W)``: 1 where the latents decide, 0 where ``image`` is kept.
            return_dict: Return an output object rather than a tuple.

        Returns:
            Pictures about -1..1, ``(B, C, h*f, w*f)``.
        """
        check_input(z, "z", self.config.latent_channels)
        sample = self.decoder(self.post_quant_conv(z), image, mask, run=self.run_block)
        return DecoderOutput(sample) if return_dict else (sample,)

    def forward(
        self,
        sample: torch.Tensor,
        mask: torch.Tensor | None = None,
        sample_posterior: bool = False,
        return_dict: bool = True,
        generator: Generators = None,
    ) -> DecoderOutput | tuple[torch.Tensor]:
        """Encodes and decodes, the latter with ``sample`` itself as the picture to keep.

        Args:
            sample: Pictures in -1..1, ``(B, C, H, W)``.
            mask: As in :meth:`decode`.
            sample_posterior: Draw the latents rather than take their mean.
            return_dict: Return an output object rather than a tuple.
            generator: Source of the draw.
        """
        posterior = self.encode(sample)[0]
        z = posterior.sample(generator) if sample_posterior else posterior.mode()
        return self.decode(z, image=sample, mask=mask, return_dict=return_dict)
