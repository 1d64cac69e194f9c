"""Consistency models: a network that jumps to the clean sample, and steps that jump there and come part of the way back.

The classes differ in their levels and in the boundary condition that makes ``x0 = x`` where there is no noise.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from ..errors import ConfigError
from ..outputs import BaseOutput
from ..random import Generators, noise_like
from .base import Count, Device, SchedulerMixin, SigmaScheduler, StepScheduler, Time, Update, Values
from .noise import given_steps, one_source, sigma_ramp
from .prediction import denoised_coefficients, mix, noise_coefficients


@dataclass
class LCMSchedulerOutput(BaseOutput):
    """Result of a step: the next sample ``prev_sample``, and the clean one, ``denoised``."""

    prev_sample: Tensor
    denoised: Tensor | None = None


@dataclass
class TCDSchedulerOutput(BaseOutput):
    """Result of a step: the next sample ``prev_sample``, and what it was before fresh noise, ``pred_noised_sample``."""

    prev_sample: Tensor
    pred_noised_sample: Tensor | None = None


class ConsistencyScheduler(SchedulerMixin):
    """Base of multistep consistency sampling."""

    step_takes = "generator=None"
    _tells_denoised = True  # whether the clean sample is part of a step's result
    _jump: Callable[[Tensor, int, Tensor], Tensor]
    """Returns the clean sample, from the output, the position and the sample: the consistency function."""
    _next_level: Callable[[int], tuple[float, float] | None]
    """Returns the factors of signal and noise at the level after a position; ``None`` draws no noise."""

    def update(self, output: Tensor, i: int, x: Tensor, generator: Generators) -> Update:
        """Jumps to the clean sample and, unless it is the last step, back with noise (arXiv:2303.01469 algorithm 1)."""
        self._count()
        x0, levels = self._jump(output, i, x), self._next_level(i)
        new = x0 if levels is None else torch.add(noise_like(output, generator, levels[1]), x0, alpha=levels[0])
        return new, x0 if self._tells_denoised else None


class DistilledScheduler(StepScheduler):
    """Base of samplers for models distilled on the training steps of another sampler."""

    _resets_origin = False  # whether set_timesteps(original_inference_steps=...) takes all training steps, whatever it says
    _position = SchedulerMixin._position  # in the run: given steps need not be even
    config_keys = (
        "BETAS original_inference_steps clip_sample clip_sample_range set_alpha_to_one steps_offset"
        " prediction_type LIMITS timestep_spacing timestep_scaling rescale_betas_zero_snr"
    )
    config_defaults = {"beta_start": 0.00085, "beta_end": 0.012, "beta_schedule": "scaled_linear", "clip_sample": False,
                       "timestep_spacing": "leading"}  # fmt: skip

    def set_timesteps(
        self, num_inference_steps: Count = None, device: Device = None, original_inference_steps: int | None = None,
        timesteps: Values = None, strength: float = 1.0,
    ) -> None:  # fmt: skip
        """Lays out a run: ``strength`` is the share of it to keep; ``original_inference_steps`` overrides the configuration's."""
        one_source(num_inference_steps=num_inference_steps, timesteps=timesteps)
        total = len(self)
        if timesteps is not None:
            stops = given_steps(timesteps, total)
            self.num_inference_steps = len(stops)
            stops = stops[max(len(stops) - int(len(stops) * strength), 0) :]
        else:
            self.num_inference_steps = count = self._check_count(num_inference_steps)
            given = total if self._resets_origin and original_inference_steps else original_inference_steps
            original = given or self.config["original_inference_steps"]
            origin = np.arange(1, int(original * strength) + 1)[::-1] * (total // original) - 1
            if original > total or count > len(origin):
                limit = f"original_inference_steps={original} (of {total} training steps) at strength={strength}"
                raise ValueError(f"num_inference_steps={count} is more than {limit}: raise these, or lower num_inference_steps")
            stops = origin[np.linspace(0, len(origin), count, endpoint=False).astype(np.int64)]
        self._set_schedule(stops, device)


class LCMScheduler(ConsistencyScheduler, DistilledScheduler):
    """Latent consistency models (arXiv:2310.04378)."""

    _output = LCMSchedulerOutput

    def get_scalings_for_boundary_condition_discrete(self, timestep: float) -> tuple[float, float]:
        """Returns ``(c_skip, c_out)`` at a training step (arXiv:2303.01469 eq. 5, appendix C, with ``sigma_data`` 0.5)."""
        scaled = timestep * self.config["timestep_scaling"]
        return 0.25 / (scaled**2 + 0.25), scaled / math.sqrt(scaled**2 + 0.25)

    def _jump(self, output: Tensor, i: int, x: Tensor) -> Tensor:
        """The consistency function on the denoised sample (arXiv:2310.04378 eq. 9)."""
        t = int(self._times[i])
        skip, out = self.get_scalings_for_boundary_condition_discrete(t)
        if self._clips or self._thresholds:
            return mix((out, skip), self._denoise(output, x, *self._signal_noise(t)), x)
        own, of_output = self._coefficients(*self._signal_noise(t))
        return mix((out * own + skip, out * of_output), x, output)

    def _next_level(self, i: int) -> tuple[float, float] | None:
        return None if i + 1 == len(self._times) else self._signal_noise(int(self._times[i + 1]))


class TCDScheduler(DistilledScheduler):
    """Trajectory consistency distillation (arXiv:2402.19159): jumps to any level of the trajectory, not only to its end.

    The jump passes no clean sample, so that nothing is clipped, whatever the configuration says.
    """

    _output = TCDSchedulerOutput
    _resets_origin = True

    step_takes = "eta=0.3, generator=None"

    def update(self, output: Tensor, i: int, x: Tensor, eta: float, generator: Generators) -> Update:
        """Strategic stochastic sampling (algorithm 4): down to a level beyond the next, and up from there with noise."""
        self._count()
        if not 0 <= eta <= 1:
            raise ValueError(f"eta={eta}, expected 0 (no fresh noise) to 1 (all noise fresh)")
        t, following = int(self._times[i]), int(self._times[i + 1]) if i + 1 < len(self._times) else 0
        beyond = self._alpha_bar[int((1 - eta) * following)]
        levels, kept = self._signal_noise(t), self._alpha_bar[following] / beyond
        parts = denoised_coefficients(self._kind, *levels), noise_coefficients(self._kind, *levels)
        own, of_output = (math.sqrt(beyond) * a + math.sqrt(1 - beyond) * b for a, b in zip(*parts, strict=True))
        noised = mix((own, of_output), x, output)
        if not eta or i + 1 == len(self._times):
            return noised, noised
        return torch.add(noise_like(output, generator, math.sqrt(1 - kept)), noised, alpha=math.sqrt(kept)), noised


class CMStochasticIterativeScheduler(ConsistencyScheduler, SigmaScheduler):
    """Consistency models in variance-exploding form (arXiv:2303.01469)."""

    _tells_denoised, _time_type = False, torch.float64
    config_keys = "num_train_timesteps sigma_min sigma_max sigma_data s_noise rho clip_denoised"
    config_defaults = {"num_train_timesteps": 40, "sigma_min": 0.002, "sigma_max": 80.0}
    set_timesteps_takes = "num_inference_steps=None, device=None, timesteps=None"
    _most = 0

    def _build(self) -> None:
        self.init_noise_sigma, self._spread = self.config["sigma_max"], self.config["sigma_data"]
        self._lay_places(np.arange(len(self)))

    def _lay_out(self, num_inference_steps: Count, device: Device, timesteps: Values) -> None:  # type: ignore[override]
        self._lay_places(self._chosen(num_inference_steps, timesteps)[::-1], device)

    def _stops(self, count: int, train_steps: int | None = None) -> np.ndarray:
        return np.arange(count)[::-1] * (len(self) // count)

    def _lay_places(self, places: np.ndarray, device: Device = None) -> None:
        c = self.config
        levels = sigma_ramp("karras", c["sigma_max"], c["sigma_min"], places / (len(self) - 1), rho=c["rho"])
        self._set_levels(np.append(levels, c["sigma_min"]), self.sigma_to_t(levels), device)

    def sigma_to_t(self, sigmas: np.ndarray) -> np.ndarray:
        """Returns what the network is told of noise levels: ``250 * log(sigma)``."""
        return 250 * np.log(np.asarray(sigmas) + 1e-44)

    def get_scalings_for_boundary_condition(self, sigma: float) -> tuple[float, float]:
        """Returns ``(c_skip, c_out)`` at a noise level (appendix C)."""
        data, above = self.config["sigma_data"], sigma - self.config["sigma_min"]
        return data**2 / (above**2 + data**2), above * data / math.sqrt(sigma**2 + data**2)

    def _jump(self, output: Tensor, i: int, x: Tensor) -> Tensor:
        """The consistency function (eq. 5)."""
        x0 = mix(self.get_scalings_for_boundary_condition(self._sigmas[i]), x, output)
        return x0.clamp_(-1, 1) if self.config["clip_denoised"] else x0

    def _next_level(self, i: int) -> tuple[float, float] | None:
        fresh = math.sqrt(max(self._sigmas[i + 1] ** 2 - self.config["sigma_min"] ** 2, 0.0))
        return (1.0, self.config["s_noise"] * fresh) if len(self._times) > 1 else None


class ConsistencyDecoderScheduler(ConsistencyScheduler, StepScheduler):
    """The two steps of DALL-E 3's consistency decoder, on the cosine table."""

    _tells_denoised = False
    _position = SchedulerMixin._position
    _least = _most = 2
    set_timesteps_takes = "num_inference_steps=None, device=None"
    config_keys = "num_train_timesteps sigma_data"
    config_defaults = {"num_train_timesteps": 1024}

    def _build(self) -> None:
        if len(self) <= 1008:
            raise ConfigError(f"num_train_timesteps={len(self)}, expected 1024: the decoder steps from 1008 to 512")
        super()._build()
        self.init_noise_sigma = self._signal_noise(1008)[1]

    def _stops(self, count: int) -> np.ndarray:
        return np.array([1008, 512])

    def scale_model_input(self, sample: Tensor, timestep: Time | None = None) -> Tensor:
        signal, noise = self._signal_noise(int(self._times[self._position(timestep)]))
        return sample * (1 / math.hypot(noise, signal * self.config["sigma_data"]))

    def _jump(self, output: Tensor, i: int, x: Tensor) -> Tensor:
        """The consistency function (arXiv:2303.01469 eq. 5 and appendix C) of a sample in variance-preserving form."""
        (signal, noise), data = self._signal_noise(int(self._times[i])), self.config["sigma_data"]
        total = math.hypot(noise, signal * data)
        return mix(((data / total) ** 2 * signal, data * noise / total), x, output)

    def _next_level(self, i: int) -> tuple[float, float] | None:
        return None if i else self._signal_noise(512)


class SCMScheduler(ConsistencyScheduler):
    """Continuous-time consistency models in TrigFlow (arXiv:2410.11081); the last of ``timesteps`` is where the run ends."""

    config_keys = "num_train_timesteps prediction_type sigma_data"
    config_defaults = {"prediction_type": "trigflow"}
    config_choices = {"prediction_type": ("trigflow",)}
    _most = 0

    def _build(self) -> None:
        self._set_schedule(np.arange(len(self))[::-1])

    def set_timesteps(
        self, num_inference_steps: int, timesteps: Values | Tensor = None, device: Device = None,
        max_timesteps: float | None = 1.57080, intermediate_timesteps: float | None = 1.3,
    ) -> None:  # fmt: skip
        """Lays out a run from ``max_timesteps`` (at most pi / 2) to 0, by ``intermediate_timesteps`` where it is of two steps.

        Explicit ``timesteps``, one more than steps, and evenly spaced steps take ``None`` for what they replace.
        """
        count = self._check_count(num_inference_steps)
        one_source(timesteps=timesteps, max_timesteps=max_timesteps)
        if timesteps is not None and len(timesteps) != count + 1:
            raise ValueError(f"num_inference_steps={count}, expected one less than there are timesteps")
        if intermediate_timesteps is not None and (count != 2 or timesteps is not None):
            raise ValueError(f"intermediate_timesteps={intermediate_timesteps} is for num_inference_steps=2 alone: set it to None")
        if timesteps is not None:
            times = np.array(torch.as_tensor(timesteps).tolist())
        else:
            times = np.linspace(float(max_timesteps or 0), 0, count + 1)
            times[1] = times[1] if intermediate_timesteps is None else intermediate_timesteps
        self.num_inference_steps, self._time_type = count, torch.float32
        self._set_schedule(times, device)
        self._ends, self._times = self._times[1:], self._times[:-1]

    def _jump(self, output: Tensor, i: int, x: Tensor) -> Tensor:
        """The consistency function (eq. 5): the rest of the way along the circle."""
        return mix((math.cos(self._times[i]), -math.sin(self._times[i])), x, output)

    def _next_level(self, i: int) -> tuple[float, float] | None:
        return math.cos(self._ends[i]), math.sin(self._ends[i]) * self.config["sigma_data"]
