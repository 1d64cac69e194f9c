"""Pipelines against the reference: the same folder, the same seed, the same picture."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import diffusers
import numpy as np
import pytest
import tiny
import torch
from scheduler_configs import NAMES

import sfumato

SCHEDULERS = NAMES[:6]  # the matrix walks the others
TEXT = dict(prompt="a red cat", negative_prompt="blue", num_inference_steps=4, output_type="np")
FEW = dict(prompt="a red cat", num_inference_steps=4, output_type="np")
SMALL = torch.rand(1, 3, 16, 16, generator=torch.Generator().manual_seed(5)) * 2 - 1


def controlled_call(name: str) -> dict[str, Any]:
    """A call with a control picture, or two."""
    steers: Any = [tiny.picture(7), tiny.picture(8)] if name.endswith("multi") else tiny.picture(7)
    if "Img2Img" not in name and "Inpaint" not in name:
        call = {**TEXT, "control_image" if "Union" in name else "image": steers}
    else:
        call = {**TEXT, "image": tiny.picture(), "control_image": steers, "strength": 0.75}
    if "Inpaint" in name:
        call["mask_image"] = tiny.mask()
    return {**call, "control_mode": 3} if "Union" in name else call


def flux_call(name: str) -> dict[str, Any]:
    """A call of FLUX at the tiny size."""
    call: dict[str, Any] = {**TEXT, "height": 32, "width": 32, "max_sequence_length": 24}
    if "Control" in name or name == "FluxFillPipeline":
        del call["negative_prompt"]
    if "Img2Img" in name or "Inpaint" in name:
        call |= {"image": tiny.picture(), "strength": 0.75}
    if name in ("FluxFillPipeline", "FluxKontextPipeline"):
        call["image"] = tiny.picture()
    if "Inpaint" in name or "Fill" in name:
        call["mask_image"] = tiny.mask()
    if "Control" in name:
        call["control_image"] = tiny.picture(7)
    if "ControlNet" in name:
        call["control_mode"] = 1
    return {**call, "max_area": 32 * 32, "_auto_resize": False} if "Kontext" in name else call


CALLS: dict[str, dict[str, Any]] = {
    "StableDiffusionPipeline": TEXT,
    "StableDiffusionImg2ImgPipeline": {**TEXT, "image": tiny.picture(), "strength": 0.75},
    "StableDiffusionInpaintPipeline": {**TEXT, "image": tiny.picture(), "mask_image": tiny.mask(), "strength": 0.75},
    "inpaint9": {**TEXT, "image": tiny.picture(), "mask_image": tiny.mask()},
    "StableDiffusionDepth2ImgPipeline": {**TEXT, "image": tiny.picture(), "strength": 0.75},
    "StableDiffusionUpscalePipeline": {**TEXT, "image": tiny.picture(size=(16, 16)), "noise_level": 30},
    "StableDiffusionLatentUpscalePipeline": {**TEXT, "image": tiny.picture()},
    "StableDiffusionInstructPix2PixPipeline": {**TEXT, "image": tiny.picture()},
    "StableDiffusionImageVariationPipeline": {"image": tiny.picture(), "num_inference_steps": 4, "output_type": "np"},
    "StableDiffusionXLPipeline": TEXT,
    "StableDiffusionXLImg2ImgPipeline": {**TEXT, "image": tiny.picture(), "strength": 0.75},
    "refiner": {**TEXT, "image": tiny.picture(), "strength": 0.75},
    "StableDiffusionXLInpaintPipeline": {**TEXT, "image": tiny.picture(), "mask_image": tiny.mask(), "strength": 0.75},
    "xl inpaint9": {**TEXT, "image": tiny.picture(), "mask_image": tiny.mask(), "strength": 0.9999},
    "StableDiffusionXLInstructPix2PixPipeline": {**TEXT, "image": tiny.picture(), "height": 32, "width": 32},
    **{name: controlled_call(name) for name in tiny.CONTROLLED},
    "StableDiffusion3Pipeline": TEXT,
    "StableDiffusion3Img2ImgPipeline": {**TEXT, "image": tiny.picture(), "strength": 0.75},
    "StableDiffusion3InpaintPipeline": {**TEXT, "image": tiny.picture(), "mask_image": tiny.mask(), "strength": 0.75},
    "StableDiffusion3ControlNetPipeline": {**TEXT, "control_image": tiny.picture(7)},
    "StableDiffusion3ControlNetInpaintingPipeline": {**TEXT, "control_image": tiny.picture(7), "control_mask": tiny.mask()},
    **{name: flux_call(name) for name in tiny.FLUX},
    "LatentConsistencyModelPipeline": FEW,
    "LatentConsistencyModelImg2ImgPipeline": {**FEW, "image": tiny.picture(), "strength": 0.75},
    "DDPMPipeline": {"num_inference_steps": 4, "output_type": "np", "batch_size": 2},
    "DDIMPipeline": {"num_inference_steps": 4, "output_type": "np", "batch_size": 2, "eta": 0.5},
    "LDMSuperResolutionPipeline": {"image": SMALL, "num_inference_steps": 4, "output_type": "np"},
}
CALLS |= {name: CALLS[name.replace("PAG", "")] for name in tiny.PAG}
FLOWS = ("StableDiffusion3", "Flux", "schnell")
OWN_SCHEDULER = (*FLOWS, "LatentConsistency")
Checkpoint = Callable[[str], tuple[Path, Any]]


def ours(folder: Path, reference: Any) -> Any:
    """Loads a folder that the reference wrote, under the reference's class name."""
    pipe = getattr(sfumato, type(reference).__name__).from_pretrained(folder)
    pipe.set_progress_bar_config(disable=True)
    return pipe


