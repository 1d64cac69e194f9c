"""Stable Diffusion 1 and 2: latent diffusion with a U-Net and a CLIP text encoder (arXiv:2112.10752).

Quirks, kept because they change the result of valid calls: the constructor sets ``steps_offset`` to 1 and ``clip_sample`` to false
on schedulers that say otherwise, and inpainting skips PNDM's Runge-Kutta steps (``adopts``), but not with adapters; nine-channel
inpainting at strength 1 does not encode its source. Not reproduced, because they are faults: pictures shared out in the order a, b,
a, b over prompts in the order a, a, b, b; inpainting with one generator per picture that draws the source's latents from the first
generator alone.
"""

from __future__ import annotations

from typing import Any, ClassVar

import torch

from ..outputs import StableDiffusionPipelineOutput
from ..pipelines.checks import check_prompts, check_width, negative_texts
from ..pipelines.run import Run
from ..pipelines.text import encode_clip
from .unet import UNetFamily

PARTS = ("vae", "text_encoder", "tokenizer", "unet", "scheduler")
CHECKER = ("safety_checker", "feature_extractor")

Texts = str | list[str] | None


class StableDiffusion(UNetFamily):
    """The family: how its parts are used, whatever the task.

    ``adopts`` is the scheduler configuration that the constructor enforces where the key exists.
    """

    family = "Stable Diffusion"
    component_names: ClassVar[tuple[str, ...]] = (*PARTS, *CHECKER, "image_encoder")
    optional_components: ClassVar[tuple[str, ...]] = (*CHECKER, "image_encoder")
    options = {"requires_safety_checker": True}
    output: ClassVar[type] = StableDiffusionPipelineOutput
    adopts: ClassVar[dict[str, Any]] = {"steps_offset": 1, "clip_sample": False}
    order = (
        "prompt image depth_map mask_image control_image masked_image_latents height width padding_mask_crop strength "
        "num_inference_steps timesteps sigmas guidance_scale negative_prompt num_images_per_prompt eta generator latents "
        "prompt_embeds negative_prompt_embeds ip_adapter_image ip_adapter_image_embeds output_type return_dict callback "
        "callback_steps cross_attention_kwargs guidance_rescale controlnet_conditioning_scale guess_mode control_guidance_start "
        "control_guidance_end adapter_conditioning_scale clip_skip callback_on_step_end callback_on_step_end_tensor_inputs "
        "pag_scale pag_adaptive_scale"
    )
    arguments = (
        "prompt num_inference_steps timesteps sigmas guidance_scale negative_prompt num_images_per_prompt eta generator "
        "prompt_embeds negative_prompt_embeds ip_adapter_image ip_adapter_image_embeds output_type return_dict "
        "cross_attention_kwargs guidance_rescale clip_skip callback_on_step_end callback_on_step_end_tensor_inputs "
        "prompt_syntax callback callback_steps guidance regions"
    )

    def adopt(self) -> None:
        scheduler = self.scheduler
        adopts = {} if self.adapters else self.adopts
        changes = {k: v for k, v in adopts.items() if k in scheduler.config and scheduler.config[k] != v}
        if changes:
            self.scheduler = type(scheduler).from_config({**scheduler.config, **changes})
        if self.safety_checker is not None and self.feature_extractor is None:
            raise ValueError("a safety_checker needs its feature_extractor: pass both, or safety_checker=None")

    def check(self, run: Run) -> None:
        args = run.args
        super().check(run)
        check_prompts(args)
        config = self.unet.config
        check_width(args, ("prompt_embeds", "negative_prompt_embeds"), config.get("encoder_hid_dim") or config.cross_attention_dim)

    def embed(self, run: Run, guided: bool) -> dict[str, dict[str, torch.Tensor]]:
        args, embedded, encoded = run.args, self.guidance_condition(run), self.encoded_prompts(run, guided)
        prompts = {name: {"encoder_hidden_states": states, **embedded} for name, (states,) in encoded.items()}
        self.add_regions(run, prompts, lambda text: self._encode([text], args.clip_skip, args.prompt_syntax))
        return prompts

    def _encode(self, texts: list[str], clip_skip: int | None, syntax: str, length: int = 0) -> torch.Tensor:
        return encode_clip(self.tokenizer, self.text_encoder, texts, clip_skip, syntax, length)[0]

    def encode_prompt(
        self, prompt: Texts, device: torch.device | None = None, num_images_per_prompt: int = 1,
        do_classifier_free_guidance: bool = True, negative_prompt: Texts = None, prompt_embeds: torch.Tensor | None = None,
        negative_prompt_embeds: torch.Tensor | None = None, *, clip_skip: int | None = None, prompt_syntax: str = "plain",
    ) -> tuple[torch.Tensor, torch.Tensor | None]:  # fmt: skip
        """Encodes prompts, once for all the pictures of a prompt.

        Returns:
            Embeddings ``(B * num_images_per_prompt, N, D)`` of the prompts and, under guidance, of the negative prompts.
        """
        device = device or self.device

        def encode(texts: list[str], length: int = 0) -> torch.Tensor:
            return self._encode(texts, clip_skip, prompt_syntax, length)

        negative = negative_prompt_embeds
        if prompt_embeds is None:
            prompts = [prompt] if isinstance(prompt, str) else list(prompt or [])
            prompt_embeds = encode(prompts, 0 if negative is None else negative.shape[1])
        else:
            prompts = [""] * len(prompt_embeds)
        if do_classifier_free_guidance and negative is None:
            negative = encode(negative_texts(negative_prompt, len(prompts)), prompt_embeds.shape[1])
            if negative.shape[1] > prompt_embeds.shape[1]:
                prompt_embeds = encode(prompts, negative.shape[1])

        def place(embeds: torch.Tensor) -> torch.Tensor:
            embeds = embeds.to(device, self.compute_dtype)
            return embeds.repeat_interleave(num_images_per_prompt, dim=0) if num_images_per_prompt > 1 else embeds

        return place(prompt_embeds), place(negative) if do_classifier_free_guidance and negative is not None else None

    def wrap_pictures(self, run: Run, decoded: torch.Tensor) -> Any:
        decoded, flags = self.run_safety_checker(decoded)
        normal = [not flag for flag in flags] if flags is not None else [True] * len(decoded)
        images = self.image_processor.postprocess(decoded, output_type=run.args.output_type, do_denormalize=normal)
        return self.wrap(run, images, flags)

    def wrap(self, run: Run, images: Any, flags: list[bool] | None = None) -> Any:
        if self.output is not StableDiffusionPipelineOutput:
            return super().wrap(run, images)
        return StableDiffusionPipelineOutput(images, flags) if run.args.return_dict else (images, flags)

    def run_safety_checker(self, image: torch.Tensor) -> tuple[torch.Tensor, list[bool] | None]:
        """Blackens pictures (B, 3, H, W) that the checker objects to; returns its verdicts, ``None`` without a checker."""
        if getattr(self, "safety_checker", None) is None:
            return image, None
        pictures = self.image_processor.postprocess(image, output_type="pil")
        pixels = self.feature_extractor(pictures, return_tensors="pt").pixel_values.to(image.device, self.compute_dtype)
        return self.safety_checker(images=image, clip_input=pixels)
