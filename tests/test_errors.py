"""Bad arguments of a call: an error of the right type that names the argument, the value and the remedy, before any work."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import tiny
import torch

import sfumato

Checkpoint = Callable[[str], tuple[Path, Any]]
NAN = float("nan")


@pytest.fixture(scope="module")
def pipes(checkpoint: Checkpoint) -> dict[str, Any]:
    folder, _ = checkpoint("StableDiffusionPipeline")
    text = sfumato.StableDiffusionPipeline.from_pretrained(folder)
    made = {
        "text": text,
        "image": sfumato.StableDiffusionImg2ImgPipeline.from_pipe(text),
        "inpaint": sfumato.StableDiffusionInpaintPipeline.from_pipe(text),
    }
    made |= {name: sfumato.DiffusionPipeline.from_pretrained(checkpoint(name)[0]) for name in ("DDPMPipeline",)}
    for pipe in made.values():
        pipe.set_progress_bar_config(disable=True)
    return made


def embeds(fill: float = 0.0, shape: tuple[int, ...] = (1, 77, 32)) -> torch.Tensor:
    return torch.full(shape, fill)


def seeded(count: int) -> list[torch.Generator]:
    return [torch.Generator().manual_seed(k) for k in range(count)]


PICTURE = {"image": tiny.picture()}
PAINT = {**PICTURE, "mask_image": tiny.mask()}
CASES: list[tuple[str, dict[str, Any], type[Exception], str]] = [
    ("text", {"promt": "a"}, TypeError, r"StableDiffusionPipeline takes no argument 'promt'; did you mean 'prompt'"),
    ("text", {"prompt": "a", "numb_inference_steps": 2}, TypeError, r"did you mean 'num_inference_steps'"),
    ("text", {"height": 36}, ValueError, r"height=36 must be a positive multiple of 8"),
    ("text", {"width": 0}, ValueError, r"width=0 must be a whole number of at least 1"),
    ("text", {"width": 32.0}, ValueError, r"width=32\.0 must be"),
    ("text", {"prompt": []}, ValueError, r"prompt=\[\] must be a text or a list of texts"),
    ("text", {"prompt": 5}, ValueError, r"prompt=5 must be a text or a list of texts"),
    ("text", {"prompt": ["a", 5]}, ValueError, r"prompt=.* must be a text or a list of texts"),
    ("text", {"negative_prompt": 5}, ValueError, r"negative_prompt=5 must be a text or a list of texts"),
    ("text", {"prompt": ["a", "b"], "negative_prompt": ["c"]}, ValueError, r"negative_prompt has 1 texts for 2 prompts: pass"),
    ("text", {"generator": seeded(2)}, ValueError, r"2 generators for 1 pictures: pass one, or one per picture"),
    ("text", {"generator": 7}, TypeError, r"generator=7 must be torch\.Generator\(\)\.manual_seed"),
    ("text", {"latents": torch.zeros(1, 4, 8, 8)}, ValueError, r"latents have shape \(1, 4, 8, 8\), expected .*\(1, 4, 16, 16\)"),
    ("text", {"latents": np.zeros((1, 4, 16, 16))}, ValueError, r"latents=a ndarray .* must be a tensor"),
    ("text", {"latents": torch.full((1, 4, 16, 16), NAN)}, ValueError, r"latents=.* must be a tensor without NaN"),
    ("text", {"prompt": None}, ValueError, r"neither of prompt and prompt_embeds given: pass exactly one"),
    ("text", {"prompt_embeds": embeds()}, ValueError, r"both prompt and prompt_embeds are given: pass one"),
    ("text", {"prompt": None, "prompt_embeds": embeds(NAN)}, ValueError, r"prompt_embeds=.* without NaN, from float32 or bfloat16"),
    ("text", {"negative_prompt_embeds": embeds(float("inf"))}, ValueError, r"negative_prompt_embeds=.* without NaN"),
    ("text", {"prompt": None, "prompt_embeds": embeds(shape=(77, 32))}, ValueError, r"has shape .77, 32., expected .B, N, D."),
    ("text", {"prompt": None, "prompt_embeds": [1.0]}, ValueError, r"prompt_embeds=\[1.0\] must be a tensor"),
    ("text", {"negative_prompt": "a", "negative_prompt_embeds": embeds()}, ValueError, r"both negative_prompt and"),
    (
        "text",
        {"prompt": None, "prompt_embeds": embeds(), "negative_prompt_embeds": embeds(shape=(1, 70, 32))},
        ValueError,
        r"prompt_embeds \(1, 77, 32\) and negative_prompt_embeds \(1, 70, 32\) differ",
    ),
    ("text", {"output_type": "jpg"}, ValueError, r"output_type='jpg' must be 'pil', 'np', 'pt' or 'latent'"),
    ("text", {"num_inference_steps": 0}, ValueError, r"num_inference_steps=0 must be a whole number of at least 1"),
    ("text", {"num_inference_steps": 2.5}, ValueError, r"num_inference_steps=2\.5 must be a whole number"),
    ("text", {"num_inference_steps": 2000}, ValueError, r"num_inference_steps=2000.*1000"),
    ("text", {"num_images_per_prompt": 0}, ValueError, r"num_images_per_prompt=0 must be"),
    ("text", {"guidance_scale": "7"}, ValueError, r"guidance_scale='7' must be a finite number"),
    ("text", {"guidance_scale": NAN}, ValueError, r"guidance_scale=nan must be a finite number"),
    ("text", {"guidance_rescale": None}, ValueError, r"guidance_rescale=None must be a finite number"),
    ("text", {"guidance_rescale": 1.5}, ValueError, r"guidance_rescale=1\.5 must be a finite number in 0\.\.1"),
    ("text", {"prompt": None, "prompt_embeds": embeds(shape=(1, 77, 31))}, ValueError, r"prompt_embeds is 31 wide, .* reads 32"),
    ("text", {"negative_prompt_embeds": embeds(shape=(1, 77, 9))}, ValueError, r"negative_prompt_embeds is 9 wide, .* reads 32"),
    ("text", {"timesteps": [5, 1]}, ValueError, r"DDIMScheduler takes no custom timesteps; .*EulerDiscreteScheduler"),
    ("text", {"timesteps": [5], "sigmas": [1.0]}, ValueError, r"timesteps and sigmas are both given: pass one"),
    ("text", {"callback_on_step_end_tensor_inputs": ["x"]}, ValueError, r"tensor_inputs has 'x'; .*offers latents, prompt_embeds"),
    ("text", {"callback_steps": 0}, ValueError, r"callback_steps=0 must be a whole number of at least 1"),
    ("text", {"clip_skip": 99}, ValueError, r"clip_skip=99 must lie in 0\.\.3"),
    ("text", {"clip_skip": -1}, ValueError, r"clip_skip=-1 must be a whole number of at least 0"),
    ("text", {"prompt_syntax": "odd"}, ValueError, r"prompt_syntax='odd' must be one of \('plain', 'weighted'\)"),
    ("text", {"ip_adapter_image": tiny.picture()}, ValueError, r"ip_adapter_image is given, but no IP-Adapter is loaded"),
    ("text", {"cross_attention_kwargs": {"scale": 0.5}}, ValueError, r"kwargs takes ip_adapter_masks alone: leave out 'scale'"),
    ("text", {"eta": 5}, ValueError, r"eta=5 .*choose a value in 0\.\.1"),
    ("text", {"callback": "x"}, TypeError, r"callback='x' must be a function"),
    ("text", {"callback_on_step_end": 5}, TypeError, r"callback_on_step_end=5 must be a function"),
    ("text", {"callback_steps": 1.5}, ValueError, r"callback_steps=1\.5 must be a whole number"),
    ("text", {"return_dict": "no"}, ValueError, r"return_dict='no' must be True or False"),
    ("text", {"clip_skip": 1.5}, ValueError, r"clip_skip=1\.5 must be a whole number"),
    ("text", {"cross_attention_kwargs": [1]}, TypeError, r"cross_attention_kwargs=\[1\] must be a dictionary"),
    ("text", {"negative_prompt_embeds": embeds(shape=(0, 77, 32))}, ValueError, r"negative_prompt_embeds has shape \(0, 77, 32\)"),
    ("text", {"negative_prompt_embeds": embeds(shape=(5, 77, 32))}, ValueError, r"one row for each of 1 prompts"),
    ("text", {"prompt": None, "prompt_embeds": embeds(shape=(0, 77, 32))}, ValueError, r"prompt_embeds has shape \(0, 77, 32\)"),
    ("text", {"timesteps": [1, 5]}, ValueError, r"timesteps=\[1, 5\] must be numbers from high to 0"),
    ("text", {"timesteps": []}, ValueError, r"timesteps=\[\] must be numbers"),
    ("text", {"sigmas": [NAN]}, ValueError, r"sigmas=\[nan\] must be numbers"),
    ("image", {}, ValueError, r"image=None: this pipeline starts from a picture; pass one"),
    ("image", {**PICTURE, "strength": 1.5}, ValueError, r"strength=1\.5 must be a finite number in 0\.\.1"),
    ("image", {**PICTURE, "strength": "x"}, ValueError, r"strength='x' must be a finite number in 0\.\.1"),
    ("image", {**PICTURE, "strength": 0.1}, ValueError, r"strength=0\.1 leaves none of 2 steps to make: raise strength to 0\.5"),
    ("image", {**PICTURE, "strength": 0}, ValueError, r"strength=0 leaves none of 2 steps"),
    ("image", {**PICTURE, "mask_image": 32}, TypeError, r"StableDiffusionImg2ImgPipeline takes no argument 'mask_image'"),
    ("image", {"image": 5}, TypeError, r"image=5 must be PIL pictures"),
    ("image", {"image": []}, TypeError, r"image=\[\] must be PIL pictures"),
    ("image", {"image": torch.zeros(0, 3, 32, 32)}, TypeError, r"image=a Tensor of shape \(0, 3, 32, 32\) must be PIL"),
    ("image", {"image": "picture.png"}, TypeError, r"image='picture.png' must be .*load_image"),
    ("image", {"image": torch.full((1, 3, 32, 32), NAN)}, ValueError, r"NaN"),
    ("image", {"prompt": ["a", "b"], "image": [tiny.picture()] * 3}, ValueError, r"3 image\(s\) cannot be shared out evenly"),
    ("inpaint", PICTURE, ValueError, r"mask_image=None: inpainting needs a picture and a mask"),
    ("inpaint", {"mask_image": tiny.mask()}, ValueError, r"image=None: inpainting needs"),
    ("inpaint", {**PAINT, "padding_mask_crop": 4}, ValueError, r"output_type='np' must be 'pil'"),
    ("inpaint", {**PICTURE, "mask_image": [tiny.mask()] * 3}, ValueError, r"3 mask\(s\) cannot be shared out evenly"),
    ("inpaint", {**PAINT, "padding_mask_crop": -4}, ValueError, r"padding_mask_crop=-4 must be a whole number of at least 0"),
    ("inpaint", {**PAINT, "masked_image_latents": [1]}, ValueError, r"masked_image_latents=\[1\] must be a tensor"),
    ("inpaint", {**PICTURE, "mask_image": 5}, TypeError, r"mask_image=5 must be PIL pictures"),
    ("DDPMPipeline", {"prompt": "a"}, TypeError, r"DDPMPipeline takes no argument 'prompt'"),
    ("DDPMPipeline", {"batch_size": 0}, ValueError, r"batch_size=0 must be a whole number of at least 1"),
]  # fmt: skip


@pytest.mark.parametrize(("kind", "arguments", "error", "message"), CASES)
def test_bad_arguments_are_refused(
    pipes: dict[str, Any],
    kind: str,
    arguments: dict[str, Any],
    error: type[Exception],
    message: str,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    pipe = pipes[kind]
    monkeypatch.setattr(type(pipe), "predict", lambda *a: pytest.fail("the denoiser ran before the error"))
    call = {"num_inference_steps": 2, "output_type": "np", **({"prompt": "a"} if kind != "DDPMPipeline" else {}), **arguments}
    if call.get("eta"):
        monkeypatch.undo()  # the scheduler judges eta, at its first step
    with pytest.raises(error, match=message):
        pipe(**call)


def test_numbers_of_numpy_and_torch_are_numbers(pipes: dict[str, Any]) -> None:
    call = {"prompt": "a", "image": tiny.picture(), "output_type": "np", "height": 32, "strength": 0.5, "guidance_scale": 3.0}
    call |= {"num_inference_steps": 4, "num_images_per_prompt": 2, "clip_skip": 1, "eta": 0.5}
    numbers = {k: v for k, v in call.items() if isinstance(v, (int, float))}
    expected = pipes["image"](**call, generator=seeded(1)[0]).images
    for convert in (np.asarray, torch.tensor, lambda v: np.asarray(v)[()]):
        got = pipes["image"](**{**call, **{k: convert(v) for k, v in numbers.items()}}, generator=seeded(1)[0]).images
        assert np.array_equal(got, expected)


def test_a_second_prompt_beside_embeddings_or_of_another_count_is_refused(checkpoint: Checkpoint) -> None:
    pipe = sfumato.StableDiffusionXLPipeline.from_pretrained(checkpoint("StableDiffusionXLPipeline")[0])
    encoded = {"prompt_embeds": embeds(shape=(1, 77, 64)), "pooled_prompt_embeds": torch.zeros(1, 32)}
    wrong: list[tuple[dict[str, Any], str]] = [
        ({"prompt_2": "b", **encoded}, "both prompt_2 and prompt_embeds are given: pass one"),
        ({"prompt": "a", "prompt_2": ["b", "c"]}, "prompt_2 has 2 texts for 1 prompts"),
        ({"prompt": "a", "negative_prompt_2": 5}, "negative_prompt_2=5 must be a text"),
        ({"prompt": "a", "original_size": 5}, "original_size=5 must be two numbers"),
        ({"prompt": "a", "target_size": (NAN, 32)}, r"target_size=\(nan, 32\) must be two numbers"),
        ({"prompt": "a", "timesteps": [1e6]}, "timesteps=1000000.0 must be a finite number in 0..1000"),
    ]
    for call, message in wrong:
        with pytest.raises(ValueError, match=message):
            pipe(**call)


def test_what_cannot_process_attention_is_refused(pipes: dict[str, Any]) -> None:
    with pytest.raises(TypeError, match="processor='x' must be callable"):
        pipes["text"].unet.set_attn_processor("x")


def test_nan_decoded_picture_names_the_vae(checkpoint: Checkpoint) -> None:
    folder, _ = checkpoint("StableDiffusionPipeline")
    pipe = sfumato.StableDiffusionPipeline.from_pretrained(folder)
    pipe.set_progress_bar_config(disable=True)
    with torch.no_grad():
        pipe.vae.decoder.conv_out.weight.fill_(NAN)
    with pytest.raises(FloatingPointError, match=r"the VAE produced NaN .*float32 or bfloat16"):
        pipe("a", num_inference_steps=1)


@pytest.mark.parametrize("output_type", ["pil", "latent"])
def test_nan_latents_name_the_denoiser(checkpoint: Checkpoint, output_type: str) -> None:
    folder, _ = checkpoint("StableDiffusionPipeline")
    pipe = sfumato.StableDiffusionPipeline.from_pretrained(folder)
    pipe.set_progress_bar_config(disable=True)
    with torch.no_grad():
        pipe.unet.conv_out.weight.fill_(NAN)
    with pytest.raises(FloatingPointError, match=r"the denoiser made NaN .*float32 or bfloat16"):
        pipe("a", num_inference_steps=1, output_type=output_type)


def test_wrong_attribute_of_a_configuration_says_what_is_near(pipes: dict[str, Any]) -> None:
    with pytest.raises(AttributeError, match=r"no key 'in_chanels'; did you mean 'in_channels'"):
        _ = pipes["text"].unet.config.in_chanels


def test_constructor_names_the_argument(pipes: dict[str, Any]) -> None:
    parts = pipes["text"].components
    with pytest.raises(TypeError, match=r"no argument 'unett'; did you mean 'unet'"):
        sfumato.StableDiffusionPipeline(**parts, unett=None)
    with pytest.raises(TypeError, match=r"lacks the component\(s\) unet"):
        sfumato.StableDiffusionPipeline(**{k: v for k, v in parts.items() if k != "unet"})
    with pytest.raises(TypeError, match=r"takes 9 arguments"):
        sfumato.StableDiffusionPipeline(*range(10))
    with pytest.raises(TypeError, match=r"got 'vae' twice"):
        sfumato.StableDiffusionPipeline(*list(parts.values())[:7], vae=parts["vae"])
    with pytest.raises(ValueError, match=r"safety_checker needs its feature_extractor: pass both, or safety_checker=None"):
        sfumato.StableDiffusionPipeline(**{**parts, "safety_checker": torch.nn.Identity()})
    wrong: list[tuple[str, Any, str]] = [
        ("vae", "x", r"vae is 'x', expected an autoencoder: load it by"),
        ("vae", parts["unet"], "vae is a UNet2DConditionModel, expected an autoencoder"),
        ("unet", parts["vae"], "unet is a AutoencoderKL, expected a denoiser"),
        ("unet", parts["scheduler"], "unet is a DDIMScheduler, expected a denoiser"),
        ("unet", sfumato.UNet2DConditionModel, r"unet is <class .*UNet2DConditionModel'>, expected a denoiser"),
        ("scheduler", "EulerDiscreteScheduler", "scheduler is 'EulerDiscreteScheduler', expected a scheduler of this library"),
        ("text_encoder", parts["tokenizer"], "text_encoder is a CLIPTokenizer.*, expected a network"),
        ("tokenizer", parts["text_encoder"], "tokenizer is a CLIPTextModel, expected a tokenizer"),
    ]
    for name, component, message in wrong:
        with pytest.raises(TypeError, match=message):
            sfumato.StableDiffusionPipeline(**{**parts, name: component})
    with pytest.raises(ValueError, match=r"4 or 9 input channels, this one has 3"):
        changed = sfumato.UNet2DConditionModel.from_config(parts["unet"].config, in_channels=3)
        sfumato.StableDiffusionInpaintPipeline(**{**parts, "unet": changed})


def test_every_error_is_also_the_built_in_type() -> None:
    assert issubclass(sfumato.ConfigError, ValueError)
    assert issubclass(sfumato.WeightsError, OSError)
    assert issubclass(sfumato.HubError, OSError)
    assert all(issubclass(e, sfumato.SfumatoError) for e in (sfumato.ConfigError, sfumato.WeightsError, sfumato.HubError))


@pytest.mark.parametrize("scheduler", [sfumato.FlowMatchEulerDiscreteScheduler(shift=3.0), sfumato.EulerDiscreteScheduler()])
def test_latent_upscaler_refuses_flow_schedulers(checkpoint: Checkpoint, scheduler: Any) -> None:
    pipe = sfumato.DiffusionPipeline.from_pretrained(checkpoint("StableDiffusionLatentUpscalePipeline")[0])
    pipe.scheduler = type(scheduler).from_config({**scheduler.config, "shift": 3.0})
    with pytest.raises(ValueError, match=f"scheduler={type(scheduler).__name__} is set up for a flow model"):
        pipe(prompt="a", image=tiny.picture(), num_inference_steps=2)


def test_networks_of_masks_and_others_are_told_apart(checkpoint: Checkpoint) -> None:
    folder, _ = checkpoint("StableDiffusion3ControlNetInpaintingPipeline")
    pipe = sfumato.StableDiffusion3ControlNetInpaintingPipeline.from_pretrained(folder)
    call = {"prompt": "a", "num_inference_steps": 2, "height": 32, "width": 32, "control_image": tiny.picture()}
    with pytest.raises(ValueError, match="control_mask=None: pass a mask of the region of control_image"):
        pipe(**call)
    other = sfumato.StableDiffusion3ControlNetPipeline.from_pretrained(checkpoint("StableDiffusion3ControlNetPipeline")[0])
    with pytest.raises(ValueError, match="extra_conditioning_channels=0, not 1 for a mask: use StableDiffusion3ControlNetPipeline"):
        type(pipe).from_pipe(pipe, controlnet=other.controlnet)(**call, control_mask=tiny.mask())
