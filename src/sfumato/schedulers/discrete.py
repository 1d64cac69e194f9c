"""Solvers on training steps: DDPM (arXiv:2006.11239), DDIM (arXiv:2010.02502), PNDM (arXiv:2202.09778).

They keep samples in variance-preserving form, ``x_t = sqrt(alpha_bar_t) * x0 + sqrt(1 - alpha_bar_t) * noise``, and are told the
training step at each call: nothing but PNDM's history is state.
"""

from __future__ import annotations

import math
from itertools import pairwise
from typing import Any

import numpy as np
import torch

from ..random import Generators, randn
from .base import SchedulerOutput, Update, wide
from .levels import BoundedStepScheduler, StepScheduler
from .noise import one_of
from .prediction import mix, noise_coefficients, split_variance

VARIANCE_TYPES = ("fixed_small", "fixed_small_log", "fixed_large", "fixed_large_log", "learned", "learned_range", None)


class DDPMScheduler(BoundedStepScheduler):
    """Ancestral sampling from the posterior of the forward process (arXiv:2006.11239).

    ``fixed_small_log`` and ``fixed_large_log`` give the same samples as ``fixed_small`` and ``fixed_large``: the logarithm is
    only the form in which the variance is written down.

    Args:
        num_train_timesteps: Steps the model was trained with.
        beta_start: First noise variance.
        beta_end: Last noise variance.
        beta_schedule: See :func:`sfumato.schedulers.noise.beta_table`.
        trained_betas: Explicit betas in place of the schedule.
        variance_type: Variance of the noise added back: ``fixed_small`` (posterior), ``fixed_large`` (beta), ``learned`` or
            ``learned_range`` (the network predicts it in as many further channels, arXiv:2102.09672 eq. 15).
        clip_sample: Clip the denoised sample.
        prediction_type: ``epsilon``, ``sample`` or ``v_prediction``.
        thresholding: Threshold the denoised sample dynamically (pixel-space models only).
        dynamic_thresholding_ratio: Quantile of dynamic thresholding.
        clip_sample_range: Bound of clipping.
        sample_max_value: Largest divisor of dynamic thresholding.
        timestep_spacing: ``linspace``, ``leading`` or ``trailing``.
        steps_offset: Added to ``leading`` timesteps.
        rescale_betas_zero_snr: Rescale the table to zero terminal signal (arXiv:2305.08891).
    """

    def __init__(
        self, num_train_timesteps: int = 1000, beta_start: float = 0.0001, beta_end: float = 0.02, beta_schedule: str = "linear",
        trained_betas: np.ndarray | list[float] | None = None, variance_type: str | None = "fixed_small", clip_sample: bool = True,
        prediction_type: str = "epsilon", thresholding: bool = False, dynamic_thresholding_ratio: float = 0.995,
        clip_sample_range: float = 1.0, sample_max_value: float = 1.0, timestep_spacing: str = "leading", steps_offset: int = 0,
        rescale_betas_zero_snr: bool = False,
    ) -> None:  # fmt: skip
        one_of("variance_type", variance_type, VARIANCE_TYPES)
        self._build()
        self._following: dict[int, int] | None = None

    def set_timesteps(
        self, num_inference_steps: int | None = None, device: str | torch.device | None = None, timesteps: list[int] | None = None
    ) -> None:
        """Lays out a run.

        Args:
            num_inference_steps: Number of steps.
            device: Where ``timesteps`` will lie.
            timesteps: Descending training steps, instead of ``num_inference_steps``.

        Raises:
            ValueError: Both or neither were given, or the steps do not fit the training steps.
        """
        stops = self._stops(num_inference_steps) if timesteps is None else self._custom_stops(num_inference_steps, timesteps)
        self._set_schedule(stops, device, torch.int64)
        self._following = dict(zip(stops.tolist(), [*stops[1:].tolist(), -1], strict=True))

    def _custom_stops(self, num_inference_steps: int | None, timesteps: list[int]) -> np.ndarray:
        if num_inference_steps is not None:
            raise ValueError("num_inference_steps and timesteps exclude each other: pass one of them")
        stops = np.asarray(timesteps).astype(np.int64)
        if not len(stops) or (np.diff(stops) >= 0).any() or stops[0] >= len(self) or stops[-1] < 0:
            raise ValueError(f"timesteps={list(timesteps)} must descend strictly within {len(self) - 1}..0")
        self.num_inference_steps = len(stops)
        return stops

    def step(
        self, model_output: torch.Tensor, timestep: int | torch.Tensor, sample: torch.Tensor, generator: Generators = None,
        return_dict: bool = True,
    ) -> SchedulerOutput | tuple[torch.Tensor, ...]:  # fmt: skip
        """Goes one step towards the clean sample.

        Args:
            model_output: ``(B, C, ...)``, or ``(B, 2C, ...)`` with a learned variance.
            timestep: Of this step.
            sample: ``(B, C, ...)``.
            generator: Source of the noise; the step to zero draws none.
            return_dict: Return a :class:`SchedulerOutput`, else ``(prev_sample, pred_original_sample)``.
        """
        return self._step(sample, self.update(model_output, self._training_step(timestep), wide(sample), generator), return_dict)

    def update(self, output: torch.Tensor, t: int, x: torch.Tensor, generator: Generators) -> Update:
        """Posterior mean (eq. 7) plus noise."""
        alpha_bar, previous = self._alpha_bar[t], self._alpha_bar_at(self._next_step(t))
        kept, beta = alpha_bar / previous, 1 - alpha_bar / previous
        output, predicted = split_variance(output, x.shape[1], self.config["variance_type"])
        x0 = self._denoise(output, x, alpha_bar)
        new = mix((math.sqrt(previous) * beta / (1 - alpha_bar), math.sqrt(kept) * (1 - previous) / (1 - alpha_bar)), x0, x)
        if t > 0:
            noise = randn(output.shape, generator=generator, device=x.device, dtype=output.dtype)
            small = max((1 - previous) / (1 - alpha_bar) * beta, 1e-20)
            new = new + self._deviation(small, beta, predicted) * noise
        return new, x0

    def _next_step(self, t: int) -> int:
        if self._following is None:
            return t - 1
        if t not in self._following:
            raise ValueError(f"timestep={t} is not in the schedule: pass one of scheduler.timesteps{self._schedule_hint()}")
        return self._following[t]

    def _deviation(self, small: float, large: float, predicted: torch.Tensor | None) -> torch.Tensor | float:
        """Returns the standard deviation of the noise, between the posterior's variance and beta."""
        kind = self.config["variance_type"]
        if kind in ("fixed_large", "fixed_large_log"):
            return math.sqrt(large)
        if kind not in ("learned", "learned_range"):
            return math.sqrt(small)
        if predicted is None:
            raise ValueError(f"variance_type={kind!r} needs twice the sample's channels in model_output; else use 'fixed_small'")
        if kind == "learned":
            return wide(predicted).sqrt()
        fraction = (wide(predicted) + 1) / 2
        return ((fraction * math.log(large) + (1 - fraction) * math.log(small)) / 2).exp()


