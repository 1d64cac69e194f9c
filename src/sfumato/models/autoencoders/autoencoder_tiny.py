"""Tiny autoencoder (TAESD, github.com/madebyollin/taesd): a small distilled stand-in for the full one, for previews and speed."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import nn

from ..layers.compute import Conv2d, pixels_last
from ..layers.resnet import activate, activation
from .outputs import AutoencoderTinyOutput, DecoderOutput
from .tiling import TilingMixin, tile_and_paste
from .vae import Autoencoder, RunBlock, call_block, check_input


class AutoencoderTinyBlock(nn.Module):
    """Three convolutions with a skip connection around them."""

    def __init__(self, channels: int, act_fn: str) -> None:
        super().__init__()
        layers: list[nn.Module] = []
        for _ in range(3):
            layers += [Conv2d(channels, channels, 3, padding=1), activation(act_fn)]
        self.conv = nn.Sequential(*layers[:-1])
        self.fuse = nn.ReLU()

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """``(B, C, H, W)`` -> the same."""
        h = x
        for layer in self.conv:
            h = layer(h) if isinstance(layer, Conv2d) else activate(layer, h)
        return activate(self.fuse, h + x)


class _TinyStack(nn.Module):
    def __init__(self, layers: list[nn.Module]) -> None:
        super().__init__()
        self.layers = nn.Sequential(*layers)

    def forward(self, x: torch.Tensor, run: RunBlock = call_block) -> torch.Tensor:
        x = pixels_last(x)
        for layer in self.layers:
            x = run(layer, x)
        return x


class EncoderTiny(_TinyStack):
    """Picture in -1..1, ``(B, C, H, W)`` -> latents ``(B, L, H/f, W/f)``."""

    def __init__(self, in_channels: int, out_channels: int, num_blocks: Sequence[int], widths: Sequence[int], act_fn: str) -> None:
        layers: list[nn.Module] = [Conv2d(in_channels, widths[0], 3, padding=1)]
        for level, (count, width) in enumerate(zip(num_blocks, widths, strict=True)):
            if level:
                layers.append(Conv2d(width, width, 3, stride=2, padding=1, bias=False))
            layers += [AutoencoderTinyBlock(width, act_fn) for _ in range(count)]
        super().__init__([*layers, Conv2d(widths[-1], out_channels, 3, padding=1)])

    def forward(self, x: torch.Tensor, run: RunBlock = call_block) -> torch.Tensor:
        """The layers work on pictures in 0..1."""
        return super().forward(x.add(1).div(2), run)


class DecoderTiny(_TinyStack):
    """Latents ``(B, L, h, w)`` -> picture in -1..1, ``(B, C, h*f, w*f)``."""

    def __init__(
        self, in_channels: int, out_channels: int, num_blocks: Sequence[int], widths: Sequence[int], act_fn: str, factor: int,
        upsample_fn: str,
    ) -> None:  # fmt: skip
        layers: list[nn.Module] = [Conv2d(in_channels, widths[0], 3, padding=1), activation(act_fn)]
        for level, (count, width) in enumerate(zip(num_blocks, widths, strict=True)):
            last = level == len(num_blocks) - 1
            layers += [AutoencoderTinyBlock(width, act_fn) for _ in range(count)]
            if not last:
                layers.append(nn.Upsample(scale_factor=factor, mode=upsample_fn))
            layers.append(Conv2d(width, out_channels if last else width, 3, padding=1, bias=last))
        super().__init__(layers)

    def forward(self, x: torch.Tensor, run: RunBlock = call_block) -> torch.Tensor:
        """Latents are squeezed softly into -3..3 first."""
        return super().forward(torch.tanh(x / 3) * 3, run).mul(2).sub(1)


class AutoencoderTiny(Autoencoder, TilingMixin):
    """Tiny autoencoder: its latents are near those of the full one, at a hundredth of the cost.

    Args:
        in_channels, out_channels, latent_channels: Of the picture, of the decoded picture, of the latents.
        encoder_block_out_channels, decoder_block_out_channels: Width of each level; equal widths.
        act_fn: Activation inside the blocks.
        upsample_fn, upsampling_scaling_factor: Interpolation (``"nearest"``, ``"bilinear"``) and enlargement between levels.
        num_encoder_blocks, num_decoder_blocks: Blocks of each level.
        latent_magnitude, latent_shift: :meth:`scale_latents` maps -magnitude..magnitude to 0..1, with this shift.
        force_upcast, scaling_factor, shift_factor: For pipelines.

    Raises:
        ValueError: The numbers of blocks and of widths differ.
    """

    def __init__(
        self, in_channels: int = 3, out_channels: int = 3, encoder_block_out_channels: tuple[int, ...] = (64, 64, 64, 64),
        decoder_block_out_channels: tuple[int, ...] = (64, 64, 64, 64), act_fn: str = "relu", upsample_fn: str = "nearest",
        latent_channels: int = 4, upsampling_scaling_factor: int = 2, num_encoder_blocks: tuple[int, ...] = (1, 3, 3, 3),
        num_decoder_blocks: tuple[int, ...] = (3, 3, 3, 1), latent_magnitude: int = 3, latent_shift: float = 0.5,
        force_upcast: bool = False, scaling_factor: float = 1.0, shift_factor: float = 0.0,
    ) -> None:  # fmt: skip
        super().__init__()
        for part, widths, blocks in (
            ("encoder", encoder_block_out_channels, num_encoder_blocks),
            ("decoder", decoder_block_out_channels, num_decoder_blocks),
        ):
            if len(widths) != len(blocks) or len(set(widths)) != 1:
                raise ValueError(
                    f"{part}_block_out_channels={tuple(widths)} with num_{part}_blocks={tuple(blocks)}: "
                    "expected as many widths as numbers of blocks, and equal widths"
                )
        self.encoder = EncoderTiny(in_channels, latent_channels, num_encoder_blocks, encoder_block_out_channels, act_fn)
        widths, factor = decoder_block_out_channels, upsampling_scaling_factor
        self.decoder = DecoderTiny(latent_channels, out_channels, num_decoder_blocks, widths, act_fn, factor, upsample_fn)
        self.register_to_config(block_out_channels=list(decoder_block_out_channels))
        self.spatial_scale_factor = 2 ** (len(encoder_block_out_channels) - 1)
        self.tile_overlap_factor = 0.125
        self.tile_sample_min_size = 512
        self.tile_latent_min_size = self.tile_sample_min_size // self.spatial_scale_factor

    def scale_latents(self, x: torch.Tensor) -> torch.Tensor:
        """Maps raw latents to 0..1, for storage as a picture."""
        return x.div(2 * self.config.latent_magnitude).add(self.config.latent_shift).clamp(0, 1)

    def unscale_latents(self, x: torch.Tensor) -> torch.Tensor:
        """Maps 0..1 back to raw latents."""
        return x.sub(self.config.latent_shift).mul(2 * self.config.latent_magnitude)

    def _encode(self, x: torch.Tensor) -> AutoencoderTinyOutput:
        return AutoencoderTinyOutput(self.sliced(self._latents, x))

    def _latents(self, x: torch.Tensor) -> torch.Tensor:
        tile, scale = self.tile_sample_min_size, self.spatial_scale_factor
        if not self.use_tiling:
            return self.encoder(x, self.run_block)
        return tile_and_paste(x, self.encoder, tile, int(tile * self.tile_overlap_factor), lambda size: -(-size // scale))

    def _picture(self, z: torch.Tensor) -> torch.Tensor:
        tile, scale = self.tile_latent_min_size, self.spatial_scale_factor
        if not self.use_tiling:
            return self.decoder(z, self.run_block)
        return tile_and_paste(z, self.decoder, tile, int(tile * self.tile_overlap_factor), lambda size: size * scale)

    def decode(
        self, x: torch.Tensor, generator: torch.Generator | None = None, return_dict: bool = True
    ) -> DecoderOutput | tuple[torch.Tensor]:
        """Decodes latents ``x`` (B, L, h, w) into pictures about -1..1, ``(B, C, h*f, w*f)``.

        ``generator`` is taken for the sake of a common call; decoding draws nothing.
        """
        check_input(x, "x", self.config.latent_channels)
        sample = self.sliced(self._picture, x)
        return DecoderOutput(sample) if return_dict else (sample,)

    def forward(self, sample: torch.Tensor, return_dict: bool = True) -> DecoderOutput | tuple[torch.Tensor]:
        """Encodes pictures, rounds the latents to bytes as when they are kept as a picture, and decodes."""
        latents = self.encode(sample).latents
        stored = self.scale_latents(latents).mul(255).round().byte()
        return self.decode(self.unscale_latents(stored.to(latents.dtype) / 255), return_dict=return_dict)
