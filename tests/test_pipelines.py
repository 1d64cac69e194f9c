"""Pipelines against the reference: the same folder, the same seed, the same picture."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import diffusers
import numpy as np
import pytest
import tiny
import torch

import sfumato

SCHEDULERS = (
    "DDPMScheduler",
    "DDIMScheduler",
    "PNDMScheduler",
    "EulerDiscreteScheduler",
    "EulerAncestralDiscreteScheduler",
    "DPMSolverMultistepScheduler",
)
TEXT = dict(prompt="a red cat", negative_prompt="blue", num_inference_steps=4, output_type="np")
SMALL = torch.rand(1, 3, 16, 16, generator=torch.Generator().manual_seed(5)) * 2 - 1
CALLS: dict[str, dict[str, Any]] = {
    "StableDiffusionPipeline": TEXT,
    "StableDiffusionImg2ImgPipeline": {**TEXT, "image": tiny.picture(), "strength": 0.75},
    "StableDiffusionInpaintPipeline": {**TEXT, "image": tiny.picture(), "mask_image": tiny.mask(), "strength": 0.75},
    "inpaint9": {**TEXT, "image": tiny.picture(), "mask_image": tiny.mask()},
    "StableDiffusionDepth2ImgPipeline": {**TEXT, "image": tiny.picture(), "strength": 0.75},
    "StableDiffusionUpscalePipeline": {**TEXT, "image": tiny.picture(size=(16, 16)), "noise_level": 30},
    "StableDiffusionLatentUpscalePipeline": {**TEXT, "image": tiny.picture()},
    "StableDiffusionInstructPix2PixPipeline": {**TEXT, "image": tiny.picture()},
    "StableDiffusionImageVariationPipeline": {"image": tiny.picture(), "num_inference_steps": 4, "output_type": "np"},
    "DDPMPipeline": {"num_inference_steps": 4, "output_type": "np", "batch_size": 2},
    "DDIMPipeline": {"num_inference_steps": 4, "output_type": "np", "batch_size": 2, "eta": 0.5},
    "LDMSuperResolutionPipeline": {"image": SMALL, "num_inference_steps": 4, "output_type": "np", "eta": 0.3},
}
Checkpoint = Callable[[str], tuple[Path, Any]]


def ours(folder: Path, reference: Any) -> Any:
    """Loads a folder that the reference wrote, under the reference's class name."""
    pipe = getattr(sfumato, type(reference).__name__).from_pretrained(folder)
    pipe.set_progress_bar_config(disable=True)
    return pipe


def seeded(seed: int | list[int]) -> Any:
    if isinstance(seed, list):
        return [torch.Generator().manual_seed(s) for s in seed]
    return torch.Generator().manual_seed(seed)


def assert_same(reference: Any, pipe: Any, seed: int | list[int] = 3, tolerance: float = 1e-4, **call: Any) -> np.ndarray:
    """Runs both with the same seed and compares the pictures."""
    with torch.no_grad():
        expected = reference(**call, generator=seeded(seed)).images
    got = pipe(**call, generator=seeded(seed)).images
    expected, got = (np.asarray(x) for x in (expected, got))
    assert expected.shape == got.shape
    assert np.isfinite(expected).all()
    assert np.abs(expected - got).max() <= tolerance
    assert got.std() > 1e-3
    return got


def with_scheduler(library: Any, pipe: Any, name: str) -> Any:
    """The same components with another scheduler."""
    parts = {**pipe.components, "scheduler": getattr(library, name).from_config(pipe.scheduler.config)}
    made = type(pipe)(**parts)
    made.set_progress_bar_config(disable=True)
    return made


@pytest.mark.parametrize("scheduler", SCHEDULERS)
@pytest.mark.parametrize("name", CALLS)
def test_same_picture_with_every_scheduler(checkpoint: Checkpoint, name: str, scheduler: str) -> None:
    if name in ("DDIMPipeline",) and scheduler != "DDIMScheduler":
        pytest.skip("the pipeline makes every scheduler a DDIM scheduler")
    if name == "StableDiffusionLatentUpscalePipeline" and not scheduler.startswith("EulerDiscrete"):
        pytest.skip("the reference's latent upscaler works with EulerDiscreteScheduler alone")
    folder, reference = checkpoint(name)
    pipe = ours(folder, reference)
    assert_same(with_scheduler(diffusers, reference, scheduler), with_scheduler(sfumato, pipe, scheduler), **CALLS[name])


TEXT_PIPELINES = [n for n in CALLS if "prompt" in CALLS[n]]


@pytest.mark.parametrize("seed", [7, [1, 2, 3, 4]], ids=["one generator", "a generator per picture"])
@pytest.mark.parametrize("name", TEXT_PIPELINES)
def test_same_pictures_in_batches(checkpoint: Checkpoint, name: str, seed: int | list[int]) -> None:
    folder, reference = checkpoint(name)
    call = {**CALLS[name], "prompt": ["a red cat", "blue apple"], "negative_prompt": ["blue", "cat"]}
    if name in ("StableDiffusionUpscalePipeline", "StableDiffusionLatentUpscalePipeline", "StableDiffusionInstructPix2PixPipeline"):
        pictures = [call["image"]] * (4 if isinstance(seed, list) else 2)
        call["image"] = pictures[:2]
    if name == "StableDiffusionLatentUpscalePipeline":
        seed = seed[:2] if isinstance(seed, list) else seed
    else:
        call["num_images_per_prompt"] = 2
    assert_same(reference, ours(folder, reference), seed, **call)
