"""FLUX.1: a rectified-flow transformer on packed latents (Black Forest Labs, 2024; Kontext: arXiv:2506.15742).

The guidance scale is an input of the distilled denoiser; guidance by a negative prompt, ``true_cfg_scale``, is another thing.

Quirks, kept because they change the result of valid calls: without own levels the schedule starts from levels spread evenly between
1 and 1 / steps; Kontext takes the mode of its pictures' posterior, and works at an area of one million pixels whatever size is
asked for, its inpainting at the size of the picture; text-to-image alone leaves levels to schedulers with ``use_flow_sigmas``.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, ClassVar

import torch
import torch.nn.functional as F

from ..media.processor import VaeImageProcessor
from ..models.several import Several
from ..pipelines.adapters import Control
from ..pipelines.checks import as_list, negative_texts
from ..pipelines.conditioning import Conditioning, numbered
from ..pipelines.guidance import WHOLE, ClassifierFreeGuidance, Guidance, Weakening
from ..pipelines.image import attention_options, network_of, region_options
from ..pipelines.run import NEGATIVE_EMBEDS, Named, Run
from ..pipelines.text import encode_clip, encode_t5
from .flux_ip_adapter import FluxPicturePrompts

Texts = str | list[str] | None
Embeds = torch.Tensor | None
ENCODERS = ("text_encoder", "tokenizer", "text_encoder_2", "tokenizer_2")
PICTURES = ("image_encoder", "feature_extractor")
RESIDUALS = ("controlnet_block_samples", "controlnet_single_block_samples")


class Flux(FluxPicturePrompts):
    """The family."""

    family = "FLUX.1"
    component_names: ClassVar[tuple[str, ...]] = ("scheduler", "vae", *ENCODERS, "transformer", *PICTURES)
    optional_components = (*ENCODERS, *PICTURES)
    first_sigmas = True
    packed = 4
    order = (
        "prompt prompt_2 negative_prompt negative_prompt_2 true_cfg_scale image mask_image masked_image_latents control_image "
        "height width padding_mask_crop strength num_inference_steps sigmas guidance_scale control_guidance_start "
        "control_guidance_end control_mode controlnet_conditioning_scale num_images_per_prompt generator latents prompt_embeds "
        "pooled_prompt_embeds ip_adapter_image ip_adapter_image_embeds negative_ip_adapter_image negative_ip_adapter_image_embeds "
        "negative_prompt_embeds negative_pooled_prompt_embeds output_type return_dict joint_attention_kwargs "
        "callback_on_step_end callback_on_step_end_tensor_inputs max_sequence_length max_area _auto_resize"
    )
    arguments = (
        "prompt prompt_2 negative_prompt negative_prompt_2 true_cfg_scale num_inference_steps sigmas guidance_scale "
        "num_images_per_prompt generator latents prompt_embeds pooled_prompt_embeds ip_adapter_image ip_adapter_image_embeds "
        "negative_ip_adapter_image negative_ip_adapter_image_embeds negative_prompt_embeds negative_pooled_prompt_embeds "
        "output_type return_dict joint_attention_kwargs callback_on_step_end callback_on_step_end_tensor_inputs "
        "max_sequence_length mu prompt_syntax guidance guidance_rescale regions"
    )
    callback_tensors: ClassVar[dict[str, Named]] = {"negative_prompt_embeds": NEGATIVE_EMBEDS}

    # --- latents ----------------------------------------------------------------------------------------------------

    @property
    def image_processor(self) -> VaeImageProcessor:
        channels = self.latent_format.channels
        return VaeImageProcessor(vae_scale_factor=self.size_multiple, vae_latent_channels=channels, do_convert_rgb=True)

    def default_size(self) -> tuple[int, int]:
        return 128 * self.latent_format.factor, 128 * self.latent_format.factor

    def pack(self, latents: torch.Tensor) -> torch.Tensor:
        """Squares of 2 x 2 latents as tokens: ``(B, C, h, w)`` -> ``(B, h/2 * w/2, 4C)``."""
        batch, channels, height, width = latents.shape
        squares = latents.view(batch, channels, height // 2, 2, width // 2, 2).permute(0, 2, 4, 1, 3, 5)
        return squares.reshape(batch, height // 2 * (width // 2), channels * 4)

    def unpack(self, latents: torch.Tensor, height: int, width: int) -> torch.Tensor:
        if latents.ndim == 4:
            return latents
        batch, _, channels = latents.shape
        squares = latents.view(batch, height // 2, width // 2, channels // 4, 2, 2).permute(0, 3, 1, 4, 2, 5)
        return squares.reshape(batch, channels // 4, height, width)

    # --- predictions ------------------------------------------------------------------------------------------------

    def choose_guidance(self, run: Run) -> Guidance:
        if (given := self.given_guidance(run, "true_cfg_scale", "guidance_rescale")) is not None:
            return given
        args = run.args
        guided = args.true_cfg_scale > 1 and (args.negative_prompt is not None or args.negative_prompt_embeds is not None)
        return ClassifierFreeGuidance(args.true_cfg_scale, guidance_rescale=args.guidance_rescale) if guided else Guidance()

    def predict(self, x: torch.Tensor, t: torch.Tensor, conditioning: Conditioning, weakening: Weakening = WHOLE) -> torch.Tensor:
        height, width = x.shape[-2:]
        tokens, count = self._inputs(x, conditioning), height // 2 * (width // 2)
        others = tokens["hidden_states"].shape[1] - count  # reference pictures, which control networks do not see
        residuals = {name: [F.pad(x, (0, 0, 0, others)) for x in conditioning.several(name)] or None for name in RESIDUALS}
        repeat = "controlnet" in self.component_names and reads_pictures(self.controlnet)
        options = attention_options(conditioning, weakening, (height // 2, width // 2))
        network = network_of(self, weakening)
        out = network(
            timestep=t / 1000, **tokens, **residuals, controlnet_blocks_repeat=repeat, joint_attention_kwargs=options,
            return_dict=False,
        )[0]  # fmt: skip
        return self.unpack(out[:, :count], height, width)

    def _inputs(self, x: torch.Tensor, conditioning: Conditioning) -> dict[str, Any]:
        """Tokens, their places and the other inputs that denoiser and control networks share."""
        tokens, places = [self.pack(x)], [grid(x, 0)]
        for i, picture in enumerate(conditioning.several("references"), 1):
            tokens.append(self.pack(picture))
            places.append(grid(picture, i))
        text = conditioning["encoder_hidden_states"]
        shared = {k: conditioning[k] for k in ("encoder_hidden_states", "pooled_projections", "guidance") if k in conditioning}
        ids = {"img_ids": torch.cat(places), "txt_ids": text.new_zeros(text.shape[1], 3)}
        return {"hidden_states": torch.cat(tokens, dim=1), **shared, **ids}

    def control(
        self, run: Run, control: Control, x: torch.Tensor, t: torch.Tensor, conditioning: Conditioning, branches: Sequence[int]
    ) -> dict[str, torch.Tensor]:
        """The residuals of a control network, those of the prompt for the negative prompt too."""
        network, picture, count = control.network, control.pictures[0], len(branches)
        x, t = x[-run.batch :], t[-run.batch :]
        conditioning = conditioning.branches([count - 1], count, run.batch)
        inputs = self._inputs(x, Conditioning({k: v for k, v in conditioning.items() if not k.startswith("references")}))
        if not network.config.guidance_embeds:
            inputs.pop("guidance", None)
        mode = None if control.kinds is None else torch.full((len(x), 1), control.kinds[0], dtype=torch.long, device=x.device)
        condition = picture if reads_pictures(network) else self.pack(picture)
        found = network(
            controlnet_cond=condition, controlnet_mode=mode, conditioning_scale=control.scale, timestep=t / 1000, **inputs,
            joint_attention_kwargs=region_options(conditioning, (x.shape[2] // 2, x.shape[3] // 2)), return_dict=False,
        )  # fmt: skip
        parts = zip(RESIDUALS, found, strict=True)
        return {k: torch.cat([v] * count) for name, part in parts for k, v in numbered(name, part or ()).items()}

    def control_latents(self, network: Any, image: torch.Tensor, run: Run) -> torch.Tensor:
        """A control picture (B, 3, H, W) in -1..1 as the control network reads it."""
        return image if reads_pictures(network) else self.latent_format.encode(image, run.args.generator)

    # --- prompts ----------------------------------------------------------------------------------------------------

    def embed(self, run: Run, guided: bool) -> dict[str, dict[str, torch.Tensor]]:
        args = run.args
        shared = {"device": run.device, "num_images_per_prompt": args.num_images_per_prompt}
        shared |= {"max_sequence_length": args.max_sequence_length, "prompt_syntax": args.prompt_syntax}
        found = {"positive": (args.prompt, args.prompt_2, args.prompt_embeds, args.pooled_prompt_embeds)}
        if guided:
            count = run.batch // args.num_images_per_prompt
            texts = negative_texts(args.negative_prompt, count)
            second = texts if args.negative_prompt_2 is None else negative_texts(args.negative_prompt_2, count)
            found["negative"] = (texts, second, args.negative_prompt_embeds, args.negative_pooled_prompt_embeds)
        prompts = {}
        for name, (first, second, states, pooled) in found.items():
            encoded = self.encode_prompt(first, second, prompt_embeds=states, pooled_prompt_embeds=pooled, **shared)
            prompts[name] = {"encoder_hidden_states": encoded[0], "pooled_projections": encoded[1]}
            if self.transformer.config.guidance_embeds:
                prompts[name]["guidance"] = torch.full((run.batch,), float(args.guidance_scale), device=run.device)
        encoding = (args.max_sequence_length, args.prompt_syntax)
        self.add_regions(run, prompts, lambda text: encode_t5(self.tokenizer_2, self.text_encoder_2, [text], *encoding))
        return prompts

    def encode_prompt(
        self, prompt: Texts, prompt_2: Texts = None, device: torch.device | None = None, num_images_per_prompt: int = 1,
        prompt_embeds: Embeds = None, pooled_prompt_embeds: Embeds = None, max_sequence_length: int = 512, *,
        prompt_syntax: str = "plain",
    ) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:  # fmt: skip
        """Encodes prompts, once for all the pictures of a prompt.

        Returns:
            T5 embeddings ``(B * num_images_per_prompt, N, D)``, pooled CLIP embeddings ``(B * num_images_per_prompt, P)``, and the
            places ``(N, 3)`` of the text tokens, zeros.
        """
        if prompt_embeds is None or pooled_prompt_embeds is None:
            texts = as_list(prompt)
            pooled_prompt_embeds = encode_clip(self.tokenizer, self.text_encoder, texts, None, prompt_syntax)[1]
            second = texts if prompt_2 is None else as_list(prompt_2)
            prompt_embeds = encode_t5(self.tokenizer_2, self.text_encoder_2, second, max_sequence_length, prompt_syntax)
        states, pooled = self.placed((prompt_embeds, pooled_prompt_embeds), device, num_images_per_prompt)
        return states, pooled, states.new_zeros(states.shape[1], 3)


def grid(latents: torch.Tensor, index: int) -> torch.Tensor:
    """Places of the tokens of latents (B, C, h, w): which picture, row, column, (h/2 * w/2, 3)."""
    rows, columns = latents.shape[-2] // 2, latents.shape[-1] // 2
    row, column = torch.meshgrid(torch.arange(rows), torch.arange(columns), indexing="ij")
    places = torch.stack([torch.full_like(row, index), row, column], dim=-1).reshape(-1, 3)
    return places.to(latents.device, latents.dtype)


def reads_pictures(network: Any) -> bool:
    """Whether a control network reads pictures themselves, rather than latents."""
    first = network.members[0] if isinstance(network, Several) else network
    return first.config.conditioning_embedding_channels is not None
