"""The catalogue of call arguments: each name, its meaning and its default, written once for every pipeline.

A public pipeline class lists the names it takes, in the reference's order; its signature and its documentation come from here.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Mapping
from types import SimpleNamespace
from typing import Any, NamedTuple

from ..errors import refuse_unknown
from . import checks as of


class Parameter(NamedTuple):
    """One call argument: its default, what it means, and what refuses values that are not of its kind."""

    default: Any
    doc: str
    check: Callable[[str, Any], Any] | None = None


CATALOGUE: dict[str, Parameter] = {
    "prompt": Parameter(None, "Text to follow, or a list with one text per picture.", of.TEXT),
    "negative_prompt": Parameter(None, "Text to avoid, or a list; used while the guidance scale is above 1.", of.TEXT),
    "prompt_embeds": Parameter(None, "Encoded prompt (B, N, D), instead of `prompt`.", of.TENSOR),
    "negative_prompt_embeds": Parameter(None, "Encoded negative prompt (B, N, D), instead of `negative_prompt`.", of.TENSOR),
    "pooled_prompt_embeds": Parameter(None, "Pooled encoded prompt (B, D), beside `prompt_embeds`.", of.TENSOR),
    "negative_pooled_prompt_embeds": Parameter(None, "Pooled encoded negative prompt (B, D).", of.TENSOR),
    "prompt_2": Parameter(None, "Text for the second text encoder; `prompt` when not given.", of.TEXT),
    "negative_prompt_2": Parameter(None, "Text to avoid for the second text encoder; `negative_prompt` when not given.", of.TEXT),
    "prompt_3": Parameter(None, "Text for the third text encoder; `prompt` when not given.", of.TEXT),
    "negative_prompt_3": Parameter(None, "Text to avoid for the third text encoder; `negative_prompt` when not given.", of.TEXT),
    "max_sequence_length": Parameter(256, "Number of tokens of the T5 text encoder; more is cut, with a warning.", of.LENGTH),
    "true_cfg_scale": Parameter(1.0, "Weight of the prompt against the negative one (arXiv:2207.12598); 1: off.", of.NUMBER),
    "skip_guidance_layers": Parameter(None, "Numbers of blocks to leave out for skip-layer guidance; none when not given."),
    "skip_layer_guidance_scale": Parameter(2.8, "Weight of skip-layer guidance.", of.NUMBER),
    "skip_layer_guidance_start": Parameter(0.01, "Part of the steps, 0 to 1, after which skip-layer guidance acts.", of.UNIT),
    "skip_layer_guidance_stop": Parameter(0.2, "Part of the steps, 0 to 1, before which skip-layer guidance acts.", of.UNIT),
    "mu": Parameter(None, "Shift of the schedule towards noise; by the picture's size when not given.", of.NUMBER),
    "joint_attention_kwargs": Parameter(None, "Keywords for the denoiser's attention layers.", of.KEYWORDS),
    "controlnet_pooled_projections": Parameter(None, "Pooled text (B, D) for the control network alone.", of.TENSOR),
    "max_area": Parameter(1024**2, "Area of the picture in pixels; height and width give its shape.", of.COUNT),
    "_auto_resize": Parameter(True, "Resize reference pictures to the nearest size that the model was trained with.", of.SWITCH),
    "negative_ip_adapter_image": Parameter(None, "Picture prompt of the negative branch; needs a loaded IP-Adapter."),
    "negative_ip_adapter_image_embeds": Parameter(None, "Encoded picture prompts of the negative branch."),
    "denoising_start": Parameter(None, "Part of the schedule, 0 to 1, that a noisy picture has behind it (refiner).", of.FRACTION),
    "denoising_end": Parameter(None, "Part of the schedule, 0 to 1, after which to stop, for a refiner to go on.", of.FRACTION),
    "original_size": Parameter(None, "Height and width that the picture should look to come from; else its own.", of.PAIR),
    "crops_coords_top_left": Parameter((0, 0), "Top and left of the crop that the picture should look like.", of.PAIR),
    "target_size": Parameter(None, "Height and width that the picture should look made for; else its own.", of.PAIR),
    "negative_original_size": Parameter(None, "As `original_size`, of the negative prompt; with `negative_target_size`.", of.PAIR),
    "negative_crops_coords_top_left": Parameter((0, 0), "As `crops_coords_top_left`, of the negative prompt.", of.PAIR),
    "negative_target_size": Parameter(None, "As `target_size`, of the negative prompt; with `negative_original_size`.", of.PAIR),
    "aesthetic_score": Parameter(6.0, "Beauty that the refiner aims at, 1 to 10.", of.NUMBER),
    "negative_aesthetic_score": Parameter(2.5, "Beauty that the refiner avoids.", of.NUMBER),
    "control_image": Parameter(None, "Control picture (edges, depth, pose ...), or a list with one for each network.", of.PICTURES),
    "control_mask": Parameter(None, "Mask of the control picture: white is painted anew, black is kept.", of.PICTURES),
    "control_mode": Parameter(None, "Kind of the control picture, a number, for union networks; a list for several.", of.ANY),
    "controlnet_conditioning_scale": Parameter(1.0, "Weight of the control network's residuals, or one for each network."),
    "guess_mode": Parameter(False, "Follow the control picture even without a prompt: only its branch is steered.", of.SWITCH),
    "control_guidance_start": Parameter(0.0, "Part of the steps, 0 to 1, from which the control network acts.", of.NUMBERS),
    "control_guidance_end": Parameter(1.0, "Part of the steps, 0 to 1, until which the control network acts.", of.NUMBERS),
    "adapter_conditioning_scale": Parameter(1.0, "Weight of the T2I-Adapter's features, or one for each adapter.", of.NUMBERS),
    "adapter_conditioning_factor": Parameter(1.0, "Part of the steps, 0 to 1, until which the T2I-Adapter acts.", of.NUMBERS),
    "image": Parameter(None, "Picture(s) to start from or to condition on: PIL, array or tensor (`load_image`).", of.PICTURES),
    "image_reference": Parameter(None, "Picture(s) to refer to; the picture that is painted on when not given.", of.PICTURES),
    "mask_image": Parameter(None, "Mask: white is painted anew, black is kept.", of.PICTURES),
    "masked_image_latents": Parameter(None, "Latents of the masked picture, instead of encoding it.", of.TENSOR),
    "padding_mask_crop": Parameter(None, "Margin in pixels: work on the masked region, enlarged, and paste it back.", of.INDEX),
    "depth_map": Parameter(None, "Depth (B, H, W), instead of estimating it from the picture.", of.TENSOR),
    "height": Parameter(None, "Height in pixels, a multiple of the autoencoder's factor.", of.COUNT),
    "width": Parameter(None, "Width in pixels, a multiple of the autoencoder's factor.", of.COUNT),
    "strength": Parameter(0.8, "How far to leave the given picture: 0 keeps it, 1 starts from noise.", of.UNIT),
    "num_inference_steps": Parameter(50, "Number of denoising steps.", of.COUNT),
    "timesteps": Parameter(None, "Own timesteps, descending, where the scheduler takes them.", of.DESCENDING),
    "sigmas": Parameter(None, "Own noise levels, descending, where the scheduler takes them.", of.DESCENDING),
    "original_inference_steps": Parameter(None, "Steps of the sampler that the model was distilled from.", of.COUNT),
    "guidance_scale": Parameter(7.5, "Weight of the prompt (classifier-free guidance, arXiv:2207.12598); 1: off.", of.NUMBER),
    "pag_scale": Parameter(3.0, "Weight of perturbed-attention guidance (arXiv:2403.17377); 0 turns it off.", of.NUMBER),
    "pag_adaptive_scale": Parameter(0.0, "What each timestep below 1000 takes from `pag_scale`, down to 0.", of.NUMBER),
    "image_guidance_scale": Parameter(1.5, "Weight of the given picture (arXiv:2211.09800); 1 or more.", of.NUMBER),
    "guidance_rescale": Parameter(0.0, "Against over-exposure under strong guidance (arXiv:2305.08891, 3.4), 0 to 1.", of.UNIT),
    "noise_level": Parameter(20, "Timestep of the noise added to the low-resolution picture.", of.INDEX),
    "num_images_per_prompt": Parameter(1, "Pictures for each prompt.", of.COUNT),
    "batch_size": Parameter(1, "Number of pictures.", of.COUNT),
    "eta": Parameter(0.0, "Amount of fresh noise per step in DDIM (arXiv:2010.02502, eq. 16), 0 to 1.", of.NUMBER),
    "use_clipped_model_output": Parameter(None, "Recompute the noise from the clipped prediction in DDIM.", of.SWITCH),
    "generator": Parameter(None, "`torch.Generator`, or a list with one per picture. The only source of randomness."),
    "latents": Parameter(None, "Own starting noise, in the shape of the latents.", of.TENSOR),
    "ip_adapter_image": Parameter(None, "Picture prompt; needs a loaded IP-Adapter."),
    "ip_adapter_image_embeds": Parameter(None, "Encoded picture prompts; needs a loaded IP-Adapter."),
    "output_type": Parameter("pil", "`pil`, `np` (B, H, W, C), `pt` (B, C, H, W) or `latent`.", of.OUTPUT),
    "return_dict": Parameter(True, "Return an output object; otherwise a tuple.", of.SWITCH),
    "cross_attention_kwargs": Parameter(None, "Keywords for the denoiser's attention layers.", of.KEYWORDS),
    "clip_skip": Parameter(None, "Text-encoder layers to skip from the end.", of.INDEX),
    "callback_on_step_end": Parameter(None, "`f(pipe, index, timestep, tensors) -> tensors` after each step.", of.FUNCTION),
    "callback_on_step_end_tensor_inputs": Parameter(["latents"], "Names of the tensors that the callback receives."),
    "callback": Parameter(None, "`f(index, timestep, latents)` every `callback_steps` steps.", of.FUNCTION),
    "callback_steps": Parameter(1, "Interval of `callback`.", of.COUNT),
    "guidance": Parameter(None, "A guidance object, such as `sfumato.APG(10.0)`, instead of `guidance_scale`."),
    "regions": Parameter(None, "Prompts that hold in part of the picture: a list of (prompt, mask), beside `prompt`."),
    "prompt_syntax": Parameter("plain", "`plain`, or `weighted`: `(word:1.3)`, `(word)`, `[word]`, `BREAK`.", of.SYNTAX),
}


def build_signature(names: str, extra: str = "", defaults: Mapping[str, Any] | None = None) -> inspect.Signature:
    """Builds a call signature.

    Args:
        names: Argument names in order, separated by spaces; a trailing ``!`` marks a required one.
        extra: Names that follow as keyword-only arguments.
        defaults: Defaults that differ from the catalogue's.
    """
    parameters = [inspect.Parameter("self", inspect.Parameter.POSITIONAL_OR_KEYWORD)]
    for kind, text in ((inspect.Parameter.POSITIONAL_OR_KEYWORD, names), (inspect.Parameter.KEYWORD_ONLY, extra)):
        for word in text.split():
            name = word.removesuffix("!")
            default = (defaults or {}).get(name, CATALOGUE[name].default)
            parameters.append(inspect.Parameter(name, kind, default=inspect.Parameter.empty if word.endswith("!") else default))
    return inspect.Signature(parameters)


def document(signature: inspect.Signature) -> str:
    """Writes the ``Args`` section of a call's documentation."""
    lines = [
        f"    {p.name}: {CATALOGUE[p.name].doc}" + ("" if p.default is p.empty else f" Default: {p.default!r}.")
        for p in list(signature.parameters.values())[1:]
    ]
    return "Args:\n" + "\n".join(lines)


def bind(owner: str, signature: inspect.Signature, args: tuple, kwargs: dict[str, Any]) -> SimpleNamespace:
    """Maps the arguments of a call to their names; names outside the signature have the catalogue's defaults."""
    refuse_unknown(kwargs, [*signature.parameters][1:], f"{owner} takes no argument")
    try:
        bound = signature.bind(None, *args, **kwargs)
    except TypeError as error:
        raise TypeError(f"{owner}: {error}") from None
    bound.apply_defaults()
    given = {name: value for name, value in bound.arguments.items() if name != "self"}
    for name, value in given.items():
        if (check := CATALOGUE[name].check) and not (value is None and signature.parameters[name].default is None):
            given[name] = check(name, value)
    return SimpleNamespace(**{name: parameter.default for name, parameter in CATALOGUE.items()} | given)
