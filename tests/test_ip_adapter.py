"""IP-Adapters: pictures as prompts, against the reference; loading and unloading; scales, masks, errors."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import tiny
import torch
from diffusers.image_processor import IPAdapterMaskProcessor as ReferenceMasks
from safetensors.torch import save_file
from test_pipelines import CALLS, ours, seeded

import sfumato
from sfumato.models.layers.options import AttentionOptions

Checkpoint = Callable[[str], tuple[Path, Any]]
KINDS = ("plain", "plus", "full", "faceid")
PATCH_WIDTH, POOLED_WIDTH, IDENTITY_WIDTH = 16, 32, 12  # of tiny.image_encoder, and of a face's identity


def norm(name: str, width: int, g: torch.Generator) -> dict[str, torch.Tensor]:
    return {f"{name}.weight": 1 + 0.1 * torch.randn(width, generator=g), f"{name}.bias": 0.1 * torch.randn(width, generator=g)}


def linear(name: str, out: int, width: int, g: torch.Generator, bias: bool = True) -> dict[str, torch.Tensor]:
    weight = {f"{name}.weight": torch.randn(out, width, generator=g) / width**0.5}
    return {**weight, **({f"{name}.bias": 0.1 * torch.randn(out, generator=g)} if bias else {})}


def resampler(width: int, out: int, g: torch.Generator, depth: int = 4) -> dict[str, torch.Tensor]:
    found = {**linear("proj_in", width, PATCH_WIDTH, g), **linear("proj_out", out, width, g), **norm("norm_out", out, g)}
    for i in range(depth):
        found |= {**norm(f"layers.{i}.0.norm1", width, g), **norm(f"layers.{i}.0.norm2", width, g)}
        found |= {**linear(f"layers.{i}.0.to_q", 64, width, g, False), **linear(f"layers.{i}.0.to_kv", 128, width, g, False)}
        found |= {**linear(f"layers.{i}.0.to_out", width, 64, g, False), **norm(f"layers.{i}.1.0", width, g)}
        found |= {**linear(f"layers.{i}.1.1", 4 * width, width, g, False), **linear(f"layers.{i}.1.3", width, 4 * width, g, False)}
    return found


def projection(kind: str, dim: int, g: torch.Generator) -> dict[str, torch.Tensor]:
    """The ``image_proj`` part of a file, in the names of the original checkpoints."""
    identity = {**linear("proj.0", 24, IDENTITY_WIDTH, g), **linear("proj.2", 4 * dim, 24, g), **norm("norm", dim, g)}
    if kind == "plain":
        return {**linear("proj", 4 * dim, POOLED_WIDTH, g), **norm("norm", dim, g)}
    if kind == "full":
        return {**linear("proj.0", PATCH_WIDTH, PATCH_WIDTH, g), **linear("proj.2", dim, PATCH_WIDTH, g), **norm("proj.3", dim, g)}
    if kind == "plus":
        return {"latents": torch.randn(1, 4, 24, generator=g), **resampler(24, dim, g)}
    if kind == "timed":
        found = {"latents": torch.randn(1, 4, 24, generator=g), **resampler(24, dim, g)}
        for i in range(4):
            found |= linear(f"layers.{i}.2.1", 96, 24, g)
        return {**found, **linear("time_embedding.linear_1", 24, 320, g), **linear("time_embedding.linear_2", 24, 24, g)}
    if kind == "faceid":
        return identity
    return {**identity, **{f"perceiver_resampler.{k}": v for k, v in resampler(dim, dim, g).items()}}


def adapter_file(unet: Any, kind: str = "plain", seed: int = 0) -> dict[str, dict[str, torch.Tensor]]:
    """An IP-Adapter for a tiny U-Net or transformer of the reference; Stable Diffusion 3 has one kind alone."""
    g = torch.Generator().manual_seed(seed)
    if "SD3" in type(unet).__name__:
        kind = "timed"
        dim, layers = unet.inner_dim, {}
        for i in range(len(unet.attn_processors)):
            layers |= {**linear(f"{i}.norm_ip.linear", 2 * dim, 24, g), **linear(f"{i}.to_k_ip", dim, dim, g, False)}
            layers |= linear(f"{i}.to_v_ip", dim, dim, g, False)
            for name in ("norm_q", "norm_k", "norm_ip_k"):
                layers[f"{i}.{name}.weight"] = 1 + 0.2 * torch.randn(unet.config.attention_head_dim, generator=g)
        return {"image_proj": projection(kind, dim, g), "ip_adapter": layers}
    if "single_transformer_blocks" in dict(unet.named_children()):
        dim = unet.config.joint_attention_dim
        names = [f"{i}.to_{x}_ip" for i in range(unet.config.num_layers) for x in "kv"]
        layers = {key: tensor for name in names for key, tensor in linear(name, unet.inner_dim, dim, g).items()}
        return {"image_proj": projection(kind, dim, g), "ip_adapter": layers}
    dim = unet.config.cross_attention_dim
    layers = {}
    modules = dict(unet.named_modules())
    numbered = sorted((n for n in unet.attn_processors if "ctrl_" not in n), key=lambda n: n.startswith("mid"))  # the U-Net's own
    for i, name in enumerate(numbered):
        if name.endswith("attn2.processor"):
            width = modules[name.removesuffix(".processor")].to_q.out_features
            layers |= {**linear(f"{i}.to_k_ip", width, dim, g, False), **linear(f"{i}.to_v_ip", width, dim, g, False)}
    return {"image_proj": projection(kind, dim, g), "ip_adapter": layers}


def pair(checkpoint: Checkpoint, name: str, *kinds: str, scale: Any = None) -> tuple[Any, Any]:
    """The reference's pipeline and ours with the same IP-Adapters."""
    folder, base = checkpoint(name)
    third = "StableDiffusion3" in name
    encoder, processor = tiny.siglip() if third else (tiny.image_encoder(), tiny.image_processor())
    parts = {**base.components, "image_encoder": encoder, "feature_extractor": processor}
    options = {k: v for k, v in base.config.items() if k in ("requires_aesthetics_score", "requires_safety_checker")}
    denoiser = "unet" if "unet" in parts else "transformer"
    parts[denoiser] = type(parts[denoiser]).from_pretrained(folder, subfolder=denoiser)  # the checkpoint's is shared between tests
    reference = type(base)(**parts, **options)
    reference.set_progress_bar_config(disable=True)
    pipe = ours(folder, base)
    pipe.image_encoder, pipe.feature_extractor = encoder, processor
    if kinds:
        files = [adapter_file(parts[denoiser], kind, seed) for seed, kind in enumerate(kinds)]
        if third:  # where the reference takes one alone
            reference.load_ip_adapter(files[0])
            pipe.load_ip_adapter(files[0])
        else:
            names: dict[str, Any] = {"subfolder": [""] * len(files), "weight_name": [""] * len(files)}
            encoder_name = {"image_encoder_pretrained_model_name_or_path": None} if denoiser == "transformer" else {}
            reference.load_ip_adapter(files, **names, **encoder_name)
            pipe.load_ip_adapter(files, **names)
    if scale is not None:
        reference.set_ip_adapter_scale(scale)
        pipe.set_ip_adapter_scale(scale)
    return reference, pipe


