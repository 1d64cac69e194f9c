"""Larger pictures in tiles, and pictures continued beyond their edges."""

from __future__ import annotations

from collections.abc import Callable
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import tiny
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image
from test_pipelines import CALLS

import sfumato
from sfumato.pipelines.upscale import _ramp, _starts

Checkpoint = Callable[[str], tuple[Path, Any]]
FAMILIES = (
    "StableDiffusionImg2ImgPipeline",
    "StableDiffusionXLImg2ImgPipeline",
    "StableDiffusion3Img2ImgPipeline",
    "FluxImg2ImgPipeline",
)


def load(checkpoint: Checkpoint, name: str) -> Any:
    pipe = getattr(sfumato, name).from_pretrained(checkpoint(name)[0])
    pipe.set_progress_bar_config(disable=True)
    return pipe


@settings(max_examples=50, deadline=None)
@given(length=st.integers(1, 3000), tile=st.integers(2, 40), share=st.floats(0.02, 0.5))
def test_tiles_cover_everything_and_overlap(length: int, tile: int, share: float) -> None:
    tile *= 16
    overlap = max(int(tile * share), 1)
    starts = _starts(length, tile, overlap)
    assert starts[0] == 0 and starts == sorted(set(starts))
    assert starts[-1] + tile >= length and (length <= tile or starts[-1] + tile == length)
    assert all(b - a <= tile - overlap for a, b in pairwise(starts))
    assert _ramp(tile, overlap).min() > 0


@pytest.mark.parametrize("name", FAMILIES)
def test_any_family_enlarges_by_any_factor(checkpoint: Checkpoint, name: str) -> None:
    pipe, image = load(checkpoint, name), tiny.picture(size=(40, 32))
    call = {"num_inference_steps": 4, "strength": 0.5}
    if "Flux" in name:
        call["max_sequence_length"] = 16

    def run(**more: Any) -> Image.Image:
        generator = torch.Generator().manual_seed(1)
        return sfumato.upscale_by_tiles(
            pipe, image, "a red cat", factor=1.6, tile=32, overlap=16, generator=generator, **call, **more
        )

    large = run()
    assert large.size == (64, 51)
    assert np.array_equal(np.asarray(large), np.asarray(run()))


def test_tiles_of_a_perfect_painter_are_the_resized_picture() -> None:
    """With a pipeline that answers what it is given, blending the tiles gives the picture back."""

    class Echo:
        task = sfumato.StableDiffusionImg2ImgPipeline.task
        size_multiple = 8
        _progress = {"disable": True}

        def __call__(self, image: Image.Image, width: int, height: int, **more: Any) -> Any:
            resized = image.resize((width, height), Image.Resampling.LANCZOS)
            return sfumato.ImagePipelineOutput(np.asarray(resized, np.float32)[None] / 255)

    image = tiny.picture(size=(96, 80))
    echo: Any = Echo()
    got = sfumato.upscale_by_tiles(echo, image, factor=2.0, tile=64, overlap=16)
    expected = image.resize((192, 160), Image.Resampling.LANCZOS)
    assert np.abs(np.asarray(got, np.int16) - np.asarray(expected, np.int16)).max() <= 1


def test_what_cannot_work_is_refused(checkpoint: Checkpoint) -> None:
    pipe, image = load(checkpoint, FAMILIES[0]), tiny.picture()
    with pytest.raises(TypeError, match=r"does text-to-image: pass AutoPipelineForImage2Image.from_pipe"):
        sfumato.upscale_by_tiles(sfumato.StableDiffusionPipeline.from_pipe(pipe), image)
    with pytest.raises(ValueError, match="tile=30 must be a positive multiple of 8"):
        sfumato.upscale_by_tiles(pipe, image, tile=30)
    with pytest.raises(ValueError, match="at most half of tile=32"):
        sfumato.upscale_by_tiles(pipe, image, tile=32, overlap=24)


def test_outpainting_keeps_the_picture(checkpoint: Checkpoint) -> None:
    image = tiny.picture(size=(32, 32))
    canvas, mask = sfumato.outpaint(image, left=16, bottom=8, overlap=4)
    assert canvas.size == mask.size == (48, 40)
    assert np.array_equal(np.asarray(canvas)[:32, 16:], np.asarray(image))
    painted = np.asarray(mask) == 255
    assert painted[:, :20].all() and painted[28:].all() and not painted[:28, 20:].any()
    with pytest.raises(ValueError, match="add pixels at one edge"):
        sfumato.outpaint(image)
    pipe = load(checkpoint, "StableDiffusionInpaintPipeline")
    call = {**CALLS["StableDiffusionInpaintPipeline"], "image": canvas, "mask_image": mask, "height": 40, "width": 48}
    assert pipe(**call).images.shape == (1, 40, 48, 3)
