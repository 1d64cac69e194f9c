"""What autoencoders return."""

from __future__ import annotations

from dataclasses import dataclass

import torch

from ...outputs import BaseOutput
from .distribution import DiagonalGaussianDistribution


@dataclass
class AutoencoderKLOutput(BaseOutput):
    """Encoded pictures: ``latent_dist.sample(generator)`` draws latents, ``latent_dist.mode()`` is their centre."""

    latent_dist: DiagonalGaussianDistribution


@dataclass
class AutoencoderTinyOutput(BaseOutput):
    """Encoded pictures: ``latents`` (B, L, h, w)."""

    latents: torch.Tensor


@dataclass
class VQEncoderOutput(AutoencoderTinyOutput):
    """Encoded pictures, not quantised yet: ``latents`` (B, L, h, w)."""


@dataclass
class DecoderOutput(BaseOutput):
    """Decoded pictures ``sample`` (B, C, H, W), about -1..1; of a quantised autoencoder also its training loss."""

    sample: torch.Tensor
    commit_loss: torch.Tensor | None = None