def assert_same(reference: Any, pipe: Any, **call: Any) -> np.ndarray:
    with torch.no_grad():
        expected = reference(**call, generator=seeded(3)).images
    got = pipe(**call, generator=seeded(3)).images
    np.testing.assert_allclose(got, expected, atol=1e-4)
    return got


def call_of(name: str, kind: str = "plain", guidance: float = 4.0, **more: Any) -> dict[str, Any]:
    call = {**CALLS[name], "num_inference_steps": 3, "guidance_scale": guidance, **more}
    if kind.startswith("faceid"):
        rows = 2 if guidance > 1 else 1
        identity = torch.randn(rows, 1, IDENTITY_WIDTH, generator=torch.Generator().manual_seed(5))
        return {**call, "ip_adapter_image_embeds": [identity]}
    return {"ip_adapter_image": tiny.picture(4), **call}


TEXT, XL, FLUX, THIRD = "StableDiffusionPipeline", "StableDiffusionXLPipeline", "FluxPipeline", "StableDiffusion3Pipeline"


@pytest.mark.parametrize("guidance", [4.0, 1.0], ids=["guided", "unguided"])
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("name", [TEXT, XL])
def test_each_kind(checkpoint: Checkpoint, name: str, kind: str, guidance: float) -> None:
    reference, pipe = pair(checkpoint, name, kind, scale=0.7)
    got = assert_same(reference, pipe, **call_of(name, kind, guidance))
    pipe.unload_ip_adapter()
    without = pipe(**{k: v for k, v in call_of(name, kind, guidance).items() if "ip_adapter" not in k}, generator=seeded(3)).images
    assert np.abs(got - without).max() > 1e-3


@pytest.mark.parametrize("shortcut", [False, True])
def test_face_identity_with_its_picture(checkpoint: Checkpoint, shortcut: bool) -> None:
    reference, pipe = pair(checkpoint, TEXT, "faceid plus")
    patches = torch.randn(2, 1, 17, PATCH_WIDTH, generator=torch.Generator().manual_seed(0))
    call = call_of(TEXT, "faceid plus")
    with pytest.raises(ValueError, match="needs the face's picture"):
        pipe(**call)
    for each in (reference, pipe):
        layer = each.unet.encoder_hid_proj.image_projection_layers[0]
        layer.clip_embeds, layer.shortcut = patches, shortcut
    got = assert_same(reference, pipe, **call)
    layer.clip_embeds = None  # of ours; a call can bring them
    with torch.no_grad():
        expected = reference.prepare_ip_adapter_image_embeds([tiny.picture(4)], None, "cpu", 1, True)
    torch.testing.assert_close(pipe.prepare_ip_adapter_image_embeds(tiny.picture(4), None, None, 1, True), expected)
    (identity,) = call["ip_adapter_image_embeds"]
    call["ip_adapter_image_embeds"] = [(identity, patches)]
    assert np.array_equal(pipe(**call, generator=seeded(3)).images, got)


STEERED = [
    "StableDiffusionControlNetPipeline", "StableDiffusionXLInpaintPipeline", "StableDiffusionInstructPix2PixPipeline",
    "FluxControlNetPipeline", "StableDiffusion3ControlNetPipeline", "StableDiffusion3InpaintPipeline",
]  # fmt: skip


