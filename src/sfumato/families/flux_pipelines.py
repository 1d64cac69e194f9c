"""The public pipelines of FLUX.1."""

from __future__ import annotations

from typing import Any

import torch

from ..pipelines.adapters import ChannelControl, LatentControlNet
from ..pipelines.conditioning import numbered
from ..pipelines.run import Run
from ..pipelines.tasks import ImageToImage, Inpaint, Task, encode_pictures, per_picture
from .flux import Flux

CONTROLNET, CHANNELS = LatentControlNet("control_image", "control_mode"), ChannelControl()
NEGATIVE = "negative_prompt negative_prompt_2 true_cfg_scale negative_prompt_embeds negative_pooled_prompt_embeds "
PICTURES = "ip_adapter_image ip_adapter_image_embeds negative_ip_adapter_image negative_ip_adapter_image_embeds"
PLAIN = NEGATIVE + PICTURES
FEW: dict[str, Any] = {"num_inference_steps": 28, "guidance_scale": 3.5, "max_sequence_length": 512}
SOME = {**FEW, "guidance_scale": 7.0, "strength": 0.6}
CONTROLNET_ORDER = Flux.order.replace("control_image ", "").replace("control_mode", "control_image control_mode")
PAINTING_ORDER = Flux.order.replace("padding_mask_crop strength num_inference_steps sigmas", "strength padding_mask_crop sigmas "
                                    "num_inference_steps")  # fmt: skip
CONTROL_ORDER = Flux.order.replace("mask_image masked_image_latents control_image", "control_image mask_image masked_image_latents")


class FluxPipeline(Flux, task=Task(), defaults=FEW):
    """Pictures from text."""

    schedulers_sigmas = True  # not so in the reference's other pipelines


class FluxImg2ImgPipeline(Flux, task=ImageToImage(), defaults=SOME):
    """Pictures from a picture and text."""


class FluxInpaintPipeline(Flux, task=Inpaint(), defaults=SOME):
    """Paints a masked region anew."""


class FluxControlNetPipeline(Flux, task=Task(), adapters=(CONTROLNET,), defaults={**FEW, "guidance_scale": 7.0}):
    """Pictures from text, steered by pictures of edges, depth, pose ..."""

    order = CONTROLNET_ORDER


class FluxControlNetImg2ImgPipeline(Flux, task=ImageToImage(), adapters=(CONTROLNET,), later=PLAIN, defaults=SOME):
    """Pictures from a picture and text, steered by control pictures."""


class FluxControlNetInpaintPipeline(Flux, task=Inpaint(), adapters=(CONTROLNET,), later=PLAIN, defaults=SOME):
    """Paints a masked region anew, steered by control pictures."""

    order = PAINTING_ORDER


class FluxControlPipeline(Flux, task=Task(), adapters=(CHANNELS,), later=PLAIN, defaults=FEW):
    """Pictures from text and a control picture, by a denoiser that reads it as channels (Canny, Depth)."""


class FluxControlImg2ImgPipeline(Flux, task=ImageToImage(), adapters=(CHANNELS,), later=PLAIN, defaults=SOME):
    """Pictures from a picture, text and a control picture, by a denoiser that reads it as channels."""


class FluxControlInpaintPipeline(
    Flux, task=Inpaint(masks_first=True), adapters=(CHANNELS,), later=f"padding_mask_crop {PLAIN}", defaults=SOME
):
    """Paints a masked region anew, by a denoiser that reads a control picture as channels."""

    order = CONTROL_ORDER


class Fill(ImageToImage):
    """Paint a masked region anew, by a denoiser that reads the masked picture and the mask as channels."""

    name = "inpaint"
    arguments = "image mask_image masked_image_latents height width strength"
    needs_image = "filling needs a picture and a mask of the region to paint anew"

    def prepare(self, run: Run) -> None:
        super().prepare(run)
        args, pipe, factor = run.args, run.pipe, run.pipe.latent_format.factor
        mask = pipe.mask_processor.preprocess(args.mask_image, **self.area(run))  # (b, 1, H, W)
        masked = args.masked_image_latents
        if masked is None:
            masked = pipe.image_processor.preprocess(args.image, **self.area(run)) * (1 - mask)
        latents = encode_pictures(run, pipe.unpack(masked, *run.latents.shape[-2:]))
        # the mask at the full resolution: the pixels of a latent as its channels
        pixels = torch.nn.functional.pixel_unshuffle(mask.to(latents), factor)
        channels = torch.cat([latents, per_picture(pixels, run.batch, "mask")], dim=1)
        run.channels = torch.cat([channels] * run.guidance.branches)