def seeded(seed: int | list[int]) -> Any:
    if isinstance(seed, list):
        return [torch.Generator().manual_seed(s) for s in seed]
    return torch.Generator().manual_seed(seed)


def assert_same(reference: Any, pipe: Any, seed: int | list[int] = 3, tolerance: float = 1e-4, **call: Any) -> np.ndarray:
    """Runs both with the same seed and compares the pictures."""
    with torch.no_grad():
        expected = reference(**call, generator=seeded(seed)).images
    got = pipe(**call, generator=seeded(seed)).images
    expected, got = (np.asarray(x) for x in (expected, got))
    assert expected.shape == got.shape
    assert np.isfinite(expected).all()
    assert np.abs(expected - got).max() <= tolerance
    assert got.std() > 1e-3
    return got


def with_scheduler(library: Any, pipe: Any, name: str) -> Any:
    """The same components with another scheduler."""
    parts = {**pipe.components, "scheduler": getattr(library, name).from_config(pipe.scheduler.config)}
    options = {k: v for k, v in pipe.config.items() if k in ("requires_aesthetics_score", "force_zeros_for_empty_prompt")}
    made = type(pipe)(**parts, **options)
    made.set_progress_bar_config(disable=True)
    return made


@pytest.mark.parametrize("scheduler", SCHEDULERS)
@pytest.mark.parametrize("name", CALLS)
def test_same_picture_with_every_scheduler(checkpoint: Checkpoint, name: str, scheduler: str) -> None:
    if name == "DDIMPipeline" and scheduler != "DDIMScheduler":
        pytest.skip("the pipeline makes every scheduler a DDIM scheduler")
    if name == "DDPMPipeline" and scheduler.startswith(("PNDM", "Euler")):
        pytest.skip("the reference's pipeline raises, or does not scale the noise as the scheduler asks")
    if name == "StableDiffusionLatentUpscalePipeline" and not scheduler.startswith("EulerDiscrete"):
        pytest.skip("the reference's latent upscaler works with EulerDiscreteScheduler alone")
    if name == "LDMSuperResolutionPipeline" and scheduler in ("DDPMScheduler", "EulerAncestralDiscreteScheduler"):
        pytest.skip("the reference's pipeline draws the steps' noise from the global generator")
    if name == "StableDiffusionXLAdapterPipeline" and scheduler == "PNDMScheduler":
        pytest.skip("the reference leaves the adapter out of PNDM's last step")
    if name.startswith(OWN_SCHEDULER) and scheduler != SCHEDULERS[0]:
        pytest.skip("flow and consistency models keep their scheduler")
    folder, reference = checkpoint(name)
    pipe = ours(folder, reference)
    if name.startswith(OWN_SCHEDULER):
        assert_same(reference, pipe, **CALLS[name])
        return
    assert_same(with_scheduler(diffusers, reference, scheduler), with_scheduler(sfumato, pipe, scheduler), **CALLS[name])


TORN = ("FluxControlNetImg2ImgPipeline", "FluxControlNetInpaintPipeline")
TEXT_PIPELINES = [n for n in CALLS if "prompt" in CALLS[n]]
SHARED_PICTURE = (
    "StableDiffusionUpscalePipeline",
    "StableDiffusionLatentUpscalePipeline",
    "StableDiffusionInstructPix2PixPipeline",
)


@pytest.mark.parametrize("name", TEXT_PIPELINES)
def test_same_pictures_in_batches(checkpoint: Checkpoint, name: str) -> None:
    if name in TORN:
        pytest.skip("the reference raises: its control mode has one row")
    if "Adapter" in name:
        pytest.skip("the reference cannot share an adapter's picture between prompts")
    folder, reference = checkpoint(name)
    call = {**CALLS[name], "prompt": ["a red cat", "blue apple"]}
    if "negative_prompt" in call:
        call["negative_prompt"] = ["blue", "cat"]
    if name in SHARED_PICTURE:
        call["image"] = [tiny.picture(k, call["image"].size) for k in (1, 2)]
    else:
        call["num_images_per_prompt"] = 2
    assert_same(reference, ours(folder, reference), **call)


@pytest.mark.parametrize("name", TEXT_PIPELINES)
def test_several_pictures_of_one_prompt(checkpoint: Checkpoint, name: str) -> None:
    if name == "StableDiffusionLatentUpscalePipeline":
        pytest.skip("takes no num_images_per_prompt")
    if name in TORN:
        pytest.skip("the reference raises: its control mode has one row")
    folder, reference = checkpoint(name)
    assert_same(reference, ours(folder, reference), num_images_per_prompt=3, **CALLS[name])


@pytest.mark.parametrize("name", TEXT_PIPELINES)
def test_a_generator_per_picture_gives_the_pictures_made_alone(checkpoint: Checkpoint, name: str) -> None:
    """The reference's single calls are the expected values: in some of its batches the first generator serves all pictures."""
    folder, reference = checkpoint(name)
    pipe = ours(folder, reference)
    prompts, pictures = ["a red cat", "blue apple"], CALLS[name].get("image")
    call = {**CALLS[name], "prompt": prompts}
    if name in SHARED_PICTURE:
        call["image"] = [pictures, pictures]
    together = pipe(**call, generator=seeded([1, 2])).images
    for k in range(2):
        with torch.no_grad():
            alone = reference(**{**CALLS[name], "prompt": prompts[k]}, generator=seeded(k + 1)).images
        np.testing.assert_allclose(together[k], alone[0], atol=1e-4)


