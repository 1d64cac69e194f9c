"""From picture embeddings to the tokens that IP-Adapters attend to (arXiv:2308.06721), and from their files to these networks.

Kinds: *plain*, a linear layer of a pooled embedding; *full*, a small network over all patches (full-face); *plus*, a resampler
(Perceiver, arXiv:2103.03206; Flamingo, arXiv:2204.14198, section 3.1); *timed*, a resampler that is told the time (Stable
Diffusion 3); *FaceID*, a small network over a face's identity; and *FaceID plus*, a resampler whose queries are made of the
identity.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any, ClassVar

import torch
import torch.nn.functional as F
from torch import nn

from ..errors import WeightsError
from ..weights import assign
from .layers.attention import attend
from .layers.embeddings import ImageProjection, TimestepEmbedding, sinusoids
from .layers.options import AttentionOptions

HEAD = 64
"""Width of a resampler's heads: files do not say it, and all have this one."""


class _Widening(nn.Module):
    def __init__(self, dim: int, inner: int, bias: bool) -> None:
        super().__init__()
        self.proj = nn.Linear(dim, inner, bias=bias)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return F.gelu(self.proj(x))


class _FeedForward(nn.Module):
    """Two linear layers with GELU (arXiv:1606.08415) between them."""

    def __init__(self, dim: int, inner: int, out: int, bias: bool = True) -> None:
        super().__init__()
        self.in_features = dim
        self.net = nn.Sequential(_Widening(dim, inner, bias), nn.Identity(), nn.Linear(inner, out, bias=bias))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.net(x)


class IPAdapterFullImageProjection(nn.Module):
    """Tokens of all patches of a picture: one each. ``image_dim`` is the width of the patches, ``dim`` of the tokens."""

    def __init__(self, image_dim: int, dim: int) -> None:
        super().__init__()
        self.ff = _FeedForward(image_dim, image_dim, dim)
        self.norm = nn.LayerNorm(dim)

    def forward(self, patches: torch.Tensor) -> torch.Tensor:
        """``(B, N, image_dim)`` -> ``(B, N, dim)``."""
        return self.norm(self.ff(patches))


class IPAdapterFaceIDImageProjection(nn.Module):
    """Tokens of a face's identity, ``inner`` wide between its two layers."""

    def __init__(self, image_dim: int, dim: int, inner: int, tokens: int) -> None:
        super().__init__()
        self.tokens = tokens
        self.ff = _FeedForward(image_dim, inner, tokens * dim)
        self.norm = nn.LayerNorm(dim)

    def forward(self, identity: torch.Tensor) -> torch.Tensor:
        """``(B, image_dim)`` -> ``(B, tokens, dim)``."""
        return self.norm(self.ff(identity).unflatten(1, (self.tokens, -1)))


class _ResamplerAttention(nn.Module):
    def __init__(self, dim: int, heads: int) -> None:
        super().__init__()
        self.heads = heads
        self.to_q, self.to_k, self.to_v = (nn.Linear(dim, heads * HEAD, bias=False) for _ in range(3))
        self.to_out = nn.Sequential(nn.Linear(heads * HEAD, dim, bias=False))

    def forward(self, latents: torch.Tensor, context: torch.Tensor) -> torch.Tensor:
        return self.to_out(attend(self.to_q(latents), self.to_k(context), self.to_v(context), self.heads))


class IPAdapterPlusImageProjectionBlock(nn.Module):
    """Latents attend to a picture's patches and to themselves, then a feed-forward network; each added to its input.

    In a ``timed`` block the time shifts and scales the latents that both read (DiT, arXiv:2212.09748, section 3.2).
    """

    def __init__(self, dim: int, heads: int, inner: int, timed: bool) -> None:
        super().__init__()
        self.ln0, self.ln1 = nn.LayerNorm(dim), nn.LayerNorm(dim)
        self.attn = _ResamplerAttention(dim, heads)
        self.ff = nn.Sequential(nn.LayerNorm(dim), _FeedForward(dim, inner, dim, bias=False))
        self.adaln_proj = nn.Linear(dim, 4 * dim) if timed else None

    def forward(self, patches: torch.Tensor, latents: torch.Tensor, time: torch.Tensor | None) -> torch.Tensor:
        """``patches`` (B, N, dim), ``latents`` (B, K, dim), ``time`` (B, dim) -> latents."""
        shift, scale, ff_shift, ff_scale = 0.0, 0.0, 0.0, 0.0
        if self.adaln_proj is not None and time is not None:
            shift, scale, ff_shift, ff_scale = self.adaln_proj(F.silu(time)).unsqueeze(1).chunk(4, dim=2)
        normed, (norm, feed_forward) = self.ln1(latents) * (1 + scale) + shift, self.ff
        latents = latents + self.attn(normed, torch.cat([self.ln0(patches), normed], dim=1))
        return latents + feed_forward(norm(latents) * (1 + ff_scale) + ff_shift)


