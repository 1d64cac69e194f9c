"""Guidance by a prompt against its absence, in other ways than along a straight line."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

import torch
import torch.nn.functional as F

from .checks import check_number
from .guidance import ClassifierFreeGuidance, Guidance, Pass, Weakening

if TYPE_CHECKING:
    from .base import DiffusionPipeline
    from .run import Run


@dataclass
class ClassifierFreeZeroStarGuidance(ClassifierFreeGuidance):
    """CFG-Zero* (arXiv:2503.18886): the unconditional prediction, scaled to fit the conditional one, as the start.

    Attributes:
        zero_init_steps: Number of first steps that predict zero, and evaluate nothing.
    """

    zero_init_steps: int = 1

    def __post_init__(self) -> None:
        super().__post_init__()
        if not isinstance(self.zero_init_steps, int) or self.zero_init_steps < 0:
            raise ValueError(f"zero_init_steps={self.zero_init_steps!r} must be a number of steps, 0 or more")

    def passes(self, run: Run) -> tuple[Pass, ...]:
        return () if run.index < self.zero_init_steps else super().passes(run)

    def mix(self, predictions: list[torch.Tensor], run: Run) -> torch.Tensor:
        return super().mix(predictions, run) if predictions else torch.zeros_like(run.latents)

    def settle(self, guided: torch.Tensor, predictions: list[torch.Tensor], run: Run) -> torch.Tensor:
        return super().settle(guided, predictions, run) if predictions else guided

    def direction(self, unconditional: torch.Tensor, conditional: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        fit = dot(conditional, unconditional) / dot(unconditional, unconditional).clamp_min(1e-8)  # eq. 11
        origin = (fit * unconditional).to(unconditional.dtype)
        return origin, conditional - origin


@dataclass
class AdaptiveProjectedGuidance(ClassifierFreeGuidance):
    """APG (arXiv:2410.02416): against over-saturation, less of the part that only makes the prediction longer.

    Attributes:
        adaptive_projected_guidance_momentum: Weight of former steps' directions, negative as a rule (section 4.3); none when
            not given.
        adaptive_projected_guidance_rescale: Greatest length of the direction (section 4.2); 0 for any.
        eta: Weight of the part of the direction that is parallel to the conditional prediction (section 4.1).
    """

    adaptive_projected_guidance_momentum: float | None = None
    adaptive_projected_guidance_rescale: float = 15.0
    eta: float = field(default=1.0, kw_only=True)
    former: torch.Tensor | None = field(default=None, init=False, repr=False, compare=False)  # of the run, directions summed up

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.adaptive_projected_guidance_momentum is not None:
            check_number("adaptive_projected_guidance_momentum", self.adaptive_projected_guidance_momentum)
        check_number("adaptive_projected_guidance_rescale", self.adaptive_projected_guidance_rescale, 0)
        check_number("eta", self.eta)

    def direction(self, unconditional: torch.Tensor, conditional: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        direction = conditional - unconditional
        if self.adaptive_projected_guidance_momentum is not None:
            if self.former is not None:
                direction = direction + self.adaptive_projected_guidance_momentum * self.former
            self.former = direction
        if self.adaptive_projected_guidance_rescale > 0:
            length = dot(direction, direction).sqrt()
            direction = direction * (self.adaptive_projected_guidance_rescale / length).clamp(max=1)
        return unconditional, weigh_parallel(direction, conditional, self.eta).to(conditional.dtype)


@dataclass
class TangentialClassifierFreeGuidance(ClassifierFreeGuidance):
    """TCFG (arXiv:2503.18137): of the unconditional prediction, the part along the first singular vector that both share."""

    def direction(self, unconditional: torch.Tensor, conditional: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        rows = torch.stack([conditional, unconditional], dim=1).flatten(2).double()  # (B, 2, D)
        # the right singular vector is a combination of the rows by the eigenvector (a, b) of their products, so that the projection
        # of u on it is b (a c + b u)
        vector = torch.linalg.eigh(rows @ rows.transpose(1, 2)).eigenvectors[:, :, -1:]  # (B, 2, 1)
        projected = vector[:, 1:] * (vector * rows).sum(dim=1, keepdim=True)
        origin = projected.view_as(unconditional).to(unconditional.dtype)
        return origin, conditional - origin


@dataclass
class FrequencyDecoupledGuidance(ClassifierFreeGuidance):
    """FDG (arXiv:2506.19713): a scale for each band of frequencies, the levels of a Laplacian pyramid.

    Attributes:
        guidance_scales: Of the bands, the highest frequencies first; their number is that of the levels.
        parallel_weights: For each band, the weight of the part of its direction that is parallel to the conditional one; 1 when
            not given.
    """

    guidance_scale: float = field(default=0.0, init=False, repr=False)  # the greatest; a callback may turn guidance off by it
    guidance_scales: Sequence[float] = (10.0, 5.0)
    parallel_weights: Sequence[float] | None = field(default=None, kw_only=True)

    def __post_init__(self) -> None:
        for scale in self.guidance_scales:
            check_number("guidance_scales", scale)
        if len(self.guidance_scales) < 1:
            raise ValueError("guidance_scales is empty: give one for each band of frequencies, such as (10.0, 5.0)")
        weights = self.parallel_weights
        if weights is not None and len(weights) != len(self.guidance_scales):
            raise ValueError(f"parallel_weights has {len(weights)} values for {len(self.guidance_scales)} guidance_scales")
        self.guidance_scale = max(self.guidance_scales)
        super().__post_init__()

    def blend(self, unconditional: torch.Tensor, conditional: torch.Tensor) -> torch.Tensor:
        count = len(self.guidance_scales)
        bands = []
        parts = zip(pyramid(unconditional, count), pyramid(conditional, count), strict=True)
        for (u, c), scale, weight in zip(parts, self.guidance_scales, self.parallel_weights or [1.0] * count, strict=True):
            direction = c - u if weight == 1 else weigh_parallel(c - u, c, weight)
            bands.append((c if self.use_original_formulation else u) + scale * direction)
        return collapse(bands).to(conditional.dtype)


@dataclass
class AutoGuidance(ClassifierFreeGuidance):
    """Away from a weaker network's prediction under the same condition: ``w + scale (c - w)`` (arXiv:2406.02507, eq. 3).

    Attributes:
        network: The weaker denoiser, smaller or less trained, that takes the pipeline's inputs.
    """

    network: torch.nn.Module = field(kw_only=True)

    @property
    def layout(self) -> tuple[str, ...]:
        return ("positive",)

    def bound(self, pipe: DiffusionPipeline) -> Guidance:
        if not isinstance(self.network, torch.nn.Module):
            raise TypeError(
                f"network={self.network!r} is no network: pass a weaker denoiser, such as {type(pipe.denoiser).__name__}"
            )
        own, theirs = (next(network.parameters()) for network in (pipe.denoiser, self.network))
        if (own.device, own.dtype) != (theirs.device, theirs.dtype):
            where = f"on {theirs.device} in {theirs.dtype}, the pipeline on {own.device} in {own.dtype}"
            raise ValueError(f"network is {where}: move it with network.to({str(own.device)!r}, {own.dtype})")
        return super().bound(pipe)

    def passes(self, run: Run) -> tuple[Pass, ...]:
        return (Pass(0, Weakening(network=self.network)), Pass(0)) if self.guides(run) else (Pass(0),)


def dot(a: torch.Tensor, b: torch.Tensor) -> torch.Tensor:
    """Scalar products of samples, (B, ...) and (B, ...) -> (B, 1, ...), in float32 at least."""
    wide = torch.promote_types(a.dtype, torch.float32)
    return (a.to(wide) * b.to(wide)).sum(dim=list(range(1, a.ndim)), keepdim=True)


def weigh_parallel(direction: torch.Tensor, along: torch.Tensor, weight: float) -> torch.Tensor:
    """A direction (B, ...) whose part parallel to ``along`` (B, ...) is multiplied by ``weight``."""
    parallel = dot(direction, along) / dot(along, along).clamp_min(1e-24) * along
    return direction + (weight - 1) * parallel


def pyramid(x: torch.Tensor, levels: int) -> list[torch.Tensor]:
    """Laplacian pyramid (Burt and Adelson, 1983) of (B, C, H, W): the bands, each half as large, in float32 at least."""
    x = x.to(torch.promote_types(x.dtype, torch.float32))
    bands = []
    for _ in range(levels - 1):
        smaller = blurred(x)[..., ::2, ::2]
        bands.append(x - enlarged(smaller, x))
        x = smaller
    return [*bands, x]


def collapse(bands: list[torch.Tensor]) -> torch.Tensor:
    """Undoes :func:`pyramid`."""
    x = bands[-1]
    for band in reversed(bands[:-1]):
        x = band + enlarged(x, band)
    return x


def blurred(x: torch.Tensor) -> torch.Tensor:
    """Blurs (B, C, H, W) with the binomial filter of five taps, its edges repeated."""
    line = torch.tensor([1.0, 4.0, 6.0, 4.0, 1.0], device=x.device, dtype=x.dtype) / 16
    channels = x.shape[1]
    x = F.conv2d(F.pad(x, (0, 0, 2, 2), mode="replicate"), line.view(1, 1, 5, 1).expand(channels, -1, -1, -1), groups=channels)
    return F.conv2d(F.pad(x, (2, 2, 0, 0), mode="replicate"), line.view(1, 1, 1, 5).expand(channels, -1, -1, -1), groups=channels)


def enlarged(x: torch.Tensor, like: torch.Tensor) -> torch.Tensor:
    """Brings (B, C, h, w) to the size of ``like``."""
    return F.interpolate(x, size=like.shape[-2:], mode="bilinear", align_corners=False)


APG, TCFG, FDG = AdaptiveProjectedGuidance, TangentialClassifierFreeGuidance, FrequencyDecoupledGuidance
