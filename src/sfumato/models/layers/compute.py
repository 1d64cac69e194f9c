"""Convolutions, linear layers and attention that suit a CPU: the layout of pixels, the order of weights, arithmetic that it has."""

from __future__ import annotations

import functools
import itertools
import threading
import weakref
from typing import Any

import torch
import torch.nn.functional as F
from torch import nn

MAX_PIXELS = 2048
"""Over how few pixels, those of the batch together, putting the weights in order costs a good part of a convolution."""

ORDERED_LIMIT = 5 * 2**29
"""Bytes of ordered weights that a process keeps at most. Convolutions beyond it order theirs at every call, as torch does."""

_HAS_ONEDNN = torch.backends.mkldnn.is_available()
MIN_PRODUCTS = 2**22
"""Multiplications from which oneDNN's matrix product outruns torch's default one, in spite of its dearer call."""

MAX_SCORES = 2**19
"""How many attention scores of a head stand in memory at a time: they should stay in the cache."""

MIN_ROWS = 64
"""Of how many queries they are at least: with fewer, reading the keys takes longer than the products."""


def pixels_last(x: torch.Tensor) -> torch.Tensor:
    """Lays ``(B, C, H, W)`` out for speed: on CPU channels-last, which saves attention and resampling their copies."""
    return x.contiguous(memory_format=torch.channels_last) if x.device.type == "cpu" else x


@functools.cache
def _lacks_bfloat16() -> bool:
    find: Any = getattr(torch.cpu, "get_capabilities", dict)  # from PyTorch 2.12
    return find().get("avx512_bf16") is False


def _is_plain(x: torch.Tensor, weight: torch.Tensor) -> bool:
    """Whether this is inference on CPU that oneDNN can do and nothing else (compiler, autocast, wrapped tensors) has a hand in."""
    return x.dtype is weight.dtype and type(weight) is nn.Parameter and weight.is_cpu and _is_inference(x)


def _is_inference(x: torch.Tensor) -> bool:
    if torch.is_grad_enabled() or torch.compiler.is_compiling() or type(x) is not torch.Tensor or not x.is_cpu:
        return False
    known = x.dtype in (torch.float32, torch.bfloat16)
    return known and not torch.is_autocast_enabled("cpu") and _HAS_ONEDNN and torch._C._get_mkldnn_enabled()


def _widens(x: torch.Tensor, rows: int) -> bool:
    """Whether to compute in float32: x86 without bfloat16 arithmetic emulates it, three times slower.

    With few rows of the matrix product the conversion of the weights costs more than it gains.
    """
    return x.dtype is torch.bfloat16 and rows >= 96 and _lacks_bfloat16()


def _wide(*tensors: torch.Tensor | None) -> tuple[Any, ...]:
    return tuple(None if t is None else t.float() for t in tensors)


