"""ControlNet-XS (arXiv:2312.06573): a slim network that exchanges features with a U-Net at every layer of its way down.

Before each layer the slim side reads the U-Net's features, after it the U-Net gets the slim side's; before each layer of the way up
the U-Net gets the slim side's state of that layer.
"""

from __future__ import annotations

import math
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from ...errors import ConfigError, check_choice
from ...outputs import BaseOutput
from ..base import ModelMixin
from ..layers.attention import additive_mask
from ..layers.compute import Conv2d, GroupNorm, pixels_last
from ..layers.embeddings import TimestepEmbedding, sinusoids, time_tensor
from ..layers.options import AttentionOptions, read_options
from ..layers.resnet import Downsample2D, activate
from ..layers.transformer_2d import Transformer2D
from ..unets.blocks import DOWN_BLOCKS, UP_BLOCKS, Conditions, DownBlock, Level, MidBlock, Shared, UpBlock, make_resnet, spread
from ..unets.conditioning import text_and_sizes
from ..unets.unet_2d_condition import UNet2DConditionModel
from .controlnet import ControlNetConditioningEmbedding, Scale, check_followed, read_scale, zero_conv

_LAYERS = 2  # of each level
_TYPES = ("DownBlock2D", "CrossAttnDownBlock2D")
_BASE_NAMES = (
    (r"^(conv_in|time_embedding|add_embedding|conv_norm_out|conv_out)\.", r"base_\1."),
    (r"^(down_blocks\.\d+)\.(resnets|attentions)\.", r"\1.base_\2."),
    (r"^(down_blocks\.\d+)\.downsamplers\.0\.", r"\1.base_downsamplers."),
    (r"^mid_block\.", "mid_block.base_midblock."),
    (r"^(up_blocks\.\d+)\.upsamplers\.0\.", r"\1.upsamplers."),
)
"""Parameter names of the U-Net -> of the whole."""

_CONTROL_NAMES = (
    (r"^(conv_in|time_embedding)\.", r"ctrl_\1."),
    (r"^(down_blocks\.\d+)\.(resnets|attentions|downsamplers)\.", r"\1.ctrl_\2."),
    (r"^mid_block\.midblock\.", "mid_block.ctrl_midblock."),
    (r"^up_connections\.", "up_blocks."),
)
"""Parameter names of the adapter -> of the whole."""


@dataclass
class ControlNetXSOutput(BaseOutput):
    """Output of a steered U-Net: ``sample`` (B, C, H, W)."""

    sample: torch.Tensor


@dataclass(frozen=True)
class _Plan:
    """What both sides are built from, each value from the finest level."""

    types: Sequence[str]
    base_widths: Sequence[int]
    widths: Sequence[int]
    heads: Sequence[int]
    depths: Sequence[int]
    contexts: Sequence[int]
    max_groups: int
    linear: bool

    def groups(self, channels: int) -> int:
        """The most groups that ``channels`` fall into."""
        return max(n for n in range(1, self.max_groups + 1) if channels % n == 0)


def _plan(
    types: Sequence[str], base_widths: Sequence[int], widths: Sequence[int], heads: Any, depths: Any, contexts: Any,
    max_groups: int, linear: bool, prefix: str = "",
) -> _Plan:  # fmt: skip
    for name in types:
        check_choice("down_block_types", name, _TYPES)
    named = {
        f"{prefix}block_out_channels": widths, f"{prefix}num_attention_heads": heads, "transformer_layers_per_block": depths,
        "cross_attention_dim": contexts,
    }  # fmt: skip
    own, heads, depths, contexts = (spread(value, len(types), key) for key, value in named.items())
    base = spread(list(base_widths), len(types), "base_block_out_channels")
    _check_heads(f"{prefix}num_attention_heads", heads, own)
    return _Plan(types, base, own, heads, depths, contexts, max_groups, linear)


