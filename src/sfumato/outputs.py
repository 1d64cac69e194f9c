"""What networks and pipelines return: dataclasses that also answer to indices, keys and unpacking of their set fields."""

from __future__ import annotations

from dataclasses import dataclass, fields
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    import numpy as np
    import torch
    from PIL import Image


class BaseOutput:
    """Lets a dataclass be read as the tuple, or the mapping, of its fields that are not ``None``."""

    def keys(self) -> tuple[str, ...]:
        """Names of the fields that are set."""
        return tuple(f.name for f in fields(self) if getattr(self, f.name) is not None)  # type: ignore[arg-type]

    def to_tuple(self) -> tuple[Any, ...]:
        """Values of the fields that are set."""
        return tuple(getattr(self, name) for name in self.keys())

    def __getitem__(self, key: int | slice | str) -> Any:
        return getattr(self, key) if isinstance(key, str) else self.to_tuple()[key]

    def __iter__(self) -> Any:
        return iter(self.to_tuple())

    def __len__(self) -> int:
        return len(self.keys())


@dataclass
class ImagePipelineOutput(BaseOutput):
    """Pictures of a call: a list of PIL images, or an array ``(B, H, W, C)`` in 0..1, or a tensor ``(B, C, H, W)``."""

    images: list[Image.Image] | np.ndarray | torch.Tensor


@dataclass
class StableDiffusionPipelineOutput(BaseOutput):
    """Pictures, as in :class:`ImagePipelineOutput`, with the safety checker's verdicts, or ``None`` when no checker ran."""

    images: list[Image.Image] | np.ndarray | torch.Tensor
    nsfw_content_detected: list[bool] | None


@dataclass
class FluxPriorReduxPipelineOutput(BaseOutput):
    """What a FLUX.1 pipeline takes instead of a prompt.

    Attributes:
        prompt_embeds: Text and picture tokens (1, N, D).
        pooled_prompt_embeds: Pooled text (1, P).
    """

    prompt_embeds: torch.Tensor
    pooled_prompt_embeds: torch.Tensor
