"""ControlNet (arXiv:2302.05543): a copy of a U-Net's way down and middle that reads a picture and steers the U-Net."""

from __future__ import annotations

import functools
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import TypeVar

import torch
import torch.nn.functional as F
from torch import nn

from ...errors import ConfigError, check_choice
from ...outputs import BaseOutput
from ..layers.compute import Conv2d, pixels_last
from ..layers.options import AttentionOptions, read_options
from ..several import Several
from ..unets.base import shared_options
from ..unets.blocks import Conditions, spread
from ..unets.conditioning import ConditionedUNet
from ..unets.unet_2d_condition import UNet2DConditionModel, down_levels
from .residuals import following, zeroed

_C = TypeVar("_C", bound="ControlNetBase")
Scale = float | torch.Tensor


@dataclass
class ControlNetOutput(BaseOutput):
    """What a U-Net takes as additional residuals.

    Attributes:
        down_block_res_samples: One for each state of the way down, (B, C, H, W).
        mid_block_res_sample: Of the middle, (B, C, H, W).
    """

    down_block_res_samples: tuple[torch.Tensor, ...]
    mid_block_res_sample: torch.Tensor

    @property
    def residuals(self) -> tuple[torch.Tensor, ...]:
        """All of them, the middle's last."""
        return (*self.down_block_res_samples, self.mid_block_res_sample)


