"""The networks of a run: loaded, or built anew from a configuration."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from PIL import Image, ImageOps

from .. import registry
from ..config import read_json
from ..errors import ConfigError, refuse_unknown
from ..hub import Source
from .cache import Rows, cached, fingerprint
from .data import Example
from .sampling import bucket_sizes, nearest_bucket

CACHE_BATCH = 16


def network(kind: str, value: str | dict[str, Any], seed: int, key: str) -> Any:
    """Loads a network, or builds a new one whose weights follow from the seed.

    Args:
        kind: Public class.
        value: Folder or repository, or configuration.
        seed: Of new weights.
        key: Of the settings, for messages.

    Raises:
        ConfigError: A configuration key is unknown, or a value is wrong.
    """
    cls = registry.load(kind)
    if isinstance(value, str):
        return cls.from_pretrained(value)
    refuse_unknown(value, cls._init_parameters(), f"[{key}] is not a configuration of {kind}, which has no key", ConfigError)
    # torch's layers initialise themselves from the global state, which is put back
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        try:
            return cls.from_config(value)
        except ValueError as error:
            raise ConfigError(f"[{key}] cannot be built: {error}") from error


def scheduler(value: str | dict[str, Any] | None, base: Any) -> Any:
    """Loads a scheduler, or makes one from configuration keys over those of ``base``, where there is one."""
    if value is None:
        if base is None:
            raise ConfigError("scheduler is not given: add a table [scheduler], or a model to take it from")
        return base
    if isinstance(value, str):
        source = Source(value)
        value = read_json(source.file("scheduler_config.json"))
        base = None
    name = value.get("_class_name", type(base).__name__ if base is not None else "DDIMScheduler")
    cls = registry.load(name)
    own = {k: v for k, v in value.items() if not k.startswith("_")}
    refuse_unknown(own, cls._init_parameters(), f"[scheduler] is not a configuration of {name}, which has no key", ConfigError)
    return cls.from_config(base.config if base is not None else {}, **own)


class Pictures:
    """Pictures of a data set in batches' shapes, encoded once and kept on disk.

    Args:
        examples: The data.
        folder: Of the cache.
        resolution, multiple, aspect: Of :func:`sfumato.training.sampling.bucket_sizes`; one square bucket without ``aspect``.
        encode: Tensor ``(B, 3, H, W)`` of bytes -> rows ``(B, ...)`` to keep.
        version: What ``encode`` depends on.
    """

    def __init__(
        self, examples: Sequence[Example], folder: Path, resolution: int, multiple: int, aspect: bool, encode: Any, version: Any
    ) -> None:
        sizes = bucket_sizes(resolution, multiple, 2.0 if aspect else 1.0)
        versions = [e.version for e in examples]
        members: dict[tuple[int, int], list[int]] = {}
        if aspect:

            def measure(rows: range) -> Any:
                yield torch.tensor([examples[r].picture().size for r in rows])

            measured = cached(folder / f"sizes-{fingerprint(versions)}", len(examples), measure, "sizes")
            for index, (width, height) in enumerate(measured[range(len(examples))].tolist()):
                members.setdefault(sizes[nearest_bucket(width, height, sizes)], []).append(index)
        else:
            members[sizes[0]] = list(range(len(examples)))
        self.buckets = list(members.values())
        self.places = {index: (b, row) for b, bucket in enumerate(self.buckets) for row, index in enumerate(bucket)}
        self.rows: list[Rows] = []
        for size, bucket in members.items():
            place = folder / f"{size[0]}x{size[1]}-{fingerprint(version, size, [versions[i] for i in bucket])}"

            def compute(rows: range, size: Any = size, bucket: Any = bucket) -> Any:
                for k in range(0, len(rows), CACHE_BATCH):
                    yield encode(as_bytes([examples[bucket[r]].picture() for r in rows[k : k + CACHE_BATCH]], size))

            self.rows.append(cached(place, len(bucket), compute, f"pictures {size[0]}x{size[1]}"))

    def __getitem__(self, examples: Sequence[int]) -> torch.Tensor:
        """The rows of examples of one bucket: ``(len(examples), ...)``."""
        places = [self.places[i] for i in examples]
        return self.rows[places[0][0]][[row for _, row in places]]


def as_bytes(pictures: Sequence[Image.Image], size: tuple[int, int]) -> torch.Tensor:
    """Pictures scaled to cover ``size`` (width, height) and cut to it about the middle: ``(B, 3, H, W)`` uint8."""
    fitted = [ImageOps.fit(picture, size, Image.Resampling.LANCZOS) for picture in pictures]
    flat = torch.stack([torch.frombuffer(bytearray(picture.tobytes()), dtype=torch.uint8) for picture in fitted])
    return flat.view(len(fitted), size[1], size[0], 3).permute(0, 3, 1, 2)


def to_input(pixels: torch.Tensor) -> torch.Tensor:
    """Bytes -> -1..1."""
    return pixels.float() / 127.5 - 1


def held_out_batches(buckets: Sequence[Sequence[int]], size: int) -> list[list[int]]:
    """Every held-out example once, in batches of one shape."""
    return [list(bucket[k : k + size]) for bucket in buckets for k in range(0, len(bucket), size)]
