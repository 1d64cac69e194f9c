"""The variational autoencoder of latent diffusion (arXiv:2112.10752, section 3.1), of Stable Diffusion, SDXL, SD3 and FLUX."""

from __future__ import annotations

import torch
from torch import nn

from ...random import Generators
from .distribution import DiagonalGaussianDistribution
from .outputs import AutoencoderKLOutput, DecoderOutput
from .tiling import Piece, TilingMixin, tile_and_fade
from .vae import Autoencoder, Coder, Layers, check_input


class AutoencoderKL(Autoencoder, TilingMixin):
    """Variational autoencoder: pictures to a normal distribution of latents and back.

    Args:
        in_channels, out_channels, latent_channels: Of the picture, of the decoded picture, of the latents.
        down_block_types, up_block_types, block_out_channels: Of each level; each but the last halves the resolution.
        layers_per_block: Residual blocks of each level of the encoder; the decoder has one more.
        act_fn, norm_num_groups: Activation name; groups of the normalisations.
        sample_size: Edge of the training pictures; the edge of a tile when tiling.
        scaling_factor, shift_factor, latents_mean, latents_std, force_upcast: For pipelines.
        use_quant_conv, use_post_quant_conv: Mix the channels of the moments, and of the latents, by a 1x1 convolution.
        mid_block_add_attention: Attention at the lowest resolution.

    Raises:
        ValueError: A block type is unknown, or the numbers of block types and widths differ.
    """

    def __init__(
        self, in_channels: int = 3, out_channels: int = 3, down_block_types: tuple[str, ...] = ("DownEncoderBlock2D",),
        up_block_types: tuple[str, ...] = ("UpDecoderBlock2D",), block_out_channels: tuple[int, ...] = (64,),
        layers_per_block: int = 1, act_fn: str = "silu", latent_channels: int = 4, norm_num_groups: int = 32,
        sample_size: int = 32, scaling_factor: float = 0.18215, shift_factor: float | None = None,
        latents_mean: tuple[float, ...] | None = None, latents_std: tuple[float, ...] | None = None, force_upcast: bool = True,
        use_quant_conv: bool = True, use_post_quant_conv: bool = True, mid_block_add_attention: bool = True,
    ) -> None:  # fmt: skip
        super().__init__()
        layers, add = Layers(norm_num_groups, act_fn), mid_block_add_attention
        ends, widths = ((in_channels, 2 * latent_channels), (latent_channels, out_channels)), block_out_channels
        self.encoder = Coder(True, ends[0], down_block_types, widths, layers_per_block, layers, add)
        self.decoder = Coder(False, ends[1], up_block_types, widths[::-1], layers_per_block + 1, layers, add)
        self.quant_conv = nn.Conv2d(2 * latent_channels, 2 * latent_channels, 1) if use_quant_conv else None
        self.post_quant_conv = nn.Conv2d(latent_channels, latent_channels, 1) if use_post_quant_conv else None
        self.tile_sample_min_size = sample_size[0] if isinstance(sample_size, (list, tuple)) else sample_size
        self.tile_latent_min_size = self.tile_sample_min_size // 2 ** (len(widths) - 1)
        self.tile_overlap_factor = 0.25

    def _encode(self, x: torch.Tensor) -> AutoencoderKLOutput:
        tiles = self.use_tiling and max(x.shape[-2:]) > self.tile_sample_min_size
        return AutoencoderKLOutput(DiagonalGaussianDistribution(self.sliced(self._tile_features if tiles else self._features, x)))

    def _picture(self, z: torch.Tensor) -> torch.Tensor:
        return self.decoder(z if self.post_quant_conv is None else self.post_quant_conv(z), run=self.run_block)

    def _tile_features(self, x: torch.Tensor) -> torch.Tensor:
        return self._tiled(x, self._features, self.tile_sample_min_size, self.tile_latent_min_size)

    def _tile_picture(self, z: torch.Tensor) -> torch.Tensor:
        return self._tiled(z, self._picture, self.tile_latent_min_size, self.tile_sample_min_size)

    def _tiled(self, x: torch.Tensor, work: Piece, tile: int, made: int) -> torch.Tensor:
        step, fade = int(tile * (1 - self.tile_overlap_factor)), int(made * self.tile_overlap_factor)
        return tile_and_fade(x, work, tile, step, fade, made - fade)

    def decode(
        self, z: torch.Tensor, return_dict: bool = True, generator: torch.Generator | None = None
    ) -> DecoderOutput | tuple[torch.Tensor]:
        """Decodes latents ``z`` (B, L, h, w), the scaling undone, into pictures about -1..1, ``(B, C, h*f, w*f)``.

        ``generator`` is taken for the sake of a common call; decoding draws nothing.
        """
        check_input(z, "z", self.config.latent_channels)
        tiles = self.use_tiling and max(z.shape[-2:]) > self.tile_latent_min_size
        sample = self.sliced(self._tile_picture if tiles else self._picture, z)
        return DecoderOutput(sample) if return_dict else (sample,)

    def tiled_encode(self, x: torch.Tensor, return_dict: bool = True) -> AutoencoderKLOutput | tuple[DiagonalGaussianDistribution]:
        """Encodes pictures in tiles, whatever their size; see :meth:`encode`."""
        check_input(x, "x", self.config.in_channels)
        posterior = DiagonalGaussianDistribution(self._tile_features(x))
        return AutoencoderKLOutput(posterior) if return_dict else (posterior,)

    def tiled_decode(self, z: torch.Tensor, return_dict: bool = True) -> DecoderOutput | tuple[torch.Tensor]:
        """Decodes latents in tiles, whatever their size; see :meth:`decode`."""
        check_input(z, "z", self.config.latent_channels)
        sample = self._tile_picture(z)
        return DecoderOutput(sample) if return_dict else (sample,)

    def forward(
        self, sample: torch.Tensor, sample_posterior: bool = False, return_dict: bool = True, generator: Generators = None
    ) -> DecoderOutput | tuple[torch.Tensor]:
        """Encodes and decodes pictures; ``sample_posterior`` draws the latents rather than take their mean."""
        posterior = self.encode(sample)[0]
        return self.decode(posterior.sample(generator) if sample_posterior else posterior.mode(), return_dict=return_dict)