@pytest.mark.parametrize("name", CALLS)
def test_what_we_save_the_reference_loads(checkpoint: Checkpoint, name: str, tmp_path: Path) -> None:
    folder, reference = checkpoint(name)
    ours(folder, reference).save_pretrained(tmp_path)
    again = type(reference).from_pretrained(tmp_path)
    again.set_progress_bar_config(disable=True)
    with torch.no_grad():
        first, second = (pipe(**CALLS[name], generator=seeded(0)).images for pipe in (reference, again))
    # the reference draws SD3's control pictures from the global generator
    assert np.abs(first - second).max() <= (1e-5 if "3ControlNet" in name else 0)


VARIED = {
    "LCM, guidance": ("LatentConsistencyModelPipeline", dict(guidance_scale=3.0, num_inference_steps=2)),
    "LCM, no guidance": ("LatentConsistencyModelPipeline", dict(guidance_scale=1.0)),
    "LCM, another origin": ("LatentConsistencyModelPipeline", dict(original_inference_steps=20, num_inference_steps=7)),
    "LCM, own timesteps": ("LatentConsistencyModelPipeline", dict(timesteps=[901, 600, 333, 60])),
    "LCM, little strength": ("LatentConsistencyModelImg2ImgPipeline", dict(strength=0.3, original_inference_steps=40)),
    "LCM, latents out": ("LatentConsistencyModelPipeline", dict(output_type="latent")),
    "no guidance": ("StableDiffusionPipeline", dict(guidance_scale=1.0)),
    "rescaled guidance": ("StableDiffusionPipeline", dict(guidance_rescale=0.7)),
    "eta": ("StableDiffusionPipeline", dict(eta=0.7)),
    "size": ("StableDiffusionPipeline", dict(height=48, width=24)),
    "latents out": ("StableDiffusionPipeline", dict(output_type="latent")),
    "tensor out": ("StableDiffusionPipeline", dict(output_type="pt")),
    "PIL out": ("StableDiffusionPipeline", dict(output_type="pil")),
    "full strength": ("StableDiffusionImg2ImgPipeline", dict(strength=1.0)),
    "picture of another size": ("StableDiffusionImg2ImgPipeline", dict(image=tiny.picture(size=(48, 32)))),
    "list of pictures": (
        "StableDiffusionImg2ImgPipeline",
        dict(image=[tiny.picture(1), tiny.picture(2)], prompt=["a", "red"], negative_prompt=None),
    ),
    "array": ("StableDiffusionImg2ImgPipeline", dict(image=np.asarray(tiny.picture())[None] / np.float32(255))),
    "tensor": ("StableDiffusionImg2ImgPipeline", dict(image=torch.rand(1, 3, 32, 32, generator=torch.Generator().manual_seed(0)))),
    "latents in": (
        "StableDiffusionImg2ImgPipeline",
        dict(image=torch.randn(1, 4, 16, 16, generator=torch.Generator().manual_seed(0))),
    ),
    "inpaint at full strength": ("StableDiffusionInpaintPipeline", dict(strength=1.0)),
    "inpaint a crop": (
        "StableDiffusionInpaintPipeline",
        dict(image=tiny.picture(size=(64, 64)), mask_image=tiny.mask((64, 64)), padding_mask_crop=4, output_type="pil"),
    ),
    "inpaint with size": ("StableDiffusionInpaintPipeline", dict(height=24, width=48)),
    "nine channels, partial strength": ("inpaint9", dict(strength=0.6)),
    "depth given": (
        "StableDiffusionDepth2ImgPipeline",
        dict(depth_map=torch.rand(1, 20, 20, generator=torch.Generator().manual_seed(0))),
    ),
    "edit without guidance": ("StableDiffusionInstructPix2PixPipeline", dict(guidance_scale=1.0)),
    "upscale without guidance": ("StableDiffusionUpscalePipeline", dict(guidance_scale=1.0)),
    "latent upscale without a prompt": ("StableDiffusionLatentUpscalePipeline", dict(guidance_scale=0.0)),
    "latent upscale of latents": (
        "StableDiffusionLatentUpscalePipeline",
        dict(image=torch.randn(1, 4, 16, 16, generator=torch.Generator().manual_seed(0))),
    ),
    "latent upscale, latents out": ("StableDiffusionLatentUpscalePipeline", dict(output_type="latent")),
    "variation in numbers": ("StableDiffusionImageVariationPipeline", dict(num_images_per_prompt=2)),
    "variations of two": ("StableDiffusionImageVariationPipeline", dict(image=[tiny.picture(1), tiny.picture(2)])),
    "XL, no negative prompt": ("StableDiffusionXLPipeline", dict(negative_prompt=None)),
    "XL without guidance": ("StableDiffusionXLPipeline", dict(guidance_scale=1.0)),
    "XL, second prompts": ("StableDiffusionXLPipeline", dict(prompt_2="a blue apple", negative_prompt_2="cat")),
    "XL, clip skip": ("StableDiffusionXLPipeline", dict(clip_skip=1)),
    "XL, rescaled": ("StableDiffusionXLPipeline", dict(guidance_rescale=0.7)),
    "XL, the base's part": ("StableDiffusionXLPipeline", dict(denoising_end=0.6, num_inference_steps=10, output_type="latent")),
    "XL, sizes": (
        "StableDiffusionXLPipeline",
        dict(original_size=(64, 48), crops_coords_top_left=(4, 8), target_size=(40, 40), negative_original_size=(16, 16)),
    ),
    "XL, negative sizes": (
        "StableDiffusionXLPipeline",
        dict(negative_original_size=(16, 16), negative_target_size=(24, 8), negative_crops_coords_top_left=(2, 0)),
    ),
    "XL, crops of a picture": ("StableDiffusionXLImg2ImgPipeline", dict(crops_coords_top_left=(4, 8))),
    "refiner's part": (
        "refiner",
        dict(
            image=torch.randn(1, 4, 16, 16, generator=torch.Generator().manual_seed(0)), denoising_start=0.6, num_inference_steps=10
        ),
    ),
    "refiner, a stretch": (
        "refiner",
        dict(
            image=torch.randn(1, 4, 16, 16, generator=torch.Generator().manual_seed(0)),
            denoising_start=0.3,
            denoising_end=0.8,
            num_inference_steps=10,
            output_type="latent",
        ),
    ),
    "refiner, crops": ("refiner", dict(crops_coords_top_left=(3, 4))),
    "refiner, scores": ("refiner", dict(aesthetic_score=7.5, negative_aesthetic_score=1.0)),
    "XL inpaint, later part": ("StableDiffusionXLInpaintPipeline", dict(denoising_start=0.5, num_inference_steps=10)),
    "XL inpaint at full strength": ("StableDiffusionXLInpaintPipeline", dict(strength=1.0)),
    "XL edit, rescaled": ("StableDiffusionXLInstructPix2PixPipeline", dict(guidance_rescale=0.7)),
    "XL edit without guidance": ("StableDiffusionXLInstructPix2PixPipeline", dict(guidance_scale=1.0)),
    "3, second and third prompts": ("StableDiffusion3Pipeline", dict(prompt_2="blue", prompt_3="a cat", negative_prompt_3="red")),
    "3 without guidance": ("StableDiffusion3Pipeline", dict(guidance_scale=1.0)),
    "3, own levels": ("StableDiffusion3Pipeline", dict(sigmas=[1.0, 0.6, 0.2])),
    "3, clip skip": ("StableDiffusion3Pipeline", dict(clip_skip=1)),
    "3, short text": ("StableDiffusion3Pipeline", dict(max_sequence_length=16, height=48)),
    "3, little strength": ("StableDiffusion3Img2ImgPipeline", dict(strength=0.55, num_inference_steps=5)),
    "FLUX, true guidance": ("FluxPipeline", dict(true_cfg_scale=3.0)),
    "FLUX, guidance scale": ("FluxPipeline", dict(guidance_scale=1.5, negative_prompt=None)),
    "FLUX, own levels": ("FluxPipeline", dict(sigmas=[1.0, 0.6, 0.2])),
    "FLUX, size and latents out": ("FluxPipeline", dict(height=48, width=32, output_type="latent")),
    "FLUX, latents in": ("FluxPipeline", dict(latents=torch.randn(1, 64, 16, generator=torch.Generator().manual_seed(0)))),
    "FLUX, little strength": ("FluxImg2ImgPipeline", dict(strength=0.55, num_inference_steps=5)),
    "schnell, true guidance": ("schnell", dict(true_cfg_scale=2.0, num_inference_steps=2)),
    "Kontext, no picture": ("FluxKontextPipeline", dict(image=None)),
    "Kontext, another shape": ("FluxKontextPipeline", dict(height=48, width=24, image=tiny.picture(size=(64, 32)))),
    "Kontext paints, other sizes": (
        "FluxKontextInpaintPipeline",
        dict(image=tiny.picture(1, (64, 40)), mask_image=tiny.mask((50, 50))),
    ),
    "Kontext paints by a reference": (
        "FluxKontextInpaintPipeline",
        dict(image_reference=tiny.picture(5, (32, 48)), strength=1.0, true_cfg_scale=2.0),
    ),
    "ControlNet, guess": ("StableDiffusionControlNetPipeline", dict(guess_mode=True)),
    "ControlNet, a while": ("StableDiffusionControlNetPipeline", dict(control_guidance_start=0.2, control_guidance_end=0.6)),
    "ControlNet, scale": ("StableDiffusionXLControlNetPipeline", dict(controlnet_conditioning_scale=0.4, guidance_scale=1.0)),
    "ControlNets, scales": (
        "StableDiffusionControlNetPipeline multi",
        dict(controlnet_conditioning_scale=[0.4, 0.9], control_guidance_end=[0.5, 1.0]),
    ),
    "ControlNet union, the control picture's size": (
        "StableDiffusionXLControlNetUnionPipeline",
        dict(control_image=tiny.picture(7, (40, 51))),
    ),
    "ControlNet paints, the picture's size": (
        "StableDiffusionControlNetInpaintPipeline",
        dict(image=tiny.picture(1, (40, 51)), mask_image=tiny.mask((40, 51)), control_image=tiny.picture(7, (40, 51))),
    ),
    "ControlNet paints a crop": (
        "StableDiffusionXLControlNetInpaintPipeline",
        dict(
            image=tiny.picture(1, (80, 48)),
            mask_image=tiny.mask((80, 48)),
            control_image=tiny.picture(7, (80, 48)),
            padding_mask_crop=8,
            output_type="pil",
        ),
    ),
    "ControlNet-XS, a while": (
        "StableDiffusionControlNetXSPipeline",
        dict(control_guidance_start=0.2, control_guidance_end=0.8, controlnet_conditioning_scale=0.6),
    ),
    "ControlNet-XS, no guidance": ("StableDiffusionXLControlNetXSPipeline", dict(guidance_scale=1.0, control_guidance_end=0.5)),
    "T2I-Adapter, scale": ("StableDiffusionAdapterPipeline", dict(adapter_conditioning_scale=0.5)),
    "T2I-Adapter, part": ("StableDiffusionXLAdapterPipeline", dict(adapter_conditioning_factor=0.5)),
    "3 ControlNet, a while": (
        "StableDiffusion3ControlNetPipeline",
        dict(control_guidance_end=0.6, controlnet_conditioning_scale=0.5),
    ),
    "3 ControlNet of masks, other sizes": (
        "StableDiffusion3ControlNetInpaintingPipeline",
        dict(control_image=tiny.picture(7, (64, 40)), control_mask=tiny.mask((48, 48)), height=48, width=32, guidance_scale=1.0),
    ),
    "3 ControlNet of masks, a picture for each prompt": (
        "StableDiffusion3ControlNetInpaintingPipeline",
        dict(
            prompt=["a", "red"],
            negative_prompt=None,
            control_image=[tiny.picture(1), tiny.picture(2)],
            control_mask=[tiny.mask()] * 2,
        ),
    ),
    "FLUX ControlNet, scale": ("FluxControlNetPipeline", dict(controlnet_conditioning_scale=0.5, control_guidance_end=0.6)),
    "FLUX ControlNet, true guidance": (
        "FluxControlNetPipeline",
        dict(true_cfg_scale=2.0, prompt=["a", "red"], negative_prompt=["blue", "cat"], num_images_per_prompt=2),
    ),
    "FLUX ControlNet, a list of one scale": ("FluxControlNetPipeline", dict(controlnet_conditioning_scale=[0.5])),
    "DDIM without noise": ("DDIMPipeline", dict(eta=0.0, output_type="pil")),
    "super-resolution of PIL": ("LDMSuperResolutionPipeline", dict(image=tiny.picture(size=(40, 32)))),
}


