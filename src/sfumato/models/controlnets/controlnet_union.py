"""ControlNet Union: one ControlNet for pictures of many kinds, told which (github.com/xinsir6/ControlNetPlus)."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import nn

from ...errors import ConfigError
from ..layers.compute import Linear, pixels_last
from ..layers.embeddings import TimestepEmbedding, sinusoids
from ..layers.options import AttentionOptions, read_options
from ..several import Several
from ..unets.blocks import Conditions
from .controlnet import ControlNetBase, ControlNetOutput, Scale, add_outputs, read_scale


class QuickGELU(nn.Module):
    """``x * sigmoid(1.702 x)`` (arXiv:1606.08415, section 2)."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x * torch.sigmoid(1.702 * x)


class _OwnAttention(nn.Module):
    """Self-attention in which a token sees itself alone, so that it is its value, projected.

    Such is the published network, which takes the batch for the sequence. With the same pictures in all of a batch, as in guidance,
    a token has the same value in all of it, which any attention gives; with different ones pictures would leak into each other.
    """

    def __init__(self, dim: int) -> None:
        super().__init__()
        self.in_proj_weight = nn.Parameter(torch.randn(3 * dim, dim) / dim**0.5)
        self.in_proj_bias = nn.Parameter(torch.zeros(3 * dim))
        self.out_proj = Linear(dim, dim)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        value, bias = self.in_proj_weight.chunk(3)[2], self.in_proj_bias.chunk(3)[2]
        return self.out_proj(nn.functional.linear(x, value, bias))


class ConditionTransformer(nn.Module):
    """A transformer block over the token of a picture."""

    def __init__(self, dim: int) -> None:
        super().__init__()
        self.attn = _OwnAttention(dim)
        self.ln_1 = nn.LayerNorm(dim)
        self.mlp = nn.ModuleDict({"c_fc": Linear(dim, 4 * dim), "gelu": QuickGELU(), "c_proj": Linear(4 * dim, dim)})
        self.ln_2 = nn.LayerNorm(dim)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """``(..., C)`` -> the same."""
        x = x + self.attn(self.ln_1(x))
        h = self.ln_2(x)
        for layer in self.mlp.values():
            h = layer(h)
        return x + h


