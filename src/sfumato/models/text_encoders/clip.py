"""The text half of CLIP (arXiv:2103.00020), with the files and parameter names of ``transformers``' class of this name.

It stands here because importing a model class of ``transformers`` takes longer than loading Stable Diffusion.
"""

from __future__ import annotations

import json
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import nn

from ...config import plain
from ...outputs import BaseOutput
from ..base import ModelMixin
from ..layers.compute import LayerNorm, Linear

_PREFIX = "text_model."


@dataclass
class CLIPTextOutput(BaseOutput):
    """Encoded texts.

    Attributes:
        last_hidden_state: States of the tokens after the final normalisation (B, N, D).
        pooler_output: The end token's state (B, D).
        hidden_states: Input of the first layer and output of each, (B, N, D) each, where they were asked for.
    """

    last_hidden_state: torch.Tensor
    pooler_output: torch.Tensor
    hidden_states: tuple[torch.Tensor, ...] | None = None


@dataclass
class CLIPTextProjectedOutput(BaseOutput):
    """Encoded texts: ``text_embeds`` (B, P), the end token's state in the joint space, and as :class:`CLIPTextOutput`."""

    text_embeds: torch.Tensor
    last_hidden_state: torch.Tensor
    hidden_states: tuple[torch.Tensor, ...] | None = None


class CLIPAttention(nn.Module):
    """Causal self-attention."""

    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.heads = heads
        self.k_proj, self.v_proj = Linear(width, width), Linear(width, width)
        self.q_proj, self.out_proj = Linear(width, width), Linear(width, width)

    def forward(self, x: torch.Tensor, mask: torch.Tensor | None) -> torch.Tensor:
        """``x`` (B, N, D), additive ``mask`` (B, 1, N, N) or ``None`` for a causal one -> (B, N, D)."""
        q, k, v = (p(x).unflatten(-1, (self.heads, -1)).transpose(1, 2) for p in (self.q_proj, self.k_proj, self.v_proj))
        y = F.scaled_dot_product_attention(q, k, v, attn_mask=mask, is_causal=mask is None)
        return self.out_proj(y.transpose(1, 2).flatten(2))


class CLIPMLP(nn.Module):
    """Two linear layers."""

    def __init__(self, width: int, inner: int, act: str) -> None:
        super().__init__()
        self.fc1, self.fc2, self.quick = Linear(width, inner), Linear(inner, width), act == "quick_gelu"

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """(B, N, D) -> (B, N, D)."""
        x = self.fc1(x)
        return self.fc2(x * torch.sigmoid(1.702 * x) if self.quick else F.gelu(x))


class CLIPLayer(nn.Module):
    """Attention and MLP, each after a normalisation, each added."""

    def __init__(self, width: int, heads: int, inner: int, act: str, eps: float) -> None:
        super().__init__()
        self.self_attn, self.mlp = CLIPAttention(width, heads), CLIPMLP(width, inner, act)
        self.layer_norm1, self.layer_norm2 = LayerNorm(width, eps=eps), LayerNorm(width, eps=eps)

    def forward(self, x: torch.Tensor, mask: torch.Tensor | None) -> torch.Tensor:
        """As :class:`CLIPAttention`."""
        x = x + self.self_attn(self.layer_norm1(x), mask)
        return x + self.mlp(self.layer_norm2(x))


def embedding(count: int, width: int) -> nn.Embedding:
    """A table of ``count`` vectors, without torch's initialisation on the meta device, which imports the compiler."""
    weight = torch.empty(count, width)
    return nn.Embedding(count, width, _weight=weight if weight.is_meta else nn.init.normal_(weight, std=0.02))