class _Resampler(nn.Module):
    """What all resamplers have: ``depth`` blocks, ``dim`` wide, between a picture's patches and tokens."""

    timed: ClassVar[bool] = False

    def __init__(self, image_dim: int, dim: int, out: int, heads: int, inner: int, depth: int) -> None:
        super().__init__()
        self.proj_in = nn.Linear(image_dim, dim)
        self.proj_out = nn.Linear(dim, out)
        self.norm_out = nn.LayerNorm(out)
        blocks = (IPAdapterPlusImageProjectionBlock(dim, heads, inner, self.timed) for _ in range(depth))
        self.layers = nn.ModuleList(blocks)

    def resample(self, patches: torch.Tensor, latents: torch.Tensor, time: torch.Tensor | None = None) -> torch.Tensor:
        patches = self.proj_in(patches)
        patches = patches if time is None else patches + time.unsqueeze(1)
        for layer in self.layers:
            latents = layer(patches, latents, time)
        return self.norm_out(self.proj_out(latents))


class IPAdapterPlusImageProjection(_Resampler):
    """A resampler with ``queries`` learned latents."""

    def __init__(self, image_dim: int, dim: int, out: int, heads: int, inner: int, depth: int, queries: int) -> None:
        super().__init__(image_dim, dim, out, heads, inner, depth)
        self.latents = nn.Parameter(torch.randn(1, queries, dim) / dim**0.5)

    def forward(self, patches: torch.Tensor) -> torch.Tensor:
        """``(B, N, image_dim)`` -> ``(B, queries, out)``."""
        return self.resample(patches, self.latents.expand(len(patches), -1, -1))


class IPAdapterTimeImageProjection(IPAdapterPlusImageProjection):
    """A resampler that is told the time, so that it acts anew in each step (Stable Diffusion 3)."""

    timed = True

    def __init__(self, image_dim: int, dim: int, out: int, heads: int, inner: int, depth: int, queries: int, time_dim: int) -> None:
        super().__init__(image_dim, dim, out, heads, inner, depth, queries)
        self.time_embedding = TimestepEmbedding(time_dim, dim)

    def embed_time(self, timestep: torch.Tensor) -> torch.Tensor:
        """Times in 0..1000 ``(B,)`` -> ``(B, dim)``."""
        weight = self.time_embedding.linear_1.weight
        return self.time_embedding(sinusoids(timestep, weight.shape[1], flip_sin_to_cos=True).to(weight.dtype))

    def forward(self, patches: torch.Tensor, time: torch.Tensor) -> torch.Tensor:  # type: ignore[override]
        """``(B, N, image_dim)`` and an embedded time ``(B, dim)`` -> ``(B, queries, out)``."""
        return self.resample(patches, self.latents.expand(len(patches), -1, -1), time)


