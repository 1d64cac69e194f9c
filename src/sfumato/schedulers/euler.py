"""Euler steps on noise levels, deterministic or with noise put back (arXiv:2206.00364 and k-diffusion's ancestral form).

Samples are in variance-exploding form, ``x = x0 + sigma * noise``; ``scale_model_input`` brings them to unit variance.
"""

from __future__ import annotations

import math

import numpy as np
import torch

from ..random import Generators, randn
from .base import Betas, Device, SigmaScheduler, StepResult, Update, one_source, wide
from .noise import integer_steps, one_of, sigma_ramp, sigmas_to_steps


class ExplodingScheduler(SigmaScheduler):
    """Base of the solvers in variance-exploding form."""

    @property
    def init_noise_sigma(self) -> float:  # type: ignore[override]
        """Standard deviation of the noise that sampling starts from."""
        largest = max(self._sigmas)
        return math.sqrt(largest**2 + 1) if self.config["timestep_spacing"] == "leading" else largest

    def scale_model_input(self, sample: torch.Tensor, timestep: float | torch.Tensor | None = None) -> torch.Tensor:
        """Divides the sample at this timestep by ``sqrt(sigma ** 2 + 1)``, so that the network sees unit variance."""
        return sample * (1 / math.sqrt(self._sigmas[self._position(timestep)] ** 2 + 1))

    def _position(self, timestep: float | torch.Tensor | None) -> int:
        whole = not timestep.is_floating_point() if isinstance(timestep, torch.Tensor) else not isinstance(timestep, float)
        if whole:
            remedy = "pass elements of scheduler.timesteps, not their positions"
            raise ValueError(f"timestep={timestep!r} is no float: {type(self).__name__} has fractional timesteps; {remedy}")
        return super()._position(timestep)  # type: ignore[arg-type]

    def set_timesteps(self, num_inference_steps: int, device: Device = None) -> None:
        """Lays out a run of ``num_inference_steps``, with ``timesteps`` on ``device``."""
        stops = self._stops(num_inference_steps)
        self._set_levels(np.append(self._sigmas_at(stops), 0.0), stops, device, torch.float32)

    def _stops(self, num_inference_steps: int | None) -> np.ndarray:
        """Returns the descending training steps of a run, with fractions, and notes their number."""
        self.num_inference_steps = count = self._check_count(num_inference_steps)
        return integer_steps(self.config["timestep_spacing"], count, len(self), self.config["steps_offset"])


