"""Perturbed attention as a call argument (PAG, arXiv:2403.17377): what the reference's pipelines of that name add to a family."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, ClassVar

from .guidance import Guidance
from .image import ImagePipeline
from .run import Run
from .weak_models import PerturbedAttentionGuidance, find_layers


class PerturbedAttention(ImagePipeline):
    """Goes before a family: ``class FamilyPAGPipeline(PerturbedAttention, Family, task=Task())``.

    The weakened prediction stands on top of whatever guidance the other arguments ask for.

    Class attributes:
        pag_layers: Which layers are perturbed unless the constructor or :meth:`set_pag_applied_layers` says otherwise.
    """

    pag_layers: ClassVar[str] = "mid"

    def __init_subclass__(cls, **kwargs: Any) -> None:
        cls.options = {**cls.options, "pag_applied_layers": cls.pag_layers}
        cls.arguments = f"{cls.arguments} pag_scale pag_adaptive_scale"
        super().__init_subclass__(**kwargs)

    @property
    def pag_applied_layers(self) -> list[str]:
        """Regular expressions that are searched in the names of the denoiser's modules."""
        given = self._options["pag_applied_layers"]
        return [given] if isinstance(given, str) else list(given)

    def set_pag_applied_layers(self, pag_applied_layers: str | Sequence[str]) -> None:
        """Sets the self-attention layers that are perturbed in calls from now on, such as ``"mid"`` or ``["mid", "up_blocks.1"]``.

        Raises:
            ValueError: A name matches no layer.
        """
        find_layers(self.denoiser, "identity", pag_applied_layers, "pag_applied_layers")
        self._options["pag_applied_layers"] = pag_applied_layers

    def choose_guidance(self, run: Run) -> Guidance:
        args, guided = run.args, super().choose_guidance(run)
        stretch: dict[str, Any] = {"perturbed_guidance_start": None, "perturbed_guidance_stop": 1.0}
        layers = self.pag_applied_layers
        return PerturbedAttentionGuidance(
            base=guided, perturbed_guidance_scale=args.pag_scale, perturbed_guidance_layers=layers, **stretch,
            adaptive_scale=args.pag_adaptive_scale,
        )  # fmt: skip
