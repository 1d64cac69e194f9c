"""Convolutions and linear layers that suit a CPU: the layout of pixels, the order of weights, arithmetic that it has."""

from __future__ import annotations

import functools
from typing import Any

import torch
import torch.nn.functional as F
from torch import nn

MIN_WEIGHTS, MAX_PIXELS = 2**20, 2048
"""Where putting the weights in order costs a good part of the convolution: many weights, few pixels."""


def pixels_last(x: torch.Tensor) -> torch.Tensor:
    """Lays ``(B, C, H, W)`` out for speed: on CPU channels-last, which saves attention and resampling their copies."""
    return x.contiguous(memory_format=torch.channels_last) if x.device.type == "cpu" else x


@functools.cache
def _lacks_bfloat16() -> bool:
    find: Any = getattr(torch.cpu, "get_capabilities", dict)  # from PyTorch 2.12
    return find().get("avx512_bf16") is False


def _is_plain(x: torch.Tensor, weight: torch.Tensor) -> bool:
    """Whether this is inference on CPU that nothing else (compiler, autocast, wrapped tensors) has a hand in."""
    if torch.compiler.is_compiling() or torch.is_grad_enabled() or type(x) is not torch.Tensor:
        return False
    same_place = type(weight) is nn.Parameter and x.device.type == weight.device.type == "cpu" and x.dtype is weight.dtype
    return same_place and not torch.is_autocast_enabled("cpu")


def _widens(x: torch.Tensor, weight: torch.Tensor, min_rows: int) -> bool:
    """Whether to compute in float32: x86 without bfloat16 arithmetic emulates it, three times slower.

    With few rows of the matrix product the conversion of the weights costs more than it gains.
    """
    if x.dtype is not torch.bfloat16 or x.numel() < min_rows * weight.shape[1]:
        return False
    return _is_plain(x, weight) and _lacks_bfloat16()


class Linear(nn.Linear):
    """A linear layer that computes bfloat16 in float32 where the CPU would emulate it."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """``(..., in_features)`` -> ``(..., out_features)``."""
        if _widens(x, self.weight, 96):
            return F.linear(x.float(), self.weight.float(), None if self.bias is None else self.bias.float()).bfloat16()
        return F.linear(x, self.weight, self.bias)


class Conv2d(nn.Conv2d):
    """A convolution that, in inference on CPU, puts large weights in oneDNN's order once rather than at every call.

    The ordered copy is made on first use, stands in no state dictionary, and is made again when the weights have changed.
    Like :class:`Linear`, it computes bfloat16 in float32 where the CPU would emulate it.
    """

    def __init__(self, in_channels: int, out_channels: int, kernel: int, stride: int = 1, padding: int = 0, bias: bool = True):
        super().__init__(in_channels, out_channels, kernel, stride, padding, bias=bias)
        self.is_large = self.weight.numel() >= MIN_WEIGHTS and kernel > 1
        self._ordered: tuple[int, torch.Tensor, torch.Tensor] | None = None

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """``(B, C, H, W)`` -> ``(B, C', H', W')``."""
        if _widens(x, self.weight, 192):
            return self._conv_forward(x.float(), self.weight.float(), None if self.bias is None else self.bias.float()).bfloat16()
        if not self.is_large or not self._pays(x):
            return self._conv_forward(x, self.weight, self.bias)
        options: Any = (self.padding, self.stride, self.dilation, 1, "none", [], "")
        return torch.ops.mkldnn._convolution_pointwise(x, self._order(x), self.bias, *options)

    def _pays(self, x: torch.Tensor) -> bool:
        if x.dim() != 4 or x.shape[1] != self.in_channels or not 0 < x.shape[0] * x.shape[2] * x.shape[3] <= MAX_PIXELS:
            return False
        if x.dtype not in (torch.float32, torch.bfloat16) or not _is_plain(x, self.weight):
            return False
        return torch.backends.mkldnn.is_available() and bool(torch.backends.mkldnn.enabled)

    def _order(self, x: torch.Tensor) -> torch.Tensor:
        weight, held = self.weight.detach(), self._ordered
        version = 0 if weight.is_inference() else self.weight._version
        # writes through `.data` leave the version as it is, so a grid of 8x8 weights is compared too
        probe = weight[:: self.out_channels // 8 or 1, :: self.in_channels // 8 or 1, 0, 0]
        if held is None or held[0] != version or held[1].dtype != probe.dtype or not torch.equal(held[1], probe):
            reorder = torch.ops.mkldnn._reorder_convolution_weight
            ordered = reorder(weight.contiguous(), self.padding, self.stride, self.dilation, 1, x.shape)
            # one assignment: threads that come here together make the same copy
            self._ordered = held = version, probe.clone(), ordered
        return held[2]

    def _apply(self, fn: Any, recurse: bool = True) -> Any:
        self._ordered = None
        return super()._apply(fn, recurse)

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_ordered": None}
