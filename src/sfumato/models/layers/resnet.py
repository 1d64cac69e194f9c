"""Convolutional residual blocks and the resampling around them (arXiv:1512.03385; with time embedding arXiv:2006.11239)."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import nn

from .compute import Conv2d, GroupNorm

ACTIVATIONS: dict[str, type[nn.Module]] = {"silu": nn.SiLU, "swish": nn.SiLU, "mish": nn.Mish, "gelu": nn.GELU, "relu": nn.ReLU}


def activation(name: str) -> nn.Module:
    """Builds an activation from its configuration name; a ``ValueError`` when that is unknown."""
    if name not in ACTIVATIONS:
        raise ValueError(f"unknown activation {name!r}: expected one of {', '.join(ACTIVATIONS)}")
    return ACTIVATIONS[name]()


def activate(act: nn.Module, x: torch.Tensor) -> torch.Tensor:
    """Applies an activation to a tensor that nothing else reads: in its place when no gradient is recorded."""
    if isinstance(act, (nn.SiLU, nn.ReLU)) and not torch.is_grad_enabled():
        return F.silu(x, inplace=True) if isinstance(act, nn.SiLU) else F.relu(x, inplace=True)
    return act(x)


def add(fresh: torch.Tensor, x: torch.Tensor) -> torch.Tensor:
    """Adds ``x`` to a tensor that nothing else reads: in its place when no gradient is recorded."""
    return fresh + x if torch.is_grad_enabled() else fresh.add_(x)


class Upsample2D(nn.Module):
    """Doubles height and width (or resizes to ``size``) by nearest neighbour, then convolves (3x3) if wanted."""

    def __init__(self, channels: int, use_conv: bool = True) -> None:
        super().__init__()
        self.conv = Conv2d(channels, channels, 3, padding=1) if use_conv else None

    def forward(self, x: torch.Tensor, size: tuple[int, int] | None = None) -> torch.Tensor:
        """``(B, C, H, W)`` -> ``(B, C, 2H, 2W)``, or to ``size``."""
        x = F.interpolate(x, scale_factor=2.0, mode="nearest") if size is None else F.interpolate(x, size=size, mode="nearest")
        return x if self.conv is None else self.conv(x)


class Downsample2D(nn.Module):
    """Halves height and width, by a strided 3x3 convolution or by 2x2 averages.

    ``padding`` is the convolution's, 0 pads right and below only, as autoencoders of this format do; so are ``out_channels``.
    """

    def __init__(self, channels: int, use_conv: bool = True, padding: int = 1, out_channels: int | None = None) -> None:
        super().__init__()
        self.padding = padding
        self.conv = Conv2d(channels, out_channels or channels, 3, stride=2, padding=padding) if use_conv else None

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """``(B, C, H, W)`` -> ``(B, C', H/2, W/2)``."""
        if self.conv is None:
            return F.avg_pool2d(x, 2)
        return self.conv(F.pad(x, (0, 1, 0, 1)) if self.padding == 0 else x)


class ResnetBlock2D(nn.Module):
    """Norm, activation, convolution, twice, with a time embedding between and a skip connection around.

    Args:
        in_channels, out_channels: Channels in and out; the same when not given.
        temb_channels: Width of the time embedding, ``None`` for none.
        groups, groups_out, eps: Groups of the first and the second normalisation (by default equal), and their epsilon.
        dropout: Before the second convolution.
        act: Activation name.
        time_embedding_norm: ``"default"`` adds the embedding, ``"scale_shift"`` scales and shifts with it.
        output_scale_factor: The sum is divided by this.
        up, down: Double or halve the resolution inside the block.
        use_in_shortcut: Have a convolution around the block; by default where the channels change.
    """

    def __init__(
        self, in_channels: int, out_channels: int | None = None, *, temb_channels: int | None = 512, groups: int = 32,
        groups_out: int | None = None, eps: float = 1e-6, dropout: float = 0.0, act: str = "silu",
        time_embedding_norm: str = "default", output_scale_factor: float = 1.0, up: bool = False,
        down: bool = False, use_in_shortcut: bool | None = None,
    ) -> None:  # fmt: skip
        super().__init__()
        out_channels = out_channels or in_channels
        self.scale_shift = time_embedding_norm == "scale_shift"
        self.output_scale_factor = output_scale_factor
        self.norm1 = GroupNorm(groups, in_channels, eps=eps)
        self.conv1 = Conv2d(in_channels, out_channels, 3, padding=1)
        if temb_channels is not None:
            self.time_emb_proj = nn.Linear(temb_channels, out_channels * (2 if self.scale_shift else 1))
        self.norm2 = GroupNorm(groups_out or groups, out_channels, eps=eps)
        self.dropout = nn.Dropout(dropout)
        self.conv2 = Conv2d(out_channels, out_channels, 3, padding=1)
        self.nonlinearity = activation(act)
        self.resample: nn.Module | None = (Upsample2D if up else Downsample2D)(in_channels, use_conv=False) if up or down else None
        shortcut = in_channels != out_channels if use_in_shortcut is None else use_in_shortcut
        self.conv_shortcut = Conv2d(in_channels, out_channels, 1) if shortcut else None

    def forward(self, x: torch.Tensor, temb: torch.Tensor | None = None) -> torch.Tensor:
        """``x`` (B, C, H, W), ``temb`` (B, T), activated already -> (B, C', H', W')."""
        h = activate(self.nonlinearity, self.norm1(x))
        if self.resample is not None:
            x, h = self.resample(x), self.resample(h)
        h = self.conv1(h)
        if temb is not None:
            # (B, T) -> (B, C', 1, 1)
            temb = self.time_emb_proj(temb).unsqueeze(-1).unsqueeze(-1)
        if temb is not None and not self.scale_shift:
            h = add(h, temb)
        h = self.norm2(h)
        if temb is not None and self.scale_shift:
            scale, shift = temb.chunk(2, dim=1)
            h = h * (1 + scale) + shift
        h = activate(self.nonlinearity, h)
        h = self.conv2(self.dropout(h) if self.training else h)
        if self.conv_shortcut is not None:
            x = self.conv_shortcut(x)
        h = add(h, x)
        return h / self.output_scale_factor if self.output_scale_factor != 1.0 else h