def _check_heads(key: str, heads: Sequence[int], widths: Sequence[int]) -> None:
    for i, (count, width) in enumerate(zip(heads, widths, strict=True)):
        if not 0 < count <= width:
            raise ConfigError(f"{key}={count!r} does not fit the {width} channels of level {i}")


class _Parts(nn.Module):
    """Modules under the names that the checkpoint has for them."""

    def __init__(self, parts: Mapping[str, nn.Module | None]) -> None:
        super().__init__()
        for name, part in parts.items():
            self.add_module(name, part)


def _control_down(plan: _Plan, shared: Shared, i: int) -> dict[str, nn.Module | None]:
    """The slim side of level ``i``, and the exchanges."""
    width, base, resample = plan.widths[i], plan.base_widths[i], i < len(plan.widths) - 1
    before = [(plan.widths[max(i - 1, 0)], plan.base_widths[max(i - 1, 0)])] + [(width, base)] * (_LAYERS - 1)
    resnets = [make_resnet(shared, c + b, width, 1.0, groups=plan.groups(c + b), groups_out=plan.groups(width)) for c, b in before]
    attentions: list[nn.Module] = []
    if DOWN_BLOCKS[plan.types[i]].attention:
        sizes = (width, plan.heads[i], plan.contexts[i], plan.depths[i], plan.groups(width))
        attentions = [Transformer2D(*sizes, linear_projection=plan.linear) for _ in range(_LAYERS)]
    read = [b for _, b in before] + [base] * resample
    return {
        "resnets": nn.ModuleList(resnets),
        "attentions": nn.ModuleList(attentions) if attentions else None,
        "downsamplers": Downsample2D(width + base, out_channels=width) if resample else None,
        "base_to_ctrl": nn.ModuleList(zero_conv(b, b) for b in read),
        "ctrl_to_base": nn.ModuleList(zero_conv(width, base) for _ in read),
    }


def _control_mid(plan: _Plan, temb_channels: int) -> dict[str, nn.Module | None]:
    width, base = plan.widths[-1], plan.base_widths[-1]
    groups = plan.groups(math.gcd(width, width + base))
    shared = Shared(temb_channels, norm_num_groups=groups, norm_eps=1e-6, use_linear_projection=plan.linear)
    level = Level(plan.heads[-1], None, plan.contexts[-1], plan.depths[-1])
    middle = MidBlock("transformer", shared, level, width, 1.0)
    middle.resnets[0] = make_resnet(shared, width + base, width, 1.0)
    return {"midblock": middle, "base_to_ctrl": zero_conv(base, base), "ctrl_to_base": zero_conv(width, base)}


def _states(widths: Sequence[int]) -> list[int]:
    """Channels of the states of a way down, in the order that the way up takes them."""
    levels = [[width] * (_LAYERS + (i < len(widths) - 1)) for i, width in enumerate(widths)]
    return [widths[0], *(w for level in levels for w in level)][::-1]


def _control_up(plan: _Plan) -> list[nn.ModuleList]:
    """What the layers of the way up, from the coarsest, get of the slim side's states."""
    states, levels, before = _states(plan.widths), [], plan.base_widths[-1]
    for i, base in enumerate(reversed(plan.base_widths)):
        mine = states[i * (_LAYERS + 1) : (i + 1) * (_LAYERS + 1)]
        levels.append(nn.ModuleList(zero_conv(state, base if j else before) for j, state in enumerate(mine)))
        before = base
    return levels


