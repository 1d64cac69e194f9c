"""Attention to picture prompts beside the text's (IP-Adapter, arXiv:2308.06721, section 3.2.2)."""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import nn

from .attention import Attention, attend
from .compute import Linear
from .options import AttentionOptions


class ImagePromptAttention(nn.Module):
    """The decoupled attention of an :class:`~sfumato.models.layers.attention.Attention` to the tokens of picture prompts.

    The queries are those of the attention to the text; keys and values are the IP-Adapter's own (equation 5).

    Args:
        layer: Number of the attention layer among those that IP-Adapters reach.
        width: Of the queries, all heads together.
        contexts: Width of the tokens of each IP-Adapter.
    """

    def __init__(self, layer: int, width: int, contexts: Sequence[int]) -> None:
        super().__init__()
        self.layer = layer
        self.to_k_ip = nn.ModuleList(Linear(context, width, bias=False) for context in contexts)
        self.to_v_ip = nn.ModuleList(Linear(context, width, bias=False) for context in contexts)

    def forward(self, query: torch.Tensor, heads: int, options: AttentionOptions, size: tuple[int, int] | None) -> torch.Tensor:
        """Queries (B, N, C) of ``size`` = height x width pixels -> what the picture prompts add to the attention's result.

        The pictures of an IP-Adapter are attended to together; those with masks each for itself, where its mask holds.
        """
        assert options.image_scales is not None  # they come with the tokens
        scales = options.image_scales[:, self.layer, :, None, None]  # (B, pictures of all adapters, 1, 1)
        total, first = torch.zeros_like(query), 0
        for i, (tokens, to_k, to_v) in enumerate(zip(options.image_tokens, self.to_k_ip, self.to_v_ip, strict=True)):
            count = tokens.shape[1]
            own, first = scales[:, first : first + count], first + count
            if options.image_masks:
                where = F.interpolate(options.image_masks[i], size, mode="bicubic").flatten(2).unsqueeze(3)  # (B, count, N, 1)
                parts = [(tokens[:, k], own[:, k] * where[:, k]) for k in range(count)]
            else:
                parts = [(tokens.flatten(1, 2), own[:, 0])]
            for part, weight in parts:
                total = total + weight * attend(query, to_k(part), to_v(part), heads)
        return total.to(query.dtype)


def prompted_layers(network: nn.Module) -> dict[str, Attention]:
    """The attention layers of a U-Net that read the prompt, by name, in the order in which IP-Adapters number them."""
    return {n: m for n, m in network.named_modules() if isinstance(m, Attention) and n.endswith("attn2")}
