"""Every cell works: each public pipeline by each scheduler, with and without guidance."""

from __future__ import annotations

import importlib.util
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import tiny
import torch
from PIL import Image
from scheduler_configs import NAMES
from test_ip_adapter import adapter_file
from test_pipelines import CALLS, seeded
from test_run import assert_equal, snapshot

import sfumato
from sfumato import registry

PIPELINES = [cls.__name__ for cls in registry.pipelines() if hasattr(cls, "call_signature")]
"""All that run the denoising loop."""
WALKED = [name for name in PIPELINES if registry.load(name).family in ("Stable Diffusion", "unconditional")]
WALKED = [name for name in WALKED if not registry.load(name).adapters and "PAG" not in name] + ["StableDiffusionXLPipeline"]
"""Pipelines that meet every scheduler; what adapters and guidance add does not depend on it."""
EXTENDED = {
    "StableDiffusionAdapterImg2ImgPipeline": "StableDiffusionAdapterPipeline",
    "StableDiffusionAdapterInpaintPipeline": "StableDiffusionAdapterPipeline",
    "StableDiffusionControlNetDepth2ImgPipeline": "StableDiffusionDepth2ImgPipeline",
    "StableDiffusionAdapterDepth2ImgPipeline": "StableDiffusionDepth2ImgPipeline",
    "StableDiffusionControlNetInstructPix2PixPipeline": "StableDiffusionInstructPix2PixPipeline",
    "StableDiffusionAdapterInstructPix2PixPipeline": "StableDiffusionInstructPix2PixPipeline",
    "StableDiffusionXLAdapterImg2ImgPipeline": "StableDiffusionXLAdapterPipeline",
    "StableDiffusionXLAdapterInpaintPipeline": "StableDiffusionXLAdapterPipeline",
    "StableDiffusionXLControlNetInstructPix2PixPipeline": "StableDiffusionXLInstructPix2PixPipeline",
    "StableDiffusionXLAdapterInstructPix2PixPipeline": "StableDiffusionXLInstructPix2PixPipeline",
    "StableDiffusionControlNetXSImg2ImgPipeline": "StableDiffusionControlNetXSPipeline",
    "StableDiffusionControlNetXSInpaintPipeline": "StableDiffusionControlNetXSPipeline",
    "StableDiffusionXLControlNetXSImg2ImgPipeline": "StableDiffusionXLControlNetXSPipeline",
    "StableDiffusionXLControlNetXSInpaintPipeline": "StableDiffusionXLControlNetXSPipeline",
    "StableDiffusion3ControlNetImg2ImgPipeline": "StableDiffusion3ControlNetPipeline",
    "StableDiffusion3ControlNetInpaintPipeline": "StableDiffusion3ControlNetPipeline",
    "FluxControlNetFillPipeline": "FluxFillPipeline",
    "FluxControlNetKontextPipeline": "FluxControlNetPipeline",
}
"""Pipelines that the reference lacks, and a checkpoint of its that has their denoiser."""
SCHEDULERS = [name for name in NAMES if name != "DPMSolverMultistepInverseScheduler"] + ["LCMScheduler", "TCDScheduler"]
"""What can stand in a Stable Diffusion pipeline; the inverse runs backwards, others are for models of their own."""
REFUSED = {("DDIMPipeline", other): "" for other in SCHEDULERS if other != "DDIMScheduler"} | {
    ("StableDiffusionLatentUpscalePipeline", other): "works on noise levels|prediction_type"
    for other in SCHEDULERS
    if other not in ("EulerDiscreteScheduler", "HeunDiscreteScheduler", "LMSDiscreteScheduler")
}
"""Cells that make no sense, with the reason that is given. A DDIM pipeline makes every scheduler a DDIM scheduler."""
SIZES = {"StableDiffusionUpscalePipeline": 32, "StableDiffusionLatentUpscalePipeline": 64}


def load(checkpoint: Callable[[str], tuple[Path, Any]], name: str, **components: Any) -> Any:
    """A pipeline, with components of other checkpoints where the reference has no such pipeline."""
    folder, _ = checkpoint(EXTENDED.get(name, name))
    cls = getattr(sfumato, name)
    if name in EXTENDED:
        options = {"dtype": components.pop("dtype", torch.float32)}
        base = sfumato.DiffusionPipeline.from_pretrained(folder, **options)
        wanted = [a.component for a in cls.adapters if a.component not in base.components]
        family = "StableDiffusionXL" if "XL" in name else "StableDiffusion"
        for component in wanted:
            kind = "ControlNet" if component == "controlnet" else "Adapter"
            source = "FluxControlNetPipeline" if "Flux" in name else f"{family}{kind}Pipeline"
            other = sfumato.DiffusionPipeline.from_pretrained(checkpoint(source)[0], **options)
            components = {**components, component: getattr(other, component)}
        pipe = cls.from_pipe(base, **components)
    else:
        pipe = cls.from_pretrained(folder, **components)
    pipe.set_progress_bar_config(disable=True)
    return pipe


