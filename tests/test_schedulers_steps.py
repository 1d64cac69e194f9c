"""Schedulers on training steps, of consistency models and of score-based models, against the reference and mathematics."""

from __future__ import annotations

import inspect
import logging
import math
from typing import Any

import diffusers
import numpy as np
import pytest
import test_pipelines
import torch
from scheduler_configs import LATENT, SPACINGS, axis, grid
from test_schedulers import SHAPE, case_id, close, generator, network

import sfumato
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


@pytest.mark.parametrize("name", [n for n in CONFIGS if n not in ("RePaintScheduler", "SCMScheduler")])
@pytest.mark.parametrize("start", [1, 5, 9])
def test_start_in_the_middle(name: str, start: int) -> None:
    reference, scheduler = pair(name, {})
    for s in (reference, scheduler):
        s.set_timesteps(10)
    same_run(reference, scheduler, start=start)


@pytest.mark.parametrize(
    ("name", "custom"),
    [
        ("DDPMParallelScheduler", {"timesteps": [900, 500, 100, 7]}),
        *[(n, {"timesteps": [999, 500, 20], "strength": s}) for n in ("LCMScheduler", "TCDScheduler") for s in (1.0, 0.7)],
        *[(n, {"num_inference_steps": 6, "strength": 0.5}) for n in ("LCMScheduler", "TCDScheduler")],
        *[(n, {"num_inference_steps": 7, "original_inference_steps": 70}) for n in ("LCMScheduler", "TCDScheduler")],
        ("CMStochasticIterativeScheduler", {"timesteps": [39, 20, 0]}),
        ("CMStochasticIterativeScheduler", {"timesteps": [22, 0]}),
        ("CMStochasticIterativeScheduler", {"num_inference_steps": 1}),
        ("DDPMWuerstchenScheduler", {"timesteps": [0.9, 0.5, 0.1, 0.0]}),
        ("SCMScheduler", {"num_inference_steps": 2}),
        ("SCMScheduler", {"num_inference_steps": 2, "max_timesteps": 1.5}),
        (
            "SCMScheduler",
            {"num_inference_steps": 3, "timesteps": [1.5, 1.0, 0.4, 0.0], "max_timesteps": None, "intermediate_timesteps": None},
        ),
    ],
    ids=case_id,
)
def test_custom_schedules(name: str, custom: dict[str, Any]) -> None:
    reference, scheduler = pair(name, {})
    for s in (reference, scheduler):
        s.set_timesteps(**custom)
    assert getattr(reference, "num_inference_steps", None) in (None, scheduler.num_inference_steps)
    if custom.get("strength", 1.0) < 1.0 and "timesteps" in custom:
        close(scheduler.timesteps, reference.timesteps)  # at the end of such a run the reference adds noise, which is left out here
    else:
        same_run(reference, scheduler)


@pytest.mark.parametrize("eta", [0.0, 0.6, 1.0])
def test_share_of_fresh_noise(eta: float) -> None:
    for kind in ("epsilon", "v_prediction"):
        reference, scheduler = pair("TCDScheduler", {"prediction_type": kind})
        for s in (reference, scheduler):
            s.set_timesteps(8)
        same_run(reference, scheduler, eta=eta)


@pytest.mark.parametrize("name", ["DDPMParallelScheduler", "DDIMParallelScheduler"])
@pytest.mark.parametrize("spacing", SPACINGS)
@pytest.mark.parametrize("kind", ["epsilon", "sample", "v_prediction"])
def test_steps_parallel_in_time(name: str, spacing: str, kind: str) -> None:
    reference, scheduler = pair(name, {**LATENT, "timestep_spacing": spacing, "prediction_type": kind})
    for s in (reference, scheduler):
        s.set_timesteps(10)
    x, output, times = *noises(2), reference.timesteps[[2, 7]]
    got = scheduler.batch_step_no_noise(output, times, x)
    close(got, reference.batch_step_no_noise(output, times, x))
    if name == "DDIMParallelScheduler":  # which makes the samples of single steps
        for i, t in enumerate(times):
            torch.testing.assert_close(got[i : i + 1], scheduler.step(output[i : i + 1], t, x[i : i + 1]).prev_sample)


