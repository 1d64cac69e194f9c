"""T2I-Adapter (arXiv:2302.08453): a small network that turns a picture into features, computed once a call, for a U-Net."""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import nn

from ...errors import ConfigError
from ..base import ModelMixin
from ..layers.compute import Conv2d, pixels_last
from ..several import Several

_TYPES = ("full_adapter", "full_adapter_xl", "light_adapter")


class _Resnet(nn.Module):
    """Two convolutions with a ReLU between, added to the input."""

    def __init__(self, channels: int, kernel: int) -> None:
        super().__init__()
        self.block1 = Conv2d(channels, channels, 3, padding=1)
        self.block2 = Conv2d(channels, channels, kernel, padding=kernel // 2)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x + self.block2(F.relu(self.block1(x)))


class _Block(nn.Module):
    """Halving, if ``down``, then residual layers; in ``light`` ones at a quarter of the channels."""

    def __init__(self, in_channels: int, out_channels: int, layers: int, down: bool, light: bool) -> None:
        super().__init__()
        width = out_channels // 4 if light else out_channels
        self.down = down
        self.in_conv = Conv2d(in_channels, width, 1) if light or in_channels != width else None
        self.resnets = nn.Sequential(*(_Resnet(width, 3 if light else 1) for _ in range(layers)))
        self.out_conv = Conv2d(width, out_channels, 1) if light else None

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """``(B, C, H, W)`` -> ``(B, C', H, W)``, or half as high and wide, rounded up."""
        if self.down:
            x = F.avg_pool2d(x, 2, ceil_mode=True)
        x = self.resnets(x if self.in_conv is None else self.in_conv(x))
        return x if self.out_conv is None else self.out_conv(x)


class _Network(nn.Module):
    """Pixels folded into channels, perhaps a convolution, then the blocks."""

    def __init__(self, in_channels: int, channels: Sequence[int], layers: int, factor: int, kind: str) -> None:
        super().__init__()
        self.factor, width, light = factor, in_channels * factor**2, kind == "light_adapter"
        self.conv_in: nn.Module | None = None
        if light:
            channels = (*channels, channels[-1])
        else:
            self.conv_in = Conv2d(width, channels[0], 3, padding=1)
            width = channels[0]
        self.body = nn.ModuleList()
        for i, out in enumerate(channels):
            down = i == 2 if kind == "full_adapter_xl" else i > 0
            self.body.append(_Block(width, out, layers, down, light))
            width = out

    def forward(self, x: torch.Tensor) -> list[torch.Tensor]:
        x = pixels_last(F.pixel_unshuffle(x, self.factor))
        x = x if self.conv_in is None else self.conv_in(x)
        features = []
        for block in self.body:
            x = block(x)
            features.append(x)
        return features


class T2IAdapter(ModelMixin):
    """A picture to features of each resolution, which a U-Net adds in its down blocks.

    Args:
        in_channels: Of the picture.
        channels: Of the features, from the finest; a ``"light_adapter"`` repeats the last at one more resolution.
        num_res_blocks: Residual layers of each resolution.
        downscale_factor: Edge of the squares of pixels that are folded into channels.
        adapter_type: ``"full_adapter"`` and ``"light_adapter"`` halve at every resolution but the first,
            ``"full_adapter_xl"`` at the third alone.

    Raises:
        ConfigError: A value is unknown or does not fit.
    """

    def __init__(
        self, in_channels: int = 3, channels: Sequence[int] = (320, 640, 1280, 1280), num_res_blocks: int = 2,
        downscale_factor: int = 8, adapter_type: str = "full_adapter",
    ) -> None:  # fmt: skip
        super().__init__()
        if adapter_type not in _TYPES:
            raise ConfigError(f"adapter_type={adapter_type!r} is unknown: expected one of {', '.join(map(repr, _TYPES))}")
        if adapter_type == "full_adapter_xl" and len(set(channels[2:])) > 1:
            raise ConfigError(f"channels={tuple(channels)}: from the third on those of a 'full_adapter_xl' must be equal")
        if adapter_type == "light_adapter" and any(width % 4 for width in channels):
            raise ConfigError(f"channels={tuple(channels)}: those of a 'light_adapter' must be multiples of 4")
        self.adapter = _Network(in_channels, channels, num_res_blocks, downscale_factor, adapter_type)

    @property
    def downscale_factor(self) -> int:
        """How many times larger than the first features the picture is."""
        return self.adapter.factor

    @property
    def total_downscale_factor(self) -> int:
        """Of what the edges of pictures are multiples, so that no halving rounds."""
        halvings = 1 if self.config.adapter_type == "full_adapter_xl" else len(self.adapter.body) - 1
        return self.adapter.factor * 2**halvings

    def forward(self, x: torch.Tensor) -> list[torch.Tensor]:
        """A picture (B, in_channels, H, W), RGB in 0..1 -> features, each (B, C, H', W'), from the finest.

        Raises:
            ValueError: The picture's shape does not fit.
        """
        factor, channels = self.adapter.factor, self.config.in_channels
        if x.dim() != 4 or x.shape[1] != channels or x.shape[2] % factor or x.shape[3] % factor:
            wanted = f"(batch, {channels}, height, width) with height and width multiples of {factor}"
            raise ValueError(f"x has shape {tuple(x.shape)}, expected {wanted}: resize or convert the picture")
        return self.adapter(x)


class MultiAdapter(Several):
    """Several T2I-Adapters, each with a picture of its own, whose features add up, weighted.

    Args:
        adapters: The networks; they must reduce pictures alike.

    Raises:
        ConfigError: They do not.
    """

    member = T2IAdapter
    holder = "adapters"
    ignore_for_config = ("adapters",)

    def __init__(self, adapters: Sequence[T2IAdapter]) -> None:
        super().__init__(adapters)
        factors = [(a.downscale_factor, a.total_downscale_factor) for a in adapters]
        if len(set(factors)) > 1:
            raise ConfigError(f"adapters reduce pictures differently, (first, all resolutions): {factors}; combine like ones")
        self.downscale_factor, self.total_downscale_factor = factors[0]

    def forward(
        self, xs: Sequence[torch.Tensor] | torch.Tensor, adapter_weights: Sequence[float] | torch.Tensor | None = None
    ) -> list[torch.Tensor]:
        """A picture for each adapter, as in :meth:`T2IAdapter.forward`, and weights, by default equal ones of sum 1 -> features.

        Raises:
            ValueError: There is another number of pictures or weights than of adapters.
        """
        weights = [1 / len(self.members)] * len(self.members) if adapter_weights is None else adapter_weights
        self.check_counts(xs=xs, adapter_weights=weights)
        each = zip(self.members, xs, weights, strict=True)
        weighted = [[weight * feature for feature in adapter(x)] for adapter, x, weight in each]
        return [sum(features[1:], features[0]) for features in zip(*weighted, strict=True)]
