"""ControlNet-XS (arXiv:2312.06573): a slim network that exchanges features with a U-Net at every layer of its way down.

Before each layer the slim side reads the U-Net's features, after it the U-Net gets the slim side's; before each layer of the way up
the U-Net gets the slim side's state of that layer.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import nn

from ...errors import ConfigError, check_choice, check_shape
from ...outputs import BaseOutput
from ..base import ModelMixin
from ..layers.attention import additive_mask
from ..layers.compute import Conv2d, pixels_last
from ..layers.embeddings import TimestepEmbedding, sinusoids, time_tensor
from ..layers.freeu import freed
from ..layers.options import AttentionOptions, read_options
from ..layers.resnet import Downsample2D, activate
from ..layers.transformer_2d import Transformer2D
from ..unets.blocks import Conditions, Level, MidBlock, Shared, make_resnet, spread
from ..unets.conditioning import text_and_sizes
from ..unets.unet_2d_condition import UNet2DConditionModel, down_levels
from .controlnet import ControlNetConditioningEmbedding, Scale, check_followed, read_scale, zero_conv

_LAYERS = 2  # of each level
_TYPES = ("DownBlock2D", "CrossAttnDownBlock2D")


@dataclass
class ControlNetXSOutput(BaseOutput):
    """Output of a steered U-Net: ``sample`` (B, C, H, W)."""

    sample: torch.Tensor


def _levels(config: Mapping[str, Any]) -> list[Level]:
    """What each resolution has of its own; the number of heads stands under its own name here."""
    return down_levels(
        {**config, "attention_head_dim": config["num_attention_heads"], "only_cross_attention": False, "norm_num_groups": None}
    )


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
        if time_embedding_mix < 1.0 and not learn_time_embedding:
            raise ConfigError(
                f"time_embedding_mix={time_embedding_mix} needs an own embedding of the time: set learn_time_embedding=True"
            )
        for name in down_block_types:
            check_choice("down_block_types", name, _TYPES)
        widths = spread(block_out_channels, len(down_block_types), "block_out_channels")
        bases = spread(base_block_out_channels, len(down_block_types), "base_block_out_channels")
        self.controlnet_cond_embedding = ControlNetConditioningEmbedding(
            widths[0], conditioning_channels, conditioning_embedding_out_channels
        )
        time_dim = 4 * bases[0]
        self.time_embedding = TimestepEmbedding(bases[0], time_dim) if learn_time_embedding else None
        self.conv_in = Conv2d(4, widths[0], 3, padding=1)
        self.control_to_base_for_conv_in = zero_conv(widths[0], bases[0])
        levels = _levels(self.config)
        states = self._build_down(levels, widths, bases, time_dim)
        self.mid_block = self._mid(levels[-1], widths[-1], bases[-1], time_dim)
        self.up_connections, before = nn.ModuleList(), bases[-1]
        for base in reversed(bases):  # each layer of the way up gets the state that it takes; the first, in the channels from below
            convs = nn.ModuleList(zero_conv(states.pop(), base if i else before) for i in range(_LAYERS + 1))
            self.up_connections.append(nn.ModuleDict({"ctrl_to_base": convs}))
            before = base

    def _groups(self, channels: int) -> int:
        """The most groups that ``channels`` fall into."""
        return max(n for n in range(1, self.config.max_norm_num_groups + 1) if channels % n == 0)

    def _build_down(self, levels: list[Level], widths: list[int], bases: list[int], time_dim: int) -> list[int]:
        """Builds the way down and the exchanges; returns the channels of its states."""
        self.down_blocks, states, before = nn.ModuleList(), [widths[0]], (widths[0], bases[0])
        for i, (level, width, base) in enumerate(zip(levels, widths, bases, strict=True)):
            read = [before, *[(width, base)] * (_LAYERS - 1)]  # channels of both sides before each layer
            resnets = [
                make_resnet(Shared(time_dim), a + b, width, 1.0, groups=self._groups(a + b), groups_out=self._groups(width))
                for a, b in read
            ]
            parts: dict[str, nn.Module] = {"resnets": nn.ModuleList(resnets)}
            if self.config.down_block_types[i] == "CrossAttnDownBlock2D":
                linear, groups = self.config.use_linear_projection, self._groups(width)
                sizes: Any = (width, level.heads, level.cross_attention_dim, level.depth, groups, linear)
                parts["attentions"] = nn.ModuleList(Transformer2D(*sizes) for _ in read)
            if i < len(widths) - 1:
                parts["downsamplers"] = Downsample2D(width + base, out_channels=width)
                read.append((width, base))
            parts["base_to_ctrl"] = nn.ModuleList(zero_conv(b, b) for _, b in read)
            parts["ctrl_to_base"] = nn.ModuleList(zero_conv(width, base) for _ in read)
            self.down_blocks.append(nn.ModuleDict(parts))
            states, before = states + [width] * len(read), (width, base)
        return states

    def _mid(self, level: Level, width: int, base: int, time_dim: int) -> nn.ModuleDict:
        groups = self._groups(math.gcd(width, base))
        shared = Shared(time_dim, norm_num_groups=groups, norm_eps=1e-6, use_linear_projection=self.config.use_linear_projection)
        middle = MidBlock("transformer", shared, level, width, 1.0)
        middle.resnets[0] = make_resnet(shared, width + base, width, 1.0)
        return nn.ModuleDict({"midblock": middle, "base_to_ctrl": zero_conv(base, base), "ctrl_to_base": zero_conv(width, base)})

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


def _check_followed(unet: UNet2DConditionModel) -> None:
    check_followed(unet, {*UNetControlNetXSModel._init_parameters(), "attention_head_dim"})


class _Joined(nn.ModuleDict):
    """The parts of both sides at one place, under the names that the whole has for them."""

    if TYPE_CHECKING:

        def __getitem__(self, key: str) -> Any: ...

    def __init__(self, base: nn.Module, control: nn.Module, prefix: str = "base_") -> None:
        parts = {f"{prefix}{name}": part for name, part in base.named_children()}
        parts |= {name if "base" in name else f"ctrl_{name}": part for name, part in control.named_children()}
        # a resampler stands in a list of one in a U-Net's blocks, by itself here
        super().__init__({k: v[0] if isinstance(v, nn.ModuleList) and "amplers" in k else v for k, v in parts.items()})


class _DownBlock(_Joined):
    """A level of the way down, both sides in step."""

    def forward(
        self, base: torch.Tensor, control: torch.Tensor | None, c: Conditions, scale: Scale
    ) -> tuple[torch.Tensor, torch.Tensor | None, list[tuple[torch.Tensor, torch.Tensor | None]]]:
        """Features of the U-Net and of the slim side (B, C, H, W), ``None`` to leave it out -> those, and all states of both."""
        states = []
        for i, (read, give) in enumerate(zip(self["base_to_ctrl"], self["ctrl_to_base"], strict=True)):
            seen, base = base, self._layer("base", i, base, c)
            if control is not None:
                control = self._layer("ctrl", i, torch.cat([control, read(seen)], dim=1), c)
                base = base + give(control) * scale
            states.append((base, control))
        return base, control, states

    def _layer(self, side: str, i: int, x: torch.Tensor, c: Conditions) -> torch.Tensor:
        if i == _LAYERS:
            return self[f"{side}_downsamplers"](x)
        x = self[f"{side}_resnets"][i](x, c.activated)
        attentions = f"{side}_attentions"
        return self[attentions][i](x, c.context, c.mask, None, c.options) if attentions in self else x


class _MidBlock(_Joined):
    """The middle of both sides."""

    def forward(self, base: torch.Tensor, control: torch.Tensor | None, c: Conditions, scale: Scale) -> torch.Tensor:
        """The U-Net's and the slim side's features -> the U-Net's."""
        seen, base = base, self["base_midblock"](base, c)
        if control is None:
            return base
        control = self["ctrl_midblock"](torch.cat([control, self["base_to_ctrl"](seen)], dim=1), c)
        return base + self["ctrl_to_base"](control) * scale