@pytest.mark.parametrize("name", STEERED)
def test_in_other_tasks(checkpoint: Checkpoint, name: str) -> None:
    """The same as the reference in some; the matrix walks all."""
    assert_same(*pair(checkpoint, name, "plain"), **call_of(name))


@pytest.mark.parametrize("name", [TEXT, XL])
def test_several_adapters_and_pictures(checkpoint: Checkpoint, name: str) -> None:
    call = call_of(name, num_images_per_prompt=2)
    call["ip_adapter_image"] = [[tiny.picture(4), tiny.picture(5)], tiny.picture(6)]
    assert_same(*pair(checkpoint, name, "plain", "plus", scale=[0.5, 0.8]), **call)


def test_embeddings_instead_of_pictures(checkpoint: Checkpoint) -> None:
    reference, pipe = pair(checkpoint, TEXT, "plain", "plus")
    pictures = [tiny.picture(4), [tiny.picture(5), tiny.picture(6)]]
    with torch.no_grad():
        for count in (1, 2):
            expected = reference.prepare_ip_adapter_image_embeds(pictures, None, "cpu", count, True)
            embeds = pipe.prepare_ip_adapter_image_embeds(pictures, None, None, count, True)
            for mine, theirs in zip(embeds, expected, strict=True):
                torch.testing.assert_close(mine, theirs, atol=1e-5, rtol=1e-5)
        embeds = pipe.prepare_ip_adapter_image_embeds(pictures, None, None, 1, True)
    call = {k: v for k, v in call_of(TEXT).items() if k != "ip_adapter_image"}
    got = assert_same(reference, pipe, **call, ip_adapter_image_embeds=embeds)
    assert np.array_equal(got, pipe(**call, ip_adapter_image=pictures, generator=seeded(3)).images)


def test_prompts_share_a_picture(checkpoint: Checkpoint) -> None:
    call = call_of(TEXT, prompt=["a red cat", "blue apple"], negative_prompt=["blue", "cat"], num_images_per_prompt=2)
    assert_same(*pair(checkpoint, TEXT, "plain"), **call)


def test_a_picture_for_each_prompt(checkpoint: Checkpoint) -> None:
    """Each prompt's picture is the one that it makes alone."""
    _, pipe = pair(checkpoint, TEXT, "plain")
    call = {k: v for k, v in call_of(TEXT).items() if "prompt" not in k}
    embeds = [pipe.prepare_ip_adapter_image_embeds(tiny.picture(k), None, None, 1, True)[0] for k in (4, 5)]
    joined = torch.cat([torch.cat(rows) for rows in zip(*(e.split(1) for e in embeds), strict=True)])
    del call["ip_adapter_image"]
    both = pipe(prompt=["a", "red"], **call, ip_adapter_image_embeds=[joined], generator=seeded([1, 2])).images
    for i, prompt in enumerate(("a", "red")):
        alone = pipe(prompt=prompt, **call, ip_adapter_image_embeds=[embeds[i]], generator=seeded([i + 1])).images
        np.testing.assert_allclose(both[i : i + 1], alone, atol=1e-5)


SCALES = [0.3, {"up": {"block_1": [0.0, 1.0]}}, {"down": 0.3, "mid": 0.4}, {"down": {"block_0": [0.7]}, "mid": [0.5]}, {}]


@pytest.mark.parametrize("scale", SCALES, ids=str)
def test_scales(checkpoint: Checkpoint, scale: Any) -> None:
    assert_same(*pair(checkpoint, TEXT, "plain", scale=scale), **call_of(TEXT))


def test_scales_of_blocks_by_depth(checkpoint: Checkpoint) -> None:
    """Where blocks hold several transformers of several layers, and for each IP-Adapter its own."""
    scale = [{"up": {"block_1": [0.2, 0.9]}, "down": 0.4}, 0.6]
    call = call_of(XL, ip_adapter_image=[tiny.picture(4), tiny.picture(5)])
    assert_same(*pair(checkpoint, XL, "plain", "full", scale=scale), **call)


@pytest.mark.parametrize(
    "scale", [[0.8, 0.5], [[0.9, 0.2], 0.5], [{"up": {"block_1": [[0.9, 0.1], [0.3, 0.6]]}}, {"mid": 1.0}]], ids=str
)
@pytest.mark.parametrize("name", [TEXT, XL])
def test_masks(checkpoint: Checkpoint, name: str, scale: Any) -> None:
    left = np.zeros((32, 32), dtype=np.uint8)
    left[:, :13] = 255
    pictures = [tiny.Image.fromarray(left), tiny.Image.fromarray(255 - left), tiny.mask()]
    masks = ReferenceMasks().preprocess(pictures, height=32, width=32)  # (3, 1, 32, 32)
    torch.testing.assert_close(sfumato.IPAdapterMaskProcessor().preprocess(pictures, height=32, width=32), masks)
    given = [masks[:2].reshape(1, 2, 32, 32), masks[2:]]
    call = call_of(name, ip_adapter_image=[[tiny.picture(4), tiny.picture(5)], tiny.picture(6)])
    call["cross_attention_kwargs"] = {"ip_adapter_masks": given}
    assert_same(*pair(checkpoint, name, "plain", "plus", scale=scale), **call)


