"""Guidance: how several predictions become one.

A guidance says which evaluations a step needs (``passes``) and how they combine. What a caller passes is a description; a run
works on a copy of its own, bound to its pipeline. While a guidance is inactive a step costs exactly one forward pass, of the
last branch.
"""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass
from typing import TYPE_CHECKING, ClassVar, NamedTuple

import torch
from torch import nn

from ..models.layers.options import Perturbation

if TYPE_CHECKING:
    from .base import DiffusionPipeline
    from .run import Run


class Weakening(NamedTuple):
    """What an evaluation has instead of the whole denoiser: some of its layers weakened, or another network."""

    perturbation: Perturbation | None = None
    network: nn.Module | None = None


WHOLE = Weakening()


class Pass(NamedTuple):
    """One evaluation of a step: on which branch of the conditioning, by what."""

    branch: int
    weakening: Weakening = WHOLE


@dataclass
class Guidance:
    """How predictions combine. ``layout`` says which prompt each branch of the conditioning has, stacked along the batch."""

    layout: ClassVar[tuple[str, ...]] = ("positive",)

    @property
    def branches(self) -> int:
        """Number of branches."""
        return len(self.layout)

    def bound(self, pipe: DiffusionPipeline) -> Guidance:
        """A copy for one run of ``pipe``; errors here name what the pipeline lacks."""
        return dataclasses.replace(self)

    def passes(self, run: Run) -> tuple[Pass, ...]:
        """What the next step of ``run`` evaluates."""
        return (Pass(self.branches - 1),)

    def combine(self, predictions: list[torch.Tensor], run: Run) -> torch.Tensor:
        """One prediction (B, ...) from those of the passes, each (B, ...), in their order."""
        return predictions[0]


@dataclass
class NoGuidance(Guidance):
    """One conditional prediction."""


@dataclass
class ClassifierFreeGuidance(Guidance):
    """Branches [unconditional, conditional]; ``u + scale (c - u)`` (arXiv:2207.12598, eq. 6).

    At a scale of 1 or below the unconditional branch is not evaluated.

    Attributes:
        guidance_scale: Weight of the condition.
        guidance_rescale: Weight in 0..1 of the prediction brought back to the conditional one's standard deviation
            (arXiv:2305.08891, eqs. 15-16).
        start, stop: Part of the steps, 0..1, in which it guides (arXiv:2404.07724).
    """

    layout = ("negative", "positive")
    guidance_scale: float = 7.5
    guidance_rescale: float = 0.0
    start: float = 0.0
    stop: float = 1.0

    def passes(self, run: Run) -> tuple[Pass, ...]:
        return (Pass(0), Pass(1)) if self.guides(run) else (Pass(1),)

    def guides(self, run: Run) -> bool:
        """Whether the next step needs the unconditional branch."""
        steps = len(run.timesteps)
        return self.guidance_scale > 1 and int(self.start * steps) <= run.index < int(self.stop * steps)

    def combine(self, predictions: list[torch.Tensor], run: Run) -> torch.Tensor:
        if len(predictions) == 1:
            return predictions[0]
        unconditional, conditional = predictions
        guided = self.blend(unconditional, conditional, run)
        return rescaled(guided, conditional, self.guidance_rescale) if self.guidance_rescale > 0 else guided

    def blend(self, unconditional: torch.Tensor, conditional: torch.Tensor, run: Run) -> torch.Tensor:
        """Combines the two branches."""
        return unconditional + self.guidance_scale * (conditional - unconditional)


def rescaled(guided: torch.Tensor, conditional: torch.Tensor, weight: float) -> torch.Tensor:
    """Brings a prediction back to the conditional one's standard deviation, by ``weight`` (arXiv:2305.08891, eqs. 15-16)."""
    dims = list(range(1, guided.ndim))
    matched = guided * (conditional.std(dim=dims, keepdim=True) / guided.std(dim=dims, keepdim=True))
    return weight * matched + (1 - weight) * guided


@dataclass
class EditGuidance(Guidance):
    """Branches [text and picture, picture, neither] of InstructPix2Pix (arXiv:2211.09800, eq. 3).

    ``guidance_scale`` is the weight of the instruction, ``image_guidance_scale`` that of the picture.
    """

    layout = ("positive", "negative", "negative")
    guidance_scale: float = 7.5
    image_guidance_scale: float = 1.5

    def passes(self, run: Run) -> tuple[Pass, ...]:
        return Pass(0), Pass(1), Pass(2)

    def combine(self, predictions: list[torch.Tensor], run: Run) -> torch.Tensor:
        full, picture, neither = predictions
        return neither + self.guidance_scale * (full - picture) + self.image_guidance_scale * (picture - neither)