@pytest.mark.parametrize("case", VARIED)
def test_same_picture_with_other_arguments(checkpoint: Checkpoint, case: str) -> None:
    name, changes = VARIED[case]
    folder, reference = checkpoint(name)
    call = {**CALLS[name], **changes}
    with torch.no_grad():
        expected = reference(**call, generator=seeded(0)).images
    got = ours(folder, reference)(**call, generator=seeded(0)).images
    tolerance = 1e-4
    if call["output_type"] == "pil":
        expected, got, tolerance = [np.asarray(p, np.float32) for p in expected], [np.asarray(p, np.float32) for p in got], 1.0
    np.testing.assert_allclose(np.asarray(got), np.asarray(expected), atol=tolerance, rtol=1e-5)


def test_kontext_pastes_what_it_paints_in_a_crop(checkpoint: Checkpoint) -> None:
    """The reference returns the enlarged region itself; other pipelines of its paste it."""
    folder, reference = checkpoint("FluxKontextInpaintPipeline")
    image, mask = tiny.picture(1, (64, 64)), tiny.mask((64, 64))
    changes = {"image": image, "mask_image": mask, "padding_mask_crop": 4, "output_type": "pil"}
    call = {**CALLS["FluxKontextInpaintPipeline"], **changes}
    with torch.no_grad():
        region = reference(**call, generator=seeded(0)).images[0]
    place = reference.mask_processor.get_crop_region(mask, *image.size, pad=4)
    expected = reference.image_processor.apply_overlay(mask, image, region, place)
    got = ours(folder, reference)(**call, generator=seeded(0)).images[0]
    np.testing.assert_allclose(np.asarray(got, np.float32), np.asarray(expected, np.float32), atol=1.0)


