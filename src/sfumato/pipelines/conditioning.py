"""What a denoiser is told beside latents and time: a frozen map of keyword -> tensor."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence

import torch


class Conditioning(Mapping[str, torch.Tensor]):
    """Tensors for the denoiser by keyword, all with the same batch size in front. Never changed after it is made."""

    def __init__(self, tensors: Mapping[str, torch.Tensor | None] | None = None) -> None:
        self._tensors = {k: v for k, v in (tensors or {}).items() if v is not None}

    def __getitem__(self, key: str) -> torch.Tensor:
        return self._tensors[key]

    def __iter__(self) -> Iterator[str]:
        return iter(self._tensors)

    def __len__(self) -> int:
        return len(self._tensors)

    def replace(self, **tensors: torch.Tensor) -> Conditioning:
        """Returns a copy with some tensors replaced or added."""
        return Conditioning({**self._tensors, **tensors})

    @staticmethod
    def cat(parts: Sequence[Conditioning]) -> Conditioning:
        """Joins along the batch. All parts have the same keywords."""
        if len(parts) == 1:
            return parts[0]
        return Conditioning({k: torch.cat([p[k] for p in parts]) for k in parts[0]})

    def fits(self, other: Conditioning) -> bool:
        """Whether both can share a batch: the same keywords, with the same shapes but for the batch."""
        return self.keys() == other.keys() and all(self[k].shape[1:] == other[k].shape[1:] for k in self)
