"""A step of every scheduler beside the reference's, on a latent of 1x4x64x64 in float32."""

from __future__ import annotations

import importlib
import inspect
import pkgutil
import statistics
import time
import warnings
from collections.abc import Callable, Iterator
from typing import Any

import torch

SHAPE = (1, 4, 64, 64)
STEPS = 50
REQUIRED = {"mask_token_id": 1024, "num_vec_classes": 1025}
COUNTS = {"ConsistencyDecoderScheduler": 2, "CMStochasticIterativeScheduler": 40, "SCMScheduler": 2}


def reference_class(name: str) -> Any:
    """Finds a scheduler of the reference, also those that it does not export."""
    import diffusers
    import diffusers.schedulers as package

    if hasattr(diffusers, name):
        return getattr(diffusers, name)
    for module in pkgutil.walk_packages(package.__path__, package.__name__ + "."):
        loaded = importlib.import_module(module.name)
        if hasattr(loaded, name):
            return getattr(loaded, name)
    raise AttributeError(name)


def stepper(scheduler: Any, name: str) -> Callable[[Any, Any, Any], Any]:
    """Returns what goes one step from ``(output, timestep, sample)``, by each class's own protocol."""
    generator = torch.Generator().manual_seed(0)
    if name == "KarrasVeScheduler":

        def karras(output: Any, t: Any, x: Any) -> Any:
            raised, level = scheduler.add_noise_to_input(x, 10.0, generator=generator)
            return scheduler.step(output, level, 9.0, raised).prev_sample

        return karras
    if name == "ScoreSdeVeScheduler":
        return lambda output, t, x: scheduler.step_pred(output, t, x, generator=generator)[0]
    if name == "ScoreSdeVpScheduler":
        return lambda output, t, x: scheduler.step_pred(output, x, t.view(1), generator=generator)[0]
    options: dict[str, Any] = {}
    if "generator" in inspect.signature(scheduler.step).parameters:
        options["generator"] = generator
    if name == "RePaintScheduler":
        options |= {"original_image": torch.zeros(SHAPE), "mask": torch.ones(SHAPE)}
    if name == "CogVideoXDPMScheduler":
        last: list[Any] = [None, None]  # denoised sample and timestep of the step before

        def cog(output: Any, t: Any, x: Any) -> Any:
            x, x0 = scheduler.step(output, last[0], t, last[1], x, return_dict=False, **options)
            last[:] = x0, t
            return x

        return cog
    scale = getattr(scheduler, "scale_model_input", None)

    def step(output: Any, t: Any, x: Any) -> Any:
        if scale is not None:
            scale(x, t)
        return scheduler.step(output, t, x, return_dict=False, **options)[0]

    return step


def loop(scheduler: Any, name: str) -> tuple[Callable[[], Any], int]:
    """Lays out a trajectory and returns what runs it, and its number of steps."""
    scheduler.set_timesteps(COUNTS.get(name, STEPS))
    if name == "ScoreSdeVeScheduler":
        scheduler.set_sigmas(STEPS)
    x = torch.randn(SHAPE) * float(getattr(scheduler, "init_noise_sigma", 1.0))
    output = torch.randn(SHAPE)
    if name == "VQDiffusionScheduler":
        x, output = torch.full((1, 1024), 1024), torch.randn(1, 1024, 1024).log_softmax(1)
    if name == "AmusedScheduler":
        x, output = torch.full((1, 256), 1024), torch.randn(1, 256, 1024)
    step, times = stepper(scheduler, name), list(scheduler.timesteps)
    times = times[:-1] if name in ("SCMScheduler", "DDPMWuerstchenScheduler") else times[:200]
    if name == "DDPMWuerstchenScheduler":
        times = [t.view(1) for t in times]

    def run() -> None:
        sample = x
        for t in times:
            sample = step(output, t, sample)

    return run, len(times)


def microseconds(scheduler: Any, name: str) -> float:
    """Processor time of one step, over a whole trajectory, or several in a row where the class has so few steps."""
    spent, steps = 0.0, 0
    while steps < STEPS * 4 // 5:
        run, count = loop(scheduler, name)
        start = time.process_time()
        run()
        spent, steps = spent + time.process_time() - start, steps + count
    return spent / steps * 1e6


def draws(scheduler: Any, name: str) -> float:
    """Counts how often a step draws normal noise."""
    run, count = loop(scheduler, name)
    drawing, calls = {"randn": torch, "normal_": torch.Tensor}, []

    def counted(original: Callable[..., torch.Tensor]) -> Callable[..., torch.Tensor]:
        return lambda *args, **options: (calls.append(args), original(*args, **options))[1]

    originals = {word: getattr(place, word) for word, place in drawing.items()}
    try:
        for word, place in drawing.items():
            setattr(place, word, counted(originals[word]))
        run()
    finally:
        for word, place in drawing.items():
            setattr(place, word, originals[word])
    return len(calls) / count


def draw() -> float:
    """Processor time of drawing the noise of one step."""
    generator = torch.Generator().manual_seed(0)
    start = time.process_time()
    for _ in range(STEPS):
        torch.randn(SHAPE, generator=generator)
    return (time.process_time() - start) / STEPS * 1e6


def case_schedulers(runs: int) -> Iterator[tuple[str, str, float, float, float]]:
    """One step of every scheduler, over trajectories of 50 steps on a latent of 1x4x64x64.

    The floor is the share of the reference's step that `torch.randn` alone takes, as often as our step draws noise.
    """
    import diffusers

    import sfumato
    from sfumato import registry

    diffusers.utils.logging.set_verbosity_error()
    warnings.simplefilter("ignore")
    names = [n for n, module in registry.PUBLIC.items() if n.endswith("Scheduler") and n != "Scheduler"]
    for name in names:
        ours, theirs = getattr(sfumato, name), reference_class(name)
        config = {k: v for k, v in REQUIRED.items() if k in inspect.signature(ours).parameters}
        pair, found = (theirs(**config), ours(**config)), []
        for _ in range(runs + 1):
            found.append([*(microseconds(scheduler, name) for scheduler in pair), draw()])
        first, second, noise = (statistics.median(times) for times in zip(*found[1:], strict=True))
        yield name, "us", first, second, noise * draws(pair[1], name) / first
