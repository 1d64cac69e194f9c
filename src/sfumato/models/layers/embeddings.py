"""Embeddings of times, classes, pooled texts and pictures that a denoiser adds to its time embedding or to its tokens."""

from __future__ import annotations

import math
from itertools import pairwise

import torch
import torch.nn.functional as F
from torch import nn

from .attention import attend
from .compute import Conv2d, pixels_last
from .resnet import activation


def sinusoids(times: torch.Tensor, dim: int, flip_sin_to_cos: bool = False, freq_shift: float = 0.0) -> torch.Tensor:
    """Embeds real numbers ``(N,)`` as ``(N, dim)`` float32: sines and cosines of geometric frequencies (arXiv:1706.03762, 3.5).

    The lowest frequency is ``10000^(-(h-1)/(h-freq_shift))`` with ``h = dim // 2``; an odd ``dim`` ends in a zero.
    """
    half = dim // 2
    steps = torch.arange(half, dtype=torch.float32, device=times.device)
    angles = times.float()[:, None] * torch.exp(steps * -math.log(10000.0) / (half - freq_shift))
    parts = [angles.cos(), angles.sin()] if flip_sin_to_cos else [angles.sin(), angles.cos()]
    embedding = torch.cat(parts, dim=-1)
    return F.pad(embedding, (0, 1)) if dim % 2 else embedding


def time_tensor(timestep: torch.Tensor | float | int, sample: torch.Tensor) -> torch.Tensor:
    """One time per sample, ``(B,)``, from a number, a scalar tensor, or a tensor of one or B times."""
    if not isinstance(timestep, torch.Tensor):
        return torch.full((sample.shape[0],), timestep, device=sample.device)
    times = timestep.reshape(-1).to(sample.device)
    if times.shape[0] not in (1, sample.shape[0]):
        raise ValueError(f"timestep holds {times.shape[0]} times for a batch of {sample.shape[0]}: pass one, or one per sample")
    return times.expand(sample.shape[0])


class GaussianFourierProjection(nn.Module):
    """Embeds numbers, or with ``log`` their logarithms, with random, fixed frequencies (arXiv:2011.13456, appendix C.3).

    The frequencies stand in the checkpoint; before training ``scale`` is their standard deviation.
    """

    def __init__(self, half_dim: int, scale: float = 1.0, log: bool = False, flip_sin_to_cos: bool = False) -> None:
        super().__init__()
        self.log, self.flip_sin_to_cos = log, flip_sin_to_cos
        self.weight = nn.Parameter(torch.randn(half_dim) * scale, requires_grad=False)

    def forward(self, times: torch.Tensor) -> torch.Tensor:
        """``(N,)`` -> ``(N, 2 * half_dim)``."""
        times = times.to(self.weight.dtype)
        angles = (times.log() if self.log else times)[:, None] * self.weight * (2 * math.pi)
        return torch.cat([angles.cos(), angles.sin()] if self.flip_sin_to_cos else [angles.sin(), angles.cos()], dim=-1)


class TimestepEmbedding(nn.Module):
    """Two linear layers over an embedded time, with a condition of width ``cond_dim`` added to the input if there is one."""

    def __init__(self, in_dim: int, dim: int, act: str = "silu", post_act: str | None = None, cond_dim: int | None = None) -> None:
        super().__init__()
        self.linear_1 = nn.Linear(in_dim, dim)
        self.cond_proj = nn.Linear(cond_dim, in_dim, bias=False) if cond_dim is not None else None
        self.act = activation(act)
        self.linear_2 = nn.Linear(dim, dim)
        self.post_act = activation(post_act) if post_act is not None else None

    def forward(self, x: torch.Tensor, condition: torch.Tensor | None = None) -> torch.Tensor:
        """``(B, in_dim)`` and optionally ``(B, cond_dim)`` -> ``(B, dim)``."""
        if condition is not None:
            if self.cond_proj is None:
                raise ValueError("timestep_cond is given, but this network was built without time_cond_proj_dim: leave it out")
            x = x + self.cond_proj(condition)
        x = self.linear_2(self.act(self.linear_1(x)))
        return x if self.post_act is None else self.post_act(x)


