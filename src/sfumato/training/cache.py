"""Tensors computed once and kept on disk: latents, embeddings, pixels."""

from __future__ import annotations

import hashlib
import math
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path

import torch
from torch import nn
from tqdm.auto import tqdm

from ..weights import read_tensors, save_tensors
from .processes import accelerator

SHARD = 512
"""Rows of a file."""


class Rows:
    """Rows of equal shape, mapped from the files that hold them."""

    def __init__(self, shards: list[torch.Tensor]) -> None:
        self.shards = shards

    def __len__(self) -> int:
        return sum(map(len, self.shards))

    def __getitem__(self, rows: Sequence[int]) -> torch.Tensor:
        """Stacks the given rows: ``(len(rows), ...)``."""
        return torch.stack([self.shards[row // SHARD][row % SHARD] for row in rows])


def fingerprint(*parts: object) -> str:
    """A short name of what a cache depends on: texts, numbers, and networks by their weights."""
    digest = hashlib.sha256()
    for part in parts:
        if isinstance(part, nn.Module):
            for name, tensor in part.state_dict().items():
                digest.update(name.encode())
                digest.update(tensor.detach().cpu().contiguous().view(-1).view(torch.uint8).numpy().data)
        else:
            digest.update(repr(part).encode())
    return digest.hexdigest()[:16]


def cached(folder: Path, count: int, compute: Callable[[range], Iterable[torch.Tensor]], what: str) -> Rows:
    """Returns ``count`` rows, computing those that ``folder`` does not hold yet.

    Args:
        folder: Named by a :func:`fingerprint` of all that the rows depend on.
        count: Number of rows.
        compute: Called with a range of rows; yields batches of them, in order.
        what: For the progress bar.
    """
    folder.mkdir(parents=True, exist_ok=True)
    paths = [folder / f"rows-{k:05d}.safetensors" for k in range(math.ceil(count / SHARD))]
    with accelerator().main_process_first():
        missing = [k for k, path in enumerate(paths) if not path.is_file()]
        for k in tqdm(missing, desc=f"caching {what}", unit="file", disable=None):
            rows = torch.cat([batch.cpu() for batch in compute(range(k * SHARD, min(count, (k + 1) * SHARD)))])
            save_tensors({"rows": rows}, folder, paths[k].name)
    return Rows([read_tensors([path])["rows"] for path in paths])
