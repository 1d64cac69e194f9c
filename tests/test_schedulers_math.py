"""Schedulers against mathematics: order of convergence where the answer is known, and noise that only generators make."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
import torchsde
from diffusers.utils.torch_utils import randn_tensor

import sfumato.schedulers as schedulers
from sfumato.random import BrownianNoise, randn

SPREAD = 0.7
"""Standard deviation of the data. For normal data the perfect network and the exact path of every sample are known."""


def perfect_noise(x: torch.Tensor, alpha: float, sigma: float) -> torch.Tensor:
    """Expectation of the noise in ``x = alpha * data + sigma * noise``."""
    return x * sigma / (alpha**2 * SPREAD**2 + sigma**2)


def spread_at(alpha: float, sigma: float) -> float:
    """Standard deviation of ``x``: along the probability flow, samples grow and shrink with it."""
    return math.sqrt(alpha**2 * SPREAD**2 + sigma**2)


def error_on_sigmas(scheduler: Any, exploding: bool) -> float:
    """Relative error at the end of a run of a scheduler with noise levels, in float64."""

    def level(sigma: float) -> tuple[float, float]:
        scale = 1.0 if exploding else 1 / math.sqrt(1 + sigma**2)
        return scale, sigma * scale

    levels = [level(s) for s in scheduler.sigmas.tolist()]
    x = torch.full((1, 1, 1, 1), spread_at(*levels[0]), dtype=torch.float64)
    for t, (alpha, sigma) in zip(scheduler.timesteps, levels, strict=False):
        x = scheduler.step(perfect_noise(x, alpha, sigma), t, x).prev_sample
    return abs(x.item() / spread_at(*levels[-1]) - 1)


def error_on_steps(scheduler: Any, last: float) -> float:
    """Relative error at the end of a run of a scheduler on training steps."""
    alpha_bar = scheduler.alphas_cumprod.double().tolist()
    level = [(math.sqrt(a), math.sqrt(1 - a)) for a in alpha_bar]
    times = scheduler.timesteps.tolist()
    x = torch.full((1, 1, 1, 1), spread_at(*level[times[0]]), dtype=torch.float64)
    for t in times:
        x = scheduler.step(perfect_noise(x, *level[t]), t, x).prev_sample
    return abs(x.item() / spread_at(math.sqrt(last), math.sqrt(1 - last)) - 1)


def observed_order(errors: list[float]) -> float:
    return math.log2(errors[0] / errors[1])


@pytest.mark.parametrize("algorithm", ["dpmsolver", "dpmsolver++"])
@pytest.mark.parametrize(("order", "kind"), [(1, "midpoint"), (2, "midpoint"), (2, "heun"), (3, "midpoint")])
def test_order_of_dpm_solver(algorithm: str, order: int, kind: str) -> None:
    errors = []
    for steps in (40, 80):
        scheduler = schedulers.DPMSolverMultistepScheduler(
            algorithm_type=algorithm,
            solver_order=order,
            solver_type=kind,
            use_exponential_sigmas=True,
            final_sigmas_type="sigma_min",
        )
        scheduler.set_timesteps(steps)
        errors.append(error_on_sigmas(scheduler, exploding=False))
    # The first step has one output only, which bounds the order of the whole run by 2.
    assert min(order, 2) - 0.4 < observed_order(errors) < order + 0.6


def test_order_of_euler() -> None:
    errors = []
    for steps in (100, 200):
        scheduler = schedulers.EulerDiscreteScheduler()
        scheduler.set_timesteps(sigmas=torch.logspace(1, -2, steps, dtype=torch.float64).tolist())
        errors.append(error_on_sigmas(scheduler, exploding=True))
    assert 0.8 < observed_order(errors) < 1.2


def test_order_on_training_steps() -> None:
    """DDIM is of first order; PNDM's multistep beats it, though steps even in time hide its order near the clean end."""
    errors = []
    for steps in (50, 100):
        ddim = schedulers.DDIMScheduler(set_alpha_to_one=False, clip_sample=False)
        pndm = [schedulers.PNDMScheduler(skip_prk_steps=skip) for skip in (True, False)]
        for scheduler in (ddim, *pndm):
            scheduler.set_timesteps(steps)
        errors.append(error_on_steps(ddim, ddim.alphas_cumprod[0].item()))
        assert all(error_on_steps(s, s.alphas_cumprod[0].item()) < errors[-1] / 5 for s in pndm)
    assert 0.8 < observed_order(errors) < 1.2


