"""Attention to picture prompts beside the text's (IP-Adapter, arXiv:2308.06721, section 3.2.2)."""

from __future__ import annotations

from collections.abc import Iterable, Sequence

import torch
import torch.nn.functional as F
from torch import nn

from ...errors import ConfigError
from .attention import Attention, attend
from .compute import Linear
from .joint_attention import JointAttention
from .options import AttentionOptions


class ImagePromptAttention(nn.Module):
    """The decoupled attention of an :class:`~sfumato.models.layers.attention.Attention` to the tokens of picture prompts.

    The queries are those of the attention to the text; keys and values are the IP-Adapter's own (equation 5).

    Args:
        layer: Number of the attention layer among those that IP-Adapters reach.
        width: Of the queries, all heads together.
        contexts: Width of the tokens of each IP-Adapter.
        bias: Of the projections to keys and values.
    """

    attention_backend = "native"

    def __init__(self, layer: int, width: int, contexts: Sequence[int], bias: bool = False) -> None:
        super().__init__()
        self.layer = layer
        self.to_k_ip = nn.ModuleList(Linear(context, width, bias=bias) for context in contexts)
        self.to_v_ip = nn.ModuleList(Linear(context, width, bias=bias) for context in contexts)

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
                where = F.interpolate(options.image_masks[i], size, mode="bicubic").flatten(2).unsqueeze(3)  # (B, count, hw, 1)
                where = F.pad(where, (0, 0, 0, query.shape[1] - where.shape[2]))  # not at tokens of reference pictures
                parts = [(tokens[:, k], own[:, k] * where[:, k]) for k in range(count)]
            else:
                parts = [(tokens.flatten(1, 2), own[:, 0])]
            for part, weight in parts:
                total = total + weight * attend(query, to_k(part), to_v(part), heads, None, self.attention_backend)
        return total.to(query.dtype)


def prompted_layers(network: nn.Module) -> dict[str, Attention | JointAttention]:
    """The attention layers that read the prompt, by name, in the order in which IP-Adapters number them.

    Those to the text in a U-Net, and those of the joint blocks in a transformer.
    """
    found: dict[str, Attention | JointAttention] = {}
    for name, module in network.named_modules():
        if (isinstance(module, Attention) and name.endswith("attn2")) or (
            isinstance(module, JointAttention) and module.to_add_out is not None
        ):
            found[name] = module
    return found


def refuse_image_prompts(tensors: Iterable[str]) -> None:
    """Refuses to save a network, of these names, while IP-Adapters are loaded in it: its checkpoint could not be loaded."""
    if any(".processor." in name for name in tensors):
        raise ConfigError("an IP-Adapter is loaded in this network: save it after `pipe.unload_ip_adapter()`")