class IPAdapterFaceIDPlusImageProjection(_Resampler):
    """A resampler whose latents are a face's identity, over the patches of its picture.

    Attributes:
        clip_embeds: Patches of the face's picture, (rows, pictures, N, image_dim) as ``prepare_ip_adapter_image_embeds`` gives
            them (negative ones first); set before a call.
        shortcut, shortcut_scale: Add the identity's tokens to this many times the result (version 2 of the checkpoints).
    """

    def __init__(
        self, identity_dim: int, identity_inner: int, tokens: int, image_dim: int, dim: int, out: int, heads: int, inner: int,
        depth: int,
    ) -> None:  # fmt: skip
        super().__init__(image_dim, dim, out, heads, inner, depth)
        self.tokens = tokens
        self.proj = _FeedForward(identity_dim, identity_inner, tokens * dim)
        self.norm = nn.LayerNorm(dim)
        self.clip_embeds: torch.Tensor | None = None
        self.shortcut, self.shortcut_scale = False, 1.0

    def forward(self, identity: torch.Tensor) -> torch.Tensor:
        """``(B, identity_dim)`` -> ``(B, tokens, out)``."""
        if self.clip_embeds is None:
            remedy = "`unet.encoder_hid_proj.image_projection_layers[i].clip_embeds = pipe.prepare_ip_adapter_image_embeds(...)[0]`"
            raise ValueError(f"an IP-Adapter FaceID plus needs the face's picture beside its identity: set {remedy}")
        patches = self.clip_embeds.flatten(0, -3).to(identity)
        if len(patches) % len(identity):
            raise ValueError(
                f"clip_embeds holds {len(patches)} pictures for {len(identity)} identities (of negative branches too): "
                "pass one for each"
            )
        latents = self.norm(self.proj(identity).unflatten(1, (self.tokens, -1)))
        out = self.resample(patches[:: len(patches) // len(identity)], latents)
        return latents + self.shortcut_scale * out if self.shortcut else out


class MultiIPAdapterImageProjection(nn.Module):
    """The projections of the IP-Adapters of a network, which has it as ``encoder_hid_proj``.

    Attributes:
        scales: Of each IP-Adapter in each attention layer that it reaches, a number or one for each of its pictures. Runs read
            them when they start; to change them put another value here, do not change this one.
        replaced: Parameters of the network that the IP-Adapters changed, by name, as they were before.
    """

    def __init__(self, layers: Sequence[nn.Module], scales: tuple[tuple[Any, ...], ...]) -> None:
        super().__init__()
        self.image_projection_layers = nn.ModuleList(layers)
        self.scales = scales
        self.replaced: dict[str, nn.Parameter] = {}

    def forward(self, image_embeds: Sequence[torch.Tensor]) -> list[torch.Tensor]:
        """One (B, pictures, ...) for each IP-Adapter -> tokens (B, pictures, K, C) of each; as given where they need the time."""
        pairs = zip(image_embeds, self.image_projection_layers, strict=True)
        return [
            embeds if isinstance(projection, IPAdapterTimeImageProjection)
            else projection(embeds.flatten(0, 1)).unflatten(0, embeds.shape[:2])
            for embeds, projection in pairs
        ]  # fmt: skip

    def at_time(self, options: AttentionOptions, timestep: torch.Tensor) -> AttentionOptions:
        """Options that hold patches (B, pictures, N, D), at times (B,): with the tokens that those which need the time make."""
        tokens, times = [], []
        for patches, projection in zip(options.image_tokens, self.image_projection_layers, strict=True):
            assert isinstance(projection, IPAdapterTimeImageProjection)  # as loading saw to
            times.append(projection.embed_time(timestep))
            rows = times[-1].repeat_interleave(patches.shape[1], dim=0)
            tokens.append(projection(patches.flatten(0, 1), rows).unflatten(0, patches.shape[:2]))
        return replace(options, image_tokens=tuple(tokens), image_times=tuple(times))


def reads_patches(projection: nn.Module) -> bool:
    """Whether a projection reads all patches of a picture rather than its pooled embedding."""
    return not isinstance(projection, ImageProjection)


def input_width(projection: nn.Module) -> int:
    """Width of the embeddings that a projection reads."""
    match projection:
        case ImageProjection():
            return projection.image_embeds.in_features
        case IPAdapterPlusImageProjection():
            return projection.proj_in.in_features
        case IPAdapterFaceIDPlusImageProjection():
            return projection.proj.in_features
        case IPAdapterFullImageProjection() | IPAdapterFaceIDImageProjection():
            return projection.ff.in_features
    raise TypeError(f"a {type(projection).__name__} is no projection of an IP-Adapter")


# --- files ----------------------------------------------------------------------------------------------------------

_RESAMPLER_NAMES = (
    (r"^perceiver_resampler\.", ""),
    (r"^(layers\.\d+)\.0\.norm1\.", r"\1.ln0."),
    (r"^(layers\.\d+)\.0\.norm2\.", r"\1.ln1."),
    (r"^(layers\.\d+)\.0\.(to_[qkv])\.", r"\1.attn.\2."),
    (r"^(layers\.\d+)\.0\.to_out\.", r"\1.attn.to_out.0."),
    (r"^(layers\.\d+)\.1\.0\.", r"\1.ff.0."),
    (r"^(layers\.\d+)\.1\.1\.", r"\1.ff.1.net.0.proj."),
    (r"^(layers\.\d+)\.1\.3\.", r"\1.ff.1.net.2."),
    (r"^(layers\.\d+)\.2\.1\.", r"\1.adaln_proj."),
)
_NAMES = {
    "plain": ((r"^proj\.", "image_embeds."),),
    "full": ((r"^proj\.0\.", "ff.net.0.proj."), (r"^proj\.2\.", "ff.net.2."), (r"^proj\.3\.", "norm.")),
    "faceid": ((r"^proj\.0\.", "ff.net.0.proj."), (r"^proj\.2\.", "ff.net.2.")),
    "plus": _RESAMPLER_NAMES,
    "timed": _RESAMPLER_NAMES,
    "faceid plus": ((r"^proj\.0\.", "proj.net.0.proj."), (r"^proj\.2\.", "proj.net.2."), *_RESAMPLER_NAMES),
}
"""Names in the files' ``image_proj`` part -> ours."""


def _kind(keys: Mapping[str, torch.Tensor]) -> str:
    marks = {
        "faceid plus": "perceiver_resampler.proj_in.weight", "timed": "time_embedding.linear_1.weight", "plus": "latents",
        "full": "proj.3.weight", "faceid": "proj.0.weight", "plain": "proj.weight",
    }  # fmt: skip
    for kind, mark in marks.items():
        if mark in keys:
            return kind
    raise WeightsError(f"image_proj holds {', '.join(sorted(keys)[:3])} ...: no kind of IP-Adapter that is known here")


def _renamed(kind: str, tensors: Mapping[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    found: dict[str, torch.Tensor] = {}
    for key, tensor in tensors.items():
        parts = [(key, tensor)]
        if ".to_kv." in key:
            parts = [(key.replace("to_kv", name), half) for name, half in zip(("to_k", "to_v"), tensor.chunk(2), strict=True)]
        for name, part in parts:
            for pattern, new in _NAMES[kind]:
                name = re.sub(pattern, new, name)
            found[name] = part
    return found


def _resampler_sizes(shape: Mapping[str, tuple[int, ...]]) -> tuple[int, int, int, int, int, int]:
    """``image_dim``, ``dim``, ``out``, ``heads``, ``inner`` and ``depth`` of a resampler."""
    (dim, image_dim), (out, _) = shape["proj_in.weight"], shape["proj_out.weight"]
    depth = len({key.split(".")[1] for key in shape if key.startswith("layers.")})
    heads, inner = shape["layers.0.attn.to_q.weight"][0] // HEAD, shape["layers.0.ff.1.net.0.proj.weight"][0]
    return image_dim, dim, out, heads, inner, depth


def build_projection(tensors: Mapping[str, torch.Tensor], dtype: torch.dtype, where: str, timed: bool) -> nn.Module:
    """Builds the projection that the ``image_proj`` part of a file holds.

    Args:
        tensors: Name -> tensor.
        dtype: Floating-point type to convert to.
        where: What the tensors came from, for messages.
        timed: Whether the network needs one that is told the time.

    Raises:
        WeightsError: They are of no known kind, or do not fit it.
    """
    kind = _kind(tensors)
    if (kind == "timed") != timed:
        raise WeightsError(f"{where} holds an image_proj ({kind}) that was made for another network (SD 1.5, SDXL, SD 3, FLUX ...)")
    named = _renamed(kind, tensors)
    shape = {key: tuple(tensor.shape) for key, tensor in named.items()}
    try:
        with torch.device("meta"):
            module = _build(kind, shape)
    except KeyError as error:
        raise WeightsError(f"{where}: the image_proj of an IP-Adapter ({kind}) lacks {error}: download it again") from error
    assign(module, named, dtype, f"image_proj of {where}")
    return module.eval()


def _build(kind: str, shape: Mapping[str, tuple[int, ...]]) -> nn.Module:
    if kind == "plain":
        (rows, image_dim), (dim,) = shape["image_embeds.weight"], shape["norm.weight"]
        return ImageProjection(image_dim, dim, rows // dim)
    if kind in ("plus", "timed"):
        sizes = *_resampler_sizes(shape), shape["latents"][1]
        if kind == "timed":
            return IPAdapterTimeImageProjection(*sizes, shape["time_embedding.linear_1.weight"][1])
        return IPAdapterPlusImageProjection(*sizes)
    (dim,) = shape["norm.weight"]
    first, last = (
        ("proj.net.0.proj.weight", "proj.net.2.weight") if kind == "faceid plus" else ("ff.net.0.proj.weight", "ff.net.2.weight")
    )
    (inner, image_dim), (rows, _) = shape[first], shape[last]
    if kind == "full":
        return IPAdapterFullImageProjection(image_dim, dim)
    if kind == "faceid":
        return IPAdapterFaceIDImageProjection(image_dim, dim, inner, rows // dim)
    return IPAdapterFaceIDPlusImageProjection(image_dim, inner, rows // dim, *_resampler_sizes(shape))
