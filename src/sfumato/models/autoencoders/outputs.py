"""What autoencoders return."""

from __future__ import annotations

from dataclasses import dataclass

import torch

from ...outputs import BaseOutput
from .distribution import DiagonalGaussianDistribution


@dataclass
class AutoencoderKLOutput(BaseOutput):
    """Encoded pictures.

    Attributes:
        latent_dist: Distribution of the latents: ``.sample(generator)`` draws, ``.mode()`` is its centre.
    """

    latent_dist: DiagonalGaussianDistribution


@dataclass
class AutoencoderTinyOutput(BaseOutput):
    """Encoded pictures.

    Attributes:
        latents: ``(B, L, h, w)``.
    """

    latents: torch.Tensor


@dataclass
class VQEncoderOutput(BaseOutput):
    """Encoded pictures, not quantised yet.

    Attributes:
        latents: ``(B, L, h, w)``.
    """

    latents: torch.Tensor


@dataclass
class DecoderOutput(BaseOutput):
    """Decoded pictures.

    Attributes:
        sample: ``(B, C, H, W)``, about -1..1.
        commit_loss: Of a quantised autoencoder, for its training.
    """

    sample: torch.Tensor
    commit_loss: torch.Tensor | None = None
