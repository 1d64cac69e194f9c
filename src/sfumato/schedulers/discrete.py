"""Solvers on training steps: DDPM (arXiv:2006.11239), DDIM (arXiv:2010.02502), PNDM (arXiv:2202.09778).

They keep samples in variance-preserving form, ``x_t = sqrt(alpha_bar_t) * x0 + sqrt(1 - alpha_bar_t) * noise``, and are told the
training step at each call: nothing but PNDM's history is state.
"""

from __future__ import annotations

import math
from itertools import pairwise

import numpy as np
import torch
from torch import Tensor

from ..random import Generators
from .base import Count, Device, LevelScheduler, StepResult, StepScheduler, StochasticScheduler, Time, Update, Values
from .noise import given_steps, noise_like, one_of, one_source
from .prediction import blend, mix, noise_coefficients, polynomial_weights, split_variance, wide


class DDPMScheduler(StochasticScheduler, StepScheduler):
    """Ancestral sampling from the posterior of the forward process (arXiv:2006.11239)."""

    config_keys = "BETAS variance_type clip_sample prediction_type BOUNDS SPACING rescale_betas_zero_snr"
    config_defaults = {"variance_type": "fixed_small", "timestep_spacing": "leading"}

    def _build(self) -> None:
        fixed = ("fixed_small", "fixed_small_log", "fixed_large", "fixed_large_log")
        one_of("variance_type", self.config["variance_type"], *fixed, "learned", "learned_range", None)
        super()._build()

    def set_timesteps(self, num_inference_steps: Count = None, device: Device = None, timesteps: Values = None) -> None:
        one_source(num_inference_steps=num_inference_steps, timesteps=timesteps)
        given = timesteps is not None
        stops = given_steps(timesteps, len(self)) if given else self._stops(self._check_count(num_inference_steps))
        self.num_inference_steps = len(stops)
        self._set_schedule(stops, device)

    def _set_schedule(self, timesteps: np.ndarray, device: Device = None) -> None:
        super()._set_schedule(timesteps, device)
        self._following = dict(pairwise([*timesteps.tolist(), -1]))

    def update(self, output: Tensor, t: int, x: Tensor, generator: Generators, following: int | None = None) -> Update:
        """Posterior mean (eq. 7) plus noise; the step to zero draws none."""
        if following is None and t not in self._following:
            raise self._no_such(t)
        following = self._following[t] if following is None else following
        alpha_bar, previous, beta = self._alpha_bar[t], self._alpha_bar_at(following), self._beta(t, following)
        output, predicted = split_variance(output, x.shape[1], self.config["variance_type"])
        new, x0 = self._mean(output, alpha_bar, previous, beta, x)
        if t > 0:
            noise = noise_like(output, generator)
            deviation = self._deviation(max((1 - previous) / (1 - alpha_bar) * beta, 1e-20), beta, predicted)
            new = torch.add(new, noise, alpha=deviation) if isinstance(deviation, float) else new + deviation * noise
        return new, x0

    def _beta(self, t: int, following: int) -> float:
        """Returns the variance of the noise between two training steps."""
        return 1 - self._alpha_bar[t] / self._alpha_bar_at(following)

    def _mean(self, output: Tensor, alpha_bar: float, previous: float, beta: float, x: Tensor) -> Update:
        """Returns the posterior's mean (eq. 7) and the denoised sample."""
        x0 = self._denoise(output, x, math.sqrt(alpha_bar), math.sqrt(1 - alpha_bar))
        weights = math.sqrt(previous) * beta / (1 - alpha_bar), math.sqrt(1 - beta) * (1 - previous) / (1 - alpha_bar)
        return mix(weights, x0, x), x0

    def _deviation(self, small: float, large: float, predicted: Tensor | None) -> Tensor | float:
        """Returns the standard deviation of the noise, between the posterior's variance and beta."""
        kind = self.config["variance_type"]
        if kind not in ("learned", "learned_range"):
            return math.sqrt(large if kind in ("fixed_large", "fixed_large_log") else small)
        if predicted is None:
            raise ValueError(f"variance_type={kind!r} needs twice the sample's channels in model_output; else use 'fixed_small'")
        if kind == "learned":
            return wide(predicted).sqrt()
        fraction = (wide(predicted) + 1) / 2
        return ((fraction * math.log(large) + (1 - fraction) * math.log(small)) / 2).exp()


