"""The convolutional encoder and decoder that the autoencoders share (arXiv:2012.09841, arXiv:2112.10752)."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import nn

from ...outputs import BaseOutput
from ..base import ModelMixin
from ..layers.attention import Attention, upgrade_attention_names
from ..layers.compute import Conv2d, GroupNorm, pixels_last
from ..layers.resnet import Downsample2D, ResnetBlock2D, Upsample2D, activate

RunBlock = Callable[..., torch.Tensor]
"""Calls a block with its arguments, perhaps through gradient checkpointing."""

EPS = 1e-6
DOWN_BLOCKS = {"DownEncoderBlock2D": False, "AttnDownEncoderBlock2D": True}
UP_BLOCKS = {"UpDecoderBlock2D": False, "AttnUpDecoderBlock2D": True}


def call_block(block: nn.Module, *args: Any) -> torch.Tensor:
    """Calls a block as it is."""
    return block(*args)


def check_input(x: torch.Tensor, name: str, channels: int) -> None:
    """Raises a ``TypeError`` for what is no tensor, a ``ValueError`` for what is not ``(B, channels, H, W)``."""
    if not isinstance(x, torch.Tensor):
        raise TypeError(f"{name} is a {type(x).__name__}, expected a tensor (B, {channels}, H, W)")
    if x.dim() != 4 or x.shape[1] != channels:
        raise ValueError(f"{name} has shape {tuple(x.shape)}, expected (B, {channels}, H, W)")


def _with_attention(kinds: Sequence[str], widths: Sequence[int], known: dict[str, bool], argument: str) -> list[bool]:
    """Reads block types: whether each level has attention."""
    if len(kinds) != len(widths):
        raise ValueError(f"{argument}={tuple(kinds)} names {len(kinds)} blocks for {len(widths)} widths {tuple(widths)}")
    for kind in kinds:
        if kind not in known:
            raise ValueError(f"{argument} holds {kind!r}: expected {' or '.join(known)}")
    return [known[kind] for kind in kinds]


class Autoencoder(ModelMixin):
    """What the autoencoders share; each says in ``_encode`` what becomes of pictures."""

    encoder: nn.Module
    quant_conv: nn.Module | None

    @classmethod
    def upgrade_state_dict(cls, tensors: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
        """Renames the attention projections of early checkpoints."""
        return upgrade_attention_names(tensors)

    def encode(self, x: torch.Tensor, return_dict: bool = True) -> Any:
        """Encodes pictures.

        Args:
            x: Pictures in -1..1, ``(B, C, H, W)``.
            return_dict: Return an output object rather than a tuple.

        Returns:
            The latents ``(B, L, H/f, W/f)``, or their distribution.
        """
        check_input(x, "x", self.config.in_channels)
        encoded = self._encode(x)
        return encoded if return_dict else encoded.to_tuple()

    def _encode(self, x: torch.Tensor) -> BaseOutput:
        raise NotImplementedError

    def _features(self, x: torch.Tensor) -> torch.Tensor:
        """Pictures -> latents, or the mean and log-variance of their distribution."""
        h = self.encoder(x, run=self.run_block)
        return h if self.quant_conv is None else self.quant_conv(h)


class SpatialNorm(nn.Module):
    """Group normalisation scaled and shifted per pixel by the quantised latents (MoVQ, arXiv:2209.09002, equation 4)."""

    def __init__(self, channels: int, latent_channels: int) -> None:
        super().__init__()
        self.norm_layer = GroupNorm(32, channels, eps=EPS)
        self.conv_y = Conv2d(latent_channels, channels, 1)
        self.conv_b = Conv2d(latent_channels, channels, 1)

    def forward(self, x: torch.Tensor, latents: torch.Tensor) -> torch.Tensor:
        """``x`` (B, C, H, W), ``latents`` (B, L, h, w) -> (B, C, H, W)."""
        latents = F.interpolate(latents, size=x.shape[-2:], mode="nearest")
        return self.norm_layer(x) * self.conv_y(latents) + self.conv_b(latents)


class SpatialResnetBlock(ResnetBlock2D):
    """A residual block normalised with the help of the latents."""

    def __init__(self, in_channels: int, out_channels: int, latent_channels: int, act_fn: str) -> None:
        super().__init__(in_channels, out_channels, temb_channels=None, eps=EPS, act=act_fn)
        self.norm1 = SpatialNorm(in_channels, latent_channels)  # type: ignore[assignment]
        self.norm2 = SpatialNorm(out_channels, latent_channels)  # type: ignore[assignment]

    def forward(self, x: torch.Tensor, latents: torch.Tensor) -> torch.Tensor:  # type: ignore[override]
        """``x`` (B, C, H, W), ``latents`` (B, L, h, w) -> (B, C', H, W)."""
        h = self.conv1(activate(self.nonlinearity, self.norm1(x, latents)))
        h = self.conv2(activate(self.nonlinearity, self.norm2(h, latents)))
        return h + (x if self.conv_shortcut is None else self.conv_shortcut(x))


class SpatialAttention(Attention):
    """Attention over pixels, normalised with the help of the latents."""

    def __init__(self, channels: int, latent_channels: int) -> None:
        super().__init__(channels, heads=1, dim_head=channels, bias=True)
        self.spatial_norm = SpatialNorm(channels, latent_channels)

    def forward(self, x: torch.Tensor, latents: torch.Tensor) -> torch.Tensor:  # type: ignore[override]
        """``x`` (B, C, H, W), ``latents`` (B, L, h, w) -> (B, C, H, W)."""
        return x + super().forward(self.spatial_norm(x, latents))


@dataclasses.dataclass
class Layers:
    """Builds the layers of one network, which differ in width alone; ``latents``: channels of those that normalise, if any."""

    groups: int
    act_fn: str
    latents: int | None = None

    def resnet(self, in_channels: int, out_channels: int) -> nn.Module:
        """A residual block."""
        if self.latents is not None:
            return SpatialResnetBlock(in_channels, out_channels, self.latents, self.act_fn)
        return ResnetBlock2D(in_channels, out_channels, temb_channels=None, groups=self.groups, eps=EPS, act=self.act_fn)

    def attention(self, channels: int) -> nn.Module:
        """An attention over pixels."""
        if self.latents is not None:
            return SpatialAttention(channels, self.latents)
        options: Any = {"norm_num_groups": self.groups, "eps": EPS, "residual_connection": True}
        return Attention(channels, heads=1, dim_head=channels, bias=True, **options)

    def norm(self, channels: int) -> nn.Module:
        """A normalisation."""
        return GroupNorm(self.groups, channels, eps=EPS) if self.latents is None else SpatialNorm(channels, self.latents)


class MidBlock(nn.Module):
    """Residual block, attention if wanted, residual block."""

    def __init__(self, channels: int, layers: Layers, add_attention: bool) -> None:
        super().__init__()
        self.attentions = nn.ModuleList([layers.attention(channels)] if add_attention else [])
        self.resnets = nn.ModuleList([layers.resnet(channels, channels), layers.resnet(channels, channels)])

    def forward(self, x: torch.Tensor, *latents: torch.Tensor) -> torch.Tensor:
        """``(B, C, H, W)`` -> the same; ``latents`` are given where they normalise."""
        x = self.resnets[0](x, *latents)
        for attention in self.attentions:
            x = attention(x, *latents)
        return self.resnets[1](x, *latents)


class LevelBlock(nn.Module):
    """The layers of one resolution, then the way to the next."""

    def __init__(self, in_channels: int, out_channels: int, count: int, layers: Layers, attention: bool) -> None:
        super().__init__()
        self.resnets = nn.ModuleList([layers.resnet(in_channels if i == 0 else out_channels, out_channels) for i in range(count)])
        self.attentions = nn.ModuleList([layers.attention(out_channels) for _ in range(count if attention else 0)])
        self.downsamplers, self.upsamplers = nn.ModuleList(), nn.ModuleList()

    def forward(self, x: torch.Tensor, *latents: torch.Tensor) -> torch.Tensor:
        """``(B, C, H, W)`` -> ``(B, C', H', W')``."""
        for index, resnet in enumerate(self.resnets):
            x = resnet(x, *latents)
            if self.attentions:
                x = self.attentions[index](x, *latents)
        for resample in (*self.downsamplers, *self.upsamplers):
            x = resample(x)
        return x


class Coder(nn.Module):
    """An encoder, pictures to the latents' size, or a decoder, the way back.

    Args:
        down: Encoder rather than decoder.
        channels: In and out.
        kinds: Block type of each level, in order of use.
        widths: Of each level, in order of use.
        count: Residual blocks of each level.
        layers: What builds them.
        middle: Attention at the lowest resolution.
    """

    down_blocks: nn.ModuleList
    up_blocks: nn.ModuleList

    def __init__(
        self, down: bool, channels: tuple[int, int], kinds: Sequence[str], widths: Sequence[int], count: int, layers: Layers,
        middle: bool,
    ) -> None:  # fmt: skip
        super().__init__()
        attention = _with_attention(kinds, widths, *((DOWN_BLOCKS, "down_block_types") if down else (UP_BLOCKS, "up_block_types")))
        self.down = down
        self.conv_in = Conv2d(channels[0], widths[0], 3, padding=1)
        blocks = [LevelBlock(widths[max(i - 1, 0)], width, count, layers, attention[i]) for i, width in enumerate(widths)]
        for block, width in zip(blocks[:-1], widths, strict=False):
            if down:
                block.downsamplers.append(Downsample2D(width, padding=0))
            else:
                block.upsamplers.append(Upsample2D(width))
        self.add_module("down_blocks" if down else "up_blocks", nn.ModuleList(blocks))
        self.mid_block = MidBlock(widths[-1 if down else 0], layers, middle)
        self.conv_norm_out, self.conv_act = layers.norm(widths[-1]), nn.SiLU()
        self.conv_out = Conv2d(widths[-1], channels[1], 3, padding=1)

    def forward(self, x: torch.Tensor, *latents: torch.Tensor, run: RunBlock = call_block) -> torch.Tensor:
        """``(B, C, H, W)`` -> ``(B, C', H', W')``; ``latents`` are given where they normalise."""
        x = self.conv_in(pixels_last(x))
        for block in (*self.down_blocks, self.mid_block) if self.down else (self.mid_block, *self.up_blocks):
            x = run(block, x, *latents)
        return self.conv_out(activate(self.conv_act, self.conv_norm_out(x, *latents)))
