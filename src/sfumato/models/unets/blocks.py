"""The blocks of two-dimensional U-Nets, down, middle and up.

A block is some residual layers, each perhaps followed by an attention of one kind, and perhaps a resampler. The block names of
the checkpoint format are rows of one table of (kind of attention, kind of resampler).
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import nn

from ...errors import ConfigError, did_you_mean
from ..layers.attention import Attention
from ..layers.freeu import freed
from ..layers.options import NO_OPTIONS, AttentionOptions
from ..layers.resnet import Downsample2D, ResnetBlock2D, Upsample2D
from ..layers.transformer_2d import Transformer2D
from .k_blocks import BinomialResample, KAttentionBlock, KResnetBlock


class Conditions(NamedTuple):
    """What the blocks of one forward pass are conditioned on."""

    temb: torch.Tensor  # (B, T)
    activated: torch.Tensor  # the same after the residual layers' activation, once here instead of in every layer
    context: torch.Tensor | None = None  # tokens (B, M, C) for attention
    mask: torch.Tensor | None = None  # bias (B, 1, N) of the attention within the picture
    context_mask: torch.Tensor | None = None  # bias (B, 1, M) of the attention to the tokens
    options: AttentionOptions = NO_OPTIONS  # of this call
    freeu: tuple[torch.Tensor, torch.Tensor] | None = None  # factors of skip connection and features (B,), of this block

    def of_up_block(self, i: int) -> Conditions:
        """The same with what FreeU asks of the ``i``-th block of the way up."""
        freeu = self.options.freeu
        if freeu is None:
            return self
        return self._replace(freeu=(freeu[:, i, 0], freeu[:, i, 1]) if i < freeu.shape[1] else None)


@dataclass(frozen=True)
class Shared:
    """What all blocks of a network have in common; the names are those of the configuration."""

    temb_channels: int
    act_fn: str = "silu"
    norm_num_groups: int | None = 32
    norm_eps: float = 1e-5
    dropout: float = 0.0
    resnet_time_scale_shift: str = "default"
    resnet_skip_time_act: bool = False
    resnet_out_scale_factor: float = 1.0
    downsample_padding: int = 1
    use_linear_projection: bool = False
    cross_attention_norm: str | None = None


@dataclass(frozen=True)
class Level:
    """What one resolution has of its own."""

    heads: int = 1  # of transformers
    head_dim: int | None = None  # width of a head of the other attentions; None for one head
    cross_attention_dim: int | None = None
    depth: int | Sequence[int] = 1  # transformer blocks, for all layers or for each
    only_cross_attention: bool = False
    groups: int | None = None  # of the normalisation before a pixel attention; None for no normalisation


class Kind(NamedTuple):
    """A block type: its attention (``None``, pixel, transformer, added, k) and resampler (conv, resnet, k, skip)."""

    attention: str | None
    resampler: str


DOWN_BLOCKS = {
    "DownBlock2D": Kind(None, "conv"),
    "AttnDownBlock2D": Kind("pixel", "conv"),
    "CrossAttnDownBlock2D": Kind("transformer", "conv"),
    "ResnetDownsampleBlock2D": Kind(None, "resnet"),
    "SimpleCrossAttnDownBlock2D": Kind("added", "resnet"),
    "KDownBlock2D": Kind(None, "k"),
    "KCrossAttnDownBlock2D": Kind("k", "k"),
    "SkipDownBlock2D": Kind(None, "skip"),
    "AttnSkipDownBlock2D": Kind("pixel", "skip"),
}
UP_BLOCKS = {name.replace("Down", "Up"): kind for name, kind in DOWN_BLOCKS.items()}


def find_kind(key: str, name: str, kinds: dict[str, Kind], context: bool) -> Kind:
    """Looks up the block type that the configuration names under ``key``, of those a network with or without ``context`` has."""
    choices = [n for n, kind in kinds.items() if kind.resampler != "skip" and (kind.attention in (None, "pixel") or context)]
    if not context:
        choices += [n for n, kind in kinds.items() if kind.resampler == "skip"]
    if name not in choices:
        raise ConfigError(f"{key} names an unknown block {name!r}: expected {', '.join(choices)}{did_you_mean(str(name), choices)}")
    return kinds[name]


def _attend(kind: str, attention: nn.Module, x: torch.Tensor, c: Conditions) -> torch.Tensor:
    """Calls an attention with what its kind looks at."""
    if kind == "transformer":
        return attention(x, c.context, c.mask, c.context_mask, c.options)
    if kind == "added":
        return attention(x, c.context, c.context_mask if c.mask is None else c.mask)
    return attention(x, c.temb, c.context, c.mask, c.context_mask) if kind == "k" else attention(x)


def pixel_attention(channels: int, head_dim: int | None, groups: int | None, eps: float, **options: Any) -> Attention:
    """Attention within a feature map, and with options perhaps beyond, added to it."""
    head_dim = head_dim or channels
    options |= {"bias": True, "residual_connection": True, "norm_num_groups": groups, "eps": eps}
    return Attention(channels, heads=channels // head_dim, dim_head=head_dim, **options)


def _attention(
    kind: str, channels: int, level: Level, shared: Shared, depth: int, scale: float = 1.0, k_self_attention: bool = False
) -> nn.Module:
    context, only_context = level.cross_attention_dim, level.only_cross_attention
    if kind == "pixel":
        return pixel_attention(channels, level.head_dim, level.groups, shared.norm_eps, rescale_output_factor=scale)
    if kind == "transformer":
        groups = shared.norm_num_groups or 32
        return Transformer2D(channels, level.heads, context, depth, groups, shared.use_linear_projection, only_context)
    if kind == "k":
        return KAttentionBlock(channels, level.head_dim or channels, context, shared.temb_channels, k_self_attention)
    added = {"added_kv_proj_dim": context, "only_cross_attention": only_context}
    norm = shared.cross_attention_norm
    return pixel_attention(channels, level.head_dim, level.groups, 1e-5, cross_attention_norm=norm, **added)


def make_resnet(shared: Shared, in_channels: int, out_channels: int, scale: float, **options: Any) -> ResnetBlock2D:
    """A residual layer that takes the activated time embedding."""
    options = {"groups": shared.norm_num_groups or 32, "eps": shared.norm_eps, "dropout": shared.dropout, **options}
    options |= {"act": shared.act_fn, "time_embedding_norm": shared.resnet_time_scale_shift, "output_scale_factor": scale}
    return ResnetBlock2D(in_channels, out_channels, temb_channels=shared.temb_channels, **options)


def spread(value: Any, count: int, key: str, what: str = "down_block_types") -> list[Any]:
    """Spreads one configuration value over ``count`` of ``what``; a :class:`ConfigError` if it has another number of values."""
    if not isinstance(value, (list, tuple)):
        return [value] * count
    if len(value) != count:
        raise ConfigError(f"{key}={value!r} has {len(value)} values for {count} {what}: give {count}")
    return list(value)


class _Block(nn.Module):
    """What down and up blocks share: layers, each with or without attention."""

    carries_picture = False

    def __init__(
        self, kind: Kind, shared: Shared, level: Level, channels: Iterable[tuple[int, int, int]], k_self_attention: bool = False
    ) -> None:
        """``channels`` holds for each layer the channels in, between its convolutions, and out."""
        super().__init__()
        # k layers modulate with the embedding as it is; the layers of pixel-space networks can be told to do so
        simple = kind.resampler == "resnet" and kind.attention != "pixel"
        self.activated = kind.resampler != "k" and not (simple and shared.resnet_skip_time_act)
        self.scale = shared.resnet_out_scale_factor if simple else 1.0
        plan = list(channels)
        if kind.resampler == "k":
            layers: list[nn.Module] = [KResnetBlock(*c, shared.temb_channels, shared.act_fn, shared.dropout) for c in plan]
        else:
            layers = [make_resnet(shared, first, last, self.scale) for first, _, last in plan]
        self.resnets = nn.ModuleList(layers)
        self.attentions: nn.ModuleList | None = None
        if kind.attention is not None:
            depths = spread(level.depth, len(plan), "transformer_layers_per_block", "layers of a block")
            self.attentions = nn.ModuleList(
                _attention(kind.attention, last, level, shared, depth, k_self_attention=k_self_attention)
                for (_, _, last), depth in zip(plan, depths, strict=True)
            )
        self.kind, self.attention = kind, kind.attention or ""

    def _resampler(self, shared: Shared, channels: int, up: bool) -> nn.ModuleList:
        if self.kind.resampler == "resnet":
            sampler: nn.Module = make_resnet(shared, channels, channels, self.scale, up=up, down=not up)
        elif self.kind.resampler == "k":
            sampler = BinomialResample(up=up, padding="reflect")
        else:
            sampler = Upsample2D(channels) if up else Downsample2D(channels, padding=shared.downsample_padding)
        return nn.ModuleList([sampler])


class DownBlock(_Block):
    """Layers, then halving if ``resample``."""

    def __init__(
        self, kind: Kind, shared: Shared, level: Level, in_channels: int, out_channels: int, layers: int, resample: bool
    ) -> None:
        channels = [(out_channels if i else in_channels, out_channels, out_channels) for i in range(layers)]
        super().__init__(kind, shared, level, channels, k_self_attention=not resample)
        self.is_k = kind.resampler == "k"
        # the lowest level of a k network hands its output on and, when it attends to a context, keeps no copy of it
        last = 0 if kind.attention == "k" and not resample else out_channels
        self.state_channels = [last] if self.is_k else [out_channels] * (layers + resample)
        self.keeps_state = last > 0
        self.residual_before_resample = kind.attention == "transformer"
        self.downsamplers = self._resampler(shared, out_channels, up=False) if resample else None

    def forward(
        self, x: torch.Tensor, c: Conditions, residual: torch.Tensor | None = None
    ) -> tuple[torch.Tensor, list[torch.Tensor | None]]:
        """``x`` (B, C, H, W) -> (B, C', H/2, W/2), and the states that the up blocks need.

        ``residual`` is an adapter's addition: before the halving where there is a transformer, after it elsewhere.
        """
        temb = c.activated if self.activated else c.temb
        states: list[torch.Tensor | None] = []
        for i, resnet in enumerate(self.resnets):
            x = resnet(x, temb)
            if self.attentions is not None:
                x = _attend(self.attention, self.attentions[i], x, c)
            states.append(x)
        if residual is not None and self.residual_before_resample:
            x = states[-1] = x + residual
        if self.is_k:
            states = [x if self.keeps_state else None]
        if self.downsamplers is not None:
            for sampler in self.downsamplers:
                x = sampler(x, temb) if self.kind.resampler == "resnet" else sampler(x)
            if not self.is_k:
                states.append(x)
        if residual is not None and not self.residual_before_resample:
            x = states[-1] = x + residual
        return x, states


class UpBlock(_Block):
    """Layers, each with a state of the way down, then doubling.

    ``k`` blocks change to the next block's channels at their end. ``state_channels`` are those of the states, in order of use;
    one for each layer, or a single one for ``k`` blocks.
    """

    def __init__(
        self, kind: Kind, shared: Shared, level: Level, in_channels: int, out_channels: int, next_channels: int,
        state_channels: Sequence[int], layers: int, resample: bool,
    ) -> None:  # fmt: skip
        self.is_k = kind.resampler == "k"
        self.out_channels = next_channels if self.is_k else out_channels
        inputs = [in_channels] + [out_channels] * (layers - 1)
        states = [*state_channels, *[0] * (layers - len(state_channels))]
        outputs = [out_channels] * (layers - 1) + [self.out_channels]
        middles = [out_channels] * layers if kind.attention else outputs
        channels = [(i + s, m, o) for i, s, m, o in zip(inputs, states, middles, outputs, strict=True)]
        super().__init__(kind, shared, level, channels, k_self_attention=state_channels[0] == 0)
        self.num_states = len(state_channels)
        self.takes_size = kind.resampler == "conv"
        self.can_be_freed = self.takes_size and kind.attention != "pixel"
        self.upsamplers = self._resampler(shared, out_channels, up=True) if resample else None

    def forward(
        self, x: torch.Tensor, states: list[torch.Tensor], c: Conditions, size: tuple[int, int] | None = None
    ) -> torch.Tensor:
        """``x`` (B, C, H, W), ``states`` of the way down, last used first -> (B, C', 2H, 2W), or of ``size``."""
        temb = c.activated if self.activated else c.temb
        for i, resnet in enumerate(self.resnets):
            if i < self.num_states and states[-1 - i] is not None:
                state = states[-1 - i]
                if c.freeu is not None and self.can_be_freed:
                    x, state = freed(x, state, *c.freeu)
                x = torch.cat([x, state], dim=1)
            x = resnet(x, temb)
            if self.attentions is not None:
                x = _attend(self.attention, self.attentions[i], x, c)
        if self.upsamplers is not None:
            for sampler in self.upsamplers:
                x = sampler(x, temb) if self.kind.resampler == "resnet" else sampler(x) if size is None else sampler(x, size)
        return x


class MidBlock(nn.Module):
    """A layer, and perhaps an attention and another layer, at the lowest resolution.

    ``scale`` divides the outputs of the layers and of pixel attentions; ``pair`` means attention and second layer.
    """

    def __init__(self, attention: str | None, shared: Shared, level: Level, channels: int, scale: float, pair: bool = True) -> None:
        super().__init__()
        self.attention = attention or ""
        self.activated = not (attention == "added" and shared.resnet_skip_time_act)
        self.resnets = nn.ModuleList(make_resnet(shared, channels, channels, scale) for _ in range(1 + pair))
        self.attentions: nn.ModuleList | None = None
        if attention is not None:
            depth = level.depth if isinstance(level.depth, int) else level.depth[0]
            self.attentions = nn.ModuleList([_attention(attention, channels, level, shared, depth, scale)])

    def forward(self, x: torch.Tensor, c: Conditions) -> torch.Tensor:
        """``x`` (B, C, H, W) -> the same."""
        temb = c.activated if self.activated else c.temb
        x = self.resnets[0](x, temb)
        if self.attentions is not None:
            x = _attend(self.attention, self.attentions[0], x, c)
        return self.resnets[1](x, temb) if len(self.resnets) > 1 else x
