"""Schedulers against the reference: schedules, scaling, noising and whole trajectories over a grid of configurations."""

from __future__ import annotations

import inspect
import itertools
import logging
from typing import Any

import diffusers
import pytest
import torch

import sfumato.schedulers as ours

logging.getLogger("diffusers").setLevel(logging.ERROR)

SD15 = {
    "beta_start": 0.00085,
    "beta_end": 0.012,
    "beta_schedule": "scaled_linear",
    "num_train_timesteps": 1000,
    "skip_prk_steps": True,
    "steps_offset": 1,
    "set_alpha_to_one": False,
    "clip_sample": False,
}
NAMES = (
    "DDPMScheduler",
    "DDIMScheduler",
    "PNDMScheduler",
    "EulerDiscreteScheduler",
    "EulerAncestralDiscreteScheduler",
    "DPMSolverMultistepScheduler",
)
LATENT = {"beta_start": 0.00085, "beta_end": 0.012, "beta_schedule": "scaled_linear"}
SPACINGS = ("linspace", "leading", "trailing")
SHAPE = (2, 4, 4, 4)


def pair(name: str, config: dict[str, Any]) -> tuple[Any, Any]:
    return getattr(diffusers, name)(**config), getattr(ours, name)(**config)


def close(got: torch.Tensor, expected: torch.Tensor, tolerance: float = 1e-5) -> None:
    assert got.shape == expected.shape and got.dtype == expected.dtype
    scale = max(1.0, expected.abs().max().item())
    assert (got - expected).abs().max().item() <= tolerance * scale


