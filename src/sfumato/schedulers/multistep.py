"""Multistep solvers beside DPM-Solver: DEIS, UniPC and SA-Solver in log signal-to-noise, LMS and IPNDM without it."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import torch
from torch import Tensor

from ..errors import ConfigError
from ..random import Generators
from .base import Count, Device, SchedulerMixin, StepResult, StepScheduler, StochasticScheduler, Time, Update, Values
from .dpm import LogSnrScheduler
from .euler import ExplodingScheduler
from .noise import noise_like
from .prediction import blend, polynomial_weights


class DEISMultistepScheduler(LogSnrScheduler):
    """Exponential integrator on the noise with a polynomial in log rho (arXiv:2204.13902 eq. 15), of order 1 to 3."""

    _on_denoised = False
    update = LogSnrScheduler._solve
    config_keys = "MULTISTEP RAMPS FLOW SPACING DYNAMIC"
    config_defaults = {"algorithm_type": "deis", "solver_type": "logrho"}
    config_choices = {"solver_order": (1, 2, 3)}

    def _build(self) -> None:
        self._adopt("algorithm_type", ("dpmsolver", "dpmsolver++"), "deis")
        self._adopt("solver_type", ("midpoint", "heun", "bh1", "bh2"), "logrho")
        super()._build()
        self._final_sigma = self._bounds[1]

    def set_timesteps(
        self, num_inference_steps: Count = None, device: Device = None, mu: float | None = None, *, sigmas: Values = None
    ) -> None:
        self._lay_out(device, num_inference_steps, None, sigmas, mu)


class UniPCMultistepScheduler(LogSnrScheduler):
    """Unified predictor-corrector (arXiv:2302.04867): each new output first corrects the step that led to it."""

    config_keys = (
        "BETAS solver_order prediction_type LIMITS predict_x0 solver_type lower_order_final disable_corrector solver_p"
        " RAMPS FLOW SPACING final_sigmas_type rescale_betas_zero_snr use_dynamic_shifting time_shift_type sigma_min"
        " sigma_max shift_terminal"
    )
    config_defaults = {"solver_type": "bh2"}

    def _build(self) -> None:
        self._adopt("solver_type", ("midpoint", "heun", "logrho"), "bh2", "bh1")
        if self.config["solver_order"] < 1:
            raise ConfigError(f"solver_order={self.config['solver_order']}, expected at least 1")
        if not self.config["predict_x0"] and self.config["final_sigmas_type"] == "zero":
            raise ConfigError("predict_x0=False cannot end at zero noise: set final_sigmas_type='sigma_min'")
        self._on_denoised = self.config["predict_x0"]
        super()._build()

    def set_timesteps(
        self, num_inference_steps: Count = None, device: Device = None, sigmas: Values = None, mu: float | None = None
    ) -> None:
        self._lay_out(device, num_inference_steps if sigmas is None else None, None, sigmas, mu)
        if self.config["solver_p"] is not None:
            self._predictor = self.config["solver_p"].fresh()
            self._predictor.set_timesteps(len(self._times), device=device)

    def _run_levels(self, *given: Any) -> tuple[np.ndarray, np.ndarray]:
        levels, times = super()._run_levels(*given)
        if not self.is_flow:
            return levels, times
        # lambda is infinite at 1
        levels = np.append(levels[:-1] / (1 + levels[:-1]), levels[-1]) if self._ramp else np.minimum(levels, 1 - 1e-6)
        return levels, levels[:-1] * len(self)

    def _even_flow(self, count: int) -> np.ndarray:
        return np.linspace(1.0, 1 / len(self), count + 1)[:-1]

    def update(self, output: Tensor, i: int, x: Tensor) -> Tensor:
        """Corrects the sample (UniC, eq. 8) and predicts the next one (UniP, eq. 9)."""
        c = self.config
        converted = self._convert(output, i, x)
        if self._start is not None and i - 1 not in c["disable_corrector"]:
            start, order = self._start
            places = (*range(i - 1, i - 1 - order, -1), i)
            x = self._transfer(start, i - 1, i, places, (*self._history[:order], converted), None, 0.0)
        self._history = [converted, *self._history[: c["solver_order"] - 1]]
        wanted = min(c["solver_order"], self._count() - i if c["lower_order_final"] else math.inf)
        order = 1 if self._sigmas[i + 1] == 0 else min(wanted, len(self._history))
        self._start = x, order
        if c["solver_p"] is not None:
            return self._predictor.step(output, self._times[i], x).prev_sample
        return self._transfer(x, i, i + 1, range(i, i - order, -1), self._history[:order], None, 0.0)


class SASolverScheduler(StochasticScheduler, LogSnrScheduler):
    """Stochastic Adams predictor-corrector with noise of adjustable strength tau (arXiv:2309.05019)."""

    config_keys = "BETAS ADAMS prediction_type tau_func LIMITS algorithm_type lower_order_final RAMPS FLOW CUT SPACING"
    config_defaults = {"algorithm_type": "data_prediction"}
    config_choices = dict(
        predictor_order=(1, 2, 3, 4), corrector_order=(1, 2, 3, 4), algorithm_type=("data_prediction", "noise_prediction")
    )

    def _build(self) -> None:
        self._on_denoised = self.config["algorithm_type"] == "data_prediction"
        super()._build()
        self._final_sigma = self._bounds[1]

    def _levels(self, timesteps: Tensor) -> tuple[Tensor, Tensor]:
        # noise is added at the training step itself, wherever the run is
        return super()._levels(timesteps) if self.is_flow else StepScheduler._levels(self, timesteps.long())  # type: ignore[arg-type]

    def update(self, output: Tensor, i: int, x: Tensor, generator: Generators) -> Tensor:
        """Corrects the sample (eq. 17, Adams-Moulton) and predicts the next one (eq. 14, Adams-Bashforth)."""
        c, count, converted, noise = self.config, self._count(), self._convert(output, i, x), noise_like(output, generator)
        if self._start is not None:
            start, order, tau2, last_noise = self._start
            x = self._transfer(start, i - 1, i, range(i, i - order, -1), (converted, *self._history[: order - 1]), last_noise, tau2)
        self._history = [converted, *self._history[: max(c["predictor_order"], c["corrector_order"] - 1) - 1]]
        left = count - i if c["lower_order_final"] else count
        tau, order = c["tau_func"], min(c["predictor_order"], left, len(self._history))
        tau2 = float(200 <= self._times[i] <= 800) if tau is None else float(tau(self._times[i])) ** 2
        self._start = x, min(c["corrector_order"], left + 1, len(self._history) + 1), tau2, noise
        return self._transfer(x, i, i + 1, range(i, i - order, -1), self._history[:order], noise, tau2)

    def _form(self) -> str:
        return "bh1" if self._on_denoised else "exact"  # as in the published solver, for few steps


class LMSDiscreteScheduler(ExplodingScheduler):
    """Adams-Bashforth steps on uneven levels (linear multistep): the polynomial through the last slopes is integrated."""

    predictions: tuple[str, ...] = ("epsilon", "sample", "v_prediction", "flow_prediction")

    config_keys = "BETAS RAMPS prediction_type SPACING"

    def step(self, model_output: Tensor, timestep: Time, sample: Tensor, order: int = 4, return_dict: bool = True) -> StepResult:  # type: ignore[override]
        """Goes one step towards the clean sample with the slopes of up to ``order`` levels; see :class:`SchedulerMixin`."""
        return self._advance(model_output, timestep, sample, return_dict, order)

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


class IPNDMScheduler(SchedulerMixin):
    """Adams-Bashforth steps of fourth order for networks with ``x = cos(a) * x0 + sin(a) * noise`` (improved PNDM).

    ``timesteps`` are angles in units of a quarter turn, in 1..0. The network predicts ``cos(a) * noise - sin(a) * x0``.
    """

    config_keys = "num_train_timesteps trained_betas"
    _time_type = torch.float32

    def _build(self) -> None:
        self.set_timesteps(self.config["num_train_timesteps"])

    def _stops(self, count: int) -> np.ndarray:
        trained = self.config["trained_betas"]
        noise = np.sin(np.linspace(1, 0, count + 1) * math.pi / 2) ** 2 if trained is None else np.asarray(trained, np.float64)
        signal = np.sqrt(1 - noise**2)
        self._levels = list(zip(signal.tolist(), noise.tolist(), strict=True))
        return (np.arctan2(noise, signal) / math.pi * 2)[:-1]

    def update(self, output: Tensor, i: int, x: Tensor) -> Tensor:
        """Adams-Bashforth on the predicted noise (arXiv:2202.09778 eq. 12), and its transfer (eq. 11)."""
        (signal, noise), (next_signal, next_noise) = self._levels[i : i + 2]
        self._history = [blend((noise, signal), (x, output)), *self._history[:3]]
        nodes = [-float(k) for k in range(len(self._history))]
        weights = polynomial_weights(nodes, [1 / (k + 1) for k in range(len(nodes))])
        if not signal:  # pure noise, which says nothing of the clean sample: its mean, 0, stands for it
            return x * next_noise
        turn = next_noise - next_signal * noise / signal
        return blend((next_signal / signal, *(turn * w for w in weights)), (x, *self._history))
