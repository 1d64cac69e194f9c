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

    Four frequencies are a product with two small matrices, less work than the Fourier transform.
    """
    if min(x.shape[-2:]) < 2:
        return torch.zeros_like(x)  # they are not apart
    rows, columns = (_projection(size, x) for size in x.shape[-2:])
    # the real part of (Re + i Im) x (Re + i Im)^T
    return rows[0] @ x @ columns[0].T - rows[1] @ x @ columns[1].T


def _projection(size: int, like: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Real and imaginary part of the projection (size, size) on the frequencies -1 and 0."""
    place = torch.arange(size, device=like.device, dtype=like.dtype)
    angle = 2 * math.pi / size * (place[:, None] - place[None, :])
    return (1 + angle.cos()) / size, -angle.sin() / size
