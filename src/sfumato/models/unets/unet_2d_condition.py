"""The conditional U-Net of latent diffusion and relatives (arXiv:2112.10752; SDXL: arXiv:2307.01952; Imagen: arXiv:2205.11487)."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from typing import Any

import torch

from ...errors import ConfigError, check_choice
from ..layers.compute import Conv2d, pixels_last
from ..layers.embeddings import ImageTimeEmbedding
from ..layers.options import AttentionOptions, read_options
from .base import UNet2DConditionOutput, shared_options
from .blocks import Level, spread
from .conditioning import ConditionedUNet


class UNet2DConditionModel(ConditionedUNet):
    """A U-Net that predicts from a noisy sample, its time, and tokens to attend to.

    Args:
        sample_size: Height and width of the sample it was trained for; information only.
        in_channels, out_channels, center_input_sample: Of the sample and the prediction; the sample is given in 0..1.
        flip_sin_to_cos, freq_shift: See :func:`~sfumato.models.layers.embeddings.sinusoids`.
        down_block_types, up_block_types: From the finest resolution; from the coarsest.
        mid_block_type: ``"UNetMidBlock2DCrossAttn"``, ``"UNetMidBlock2DSimpleCrossAttn"``, ``"UNetMidBlock2D"`` or ``None``.
        only_cross_attention, mid_block_only_cross_attention: No attention within the picture; in the middle.
        block_out_channels, layers_per_block: Channels and residual layers of each resolution; up blocks have one layer more.
        downsample_padding: Padding of the halving convolutions.
        mid_block_scale_factor, resnet_out_scale_factor: Divide the outputs of residual layers in the middle; in ``Simple`` blocks.
        dropout, act_fn: In residual layers; ``"silu"``, ``"swish"``, ``"mish"``, ``"gelu"`` or ``"relu"``.
        norm_num_groups, norm_eps: Of the normalisations; ``None`` groups for networks of ``K`` blocks, which have their own.
        cross_attention_dim: Width of the tokens, for all resolutions or for each.
        transformer_layers_per_block: Depth of the transformers, for all, for each resolution, or for each layer of each.
        reverse_transformer_layers_per_block: The same for the up blocks, from the coarsest.
        encoder_hid_dim, encoder_hid_dim_type: Width before, and kind of, a projection of the tokens: ``None``, ``"text_proj"``,
            ``"text_image_proj"`` or ``"image_proj"``.
        attention_head_dim: In transformers the number of heads (a misnomer that checkpoints keep), elsewhere their width.
        num_attention_heads, dual_cross_attention, attention_type: Not offered; must keep their defaults.
        use_linear_projection: Transformers project by linear layers instead of 1x1 convolutions.
        class_embed_type, num_class_embeds: ``None``, ``"timestep"``, ``"identity"``, ``"projection"``, ``"simple_projection"``.
        class_embeddings_concat: Concatenate the class embedding to the time embedding instead of adding it.
        addition_embed_type: ``None``, ``"text"``, ``"text_image"``, ``"text_time"``, ``"image"`` or ``"image_hint"``.
        addition_time_embed_dim, addition_embed_type_num_heads: Of each number of ``"text_time"``; heads of ``"text"``.
        projection_class_embeddings_input_dim: Width of the input of projections of classes, or of ``"text_time"``.
        upcast_attention: Accepted and without effect: attention scores are always accumulated in float32.
        resnet_time_scale_shift: ``"default"`` adds the time embedding, ``"scale_shift"`` modulates with it.
        resnet_skip_time_act: Do not activate the time embedding in blocks of the ``Simple`` and ``Resnet`` types.
        time_embedding_type, time_embedding_dim: ``"positional"`` or ``"fourier"``; width.
        time_embedding_act_fn, timestep_post_act: Activation of the final time embedding; before classes and additions.
        time_cond_proj_dim: Width of ``timestep_cond``.
        conv_in_kernel, conv_out_kernel: Size of the first and the last convolution.
        cross_attention_norm: Normalisation of the tokens in ``Simple`` and ``K`` blocks: ``"layer_norm"`` or ``"group_norm"``.

    Raises:
        ConfigError: Values are unknown or do not fit together.
    """

    def __init__(
        self, sample_size: int | tuple[int, int] | None = None, in_channels: int = 4, out_channels: int = 4,
        center_input_sample: bool = False, flip_sin_to_cos: bool = True, freq_shift: int = 0,
        down_block_types: tuple[str, ...] = (*("CrossAttnDownBlock2D",) * 3, "DownBlock2D"),
        mid_block_type: str | None = "UNetMidBlock2DCrossAttn",
        up_block_types: tuple[str, ...] = ("UpBlock2D", *("CrossAttnUpBlock2D",) * 3),
        only_cross_attention: bool | tuple[bool, ...] = False, block_out_channels: tuple[int, ...] = (320, 640, 1280, 1280),
        layers_per_block: int | tuple[int, ...] = 2, downsample_padding: int = 1, mid_block_scale_factor: float = 1,
        dropout: float = 0.0, act_fn: str = "silu", norm_num_groups: int | None = 32, norm_eps: float = 1e-5,
        cross_attention_dim: int | tuple[int, ...] = 1280,
        transformer_layers_per_block: int | tuple[int | tuple[int, ...], ...] = 1,
        reverse_transformer_layers_per_block: tuple[int | tuple[int, ...], ...] | None = None, encoder_hid_dim: int | None = None,
        encoder_hid_dim_type: str | None = None, attention_head_dim: int | tuple[int, ...] = 8,
        num_attention_heads: int | tuple[int, ...] | None = None, dual_cross_attention: bool = False,
        use_linear_projection: bool = False, class_embed_type: str | None = None, addition_embed_type: str | None = None,
        addition_time_embed_dim: int | None = None, num_class_embeds: int | None = None, upcast_attention: bool = False,
        resnet_time_scale_shift: str = "default", resnet_skip_time_act: bool = False, resnet_out_scale_factor: float = 1.0,
        time_embedding_type: str = "positional", time_embedding_dim: int | None = None, time_embedding_act_fn: str | None = None,
        timestep_post_act: str | None = None, time_cond_proj_dim: int | None = None, conv_in_kernel: int = 3,
        conv_out_kernel: int = 3, projection_class_embeddings_input_dim: int | None = None, attention_type: str = "default",
        class_embeddings_concat: bool = False, mid_block_only_cross_attention: bool | None = None,
        cross_attention_norm: str | None = None, addition_embed_type_num_heads: int = 64,
    ) -> None:  # fmt: skip
        super().__init__()
        self._check_config()
        check_choice("cross_attention_norm", cross_attention_norm, (None, "layer_norm", "group_norm"))
        _refuse_unoffered(num_attention_heads, dual_cross_attention, attention_type)
        if encoder_hid_dim is not None and encoder_hid_dim_type is None:
            self.register_to_config(encoder_hid_dim_type="text_proj")
        width = block_out_channels[0]
        self.conv_in = Conv2d(in_channels, width, conv_in_kernel, padding=(conv_in_kernel - 1) // 2)
        temb_channels = self._build_conditioning()
        shared = shared_options(self.config, temb_channels)
        layers = spread(layers_per_block, len(down_block_types), "layers_per_block")
        levels = down_levels(self.config)
        self._build(shared, levels, layers, _up_levels(self.config, levels))
        self.mid_block = self._build_mid(shared, levels[-1])
        self._build_out(norm_num_groups, act_fn, conv_out_kernel)
        self.center_input_sample = center_input_sample

    def forward(
        self, sample: torch.Tensor, timestep: torch.Tensor | float | int, encoder_hidden_states: torch.Tensor | None,
        class_labels: torch.Tensor | None = None, timestep_cond: torch.Tensor | None = None,
        attention_mask: torch.Tensor | None = None, cross_attention_kwargs: AttentionOptions | None = None,
        added_cond_kwargs: Mapping[str, torch.Tensor] | None = None,
        down_block_additional_residuals: Sequence[torch.Tensor] | None = None,
        mid_block_additional_residual: torch.Tensor | None = None,
        down_intrablock_additional_residuals: Sequence[torch.Tensor] | None = None,
        encoder_attention_mask: torch.Tensor | None = None, return_dict: bool = True,
    ) -> UNet2DConditionOutput | tuple[torch.Tensor]:  # fmt: skip
        """Predicts.

        Args:
            sample: Noisy sample ``(B, in_channels, H, W)``.
            timestep: One time, or ``(B,)`` of them.
            encoder_hidden_states: Tokens ``(B, M, C)``; ``None`` only where ``encoder_hid_dim_type="image_proj"`` makes them.
            class_labels: Classes or class embeddings, where the network was built with them.
            timestep_cond: Condition of the time embedding ``(B, time_cond_proj_dim)``, such as an embedded guidance scale.
            attention_mask: 1 keeps, 0 hides, ``(B, N)``: of the attention within the picture, which then must have N pixels
                at every level; in ``Simple`` blocks, of the tokens.
            cross_attention_kwargs: :class:`~sfumato.models.layers.options.AttentionOptions`, or nothing.
            added_cond_kwargs: What ``addition_embed_type`` and ``encoder_hid_dim_type`` ask for: ``text_embeds``,
                ``time_ids``, ``image_embeds``, ``hint``.
            down_block_additional_residuals: Added to the states of the way down, one for each (ControlNet).
            mid_block_additional_residual: Added after the middle (ControlNet).
            down_intrablock_additional_residuals: Added in the down blocks, one for each (T2I-Adapter).
            encoder_attention_mask: 1 keeps, 0 hides, ``(B, M)``: of the tokens.
            return_dict: Return :class:`UNet2DConditionOutput`, otherwise a tuple.

        Returns:
            The prediction ``(B, out_channels, H, W)``.

        Raises:
            ValueError: An argument is unknown to the network, missing, or does not fit.
        """
        options = read_options("cross_attention_kwargs", cross_attention_kwargs)
        added = added_cond_kwargs or {}
        if self.center_input_sample:
            sample = 2 * sample - 1.0
        conditions = (class_labels, timestep_cond, attention_mask, encoder_attention_mask, added, options)
        c = self.conditions(sample, timestep, encoder_hidden_states, *conditions)
        if isinstance(self.add_embedding, ImageTimeEmbedding) and "hint" in added:
            sample = torch.cat([sample, self.add_embedding.hint(added["hint"])], dim=1)
        uneven, states_added = self._check_sample(sample), down_block_additional_residuals
        within = _counted(down_intrablock_additional_residuals, len(self.down_blocks), "down_intrablock_additional_residuals")
        x, states = self._down(self.conv_in(pixels_last(sample)), c, within)
        if states_added is not None:
            counted = _counted(states_added, len(states), "down_block_additional_residuals")
            states = [state + residual for state, residual in zip(states, counted, strict=True)]
        if self.mid_block is not None:
            x = self.run_block(self.mid_block, x, c)
        if mid_block_additional_residual is not None:
            x = x + mid_block_additional_residual
        x = self._out(self._up(x, states, c, uneven)[0])
        return UNet2DConditionOutput(x) if return_dict else (x,)


def _counted(residuals: Sequence[torch.Tensor] | None, count: int, name: str) -> Sequence[torch.Tensor]:
    if residuals is not None and len(residuals) != count:
        raise ValueError(f"{name} holds {len(residuals)} tensors, this network takes {count}: pass that many")
    return residuals or ()


def _refuse_unoffered(num_attention_heads: Any, dual_cross_attention: bool, attention_type: str) -> None:
    if num_attention_heads is not None:
        raise ConfigError(
            f"num_attention_heads={num_attention_heads!r}: this checkpoint format keeps the number of heads in attention_head_dim"
        )
    if dual_cross_attention:
        raise ConfigError("dual_cross_attention=True is not offered: no published pipeline uses it")
    if attention_type != "default":
        raise ConfigError(f"attention_type={attention_type!r} is not offered: expected 'default'")


def down_levels(config: Mapping[str, Any]) -> list[Level]:
    """Reads from a configuration what each resolution of the way down has of its own."""
    heads = "attention_head_dim" if config["num_attention_heads"] is None else "num_attention_heads"
    keys = (heads, "attention_head_dim", "cross_attention_dim", "transformer_layers_per_block", "only_cross_attention")
    each = [spread(config[key], len(config["down_block_types"]), key) for key in keys]
    levels = [Level(*values) for values in zip(*each, [config["norm_num_groups"]] * len(each[0]), strict=True)]
    for i, (level, width) in enumerate(zip(levels, config["block_out_channels"], strict=True)):
        for key, value in ((heads, level.heads), ("attention_head_dim", level.head_dim)):
            if value is None or value <= 0 or value > width:
                raise ConfigError(f"{key}={value!r} does not fit the {width} channels of level {i}")
    return levels


def _up_levels(config: Mapping[str, Any], down: list[Level]) -> list[Level]:
    """The same for the way up, from the coarsest."""
    depths = config["reverse_transformer_layers_per_block"]
    if depths is None:
        nested = [level.depth for level in down if not isinstance(level.depth, int)]
        if nested:
            raise ConfigError(
                f"transformer_layers_per_block gives depths of single layers ({nested[0]}), and up blocks have one layer more: "
                "give reverse_transformer_layers_per_block too"
            )
        return down[::-1]
    if len(depths) != len(down):
        raise ConfigError(f"reverse_transformer_layers_per_block={depths!r} has {len(depths)} values: give {len(down)}")
    return [dataclasses.replace(level, depth=depth) for level, depth in zip(down[::-1], depths, strict=True)]
