"""What a step sees: shapes of batches, and which examples stand in them. All of it follows from the seed and the step."""

from __future__ import annotations

import functools
import hashlib
import math
from collections.abc import Sequence

import torch

from ..errors import ConfigError


def generator(seed: int, *labels: object) -> torch.Generator:
    """A generator of its own for each use: ``generator(seed, "noise", step)``."""
    digest = hashlib.blake2b("/".join(map(str, (seed, *labels))).encode(), digest_size=8).digest()
    return torch.Generator().manual_seed(int.from_bytes(digest, "little") >> 1)


def bucket_sizes(resolution: int, multiple: int, ratio: float = 2.0) -> list[tuple[int, int]]:
    """Shapes (width, height) of batches when pictures keep their proportions.

    For each width, the largest height with an area of at most ``resolution**2``; edges are multiples of ``multiple``, and
    proportions lie within ``1 / ratio .. ratio``; at 1 the square alone is left.

    Raises:
        ConfigError: ``resolution`` is no multiple of ``multiple``.
    """
    if resolution % multiple:
        near = max(round(resolution / multiple), 1) * multiple
        raise ConfigError(f"resolution={resolution} must be a multiple of {multiple} for this model, such as {near}")
    sizes = {(resolution, resolution)}
    for width in range(multiple, int(resolution * math.sqrt(ratio)) + 1, multiple):
        height = resolution**2 // width // multiple * multiple
        if height and 1 / ratio <= width / height <= ratio:
            sizes |= {(width, height), (height, width)}
    return sorted(sizes)


def nearest_bucket(width: int, height: int, sizes: Sequence[tuple[int, int]]) -> int:
    """Which of ``sizes`` has the proportions nearest to those of a picture; the larger of equals."""
    wanted = math.log(width / height)
    return min(range(len(sizes)), key=lambda i: (abs(math.log(sizes[i][0] / sizes[i][1]) - wanted), -sizes[i][0] * sizes[i][1]))


class Sampler:
    """Draws batches; ``batch(k)`` is a pure function, so that a position in the data is a number.

    Examples of equal weight come in epochs: each once, in an order of that epoch, the last batch of a bucket filled up with its
    first examples. Examples of several weights are drawn with replacement.

    Args:
        buckets: Examples that fit together, by bucket; none is empty.
        weights: How often an example is drawn.
        size: Of a batch.
        seed: What the order follows from.

    Attributes:
        version: Differs where the examples are others.
    """

    def __init__(self, buckets: Sequence[Sequence[int]], weights: Sequence[float], size: int, seed: int) -> None:
        self.buckets, self.size, self.seed = [torch.tensor(b) for b in buckets], size, seed
        self.version = hashlib.blake2b(repr((list(map(list, buckets)), list(weights))).encode(), digest_size=8).hexdigest()
        self.counts = [math.ceil(len(b) / size) for b in buckets]
        self.epoch = functools.lru_cache(maxsize=1)(self._epoch)
        every = torch.tensor(weights, dtype=torch.float64)
        self.cumulated = None if len(set(weights)) == 1 else [every[b].cumsum(0) for b in self.buckets]

    def batch(self, index: int) -> list[int]:
        """The examples of batch ``index``, counted over all epochs, from one bucket."""
        if self.cumulated is not None:
            draw = generator(self.seed, "examples", index)
            totals = torch.stack([c[-1] for c in self.cumulated]).cumsum(0)
            which = int(torch.searchsorted(totals, torch.rand(1, generator=draw, dtype=torch.float64) * totals[-1], right=True))
            bucket, heights = self.buckets[which], self.cumulated[which]
            places = torch.rand(self.size, generator=draw, dtype=torch.float64) * heights[-1]
            return bucket[torch.searchsorted(heights, places, right=True)].tolist()
        epoch, position = divmod(index, sum(self.counts))
        return self.epoch(epoch)[position]

    def _epoch(self, epoch: int) -> list[list[int]]:
        draw = generator(self.seed, "epoch", epoch)
        batches = []
        for bucket, count in zip(self.buckets, self.counts, strict=True):
            order = bucket[torch.randperm(len(bucket), generator=draw)]
            filled = order.repeat(math.ceil(count * self.size / len(order)))[: count * self.size]
            batches += filled.view(count, self.size).tolist()
        return [batches[i] for i in torch.randperm(len(batches), generator=draw).tolist()]
