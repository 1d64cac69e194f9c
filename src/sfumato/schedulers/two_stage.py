"""Solvers that ask the network twice a step: Heun, DPM2 and their stochastic relatives.

The probability flow ``dx / dsigma = (x - x0) / sigma`` is followed from one level to the next with a second evaluation, at the end
of the step or at the geometric mean of its levels. ``timesteps`` holds an entry per evaluation; the last step, to zero noise, is
Euler's and has one.
"""

from __future__ import annotations

import math
from typing import Any, ClassVar

import numpy as np
import torch
from torch import Tensor

from ..random import Generators
from .base import Count, Device, StepResult, StochasticScheduler, Time, Update, Values
from .brownian import BrownianNoise
from .euler import ExplodingScheduler
from .noise import noise_like, one_source
from .prediction import blend

Levels = tuple[float, float, float]
"""Where a step sets out from, where the network is asked the second time, and where the step ends."""
Pair = tuple[Tensor, Tensor]


class TwoStageScheduler(ExplodingScheduler):
    """Base of the solvers with two evaluations a step. In ``sigmas`` each inner level stands twice."""

    order: ClassVar[int] = 2
    _ends = 1  # how often the last level stands in ``sigmas``

    def _set_levels(self, sigmas: np.ndarray, timesteps: np.ndarray, device: Device = None) -> None:
        times = np.empty(2 * len(timesteps) - 1)
        times[::2], times[1::2] = timesteps, self._middle_times(sigmas, timesteps)
        doubled = np.concatenate([sigmas[:1], np.repeat(sigmas[1:-1], 2), np.repeat(sigmas[-1:], self._ends)])
        super()._set_levels(doubled, times, device)

    def _middle_times(self, sigmas: np.ndarray, timesteps: np.ndarray) -> np.ndarray:
        """Returns the timesteps of the second evaluations."""
        return timesteps[1:]

    def _middle(self, here: float, there: float) -> float:
        """Returns the level of the second evaluation of a step."""
        return there

    def _evaluated(self, i: int) -> float:
        return self._middle(*self._sigmas[i - 1 : i + 1]) if i % 2 else self._sigmas[i]

    def _begin(self, timestep: Time) -> int:
        if (i := super()._begin(timestep)) % 2:
            raise ValueError(f"position {i} is the second evaluation of a step: begin at an even position of the schedule")
        return i

    def update(self, output: Tensor, i: int, x: Tensor, source: Any = None) -> Update:
        """One evaluation; ``source`` is what the stochastic solvers make their noise of."""
        level, (here, there) = self._evaluated(i), self._sigmas[i - i % 2 : i - i % 2 + 2]
        x0 = self._denoise(output, x, self._signal_noise(level)[0], level)
        if self._start is not None:
            new, self._start = self.second(output, x, x0, (here, level, there), self._start, source), None
        elif i + 1 == len(self._times):
            new = self._move(output, x, x0, here, there)
        else:
            new, self._start = self.first(output, x, x0, (here, self._middle(here, there), there), source)
        return new, x0

    def first(self, output: Tensor, x: Tensor, x0: Tensor, levels: Levels, source: Any) -> Pair:
        """Euler's step to the level of the second evaluation; also returns what that sets out from."""
        return self._move(output, x, x0, *levels[:2]), x

    def second(self, output: Tensor, x: Tensor, x0: Tensor, levels: Levels, start: Tensor, source: Any) -> Tensor:
        """Goes the whole step from its start with the slope half-way (midpoint rule)."""
        return self._along(output, x, x0, levels[1], start, levels[2] - levels[0])

    def _along(self, output: Tensor, x: Tensor, x0: Tensor, level: float, start: Any, step: float) -> Tensor:
        """Goes ``step`` in sigma from ``start`` with the slope that ``x`` has at ``level``."""
        if self._direct:
            return torch.add(start, output, alpha=step)
        return blend((1.0, step / level, -step / level), (start, x, x0))


class HeunDiscreteScheduler(TwoStageScheduler):
    """Heun's second-order method (arXiv:2206.00364 algorithm 1): the mean of the slopes at both ends of a step."""

    predictions: tuple[str, ...] = ("epsilon", "sample", "v_prediction", "flow_prediction")

    config_keys = "BETAS prediction_type RAMPS clip_sample clip_sample_range SPACING"
    config_defaults = {"beta_start": 0.00085, "beta_end": 0.012, "clip_sample": False}

    def set_timesteps(
        self, num_inference_steps: Count = None, device: Device = None, num_train_timesteps: int | None = None,
        timesteps: Values = None, *, sigmas: Values = None, mu: float | None = None,
    ) -> None:  # fmt: skip
        """Lays out a run; ``num_train_timesteps`` overrides the configuration's. See :class:`SchedulerMixin`."""
        one_source(num_inference_steps=num_inference_steps, timesteps=timesteps, sigmas=sigmas)
        if timesteps is not None and self._ramp:
            raise ValueError(f"timesteps cannot be set with use_{self._ramp}_sigmas=True: pass sigmas")
        self._lay_out(device, num_inference_steps, timesteps, sigmas, mu, num_train_timesteps)

    def first(self, output: Tensor, x: Tensor, x0: Tensor, levels: Levels, source: Any) -> Pair:
        """Euler's step to the next level, and half of it, to which the other slope's half will be added."""
        here, _, there = levels
        return self._move(output, x, x0, here, there), self._move(output, x, x0, here, (here + there) / 2)

    def second(self, output: Tensor, x: Tensor, x0: Tensor, levels: Levels, start: Tensor, source: Any) -> Tensor:
        """The other half of the step, with the slope at its end."""
        here, _, there = levels
        return self._along(output, x, x0, there, start, (there - here) / 2)


