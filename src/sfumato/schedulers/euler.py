"""Solvers of the probability flow over noise levels (arXiv:2206.00364): Euler, Heun, DPM2 and their stochastic relatives.

Samples are in variance-exploding form, ``x = x0 + sigma * noise``, or of flow models; ``scale_model_input`` gives unit variance.
Heun and DPM2 ask the network again at the end of a step or at the geometric mean of its levels: ``timesteps`` holds an entry per
evaluation; the last step, to zero noise, is Euler's and has one.
"""

from __future__ import annotations

import math
from typing import Any, ClassVar

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from ..errors import ConfigError
from ..random import BrownianNoise, Generators, noise_like
from .base import Count, Device, LevelScheduler, Run, SigmaScheduler, Time, Update, Values
from .noise import shift_flow, sigma_ramp
from .prediction import blend, polynomial_weights

CHURN = "s_churn=0.0, s_tmin=0.0, s_tmax=inf, s_noise=1.0, generator=None"
"""What ``step`` takes where noise can be added before it."""


class ExplodingScheduler(SigmaScheduler):
    """Base of the solvers of ``dx / dsigma = (x - x0) / sigma`` (arXiv:2206.00364 eq. 1).

    It holds in variance-exploding form and for flows alike: with ``prediction_type`` flow_prediction, or a configuration that comes
    from a flow model's scheduler, the same solvers run on flows.
    """

    predictions: tuple[str, ...] = ("epsilon", "v_prediction", "flow_prediction")
    set_timesteps_takes = "num_inference_steps=None, device=None, *, timesteps=None, sigmas=None, mu=None"
    _time_type = torch.float32
    _direct = False  # whether the network's output is the slope

    def _build(self) -> None:
        super()._build()
        if self.is_flow:
            self._set_flow()
        self._direct = not self._clips and self._kind == ("flow_prediction" if self.is_flow else "epsilon")
        self._spread = None if self.is_flow else 1.0

    def _set_flow(self) -> None:
        """Lays out all levels that a flow model was trained with."""
        dynamic = self.config.get("use_dynamic_shifting")
        levels = shift_flow(np.arange(len(self), 0, -1) / len(self), 1.0 if dynamic else self._shift)
        self._set_levels(np.append(levels, 0.0), levels * len(self))

    @property
    def init_noise_sigma(self) -> float:  # type: ignore[override]
        if self.is_flow:
            return 1.0
        largest = max(self._sigmas)
        return math.sqrt(largest**2 + 1) if self.config["timestep_spacing"] == "leading" else largest

    def _begin(self, timestep: Time) -> int:
        whole = not timestep.is_floating_point() if isinstance(timestep, Tensor) else not isinstance(timestep, float)
        if whole:
            remedy = "pass elements of scheduler.timesteps, not their positions"
            raise ValueError(f"timestep={timestep!r} is no float: {type(self).__name__} has fractional timesteps; {remedy}")
        return super()._begin(timestep)

    def _move(self, output: Tensor, x: Tensor, x0: Tensor, here: float, there: float) -> Tensor:
        """Euler's step from one level to another; where the network predicts the slope itself, along its output."""
        return torch.add(x, output, alpha=there - here) if self._direct else torch.lerp(x0, x, there / here)

    def _churn(
        self, x: Tensor, i: int, dtype: torch.dtype, amount: float, low: float, high: float, factor: float, generator: Generators
    ) -> tuple[Tensor, float]:
        """Adds noise before a step (arXiv:2206.00364 algorithm 2) and returns the sample with its raised level."""
        sigma = self._sigmas[i]
        if amount <= 0 or not low <= sigma <= high:
            return x, sigma
        if self.is_flow:
            raise ValueError(f"s_churn={amount} raises the noise level, which a flow cannot exceed at its start: set s_churn=0")
        raised = sigma * (1 + min(amount / (len(self._sigmas) - 1), math.sqrt(2) - 1))
        return x + noise_like(x.to(dtype), generator, factor * math.sqrt(raised**2 - sigma**2)), raised

    def _renoise(self, x: Tensor, down: float, up: float, noise: Tensor, factor: float = 1.0) -> Tensor:
        """Brings ``x`` from the level ``down`` back to ``up``, in place, with noise of the variance that is missing there."""
        ratio = (1 - up) / (1 - down) if self.is_flow else 1.0
        added = math.sqrt(max(up**2 - (ratio * down) ** 2, 0.0))
        return (x if ratio == 1 else x.mul_(ratio)).add_(noise, alpha=added * factor)