def zero_conv(in_channels: int, out_channels: int, kernel: int = 1) -> Conv2d:
    """A convolution that answers zero before training (section 3.1)."""
    return zeroed(Conv2d(in_channels, out_channels, kernel, padding=kernel // 2))


_NOT_FOLLOWED = (
    "sample_size", "out_channels", "up_block_types", "reverse_transformer_layers_per_block", "conv_out_kernel", "dropout",
)  # fmt: skip
"""Keys of a U-Net that a ControlNet need not know."""


def check_followed(unet: UNet2DConditionModel, known: Collection[str]) -> None:
    """Raises :class:`ConfigError` if a U-Net has something unusual under a key that is not ``known``."""
    for key, parameter in UNet2DConditionModel._init_parameters().items():
        if key not in known and (value := unet.config[key]) != parameter.default:
            raise ConfigError(f"a U-Net with {key}={value!r} cannot be followed: it must be {parameter.default!r}")


def read_scale(scale: Scale, like: torch.Tensor) -> Scale:
    """A weight, with the dtype and on the device of ``like``.

    Raises:
        ValueError: It is neither one number nor a tensor with one for each sample, (B, 1, 1, 1).
    """
    if isinstance(scale, (list, tuple)) or (isinstance(scale, torch.Tensor) and scale.dim() not in (0, 4)):
        got = f"a tensor of shape {tuple(scale.shape)}" if isinstance(scale, torch.Tensor) else repr(scale)
        raise ValueError(f"conditioning_scale is {got}: expected one number, or a tensor with one for each sample, (B, 1, 1, 1)")
    return scale.to(like) if isinstance(scale, torch.Tensor) else scale


class ControlNetConditioningEmbedding(nn.Module):
    """Turns a picture into features of the size of the latents (section 3.2): each width but the first halves it."""

    def __init__(self, out_channels: int, in_channels: int = 3, widths: Sequence[int] = (16, 32, 96, 256)) -> None:
        super().__init__()
        self.factor = 2 ** (len(widths) - 1)
        self.conv_in = Conv2d(in_channels, widths[0], 3, padding=1)
        self.blocks = nn.ModuleList()
        for a, b in pairwise(widths):
            self.blocks += [Conv2d(a, a, 3, padding=1), Conv2d(a, b, 3, padding=1, stride=2)]
        self.conv_out = zero_conv(widths[-1], out_channels, 3)

    def check(self, name: str, picture: torch.Tensor, sample: torch.Tensor) -> None:
        """Raises :class:`ValueError` unless ``picture`` (1 or B, C, factor * H, factor * W) fits ``sample`` (B, C', H, W)."""
        expected = (self.conv_in.in_channels, *(size * self.factor for size in sample.shape[2:]))
        fits = picture.dim() == 4 and picture.shape[1] == expected[0] and picture.shape[0] in (1, sample.shape[0])
        if not fits or any(-(-p // self.factor) != s for p, s in zip(picture.shape[2:], sample.shape[2:], strict=True)):
            remedy = f"resize the picture to {self.factor} times the latents, repeat it for the batch"
            wanted = f"for a sample of {tuple(sample.shape)} expected {(sample.shape[0], *expected)}"
            raise ValueError(f"{name} has shape {tuple(picture.shape)}, {wanted}: {remedy}")

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """``(B, C, factor * H, factor * W)`` -> ``(B, C', H, W)``."""
        x = F.silu(self.conv_in(pixels_last(x)))
        for block in self.blocks:
            x = F.silu(block(x))
        return self.conv_out(x)


class ControlNetBase(ConditionedUNet):
    """What reads pictures and follows a U-Net down; the configuration keys are those of :class:`ControlNetModel`."""

    def _build_control(self) -> None:
        self._check_config()
        config, width = self.config, self.config.block_out_channels[0]
        check_choice("controlnet_conditioning_channel_order", config.controlnet_conditioning_channel_order, ("rgb", "bgr"))
        self.conv_in = Conv2d(config.in_channels, width, 3, padding=1)
        shared = shared_options(config, self._build_conditioning())
        levels = down_levels(config)
        widths = self._build_down(shared, levels, spread(config.layers_per_block, len(levels), "layers_per_block"))
        if 0 in widths:
            raise ConfigError(f"down_block_types={config.down_block_types!r} keeps no state of the last level to control")
        self.mid_block = self._build_mid(shared, levels[-1])
        pictures = config.conditioning_channels, config.conditioning_embedding_out_channels
        self.controlnet_cond_embedding = ControlNetConditioningEmbedding(width, *pictures)
        self.controlnet_down_blocks = nn.ModuleList(zero_conv(w, w) for w in widths)
        self.controlnet_mid_block = zero_conv(widths[-1], widths[-1])

    @classmethod
    def from_unet(
        cls: type[_C], unet: UNet2DConditionModel, controlnet_conditioning_channel_order: str = "rgb",
        conditioning_embedding_out_channels: tuple[int, ...] | None = (16, 32, 96, 256), load_weights_from_unet: bool = True,
        conditioning_channels: int = 3,
    ) -> _C:  # fmt: skip
        """Builds a network to train, whose residuals are zero, that follows ``unet``, in float32.

        Args:
            unet: The U-Net to follow.
            controlnet_conditioning_channel_order, conditioning_embedding_out_channels: See the class.
            load_weights_from_unet: Start from the U-Net's weights.
            conditioning_channels: Channels of the picture.

        Raises:
            ConfigError: The U-Net has something that this network cannot follow.
        """
        own = {
            "controlnet_conditioning_channel_order": controlnet_conditioning_channel_order,
            "conditioning_embedding_out_channels": conditioning_embedding_out_channels,
            "conditioning_channels": conditioning_channels,
        }
        check_followed(unet, {*cls._init_parameters(), *_NOT_FOLLOWED})
        return following(cls, unet, load_weights_from_unet, **own)

    def _embed_picture(self, name: str, picture: torch.Tensor, sample: torch.Tensor) -> torch.Tensor:
        """A picture (B, C, 8H, 8W), checked against ``sample`` -> its features (B, C', H, W)."""
        self.controlnet_cond_embedding.check(name, picture, sample)
        return self.controlnet_cond_embedding(picture.flip(1) if self._is_bgr else picture)

    @property
    def _is_bgr(self) -> bool:
        return self.config.controlnet_conditioning_channel_order == "bgr"

    def _residuals(self, x: torch.Tensor, c: Conditions, scale: Scale, guess_mode: bool) -> ControlNetOutput:
        """Features at the start of the way down (B, C, H, W) -> residuals, times ``scale``.

        In guess mode those of the finest resolution weigh a tenth, those of the middle one ("guess mode" of the paper's code).
        """
        scale = read_scale(scale, x)
        x, states = self._down(x, c)
        if self.mid_block is not None:
            x = self.run_block(self.mid_block, x, c)
        found = [conv(state) for conv, state in zip(self.controlnet_down_blocks, states, strict=True)]
        found.append(self.controlnet_mid_block(x))
        pools = self.config.global_pool_conditions
        scales = [scale] * len(found)
        if guess_mode and not pools:
            scales = [scale * 10 ** (i / (len(found) - 1) - 1) for i in range(len(found))]
        found = [residual * weight for residual, weight in zip(found, scales, strict=True)]
        if pools:
            found = [residual.mean(dim=(2, 3), keepdim=True) for residual in found]
        return ControlNetOutput(tuple(found[:-1]), found[-1])


class ControlNetModel(ControlNetBase):
    """The way down and the middle of a conditional U-Net, which read a picture and answer residuals for the U-Net.

    Args:
        in_channels, flip_sin_to_cos, freq_shift: As the U-Net's, :class:`UNet2DConditionModel`.
        conditioning_channels, conditioning_embedding_out_channels: Channels of the picture; widths of the convolutions
            that read it, of which all but the first halve it.
        down_block_types, mid_block_type, only_cross_attention, block_out_channels, layers_per_block, downsample_padding,
            mid_block_scale_factor, act_fn, norm_num_groups, norm_eps, cross_attention_dim, transformer_layers_per_block,
            encoder_hid_dim, encoder_hid_dim_type, attention_head_dim, use_linear_projection, class_embed_type,
            addition_embed_type, addition_time_embed_dim, num_class_embeds, upcast_attention, resnet_time_scale_shift,
            projection_class_embeddings_input_dim, addition_embed_type_num_heads: As the U-Net's.
        num_attention_heads: Heads of the transformers, ``None`` for ``attention_head_dim``.
        controlnet_conditioning_channel_order: Order of the picture's channels that the network was trained with, ``"rgb"``
            or ``"bgr"``; pictures are given as RGB.
        global_pool_conditions: Answer the residuals' means over the pixels.

    Raises:
        ConfigError: Values are unknown or do not fit together.
    """

    def __init__(
        self, in_channels: int = 4, conditioning_channels: int = 3, flip_sin_to_cos: bool = True, freq_shift: int = 0,
        down_block_types: tuple[str, ...] = (*("CrossAttnDownBlock2D",) * 3, "DownBlock2D"),
        mid_block_type: str | None = "UNetMidBlock2DCrossAttn", only_cross_attention: bool | tuple[bool, ...] = False,
        block_out_channels: tuple[int, ...] = (320, 640, 1280, 1280), layers_per_block: int = 2, downsample_padding: int = 1,
        mid_block_scale_factor: float = 1, act_fn: str = "silu", norm_num_groups: int | None = 32, norm_eps: float = 1e-5,
        cross_attention_dim: int = 1280, transformer_layers_per_block: int | tuple[int, ...] = 1,
        encoder_hid_dim: int | None = None, encoder_hid_dim_type: str | None = None,
        attention_head_dim: int | tuple[int, ...] = 8, num_attention_heads: int | tuple[int, ...] | None = None,
        use_linear_projection: bool = False, class_embed_type: str | None = None, addition_embed_type: str | None = None,
        addition_time_embed_dim: int | None = None, num_class_embeds: int | None = None, upcast_attention: bool = False,
        resnet_time_scale_shift: str = "default", projection_class_embeddings_input_dim: int | None = None,
        controlnet_conditioning_channel_order: str = "rgb",
        conditioning_embedding_out_channels: tuple[int, ...] | None = (16, 32, 96, 256),
        global_pool_conditions: bool = False, addition_embed_type_num_heads: int = 64,
    ) -> None:  # fmt: skip
        super().__init__()
        self._build_control()

    def forward(
        self, sample: torch.Tensor, timestep: torch.Tensor | float | int, encoder_hidden_states: torch.Tensor | None,
        controlnet_cond: torch.Tensor, conditioning_scale: Scale = 1.0, class_labels: torch.Tensor | None = None,
        timestep_cond: torch.Tensor | None = None, attention_mask: torch.Tensor | None = None,
        added_cond_kwargs: Mapping[str, torch.Tensor] | None = None, cross_attention_kwargs: AttentionOptions | None = None,
        guess_mode: bool = False, return_dict: bool = True,
    ) -> ControlNetOutput | tuple[tuple[torch.Tensor, ...], torch.Tensor]:  # fmt: skip
        """Answers residuals.

        Args:
            sample, timestep, encoder_hidden_states, class_labels, timestep_cond, attention_mask, added_cond_kwargs,
                cross_attention_kwargs: What the U-Net is given, see :meth:`UNet2DConditionModel.forward`.
            controlnet_cond: The picture (B, conditioning_channels, 8H, 8W), RGB in 0..1.
            conditioning_scale: Weight of the residuals, one for all or (B, 1, 1, 1); a tensor can change without compiling again.
            guess_mode: Weigh the residuals from 0.1 at the finest resolution to 1 in the middle.
            return_dict: Return :class:`ControlNetOutput`, otherwise a tuple.

        Raises:
            ValueError: An argument is unknown to the network, missing, or does not fit.
        """
        options, added = read_options("cross_attention_kwargs", cross_attention_kwargs), added_cond_kwargs or {}
        self._check_sample(sample)
        picture = self._embed_picture("controlnet_cond", controlnet_cond, sample)
        conditions = (class_labels, timestep_cond, attention_mask, None, added, options)
        c = self.conditions(sample, timestep, encoder_hidden_states, *conditions)
        output = self._residuals(self.conv_in(pixels_last(sample)) + picture, c, conditioning_scale, guess_mode)
        return output if return_dict else (output.down_block_res_samples, output.mid_block_res_sample)


def add_outputs(outputs: Sequence[ControlNetOutput]) -> ControlNetOutput:
    """The residuals of several networks, added up."""
    *down, middle = (functools.reduce(torch.add, each) for each in zip(*(o.residuals for o in outputs), strict=True))
    return ControlNetOutput(tuple(down), middle)


class MultiControlNetModel(Several):
    """Several ControlNets, each with a picture of its own, whose residuals add up.

    Args:
        controlnets: The networks, as ``nets``.
    """

    member = ControlNetModel

    def forward(
        self, sample: torch.Tensor, timestep: torch.Tensor | float | int, encoder_hidden_states: torch.Tensor | None,
        controlnet_cond: Sequence[torch.Tensor], conditioning_scale: Sequence[Scale] | torch.Tensor,
        class_labels: torch.Tensor | None = None, timestep_cond: torch.Tensor | None = None,
        attention_mask: torch.Tensor | None = None, added_cond_kwargs: Mapping[str, torch.Tensor] | None = None,
        cross_attention_kwargs: AttentionOptions | None = None, guess_mode: bool = False, return_dict: bool = True,
    ) -> ControlNetOutput | tuple[tuple[torch.Tensor, ...], torch.Tensor]:  # fmt: skip
        """Answers the sum of the residuals, see :meth:`ControlNetModel.forward`.

        Args:
            sample, timestep, encoder_hidden_states, class_labels, timestep_cond, attention_mask, added_cond_kwargs,
                cross_attention_kwargs, guess_mode, return_dict: Of all.
            controlnet_cond, conditioning_scale: A picture and a weight for each network.

        Raises:
            ValueError: There is another number of pictures or weights than of networks.
        """
        self.check_counts(controlnet_cond=controlnet_cond, conditioning_scale=conditioning_scale)
        shared = (class_labels, timestep_cond, attention_mask, added_cond_kwargs, cross_attention_kwargs, guess_mode)
        each = zip(self.members, controlnet_cond, conditioning_scale, strict=True)
        start = (sample, timestep, encoder_hidden_states)
        output = add_outputs([net(*start, picture, scale, *shared) for net, picture, scale in each])
        return output if return_dict else (output.down_block_res_samples, output.mid_block_res_sample)
