"""The public pipelines of Stable Diffusion 3 and 3.5."""

from __future__ import annotations

from ..pipelines.adapters import LatentControlNet
from ..pipelines.guidance import Guidance
from ..pipelines.run import Run
from ..pipelines.tasks import ImageToImage, Inpaint, Task
from ..pipelines.weak_models import SkipLayerGuidance
from .stable_diffusion_3 import StableDiffusion3

CONTROL = LatentControlNet("control_image", "controlnet_pooled_projections")
FEW = {"num_inference_steps": 28, "guidance_scale": 7.0}
SOME = {"num_inference_steps": 50, "guidance_scale": 7.0, "strength": 0.6}
SKIPPING = ("skip_layer_guidance_scale", "skip_layer_guidance_start", "skip_layer_guidance_stop")
IMAGE = "ip_adapter_image ip_adapter_image_embeds "


class StableDiffusion3Pipeline(StableDiffusion3, task=Task(), defaults=FEW):
    """Pictures from text."""

    arguments = (
        f"{StableDiffusion3.arguments} skip_guidance_layers skip_layer_guidance_scale skip_layer_guidance_start "
        "skip_layer_guidance_stop"
    )

    def choose_guidance(self, run: Run) -> Guidance:
        args, guided = run.args, super().choose_guidance(run)
        own = {name: getattr(args, name) for name in SKIPPING}
        if args.skip_guidance_layers is None:
            for name, value in own.items():
                if value != self.call_signature.parameters[name].default:
                    raise ValueError(f"{name}={value!r} is given without skip_guidance_layers: name the layers to leave out")
            return guided
        if guided.branches == 1:
            raise ValueError(
                f"skip_guidance_layers={args.skip_guidance_layers!r} is given, but nothing guides: raise guidance_scale above 1"
            )
        return SkipLayerGuidance(base=guided, skip_layer_guidance_layers=args.skip_guidance_layers, **own)


class StableDiffusion3Img2ImgPipeline(StableDiffusion3, task=ImageToImage(), defaults=SOME):
    """Pictures from a picture and text."""

    arguments = StableDiffusion3.arguments + " latents"
    order = (
        StableDiffusion3.order.replace("image mask_image masked_image_latents height width", "height width image")
        .replace(IMAGE, "")
        .replace("output_type ", f"output_type {IMAGE}")
    )


class StableDiffusion3InpaintPipeline(StableDiffusion3, task=Inpaint(), defaults=SOME):
    """Paints a masked region anew."""


class StableDiffusion3ControlNetPipeline(StableDiffusion3, task=Task(), adapters=(CONTROL,), later="mu", defaults=FEW):
    """Pictures from text, steered by pictures of edges, depth, pose ..."""


class StableDiffusion3ControlNetImg2ImgPipeline(StableDiffusion3, task=ImageToImage(), adapters=(CONTROL,), defaults=SOME):
    """Pictures from a picture and text, steered by control pictures."""


class StableDiffusion3ControlNetInpaintPipeline(StableDiffusion3, task=Inpaint(), adapters=(CONTROL,), defaults=SOME):
    """Paints a masked region anew, steered by control pictures."""
