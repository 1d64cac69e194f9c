"""The variational autoencoder of latent diffusion (arXiv:2112.10752, section 3.1), of Stable Diffusion, SDXL, SD3 and FLUX."""

from __future__ import annotations

import torch
from torch import nn

from ...random import Generators
from ..base import ModelMixin
from ..layers.attention import upgrade_attention_names
from .distribution import DiagonalGaussianDistribution
from .outputs import AutoencoderKLOutput, DecoderOutput
from .tiling import TilingMixin, tile_and_fade
from .vae import Decoder, Encoder, check_input


class AutoencoderKL(ModelMixin, TilingMixin):
    """Variational autoencoder: pictures to a normal distribution of latents and back.

    Args:
        in_channels: Channels of the picture.
        out_channels: Channels of the decoded picture.
        down_block_types: Block of each level of the encoder.
        up_block_types: Block of each level of the decoder.
        block_out_channels: Width of each level; each level but the last halves the resolution.
        layers_per_block: Residual blocks of each level of the encoder; the decoder has one more.
        act_fn: Activation name.
        latent_channels: Channels of the latents.
        norm_num_groups: Groups of the normalisations.
        sample_size: Edge of the training pictures; the edge of a tile when tiling.
        scaling_factor: For pipelines: latents times this have unit variance.
        shift_factor: For pipelines: subtracted from latents before scaling.
        latents_mean: For pipelines: mean of each latent channel.
        latents_std: For pipelines: standard deviation of each latent channel.
        force_upcast: For pipelines: whether float16 overflows.
        use_quant_conv: Mix the channels of mean and log-variance by a 1x1 convolution.
        use_post_quant_conv: Mix the channels of the latents before decoding.
        mid_block_add_attention: Attention at the lowest resolution.

    Raises:
        ValueError: A block type is unknown, or the numbers of block types and widths differ.
    """

    def __init__(
        self,
        in_channels: int = 3,
        out_channels: int = 3,
        down_block_types: tuple[str, ...] = ("DownEncoderBlock2D",),
        up_block_types: tuple[str, ...] = ("UpDecoderBlock2D",),
        block_out_channels: tuple[int, ...] = (64,),
        layers_per_block: int = 1,
        act_fn: str = "silu",
        latent_channels: int = 4,
        norm_num_groups: int = 32,
        sample_size: int = 32,
        scaling_factor: float = 0.18215,
        shift_factor: float | None = None,
        latents_mean: tuple[float, ...] | None = None,
        latents_std: tuple[float, ...] | None = None,
        force_upcast: bool = True,
        use_quant_conv: bool = True,
        use_post_quant_conv: bool = True,
        mid_block_add_attention: bool = True,
    ) -> None:
        super().__init__()
        self.encoder = Encoder(
            in_channels,
            latent_channels,
            down_block_types,
            block_out_channels,
            layers_per_block,
            norm_num_groups,
            act_fn,
            mid_block_add_attention=mid_block_add_attention,
        )
        self.decoder = Decoder(
            latent_channels,
            out_channels,
            up_block_types,
            block_out_channels,
            layers_per_block,
            norm_num_groups,
            act_fn,
            mid_block_add_attention=mid_block_add_attention,
        )
        self.quant_conv = nn.Conv2d(2 * latent_channels, 2 * latent_channels, 1) if use_quant_conv else None
        self.post_quant_conv = nn.Conv2d(latent_channels, latent_channels, 1) if use_post_quant_conv else None
        edge = sample_size[0] if isinstance(sample_size, (list, tuple)) else sample_size
        self.tile_sample_min_size = edge
        self.tile_latent_min_size = edge // 2 ** (len(block_out_channels) - 1)
        self.tile_overlap_factor = 0.25

    @classmethod
    def upgrade_state_dict(cls, tensors: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
        """Renames the attention projections of early checkpoints."""
        return upgrade_attention_names(tensors)

    def _encode_piece(self, x: torch.Tensor) -> torch.Tensor:
        moments = self.encoder(x, self.run_block)
        return moments if self.quant_conv is None else self.quant_conv(moments)

    def _decode_piece(self, z: torch.Tensor) -> torch.Tensor:
        return self.decoder(z if self.post_quant_conv is None else self.post_quant_conv(z), run=self.run_block)

    def _encode(self, x: torch.Tensor) -> torch.Tensor:
        return self._tiled_encode(x) if self.use_tiling and max(x.shape[-2:]) > self.tile_sample_min_size else self._encode_piece(x)

    def _decode(self, z: torch.Tensor) -> torch.Tensor:
        return self._tiled_decode(z) if self.use_tiling and max(z.shape[-2:]) > self.tile_latent_min_size else self._decode_piece(z)

    def _tiled_encode(self, x: torch.Tensor) -> torch.Tensor:
        tile, latent = self.tile_sample_min_size, self.tile_latent_min_size
        step, fade = int(tile * (1 - self.tile_overlap_factor)), int(latent * self.tile_overlap_factor)
        return tile_and_fade(x, self._encode_piece, tile, step, fade, latent - fade)

    def _tiled_decode(self, z: torch.Tensor) -> torch.Tensor:
        tile, latent = self.tile_sample_min_size, self.tile_latent_min_size
        step, fade = int(latent * (1 - self.tile_overlap_factor)), int(tile * self.tile_overlap_factor)
        return tile_and_fade(z, self._decode_piece, latent, step, fade, tile - fade)

    def encode(self, x: torch.Tensor, return_dict: bool = True) -> AutoencoderKLOutput | tuple[DiagonalGaussianDistribution]:
        """Encodes pictures.

        Args:
            x: Pictures in -1..1, ``(B, C, H, W)``.
            return_dict: Return an output object rather than a tuple.

        Returns:
            The distribution of the latents ``(B, L, H/f, W/f)``.
        """
        check_input(x, "x", self.config.in_channels)
        posterior = DiagonalGaussianDistribution(self.sliced(self._encode, x))
        return AutoencoderKLOutput(posterior) if return_dict else (posterior,)

    def decode(
        self, z: torch.Tensor, return_dict: bool = True, generator: torch.Generator | None = None
    ) -> DecoderOutput | tuple[torch.Tensor]:
        """Decodes latents.

        Args:
            z: Latents ``(B, L, h, w)``, with the scaling undone.
            return_dict: Return an output object rather than a tuple.
            generator: Taken for the sake of a common call; decoding draws nothing.

        Returns:
            Pictures about -1..1, ``(B, C, h*f, w*f)``.
        """
        check_input(z, "z", self.config.latent_channels)
        sample = self.sliced(self._decode, z)
        return DecoderOutput(sample) if return_dict else (sample,)

    def tiled_encode(self, x: torch.Tensor, return_dict: bool = True) -> AutoencoderKLOutput | tuple[DiagonalGaussianDistribution]:
        """Encodes pictures in tiles, whatever their size; see :meth:`encode`."""
        check_input(x, "x", self.config.in_channels)
        posterior = DiagonalGaussianDistribution(self._tiled_encode(x))
        return AutoencoderKLOutput(posterior) if return_dict else (posterior,)

    def tiled_decode(self, z: torch.Tensor, return_dict: bool = True) -> DecoderOutput | tuple[torch.Tensor]:
        """Decodes latents in tiles, whatever their size; see :meth:`decode`."""
        check_input(z, "z", self.config.latent_channels)
        sample = self._tiled_decode(z)
        return DecoderOutput(sample) if return_dict else (sample,)

    def forward(
        self, sample: torch.Tensor, sample_posterior: bool = False, return_dict: bool = True, generator: Generators = None
    ) -> DecoderOutput | tuple[torch.Tensor]:
        """Encodes and decodes.

        Args:
            sample: Pictures in -1..1, ``(B, C, H, W)``.
            sample_posterior: Draw the latents rather than take their mean.
            return_dict: Return an output object rather than a tuple.
            generator: Source of the draw.
        """
        posterior = self.encode(sample)[0]
        return self.decode(posterior.sample(generator) if sample_posterior else posterior.mode(), return_dict=return_dict)
