"""What a denoiser learns: noise levels, the noisy sample, the target, and the weight of its error.

Everywhere ``x_t = alpha * x0 + sigma * noise``. The noise table and the kind of prediction are those of the scheduler that the
model is saved with, so that what is trained is what is sampled.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, NamedTuple

import torch

from ..errors import ConfigError

KINDS = ("epsilon", "v_prediction", "flow_prediction")


class Levels(NamedTuple):
    """Noise levels of a batch, ``(B,)`` each: factors of sample and noise, and the time that the network is told."""

    alpha: torch.Tensor
    sigma: torch.Tensor
    time: torch.Tensor


@dataclass(frozen=True)
class Objective:
    """Noise table and kind of prediction.

    Attributes:
        kind: ``epsilon`` (arXiv:2006.11239), ``v_prediction`` (arXiv:2202.00512) or ``flow_prediction`` (arXiv:2210.02747).
        alphas_cumprod: Signal variance after each training step ``(T,)``; flow needs the number of steps alone.
        shift: Of flow, towards noise (arXiv:2403.03206, equation 23).
    """

    kind: str
    alphas_cumprod: torch.Tensor
    shift: float = 1.0

    @classmethod
    def of(cls, scheduler: Any) -> Objective:
        """Reads the objective from a scheduler.

        Raises:
            ConfigError: The scheduler's predictions are not among those that can be trained.
        """
        config = scheduler.config
        flow = type(scheduler).__name__.startswith("FlowMatch")
        kind = "flow_prediction" if flow else config.get("prediction_type", "epsilon")
        if kind not in KINDS:
            raise ConfigError(f"prediction_type={kind!r} cannot be trained: set one of {', '.join(KINDS)} for the scheduler")
        steps = config["num_train_timesteps"]
        table = torch.ones(steps) if kind == "flow_prediction" else scheduler.alphas_cumprod
        if kind == "epsilon" and table[-1] <= 0:
            remedy = "set prediction_type='v_prediction', or rescale_betas_zero_snr=false"
            raise ConfigError(f"prediction_type='epsilon' cannot be learnt on a table that ends without signal; {remedy}")
        return cls(kind, table, float(config.get("flow_shift", config.get("shift")) or 1.0))

    def levels(self, place: torch.Tensor) -> Levels:
        """Noise levels at places ``(B,)`` in 0..1, from clean to noise."""
        count = len(self.alphas_cumprod)
        if self.kind == "flow_prediction":
            sigma = self.shift * place / (1 + (self.shift - 1) * place)
            return Levels(1 - sigma, sigma, sigma * count)
        step = (place * count).long().clamp(max=count - 1)
        return Levels(self.alphas_cumprod[step].sqrt(), (1 - self.alphas_cumprod[step]).sqrt(), step)

    def noisy(self, x0: torch.Tensor, noise: torch.Tensor, levels: Levels) -> torch.Tensor:
        """``x_t`` of samples and noise ``(B, ...)``."""
        return _rows(levels.alpha, x0) * x0 + _rows(levels.sigma, x0) * noise

    def target(self, x0: torch.Tensor, noise: torch.Tensor, levels: Levels) -> torch.Tensor:
        """What the network shall answer: ``noise``, ``alpha * noise - sigma * x0`` or ``noise - x0``."""
        if self.kind == "epsilon":
            return noise
        if self.kind == "flow_prediction":
            return noise - x0
        return _rows(levels.alpha, x0) * noise - _rows(levels.sigma, x0) * x0

    def weight(self, levels: Levels, gamma: float) -> torch.Tensor:
        """Weights ``(B,)`` of the squared error by min-SNR (arXiv:2303.09556): ``min(snr, gamma)`` on the error of ``x0``.

        An error of the noise is ``snr`` times as large, squared, as that of ``x0``; one of ``v`` or of the flow is
        ``1 / sigma**2`` times as large.
        """
        snr = (levels.alpha / levels.sigma) ** 2
        if self.kind == "epsilon":
            return (gamma / snr).clamp(max=1)
        return torch.minimum(levels.alpha**2, gamma * levels.sigma**2)


def draw_places(count: int, density: str, mean: float, std: float, draw: torch.Generator) -> torch.Tensor:
    """Draws ``count`` places in 0..1: ``uniform``, or ``logit-normal``, whose logit is normal (arXiv:2403.03206, eq. 19)."""
    if density == "uniform":
        return torch.rand(count, generator=draw)
    return torch.sigmoid(torch.randn(count, generator=draw) * std + mean)


def draw_noise(shape: torch.Size, offset: float, draw: torch.Generator) -> torch.Tensor:
    """Normal noise; ``offset`` adds noise that all pixels of a channel share."""
    noise = torch.randn(shape, generator=draw)
    if offset:
        noise += offset * torch.randn((*shape[:2], *[1] * (len(shape) - 2)), generator=draw)
    return noise


def _rows(values: torch.Tensor, like: torch.Tensor) -> torch.Tensor:
    return values.view(-1, *[1] * (like.ndim - 1))