def noises(count: int, shape: tuple[int, ...] = SHAPE) -> list[torch.Tensor]:
    return [torch.randn(shape, generator=generator(20 + i)) for i in range(count)]


def test_consistency_decoder() -> None:
    reference, scheduler = pair("ConsistencyDecoderScheduler", {"sigma_data": 0.4})
    for s in (reference, scheduler):
        s.set_timesteps(2)
    same_run(reference, scheduler)


@pytest.mark.parametrize(
    "config", [{}, {"sigma_min": 0.1, "sigma_max": 20.0, "s_churn": 10, "s_noise": 1.0, "s_max": 5}], ids=case_id
)
@pytest.mark.parametrize("steps", [4, 10, 25])
def test_karras_ve(config: dict[str, Any], steps: int) -> None:
    results = []
    for s in pair("KarrasVeScheduler", config):
        s.set_timesteps(steps)
        source, model = generator(4), network(4, 4)
        x = torch.randn(SHAPE, generator=generator(2)) * s.init_noise_sigma
        samples = [s.timesteps, s.schedule]
        for t in s.timesteps:
            sigma = s.schedule[t].sqrt()
            sigma_prev = s.schedule[t - 1].sqrt() if t > 0 else 0
            x_hat, sigma_hat = s.add_noise_to_input(x, sigma, generator=source)
            output = s.step(-torch.tanh(model(x_hat, t) / 20), sigma_hat, sigma_prev, x_hat)
            samples.extend(output.to_tuple())
            if sigma_prev != 0:
                slope = -torch.tanh(model(output.prev_sample, t) / 20)
                output = s.step_correct(slope, sigma_hat, sigma_prev, x_hat, output.prev_sample, output.derivative)
                samples.extend(output.to_tuple())
            x = output.prev_sample
        results.append([*samples, source.get_state().float()])
    for expected, got in zip(*results, strict=True):  # the reference rounds at the scale of the first sample
        close(got, expected, scale=s.init_noise_sigma)


@pytest.mark.parametrize("config", [{}, {"sigma_max": 50.0, "snr": 0.3, "sampling_eps": 0.01}], ids=case_id)
@pytest.mark.parametrize("steps", [4, 10, 25, 1000])
def test_score_sde_ve(config: dict[str, Any], steps: int) -> None:
    results = []
    for s in pair("ScoreSdeVeScheduler", config):
        s.set_timesteps(steps)
        s.set_sigmas(steps)
        source, model, x = generator(4), network(4, 4), torch.randn(SHAPE, generator=generator(2)) * s.init_noise_sigma
        samples = [s.timesteps, s.sigmas, s.discrete_sigmas]
        for i, t in enumerate(s.timesteps):
            x = s.step_correct((model(x, i) - x) / s.sigmas[i] ** 2, x, generator=source).prev_sample
            samples.extend(s.step_pred((model(x, i) - x) / s.sigmas[i] ** 2, t, x, generator=source).to_tuple())
            x = samples[-2]
        results.append([*samples, source.get_state().float()])
    for expected, got in zip(*results, strict=True):
        close(got, expected)
    x, noise = noises(2)
    reference, scheduler = pair("ScoreSdeVeScheduler", config)
    close(scheduler.add_noise(x, noise, torch.tensor([5, 900])), reference.add_noise(x, noise, torch.tensor([5, 900])))


@pytest.mark.parametrize("config", [{}, {"beta_min": 0.5, "beta_max": 10, "sampling_eps": 0.01}], ids=case_id)
@pytest.mark.parametrize("steps", [4, 10, 25])
def test_score_sde_vp(config: dict[str, Any], steps: int) -> None:
    results = []
    for s in pair("ScoreSdeVpScheduler", config):
        s.set_timesteps(steps)
        source, model, x = generator(4), network(4, 4), torch.randn(SHAPE, generator=generator(2))
        samples = [s.timesteps]
        for i, t in enumerate(s.timesteps):
            x, mean = s.step_pred(model(x, i), x, t, generator=source)
            samples.extend((x, mean))
        results.append([*samples, source.get_state().float()])
    for expected, got in zip(*results, strict=True):
        close(got, expected)


