"""Adaptive layer normalisation: a condition shifts, scales and gates (DiT, arXiv:2212.09748, section 3.2)."""

from __future__ import annotations

import torch
from torch import nn

from .compute import Linear


class Modulation(nn.Module):
    """Reads shifts, scales and gates, ``dim`` wide, from a condition (``width``, else as wide); their order is the checkpoint's."""

    def __init__(self, dim: int, parts: int, width: int | None = None) -> None:
        super().__init__()
        self.parts = parts
        self.linear = Linear(width or dim, parts * dim)

    def forward(self, condition: torch.Tensor) -> tuple[torch.Tensor, ...]:
        """The condition (B, C), activated already -> ``parts`` of (B, 1, C)."""
        return self.linear(condition).unsqueeze(1).chunk(self.parts, dim=2)


def _may_overwrite() -> bool:
    return not (torch.is_grad_enabled() or torch.compiler.is_compiling())


def modulated(x: torch.Tensor, shift: torch.Tensor, scale: torch.Tensor) -> torch.Tensor:
    """Normalises tokens (B, N, C) over their channels, then scales by ``1 + scale`` and shifts, both (B, 1, C)."""
    x = torch.layer_norm(x, x.shape[-1:], eps=1e-6)
    return torch.addcmul(shift, x, 1 + scale, out=x if _may_overwrite() else None)


def add_gated(x: torch.Tensor, gate: torch.Tensor, fresh: torch.Tensor) -> torch.Tensor:
    """Adds to ``x`` (B, N, C) what a layer made, ``fresh``, times ``gate`` (B, 1, C); overwrites ``fresh`` in inference."""
    return torch.addcmul(x, gate, fresh, out=fresh if _may_overwrite() else None)


def within_float16(x: torch.Tensor) -> torch.Tensor:
    """Keeps float16 tokens, which some channels of these networks overflow, below infinity."""
    return x.clamp(-65504, 65504) if x.dtype is torch.float16 else x
