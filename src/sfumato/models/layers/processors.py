"""The processor interface of the field's attention layers, for callers who bring a processor of their own.

A processor is called as ``processor(attn, hidden_states, encoder_hidden_states=..., attention_mask=...)`` and uses the layer's
projections and the methods here. It stands in place of the layer's own computation, options of the call included.

In joint attention ``encoder_hidden_states`` is the text, and where it is given the answer is a pair, of the image and of the text.
FLUX.1 passes ``image_rotary_emb``, cosines and sines (S, D), besides.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import nn

from ...errors import did_you_mean

Processor = Callable[..., Any]


class AttnProcessor:
    """Stands for the layer's own computation."""

    def __call__(
        self, attn: Any, hidden_states: torch.Tensor, encoder_hidden_states: torch.Tensor | None = None,
        attention_mask: torch.Tensor | None = None, image_rotary_emb: tuple[torch.Tensor, torch.Tensor] | None = None,
    ) -> Any:  # fmt: skip
        """What the layer computes without a processor."""
        rope = {} if image_rotary_emb is None else {"image_rotary_emb": image_rotary_emb}
        return attn.own_forward(hidden_states, encoder_hidden_states, attention_mask, **rope)


class Processable:
    """What an attention layer offers processors."""

    heads: int
    custom_processor: Processor | None = None

    def get_processor(self) -> Processor:
        """The processor in place."""
        return self.custom_processor or AttnProcessor()

    def set_processor(self, processor: Processor) -> None:
        """Puts a processor in place; an :class:`AttnProcessor` undoes it."""
        if not callable(processor):
            raise TypeError(f"processor={processor!r} must be callable: pass AttnProcessor() for the layer's own computation")
        self.custom_processor = None if isinstance(processor, AttnProcessor) else processor

    def prepare_attention_mask(
        self, mask: torch.Tensor | None, target_length: int, batch_size: int, out_dim: int = 3
    ) -> torch.Tensor | None:
        """A mask (B, 1, M) for each head, (B * heads, 1, M), or (B, heads, 1, M) for an ``out_dim`` of 4."""
        if mask is None:
            return None
        wide = mask.unsqueeze(1).expand(-1, self.heads, -1, -1)
        return wide if out_dim == 4 else wide.flatten(0, 1)

    def head_to_batch_dim(self, x: torch.Tensor, out_dim: int = 3) -> torch.Tensor:
        """``(B, N, heads * D)`` -> ``(B * heads, N, D)``, or ``(B, heads, N, D)`` for an ``out_dim`` of 4."""
        split = x.unflatten(2, (self.heads, -1)).transpose(1, 2)
        return split if out_dim == 4 else split.flatten(0, 1)

    def batch_to_head_dim(self, x: torch.Tensor) -> torch.Tensor:
        """Undoes :meth:`head_to_batch_dim`."""
        return x.unflatten(0, (-1, self.heads)).transpose(1, 2).flatten(2)

    def get_attention_scores(self, query: torch.Tensor, key: torch.Tensor, mask: torch.Tensor | None = None) -> torch.Tensor:
        """Attention weights (B * heads, N, M)."""
        scores = query @ key.transpose(-1, -2) * query.shape[-1] ** -0.5
        return (scores if mask is None else scores + mask).float().softmax(dim=-1).to(query.dtype)


def processors(network: nn.Module) -> dict[str, Processor]:
    """The processors of a network's attention layers, by ``<layer>.processor``."""
    return {f"{n}.processor": layer.get_processor() for n, layer in network.named_modules() if isinstance(layer, Processable)}


def set_processors(network: nn.Module, given: Processor | Mapping[str, Processor]) -> None:
    """Puts one processor in all attention layers of a network, or those of a mapping as :func:`processors` returns it.

    Raises:
        ValueError: The network's attention takes none, or the mapping does not name just its layers.
    """
    layers = {f"{n}.processor": layer for n, layer in network.named_modules() if isinstance(layer, Processable)}
    if not layers:
        raise ValueError(f"{type(network).__name__} has no attention, so it takes no processors")
    if not isinstance(given, Mapping):
        given = dict.fromkeys(layers, given)
    for name in given.keys() - layers.keys():
        raise ValueError(f"{name!r} is no attention layer of this network{did_you_mean(name, layers)}")
    if missing := layers.keys() - given.keys():
        raise ValueError(
            f"{len(missing)} attention layers have no processor, {min(missing)!r} first: give one for each, or one for all"
        )
    for name, layer in layers.items():
        layer.set_processor(given[name])
