"""Random numbers that come from given generators and nowhere else: the global random state is neither read nor changed."""

from __future__ import annotations

import functools
import math
import os
from collections.abc import Callable, Sequence

import numpy as np
import torch
from torch import Tensor

Generators = torch.Generator | list[torch.Generator] | None
"""Where noise comes from: one generator for a whole batch, one generator per sample, or ``None`` for fresh entropy."""


def randn(
    shape: Sequence[int],
    *,
    generator: Generators = None,
    device: torch.device | str | None = None,
    dtype: torch.dtype | None = None,
    layout: torch.layout | None = None,
) -> Tensor:
    """Draws standard normal noise.

    A CPU generator draws on the CPU and the result is moved, so a seed gives the same noise on every device.

    Args:
        shape: Of the result; the first dimension is the batch.
        generator: One generator, or a list with one per sample (each draws its own ``(1, ...)``; a list of one draws the whole
            batch). ``None`` draws from a generator seeded by the operating system.
        device: Where the result lies (default CPU).
        dtype: Of the draw and of the result; ``layout`` likewise. The defaults are torch's.

    Raises:
        ValueError: The list's length is not the batch size, or a generator's device can serve neither the CPU nor ``device``.
    """
    layout = layout or torch.strided
    return _draw(lambda s, g: torch.randn(s, generator=g, device=g.device, dtype=dtype, layout=layout), shape, generator, device)


def noise_like(sample: Tensor, generator: Generators, scale: float | Tensor = 1.0) -> Tensor:
    """Draws normal noise of deviation ``scale`` in the shape, the precision and the place of ``sample``."""
    if isinstance(scale, float) and isinstance(generator, torch.Generator) and generator.device == sample.device:
        return torch.empty_like(sample, memory_format=torch.contiguous_format).normal_(0.0, scale, generator=generator)
    return randn(sample.shape, generator=generator, device=sample.device, dtype=sample.dtype) * scale


def rand(shape: Sequence[int], *, generator: Generators = None, device: torch.device | str | None = None) -> Tensor:
    """Draws float32 numbers uniform in 0..1; arguments and errors as of :func:`randn`."""
    return _draw(lambda s, g: torch.rand(s, generator=g, device=g.device), shape, generator, device)


def categorical(probabilities: Tensor, *, generator: Generators = None) -> Tensor:
    """Draws the classes of ``probabilities``, ``(B, N, classes)``, as int64 ``(B, N)``; errors as of :func:`randn`."""
    rest = iter(probabilities.split(1) if isinstance(generator, (list, tuple)) and len(generator) > 1 else [probabilities])

    def draw(shape: tuple[int, ...], source: torch.Generator) -> Tensor:
        p = next(rest).flatten(0, 1).to(source.device)
        if source.device.type != "cpu":
            return torch.multinomial(p, 1, generator=source).view(shape)
        if not p.sum().isfinite():
            raise ValueError("probabilities are not finite: look for NaN or infinite logits in the model's output")
        return torch.cat([_categorical(rows, source) for rows in p.split(32)]).view(shape)  # pieces that stay in the cache

    return _draw(draw, probabilities.shape[:2], generator, probabilities.device)


def _categorical(probabilities: Tensor, source: torch.Generator) -> Tensor:
    """Draws a class per row, twice as fast as and equal to torch's multinomial, which takes its logarithms one by one.

    It is the largest of ``p / e``, where ``e`` are exponential, ``-log(1 - u)``, that is the smallest of ``p / log(1 - u)``.
    """
    uniform = torch.empty(probabilities.shape, dtype=torch.float64).uniform_(generator=source)
    return (probabilities / uniform.neg_().log1p_().to(probabilities.dtype)).argmin(-1)


def _draw(
    draw: Callable[[tuple[int, ...], torch.Generator], Tensor], shape: Sequence[int], generator: Generators,
    device: torch.device | str | None,
) -> Tensor:  # fmt: skip
    """Draws ``shape`` from one generator, or sample by sample from a list, and brings the result to ``device``."""
    place = torch.device(device or "cpu")
    if isinstance(generator, (list, tuple)) and len(generator) == 1:
        generator = generator[0]
    if isinstance(generator, (list, tuple)):
        if len(generator) != shape[0]:
            raise ValueError(f"generator has {len(generator)} entries for a batch of {shape[0]}: pass one generator per sample")
        return torch.cat([_draw(draw, (1, *shape[1:]), g, place) for g in generator])
    if generator is None:
        generator = torch.Generator().manual_seed(_entropy())
    source = generator.device
    if source.type not in ("cpu", place.type):
        raise ValueError(f"a generator on {source} cannot draw for device {place}: use a CPU generator or one on {place.type}")
    return draw(tuple(shape), generator).to(place)