class ControlNetXSAdapter(ModelMixin):
    """The slim side alone: what is trained and saved. :meth:`UNetControlNetXSModel.from_unet` joins it to a U-Net.

    Args:
        conditioning_channels, conditioning_embedding_out_channels: Channels of the picture; widths of the layers that read it.
        conditioning_channel_order: Order of the picture's channels that the network was trained with, ``"rgb"`` or ``"bgr"``.
        time_embedding_mix, learn_time_embedding: Share of an own embedding of the time; whether there is one.
        num_attention_heads, block_out_channels, transformer_layers_per_block: Of each level of the slim side.
        base_block_out_channels, cross_attention_dim, down_block_types, sample_size: Of the U-Net.
        upcast_attention: Accepted and without effect: attention scores are always accumulated in float32.
        max_norm_num_groups: Normalisations have the most groups up to this that divide their channels.
        use_linear_projection: As the U-Net's.

    Raises:
        ConfigError: Values are unknown or do not fit together.
    """

    def __init__(
        self, conditioning_channels: int = 3, conditioning_channel_order: str = "rgb",
        conditioning_embedding_out_channels: tuple[int, ...] = (16, 32, 96, 256), time_embedding_mix: float = 1.0,
        learn_time_embedding: bool = False, num_attention_heads: int | tuple[int, ...] = 4,
        block_out_channels: tuple[int, ...] = (4, 8, 16, 16), base_block_out_channels: tuple[int, ...] = (320, 640, 1280, 1280),
        cross_attention_dim: int = 1024, down_block_types: tuple[str, ...] = (*("CrossAttnDownBlock2D",) * 3, "DownBlock2D"),
        sample_size: int | None = 96, transformer_layers_per_block: int | tuple[int, ...] = 1, upcast_attention: bool = True,
        max_norm_num_groups: int = 32, use_linear_projection: bool = True,
    ) -> None:  # fmt: skip
        super().__init__()
        check_choice("conditioning_channel_order", conditioning_channel_order, ("rgb", "bgr"))
        _check_mix(time_embedding_mix, learn_time_embedding)
        plan = _plan(
            down_block_types, base_block_out_channels, list(block_out_channels), num_attention_heads, transformer_layers_per_block,
            cross_attention_dim, max_norm_num_groups, use_linear_projection,
        )  # fmt: skip
        width, base = block_out_channels[0], base_block_out_channels[0]
        self.controlnet_cond_embedding = ControlNetConditioningEmbedding(
            width, conditioning_channels, conditioning_embedding_out_channels
        )
        self.time_embedding = TimestepEmbedding(base, 4 * base) if learn_time_embedding else None
        self.conv_in = Conv2d(4, width, 3, padding=1)
        self.control_to_base_for_conv_in = zero_conv(width, base)
        shared = Shared(4 * base)
        self.down_blocks = nn.ModuleList(_Parts(_control_down(plan, shared, i)) for i in range(len(plan.widths)))
        self.mid_block = _Parts(_control_mid(plan, 4 * base))
        self.up_connections = nn.ModuleList(_Parts({"ctrl_to_base": convs}) for convs in _control_up(plan))

    @classmethod
    def from_unet(
        cls, unet: UNet2DConditionModel, size_ratio: float | None = None, block_out_channels: Sequence[int] | None = None,
        num_attention_heads: Sequence[int] | int | None = None, learn_time_embedding: bool = False, time_embedding_mix: float = 1.0,
        conditioning_channels: int = 3, conditioning_channel_order: str = "rgb",
        conditioning_embedding_out_channels: tuple[int, ...] = (16, 32, 96, 256),
    ) -> ControlNetXSAdapter:  # fmt: skip
        """Builds a slim side to train for ``unet``, with its dtype.

        Args:
            unet: The U-Net to follow.
            size_ratio, block_out_channels: Channels of each level, as a share of the U-Net's, or as they are; one of the two.
            num_attention_heads: Of each level, ``None`` for the U-Net's.
            learn_time_embedding, time_embedding_mix, conditioning_channels, conditioning_channel_order,
                conditioning_embedding_out_channels: See the class.

        Raises:
            ValueError: Both or none of ``size_ratio`` and ``block_out_channels`` are given.
            ConfigError: The U-Net has something that this network cannot follow.
        """
        if (size_ratio is None) == (block_out_channels is None):
            given = f"size_ratio={size_ratio!r} and block_out_channels={block_out_channels!r}"
            raise ValueError(f"{given}: pass exactly one, a share of the U-Net's channels or the channels")
        config = unet.config
        _check_followed(unet)
        widths = block_out_channels or [int(width * (size_ratio or 0)) for width in config.block_out_channels]
        same = ("cross_attention_dim", "down_block_types", "sample_size", "transformer_layers_per_block", "upcast_attention")
        adapter = cls(
            **{key: config[key] for key in (*same, "use_linear_projection")}, block_out_channels=tuple(widths),
            base_block_out_channels=config.block_out_channels, max_norm_num_groups=config.norm_num_groups,
            num_attention_heads=config.attention_head_dim if num_attention_heads is None else num_attention_heads,  # type: ignore[arg-type]
            learn_time_embedding=learn_time_embedding, time_embedding_mix=time_embedding_mix,
            conditioning_channels=conditioning_channels, conditioning_channel_order=conditioning_channel_order,
            conditioning_embedding_out_channels=conditioning_embedding_out_channels,
        )  # fmt: skip
        return adapter.to(dtype=unet.dtype)

    def forward(self, *args: Any, **kwargs: Any) -> None:
        """Refuses: the slim side cannot run by itself."""
        raise ValueError("a ControlNetXSAdapter cannot run by itself: join it to a U-Net by UNetControlNetXSModel.from_unet")


