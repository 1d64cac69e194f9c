"""Rotary position embedding over several axes (arXiv:2104.09864, equation 34; axes as in FLUX.1)."""

from __future__ import annotations

from collections.abc import Sequence

import torch


def rope_table(ids: torch.Tensor, axes_dims: Sequence[int], theta: float = 10000.0) -> torch.Tensor:
    """Cosines and sines of the places of tokens.

    ``ids`` (..., S, axes), a place on each axis -> (..., S, 1, D / 2, 2) float32, D the sum of ``axes_dims``; the 1 is for heads.
    """
    dtype = torch.float32 if ids.device.type == "mps" else torch.float64  # which MPS lacks
    angles = []
    for axis, dim in enumerate(axes_dims):
        frequencies = theta ** (-torch.arange(0, dim, 2, dtype=dtype, device=ids.device) / dim)
        angles.append(ids[..., axis, None].to(dtype) * frequencies)
    angle = torch.cat(angles, dim=-1)
    return torch.stack([angle.cos(), angle.sin()], dim=-1).float().unsqueeze(-3)


def rotate(x: torch.Tensor, table: torch.Tensor) -> torch.Tensor:
    """Rotates each pair of neighbouring channels by its angle: ``x`` (B, S, heads, D), ``table`` of :func:`rope_table`."""
    pairs = x.float().unflatten(-1, (-1, 2))
    if torch.compiler.is_compiling():  # which cannot fuse complex numbers
        (a, b), (cos, sin) = pairs.unbind(-1), table.unbind(-1)
        turned = torch.stack([a * cos - b * sin, a * sin + b * cos], dim=-1)
    else:
        turned = torch.view_as_real(torch.view_as_complex(pairs) * torch.view_as_complex(table))
    return turned.flatten(-2).to(x.dtype)
