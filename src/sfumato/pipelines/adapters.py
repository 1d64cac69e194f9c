"""Adapters: what else conditions a denoiser, beside its prompt: control networks, T2I-Adapters.

A class names the kinds that it has; a kind makes, for each run, the parts that are at work there. Their outputs reach the denoiser
by name, and those of the same name add up.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, ClassVar, Protocol

import torch

from .conditioning import Conditioning

if TYPE_CHECKING:
    from collections.abc import Sequence

    from .run import Run


class ActiveAdapter(Protocol):
    """An adapter at work in one run."""

    def extras(
        self, run: Run, x: torch.Tensor, t: torch.Tensor, conditioning: Conditioning, branches: Sequence[int]
    ) -> dict[str, torch.Tensor]:
        """What it gives the denoiser for the next step; nothing, at no cost, while it is inactive.

        ``x`` (N, C, H, W) are the scaled latents, without extra channels, of the guidance's ``branches`` stacked along the batch.
        """
        ...


class Adapter:
    """A kind of adapter. ``arguments`` are its call arguments, ``component`` its network's name in the pipeline."""

    name: ClassVar[str] = "none"
    arguments: ClassVar[str] = ""
    component: ClassVar[str] = ""

    def check(self, run: Run) -> None:
        """Refuses arguments that cannot work, before any work is done."""

    def prepare(self, run: Run) -> ActiveAdapter:
        """Sets the adapter up for a run whose conditioning and schedule are known."""
        raise NotImplementedError
