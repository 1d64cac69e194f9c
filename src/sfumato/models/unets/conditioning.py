"""How a conditional U-Net (and a network that follows one) turns times, classes, texts and pictures into embeddings."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping

import torch
from torch import nn

from ...errors import ConfigError, check_choice, did_you_mean
from ..layers.attention import additive_mask
from ..layers.embeddings import (
    GaussianFourierProjection,
    ImageProjection,
    ImageTimeEmbedding,
    TextImageProjection,
    TextImageTimeEmbedding,
    TextTimeEmbedding,
    TimestepEmbedding,
    sinusoids,
    time_tensor,
)
from ..layers.options import AttentionOptions
from ..layers.resnet import activation
from .base import UNetBase
from .blocks import Conditions, Level, MidBlock, Shared

ADDED_INPUTS: dict[str | None, tuple[str, ...]] = {
    None: (), "text": (), "text_image": ("text_embeds", "image_embeds"), "text_time": ("text_embeds", "time_ids"),
    "image": ("image_embeds",), "image_hint": ("image_embeds", "hint"),
}  # fmt: skip
"""``addition_embed_type`` -> what ``added_cond_kwargs`` must hold."""

TOKEN_INPUTS: dict[str | None, tuple[str, ...]] = {
    None: (), "text_proj": (), "text_image_proj": ("image_embeds",), "image_proj": ("image_embeds",),
}  # fmt: skip
"""``encoder_hid_dim_type`` -> what ``added_cond_kwargs`` must hold."""

_MID_BLOCKS = {"UNetMidBlock2DCrossAttn": "transformer", "UNetMidBlock2DSimpleCrossAttn": "added", "UNetMidBlock2D": None}
_CLASS_TYPES = (None, "timestep", "identity", "projection", "simple_projection")


def text_and_sizes(added: Mapping[str, torch.Tensor], dim: int, flip_sin_to_cos: bool, freq_shift: float) -> torch.Tensor:
    """What ``"text_time"`` embeds: the pooled text and the sizes, each number of them as ``dim`` sinusoids, (B, C + 6 * dim)."""
    ids = added["time_ids"]
    sizes = sinusoids(ids.flatten(), dim, flip_sin_to_cos, freq_shift)
    # (B * 6, D) -> (B, 6 * D)
    return torch.cat([added["text_embeds"], sizes.reshape(ids.shape[0], -1)], dim=-1)


class ConditionedUNet(UNetBase):
    """A U-Net with the embeddings of the conditional models; built from the configuration, by its key names."""

    def _build_conditioning(self) -> int:
        """Builds the embeddings; returns the width of the time embedding that the blocks receive."""
        config = self.config  # of a network that follows a U-Net it lacks some keys
        time_type, concat = config.get("time_embedding_type", "positional"), config.get("class_embeddings_concat", False)
        check_choice("time_embedding_type", time_type, ("positional", "fourier"))
        check_choice("class_embed_type", config.class_embed_type, _CLASS_TYPES)
        check_choice("addition_embed_type", config.addition_embed_type, ADDED_INPUTS)
        check_choice("encoder_hid_dim_type", config.encoder_hid_dim_type, TOKEN_INPUTS)
        in_dim = config.block_out_channels[0]
        time_dim = config.get("time_embedding_dim") or in_dim * 4
        if time_type == "fourier":
            time_dim = in_dim = config.time_embedding_dim or in_dim * 2
            if time_dim % 2:
                raise ConfigError(f"time_embedding_dim={time_dim} must be even with time_embedding_type='fourier'")
            self.time_proj = GaussianFourierProjection(time_dim // 2, flip_sin_to_cos=config.flip_sin_to_cos)
        acts = config.act_fn, config.get("timestep_post_act")
        self.time_embedding = TimestepEmbedding(in_dim, time_dim, *acts, config.get("time_cond_proj_dim"))
        act = config.get("time_embedding_act_fn")
        self.time_embed_act = None if act is None else activation(act)
        self._build_classes(in_dim, time_dim, config.act_fn if config.class_embed_type == "timestep" else "silu")
        if concat and self.class_embedding is None:
            raise ConfigError("class_embeddings_concat=True needs a class embedding: give class_embed_type or num_class_embeds")
        self._build_additions(time_dim)
        self._build_token_projection()
        self.added_inputs = frozenset((*ADDED_INPUTS[config.addition_embed_type], *TOKEN_INPUTS[config.encoder_hid_dim_type]))
        self.activation = activation(config.act_fn)
        return time_dim * 2 if concat else time_dim

    def _build_mid(self, shared: Shared, level: Level) -> MidBlock | None:
        config, kind = self.config, self.config.get("mid_block_type", "UNetMidBlock2DCrossAttn")
        check_choice("mid_block_type", kind, (*_MID_BLOCKS, None))
        if kind is None:
            return None
        only_cross, attention = config.get("mid_block_only_cross_attention"), _MID_BLOCKS[kind]
        if only_cross is None:
            only_cross = config.only_cross_attention is True
        # transformers in the middle always attend to the picture too
        level = dataclasses.replace(level, only_cross_attention=only_cross and attention == "added")
        scale, pair = config.mid_block_scale_factor, attention is not None
        return MidBlock(attention, shared, level, config.block_out_channels[-1], scale, pair)

    def _need(self, chosen: str, *keys: str) -> None:
        for key in keys:
            if self.config[key] is None:
                raise ConfigError(f"{chosen}={self.config[chosen]!r} needs {key}")

    def _build_additions(self, time_dim: int) -> None:
        config, kind = self.config, self.config.addition_embed_type
        context_dim = config.cross_attention_dim
        if isinstance(context_dim, (list, tuple)):
            context_dim = context_dim[0]
        self.add_embedding: nn.Module | None = None
        if kind == "text":
            text_dim = config.encoder_hid_dim or context_dim
            self.add_embedding = TextTimeEmbedding(text_dim, time_dim, config.addition_embed_type_num_heads)
        elif kind == "text_image":
            self.add_embedding = TextImageTimeEmbedding(context_dim, context_dim, time_dim)
        elif kind == "text_time":
            self._need("addition_embed_type", "addition_time_embed_dim", "projection_class_embeddings_input_dim")
            self.add_embedding = TimestepEmbedding(config.projection_class_embeddings_input_dim, time_dim)
        elif kind is not None:
            self._need("addition_embed_type", "encoder_hid_dim")
            self.add_embedding = ImageTimeEmbedding(config.encoder_hid_dim, time_dim, hint=kind == "image_hint")

    def _build_token_projection(self) -> None:
        config, kind = self.config, self.config.encoder_hid_dim_type
        self.encoder_hid_proj: nn.Module | None = None
        if kind is None:
            return
        self._need("encoder_hid_dim_type", "encoder_hid_dim")
        width, context_dim = config.encoder_hid_dim, config.cross_attention_dim
        if kind == "text_proj":
            self.encoder_hid_proj = nn.Linear(width, context_dim)
        elif kind == "text_image_proj":
            self.encoder_hid_proj = TextImageProjection(width, context_dim, context_dim)
        else:
            self.encoder_hid_proj = ImageProjection(width, context_dim)

    def check_added(self, added: Mapping[str, torch.Tensor]) -> None:
        """Raises :class:`ValueError` unless ``added_cond_kwargs`` holds just what this network reads."""
        for name in added:
            if name not in self.added_inputs:
                near = did_you_mean(name, self.added_inputs)
                raise ValueError(f"added_cond_kwargs holds {name!r}, which this network does not read{near}: leave it out")
        for name in self.added_inputs:
            if name not in added:
                raise ValueError(f"added_cond_kwargs lacks {name!r}: this network needs {', '.join(sorted(self.added_inputs))}")

    def conditions(
        self, sample: torch.Tensor, timestep: torch.Tensor | float | int, context: torch.Tensor | None,
        labels: torch.Tensor | None, time_condition: torch.Tensor | None, mask: torch.Tensor | None,
        context_mask: torch.Tensor | None, added: Mapping[str, torch.Tensor], options: AttentionOptions,
    ) -> Conditions:  # fmt: skip
        """What the blocks are conditioned on, of the arguments that :meth:`UNet2DConditionModel.forward` describes."""
        if added or self.added_inputs:
            self.check_added(added)
        dtype = self.conv_in.weight.dtype
        temb = self.embed_time(time_tensor(timestep, sample), dtype, context, labels, time_condition, added)
        bias, context_bias = (None if m is None else additive_mask(m, dtype) for m in (mask, context_mask))
        return Conditions(temb, self.activation(temb), self.project_tokens(context, added), bias, context_bias, options)

    def embed_time(
        self, times: torch.Tensor, dtype: torch.dtype, context: torch.Tensor | None, labels: torch.Tensor | None,
        condition: torch.Tensor | None, added: Mapping[str, torch.Tensor],
    ) -> torch.Tensor:  # fmt: skip
        """Embeds ``times`` (B,), ``class_labels``, ``timestep_cond`` and ``added_cond_kwargs``, checked, as ``(B, T)``.

        ``context`` are the tokens before their projection, which ``addition_embed_type="text"`` pools.
        """
        temb, classes = self.time_embedding(self.project_time(times).to(dtype), condition), self._embed_class(labels, dtype)
        if classes is not None:
            concat = self.config.get("class_embeddings_concat")
            temb = torch.cat([temb, classes], dim=-1) if concat else temb + classes
        if self.add_embedding is not None:
            temb = temb + self.add_embedding(*self._addition(context, added, dtype))
        return temb if self.time_embed_act is None else self.time_embed_act(temb)

    def _addition(
        self, context: torch.Tensor | None, added: Mapping[str, torch.Tensor], dtype: torch.dtype
    ) -> tuple[torch.Tensor | None, ...]:
        """What the embedding of additions reads."""
        config, kind = self.config, self.config.addition_embed_type
        if kind == "text":
            return (context,)
        if kind == "text_image":
            return added["text_embeds"], added["image_embeds"]
        if kind == "text_time":
            return (text_and_sizes(added, config.addition_time_embed_dim, config.flip_sin_to_cos, config.freq_shift).to(dtype),)
        return (added["image_embeds"],)

    def project_tokens(self, context: torch.Tensor | None, added: Mapping[str, torch.Tensor]) -> torch.Tensor | None:
        """Turns ``encoder_hidden_states``, and pictures, into the tokens that the blocks attend to."""
        if self.encoder_hid_proj is None or self.config.encoder_hid_dim_type is None:
            return context  # what an IP-Adapter projects reaches the attention as options
        tokens = () if self.config.encoder_hid_dim_type == "image_proj" else (context,)
        return self.encoder_hid_proj(*tokens, *(added[name] for name in TOKEN_INPUTS[self.config.encoder_hid_dim_type]))
