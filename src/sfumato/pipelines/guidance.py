"""Guidance: how several predictions become one.

A guidance says how many branches a step evaluates, stacked along the batch in a fixed order, and how it combines them.
It is frozen; while it is inactive a step costs exactly one forward pass, of the last branch.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch


@dataclass(frozen=True)
class NoGuidance:
    """One conditional prediction."""

    branches: int = 1

    def active(self, index: int, steps: int) -> bool:
        """Whether step ``index`` of ``steps`` needs all branches."""
        return False

    def combine(self, prediction: torch.Tensor) -> torch.Tensor:
        """``(branches * B, ...)`` -> ``(B, ...)``."""
        return prediction


@dataclass(frozen=True)
class ClassifierFreeGuidance:
    """Branches [unconditional, conditional]; ``u + scale (c - u)`` (arXiv:2207.12598, eq. 6).

    At a ``scale`` of 1 or below the unconditional branch is not evaluated. ``rescale`` is the weight in 0..1 of the prediction
    brought back to the conditional one's standard deviation (arXiv:2305.08891, eqs. 15-16).
    """

    scale: float
    rescale: float = 0.0
    branches: int = 2

    def active(self, index: int, steps: int) -> bool:
        """Whether step ``index`` of ``steps`` needs both branches."""
        return self.scale > 1

    def combine(self, prediction: torch.Tensor) -> torch.Tensor:
        """``(2B, ...)`` -> ``(B, ...)``."""
        unconditional, conditional = prediction.chunk(2)
        guided = unconditional + self.scale * (conditional - unconditional)
        if self.rescale > 0:
            dims = list(range(1, guided.ndim))
            matched = guided * (conditional.std(dim=dims, keepdim=True) / guided.std(dim=dims, keepdim=True))
            guided = self.rescale * matched + (1 - self.rescale) * guided
        return guided


@dataclass(frozen=True)
class EditGuidance:
    """Branches [text and picture, picture, neither] of InstructPix2Pix (arXiv:2211.09800, eq. 3).

    ``scale`` is the weight of the instruction, ``image_scale`` that of the picture.
    """

    scale: float
    image_scale: float
    branches: int = 3

    def active(self, index: int, steps: int) -> bool:
        """Always: whether to guide is decided when the run is set up."""
        return True

    def combine(self, prediction: torch.Tensor) -> torch.Tensor:
        """``(3B, ...)`` -> ``(B, ...)``."""
        full, picture, neither = prediction.chunk(3)
        return neither + self.scale * (full - picture) + self.image_scale * (picture - neither)


Guidance = NoGuidance | ClassifierFreeGuidance | EditGuidance
