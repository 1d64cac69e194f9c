"""The model that ships inside the package."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import diffusers
import numpy as np
import pytest
import torch
from PIL import Image

import sfumato
from sfumato.hub import EMBEDDED_MODEL
from sfumato.media.image import read_recipe

OFFLINE = """
import socket
def refuse(*args, **kwargs):
    raise OSError("the test forbids the network")
socket.socket.connect = refuse
from sfumato.cli.main import app
app(["generate", "red apple, noto style", "--seed", "0", "--steps", "10", "--out", OUT])
"""


def test_it_is_small() -> None:
    assert sum(p.stat().st_size for p in EMBEDDED_MODEL.rglob("*") if p.is_file()) < 30e6


def test_generate_makes_a_picture_offline(tmp_path: Path) -> None:
    out = tmp_path / "apple.png"
    done = subprocess.run([sys.executable, "-c", f"OUT = {str(out)!r}\n{OFFLINE}"], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    recipe = read_recipe(out)
    assert recipe is not None and recipe["seed"] == 0 and recipe["scheduler"] == "DDIMScheduler"
    picture = np.asarray(Image.open(out), dtype=np.float32)
    assert picture.shape == (64, 64, 3)
    red, green, blue = picture[24:48, 20:44].mean(axis=(0, 1))
    assert red > 1.5 * green and red > 1.5 * blue
    assert picture[:4].mean() > 200  # on white


@pytest.mark.parametrize("prompt", ["blue heart, 3d style", "cat face, flat style"])
def test_the_reference_makes_the_same_picture(prompt: str) -> None:
    call = {"num_inference_steps": 4, "guidance_scale": 4.0, "output_type": "np"}
    pictures = []
    for library in (diffusers, sfumato):
        pipe = library.StableDiffusionPipeline.from_pretrained(EMBEDDED_MODEL, torch_dtype=torch.float32)
        pipe.set_progress_bar_config(disable=True)
        pictures.append(pipe(prompt, generator=torch.Generator().manual_seed(0), **call).images)
    np.testing.assert_allclose(pictures[1], pictures[0], atol=1e-4)