def _linear(
    x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None, post: str = "none", algorithm: str = ""
) -> torch.Tensor:
    """Large plain inference: oneDNN's matrix product is the faster one. ``post`` is a function that it applies to the result."""
    if _widens(x, x.numel() // weight.shape[1]):
        x, weight, bias = _wide(x, weight, bias)
        return _linear(x, weight, bias, post, algorithm).bfloat16()
    return torch.ops.mkldnn._linear_pointwise.default(x, weight, bias, post, [], algorithm)


def attention(query: torch.Tensor, key: torch.Tensor, value: torch.Tensor) -> torch.Tensor:
    """Scaled dot-product attention without a mask (arXiv:1706.03762, equation 1); on one CPU thread by plain matrix products.

    Query (B, H, N, D), key and value (B, H, M, D) -> (B, H, N, D). Head by head, some rows of scores at a time, oneDNN takes half
    the time of torch's kernel. Scores are float32; as in torch's kernel bfloat16 values are mixed in bfloat16. Several threads
    would wait for each other after every product, for long on a busy machine, where torch's kernel deals heads out to them.
    """
    (batch, heads, count, dim), keys = query.shape, key.shape[2]
    if count * keys * dim < MIN_PRODUCTS or not _is_inference(query) or torch.get_num_threads() > 1:
        return F.scaled_dot_product_attention(query, key, value)
    wide = query.dtype is torch.float32 or _lacks_bfloat16()
    out, rows = query.new_empty(batch, count, heads, dim), max(MAX_SCORES // keys, MIN_ROWS)
    for b, h in itertools.product(range(batch), range(heads)):
        q, k = query[b, h].float() * dim**-0.5, key[b, h].float().contiguous()  # oneDNN is slow on rows that lie apart
        v = value[b, h].float().t().contiguous() if wide else value[b, h]
        for i in range(0, count, rows):
            shares = _linear(q[i : i + rows], k, None).softmax(-1)  # (rows, M)
            out[b, i : i + rows, h] = _linear(shares, v, None) if wide else shares.bfloat16() @ v
    return out.transpose(1, 2)


class GroupNorm(nn.GroupNorm):
    """A group normalisation that calls torch without ceremony: networks of many small layers feel it."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """``(B, C, ...)`` -> the same."""
        own = self._parameters  # read so because attribute look-ups of parameters are dear
        return torch.group_norm(x, self.num_groups, own["weight"], own["bias"], self.eps)


class LayerNorm(nn.LayerNorm):
    """A layer normalisation that calls torch without ceremony."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """``(..., C)`` -> the same."""
        own = self._parameters
        return torch.layer_norm(x, self.normalized_shape, own["weight"], own["bias"], self.eps)


class Linear(nn.Linear):
    """A linear layer that, in inference on CPU, takes the faster of two matrix libraries.

    It computes bfloat16 in float32 where the CPU would emulate it.
    """

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """``(..., in_features)`` -> ``(..., out_features)``."""
        weight: Any = self._parameters["weight"]
        bias = self._parameters["bias"]
        return _linear(x, weight, bias) if self._is_large_and_plain(x) else F.linear(x, weight, bias)

    def _is_large_and_plain(self, x: torch.Tensor) -> bool:
        weight: Any = self._parameters["weight"]
        return x.numel() * self.out_features >= MIN_PRODUCTS and x.shape[-1] == self.in_features and _is_plain(x, weight)


class GELULinear(Linear):
    """A linear layer and the GELU of its result (arXiv:1606.08415, the form with tanh), in one pass in inference on CPU."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """``(..., in_features)`` -> ``(..., out_features)``."""
        if self._is_large_and_plain(x):
            return _linear(x, self.weight, self.bias, "gelu", "tanh")
        return F.gelu(super().forward(x), approximate="tanh")


class RMSNorm(nn.RMSNorm):
    """Division by the root of the mean square (arXiv:1910.07467, equation 4); on CPU in three passes where torch takes more."""

    eps: float

    def __init__(self, dim: int, eps: float) -> None:
        super().__init__(dim, eps)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """``(..., dim)`` -> the same."""
        if not _is_plain(x, self.weight):
            return super().forward(x)
        norm = torch.linalg.vector_norm(x, dim=-1, keepdim=True, dtype=torch.float32)
        inverse = (norm * norm / x.shape[-1] + self.eps).rsqrt_()
        return (x * inverse).to(x.dtype).mul_(self.weight)


class _Ordered:
    """A convolution's weights in oneDNN's order, and what tells whether they are still those of the parameter."""

    def __init__(self, conv: Conv2d, x: torch.Tensor) -> None:
        weight = conv.weight.detach()
        self.version, self.place = _version(conv.weight), weight.data_ptr()
        # writes through `.data` leave the version as it is, so a grid of 8x8 weights is compared too
        self.probe = weight[:: conv.out_channels // 8 or 1, :: conv.in_channels // 8 or 1, 0, 0]
        self.seen = self.probe.clone()
        shape: Any = (conv.padding, conv.stride, conv.dilation, 1)
        # from channels-last weights oneDNN has a quick way
        weight = weight.contiguous(memory_format=torch.channels_last)
        self.weights = torch.ops.mkldnn._reorder_convolution_weight(weight, *shape, x.shape)
        self.options = (*shape, "none", [], "")

    def holds(self, weight: torch.Tensor) -> bool:
        """Whether ``weight`` is what was ordered."""
        same = self.place == weight.data_ptr() and self.version == _version(weight) and self.probe.dtype is weight.dtype
        return same and torch.equal(self.probe, self.seen)


def _version(weight: torch.Tensor) -> int:
    return 0 if weight.is_inference() else weight._version


_kept: weakref.WeakKeyDictionary[_Ordered, int] = weakref.WeakKeyDictionary()  # with their bytes
_lock = threading.Lock()


def _keep(ordered: _Ordered, size: int) -> bool:
    """Counts ordered weights against the limit; whether there is room for them."""
    with _lock:
        fits = sum(_kept.values()) + size <= ORDERED_LIMIT
        if fits:
            _kept[ordered] = size
    return fits


class Conv2d(nn.Conv2d):
    """A convolution that, in inference on CPU, puts its weights in oneDNN's order once rather than at every call.

    The ordered copy is made when the convolution first sees few pixels (:data:`MAX_PIXELS`), stands in no state dictionary, is
    bounded by :data:`ORDERED_LIMIT`, and is made again when the weights have changed. It sees every change but one: a write through
    ``weight.data`` that leaves a grid of 64 weights as they are; write to the parameter itself, under ``torch.no_grad()``.
    Like :class:`Linear`, it computes bfloat16 in float32 where the CPU would emulate it.
    """

    def __init__(self, in_channels: int, out_channels: int, kernel: int, stride: int = 1, padding: int = 0, bias: bool = True):
        super().__init__(in_channels, out_channels, kernel, stride, padding, bias=bias)
        self.is_pointwise = (kernel, stride, padding) == (1, 1, 0)
        self._ordered: _Ordered | None = None

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """``(B, C, H, W)`` -> ``(B, C', H', W')``."""
        weight: Any = self._parameters["weight"]
        bias = self._parameters["bias"]
        if x.dim() != 4 or x.shape[1] != self.in_channels or not _is_plain(x, weight):
            return self._conv_forward(x, weight, bias)
        rows = x.numel() // self.in_channels
        if self.is_pointwise and x.is_contiguous(memory_format=torch.channels_last):
            # a linear layer over the channels of each pixel
            matrix, large = weight.flatten(1), x.numel() * self.out_channels >= MIN_PRODUCTS
            return (_linear if large else F.linear)(x.permute(0, 2, 3, 1), matrix, bias).permute(0, 3, 1, 2)
        if _widens(x, rows // 2):  # a convolution gains less
            return self._conv_forward(*_wide(x, weight, bias)).bfloat16()
        if not 0 < rows <= MAX_PIXELS:
            return self._conv_forward(x, weight, bias)
        held = self._ordered
        if held is None or not held.holds(weight):
            held = self._order(x)
        return torch.ops.mkldnn._convolution_pointwise.default(x, held.weights, bias, *held.options)

    def _order(self, x: torch.Tensor) -> _Ordered:
        self._ordered, made = None, _Ordered(self, x)
        if _keep(made, self.weight.nbytes):
            self._ordered = made  # threads that come here together make the same copy
        return made

    def _apply(self, fn: Any, recurse: bool = True) -> Any:
        self._ordered = None
        return super()._apply(fn, recurse)

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_ordered": None}
