"""What the two-dimensional U-Nets share: the way down, the middle, the way up."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, cast

import torch
from torch import nn

from ...errors import ConfigError, check_choice
from ...outputs import BaseOutput
from ..base import ModelMixin
from ..layers.compute import Conv2d, GroupNorm
from ..layers.embeddings import TimestepEmbedding, sinusoids
from ..layers.resnet import ACTIVATIONS, activate, activation
from .blocks import DOWN_BLOCKS, UP_BLOCKS, Conditions, DownBlock, Kind, Level, MidBlock, Shared, UpBlock, find_kind, spread
from .skip_blocks import SkipDownBlock, SkipUpBlock


@dataclass
class UNet2DOutput(BaseOutput):
    """Output of an unconditional U-Net: ``sample`` (B, C, H, W)."""

    sample: torch.Tensor


@dataclass
class UNet2DConditionOutput(UNet2DOutput):
    """Output of a conditional U-Net: ``sample`` (B, C, H, W)."""


class UNetBase(ModelMixin):
    """Down blocks, a middle block, up blocks, and the convolutions around them."""

    conv_in: nn.Conv2d
    time_proj: nn.Module
    down_blocks: nn.ModuleList
    up_blocks: nn.ModuleList
    conv_norm_out: nn.Module | None
    mid_block: MidBlock | None
    exact_size_only = False

    def _check_config(self) -> None:
        """Raises :class:`ConfigError` when values that every constructor reads are unknown or do not fit together."""
        config = self.config
        for key in ("block_out_channels", "up_block_types"):
            if key in config:
                spread(list(config[key]), len(config.down_block_types), key)
        for key in ("act_fn", "time_embedding_act_fn", "timestep_post_act"):
            if config.get(key) is not None:
                check_choice(key, config[key], ACTIVATIONS)
        check_choice("resnet_time_scale_shift", config.resnet_time_scale_shift, ("default", "scale_shift"))
        if config.norm_num_groups is not None:
            for width in config.block_out_channels:
                if width % config.norm_num_groups:
                    raise ConfigError(f"block_out_channels: {width} is not a multiple of norm_num_groups={config.norm_num_groups}")

    def _build(
        self, shared: Shared, levels: Sequence[Level], layers: Sequence[int], up_levels: Sequence[Level] | None = None,
        attention_resampler: tuple[str, str] = ("conv", "conv"), context: bool = True,
    ) -> None:  # fmt: skip
        """Builds the blocks that the configuration describes, but for the middle.

        ``levels``, what each resolution has of its own, and ``layers`` run from the finest, ``up_levels`` (by default the levels
        reversed) from the coarsest. ``attention_resampler`` is how blocks with pixel attention halve, and double: conv or resnet.
        ``context``: whether the network attends to one.
        """
        states = self._build_down(shared, levels, layers, attention_resampler[0], context)
        kinds = self._kinds("up_block_types", UP_BLOCKS, attention_resampler[1], context)
        widths = list(self.config.block_out_channels)
        self._build_up(shared, up_levels or list(reversed(levels)), layers[::-1], kinds, widths[::-1], states)
        self.exact_size_only = not all(block.takes_size for block in self.up_blocks[:-1])

    def _kinds(self, key: str, table: dict[str, Kind], attention_resampler: str, context: bool) -> list[Kind]:
        """The kinds of the blocks that the configuration names under ``key``."""
        found = [find_kind(key, name, table, context) for name in self.config[key]]
        return [k._replace(resampler=attention_resampler) if k == Kind("pixel", "conv") else k for k in found]

    def _build_down(
        self,
        shared: Shared,
        levels: Sequence[Level],
        layers: Sequence[int],
        attention_resampler: str = "conv",
        context: bool = True,
    ) -> list[int]:
        """Builds the way down, see :meth:`_build`; returns the channels of its states, the first convolution's first."""
        widths = list(self.config.block_out_channels)
        self.down_blocks, channels, states = nn.ModuleList(), widths[0], [widths[0]]
        for i, kind in enumerate(self._kinds("down_block_types", DOWN_BLOCKS, attention_resampler, context)):
            down = SkipDownBlock if kind.resampler == "skip" else DownBlock
            self.down_blocks.append(down(kind, shared, levels[i], channels, widths[i], layers[i], i < len(widths) - 1))
            channels = widths[i]
            states += cast(list[int], self.down_blocks[i].state_channels)
        self.size_factor = 2 ** (len(widths) - 1)
        return states

    def _build_up(
        self, shared: Shared, levels: Sequence[Level], layers: Sequence[int], kinds: Sequence[Kind], widths: Sequence[int],
        states: list[int],
    ) -> None:  # fmt: skip
        """``levels``, ``layers``, ``kinds`` and ``widths`` run from the coarsest; ``states`` from the finest."""
        self.up_blocks, channels = nn.ModuleList(), widths[0]
        for i, (kind, level, width) in enumerate(zip(kinds, levels, widths, strict=True)):
            is_k, following = kind.resampler == "k", widths[min(i + 1, len(widths) - 1)]
            count = layers[i] if is_k else layers[i] + 1
            taken = 1 if is_k else count
            if len(states) < taken:
                raise ConfigError(
                    f"up_block_types[{i}] needs {taken} states of the way down, {len(states)} are left: use matching types"
                )
            used = states[: -taken - 1 : -1]
            del states[-taken:]
            up = SkipUpBlock if kind.resampler == "skip" else UpBlock
            block = up(kind, shared, level, channels, width, following, used, count, i < len(widths) - 1)
            self.up_blocks.append(block)
            channels = block.out_channels

    def _build_classes(self, in_dim: int, time_dim: int, act: str = "silu") -> None:
        config, kind = self.config, self.config.class_embed_type
        width: Any = config.get("projection_class_embeddings_input_dim")
        if kind in ("projection", "simple_projection") and width is None:
            raise ConfigError(f"class_embed_type={kind!r} needs projection_class_embeddings_input_dim, the width of class_labels")
        self.class_embedding: nn.Module | None = None
        if kind in ("timestep", "projection"):
            self.class_embedding = TimestepEmbedding(in_dim if kind == "timestep" else width, time_dim, act)
        elif kind is not None:
            self.class_embedding = nn.Identity() if kind == "identity" else nn.Linear(width, time_dim)
        elif config.num_class_embeds is not None:
            self.class_embedding = nn.Embedding(config.num_class_embeds, time_dim)

    def project_time(self, times: torch.Tensor) -> torch.Tensor:
        """``(B,)`` -> ``(B, D)``, before the linear layers."""
        if self.config.get("time_embedding_type", "positional") != "positional":
            return self.time_proj(times)
        return sinusoids(times, self.config.block_out_channels[0], self.config.flip_sin_to_cos, self.config.freq_shift)

    def _embed_class(self, labels: torch.Tensor | None, dtype: torch.dtype) -> torch.Tensor | None:
        """What classes add to the time embedding ``(B, T)``, where the network was built with them."""
        if (self.class_embedding is None) != (labels is None):
            have = "are given, but this network was built without classes: leave them out"
            lack = "are not given, but this network was built with classes: pass them"
            raise ValueError(f"class_labels {lack if labels is None else have}")
        if self.class_embedding is None or labels is None:
            return None
        if self.config.class_embed_type == "timestep":
            labels = self.project_time(labels)
        return self.class_embedding(labels if self.config.class_embed_type is None else labels.to(dtype)).to(dtype)

    def _build_out(self, groups: int | None, act: str, kernel: int = 3) -> None:
        config, width = self.config, self.config.block_out_channels[0]
        self.conv_norm_out = None if groups is None else GroupNorm(groups, width, eps=config.norm_eps)
        self.conv_act = None if groups is None else activation(act)
        self.conv_out = Conv2d(width, config.out_channels, kernel, padding=(kernel - 1) // 2)

    def _check_sample(self, sample: torch.Tensor) -> bool:
        """Whether the up blocks must be told their sizes, because halving and doubling does not give them."""
        if sample.dim() != 4 or sample.shape[1] != self.conv_in.in_channels:
            expected = f"(batch, {self.conv_in.in_channels}, height, width)"
            raise ValueError(f"sample has shape {tuple(sample.shape)}, this network expects {expected}")
        uneven = bool(sample.shape[2] % self.size_factor or sample.shape[3] % self.size_factor)
        if uneven and self.exact_size_only:
            size = tuple(sample.shape[2:])
            raise ValueError(f"sample has height and width {size}, but this network needs multiples of {self.size_factor}")
        return uneven

    def _down(
        self, x: torch.Tensor, c: Conditions, residuals: Sequence[torch.Tensor] = (), picture: torch.Tensor | None = None
    ) -> tuple[torch.Tensor, list[Any]]:
        """The way down: the features, and the states for the way up. ``picture`` goes along blocks that carry one."""
        states: list[Any] = [x]
        for i, block in enumerate(self.down_blocks):
            if block.carries_picture:
                x, new, picture = self.run_block(block, x, c, picture)
            else:
                x, new = self.run_block(block, x, c, residuals[i] if i < len(residuals) else None)
            states += new
        return x, states

    def _up(self, x: torch.Tensor, states: list[Any], c: Conditions, uneven: bool) -> tuple[torch.Tensor, torch.Tensor | None]:
        """The way up: the features, and the picture of blocks that make one."""
        picture: torch.Tensor | None = None
        for i, block in enumerate(self.up_blocks):
            c = c.of_up_block(i)
            count = cast(int, block.num_states)
            taken = states[-count:]
            del states[-count:]
            if block.carries_picture:
                x, picture = self.run_block(block, x, taken, c, picture)
            else:
                x = self.run_block(block, x, taken, c, states[-1].shape[2:] if uneven and states else None)
        return x, picture

    def _out(self, x: torch.Tensor) -> torch.Tensor:
        if self.conv_norm_out is not None and self.conv_act is not None:
            x = activate(self.conv_act, self.conv_norm_out(x))
        return self.conv_out(x)


def shared_options(config: dict[str, Any], temb_channels: int) -> Shared:
    """Collects from a configuration what all blocks have in common."""
    names = [f.name for f in dataclasses.fields(Shared) if f.name in config]
    return Shared(temb_channels=temb_channels, **{name: config[name] for name in names})