def generator(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def network(channels: int, outputs: int) -> Any:
    """A fixed random linear model of the scaled sample and the timestep."""
    weight = torch.randn(outputs, channels, generator=generator(1)) * 0.4
    return lambda x, t: torch.einsum("oc,bchw->bohw", weight, x) * (1 + 0.3 * torch.sin(torch.as_tensor(float(t)) / 100))


def trajectory(scheduler: Any, start: int = 0, doubled: bool = False, **options: Any) -> list[torch.Tensor]:
    """Runs the schedule from ``start`` on and returns all samples. ``noise`` in the options asks for given variance noise."""
    model = network(4, 8 if doubled else 4)
    x = torch.randn(SHAPE, generator=generator(2)) * float(scheduler.init_noise_sigma)
    if start and hasattr(scheduler, "set_begin_index"):
        scheduler.set_begin_index(start)
    noises = generator(3) if options.pop("noise", False) else None
    if "generator" in inspect.signature(scheduler.step).parameters and noises is None:
        options["generator"] = generator(4)
    samples = []
    for t in scheduler.timesteps[start:]:
        output = model(scheduler.scale_model_input(x, t), t)
        if noises is not None:
            options["variance_noise"] = torch.randn(SHAPE, generator=noises)
        result = scheduler.step(output, t, x, **options)
        x = result.prev_sample
        samples += [x, *([result.pred_original_sample] if "pred_original_sample" in result.keys() else [])]  # noqa: SIM118
    if isinstance(options.get("generator"), torch.Generator):
        samples.append(options["generator"].get_state().float())  # as many draws as the reference
    return samples


def same_schedule(reference: Any, scheduler: Any) -> None:
    assert scheduler.timesteps.dtype == reference.timesteps.dtype
    close(scheduler.timesteps, reference.timesteps, 1e-6)
    assert float(scheduler.init_noise_sigma) == pytest.approx(float(reference.init_noise_sigma), rel=1e-6)
    if hasattr(reference, "sigmas"):
        close(scheduler.sigmas, reference.sigmas, 1e-6)


def same_run(reference: Any, scheduler: Any, start: int = 0, doubled: bool = False, **options: Any) -> None:
    same_schedule(reference, scheduler)
    expected = trajectory(reference, start, doubled, **options)
    got = trajectory(scheduler, start, doubled, **options)
    assert len(got) == len(expected)
    for a, b in zip(got, expected, strict=True):
        close(a, b)


def grid(*axes: list[dict[str, Any]]) -> list[dict[str, Any]]:
    return [{k: v for part in parts for k, v in part.items()} for parts in itertools.product(*axes)]


def axis(key: str, *values: Any) -> list[dict[str, Any]]:
    return [{key: value} for value in values]


COMMON = grid([LATENT, {}, {"beta_schedule": "squaredcos_cap_v2"}], axis("timestep_spacing", *SPACINGS))
OFFSET = grid([LATENT], axis("timestep_spacing", "leading", "trailing"), axis("steps_offset", 1))
SNR = [
    {**LATENT, "rescale_betas_zero_snr": True, "timestep_spacing": s, "prediction_type": p}
    for s, p in (("trailing", "v_prediction"), ("linspace", "v_prediction"), ("leading", "epsilon"))
]
TRAINED = [{"trained_betas": torch.linspace(0.001, 0.03, 500).tolist(), "num_train_timesteps": 500}]
BOUNDED = grid(
    [LATENT],
    axis("prediction_type", "epsilon", "sample", "v_prediction"),
    [
        {"clip_sample": False},
        {"clip_sample": True, "clip_sample_range": 0.7},
        {"thresholding": True, "sample_max_value": 1.5},
        {"thresholding": True, "clip_sample": True, "dynamic_thresholding_ratio": 0.9, "sample_max_value": 0.9},
    ],
)
RAMPS = [{}, {"use_karras_sigmas": True}, {"use_exponential_sigmas": True}, {"use_beta_sigmas": True}]
SOLVERS = grid(
    [LATENT],
    axis("solver_order", 1, 2, 3, 4),
    [{"algorithm_type": a, "final_sigmas_type": f} for a, f in (("dpmsolver++", "zero"), ("dpmsolver++", "sigma_min"))]
    + [{"algorithm_type": a, "final_sigmas_type": "sigma_min"} for a in ("dpmsolver", "sde-dpmsolver++", "sde-dpmsolver")]
    + [{"algorithm_type": "sde-dpmsolver++"}],
    axis("solver_type", "midpoint", "heun"),
)
CONFIGS: dict[str, list[dict[str, Any]]] = {
    "DDPMScheduler": COMMON + OFFSET + SNR + TRAINED + BOUNDED + grid([LATENT], axis("variance_type", "fixed_small_log", "fixed_large", None))
    + [{"beta_schedule": "sigmoid"}],
    "DDIMScheduler": COMMON + OFFSET + SNR + TRAINED + BOUNDED + grid([LATENT], axis("set_alpha_to_one", False), axis("steps_offset", 0, 1)),
    "PNDMScheduler": grid(COMMON, axis("skip_prk_steps", True, False)) + OFFSET
    + grid([LATENT], axis("prediction_type", "v_prediction"), axis("skip_prk_steps", True, False), axis("set_alpha_to_one", True, False)),
    "EulerDiscreteScheduler": COMMON + OFFSET + SNR + TRAINED
    + grid([LATENT], RAMPS, axis("interpolation_type", "linear", "log_linear"), axis("prediction_type", "epsilon", "v_prediction", "sample"))
    + grid([LATENT], RAMPS, axis("timestep_type", "continuous"), axis("prediction_type", "v_prediction", "epsilon"))
    + grid([LATENT], RAMPS, [{"sigma_min": 0.05, "sigma_max": 50.0}], axis("final_sigmas_type", "zero", "sigma_min"), axis("timestep_spacing", *SPACINGS)),
    "EulerAncestralDiscreteScheduler": grid(COMMON + OFFSET, axis("prediction_type", "epsilon", "v_prediction")) + SNR + TRAINED,
    "DPMSolverMultistepScheduler": COMMON + OFFSET + SNR + TRAINED
    + [c for c in SOLVERS if not (c["algorithm_type"] == "sde-dpmsolver" and c["solver_order"] > 2)]
    + grid([LATENT], [*RAMPS, {"use_lu_lambdas": True}], axis("final_sigmas_type", "zero", "sigma_min"), axis("lower_order_final", True, False), axis("euler_at_final", True, False))
    + grid([LATENT], axis("prediction_type", "epsilon", "sample", "v_prediction", "flow_prediction"), axis("thresholding", True, False),
           [{}, {"algorithm_type": "dpmsolver", "final_sigmas_type": "sigma_min"}])
    + grid(axis("use_flow_sigmas", True), axis("flow_shift", 1.0, 3.0), axis("prediction_type", "flow_prediction", "epsilon"), axis("solver_order", 2, 3))
    + grid([LATENT], axis("lambda_min_clipped", -1.1, -5.1), axis("timestep_spacing", *SPACINGS)),
}  # fmt: skip


def case_id(value: Any) -> str:
    if isinstance(value, dict):
        return "-".join(f"{k}={v}" for k, v in value.items() if k not in ("beta_start", "beta_end", "trained_betas")) or "default"
    return str(value)


@pytest.mark.parametrize(("name", "config"), [(n, c) for n, cs in CONFIGS.items() for c in cs], ids=case_id)
def test_trajectories(name: str, config: dict[str, Any]) -> None:
    assert len(CONFIGS[name]) >= 20
    for steps in (4, 10, 25):
        reference, scheduler = pair(name, config)
        if name.startswith("Euler") or name == "DDIMScheduler":
            same_schedule(reference, scheduler)  # as constructed
        reference.set_timesteps(steps)
        scheduler.set_timesteps(steps)
        assert len(scheduler) == len(reference) and scheduler.num_inference_steps == reference.num_inference_steps
        same_run(reference, scheduler)