class ControlNetUnionModel(ControlNetBase):
    """A ControlNet that reads several pictures, each of one of ``num_control_type`` kinds (depth, edges, pose ...).

    Args:
        in_channels, conditioning_channels, flip_sin_to_cos, freq_shift, down_block_types, only_cross_attention,
            block_out_channels, layers_per_block, downsample_padding, mid_block_scale_factor, act_fn, norm_num_groups, norm_eps,
            cross_attention_dim, transformer_layers_per_block, encoder_hid_dim, encoder_hid_dim_type, attention_head_dim,
            num_attention_heads, use_linear_projection, class_embed_type, addition_embed_type, addition_time_embed_dim,
            num_class_embeds, upcast_attention, resnet_time_scale_shift, projection_class_embeddings_input_dim,
            controlnet_conditioning_channel_order, conditioning_embedding_out_channels, global_pool_conditions,
            addition_embed_type_num_heads: As those of :class:`ControlNetModel`.
        num_control_type: Number of kinds of pictures.
        num_trans_channel, num_trans_layer: Width and depth of the transformer over the pictures.
        num_trans_head: Its heads; without effect, since a token attends to itself alone.
        num_proj_channel: Channels that its tokens are projected to; those of the first resolution.

    Raises:
        ConfigError: Values are unknown or do not fit together.
    """

    def __init__(
        self, in_channels: int = 4, conditioning_channels: int = 3, flip_sin_to_cos: bool = True, freq_shift: int = 0,
        down_block_types: tuple[str, ...] = (*("CrossAttnDownBlock2D",) * 3, "DownBlock2D"),
        only_cross_attention: bool | tuple[bool, ...] = False, block_out_channels: tuple[int, ...] = (320, 640, 1280, 1280),
        layers_per_block: int = 2, downsample_padding: int = 1, mid_block_scale_factor: float = 1, act_fn: str = "silu",
        norm_num_groups: int | None = 32, norm_eps: float = 1e-5, cross_attention_dim: int = 1280,
        transformer_layers_per_block: int | tuple[int, ...] = 1, encoder_hid_dim: int | None = None,
        encoder_hid_dim_type: str | None = None, attention_head_dim: int | tuple[int, ...] = 8,
        num_attention_heads: int | tuple[int, ...] | None = None, use_linear_projection: bool = False,
        class_embed_type: str | None = None, addition_embed_type: str | None = None, addition_time_embed_dim: int | None = None,
        num_class_embeds: int | None = None, upcast_attention: bool = False, resnet_time_scale_shift: str = "default",
        projection_class_embeddings_input_dim: int | None = None, controlnet_conditioning_channel_order: str = "rgb",
        conditioning_embedding_out_channels: tuple[int, ...] | None = (48, 96, 192, 384), global_pool_conditions: bool = False,
        addition_embed_type_num_heads: int = 64, num_control_type: int = 6, num_trans_channel: int = 320,
        num_trans_head: int = 8, num_trans_layer: int = 1, num_proj_channel: int = 320,
    ) -> None:  # fmt: skip
        super().__init__()
        self._build_control()
        if addition_time_embed_dim is None:
            raise ConfigError(
                "addition_time_embed_dim=None: give the width that the kinds of the pictures are embedded in, such as 256"
            )
        width, time_dim = block_out_channels[0], self.time_embedding.linear_2.out_features
        for key, value in (("num_trans_channel", num_trans_channel), ("num_proj_channel", num_proj_channel)):
            if value != width:
                raise ConfigError(f"{key}={value}: tokens and features add up, so it must be block_out_channels[0]={width}")
        self.task_embedding = nn.Parameter(torch.randn(num_control_type, num_trans_channel) / num_trans_channel**0.5)
        self.transformer_layes = nn.ModuleList(ConditionTransformer(num_trans_channel) for _ in range(num_trans_layer))
        self.spatial_ch_projs = nn.Linear(num_trans_channel, num_proj_channel)
        nn.init.zeros_(self.spatial_ch_projs.weight)
        nn.init.zeros_(self.spatial_ch_projs.bias)
        self.control_add_embedding = TimestepEmbedding(addition_time_embed_dim * num_control_type, time_dim)

    def forward(
        self, sample: torch.Tensor, timestep: torch.Tensor | float | int, encoder_hidden_states: torch.Tensor | None,
        controlnet_cond: Sequence[torch.Tensor], control_type: torch.Tensor, control_type_idx: Sequence[int],
        conditioning_scale: Scale | Sequence[Scale] = 1.0, class_labels: torch.Tensor | None = None,
        timestep_cond: torch.Tensor | None = None, attention_mask: torch.Tensor | None = None,
        added_cond_kwargs: Mapping[str, torch.Tensor] | None = None, cross_attention_kwargs: AttentionOptions | None = None,
        from_multi: bool = False, guess_mode: bool = False, return_dict: bool = True,
    ) -> ControlNetOutput | tuple[tuple[torch.Tensor, ...], torch.Tensor]:  # fmt: skip
        """Answers residuals, see :meth:`ControlNetModel.forward`.

        Args:
            sample, timestep, encoder_hidden_states, class_labels, timestep_cond, attention_mask, added_cond_kwargs,
                cross_attention_kwargs, guess_mode, return_dict: As there.
            controlnet_cond: The pictures, each (B, conditioning_channels, 8H, 8W), RGB in 0..1.
            control_type: 1 for each kind of which there is a picture, else 0, (B, num_control_type).
            control_type_idx: The kind of each picture, from 0.
            conditioning_scale: Weight of the pictures' features, for all or for each.
            from_multi: One of several networks: weigh the residuals instead, by one weight.

        Raises:
            ValueError: An argument is unknown to the network, missing, or does not fit.
        """
        options, added = read_options("cross_attention_kwargs", cross_attention_kwargs), added_cond_kwargs or {}
        self._check_sample(sample)
        self._check_types(sample, controlnet_cond, control_type, control_type_idx)
        weights, scale = _scales(conditioning_scale, len(controlnet_cond), from_multi)
        conditions = (class_labels, timestep_cond, attention_mask, None, added, options)
        c = self._add_types(self.conditions(sample, timestep, encoder_hidden_states, *conditions), control_type)
        x = self.conv_in(pixels_last(sample))
        for i, (picture, kind, weight) in enumerate(zip(controlnet_cond, control_type_idx, weights, strict=True)):
            features = self._embed_picture(f"controlnet_cond[{i}]", picture, sample)
            weight = read_scale(weight, features)
            token = (features.mean(dim=(2, 3)) + self.task_embedding[kind])[:, None, None] * weight  # (B, 1, 1, C)
            for layer in self.transformer_layes:
                token = layer(token)
            features = features + self.spatial_ch_projs(token).permute(0, 3, 1, 2)
            x = x + features * weight
        output = self._residuals(x, c, scale, guess_mode)
        return output if return_dict else (output.down_block_res_samples, output.mid_block_res_sample)

    def _check_types(
        self, sample: torch.Tensor, pictures: Sequence[torch.Tensor], control_type: torch.Tensor, kinds: Sequence[int]
    ) -> None:
        if not isinstance(pictures, (list, tuple)) or len(pictures) != len(kinds):
            got = f"a list of {len(pictures)}" if isinstance(pictures, (list, tuple)) else f"a {type(pictures).__name__}"
            raise ValueError(f"controlnet_cond is {got}, control_type_idx={kinds!r}: pass a list with one picture for each kind")
        count = self.config.num_control_type
        for kind in kinds:
            if not 0 <= kind < count:
                raise ValueError(f"control_type_idx={kinds!r}: {kind} is no kind of this network, which has 0 to {count - 1}")
        if control_type.dim() != 2 or control_type.shape[1] != count or len(control_type) not in (1, len(sample)):
            raise ValueError(f"control_type has shape {tuple(control_type.shape)}: expected {(len(sample), count)}")

    def _add_types(self, c: Conditions, control_type: torch.Tensor) -> Conditions:
        """Adds the embedding of the kinds to that of the time."""
        config = self.config
        kinds = sinusoids(control_type.flatten(), config.addition_time_embed_dim, config.flip_sin_to_cos, config.freq_shift)
        temb = c.temb + self.control_add_embedding(kinds.reshape(len(control_type), -1).to(c.temb.dtype))
        return c._replace(temb=temb, activated=self.activation(temb))


