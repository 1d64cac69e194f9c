"""Layers of k-diffusion's U-Nets: normalisation that the time embedding modulates, and binomial resampling filters."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import nn

from ..layers.attention import Attention
from ..layers.compute import Conv2d
from ..layers.resnet import activation, add


class AdaGroupNorm(nn.Module):
    """Group normalisation, 32 channels a group, whose scale and shift are a linear function of the time embedding."""

    def __init__(self, temb_channels: int, channels: int) -> None:
        super().__init__()
        self.groups = max(1, channels // 32)
        self.linear = nn.Linear(temb_channels, 2 * channels)

    def forward(self, x: torch.Tensor, temb: torch.Tensor) -> torch.Tensor:
        """``x`` (B, C, H, W), ``temb`` (B, T) -> (B, C, H, W)."""
        scale, shift = self.linear(temb)[:, :, None, None].chunk(2, dim=1)
        return F.group_norm(x, self.groups, eps=1e-5) * (1 + scale) + shift


class KResnetBlock(nn.Module):
    """A residual block normalised by :class:`AdaGroupNorm`, of ``mid_channels`` between its convolutions."""

    def __init__(
        self, in_channels: int, mid_channels: int, out_channels: int, temb_channels: int, act: str, dropout: float
    ) -> None:
        super().__init__()
        self.norm1 = AdaGroupNorm(temb_channels, in_channels)
        self.conv1 = Conv2d(in_channels, mid_channels, 3, padding=1)
        self.norm2 = AdaGroupNorm(temb_channels, mid_channels)
        self.dropout = nn.Dropout(dropout)
        self.conv2 = Conv2d(mid_channels, out_channels, 3, padding=1)
        self.nonlinearity = activation(act)
        self.conv_shortcut = Conv2d(in_channels, out_channels, 1, bias=False) if in_channels != out_channels else None

    def forward(self, x: torch.Tensor, temb: torch.Tensor) -> torch.Tensor:
        """``x`` (B, C, H, W), ``temb`` (B, T) -> (B, C', H, W)."""
        h = self.conv1(self.nonlinearity(self.norm1(x, temb)))
        h = self.conv2(self.dropout(self.nonlinearity(self.norm2(h, temb))))
        return add(h, x if self.conv_shortcut is None else self.conv_shortcut(x))


class KAttentionBlock(nn.Module):
    """Optional self-attention, then attention to the context, each after :class:`AdaGroupNorm`."""

    def __init__(
        self, channels: int, head_dim: int, cross_attention_dim: int | None, temb_channels: int, self_attention: bool
    ) -> None:
        super().__init__()
        heads = channels // head_dim
        self.norm1 = self.attn1 = None
        if self_attention:
            self.norm1 = AdaGroupNorm(temb_channels, channels)
            self.attn1 = Attention(channels, heads=heads, dim_head=head_dim, bias=True)
        self.norm2 = AdaGroupNorm(temb_channels, channels)
        # whatever the configuration says of the context's normalisation
        options: Any = {"cross_attention_dim": cross_attention_dim, "cross_attention_norm": "layer_norm"}
        self.attn2 = Attention(channels, heads=heads, dim_head=head_dim, bias=True, **options)

    def forward(
        self, x: torch.Tensor, temb: torch.Tensor, context: torch.Tensor | None, mask: torch.Tensor | None,
        context_mask: torch.Tensor | None,
    ) -> torch.Tensor:  # fmt: skip
        """``x`` (B, C, H, W), ``temb`` (B, T), ``context`` (B, M, C') -> (B, C, H, W)."""
        if self.norm1 is not None and self.attn1 is not None:
            x = self.attn1(self.norm1(x, temb), None, mask) + x
        return self.attn2(self.norm2(x, temb), context, context_mask if context is not None else mask) + x


class BinomialResample(nn.Module):
    """Halves, or doubles if ``up``, with the binomial filter 1, 3, 3, 1 in each direction, free of aliasing.

    ``padding`` is ``"reflect"`` or ``"constant"`` (zeros).
    """

    def __init__(self, up: bool, padding: str) -> None:
        super().__init__()
        self.up, self.padding = up, padding

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """``(B, C, H, W)`` -> ``(B, C, 2H, 2W)`` or ``(B, C, H/2, W/2)``."""
        # 1, 3, 3, 1 as a polynomial: nothing is copied to the device
        steps = torch.arange(4, dtype=x.dtype, device=x.device)
        line = (1 + steps * (3 - steps)) / (4.0 if self.up else 8.0)
        kernel = torch.outer(line, line).expand(x.shape[1], 1, 4, 4)
        x = F.pad(x, (1, 1, 1, 1), mode=self.padding)
        if self.up:
            return F.conv_transpose2d(x, kernel, stride=2, padding=3, groups=x.shape[1])
        return F.conv2d(x, kernel, stride=2, groups=x.shape[1])