@pytest.mark.parametrize("argument", ["timesteps", "sigmas"])
def test_own_schedule(checkpoint: Checkpoint, argument: str) -> None:
    folder, reference = checkpoint("StableDiffusionPipeline")
    reference = with_scheduler(diffusers, reference, "EulerDiscreteScheduler")
    pipe = with_scheduler(sfumato, ours(folder, reference), "EulerDiscreteScheduler")
    own = {"timesteps": [900, 600, 250, 50], "sigmas": [12.0, 5.0, 1.0, 0.2]}[argument]
    assert_same(reference, pipe, **{**TEXT, argument: own})
    with pytest.raises(ValueError, match="takes no custom"):
        ours(folder, reference)(**{**TEXT, argument: own})


def test_embeddings_instead_of_prompts(checkpoint: Checkpoint) -> None:
    folder, reference = checkpoint("StableDiffusionPipeline")
    pipe = ours(folder, reference)
    with torch.no_grad():
        positive, negative = pipe.encode_prompt("a red cat", negative_prompt="blue")
    call = {"prompt_embeds": positive, "negative_prompt_embeds": negative, "num_inference_steps": 4, "output_type": "np"}
    got = assert_same(reference, pipe, **call)
    assert np.array_equal(got, pipe(**TEXT, generator=seeded(3)).images)


