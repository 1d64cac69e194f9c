"""Brownian motion whose increments do not depend on the order or the size of the steps that ask for them."""

from __future__ import annotations

import functools
import math
import os
from collections.abc import Callable

import numpy as np
import torch
from torch import Tensor

from ..random import Generators, randn

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
        draw = functools.partial(_draw, like, seeds)
        self._like, self._low, self._high = like, round(low, DIGITS), round(high, DIGITS)
        self._whole = draw().mul_(math.sqrt(self._high - self._low))
        self._halves = functools.lru_cache(maxsize=96)(functools.partial(_split, draw))  # all nodes on the way to two points

    def __call__(self, start: float, end: float) -> Tensor:
        """Returns the increment between two levels in the interval, in either order, over the root of their distance."""
        low, high = (min(max(round(level, DIGITS), self._low), self._high) for level in sorted((start, end)))
        if low == high:
            return torch.zeros_like(self._like)
        increment = self._increment(low, high, self._low, self._high, self._whole)
        return increment * (math.copysign(1, end - start) / math.sqrt(abs(end - start)))

    def _increment(
        self, low: float, high: float, start: float, end: float, whole: Tensor, index: int = 0, depth: int = 0
    ) -> Tensor:
        """Returns the increment between two levels within a node's interval, of which ``whole`` is the increment."""
        if (low, high) == (start, end):
            return whole
        middle = round((start + end) / 2, DIGITS)
        left, right = self._halves(index, depth, start, middle, end, whole)
        parts = []
        if low < middle:
            parts.append(self._increment(low, min(high, middle), start, middle, left, 2 * index, depth + 1))
        if high > middle:
            parts.append(self._increment(max(low, middle), high, middle, end, right, 2 * index + 1, depth + 1))
        return parts[0] if len(parts) == 1 else parts[0] + parts[1]


def _split(
    draw: Callable[..., Tensor], index: int, depth: int, start: float, middle: float, end: float, whole: Tensor
) -> tuple[Tensor, Tensor]:
    """Returns the increments of both halves of a node's interval: a Brownian bridge in its middle."""
    share, width = (middle - start) / (end - start), end - start
    left = draw(index, depth).mul_(math.sqrt(share * (1 - share) * width)).add_(whole, alpha=share)
    return left, whole - left


def _draw(like: Tensor, seeds: list[int], *node: int) -> Tensor:
    """Draws standard normal noise from a node's seeds, one for all samples or one each."""
    states = [np.random.SeedSequence(seed, spawn_key=node, pool_size=24).generate_state(1)[0] for seed in seeds]
    sources = [torch.Generator(like.device).manual_seed(int(state)) for state in states]
    return randn(like.shape, generator=sources, device=like.device, dtype=like.dtype)


def _draw_seed(generator: torch.Generator | None) -> int:
    if generator is None:
        return int.from_bytes(os.urandom(8), "little") >> 1
    return int(torch.randint(2**63 - 1, (), generator=generator, device=generator.device))
