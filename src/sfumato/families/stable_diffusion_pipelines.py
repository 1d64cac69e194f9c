"""The public pipelines of Stable Diffusion 1 and 2."""

from __future__ import annotations

from ..pipelines.adapters import T2I, ControlNet
from ..pipelines.tasks import ImageToImage, Inpaint, Task
from .stable_diffusion import StableDiffusion

CALLBACKS = "callback callback_steps"
SCHEDULE = f"timesteps sigmas guidance_rescale {CALLBACKS}"


class StableDiffusionPipeline(StableDiffusion, task=Task(), later=CALLBACKS):
    """Pictures from text."""


class StableDiffusionImg2ImgPipeline(StableDiffusion, task=ImageToImage(), later=f"height width guidance_rescale {CALLBACKS}"):
    """Pictures from a picture and text."""


class Inpainting(StableDiffusion):
    """What inpainting asks of the denoiser."""

    adopts = {"steps_offset": 1, "skip_prk_steps": True}

    def adopt(self) -> None:
        super().adopt()
        if self.unet is not None and self.input_channels not in (4, 9):
            raise ValueError(f"inpainting needs a U-Net with 4 or 9 input channels, this one has {self.input_channels}")


class StableDiffusionInpaintPipeline(Inpainting, task=Inpaint(), later=f"guidance_rescale {CALLBACKS}", defaults={"strength": 1.0}):
    """Paints a masked region anew."""


class StableDiffusionControlNetPipeline(
    StableDiffusion, task=Task(), adapters=(ControlNet("image"),), later=f"guidance_rescale {CALLBACKS}"
):
    """Pictures from text, steered by pictures of edges, depth, pose ..."""


class StableDiffusionControlNetImg2ImgPipeline(
    StableDiffusion, task=ImageToImage(), adapters=(ControlNet(),), later=SCHEDULE, defaults={"controlnet_conditioning_scale": 0.8}
):
    """Pictures from a picture and text, steered by control pictures."""

    arguments = StableDiffusion.arguments + " latents"


class StableDiffusionControlNetInpaintPipeline(
    Inpainting, task=Inpaint(), adapters=(ControlNet(),), later=f"masked_image_latents {SCHEDULE}",
    defaults={"strength": 1.0, "controlnet_conditioning_scale": 0.5},
):  # fmt: skip
    """Paints a masked region anew, steered by control pictures."""


class StableDiffusionAdapterPipeline(
    StableDiffusion, task=Task(), adapters=(T2I(),),
    later="ip_adapter_image ip_adapter_image_embeds guidance_rescale adapter_conditioning_factor callback_on_step_end "
    "callback_on_step_end_tensor_inputs",
):  # fmt: skip
    """Pictures from text, steered by T2I-Adapters."""


class StableDiffusionAdapterImg2ImgPipeline(StableDiffusion, task=ImageToImage(), adapters=(T2I("control_image"),)):
    """Pictures from a picture and text, steered by T2I-Adapters."""


class StableDiffusionAdapterInpaintPipeline(Inpainting, task=Inpaint(), adapters=(T2I("control_image"),)):
    """Paints a masked region anew, steered by T2I-Adapters."""
