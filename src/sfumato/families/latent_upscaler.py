"""The latent upscaler: doubles the size of Stable Diffusion's latents, with a denoiser preconditioned as in EDM.

The denoiser ``F`` predicts through ``D = c_skip x + c_out F(c_in x; c_noise)`` (arXiv:2206.00364, eq. 7 and table 1 with
``sigma_data = 1``). The conditions are the latents themselves, enlarged, and the pooled prompt.
"""

from __future__ import annotations

from typing import Any

import torch

from ..outputs import ImagePipelineOutput
from ..pipelines.checks import as_list, check_generators, check_pooled, check_width, negative_texts, prompt_count
from ..pipelines.conditioning import Conditioning
from ..pipelines.guidance import WHOLE, Weakening
from ..pipelines.image import ImagePipeline
from ..pipelines.run import Run
from ..pipelines.tasks import Task, encode_pictures
from ..pipelines.text import encode_clip
from ..schedulers.euler import ExplodingScheduler
from .stable_diffusion import PARTS, StableDiffusion

NOISE_LEVEL_WIDTH = 128
"""Width of the embedding of the noise level of the conditioning latents, which is always zero: ones, then zeros."""


class LatentUpscale(Task):
    """Start from noise at twice the size, with the given latents as extra channels; time is the noise level."""

    name = "latent-upscale"
    needs_image = "upscaling needs a picture or latents"

    def prepare(self, run: Run) -> None:
        pipe = run.pipe
        latents = encode_pictures(run, pipe.image_processor.preprocess(run.args.image))
        enlarged = torch.nn.functional.interpolate(latents, scale_factor=2, mode="nearest")
        run.channels = torch.cat([enlarged] * run.guidance.branches)
        shape = (run.batch, pipe.latent_format.channels, *enlarged.shape[-2:])
        run.latents = self.noise_of_shape(run, shape) * run.scheduler.init_noise_sigma

    def time(self, run: Run) -> torch.Tensor:
        return run.scheduler.sigmas[run.index].to(run.device)


class StableDiffusionLatentUpscalePipeline(
    StableDiffusion,
    task=LatentUpscale(),
    call="prompt image num_inference_steps guidance_scale negative_prompt generator latents prompt_embeds negative_prompt_embeds "
    "pooled_prompt_embeds negative_pooled_prompt_embeds output_type return_dict callback callback_steps",
    extra="callback_on_step_end callback_on_step_end_tensor_inputs guidance_rescale",
    defaults={"num_inference_steps": 75, "guidance_scale": 9.0},
):
    """Latents, or pictures, twice as large."""

    component_names = PARTS
    optional_components = ()
    options = {}
    output = ImagePipelineOutput
    adopts = {}
    safety_checker = None

    def check(self, run: Run) -> None:
        super().check(run)
        args = run.args
        check_pooled(args)
        pooled_width = self.unet.config.time_cond_proj_dim - NOISE_LEVEL_WIDTH
        check_width(args, ("pooled_prompt_embeds", "negative_pooled_prompt_embeds"), pooled_width)
        name = type(self.scheduler).__name__
        if not isinstance(self.scheduler, ExplodingScheduler):
            raise ValueError(f"the latent upscaler works on noise levels, as EulerDiscreteScheduler does, not {name}")
        if self.scheduler.is_flow:
            reason = "a flow mixes the sample away, and this network denoises sample + sigma * noise"
            raise ValueError(f"scheduler={name} is set up for a flow model: {reason}; take EulerDiscreteScheduler without 'shift'")

    def condition(self, run: Run) -> None:
        args = run.args
        run.batch = prompt_count(args)
        check_generators(run)
        embeds, pooled = args.prompt_embeds, args.pooled_prompt_embeds
        if embeds is None:
            prompts = [""] * run.batch if args.guidance_scale == 0 else as_list(args.prompt)
            embeds, pooled = encode_clip(self.tokenizer, self.text_encoder, prompts, layer="last")
        run.guidance = ImagePipeline.choose_guidance(self, run)  # its time condition is no embedded guidance scale
        if run.guidance.branches > 1:
            negative, negative_pooled = args.negative_prompt_embeds, args.negative_pooled_prompt_embeds
            if negative is None:
                negatives = negative_texts(args.negative_prompt, run.batch)
                negative, negative_pooled = encode_clip(self.tokenizer, self.text_encoder, negatives, layer="last")
            embeds, pooled = torch.cat([negative, embeds]), torch.cat([negative_pooled, pooled])
        embeds, pooled = (x.to(run.device, self.compute_dtype) for x in (embeds, pooled))
        half = torch.ones(len(pooled), NOISE_LEVEL_WIDTH // 2, device=run.device, dtype=pooled.dtype)
        time_condition = torch.cat([half, torch.zeros_like(half), pooled], dim=1)
        run.conditioning = Conditioning({"encoder_hidden_states": embeds, "timestep_cond": time_condition})

    def predict(self, x: torch.Tensor, t: torch.Tensor, conditioning: Conditioning, weakening: Weakening = WHOLE) -> torch.Tensor:
        """As the family's, but ``t`` is the noise level sigma (N,), and ``x`` holds ``c_in x`` and the conditioning latents."""
        sigma = t.reshape(-1, *[1] * (x.ndim - 1)).float()
        network = super().predict(x, t.log() * 0.25, conditioning, weakening)
        channels = self.latent_format.channels
        scaled, network = x[:, :channels], network[:, :channels]
        root = (sigma**2 + 1) ** 0.5
        # c_skip x = (c_in x) sqrt(s^2 + 1) / (s^2 + 1); c_out = s / sqrt(s^2 + 1)
        return (scaled / root + network * sigma / root).to(x.dtype)

    def encode_prompt(self, prompts: list[str]) -> Any:  # type: ignore[override]
        """Encodes prompts to token embeddings (B, N, D) and pooled embeddings (B, D)."""
        return encode_clip(self.tokenizer, self.text_encoder, prompts, layer="last")
