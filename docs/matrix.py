"""Writes ``docs/matrix.md``: which family does what, by which class, and why the other cells are empty.

Run ``python docs/matrix.py`` after a pipeline class was added.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

from sfumato import registry

FAMILIES = ("Stable Diffusion", "Stable Diffusion XL", "Stable Diffusion 3", "FLUX.1")
TASKS = ("text-to-image", "image-to-image", "inpaint", "depth-to-image", "instruct-edit", "reference")
ADAPTERS = ("", "controlnet", "t2i-adapter", "control-channels")
NO_DENOISER = "there is no published denoiser of this kind"
REASONS = {
    ("t2i-adapter", "Stable Diffusion 3"): "T2I-Adapters add to a U-Net's way down, and a transformer has none",
    ("t2i-adapter", "FLUX.1"): "T2I-Adapters add to a U-Net's way down, and a transformer has none",
    ("control-channels", "Stable Diffusion"): f"{NO_DENOISER}: use a ControlNet",
    ("control-channels", "Stable Diffusion XL"): f"{NO_DENOISER}: use a ControlNet",
    ("control-channels", "Stable Diffusion 3"): f"{NO_DENOISER}: use a ControlNet",
    ("depth-to-image", "Stable Diffusion XL"): f"{NO_DENOISER}: use a ControlNet for depth",
    ("depth-to-image", "Stable Diffusion 3"): f"{NO_DENOISER}: use a ControlNet for depth",
    ("depth-to-image", "FLUX.1"): f"{NO_DENOISER}: use FluxControlImg2ImgPipeline with the depth denoiser",
    ("instruct-edit", "Stable Diffusion 3"): NO_DENOISER,
    ("instruct-edit", "FLUX.1"): f"{NO_DENOISER}: Kontext edits by reference",
    ("control-channels", "FLUX.1"): NO_DENOISER,
    ("reference", "Stable Diffusion"): f"{NO_DENOISER}: use an IP-Adapter",
    ("reference", "Stable Diffusion XL"): f"{NO_DENOISER}: use an IP-Adapter",
    ("reference", "Stable Diffusion 3"): NO_DENOISER,
}
"""Why cells make no sense, by task or adapter, and family."""
NO_PICTURES = {
    "StableDiffusionImageVariation": "its prompt is a picture already",
    "StableDiffusionUpscale": "there is no published IP-Adapter for its denoiser",
    "StableDiffusionLatentUpscale": "there is no published IP-Adapter for its denoiser",
}
"""Why pipelines of these families refuse IP-Adapters."""


def classes(family: str, task: str, adapter: str) -> list[str]:
    """Names of the public pipelines of a cell."""

    def fits(cls: Any) -> bool:
        kinds = "".join(a.name for a in cls.adapters)  # "masked-controlnet" is a kind of "controlnet"
        return cls.family == family and cls.task.name == task and (kinds.endswith(adapter) if adapter else not kinds)

    return [cls.__name__ for cls in registry.pipelines() if fits(cls)]


def reason(family: str, task: str, adapter: str) -> str:
    """Why a cell is empty."""
    return REASONS.get((task, family)) or REASONS.get((adapter, family)) or "not offered yet"


def page() -> str:
    """The whole page."""
    lines = [
        "# What works with what",
        "",
        "Written by `python docs/matrix.py` from the registry; `tests/test_matrix.py` runs every class that stands here.",
        "",
        "Every class takes `guidance=` (see [guidance.md](guidance.md)), `regions=` (prompts for parts of the picture),",
        'own sigmas, prompt weights (`prompt_syntax="weighted"`) and IP-Adapters (see [ip-adapters.md](ip-adapters.md)).',
        "Denoisers that edit by instruction have a guidance of their own and refuse another.",
        "Latent consistency models have `LatentConsistencyModelPipeline` and `LatentConsistencyModelImg2ImgPipeline`; their U-Net",
        "works in the pipelines of Stable Diffusion, too: `StableDiffusionInpaintPipeline.from_pipe(pipe)`.",
        *(f"No IP-Adapters in {name}: {why}." for name, why in NO_PICTURES.items()),
        "",
    ]
    reasons: list[str] = []
    lines += [f"| task | adapter | {' | '.join(FAMILIES)} |", f"|---|---|{'---|' * len(FAMILIES)}"]
    for task in TASKS:
        for adapter in ADAPTERS:
            cells = []
            for family in FAMILIES:
                names = classes(family, task, adapter)
                if not names:
                    why = reason(family, task, adapter)
                    reasons += [] if why in reasons else [why]
                    names = [f"– [{reasons.index(why) + 1}]"]
                cells.append("<br>".join(name.removesuffix("Pipeline") for name in names))
            lines.append(f"| {task} | {adapter or 'none'} | {' | '.join(cells)} |")
    lines += ["", "Empty cells:", "", *(f"{i}. {why}." for i, why in enumerate(reasons, 1)), ""]
    return "\n".join(lines)


if __name__ == "__main__":
    Path(__file__).with_name("matrix.md").write_text(page(), encoding="utf-8")
