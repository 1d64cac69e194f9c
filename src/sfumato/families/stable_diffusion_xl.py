"""Stable Diffusion XL, base and refiner: a larger U-Net, two text encoders, sizes as conditions (arXiv:2307.01952).

Quirks, kept because they change the result of calls: a missing negative prompt is zeros, not an encoded empty text, unless
``force_zeros_for_empty_prompt`` is false; ``clip_skip`` spares the negative prompt; text-to-image gives the negative branch sizes
of its own only if both are named, the other tasks always; with ``denoising_start`` a given picture is taken as noisy already.
"""

from __future__ import annotations

from typing import Any, ClassVar

import torch

from ..pipelines.checks import as_list, check_pooled, check_prompts, check_width, negative_texts
from ..pipelines.run import NEGATIVE_EMBEDS, Named, Run, conditioned, negative
from ..pipelines.text import encode_clips
from .unet import UNetFamily

Texts = str | list[str] | None
Embeds = torch.Tensor | None
PARTS = ("vae", "text_encoder", "text_encoder_2", "tokenizer", "tokenizer_2", "unet", "scheduler")
WATERMARK = "add_watermarker=True: pictures are not marked here; leave it out, and mark them with the package invisible-watermark"


class StableDiffusionXL(UNetFamily):
    """The family. ``negative_sizes``: the negative branch has sizes of its own even if none are named."""

    family = "Stable Diffusion XL"
    component_names: ClassVar[tuple[str, ...]] = (*PARTS, "image_encoder", "feature_extractor")
    optional_components: ClassVar[tuple[str, ...]] = (*PARTS[1:5], "image_encoder", "feature_extractor")
    options: ClassVar[dict[str, Any]] = {"force_zeros_for_empty_prompt": True, "add_watermarker": None}
    negative_sizes: ClassVar[bool] = False
    order = (
        "prompt prompt_2 image mask_image control_image masked_image_latents height width padding_mask_crop strength "
        "num_inference_steps timesteps sigmas denoising_start denoising_end guidance_scale image_guidance_scale negative_prompt "
        "negative_prompt_2 num_images_per_prompt eta generator latents prompt_embeds negative_prompt_embeds pooled_prompt_embeds "
        "negative_pooled_prompt_embeds ip_adapter_image ip_adapter_image_embeds output_type return_dict callback callback_steps "
        "cross_attention_kwargs controlnet_conditioning_scale guess_mode control_guidance_start control_guidance_end control_mode "
        "guidance_rescale original_size crops_coords_top_left target_size negative_original_size negative_crops_coords_top_left "
        "negative_target_size aesthetic_score negative_aesthetic_score adapter_conditioning_scale adapter_conditioning_factor "
        "clip_skip callback_on_step_end callback_on_step_end_tensor_inputs pag_scale pag_adaptive_scale"
    )
    arguments = (
        "prompt prompt_2 num_inference_steps timesteps sigmas denoising_end guidance_scale negative_prompt negative_prompt_2 "
        "num_images_per_prompt eta generator prompt_embeds negative_prompt_embeds pooled_prompt_embeds "
        "negative_pooled_prompt_embeds ip_adapter_image ip_adapter_image_embeds output_type return_dict cross_attention_kwargs "
        "guidance_rescale original_size crops_coords_top_left target_size negative_original_size negative_crops_coords_top_left "
        "negative_target_size clip_skip callback_on_step_end callback_on_step_end_tensor_inputs prompt_syntax callback "
        "callback_steps guidance regions"
    )
    callback_tensors: ClassVar[dict[str, Named]] = {
        "negative_prompt_embeds": NEGATIVE_EMBEDS,
        "add_text_embeds": conditioned("text_embeds"),
        "add_time_ids": conditioned("time_ids"),
        "negative_pooled_prompt_embeds": negative("text_embeds"),
        **dict.fromkeys(("negative_add_time_ids", "add_neg_time_ids"), negative("time_ids")),
    }

    def adopt(self) -> None:
        if self._options["add_watermarker"]:
            raise ValueError(WATERMARK)

    def check(self, run: Run) -> None:
        args = run.args
        super().check(run)
        check_prompts(args)
        check_pooled(args)
        check_width(args, ("prompt_embeds", "negative_prompt_embeds"), self.unet.config.cross_attention_dim)
        start, end = args.denoising_start, args.denoising_end
        if start is not None and end is not None and start >= end:
            raise ValueError(f"denoising_start={start} must lie below denoising_end={end}")

    # --- schedule: the base and the refiner share one ------------------------------------------------------------------

    def _cutoff(self, run: Run, fraction: float) -> int:
        """The time at which ``fraction`` of the noise is gone."""
        steps = run.scheduler.config.num_train_timesteps
        return round(steps - fraction * steps)

    def limit(self, run: Run) -> None:
        if run.args.denoising_end is not None:
            kept = int((run.timesteps >= self._cutoff(run, run.args.denoising_end)).sum())
            run.timesteps = run.timesteps[:kept]
            if not kept:
                raise ValueError(f"denoising_end={run.args.denoising_end} comes before the first step: raise it, or the strength")

    def truncate(self, run: Run) -> None:
        if run.args.denoising_start is None:
            super().truncate(run)
            return
        left, order = int((run.timesteps < self._cutoff(run, run.args.denoising_start)).sum()), run.scheduler.order
        if order == 2 and left % 2 == 0:
            left += 1  # a second-order scheduler lists the times between its ends twice: begin at the first of a pair
        run.timesteps = run.scheduler.timesteps[len(run.timesteps) - left :]
        run.scheduler.set_begin_index(len(run.scheduler.timesteps) - left)

    def adds_noise(self, run: Run) -> bool:
        return run.args.denoising_start is None

    # --- conditions -------------------------------------------------------------------------------------------------

    def embed(self, run: Run, guided: bool) -> dict[str, dict[str, torch.Tensor]]:
        args, embedded, prompts = run.args, self.guidance_condition(run), {}
        ids = dict(zip(("positive", "negative"), self.time_ids(run), strict=True))
        for name, (states, pooled) in self.encoded_prompts(run, guided).items():
            check_ids(self.unet.config, len(ids[name]), pooled.shape[1])
            row = torch.tensor([ids[name]], dtype=states.dtype, device=run.device).repeat(run.batch, 1)
            prompts[name] = {"encoder_hidden_states": states, "text_embeds": pooled, "time_ids": row, **embedded}
        self.add_regions(run, prompts, lambda text: self._encode([text], [text], args.clip_skip, args.prompt_syntax)[0])
        return prompts

    def time_ids(self, run: Run) -> tuple[list[float], list[float]]:
        """Sizes as conditions (section 2.2): of the positive and of the negative branch."""
        args, size, scored = run.args, self.task.size(run), bool(self._options.get("requires_aesthetics_score"))
        original, target = args.original_size or size, args.target_size or size
        own = self.negative_sizes or (args.negative_original_size is not None and args.negative_target_size is not None)
        positive = [*original, *args.crops_coords_top_left, *((args.aesthetic_score,) if scored else target)]
        other = args.negative_original_size or original, args.negative_target_size or target
        last = (args.negative_aesthetic_score,) if scored else other[1]
        crops = args.negative_crops_coords_top_left
        if self.negative_sizes and not scored and tuple(crops) == (0, 0):
            crops = args.crops_coords_top_left
        negative = [*other[0], *crops, *last] if own else positive
        return positive, negative

    def _encode(
        self, texts: list[str], texts_2: list[str], clip_skip: int | None, syntax: str, length: int = 0
    ) -> tuple[torch.Tensor, torch.Tensor]:
        parts = (self.tokenizer, self.text_encoder, texts), (self.tokenizer_2, self.text_encoder_2, texts_2)
        states, pooled = encode_clips([part for part in parts if part[1] is not None], clip_skip, syntax, length)
        return states, pooled[-1]

    def encode_prompt(
        self, prompt: Texts, prompt_2: Texts = None, device: torch.device | None = None, num_images_per_prompt: int = 1,
        do_classifier_free_guidance: bool = True, negative_prompt: Texts = None, negative_prompt_2: Texts = None,
        prompt_embeds: Embeds = None, negative_prompt_embeds: Embeds = None, pooled_prompt_embeds: Embeds = None,
        negative_pooled_prompt_embeds: Embeds = None, *, clip_skip: int | None = None, prompt_syntax: str = "plain",
    ) -> tuple[torch.Tensor, Embeds, torch.Tensor, Embeds]:  # fmt: skip
        """Encodes prompts, once for all the pictures of a prompt.

        Returns:
            Embeddings ``(B * num_images_per_prompt, N, D)`` of the prompts and, under guidance, of the negative prompts; then the
            pooled embeddings ``(B * num_images_per_prompt, P)`` of both.
        """

        def encode(length: int) -> tuple[torch.Tensor, torch.Tensor]:
            texts = as_list(prompt)
            return self._encode(texts, texts if prompt_2 is None else as_list(prompt_2), clip_skip, prompt_syntax, length)

        negative, negative_pooled = negative_prompt_embeds, negative_pooled_prompt_embeds
        if prompt_embeds is None or pooled_prompt_embeds is None:
            prompt_embeds, pooled_prompt_embeds = encode(0 if negative is None else negative.shape[1])
        if do_classifier_free_guidance and (negative is None or negative_pooled is None):
            if negative_prompt is None and self._options["force_zeros_for_empty_prompt"]:
                negative, negative_pooled = torch.zeros_like(prompt_embeds), torch.zeros_like(pooled_prompt_embeds)
            else:
                first = negative_texts(negative_prompt, len(prompt_embeds))
                second = first if negative_prompt_2 is None else negative_texts(negative_prompt_2, len(prompt_embeds))
                negative, negative_pooled = self._encode(first, second, None, prompt_syntax, prompt_embeds.shape[1])
                if negative.shape[1] > prompt_embeds.shape[1]:
                    prompt_embeds = encode(negative.shape[1])[0]

        if not do_classifier_free_guidance:
            negative = negative_pooled = None
        return self.placed((prompt_embeds, negative, pooled_prompt_embeds, negative_pooled), device, num_images_per_prompt)


def check_ids(config: Any, count: int, pooled: int) -> None:
    """Refuses another number of sizes and scores than the U-Net was trained with: 6 for the base, 5 for the refiner."""
    expected = (config.projection_class_embeddings_input_dim - pooled) / config.addition_time_embed_dim
    if count != expected:
        scored = count == 5
        raise ValueError(
            f"requires_aesthetics_score={scored} gives {count} sizes and scores, this U-Net reads {expected:g}: "
            f"build the pipeline with requires_aesthetics_score={not scored}"
        )
