"""Autoencoder with quantised latents (VQ-VAE, arXiv:1711.00937; VQGAN, arXiv:2012.09841; MoVQ, arXiv:2209.09002)."""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import nn

from .outputs import DecoderOutput, VQEncoderOutput
from .vae import Autoencoder, Coder, Layers, check_input


class VectorQuantizer(nn.Module):
    """Replaces each latent vector by the nearest entry of a codebook.

    Args:
        n_e: Entries of the codebook.
        vq_embed_dim: Channels of an entry.
        beta: Weight of the loss term that moves the codebook; the term that moves the latents has weight 1.
    """

    def __init__(self, n_e: int, vq_embed_dim: int, beta: float = 0.25) -> None:
        super().__init__()
        self.beta = beta
        self.embedding = nn.Embedding(n_e, vq_embed_dim)
        nn.init.uniform_(self.embedding.weight, -1.0 / n_e, 1.0 / n_e)

    def forward(self, z: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """Quantises latents ``(B, C, h, w)``.

        Returns:
            The codebook's entries ``(B, C, h, w)``, whose gradient goes straight to ``z``; the loss; the indices ``(B*h*w,)``.
        """
        pixels = z.permute(0, 2, 3, 1)  # (B, h, w, C)
        indices = torch.cdist(pixels.flatten(0, 2), self.embedding.weight).argmin(dim=1)
        entries = self.get_codebook_entry(indices, pixels.shape)
        loss = F.mse_loss(z, entries.detach()) + self.beta * F.mse_loss(entries, z.detach())
        return z + (entries - z).detach(), loss, indices

    def get_codebook_entry(self, indices: torch.Tensor, shape: Sequence[int]) -> torch.Tensor:
        """``B*h*w`` indices, in any form, and ``shape`` (B, h, w, C) -> entries ``(B, C, h, w)``."""
        return self.embedding(indices).view(tuple(shape)).permute(0, 3, 1, 2).contiguous()


class VQModel(Autoencoder):
    """Autoencoder with quantised latents.

    Args:
        in_channels, out_channels, latent_channels: Of the picture, of the decoded picture, of the latents.
        down_block_types, up_block_types, block_out_channels: Of each level; each but the last halves the resolution.
        layers_per_block: Residual blocks of each level of the encoder; the decoder has one more.
        act_fn, norm_num_groups: Activation name; groups of the normalisations.
        sample_size, scaling_factor, force_upcast: For pipelines.
        num_vq_embeddings, vq_embed_dim: Entries of the codebook; their channels, ``latent_channels`` when not given.
        norm_type: Of the decoder: ``"group"``, or ``"spatial"``: the quantised latents take part in every normalisation.
        mid_block_add_attention: Attention at the lowest resolution.
        lookup_from_codebook: :meth:`decode` with ``force_not_quantize`` takes indices.

    Raises:
        ValueError: A block type or ``norm_type`` is unknown, or the numbers of block types and widths differ.
    """

    def __init__(
        self, in_channels: int = 3, out_channels: int = 3, down_block_types: tuple[str, ...] = ("DownEncoderBlock2D",),
        up_block_types: tuple[str, ...] = ("UpDecoderBlock2D",), block_out_channels: tuple[int, ...] = (64,),
        layers_per_block: int = 1, act_fn: str = "silu", latent_channels: int = 3, sample_size: int = 32,
        num_vq_embeddings: int = 256, norm_num_groups: int = 32, vq_embed_dim: int | None = None, scaling_factor: float = 0.18215,
        norm_type: str = "group", mid_block_add_attention: bool = True, lookup_from_codebook: bool = False,
        force_upcast: bool = False,
    ) -> None:  # fmt: skip
        super().__init__()
        embed = vq_embed_dim or latent_channels
        if norm_type not in ("group", "spatial"):
            raise ValueError(f"norm_type={norm_type!r}: expected 'group' or 'spatial'")
        layers, add = Layers(norm_num_groups, act_fn), mid_block_add_attention
        spatial = Layers(norm_num_groups, act_fn, latent_channels) if norm_type == "spatial" else layers
        ends, widths = ((in_channels, latent_channels), (latent_channels, out_channels)), block_out_channels
        self.encoder = Coder(True, ends[0], down_block_types, widths, layers_per_block, layers, add)
        self.decoder = Coder(False, ends[1], up_block_types, widths[::-1], layers_per_block + 1, spatial, add)
        self.quant_conv = nn.Conv2d(latent_channels, embed, 1)
        self.quantize = VectorQuantizer(num_vq_embeddings, embed)
        self.post_quant_conv = nn.Conv2d(embed, latent_channels, 1)

    def _encode(self, x: torch.Tensor) -> VQEncoderOutput:
        return VQEncoderOutput(self._features(x))

    def decode(
        self, h: torch.Tensor, force_not_quantize: bool = False, return_dict: bool = True, shape: Sequence[int] | None = None
    ) -> DecoderOutput | tuple[torch.Tensor, torch.Tensor]:
        """Quantises and decodes latents.

        Args:
            h: Latents ``(B, E, h, w)``; with ``force_not_quantize`` and ``lookup_from_codebook`` indices ``(B, h, w)``.
            force_not_quantize: The latents are entries of the codebook, or indices, already.
            shape: ``(B, h, w, E)``, for indices.

        Returns:
            Pictures about -1..1, ``(B, C, h*f, w*f)``, and the quantiser's loss (zeros ``(B,)`` when it had nothing to do).
        """
        embed = self.config.vq_embed_dim or self.config.latent_channels
        if force_not_quantize and self.config.lookup_from_codebook:
            if shape is None:
                raise ValueError("shape=None: to decode indices pass shape=(batch, height, width, channels) of the latents")
            quantised = self.quantize.get_codebook_entry(h, shape)
            loss = quantised.new_zeros(shape[0])
        else:
            check_input(h, "h", embed)
            quantised, loss = h, h.new_zeros(h.shape[0])
            if not force_not_quantize:
                quantised, loss, _ = self.quantize(h)
        extra = (quantised,) if self.config.norm_type == "spatial" else ()
        sample = self.decoder(self.post_quant_conv(quantised), *extra, run=self.run_block)
        return DecoderOutput(sample, loss) if return_dict else (sample, loss)

    def forward(self, sample: torch.Tensor, return_dict: bool = True) -> DecoderOutput | tuple[torch.Tensor, torch.Tensor]:
        """Encodes, quantises and decodes pictures in -1..1, ``(B, C, H, W)``."""
        return self.decode(self.encode(sample)[0], return_dict=return_dict)
