"""Exponential integrators in half log signal-to-noise: DPM-Solver (arXiv:2206.00927), DPM-Solver++ (arXiv:2211.01095) and kin.

Samples are in the form ``x = alpha * x0 + sigma * noise``, variance-preserving or, for flow models, ``alpha = 1 - sigma``.
With ``lambda = log(alpha / sigma)`` the linear part of the flow is solved exactly, and a polynomial in ``lambda`` through the
network's outputs at several levels is integrated against the exponential that is left. All solvers here, DEIS, UniPC and
SA-Solver differ in which levels those are and in who evaluates them.
"""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import torch
from torch import Tensor

from ..errors import ConfigError
from ..random import BrownianNoise, Generators, noise_like
from .base import Count, Device, LevelScheduler, Run, SigmaScheduler, StepScheduler, Values
from .euler import EDMScheduler
from .noise import integer_steps, one_of, sigmas_to_steps
from .prediction import blend, log_snr, mix, noise_coefficients, polynomial_weights, split_variance


class LogSnrScheduler(SigmaScheduler):
    """Base of the solvers in half log signal-to-noise; with the configuration of a flow model's scheduler, of that flow."""

    predictions: tuple[str, ...] = ("epsilon", "sample", "v_prediction", "flow_prediction")
    set_timesteps_takes = "num_inference_steps=None, device=None"
    _form: str  # how the second moment is approximated, if it is
    _on_denoised = True  # extrapolate the denoised sample, else the noise
    _tau2 = 0.0  # square of the noise's strength

    def _build(self) -> None:
        super()._build()
        one_of("time_shift_type", self._own("time_shift_type", "exponential"), "exponential")
        if self._kind == "flow_prediction" and not self.is_flow:
            raise ConfigError("prediction_type='flow_prediction' needs the levels of a flow: set use_flow_sigmas=True")
        self._ramp = self._ramp or ("lu" if self._own("use_lu_lambdas", False) else None)
        self._takes_times = not (self._ramp or self.is_flow)
        self._euler_at_final = self._own("euler_at_final", False)
        self._form = self._own("solver_type", "bh1" if self._on_denoised else "exact")

    def _adopt(self, key: str, related: tuple[str, ...], *own: str) -> str:
        """Returns a valid value of ``key``; the first of ``own`` stands for those that related solvers call otherwise."""
        value = own[0] if self.config[key] in related else self.config[key]
        one_of(key, value, *own)
        self.register_to_config(**{key: value})
        return value

    def _signal_noise(self, sigma: float) -> tuple[float, float]:
        if self.is_flow:
            return 1 - sigma, sigma
        alpha = 1 / math.sqrt(sigma**2 + 1)
        return alpha, sigma * alpha

    def _log_snr(self, i: int) -> float:
        """Returns ``lambda`` at a position of the run, infinite where no noise is left."""
        return log_snr(*self._signal_noise(self._sigmas[i]))

    def _run_levels(self, count: Count, timesteps: Any, sigmas: Any, mu: float | None, train_steps: Count = None) -> Run:
        if sigmas is not None and not self.is_flow:
            raise ValueError("sigmas can be set for flow models only: set use_flow_sigmas=True, or pass num_inference_steps")
        if not self.is_flow or not self._ramp:
            return super()._run_levels(count, timesteps, sigmas, mu)
        return self._levels_at(self._stops(self._check_count(count) if sigmas is None else len(sigmas)))

    def _stops(self, count: int, train_steps: int | None = None) -> np.ndarray:
        spacing, offset = self._own("timestep_spacing", "linspace"), self._own("steps_offset", 0)
        return integer_steps(spacing, count, len(self), offset, extra=1, top=self._top()).round()

    def _top(self) -> int:
        """Returns how many training steps are within ``lambda_min_clipped``: lambda falls along the table."""
        return int((-np.log(self._table) >= self._own("lambda_min_clipped", -math.inf)).sum())

    def _ramp_ends(self, levels: np.ndarray) -> tuple[float, float]:
        return super()._ramp_ends(np.array(self._bounds))

    def _times_of(self, levels: np.ndarray) -> np.ndarray:
        steps = sigmas_to_steps(levels, self._table)
        rounded = self._ramp in ("karras", "lu") and self.config["beta_schedule"] != "squaredcos_cap_v2"
        return steps.round() if rounded else steps  # else cut off, as trained

    def _even_flow(self, count: int) -> np.ndarray:
        return 1 - np.linspace(1.0, 1 / len(self), count + 1)[:0:-1]

    def _convert(self, output: Tensor, i: int, x: Tensor) -> Tensor:
        """Returns what the solver extrapolates: the denoised sample, or the noise."""
        if output.shape[1] != x.shape[1]:
            output = split_variance(output, x.shape[1], self._own("variance_type", None))[0]
        alpha, sigma = self._signal_noise(self._sigmas[i])
        if not self._on_denoised and not self._thresholds:
            return mix(noise_coefficients(self._kind, alpha, sigma), x, output)
        x0 = self._denoise(output, x, alpha, sigma)
        return x0 if self._on_denoised else mix(noise_coefficients("sample", alpha, sigma), x, x0)

    def _solve(self, output: Tensor, i: int, x: Tensor, noise: Tensor | None = None) -> Tensor:
        """Integrates the polynomial through the last outputs (arXiv:2211.01095 algorithm 2, arXiv:2204.13902 eq. 15)."""
        order = self._order_at(i, self._count() - i)
        self._history = [self._convert(output, i, x), *self._history[:2]]
        return self._transfer(i, x, i, i + 1, order, noise, self._tau2)

    def _order_at(self, i: int, left: int) -> int:
        """Returns the order of a step: as many outputs as there are, fewer at the end of short runs."""
        lowered = self.config["lower_order_final"] and i + left < 15
        if left == 1 and (self._euler_at_final or lowered or not self._sigmas[-1]):
            return 1
        return min(len(self._history) + 1, self.config["solver_order"], left if lowered and left == 2 else 3)

    def _moments(self, gain: float, z: float, count: int, tau2: float, form: str) -> list[float]:
        """Returns ``gain * z`` times the integrals over 0..1 of ``exp(z * (1 - r)) * r**k``, ``k < count``.

        They are exponential integrators' phi functions (arXiv:2206.00927 appendix B); published solvers replace some of them.
        """
        moments = [gain * math.expm1(z)]
        for k in range(1, count):
            moments.append(k * moments[-1] / z - gain)
        if count == 2 and form in ("midpoint", "bh2", "bh1"):
            moments[1] = (gain * z if form == "bh1" else moments[0]) / 2
        return moments

    def _transfer(
        self, i: int, x: Tensor, start: int, to: int, count: int, noise: Tensor | None = None, tau2: float = 0.0, stride: int = 1
    ) -> Tensor:
        """Moves ``x`` between two positions of the run along the polynomial through ``count`` outputs, those of ``i`` and before.

        arXiv:2211.01095 eqs. 9 and 14, with noise of strength ``tau`` arXiv:2309.05019 eqs. 13 and 14; ``h`` is the step in lambda.
        """
        (alpha_s, sigma_s), (alpha_t, sigma_t) = self._signal_noise(self._sigmas[start]), self._signal_noise(self._sigmas[to])
        base = self._log_snr(start)
        h = self._log_snr(to) - base
        if h == 0:  # a spacing that already ends at the table's smallest level, with final_sigmas_type="sigma_min"
            return x
        damped = tau2 * h if tau2 else 0.0
        if self._on_denoised:
            keep, gain, z, fresh = sigma_t / sigma_s * math.exp(-damped), -alpha_t, -h - damped, -math.expm1(-2 * damped)
        else:
            keep, gain, z, fresh = alpha_t / alpha_s, -sigma_t * (1 + tau2), h, tau2 * math.expm1(2 * h)
        places = range(i, i - count * stride, -stride)
        nodes = [0.0 if place == start else (self._log_snr(place) - base) / h for place in places]
        moments = self._moments(gain, z, count, tau2, self._form if stride == 1 else "exact")
        weights = polynomial_weights(nodes, moments)
        new = blend((keep, *weights), (x, *self._history[: count * stride : stride]))
        return new if noise is None else new.add_(noise, alpha=sigma_t * math.sqrt(fresh))


