"""Snippets as users have them: with ``import sfumato as diffusers`` they need nothing else, and give the same picture."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import tiny
from PIL import Image

SNIPPETS = {
    "text-to-image": (
        "StableDiffusionPipeline",
        """
import torch
import diffusers

pipe = diffusers.StableDiffusionPipeline.from_pretrained(FOLDER, torch_dtype=torch.float32, safety_checker=None)
pipe = pipe.to("cpu")
generator = torch.Generator("cpu").manual_seed(0)
image = pipe("a red cat", negative_prompt="blue", num_inference_steps=5, guidance_scale=7.5, generator=generator).images[0]
image.save(OUT)
""",
    ),
    "image-to-image": (
        "StableDiffusionPipeline",
        """
import torch
import diffusers

pipeline = diffusers.AutoPipelineForImage2Image.from_pretrained(FOLDER, torch_dtype=torch.float32, use_safetensors=True)
init_image = diffusers.utils.load_image(IMAGE)
image = pipeline(
    prompt="a red cat", image=init_image, strength=0.8, num_inference_steps=5, guidance_scale=8.0, generator=torch.manual_seed(3)
).images[0]
diffusers.utils.make_image_grid([init_image, image], rows=1, cols=2).save(OUT)
""",
    ),
    "inpainting by another scheduler": (
        "StableDiffusionPipeline",
        """
import torch
import diffusers

pipe = diffusers.DiffusionPipeline.from_pretrained(FOLDER)
pipe = diffusers.StableDiffusionInpaintPipeline(**pipe.components, requires_safety_checker=False)
pipe.scheduler = diffusers.DPMSolverMultistepScheduler.from_config(pipe.scheduler.config, use_karras_sigmas=True)
pipe.set_progress_bar_config(disable=True)
image, mask = diffusers.utils.load_image(IMAGE), diffusers.utils.load_image(MASK)
generator = [torch.Generator().manual_seed(1)]
result = pipe(
    prompt=["a blue cat"], image=image, mask_image=mask, height=32, width=32, num_inference_steps=6, generator=generator
)
result.images[0].save(OUT)
""",
    ),
}


@pytest.mark.parametrize("name", SNIPPETS)
def test_snippet(checkpoint: Callable[[str], tuple[Path, Any]], name: str, tmp_path: Path) -> None:
    kind, code = SNIPPETS[name]
    folder, _ = checkpoint(kind)
    tiny.picture().save(tmp_path / "image.png")
    tiny.mask().save(tmp_path / "mask.png")
    pictures = {}
    for library, line in (("diffusers", "import diffusers"), ("sfumato", "import sfumato as diffusers")):
        out = tmp_path / f"{library}.png"
        values = [str(p) for p in (folder, tmp_path / "image.png", tmp_path / "mask.png", out)]
        names = f"FOLDER, IMAGE, MASK, OUT = {values!r}\n"
        done = subprocess.run(
            [sys.executable, "-c", names + code.replace("import diffusers", line)], capture_output=True, text=True, check=False
        )
        assert done.returncode == 0, done.stderr
        pictures[library] = np.asarray(Image.open(out), dtype=np.float32)
    assert np.abs(pictures["diffusers"] - pictures["sfumato"]).max() <= 1
