"""Checks of call arguments that tasks and families share; each names the argument, its value and the remedy."""

from __future__ import annotations

from collections.abc import Sequence
from numbers import Real
from typing import TYPE_CHECKING, Any

import torch

from .text import SYNTAXES

if TYPE_CHECKING:
    from .run import Run


def check_count(args: Any, name: str) -> None:
    """Refuses an argument that is no whole number of at least 1."""
    value = getattr(args, name)
    if not isinstance(value, int) or value < 1:
        raise ValueError(f"{name}={value!r} must be a whole number of at least 1")


def check_strength(run: Run) -> None:
    """Refuses a strength outside 0..1."""
    if not (isinstance(run.args.strength, Real) and 0 <= float(run.args.strength) <= 1):
        raise ValueError(f"strength={run.args.strength!r} must lie in 0..1: 0 keeps the picture, 1 starts from noise")


def check_prompts(args: Any) -> None:
    """Refuses prompts and embeddings that contradict each other or cannot be encoded."""
    if args.prompt_syntax not in SYNTAXES:
        raise ValueError(f"prompt_syntax={args.prompt_syntax!r} is unknown: expected one of {SYNTAXES}")
    if (args.prompt is None) == (args.prompt_embeds is None):
        both = "both" if args.prompt is not None else "neither"
        raise ValueError(f"{both} of prompt and prompt_embeds given: pass exactly one")
    if args.negative_prompt is not None and args.negative_prompt_embeds is not None:
        raise ValueError("both negative_prompt and negative_prompt_embeds are given: pass one")
    for name in ("prompt", "negative_prompt"):
        text, embeds = getattr(args, name), getattr(args, f"{name}_embeds")
        if text is not None and not isinstance(text, str):
            if not isinstance(text, (list, tuple)) or not all(isinstance(item, str) for item in text):
                raise ValueError(f"{name} must be a text or a list of texts, not {type(text).__name__}")
            if not text:
                raise ValueError(f"{name}=[] is empty: pass at least one text")
        if embeds is not None:
            if not (isinstance(embeds, torch.Tensor) and embeds.ndim == 3):
                raise ValueError(f"{name}_embeds must be a tensor (B, N, D), not {getattr(embeds, 'shape', type(embeds).__name__)}")
            if not bool(torch.isfinite(embeds).all()):
                raise ValueError(f"{name}_embeds holds NaN or infinite values: encode the prompt in float32 or bfloat16")
    shapes = [tuple(e.shape) for e in (args.prompt_embeds, args.negative_prompt_embeds) if e is not None]
    if len(set(shapes)) == 2:
        raise ValueError(f"prompt_embeds {shapes[0]} and negative_prompt_embeds {shapes[1]} differ in shape")
    check_count(args, "num_images_per_prompt")


def check_width(args: Any, names: tuple[str, ...], width: int | Sequence[int]) -> None:
    """Refuses embeddings of another width than the denoiser's ``width``, one for all its levels or one for each."""
    widths = {width} if isinstance(width, int) else set(width)
    for name in names:
        embeds = getattr(args, name)
        if embeds is not None and widths != {embeds.shape[-1]}:
            expected = " or ".join(map(str, sorted(widths)))
            raise ValueError(f"{name} is {embeds.shape[-1]} wide, this denoiser reads {expected}: encode with its own text encoder")


def prompt_count(args: Any) -> int:
    """Number of prompts of a call."""
    if args.prompt_embeds is not None:
        return len(args.prompt_embeds)
    return 1 if isinstance(args.prompt, str) else len(args.prompt)


def negative_texts(negative: str | list[str] | None, count: int) -> list[str]:
    """One negative text per prompt."""
    if negative is None or isinstance(negative, str):
        return [negative or ""] * count
    if len(negative) != count:
        raise ValueError(f"negative_prompt has {len(negative)} texts for {count} prompts: pass one text, or one per prompt")
    return list(negative)


def check_generators(run: Run) -> None:
    """Refuses a list of generators that does not have one per picture."""
    generator = run.args.generator
    each = generator if isinstance(generator, (list, tuple)) else [generator]
    if generator is not None and not all(isinstance(g, torch.Generator) for g in each):
        raise TypeError(f"generator={generator!r} must be torch.Generator().manual_seed(seed), or a list of such")
    if isinstance(generator, (list, tuple)) and len(generator) != run.batch:
        raise ValueError(f"{len(generator)} generators for {run.batch} pictures: pass one, or one per picture")


def check_regions(regions: Any) -> None:
    """Refuses regions that are no list of (prompt, mask)."""
    if regions is None:
        return
    pairs = isinstance(regions, (list, tuple)) and regions and all(isinstance(r, tuple) and len(r) == 2 for r in regions)
    if not pairs or not all(isinstance(text, str) for text, _ in regions):
        raise ValueError(f"regions={regions!r} must be a list of (prompt, mask), the mask white where the prompt holds")


def check_fraction(args: Any, name: str) -> None:
    """Refuses a part of the schedule that does not lie between 0 and 1; ``None`` is none."""
    value = getattr(args, name)
    if value is not None and not (isinstance(value, Real) and 0 < float(value) < 1):
        raise ValueError(f"{name}={value!r} must lie between 0 and 1, a part of the schedule")


def check_pooled(args: Any) -> None:
    """Refuses token embeddings without their pooled ones, or the other way round."""
    for name in ("prompt_embeds", "negative_prompt_embeds"):
        pooled = name.replace("prompt", "pooled_prompt")
        if (getattr(args, name) is None) != (getattr(args, pooled) is None):
            raise ValueError(f"{name} and {pooled} belong together: pass both or neither, as encode_prompt returns them")


def as_list(texts: Any) -> list[str]:
    """Texts as a list; nothing is an empty one."""
    return [texts] if isinstance(texts, str) else list(texts or [])