def test_safety_checker_is_honoured(checkpoint: Checkpoint, tmp_path: Path) -> None:
    _, plain = checkpoint("StableDiffusionPipeline")
    torch.manual_seed(0)
    parts = {**plain.components, "safety_checker": tiny.safety_checker(), "feature_extractor": tiny.image_processor()}
    type(plain)(**parts).save_pretrained(tmp_path)
    reference = type(plain).from_pretrained(tmp_path)
    pipe = ours(tmp_path, reference)
    seen = set()
    for seed in range(6):
        expected = reference(**TEXT, generator=seeded(seed))
        got = pipe(**TEXT, generator=seeded(seed))
        assert got.nsfw_content_detected == expected.nsfw_content_detected
        np.testing.assert_allclose(got.images, expected.images, atol=1e-4)
        seen |= set(got.nsfw_content_detected)
    assert True in seen
    pipe.save_pretrained(tmp_path / "again")
    assert type(plain).from_pretrained(tmp_path / "again").safety_checker is not None


def test_clip_skip_is_a_shorter_encoder(checkpoint: Checkpoint) -> None:
    """The reference's own clip_skip needs an older transformers; an encoder with a layer less is the same by definition."""
    folder, reference = checkpoint("StableDiffusionPipeline")
    full = reference.text_encoder
    shorter = type(full)(
        type(full.config)(**{**full.config.to_dict(), "num_hidden_layers": full.config.num_hidden_layers - 1})
    ).eval()
    shorter.load_state_dict(full.state_dict(), strict=False)
    cut = type(reference)(**{**reference.components, "text_encoder": shorter})
    expected = cut(**TEXT, generator=seeded(0)).images
    got = ours(folder, reference)(**TEXT, clip_skip=1, generator=seeded(0)).images
    np.testing.assert_allclose(got, expected, atol=1e-4)


def test_one_negative_prompt_for_all(checkpoint: Checkpoint) -> None:
    folder, reference = checkpoint("StableDiffusionPipeline")
    pipe = ours(folder, reference)
    call = {**TEXT, "prompt": ["a", "red"]}
    one, each = (pipe(**{**call, "negative_prompt": n}, generator=seeded(0)).images for n in ("cat", ["cat", "cat"]))
    assert np.array_equal(one, each)


def test_tuple_output(checkpoint: Checkpoint) -> None:
    folder, reference = checkpoint("StableDiffusionPipeline")
    images, flags = ours(folder, reference)(**TEXT, return_dict=False)
    assert images.shape == (1, 32, 32, 3) and flags is None


CALLED_BACK = (
    "StableDiffusionPipeline", "StableDiffusionXLPipeline", "StableDiffusionXLInpaintPipeline", "FluxPipeline",
    "StableDiffusion3Pipeline", "StableDiffusionXLControlNetPipeline", "FluxImg2ImgPipeline", "FluxKontextPipeline",
)  # fmt: skip