def test_masks_keep_the_proportions_of_a_picture(checkpoint: Checkpoint) -> None:
    """The reference guesses the size of a layer from its area; here it is known."""
    mask = ReferenceMasks().preprocess([tiny.mask((48, 32))], height=32, width=48)
    call = call_of(TEXT, height=32, width=48, cross_attention_kwargs={"ip_adapter_masks": [mask]})
    assert_same(*pair(checkpoint, TEXT, "plain"), **call)


# --- what loading changes -----------------------------------------------------------------------------------------------


def test_unloading_restores_the_network(checkpoint: Checkpoint) -> None:
    _, pipe = pair(checkpoint, TEXT)
    before, call = dict(pipe.unet.named_parameters()), CALLS[TEXT]
    plain = pipe(**call, generator=seeded(1)).images
    file = adapter_file(checkpoint(TEXT)[1].unet)
    g = torch.Generator().manual_seed(0)
    for number, kind, out in ((0, "to_q", 16), (1, "to_v", 16), (1, "to_out", 16)):
        width = 32 if (number, kind) == (1, "to_v") else 16
        file["ip_adapter"][f"{number}.{kind}_lora.down.weight"] = torch.randn(2, width, generator=g)
        file["ip_adapter"][f"{number}.{kind}_lora.up.weight"] = torch.randn(out, 2, generator=g)
    for _ in range(2):  # the second time in place of the first
        pipe.load_ip_adapter(file)
    block = pipe.unet.down_blocks[0].attentions[0].transformer_blocks[0]
    down, up = (file["ip_adapter"][f"1.to_out_lora.{x}.weight"] for x in ("down", "up"))
    owned = before["down_blocks.0.attentions.0.transformer_blocks.0.attn2.to_out.0.weight"]
    torch.testing.assert_close(block.attn2.to_out[0].weight, owned + up @ down)
    assert not np.array_equal(plain, pipe(**call_of(TEXT), generator=seeded(1)).images)
    pipe.unload_ip_adapter()
    after = dict(pipe.unet.named_parameters())
    assert after.keys() == before.keys() and all(after[k] is before[k] for k in before)
    assert np.array_equal(plain, pipe(**call, generator=seeded(1)).images)
    pipe.unload_ip_adapter()  # nothing is left to do


def test_scale_zero_is_no_adapter(checkpoint: Checkpoint) -> None:
    _, pipe = pair(checkpoint, TEXT, "plain", scale=0.0)
    call = {**CALLS[TEXT], "num_inference_steps": 3, "guidance_scale": 4.0}
    off = pipe(**call_of(TEXT), generator=seeded(1)).images
    pipe.unload_ip_adapter()
    np.testing.assert_allclose(off, pipe(**call, generator=seeded(1)).images, atol=1e-6)


def test_a_run_keeps_the_scale_that_it_began_with(checkpoint: Checkpoint) -> None:
    _, pipe = pair(checkpoint, TEXT, "plain", scale=0.5)
    expected = pipe(**call_of(TEXT), generator=seeded(1)).images
    run = pipe.start(**call_of(TEXT), generator=seeded(1))
    run.step()
    pipe.set_ip_adapter_scale(1.0)
    assert np.array_equal(run.result().images, expected)
    assert not np.array_equal(pipe(**call_of(TEXT), generator=seeded(1)).images, expected)


def test_loading_files(checkpoint: Checkpoint, tmp_path: Path) -> None:
    """A repository with several files and the encoder of pictures."""
    reference, pipe = pair(checkpoint, TEXT, "plain")
    expected = pipe(**call_of(TEXT), generator=seeded(1)).images
    (tmp_path / "models").mkdir()
    file = adapter_file(checkpoint(TEXT)[1].unet)
    tensors = {f"{part}.{key}": tensor for part, keys in file.items() for key, tensor in keys.items()}
    save_file(tensors, tmp_path / "models" / "ip.safetensors")
    reference.image_encoder.save_pretrained(tmp_path / "models" / "image_encoder")
    fresh = ours(checkpoint(TEXT)[0], checkpoint(TEXT)[1])
    fresh.load_ip_adapter(tmp_path, subfolder="models", weight_name="ip.safetensors")
    assert fresh.feature_extractor.crop_size["height"] == 16
    assert np.array_equal(fresh(**call_of(TEXT), generator=seeded(1)).images, expected)
    fresh.unload_ip_adapter()
    assert fresh.image_encoder is None
    fresh.load_ip_adapter([tmp_path], ["models"], ["ip.safetensors"], image_encoder_folder="models/image_encoder")
    assert np.array_equal(fresh(**call_of(TEXT), generator=seeded(1)).images, expected)
    with pytest.raises(sfumato.WeightsError, match="pickles"):
        fresh.load_ip_adapter(tmp_path, subfolder="models", weight_name="ip.bin")