class FluxFillPipeline(
    Flux, task=Fill(), later=PLAIN,
    defaults={**FEW, "num_inference_steps": 50, "guidance_scale": 30.0, "strength": 1.0},
):  # fmt: skip
    """Paints a masked region anew, by a denoiser made for it."""


SIZES = (
    (672, 1568), (688, 1504), (720, 1456), (752, 1392), (800, 1328), (832, 1248), (880, 1184), (944, 1104), (1024, 1024),
    (1104, 944), (1184, 880), (1248, 832), (1328, 800), (1392, 752), (1456, 720), (1504, 688), (1568, 672),
)  # fmt: skip
"""Widths and heights that Kontext was trained with."""


def fitted(run: Run, picture: Any) -> tuple[int, int]:
    """Height and width, in pixels, at which the denoiser sees a picture."""
    height, width = run.pipe.image_processor.get_default_height_width(picture[0] if isinstance(picture, list) else picture)
    if run.args._auto_resize:
        ratio = width / height
        width, height = min(SIZES, key=lambda size: abs(ratio - size[0] / size[1]))
    multiple = run.pipe.size_multiple
    return height // multiple * multiple, width // multiple * multiple


def mode_latents(run: Run, pixels: torch.Tensor, what: str) -> torch.Tensor:
    """Latents of pictures (b, 3, H, W), the mode of their posterior, one for each picture of the run."""
    form = run.pipe.latent_format
    latents = form.scaled(form.encode(pixels.to(run.device), mode=True))
    return per_picture(latents.to(run.pipe.compute_dtype), run.batch, what)


def refer(run: Run, image: Any) -> None:
    """Lets the denoiser see pictures beside its own: a list of lists has several for each picture."""
    nested = isinstance(image, (list, tuple)) and isinstance(image[0], (list, tuple))
    found = []
    for pictures in zip(*image, strict=True) if nested else [image]:
        given = list(pictures) if isinstance(pictures, tuple) else pictures
        if isinstance(given, torch.Tensor) and given.shape[1] == run.pipe.latent_format.channels:
            latents = per_picture(given.to(run.device, run.pipe.compute_dtype), run.batch, "reference picture")
        else:
            height, width = fitted(run, given)
            pixels = run.pipe.image_processor.preprocess(given, height=height, width=width)
            latents = mode_latents(run, pixels, "reference picture")
        found.append(torch.cat([latents] * run.guidance.branches))
    run.conditioning = run.conditioning.plus(numbered("references", found))


class Reference(Task):
    """Text to picture, with pictures that the denoiser sees beside its own."""

    name = "reference"
    arguments = "image height width max_area _auto_resize"

    def size(self, run: Run) -> tuple[int, int]:
        height, width = super().size(run)
        ratio, multiple = width / height, run.pipe.size_multiple
        edges = round((run.args.max_area / ratio) ** 0.5), round((run.args.max_area * ratio) ** 0.5)
        return edges[0] // multiple * multiple, edges[1] // multiple * multiple

    def prepare(self, run: Run) -> None:
        if run.args.image is not None:
            refer(run, run.args.image)
        super().prepare(run)


class ReferenceInpaint(Inpaint):
    """Inpainting at the picture's size by a denoiser that sees the picture, or others, beside its own."""

    arguments = "image image_reference mask_image height width padding_mask_crop strength latents max_area _auto_resize"

    def size(self, run: Run) -> tuple[int, int]:
        return fitted(run, run.args.image)

    def encode(self, run: Run, image: torch.Tensor) -> torch.Tensor:
        return mode_latents(run, image, "image")

    def prepare(self, run: Run) -> None:
        super().prepare(run)
        reference = run.args.image_reference
        refer(run, run.kept.source if reference is None else reference)


class FluxKontextPipeline(Flux, task=Reference(), defaults=FEW):
    """Pictures from text and pictures to edit or to refer to."""

    order = "image " + Flux.order.replace("image mask_image", "mask_image", 1)


class FluxKontextInpaintPipeline(Flux, task=ReferenceInpaint(), defaults={**FEW, "strength": 1.0}):
    """Paints a masked region anew, from text and a picture to refer to."""

    order = "image image_reference mask_image " + Flux.order.replace("image mask_image ", "", 1).replace(
        "padding_mask_crop strength", "strength padding_mask_crop"
    )


class FluxControlNetFillPipeline(
    Flux, task=Fill(), adapters=(CONTROLNET,), defaults={**FEW, "guidance_scale": 30.0, "strength": 1.0}
):
    """Paints a masked region anew, by a denoiser made for it, steered by control pictures."""


class FluxControlNetKontextPipeline(Flux, task=Reference(), adapters=(CONTROLNET,), defaults=FEW):
    """Pictures from text and pictures to edit or to refer to, steered by control pictures."""