class DDIMScheduler(StepScheduler):
    """Deterministic sampling on training steps, stochastic with ``eta > 0`` (arXiv:2010.02502)."""

    config_keys = "BETAS ENDS prediction_type BOUNDS timestep_spacing rescale_betas_zero_snr"
    config_defaults = {"timestep_spacing": "leading"}

    def step(  # type: ignore[override]
        self, model_output: Tensor, timestep: Time, sample: Tensor, eta: float = 0.0, use_clipped_model_output: bool = False,
        generator: Generators = None, variance_noise: Tensor | None = None, return_dict: bool = True,
    ) -> StepResult:  # fmt: skip
        """Goes one step towards the clean sample.

        Args:
            model_output, timestep, sample, generator, variance_noise, return_dict: See :class:`SchedulerMixin`.
            eta: Share of the posterior's deviation that is added as noise, 0 (none) to 1 (as DDPM).
            use_clipped_model_output: Recompute the noise from the clipped denoised sample.

        Raises:
            ValueError: ``set_timesteps`` was not called, ``eta`` is out of range, or noise and generator were both given.
        """
        noise = variance_noise if eta else None
        if noise is not None and generator is not None:
            raise ValueError("generator and variance_noise exclude each other: pass one of them")
        if eta and noise is None:
            noise = noise_like(model_output, generator)
        return self._advance(model_output, timestep, sample, return_dict, eta, use_clipped_model_output, noise)

    def _move(self, t: int) -> tuple[float, float]:
        """Returns ``alpha_bar`` before and after the step."""
        return self._alpha_bar[t], self._alpha_bar_at(t - self._stride())

    def update(self, output: Tensor, t: int, x: Tensor, eta: float, reclip: bool, noise: Tensor | None) -> Update:
        """Eq. 12 with the deviation of eq. 16."""
        alpha_bar, previous = self._move(t)
        alpha, sigma = math.sqrt(alpha_bar), math.sqrt(1 - alpha_bar)
        x0 = self._denoise(output, x, alpha, sigma)
        variance = eta**2 * (1 - previous) / (1 - alpha_bar) * (1 - alpha_bar / previous) if eta else 0.0
        if variance > 1 - previous + 1e-9:
            raise ValueError(f"eta={eta} asks for more noise than the next level holds: choose a value in 0..1")
        predicted = "sample" if reclip else self._kind
        predicted_noise = mix(noise_coefficients(predicted, alpha, sigma), x, x0 if reclip else output)
        new = mix((math.sqrt(previous), math.sqrt(max(1 - previous - variance, 0.0))), x0, predicted_noise)
        return new if noise is None else torch.add(new, noise, alpha=math.sqrt(variance)), x0


class PNDMScheduler(StepScheduler):
    """Pseudo linear multistep sampling (arXiv:2202.09778).

    A pseudo Runge-Kutta warm-up spends 12 evaluations on the first three steps; without it (as latent models use it) the first
    step is evaluated twice and the order grows from there.
    """

    predictions = LevelScheduler.predictions
    config_keys = "BETAS skip_prk_steps set_alpha_to_one prediction_type SPACING"
    config_defaults = {"set_alpha_to_one": False, "timestep_spacing": "leading"}
    _warm_up = 0  # evaluations

    def _reset(self) -> None:
        super()._reset()
        self._calls = 0
        self._stages: list[Tensor] = []  # of a Runge-Kutta step

    def _stops(self, count: int) -> np.ndarray:
        """Returns one entry per evaluation."""
        stops = super()._stops(count)
        if self.config["skip_prk_steps"]:
            return np.concatenate([stops[:2], stops[1:]])
        if count < 4:
            raise ValueError(f"num_inference_steps={count}, the Runge-Kutta warm-up needs 4: set skip_prk_steps=True")
        half = self._stride() // 2
        # From each of the first three steps, two evaluations half-way and one at the next step.
        warm_up = [t for a, b in pairwise(stops[:4]) for t in (a, b + half, b + half, b)]
        self._warm_up = len(warm_up)
        return np.array([*warm_up, *stops[3:]])

    def update(self, output: Tensor, t: int, x: Tensor) -> Tensor:
        """One evaluation; without warm-up the second one repeats the first step (Heun)."""
        solve = self._runge_kutta if self._calls < self._warm_up else self._adams_bashforth
        new = solve(output, t, x, self._stride())
        self._calls += 1
        return new

    def _runge_kutta(self, output: Tensor, t: int, x: Tensor, stride: int) -> Tensor:
        """One of the four evaluations of eq. 13."""
        stage = self._calls % 4
        if stage == 0:
            self._history = [output, *self._history]
            self._start, self._stages = x, []
        self._stages.append(output)
        start, reach = int(self._times[self._calls - stage]), t - (0 if stage % 2 else stride // 2)
        base = x if self._start is None else self._start
        weights, outputs = ([1.0], [output]) if stage < 3 else ([1 / 6, 1 / 3, 1 / 3, 1 / 6], self._stages)
        return self._transfer(weights, outputs, base, start, reach)

    def _adams_bashforth(self, output: Tensor, t: int, x: Tensor, stride: int) -> Tensor:
        """The polynomial through the last predictions of the noise, integrated (eq. 12)."""
        if self._calls == 1 and self._start is not None:
            x, self._start = self._start, None
            return self._transfer([0.5, 0.5], [output, self._history[0]], x, t + stride, t)
        self._history = [output, *self._history[:3]]
        if self._calls == 0:
            self._start = x
        count = len(self._history)
        weights = polynomial_weights([-float(k) for k in range(count)], [1 / (k + 1) for k in range(count)])
        return self._transfer(weights, self._history, x, t, t - stride)

    def _transfer(self, weights: list[float], outputs: list[Tensor], x: Tensor, t: int, to: int) -> Tensor:
        """Moves ``x`` between training steps along the weighted predictions of the noise (eq. 11, which is DDIM's transfer)."""
        here, there = self._alpha_bar[t], self._alpha_bar_at(to)
        keep, turn = math.sqrt(there / here), math.sqrt(1 - there) - math.sqrt(there * (1 - here) / here)
        if self._kind == "v_prediction":
            keep, turn = keep + turn * math.sqrt(1 - here), turn * math.sqrt(here)
        return blend((keep, *(turn * weight for weight in weights)), (x, *outputs))