def call_of(name: str, guided: bool) -> dict[str, Any]:
    call = {**CALLS[EXTENDED.get(name, name)], "num_inference_steps": 5}
    cls = getattr(sfumato, name)
    taken = cls.call_signature.parameters
    if name in EXTENDED:
        call = {k: v for k, v in call.items() if k in taken and k not in ("control_mode", "image" if "Adapter" in name else "")}
        call |= {"image": tiny.picture()} if "image" in taken else {}
        call |= {"control_image": tiny.picture(7)} if "control_image" in taken else {}
        call |= {"mask_image": tiny.mask()} if "mask_image" in taken else {}
        call |= {"control_mode": 1} if "Flux" in name else {}
        call |= {"max_area": 32 * 32, "_auto_resize": False} if "Kontext" in name else {}
    for scale in ("true_cfg_scale", "guidance_scale"):
        if scale in taken:
            call[scale] = 3.0 if guided else 1.0
            break
    return call


def test_the_registry_is_covered() -> None:
    assert set(PIPELINES) <= {*CALLS, *EXTENDED}
    # EDM's schedulers are among the exchangeable ones by name, but ask for networks with EDM's preconditioning
    assert {s.name for s in sfumato.KarrasDiffusionSchedulers} - {"EDMEulerScheduler"} <= set(SCHEDULERS) <= set(registry.PUBLIC)


@pytest.mark.parametrize("guided", [True, False], ids=["guided", "unguided"])
@pytest.mark.parametrize("scheduler", SCHEDULERS)
@pytest.mark.parametrize("name", WALKED)
def test_cell(checkpoint: Callable[[str], tuple[Path, Any]], name: str, scheduler: str, guided: bool) -> None:
    pipe, call = load(checkpoint, name), call_of(name, guided)
    make = getattr(sfumato, scheduler).from_config
    if name == "DDIMPipeline" and scheduler != "DDIMScheduler":
        assert isinstance(type(pipe)(pipe.unet, make(pipe.scheduler.config)).scheduler, sfumato.DDIMScheduler)
        return
    if (name, scheduler) in REFUSED:
        with pytest.raises(ValueError, match=REFUSED[name, scheduler]):
            pipe.scheduler = make(pipe.scheduler.config)
            pipe(**call)
        return
    pipe.scheduler = make(pipe.scheduler.config)
    before = snapshot(pipe)
    first = pipe(**call, generator=seeded(1)).images
    assert_equal(before, snapshot(pipe))
    assert np.isfinite(first).all() and first.std() > 0
    assert first.shape[-1] == 3
    if name in SIZES:
        assert first.shape[1:3] == (SIZES[name], SIZES[name])
    assert np.array_equal(first, pipe(**call, generator=seeded(1)).images)
    assert not np.array_equal(first, pipe(**call, generator=seeded(2)).images)


GUIDANCES: dict[str, Callable[[Any], Any]] = {
    "CFG": lambda pipe: sfumato.ClassifierFreeGuidance(guidance_scale=3.0, guidance_rescale=0.5, start=0.0, stop=0.7),
    "CFG-Zero*": lambda pipe: sfumato.ClassifierFreeZeroStarGuidance(guidance_scale=3.0),
    "APG": lambda pipe: sfumato.APG(guidance_scale=3.0),
    "TCFG": lambda pipe: sfumato.TCFG(guidance_scale=3.0),
    "FDG": lambda pipe: sfumato.FDG(guidance_scales=[3.0, 2.0]),
    "PAG": lambda pipe: sfumato.PAG(guidance_scale=3.0, perturbed_guidance_layers=layers(pipe), perturbed_guidance_stop=1.0),
    "SEG": lambda pipe: sfumato.SEG(guidance_scale=3.0, seg_guidance_layers=layers(pipe)),
}
"""Guidance that every family takes; skip-layer guidance is for transformers, autoguidance needs a second network."""


def layers(pipe: Any) -> list[str]:
    return ["mid"] if hasattr(pipe, "unet") else ["blocks.1"]


@pytest.mark.parametrize("name", [n for n in PIPELINES if registry.load(n).family != "unconditional"])
def test_every_pipeline_takes_every_guidance(checkpoint: Callable[[str], tuple[Path, Any]], name: str) -> None:
    pipe = load(checkpoint, name)
    call = {**call_of(name, False), "num_inference_steps": 3}
    if "strength" in call:
        call["strength"] = 1.0
    if "negative_prompt" in pipe.call_signature.parameters:
        call["negative_prompt"] = "blue"
    if "guidance" not in pipe.call_signature.parameters:
        pytest.skip("variations, the x4 and the latent upscaler guide by their scale alone")
    if "InstructPix2Pix" in name:
        with pytest.raises(ValueError, match="has a guidance of its own"):
            pipe(**call, guidance=sfumato.ClassifierFreeGuidance())
        return
    before, pictures = snapshot(pipe), {"none": pipe(**call, generator=seeded(1)).images}
    del call["true_cfg_scale" if "Flux" in name else "guidance_scale"]  # the guidance has its own
    for label, make in GUIDANCES.items():
        if label in ("PAG", "SEG") and name == "StableDiffusionLatentUpscalePipeline":
            continue
        pictures[label] = pipe(**call, guidance=make(pipe), generator=seeded(1)).images
        assert pictures[label].shape == pictures["none"].shape and np.isfinite(pictures[label]).all(), label
        assert not np.array_equal(pictures[label], pictures["none"]), label
    assert_equal(before, snapshot(pipe))
    assert np.array_equal(pictures["APG"], pipe(**call, guidance=GUIDANCES["APG"](pipe), generator=seeded(1)).images)


