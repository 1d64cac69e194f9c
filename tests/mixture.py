"""A data distribution whose perfect network is known: runs of schedulers on it, and their exact results.

The data are a mixture of normal distributions in the plane. The mean of the data given ``x = x0 + sigma * noise`` is a softmax of
the components' means (arXiv:2206.00364 eq. 57), so every prediction a network could make is known in closed form, and the
probability flow can be integrated as exactly as wanted.
"""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor

MEANS = torch.tensor([[1.0, 0.3], [-0.8, 0.6], [-0.1, -1.1]], dtype=torch.float64)
SPREAD = 0.35
MEAN = MEANS.mean(0)
COVARIANCE = torch.eye(2, dtype=torch.float64) * SPREAD**2 + torch.cov(MEANS.T, correction=0)


def denoised(x: Tensor, sigma: float) -> Tensor:
    """The mean of the data given ``x = x0 + sigma * noise``, both ``(B, 2, 1, 1)``."""
    variance = sigma**2 + SPREAD**2
    flat = x.flatten(1).double()  # (B, 2)
    weights = (-(torch.cdist(flat, MEANS) ** 2) / (2 * variance)).softmax(1)  # (B, components)
    return ((weights @ MEANS * sigma**2 + flat * SPREAD**2) / variance).view_as(x).to(x.dtype)


def exact(x: Tensor, start: float, end: float, steps: int = 400) -> Tensor:
    """Follows the probability flow of ``x0 + sigma * noise`` from one level to another: Runge-Kutta 4 in log sigma."""
    u, h = math.log(start), math.log(end / start) / steps
    for k in range(steps):
        now = u + k * h

        def slope(at: Tensor, time: float) -> Tensor:
            return at - denoised(at, math.exp(time))

        a = slope(x, now)
        b = slope(x + a * (h / 2), now + h / 2)
        c = slope(x + b * (h / 2), now + h / 2)
        x = x + (a + 2 * b + 2 * c + slope(x + c * h, now + h)) * (h / 6)
    return x


def samples(sigma: float, count: int = 48, seed: int = 0) -> Tensor:
    """Data with noise of level ``sigma``, float64 ``(count, 2, 1, 1)``."""
    generator = torch.Generator().manual_seed(seed)
    which = torch.randint(len(MEANS), (count,), generator=generator)
    noise = torch.randn(2, count, 2, generator=generator, dtype=torch.float64)
    return (MEANS[which] + SPREAD * noise[0] + sigma * noise[1]).view(count, 2, 1, 1)


class Levels:
    """Signal and noise of a scheduler's sample at each evaluation, and what a perfect network would answer there."""

    def __init__(self, scheduler: Any) -> None:
        self.scheduler, self.name = scheduler, type(scheduler).__name__
        self.flow = getattr(scheduler, "is_flow", False)

    def at(self, i: int) -> tuple[float, float]:
        """Returns ``(alpha, sigma)`` of ``x = alpha * x0 + sigma * noise`` at position ``i``; at the end for ``i = len``."""
        scheduler, one = self.scheduler.fresh(), torch.ones(1, 1, 1, 1, dtype=torch.float64)
        count = len(scheduler.timesteps)
        if self.name == "IPNDMScheduler":
            sigma = float(scheduler.config.trained_betas[i])
            return math.sqrt(1 - sigma**2), sigma
        if self.name == "SASolverScheduler":  # which adds noise by training steps, wherever the run is
            sigma = scheduler.sigmas[i].item()
            return 1 / math.sqrt(sigma**2 + 1), sigma / math.sqrt(sigma**2 + 1)
        if hasattr(scheduler, "sigmas"):
            scheduler.step_index = i
            if scheduler.order == 2 and i < count:  # where the network is asked, which need not be where a step begins or ends
                sigma = math.sqrt(max(scheduler.scale_model_input(one).item() ** -2 - 1, 0.0))
                sigma = scheduler.timesteps[i].item() / len(scheduler) if self.flow else sigma
                return 1 - sigma if self.flow else 1.0, sigma
            time = scheduler.timesteps[:1]
        else:
            time = (
                scheduler.timesteps[i : i + 1]
                if i < count
                else scheduler.timesteps[-1:] - len(scheduler) // scheduler.num_inference_steps
            )
            if time < 0:  # beyond the table
                last = scheduler.alphas_cumprod[0].item()
                return (1.0, 0.0) if scheduler.config.get("set_alpha_to_one", True) else (math.sqrt(last), math.sqrt(1 - last))
        return scheduler.add_noise(one, 0 * one, time).item(), scheduler.add_noise(0 * one, one, time).item()

    def output(self, x: Tensor, i: int) -> Tensor:
        """The perfect network's output for the unscaled sample."""
        alpha, sigma = self.at(i)
        x0 = denoised(x / alpha, sigma / alpha) if alpha else MEAN.view(1, 2, 1, 1).expand_as(x)
        noise = (x - alpha * x0) / sigma
        if self.name.startswith(("EDM", "Cosine")):  # preconditioned (arXiv:2206.00364 table 1)
            c = self.scheduler.config
            variance = sigma**2 + c.sigma_data**2
            out = sigma * c.sigma_data / math.sqrt(variance) * (-1 if c.prediction_type == "v_prediction" else 1)
            return (x0 - c.sigma_data**2 / variance * x) / out
        if self.name == "IPNDMScheduler":
            return alpha * noise - sigma * x0
        return noise - x0 if self.flow else noise


def run(scheduler: Any, x: Tensor, stop: int | None = None, **options: Any) -> Tensor:
    """Runs the schedule from ``x``, in the scheduler's form, and returns the sample after ``stop`` evaluations (default all)."""
    levels = Levels(scheduler)
    scheduler = scheduler.fresh()
    scheduler.set_begin_index(0)
    for i, t in enumerate(scheduler.timesteps[:stop]):
        scheduler.scale_model_input(x, t)
        x = scheduler.step(levels.output(x, i), t, x, return_dict=False, **options)[0]
    return x


def error(scheduler: Any, stop: int | None = None, **options: Any) -> float:
    """Root mean square of the distance to the exact result, in units of the data."""
    levels = Levels(scheduler)
    stop = len(scheduler.timesteps) if stop is None else stop
    (alpha, sigma), (alpha_end, sigma_end) = levels.at(0), levels.at(stop)
    start = samples(sigma / alpha)
    got = run(scheduler, start * alpha, stop, **options) / alpha_end
    return (got - exact(start, sigma / alpha, sigma_end / alpha_end)).square().sum(1).mean().sqrt().item()
