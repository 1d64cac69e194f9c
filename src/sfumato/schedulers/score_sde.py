"""Samplers of score-based models: stochastic differential equations (arXiv:2011.13456) and their second-order form (EDM)."""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from ..outputs import BaseOutput
from ..random import Generators, noise_like
from .base import Device, SchedulerMixin, SchedulerOutput, StepResult, Time


@dataclass
class KarrasVeOutput(BaseOutput):
    """Result of a step: sample, slope and clean sample, all in the sample's shape."""

    prev_sample: Tensor
    derivative: Tensor
    pred_original_sample: Tensor | None = None


@dataclass
class SdeVeOutput(BaseOutput):
    """Result of a step: the sample, and the sample without its fresh noise."""

    prev_sample: Tensor
    prev_sample_mean: Tensor


class KarrasVeScheduler(SchedulerMixin):
    """Stochastic sampling in variance-exploding form (arXiv:2206.00364 algorithm 2); the caller passes the noise levels.

    Attributes:
        schedule: Squares of the noise levels, ``(steps,)``, for ``timesteps`` from the last to 0."""

    order = 2
    _least = 2  # from sigma_max to sigma_min
    config_keys = "sigma_min sigma_max s_noise s_churn s_min s_max"
    config_defaults = {"sigma_min": 0.02, "sigma_max": 100, "s_noise": 1.007}

    def _build(self) -> None:
        self.init_noise_sigma = self.config["sigma_max"]

    def _lay_out(self, num_inference_steps: int, device: Device) -> None:  # type: ignore[override]
        super()._lay_out(num_inference_steps, device)
        high, low = self.config["sigma_max"] ** 2, self.config["sigma_min"] ** 2
        squares = high * (low / high) ** np.linspace(1, 0, num_inference_steps)
        self.schedule = torch.tensor(squares, dtype=torch.float32, device=device)

    def add_noise_to_input(self, sample: Tensor, sigma: float, generator: Generators = None) -> tuple[Tensor, float]:
        """Raises a sample of noise level ``sigma`` to a higher one, and returns both (lines 4 to 6)."""
        c, sigma = self.config, float(sigma)
        churn = min(c["s_churn"] / self._count(), math.sqrt(2) - 1) if c["s_min"] <= sigma <= c["s_max"] else 0.0
        raised = sigma * (1 + churn)
        noise = noise_like(sample.float(), generator, c["s_noise"] * math.sqrt(raised**2 - sigma**2))
        return sample + noise, raised

    def step(  # type: ignore[override]
        self, model_output: Tensor, sigma_hat: float, sigma_prev: float, sample_hat: Tensor, return_dict: bool = True
    ) -> KarrasVeOutput | tuple[Tensor, ...]:
        """Goes from the raised level to the next along the slope (lines 7 and 8).

        ``model_output`` is ``(x0 - sample) / sigma``, minus the noise; ``sigma_hat, sample_hat`` are of ``add_noise_to_input``.
        """
        new = torch.add(sample_hat, model_output, alpha=float(sigma_hat) - float(sigma_prev))
        if not return_dict:
            return new, -model_output
        return KarrasVeOutput(new, -model_output, torch.add(sample_hat, model_output, alpha=float(sigma_hat)))

    def step_correct(
        self, model_output: Tensor, sigma_hat: float, sigma_prev: float, sample_hat: Tensor, sample_prev: Tensor,
        derivative: Tensor, return_dict: bool = True,
    ) -> KarrasVeOutput | tuple[Tensor, ...]:  # fmt: skip
        """Repeats the step with the mean of the slopes at its ends (lines 10 and 11); ``model_output`` is of ``sample_prev``."""
        half = (float(sigma_prev) - float(sigma_hat)) / 2
        new = torch.add(sample_hat, derivative, alpha=half).sub_(model_output, alpha=half)
        x0 = torch.add(sample_prev, model_output, alpha=float(sigma_prev))
        return KarrasVeOutput(new, derivative, x0) if return_dict else (new, derivative)


