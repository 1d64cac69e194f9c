"""EDM's solvers (arXiv:2206.00364, table 1): ``x = x0 + sigma * noise`` with a network at unit variance.

``x0 = c_skip * x + c_out * output``, the network's input is ``c_in * x``, and its time ``log(sigma) / 4``.
"""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import torch
from torch import Tensor

from ..random import Generators
from .base import Count, Device, LevelScheduler, SigmaScheduler, Time, Update, Values
from .brownian import BrownianNoise
from .dpm import DPMSolverScheduler, LogSnrScheduler
from .euler import CHURN, EulerDiscreteScheduler
from .noise import one_of, one_source, sigma_ramp


class EDMScheduler(SigmaScheduler):
    """What EDM's schedulers share."""

    predictions: tuple[str, ...] = ("epsilon", "v_prediction")
    config_defaults = {"sigma_min": 0.002, "sigma_max": 80.0}
    _precision, _time_type = torch.float64, torch.float32  # of the levels as they are laid, and of what the network is told

    def _build(self) -> None:
        LevelScheduler._build(self)
        self._lay_levels(None, len(self))
        self.num_inference_steps = None

    def _lay_levels(self, device: Device, count: int | None, places: np.ndarray | None = None) -> None:
        """Lays out a run of so many steps, or of levels at these places between both ends."""
        c, wanted = self.config, self._check_count(count) if places is None else places
        sigmas = sigma_ramp(c["sigma_schedule"], c["sigma_max"], c["sigma_min"], wanted, c["rho"], self._precision)
        self.num_inference_steps = len(sigmas)
        end = sigmas[-1] if c["final_sigmas_type"] == "sigma_min" else 0.0
        self._set_levels(np.append(sigmas, end), self._times_of(sigmas), device)

    def _times_of(self, levels: np.ndarray) -> np.ndarray:
        return np.log(levels) / 4

    @property
    def init_noise_sigma(self) -> float:  # type: ignore[override]
        return math.sqrt(self.config["sigma_max"] ** 2 + 1)

    def scale_model_input(self, sample: Tensor, timestep: Time | None = None) -> Tensor:
        """Multiplies the sample at this timestep by ``c_in``, so that the network sees unit variance."""
        assert timestep is not None
        return sample / math.sqrt(self._sigmas[self._position(timestep)] ** 2 + self.config["sigma_data"] ** 2)

    def _coefficients(self, alpha: float, sigma: float) -> tuple[float, float]:
        data = self.config["sigma_data"]
        variance = sigma**2 + data**2
        out = sigma * data / math.sqrt(variance)
        return data**2 / variance, -out if self._kind == "v_prediction" else out


class EDMEulerScheduler(EDMScheduler, EulerDiscreteScheduler):
    """Euler's method with EDM's preconditioning and optional churn (arXiv:2206.00364 algorithm 2 without its correction)."""

    config_keys = "EDM prediction_type rho final_sigmas_type"
    step_takes = f"{CHURN}, return_dict=True, pred_original_sample=None"

    def set_timesteps(self, num_inference_steps: Count = None, device: Device = None, sigmas: Tensor | Values = None) -> None:
        """Lays out a run; ``sigmas`` are places in the spacing, from 0 (``sigma_max``) to 1 (``sigma_min``)."""
        if sigmas is None or num_inference_steps is None:
            one_source(num_inference_steps=num_inference_steps, sigmas=sigmas)
        places = np.linspace(0, 1, self._check_count(num_inference_steps)) if sigmas is None else np.asarray(sigmas, np.float64)
        if places.min() < 0 or places.max() > 1:
            raise ValueError(f"sigmas={places.tolist()}: expected places between 0 (sigma_max) and 1 (sigma_min)")
        self._lay_levels(device, None, places)

    def update(self, output: Tensor, i: int, x: Tensor, *more: Any) -> Update:
        *churn, x0 = more
        if x0 is None:
            return super().update(output, i, x, *churn)
        x, here = self._churn(x, i, x0.dtype, *churn)
        return torch.lerp(x0.to(x.dtype), x, self._sigmas[i + 1] / here), x0


class EDMDPMSolverMultistepScheduler(EDMScheduler, DPMSolverScheduler):
    """Multistep DPM-Solver++ with EDM's preconditioning, as ODE or SDE; see :class:`DPMSolverMultistepScheduler`."""

    _precision = torch.float32
    _algorithms = ("dpmsolver++", "sde-dpmsolver++")

    config_keys = "EDM prediction_type rho solver_order LIMITS SOLVER euler_at_final final_sigmas_type"
    set_timesteps_takes = LogSnrScheduler.set_timesteps_takes

    def _build(self) -> None:
        self._read_solver()
        super()._build()
        self._euler_at_final = self.config["euler_at_final"]

    def _read_solver(self) -> None:
        super()._read_solver()
        one_of("solver_order", self.config["solver_order"], *((1, 2) if self._tau2 else (1, 2, 3)))

    def _lay_out(self, num_inference_steps: Count, device: Device) -> None:  # type: ignore[override]
        self._lay_levels(device, num_inference_steps)

    def _signal_noise(self, sigma: float) -> tuple[float, float]:
        return 1.0, sigma


class CosineDPMSolverMultistepScheduler(EDMDPMSolverMultistepScheduler):
    """Multistep SDE DPM-Solver++ with Brownian noise, for networks told the angle ``2 / pi * atan(sigma)`` (Stable Audio)."""

    config_keys = "EDM solver_order prediction_type rho solver_type lower_order_final euler_at_final final_sigmas_type"
    config_defaults = {"sigma_min": 0.3, "sigma_max": 500, "sigma_data": 1.0, "sigma_schedule": "exponential",
                       "prediction_type": "v_prediction"}  # fmt: skip
    config_choices = {"solver_order": (1, 2), "solver_type": ("midpoint", "heun")}

    def _read_solver(self) -> None:
        self._on_denoised, self._tau2 = True, 1.0

    def _times_of(self, levels: np.ndarray) -> np.ndarray:
        return np.arctan(levels) / math.pi * 2

    def update(self, output: Tensor, i: int, x: Tensor, generator: Generators, noise: Tensor | None = None) -> Tensor:
        """See :class:`DPMSolverScheduler`; the seeds of ``generator`` fix the run's Brownian motion, nothing is drawn from it."""
        if self._path is None:
            given = generator if isinstance(generator, (list, tuple)) else [generator]
            seeds = [g.initial_seed() for g in given if g is not None] or None
            self._path = BrownianNoise(x.to(output.dtype), self.config["sigma_min"], self.config["sigma_max"], seed=seeds)
        return super().update(output, i, x, None, self._path(*self._sigmas[i : i + 2]))
