"""Solvers on levels that are even in log sigma, as tests and the plot of the documentation run them."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any, NamedTuple

import numpy as np
import torch

import sfumato.schedulers as schedulers

HIGH, LOW = 100.0, 0.1


class Case(NamedTuple):
    """A deterministic solver: how to lay out a run of so many evaluations, its order, and the evaluations left out at its end."""

    make: Callable[[int], Any]
    order: float
    omit: int = 0
    options: dict[str, Any] = {}
    fine: int = 80  # evaluations from which on the order shows


def on_sigmas(name: str, **config: Any) -> Callable[[int], Any]:
    """Levels given as sigmas."""

    def make(evaluations: int) -> Any:
        scheduler = getattr(schedulers, name)(**config)
        steps = (evaluations + 1) // scheduler.order
        scheduler.set_timesteps(sigmas=np.geomspace(HIGH, LOW, steps + 1).tolist())
        return scheduler

    return make


def on_flow(name: str, **config: Any) -> Callable[[int], Any]:
    """Levels given as those of a flow; the schedule adds a step to zero, which the run leaves out."""

    def make(evaluations: int) -> Any:
        scheduler = getattr(schedulers, name)(**config)
        sigmas = np.geomspace(HIGH, LOW, (evaluations + 1) // scheduler.order + 1)
        levels = (sigmas / (1 + sigmas)).tolist()
        scheduler.set_timesteps(sigmas=levels)
        return scheduler

    return make


def on_table(name: str, **config: Any) -> Callable[[int], Any]:
    """The table's levels, even in logarithm; the run ends at the smallest."""

    def make(evaluations: int) -> Any:
        scheduler = getattr(schedulers, name)(use_exponential_sigmas=True, **config)
        scheduler.set_timesteps(evaluations)
        return scheduler

    return make


def on_edm(name: str, **config: Any) -> Callable[[int], Any]:
    """EDM's levels, even in logarithm."""

    def make(evaluations: int) -> Any:
        ends = {"sigma_min": LOW, "sigma_max": HIGH, "sigma_schedule": "exponential", "final_sigmas_type": "sigma_min"}
        scheduler = getattr(schedulers, name)(**ends, **config)
        scheduler.set_timesteps(evaluations)
        return scheduler

    return make


def on_steps(name: str, **config: Any) -> Callable[[int], Any]:
    """Even steps in time, of so many training steps that their number does not matter; the run leaves out its end."""

    def make(evaluations: int) -> Any:
        total = 64000
        options = {"num_train_timesteps": total, "trained_betas": np.linspace(0.1, 20, total) / total}
        known = getattr(schedulers, name)._init_parameters()
        fixed = {"clip_sample": False, "set_alpha_to_one": False, "timestep_spacing": "leading"}
        scheduler = getattr(schedulers, name)(**options, **{k: v for k, v in fixed.items() if k in known}, **config)
        scheduler.set_timesteps(evaluations)
        return scheduler

    return make


def ipndm(evaluations: int) -> Any:
    """Even angles."""
    angles = np.linspace(math.atan(HIGH), math.atan(LOW), evaluations + 1)
    scheduler = schedulers.IPNDMScheduler(trained_betas=np.sin(angles))
    scheduler.set_timesteps(evaluations)
    return scheduler


def no_noise(t: float) -> float:
    """SA-Solver's tau as an ODE."""
    return 0.0


MIN = {"final_sigmas_type": "sigma_min"}
CASES: dict[str, Case] = {
    "Euler": Case(on_sigmas("EulerDiscreteScheduler"), 1),
    "Heun": Case(on_sigmas("HeunDiscreteScheduler"), 2),
    "KDPM2": Case(on_sigmas("KDPM2DiscreteScheduler"), 2),
    **{f"LMS {k}": Case(on_sigmas("LMSDiscreteScheduler"), k, 0, {"order": k}) for k in (1, 2, 3, 4)},
    **{
        f"{'DPM++' if a.endswith('+') else 'DPM'} multistep {k} {t}": Case(
            on_table("DPMSolverMultistepScheduler", algorithm_type=a, solver_order=k, solver_type=t, **MIN),
            min(k, 2),  # the published third order has half of its quadratic term
        )
        for a in ("dpmsolver++", "dpmsolver") for k in (1, 2, 3) for t in ("midpoint", "heun")
    },
    **{
        f"{'DPM++' if a.endswith('+') else 'DPM'} singlestep {k} {t}": Case(
            on_table("DPMSolverSinglestepScheduler", algorithm_type=a, solver_order=k, solver_type=t, **MIN), k
        )
        for a in ("dpmsolver++", "dpmsolver") for k in (1, 2, 3) for t in ("midpoint", "heun")
    },
    "DPM++ inverse 2": Case(on_table("DPMSolverMultistepInverseScheduler"), 2),
    **{f"DEIS {k}": Case(on_table("DEISMultistepScheduler", solver_order=k), k) for k in (1, 2, 3)},
    # The corrector adds an order to the predictor's.
    **{f"UniPC {k} {t}": Case(on_table("UniPCMultistepScheduler", solver_order=k, solver_type=t, **MIN), k + 1)
       for k in (1, 2) for t in ("bh1", "bh2")},
    "UniPC 3": Case(on_table("UniPCMultistepScheduler", solver_order=3, **MIN), 4, fine=160),
    **{f"SA {k}": Case(on_table("SASolverScheduler", predictor_order=k, corrector_order=k, tau_func=no_noise), k) for k in (1, 2)},
    "SA 3": Case(on_table("SASolverScheduler", predictor_order=3, corrector_order=3, tau_func=no_noise), 4, fine=160),
    "DDIM": Case(on_steps("DDIMScheduler"), 1, 2),
    "DDIM inverse": Case(on_steps("DDIMInverseScheduler"), 1, 2),
    "CogVideoX DDIM": Case(on_steps("CogVideoXDDIMScheduler", snr_shift_scale=1.0), 1, 2),
    "PNDM": Case(on_steps("PNDMScheduler", skip_prk_steps=True), 2, 6),
    "IPNDM": Case(ipndm, 2, fine=320),
    "EDM Euler": Case(on_edm("EDMEulerScheduler"), 1),
    **{f"EDM DPM++ {k}": Case(on_edm("EDMDPMSolverMultistepScheduler", solver_order=k), min(k, 2)) for k in (1, 2, 3)},
    "Flow Euler": Case(on_flow("FlowMatchEulerDiscreteScheduler"), 1, 1),
    "Flow Heun": Case(on_flow("FlowMatchHeunDiscreteScheduler"), 2, 1),
    "Euler on a flow": Case(on_flow("EulerDiscreteScheduler", prediction_type="flow_prediction"), 1, 1),
    "KDPM2 on a flow": Case(on_flow("KDPM2DiscreteScheduler", prediction_type="flow_prediction"), 2, 1),
    "LMS on a flow": Case(on_flow("LMSDiscreteScheduler", prediction_type="flow_prediction"), 4, 1),
    "UniPC on a flow": Case(on_flow("UniPCMultistepScheduler", prediction_type="flow_prediction", use_flow_sigmas=True), 3, 1),
}  # fmt: skip


def evaluations(scheduler: Any, omit: int) -> int:
    """How many evaluations of the schedule to run."""
    return len(scheduler.timesteps) - omit * (len(scheduler.timesteps) // 20 if omit > 1 else 1)


def seeded(seed: int = 0) -> torch.Generator:
    """A generator of its own."""
    return torch.Generator().manual_seed(seed)