class DPMSolverScheduler(LogSnrScheduler):
    """Base of DPM-Solver and DPM-Solver++, as ODE or SDE, of order 1 to 3; only the ``sde-`` solvers add noise."""

    step_takes = "generator=None"
    set_timesteps_takes = "num_inference_steps=None, device=None, mu=None, timesteps=None, *, sigmas=None"
    _algorithms: tuple[str, ...] = ("dpmsolver++", "dpmsolver", "sde-dpmsolver", "sde-dpmsolver++")
    # The published quadratic term is half of the exact one, and as an SDE has another sign inside.
    _third = 0.5, 1.0

    def _build(self) -> None:
        self._read_solver()
        super()._build()

    def _read_solver(self) -> None:
        c, algorithm = self.config, self._adopt("algorithm_type", ("deis",), *self._algorithms)
        self._adopt("solver_type", ("logrho", "bh1", "bh2"), "midpoint", "heun")
        self._on_denoised, self._tau2 = algorithm.endswith("++"), float(algorithm.startswith("sde"))
        if not self._on_denoised and self._own("final_sigmas_type", None) == "zero":
            raise ConfigError(f"algorithm_type={algorithm!r} cannot end at zero noise: set final_sigmas_type='sigma_min'")
        if not 1 <= c["solver_order"] <= (2 if algorithm == "sde-dpmsolver" else math.inf):
            orders = "choose 1 or 2 (or 3, if not sde-dpmsolver)"
            raise ConfigError(f"algorithm_type={algorithm!r} has no solver_order={c['solver_order']}: {orders}")

    def update(self, output: Tensor, i: int, x: Tensor, generator: Generators, noise: Tensor | None = None) -> Tensor:
        """Solves (arXiv:2211.01095 eqs. 9 and 14) with the noise that is given, or drawn in float32."""
        if self._tau2 and noise is None:
            noise = noise_like(x.float(), generator)
        return self._solve(output, i, x, noise if self._tau2 else None)

    def _moments(self, gain: float, z: float, count: int, tau2: float, form: str) -> list[float]:
        moments = super()._moments(gain, z, count, tau2, form)
        if count == 3:
            factor, as_sde = self._third
            moments[2] = factor * moments[2] + (as_sde * gain if tau2 else 0.0)
        return moments


