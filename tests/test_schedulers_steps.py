"""Schedulers on training steps, of consistency models, of score-based models and of tokens, against the reference."""

from __future__ import annotations

import inspect
import logging
from typing import Any

import diffusers
import numpy as np
import pytest
import torch
from scheduler_configs import LATENT, SPACINGS, axis, grid
from test_schedulers import SHAPE, case_id, close, generator, network

import sfumato.schedulers as ours

logging.getLogger("diffusers").setLevel(logging.ERROR)

KINDS = axis("prediction_type", "epsilon", "sample", "v_prediction")
CLIPS = [{"clip_sample": False}, {"clip_sample": True, "clip_sample_range": 0.7}]
THRESHOLDS = [*CLIPS, {"thresholding": True, "sample_max_value": 1.5}]
TABLES = [LATENT, {}, {"beta_schedule": "squaredcos_cap_v2"}, {"trained_betas": np.linspace(0.001, 0.015, 1000)}]
SNR = [{**LATENT, "rescale_betas_zero_snr": True, "timestep_spacing": s, "prediction_type": "v_prediction"} for s in SPACINGS[1:]]
ORIGINS = axis("original_inference_steps", 25, 50, 100)
CONFIGS: dict[str, list[dict[str, Any]]] = {
    "DDPMParallelScheduler": grid(TABLES, axis("timestep_spacing", *SPACINGS)) + grid([LATENT], KINDS, THRESHOLDS) + SNR,
    "DDIMParallelScheduler": grid(TABLES, axis("timestep_spacing", *SPACINGS), axis("set_alpha_to_one", True, False))
    + grid([LATENT], KINDS, THRESHOLDS) + SNR,
    "DDIMInverseScheduler": grid(TABLES, axis("timestep_spacing", "leading", "trailing"), axis("set_alpha_to_one", True, False))
    + grid([LATENT], axis("prediction_type", "epsilon", "v_prediction"), CLIPS, axis("steps_offset", 0, 1))
    + grid([LATENT], [{"prediction_type": "sample", "set_alpha_to_one": False}], CLIPS[:1]),
    "RePaintScheduler": grid(TABLES, axis("eta", 0.0, 0.5, 1.0), axis("clip_sample", True, False))
    + grid([{"beta_schedule": "sigmoid"}], axis("eta", 0.0, 1.0)),
    "UnCLIPScheduler": grid(axis("prediction_type", "epsilon", "sample"), axis("clip_sample_range", 0.7, 1.0, 5.0),
                            axis("variance_type", "fixed_small_log", "learned_range"), axis("num_train_timesteps", 1000, 500))
    + grid(axis("prediction_type", "epsilon", "sample"), CLIPS[:1], axis("num_train_timesteps", 1000, 500)),
    "DDPMWuerstchenScheduler": grid(axis("scaler", 1.0, 0.5, 2.0, 5.0), axis("s", 0.008, 0.001, 0.02, 0.05, 0.1)),
    "CogVideoXDDIMScheduler": grid(TABLES, axis("timestep_spacing", *SPACINGS), axis("snr_shift_scale", 1.0, 3.0)) + SNR
    + grid(KINDS, axis("set_alpha_to_one", True, False), CLIPS),
    "CogVideoXDPMScheduler": grid(TABLES, axis("timestep_spacing", *SPACINGS), axis("snr_shift_scale", 1.0, 3.0)) + SNR
    + grid(KINDS, axis("set_alpha_to_one", True, False), axis("steps_offset", 0, 1)),
    "LCMScheduler": grid(TABLES, ORIGINS, axis("timestep_scaling", 10.0, 0.5)) + grid([LATENT], KINDS, THRESHOLDS),
    "TCDScheduler": grid(TABLES, ORIGINS) + grid([LATENT], KINDS, THRESHOLDS) + SNR,
    "CMStochasticIterativeScheduler": grid(axis("sigma_max", 80.0, 20.0), axis("rho", 7.0, 3.0), axis("clip_denoised", True, False),
                                           axis("s_noise", 1.0, 1.1), [{}, {"sigma_data": 0.3, "sigma_min": 0.01}]),
    "SCMScheduler": grid(axis("sigma_data", 0.5, 1.0), axis("num_train_timesteps", 1000, 50)),
}  # fmt: skip