class EulerDiscreteScheduler(ExplodingScheduler):
    """Euler's method on the probability flow, with optional churn (arXiv:2206.00364 algorithm 2 without its correction)."""

    predictions: tuple[str, ...] = ("epsilon", "sample", "original_sample", "v_prediction", "flow_prediction")

    config_keys = (
        "BETAS prediction_type interpolation_type RAMPS sigma_min sigma_max timestep_spacing timestep_type"
        " steps_offset rescale_betas_zero_snr final_sigmas_type"
    )
    step_takes = CHURN
    set_timesteps_takes = "num_inference_steps=None, device=None, timesteps=None, sigmas=None, *, mu=None"

    def _build(self) -> None:
        self._continuous = self.config["timestep_type"] == "continuous" and self.config["prediction_type"] == "v_prediction"
        super()._build()
        if self._continuous:
            self._takes_times = False
            self._set_levels(np.append(self._table[::-1], 0.0), np.log(self._table[::-1]) / 4)

    def _sigmas_at(self, stops: np.ndarray) -> np.ndarray:
        even = self.config["interpolation_type"] == "log_linear"
        return sigma_ramp("exponential", *self._bounds, len(stops) + 1) if even else super()._sigmas_at(stops)

    def _times_of(self, levels: np.ndarray) -> np.ndarray:
        return np.log(levels) / 4 if self._continuous else super()._times_of(levels)

    def update(self, output: Tensor, i: int, x: Tensor, *churn: Any) -> Update:
        """Moves along the line from ``x`` at the raised sigma through its denoised form (arXiv:2206.00364 algorithm 2, line 8)."""
        x, here = self._churn(x, i, output.dtype, *churn)
        x0 = self._denoise(output, x, self._signal_noise(here)[0], here)
        return self._move(output, x, x0, here, self._sigmas[i + 1]), x0


class EulerAncestralDiscreteScheduler(ExplodingScheduler):
    """Euler steps that go further down than the next level and come back up with fresh noise."""

    config_keys = "BETAS prediction_type SPACING rescale_betas_zero_snr"
    step_takes = "generator=None"

    def update(self, output: Tensor, i: int, x: Tensor, generator: Generators) -> Update:
        """Goes down to the level from which fresh noise leads back to the next one, as DDPM's (arXiv:2006.11239 eq. 7)."""
        sigma, up = self._sigmas[i : i + 2]
        x0 = self._denoise(output, x, self._signal_noise(sigma)[0], sigma)
        down = up**2 / sigma if up < sigma else up
        return self._renoise(self._move(output, x, x0, sigma, down), down, up, noise_like(output, generator)), x0


class TwoStageScheduler(ExplodingScheduler):
    """Base of the solvers with two evaluations a step. In ``sigmas`` each inner level stands twice."""

    order: ClassVar[int] = 2
    _half = False  # whether the first evaluation's slope makes up half of the step
    _ends = 1  # how often the last level stands in ``sigmas``

    def _set_levels(self, sigmas: np.ndarray, timesteps: np.ndarray, device: Device = None) -> None:
        times = np.empty(2 * len(timesteps) - 1)
        times[::2], times[1::2] = timesteps, self._middle_times(sigmas, timesteps)
        doubled = np.concatenate([sigmas[:1], np.repeat(sigmas[1:-1], 2), np.repeat(sigmas[-1:], self._ends)])
        super()._set_levels(doubled, times, device)

    def _middle_times(self, sigmas: np.ndarray, timesteps: np.ndarray) -> np.ndarray:
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
        """Euler's step to where the network is asked again, then a step from the start with the slope there.

        The latter is the midpoint rule (arXiv:2206.00927 algorithm 1), or, with half of each slope, Heun's (arXiv:2206.00364
        algorithm 1). ``source`` is what the stochastic solvers make their noise of.
        """
        level, (here, there) = self._evaluated(i), self._sigmas[i - i % 2 : i - i % 2 + 2]
        x0 = self._denoise(output, x, self._signal_noise(level)[0], level)
        if self._start is not None:
            new, self._start = self._second(output, x, x0, (here, level, there), source), None
        elif i + 1 == len(self._times):
            new = super()._move(output, x, x0, here, there)
        else:
            new = self._move(output, x, x0, here, self._middle(here, there))
            self._start = self._move(output, x, x0, here, (here + there) / 2) if self._half else x
        return new, x0

    def _second(self, output: Tensor, x: Tensor, x0: Tensor, levels: tuple[float, float, float], source: Any) -> Tensor:
        here, level, there = levels
        return self._along(output, x, x0, level, self._start, (there - here) / (2 if self._half else 1))

    def _along(self, output: Tensor, x: Tensor, x0: Tensor, level: float, start: Any, step: float) -> Tensor:
        """Goes ``step`` in sigma from ``start`` with the slope that ``x`` has at ``level``."""
        if self._direct:
            return torch.add(start, output, alpha=step)
        return blend((1.0, step / level, -step / level), (start, x, x0))