REGIONAL = [n for n in PIPELINES if "regions" in registry.load(n).call_signature.parameters]


@pytest.mark.parametrize("name", REGIONAL)
def test_regions(checkpoint: Callable[[str], tuple[Path, Any]], name: str) -> None:
    """A region changes the picture; one of an all-black mask is the picture without it."""
    pipe, call = load(checkpoint, name), {**call_of(name, True), "num_inference_steps": 3}
    plain, left = pipe(**call, generator=seeded(1)).images, tiny.mask()
    regional = pipe(**call, regions=[("blue blue cat", left)], generator=seeded(1)).images
    nowhere = pipe(**call, regions=[("blue blue cat", Image.new("L", (32, 32), 0))], generator=seeded(1)).images
    assert regional.shape == plain.shape and np.isfinite(regional).all()
    assert np.abs(regional - plain).max() > 1e-4
    if "Kontext" not in name:  # whose reference pictures see every prompt
        np.testing.assert_allclose(nowhere, plain, atol=2e-4)


def matrix() -> Any:
    spec = importlib.util.spec_from_file_location("matrix", Path(__file__).parents[1] / "docs" / "matrix.py")
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_the_page_is_current() -> None:
    assert (Path(__file__).parents[1] / "docs" / "matrix.md").read_text() == matrix().page(), "run: python docs/matrix.py"


@pytest.mark.parametrize("name", [n for n in PIPELINES if registry.load(n).family != "unconditional"])
def test_picture_prompts(checkpoint: Callable[[str], tuple[Path, Any]], name: str) -> None:
    """Every pipeline with an IP-Adapter, or its refusal, of which the page gives the reason."""
    pipe, reference = load(checkpoint, name), checkpoint(EXTENDED.get(name, name))[1]
    file = adapter_file(getattr(reference, pipe.denoiser_name))
    if name.removesuffix("Pipeline") in matrix().NO_PICTURES:
        with pytest.raises(ValueError, match="takes no picture prompts"):
            pipe.load_ip_adapter(file)
        return
    call, untouched = {**call_of(name, True), "num_inference_steps": 2}, snapshot(pipe)["weights"]
    plain = pipe(**call, generator=seeded(1)).images
    pipe.load_ip_adapter(file)
    if "image_encoder" in pipe.components:
        encoder, processor = tiny.siglip() if "StableDiffusion3" in name else (tiny.image_encoder(), tiny.image_processor())
        pipe.image_encoder, pipe.feature_extractor = encoder, processor
        call["ip_adapter_image"] = tiny.picture(4)
    else:
        with pytest.raises(ValueError, match="pass ip_adapter_image_embeds that another pipeline prepared"):
            pipe(**call, ip_adapter_image=tiny.picture(4))
        call["ip_adapter_image_embeds"] = [torch.ones(2, 1, 32)]
    before, first = snapshot(pipe), pipe(**call, generator=seeded(1)).images
    assert_equal(before, snapshot(pipe))
    assert first.shape == plain.shape and np.isfinite(first).all()
    assert np.abs(first - plain).max() > 1e-4
    assert np.array_equal(first, pipe(**call, generator=seeded(1)).images)
    pipe.unload_ip_adapter()
    if "image_encoder" in pipe.components:
        pipe.image_encoder = None
    assert_equal(untouched, snapshot(pipe)["weights"])


@pytest.mark.parametrize("name", PIPELINES)
def test_survives_saving_and_loading(checkpoint: Callable[[str], tuple[Path, Any]], name: str, tmp_path: Path) -> None:
    pipe = load(checkpoint, name)
    pipe.save_pretrained(tmp_path)
    again = sfumato.DiffusionPipeline.from_pretrained(tmp_path)
    assert type(again) is type(pipe)
    again.set_progress_bar_config(disable=True)
    call = call_of(name, True)
    assert np.array_equal(pipe(**call, generator=seeded(1)).images, again(**call, generator=seeded(1)).images)


@pytest.mark.parametrize("name", [n for n in PIPELINES if registry.load(n).family != "unconditional"])
def test_half_precision_runs(checkpoint: Callable[[str], tuple[Path, Any]], name: str) -> None:
    pipe = load(checkpoint, name, dtype=torch.bfloat16)
    assert pipe.dtype == torch.bfloat16
    assert np.isfinite(pipe(**call_of(name, True), generator=seeded(1)).images).all()