def _check_mix(mix: float, learned: bool) -> None:
    if mix < 1.0 and not learned:
        raise ConfigError(f"time_embedding_mix={mix} needs an own embedding of the time: set learn_time_embedding=True")


def _check_followed(unet: UNet2DConditionModel) -> None:
    check_followed(unet, {*UNetControlNetXSModel._init_parameters(), "attention_head_dim"})


class _XSDownBlock(_Parts):
    """A level of the way down, both sides in step."""

    def forward(
        self, base: torch.Tensor, control: torch.Tensor | None, c: Conditions, scale: Scale
    ) -> tuple[torch.Tensor, torch.Tensor | None, list[torch.Tensor], list[torch.Tensor | None]]:
        """The U-Net's and the slim side's features (B, C, H, W), the latter ``None`` to leave it out -> those, and all states."""
        parts: Any = self._modules
        states: list[torch.Tensor] = []
        control_states: list[torch.Tensor | None] = []

        def run(side: str, i: int, x: torch.Tensor) -> torch.Tensor:
            if i == _LAYERS:
                return parts[f"{side}_downsamplers"](x)
            x = parts[f"{side}_resnets"][i](x, c.activated)
            attentions = parts[f"{side}_attentions"]
            return x if attentions is None else attentions[i](x, c.context, c.mask, None, c.options)

        for i in range(_LAYERS + (parts["base_downsamplers"] is not None)):
            seen = base
            base = run("base", i, base)
            if control is not None:
                control = run("ctrl", i, torch.cat([control, parts["base_to_ctrl"][i](seen)], dim=1))
                base = base + parts["ctrl_to_base"][i](control) * scale
            states.append(base)
            control_states.append(control)
        return base, control, states, control_states


class _XSMidBlock(_Parts):
    """The middle of both sides."""

    def forward(
        self, base: torch.Tensor, control: torch.Tensor | None, c: Conditions, scale: Scale
    ) -> tuple[torch.Tensor, torch.Tensor | None]:
        """The U-Net's and the slim side's features -> the same."""
        parts: Any = self._modules
        seen = base
        base = parts["base_midblock"](base, c)
        if control is not None:
            control = parts["ctrl_midblock"](torch.cat([control, parts["base_to_ctrl"](seen)], dim=1), c)
            base = base + parts["ctrl_to_base"](control) * scale
        return base, control