class HeunDiscreteScheduler(TwoStageScheduler):
    """Heun's second-order method (arXiv:2206.00364 algorithm 1): the mean of the slopes at both ends of a step."""

    _half = True
    predictions: tuple[str, ...] = ("epsilon", "sample", "v_prediction", "flow_prediction")

    config_keys = "BETAS prediction_type RAMPS clip_sample clip_sample_range SPACING"
    config_defaults = {"beta_start": 0.00085, "beta_end": 0.012, "clip_sample": False}

    set_timesteps_takes = "num_inference_steps=None, device=None, num_train_timesteps=None, timesteps=None, *, sigmas=None, mu=None"


class KDPM2DiscreteScheduler(TwoStageScheduler):
    """DPM-Solver-2 in the form of the midpoint rule at the geometric mean (arXiv:2206.00927, arXiv:2206.00364 appendix)."""

    _ends = 3

    config_keys = "BETAS RAMPS prediction_type SPACING"
    config_defaults = {"beta_start": 0.00085, "beta_end": 0.012}

    set_timesteps_takes = "num_inference_steps=None, device=None, num_train_timesteps=None, *, timesteps=None, sigmas=None, mu=None"

    def _levels_at(self, stops: np.ndarray) -> Run:
        levels, times = super()._levels_at(stops)
        self._time_type = torch.float64 if self._ramp else torch.float32
        return levels, times.round() if self._ramp == "karras" else times  # as released pictures were made

    def _middle_times(self, sigmas: np.ndarray, timesteps: np.ndarray) -> np.ndarray:
        return self._times_of(np.sqrt(sigmas[:-2] * sigmas[1:-1]))

    def _middle(self, here: float, there: float) -> float:
        return math.sqrt(here * there)


class KDPM2AncestralDiscreteScheduler(KDPM2DiscreteScheduler):
    """DPM-Solver-2 to the level ``next**2 / sigma``, from where noise leads back up: the geometric mean is the next level."""

    step_takes = "generator=None"

    def _middle_times(self, sigmas: np.ndarray, timesteps: np.ndarray) -> np.ndarray:
        return self._times_of(sigmas[1:-1])

    def _middle(self, here: float, there: float) -> float:
        return there

    def _second(self, output: Tensor, x: Tensor, x0: Tensor, levels: tuple[float, float, float], source: Any) -> Tensor:
        here, level, there = levels
        down = there**2 / here
        new = self._along(output, x, x0, level, self._start, down - here)
        return self._renoise(new, down, there, noise_like(output, source))


class LMSDiscreteScheduler(ExplodingScheduler):
    """Adams-Bashforth steps on uneven levels (linear multistep): the polynomial through the last slopes is integrated."""

    predictions: tuple[str, ...] = ("epsilon", "sample", "v_prediction", "flow_prediction")

    config_keys = "BETAS RAMPS prediction_type SPACING"
    step_takes = "order=4"

    def update(self, output: Tensor, i: int, x: Tensor, order: int) -> Update:
        """Adams-Bashforth in sigma (arXiv:2206.00364 eq. 1)."""
        here, there = self._sigmas[i : i + 2]
        x0 = self._denoise(output, x, self._signal_noise(here)[0], here)
        slope = output if self._direct else (x - x0).div_(here)
        self._history = [slope, *self._history[: order - 1]]
        step = there - here
        nodes = [(self._sigmas[i - k] - here) / step for k in range(len(self._history))]
        weights = polynomial_weights(nodes, [step / (k + 1) for k in range(len(nodes))])
        return blend((1.0, *weights), (x, *self._history)), x0