@pytest.mark.parametrize("name", CALLED_BACK)
def test_callbacks_change_latents_and_prompts_as_in_the_reference(checkpoint: Checkpoint, name: str) -> None:
    def change(pipe: Any, index: int, t: Any, tensors: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
        seen.append({key: tuple(value.shape) for key, value in tensors.items()})
        return {"latents": tensors["latents"] * 0.9 + 0.01, "prompt_embeds": tensors["prompt_embeds"] * 1.1}

    seen: list[dict[str, Any]] = []
    folder, reference = checkpoint(name)
    call = {**CALLS[name], "callback_on_step_end": change, "callback_on_step_end_tensor_inputs": ["latents", "prompt_embeds"]}
    assert_same(reference, ours(folder, reference), **call)
    half = len(seen) // 2
    assert half > 1 and seen[:half] == seen[half:]  # the same tensors, in the same shapes, packed where the reference packs


def test_callbacks_of_consistency_models_see_and_change_their_own_tensors(checkpoint: Checkpoint) -> None:
    def change(pipe: Any, index: int, t: Any, tensors: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
        return {
            "denoised": tensors["denoised"] * 0.9,
            "w_embedding": tensors["w_embedding"] * 1.1,
            "latents": tensors["latents"] * 0.8,
        }

    folder, reference = checkpoint("LatentConsistencyModelPipeline")
    call = {**FEW, "callback_on_step_end": change, "callback_on_step_end_tensor_inputs": ["denoised", "w_embedding", "latents"]}
    assert_same(reference, ours(folder, reference), **call)


def test_consistency_models_need_a_unet_that_reads_the_scale(checkpoint: Checkpoint) -> None:
    folder, reference = checkpoint("LatentConsistencyModelPipeline")
    pipe = ours(folder, reference)
    other = sfumato.AutoPipelineForImage2Image.from_pipe(pipe)
    assert type(other) is sfumato.LatentConsistencyModelImg2ImgPipeline and other.unet is pipe.unet
    painter = sfumato.StableDiffusionInpaintPipeline.from_pipe(pipe)
    picture = painter(**FEW, image=tiny.picture(), mask_image=tiny.mask(), generator=seeded(0)).images[0]
    assert picture.shape == (32, 32, 3) and picture.std() > 1e-3
    plain = sfumato.StableDiffusionPipeline.from_pretrained(checkpoint("StableDiffusionPipeline")[0])
    with pytest.raises(ValueError, match=r"time_cond_proj_dim=None.*use StableDiffusionPipeline, with LCMScheduler"):
        sfumato.LatentConsistencyModelPipeline.from_pipe(plain)


@pytest.mark.parametrize("name", ["StableDiffusionXLControlNetPipeline", "StableDiffusionXLPipeline"])
def test_the_reference_s_callbacks_end_guidance(checkpoint: Checkpoint, name: str) -> None:
    kind = "SDXLControlnetCFGCutoffCallback" if "ControlNet" in name else "SDXLCFGCutoffCallback"
    cut = getattr(diffusers.callbacks, kind)(cutoff_step_ratio=0.5)
    call = {**CALLS[name], "callback_on_step_end": cut, "callback_on_step_end_tensor_inputs": cut.tensor_inputs}
    folder, reference = checkpoint(name)
    assert_same(reference, ours(folder, reference), **call)


CONTROL_CALLED_BACK = (
    "StableDiffusionControlNetPipeline multi", "StableDiffusionXLControlNetImg2ImgPipeline", "FluxControlNetPipeline",
)  # fmt: skip


@pytest.mark.parametrize("name", CONTROL_CALLED_BACK)
def test_callbacks_change_control_pictures_as_in_the_reference(checkpoint: Checkpoint, name: str) -> None:
    def change(pipe: Any, index: int, t: Any, tensors: dict[str, Any]) -> dict[str, Any]:
        value = tensors[argument]
        seen.append([tuple(each.shape) for each in value] if isinstance(value, list) else tuple(value.shape))
        return {argument: [each * 0.8 for each in value] if isinstance(value, list) else value * 0.8}

    seen: list[Any] = []
    argument = "control_image" if "control_image" in CALLS[name] else "image"
    folder, reference = checkpoint(name)
    pipe = ours(folder, reference)
    call = {**CALLS[name], "callback_on_step_end": change, "callback_on_step_end_tensor_inputs": [argument]}
    assert_same(reference, pipe, **call)
    half = len(seen) // 2
    assert half > 1 and seen[:half] == seen[half:]
    with pytest.raises(ValueError, match="a callback returned 0 control pictures"):
        pipe(**{**call, "callback_on_step_end": lambda *given: {argument: []}})


@pytest.mark.parametrize("mode", ["RGBA", "L", "P"])
def test_pictures_of_any_mode_are_pictures(checkpoint: Checkpoint, mode: str) -> None:
    """Four channels are no latents, though latents have as many here; the reference takes them for such."""
    for name in ("StableDiffusionImg2ImgPipeline", "StableDiffusionXLControlNetInpaintPipeline", "StableDiffusionUpscalePipeline"):
        folder, reference = checkpoint(name)
        picture = CALLS[name]["image"].convert(mode)
        with torch.no_grad():
            expected = reference(**{**CALLS[name], "image": picture.convert("RGB")}, generator=seeded(0)).images
        got = ours(folder, reference)(**{**CALLS[name], "image": picture}, generator=seeded(0)).images
        np.testing.assert_allclose(got, expected, atol=1e-4)


@pytest.mark.parametrize("scheduler", ["DPMSolverMultistepScheduler", "UniPCMultistepScheduler"])
def test_flow_schedulers_lay_out_their_own_levels(checkpoint: Checkpoint, scheduler: str) -> None:
    for name in ("FluxPipeline", "FluxKontextPipeline", "StableDiffusion3Pipeline"):
        if name == "FluxKontextPipeline" and scheduler.startswith("DPM"):
            continue  # the reference raises
        folder, reference = checkpoint(name)
        pipes = []
        for library, pipe in ((diffusers, reference), (sfumato, ours(folder, reference))):
            options = {"use_flow_sigmas": True, "prediction_type": "flow_prediction"}
            made = getattr(library, scheduler).from_config(pipe.scheduler.config, **options)
            pipes.append(type(pipe)(**{**pipe.components, "scheduler": made}))
            pipes[-1].set_progress_bar_config(disable=True)
        assert_same(*pipes, **CALLS[name])


def test_depth_at_another_size(checkpoint: Checkpoint) -> None:
    """The reference takes no size: its pictures are those of the enlarged picture."""
    name = "StableDiffusionDepth2ImgPipeline"
    folder, reference = checkpoint(name)
    large = CALLS[name]["image"].resize((48, 40), 1)
    depth = torch.rand(1, 20, 20, generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        expected = reference(**{**CALLS[name], "image": large, "depth_map": depth}, generator=seeded(0)).images
    got = ours(folder, reference)(**CALLS[name], depth_map=depth, height=40, width=48, generator=seeded(0)).images
    np.testing.assert_allclose(got, expected, atol=1e-4)


def test_a_schedule_that_ends_before_it_begins(checkpoint: Checkpoint) -> None:
    folder, reference = checkpoint("StableDiffusionXLImg2ImgPipeline")
    with pytest.raises(ValueError, match=r"denoising_end=0.1 comes before the first step"):
        ours(folder, reference)(**CALLS["StableDiffusionXLImg2ImgPipeline"], denoising_end=0.1)


def test_embeddings_of_every_family_instead_of_prompts(checkpoint: Checkpoint) -> None:
    """Computed once, saved and passed."""
    for name in ("StableDiffusionXLPipeline", "StableDiffusion3Pipeline", "FluxPipeline"):
        folder, reference = checkpoint(name)
        pipe = ours(folder, reference)
        call = {k: v for k, v in CALLS[name].items() if k not in ("prompt", "negative_prompt")}
        with torch.no_grad():
            if name == "FluxPipeline":
                states, pooled, _ = pipe.encode_prompt("a red cat", max_sequence_length=24)
                given, texts = {"prompt_embeds": states, "pooled_prompt_embeds": pooled}, {"prompt": "a red cat"}
            else:
                names = ("prompt_embeds", "negative_prompt_embeds", "pooled_prompt_embeds", "negative_pooled_prompt_embeds")
                texts = {"prompt": "a red cat", "negative_prompt": "blue"}
                given = dict(zip(names, pipe.encode_prompt(**texts), strict=True))
        got = assert_same(reference, pipe, **call, **given)
        np.testing.assert_allclose(got, pipe(**texts, **call, generator=seeded(3)).images, atol=1e-6)


def test_auto_pipelines_take_control_networks(checkpoint: Checkpoint) -> None:
    for name, task in (("StableDiffusionXLControlNetPipeline", "Text2Image"), ("FluxControlNetInpaintPipeline", "Inpainting")):
        folder, reference = checkpoint(name)
        base = checkpoint("StableDiffusionXLPipeline" if "XL" in name else "FluxPipeline")[0]
        network = type(ours(folder, reference).controlnet).from_pretrained(folder / "controlnet")
        for library, given in ((diffusers, reference.controlnet), (sfumato, network)):
            made = getattr(library, f"AutoPipelineFor{task}").from_pretrained(base, controlnet=given)
            assert type(made).__name__ == name and made.controlnet is given


@pytest.mark.parametrize(
    "name", ["StableDiffusionPipeline", "StableDiffusionXLPipeline", "StableDiffusion3Pipeline", "FluxPipeline"]
)
def test_one_part_encodes_and_another_denoises(checkpoint: Checkpoint, name: str) -> None:
    """Neither loads what it does not need."""
    folder, reference = checkpoint(name)
    kind = getattr(sfumato, name)
    encoders = [part for part in kind.component_names if part.startswith(("text_encoder", "tokenizer"))]
    denoiser = "transformer" if "transformer" in kind.component_names else "unet"
    first = kind.from_pretrained(folder, **{denoiser: None, "vae": None})
    second = kind.from_pretrained(folder, **dict.fromkeys([*encoders, "vae"]))
    second.set_progress_bar_config(disable=True)
    call = {k: v for k, v in CALLS[name].items() if "prompt" not in k} | {"output_type": "latent"}
    call |= {"original_size": (32, 32), "target_size": (32, 32)} if "XL" in name else {}
    with torch.no_grad():
        if name == "FluxPipeline":
            found = first.encode_prompt("a red cat", max_sequence_length=24)[:2]
            given = dict(zip(("prompt_embeds", "pooled_prompt_embeds"), found, strict=True))
        else:
            found = first.encode_prompt("a red cat", negative_prompt="blue")
            names = ("prompt_embeds", "negative_prompt_embeds", "pooled_prompt_embeds", "negative_pooled_prompt_embeds")
            given = dict(zip(names, found, strict=False))
        expected = reference(**call, **given, generator=seeded(0)).images
    size = {"height": 128, "width": 128}  # eight pixels per latent, where no autoencoder tells
    got = second(**{**call, **size}, **given, generator=seeded(0)).images
    np.testing.assert_allclose(got, expected, atol=1e-4, rtol=1e-4)
    with pytest.raises(ValueError, match=rf"{denoiser}=None: this pipeline can encode prompts only"):
        first("a")
    with pytest.raises(ValueError, match="vae=None: this pipeline makes output_type='latent'"):
        second(**given)
    with pytest.raises(ValueError, match="text_encoder=None: pass prompt_embeds"):
        second("a", output_type="latent")


def test_a_unet_and_a_slim_side_are_joined_where_a_pipeline_is_built(checkpoint: Checkpoint, tmp_path: Path) -> None:
    _, base = checkpoint("StableDiffusionPipeline")
    sizes = dict(block_out_channels=(32, 32), norm_num_groups=32, layers_per_block=2)  # the reference joins such alone faithfully
    parts = {"unet": tiny.unet(**sizes)}
    parts["controlnet"] = diffusers.ControlNetXSAdapter.from_unet(parts["unet"], 0.5, conditioning_embedding_out_channels=(8, 16))
    for name, parameter in parts["controlnet"].named_parameters():
        if "base" in name or "cond_embedding" in name:
            torch.nn.init.normal_(parameter, std=0.1)
    for name, network in parts.items():
        network.save_pretrained(tmp_path / name)
    shared = {name: part for name, part in base.components.items() if name != "image_encoder"}
    reference = diffusers.StableDiffusionControlNetXSPipeline(**{**shared, **parts}, requires_safety_checker=False)
    reference.set_progress_bar_config(disable=True)
    unet = sfumato.UNet2DConditionModel.from_pretrained(tmp_path / "unet")
    slim = sfumato.ControlNetXSAdapter.from_pretrained(tmp_path / "controlnet")
    plain = ours(checkpoint("StableDiffusionPipeline")[0], base)
    pipe = sfumato.StableDiffusionControlNetXSPipeline.from_pipe(plain, unet=unet, controlnet=slim)
    pipe.set_progress_bar_config(disable=True)
    assert_same(reference, pipe, **CALLS["StableDiffusionControlNetXSPipeline"])
    assert sfumato.StableDiffusionControlNetXSImg2ImgPipeline.from_pipe(pipe).unet is pipe.unet
    scales = [{"controlnet_conditioning_scale": scale} for scale in (0.5, torch.tensor(0.5))]
    pictures = [pipe(**{**CALLS["StableDiffusionControlNetXSPipeline"], **scale}, generator=seeded(0)).images for scale in scales]
    assert np.array_equal(*pictures)
    with pytest.raises(TypeError, match="controlnet is a UNet2DConditionModel: expected a ControlNetXSAdapter"):
        type(pipe).from_pipe(plain, controlnet=unet)