class KDPM2DiscreteScheduler(TwoStageScheduler):
    """DPM-Solver-2 in the form of the midpoint rule at the geometric mean (arXiv:2206.00927, arXiv:2206.00364 appendix)."""

    _ends = 3

    config_keys = "BETAS RAMPS prediction_type SPACING"
    config_defaults = {"beta_start": 0.00085, "beta_end": 0.012}

    def set_timesteps(
        self, num_inference_steps: Count = None, device: Device = None, num_train_timesteps: int | None = None, *,
        sigmas: Values = None, mu: float | None = None,
    ) -> None:  # fmt: skip
        one_source(num_inference_steps=num_inference_steps, sigmas=sigmas)
        self._lay_out(device, num_inference_steps, None, sigmas, mu, num_train_timesteps)

    def _levels_at(self, stops: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        levels, times = super()._levels_at(stops)
        self._time_type = torch.float64 if self._ramp else torch.float32
        return levels, times.round() if self._ramp == "karras" else times  # as released pictures were made

    def _middle_times(self, sigmas: np.ndarray, timesteps: np.ndarray) -> np.ndarray:
        return self._times_of(np.sqrt(sigmas[:-2] * sigmas[1:-1]))

    def _middle(self, here: float, there: float) -> float:
        return math.sqrt(here * there)


class KDPM2AncestralDiscreteScheduler(StochasticScheduler, KDPM2DiscreteScheduler):
    """DPM-Solver-2 to a level below the next one, from which fresh noise leads back up.

    That level is ``next**2 / sigma``, so the geometric mean of the step is the next level itself.
    """

    def _middle_times(self, sigmas: np.ndarray, timesteps: np.ndarray) -> np.ndarray:
        return self._times_of(sigmas[1:-1])

    def _middle(self, here: float, there: float) -> float:
        return there

    def second(self, output: Tensor, x: Tensor, x0: Tensor, levels: Levels, start: Tensor, source: Any) -> Tensor:
        """The midpoint rule to the lower level, and noise."""
        here, middle, there = levels
        down = there**2 / here
        return self._renoise(self._along(output, x, x0, middle, start, down - here), down, there, noise_like(output, source))


class DPMSolverSDEScheduler(KDPM2DiscreteScheduler):
    """Stochastic DPM-Solver++ with a midpoint at half the step in log sigma (arXiv:2211.01095 section 5, with r = 1/2).

    Its noise is increments of one Brownian motion over sigma per run, so that runs with more steps approach the same picture.
    """

    _ends, _time_type = 1, torch.float64

    config_keys = "BETAS prediction_type RAMPS noise_sampler_seed SPACING"
    config_defaults = {"beta_start": 0.00085, "beta_end": 0.012}

    def step(
        self, model_output: Tensor, timestep: Time, sample: Tensor, return_dict: bool = True, s_noise: float = 1.0, *,
        generator: Generators = None,
    ) -> StepResult:  # fmt: skip
        """Goes one evaluation further, with ``s_noise`` times the noise; ``generator`` seeds it in the run's first step."""
        return self._advance(model_output, timestep, sample, return_dict, s_noise, generator)

    def update(self, output: Tensor, i: int, x: Tensor, factor: float, generator: Generators) -> Update:  # type: ignore[override]
        """One evaluation, with ``factor`` times the noise."""
        if self._path is None:
            seed, ends = self.config["noise_sampler_seed"], (min(s for s in self._sigmas if s > 0), max(self._sigmas))
            self._path = BrownianNoise(x.to(output.dtype), *ends, seed=seed, generator=generator)
        return super().update(output, i, x, factor)

    def _levels_at(self, stops: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        return ExplodingScheduler._levels_at(self, stops)

    def _middle(self, here: float, there: float) -> float:
        low, high = torch.tensor((here, there)).log()
        return torch.lerp(low, high, 0.5).exp().item()

    def first(self, output: Tensor, x: Tensor, x0: Tensor, levels: Levels, source: Any) -> Pair:
        """An ancestral step to the level of the second evaluation."""
        return self._ancestral(x, x0, *levels[:2], source), x

    def second(self, output: Tensor, x: Tensor, x0: Tensor, levels: Levels, start: Tensor, source: Any) -> Tensor:
        """An ancestral step from the start of the step, towards the second evaluation's denoised sample."""
        return self._ancestral(start, x0, levels[0], levels[2], source)

    def _ancestral(self, x: Tensor, x0: Tensor, here: float, there: float, factor: float) -> Tensor:
        assert self._path is not None
        down = there**2 / here
        # The path is as rough as its time is exact: these are the times at which released pictures were made.
        ends = [torch.tensor(level).log().exp().item() for level in (here, there)]
        return self._renoise(torch.lerp(x0, x, down / here), down, there, self._path(*ends), factor)