class DPMSolverMultistepScheduler(DPMSolverScheduler):
    """Multistep DPM-Solver and DPM-Solver++, as ODE or SDE, of order 1 to 3."""

    config_keys = "MULTISTEP euler_at_final RAMPS use_lu_lambdas FLOW final_sigmas_type CUT SPACING rescale_betas_zero_snr DYNAMIC"
    step_takes = "generator=None, variance_noise=None"


class DPMSolverMultistepInverseScheduler(DPMSolverMultistepScheduler):
    """Multistep DPM-Solver run backwards, from a clean sample to the noise that leads to it (DiffEdit, arXiv:2210.11427)."""

    _algorithms = ("dpmsolver++", "dpmsolver")

    config_keys = "MULTISTEP euler_at_final RAMPS FLOW CUT SPACING"
    set_timesteps_takes = LogSnrScheduler.set_timesteps_takes

    def _stops(self, count: int, train_steps: int | None = None) -> np.ndarray:
        spacing, offset = self.config["timestep_spacing"], self.config["steps_offset"]
        more = int(spacing != "trailing")  # stops, of which the noisiest is left out
        return integer_steps(spacing, count + more, len(self), offset, top=self._top())[more:].round()

    def _run_levels(self, *given: Any) -> Run:
        levels, times = super()._run_levels(*given)
        noisiest = levels[0] if self.is_flow and not self._ramp else self._table[self._top() - 1]
        return np.append(levels[-2::-1], noisiest), times[::-1]


