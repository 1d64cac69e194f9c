"""The public pipelines of Stable Diffusion XL."""

from __future__ import annotations

from ..pipelines.adapters import T2I, ControlNet
from ..pipelines.tasks import ImageToImage, Inpaint, InstructEdit, Task
from .stable_diffusion_xl import PARTS, StableDiffusionXL
from .unet import Editing

CONTROL = ControlNet("image")
UNION = ControlNet("control_image", "guess_mode control_mode", sets_size=True)
CALLBACKS = "callback callback_steps"
SIZES = "negative_original_size negative_crops_coords_top_left negative_target_size"
SCHEDULE = f"{CALLBACKS} timesteps sigmas guidance_rescale"
PAINTING = f"{CALLBACKS} timesteps sigmas masked_image_latents {SIZES}"
POOLED = "pooled_prompt_embeds negative_pooled_prompt_embeds "
PICTURES = "ip_adapter_image ip_adapter_image_embeds "


class StableDiffusionXLPipeline(StableDiffusionXL, task=Task(), later=CALLBACKS, defaults={"guidance_scale": 5.0}):
    """Pictures from text."""


class Refining(StableDiffusionXL):
    """What the tasks that start from a picture add: the refiner's scores, and a start within the schedule."""

    options = {"requires_aesthetics_score": False, "force_zeros_for_empty_prompt": True, "add_watermarker": None}
    arguments = StableDiffusionXL.arguments + " latents denoising_start aesthetic_score negative_aesthetic_score"
    negative_sizes = True


class StableDiffusionXLImg2ImgPipeline(
    Refining, task=ImageToImage(), later=f"height width {CALLBACKS}", defaults={"strength": 0.3, "guidance_scale": 5.0}
):
    """Pictures from a picture and text; the refiner."""


class StableDiffusionXLInpaintPipeline(Refining, task=Inpaint(), later=CALLBACKS, defaults={"strength": 0.9999}):
    """Paints a masked region anew."""


class StableDiffusionXLControlNetPipeline(
    StableDiffusionXL, task=Task(), adapters=(CONTROL,), later=f"guidance_rescale {CALLBACKS}", defaults={"guidance_scale": 5.0}
):
    """Pictures from text, steered by pictures of edges, depth, pose ..."""


class StableDiffusionXLControlNetUnionPipeline(
    StableDiffusionXL, task=Task(), adapters=(UNION,), later=f"guidance_rescale {CALLBACKS}", defaults={"guidance_scale": 5.0}
):
    """Pictures from text, steered by one network that reads pictures of many kinds."""


class StableDiffusionXLControlNetImg2ImgPipeline(
    Refining, task=ImageToImage(), adapters=(ControlNet(),), later=f"{SCHEDULE} denoising_start denoising_end",
    defaults={"guidance_scale": 5.0, "controlnet_conditioning_scale": 0.8},
):  # fmt: skip
    """Pictures from a picture and text, steered by control pictures."""


class StableDiffusionXLControlNetUnionImg2ImgPipeline(
    Refining, task=ImageToImage(), adapters=(UNION,), later=f"{SCHEDULE} denoising_start denoising_end",
    defaults={"guidance_scale": 5.0, "controlnet_conditioning_scale": 0.8},
):  # fmt: skip
    """Pictures from a picture and text, steered by one network that reads pictures of many kinds."""


class StableDiffusionXLControlNetInpaintPipeline(
    Refining, task=Inpaint(), adapters=(ControlNet(),), later=PAINTING, defaults={"strength": 0.9999, "guidance_scale": 5.0}
):
    """Paints a masked region anew, steered by control pictures."""

    order = (
        StableDiffusionXL.order.replace(POOLED + PICTURES, PICTURES + POOLED)
        .replace("guidance_rescale ", "")
        .replace("original_size crops", "guidance_rescale original_size crops", 1)
    )


class StableDiffusionXLControlNetUnionInpaintPipeline(
    Refining, task=Inpaint(), adapters=(UNION,), later=PAINTING, defaults={"strength": 0.9999, "guidance_scale": 5.0}
):
    """Paints a masked region anew, steered by one network that reads pictures of many kinds."""

    order = StableDiffusionXLControlNetInpaintPipeline.order


class StableDiffusionXLAdapterPipeline(
    StableDiffusionXL, task=Task(), adapters=(T2I(),), later="callback_on_step_end callback_on_step_end_tensor_inputs",
    defaults={"guidance_scale": 5.0},
):  # fmt: skip
    """Pictures from text, steered by T2I-Adapters."""


class StableDiffusionXLAdapterImg2ImgPipeline(Refining, task=ImageToImage(), adapters=(T2I("control_image"),)):
    """Pictures from a picture and text, steered by T2I-Adapters."""


class StableDiffusionXLAdapterInpaintPipeline(Refining, task=Inpaint(), adapters=(T2I("control_image"),)):
    """Paints a masked region anew, steered by T2I-Adapters."""


class StableDiffusionXLInstructPix2PixPipeline(
    Editing, StableDiffusionXL, task=InstructEdit(),
    later=f"timesteps sigmas {SIZES} clip_skip ip_adapter_image ip_adapter_image_embeds callback_on_step_end "
    "callback_on_step_end_tensor_inputs",
    defaults={"num_inference_steps": 100, "guidance_scale": 5.0},
):  # fmt: skip
    """Edits a picture as an instruction says."""

    component_names = PARTS
    optional_components = ()
    options = {**StableDiffusionXL.options, "is_cosxl_edit": False}
    picture_sets_size = False

    @property
    def reference_scale(self) -> float:  # type: ignore[override]
        """CosXL reads the picture's latents as scaled as its own."""
        return self.latent_format.scale if self._options["is_cosxl_edit"] else 1.0


class StableDiffusionXLControlNetInstructPix2PixPipeline(
    StableDiffusionXLInstructPix2PixPipeline, task=InstructEdit(), adapters=(ControlNet(),)
):
    """Edits a picture as an instruction says, steered by control pictures."""


class StableDiffusionXLAdapterInstructPix2PixPipeline(
    StableDiffusionXLInstructPix2PixPipeline, task=InstructEdit(), adapters=(T2I("control_image"),)
):
    """Edits a picture as an instruction says, steered by T2I-Adapters."""