class _XSUpBlock(_Parts):
    """A level of the way up, which the U-Net walks alone."""

    def forward(
        self, x: torch.Tensor, states: list[torch.Tensor], control_states: list[torch.Tensor | None], c: Conditions, scale: Scale
    ) -> torch.Tensor:
        """Features (B, C, H, W), the states of both sides, last used first -> (B, C', 2H, 2W)."""
        parts: Any = self._modules
        for i, resnet in enumerate(parts["resnets"]):
            if (control := control_states[-1 - i]) is not None:
                x = x + parts["ctrl_to_base"][i](control) * scale
            x = resnet(torch.cat([x, states[-1 - i]], dim=1), c.activated)
            if parts["attentions"] is not None:
                x = parts["attentions"][i](x, c.context, c.mask, None, c.options)
        return x if parts["upsamplers"] is None else parts["upsamplers"](x)


class UNetControlNetXSModel(ModelMixin):
    """A U-Net and the slim side that steers it, as one network.

    Args:
        sample_size, down_block_types, up_block_types, block_out_channels, norm_num_groups, cross_attention_dim,
            transformer_layers_per_block, addition_embed_type, addition_time_embed_dim, upcast_attention, use_linear_projection,
            time_cond_proj_dim, projection_class_embeddings_input_dim: Of the U-Net, :class:`UNet2DConditionModel`.
        num_attention_heads: Heads of the U-Net's transformers.
        time_embedding_mix: Share of the slim side's own embedding of the time.
        ctrl_conditioning_channels, ctrl_conditioning_embedding_out_channels, ctrl_conditioning_channel_order,
            ctrl_learn_time_embedding, ctrl_block_out_channels, ctrl_num_attention_heads, ctrl_max_norm_num_groups: See
            :class:`ControlNetXSAdapter`.

    Raises:
        ConfigError: Values are unknown or do not fit together.
    """

    def __init__(
        self, sample_size: int | None = 96, down_block_types: tuple[str, ...] = (*("CrossAttnDownBlock2D",) * 3, "DownBlock2D"),
        up_block_types: tuple[str, ...] = ("UpBlock2D", *("CrossAttnUpBlock2D",) * 3),
        block_out_channels: tuple[int, ...] = (320, 640, 1280, 1280), norm_num_groups: int | None = 32,
        cross_attention_dim: int | tuple[int, ...] = 1024, transformer_layers_per_block: int | tuple[int, ...] = 1,
        num_attention_heads: int | tuple[int, ...] = 8, addition_embed_type: str | None = None,
        addition_time_embed_dim: int | None = None, upcast_attention: bool = True, use_linear_projection: bool = True,
        time_cond_proj_dim: int | None = None, projection_class_embeddings_input_dim: int | None = None,
        time_embedding_mix: float = 1.0, ctrl_conditioning_channels: int = 3,
        ctrl_conditioning_embedding_out_channels: tuple[int, ...] = (16, 32, 96, 256),
        ctrl_conditioning_channel_order: str = "rgb", ctrl_learn_time_embedding: bool = False,
        ctrl_block_out_channels: tuple[int, ...] = (4, 8, 16, 16), ctrl_num_attention_heads: int | tuple[int, ...] = 4,
        ctrl_max_norm_num_groups: int = 32,
    ) -> None:  # fmt: skip
        super().__init__()
        check_choice("ctrl_conditioning_channel_order", ctrl_conditioning_channel_order, ("rgb", "bgr"))
        check_choice("addition_embed_type", addition_embed_type, (None, "text_time"))
        _check_mix(time_embedding_mix, ctrl_learn_time_embedding)
        for i, name in enumerate(spread(list(up_block_types), len(down_block_types), "up_block_types")):
            check_choice(f"up_block_types[{i}]", name, [kind.replace("Down", "Up") for kind in _TYPES])
        plan = _plan(
            down_block_types, block_out_channels, list(ctrl_block_out_channels), ctrl_num_attention_heads,
            transformer_layers_per_block, cross_attention_dim, ctrl_max_norm_num_groups, use_linear_projection, "ctrl_",
        )  # fmt: skip
        width, base, time_dim = ctrl_block_out_channels[0], block_out_channels[0], 4 * block_out_channels[0]
        self.base_conv_in, self.ctrl_conv_in = Conv2d(4, base, 3, padding=1), Conv2d(4, width, 3, padding=1)
        self.controlnet_cond_embedding = ControlNetConditioningEmbedding(
            width, ctrl_conditioning_channels, ctrl_conditioning_embedding_out_channels
        )
        self.control_to_base_for_conv_in = zero_conv(width, base)
        self.base_time_embedding = TimestepEmbedding(base, time_dim, cond_dim=time_cond_proj_dim)
        self.ctrl_time_embedding = TimestepEmbedding(base, time_dim) if ctrl_learn_time_embedding else None
        self.base_add_embedding: TimestepEmbedding | None = None
        if addition_embed_type is not None:
            if projection_class_embeddings_input_dim is None or addition_time_embed_dim is None:
                needed = "addition_time_embed_dim and projection_class_embeddings_input_dim"
                raise ConfigError(f"addition_embed_type={addition_embed_type!r} needs {needed}")
            self.base_add_embedding = TimestepEmbedding(projection_class_embeddings_input_dim, time_dim)
        self._build_blocks(
            plan, Shared(time_dim, norm_num_groups=norm_num_groups, norm_eps=1e-6, use_linear_projection=use_linear_projection)
        )
        self.base_conv_norm_out = GroupNorm(norm_num_groups or 32, base, eps=1e-5)
        self.base_conv_act = nn.SiLU()
        self.base_conv_out = Conv2d(base, 4, 3, padding=1)

    def _build_blocks(self, plan: _Plan, shared: Shared) -> None:
        widths, count, config = plan.base_widths, len(plan.types), self.config
        heads = spread(config.num_attention_heads, count, "num_attention_heads")
        _check_heads("num_attention_heads", heads, widths)
        if any(width % (shared.norm_num_groups or 32) for width in widths):
            raise ConfigError(f"block_out_channels={widths} are no multiples of norm_num_groups={shared.norm_num_groups}")
        levels = [Level(heads[i], None, plan.contexts[i], plan.depths[i]) for i in range(count)]
        self.down_blocks = nn.ModuleList()
        for i, name in enumerate(plan.types):
            resample = i < count - 1
            down = DownBlock(DOWN_BLOCKS[name], shared, levels[i], widths[max(i - 1, 0)], widths[i], _LAYERS, resample)
            halving = down.downsamplers[0] if down.downsamplers is not None else None
            parts = {"base_resnets": down.resnets, "base_attentions": down.attentions, "base_downsamplers": halving}
            for key, part in _control_down(plan, Shared(shared.temb_channels), i).items():
                parts[key if "base" in key else f"ctrl_{key}"] = part
            self.down_blocks.append(_XSDownBlock(parts))
        middle = MidBlock("transformer", shared, levels[-1], widths[-1], 1.0)
        control = _control_mid(plan, shared.temb_channels)
        self.mid_block = _XSMidBlock({"base_midblock": middle, "ctrl_midblock": control.pop("midblock"), **control})
        self.up_blocks, before, states = nn.ModuleList(), widths[-1], _states(widths)
        for i, (name, connections) in enumerate(zip(config.up_block_types, _control_up(plan), strict=True)):
            width, used = widths[count - 1 - i], states[i * (_LAYERS + 1) : (i + 1) * (_LAYERS + 1)]
            up = UpBlock(UP_BLOCKS[name], shared, levels[count - 1 - i], before, width, width, used, _LAYERS + 1, i < count - 1)
            doubling = up.upsamplers[0] if up.upsamplers is not None else None
            parts = {"resnets": up.resnets, "attentions": up.attentions, "upsamplers": doubling, "ctrl_to_base": connections}
            self.up_blocks.append(_XSUpBlock(parts))
            before = width

    @classmethod
    def from_unet(
        cls, unet: UNet2DConditionModel, controlnet: ControlNetXSAdapter | None = None, size_ratio: float | None = None,
        ctrl_block_out_channels: Sequence[int] | None = None, time_embedding_mix: float | None = None,
        ctrl_optional_kwargs: Mapping[str, Any] | None = None,
    ) -> UNetControlNetXSModel:  # fmt: skip
        """Joins a U-Net and a slim side, with copies of their weights.

        Args:
            unet: The U-Net.
            controlnet: The slim side; without it a new one is made from the other arguments.
            size_ratio, ctrl_block_out_channels, time_embedding_mix: See :meth:`ControlNetXSAdapter.from_unet`.
            ctrl_optional_kwargs: Its further arguments.

        Raises:
            ValueError: A slim side is given together with arguments for a new one.
            ConfigError: The two do not fit together.
        """
        asked = {"size_ratio": size_ratio, "block_out_channels": ctrl_block_out_channels, "time_embedding_mix": time_embedding_mix}
        given = {key: value for key, value in asked.items() if value is not None} | dict(ctrl_optional_kwargs or {})
        if controlnet is None:
            controlnet = ControlNetXSAdapter.from_unet(unet, **given)
        elif given:
            raise ValueError(f"controlnet is given, so {', '.join(given)} would be ignored: leave them out, or the controlnet")
        theirs, own = unet.config, controlnet.config
        _check_followed(unet)
        if list(own.base_block_out_channels) != list(theirs.block_out_channels):
            widths = f"{list(own.base_block_out_channels)}, not {list(theirs.block_out_channels)}"
            raise ConfigError(f"controlnet was made for a U-Net with block_out_channels={widths}: use the one made for this U-Net")
        known = cls._init_parameters()
        values = {key: value for key, value in theirs.items() if key in known and key != "num_attention_heads"}
        renamed = {key: f"ctrl_{key}" for key in own if f"ctrl_{key}" in known}
        network = cls(
            **values, num_attention_heads=theirs.attention_head_dim, time_embedding_mix=own.time_embedding_mix,
            **{name: own[key] for key, name in renamed.items()},
        )  # fmt: skip
        network.load_state_dict(
            {_renamed(k, _BASE_NAMES): v for k, v in unet.state_dict().items()}
            | {_renamed(k, _CONTROL_NAMES): v for k, v in controlnet.state_dict().items()}
        )
        return network.to(dtype=unet.dtype, device=unet.device)

    def freeze_unet_params(self) -> None:
        """Leaves gradients to the slim side and the exchanges alone."""
        for name, parameter in self.named_parameters():
            parameter.requires_grad_("ctrl" in name or "control" in name or "base_to_ctrl" in name)

    def forward(
        self, sample: torch.Tensor, timestep: torch.Tensor | float | int, encoder_hidden_states: torch.Tensor,
        controlnet_cond: torch.Tensor | None = None, conditioning_scale: Scale = 1.0, class_labels: torch.Tensor | None = None,
        timestep_cond: torch.Tensor | None = None, attention_mask: torch.Tensor | None = None,
        cross_attention_kwargs: AttentionOptions | None = None, added_cond_kwargs: Mapping[str, torch.Tensor] | None = None,
        return_dict: bool = True, apply_control: bool = True,
    ) -> ControlNetXSOutput | tuple[torch.Tensor]:  # fmt: skip
        """Predicts.

        Args:
            sample, timestep, encoder_hidden_states, timestep_cond, attention_mask, cross_attention_kwargs, added_cond_kwargs: See
                :meth:`UNet2DConditionModel.forward`.
            controlnet_cond: The picture (B, ctrl_conditioning_channels, 8H, 8W), RGB in 0..1.
            conditioning_scale: Weight of what the slim side adds; a tensor can change without compiling again.
            class_labels: Must be ``None``: the network has no classes.
            return_dict: Return :class:`ControlNetXSOutput`, otherwise a tuple.
            apply_control: Let the slim side run; without it this is the U-Net alone.

        Returns:
            The prediction (B, 4, H, W).

        Raises:
            ValueError: An argument is unknown to the network, missing, or does not fit.
        """
        options = read_options("cross_attention_kwargs", cross_attention_kwargs)
        self._check_inputs(sample, controlnet_cond if apply_control else None, class_labels, apply_control)
        temb = self._embed_time(sample, timestep, timestep_cond, added_cond_kwargs or {}, apply_control)
        mask = None if attention_mask is None else additive_mask(attention_mask, temb.dtype)
        c, scale = (
            Conditions(temb, nn.functional.silu(temb), encoder_hidden_states, mask, None, options),
            read_scale(conditioning_scale, temb),
        )
        sample = pixels_last(sample)
        x, control = self.base_conv_in(sample), None
        if apply_control and controlnet_cond is not None:
            picture = controlnet_cond.flip(1) if self.config.ctrl_conditioning_channel_order == "bgr" else controlnet_cond
            control = self.ctrl_conv_in(sample) + self.controlnet_cond_embedding(picture)
            x = x + self.control_to_base_for_conv_in(control) * scale
        states, control_states = [x], [control]
        for block in self.down_blocks:
            x, control, new, control_new = self.run_block(block, x, control, c, scale)
            states += new
            control_states += control_new
        x, _ = self.run_block(self.mid_block, x, control, c, scale)
        for i, block in enumerate(self.up_blocks):
            end = len(states) - i * (_LAYERS + 1)
            own = slice(end - _LAYERS - 1, end)
            x = self.run_block(block, x, states[own], control_states[own], c, scale)
        x = self.base_conv_out(activate(self.base_conv_act, self.base_conv_norm_out(x)))
        return ControlNetXSOutput(x) if return_dict else (x,)

    def _check_inputs(
        self, sample: torch.Tensor, picture: torch.Tensor | None, labels: torch.Tensor | None, apply_control: bool
    ) -> None:
        factor = 2 ** (len(self.down_blocks) - 1)
        if sample.dim() != 4 or sample.shape[1] != 4 or sample.shape[2] % factor or sample.shape[3] % factor:
            expected = f"(batch, 4, height, width) with height and width multiples of {factor}"
            raise ValueError(f"sample has shape {tuple(sample.shape)}, this network expects {expected}")
        if labels is not None:
            raise ValueError("class_labels are given, but this network was built without classes: leave them out")
        if picture is not None:
            self.controlnet_cond_embedding.check("controlnet_cond", picture, sample)
        elif apply_control:
            raise ValueError("controlnet_cond=None: pass the picture, or apply_control=False for the U-Net alone")

    def _embed_time(
        self, sample: torch.Tensor, timestep: torch.Tensor | float | int, condition: torch.Tensor | None,
        added: Mapping[str, torch.Tensor], apply_control: bool,
    ) -> torch.Tensor:  # fmt: skip
        config, dtype = self.config, self.base_conv_in.weight.dtype
        times = sinusoids(time_tensor(timestep, sample), config.block_out_channels[0], flip_sin_to_cos=True).to(dtype)
        temb = self.base_time_embedding(times, condition)
        if self.ctrl_time_embedding is not None and apply_control:
            share = config.time_embedding_mix**0.3
            temb = self.ctrl_time_embedding(times) * share + temb * (1 - share)
        needed = () if self.base_add_embedding is None else ("text_embeds", "time_ids")
        if sorted(added) != sorted(needed):
            raise ValueError(f"added_cond_kwargs holds {sorted(added)}, this network reads {sorted(needed)}: pass just those")
        if self.base_add_embedding is not None:
            temb = temb + self.base_add_embedding(text_and_sizes(added, config.addition_time_embed_dim, True, 0).to(dtype))
        return temb


def _renamed(name: str, rules: Sequence[tuple[str, str]]) -> str:
    for pattern, replacement in rules:
        name, found = re.subn(pattern, replacement, name)
        if found:
            break
    return name
