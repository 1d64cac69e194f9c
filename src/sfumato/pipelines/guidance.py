"""Guidance: how several predictions become one.

A guidance says which evaluations a step needs (``passes``) and how they combine. What a caller passes is a description; a run
works on a copy of its own, bound to its pipeline. While a guidance is inactive a step costs exactly one forward pass.
"""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from torch import nn

from ..models.layers.options import Perturbation
from .checks import check_number

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
    """How predictions combine; this one takes the conditional prediction as it is."""

    @property
    def layout(self) -> tuple[str, ...]:
        """Which prompt each branch of the conditioning has; the branches are stacked along the batch."""
        return ("positive",)

    @property
    def branches(self) -> int:
        """Number of branches."""
        return len(self.layout)

    @property
    def conditional(self) -> int:
        """The branch on which the whole condition holds."""
        return self.branches - 1

    @property
    def of_prompt(self) -> Guidance:
        """The guidance by the prompt, which this one may stand on."""
        return self

    def bound(self, pipe: DiffusionPipeline) -> Guidance:
        """A copy for one run of ``pipe``; errors here name what the pipeline lacks."""
        return dataclasses.replace(self)

    def passes(self, run: Run) -> tuple[Pass, ...]:
        """What the next step of ``run`` evaluates."""
        return (Pass(self.conditional),)

    def combine(self, predictions: list[torch.Tensor], run: Run) -> torch.Tensor:
        """One prediction (B, ...) from those of the passes, each (B, ...), in their order."""
        return self.settle(self.mix(predictions, run), predictions, run)

    def mix(self, predictions: list[torch.Tensor], run: Run) -> torch.Tensor:
        """As :meth:`combine`, before :meth:`settle`."""
        return predictions[-1]

    def settle(self, guided: torch.Tensor, predictions: list[torch.Tensor], run: Run) -> torch.Tensor:
        """What is done last to a guided prediction, whatever else was added to it."""
        return guided


NoGuidance = Guidance  # what callers call it


@dataclass
class ClassifierFreeGuidance(Guidance):
    """Branches [unconditional, conditional]; ``u + scale (c - u)`` (arXiv:2207.12598, eq. 6).

    At a scale of 1 or below (0, in the original formulation) the unconditional branch is not evaluated.

    Attributes:
        guidance_scale: Weight of the condition.
        guidance_rescale: Weight in 0..1 of the prediction brought back to the conditional one's standard deviation
            (arXiv:2305.08891, eqs. 15-16).
        use_original_formulation: ``c + scale (c - u)``, the paper's own counting of scales.
        start, stop: Part of the steps, 0..1, in which it guides (arXiv:2404.07724); both ends are rounded down.
    """

    guidance_scale: float = 7.5
    guidance_rescale: float = field(default=0.0, kw_only=True)
    use_original_formulation: bool = field(default=False, kw_only=True)
    start: float = field(default=0.0, kw_only=True)
    stop: float = field(default=1.0, kw_only=True)

    def __post_init__(self) -> None:
        check_number("guidance_scale", self.guidance_scale)
        check_number("guidance_rescale", self.guidance_rescale, 0, 1)
        check_stretch(self.start, self.stop)

    @property
    def layout(self) -> tuple[str, ...]:
        return "negative", "positive"

    def passes(self, run: Run) -> tuple[Pass, ...]:
        return (Pass(0), Pass(1)) if self.guides(run) else (Pass(1),)

    def guides(self, run: Run) -> bool:
        """Whether the next step needs the unconditional branch."""
        steps = len(run.timesteps)
        neutral = 0 if self.use_original_formulation else 1
        return self.guidance_scale > neutral and int(self.start * steps) <= run.index < int(self.stop * steps)

    def mix(self, predictions: list[torch.Tensor], run: Run) -> torch.Tensor:
        return predictions[0] if len(predictions) == 1 else self.blend(*predictions)

    def blend(self, unconditional: torch.Tensor, conditional: torch.Tensor) -> torch.Tensor:
        """Combines the two branches."""
        origin, direction = self.direction(unconditional, conditional)
        return (conditional if self.use_original_formulation else origin) + self.guidance_scale * direction

    def direction(self, unconditional: torch.Tensor, conditional: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Where guidance starts, and where it leads; by default from the unconditional prediction to the conditional one."""
        return unconditional, conditional - unconditional

    def settle(self, guided: torch.Tensor, predictions: list[torch.Tensor], run: Run) -> torch.Tensor:
        if self.guidance_rescale == 0 or len(predictions) == 1:
            return guided
        return rescaled(guided, predictions[-1], self.guidance_rescale)


def rescaled(guided: torch.Tensor, conditional: torch.Tensor, weight: float) -> torch.Tensor:
    """Brings a prediction back to the conditional one's standard deviation, by ``weight`` (arXiv:2305.08891, eqs. 15-16)."""
    dims = list(range(1, guided.ndim))
    matched = guided * (conditional.std(dim=dims, keepdim=True) / guided.std(dim=dims, keepdim=True))
    return weight * matched + (1 - weight) * guided


def check_stretch(start: Any, stop: Any, prefix: str = "") -> None:
    """Raises ``ValueError`` unless ``start`` and ``stop`` are parts of the steps, 0..1, in order."""
    for name, value in ((f"{prefix}start", start), (f"{prefix}stop", stop)):
        check_number(name, value, 0, 1)
    if start > stop:
        raise ValueError(f"{prefix}start={start} must not lie above {prefix}stop={stop}")


@dataclass
class EditGuidance(Guidance):
    """Branches [text and picture, picture, neither] of InstructPix2Pix (arXiv:2211.09800, eq. 3).

    ``guidance_scale`` is the weight of the instruction, ``image_guidance_scale`` that of the picture, and ``guidance_rescale`` that
    of the prediction brought back to the first branch's standard deviation.
    """

    layout = ("positive", "negative", "negative")
    conditional = 0
    guidance_scale: float = 7.5
    image_guidance_scale: float = 1.5
    guidance_rescale: float = 0.0

    def passes(self, run: Run) -> tuple[Pass, ...]:
        return Pass(0), Pass(1), Pass(2)

    def mix(self, predictions: list[torch.Tensor], run: Run) -> torch.Tensor:
        full, picture, neither = predictions
        return neither + self.guidance_scale * (full - picture) + self.image_guidance_scale * (picture - neither)

    def settle(self, guided: torch.Tensor, predictions: list[torch.Tensor], run: Run) -> torch.Tensor:
        return rescaled(guided, predictions[0], self.guidance_rescale) if self.guidance_rescale else guided
