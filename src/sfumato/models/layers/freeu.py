"""FreeU (arXiv:2309.11497): on a U-Net's way up, stronger features and weaker skip connections."""

from __future__ import annotations

import math

import torch


def freed(x: torch.Tensor, state: torch.Tensor, skip: torch.Tensor, backbone: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Features ``x`` (B, C, H, W) and the state (B, C', H, W) that joins them -> both, weighed.

    The first half of the features' channels is multiplied by ``backbone`` (B,) (eq. 4), the lowest frequencies of the state by
    ``skip`` (B,) (eqs. 5-6).
    """
    half = x.shape[1] // 2
    x = torch.cat([x[:, :half] * backbone.view(-1, 1, 1, 1).to(x.dtype), x[:, half:]], dim=1)
    rest = (skip.view(-1, 1, 1, 1) - 1) * lowest_frequencies(state.float())
    return x, state + rest.to(state.dtype)


def lowest_frequencies(x: torch.Tensor) -> torch.Tensor:
    """The part of (..., H, W) whose frequencies are -1 and 0 in both directions, the paper's threshold of 1.

    Four frequencies take three waves along each side, less work than the Fourier transform.
    """
    height, width = x.shape[-2:]
    if min(height, width) < 2:
        return torch.zeros_like(x)  # they are not apart
    rows, columns = _waves(height, x), _waves(width, x)
    amplitudes = rows.T @ x @ columns  # (..., 3, 3)
    # along a side, the projection is B (1 + i turn) B^T / size with the waves B; this is the real part of the product of both
    turn = torch.tensor([[0.0, 0.0, 0.0], [0.0, 0.0, 1.0], [0.0, -1.0, 0.0]], device=x.device, dtype=x.dtype)
    return rows @ (amplitudes - turn @ amplitudes @ turn.T) @ columns.T / (height * width)


def _waves(size: int, like: torch.Tensor) -> torch.Tensor:
    """A constant, a cosine and a sine over ``size`` places, (size, 3)."""
    angle = 2 * math.pi / size * torch.arange(size, device=like.device, dtype=like.dtype)
    return torch.stack([torch.ones_like(angle), angle.cos(), angle.sin()], dim=1)
