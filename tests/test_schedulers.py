"""Schedulers against the reference: schedules, scaling, noising and whole trajectories over a grid of configurations."""

from __future__ import annotations

import inspect
import logging
from typing import Any

import diffusers
import pytest
import torch
from scheduler_configs import BOUNDED, CONFIGS, CONTINUOUS, EXACT, FEW_KEYS, LATENT, NAMES, OTHERS, SD15, SPACINGS

import sfumato.schedulers as ours
from sfumato.schedulers.euler import ExplodingScheduler

logging.getLogger("diffusers").setLevel(logging.ERROR)

SHAPE = (2, 4, 4, 4)


def pair(name: str, config: dict[str, Any]) -> tuple[Any, Any]:
    if name == "DPMSolverSDEScheduler":
        config = {"noise_sampler_seed": 0, **config}
    return getattr(diffusers, name)(**config), getattr(ours, name)(**config)


def close(got: torch.Tensor, expected: torch.Tensor, tolerance: float = 1e-5, scale: float = 1.0) -> None:
    assert got.shape == expected.shape and got.dtype == expected.dtype
    scale = max(scale, expected.abs().max().item())
    assert (got - expected).abs().max().item() <= tolerance * scale


def generator(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def network(channels: int, outputs: int) -> Any:
    """A fixed random linear model of the scaled sample and the timestep."""
    weight = torch.randn(outputs, channels, generator=generator(1)) * 0.25
    return lambda x, t: (
        torch.einsum("oc,bchw->bohw", weight.to(x.dtype), x) * (1 + 0.3 * torch.sin(torch.as_tensor(float(t)) / 100))
    )


def takes_generator(scheduler: Any) -> bool:
    """Whether the step takes a generator in the reference, too."""
    parameter = inspect.signature(scheduler.step).parameters.get("generator")
    return parameter is not None and parameter.kind is not parameter.KEYWORD_ONLY


def trajectory(scheduler: Any, start: int = 0, doubled: bool = False, **options: Any) -> list[torch.Tensor]:
    """Runs the schedule from ``start`` on and returns all samples, the denoised ones too.

    ``noise`` in the options asks for given variance noise.
    """
    model = network(4, 8 if doubled else 4)
    x = torch.randn(SHAPE, generator=generator(2)) * float(getattr(scheduler, "init_noise_sigma", 1.0))
    x = x.double() if type(scheduler).__name__ in EXACT else x
    scale = getattr(scheduler, "scale_model_input", lambda x, t: x)  # the reference's flow schedulers have neither
    if hasattr(scheduler, "set_begin_index") and (start or scheduler.timesteps[0] in scheduler.timesteps[1:2]):
        scheduler.set_begin_index(start)  # the reference loses the first of two equal timesteps otherwise
    noises = generator(3) if options.pop("noise", False) else None
    if takes_generator(scheduler) and noises is None:
        options["generator"] = generator(4)
    samples: list[torch.Tensor] = []
    for t in scheduler.timesteps[start:]:
        output = model(scale(x, t), t)
        if noises is not None:
            options["variance_noise"] = torch.randn(SHAPE, generator=noises)
        result = scheduler.step(output, t, x, **options)
        x = result.prev_sample
        samples.append(x)
        if len(result) > 1:  # near pure noise the denoised sample is the less exact of the two
            samples.append(result.pred_original_sample / 3)
    if isinstance(options.get("generator"), torch.Generator):
        samples.append(options["generator"].get_state().float())  # as many draws as the reference
    return samples


def same_schedule(reference: Any, scheduler: Any) -> None:
    assert scheduler.timesteps.dtype == reference.timesteps.dtype
    close(scheduler.timesteps, reference.timesteps, 1e-6)
    assert float(scheduler.init_noise_sigma) == pytest.approx(float(getattr(reference, "init_noise_sigma", 1.0)), rel=1e-6)
    if hasattr(reference, "sigmas"):
        close(scheduler.sigmas, reference.sigmas.float(), 1e-6)


def same_run(reference: Any, scheduler: Any, start: int = 0, doubled: bool = False, **options: Any) -> None:
    same_schedule(reference, scheduler)
    if type(scheduler).__name__ in EXACT:
        reference.sigmas = reference.sigmas.double()
    expected = trajectory(reference, start, doubled, **options)
    got = trajectory(scheduler, start, doubled, **options)
    # The reference's float32 rounds at the scale of the largest sample, which tables of zero terminal SNR begin with.
    scale = max(1.0, 0.2 * float(scheduler.init_noise_sigma))
    for a, b in zip(got, expected, strict=True):
        close(a, b, scale=scale)


def case_id(value: Any) -> str:
    if isinstance(value, dict):
        shown = {k: v if isinstance(v, (int, float, str, list, tuple)) else type(v).__name__ for k, v in value.items()}
        return "-".join(f"{k}={v}" for k, v in shown.items() if k not in ("beta_start", "beta_end", "trained_betas")) or "default"
    return str(value)


@pytest.mark.parametrize(("name", "config"), [(n, c) for n, cs in {**CONFIGS, **OTHERS}.items() for c in cs], ids=case_id)
def test_trajectories(name: str, config: dict[str, Any]) -> None:
    assert name in FEW_KEYS or len({**CONFIGS, **OTHERS}[name]) >= 20
    for steps in (4, 10, 25):
        reference, scheduler = pair(name, config)
        if name in ("DDPMScheduler", "DDIMScheduler", "EulerDiscreteScheduler"):
            same_schedule(reference, scheduler)  # as constructed
        reference.set_timesteps(steps)
        scheduler.set_timesteps(steps)
        assert len(scheduler) == len(reference) and scheduler.num_inference_steps == reference.num_inference_steps
        same_run(reference, scheduler)


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("start", [1, 5, 9])
def test_start_in_the_middle(name: str, start: int) -> None:
    for extra in ({}, {"use_karras_sigmas": True}, {"solver_order": 3}, {"skip_prk_steps": True}):
        config = {k: v for k, v in {**LATENT, **extra}.items() if k in inspect.signature(getattr(ours, name)).parameters}
        if name == "PNDMScheduler":
            config["skip_prk_steps"] = True  # a Runge-Kutta warm-up cannot begin in its middle
        reference, scheduler = pair(name, config)
        reference.set_timesteps(10)
        scheduler.set_timesteps(10)
        # In the reference LMS uses the weights of outputs that it does not have, unless it is told the order.
        same_run(reference, scheduler, start * scheduler.order, **({"order": 1} if name == "LMSDiscreteScheduler" else {}))


@pytest.mark.parametrize("name", NAMES)
def test_a_single_step(name: str) -> None:
    config = {k: v for k, v in LATENT.items() if k in inspect.signature(getattr(ours, name)).parameters}
    config |= {"skip_prk_steps": True} if name == "PNDMScheduler" else {}  # its Runge-Kutta warm-up needs four
    reference, scheduler = pair(name, config)
    reference.set_timesteps(1)
    scheduler.set_timesteps(1)
    same_run(reference, scheduler)


def begin_without_index(scheduler: Any, start: int) -> torch.Tensor:
    x = torch.randn(SHAPE, generator=generator(2))
    for t in scheduler.timesteps[start:]:
        x = scheduler.step(network(4, 4)(scheduler.scale_model_input(x, t), t), t, x).prev_sample
    return x


@pytest.mark.parametrize("name", ["EulerDiscreteScheduler", "DPMSolverMultistepScheduler"])
def test_the_first_timestep_tells_where_a_run_begins(name: str) -> None:
    reference, scheduler = pair(name, LATENT)
    reference.set_timesteps(10)
    scheduler.set_timesteps(10)
    close(begin_without_index(scheduler, 4), begin_without_index(reference, 4))
    assert scheduler.step_index == reference.step_index == 10
    scheduler.set_timesteps(5)
    assert scheduler.step_index is None and scheduler.begin_index is None


@pytest.mark.parametrize(
    ("name", "config", "custom"),
    [
        ("DDPMScheduler", {}, {"timesteps": [900, 500, 100, 7]}),
        ("EulerDiscreteScheduler", {}, {"timesteps": [900, 500.5, 100]}),
        ("EulerDiscreteScheduler", {"final_sigmas_type": "sigma_min"}, {"timesteps": [900, 500, 100]}),
        ("EulerDiscreteScheduler", {"interpolation_type": "log_linear"}, {"timesteps": [900, 500, 100]}),
        ("EulerDiscreteScheduler", {}, {"sigmas": [10.0, 3.0, 1.0, 0.0]}),
        ("EulerDiscreteScheduler", {"use_karras_sigmas": True}, {"sigmas": [10.0, 3.0, 1.0, 0.2]}),
        ("EulerDiscreteScheduler", CONTINUOUS, {"sigmas": [10.0, 3.0, 1.0, 0.0]}),
        ("DPMSolverMultistepScheduler", {}, {"timesteps": [999, 850, 500, 100]}),
        ("DPMSolverMultistepScheduler", {"solver_order": 3, "final_sigmas_type": "sigma_min"}, {"timesteps": [999, 850, 500, 100]}),
        (
            "DPMSolverMultistepScheduler",
            {"use_flow_sigmas": True, "prediction_type": "flow_prediction", "use_dynamic_shifting": True},
            {"num_inference_steps": 6, "mu": 0.8},
        ),
    ],
    ids=case_id,
)
def test_custom_schedules(name: str, config: dict[str, Any], custom: dict[str, Any]) -> None:
    reference, scheduler = pair(name, {**LATENT, **config})
    reference.set_timesteps(**custom)
    scheduler.set_timesteps(**custom)
    same_run(reference, scheduler)


@pytest.mark.parametrize("name", [n for n in NAMES if issubclass(getattr(ours, n), ExplodingScheduler)])
def test_explicit_timesteps_lay_out_the_run_that_has_them(name: str) -> None:
    first, second = (getattr(ours, name)(**LATENT) for _ in range(2))
    first.set_timesteps(4)
    second.set_timesteps(timesteps=first.timesteps[:: first.order].tolist())
    close(second.timesteps, first.timesteps, 1e-6)
    close(second.sigmas, first.sigmas, 1e-6)
    with pytest.raises(ValueError, match="exactly one of num_inference_steps, timesteps, sigmas"):
        second.set_timesteps(4, timesteps=[900.0])


@pytest.mark.parametrize(
    ("name", "config", "options"),
    [
        *[("DDIMScheduler", c, {"eta": e}) for c in BOUNDED[:4] for e in (0.3, 1.0)],
        ("DDIMScheduler", {"clip_sample": True}, {"eta": 0.5, "noise": True}),
        ("DDIMScheduler", {"clip_sample": True}, {"use_clipped_model_output": True}),
        ("DDIMScheduler", {"clip_sample": True, "prediction_type": "v_prediction"}, {"use_clipped_model_output": True, "eta": 0.4}),
        ("DPMSolverMultistepScheduler", {"algorithm_type": "sde-dpmsolver++"}, {"noise": True}),
        ("EulerDiscreteScheduler", {}, {"s_churn": 5.0, "s_tmin": 0.5, "s_tmax": 10.0, "s_noise": 1.003}),
        ("EulerDiscreteScheduler", {"prediction_type": "sample"}, {"s_churn": 5.0}),
        ("EulerDiscreteScheduler", {"use_karras_sigmas": True}, {"s_churn": 40.0}),
        *[("DDPMScheduler", {"variance_type": v, "clip_sample": False}, {"doubled": True}) for v in ("learned_range",)],
        ("DPMSolverMultistepScheduler", {"variance_type": "fixed_small"}, {}),
    ],
    ids=case_id,
)
def test_step_options(name: str, config: dict[str, Any], options: dict[str, Any]) -> None:
    reference, scheduler = pair(name, {**LATENT, **config})
    reference.set_timesteps(10)
    scheduler.set_timesteps(10)
    same_run(reference, scheduler, **options)


def test_learned_variance() -> None:
    reference, scheduler = pair("DDPMScheduler", {**LATENT, "variance_type": "learned"})
    output = torch.randn(2, 8, 4, 4, generator=generator(5)).abs()  # the second half is a variance
    x = torch.randn(SHAPE, generator=generator(6))
    for s in (reference, scheduler):
        s.set_timesteps(10)
    samples = [s.step(output, reference.timesteps[4], x, generator=generator()).prev_sample for s in (scheduler, reference)]
    close(*samples)


def test_learned_variance_channels_are_cut_off_for_dpm() -> None:
    reference, scheduler = pair("DPMSolverMultistepScheduler", {"variance_type": "learned_range"})
    output, x = torch.randn(2, 6, 4, 4, generator=generator(5)), torch.randn(2, 3, 4, 4, generator=generator(6))
    for s in (reference, scheduler):
        s.set_timesteps(10)
    close(*(s.step(output, reference.timesteps[0], x).prev_sample for s in (scheduler, reference)))


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision(name: str, dtype: torch.dtype) -> None:
    """Half-precision samples give half-precision samples, as near to the reference's as their rounding."""
    reference, scheduler = pair(name, {**LATENT, **({"skip_prk_steps": True} if name == "PNDMScheduler" else {})})
    drawn = takes_generator(scheduler)
    results = []
    for s in (reference, scheduler):
        s.set_timesteps(6)
        x = (torch.randn(SHAPE, generator=generator(2)) * float(s.init_noise_sigma)).to(dtype)
        output = torch.randn(SHAPE, generator=generator(3)).to(dtype)
        s.scale_model_input(x, s.timesteps[0])
        results.append(s.step(output, s.timesteps[0], x, **({"generator": generator()} if drawn else {})).prev_sample)
    close(results[1], results[0], 0.05)


def test_one_generator_per_sample() -> None:
    """A batch with a list of generators holds what each sample gives alone."""
    scheduler = ours.EulerAncestralDiscreteScheduler(**LATENT)
    scheduler.set_timesteps(4)
    x, output = torch.randn(SHAPE, generator=generator(2)), torch.randn(SHAPE, generator=generator(3))
    t = scheduler.timesteps[0]
    batch = scheduler.fresh().step(output, t, x, generator=[generator(10), generator(11)]).prev_sample
    for i in range(2):
        alone = scheduler.fresh().step(output[i : i + 1], t, x[i : i + 1], generator=generator(10 + i)).prev_sample
        torch.testing.assert_close(batch[i : i + 1], alone, rtol=0, atol=0)
    with pytest.raises(ValueError, match="3 entries for a batch of 2"):
        scheduler.fresh().step(output, t, x, generator=[generator()] * 3)


@pytest.mark.parametrize("name", NAMES)
def test_global_random_state_is_left_alone(name: str) -> None:
    before = torch.get_rng_state()
    scheduler = getattr(ours, name)(**LATENT)
    scheduler.set_timesteps(4)
    options = {"eta": 1.0} if name == "DDIMScheduler" else {}
    scheduler.step(torch.zeros(SHAPE), scheduler.timesteps[0], torch.zeros(SHAPE), **options)
    assert torch.equal(before, torch.get_rng_state())


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("spacing", SPACINGS)
@pytest.mark.parametrize("extra", [{}, {"rescale_betas_zero_snr": True}, {"use_karras_sigmas": True}], ids=case_id)
def test_add_noise(name: str, spacing: str, extra: dict[str, Any]) -> None:
    known = inspect.signature(getattr(ours, name)).parameters
    config = {k: v for k, v in {**LATENT, "timestep_spacing": spacing, **extra}.items() if k in known}
    reference, scheduler = pair(name, config)
    x, noise = torch.randn(SHAPE, generator=generator(2)), torch.randn(SHAPE, generator=generator(3))
    for s in (reference, scheduler):
        s.set_timesteps(8)
    for t in (reference.timesteps[[2, 5]], reference.timesteps[3:4]):
        close(scheduler.add_noise(x, noise, t), reference.add_noise(x, noise, t))
    if hasattr(reference, "set_begin_index"):
        for s in (reference, scheduler):
            s.set_begin_index(4)
        close(scheduler.add_noise(x, noise, t), reference.add_noise(x, noise, t))
        for s in (reference, scheduler):
            s.step(noise, s.timesteps[4], x)
        close(scheduler.add_noise(x, noise, t), reference.add_noise(x, noise, t))


@pytest.mark.parametrize("name", ["DDPMScheduler", "DDIMScheduler"])
def test_get_velocity(name: str) -> None:
    reference, scheduler = pair(name, LATENT)
    x, noise = torch.randn(SHAPE, generator=generator(2)), torch.randn(SHAPE, generator=generator(3))
    t = torch.tensor([10, 800])
    close(scheduler.get_velocity(x, noise, t), reference.get_velocity(x, noise, t))


@pytest.mark.parametrize("name", NAMES)
def test_training_targets_need_no_run(name: str) -> None:
    """Noise and velocity at training steps, by definition: alpha * x + sigma * noise (times 1 / alpha in exploding form)."""
    scheduler = getattr(ours, name)(**LATENT)
    x, noise = torch.randn(SHAPE, generator=generator(2)), torch.randn(SHAPE, generator=generator(3))
    alpha_bar = (1 - torch.linspace(0.00085**0.5, 0.012**0.5, 1000, dtype=torch.float64) ** 2).cumprod(0)
    for t in (3, 500, 999):
        alpha, sigma = alpha_bar[t].sqrt().item(), (1 - alpha_bar[t]).sqrt().item()
        exploding = alpha if isinstance(scheduler, ExplodingScheduler) else 1.0
        steps = torch.tensor([t], dtype=scheduler.timesteps.dtype)
        close(scheduler.add_noise(x, noise, steps) * exploding, alpha * x + sigma * noise, 1e-4)
        close(scheduler.get_velocity(x, noise, steps), alpha * noise - sigma * x, 1e-4)


@pytest.mark.parametrize("name", NAMES)
def test_interleaved_copies_are_independent(name: str) -> None:
    scheduler = getattr(ours, name)(**LATENT)
    scheduler.set_timesteps(12)
    model = network(4, 4)
    drawn = "generator" in inspect.signature(scheduler.step).parameters

    def run(seeds: list[int]) -> list[torch.Tensor]:
        copies = [scheduler.fresh() for _ in seeds]
        noises = [{"generator": generator(s)} if drawn else {} for s in seeds]
        samples = [torch.randn(SHAPE, generator=generator(s)) for s in seeds]
        for t in scheduler.timesteps:
            for i, copy in enumerate(copies):
                output = model(copy.scale_model_input(samples[i], t), t)
                samples[i] = copy.step(output, t, samples[i], **noises[i]).prev_sample
        return samples

    together = run([1, 2])
    for seed, sample in zip([1, 2], together, strict=True):
        torch.testing.assert_close(sample, run([seed])[0], rtol=0, atol=0)
    assert scheduler.step_index is None


def public(config: Any, keys: Any = None) -> dict[str, Any]:
    return {k: v for k, v in dict(config).items() if not k.startswith("_") and (keys is None or k in keys)}


@pytest.mark.parametrize("first", NAMES)
@pytest.mark.parametrize("second", NAMES)
def test_configurations_cross_classes(first: str, second: str) -> None:
    converted = []
    for library in (diffusers, ours):
        one = getattr(library, first).from_config(SD15)
        other = getattr(library, second).from_config(one.config)
        back = getattr(library, first).from_config(other.config)
        # The keys that the classes know; what else a configuration carries along has no effect on them.
        converted.append([public(s.config, inspect.signature(type(s).__init__).parameters) for s in (one, other, back)])
        assert other.config["clip_sample"] is False and other.config["skip_prk_steps"] is True  # kept for the way back
    assert converted[1] == converted[0]


def test_defaults_do_not_travel_through_a_third_class() -> None:
    results = []
    for library in (diffusers, ours):
        euler = library.EulerDiscreteScheduler.from_config(library.DDIMScheduler(**LATENT).config)
        results.append(library.PNDMScheduler.from_config(euler.config).config["set_alpha_to_one"])
    assert results[1] == results[0]


@pytest.mark.parametrize("name", NAMES)
def test_files_are_exchanged_with_the_reference(name: str, tmp_path: Any) -> None:
    config = {**LATENT, "prediction_type": "v_prediction", "use_karras_sigmas": True, "clip_sample": False}
    reference, scheduler = pair(name, {k: v for k, v in config.items() if k in inspect.signature(getattr(ours, name)).parameters})
    scheduler.save_pretrained(tmp_path / "ours" / "scheduler")
    reference.save_pretrained(tmp_path / "theirs" / "scheduler")
    for folder in ("ours", "theirs"):
        loaded = getattr(ours, name).from_pretrained(tmp_path / folder, subfolder="scheduler")
        read = getattr(diffusers, name).from_pretrained(tmp_path / folder, subfolder="scheduler")
        assert public(loaded.config) == public(scheduler.config) == public(read.config)
    changed = getattr(ours, name).from_pretrained(tmp_path / "theirs" / "scheduler", beta_end=0.03)
    assert changed.config.beta_end == 0.03
    with pytest.raises(ValueError, match=r"beta_ends.*did you mean 'beta_end'"):
        getattr(ours, name).from_pretrained(tmp_path / "theirs", subfolder="scheduler", beta_ends=0.03)


def test_foreign_keys_are_kept_but_not_obeyed() -> None:
    """Clipping that a DDIM configuration asks for does not reach DPM-Solver, which has no such key."""
    theirs, clipped = pair("DDIMScheduler", {**LATENT, "clip_sample": True, "clip_sample_range": 0.1, "set_alpha_to_one": False})
    for name in ("DPMSolverMultistepScheduler", "EulerDiscreteScheduler", "DDPMScheduler"):
        reference, converted = getattr(diffusers, name).from_config(theirs.config), getattr(ours, name).from_config(clipped.config)
        for s in (converted, reference):
            s.set_timesteps(5)
        same_run(reference, converted)


SETTING_ERRORS: list[tuple[str, dict[str, Any], dict[str, Any]]] = [
    *[(n, {}, {"num_inference_steps": 0}) for n in NAMES],
    *[(n, {}, {}) for n in NAMES],
    *[(n, {"timestep_spacing": "trailling"}, {"num_inference_steps": 5}) for n in NAMES],
    *[(n, {"beta_schedule": "quadratic"}, {"num_inference_steps": 5}) for n in NAMES],
    *[(n, {}, {"num_inference_steps": 1001}) for n in ("DDPMScheduler", "DDIMScheduler")],
    ("PNDMScheduler", {"skip_prk_steps": False}, {"num_inference_steps": 3}),
    ("DDPMScheduler", {}, {"timesteps": [100, 500]}),
    ("DDPMScheduler", {}, {"timesteps": [1000, 500]}),
    ("DDPMScheduler", {}, {"timesteps": [900], "num_inference_steps": 1}),
    ("EulerDiscreteScheduler", {}, {"timesteps": [900], "num_inference_steps": 1}),
    ("EulerDiscreteScheduler", {}, {"timesteps": [900], "sigmas": [1.0, 0.0]}),
    ("EulerDiscreteScheduler", {"use_karras_sigmas": True}, {"timesteps": [900]}),
    ("EulerDiscreteScheduler", {"timestep_type": "continuous", "prediction_type": "v_prediction"}, {"timesteps": [900]}),
    ("EulerDiscreteScheduler", {"use_karras_sigmas": True, "use_beta_sigmas": True}, {"num_inference_steps": 5}),
    ("EulerDiscreteScheduler", {"interpolation_type": "cubic"}, {"num_inference_steps": 5}),
    ("EulerDiscreteScheduler", {"final_sigmas_type": "one"}, {"num_inference_steps": 5}),
    ("DPMSolverMultistepScheduler", {}, {"timesteps": [900], "num_inference_steps": 1}),
    ("DPMSolverMultistepScheduler", {"use_exponential_sigmas": True}, {"timesteps": [900]}),
    ("DPMSolverMultistepScheduler", {"use_flow_sigmas": True, "prediction_type": "flow_prediction"}, {"timesteps": [900]}),
    ("DPMSolverMultistepScheduler", {}, {"num_inference_steps": 5, "mu": 0.5}),
    ("DPMSolverMultistepScheduler", {"use_karras_sigmas": True, "use_exponential_sigmas": True}, {"num_inference_steps": 5}),
    ("DPMSolverMultistepScheduler", {"algorithm_type": "dpmsolver"}, {"num_inference_steps": 5}),
    ("DPMSolverMultistepScheduler", {"algorithm_type": "euler"}, {"num_inference_steps": 5}),
    ("DPMSolverMultistepScheduler", {"solver_type": "third"}, {"num_inference_steps": 5}),
    ("DPMSolverMultistepScheduler", {"final_sigmas_type": "one"}, {"num_inference_steps": 5}),
]


@pytest.mark.parametrize(("name", "config", "setting"), SETTING_ERRORS, ids=case_id)
def test_wrong_settings_raise_as_in_the_reference(name: str, config: dict[str, Any], setting: dict[str, Any]) -> None:
    def attempt(library: Any) -> None:
        scheduler = getattr(library, name)(**config)
        scheduler.set_timesteps(**setting)

    with pytest.raises((ValueError, TypeError)) as raised:
        attempt(ours)
    value = next((str(v) for v in [*config.values()] if isinstance(v, str) and v in str(raised.value)), None)
    assert value is not None or any(key in str(raised.value) for key in [*config, *setting, "num_inference_steps"])
    if setting.get("num_inference_steps") != 0 or name in ("DDPMScheduler", "DDIMScheduler", "PNDMScheduler"):  # the others take 0
        with pytest.raises(Exception):  # noqa: B017
            attempt(diffusers)


def step_error(name: str, config: dict[str, Any], options: dict[str, Any]) -> None:
    for library, kind in ((ours, (ValueError, TypeError)), (diffusers, Exception)):
        scheduler = getattr(library, name)(**config)
        if not options.get("unset"):
            scheduler.set_timesteps(5)
        output = torch.zeros(2, options.get("channels", 4), 4, 4)
        t = 0 if scheduler.timesteps is None else scheduler.timesteps[0]
        given = {k: v for k, v in options.items() if k in ("eta", "generator", "variance_noise")}
        with pytest.raises(kind):
            scheduler.step(output, options.get("t", t), torch.zeros(SHAPE), **given)


@pytest.mark.parametrize(
    ("name", "config", "options"),
    [
        *[(n, {}, {"unset": True}) for n in ("DDIMScheduler", "PNDMScheduler", "DPMSolverMultistepScheduler")],
        *[(n, {}, {"t": 1}) for n in ("EulerDiscreteScheduler", "EulerAncestralDiscreteScheduler")],
        *[(n, {}, {"t": 123.25}) for n in ("DDPMScheduler", "DDIMScheduler", "PNDMScheduler", "EulerDiscreteScheduler")],
        ("DDPMScheduler", {}, {"t": 123}),
        ("DDPMScheduler", {}, {"channels": 8}),
        ("DDPMScheduler", {"variance_type": "learned_range"}, {}),
        ("DDIMScheduler", {}, {"eta": 0.5, "generator": generator(), "variance_noise": torch.zeros(SHAPE)}),
        *[(n, {"prediction_type": "score"}, {}) for n in NAMES],
        ("PNDMScheduler", {"prediction_type": "sample"}, {}),
        ("EulerAncestralDiscreteScheduler", {"prediction_type": "sample"}, {}),
    ],
    ids=case_id,
)
def test_wrong_steps_raise_as_in_the_reference(name: str, config: dict[str, Any], options: dict[str, Any]) -> None:
    if "prediction_type" in config:
        with pytest.raises(ValueError, match=config["prediction_type"]):
            getattr(ours, name)(**config)
        return
    step_error(name, config, options)


def test_a_finished_run_says_so() -> None:
    for name in ("EulerDiscreteScheduler", "DPMSolverMultistepScheduler"):
        scheduler = getattr(ours, name)()
        scheduler.set_timesteps(2)
        for t in scheduler.timesteps:
            scheduler.step(torch.zeros(SHAPE), t, torch.zeros(SHAPE))
        with pytest.raises(ValueError, match="at its end"):
            scheduler.step(torch.zeros(SHAPE), scheduler.timesteps[0], torch.zeros(SHAPE))


def test_outputs_unpack_like_the_reference() -> None:
    for name in NAMES:
        reference, scheduler = pair(name, LATENT)
        lengths = []
        for s in (reference, scheduler):
            s.set_timesteps(5)
            lengths.append(len(s.step(torch.zeros(SHAPE), s.timesteps[0], torch.zeros(SHAPE), return_dict=False)))
        assert lengths[0] == lengths[1]


def test_names_and_signatures_equal_the_reference() -> None:
    assert [(e.name, e.value) for e in ours.KarrasDiffusionSchedulers] == [
        (e.name, e.value) for e in diffusers.schedulers.KarrasDiffusionSchedulers
    ]
    for name in NAMES:
        reference, scheduler = getattr(diffusers, name), getattr(ours, name)
        assert scheduler.order == reference.order and scheduler.config_name == reference.config_name
        for method in ("__init__", "set_timesteps", "step", "add_noise"):
            expected = [(p.name, p.default) for p in inspect.signature(getattr(reference, method)).parameters.values()]
            parameters = inspect.signature(getattr(scheduler, method)).parameters.values()
            got = [(p.name, p.default) for p in parameters if p.kind is not p.KEYWORD_ONLY]  # ours alone are keyword-only
            required = {name for name, default in expected if default is inspect.Parameter.empty}
            assert [(n, inspect.Parameter.empty if n in required and d is None else d) for n, d in got] == expected
        assert {c.__name__ for c in scheduler().compatibles} == {c.__name__ for c in reference().compatibles}


@pytest.mark.parametrize("name", [n for n in ours.__all__ if n.endswith("Scheduler") and n != "Scheduler"])
def test_every_argument_has_a_type_and_a_meaning(name: str) -> None:
    for method in (getattr(ours, name).step, getattr(ours, name).set_timesteps):
        taken = list(inspect.signature(method).parameters.values())[1:]
        assert all(p.annotation is not p.empty for p in taken) and method.__doc__
        if "Args:" in method.__doc__:
            assert all(f"\n    {p.name}: " in method.__doc__ for p in taken)


def test_calls_are_checked_by_python_itself() -> None:
    scheduler, x = ours.EulerDiscreteScheduler(), torch.zeros(SHAPE)
    with pytest.raises(TypeError, match=r"set_timesteps\(\) got an unexpected keyword argument 'steps'"):
        scheduler.set_timesteps(steps=4)
    scheduler.set_timesteps(4)
    t = scheduler.timesteps[0]
    with pytest.raises(TypeError, match=r"step\(\) missing 1 required positional argument: 'sample'"):
        scheduler.step(x, t)
    with pytest.raises(TypeError, match="multiple values for argument 'timestep'"):
        scheduler.step(x, t, x, timestep=t)
    with pytest.raises(TypeError, match="unexpected keyword argument 'eta'"):
        scheduler.step(x, t, x, eta=0.0)