class TimeTextEmbedding(nn.Module):
    """The condition of a transformer's modulations: time, pooled text and, if built so, guidance scale, each embedded and added.

    Args:
        dim, text_dim: Width of the result, and of the pooled text.
        guidance: Whether there is a guidance scale (distilled guidance, arXiv:2210.03142, section 3).
    """

    def __init__(self, dim: int, text_dim: int, guidance: bool = False) -> None:
        super().__init__()
        self.timestep_embedder = TimestepEmbedding(256, dim)
        self.guidance_embedder = TimestepEmbedding(256, dim) if guidance else None
        self.text_embedder = TimestepEmbedding(text_dim, dim)

    def forward(self, times: torch.Tensor, text: torch.Tensor, guidance: torch.Tensor | None = None) -> torch.Tensor:
        """``times`` (B,) in 0..1000, pooled ``text`` (B, text_dim), ``guidance`` (B,), the scale times 1000 -> (B, dim)."""
        embedding = self.timestep_embedder(sinusoids(times, 256, flip_sin_to_cos=True).to(text.dtype))
        if self.guidance_embedder is not None and guidance is not None:
            embedding = embedding + self.guidance_embedder(sinusoids(guidance, 256, flip_sin_to_cos=True).to(text.dtype))
        return embedding + self.text_embedder(text)