@pytest.mark.parametrize("name", [TEXT, FLUX, THIRD])
def test_network_compiles_with_an_adapter(checkpoint: Checkpoint, name: str) -> None:
    """Once for all scales."""
    several = ["plain"] if name == THIRD else ["plain", "plain"]
    _, pipe = pair(checkpoint, name, *several)
    call = {**CALLS[name], "ip_adapter_image": [tiny.picture(4 + i) for i in range(len(several))]}
    torch._dynamo.reset()
    torch._dynamo.utils.counters.clear()
    network = pipe.denoiser
    compiled, graphs = torch.compile(network, fullgraph=True, backend="eager"), 0
    for scale in ([0.5, 0.4], [0.1, {"up": 1.0}]) if name == TEXT else (0.5, 0.8):
        pipe.set_ip_adapter_scale(scale)
        request, found = pipe.start(**call, generator=seeded(1)).requests()[0], []
        for each in (network, compiled):
            setattr(pipe, pipe.denoiser_name, each)
            with torch.no_grad():
                found.append(pipe.predict(request.latents, request.timesteps, request.conditioning))
        torch.testing.assert_close(*found)
        graphs = graphs or torch._dynamo.utils.counters["stats"]["unique_graphs"]
    assert torch._dynamo.utils.counters["stats"]["unique_graphs"] == graphs == 1


@pytest.mark.parametrize("name", [TEXT, THIRD])
def test_runs_share_a_pass(checkpoint: Checkpoint, name: str) -> None:
    """Runs with different pictures and scales, one of them a step ahead."""
    _, pipe = pair(checkpoint, name, "plain")
    expected, runs = [], []
    for scale, k in ((0.3, 4), (0.9, 5)):
        call = {**CALLS[name], "num_inference_steps": 3, "ip_adapter_image": tiny.picture(k)}
        pipe.set_ip_adapter_scale(scale)
        expected.append(pipe(**call, generator=seeded(1)).images)
        runs.append(pipe.start(**call, generator=seeded(1)))
    runs[0].step()
    while not runs[0].done:
        answers = sfumato.evaluate(pipe, [request for run in runs for request in run.requests()])
        for run, answer in zip(runs, answers, strict=True):
            run.advance([answer])
    for run, one in zip(runs, expected, strict=True):
        np.testing.assert_allclose(run.result().images, one, atol=1e-5)


# --- FLUX ---------------------------------------------------------------------------------------------------------------


def flux_call(name: str = FLUX, **more: Any) -> dict[str, Any]:
    return {**CALLS[name], "num_inference_steps": 3, "ip_adapter_image": tiny.picture(4), **more}


@pytest.mark.parametrize("scale", [None, 0.4, [0.2, 0.9]], ids=str)
def test_flux(checkpoint: Checkpoint, scale: Any) -> None:
    reference, pipe = pair(checkpoint, FLUX, "plain", scale=scale)
    got = assert_same(reference, pipe, **flux_call(num_images_per_prompt=2))
    pipe.unload_ip_adapter()
    call = {k: v for k, v in flux_call(num_images_per_prompt=2).items() if k != "ip_adapter_image"}
    assert np.abs(got - pipe(**call, generator=seeded(3)).images).max() > 1e-3
    _, plain = pair(checkpoint, FLUX)
    assert np.array_equal(pipe(**call, generator=seeded(3)).images, plain(**call, generator=seeded(3)).images)


@pytest.mark.parametrize("scale", [0.6, [0.2, 0.9], [0.3, [0.1, 0.8]]], ids=str)
def test_several_adapters_of_flux(checkpoint: Checkpoint, scale: Any) -> None:
    call = flux_call(ip_adapter_image=[tiny.picture(4), tiny.picture(5)])
    assert_same(*pair(checkpoint, FLUX, "plain", "plain", scale=scale), **call)


@pytest.mark.parametrize("given", ["both", "negative", "positive"])
def test_flux_with_a_negative_picture(checkpoint: Checkpoint, given: str) -> None:
    call = flux_call(negative_prompt="blue", true_cfg_scale=3.0, negative_ip_adapter_image=tiny.picture(7))
    for other, name in (("negative", "ip_adapter_image"), ("positive", "negative_ip_adapter_image")):
        if given == other:
            del call[name]
    assert_same(*pair(checkpoint, FLUX, "plain"), **call)


def test_flux_from_a_file(checkpoint: Checkpoint, tmp_path: Path) -> None:
    """The names in published files, and an encoder from a folder of its own."""
    reference, pipe = pair(checkpoint, FLUX, "plain")
    expected = pipe(**flux_call(), generator=seeded(1)).images
    file = adapter_file(checkpoint(FLUX)[1].transformer)
    tensors = {f"ip_adapter_proj_model.{key}": tensor for key, tensor in file["image_proj"].items()}
    for key, tensor in file["ip_adapter"].items():
        number, projection_name, part = key.split(".")
        name = f"ip_adapter_double_stream_{projection_name[3]}_proj.{part}"
        tensors[f"double_blocks.{number}.processor.{name}"] = tensor
    save_file(tensors, tmp_path / "ip.safetensors")
    reference.image_encoder.save_pretrained(tmp_path / "clip" / "model")
    fresh = ours(checkpoint(FLUX)[0], checkpoint(FLUX)[1])
    fresh.load_ip_adapter(tmp_path, "ip.safetensors", "", str(tmp_path / "clip"), "model")
    assert np.array_equal(fresh(**flux_call(), generator=seeded(1)).images, expected)


# --- Stable Diffusion 3 -------------------------------------------------------------------------------------------------


def third_call(name: str = THIRD, **more: Any) -> dict[str, Any]:
    return {**CALLS[name], "num_inference_steps": 3, "guidance_scale": 4.0, "ip_adapter_image": tiny.picture(4), **more}


