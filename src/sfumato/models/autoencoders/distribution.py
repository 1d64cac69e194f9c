"""The posterior of a variational autoencoder (arXiv:1312.6114): a normal distribution per latent value."""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch

from ...random import Generators, randn


class DiagonalGaussianDistribution:
    """Independent normal distributions.

    Args:
        parameters: Mean and log-variance stacked along dimension 1, ``(B, 2L, ...)``; the latter is kept within -30..20.
        deterministic: The variance is taken as zero: samples are the mean.
    """

    def __init__(self, parameters: torch.Tensor, deterministic: bool = False) -> None:
        self.parameters, self.deterministic = parameters, deterministic
        self.mean, logvar = parameters.chunk(2, dim=1)
        self.logvar = logvar.clamp(-30.0, 20.0)
        self.std = torch.zeros_like(self.mean) if deterministic else torch.exp(self.logvar / 2)
        self.var = torch.zeros_like(self.mean) if deterministic else torch.exp(self.logvar)

    def sample(self, generator: Generators = None) -> torch.Tensor:
        """Draws ``mean + std * noise``; a list of generators gives one per sample of the batch."""
        noise = randn(self.mean.shape, generator=generator, device=self.mean.device, dtype=self.mean.dtype)
        return self.mean + self.std * noise

    def mode(self) -> torch.Tensor:
        """The most likely value, which is the mean."""
        return self.mean

    def kl(self, other: DiagonalGaussianDistribution | None = None) -> torch.Tensor:
        """Kullback-Leibler divergence to ``other``, or to the standard normal, per sample: ``(B,)``."""
        if self.deterministic:
            return self.mean.new_zeros(1)
        if other is None:
            terms = self.mean.square() + self.var - 1.0 - self.logvar
        else:
            terms = (self.mean - other.mean).square() / other.var + self.var / other.var - 1.0 - self.logvar + other.logvar
        return 0.5 * terms.flatten(1).sum(1)

    def nll(self, sample: torch.Tensor, dims: Sequence[int] = (1, 2, 3)) -> torch.Tensor:
        """Negative log-likelihood of ``sample``, summed over ``dims``."""
        if self.deterministic:
            return self.mean.new_zeros(1)
        terms = math.log(2.0 * math.pi) + self.logvar + (sample - self.mean).square() / self.var
        return 0.5 * terms.sum(dim=tuple(dims))