def grid_sinusoids(dim: int, size: int, base_size: int) -> torch.Tensor:
    """Sinusoids of the places of a square grid, ``(1, size * size, dim)`` float32: half for the column, half for the row.

    Places are counted as in a grid of ``base_size``, whatever the size, so that the spacing of a larger one is finer.
    """
    places = torch.arange(size, dtype=torch.float64) * (base_size / size)
    angles = places[:, None] * 10000.0 ** (-torch.arange(dim // 4, dtype=torch.float64) / (dim // 4))
    line = torch.cat([angles.sin(), angles.cos()], dim=1).float()  # (size, dim / 2)
    column, row = line[None].expand(size, -1, -1), line[:, None].expand(-1, size, -1)
    return torch.cat([column, row], dim=2).flatten(0, 1).unsqueeze(0)


class PatchEmbedding(nn.Module):
    """Turns patches of a picture into tokens, and adds the places of the middle of a grid of ``max_size`` (0: no places).

    The places stand in the checkpoint. ``base_size`` is the size of the picture, in patches, of the training.
    """

    pos_embed: torch.Tensor

    def __init__(self, in_channels: int, dim: int, patch: int, base_size: int, max_size: int) -> None:
        super().__init__()
        self.patch, self.max_size = patch, max_size
        self.proj = Conv2d(in_channels, dim, patch, stride=patch)
        if max_size:
            self.register_buffer("pos_embed", grid_sinusoids(dim, max_size, base_size))

    def forward(self, picture: torch.Tensor) -> torch.Tensor:
        """``(B, C, H, W)`` -> ``(B, H / patch * W / patch, dim)``; a ``ValueError`` if it is no whole number of patches."""
        height, width = (side // self.patch for side in picture.shape[2:])
        if (height * self.patch, width * self.patch) != picture.shape[2:]:
            raise ValueError(f"a height and width of {tuple(picture.shape[2:])} are not multiples of the patch, {self.patch}")
        tokens = self.proj(pixels_last(picture)).flatten(2).transpose(1, 2)
        if not self.max_size:
            return tokens
        if max(height, width) > self.max_size:
            raise ValueError(
                f"{height} x {width} patches are more than this network knows, {self.max_size} a side: make the picture smaller"
            )
        top, left = (self.max_size - height) // 2, (self.max_size - width) // 2
        grid = self.pos_embed.view(self.max_size, self.max_size, -1)
        places = grid[top : top + height, left : left + width].reshape(1, height * width, -1)
        return tokens + places.to(tokens.dtype)


class AttentionPooling(nn.Module):
    """Pools tokens by letting their mean attend to itself and to them (arXiv:2103.00020, section 2.4)."""

    def __init__(self, heads: int, dim: int) -> None:
        super().__init__()
        self.heads = heads
        self.positional_embedding = nn.Parameter(torch.randn(1, dim) / dim**0.5)
        self.k_proj, self.q_proj, self.v_proj = nn.Linear(dim, dim), nn.Linear(dim, dim), nn.Linear(dim, dim)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """``(B, N, C)`` -> ``(B, C)``."""
        mean = x.mean(dim=1, keepdim=True) + self.positional_embedding
        x = torch.cat([mean, x], dim=1)
        return attend(self.q_proj(mean), self.k_proj(x), self.v_proj(x), self.heads)[:, 0]


class TextTimeEmbedding(nn.Module):
    """Pooled text tokens, added to the time embedding."""

    def __init__(self, text_dim: int, dim: int, heads: int) -> None:
        super().__init__()
        self.norm1 = nn.LayerNorm(text_dim)
        self.pool = AttentionPooling(heads, text_dim)
        self.proj = nn.Linear(text_dim, dim)
        self.norm2 = nn.LayerNorm(dim)

    def forward(self, text: torch.Tensor) -> torch.Tensor:
        """``(B, N, text_dim)`` -> ``(B, dim)``."""
        return self.norm2(self.proj(self.pool(self.norm1(text))))


class TextImageTimeEmbedding(nn.Module):
    """A pooled text and a picture embedding, added to the time embedding."""

    def __init__(self, text_dim: int, image_dim: int, dim: int) -> None:
        super().__init__()
        self.text_proj = nn.Linear(text_dim, dim)
        self.text_norm = nn.LayerNorm(dim)
        self.image_proj = nn.Linear(image_dim, dim)

    def forward(self, text: torch.Tensor, image: torch.Tensor) -> torch.Tensor:
        """``(B, text_dim)`` and ``(B, image_dim)`` -> ``(B, dim)``."""
        return self.image_proj(image) + self.text_norm(self.text_proj(text))


class ImageTimeEmbedding(nn.Module):
    """A picture embedding, added to the time embedding; with ``hint`` also a picture turned into four latent channels."""

    def __init__(self, image_dim: int, dim: int, hint: bool = False) -> None:
        super().__init__()
        self.image_proj = nn.Linear(image_dim, dim)
        self.image_norm = nn.LayerNorm(dim)
        if hint:
            widths, layers = (3, 16, 16, 32, 32, 96, 96, 256), []
            for i, (a, b) in enumerate(pairwise(widths)):
                # every second convolution halves the picture, from the third on
                layers += [nn.Conv2d(a, b, 3, padding=1, stride=2 if i and i % 2 == 0 else 1), nn.SiLU()]
            self.input_hint_block = nn.Sequential(*layers, nn.Conv2d(256, 4, 3, padding=1))

    def forward(self, image: torch.Tensor) -> torch.Tensor:
        """``(B, image_dim)`` -> ``(B, dim)``."""
        return self.image_norm(self.image_proj(image))

    def hint(self, picture: torch.Tensor) -> torch.Tensor:
        """``(B, 3, 8H, 8W)`` -> ``(B, 4, H, W)``."""
        return self.input_hint_block(picture)


class ImageProjection(nn.Module):
    """Turns a picture embedding into normalised tokens."""

    def __init__(self, image_dim: int, dim: int, tokens: int = 32) -> None:
        super().__init__()
        self.tokens = tokens
        self.image_embeds = nn.Linear(image_dim, tokens * dim)
        self.norm = nn.LayerNorm(dim)

    def forward(self, image: torch.Tensor) -> torch.Tensor:
        """``(B, image_dim)`` -> ``(B, tokens, dim)``."""
        return self.norm(self.image_embeds(image).unflatten(1, (self.tokens, -1)))


class TextImageProjection(nn.Module):
    """Turns a picture embedding into tokens that stand before the projected text tokens."""

    def __init__(self, text_dim: int, image_dim: int, dim: int, tokens: int = 10) -> None:
        super().__init__()
        self.tokens = tokens
        self.image_embeds = nn.Linear(image_dim, tokens * dim)
        self.text_proj = nn.Linear(text_dim, dim)

    def forward(self, text: torch.Tensor, image: torch.Tensor) -> torch.Tensor:
        """``(B, N, text_dim)`` and ``(B, image_dim)`` -> ``(B, tokens + N, dim)``."""
        return torch.cat([self.image_embeds(image).unflatten(1, (self.tokens, -1)), self.text_proj(text)], dim=1)
