"""Brownian motion whose increments do not depend on the order or the size of the steps that ask for them."""

from __future__ import annotations

import math
import os

import torch
from torch import Tensor

from ..random import Generators


class BrownianNoise:
    """Standard normal noise from one Brownian motion over an interval of noise levels: torchsde's tree (arXiv:2105.13493).

    A seed fixes the whole path, and each call reads an increment.

    Args:
        like: Sample ``(B, ...)`` whose shape, device and precision the noise gets.
        low, high: Smallest and largest level.
        seed: Of the whole batch, or one per sample.
        generator: Draws the seed where there is none: one, or one per sample; ``None`` for fresh entropy.
    """

    def __init__(
        self, like: Tensor, low: float, high: float, *, seed: int | list[int] | None = None, generator: Generators = None
    ) -> None:
        try:
            from torchsde import BrownianInterval
        except ImportError as error:
            raise ImportError("Brownian noise needs torchsde: `pip install 'sfumato[sde]'`") from error
        if seed is None:
            draws = generator if isinstance(generator, (list, tuple)) else [generator]
            seed = [_draw_seed(g) for g in draws]
        seeds = seed if isinstance(seed, list) else [seed]
        if len(seeds) not in (1, like.shape[0]):
            raise ValueError(f"{len(seeds)} generators or seeds for a batch of {like.shape[0]}: pass one per sample")
        size = tuple(like.shape) if len(seeds) == 1 else (1, *like.shape[1:])
        options = dict(dtype=like.dtype, device=like.device, tol=1e-6, pool_size=24, cache_size=128, halfway_tree=True)
        self._paths = [BrownianInterval(low, high, size=size, entropy=s, **options) for s in seeds]
        self._ends, self._like = (low, high), like

    def __call__(self, start: float, end: float) -> Tensor:
        """Returns the increment between two levels in the interval, in either order, over the root of their distance."""
        low, high = (min(max(level, self._ends[0]), self._ends[1]) for level in sorted((start, end)))
        if high - low < 1e-6 * high:  # nearer than the tree tells apart
            return torch.zeros_like(self._like)
        sign = 1 if start < end else -1
        increment = torch.cat([path(low, high) for path in self._paths])
        return increment.mul_(sign / math.sqrt(abs(end - start)))


def _draw_seed(generator: torch.Generator | None) -> int:
    if generator is None:
        return int.from_bytes(os.urandom(8), "little") >> 1
    return int(torch.randint(2**63 - 1, (), generator=generator, device=generator.device))
