"""Who computes attention: torch's own kernels, and packages that are faster where they are installed.

Every backend takes queries (B, H, N, D), keys and values (B, H, M, D) and a mask, and says beforehand what it cannot do. None is
ever taken in another's place, and none drops a mask.
"""

from __future__ import annotations

import importlib.util
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import nn
from torch.nn.attention import SDPBackend, sdpa_kernel

from ...errors import did_you_mean
from .compute import attention

Kernel = Callable[[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor | None], torch.Tensor]
HALVES = (torch.float16, torch.bfloat16)


@dataclass(frozen=True)
class Backend:
    """A way to compute attention, and what it is limited to.

    Attributes:
        kernel: Computes it.
        package: What must be installed, if anything; ``pip install`` takes the name ``install``.
        masks: Whether it honours a mask.
        dtypes: Floating-point types that it takes; empty for all.
        head_sizes: Widths of a head that it takes; empty for all.
        cuda: Whether it needs CUDA tensors.
    """

    kernel: Kernel
    package: str = ""
    install: str = ""
    masks: bool = True
    dtypes: tuple[torch.dtype, ...] = ()
    head_sizes: tuple[int, ...] = ()
    cuda: bool = False

    def refusal(self, query: torch.Tensor, mask: torch.Tensor | None) -> str:
        """Why it cannot compute this attention; empty if it can."""
        if mask is not None and not self.masks:
            return "it would drop the attention mask of this call"
        if self.dtypes and query.dtype not in self.dtypes:
            return f"it takes {' or '.join(map(str, self.dtypes))}, not {query.dtype}"
        if self.head_sizes and query.shape[-1] not in self.head_sizes:
            return f"it takes heads of {' or '.join(map(str, self.head_sizes))}, not of {query.shape[-1]}"
        return f"it needs CUDA tensors, not {query.device}" if self.cuda and not query.is_cuda else ""


def _native(query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, mask: torch.Tensor | None) -> torch.Tensor:
    return F.scaled_dot_product_attention(query, key, value, mask) if mask is not None else attention(query, key, value)


def _torch_kernel(kind: SDPBackend) -> Kernel:
    def kernel(query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, mask: torch.Tensor | None) -> torch.Tensor:
        with sdpa_kernel(kind):
            return F.scaled_dot_product_attention(query, key, value, attn_mask=mask)

    return kernel


def _flash(query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, mask: torch.Tensor | None) -> torch.Tensor:
    import flash_attn

    out: torch.Tensor = flash_attn.flash_attn_func(*(x.transpose(1, 2) for x in (query, key, value)))
    return out.transpose(1, 2)


def _flash_3(query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, mask: torch.Tensor | None) -> torch.Tensor:
    import flash_attn_interface

    out: Any = flash_attn_interface.flash_attn_func(*(x.transpose(1, 2) for x in (query, key, value)))
    return (out[0] if isinstance(out, tuple) else out).transpose(1, 2)


def _sage(query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, mask: torch.Tensor | None) -> torch.Tensor:
    import sageattention

    out: torch.Tensor = sageattention.sageattn(query, key, value, tensor_layout="HND")
    return out


def _xformers(query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, mask: torch.Tensor | None) -> torch.Tensor:
    import xformers.ops

    bias = mask
    if mask is not None:
        if mask.dtype == torch.bool:
            bias = torch.zeros_like(mask, dtype=query.dtype).masked_fill(~mask, float("-inf"))
        assert bias is not None
        bias = bias.expand(*query.shape[:3], key.shape[2])
    out: torch.Tensor = xformers.ops.memory_efficient_attention(*(x.transpose(1, 2) for x in (query, key, value)), attn_bias=bias)
    return out.transpose(1, 2)


def _flex(query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, mask: torch.Tensor | None) -> torch.Tensor:
    from torch.nn.attention.flex_attention import flex_attention

    if mask is None:
        return flex_attention(query, key, value)
    wide = mask.expand(*query.shape[:3], key.shape[2])

    def masked(score: torch.Tensor, b: torch.Tensor, h: torch.Tensor, i: torch.Tensor, j: torch.Tensor) -> torch.Tensor:
        if wide.dtype == torch.bool:
            return torch.where(wide[b, h, i, j], score, float("-inf"))
        return score + wide[b, h, i, j]

    return flex_attention(query, key, value, score_mod=masked)


BACKENDS: dict[str, Backend] = {
    "native": Backend(_native),
    "_native_math": Backend(_torch_kernel(SDPBackend.MATH)),
    "_native_flash": Backend(_torch_kernel(SDPBackend.FLASH_ATTENTION), masks=False, dtypes=HALVES, cuda=True),
    "_native_efficient": Backend(_torch_kernel(SDPBackend.EFFICIENT_ATTENTION), cuda=True),
    "_native_cudnn": Backend(_torch_kernel(SDPBackend.CUDNN_ATTENTION), dtypes=HALVES, cuda=True),
    "flex": Backend(_flex),
    "flash": Backend(_flash, "flash_attn", "flash-attn", masks=False, dtypes=HALVES, cuda=True),
    "_flash_3": Backend(_flash_3, "flash_attn_interface", "flash-attn-3", masks=False, dtypes=HALVES, cuda=True),
    "sage": Backend(_sage, "sageattention", "sageattention", masks=False, dtypes=HALVES, head_sizes=(64, 96, 128), cuda=True),
    "xformers": Backend(_xformers, "xformers", "xformers", cuda=True),
}
"""By the names of the field; ``native`` lets torch choose its kernel by mask, dtype and head size, on a CPU beside our own."""


def find_backend(name: str) -> Backend:
    """Looks a backend up.

    Raises:
        ValueError: There is none of this name.
        ImportError: Its package is not installed.
    """
    if name not in BACKENDS:
        raise ValueError(
            f"attention backend {name!r} is unknown{did_you_mean(str(name), BACKENDS)}: expected one of {', '.join(BACKENDS)}"
        )
    backend = BACKENDS[name]
    if backend.package and importlib.util.find_spec(backend.package) is None:
        raise ImportError(f"attention backend {name!r} needs the package {backend.package}: pip install {backend.install}")
    return backend


def set_backend(network: nn.Module, name: str) -> None:
    """Lets a backend compute all attention of a network; ``"native"`` undoes it."""
    find_backend(name)
    layer: Any
    for layer in network.modules():
        if hasattr(type(layer), "attention_backend"):
            layer.attention_backend = name


def compute(name: str, query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, mask: torch.Tensor | None) -> torch.Tensor:
    """Attention (B, H, N, D) by the backend ``name``; a ``ValueError`` if it cannot honour what is asked."""
    backend = BACKENDS[name]
    if reason := backend.refusal(query, mask):
        raise ValueError(f"attention backend {name!r} cannot be used here: {reason}; set_attention_backend('native') can")
    return backend.kernel(query, key, value, mask)