class CLIPTextModel(ModelMixin):
    """CLIP's text transformer.

    Args:
        vocab_size: Number of tokens.
        hidden_size: Width D.
        intermediate_size: Width inside the MLPs.
        projection_dim: Width of the joint space; information only.
        num_hidden_layers: Layers.
        num_attention_heads: Heads of each.
        max_position_embeddings: Longest text, in tokens.
        hidden_act: ``"quick_gelu"`` or ``"gelu"``.
        layer_norm_eps: Of the normalisations.
        eos_token_id: End token, whose first place is pooled; 2 stands for the highest token, as in the first checkpoints.
    """

    embeddings: nn.ModuleDict
    encoder: nn.ModuleDict
    weights_name = "model.safetensors"
    ignorable_keys = ("position_ids",)

    def __init__(
        self, vocab_size: int = 49408, hidden_size: int = 512, intermediate_size: int = 2048, projection_dim: int = 512,
        num_hidden_layers: int = 12, num_attention_heads: int = 8, max_position_embeddings: int = 77,
        hidden_act: str = "quick_gelu", layer_norm_eps: float = 1e-5, eos_token_id: int = 49407,
    ) -> None:  # fmt: skip
        super().__init__()
        if hidden_act not in ("quick_gelu", "gelu"):
            raise ValueError(f"hidden_act={hidden_act!r} is unknown: expected 'quick_gelu' or 'gelu'")
        tables = {"token_embedding": vocab_size, "position_embedding": max_position_embeddings}
        self.embeddings = nn.ModuleDict({name: embedding(count, hidden_size) for name, count in tables.items()})
        layer = (hidden_size, num_attention_heads, intermediate_size, hidden_act, layer_norm_eps)
        self.encoder = nn.ModuleDict({"layers": nn.ModuleList(CLIPLayer(*layer) for _ in range(num_hidden_layers))})
        self.final_layer_norm = LayerNorm(hidden_size, eps=layer_norm_eps)
        self.eos_token_id = eos_token_id

    def forward(
        self, input_ids: torch.Tensor, attention_mask: torch.Tensor | None = None, output_hidden_states: bool = False
    ) -> CLIPTextOutput:
        """Encodes tokens (B, N); ``attention_mask`` (B, N) is 0 at tokens to leave out."""
        count = input_ids.shape[1]
        positions: Any = self.embeddings["position_embedding"]
        x = self.embeddings["token_embedding"](input_ids) + positions.weight[:count]
        mask = None
        if attention_mask is not None:
            keep = torch.ones(count, count, dtype=torch.bool, device=x.device).tril() & attention_mask[:, None, None, :].bool()
            mask = torch.zeros(keep.shape, dtype=x.dtype, device=x.device).masked_fill(~keep, torch.finfo(x.dtype).min)
        states = [x]
        layers: Any = self.encoder["layers"]
        for layer in layers:
            x = layer(x, mask)
            states.append(x)
        x = self.final_layer_norm(x)
        ends = input_ids if self.eos_token_id == 2 else (input_ids == self.eos_token_id).int()
        pooled = x[torch.arange(len(x), device=x.device), ends.argmax(dim=-1)]
        return CLIPTextOutput(x, pooled, tuple(states) if output_hidden_states else None)

    @classmethod
    def upgrade_state_dict(cls, tensors: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
        return {key.removeprefix(_PREFIX): tensor for key, tensor in tensors.items()}

    @classmethod
    def downgrade_state_dict(cls, tensors: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
        return {key if key.startswith("text_projection") else _PREFIX + key: tensor for key, tensor in tensors.items()}

    def to_json_string(self) -> str:
        config = {k: plain(v) for k, v in sorted(self.config.items()) if not k.startswith("_")}
        return json.dumps({**config, "architectures": [type(self).__name__], "model_type": "clip_text_model"}, indent=2) + "\n"


class CLIPTextModelWithProjection(CLIPTextModel):
    """CLIP's text transformer with the projection of the end token's state into the joint space of texts and pictures.

    Args:
        projection_dim: Width P of the joint space. The others are those of :class:`CLIPTextModel`.
    """

    def __init__(
        self, vocab_size: int = 49408, hidden_size: int = 512, intermediate_size: int = 2048, projection_dim: int = 512,
        num_hidden_layers: int = 12, num_attention_heads: int = 8, max_position_embeddings: int = 77,
        hidden_act: str = "quick_gelu", layer_norm_eps: float = 1e-5, eos_token_id: int = 49407,
    ) -> None:  # fmt: skip
        layers = (num_hidden_layers, num_attention_heads, max_position_embeddings, hidden_act, layer_norm_eps, eos_token_id)
        super().__init__(vocab_size, hidden_size, intermediate_size, projection_dim, *layers)
        self.text_projection = Linear(hidden_size, projection_dim, bias=False)

    def forward(  # type: ignore[override]
        self, input_ids: torch.Tensor, attention_mask: torch.Tensor | None = None, output_hidden_states: bool = False
    ) -> CLIPTextProjectedOutput:
        """As :class:`CLIPTextModel`, with the projected state in place of the pooled one."""
        out = super().forward(input_ids, attention_mask, output_hidden_states)
        return CLIPTextProjectedOutput(self.text_projection(out.pooler_output), out.last_hidden_state, out.hidden_states)