class EulerDiscreteScheduler(ExplodingScheduler):
    """Euler's method on the probability flow, with optional churn (arXiv:2206.00364 algorithm 2 without its correction).

    Args:
        interpolation_type: ``linear`` interpolates the table at the timesteps; ``log_linear`` lays sigmas uniformly in logarithm.
        sigma_min, sigma_max: Range of the ``use_*_sigmas`` spacings (default: that of the timesteps).
        timestep_type: ``continuous`` tells v-prediction networks ``log(sigma) / 4`` in place of the training step.
    """

    predictions = ("epsilon", "sample", "original_sample", "v_prediction")

    def __init__(
        self, num_train_timesteps: int = 1000, beta_start: float = 0.0001, beta_end: float = 0.02, beta_schedule: str = "linear",
        trained_betas: Betas = None, prediction_type: str = "epsilon", interpolation_type: str = "linear",
        use_karras_sigmas: bool | None = False, use_exponential_sigmas: bool | None = False, use_beta_sigmas: bool | None = False,
        sigma_min: float | None = None, sigma_max: float | None = None, timestep_spacing: str = "linspace",
        timestep_type: str = "discrete", steps_offset: int = 0, rescale_betas_zero_snr: bool = False,
        final_sigmas_type: str = "zero",
    ) -> None:  # fmt: skip
        one_of("interpolation_type", interpolation_type, "linear", "log_linear")
        one_of("timestep_type", timestep_type, "discrete", "continuous")
        self._continuous = timestep_type == "continuous" and prediction_type == "v_prediction"
        self._build()
        if self._continuous:
            self._set_levels(np.append(self._table[::-1], 0.0), np.log(self._table[::-1]) / 4, None, torch.float32)

    def set_timesteps(
        self, num_inference_steps: int | None = None, device: Device = None, timesteps: list[float] | None = None,
        sigmas: list[float] | None = None,
    ) -> None:  # fmt: skip
        """Lays out a run of so many steps, of given training steps (fractions allowed), or of sigmas with the level to end at.

        Raises:
            ValueError: Not exactly one of the three was given, or ``timesteps`` with a spacing of sigmas.
        """
        one_source(num_inference_steps=num_inference_steps, timesteps=timesteps, sigmas=sigmas)
        if timesteps is not None and (self._ramp or self._continuous):
            cause = f"use_{self._ramp}_sigmas=True" if self._ramp else "timestep_type='continuous'"
            raise ValueError(f"timesteps cannot be set with {cause}: pass sigmas, or change the configuration")
        if sigmas is not None:
            levels = np.array(sigmas, dtype=np.float64)
            stops = sigmas_to_steps(levels[:-1], self._table)
        else:
            stops = self._stops(num_inference_steps) if timesteps is None else np.array(timesteps, dtype=np.float64)
            levels, stops = self._levels_at(stops)
        if self._continuous:
            stops = np.log(levels[:-1]) / 4
        self.num_inference_steps = len(stops)
        self._set_levels(levels, stops, device, torch.float32)

    def _levels_at(self, stops: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Returns the noise levels of a run, the last included, and its training steps."""
        c = self.config
        levels = self._sigmas_at(stops)
        if c["interpolation_type"] == "log_linear":
            levels = sigma_ramp("exponential", *self._bounds, len(stops) + 1)
        if self._ramp:
            high = levels[0] if c["sigma_max"] is None else c["sigma_max"]
            low = levels[-1] if c["sigma_min"] is None else c["sigma_min"]
            levels = sigma_ramp(self._ramp, high, low, len(stops))
            stops = sigmas_to_steps(levels, self._table)
        return np.append(levels, self._final_sigma), stops

    def step(
        self, model_output: torch.Tensor, timestep: float | torch.Tensor, sample: torch.Tensor, s_churn: float = 0.0,
        s_tmin: float = 0.0, s_tmax: float = math.inf, s_noise: float = 1.0, generator: Generators = None, return_dict: bool = True,
    ) -> StepResult:  # fmt: skip
        """Goes one step towards the clean sample.

        Args:
            model_output, timestep, sample, generator, return_dict: See :class:`SchedulerMixin`.
            s_churn, s_noise: Noise added per run before the steps (0 is deterministic), and its factor.
            s_tmin, s_tmax: Range of sigmas with churn.
        """
        i = self._position(timestep)
        sigma, x, churned = self._sigmas[i], wide(sample), self._sigmas[i]
        if s_churn > 0 and s_tmin <= sigma <= s_tmax:
            churned = sigma * (1 + min(s_churn / (len(self._sigmas) - 1), math.sqrt(2) - 1))
            noise = randn(model_output.shape, generator=generator, device=x.device, dtype=model_output.dtype)
            x = x + noise * (s_noise * math.sqrt(churned**2 - sigma**2))
        return self._step(sample, self.update(model_output, i, x, churned), return_dict)

    def update(self, output: torch.Tensor, i: int, x: torch.Tensor, churned: float) -> Update:
        """Moves along the line from ``x`` at sigma ``churned`` through its denoised form."""
        x0 = self._denoise(output, x, 1.0, churned)
        return torch.lerp(x0, x, self._sigmas[i + 1] / churned), x0


class EulerAncestralDiscreteScheduler(ExplodingScheduler):
    """Euler steps that go further down than the next level and come back up with fresh noise."""

    def __init__(
        self, num_train_timesteps: int = 1000, beta_start: float = 0.0001, beta_end: float = 0.02, beta_schedule: str = "linear",
        trained_betas: Betas = None, prediction_type: str = "epsilon", timestep_spacing: str = "linspace", steps_offset: int = 0,
        rescale_betas_zero_snr: bool = False,
    ) -> None:  # fmt: skip
        self._build()

    def step(
        self, model_output: torch.Tensor, timestep: float | torch.Tensor, sample: torch.Tensor, generator: Generators = None,
        return_dict: bool = True,
    ) -> StepResult:  # fmt: skip
        """Goes one step towards the clean sample, with noise from ``generator``; see :class:`SchedulerMixin`."""
        i = self._position(timestep)
        noise = randn(model_output.shape, generator=generator, device=sample.device, dtype=model_output.dtype)
        return self._step(sample, self.update(model_output, i, wide(sample), noise), return_dict)

    def update(self, output: torch.Tensor, i: int, x: torch.Tensor, noise: torch.Tensor) -> Update:
        """Splits the next level's variance into a part kept by the step and a part drawn anew, as DDPM's posterior does."""
        sigma, following = self._sigmas[i], self._sigmas[i + 1]
        up = following * math.sqrt(1 - following**2 / sigma**2) if following < sigma else 0.0
        x0 = self._denoise(output, x, 1.0, sigma)
        return torch.lerp(x0, x, math.sqrt(following**2 - up**2) / sigma).add_(noise, alpha=up), x0