def reference_class(name: str) -> Any:
    return getattr(diffusers.schedulers, name)


def pair(name: str, config: dict[str, Any]) -> tuple[Any, Any]:
    return reference_class(name)(**config), getattr(ours, name)(**config)


def trajectory(scheduler: Any, start: int = 0, doubled: bool = False, seeds: tuple[int, ...] = (4,), **options: Any) -> list[Any]:
    """Runs the schedule from ``start`` on; answers all samples, what else the steps give, and the generator's final state."""
    name, model = type(scheduler).__name__, network(4, 8 if doubled else 4)
    x = torch.randn(SHAPE, generator=generator(2)) * float(scheduler.init_noise_sigma)
    parameters = inspect.signature(scheduler.step).parameters
    sources = [generator(seed) for seed in seeds]
    if "generator" in parameters:
        options["generator"] = sources if len(seeds) > 1 else sources[0]
    if start and hasattr(scheduler, "set_begin_index"):
        scheduler.set_begin_index(start)
    times = list(scheduler.timesteps[start:])
    if name in ("SCMScheduler", "DDPMWuerstchenScheduler"):
        times.pop()  # where the run ends
    samples: list[Any] = []
    old = back = None
    for i, t in enumerate(times):
        output = model(scheduler.scale_model_input(x, t), t) if hasattr(scheduler, "scale_model_input") else model(x, t)
        if name == "DDPMWuerstchenScheduler":
            t = t.expand(2)
        if name == "CogVideoXDPMScheduler":
            x, old = scheduler.step(output, old, t, back, x, **options)
            result, back = (x, old), t
        elif name == "RePaintScheduler":
            picture, mask = torch.randn(SHAPE, generator=generator(8)), torch.zeros(2, 1, 4, 4)
            mask[..., :2] = 1.0
            if i and t > times[i - 1]:
                x = scheduler.undo_step(x, times[i - 1], options["generator"])
                samples.append(x)
                continue
            result = scheduler.step(output, t, x, picture, mask, **options).to_tuple()
        elif name == "UnCLIPScheduler":
            following = times[i + 1] if i + 1 < len(times) else None
            result = scheduler.step(output, t, x, prev_timestep=following, **options).to_tuple()
        else:
            result = scheduler.step(output, t, x, **options).to_tuple()
        x = result[0]
        samples.extend([x, *(extra / 8 for extra in result[1:])])  # the denoised one has float32's rounding divided by the signal
    return [*samples, sources[0].get_state().float()] if len(seeds) == 1 else samples


def same_run(reference: Any, scheduler: Any, **options: Any) -> None:
    assert scheduler.timesteps.dtype == reference.timesteps.dtype
    close(scheduler.timesteps, reference.timesteps, 1e-6)
    assert float(scheduler.init_noise_sigma) == pytest.approx(float(reference.init_noise_sigma), rel=1e-6)
    for got, expected in zip(trajectory(scheduler, **options), trajectory(reference, **options), strict=True):
        close(got, expected)


def lay_out(scheduler: Any, steps: int) -> None:
    options: dict[str, Any] = {}
    if isinstance(scheduler, (ours.SCMScheduler, diffusers.SCMScheduler)) and steps != 2:
        options["intermediate_timesteps"] = None
    if "RePaint" in type(scheduler).__name__:
        options = {"jump_length": 3, "jump_n_sample": 2}
    scheduler.set_timesteps(steps, **options)


@pytest.mark.parametrize(("name", "config"), [(n, c) for n, cs in CONFIGS.items() for c in cs], ids=case_id)
def test_trajectories(name: str, config: dict[str, Any]) -> None:
    assert len(CONFIGS[name]) >= 20 or name == "SCMScheduler"  # which has three keys, one with a single value
    for steps in (4, 10, 25):
        reference, scheduler = pair(name, config)
        for s in (reference, scheduler):
            lay_out(s, steps)
        same_run(reference, scheduler, doubled=config.get("variance_type") == "learned_range")