class ScoreSdeVeScheduler(SchedulerMixin):
    """Predictor and corrector for the variance-exploding SDE (arXiv:2011.13456 algorithm 2).

    Attributes:
        sigmas, discrete_sigmas: Noise levels of ``timesteps``, and from ``sigma_min`` up to ``sigma_max``."""

    config_keys = "num_train_timesteps snr sigma_min sigma_max sampling_eps correct_steps"
    _time_type = torch.float32
    config_defaults = {"num_train_timesteps": 2000, "sigma_min": 0.01, "sigma_max": 1348.0}

    def _build(self) -> None:
        self.init_noise_sigma = self.config["sigma_max"]
        self.set_sigmas(len(self))

    def set_timesteps(self, num_inference_steps: int, sampling_eps: float | None = None, device: Device = None) -> None:
        """Lays out times from 1 to ``sampling_eps``; ``set_sigmas`` follows."""
        end = self.config["sampling_eps"] if sampling_eps is None else sampling_eps
        self.num_inference_steps = count = self._check_count(num_inference_steps)
        self._set_schedule(torch.linspace(1, end, count).numpy(), device)

    def set_sigmas(
        self, num_inference_steps: int, sigma_min: float | None = None, sigma_max: float | None = None,
        sampling_eps: float | None = None,
    ) -> None:  # fmt: skip
        """Lays out the noise levels, geometric in time (arXiv:2011.13456 eq. 30), of as many times as there are steps."""
        low = self.config["sigma_min"] if sigma_min is None else sigma_min
        high = self.config["sigma_max"] if sigma_max is None else sigma_max
        if self.num_inference_steps != num_inference_steps:
            self.set_timesteps(num_inference_steps, sampling_eps)
        self.discrete_sigmas = torch.linspace(math.log(low), math.log(high), num_inference_steps).exp()
        self.sigmas = low * (high / low) ** self.timesteps.cpu()
        self._levels = self.discrete_sigmas.tolist()

    def step_pred(
        self, model_output: Tensor, timestep: Time, sample: Tensor, generator: Generators = None, return_dict: bool = True
    ) -> SdeVeOutput | tuple[Tensor, ...]:
        """Predictor: reverse diffusion by one noise level (eq. 47); the output is the score. See :meth:`SchedulerMixin.step`."""
        last = len(self._times) - 1
        i = int(np.float32(self._time(timestep) * last))
        variance = self._levels[i] ** 2 - (self._levels[i - 1] if i else 0.0) ** 2
        mean = torch.add(sample, model_output, alpha=variance)
        new = noise_like(sample, generator, math.sqrt(variance)).add_(mean)
        return SdeVeOutput(new, mean) if return_dict else (new, mean)

    def step_correct(
        self, model_output: Tensor, sample: Tensor, generator: Generators = None, return_dict: bool = True
    ) -> StepResult:
        """Corrector: Langevin dynamics at one noise level (algorithm 4); the step size is that of the whole batch."""
        noise, around = noise_like(sample, generator), tuple(range(1, sample.ndim))
        ratio = torch.linalg.vector_norm(noise, dim=around).mean() / torch.linalg.vector_norm(model_output, dim=around).mean()
        size = ratio * ratio * (2 * self.config["snr"] ** 2)
        new = torch.addcmul(sample, model_output, size).addcmul_(noise, (2 * size).sqrt())
        return SchedulerOutput(new) if return_dict else (new,)

    def add_noise(self, original_samples: Tensor, noise: Tensor, timesteps: Tensor) -> Tensor:
        """Noises clean samples to the levels at positions ``timesteps``, ``(B,)``, of ``discrete_sigmas``."""
        sigmas = self.discrete_sigmas.to(original_samples)[timesteps.to(original_samples.device)]
        return original_samples + noise * sigmas.view(-1, *[1] * (noise.ndim - 1))


class ScoreSdeVpScheduler(SchedulerMixin):
    """Euler-Maruyama on the variance-preserving SDE (arXiv:2011.13456 eqs. 11 and 32)."""

    config_keys = "num_train_timesteps beta_min beta_max sampling_eps"
    config_defaults = {"num_train_timesteps": 2000, "sampling_eps": 1e-3}
    _time_type = torch.float32

    def _stops(self, count: int) -> np.ndarray:
        return torch.linspace(1, self.config["sampling_eps"], count).numpy()

    def step_pred(self, score: Tensor, x: Tensor, t: Time, generator: Generators = None) -> tuple[Tensor, Tensor]:
        """Returns the next sample, and the same without its fresh noise; ``score`` is the noise that the model predicts."""
        count, low, high, now = self._count(), self.config["beta_min"], self.config["beta_max"], self._time(t)
        # Spread of the noise at this time (eq. 33), in float32, which shows near time 0, as published samples were made.
        spread = math.sqrt(1 - float(np.exp(np.float32(-(now**2) / 2 * (high - low) - now * low))))
        beta = (low + now * (high - low)) / count
        mean = torch.add(x, x, alpha=beta / 2).sub_(score, alpha=beta / spread)
        return noise_like(x, generator, math.sqrt(beta)).add_(mean), mean
