"""Transformers over the pixels of a feature map (arXiv:2112.10752, section 3.3)."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import nn

from .attention import Attention
from .compute import Conv2d, GroupNorm, LayerNorm, Linear
from .options import NO_OPTIONS, AttentionOptions, region_mask
from .resnet import add


class GEGLU(nn.Module):
    """A linear layer gated by the GELU of another (arXiv:2002.05202, equation 6)."""

    def __init__(self, in_dim: int, out_dim: int) -> None:
        super().__init__()
        self.proj = Linear(in_dim, 2 * out_dim)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """``(..., in_dim)`` -> ``(..., out_dim)``."""
        x, gate = self.proj(x).chunk(2, dim=-1)
        gate = F.gelu(gate)
        return x * gate if torch.is_grad_enabled() else gate.mul_(x)


class FeedForward(nn.Module):
    """The transformer's two-layer network, four times as wide inside."""

    def __init__(self, dim: int) -> None:
        super().__init__()
        self.net = nn.Sequential(GEGLU(dim, 4 * dim), nn.Identity(), Linear(4 * dim, dim))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """``(B, N, dim)`` -> the same."""
        gated, _, out = self.net
        return out(gated(x))


class BasicTransformerBlock(nn.Module):
    """Self-attention, attention to the context, feed-forward; each normalised before and added to its input.

    With ``only_cross_attention`` the first attention too looks at the context.
    """

    def __init__(self, dim: int, heads: int, dim_head: int, cross_attention_dim: int | None, only_cross_attention: bool) -> None:
        super().__init__()
        self.only_cross_attention = only_cross_attention
        first_context = cross_attention_dim if only_cross_attention else None
        self.norm1 = LayerNorm(dim)
        self.attn1 = Attention(dim, cross_attention_dim=first_context, heads=heads, dim_head=dim_head)
        self.norm2 = LayerNorm(dim)
        self.attn2 = Attention(dim, cross_attention_dim=cross_attention_dim, heads=heads, dim_head=dim_head)
        self.norm3 = LayerNorm(dim)
        self.ff = FeedForward(dim)

    def forward(
        self, x: torch.Tensor, context: torch.Tensor | None, mask: torch.Tensor | None, context_mask: torch.Tensor | None,
        options: AttentionOptions = NO_OPTIONS, size: tuple[int, int] | None = None,
    ) -> torch.Tensor:  # fmt: skip
        """``x`` (B, N, C), ``context`` (B, M, C'), masks, options and size as in :class:`Attention` -> (B, N, C)."""
        x = add(self.attn1(self.norm1(x), context if self.only_cross_attention else None, mask, options, size), x)
        x = add(self.attn2(self.norm2(x), context, context_mask, options, size), x)
        return add(self.ff(self.norm3(x)), x)


class Transformer2D(nn.Module):
    """A stack of transformer blocks over the pixels of a feature map, added to it.

    With ``linear_projection`` it projects by linear layers instead of 1x1 convolutions: the same but for the weights' shape.
    """

    def __init__(
        self, channels: int, heads: int, cross_attention_dim: int | None, depth: int = 1, groups: int = 32,
        linear_projection: bool = False, only_cross_attention: bool = False,
    ) -> None:  # fmt: skip
        super().__init__()
        dim_head = channels // heads
        inner = heads * dim_head
        self.norm = GroupNorm(groups, channels, eps=1e-6)
        self.linear_projection = linear_projection
        self.proj_in = Linear(channels, inner) if linear_projection else Conv2d(channels, inner, 1)
        blocks = [BasicTransformerBlock(inner, heads, dim_head, cross_attention_dim, only_cross_attention) for _ in range(depth)]
        self.transformer_blocks = nn.ModuleList(blocks)
        self.proj_out = Linear(inner, channels) if linear_projection else Conv2d(inner, channels, 1)

    def forward(
        self, x: torch.Tensor, context: torch.Tensor | None, mask: torch.Tensor | None, context_mask: torch.Tensor | None,
        options: AttentionOptions = NO_OPTIONS,
    ) -> torch.Tensor:  # fmt: skip
        """``x`` (B, C, H, W), ``context`` (B, M, C'), masks and options as in :class:`Attention` -> (B, C, H, W)."""
        size, h = (x.shape[2], x.shape[3]), self.norm(x)
        if options.regions is not None and context is not None:
            context_mask = region_mask(options.regions, *size, context.shape[1])
        h = self.proj_in(_tokens(h)) if self.linear_projection else _tokens(self.proj_in(h))
        for block in self.transformer_blocks:
            if not options.perturbs(block, "skip"):
                h = block(h, context, mask, context_mask, options, size)
        if self.linear_projection:
            h = self.proj_out(h)
        h = h.reshape(len(h), *size, -1).permute(0, 3, 1, 2)
        return x + h if self.linear_projection else add(self.proj_out(h), x)


def _tokens(x: torch.Tensor) -> torch.Tensor:
    """(B, C, H, W) -> (B, HW, C): a view, contiguous when the input is channels-last."""
    return x.permute(0, 2, 3, 1).flatten(1, 2)
