"""Attention to picture prompts beside the text's (IP-Adapter, arXiv:2308.06721, section 3.2.2)."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import ClassVar

import torch
import torch.nn.functional as F
from torch import nn

from .attention import Attention, attend
from .compute import Linear, RMSNorm
from .joint_attention import Joint, JointAttention
from .modulation import Modulation, modulated
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
    joined: ClassVar[bool] = False  # whether pictures stand among the image tokens that are attended to

    def __init__(self, layer: int, width: int, contexts: Sequence[int], bias: bool = False) -> None:
        super().__init__()
        self.layer = layer
        self.to_k_ip = nn.ModuleList(Linear(context, width, bias=bias) for context in contexts)
        self.to_v_ip = nn.ModuleList(Linear(context, width, bias=bias) for context in contexts)

    def forward(self, query: torch.Tensor, heads: int, options: AttentionOptions, size: tuple[int, int] | None) -> torch.Tensor:
        """Queries (B, N, C) of ``size`` = height x width pixels -> what the picture prompts add to the attention's result."""

        def look(i: int, tokens: torch.Tensor) -> torch.Tensor:
            return attend(query, self.to_k_ip[i](tokens), self.to_v_ip[i](tokens), heads, None, self.attention_backend)

        return self.weighted(query, options, size, look)

    def weighted(
        self, query: torch.Tensor, options: AttentionOptions, size: tuple[int, int] | None,
        look: Callable[[int, torch.Tensor], torch.Tensor],
    ) -> torch.Tensor:  # fmt: skip
        """Adds up what ``look`` finds for queries (B, N, C) in tokens of the i-th IP-Adapter, by scales and masks.

        The pictures of an IP-Adapter are attended to together; those with masks each for itself, where its mask holds.
        """
        assert options.image_scales is not None  # they come with the tokens
        scales = options.image_scales[:, self.layer, :, None, None]  # (B, pictures of all adapters, 1, 1)
        total, first = torch.zeros_like(query), 0
        for i, tokens in enumerate(options.image_tokens):
            count = tokens.shape[1]
            own, first = scales[:, first : first + count], first + count
            if options.image_masks:
                where = F.interpolate(options.image_masks[i], size, mode="bicubic").flatten(2).unsqueeze(3)  # (B, count, hw, 1)
                where = F.pad(where, (0, 0, 0, query.shape[1] - where.shape[2]))  # not at tokens of reference pictures
                parts = [(tokens[:, k], own[:, k] * where[:, k]) for k in range(count)]
            else:
                parts = [(tokens.flatten(1, 2), own[:, 0])]
            for part, weight in parts:
                total = total + weight * look(i, part)
        return total.to(query.dtype)


class JointImagePromptAttention(ImagePromptAttention):
    """A second attention of the image tokens of Stable Diffusion 3, to themselves and to the tokens of picture prompts.

    The latter are modulated by the time; queries and keys have a normalisation of their own.

    Args:
        layer, width, contexts: As above.
        dim_head: Width of a head.
        times: Width of what each IP-Adapter makes of the time.
    """

    joined = True

    def __init__(self, layer: int, width: int, contexts: Sequence[int], dim_head: int, times: Sequence[int]) -> None:
        super().__init__(layer, width, contexts)
        self.norm_ip = nn.ModuleList(Modulation(*pair) for pair in zip(contexts, (2,) * len(times), times, strict=True))
        self.norm_q, self.norm_k, self.norm_ip_k = (nn.ModuleList(RMSNorm(dim_head, 1e-6) for _ in contexts) for _ in range(3))

    def forward(  # type: ignore[override]
        self, query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, joint: Joint, attend: Callable[..., torch.Tensor]
    ) -> torch.Tensor:
        """Image tokens (B, N, heads, D), not normalised -> what is added to the result of ``attend`` (B, N, C)."""

        def look(i: int, tokens: torch.Tensor) -> torch.Tensor:
            tokens = modulated(tokens, *self.norm_ip[i](F.silu(joint.options.image_times[i])))
            keys, values = (part(tokens).unflatten(2, query.shape[2:]) for part in (self.to_k_ip[i], self.to_v_ip[i]))
            keys = torch.cat([self.norm_ip_k[i](keys), self.norm_k[i](key)], dim=1)
            # pictures stand where the text does, so that a weakened layer weakens this attention alike
            return attend(self.norm_q[i](query), keys, torch.cat([values, value], dim=1), joint._replace(mask=None))

        return self.weighted(query.flatten(2), joint.options, joint.size, look)


def own_layers(network: nn.Module) -> dict[str, Attention | JointAttention]:
    """The attention layers of a network by module name, without those of a slim side that is joined to it (ControlNet-XS)."""
    return {n: m for n, m in network.named_modules() if isinstance(m, Attention | JointAttention) and "ctrl_" not in n}


def prompted_layers(network: nn.Module) -> dict[str, Attention | JointAttention]:
    """The attention layers that IP-Adapters reach, by name, in the order in which they number them.

    Those to the text in a U-Net, and those of the joint blocks in a transformer: all that have an output projection.
    """
    found: dict[str, Attention | JointAttention] = {}
    for name, module in own_layers(network).items():
        reads_text = isinstance(module, Attention) and name.endswith("attn2")
        if reads_text or (isinstance(module, JointAttention) and isinstance(module.to_out, nn.Sequential)):
            # compiled networks put the one before it, joined ones the other within
            found[name.removeprefix("_orig_mod.").replace("base_", "")] = module
    return found
