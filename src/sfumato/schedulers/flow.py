"""Solvers for flow models: ``x = (1 - sigma) * x0 + sigma * noise``, whose network predicts ``noise - x0`` (arXiv:2210.02747).

``dx / dsigma`` is that prediction, so Euler's and Heun's methods are those of the other schedulers.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from ..errors import ConfigError
from ..random import Generators, noise_like
from .base import Count, Device, Values
from .euler import CHURN, ExplodingScheduler, HeunDiscreteScheduler


class FlowScheduler(ExplodingScheduler):
    """Base of the schedulers that are for flow models alone."""

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
    """Euler's method for flow models."""

    config_keys = "SHIFTS stochastic_sampling"
    step_takes = f"{CHURN}, per_token_timesteps=None"
    set_timesteps_takes = "num_inference_steps=None, device=None, sigmas=None, mu=None, timesteps=None"

    def _lay_out(self, num_inference_steps: Count, device: Device, sigmas: Values, mu: Any, timesteps: Values) -> None:  # type: ignore[override]
        """Lays out a run of so many steps, or of given levels (without the one to end at), ``timesteps`` or both.

        ``mu`` has an effect with ``use_dynamic_shifting`` only: pipelines work it out for every model of a family.
        """
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
    """Euler's method for flow models with noise put back at each step."""

    config_keys = "num_train_timesteps eta s_noise"
    config_defaults = {"eta": 1.0}
    step_takes = "generator=None"
    set_timesteps_takes = "num_inference_steps=None, device=None, sigmas=None, timesteps=None, mu=None, **kwargs"

    def _lay_out(self, num_inference_steps: Count, device: Device, sigmas: Any, timesteps: Any, mu: Any) -> None:  # type: ignore[override]
        """Lays out a run of so many steps, or of given levels, or ``timesteps`` that are levels, with the one to end at.

        ``mu`` and further arguments, which other schedulers take, have no effect here.
        """
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
