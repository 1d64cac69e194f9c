"""From picture embeddings to the tokens that IP-Adapters attend to (arXiv:2308.06721).

Kinds: *plain*, a linear layer of a pooled embedding; *full*, a small network over all patches (full-face); *plus*, a resampler
(Perceiver, arXiv:2103.03206; Flamingo, arXiv:2204.14198, section 3.1); *timed*, a resampler that is told the time (Stable
Diffusion 3); *FaceID*, a small network over a face's identity; and *FaceID plus*, a resampler whose queries are made of the
identity. Parameters are named as in the files.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any, ClassVar

import torch
from torch import nn

from ..errors import WeightsError
from ..weights import assign
from .layers.attention import attend
from .layers.embeddings import TimestepEmbedding, sinusoids
from .layers.options import AttentionOptions

HEAD = 64
"""Width of a resampler's heads: files do not say it, and all have this one."""


def _feed_forward(dim: int, inner: int, out: int, bias: bool = True) -> nn.Sequential:
    """Two linear layers with GELU (arXiv:1606.08415) between them."""
    return nn.Sequential(nn.Linear(dim, inner, bias=bias), nn.GELU(), nn.Linear(inner, out, bias=bias))


class IPAdapterImageProjection(nn.Module):
    """Tokens of a pooled embedding; with an ``inner`` layer of that width, of a face's identity."""

    def __init__(self, image_dim: int, dim: int, tokens: int, inner: int | None = None) -> None:
        super().__init__()
        self.tokens, out = tokens, tokens * dim
        self.proj = nn.Linear(image_dim, out) if inner is None else _feed_forward(image_dim, inner, out)
        self.norm = nn.LayerNorm(dim)

    def forward(self, embedding: torch.Tensor) -> torch.Tensor:
        """``(B, image_dim)`` -> ``(B, tokens, dim)``."""
        return self.norm(self.proj(embedding).unflatten(1, (self.tokens, -1)))


class IPAdapterFullImageProjection(nn.Module):
    """Tokens of all patches of a picture: one each. ``image_dim`` is the width of the patches, ``dim`` of the tokens."""

    def __init__(self, image_dim: int, dim: int) -> None:
        super().__init__()
        self.proj = nn.Sequential(*_feed_forward(image_dim, image_dim, dim), nn.LayerNorm(dim))

    def forward(self, patches: torch.Tensor) -> torch.Tensor:
        """``(B, N, image_dim)`` -> ``(B, N, dim)``."""
        return self.proj(patches)


class _ResamplerAttention(nn.Module):
    """Attention of latents to a picture's patches and to themselves."""

    def __init__(self, dim: int, heads: int) -> None:
        super().__init__()
        self.heads, inner = heads, heads * HEAD
        self.norm1, self.norm2 = nn.LayerNorm(dim), nn.LayerNorm(dim)
        self.to_q, self.to_kv = nn.Linear(dim, inner, bias=False), nn.Linear(dim, 2 * inner, bias=False)
        self.to_out = nn.Linear(inner, dim, bias=False)

    def forward(self, patches: torch.Tensor, latents: torch.Tensor, shift: Any, scale: Any) -> torch.Tensor:
        latents = self.norm2(latents) * (1 + scale) + shift
        key, value = self.to_kv(torch.cat([self.norm1(patches), latents], dim=1)).chunk(2, dim=2)
        return self.to_out(attend(self.to_q(latents), key, value, self.heads))


class _Resampler(nn.Module):
    """``depth`` blocks, ``dim`` wide, between a picture's patches and tokens: attention and feed-forward, each added to its input.

    In a ``timed`` one, the time is added to the patches, and shifts and scales what both parts of a block read of the latents
    (DiT, arXiv:2212.09748, section 3.2).
    """

    timed: ClassVar[bool] = False

    def __init__(self, image_dim: int, dim: int, out: int, heads: int, inner: int, depth: int) -> None:
        super().__init__()
        self.proj_in = nn.Linear(image_dim, dim)
        self.proj_out = nn.Linear(dim, out)
        self.norm_out = nn.LayerNorm(out)
        self.layers = nn.ModuleList()
        for _ in range(depth):
            feed_forward = nn.Sequential(nn.LayerNorm(dim), *_feed_forward(dim, inner, dim, bias=False))
            modulation = [nn.Sequential(nn.SiLU(), nn.Linear(dim, 4 * dim))] if self.timed else []
            self.layers.append(nn.ModuleList([_ResamplerAttention(dim, heads), feed_forward, *modulation]))

    def resample(self, patches: torch.Tensor, latents: torch.Tensor, time: torch.Tensor | None = None) -> torch.Tensor:
        """``patches`` (B, N, image_dim), ``latents`` (B, K, dim), ``time`` (B, dim) -> tokens (B, K, out)."""
        patches = self.proj_in(patches) if time is None else self.proj_in(patches) + time.unsqueeze(1)
        blocks: Any = self.layers
        for attention, feed_forward, *modulation in blocks:
            parts = [0.0] * 4 if time is None else modulation[0](time).unsqueeze(1).chunk(4, dim=2)
            latents = latents + attention(patches, latents, *parts[:2])
            latents = latents + feed_forward[1:](feed_forward[0](latents) * (1 + parts[3]) + parts[2])
        return self.norm_out(self.proj_out(latents))