class _UpBlock(_Joined):
    """A level of the way up, which the U-Net walks alone."""

    can_be_freed = True

    def forward(
        self, x: torch.Tensor, states: list[tuple[torch.Tensor, torch.Tensor | None]], c: Conditions, scale: Scale,
        size: tuple[int, int] | None,
    ) -> torch.Tensor:  # fmt: skip
        """Features (B, C, H, W), the states of both sides, last used first -> (B, C', 2H, 2W), or of ``size``."""
        for i, (resnet, give) in enumerate(zip(self["resnets"], self["ctrl_to_base"], strict=True)):
            state, control = states[-1 - i]
            if control is not None:
                x = x + give(control) * scale
            if c.freeu is not None:
                x, state = freed(x, state, *c.freeu)
            x = resnet(torch.cat([x, state], dim=1), c.activated)
            if "attentions" in self:
                x = self["attentions"][i](x, c.context, c.mask, None, c.options)
        return self["upsamplers"](x, size) if "upsamplers" in self else x


def _join(unet: UNet2DConditionModel, control: ControlNetXSAdapter) -> dict[str, Any]:
    """The parts of both sides under the names that the whole has for them."""
    ends = ("conv_in", "time_embedding", "add_embedding", "conv_norm_out", "conv_act", "conv_out")
    middle: dict[str, Any] = {"midblock": unet.mid_block}
    levels = zip(unet.down_blocks, control.down_blocks, strict=True), zip(unet.up_blocks, control.up_connections, strict=True)
    return {
        **{f"base_{name}": getattr(unet, name) for name in ends},
        **{f"ctrl_{name}": getattr(control, name) for name in ("conv_in", "time_embedding")},
        **{name: getattr(control, name) for name in ("controlnet_cond_embedding", "control_to_base_for_conv_in")},
        "down_blocks": nn.ModuleList(_DownBlock(*pair) for pair in levels[0]),
        "up_blocks": nn.ModuleList(_UpBlock(*pair, prefix="") for pair in levels[1]),
        "mid_block": _MidBlock(nn.ModuleDict(middle), control.mid_block),  # in the order in which IP-Adapters number layers
    }


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

    if TYPE_CHECKING:  # the parts have the names that `_join` gives them

        def __getattr__(self, name: str) -> Any: ...

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
        for i, name in enumerate(up_block_types):
            check_choice(f"up_block_types[{i}]", name, [kind.replace("Down", "Up") for kind in _TYPES])
        check_choice("addition_embed_type", addition_embed_type, (None, "text_time"))
        config, slim = self.config, ControlNetXSAdapter._init_parameters()
        own: dict[str, Any] = {key: config.get(f"ctrl_{key}", config.get(key)) for key in slim} | {
            "base_block_out_channels": block_out_channels
        }
        try:
            control = ControlNetXSAdapter(**own)
        except ConfigError as error:
            raise ConfigError(f"the slim side, whose keys begin with ctrl_: {error}") from error
        _levels(config)  # names the number of heads as this class does if it does not fit
        known = UNet2DConditionModel._init_parameters()
        heads = {"attention_head_dim": num_attention_heads, "num_attention_heads": None}
        unet = UNet2DConditionModel(**{key: value for key, value in config.items() if key in known} | heads, norm_eps=1e-6)
        for name, part in _join(unet, control).items():
            setattr(self, name, part)
        self.base_conv_norm_out.eps = 1e-5  # the layers before have another
        self.encoder_hid_proj: nn.Module | None = None  # of IP-Adapters

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
        values = {key: value for key, value in theirs.items() if key in known}
        values |= {f"ctrl_{key}": value for key, value in own.items() if f"ctrl_{key}" in known}
        values |= {"num_attention_heads": theirs.attention_head_dim, "time_embedding_mix": own.time_embedding_mix}
        network = cls(**values)
        network.load_state_dict(nn.ModuleDict(_join(unet, controlnet)).state_dict())
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
        check_shape("sample", sample, (None, 4, None, None))
        if class_labels is not None:
            raise ValueError("class_labels are given, but this network was built without classes: leave them out")
        temb = self._embed_time(sample, timestep, timestep_cond, added_cond_kwargs or {}, apply_control)
        mask = None if attention_mask is None else additive_mask(attention_mask, temb.dtype)
        c = Conditions(temb, nn.functional.silu(temb), encoder_hidden_states, mask, None, options)
        scale, sample = read_scale(conditioning_scale, temb), pixels_last(sample)
        x, control = self.base_conv_in(sample), None
        if apply_control:
            if controlnet_cond is None:
                raise ValueError("controlnet_cond=None: pass the picture, or apply_control=False for the U-Net alone")
            self.controlnet_cond_embedding.check("controlnet_cond", controlnet_cond, sample)
            picture = controlnet_cond.flip(1) if self.config.ctrl_conditioning_channel_order == "bgr" else controlnet_cond
            control = self.ctrl_conv_in(sample) + self.controlnet_cond_embedding(picture)
            x = x + self.control_to_base_for_conv_in(control) * scale
        states = [(x, control)]
        for block in self.down_blocks:
            x, control, new = self.run_block(block, x, control, c, scale)
            states += new
        x = self.run_block(self.mid_block, x, control, c, scale)
        for i, block in enumerate(self.up_blocks):
            states, taken = states[: -_LAYERS - 1], states[-_LAYERS - 1 :]
            x = self.run_block(block, x, taken, c.of_up_block(i), scale, states[-1][0].shape[2:] if states else None)
        x = self.base_conv_out(activate(self.base_conv_act, self.base_conv_norm_out(x)))
        return ControlNetXSOutput(x) if return_dict else (x,)

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
