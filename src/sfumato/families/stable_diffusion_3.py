"""Stable Diffusion 3 and 3.5: a multimodal transformer, three text encoders of which any may be missing (arXiv:2403.03206).

Not reproduced, because they are faults: inpainting that decodes without the autoencoder's shift; control pictures drawn from the
global generator (the posterior's mode is taken).
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, ClassVar

import torch
import torch.nn.functional as F

from ..pipelines.adapters import Control
from ..pipelines.checks import as_list, negative_texts
from ..pipelines.conditioning import Conditioning, numbered
from ..pipelines.guidance import WHOLE, Weakening
from ..pipelines.image import attention_options, network_of, region_options
from ..pipelines.run import NEGATIVE_EMBEDS, Named, Run, conditioned, negative
from ..pipelines.text import encode_clips, encode_t5
from .stable_diffusion_3_ip_adapter import SD3PicturePrompts

Texts = str | list[str] | None
Embeds = torch.Tensor | None
PARTS = ("transformer", "scheduler", "vae")
ENCODERS = ("text_encoder", "tokenizer", "text_encoder_2", "tokenizer_2", "text_encoder_3", "tokenizer_3")
PICTURES = ("image_encoder", "feature_extractor")


class StableDiffusion3(SD3PicturePrompts):
    """The family."""

    family = "Stable Diffusion 3"
    component_names: ClassVar[tuple[str, ...]] = (*PARTS, *ENCODERS, *PICTURES)
    optional_components = (*ENCODERS, *PICTURES)
    order = (
        "prompt prompt_2 prompt_3 image mask_image masked_image_latents height width padding_mask_crop strength "
        "num_inference_steps sigmas guidance_scale control_guidance_start control_guidance_end control_image control_mask "
        "controlnet_conditioning_scale controlnet_pooled_projections negative_prompt negative_prompt_2 negative_prompt_3 "
        "num_images_per_prompt generator latents prompt_embeds negative_prompt_embeds pooled_prompt_embeds "
        "negative_pooled_prompt_embeds ip_adapter_image ip_adapter_image_embeds output_type return_dict joint_attention_kwargs "
        "clip_skip callback_on_step_end callback_on_step_end_tensor_inputs max_sequence_length skip_guidance_layers "
        "skip_layer_guidance_scale skip_layer_guidance_stop skip_layer_guidance_start mu pag_scale pag_adaptive_scale"
    )
    arguments = (
        "prompt prompt_2 prompt_3 num_inference_steps sigmas guidance_scale negative_prompt negative_prompt_2 negative_prompt_3 "
        "num_images_per_prompt generator prompt_embeds negative_prompt_embeds pooled_prompt_embeds negative_pooled_prompt_embeds "
        "ip_adapter_image ip_adapter_image_embeds output_type return_dict joint_attention_kwargs clip_skip callback_on_step_end "
        "callback_on_step_end_tensor_inputs max_sequence_length mu prompt_syntax guidance guidance_rescale regions"
    )
    callback_tensors: ClassVar[dict[str, Named]] = {
        "negative_prompt_embeds": NEGATIVE_EMBEDS,
        "pooled_prompt_embeds": conditioned("pooled_projections"),
        "negative_pooled_prompt_embeds": negative("pooled_projections"),
    }

    def predict(self, x: torch.Tensor, t: torch.Tensor, conditioning: Conditioning, weakening: Weakening = WHOLE) -> torch.Tensor:
        inputs = {k: conditioning[k] for k in ("encoder_hidden_states", "pooled_projections")}
        residuals = list(conditioning.several("block_controlnet_hidden_states")) or None
        options = self.told_time(attention_options(conditioning, weakening), t)
        network = network_of(self, weakening)
        return network(
            x, timestep=t, **inputs, block_controlnet_hidden_states=residuals, joint_attention_kwargs=options, return_dict=False
        )[0]

    def control(
        self, run: Run, control: Control, x: torch.Tensor, t: torch.Tensor, conditioning: Conditioning, branches: Sequence[int]
    ) -> dict[str, torch.Tensor]:
        """The residuals of a control network."""
        network, pooled = control.network, conditioning["pooled_projections"]
        given, config = run.args.controlnet_pooled_projections, network.config
        if config.force_zeros_for_pooled_projection or config.extra_conditioning_channels:
            pooled = torch.zeros_like(pooled)
        elif given is not None:
            pooled = given.to(pooled)
        text = None if config.joint_attention_dim is None else conditioning["encoder_hidden_states"]
        picture = torch.cat([control.pictures[0]] * len(branches))
        tokens: dict[str, Any] = {"encoder_hidden_states": text, "pooled_projections": pooled}
        tokens["joint_attention_kwargs"] = None if text is None else region_options(conditioning)
        (residuals,) = network(x, picture, control.scale, **tokens, timestep=t, return_dict=False)
        return numbered("block_controlnet_hidden_states", residuals)

    def control_latents(self, network: Any, image: torch.Tensor, run: Run) -> torch.Tensor:
        """A control picture (B, 3, H, W) in -1..1 as the control network reads it."""
        form = self.latent_format
        shift = 0.0 if network.config.force_zeros_for_pooled_projection else form.shift
        return (form.encode(image, mode=True) - shift) * form.scale

    # --- prompts ----------------------------------------------------------------------------------------------------

    def embed(self, run: Run, guided: bool) -> dict[str, dict[str, torch.Tensor]]:
        args, prompts = run.args, {}
        for name, (states, pooled) in self.encoded_prompts(run, guided).items():
            prompts[name] = {"encoder_hidden_states": states, "pooled_projections": pooled}
        encoding = (args.clip_skip, args.max_sequence_length, args.prompt_syntax)
        self.add_regions(run, prompts, lambda text: self._encode(([text],) * 3, *encoding)[0])
        return prompts

    def _encode(
        self, texts: tuple[list[str], ...], clip_skip: int | None, length: int, syntax: str, least: int = 0
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Tokens of both CLIP models side by side, then T5's (B, N, D), and pooled texts (B, P); zeros for what is missing."""
        count = len(texts[0])
        blank: Any = {"device": self.device, "dtype": self.compute_dtype}
        clips = [(self.tokenizer, self.text_encoder), (self.tokenizer_2, self.text_encoder_2)]
        found: list[torch.Tensor | None] = [None, None]
        states = torch.zeros(count, 77, 0, **blank)
        if present := [(t, e, x) for (t, e), x in zip(clips, texts, strict=False) if e is not None]:
            states, pools = encode_clips(present, clip_skip, syntax, least)
            for i, (_, encoder) in enumerate(clips):
                found[i] = pools.pop(0) if encoder is not None else None
        known = sum(p.shape[1] for p in found if p is not None)
        missing = sum(p is None for p in found)
        gap = (self.transformer.config.pooled_projection_dim - known) // missing if missing else 0
        pooled = [torch.zeros(count, gap, **blank) if p is None else p for p in found]
        before = pooled[0].shape[1] if found[0] is None and found[1] is not None else 0
        if self.text_encoder_3 is None:
            t5 = torch.zeros(count, length, self.transformer.config.joint_attention_dim, **blank)
        else:
            t5 = encode_t5(self.tokenizer_3, self.text_encoder_3, texts[2], length, syntax)
        states = F.pad(states, (before, t5.shape[-1] - states.shape[-1] - before))
        return torch.cat([states.to(t5), t5], dim=1), torch.cat([p.to(t5) for p in pooled], dim=1)

    def encode_prompt(
        self, prompt: Texts, prompt_2: Texts = None, prompt_3: Texts = None, device: torch.device | None = None,
        num_images_per_prompt: int = 1, do_classifier_free_guidance: bool = True, negative_prompt: Texts = None,
        negative_prompt_2: Texts = None, negative_prompt_3: Texts = None, prompt_embeds: Embeds = None,
        negative_prompt_embeds: Embeds = None, pooled_prompt_embeds: Embeds = None, negative_pooled_prompt_embeds: Embeds = None,
        clip_skip: int | None = None, max_sequence_length: int = 256, *, prompt_syntax: str = "plain",
    ) -> tuple[torch.Tensor, Embeds, torch.Tensor, Embeds]:  # fmt: skip
        """Encodes prompts, once for all the pictures of a prompt.

        Returns:
            Embeddings ``(B * num_images_per_prompt, N, D)`` of the prompts and, under guidance, of the negative prompts; then the
            pooled embeddings ``(B * num_images_per_prompt, P)`` of both.
        """

        def encode(texts: tuple[list[str], ...], skip: int | None, least: int = 0) -> tuple[torch.Tensor, torch.Tensor]:
            return self._encode(texts, skip, max_sequence_length, prompt_syntax, least)

        first = as_list(prompt)
        texts = tuple(first if other is None else as_list(other) for other in (prompt, prompt_2, prompt_3))
        if prompt_embeds is None or pooled_prompt_embeds is None:
            prompt_embeds, pooled_prompt_embeds = encode(texts, clip_skip)
        negative, negative_pooled = negative_prompt_embeds, negative_pooled_prompt_embeds
        if do_classifier_free_guidance and (negative is None or negative_pooled is None):
            others = tuple(
                negative_texts(negative_prompt if other is None else other, len(prompt_embeds))
                for other in (negative_prompt, negative_prompt_2, negative_prompt_3)
            )
            negative, negative_pooled = encode(others, None, prompt_embeds.shape[1] - max_sequence_length)
            if first and negative.shape[1] > prompt_embeds.shape[1]:
                prompt_embeds = encode(texts, clip_skip, negative.shape[1] - max_sequence_length)[0]

        if not do_classifier_free_guidance:
            negative = negative_pooled = None
        return self.placed((prompt_embeds, negative, pooled_prompt_embeds, negative_pooled), device, num_images_per_prompt)