class DDIMScheduler(BoundedStepScheduler):
    """Deterministic sampling on training steps, stochastic with ``eta > 0`` (arXiv:2010.02502).

    Args:
        num_train_timesteps, beta_start, beta_end, beta_schedule, trained_betas: As in :class:`DDPMScheduler`.
        clip_sample: Clip the denoised sample.
        set_alpha_to_one: The last step ends at the clean sample; else at the level of training step 0.
        steps_offset, prediction_type, thresholding, dynamic_thresholding_ratio, clip_sample_range, sample_max_value,
        timestep_spacing, rescale_betas_zero_snr: As in :class:`DDPMScheduler`.
    """

    def __init__(
        self, num_train_timesteps: int = 1000, beta_start: float = 0.0001, beta_end: float = 0.02, beta_schedule: str = "linear",
        trained_betas: np.ndarray | list[float] | None = None, clip_sample: bool = True, set_alpha_to_one: bool = True,
        steps_offset: int = 0, prediction_type: str = "epsilon", thresholding: bool = False,
        dynamic_thresholding_ratio: float = 0.995, clip_sample_range: float = 1.0, sample_max_value: float = 1.0,
        timestep_spacing: str = "leading", rescale_betas_zero_snr: bool = False,
    ) -> None:  # fmt: skip
        self._build()

    def set_timesteps(self, num_inference_steps: int, device: str | torch.device | None = None) -> None:
        """Lays out a run of ``num_inference_steps``, at most as many as training steps, with ``timesteps`` on ``device``."""
        self._set_schedule(self._stops(num_inference_steps), device, torch.int64)

    def step(
        self, model_output: torch.Tensor, timestep: int | torch.Tensor, sample: torch.Tensor, eta: float = 0.0,
        use_clipped_model_output: bool = False, generator: Generators = None, variance_noise: torch.Tensor | None = None,
        return_dict: bool = True,
    ) -> SchedulerOutput | tuple[torch.Tensor, ...]:  # fmt: skip
        """Goes one step towards the clean sample.

        Args:
            model_output: ``(B, C, ...)``.
            timestep: Of this step.
            sample: ``(B, C, ...)``.
            eta: Share of the posterior's deviation that is added as noise, 0 (none) to 1 (as DDPM).
            use_clipped_model_output: Recompute the noise from the clipped denoised sample.
            generator: Source of the noise, if ``eta > 0``.
            variance_noise: The noise itself, in place of ``generator``.
            return_dict: Return a :class:`SchedulerOutput`, else ``(prev_sample, pred_original_sample)``.

        Raises:
            ValueError: ``set_timesteps`` was not called, ``eta`` is out of range, or noise and generator were both given.
        """
        if self.num_inference_steps is None:
            raise ValueError("the schedule is not laid out: call set_timesteps(num_inference_steps) before step")
        noise = None
        if eta:
            if variance_noise is not None and generator is not None:
                raise ValueError("generator and variance_noise exclude each other: pass one of them")
            noise = variance_noise
            if noise is None:
                noise = randn(model_output.shape, generator=generator, device=sample.device, dtype=model_output.dtype)
        new = self.update(model_output, self._training_step(timestep), wide(sample), eta, use_clipped_model_output, noise)
        return self._step(sample, new, return_dict)

    def update(self, output: torch.Tensor, t: int, x: torch.Tensor, eta: float, reclip: bool, noise: torch.Tensor | None) -> Update:
        """Eq. 12 with the deviation of eq. 16."""
        alpha_bar = self._alpha_bar[t]
        previous = self._alpha_bar_at(t - len(self) // (self.num_inference_steps or 1))
        alpha, sigma = math.sqrt(alpha_bar), math.sqrt(1 - alpha_bar)
        x0 = self._denoise(output, x, alpha_bar)
        variance = eta**2 * (1 - previous) / (1 - alpha_bar) * (1 - alpha_bar / previous)
        if variance > 1 - previous + 1e-9:
            raise ValueError(f"eta={eta} asks for more noise than the next level holds: choose a value in 0..1")
        direction = math.sqrt(max(1 - previous - variance, 0.0))
        predicted = "sample" if reclip else self.config["prediction_type"]
        predicted_noise = mix(noise_coefficients(predicted, alpha, sigma), x, x0 if reclip else output)
        new = mix((math.sqrt(previous), direction), x0, predicted_noise)
        if noise is not None:
            new = new + noise * math.sqrt(variance)
        return new, x0


class PNDMScheduler(StepScheduler):
    """Pseudo linear multistep sampling, with pseudo Runge-Kutta steps to begin with (arXiv:2202.09778).

    The Runge-Kutta warm-up spends 12 evaluations on the first three steps; without it (``skip_prk_steps``, as latent models
    use it) the first step is evaluated twice and the order grows from there.

    Args:
        num_train_timesteps, beta_start, beta_end, beta_schedule, trained_betas: As in :class:`DDPMScheduler`.
        skip_prk_steps: Leave out the Runge-Kutta warm-up.
        set_alpha_to_one: As in :class:`DDIMScheduler`.
        prediction_type: ``epsilon`` or ``v_prediction``.
        timestep_spacing, steps_offset: As in :class:`DDPMScheduler`.
    """

    predictions = ("epsilon", "v_prediction")

    def __init__(
        self, num_train_timesteps: int = 1000, beta_start: float = 0.0001, beta_end: float = 0.02, beta_schedule: str = "linear",
        trained_betas: np.ndarray | list[float] | None = None, skip_prk_steps: bool = False, set_alpha_to_one: bool = False,
        prediction_type: str = "epsilon", timestep_spacing: str = "leading", steps_offset: int = 0,
    ) -> None:  # fmt: skip
        self._warm_up = 0
        self._build()

    def _reset(self) -> None:
        super()._reset()
        self._calls = 0
        self._history: list[torch.Tensor] = []
        self._base: torch.Tensor | None = None
        self._slope: torch.Tensor | None = None

    def set_timesteps(self, num_inference_steps: int, device: str | torch.device | None = None) -> None:
        """Lays out a run; ``timesteps`` on ``device`` holds one entry per network evaluation.

        Raises:
            ValueError: Fewer than 4 steps with the Runge-Kutta warm-up, or more steps than the model was trained with.
        """
        stops = self._stops(num_inference_steps)
        half = len(self) // len(stops) // 2
        if self.config["skip_prk_steps"]:
            warm_up, rest = np.empty(0, dtype=np.int64), np.concatenate([stops[:2], stops[1:]])
        elif len(stops) < 4:
            raise ValueError(f"num_inference_steps={len(stops)}, the Runge-Kutta warm-up needs 4: set skip_prk_steps=True")
        else:
            # From each of the first three steps, two evaluations half-way and one at the next step.
            warm_up = np.array([t for a, b in pairwise(stops[:4]) for t in (a, b + half, b + half, b)])
            rest = stops[3:]
        self._set_schedule(np.concatenate([warm_up, rest]), device, torch.int64)
        self._warm_up = len(warm_up)

    def step(
        self, model_output: torch.Tensor, timestep: int | torch.Tensor, sample: torch.Tensor, return_dict: bool = True
    ) -> SchedulerOutput | tuple[torch.Tensor, ...]:
        """Goes one evaluation further.

        Args:
            model_output: ``(B, C, ...)``.
            timestep: Of this evaluation.
            sample: ``(B, C, ...)``.
            return_dict: Return a :class:`SchedulerOutput`, else ``(prev_sample,)``.

        Raises:
            ValueError: ``set_timesteps`` was not called.
        """
        if self.num_inference_steps is None:
            raise ValueError("the schedule is not laid out: call set_timesteps(num_inference_steps) before step")
        t = self._training_step(timestep)
        new = (self._runge_kutta if self._calls < self._warm_up else self.update)(model_output, t, wide(sample))
        self._calls += 1
        return self._step(sample, (new, None), return_dict)

    def _stride(self) -> int:
        return len(self) // (self.num_inference_steps or 1)

    def _runge_kutta(self, output: torch.Tensor, t: int, x: torch.Tensor) -> torch.Tensor:
        """One of the four evaluations of eq. 13."""
        stage = self._calls % 4
        start = int(self._times[self._calls - stage])
        if stage == 0:
            self._history.append(output)
            self._base, self._slope = x, None
        base = x if self._base is None else self._base
        weighted = output * (1 / 6, 1 / 3, 1 / 3, 1 / 6)[stage]
        self._slope = weighted if self._slope is None else self._slope + weighted
        reach = t - (0 if stage % 2 else self._stride() // 2)
        return self._transfer(self._slope if stage == 3 else output, base, start, reach)

    def update(self, output: torch.Tensor, t: int, x: torch.Tensor) -> torch.Tensor:
        """Adams-Bashforth on the predicted noise (eq. 12); without warm-up the second call repeats the first step (Heun)."""
        if self._calls == 1 and len(self._history) == 1 and self._base is not None:
            x, self._base = self._base, None
            return self._transfer((output + self._history[0]) / 2, x, t + self._stride(), t)
        self._history = [*self._history[-3:], output]
        if self._calls == 0:
            self._base = x
        weights = ((1.0,), (-0.5, 1.5), (5 / 12, -16 / 12, 23 / 12), (-9 / 24, 37 / 24, -59 / 24, 55 / 24))[len(self._history) - 1]
        slope = sum(w * h for w, h in zip(weights, self._history, strict=True))
        return self._transfer(slope, x, t, t - self._stride())

    def _transfer(self, output: Any, x: torch.Tensor, t: int, to: int) -> torch.Tensor:
        """Moves ``x`` from training step ``t`` to step ``to`` along the predicted noise (eq. 11, which is DDIM's transfer)."""
        here, there = self._alpha_bar[t], self._alpha_bar_at(to)
        if self.config["prediction_type"] == "v_prediction":
            output = mix((math.sqrt(1 - here), math.sqrt(here)), x, output)
        return mix((math.sqrt(there / here), math.sqrt(1 - there) - math.sqrt(there * (1 - here) / here)), x, output)
