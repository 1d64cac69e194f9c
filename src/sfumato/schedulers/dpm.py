"""Exponential integrators in half log signal-to-noise: DPM-Solver (arXiv:2206.00927) and DPM-Solver++ (arXiv:2211.01095).

Samples are in the form ``x = alpha * x0 + sigma * noise``, variance-preserving or, for flow models, ``alpha = 1 - sigma``.
With ``lambda = log(alpha / sigma)`` the linear part of the flow is solved exactly, and the network's outputs at the last
levels are extrapolated by a polynomial in ``lambda``.
"""

from __future__ import annotations

import math

import numpy as np
import torch

from ..errors import ConfigError
from ..random import Generators, randn
from .base import Betas, Device, SigmaScheduler, StepResult, one_source, wide
from .noise import integer_steps, one_of, shift_flow_sigmas, sigma_ramp, sigmas_to_steps
from .prediction import mix, noise_coefficients, split_variance


class LogSnrScheduler(SigmaScheduler):
    """Base of the solvers in half log signal-to-noise.

    Their configuration holds ``use_flow_sigmas``; a run's levels are ``sigma / alpha``, or ``sigma`` itself for flow models.
    """

    predictions = ("epsilon", "sample", "v_prediction", "flow_prediction")

    def _signal_noise(self, sigma: float) -> tuple[float, float]:
        if self.config["use_flow_sigmas"]:
            return 1 - sigma, sigma
        alpha = 1 / math.sqrt(sigma**2 + 1)
        return alpha, sigma * alpha

    def _log_snr(self, i: int) -> float:
        """Returns ``lambda`` at a position of the run, infinite where no noise is left."""
        alpha, sigma = self._signal_noise(self._sigmas[i])
        return math.log(alpha) - math.log(sigma) if sigma > 0 else math.inf


