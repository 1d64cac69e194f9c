"""The public pipelines with perturbed-attention guidance as call arguments (arXiv:2403.17377)."""

from __future__ import annotations

from ..pipelines.adapters import ControlNet
from ..pipelines.pag import PerturbedAttention
from ..pipelines.tasks import ImageToImage, Inpaint, Task
from .stable_diffusion import StableDiffusion
from .stable_diffusion_3 import StableDiffusion3
from .stable_diffusion_3_pipelines import StableDiffusion3Img2ImgPipeline
from .stable_diffusion_pipelines import CALLBACKS, SCHEDULE, Inpainting
from .stable_diffusion_xl import StableDiffusionXL
from .stable_diffusion_xl_pipelines import Refining

PICTURES = "ip_adapter_image ip_adapter_image_embeds"


class StableDiffusionPAGPipeline(PerturbedAttention, StableDiffusion, task=Task(), later=CALLBACKS):
    """Pictures from text."""


class StableDiffusionPAGImg2ImgPipeline(
    PerturbedAttention, StableDiffusion, task=ImageToImage(), later=f"height width guidance_rescale {CALLBACKS}"
):
    """Pictures from a picture and text."""


class StableDiffusionPAGInpaintPipeline(
    PerturbedAttention, Inpainting, task=Inpaint(), later=CALLBACKS, defaults={"strength": 0.9999}
):
    """Paints a masked region anew."""

    adopts = StableDiffusion.adopts  # here the reference's constructor changes what it does for pictures from text


class StableDiffusionControlNetPAGPipeline(
    PerturbedAttention, StableDiffusion, task=Task(), adapters=(ControlNet("image"),), later=f"guidance_rescale {CALLBACKS}"
):
    """Pictures from text, steered by pictures of edges, depth, pose ..."""


class StableDiffusionControlNetPAGInpaintPipeline(
    PerturbedAttention, Inpainting, task=Inpaint(), adapters=(ControlNet(),), later=f"masked_image_latents guess_mode {SCHEDULE}",
    defaults={"strength": 1.0, "controlnet_conditioning_scale": 0.5},
):  # fmt: skip
    """Paints a masked region anew, steered by control pictures."""


class StableDiffusionXLPAGPipeline(
    PerturbedAttention, StableDiffusionXL, task=Task(), later=CALLBACKS, defaults={"guidance_scale": 5.0}
):
    """Pictures from text."""


class StableDiffusionXLPAGImg2ImgPipeline(
    PerturbedAttention, Refining, task=ImageToImage(), later=f"height width {CALLBACKS}",
    defaults={"strength": 0.3, "guidance_scale": 5.0},
):  # fmt: skip
    """Pictures from a picture and text; the refiner."""


class StableDiffusionXLPAGInpaintPipeline(
    PerturbedAttention, Refining, task=Inpaint(), later=CALLBACKS, defaults={"strength": 0.9999}
):
    """Paints a masked region anew."""


class StableDiffusionXLControlNetPAGPipeline(
    PerturbedAttention, StableDiffusionXL, task=Task(), adapters=(ControlNet("image"),),
    later=f"guess_mode guidance_rescale {CALLBACKS}", defaults={"guidance_scale": 5.0},
):  # fmt: skip
    """Pictures from text, steered by pictures of edges, depth, pose ..."""


class StableDiffusionXLControlNetPAGImg2ImgPipeline(
    PerturbedAttention, Refining, task=ImageToImage(), adapters=(ControlNet(),), later=f"{SCHEDULE} denoising_start denoising_end",
    defaults={"guidance_scale": 5.0, "controlnet_conditioning_scale": 0.8},
):  # fmt: skip
    """Pictures from a picture and text, steered by control pictures."""


class StableDiffusion3PAGPipeline(
    PerturbedAttention, StableDiffusion3, task=Task(), later=f"{PICTURES} mu",
    defaults={"num_inference_steps": 28, "guidance_scale": 7.0},
):  # fmt: skip
    """Pictures from text."""

    pag_layers = "blocks.1"


class StableDiffusion3PAGImg2ImgPipeline(
    PerturbedAttention, StableDiffusion3, task=ImageToImage(), later=f"{PICTURES} mu",
    defaults={"num_inference_steps": 50, "guidance_scale": 7.0, "strength": 0.6},
):  # fmt: skip
    """Pictures from a picture and text."""

    pag_layers = "blocks.1"
    arguments, order = StableDiffusion3Img2ImgPipeline.arguments, StableDiffusion3Img2ImgPipeline.order
