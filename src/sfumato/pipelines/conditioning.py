"""What a denoiser is told beside latents and time: a frozen map of keyword -> tensor."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence

import torch


class Conditioning(Mapping[str, torch.Tensor]):
    """Tensors for the denoiser by keyword, all with the same batch size in front. Never changed after it is made.

    A keyword of several tensors is written with numbers: ``residuals.0``, ``residuals.1``; :meth:`several` collects them.
    """

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

    def plus(self, tensors: Mapping[str, torch.Tensor]) -> Conditioning:
        """Returns a copy with tensors added: to those of the same name, as several adapters add their residuals."""
        return Conditioning({**self._tensors, **{k: self._tensors[k] + v if k in self else v for k, v in tensors.items()}})

    def several(self, keyword: str) -> tuple[torch.Tensor, ...]:
        """The tensors ``keyword.0``, ``keyword.1``, ... in order."""
        found: list[torch.Tensor] = []
        while (tensor := self._tensors.get(f"{keyword}.{len(found)}")) is not None:
            found.append(tensor)
        return tuple(found)

    def branches(self, wanted: Sequence[int], count: int, batch: int) -> Conditioning:
        """The wanted ones of ``count`` branches, stacked along the batch; tensors without branches stay as they are."""
        if list(wanted) == list(range(count)):
            return self

        def take(tensor: torch.Tensor) -> torch.Tensor:
            return take_branches(tensor, wanted, batch) if len(tensor) == batch * count else tensor

        return Conditioning({k: take(v) for k, v in self.items()})

    @staticmethod
    def cat(parts: Sequence[Conditioning]) -> Conditioning:
        """Joins along the batch. All parts have the same keywords."""
        if len(parts) == 1:
            return parts[0]
        return Conditioning({k: torch.cat([p[k] for p in parts]) for k in parts[0]})

    def fits(self, other: Conditioning) -> bool:
        """Whether both can share a batch: the same keywords, with the same shapes but for the batch."""
        return self.keys() == other.keys() and all(self[k].shape[1:] == other[k].shape[1:] for k in self)


def take_branches(tensor: torch.Tensor, wanted: Sequence[int], batch: int) -> torch.Tensor:
    """The wanted branches of a tensor that stacks them, ``batch`` rows each."""
    parts = [tensor[b * batch : (b + 1) * batch] for b in wanted]
    return parts[0] if len(parts) == 1 else torch.cat(parts)


def numbered(keyword: str, tensors: Sequence[torch.Tensor]) -> dict[str, torch.Tensor]:
    """``keyword.0``, ``keyword.1``, ... as :meth:`Conditioning.several` reads them."""
    return {f"{keyword}.{i}": tensor for i, tensor in enumerate(tensors)}
