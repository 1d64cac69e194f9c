"""The run: stepping, cancelling, sharing a forward, threads; and that a call changes nothing."""

from __future__ import annotations

import copy
import threading
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import tiny
import torch

import sfumato

Checkpoint = Callable[[str], tuple[Path, Any]]
CALL = dict(num_inference_steps=4, output_type="np")


@pytest.fixture(scope="module")
def pipe(checkpoint: Checkpoint) -> Any:
    folder, _ = checkpoint("StableDiffusionPipeline")
    made = sfumato.StableDiffusionPipeline.from_pretrained(folder)
    made.set_progress_bar_config(disable=True)
    return made


def generator(seed: int) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def snapshot(pipe: Any) -> dict[str, Any]:
    """Everything on a pipeline and its scheduler that a call could have changed."""
    scheduler = {k: copy.deepcopy(v) for k, v in vars(pipe.scheduler).items()}
    weights = {f"{n}.{k}": v.clone() for n, m in pipe.modules().items() for k, v in m.state_dict().items()}
    return {"attributes": dict(vars(pipe)), "scheduler": scheduler, "weights": weights, "config": dict(pipe.config)}


def assert_equal(a: Any, b: Any) -> None:
    assert type(a) is type(b)
    if isinstance(a, dict):
        assert a.keys() == b.keys()
        for key in a:
            assert_equal(a[key], b[key])
    elif isinstance(a, (list, tuple)):
        assert len(a) == len(b)
        for x, y in zip(a, b, strict=True):
            assert_equal(x, y)
    elif isinstance(a, torch.Tensor):
        assert torch.equal(a, b)
    elif isinstance(a, np.ndarray):
        assert np.array_equal(a, b)
    elif isinstance(a, (int, float, str, bool, type(None))):
        assert a == b


@pytest.mark.parametrize(
    "scheduler", ["DDIMScheduler", "PNDMScheduler", "DPMSolverMultistepScheduler", "EulerAncestralDiscreteScheduler"]
)
def test_eight_threads_give_what_eight_calls_give(pipe: Any, scheduler: str) -> None:
    pipe = sfumato.StableDiffusionPipeline.from_pipe(pipe, scheduler=getattr(sfumato, scheduler).from_config(pipe.scheduler.config))
    pipe.set_progress_bar_config(disable=True)
    prompts = ["a red cat", "blue", "cat", "apple", "a", "red", "blue cat", "a blue apple"]

    def one(k: int) -> np.ndarray:
        return pipe(prompts[k], num_inference_steps=4 + k % 3, generator=generator(k), output_type="np").images

    alone = [one(k) for k in range(8)]
    with ThreadPoolExecutor(8) as pool:
        together = list(pool.map(one, range(8)))
    for a, b in zip(alone, together, strict=True):
        assert np.array_equal(a, b)


def test_a_call_changes_nothing(pipe: Any) -> None:
    before = snapshot(pipe)
    state = torch.random.get_rng_state()
    numpy_state = np.random.get_state()[1].copy()
    pipe("a red cat", negative_prompt="blue", **CALL)
    assert_equal(before, snapshot(pipe))
    assert torch.equal(state, torch.random.get_rng_state())
    assert np.array_equal(numpy_state, np.random.get_state()[1])


def test_steps_by_hand_give_the_call(pipe: Any) -> None:
    expected = pipe("a red cat", generator=generator(1), **CALL).images
    run = pipe.start("a red cat", generator=generator(1), **CALL)
    assert run.progress == sfumato.Progress(0, 4)
    while not run.done:
        run.step()
        (preview,) = run.preview()
        assert preview.size == (16, 16)
    assert run.progress.fraction == 1.0
    assert np.array_equal(run.result().images, expected)
    with pytest.raises(RuntimeError, match="all 4 steps"):
        run.step()


