"""FLUX.1 Redux: pictures as prompts for FLUX.1, by SigLIP and a small network (Black Forest Labs, 2024).

It makes no pictures and runs no denoising loop; what it returns is passed on to a FLUX.1 pipeline:
``pipe(**redux(image), guidance_scale=2.5)``.
"""

from __future__ import annotations

from typing import Any, ClassVar

import torch

from ..outputs import FluxPriorReduxPipelineOutput
from ..pipelines.base import DiffusionPipeline
from ..pipelines.checks import as_list
from ..pipelines.text import encode_clip, encode_t5
from .flux import ENCODERS, Embeds, Texts

TOKENS = 512
"""Text tokens before those of the picture; zeros without text encoders."""


class FluxPriorReduxPipeline(DiffusionPipeline):
    """Turns pictures, and perhaps texts, into one prompt for FLUX.1."""

    family = "FLUX.1 Redux"
    component_names: ClassVar[tuple[str, ...]] = ("image_encoder", "feature_extractor", "image_embedder", *ENCODERS)
    optional_components = ENCODERS

    @torch.no_grad()
    def __call__(
        self, image: Any, prompt: Texts = None, prompt_2: Texts = None, prompt_embeds: Embeds = None,
        pooled_prompt_embeds: Embeds = None, prompt_embeds_scale: float | list[float] = 1.0,
        pooled_prompt_embeds_scale: float | list[float] = 1.0, return_dict: bool = True,
    ) -> FluxPriorReduxPipelineOutput | tuple[torch.Tensor, torch.Tensor]:  # fmt: skip
        """Encodes pictures; several are blended into one prompt.

        Args:
            image: Picture, or list of pictures.
            prompt, prompt_2: Text beside each picture, one or one for each; needs the text encoders.
            prompt_embeds, pooled_prompt_embeds: Encoded texts (B, M, D) and (B, P), instead of ``prompt``.
            prompt_embeds_scale, pooled_prompt_embeds_scale: Weight of each picture's tokens, and of its pooled text.
            return_dict: Return an output object; otherwise a tuple.

        Raises:
            ValueError: The numbers of pictures, texts and weights differ, or a text meets no text encoder.
        """
        images = list(image) if isinstance(image, (list, tuple)) else [image]
        count, weight = len(images), next(self.image_encoder.parameters())
        pixels = self.feature_extractor.preprocess(images=images, return_tensors="pt").pixel_values
        features = self.image_encoder(pixels.to(weight.device, weight.dtype)).last_hidden_state
        tokens = self.image_embedder(features).image_embeds  # (B, N, D)
        if prompt_embeds is None or pooled_prompt_embeds is None:
            prompt_embeds, pooled_prompt_embeds = self._texts(prompt, prompt_2, count, tokens)
        scales = [prompt_embeds_scale, pooled_prompt_embeds_scale]
        for name, rows in (("prompt", len(prompt_embeds)), *(("scale", len(s)) for s in scales if isinstance(s, list))):
            if rows != count:
                raise ValueError(f"{rows} {name}s for {count} pictures: pass one for each")
        joined = torch.cat([prompt_embeds.to(tokens), tokens], dim=1)
        weights = [torch.tensor(s if isinstance(s, list) else [s] * count).to(joined) for s in scales]
        states = (joined * weights[0][:, None, None]).sum(dim=0, keepdim=True)
        pooled = (pooled_prompt_embeds.to(tokens) * weights[1][:, None]).sum(dim=0, keepdim=True)
        return FluxPriorReduxPipelineOutput(states, pooled) if return_dict else (states, pooled)

    def _texts(self, prompt: Texts, prompt_2: Texts, count: int, tokens: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        if self.text_encoder is None or self.text_encoder_2 is None:
            if prompt is not None:
                raise ValueError(f"prompt={prompt!r}: this pipeline has no text encoders; load it with those of FLUX.1")
            return tokens.new_zeros(count, TOKENS, tokens.shape[-1]), tokens.new_zeros(count, 768)
        first = as_list("" if prompt is None else prompt)
        first = first * count if len(first) == 1 else first
        second = first if prompt_2 is None else as_list(prompt_2)
        second = second * count if len(second) == 1 else second
        pooled = encode_clip(self.tokenizer, self.text_encoder, first)[1]
        return encode_t5(self.tokenizer_2, self.text_encoder_2, second, TOKENS), pooled
