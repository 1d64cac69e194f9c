"""Guidance away from a weaker version of the denoiser: some of its layers perturbed, or left out.

It stands on top of a guidance by the prompt, or alone: ``g + scale (c - w)``, with the guided, the conditional and the weakened
prediction.
"""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Sequence
from dataclasses import InitVar, dataclass, field
from typing import TYPE_CHECKING, Any, ClassVar

import torch
from torch import nn

from ..models.layers.joint_attention import JointAttention
from ..models.layers.options import Perturbation
from ..models.layers.transformer_2d import BasicTransformerBlock
from .checks import check_number
from .guidance import WHOLE, ClassifierFreeGuidance, Guidance, Pass, Weakening, check_stretch

if TYPE_CHECKING:
    from .base import DiffusionPipeline
    from .run import Run

Layers = int | str | Sequence[int | str] | None
"""Which layers to weaken: numbers of ``transformer_blocks``, or regular expressions that are searched in module names."""


@dataclass
class WeakModelGuidance(Guidance):
    """What perturbed attention, skipped layers and smoothed energy have in common.

    Where its own scale is 0, or outside its part of the steps, the weakened network is not evaluated.

    Args:
        guidance_scale, guidance_rescale, use_original_formulation, start, stop: Of the guidance by the prompt, as those of
            :class:`~sfumato.pipelines.guidance.ClassifierFreeGuidance`; a scale of 1 leaves it out.
        base: Another guidance to stand on, instead of the five.
    """

    prefix: ClassVar[str]
    kind: ClassVar[str]
    guidance_scale: InitVar[float] = 7.5
    guidance_rescale: InitVar[float] = field(default=0.0, kw_only=True)
    use_original_formulation: InitVar[bool] = field(default=False, kw_only=True)
    start: InitVar[float] = field(default=0.0, kw_only=True)
    stop: InitVar[float] = field(default=1.0, kw_only=True)
    base: Guidance | None = field(default=None, kw_only=True)
    weakening: Weakening = field(default=WHOLE, init=False, repr=False)

    def __post_init__(self, guidance_scale: float, *others: Any) -> None:
        names = ("guidance_rescale", "use_original_formulation", "start", "stop")
        given = {"guidance_scale": guidance_scale, **dict(zip(names, others, strict=True))}
        if self.base is None:
            steered = ClassifierFreeGuidance(**given)
            neutral = 0 if steered.use_original_formulation else 1
            self.base = steered if steered.guidance_scale > neutral else Guidance()
        elif changed := [name for name, value in given.items() if value != getattr(type(self), name)]:
            raise ValueError(f"{changed[0]}={given[changed[0]]!r} is given beside base, which has its own: leave one of them out")
        elif not isinstance(self.base, Guidance):
            raise TypeError(f"base={self.base!r} is no guidance: pass one, such as sfumato.ClassifierFreeGuidance(5.0)")
        scale, first, last = self.own("scale"), self.own("start"), self.own("stop")
        check_number(f"{self.prefix}_scale", scale)
        check_stretch(0 if first is None else first, last, f"{self.prefix}_")

    def own(self, name: str) -> Any:
        """An argument of the kind, whose name begins with its prefix."""
        return getattr(self, f"{self.prefix}_{name}")

    @property
    def below(self) -> Guidance:
        """The guidance that it stands on."""
        assert self.base is not None  # the constructor makes one
        return self.base

    @property
    def layout(self) -> tuple[str, ...]:
        return self.below.layout

    @property
    def conditional(self) -> int:
        return self.below.conditional

    @property
    def of_prompt(self) -> Guidance:
        return self.below.of_prompt

    def bound(self, pipe: DiffusionPipeline) -> Guidance:
        layers = find_layers(pipe.denoiser, self.kind, self.own("layers"), f"{self.prefix}_layers")
        copy = dataclasses.replace(self, base=self.below.bound(pipe))
        copy.weakening = Weakening(self.perturbation(layers))
        return copy

    def perturbation(self, layers: frozenset[nn.Module]) -> Perturbation:
        """How ``layers`` are weakened."""
        return Perturbation(self.kind, layers)

    def scale(self, run: Run) -> float:
        """Weight of the weakened prediction at the next step."""
        return self.own("scale")

    def acts(self, run: Run) -> bool:
        """Whether the next step evaluates the weakened network."""
        steps, first = len(run.timesteps), self.own("start")
        within = (first is None or steps * first < run.index) and run.index < steps * self.own("stop")
        return within and self.scale(run) != 0

    def passes(self, run: Run) -> tuple[Pass, ...]:
        below = self.below.passes(run)
        return (*below, Pass(self.conditional, self.weakening)) if below and self.acts(run) else below

    def mix(self, predictions: list[torch.Tensor], run: Run) -> torch.Tensor:
        below = self.below.passes(run)
        guided = self.below.mix(predictions[: len(below)], run)
        if len(predictions) == len(below):
            return guided
        conditional = predictions[below.index(Pass(self.conditional))]
        return guided + self.scale(run) * (conditional - predictions[-1])

    def settle(self, guided: torch.Tensor, predictions: list[torch.Tensor], run: Run) -> torch.Tensor:
        return self.below.settle(guided, predictions[: len(self.below.passes(run))], run)


