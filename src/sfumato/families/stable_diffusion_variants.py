"""Relatives of Stable Diffusion whose denoiser reads depth (5 channels), a small picture (7), a picture to edit (8), or no text.

Quirks: the instruction pipeline takes the posterior's mode. Not reproduced, because it is a fault: with one generator per picture
the low-resolution noise of upscaling drawn from the first generator alone.
"""

from __future__ import annotations

import torch

from ..media.processor import VaeImageProcessor
from ..outputs import ImagePipelineOutput
from ..pipelines.adapters import T2I, ControlNet
from ..pipelines.checks import check_generators
from ..pipelines.conditioning import Conditioning
from ..pipelines.run import Run
from ..pipelines.tasks import DepthToImage, InstructEdit, Task, per_picture
from ..random import randn
from .stable_diffusion import CHECKER, PARTS, StableDiffusion
from .unet import Editing

EXTRA = "prompt_syntax callback callback_steps"


DEPTH = "height width timesteps sigmas ip_adapter_image ip_adapter_image_embeds guidance_rescale callback callback_steps"


class StableDiffusionDepth2ImgPipeline(StableDiffusion, task=DepthToImage(), later=DEPTH):
    """Pictures from a picture's depth and text."""

    component_names = (*PARTS, "depth_estimator", "feature_extractor")
    optional_components = ()
    options = {}
    output = ImagePipelineOutput
    adopts = {}
    safety_checker = None

    def depth_channel(self, run: Run) -> torch.Tensor:
        """Depth of the pictures as a channel in -1..1, (B, 1, h, w) at the size of the latents."""
        args = run.args
        height, width = self.task.size(run)
        if args.depth_map is None:
            raw = args.image if isinstance(args.image, (list, tuple)) or not hasattr(args.image, "size") else [args.image]
            pixels = self.feature_extractor(images=raw, return_tensors="pt").pixel_values.to(run.device, self.compute_dtype)
            depth = self.depth_estimator(pixels).predicted_depth
        else:
            depth = args.depth_map.to(run.device, self.compute_dtype)
        size = (height // self.vae_scale_factor, width // self.vae_scale_factor)
        depth = torch.nn.functional.interpolate(depth.unsqueeze(1).float(), size=size, mode="bicubic", align_corners=False)
        low, high = depth.amin(dim=(1, 2, 3), keepdim=True), depth.amax(dim=(1, 2, 3), keepdim=True)
        depth = 2.0 * (depth - low) / (high - low) - 1.0
        return per_picture(depth.to(self.compute_dtype), run.batch, "depth map")


class StableDiffusionControlNetDepth2ImgPipeline(
    StableDiffusionDepth2ImgPipeline, task=DepthToImage(), adapters=(ControlNet(),), later=DEPTH
):
    """Pictures from a picture's depth and text, steered by control pictures."""


class StableDiffusionInstructPix2PixPipeline(
    Editing, StableDiffusion, task=InstructEdit(),
    later="timesteps sigmas guidance_rescale clip_skip height width callback callback_steps",
    defaults={"num_inference_steps": 100},
):  # fmt: skip
    """Edits a picture as an instruction says."""

    adopts = {}
    order = (
        StableDiffusion.order.replace("guidance_scale ", "guidance_scale image_guidance_scale ", 1)
        .replace("cross_attention_kwargs ", "")
        .replace("tensor_inputs", "tensor_inputs cross_attention_kwargs")
    )


class StableDiffusionAdapterDepth2ImgPipeline(
    StableDiffusionDepth2ImgPipeline, task=DepthToImage(), adapters=(T2I("control_image"),), later=DEPTH
):
    """Pictures from a picture's depth and text, steered by T2I-Adapters."""


class StableDiffusionControlNetInstructPix2PixPipeline(
    StableDiffusionInstructPix2PixPipeline, task=InstructEdit(), adapters=(ControlNet(),)
):
    """Edits a picture as an instruction says, steered by control pictures."""


class StableDiffusionAdapterInstructPix2PixPipeline(
    StableDiffusionInstructPix2PixPipeline, task=InstructEdit(), adapters=(T2I("control_image"),)
):
    """Edits a picture as an instruction says, steered by T2I-Adapters."""


class NoisyUpscale(Task):
    """Condition on a low-resolution picture with noise of a known level added, as extra channels."""

    name = "upscale"
    needs_image = "upscaling needs a picture"

    def check(self, run: Run) -> None:
        super().check(run)
        limit = run.pipe.max_noise_level
        if run.args.noise_level > limit:
            raise ValueError(f"noise_level={run.args.noise_level} must lie in 0..{limit}")

    def prepare(self, run: Run) -> None:
        pipe, args = run.pipe, run.args
        image = pipe.image_processor.preprocess(args.image).to(run.device, pipe.compute_dtype)  # (b, 3, h, w) in -1..1
        if isinstance(args.generator, list):  # each picture's noise comes from its own generator
            image = per_picture(image, run.batch, "image")
        level = torch.tensor([args.noise_level], dtype=torch.long, device=run.device)
        noise = randn(image.shape, generator=args.generator, device=run.device, dtype=image.dtype)
        image = per_picture(pipe.low_res_scheduler.add_noise(image, noise, level), run.batch, "image")
        run.channels = torch.cat([image] * run.guidance.branches)
        run.conditioning = run.conditioning.replace(class_labels=level.repeat(len(run.channels)))
        shape = (run.batch, pipe.latent_format.channels, *image.shape[-2:])
        run.latents = self.noise_of_shape(run, shape) * run.scheduler.init_noise_sigma


class StableDiffusionUpscalePipeline(
    StableDiffusion,
    task=NoisyUpscale(),
    call="prompt image num_inference_steps guidance_scale noise_level negative_prompt num_images_per_prompt eta generator latents "
    "prompt_embeds negative_prompt_embeds output_type return_dict callback callback_steps cross_attention_kwargs clip_skip",
    extra="prompt_syntax callback_on_step_end callback_on_step_end_tensor_inputs guidance_rescale",
    defaults={"num_inference_steps": 75, "guidance_scale": 9.0},
):
    """Pictures four times as large, from a small picture and text."""

    component_names = (*PARTS[:-1], "low_res_scheduler", "scheduler", *CHECKER, "watermarker")
    optional_components = (*CHECKER, "watermarker")
    options = {"max_noise_level": 350}
    adopts = {}

    @property
    def max_noise_level(self) -> int:
        """Largest noise level that the denoiser was trained with."""
        return self._options["max_noise_level"]

    @property
    def image_processor(self) -> VaeImageProcessor:
        return VaeImageProcessor(vae_scale_factor=self.latent_format.factor, resample="bicubic", do_convert_rgb=True)


class StableDiffusionImageVariationPipeline(
    StableDiffusion,
    task=Task(),
    call="image! height width num_inference_steps guidance_scale num_images_per_prompt eta generator latents output_type "
    "return_dict callback callback_steps",
    extra="callback_on_step_end callback_on_step_end_tensor_inputs guidance_rescale",
):
    """Variations of a picture, conditioned on its CLIP embedding."""

    component_names = ("vae", "image_encoder", "unet", "scheduler", "safety_checker", "feature_extractor")
    optional_components = ("safety_checker",)
    adopts = {}

    def check(self, run: Run) -> None:
        run.args.prompt = "picture"
        super().check(run)

    def condition(self, run: Run) -> None:
        args, pixels = run.args, run.args.image
        if not isinstance(pixels, torch.Tensor):
            pixels = self.feature_extractor(images=pixels, return_tensors="pt").pixel_values
        weight = next(self.image_encoder.parameters())
        embeds = self.image_encoder(pixels.to(weight.device, weight.dtype)).image_embeds.unsqueeze(1)  # (B, 1, D)
        run.batch = len(embeds) * args.num_images_per_prompt
        check_generators(run)
        embeds = embeds.to(self.compute_dtype).repeat_interleave(args.num_images_per_prompt, dim=0)
        run.guidance = self.choose_guidance(run)
        if run.guidance.branches > 1:
            embeds = torch.cat([torch.zeros_like(embeds), embeds])
        run.conditioning = Conditioning({"encoder_hidden_states": embeds})
