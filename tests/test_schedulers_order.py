"""Schedulers against mathematics: orders of convergence, and the distributions that stochastic solvers end with."""

from __future__ import annotations

import inspect
import math
from typing import Any

import pytest
import torch
from convergence_cases import CASES, evaluations, seeded
from mixture import COVARIANCE, MEAN, Levels, denoised, error, exact, samples

import sfumato.schedulers as schedulers


def test_the_exact_flow_is_exact() -> None:
    x = samples(50.0)
    assert (exact(x, 50.0, 0.1) - exact(x, 50.0, 0.1, 1600)).abs().max() < 1e-8
    assert (exact(exact(x, 50.0, 0.1), 0.1, 50.0) - x).abs().max() < 1e-6  # and back


@pytest.mark.parametrize("name", CASES)
def test_order_of_convergence(name: str) -> None:
    """Twice the evaluations divide the error by two to the order."""
    case, errors = CASES[name], []
    # Solvers of three evaluations a step end on a whole step.
    for count in (case.fine - 1, 2 * case.fine - (0 if "singlestep 3" in name else 1)):
        scheduler = case.make(count)
        errors.append(error(scheduler, evaluations(scheduler, case.omit), **case.options))
    assert math.log2(errors[0] / errors[1]) == pytest.approx(case.order, abs=0.3)


def tau(t: float) -> float:
    return 1.0


MIN = {"use_exponential_sigmas": True}
STOCHASTIC: list[tuple[str, dict[str, Any], dict[str, Any]]] = [
    ("DDPMScheduler", {"clip_sample": False}, {}),
    ("DDIMScheduler", {"clip_sample": False}, {"eta": 1.0}),
    ("EulerAncestralDiscreteScheduler", {}, {}),
    ("EulerDiscreteScheduler", {"use_karras_sigmas": True}, {"s_churn": 10.0}),
    ("KDPM2AncestralDiscreteScheduler", MIN, {}),
    ("DPMSolverSDEScheduler", {**MIN, "noise_sampler_seed": 0}, {}),
    ("DPMSolverMultistepScheduler", {**MIN, "algorithm_type": "sde-dpmsolver++"}, {}),
    ("DPMSolverMultistepScheduler", {**MIN, "algorithm_type": "sde-dpmsolver", "final_sigmas_type": "sigma_min"}, {}),
    ("DPMSolverSinglestepScheduler", {**MIN, "algorithm_type": "sde-dpmsolver++"}, {}),
    ("SASolverScheduler", {**MIN, "tau_func": tau}, {}),
    ("EDMEulerScheduler", {}, {"s_churn": 10.0}),
    ("EDMDPMSolverMultistepScheduler", {"algorithm_type": "sde-dpmsolver++"}, {}),
    ("CosineDPMSolverMultistepScheduler", {"sigma_min": 0.01}, {}),
    ("LTXEulerAncestralRFScheduler", {}, {}),
    ("EulerAncestralDiscreteScheduler", {"prediction_type": "flow_prediction"}, {}),
]


@pytest.mark.parametrize(("name", "config", "options"), STOCHASTIC)
def test_stochastic_solvers_end_with_the_datas_mean_and_covariance(
    name: str, config: dict[str, Any], options: dict[str, Any]
) -> None:
    scheduler = getattr(schedulers, name)(**config)
    scheduler.set_timesteps(200)
    levels, generator = Levels(scheduler), seeded(1)
    if "generator" in inspect.signature(scheduler.step).parameters:
        options = {**options, "generator": generator}
    x = torch.randn(8000, 2, 1, 1, generator=generator) * float(scheduler.init_noise_sigma)
    for i, t in enumerate(scheduler.timesteps):
        scheduler.scale_model_input(x, t)
        x = scheduler.step(levels.output(x, i), t, x, return_dict=False, **options)[0]
    points = x.flatten(1).double()
    assert (points.mean(0) - MEAN).abs().max() < 0.05  # four standard errors
    assert (torch.cov(points.T) - COVARIANCE).abs().max() < 0.08


def test_the_networks_answer_is_the_mean_of_the_data() -> None:
    """By definition: the data, weighted with the probability that they became this noisy point."""
    clean = samples(0.0, 200_000).flatten(1)
    for sigma in (0.3, 0.8, 5.0):
        point = torch.tensor([0.4, 0.2], dtype=torch.float64)
        weights = (-(clean - point).square().sum(1) / (2 * sigma**2)).softmax(0)
        assert (weights @ clean - denoised(point.view(1, 2, 1, 1), sigma).flatten()).abs().max() < 0.02
