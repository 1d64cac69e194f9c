"""The convolutional encoder and decoder that the autoencoders share (arXiv:2012.09841, arXiv:2112.10752)."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import nn

from ..layers.attention import Attention
from ..layers.conv import pixels_last
from ..layers.resnet import Downsample2D, ResnetBlock2D, Upsample2D, activate, activation

RunBlock = Callable[..., torch.Tensor]
"""Calls a block with its arguments, perhaps through gradient checkpointing."""

EPS = 1e-6
DOWN_BLOCK_TYPES = {"DownEncoderBlock2D": False, "AttnDownEncoderBlock2D": True}
UP_BLOCK_TYPES = {"UpDecoderBlock2D": False, "AttnUpDecoderBlock2D": True}


def call_block(block: nn.Module, *args: Any) -> torch.Tensor:
    """Calls a block as it is."""
    return block(*args)


def check_input(x: torch.Tensor, name: str, channels: int) -> None:
    """Refuses what is not a batch of pictures or latents.

    Raises:
        TypeError: Not a tensor.
        ValueError: Not ``(B, channels, H, W)``.
    """
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


class SpatialNorm(nn.Module):
    """Group normalisation scaled and shifted per pixel by the quantised latents (MoVQ, arXiv:2209.09002, equation 4)."""

    def __init__(self, channels: int, latent_channels: int) -> None:
        super().__init__()
        self.norm_layer = nn.GroupNorm(32, channels, eps=EPS)
        self.conv_y = nn.Conv2d(latent_channels, channels, 1)
        self.conv_b = nn.Conv2d(latent_channels, channels, 1)

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


class Layers:
    """Builds the layers of one network, which differ in width alone.

    Args:
        groups: Groups of the normalisations.
        act_fn: Activation name.
        latent_channels: Channels of the latents that normalise, ``None`` for plain group normalisation.
    """

    def __init__(self, groups: int, act_fn: str, latent_channels: int | None = None) -> None:
        self.groups, self.act_fn, self.latent_channels = groups, act_fn, latent_channels

    def resnet(self, in_channels: int, out_channels: int) -> nn.Module:
        """A residual block."""
        if self.latent_channels is not None:
            return SpatialResnetBlock(in_channels, out_channels, self.latent_channels, self.act_fn)
        return ResnetBlock2D(in_channels, out_channels, temb_channels=None, groups=self.groups, eps=EPS, act=self.act_fn)

    def attention(self, channels: int) -> nn.Module:
        """Attention over pixels, one head."""
        if self.latent_channels is not None:
            return SpatialAttention(channels, self.latent_channels)
        return Attention(
            channels, heads=1, dim_head=channels, bias=True, norm_num_groups=self.groups, eps=EPS, residual_connection=True
        )

    def norm(self, channels: int) -> nn.Module:
        """A normalisation."""
        if self.latent_channels is not None:
            return SpatialNorm(channels, self.latent_channels)
        return nn.GroupNorm(self.groups, channels, eps=EPS)


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
        self.downsamplers = nn.ModuleList()
        self.upsamplers = nn.ModuleList()

    def forward(self, x: torch.Tensor, *latents: torch.Tensor) -> torch.Tensor:
        """``(B, C, H, W)`` -> ``(B, C', H', W')``."""
        for index, resnet in enumerate(self.resnets):
            x = resnet(x, *latents)
            if self.attentions:
                x = self.attentions[index](x, *latents)
        for resample in (*self.downsamplers, *self.upsamplers):
            x = resample(x)
        return x


class Encoder(nn.Module):
    """Picture -> features of the latents' size.

    Args:
        in_channels: Channels of the picture.
        out_channels: Channels of the latents.
        down_block_types: Block of each level.
        block_out_channels: Width of each level.
        layers_per_block: Residual blocks of each level.
        norm_num_groups: Groups of the normalisations.
        act_fn: Activation name.
        double_z: Give twice the channels: mean and log-variance.
        mid_block_add_attention: Attention at the lowest resolution.
    """

    def __init__(
        self,
        in_channels: int,
        out_channels: int,
        down_block_types: Sequence[str],
        block_out_channels: Sequence[int],
        layers_per_block: int = 2,
        norm_num_groups: int = 32,
        act_fn: str = "silu",
        double_z: bool = True,
        mid_block_add_attention: bool = True,
    ) -> None:
        super().__init__()
        attention = _with_attention(down_block_types, block_out_channels, DOWN_BLOCK_TYPES, "down_block_types")
        layers, widths = Layers(norm_num_groups, act_fn), list(block_out_channels)
        self.conv_in = nn.Conv2d(in_channels, widths[0], 3, padding=1)
        self.down_blocks = nn.ModuleList()
        for level, width in enumerate(widths):
            block = LevelBlock(widths[max(level - 1, 0)], width, layers_per_block, layers, attention[level])
            if level < len(widths) - 1:
                block.downsamplers.append(Downsample2D(width, padding=0))
            self.down_blocks.append(block)
        self.mid_block = MidBlock(widths[-1], layers, mid_block_add_attention)
        self.conv_norm_out = layers.norm(widths[-1])
        self.conv_act = activation("silu")
        self.conv_out = nn.Conv2d(widths[-1], 2 * out_channels if double_z else out_channels, 3, padding=1)

    def forward(self, x: torch.Tensor, run: RunBlock = call_block) -> torch.Tensor:
        """``(B, C, H, W)`` -> ``(B, L, h, w)``, or ``2L`` channels."""
        x = self.conv_in(pixels_last(x))
        for block in self.down_blocks:
            x = run(block, x)
        x = run(self.mid_block, x)
        return self.conv_out(activate(self.conv_act, self.conv_norm_out(x)))


class Decoder(nn.Module):
    """Latents -> picture.

    Args:
        in_channels: Channels of the latents.
        out_channels: Channels of the picture.
        up_block_types: Block of each level, lowest resolution first.
        block_out_channels: Width of each level, highest resolution first, as in the encoder.
        layers_per_block: Residual blocks of each level, less one.
        norm_num_groups: Groups of the normalisations.
        act_fn: Activation name.
        norm_type: ``"group"``, or ``"spatial"``: the latents take part in every normalisation.
        mid_block_add_attention: Attention at the lowest resolution.
    """

    def __init__(
        self,
        in_channels: int,
        out_channels: int,
        up_block_types: Sequence[str],
        block_out_channels: Sequence[int],
        layers_per_block: int = 2,
        norm_num_groups: int = 32,
        act_fn: str = "silu",
        norm_type: str = "group",
        mid_block_add_attention: bool = True,
    ) -> None:
        super().__init__()
        if norm_type not in ("group", "spatial"):
            raise ValueError(f"norm_type={norm_type!r}: expected 'group' or 'spatial'")
        attention = _with_attention(up_block_types, block_out_channels, UP_BLOCK_TYPES, "up_block_types")
        layers = Layers(norm_num_groups, act_fn, in_channels if norm_type == "spatial" else None)
        widths = list(reversed(block_out_channels))
        self.conv_in = nn.Conv2d(in_channels, widths[0], 3, padding=1)
        self.mid_block = MidBlock(widths[0], layers, mid_block_add_attention)
        self.up_blocks = nn.ModuleList()
        for level, width in enumerate(widths):
            block = LevelBlock(widths[max(level - 1, 0)], width, layers_per_block + 1, layers, attention[level])
            if level < len(widths) - 1:
                block.upsamplers.append(Upsample2D(width))
            self.up_blocks.append(block)
        self.conv_norm_out = layers.norm(widths[-1])
        self.conv_act = activation("silu")
        self.conv_out = nn.Conv2d(widths[-1], out_channels, 3, padding=1)

    def forward(self, x: torch.Tensor, *latents: torch.Tensor, run: RunBlock = call_block) -> torch.Tensor:
        """``(B, L, h, w)`` -> ``(B, C, H, W)``; ``latents`` are given where they normalise."""
        x = run(self.mid_block, self.conv_in(pixels_last(x)), *latents)
        for block in self.up_blocks:
            x = run(block, x, *latents)
        return self.conv_out(activate(self.conv_act, self.conv_norm_out(x, *latents)))