DIGITS = 6
"""Decimal places of the noise levels that are told apart."""


class BrownianNoise:
    """Standard normal noise from one Brownian motion over an interval of noise levels, which a seed fixes.

    Each call reads an increment off a tree of Brownian bridges (arXiv:2105.13493 section 4): the increment of an interval is split
    at its middle with noise from the node's own seed. The path is the one of torchsde's ``BrownianInterval`` with ``halfway_tree``.

    Args:
        like: Sample ``(B, ...)`` whose shape, device and precision the noise gets.
        low, high: Smallest and largest level.
        seed: Of the whole batch, or one per sample.
        generator: Draws the seed where there is none: one, or one per sample; ``None`` for fresh entropy.
    """

    def __init__(
        self, like: Tensor, low: float, high: float, *, seed: int | list[int] | None = None, generator: Generators = None
    ) -> None:
        given = generator if isinstance(generator, (list, tuple)) else [generator]
        seeds = [_draw_seed(g) for g in given] if seed is None else seed if isinstance(seed, list) else [seed]
        draw = functools.partial(_draw_node, like, seeds)
        self._like, self._low, self._high = like, round(low, DIGITS), round(high, DIGITS)
        self._whole = draw().mul_(math.sqrt(self._high - self._low))
        self._halves = functools.lru_cache(maxsize=96)(functools.partial(_split, draw))  # all nodes on the way to two points

    def __call__(self, start: float, end: float) -> Tensor:
        """Returns the increment between two levels in the interval, in either order, over the root of their distance."""
        low, high = (min(max(round(level, DIGITS), self._low), self._high) for level in sorted((start, end)))
        if low == high:
            return torch.zeros_like(self._like)
        increment = self._increment(low, high, 0, 0, self._low, self._high, self._whole)
        return increment * (math.copysign(1, end - start) / math.sqrt(abs(end - start)))

    def _increment(self, low: float, high: float, index: int, depth: int, start: float, end: float, whole: Tensor) -> Tensor:
        """Returns the increment between two levels within a node's interval, of which ``whole`` is the increment."""
        if (low, high) == (start, end):
            return whole
        middle, left, right = self._halves(index, depth, start, end, whole)
        first, second = (2 * index, depth + 1, start, middle, left), (2 * index + 1, depth + 1, middle, end, right)
        if high <= middle:
            return self._increment(low, high, *first)
        if low >= middle:
            return self._increment(low, high, *second)
        return self._increment(low, middle, *first) + self._increment(middle, high, *second)


def _split(
    draw: Callable[..., Tensor], index: int, depth: int, start: float, end: float, whole: Tensor
) -> tuple[float, Tensor, Tensor]:
    """Returns the middle of a node's interval and the increments of both its halves: a Brownian bridge in the middle."""
    middle, width = round((start + end) / 2, DIGITS), end - start
    share = (middle - start) / width
    left = draw(index, depth).mul_(math.sqrt(share * (1 - share) * width)).add_(whole, alpha=share)
    return middle, left, whole - left


def _draw_node(like: Tensor, seeds: list[int], *node: int) -> Tensor:
    """Draws standard normal noise from a node's seeds, one for all samples or one each."""
    states = [np.random.SeedSequence(seed, spawn_key=node, pool_size=24).generate_state(1)[0] for seed in seeds]
    sources = [torch.Generator(like.device).manual_seed(int(state)) for state in states]
    return randn(like.shape, generator=sources, device=like.device, dtype=like.dtype)


def _entropy() -> int:
    return int.from_bytes(os.urandom(8), "little") >> 1


def _draw_seed(generator: torch.Generator | None) -> int:
    if generator is None:
        return _entropy()
    return int(torch.randint(2**63 - 1, (), generator=generator, device=generator.device))
