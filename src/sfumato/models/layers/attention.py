"""Scaled dot-product attention (arXiv:1706.03762, equation 1): one layer and one place where it is computed."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import nn

from . import backends
from .compute import GroupNorm, Linear
from .options import NO_OPTIONS, AttentionOptions, blur_queries
from .processors import Processable

_OLD_NAMES = {".query.": ".to_q.", ".key.": ".to_k.", ".value.": ".to_v.", ".proj_attn.": ".to_out.0."}


def attend(
    query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, heads: int, mask: torch.Tensor | None = None,
    backend: str = "native",
) -> torch.Tensor:  # fmt: skip
    """Computes multi-head attention; every attention of the networks passes here.

    ``query`` (B, N, heads * D), ``key`` and ``value`` (B, M, heads * D); ``mask``, boolean (true: take part) or additive,
    broadcastable to (B, heads, N, M) -> (B, N, heads * D). ``backend`` is one of :mod:`~sfumato.models.layers.backends`.
    """
    # (B, N, heads * D) -> (B, heads, N, D), views only
    query, key, value = (x.view(*x.shape[:2], heads, -1).transpose(1, 2) for x in (query, key, value))
    return backends.compute(backend, query, key, value, mask).transpose(1, 2).flatten(2)


def additive_mask(mask: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    """Turns a mask (B, M) of 1 (take part) or 0 into a bias (B, 1, M) of 0 or -10000, the value checkpoints were trained with.

    A mask of three dimensions is a bias already; one of another number is a ``ValueError``.
    """
    if mask.dim() == 3:
        return mask
    if mask.dim() != 2:
        raise ValueError(f"an attention mask of shape {tuple(mask.shape)}: expected (batch, keys) or a bias (batch, 1, keys)")
    return ((1 - mask.to(dtype)) * -10000.0).unsqueeze(1)


def upgrade_attention_names(tensors: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """Renames ``query``, ``key``, ``value`` and ``proj_attn``, as early checkpoints call the projections."""

    def renamed(key: str) -> str:
        for old, new in _OLD_NAMES.items():
            key = key.replace(old, new)
        return key

    return {renamed(key): tensor for key, tensor in tensors.items()}


class Attention(nn.Module, Processable):
    """Multi-head attention over tokens or pixels, within the input or towards other tokens.

    Args:
        query_dim, cross_attention_dim: Width of input and output, and of ``encoder_hidden_states`` (by default the same).
        heads, dim_head: Number of heads and width of each.
        bias: Of the query, key and value projections.
        norm_num_groups, eps: Of a group normalisation of the input, ``None`` for none.
        cross_attention_norm: Normalisation of ``encoder_hidden_states``: ``None``, ``"layer_norm"`` or ``"group_norm"``.
        cross_attention_norm_num_groups: Groups of the latter.
        added_kv_proj_dim: Width of tokens that are attended to in addition to the input itself.
        only_cross_attention: With ``added_kv_proj_dim``: attend to the added tokens alone.
        residual_connection, rescale_output_factor: Add the input to the output; divide by this.
    """

    attention_backend = "native"

    def __init__(
        self, query_dim: int, *, cross_attention_dim: int | None = None, heads: int = 8, dim_head: int = 64,
        bias: bool = False, norm_num_groups: int | None = None, eps: float = 1e-5, cross_attention_norm: str | None = None,
        cross_attention_norm_num_groups: int = 32, added_kv_proj_dim: int | None = None, only_cross_attention: bool = False,
        residual_connection: bool = False, rescale_output_factor: float = 1.0,
    ) -> None:  # fmt: skip
        super().__init__()
        inner, context = heads * dim_head, cross_attention_dim or query_dim
        self.heads, self.residual_connection, self.rescale_output_factor = heads, residual_connection, rescale_output_factor
        self.group_norm = GroupNorm(norm_num_groups, query_dim, eps=eps) if norm_num_groups else None
        self.norm_cross = None
        if cross_attention_norm is not None:
            # with added tokens it is those that are normalised
            width = context if added_kv_proj_dim is None else added_kv_proj_dim
            self.norm_cross = _context_norm(cross_attention_norm, width, cross_attention_norm_num_groups)
        self.to_q = Linear(query_dim, inner, bias=bias)
        own_keys = added_kv_proj_dim is None or not only_cross_attention
        self.has_own_keys, self.has_added_keys = own_keys, added_kv_proj_dim is not None
        if own_keys:
            self.to_k = Linear(context, inner, bias=bias)
            self.to_v = Linear(context, inner, bias=bias)
        if added_kv_proj_dim is not None:
            self.add_k_proj = Linear(added_kv_proj_dim, inner)
            self.add_v_proj = Linear(added_kv_proj_dim, inner)
        self.to_out = nn.Sequential(Linear(inner, query_dim), nn.Identity())
        self.spatial_norm: Any = None
        self.norm_q = self.norm_k = None  # callers' processors ask for these
        self.processor: nn.Module | None = None  # attention to picture prompts, while an IP-Adapter is loaded

    def forward(
        self, x: torch.Tensor, encoder_hidden_states: torch.Tensor | None = None, attention_mask: torch.Tensor | None = None,
        options: AttentionOptions = NO_OPTIONS, size: tuple[int, int] | None = None,
    ) -> torch.Tensor:  # fmt: skip
        """What a caller's processor makes of the input, or else :meth:`own_forward`."""
        if self.custom_processor is None:
            return self.own_forward(x, encoder_hidden_states, attention_mask, options, size)
        return self.custom_processor(self, x, encoder_hidden_states=encoder_hidden_states, attention_mask=attention_mask)

    def own_forward(
        self, x: torch.Tensor, encoder_hidden_states: torch.Tensor | None = None, attention_mask: torch.Tensor | None = None,
        options: AttentionOptions = NO_OPTIONS, size: tuple[int, int] | None = None,
    ) -> torch.Tensor:  # fmt: skip
        """Attends from tokens (B, N, C) or pixels (B, C, H, W) to ``encoder_hidden_states`` (B, M, C'), or to ``x`` itself.

        ``attention_mask`` is broadcastable to (B, N, M), boolean or additive. With added tokens it covers those alone.
        ``options`` weaken the layer or add picture prompts; ``size`` is the height and width of N tokens that are pixels.
        """
        residual, pixels = x, x.dim() == 4
        if self.group_norm is not None:
            x = self.group_norm(x) if pixels else self.group_norm(x.transpose(1, 2)).transpose(1, 2)
        if pixels:
            # (B, C, H, W) -> (B, HW, C): a view, contiguous when the input is channels-last
            x = x.permute(0, 2, 3, 1).flatten(1, 2)
        context = x if encoder_hidden_states is None else encoder_hidden_states
        if self.norm_cross is not None and encoder_hidden_states is not None:
            context = self.norm_cross(context)
        if not self.has_added_keys:
            key, value = self.to_k(context), self.to_v(context)
        else:
            key, value = self.add_k_proj(context), self.add_v_proj(context)
            if self.has_own_keys:
                key, value = torch.cat([key, self.to_k(x)], dim=1), torch.cat([value, self.to_v(x)], dim=1)
        if attention_mask is not None:
            attention_mask = _fit_mask(attention_mask, key.shape[1])
        x = self.to_out(self._attend(x, key, value, attention_mask, options, size))
        if pixels:
            x = x.transpose(1, 2).unflatten(2, residual.shape[2:])
        if self.residual_connection:
            x = residual + x
        return x if self.rescale_output_factor == 1.0 else x / self.rescale_output_factor

    def _attend(
        self, x: torch.Tensor, key: torch.Tensor, value: torch.Tensor, mask: torch.Tensor | None, options: AttentionOptions,
        size: tuple[int, int] | None,
    ) -> torch.Tensor:  # fmt: skip
        if options is NO_OPTIONS:
            return attend(self.to_q(x), key, value, self.heads, mask, self.attention_backend)
        if options.perturbs(self, "identity"):
            return value
        query = self.to_q(x)
        if options.perturbation is not None and size is not None and options.perturbs(self, "blur"):
            query = blur_queries(query, *size, options.perturbation.blur_sigma)
        out = attend(query, key, value, self.heads, mask, self.attention_backend)
        if self.processor is not None and options.image_tokens:
            out = out + self.processor(query, self.heads, options, size)
        return out


class _TokenGroupNorm(nn.GroupNorm):
    """Group normalisation of ``(B, M, C)`` tokens: statistics over tokens and the channels of a group."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return super().forward(x.transpose(1, 2)).transpose(1, 2)


def _context_norm(kind: str, width: int, groups: int) -> nn.Module:
    if kind not in ("layer_norm", "group_norm"):
        raise ValueError(f"unknown cross_attention_norm {kind!r}: expected None, 'layer_norm' or 'group_norm'")
    return nn.LayerNorm(width) if kind == "layer_norm" else _TokenGroupNorm(groups, width, eps=1e-5)


def _fit_mask(mask: torch.Tensor, keys: int) -> torch.Tensor:
    """``(B, 1 or N, M)`` -> ``(B, 1, 1 or N, keys)``; keys that the mask does not speak of take part."""
    missing = keys - mask.shape[-1]
    if missing:
        mask = F.pad(mask, (0, missing), value=True if mask.dtype == torch.bool else 0.0)
    return mask.unsqueeze(1)