class DPMSolverSinglestepScheduler(DPMSolverScheduler):
    """Singlestep DPM-Solver and DPM-Solver++: as many entries of the schedule as the order make one step, which sets out anew."""

    _algorithms = ("dpmsolver++", "dpmsolver", "sde-dpmsolver++")
    _third = 1.0, 2.0

    config_keys = "MULTISTEP RAMPS FLOW final_sigmas_type CUT DYNAMIC"
    config_defaults = {"lower_order_final": False}

    config_choices = {"solver_order": (1, 2, 3)}

    def _set_schedule(self, timesteps: np.ndarray, device: Device = None) -> None:
        super()._set_schedule(timesteps, device)
        self.order_list = self.get_order_list(len(timesteps))

    def get_order_list(self, num_inference_steps: int) -> list[int]:
        """Returns how many outputs each evaluation uses: 1 to the order, over and over, lowered at the end."""
        order, to_zero = self.config["solver_order"], self.config["final_sigmas_type"] == "zero"
        orders = [1 + k % order for k in range(num_inference_steps)]
        if orders and (to_zero or (self.config["lower_order_final"] and (order, orders[-1]) != (3, 2))):
            orders[-1] = 1
        return orders

    def _solve(self, output: Tensor, i: int, x: Tensor, noise: Tensor | None = None) -> Tensor:
        """Integrates from where the step began the polynomial through its outputs (arXiv:2206.00927 algorithms 1 and 2)."""
        order = min(self.order_list[i], len(self._history) + 1)
        self._history = [self._convert(output, i, x), *self._history[: order - 1]]
        if order == 1 or self._start is None:
            self._start = x
        # The published third order uses its last slope alone.
        count, stride = (2, 2) if order == 3 and self.config["solver_type"] == "midpoint" else (order, 1)
        return self._transfer(i, self._start, i - order + 1, i + 1, count, noise, self._tau2, stride)


class DEISMultistepScheduler(LogSnrScheduler):
    """Exponential integrator on the noise with a polynomial in log rho (arXiv:2204.13902 eq. 15), of order 1 to 3."""

    _on_denoised, _ending = False, "sigma_min"
    update = LogSnrScheduler._solve
    config_keys = "MULTISTEP RAMPS FLOW SPACING DYNAMIC"
    config_defaults = {"algorithm_type": "deis", "solver_type": "logrho"}
    config_choices = {"solver_order": (1, 2, 3)}
    set_timesteps_takes = "num_inference_steps=None, device=None, mu=None, *, sigmas=None"

    def _build(self) -> None:
        self._adopt("algorithm_type", ("dpmsolver", "dpmsolver++"), "deis")
        self._adopt("solver_type", ("midpoint", "heun", "bh1", "bh2"), "logrho")
        super()._build()


