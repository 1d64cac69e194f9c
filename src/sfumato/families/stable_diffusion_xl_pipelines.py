"""The public pipelines of Stable Diffusion XL."""

from __future__ import annotations

from ..pipelines.tasks import ImageToImage, Inpaint, Task
from .stable_diffusion_xl import StableDiffusionXL


class StableDiffusionXLPipeline(StableDiffusionXL, task=Task(), defaults={"guidance_scale": 5.0}):
    """Pictures from text."""


class Refining(StableDiffusionXL):
    """What the tasks that start from a picture add: the refiner's scores, and a start within the schedule."""

    options = {"requires_aesthetics_score": False, "force_zeros_for_empty_prompt": True, "add_watermarker": None}
    arguments = StableDiffusionXL.arguments + " latents denoising_start aesthetic_score negative_aesthetic_score"
    negative_sizes = True


class StableDiffusionXLImg2ImgPipeline(
    Refining, task=ImageToImage(), later="height width", defaults={"strength": 0.3, "guidance_scale": 5.0}
):
    """Pictures from a picture and text; the refiner."""


class StableDiffusionXLInpaintPipeline(Refining, task=Inpaint(), defaults={"strength": 0.9999}):
    """Paints a masked region anew."""
