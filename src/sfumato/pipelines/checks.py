"""Checks of call arguments that tasks and families share; each names the argument, its value and the remedy."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from numbers import Real
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from PIL import Image

from .text import SYNTAXES

if TYPE_CHECKING:
    from .run import Run


def plain(value: Any) -> Any:
    """Numbers of torch and numpy as Python's own, and rows of them as lists."""
    return value.tolist() if getattr(value, "ndim", 2) < 2 else value


def is_number(value: Any) -> bool:
    """Whether a value is a finite number."""
    return isinstance(value, Real) and math.isfinite(value)


@dataclass(frozen=True)
class Kind:
    """A kind of argument: what to ``expect``, in words, whether a value ``fits``, and the error if it does not."""

    expect: str
    fits: Callable[[Any], bool]
    error: type[Exception] = ValueError

    def __call__(self, name: str, value: Any) -> Any:
        """The value, with Python's own numbers; an error if it is of another kind."""
        found = plain(value)
        if not self.fits(found):
            shown = f"a {type(value).__name__} of shape {tuple(value.shape)}" if getattr(value, "ndim", 0) > 1 else repr(value)
            raise self.error(f"{name}={shown} must be {self.expect}")
        return found


def whole(low: int = 1, high: float = math.inf) -> Kind:
    """Whole numbers."""
    return Kind(
        f"a whole number of at least {low}" + f", at most {high}" * math.isfinite(high),
        lambda v: isinstance(v, int) and low <= v <= high,
    )


def check_number(name: str, value: Any, low: float = -math.inf, high: float = math.inf) -> None:
    """Raises ``ValueError`` unless ``value`` is a finite number in ``low..high``."""
    within = "" if math.isinf(low) and math.isinf(high) else f" in {low:g}..{high:g}"
    Kind(f"a finite number{within}", lambda v: is_number(v) and low <= v <= high)(name, value)


def each(value: Any, fits: Callable[[Any], bool]) -> bool:
    """Whether a value is a list of such that fit, at least one."""
    return isinstance(value, (list, tuple)) and len(value) > 0 and all(map(fits, value))


def is_picture(value: Any) -> bool:
    """Whether a value is a picture, or lists of pictures."""
    filled = isinstance(value, (np.ndarray, torch.Tensor)) and 0 not in value.shape
    return filled or isinstance(value, Image.Image) or each(value, is_picture)


NUMBER, COUNT, INDEX, LENGTH = Kind("a finite number", is_number), whole(), whole(0), whole(1, 512)
UNIT = Kind("a finite number in 0..1", lambda v: is_number(v) and 0 <= v <= 1)
FRACTION = Kind("a number between 0 and 1, a part of the schedule", lambda v: is_number(v) and 0 < v < 1)
NUMBERS = Kind("a finite number, or a list of such", lambda v: is_number(v) or each(v, is_number))
PAIR = Kind("two numbers", lambda v: each(v, is_number) and len(v) == 2)
DESCENDING = Kind("numbers from high to 0", lambda v: each(v, is_number) and [*v, 0] == sorted([*v, 0], reverse=True))
TEXT = Kind("a text or a list of texts", lambda v: isinstance(v, str) or each(v, lambda item: isinstance(item, str)))
SWITCH = Kind("True or False", lambda v: v in (True, False, None))
FUNCTION, KEYWORDS = Kind("a function", callable, TypeError), Kind("a dictionary", lambda v: isinstance(v, dict), TypeError)
PICTURES = Kind("PIL pictures, numpy arrays or torch tensors, one or more (load_image reads files)", is_picture, TypeError)
TENSOR = Kind("a tensor without NaN, from float32 or bfloat16", lambda v: isinstance(v, torch.Tensor) and bool(v.isfinite().all()))
OUTPUT = Kind("'pil', 'np', 'pt' or 'latent'", lambda v: v in ("pil", "np", "pt", "latent"))
SYNTAX = Kind(f"one of {SYNTAXES}", lambda v: v in SYNTAXES)
ANY = Kind("anything", lambda v: True)


def check_prompts(args: Any) -> None:
    """Refuses prompts and embeddings that contradict each other or cannot be encoded."""
    if args.prompt is None and args.prompt_embeds is None:
        raise ValueError("neither of prompt and prompt_embeds given: pass exactly one")
    count = prompt_count(args)
    for name in ("prompt", "negative_prompt"):
        for embeds, sizes in ((f"{name}_embeds", "(B, N, D)"), (name.replace("prompt", "pooled_prompt_embeds"), "(B, D)")):
            value = getattr(args, embeds)
            if value is not None and (value.ndim != sizes.count(",") + 1 or len(value) != max(count, 1)):
                raise ValueError(f"{embeds} has shape {tuple(value.shape)}, expected {sizes}, one row for each of {count} prompts")
        for other in (name, f"{name}_2", f"{name}_3"):
            texts = getattr(args, other)
            if texts is not None and getattr(args, f"{name}_embeds") is not None:
                raise ValueError(f"both {other} and {name}_embeds are given: pass one")
            if len(as_list(texts)) not in (count, 0 if texts is None else count, 1 if name != "prompt" else count):
                raise ValueError(f"{other} has {len(as_list(texts))} texts for {count} prompts: pass as many")
    shapes = [tuple(e.shape) for e in (args.prompt_embeds, args.negative_prompt_embeds) if e is not None]
    if len(set(shapes)) == 2:
        raise ValueError(f"prompt_embeds {shapes[0]} and negative_prompt_embeds {shapes[1]} differ in shape")


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


def check_pooled(args: Any) -> None:
    """Refuses token embeddings without their pooled ones, or the other way round."""
    for name in ("prompt_embeds", "negative_prompt_embeds"):
        pooled = name.replace("prompt", "pooled_prompt")
        if (getattr(args, name) is None) != (getattr(args, pooled) is None):
            raise ValueError(f"{name} and {pooled} belong together: pass both or neither, as encode_prompt returns them")


def as_list(texts: Any) -> list[str]:
    """Texts as a list; nothing is an empty one."""
    return [texts] if isinstance(texts, str) else list(texts or [])
