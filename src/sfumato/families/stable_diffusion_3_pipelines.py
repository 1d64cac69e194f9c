"""The public pipelines of Stable Diffusion 3 and 3.5."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F

from ..pipelines.adapters import LatentControlNet
from ..pipelines.guidance import Guidance
from ..pipelines.run import Run
from ..pipelines.tasks import ImageToImage, Inpaint, Task, per_picture
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


class Painting(Task):
    """Inpainting from noise, by a control network that sees what is kept."""

    name = "inpaint"


class MaskedControlNet(LatentControlNet):
    """Control networks that read a picture without the region to paint, as latents, and as a channel what is kept."""

    name = "masked-controlnet"

    def check(self, run: Run) -> None:
        super().check(run)
        if run.args.control_mask is None:
            raise ValueError("control_mask=None: pass a mask of the region of control_image to paint anew")
        for network in self.networks(run):
            if (channels := network.config.extra_conditioning_channels) != 1:
                wrong = f"controlnet has extra_conditioning_channels={channels}, not 1 for a mask"
                raise ValueError(f"{wrong}: use StableDiffusion3ControlNetPipeline")

    def picture(self, run: Run, image: Any, network: Any) -> torch.Tensor:
        """A picture as latents, black where it is to be painted, and 1 where it is kept, (B, C + 1, h, w)."""
        area, form = run.task.area(run), run.pipe.latent_format
        mask = run.pipe.mask_processor.preprocess(run.args.control_mask, **area).to(run.device)
        picture = self.processor(run).preprocess(image, **area).to(run.device)
        latents = form.scaled(form.encode(torch.where(mask < 0.5, picture, -1.0), mode=True))
        kept = 1 - F.interpolate(mask, size=latents.shape[-2:])
        both = torch.cat([latents, kept.expand(len(latents), -1, -1, -1)], dim=1).to(run.pipe.compute_dtype)
        return per_picture(both, run.batch, "control picture")


MASKED = MaskedControlNet("control_image", "control_mask controlnet_pooled_projections")


class StableDiffusion3ControlNetInpaintingPipeline(StableDiffusion3, task=Painting(), adapters=(MASKED,), later="mu", defaults=FEW):
    """Paints a masked region anew, from noise, by a control network that was trained on masks."""