class IPAdapterPlusImageProjection(_Resampler):
    """A resampler with ``queries`` learned latents."""

    def __init__(self, image_dim: int, dim: int, out: int, heads: int, inner: int, depth: int, queries: int) -> None:
        super().__init__(image_dim, dim, out, heads, inner, depth)
        self.latents = nn.Parameter(torch.randn(1, queries, dim) / dim**0.5)

    def forward(self, patches: torch.Tensor, time: torch.Tensor | None = None) -> torch.Tensor:
        """``(B, N, image_dim)``, and an embedded time ``(B, dim)`` for one that is told it -> ``(B, queries, out)``."""
        return self.resample(patches, self.latents.expand(len(patches), -1, -1), time)


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


class IPAdapterFaceIDPlusImageProjection(IPAdapterImageProjection):
    """A resampler whose latents are a face's identity, over the patches of its picture.

    Attributes:
        clip_embeds: Patches of the face's picture, (rows, pictures, N, image_dim) as ``prepare_ip_adapter_image_embeds`` gives
            them (negative ones first), for calls that do not bring their own.
        shortcut, shortcut_scale: Add the identity's tokens to this many times the result (version 2 of the checkpoints).
    """

    def __init__(self, identity_dim: int, dim: int, tokens: int, identity_inner: int, resampler: _Resampler) -> None:
        super().__init__(identity_dim, dim, tokens, identity_inner)
        self.perceiver_resampler = resampler
        self.clip_embeds: torch.Tensor | None = None
        self.shortcut, self.shortcut_scale = False, 1.0

    def forward(self, identity: torch.Tensor, face: torch.Tensor | None = None) -> torch.Tensor:
        """``(B, identity_dim)``, and the call's own patches in place of ``clip_embeds`` -> ``(B, tokens, out)``."""
        face = self.clip_embeds if face is None else face
        if face is None:
            remedy = "`ip_adapter_image_embeds=[(identity, pipe.prepare_ip_adapter_image_embeds(picture, ...)[0])]`"
            raise ValueError(f"an IP-Adapter FaceID plus needs the face's picture beside its identity: pass {remedy}")
        patches = face.flatten(0, -3).to(identity)
        if len(patches) % len(identity):
            what = f"clip_embeds holds {len(patches)} pictures for {len(identity)} identities (of negative branches too)"
            raise ValueError(f"{what}: pass one for each")
        latents = super().forward(identity)
        out = self.perceiver_resampler.resample(patches[:: len(patches) // len(identity)], latents)
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

    def forward(self, image_embeds: Sequence[torch.Tensor], faces: Mapping[int, torch.Tensor]) -> list[torch.Tensor]:
        """One (B, pictures, ...) for each IP-Adapter -> tokens (B, pictures, K, C) of each; as given where they need the time.

        ``faces`` are patches that a call brings beside identities, by the number of the IP-Adapter.
        """
        found = []
        for i, (embeds, projection) in enumerate(zip(image_embeds, self.image_projection_layers, strict=True)):
            if not isinstance(projection, IPAdapterTimeImageProjection):
                face = [faces[i]] if i in faces else []
                embeds = projection(embeds.flatten(0, 1), *face).unflatten(0, embeds.shape[:2])
            found.append(embeds)
        return found

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
    return reads_face(projection) or not isinstance(projection, IPAdapterImageProjection)


def reads_face(projection: nn.Module) -> bool:
    """Whether a projection reads a face's identity and its picture's patches."""
    return isinstance(projection, IPAdapterFaceIDPlusImageProjection)


def input_width(projection: nn.Module) -> int:
    """Width of the embeddings that a projection reads, in its first layer."""
    return next(layer.in_features for layer in projection.modules() if isinstance(layer, nn.Linear))


# --- files ----------------------------------------------------------------------------------------------------------

_MARKS = {
    "perceiver_resampler.proj_in.weight": "FaceID plus", "time_embedding.linear_1.weight": "timed", "latents": "plus",
    "proj.3.weight": "full", "proj.0.weight": "FaceID", "proj.weight": "plain",
}  # fmt: skip
"""Names that tell the kinds apart, in this order."""
_ORIGINAL = {
    ".ln0.": ".0.norm1.", ".ln1.": ".0.norm2.", ".attn.to_out.0.": ".0.to_out.", ".attn.": ".0.", ".adaln_norm.": ".1.0.",
    ".ff.net.0.proj.": ".1.1.", ".ff.net.2.": ".1.3.", ".adaln_proj.": ".2.1.",
}  # fmt: skip
"""Parts of names in the safetensors files for Stable Diffusion 3, which are the field's -> those of the original."""


def _original(name: str) -> str:
    for part, original in _ORIGINAL.items():
        name = name.replace(part, original)
    return name


def _resampler_sizes(shape: Mapping[str, tuple[int, ...]], prefix: str = "") -> tuple[int, int, int, int, int, int]:
    """``image_dim``, ``dim``, ``out``, ``heads``, ``inner`` and ``depth`` of a resampler."""
    (dim, image_dim), (out, _) = shape[f"{prefix}proj_in.weight"], shape[f"{prefix}proj_out.weight"]
    depth = len({key.removeprefix(prefix).split(".")[1] for key in shape if key.startswith(f"{prefix}layers.")})
    heads, inner = shape[f"{prefix}layers.0.0.to_q.weight"][0] // HEAD, shape[f"{prefix}layers.0.1.1.weight"][0]
    return image_dim, dim, out, heads, inner, depth


def build_projection(tensors: Mapping[str, torch.Tensor], dtype: torch.dtype, where: str, timed: bool) -> nn.Module:
    """Builds the projection that the ``image_proj`` part of a file holds.

    Args:
        tensors: Name -> tensor.
        dtype: Floating-point type to convert to.
        where: What the tensors came from, for messages.
        timed: Whether the network needs one that is told the time.

    Raises:
        WeightsError: They are of no known kind, do not fit it, or are for another network.
    """
    tensors = {_original(name): tensor for name, tensor in tensors.items()}
    kind = next((kind for mark, kind in _MARKS.items() if mark in tensors), None)
    if kind is None:
        raise WeightsError(f"image_proj holds {', '.join(sorted(tensors)[:3])} ...: no kind of IP-Adapter that is known here")
    if (kind == "timed") != timed:
        raise WeightsError(f"{where} holds an image_proj ({kind}) that was made for another network (SD 1.5, SDXL, SD 3, FLUX ...)")
    try:
        with torch.device("meta"):
            module = _build(kind, {key: tuple(tensor.shape) for key, tensor in tensors.items()})
    except KeyError as error:
        raise WeightsError(f"{where}: the image_proj of an IP-Adapter ({kind}) lacks {error}: download it again") from error
    assign(module, tensors, dtype, f"image_proj of {where}")
    return module.eval()


def _build(kind: str, shape: Mapping[str, tuple[int, ...]]) -> nn.Module:
    if kind in ("plus", "timed"):
        sizes = *_resampler_sizes(shape), shape["latents"][1]
        if kind == "timed":
            return IPAdapterTimeImageProjection(*sizes, shape["time_embedding.linear_1.weight"][1])
        return IPAdapterPlusImageProjection(*sizes)
    if kind == "full":
        return IPAdapterFullImageProjection(shape["proj.0.weight"][1], *shape["proj.3.weight"])
    (dim,) = shape["norm.weight"]
    if kind == "plain":
        rows, image_dim = shape["proj.weight"]
        return IPAdapterImageProjection(image_dim, dim, rows // dim)
    (inner, image_dim), (rows, _) = shape["proj.0.weight"], shape["proj.2.weight"]
    own = image_dim, dim, rows // dim, inner
    if kind == "FaceID":
        return IPAdapterImageProjection(*own)
    return IPAdapterFaceIDPlusImageProjection(*own, _Resampler(*_resampler_sizes(shape, "perceiver_resampler.")))