def test_runs_at_different_steps_share_a_forward(pipe: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    calls = [
        dict(prompt="a red cat", generator=generator(1), **CALL),
        dict(prompt="blue", generator=generator(2), guidance_scale=1.0, **CALL),
    ]
    expected = [pipe(**{**c, "generator": generator(k + 1)}).images for k, c in enumerate(calls)]
    runs = [pipe.start(**c) for c in calls]
    runs[0].step()  # now one step ahead
    forwards = []
    predict = type(pipe).predict
    monkeypatch.setattr(type(pipe), "predict", lambda self, x, t, *more: forwards.append(t.tolist()) or predict(self, x, t, *more))
    while not runs[0].done:
        requests = [run.requests() for run in runs]
        answers = sfumato.evaluate(pipe, [r for own in requests for r in own])
        for run, answer in zip(runs, answers, strict=True):
            run.advance([answer])
    assert len(forwards) == 3  # one shared pass a step
    assert len(set(forwards[0])) == 2  # at two different times
    assert len(forwards[0]) == 3  # two guidance branches, and one
    for run, picture in zip(runs, expected, strict=True):
        np.testing.assert_allclose(run.result().images, picture, atol=2e-6)


def test_cancel_from_another_thread(pipe: Any) -> None:
    reached = threading.Event()
    proceed = threading.Event()

    def on_step(view: Any, index: int, t: Any, tensors: dict) -> dict:
        if index == 1:
            reached.set()
            proceed.wait(10)
        return tensors

    run = pipe.start("a red cat", callback_on_step_end=on_step, **CALL)
    with ThreadPoolExecutor(1) as pool:
        future = pool.submit(run.result)
        assert reached.wait(30)
        run.cancel()
        proceed.set()
        with pytest.raises(sfumato.RunCancelled, match="after 2 of 4 steps"):
            future.result()
    assert pipe("a red cat", **CALL).images.shape == (1, 32, 32, 3)


def test_interrupt_decodes_what_there_is(pipe: Any) -> None:
    seen = []

    def on_step(view: Any, index: int, t: Any, tensors: dict) -> dict:
        seen.append(index)
        view._interrupt = index == 1
        return tensors

    assert pipe("a red cat", callback_on_step_end=on_step, **CALL).images.shape == (1, 32, 32, 3)
    assert seen == [0, 1]
    with pytest.raises(AttributeError, match="other runs share"):
        pipe("a", callback_on_step_end=lambda view, i, t, tensors: setattr(view, "unet", None), **CALL)


def test_picture_of_a_batch_equals_the_picture_alone(pipe: Any) -> None:
    prompts = ["a red cat", "blue apple"]
    both = pipe(prompts, num_images_per_prompt=2, generator=[generator(s) for s in (1, 2, 3, 4)], **CALL).images
    for k in range(4):
        alone = pipe(prompts[k // 2], generator=generator(k + 1), **CALL).images
        np.testing.assert_allclose(both[k], alone[0], atol=1e-5)


def test_guidance_of_one_costs_one_branch(pipe: Any) -> None:
    run = pipe.start("a", guidance_scale=1.0, **CALL)
    (request,) = run.requests()
    assert len(request.latents) == 1
    run = pipe.start("a", guidance_scale=2.0, **CALL)
    (request,) = run.requests()
    assert len(request.latents) == 2


def test_callback_turns_guidance_off_midway(checkpoint: Checkpoint, pipe: Any) -> None:
    _, reference = checkpoint("StableDiffusionPipeline")

    def off(view: Any, index: int, t: Any, tensors: dict) -> dict:
        if index == 1:
            tensors["prompt_embeds"] = tensors["prompt_embeds"].chunk(2)[-1]
            view._guidance_scale = 0.0
        return tensors

    options = dict(CALL, callback_on_step_end=off, callback_on_step_end_tensor_inputs=["prompt_embeds"])
    expected = reference("a red cat", generator=generator(0), **options).images
    got = pipe("a red cat", generator=generator(0), **options).images
    np.testing.assert_allclose(got, expected, atol=1e-4)


def test_callback_changes_latents(checkpoint: Checkpoint, pipe: Any) -> None:
    _, reference = checkpoint("StableDiffusionPipeline")
    options = dict(CALL, callback_on_step_end=lambda view, i, t, tensors: {"latents": tensors["latents"] * 0.9})
    expected = reference("a red cat", generator=generator(0), **options).images
    np.testing.assert_allclose(pipe("a red cat", generator=generator(0), **options).images, expected, atol=1e-4)


def test_callback_names_are_checked_and_written(checkpoint: Checkpoint, pipe: Any) -> None:
    with pytest.raises(ValueError, match=r"offers latents, prompt_embeds.* returned 'latent'; did you mean 'latents'"):
        pipe("a red cat", callback_on_step_end=lambda view, i, t, tensors: {"latent": None}, **CALL)
    inpaint, seen = sfumato.StableDiffusionInpaintPipeline.from_pipe(pipe), []

    def on_step(view: Any, index: int, t: Any, tensors: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
        seen.append(tensors["mask"])
        return {"mask": torch.full_like(tensors["mask"], float(index))}

    call = {"image": tiny.picture(), "mask_image": tiny.mask(), "callback_on_step_end_tensor_inputs": ["mask"], **CALL}
    inpaint.set_progress_bar_config(disable=True)
    inpaint("a red cat", callback_on_step_end=on_step, **call)
    assert len(seen) > 1
    assert [mask.unique().tolist() for mask in seen[1:]] == [[float(i)] for i in range(len(seen) - 1)]