@pytest.mark.parametrize("name", ["DDPMScheduler", "EulerAncestralDiscreteScheduler"])
def test_ancestral_sampling_keeps_the_distribution(name: str) -> None:
    """With the perfect network, stochastic sampling ends with the spread of the data."""
    scheduler = getattr(schedulers, name)(**({"clip_sample": False} if name == "DDPMScheduler" else {}))
    scheduler.set_timesteps(250)
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(40000, 1, 1, 1, generator=generator) * scheduler.init_noise_sigma
    for i, t in enumerate(scheduler.timesteps):
        if name == "DDPMScheduler":
            alpha_bar = scheduler.alphas_cumprod[int(t)].item()
            noise = perfect_noise(x, math.sqrt(alpha_bar), math.sqrt(1 - alpha_bar))
        else:
            noise = perfect_noise(x, 1.0, scheduler.sigmas[i].item())
        x = scheduler.step(noise, t, x, generator=generator).prev_sample
    assert x.std().item() == pytest.approx(SPREAD, rel=0.03)


# Brownian noise is drawn on the device itself, which must be a real one.
@pytest.mark.parametrize("name", [e.name for e in schedulers.KarrasDiffusionSchedulers if e.name != "DPMSolverSDEScheduler"])
def test_steps_do_not_wait_for_the_device(name: str) -> None:
    """Tensors without data raise when their value is asked for, as a step that waits for an accelerator would."""
    scheduler = getattr(schedulers, name)()
    scheduler.set_timesteps(6, device="meta")
    scheduler.set_begin_index(0)
    x = torch.empty(1, 4, 8, 8, device="meta")
    for i, t in enumerate(scheduler.timesteps):
        if isinstance(scheduler, schedulers.base.StepScheduler):
            assert scheduler._training_step(t) == scheduler._times[i]
        output = scheduler.scale_model_input(x, t)
        x = scheduler.step(output, t, x).prev_sample
    assert x.shape == (1, 4, 8, 8) and scheduler.timesteps.device.type == "meta"


def test_noise_equals_the_reference() -> None:
    def seeded(seed: int) -> torch.Generator:
        return torch.Generator().manual_seed(seed)

    shape = (2, 3, 4)
    for make in (lambda: seeded(1), lambda: [seeded(1), seeded(2)], lambda: [seeded(1)]):
        for dtype in (torch.float32, torch.float64, torch.bfloat16):
            expected = randn_tensor(shape, generator=make(), dtype=dtype)
            torch.testing.assert_close(randn(shape, generator=make(), dtype=dtype), expected, rtol=0, atol=0)


def test_noise_without_generator_is_fresh_and_private() -> None:
    before = torch.get_rng_state()
    first, second = randn((2, 8)), randn((2, 8))
    assert torch.equal(before, torch.get_rng_state()) and not torch.equal(first, second)


def test_noise_needs_a_generator_per_sample() -> None:
    with pytest.raises(ValueError, match="3 entries for a batch of 2"):
        randn((2, 4), generator=[torch.Generator()] * 3)


def test_brownian_motion_is_torchsdes() -> None:
    """The same path for the same seed, at any order and size of the steps, with a bounded memory."""
    low, high, like = 0.03, 14.6, torch.zeros(2, 3)
    options = dict(dtype=like.dtype, device="cpu", tol=1e-6, pool_size=24, halfway_tree=True)
    path = torchsde.BrownianInterval(low, high, size=(2, 3), entropy=2**62 + 1, **options)
    ours = BrownianNoise(like, low, high, seed=2**62 + 1)
    places = torch.rand(60, 2, generator=torch.Generator().manual_seed(0), dtype=torch.float64).sort(1).values * (high - low) + low
    for start, end in [*places.tolist(), (low, high), (low, low + 1e-5), (7.0, 7.0 + 1e-5)]:
        expected = path(start, end) / math.sqrt(end - start)
        torch.testing.assert_close(ours(start, end), expected, rtol=0, atol=1e-5)
        torch.testing.assert_close(ours(end, start), -expected, rtol=0, atol=1e-5)
    assert not ours(3.0, 3.0).any()


def test_brownian_motion_per_sample() -> None:
    noise = BrownianNoise(torch.zeros(2, 3), 0.1, 9.0, seed=[5, 6])(0.5, 2.0)
    for i, seed in enumerate((5, 6)):
        assert torch.equal(noise[i : i + 1], BrownianNoise(torch.zeros(1, 3), 0.1, 9.0, seed=seed)(0.5, 2.0))
    with pytest.raises(ValueError, match="3 entries for a batch of 2"):
        BrownianNoise(torch.zeros(2, 3), 0.1, 9.0, seed=[1, 2, 3])