@dataclass
class PerturbedAttentionGuidance(WeakModelGuidance):
    """PAG (arXiv:2403.17377): in some layers each pixel looks at itself alone.

    Args:
        perturbed_guidance_scale: Weight.
        perturbed_guidance_start, perturbed_guidance_stop: Part of the steps, 0..1, after and before which it acts; ``None`` to
            begin at the first.
        perturbed_guidance_layers: Which self-attention layers; when not given, those in the middle.
        adaptive_scale: What each timestep below 1000 takes from the weight, down to 0.
    """

    prefix, kind = "perturbed_guidance", "identity"
    perturbed_guidance_scale: float = 2.8
    perturbed_guidance_start: float | None = 0.01
    perturbed_guidance_stop: float = 0.2
    perturbed_guidance_layers: Layers = None
    adaptive_scale: float = field(default=0.0, kw_only=True)

    def scale(self, run: Run) -> float:
        if self.adaptive_scale == 0:
            return self.perturbed_guidance_scale
        return max(self.perturbed_guidance_scale - self.adaptive_scale * (1000 - float(run.timesteps[run.index])), 0.0)


@dataclass
class SkipLayerGuidance(WeakModelGuidance):
    """SLG (Stability AI, 2024, for Stable Diffusion 3.5): some transformer blocks are left out.

    Args:
        skip_layer_guidance_scale: Weight.
        skip_layer_guidance_start, skip_layer_guidance_stop: Part of the steps, 0..1, after and before which it acts; ``None`` to
            begin at the first.
        skip_layer_guidance_layers: Which blocks; when not given, the middle one.
    """

    prefix, kind = "skip_layer_guidance", "skip"
    skip_layer_guidance_scale: float = 2.8
    skip_layer_guidance_start: float | None = 0.01
    skip_layer_guidance_stop: float = 0.2
    skip_layer_guidance_layers: Layers = None


@dataclass
class SmoothedEnergyGuidance(WeakModelGuidance):
    """SEG (arXiv:2408.00760): in some layers the queries are blurred over the picture.

    Args:
        seg_guidance_scale: Weight.
        seg_blur_sigma: Standard deviation of the blur in pixels of the layer; above 9999 their mean.
        seg_guidance_start, seg_guidance_stop: Part of the steps, 0..1, after and before which it acts; ``None`` to begin at the
            first.
        seg_guidance_layers: Which self-attention layers; when not given, those in the middle.
    """

    prefix, kind = "seg_guidance", "blur"
    seg_guidance_scale: float = 2.8
    seg_blur_sigma: float = 9999999.0
    seg_guidance_start: float | None = 0.0
    seg_guidance_stop: float = 1.0
    seg_guidance_layers: Layers = None

    def perturbation(self, layers: frozenset[nn.Module]) -> Perturbation:
        return Perturbation(self.kind, layers, self.seg_blur_sigma)


def find_layers(network: nn.Module, kind: str, wanted: Layers, argument: str) -> frozenset[nn.Module]:
    """The modules that a perturbation of ``kind`` acts on: blocks for ``"skip"``, else self-attention layers.

    Raises:
        ValueError: The network has no such layers, or none of a wanted name; the message says what there is.
    """
    found = _blocks(network) if kind == "skip" else _self_attention(network)
    if not found:
        raise ValueError(f"{type(network).__name__} has no {'transformer block' if kind == 'skip' else 'self-attention layer'}")
    if wanted is None:
        middle = [name for name in found if name.startswith("mid_block.")] or [list(found)[len(found) // 2]]
        return frozenset(found[name] for name in middle)
    chosen: set[nn.Module] = set()
    for item in [wanted] if isinstance(wanted, (int, str)) else wanted:
        pattern = rf"^transformer_blocks\.{item}(\.|$)" if isinstance(item, int) else item
        try:
            matched = {module for name, module in found.items() if re.search(pattern, name)}
        except (re.error, TypeError) as error:
            raise ValueError(f"{argument} has {item!r}, expected numbers of blocks or regular expressions: {error}") from None
        if not matched:
            raise ValueError(f"{argument} has {item!r}, which names no layer; there are {', '.join(found)}")
        chosen |= matched
    if not chosen:
        raise ValueError(f"{argument}={wanted!r} names no layer: leave it out, or name some of {', '.join(found)}")
    return frozenset(chosen)


def _self_attention(network: nn.Module) -> dict[str, nn.Module]:
    """Attention within the picture, by module name: of U-Nets, or the joint attention of transformers."""
    found: dict[str, nn.Module] = {}
    for name, module in network.named_modules():
        if isinstance(module, JointAttention):
            found[name] = module
        elif isinstance(module, BasicTransformerBlock) and not module.only_cross_attention:
            found[f"{name}.attn1"] = module.attn1
    return found


def _blocks(network: nn.Module) -> dict[str, nn.Module]:
    """Transformer blocks by module name."""
    lists = [(n, m) for n, m in network.named_modules() if isinstance(m, nn.ModuleList) and n.endswith("transformer_blocks")]
    return {f"{name}.{i}": block for name, blocks in lists for i, block in enumerate(blocks)}


PAG, SLG, SEG = PerturbedAttentionGuidance, SkipLayerGuidance, SmoothedEnergyGuidance