class DPMSolverSDEScheduler(KDPM2DiscreteScheduler):
    """Stochastic DPM-Solver++ with a midpoint at half the step in log sigma (arXiv:2211.01095 section 5, with r = 1/2).

    Its noise is increments of one Brownian motion over sigma per run, so that runs with more steps approach the same picture.
    """

    _ends, _time_type = 1, torch.float64

    config_keys = "BETAS prediction_type RAMPS noise_sampler_seed SPACING"
    step_takes = "return_dict=True, s_noise=1.0, *, generator=None"

    def update(self, output: Tensor, i: int, x: Tensor, factor: float, generator: Generators) -> Update:  # type: ignore[override]
        if self._path is None:
            seed, ends = self.config["noise_sampler_seed"], (min(s for s in self._sigmas if s > 0), max(self._sigmas))
            self._path = BrownianNoise(x.to(output.dtype), *ends, seed=seed, generator=generator)
        self._factor = factor
        return super().update(output, i, x)

    _levels_at = ExplodingScheduler._levels_at

    def _middle(self, here: float, there: float) -> float:
        low, high = torch.tensor((here, there)).log()
        return torch.lerp(low, high, 0.5).exp().item()

    def _second(self, output: Tensor, x: Tensor, x0: Tensor, levels: tuple[float, float, float], source: Any) -> Tensor:
        return self._move(output, self._start, x0, levels[0], levels[2])

    def _move(self, output: Tensor, x: Tensor, x0: Tensor, here: float, there: float) -> Tensor:
        """An ancestral step (arXiv:2211.01095 section 5)."""
        assert self._path is not None
        down = there**2 / here
        # The path is as rough as its time is exact: these are the times at which released pictures were made.
        ends = [torch.tensor(level).log().exp().item() for level in (here, there)]
        return self._renoise(torch.lerp(x0, x, down / here), down, there, self._path(*ends), self._factor)


class FlowScheduler(ExplodingScheduler):
    """Base of the schedulers for flow models alone: ``x = (1 - sigma) * x0 + sigma * noise``, ``dx / dsigma`` is the prediction."""

    predictions: tuple[str, ...] = ("flow_prediction",)

    def _build(self) -> None:
        kind = self.config.get("prediction_type", "flow_prediction")
        if kind != "flow_prediction":
            remedy = "take the class of the same name without 'FlowMatch'"
            raise ConfigError(f"{type(self).__name__} is for flow models, the configuration has prediction_type={kind!r}: {remedy}")
        self._kind, self._direct, self._thresholds, self._clips = "flow_prediction", True, False, False
        self._ramp = self._read_ramp()
        self._read_flow()
        self._set_flow()

    @property
    def shift(self) -> float:
        """The static shift of the levels."""
        return self.config["shift"]

    def set_shift(self, shift: float) -> None:
        """Replaces the static shift; it acts from the next ``set_timesteps`` on."""
        self.register_to_config(shift=shift)
        self._shift = shift

    def scale_noise(self, sample: Tensor, timestep: Tensor, noise: Tensor) -> Tensor:
        """Mixes clean samples ``(B, ...)`` with noise at the level of ``timestep``, as :meth:`add_noise` does."""
        return self.add_noise(sample, noise, torch.as_tensor(timestep).reshape(-1))