def test_a_projection_that_is_told_the_time(checkpoint: Checkpoint) -> None:
    reference, pipe = pair(checkpoint, THIRD, "plain")
    patches, times = torch.randn(2, 5, PATCH_WIDTH, generator=torch.Generator().manual_seed(0)), torch.tensor([900.0, 20.5])
    with torch.no_grad():
        expected, embedded = reference.transformer.image_proj(patches, times)
        options = AttentionOptions(image_tokens=(patches[:, None],))
        options = pipe.transformer.encoder_hid_proj.at_time(options, times)
    torch.testing.assert_close(options.image_tokens[0][:, 0], expected, atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(options.image_times[0], embedded)


@pytest.mark.parametrize(
    ("scale", "more"),
    [
        (None, {}), (0.6, {"guidance_scale": 1.0}), (0.0, {}),
        (0.6, {"prompt": ["a red cat", "blue apple"], "negative_prompt": ["blue", "cat"], "num_images_per_prompt": 2}),
    ],
)  # fmt: skip
def test_third(checkpoint: Checkpoint, scale: float | None, more: dict[str, Any]) -> None:
    reference, pipe = pair(checkpoint, THIRD, "plain", scale=scale)
    got = assert_same(reference, pipe, **third_call(**more))
    assert pipe.is_ip_adapter_active == reference.is_ip_adapter_active == (scale != 0)
    call = {k: v for k, v in third_call(**more).items() if k != "ip_adapter_image"}
    without = assert_same(reference, pipe, **call)  # a picture need not be given
    assert (np.abs(got - without).max() > 1e-3) == (scale != 0)
    pipe.unload_ip_adapter()
    assert not pipe.is_ip_adapter_active
    assert np.array_equal(pipe(**call, generator=seeded(3)).images, without)


def test_an_adapter_whose_pictures_all_weigh_nothing_is_not_active(checkpoint: Checkpoint) -> None:
    _, pipe = pair(checkpoint, TEXT, "plain")
    for scale, active in ((0.0, False), (0.5, True), ([[0.0, 0.0]], False), ([[0.0, 0.5]], True)):  # of two pictures with masks
        pipe.set_ip_adapter_scale(scale)
        assert pipe.is_ip_adapter_active == active


def test_embeddings_of_third(checkpoint: Checkpoint) -> None:
    reference, pipe = pair(checkpoint, THIRD, "plain")
    with torch.no_grad():
        torch.testing.assert_close(pipe.encode_image(tiny.picture(4)), reference.encode_image(tiny.picture(4), "cpu"))
        for options in ((1, True), (2, True), (2, False)):
            expected = reference.prepare_ip_adapter_image_embeds(tiny.picture(4), None, "cpu", *options)
            embeds = pipe.prepare_ip_adapter_image_embeds(tiny.picture(4), None, None, *options)
            torch.testing.assert_close(embeds, expected)
            again = reference.prepare_ip_adapter_image_embeds(None, expected, "cpu", *options)
            torch.testing.assert_close(pipe.prepare_ip_adapter_image_embeds(None, embeds, None, *options), again)
        embeds = pipe.prepare_ip_adapter_image_embeds(tiny.picture(4))
    call = {k: v for k, v in third_call().items() if k != "ip_adapter_image"}
    got = assert_same(reference, pipe, **call, ip_adapter_image_embeds=embeds)
    assert np.array_equal(got, pipe(**third_call(), generator=seeded(3)).images)


@pytest.mark.parametrize("name", [FLUX, THIRD])
def test_masks_of_transformers(checkpoint: Checkpoint, name: str) -> None:
    """Everywhere is no mask, nowhere is no adapter."""
    _, pipe = pair(checkpoint, name, "plain")
    call = {**CALLS[name], "num_inference_steps": 3, "ip_adapter_image": tiny.picture(4)}
    ones = torch.ones(1, 1, 32, 32)
    whole, nowhere = (
        pipe(**call, joint_attention_kwargs={"ip_adapter_masks": [mask]}, generator=seeded(1)).images for mask in (ones, 0 * ones)
    )
    np.testing.assert_allclose(whole, pipe(**call, generator=seeded(1)).images, atol=1e-5)
    pipe.set_ip_adapter_scale(0.0)
    np.testing.assert_allclose(nowhere, pipe(**call, generator=seeded(1)).images, atol=1e-5)


def test_scales_by_block_of_third(checkpoint: Checkpoint) -> None:
    """The first block has two attention layers."""
    reference, pipe = pair(checkpoint, THIRD, "plain")
    layers = [p for p in reference.transformer.attn_processors.values() if hasattr(p, "norm_ip")]
    for layer, scale in zip(layers, (0.2, 0.2, 0.9, 0.5), strict=True):
        layer.scale = scale
    pipe.set_ip_adapter_scale([0.2, 0.9, 0.5])
    assert_same(reference, pipe, **third_call())


def test_several_adapters_and_pictures_of_third(checkpoint: Checkpoint) -> None:
    """Equal adapters are one of the sum of their scales; a picture that is masked out everywhere is none."""
    _, pipe = pair(checkpoint, THIRD, "plain", scale=0.7)
    one = pipe(**third_call(), generator=seeded(3)).images
    pictures, masks = [tiny.picture(4), tiny.picture(5)], torch.cat([torch.ones(1, 1, 32, 32), torch.zeros(1, 1, 32, 32)], dim=1)
    more = {"ip_adapter_image": [pictures], "joint_attention_kwargs": {"ip_adapter_masks": [masks]}}
    np.testing.assert_allclose(pipe(**third_call(**more), generator=seeded(3)).images, one, atol=1e-5)
    together = pipe(**third_call(ip_adapter_image=[pictures]), generator=seeded(3)).images
    embeds = pipe.prepare_ip_adapter_image_embeds([pictures])
    assert [x.shape[:2] for x in embeds] == [(2, 2)]
    again = pipe(**third_call(ip_adapter_image=None, ip_adapter_image_embeds=embeds), generator=seeded(3)).images
    assert np.array_equal(together, again) and np.abs(together - one).max() > 1e-4
    file = adapter_file(checkpoint(THIRD)[1].transformer)
    pipe.load_ip_adapter([file, file], [""] * 2, [""] * 2)
    pipe.set_ip_adapter_scale([0.3, 0.4])
    both = pipe(**third_call(ip_adapter_image=[tiny.picture(4)] * 2), generator=seeded(3)).images
    np.testing.assert_allclose(both, one, atol=1e-5)


def test_third_from_a_file(checkpoint: Checkpoint, tmp_path: Path) -> None:
    """With its default name, the encoder beside it, and the parameters named as in the reference's network."""
    reference, pipe = pair(checkpoint, THIRD, "plain")
    expected = pipe(**third_call(), generator=seeded(1)).images
    file = {**adapter_file(checkpoint(THIRD)[1].transformer), "image_proj": reference.transformer.image_proj.state_dict()}
    tensors = {f"{part}.{key}": tensor for part, keys in file.items() for key, tensor in keys.items()}
    save_file(tensors, tmp_path / "ip-adapter.safetensors")
    reference.image_encoder.save_pretrained(tmp_path / "image_encoder")
    fresh = ours(checkpoint(THIRD)[0], checkpoint(THIRD)[1])
    fresh.load_ip_adapter(tmp_path)
    assert np.array_equal(fresh(**third_call(), generator=seeded(1)).images, expected)


# --- errors -------------------------------------------------------------------------------------------------------------


def test_calls_that_cannot_work(checkpoint: Checkpoint) -> None:
    _, pipe = pair(checkpoint, TEXT)
    plain = CALLS[TEXT]
    masks = {"ip_adapter_masks": [torch.ones(1, 1, 32, 32)]}
    for wrong in ({"ip_adapter_image": tiny.picture()}, {"cross_attention_kwargs": masks}):
        with pytest.raises(ValueError, match=r"no IP-Adapter is loaded.*load_ip_adapter"):
            pipe(**plain, **wrong)
    with pytest.raises(ValueError, match="load_ip_adapter"):
        pipe.set_ip_adapter_scale(1.0)
    pipe.load_ip_adapter(adapter_file(checkpoint(TEXT)[1].unet))
    picture, ones = tiny.picture(), torch.ones(2, 1, POOLED_WIDTH)
    cases: list[tuple[dict[str, Any], str]] = [
        ({}, "unload_ip_adapter"),
        ({"ip_adapter_image": picture, "ip_adapter_image_embeds": [ones]}, "both"),
        ({"ip_adapter_image": [picture, picture]}, "a list of 2 for 1 IP-Adapters"),
        ({"ip_adapter_image_embeds": ones}, "Tensor for 1 IP-Adapters"),
        ({"ip_adapter_image_embeds": [ones[:, 0]]}, "rows, pictures, 32"),
        ({"ip_adapter_image_embeds": [ones[..., :8]]}, "rows, pictures, 32"),
        ({"ip_adapter_image_embeds": [ones[:1]]}, "negative"),
        ({"ip_adapter_image_embeds": [ones * float("nan")]}, "NaN"),
        ({"ip_adapter_image": picture, "cross_attention_kwargs": {"ip_adapter_mask": []}}, "did you mean 'ip_adapter_masks'"),
        (
            {"ip_adapter_image": picture, "cross_attention_kwargs": {"ip_adapter_masks": [torch.ones(1, 2, 8, 8)]}},
            r"\(1, 1, H, W\)",
        ),
    ]
    for wrong, message in cases:
        with pytest.raises(ValueError, match=message):
            pipe(**plain, **wrong)
    pipe.set_ip_adapter_scale([[0.5, 0.5]])
    with pytest.raises(ValueError, match="ip_adapter_masks"):
        pipe(**plain, ip_adapter_image=[[picture, picture]])
    pipe.load_ip_adapter(adapter_file(checkpoint(TEXT)[1].unet, "faceid"))
    with pytest.raises(ValueError, match="embeddings are 32 wide, this IP-Adapter reads 12"):
        pipe(**plain, ip_adapter_image=picture)
    pipe.image_encoder = None
    with pytest.raises(ValueError, match="image_encoder"):
        pipe(**plain, ip_adapter_image=picture)


@pytest.mark.parametrize(
    ("scale", "message"),
    [
        ([0.1, 0.2], "2 values for 1 IP-Adapters"),
        ({"upp": 1.0}, "did you mean 'up'"),
        ({"up": {"block_0": 1.0}}, "block_1 do"),
        ({"up": {"block_1": [0.1, 0.2, 0.3]}}, "3 values for 2 transformers"),
        ("strong", "scale=.strong. must be a finite number"),
        (float("nan"), "scale=nan must be a finite number"),
    ],
)
def test_scales_that_cannot_work(checkpoint: Checkpoint, scale: Any, message: str) -> None:
    _, pipe = pair(checkpoint, TEXT, "plain")
    with pytest.raises(ValueError, match=message):
        pipe.set_ip_adapter_scale(scale)


def test_files_that_cannot_work(checkpoint: Checkpoint, tmp_path: Path) -> None:
    _, pipe = pair(checkpoint, TEXT)
    file, other = adapter_file(checkpoint(TEXT)[1].unet), adapter_file(checkpoint(XL)[1].unet)
    fits, lacking = {**file["image_proj"]}, {**file["image_proj"]}
    del lacking["norm.bias"]
    lonely = {**file["ip_adapter"], "0.to_q_lora.down.weight": torch.zeros(2, 16)}
    narrow = {key: tensor[:8] if key.startswith("1.") else tensor for key, tensor in file["ip_adapter"].items()}
    for wrong, message in (
        (other, "another network"),
        ({"image_proj": fits}, "'image_proj' and 'ip_adapter'"),
        ({**file, "image_proj": {"weight": torch.zeros(1)}}, "no kind of IP-Adapter"),
        ({**file, "image_proj": lacking}, "norm.bias"),
        ({**file, "ip_adapter": lonely}, "no counterpart"),
        ({**file, "ip_adapter": narrow}, "has shape"),
    ):
        with pytest.raises(sfumato.WeightsError, match=message):
            pipe.load_ip_adapter(wrong)
    with pytest.raises(ValueError, match="weight_name"):
        pipe.load_ip_adapter(tmp_path)
    with pytest.raises(ValueError, match="subfolder is a list of 1 for 2"):
        pipe.load_ip_adapter([file, file])
    assert pipe.unet.encoder_hid_proj is None
    flux = pair(checkpoint, FLUX)[1]
    with pytest.raises(sfumato.WeightsError, match="another network"):
        flux.load_ip_adapter(file)
    flux.load_ip_adapter(adapter_file(checkpoint(FLUX)[1].transformer))
    with pytest.raises(ValueError, match="3 values for 2 joint blocks"):
        flux.set_ip_adapter_scale([0.1, 0.2, 0.3])
    with pytest.raises(ValueError, match="no picture for it"):
        flux(**CALLS[FLUX])
    with pytest.raises(sfumato.ConfigError, match="unload_ip_adapter"):
        flux.save_pretrained(tmp_path)
    third = pair(checkpoint, THIRD)[1]
    own = adapter_file(checkpoint(THIRD)[1].transformer)
    for part in ("image_proj", "ip_adapter"):
        with pytest.raises(sfumato.WeightsError, match="another network"):
            third.load_ip_adapter({**own, part: file[part]})
    with pytest.raises(ValueError, match="no IP-Adapter is loaded"):
        third(**CALLS[THIRD], ip_adapter_image=tiny.picture())
    folder, reference = checkpoint("StableDiffusionImageVariationPipeline")
    with pytest.raises(ValueError, match="takes no picture prompts"):
        ours(folder, reference).load_ip_adapter(file)


def test_a_network_is_saved_without_its_adapter(checkpoint: Checkpoint, tmp_path: Path) -> None:
    _, pipe = pair(checkpoint, TEXT, "plain")
    with pytest.raises(sfumato.ConfigError, match="unload_ip_adapter"):
        pipe.save_pretrained(tmp_path)
    assert not any(tmp_path.rglob("*.safetensors"))


def test_a_unet_that_is_joined_to_a_slim_side_reads_pictures_as_alone(checkpoint: Checkpoint) -> None:
    """The slim side has no part in it; layers and scales are numbered and named as the U-Net's own."""
    base = sfumato.DiffusionPipeline.from_pretrained(checkpoint(TEXT)[0])
    encoder, processor = tiny.image_encoder(), tiny.image_processor()
    torch.manual_seed(0)
    theirs = type(checkpoint(TEXT)[1].unet).from_config({**base.unet.config, "layers_per_block": 2})
    unet = sfumato.UNet2DConditionModel.from_config({**base.unet.config, "layers_per_block": 2}).eval()
    slim = sfumato.ControlNetXSAdapter.from_unet(unet, 0.5, conditioning_embedding_out_channels=(8, 16))
    plain = type(base).from_pipe(base, unet=unet, image_encoder=encoder, feature_extractor=processor)
    joined = sfumato.StableDiffusionControlNetXSPipeline.from_pipe(plain, controlnet=slim)  # which adds nothing before training
    call, pictures = {**CALLS[TEXT], "ip_adapter_image": tiny.picture(4)}, []
    for pipe, more in ((plain, {}), (joined, {"image": tiny.picture(7)})):
        pipe.set_progress_bar_config(disable=True)
        before = pipe(**CALLS[TEXT], **more, generator=seeded(0)).images
        pipe.load_ip_adapter(adapter_file(theirs))
        pipe.set_ip_adapter_scale({"down": {"block_0": [0.2, 0.9]}, "mid": 0.5, "up": 0.7})
        pictures.append(pipe(**call, **more, generator=seeded(0)).images)
        assert np.abs(pictures[-1] - before).max() > 1e-2
    np.testing.assert_allclose(*pictures, atol=1e-3)