class UniPCMultistepScheduler(LogSnrScheduler):
    """Unified predictor-corrector (arXiv:2302.04867): each new output first corrects the step that led to it."""

    config_keys = (
        "BETAS solver_order prediction_type LIMITS predict_x0 solver_type lower_order_final disable_corrector solver_p RAMPS FLOW"
        " SPACING final_sigmas_type rescale_betas_zero_snr DYNAMIC sigma_min sigma_max shift_terminal"
    )
    config_defaults = {"solver_type": "bh2"}
    set_timesteps_takes = "num_inference_steps=None, device=None, sigmas=None, mu=None"

    def _build(self) -> None:
        self._adopt("solver_type", ("midpoint", "heun", "logrho"), "bh2", "bh1")
        if self.config["solver_order"] < 1:
            raise ConfigError(f"solver_order={self.config['solver_order']}, expected at least 1")
        if not self.config["predict_x0"] and self.config["final_sigmas_type"] == "zero":
            raise ConfigError("predict_x0=False cannot end at zero noise: set final_sigmas_type='sigma_min'")
        self._on_denoised = self.config["predict_x0"]
        super()._build()

    def _lay_out(self, num_inference_steps: Count, device: Device, sigmas: Values, mu: float | None) -> None:  # type: ignore[override]
        super()._lay_out(num_inference_steps if sigmas is None else None, device, None, sigmas, mu)
        if self.config["solver_p"] is not None:
            self._predictor = self.config["solver_p"].fresh()
            self._predictor.set_timesteps(len(self._times), device=device)

    def _run_levels(self, *given: Any) -> Run:
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
        self._history = [self._convert(output, i, x), *self._history[: c["solver_order"]]]
        if self._start is not None and i - 1 not in c["disable_corrector"]:
            start, order = self._start
            x = self._transfer(i, start, i - 1, i, order + 1)
        wanted = min(c["solver_order"], self._count() - i if c["lower_order_final"] else math.inf)
        order = 1 if self._sigmas[i + 1] == 0 else min(wanted, len(self._history))
        self._start = x, order
        if c["solver_p"] is not None:
            return self._predictor.step(output, self._times[i], x).prev_sample
        return self._transfer(i, x, i, i + 1, order)


class SASolverScheduler(LogSnrScheduler):
    """Stochastic Adams predictor-corrector with noise of adjustable strength tau (arXiv:2309.05019)."""

    config_keys = "BETAS ADAMS prediction_type tau_func LIMITS algorithm_type lower_order_final RAMPS FLOW CUT SPACING"
    step_takes = "generator=None"
    config_defaults = {"algorithm_type": "data_prediction"}
    config_choices = {"algorithm_type": ("data_prediction", "noise_prediction")}
    _ending = "sigma_min"

    def _build(self) -> None:
        self._on_denoised = self.config["algorithm_type"] == "data_prediction"
        super()._build()

    def _levels(self, timesteps: Tensor) -> tuple[Tensor, Tensor]:
        # noise is added at the training step itself, wherever the run is
        return super()._levels(timesteps) if self.is_flow else LevelScheduler._levels(self, timesteps.long())

    _share = StepScheduler._share

    def update(self, output: Tensor, i: int, x: Tensor, generator: Generators) -> Tensor:
        """Corrects the sample (eq. 17, Adams-Moulton) and predicts the next one (eq. 14, Adams-Bashforth)."""
        c, count, noise = self.config, self._count(), noise_like(output, generator)
        self._history = [self._convert(output, i, x), *self._history[: max(c["predictor_order"], c["corrector_order"] - 1)]]
        if self._start is not None:
            start, order, tau2, last_noise = self._start
            x = self._transfer(i, start, i - 1, i, order, last_noise, tau2)
        left = count - i if c["lower_order_final"] else count
        tau, order = c["tau_func"], min(c["predictor_order"], left, len(self._history))
        tau2 = float(200 <= self._times[i] <= 800) if tau is None else float(tau(self._times[i])) ** 2
        self._start = x, min(c["corrector_order"], left + 1, len(self._history) + 1), tau2, noise
        return self._transfer(i, x, i, i + 1, order, noise, tau2)


class EDMDPMSolverMultistepScheduler(DPMSolverScheduler, EDMScheduler):
    """Multistep DPM-Solver++ with EDM's preconditioning, as ODE or SDE; see :class:`DPMSolverMultistepScheduler`."""

    predictions = EDMScheduler.predictions
    _precision = torch.float32
    _algorithms = ("dpmsolver++", "sde-dpmsolver++")
    _times_of = EDMScheduler._times_of

    config_keys = "EDM prediction_type rho solver_order LIMITS SOLVER euler_at_final final_sigmas_type"
    set_timesteps_takes = LogSnrScheduler.set_timesteps_takes

    def _read_solver(self) -> None:
        super()._read_solver()
        one_of("solver_order", self.config["solver_order"], *((1, 2) if self._tau2 else (1, 2, 3)))

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