class FlowMatchEulerDiscreteScheduler(FlowScheduler):
    """Euler's method for flow models.

    ``set_timesteps`` takes a number of steps, levels without the one to end at, ``timesteps``, or several of these of one length.
    ``mu`` has an effect with ``use_dynamic_shifting`` only: pipelines work it out for every model of a family.
    """

    config_keys = "SHIFTS stochastic_sampling"
    step_takes = f"{CHURN}, per_token_timesteps=None"
    set_timesteps_takes = "num_inference_steps=None, device=None, sigmas=None, mu=None, timesteps=None"

    def _lay_out(self, num_inference_steps: Count, device: Device, sigmas: Values, mu: Any, timesteps: Values) -> None:  # type: ignore[override]
        lengths = {num_inference_steps, *(len(given) for given in (sigmas, timesteps) if given is not None)} - {None}
        if len(lengths) != 1:
            raise ValueError("set_timesteps takes num_inference_steps, sigmas or timesteps, or several of them of one length")
        mu = mu if self.config["use_dynamic_shifting"] else None
        self._take(*self._flow_levels(num_inference_steps, timesteps, sigmas, mu), device)

    def update(self, output: Tensor, i: int, x: Tensor, *more: Any) -> Tensor:
        """Euler's step along the prediction, or with fresh noise in place of the old (arXiv:2210.02747)."""
        *churn, times = more  # its last is the generator
        if churn[0] > 0:
            self._churn(x, i, x.dtype, *churn)  # which flows refuse
        levels: Any = self._sigmas[i : i + 2]
        here, there = levels
        if times is not None:
            here = times.to(x.dtype).unsqueeze(-1) / len(self)  # (B, N, 1)
            levels = self.sigmas.to(x.device, x.dtype).view(-1, 1, 1, 1)
            there = torch.where(levels < here - 1e-6, levels, 0.0).amax(0)
        if self.config["stochastic_sampling"]:
            return noise_like(x, churn[-1], there).add_((x - here * output) * (1 - there))
        return torch.add(x, output, alpha=there - here) if times is None else x + (there - here) * output


class FlowMatchHeunDiscreteScheduler(FlowScheduler, HeunDiscreteScheduler):
    """Heun's method for flow models."""

    config_keys = "num_train_timesteps shift"
    step_takes = CHURN
    set_timesteps_takes = "num_inference_steps=None, device=None, *, sigmas=None"

    def update(self, output: Tensor, i: int, x: Tensor, *churn: Any) -> Tensor:  # type: ignore[override]
        """One evaluation; see :class:`TwoStageScheduler`."""
        self._churn(x, i, x.dtype, *churn)  # which flows refuse
        return super().update(output, i, x)[0]


class FlowMatchLCMScheduler(FlowMatchEulerDiscreteScheduler):
    """Consistency sampling for flow models: denoise, then noise anew to the next level (arXiv:2310.04378 algorithm 3)."""

    config_keys = "SHIFTS scale_factors upscale_mode"
    step_takes = "generator=None"

    def set_scale_factors(self, scale_factors: list[float], upscale_mode: str) -> None:
        """Replaces the growth of the sample from step to step."""
        self.register_to_config(scale_factors=scale_factors, upscale_mode=upscale_mode)

    def update(self, output: Tensor, i: int, x: Tensor, generator: Generators) -> Tensor:
        """To the denoised sample, which may grow, and to the next level with fresh noise (arXiv:2310.04378 algorithm 3)."""
        here, there = self._sigmas[i : i + 2]
        x0 = torch.add(x, output, alpha=-here)
        factors, self._start = self.config["scale_factors"] or [], self._start or x.shape[2:]
        if i < len(factors):
            size = [round(factors[i] * side) for side in self._start]
            x0 = F.interpolate(x0, size=size, mode=self.config["upscale_mode"])
        return noise_like(x0, generator).lerp_(x0, 1 - there)