class DPMSolverMultistepScheduler(LogSnrScheduler):
    """Multistep DPM-Solver and DPM-Solver++, as ODE or SDE, of order 1 to 3.

    Args:
        solver_order: 1 to 3; higher counts as 3. Guided sampling is best with 2.
        algorithm_type: ``dpmsolver++`` (extrapolates the denoised sample), ``dpmsolver`` (the noise), or either with ``sde-``.
        solver_type: ``midpoint`` or ``heun``, the form of the second-order step.
        lower_order_final: Lower the order in the last steps of runs below 15 steps.
        euler_at_final: Take the last step at first order.
        use_lu_lambdas: Space the levels uniformly in ``lambda``.
        use_flow_sigmas: The model is a flow; its levels are uniform, moved by ``flow_shift``.
        flow_shift: See :func:`sfumato.schedulers.noise.shift_flow_sigmas`.
        lambda_min_clipped: Leave out levels with smaller ``lambda`` (cosine tables reach minus infinity).
        use_dynamic_shifting: Let ``set_timesteps`` take the logarithm of the flow shift, ``mu``.
        time_shift_type: ``exponential``.
    """

    def __init__(
        self, num_train_timesteps: int = 1000, beta_start: float = 0.0001, beta_end: float = 0.02, beta_schedule: str = "linear",
        trained_betas: Betas = None, solver_order: int = 2, prediction_type: str = "epsilon", thresholding: bool = False,
        dynamic_thresholding_ratio: float = 0.995, sample_max_value: float = 1.0, algorithm_type: str = "dpmsolver++",
        solver_type: str = "midpoint", lower_order_final: bool = True, euler_at_final: bool = False,
        use_karras_sigmas: bool | None = False, use_exponential_sigmas: bool | None = False, use_beta_sigmas: bool | None = False,
        use_lu_lambdas: bool | None = False, use_flow_sigmas: bool | None = False, flow_shift: float | None = 1.0,
        final_sigmas_type: str | None = "zero", lambda_min_clipped: float = -math.inf, variance_type: str | None = None,
        timestep_spacing: str = "linspace", steps_offset: int = 0, rescale_betas_zero_snr: bool = False,
        use_dynamic_shifting: bool = False, time_shift_type: str = "exponential",
    ) -> None:  # fmt: skip
        # Names that related solvers have for what this one calls otherwise.
        algorithm_type = "dpmsolver++" if algorithm_type == "deis" else algorithm_type
        solver_type = "midpoint" if solver_type in ("logrho", "bh1", "bh2") else solver_type
        self.register_to_config(algorithm_type=algorithm_type, solver_type=solver_type)
        one_of("algorithm_type", algorithm_type, "dpmsolver", "dpmsolver++", "sde-dpmsolver", "sde-dpmsolver++")
        one_of("solver_type", solver_type, "midpoint", "heun")
        one_of("time_shift_type", time_shift_type, "exponential")
        self._on_denoised, self._stochastic = algorithm_type.endswith("++"), algorithm_type.startswith("sde")
        if not self._on_denoised and final_sigmas_type == "zero":
            raise ConfigError(f"algorithm_type={algorithm_type!r} cannot end at zero noise: set final_sigmas_type='sigma_min'")
        if not 1 <= solver_order <= (2 if algorithm_type == "sde-dpmsolver" else math.inf):
            raise ConfigError(
                f"algorithm_type={algorithm_type!r} has no solver_order={solver_order}: choose 1 or 2 (or 3, if not sde-dpmsolver)"
            )
        if prediction_type == "flow_prediction" and not use_flow_sigmas:
            raise ConfigError("prediction_type='flow_prediction' needs the levels of a flow: set use_flow_sigmas=True")
        self._build()
        self._ramp = self._ramp or ("lu" if use_lu_lambdas else "flow" if use_flow_sigmas else None)
        if use_flow_sigmas and self._ramp != "flow":
            raise ConfigError(f"use_flow_sigmas excludes the {self._ramp!r} spacing, whose levels exceed 1: set only one of them")

    def _reset(self) -> None:
        super()._reset()
        self._history: list[torch.Tensor] = []

    def set_timesteps(
        self, num_inference_steps: int | None = None, device: Device = None, mu: float | None = None,
        timesteps: list[int] | None = None,
    ) -> None:  # fmt: skip
        """Lays out a run of so many steps, or of given, whole training steps; ``timesteps`` will lie on ``device``.

        ``mu`` is the logarithm of the flow shift, if the configuration says ``use_dynamic_shifting``.

        Raises:
            ValueError: Not exactly one of the number and ``timesteps`` was given, or an argument does not fit the configuration.
        """
        c = self.config
        one_source(num_inference_steps=num_inference_steps, timesteps=timesteps)
        if mu is not None and not c["use_dynamic_shifting"]:
            raise ValueError(f"mu={mu} needs a scheduler with use_dynamic_shifting=True")
        if timesteps is not None and self._ramp:
            raise ValueError(f"timesteps cannot be set with the {self._ramp!r} spacing of sigmas: pass num_inference_steps")
        if timesteps is None:
            # Steps with lambda below the bound are left out: lambda falls along the table.
            top = int((-np.log(self._table) >= c["lambda_min_clipped"]).sum())
            count = self._check_count(num_inference_steps)
            stops = integer_steps(c["timestep_spacing"], count, len(self), c["steps_offset"], extra=1, top=top).round()
        else:
            stops = np.array(timesteps)
        levels, stops = self._levels_at(stops.astype(np.int64), c["flow_shift"] if mu is None else math.exp(mu))
        self.num_inference_steps = len(stops)
        self._set_levels(np.append(levels, self._final_sigma), stops, device, torch.int64)

    def _levels_at(self, stops: np.ndarray, flow_shift: float) -> tuple[np.ndarray, np.ndarray]:
        """Returns a run's noise levels, without the last, and its whole training steps."""
        if self._ramp is None:
            return self._sigmas_at(stops), stops
        if self._ramp == "flow":
            uniform = np.linspace(1.0, 1 / len(self), len(stops) + 1)
            levels = shift_flow_sigmas(1 - uniform, flow_shift)[:0:-1]
            return levels, (levels * len(self)).astype(np.int64)
        # Levels uniform in lambda are uniform in log sigma as well (arXiv:2206.00927 section 3.4), on this table.
        levels = sigma_ramp("exponential" if self._ramp == "lu" else self._ramp, *self._bounds, len(stops))
        steps = sigmas_to_steps(levels, self._table)
        rounded = self._ramp in ("karras", "lu") and self.config["beta_schedule"] != "squaredcos_cap_v2"  # else cut off, as trained
        return levels, (steps.round() if rounded else steps).astype(np.int64)

    def step(
        self, model_output: torch.Tensor, timestep: int | torch.Tensor, sample: torch.Tensor, generator: Generators = None,
        variance_noise: torch.Tensor | None = None, return_dict: bool = True,
    ) -> StepResult:  # fmt: skip
        """Goes one step towards the clean sample; only the ``sde-`` solvers add noise. See :class:`SchedulerMixin`.

        Raises:
            ValueError: ``set_timesteps`` was not called, or the timestep is not in the schedule.
        """
        count, i = self._count(), self._position(timestep)
        x, noise = wide(sample), variance_noise if self._stochastic else None
        if self._stochastic and noise is None:
            noise = randn(model_output.shape, generator=generator, device=x.device, dtype=torch.float32)
        output = split_variance(model_output, sample.shape[1], self.config["variance_type"])[0]
        self._history = [self._convert(output, i, x), *self._history[:2]]
        return self._step(sample, (self.update(i, x, self._order_at(i, count), noise), None), return_dict)

    def _convert(self, output: torch.Tensor, i: int, x: torch.Tensor) -> torch.Tensor:
        """Returns what the solver extrapolates: the denoised sample, or the noise."""
        alpha, sigma = self._signal_noise(self._sigmas[i])
        if not self._on_denoised and not self._thresholds:
            return mix(noise_coefficients(self.config["prediction_type"], alpha, sigma), x, output)
        x0 = self._denoise(output, x, alpha, sigma)
        return x0 if self._on_denoised else mix(noise_coefficients("sample", alpha, sigma), x, x0)

    def _order_at(self, i: int, count: int) -> int:
        """Returns the order of a step: as many outputs as there are, fewer at the end of short runs."""
        c, left = self.config, count - i
        lowered = c["lower_order_final"] and count < 15
        if left == 1 and (c["euler_at_final"] or lowered or c["final_sigmas_type"] == "zero"):
            return 1
        return min(len(self._history), c["solver_order"], left if lowered and left == 2 else 3)

    def update(self, i: int, x: torch.Tensor, order: int, noise: torch.Tensor | None) -> torch.Tensor:
        """Integrates the polynomial through the last ``order`` outputs exactly (arXiv:2211.01095 eqs. 9 and 14, appendix A).

        With ``z = -h`` for the denoised sample and ``z = h`` for the noise (``h`` the step in lambda, doubled where fresh noise
        is put back), outputs and their divided differences weigh in with ``expm1(z)`` and its Taylor remainders.
        """
        (alpha_s, sigma_s), (alpha_t, sigma_t) = self._signal_noise(self._sigmas[i]), self._signal_noise(self._sigmas[i + 1])
        now, h = self._log_snr(i), self._log_snr(i + 1) - self._log_snr(i)
        if h == 0:  # a spacing that already ends at the table's smallest level, with final_sigmas_type="sigma_min"
            return x
        if self._on_denoised:
            keep, gain, z, fresh = sigma_t / sigma_s, -alpha_t, -h, -math.expm1(-2 * h)
            if self._stochastic:
                keep, z = keep * math.exp(-h), -2 * h
        else:
            keep, gain, z, fresh = alpha_t / alpha_s, -sigma_t * (2 if self._stochastic else 1), h, math.expm1(2 * h)
        first = gain * math.expm1(z)
        weights = [first]
        if order > 1:
            slope = gain * (math.expm1(z) / z - 1) if order == 3 or self.config["solver_type"] == "heun" else first / 2
            r0 = (now - self._log_snr(i - 1)) / h
            weights = [first + slope / r0, -slope / r0]
            if order == 3:
                r1 = (self._log_snr(i - 1) - self._log_snr(i - 2)) / h
                # As an SDE the quadratic term keeps the sign that published samples were made with: it costs the third order.
                taylor = 0.5 if noise is None else -0.5
                bend = (slope * r0 + gain * ((math.expm1(z) - z) / z**2 - taylor)) / (r0 + r1)
                near, far = (slope + bend) / r0, bend / r1
                weights = [first + near, -near - far, far]
        new = x * keep
        for weight, output in zip(weights, self._history, strict=False):
            new.add_(output, alpha=weight)
        return new if noise is None else new.add_(noise, alpha=sigma_t * math.sqrt(fresh))