STOCHASTIC = [n for n in CONFIGS if n not in ("DDIMParallelScheduler", "DDIMInverseScheduler", "CogVideoXDDIMScheduler")]


@pytest.mark.parametrize("name", STOCHASTIC)
def test_a_batch_with_a_generator_per_sample_is_its_samples_alone(name: str) -> None:
    config = {"eta": 1.0} if name == "RePaintScheduler" else {}
    runs = []
    for seeds, samples in (((5, 6), slice(0, 2)), ((5,), slice(0, 1)), ((6,), slice(1, 2))):
        scheduler = getattr(ours, name)(**config)
        lay_out(scheduler, 4)
        step, undo = scheduler.step, getattr(scheduler, "undo_step", None)

        def cut(*args: Any, step: Any = step, samples: slice = samples, **options: Any) -> Any:
            """Steps the chosen samples of a batch, and answers a whole batch."""
            batch = [a[samples] if isinstance(a, torch.Tensor) and a.ndim == 4 else a for a in args]
            result = step(*batch, **options)
            parts = result if isinstance(result, tuple) else result.to_tuple() if hasattr(result, "to_tuple") else (result,)
            whole = [p if len(p) == 2 else p.expand(2, -1, -1, -1) for p in parts]
            if isinstance(result, torch.Tensor):
                return whole[0]
            return tuple(whole) if isinstance(result, tuple) else type(result)(*whole)

        cut.__signature__ = inspect.signature(step)  # type: ignore[attr-defined]
        scheduler.step = cut
        if undo is not None:
            scheduler.undo_step = lambda *a, u=undo: cut(*a, step=u)
        runs.append(trajectory(scheduler, seeds=seeds))
    for both, first, second in zip(*runs, strict=False):
        torch.testing.assert_close(both, torch.cat([first[:1], second[1:]]), rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize(
    "name", [n for n in CONFIGS if n not in ("RePaintScheduler", "CMStochasticIterativeScheduler", "SCMScheduler")]
)
def test_half_precision(name: str) -> None:
    for dtype in (torch.bfloat16, torch.float16):
        results = []
        for s in pair(name, {}):
            s.set_timesteps(6)
            x, output = (n.to(dtype) for n in noises(2))
            t = s.timesteps[2].expand(2) if name == "DDPMWuerstchenScheduler" else s.timesteps[2]
            options = {"generator": generator()} if "generator" in inspect.signature(s.step).parameters else {}
            places = (None, t, None, x) if name == "CogVideoXDPMScheduler" else (t, x)
            results.append(s.step(output, *places, **options)[0])
        close(results[1], results[0], 0.03)


@pytest.mark.parametrize("name", sorted({*CONFIGS, "ConsistencyDecoderScheduler"}))
def test_runs_leave_global_random_state_and_each_other_alone(name: str) -> None:
    before = torch.get_rng_state()
    scheduler = getattr(ours, name)()
    lay_out(scheduler, 2 if name == "ConsistencyDecoderScheduler" else 6)
    alone = trajectory(scheduler.fresh())
    first, second = scheduler.fresh(), scheduler.fresh()
    trajectory(first)
    for a, b in zip(trajectory(second), alone, strict=True):
        assert torch.equal(a, b)
    assert torch.equal(before, torch.get_rng_state()) and scheduler.step_index is None


ADDERS = [n for n in CONFIGS if n not in ("DDIMInverseScheduler", "RePaintScheduler", "SCMScheduler")]


@pytest.mark.parametrize("name", ADDERS)
def test_add_noise(name: str) -> None:
    reference, scheduler = pair(name, {})
    for s in (reference, scheduler):
        s.set_timesteps(8)
    x, noise = noises(2)
    for t in (reference.timesteps[[2, 5]], reference.timesteps[3:4]):
        close(scheduler.add_noise(x, noise, t), reference.add_noise(x, noise, t))
    if name == "CMStochasticIterativeScheduler":
        for s in (reference, scheduler):
            s.set_begin_index(4)
        close(scheduler.add_noise(x, noise, t), reference.add_noise(x, noise, t))
    if hasattr(reference, "get_velocity"):
        close(scheduler.get_velocity(x, noise, t), reference.get_velocity(x, noise, t))


ALL = [*CONFIGS, "ConsistencyDecoderScheduler", "KarrasVeScheduler", "ScoreSdeVeScheduler", "ScoreSdeVpScheduler",
       "VQDiffusionScheduler", "AmusedScheduler"]  # fmt: skip
METHODS = ("__init__", "set_timesteps", "step", "batch_step_no_noise", "undo_step", "step_pred", "step_correct", "set_sigmas",
           "add_noise_to_input", "q_posterior", "get_scalings_for_boundary_condition_discrete", "sigma_to_t",
           "get_scalings_for_boundary_condition")  # fmt: skip


@pytest.mark.parametrize("name", ALL)
def test_signatures_are_the_references(name: str) -> None:
    reference, scheduler = reference_class(name), getattr(ours, name)
    assert scheduler.order == getattr(reference, "order", 1)
    for method in METHODS:
        if hasattr(reference, method):
            expected, got = (inspect.signature(getattr(cls, method)).parameters.values() for cls in (reference, scheduler))
            assert [(p.name, p.default) for p in got] == [(p.name, p.default) for p in expected if p.name != "kwargs"]


STEPPERS = [n for n in ALL if hasattr(reference_class(n), "step") and n not in ("KarrasVeScheduler", "CogVideoXDPMScheduler")]


@pytest.mark.parametrize("name", STEPPERS)
def test_outputs_are_the_references(name: str) -> None:
    """Steps answer the same fields, as many as a tuple."""
    config = {"VQDiffusionScheduler": {"num_vec_classes": 9}, "AmusedScheduler": {"mask_token_id": 8}}.get(name, {})
    fields = []
    for scheduler in pair(name, config):
        lay_out(scheduler, 2)
        x, t = noises(1)[0], scheduler.timesteps[0]
        arguments: list[Any] = [x, t.expand(2) if name == "DDPMWuerstchenScheduler" else t, x]
        if config:
            arguments = [torch.zeros((2, 8, 16) if "VQ" in name else (2, 16, 8)), t, torch.full((2, 16), 8)]
        if name == "RePaintScheduler":
            arguments += [x, torch.ones_like(x)]
        keys = list(scheduler.step(*arguments).keys())
        lay_out(scheduler, 2)
        fields.append((keys, len(scheduler.step(*arguments, return_dict=False))))
    assert fields[1] == fields[0]


SETTING_ERRORS: list[tuple[str, dict[str, Any], dict[str, Any]]] = [
    *[(n, {}, {"num_inference_steps": 1001}) for n in ("DDIMParallelScheduler", "DDIMInverseScheduler", "CogVideoXDPMScheduler")],
    *[(n, {"beta_schedule": "quadratic"}, {"num_inference_steps": 5}) for n in ("LCMScheduler", "CogVideoXDDIMScheduler")],
    ("UnCLIPScheduler", {"beta_schedule": "linear"}, {"num_inference_steps": 5}),
    ("CogVideoXDDIMScheduler", {"timestep_spacing": "trailling"}, {"num_inference_steps": 5}),
    ("DDIMInverseScheduler", {"timestep_spacing": "linspace"}, {"num_inference_steps": 5}),
    *[(n, {}, {"num_inference_steps": 0}) for n in ("LCMScheduler", "TCDScheduler", "CMStochasticIterativeScheduler")],
    *[(n, {}, {}) for n in ("LCMScheduler", "TCDScheduler", "CMStochasticIterativeScheduler", "DDPMWuerstchenScheduler")],
    *[(n, {}, {"num_inference_steps": s}) for n in ("LCMScheduler", "TCDScheduler") for s in (51, 1001)],
    *[(n, {}, {"num_inference_steps": 4, "strength": 0.03}) for n in ("LCMScheduler", "TCDScheduler")],
    ("LCMScheduler", {}, {"num_inference_steps": 4, "original_inference_steps": 2000}),
    *[(n, {}, {"timesteps": [500, 999]}) for n in ("LCMScheduler", "TCDScheduler")],
    *[(n, {}, {"timesteps": [1000, 5]}) for n in ("LCMScheduler", "TCDScheduler")],
    *[(n, {}, {"timesteps": [9, 5], "num_inference_steps": 2}) for n in ("LCMScheduler", "CMStochasticIterativeScheduler")],
    ("CMStochasticIterativeScheduler", {}, {"num_inference_steps": 50}),
    ("CMStochasticIterativeScheduler", {}, {"timesteps": [20, 39]}),
    ("CMStochasticIterativeScheduler", {}, {"timesteps": [40, 1]}),
    ("UnCLIPScheduler", {}, {"num_inference_steps": 1}),
    *[("ConsistencyDecoderScheduler", {}, {"num_inference_steps": n}) for n in (1, 3, None)],
    ("SCMScheduler", {}, {"num_inference_steps": 4}),
    ("SCMScheduler", {}, {"num_inference_steps": 1001, "intermediate_timesteps": None}),
    ("SCMScheduler", {}, {"num_inference_steps": 2, "timesteps": [1.5, 1.0, 0.0]}),
    ("SCMScheduler", {}, {"num_inference_steps": 2, "timesteps": [1.5], "max_timesteps": None, "intermediate_timesteps": None}),
    ("SCMScheduler", {}, {"num_inference_steps": 2, "max_timesteps": None}),
]  # fmt: skip


@pytest.mark.parametrize(("name", "config", "setting"), SETTING_ERRORS, ids=case_id)
def test_wrong_settings_raise_as_in_the_reference(name: str, config: dict[str, Any], setting: dict[str, Any]) -> None:
    with pytest.raises((ValueError, TypeError)) as raised:
        getattr(ours, name)(**config).set_timesteps(**setting)
    assert any(key in str(raised.value) for key in [*config, *setting, "num_inference_steps"])
    with pytest.raises(Exception):  # noqa: B017
        reference_class(name)(**config).set_timesteps(**setting)


def test_what_only_we_refuse() -> None:
    x = noises(1)[0]
    with pytest.raises(ValueError, match="sum to more than 1"):
        ours.VQDiffusionScheduler(9, alpha_cum_start=0.99, gamma_cum_start=0.1)
    with pytest.raises(ValueError, match="num_inference_steps=101"):
        ours.VQDiffusionScheduler(9).set_timesteps(101)
    with pytest.raises(ValueError, match="did you mean 'cosine'"):
        ours.AmusedScheduler(9, "cosin")
    with pytest.raises(ValueError, match="prediction_type='epsilon'"):
        ours.SCMScheduler(prediction_type="epsilon")
    with pytest.raises(ValueError, match="set_alpha_to_one=False"):
        inverse = ours.DDIMInverseScheduler(prediction_type="sample")
        inverse.set_timesteps(4)
        inverse.step(x, 0, x)
    for name in ("CogVideoXDDIMScheduler", "CogVideoXDPMScheduler"):
        scheduler = getattr(ours, name)()
        scheduler.set_timesteps(4)
        places = (None, 0, None) if "DPM" in name else (0,)
        for given in ({"eta": 0.5}, {"variance_noise": x}):
            with pytest.raises(ValueError, match=r"eta.* and variance_noise"):
                scheduler.step(x, *places, x, **given)
    tcd = ours.TCDScheduler()
    tcd.set_timesteps(4)
    with pytest.raises(ValueError, match=r"eta=1\.5"):
        tcd.step(x, 999, x, eta=1.5)
    wuerstchen = ours.DDPMWuerstchenScheduler()
    wuerstchen.set_timesteps(4)
    with pytest.raises(ValueError, match="one for the whole batch"):
        wuerstchen.step(x, torch.tensor([1.0, 0.5]), x)
    lcm = ours.LCMScheduler()
    with pytest.raises(ValueError, match="call set_timesteps"):
        lcm.step(x, 999, x)


SPREAD = 0.7
"""Standard deviation of the data of the tests below. For normal data the perfect network is known."""


@pytest.mark.parametrize(
    "name", ["DDPMParallelScheduler", "DDPMWuerstchenScheduler", "CogVideoXDPMScheduler", "ScoreSdeVpScheduler"]
)
def test_stochastic_samplers_keep_the_distribution(name: str) -> None:
    scheduler = getattr(ours, name)(**({"clip_sample": False} if name == "DDPMParallelScheduler" else {}))
    scheduler.set_timesteps(250)
    source = generator()
    x = torch.randn(40000, 1, 1, 1, generator=source)
    old = back = None
    times = scheduler.timesteps[:-1] if name == "DDPMWuerstchenScheduler" else scheduler.timesteps
    for t in times:
        if name == "ScoreSdeVpScheduler":
            alpha_bar = math.exp(-(t.item() ** 2) / 2 * 19.9 - 0.1 * t.item())
        else:
            alpha_bar = scheduler._levels(t[None])[0].item() ** 2
        noise = x * math.sqrt(1 - alpha_bar) / (alpha_bar * SPREAD**2 + 1 - alpha_bar)
        if name == "CogVideoXDPMScheduler":
            x, old = scheduler.step(noise, old, t, back, x, generator=source)
            back = t
        elif name == "ScoreSdeVpScheduler":
            x = scheduler.step_pred(noise, x, t, generator=source)[0]
        else:
            x = scheduler.step(noise, t, x, generator=source).prev_sample
    assert x.std().item() == pytest.approx(SPREAD, rel=0.03)


def test_inversion_undoes_sampling() -> None:
    """With many steps, DDIM from its inversion's noise comes back to the clean sample."""
    config = {"clip_sample": False, "set_alpha_to_one": False}
    x = start = torch.randn(SHAPE, generator=generator(2)) * SPREAD
    for name in ("DDIMInverseScheduler", "DDIMParallelScheduler"):
        scheduler = getattr(ours, name)(**config)
        scheduler.set_timesteps(500)
        for t in scheduler.timesteps:
            alpha_bar = scheduler.alphas_cumprod[t].item()
            x = scheduler.step(x * math.sqrt(1 - alpha_bar) / (alpha_bar * SPREAD**2 + 1 - alpha_bar), t, x).prev_sample
    close(x, start, 0.02)


def test_boundary_conditions() -> None:
    """Where there is no noise, consistency functions are the identity (arXiv:2303.01469 section 3)."""
    x, output = noises(2)
    consistency = ours.CMStochasticIterativeScheduler(clip_denoised=False)
    consistency.set_timesteps(timesteps=[39])
    assert consistency.sigmas[0] == pytest.approx(0.002)
    close(consistency.step(output, consistency.timesteps[0], x).prev_sample, x)
    assert ours.LCMScheduler().get_scalings_for_boundary_condition_discrete(0) == (1.0, 0.0)
    trig = ours.SCMScheduler()
    trig.set_timesteps(1, timesteps=[0.0, 0.0], max_timesteps=None, intermediate_timesteps=None)
    close(trig.step(output, 0.0, x).pred_original_sample, x)


def test_repaint_takes_no_more_steps_than_there_are() -> None:
    reference, scheduler = pair("RePaintScheduler", {"num_train_timesteps": 20})
    for s in (reference, scheduler):
        s.set_timesteps(50)
    close(scheduler.timesteps, reference.timesteps)
    assert scheduler.num_inference_steps == reference.num_inference_steps


def test_repaint_keeps_the_known_region() -> None:
    scheduler = ours.RePaintScheduler(clip_sample=False)
    scheduler.set_timesteps(4, jump_n_sample=1)
    picture, output = noises(2)
    mask = torch.zeros(1, 1, 4, 4)
    mask[..., :2] = 1
    x = picture * 0
    for t in scheduler.timesteps:
        x = scheduler.step(output, t, x, picture, mask, generator=generator()).prev_sample
    close(x[..., :2], picture[..., :2])
    assert (x[..., 2:] - picture[..., 2:]).abs().min() > 0


@pytest.mark.parametrize("name", [n for n in CONFIGS if n not in ("RePaintScheduler", "UnCLIPScheduler")])
def test_steps_do_not_wait_for_the_device(name: str) -> None:
    """Tensors without data raise when their value is asked for, as a step that waits for an accelerator would."""
    scheduler = getattr(ours, name)()
    lay_out(scheduler, 6) if name != "SCMScheduler" else scheduler.set_timesteps(6, device="meta", intermediate_timesteps=None)
    if name != "SCMScheduler":
        scheduler.set_timesteps(6, device="meta")
    scheduler.set_begin_index(0)
    x = old = torch.empty(2, 4, 8, 8, device="meta")
    for i, t in enumerate(scheduler.timesteps[:6]):
        if name == "CogVideoXDPMScheduler":
            x = scheduler.step(x, old if i else None, t, scheduler.timesteps[i - 1] if i else None, x)[0]
        else:
            x = scheduler.step(x, t.expand(2) if name == "DDPMWuerstchenScheduler" else t, x).prev_sample
    assert x.shape == (2, 4, 8, 8) and scheduler.timesteps.device.type == "meta"


@pytest.mark.parametrize("scheduler", ["LCMScheduler", "TCDScheduler"])
@pytest.mark.parametrize("name", ["StableDiffusionPipeline", "StableDiffusionImg2ImgPipeline"])
def test_pipelines_take_distilled_schedulers(checkpoint: Any, name: str, scheduler: str) -> None:
    folder, reference = checkpoint(name)
    pipe = test_pipelines.ours(folder, reference)
    both = (test_pipelines.with_scheduler(*side, scheduler) for side in ((diffusers, reference), (sfumato, pipe)))
    test_pipelines.assert_same(*both, **test_pipelines.CALLS[name])


@pytest.mark.parametrize("name", ["FlowMatchEulerDiscreteScheduler", "FlowMatchLCMScheduler"])
def test_a_shift_that_is_set_acts(name: str) -> None:
    samples = []
    for scheduler in pair(name, {}):
        scheduler.set_shift(3.0)
        scheduler.set_timesteps(4)
        samples.append([scheduler.timesteps, scheduler.sigmas])
    for expected, got in zip(*samples, strict=True):
        close(got, expected)


@pytest.mark.parametrize(
    "name", ["UniPCMultistepScheduler", "DPMSolverMultistepScheduler", "EulerDiscreteScheduler", "HeunDiscreteScheduler"]
)
def test_a_solver_on_a_flow_stays_on_it_when_saved(name: str, tmp_path: Any) -> None:
    first = getattr(ours, name).from_config(ours.FlowMatchEulerDiscreteScheduler(shift=3.0).config)
    first.save_pretrained(tmp_path)
    second, x = getattr(ours, name).from_pretrained(tmp_path), noises(1)[0]
    for scheduler in (first, second):
        scheduler.set_timesteps(4)
    assert first.is_flow and torch.equal(first.sigmas, second.sigmas)
    close(second.step(x, second.timesteps[0], x * 2).prev_sample, first.step(x, first.timesteps[0], x * 2).prev_sample)
    assert (first.step(x, first.timesteps[1], x * 2).prev_sample - x * 2).abs().max() > 0.01