class LTXEulerAncestralRFScheduler(FlowScheduler):
    """Euler's method for flow models with noise put back at each step.

    ``set_timesteps`` takes a number of steps, or levels, as ``sigmas`` or ``timesteps``, with the one to end at, and nothing else.
    """

    config_keys = "num_train_timesteps eta s_noise"
    config_defaults = {"eta": 1.0}
    step_takes = "generator=None"
    set_timesteps_takes = "num_inference_steps=None, device=None, sigmas=None, timesteps=None, mu=None, **kwargs"

    def _lay_out(self, num_inference_steps: Count, device: Device, sigmas: Any, timesteps: Any, mu: Any) -> None:  # type: ignore[override]
        if (given := timesteps if sigmas is None else sigmas) is None:
            super()._lay_out(num_inference_steps, device)
            return
        levels = np.asarray(given, dtype=np.float64)
        if levels.min() < 0 or levels.max() > 1:
            raise ValueError(f"sigmas={levels.tolist()}: the levels of a flow lie in 0..1")
        self.num_inference_steps = len(levels) - 1
        self._set_levels(np.append(levels, levels[-1]), levels * len(self), device)
        self.sigmas = self.sigmas[:-1]

    def update(self, output: Tensor, i: int, x: Tensor, generator: Generators) -> Tensor:
        """Down below the next level, and up with fresh noise as Euler ancestral does; rectified flow (arXiv:2209.03003 eq. 1)."""
        here, there = self._sigmas[i : i + 2]
        if here == there:  # the last of the given levels, which no step leaves
            return x
        down = there * (1 + (there / here - 1) * self.config["eta"])
        new = torch.add(x, output, alpha=down - here)
        if there and down != there and self.config["s_noise"]:
            return self._renoise(new, down, there, noise_like(x, generator), self.config["s_noise"])
        return new


class EDMScheduler(SigmaScheduler):
    """Base of EDM's schedulers (arXiv:2206.00364, table 1): ``x = x0 + sigma * noise`` with a network at unit variance.

    ``x0 = c_skip * x + c_out * output``, the network's input is ``c_in * x``, and its time ``log(sigma) / 4``.
    """

    predictions: tuple[str, ...] = ("epsilon", "v_prediction")
    config_defaults = {"sigma_min": 0.002, "sigma_max": 80.0}
    _precision, _time_type = torch.float64, torch.float32  # of the levels as they are laid, and of what the network is told

    def _build(self) -> None:
        LevelScheduler._build(self)
        self._spread = self.config["sigma_data"]
        self._set_levels(*self._run_levels(len(self), None, None, None))

    def _run_levels(self, count: Count, timesteps: Any, sigmas: Any, mu: float | None, train_steps: Count = None) -> Run:
        """Lays out so many levels, or those at the places ``sigmas`` between ``sigma_max``, 0, and ``sigma_min``, 1."""
        c, places = self.config, self._check_count(count) if sigmas is None else np.asarray(sigmas, np.float64)
        if isinstance(places, np.ndarray) and (places.min() < 0 or places.max() > 1):
            raise ValueError(f"sigmas={places.tolist()}: expected places between 0 (sigma_max) and 1 (sigma_min)")
        levels = sigma_ramp(c["sigma_schedule"], c["sigma_max"], c["sigma_min"], places, c["rho"], self._precision)
        return np.append(levels, levels[-1] if c["final_sigmas_type"] == "sigma_min" else 0.0), self._times_of(levels)

    def _times_of(self, levels: np.ndarray) -> np.ndarray:
        return np.log(levels) / 4

    @property
    def init_noise_sigma(self) -> float:  # type: ignore[override]
        return math.sqrt(self.config["sigma_max"] ** 2 + 1)

    def _coefficients(self, alpha: float, sigma: float) -> tuple[float, float]:
        data = self.config["sigma_data"]
        variance = sigma**2 + data**2
        out = sigma * data / math.sqrt(variance)
        return data**2 / variance, -out if self._kind == "v_prediction" else out


class EDMEulerScheduler(EDMScheduler, EulerDiscreteScheduler):
    """Euler's method with EDM's preconditioning and optional churn (arXiv:2206.00364 algorithm 2 without its correction)."""

    config_keys = "EDM prediction_type rho final_sigmas_type"
    step_takes = f"{CHURN}, return_dict=True, pred_original_sample=None"
    set_timesteps_takes = "num_inference_steps=None, device=None, sigmas=None"

    def _lay_out(self, num_inference_steps: Count, device: Device, sigmas: Any) -> None:  # type: ignore[override]
        super()._lay_out(num_inference_steps if sigmas is None else None, device, None, sigmas)

    def update(self, output: Tensor, i: int, x: Tensor, *more: Any) -> Update:
        *churn, x0 = more
        if x0 is None:
            return super().update(output, i, x, *churn)
        x, here = self._churn(x, i, x0.dtype, *churn)
        return torch.lerp(x0.to(x.dtype), x, self._sigmas[i + 1] / here), x0
