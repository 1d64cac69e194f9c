"""Latent consistency models (arXiv:2310.04378): a U-Net distilled to few steps, which reads the guidance scale as an input.

Quirks, kept because they change the result of valid calls: the steps are among those of the sampler that the model was distilled
from (``original_inference_steps``); in picture-to-picture the scheduler keeps the part of them that ``strength`` says; what is
decoded is the last prediction of the clean latents.
"""

from __future__ import annotations

from typing import Any

import torch

from ..pipelines.guidance import Guidance
from ..pipelines.run import Named, Run, accepted, conditioned
from ..pipelines.tasks import ImageToImage, Task
from .stable_diffusion import StableDiffusion

DENOISED = Named(lambda run: run.denoised, lambda run, value: setattr(run, "denoised", value))
CALL = (
    "original_inference_steps timesteps guidance_scale num_images_per_prompt generator latents prompt_embeds ip_adapter_image "
    "ip_adapter_image_embeds output_type return_dict cross_attention_kwargs clip_skip callback_on_step_end "
    "callback_on_step_end_tensor_inputs"
)
MORE = "prompt_syntax callback callback_steps guidance regions"
FEW = {"num_inference_steps": 4, "guidance_scale": 8.5}


class LatentConsistency(StableDiffusion):
    """The family: Stable Diffusion's parts, few steps, no negative prompt."""

    family = "Latent consistency"
    adopts = {}
    callback_tensors = {"denoised": DENOISED, "w_embedding": conditioned("timestep_cond")}

    def adopt(self) -> None:
        super().adopt()
        if self.unet.config.time_cond_proj_dim is None:
            remedy = "use StableDiffusionPipeline, with LCMScheduler if an LCM-LoRA is in it"
            raise ValueError(f"this U-Net reads no guidance scale (time_cond_proj_dim=None): {remedy}")

    def choose_guidance(self, run: Run) -> Guidance:
        return self.given_guidance(run) or Guidance()

    def schedule_options(self, run: Run, given: dict[str, Any]) -> dict[str, Any]:
        takes = accepted(type(run.scheduler).set_timesteps) & self.call_signature.parameters.keys()
        return {**given, **{name: getattr(run.args, name) for name in takes & {"original_inference_steps", "strength"}}}

    def truncate(self, run: Run) -> None:
        if "strength" not in accepted(type(run.scheduler).set_timesteps):
            super().truncate(run)

    def decode_output(self, run: Run, **vae_extras: torch.Tensor) -> Any:
        if isinstance(run.denoised, torch.Tensor):
            run.latents = run.denoised
        return super().decode_output(run, **vae_extras)


class LatentConsistencyModelPipeline(
    LatentConsistency, task=Task(), call=f"prompt height width num_inference_steps {CALL}", extra=MORE, defaults=FEW
):
    """Pictures from text in few steps."""


class LatentConsistencyModelImg2ImgPipeline(
    LatentConsistency, task=ImageToImage(), call=f"prompt image num_inference_steps strength {CALL}",
    extra=f"height width {MORE}", defaults=FEW,
):  # fmt: skip
    """Pictures from a picture and text in few steps."""