def _scales(scale: Scale | Sequence[Scale], count: int, from_multi: bool) -> tuple[list[Scale], Scale]:
    """The weights of ``count`` pictures and that of the residuals: of a single picture it is the residuals that are weighed."""
    if isinstance(scale, torch.Tensor) and scale.dim() == 1:
        scale = list(scale.unbind())
    if isinstance(scale, (list, tuple)):
        if from_multi or len(scale) != count:
            expected = "one number, with from_multi=True" if from_multi else f"one number, or {count}, one for each picture"
            raise ValueError(f"conditioning_scale={scale!r}: expected {expected}")
        return ([1.0], scale[0]) if count == 1 else (list(scale), 1.0)
    single: Any = scale
    return ([1.0] * count, single) if from_multi or count == 1 else ([single] * count, 1.0)


class MultiControlNetUnionModel(Several):
    """Several ControlNet Unions, whose residuals add up.

    Args:
        controlnets: The networks, as ``nets``.
    """

    member = ControlNetUnionModel

    def forward(
        self, sample: torch.Tensor, timestep: torch.Tensor | float | int, encoder_hidden_states: torch.Tensor | None,
        controlnet_cond: Sequence[Sequence[torch.Tensor]], control_type: Sequence[torch.Tensor],
        control_type_idx: Sequence[Sequence[int]], conditioning_scale: Sequence[Scale] | torch.Tensor,
        class_labels: torch.Tensor | None = None, timestep_cond: torch.Tensor | None = None,
        attention_mask: torch.Tensor | None = None, added_cond_kwargs: Mapping[str, torch.Tensor] | None = None,
        cross_attention_kwargs: AttentionOptions | None = None, guess_mode: bool = False, return_dict: bool = True,
    ) -> ControlNetOutput | tuple[tuple[torch.Tensor, ...], torch.Tensor]:  # fmt: skip
        """Answers the sum of the residuals, see :meth:`ControlNetUnionModel.forward`.

        Args:
            sample, timestep, encoder_hidden_states, class_labels, timestep_cond, attention_mask, added_cond_kwargs,
                cross_attention_kwargs, guess_mode, return_dict: Of all.
            controlnet_cond, control_type, control_type_idx: Of each network.
            conditioning_scale: A weight of each network's residuals.

        Raises:
            ValueError: There is another number of anything than of networks.
        """
        self.check_counts(controlnet_cond=controlnet_cond, control_type=control_type)
        self.check_counts(control_type_idx=control_type_idx, conditioning_scale=conditioning_scale)
        shared = (class_labels, timestep_cond, attention_mask, added_cond_kwargs, cross_attention_kwargs, True, guess_mode)
        each = zip(self.members, controlnet_cond, control_type, control_type_idx, conditioning_scale, strict=True)
        output = add_outputs([net(sample, timestep, encoder_hidden_states, *own, *shared) for net, *own in each])
        return output if return_dict else (output.down_block_res_samples, output.mid_block_res_sample)
