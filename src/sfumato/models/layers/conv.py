"""Convolutions on CPU: channels-last pixels, and weights in the order the processor wants."""

from __future__ import annotations

from typing import Any

import torch
from torch import nn

MIN_WEIGHTS, MAX_PIXELS = 2**20, 2048
"""Where putting the weights in order costs a good part of the convolution: many weights, few pixels."""


def pixels_last(x: torch.Tensor) -> torch.Tensor:
    """Lays ``(B, C, H, W)`` out for speed: on CPU channels-last, which saves attention and resampling their copies."""
    return x.contiguous(memory_format=torch.channels_last) if x.device.type == "cpu" else x


class Conv2d(nn.Conv2d):
    """A convolution that, in inference on CPU, puts large weights in oneDNN's order once rather than at every call.

    The ordered copy is made on first use, stands in no state dictionary, and is made again when the weights have changed.
    """

    def __init__(self, in_channels: int, out_channels: int, kernel: int, stride: int = 1, padding: int = 0, bias: bool = True):
        super().__init__(in_channels, out_channels, kernel, stride, padding, bias=bias)
        self.is_large = self.weight.numel() >= MIN_WEIGHTS and kernel > 1
        self._ordered: tuple[int, torch.Tensor, torch.Tensor] | None = None

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """``(B, C, H, W)`` -> ``(B, C', H', W')``."""
        if not self.is_large or torch.compiler.is_compiling() or not self._pays(x):
            return self._conv_forward(x, self.weight, self.bias)
        options = (self.padding, self.stride, self.dilation, 1, "none", [], "")
        return torch.ops.mkldnn._convolution_pointwise(x, self._order(x), self.bias, *options)

    def _pays(self, x: torch.Tensor) -> bool:
        return (
            not torch.is_grad_enabled()
            and type(x) is torch.Tensor
            and type(self.weight) is nn.Parameter
            and x.device.type == self.weight.device.type == "cpu"
            and x.dtype == self.weight.dtype
            and x.dtype in (torch.float32, torch.bfloat16)
            and x.dim() == 4
            and x.shape[1] == self.in_channels
            and 0 < x.shape[0] * x.shape[2] * x.shape[3] <= MAX_PIXELS
            and torch.backends.mkldnn.is_available()
            and torch.backends.mkldnn.enabled
            and not torch.is_autocast_enabled("cpu")
        )

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
