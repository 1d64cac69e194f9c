"""Pipelines from folders and from each other: what is written, what is shared, what is refused."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import diffusers
import numpy as np
import pytest
import tiny
import torch
from safetensors.torch import load_file, save_file

import sfumato

Checkpoint = Callable[[str], tuple[Path, Any]]
NAMES = [n for n in dir(sfumato) if n.endswith("Pipeline") and n != "DiffusionPipeline"]
NAMES = [n for n in NAMES if hasattr(diffusers, n) and n != "FluxPriorReduxPipeline"]  # which has a test of its own
SD = "StableDiffusionPipeline"


@pytest.fixture
def folder(checkpoint: Checkpoint, tmp_path: Path) -> Path:
    """A tiny checkpoint that a test may spoil."""
    return Path(shutil.copytree(checkpoint(SD)[0], tmp_path / "model"))


def load(folder: Path, **options: Any) -> Any:
    return sfumato.DiffusionPipeline.from_pretrained(folder, **options)


def edit(path: Path, **changes: Any) -> None:
    path.write_text(json.dumps({**json.loads(path.read_text()), **changes}))


def draw(pipe: Any, **call: Any) -> np.ndarray:
    pipe.set_progress_bar_config(disable=True)
    options = {"num_inference_steps": 2, "output_type": "np", "generator": torch.Generator().manual_seed(0)}
    return pipe("a red cat", **{**options, **call}).images


# --- what is written, and which class is loaded


@pytest.mark.parametrize("name", NAMES)
def test_dispatch_and_model_index(checkpoint: Checkpoint, name: str, tmp_path: Path) -> None:
    folder, reference = checkpoint(name)
    pipe = load(folder)
    assert type(pipe) is getattr(sfumato, name)
    assert list(pipe.components) == list(type(pipe).component_names)
    pipe.save_pretrained(tmp_path / "ours")
    reference.save_pretrained(tmp_path / "theirs")
    ours, theirs = (json.loads((tmp_path / side / "model_index.json").read_text()) for side in ("ours", "theirs"))
    assert {k: v for k, v in ours.items() if k in theirs} == {k: v for k, v in theirs.items() if k != "_name_or_path"}
    extra = {k: v for k, v in ours.items() if k not in theirs}  # what the reference does not write, or has no place for
    assert all(k in type(pipe).options or v == [None, None] for k, v in extra.items()), extra
    listed = {
        side: {p.relative_to(tmp_path / side) for p in (tmp_path / side).rglob("*.safetensors")} for side in ("ours", "theirs")
    }
    assert listed["ours"] == listed["theirs"]
    assert not list(tmp_path.rglob("*.tmp")) + list(tmp_path.rglob(".*"))


def test_safety_checker_keeps_its_place(folder: Path, tmp_path: Path) -> None:
    parts = {"safety_checker": tiny.safety_checker(), "feature_extractor": tiny.image_processor()}
    reference = diffusers.StableDiffusionPipeline.from_pretrained(folder, **parts)
    reference.save_pretrained(tmp_path / "theirs")
    pipe = load(tmp_path / "theirs")
    assert isinstance(pipe.safety_checker, sfumato.StableDiffusionSafetyChecker)
    pipe.save_pretrained(tmp_path / "ours")
    ours, theirs = (json.loads((tmp_path / side / "model_index.json").read_text()) for side in ("ours", "theirs"))
    assert ours == {k: v for k, v in theirs.items() if k != "_name_or_path"}
    again = diffusers.StableDiffusionPipeline.from_pretrained(tmp_path / "ours")
    for key, value in reference.safety_checker.state_dict().items():
        assert torch.equal(again.safety_checker.state_dict()[key], value)


def test_saving_over_the_folder_it_was_loaded_from(folder: Path) -> None:
    pipe = load(folder)
    before = draw(pipe)
    pipe.save_pretrained(folder)  # the weights in use are mapped from these very files
    assert np.array_equal(draw(pipe), before)
    assert np.array_equal(draw(load(folder)), before)


def test_sharded_pipeline_both_ways(folder: Path, tmp_path: Path) -> None:
    pipe = load(folder)
    pipe.save_pretrained(tmp_path / "ours", max_shard_size="100KB", variant="fp16")
    assert list((tmp_path / "ours" / "text_encoder").glob("model.fp16-*-of-*.safetensors"))
    theirs = diffusers.StableDiffusionPipeline.from_pretrained(tmp_path / "ours", variant="fp16")
    theirs.save_pretrained(tmp_path / "theirs", max_shard_size="100KB", variant="fp16")
    again = load(tmp_path / "theirs", variant="fp16")
    for name, module in pipe.modules().items():
        for key, value in module.state_dict().items():
            assert torch.equal(again.modules()[name].state_dict()[key], value)
    pipe.save_pretrained(tmp_path / "ours", variant="fp16")
    assert [p.name for p in (tmp_path / "ours" / "text_encoder").glob("*.safetensors*")] == ["model.fp16.safetensors"]


# --- what is asked for


@pytest.mark.parametrize(
    ("options", "error", "message"),
    [
        ({"unett": None}, TypeError, r"no argument or component 'unett'; did you mean 'unet'"),
        ({"trust_remote_code": True}, TypeError, r"no argument or component 'trust_remote_code'"),
        ({"custom_pipeline": "x"}, TypeError, r"no argument or component 'custom_pipeline'"),
        ({"device_map": "auto"}, ValueError, r"device_map='auto' splits a model over devices, .*name one device"),
        ({"device_map": "balanced"}, ValueError, r"device_map='balanced' splits"),
        ({"device_map": {"unet": 0}}, ValueError, r"device_map=\{'unet': 0\} splits"),
        ({"device_map": "cuad"}, ValueError, r"device_map='cuad' is no device of this machine .*name one, such as 'cpu'"),
        ({"dtype": "float16"}, ValueError, r"dtype='float16' is not a floating-point torch dtype such as torch.float16"),
        ({"torch_dtype": torch.int8}, ValueError, r"dtype=torch.int8 is not a floating-point"),
        ({"dtype": {"unet": "half"}}, ValueError, r"dtype='half' is not a floating-point"),
        ({"dtype": {"unett": torch.float16}}, ValueError, r"dtype names 'unett', .*did you mean 'unet'"),
        (
            {"dtype": torch.float16, "torch_dtype": torch.float32},
            ValueError,
            r"dtype=torch.float16 and torch_dtype=.*differ: pass one",
        ),
        ({"variant": "fp16"}, sfumato.HubError, r"has no files of variant='fp16': leave it out, or choose another"),
        ({"use_safetensors": False}, ValueError, r"use_safetensors=False asks for pickle weights, .*convert them"),
    ],
)
def test_refused_options(folder: Path, options: dict[str, Any], error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        load(folder, **options)


def test_dtype_by_component(folder: Path) -> None:
    pipe = load(folder, torch_dtype={"vae": torch.float64, "default": torch.bfloat16})
    assert {n: m.dtype for n, m in pipe.modules().items()} == {
        "vae": torch.float64, "unet": torch.bfloat16, "text_encoder": torch.bfloat16,
    }  # fmt: skip
    assert load(folder, dtype={"vae": torch.float64}).unet.dtype == torch.float32


def test_default_dtype_is_float32_whatever_the_files_hold(folder: Path) -> None:
    load(folder, dtype=torch.float16).save_pretrained(folder)
    assert {p.dtype for m in load(folder).modules().values() for p in m.parameters()} == {torch.float32}


def test_variant_of_some_components(folder: Path) -> None:
    load(folder).unet.half().save_pretrained(folder / "unet", variant="fp16")
    half = load_file(folder / "unet" / "diffusion_pytorch_model.fp16.safetensors")
    (folder / "unet" / "diffusion_pytorch_model.safetensors").unlink()
    pipe = load(folder, variant="fp16")
    assert torch.equal(pipe.unet.conv_in.weight, half["conv_in.weight"].float())


def test_ready_components(folder: Path) -> None:
    scheduler = sfumato.EulerDiscreteScheduler(beta_schedule="scaled_linear")
    unet = sfumato.UNet2DConditionModel.from_pretrained(folder, subfolder="unet")
    shutil.rmtree(folder / "unet")  # what is given is not looked for
    pipe = load(folder, unet=unet, scheduler=scheduler, safety_checker=None, requires_safety_checker=True)
    assert pipe.unet is unet
    assert pipe.config.scheduler == ["diffusers", "EulerDiscreteScheduler"]
    assert pipe.config.requires_safety_checker is True
    assert pipe.safety_checker is pipe.image_encoder is None


def test_components_and_to(folder: Path) -> None:
    pipe = load(folder)
    twin = type(pipe)(**pipe.components)
    assert all(a is b for a, b in zip(list(pipe.modules().values()), list(twin.modules().values()), strict=True))
    assert pipe.to(torch.float64) is pipe
    assert pipe.dtype == torch.float64
    assert pipe.device == torch.device("cpu")
    assert twin.unet.dtype == torch.float64
    assert draw(pipe.to("cpu", torch.float32)).shape == (1, 32, 32, 3)


# --- one pipeline from another


def test_from_pipe_shares_weights_both_ways(folder: Path) -> None:
    text = sfumato.StableDiffusionPipeline.from_pretrained(folder)
    image = sfumato.StableDiffusionImg2ImgPipeline.from_pipe(text)
    back = sfumato.StableDiffusionPipeline.from_pipe(image)
    for name, module in text.modules().items():
        assert image.modules()[name] is module is back.modules()[name]
    assert np.array_equal(draw(back), draw(text))
    assert image.config._name_or_path == str(folder)
    inpaint = sfumato.StableDiffusionInpaintPipeline.from_pipe(text, scheduler=sfumato.PNDMScheduler())
    assert inpaint.scheduler.config.skip_prk_steps
    assert type(text.scheduler).__name__ == "DDIMScheduler"


def test_from_pipe_names_what_is_wrong(folder: Path) -> None:
    text = sfumato.StableDiffusionPipeline.from_pretrained(folder)
    with pytest.raises(TypeError, match=r"from_pipe has no component 'schedular'; did you mean 'scheduler'"):
        sfumato.StableDiffusionImg2ImgPipeline.from_pipe(text, schedular=None)
    with pytest.raises(
        ValueError, match=r"StableDiffusionPipeline has no 'depth_estimator', which .*needs: pass depth_estimator=\.\.\."
    ):
        sfumato.StableDiffusionDepth2ImgPipeline.from_pipe(text)


AUTO = {
    "AutoPipelineForText2Image": "StableDiffusionPipeline",
    "AutoPipelineForImage2Image": "StableDiffusionImg2ImgPipeline",
    "AutoPipelineForInpainting": "StableDiffusionInpaintPipeline",
}


@pytest.mark.parametrize("name", AUTO)
def test_auto_pipelines(folder: Path, name: str) -> None:
    auto = getattr(sfumato, name)
    pipe = auto.from_pretrained(folder, torch_dtype=torch.float64)
    assert type(pipe).__name__ == AUTO[name] == type(getattr(diffusers, name).from_pretrained(folder)).__name__
    assert pipe.dtype == torch.float64
    for other in AUTO.values():
        start = getattr(sfumato, other).from_pipe(pipe)
        made = auto.from_pipe(start)
        assert type(made).__name__ == AUTO[name]
        assert made.unet is pipe.unet
    with pytest.raises(TypeError, match=r"is not built directly: use `from_pretrained` or `from_pipe`"):
        auto()


def test_auto_pipeline_of_a_family_without_the_task(checkpoint: Checkpoint) -> None:
    folder, _ = checkpoint("DDPMPipeline")
    with pytest.raises(ValueError, match=r"AutoPipelineForInpainting: the family of DDPMPipeline has no inpaint"):
        sfumato.AutoPipelineForInpainting.from_pretrained(folder)


# --- broken folders


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("{", r"model_index.json is missing or not valid JSON"),
        ("[]", r"model_index.json holds a JSON list, expected an object"),
        ("{}", r"model_index.json lacks '_class_name': is this a pipeline folder"),
        ('{"_class_name": 5}', r"lacks '_class_name'"),
        (
            '{"_class_name": "StableDifusionPipeline"}',
            r"asks for 'StableDifusionPipeline', .*; did you mean 'StableDiffusionPipeline'",
        ),
        ('{"_class_name": "UNet2DModel"}', r"asks for 'UNet2DModel', which is no pipeline offered here"),
        ('{"_class_name": "DiffusionPipeline"}', r"asks for 'DiffusionPipeline', which is no pipeline"),
    ],
)
@pytest.mark.parametrize("entrance", ["DiffusionPipeline", "AutoPipelineForText2Image"])
def test_broken_model_index(folder: Path, entrance: str, text: str, message: str) -> None:
    (folder / "model_index.json").write_text(text)
    with pytest.raises(sfumato.ConfigError, match=message):
        getattr(sfumato, entrance).from_pretrained(folder)


@pytest.mark.parametrize("entry", ["foo", ["a"], {"a": 1}, 5, ["diffusers", None], ["diffusers", 5]], ids=str)
def test_broken_entry_of_model_index(folder: Path, entry: Any) -> None:
    edit(folder / "model_index.json", unet=entry)
    with pytest.raises(sfumato.ConfigError, match=r"model_index.json of .*'unet' is .*expected \[library, class\]"):
        load(folder)


@pytest.mark.parametrize(
    "entry",
    [
        ["evil", "Evil"], ["os", "system"], ["diffusers", "Evil"], ["diffusers", "Run"], ["diffusers", "StableDiffusionPipeline"],
        ["transformers", "pipeline"], ["transformers", "AutoModel"], ["transformers", "logging"],
    ],
    ids=".".join,
)  # fmt: skip
def test_foreign_classes_are_not_imported(folder: Path, tmp_path: Path, entry: list[str], monkeypatch: pytest.MonkeyPatch) -> None:
    for place in (folder, folder / "unet", tmp_path):
        (place / "evil.py").write_text(f"import pathlib; pathlib.Path({str(tmp_path / 'trace')!r}).touch()")
    monkeypatch.syspath_prepend(tmp_path)
    edit(folder / "model_index.json", unet=entry)
    edit(folder / "unet" / "config.json", auto_map={"AutoModel": "evil.Evil"})
    message = (
        rf"component 'unet' is a {'.'.join(entry)}, which is not offered here, and no code outside the library is run: pass unet="
    )
    with pytest.raises(sfumato.ConfigError, match=message):
        load(folder)
    assert "evil" not in sys.modules
    assert not (tmp_path / "trace").exists()


@pytest.mark.parametrize("key", ["_attn_implementation", "attn_implementation"])
def test_kernels_from_the_hub_are_refused(checkpoint: Checkpoint, key: str, tmp_path: Path) -> None:
    folder = tmp_path / "copy"
    shutil.copytree(checkpoint("StableDiffusionImageVariationPipeline")[0], folder)
    edit(folder / "image_encoder" / "config.json", vision_config={key: "evil/kernel"})
    with pytest.raises(
        sfumato.ConfigError, match=rf"config.json asks for code from the hub, {key}='evil/kernel', .*remove the key"
    ):
        sfumato.DiffusionPipeline.from_pretrained(folder)


def test_missing_model_index(folder: Path) -> None:
    (folder / "model_index.json").unlink()
    with pytest.raises(
        sfumato.HubError, match=rf"{folder} has no file 'model_index.json': is it a checkpoint of the expected kind"
    ):
        load(folder)


def test_folder_of_a_single_network(folder: Path) -> None:
    with pytest.raises(
        sfumato.HubError, match=r"unet holds a single network \(config.json\), no pipeline: load it with its own class"
    ):
        load(folder / "unet")
    with pytest.raises(sfumato.ConfigError, match=rf"{folder} has no config.json: is it the folder of a UNet.*, or its parent"):
        sfumato.UNet2DConditionModel.from_pretrained(folder)


def test_missing_component_folder(folder: Path) -> None:
    shutil.rmtree(folder / "vae")
    with pytest.raises(
        sfumato.HubError, match=rf"{folder} has no folder 'vae', which its model_index.json names: download the rest"
    ):
        load(folder)


def test_component_that_the_repository_lacks(folder: Path) -> None:
    with pytest.raises(
        sfumato.ConfigError, match=r"has no 'depth_estimator', which .* needs: pass depth_estimator=\.\.\., or use the class"
    ):
        sfumato.StableDiffusionDepth2ImgPipeline.from_pretrained(folder)


def test_wrong_subfolder(folder: Path) -> None:
    with pytest.raises(sfumato.HubError, match=r"has no subfolder 'unett'; it has: scheduler, text_encoder, tokenizer, unet, vae"):
        sfumato.UNet2DConditionModel.from_pretrained(folder, subfolder="unett")


@pytest.mark.parametrize(
    ("file", "error"),
    [
        ("scheduler/scheduler_config.json", sfumato.ConfigError),
        ("unet/config.json", sfumato.ConfigError),
        ("unet/diffusion_pytorch_model.safetensors", sfumato.WeightsError),
        ("text_encoder/config.json", sfumato.ConfigError),
        ("text_encoder/model.safetensors", sfumato.WeightsError),
        ("tokenizer/tokenizer.json", sfumato.ConfigError),
        ("tokenizer/tokenizer_config.json", sfumato.ConfigError),
    ],
)
@pytest.mark.parametrize("how", ["missing", "truncated"])
def test_missing_or_truncated_file_is_an_error(folder: Path, file: str, error: type[Exception], how: str) -> None:
    data = (folder / file).read_bytes()
    (folder / file).unlink()
    if how == "truncated":
        (folder / file).write_bytes(data[:-20])
    with pytest.raises(error, match=str(folder / Path(file).parent)):
        load(folder)


def test_text_encoder_with_a_missing_parameter_is_not_made_up(folder: Path) -> None:
    path = folder / "text_encoder" / "model.safetensors"
    tensors = load_file(path)
    lost = next(k for k in tensors if k.endswith("layers.0.layer_norm1.weight"))
    del tensors[lost]
    save_file(tensors, path, metadata={"format": "pt"})
    with pytest.raises(sfumato.WeightsError, match=r"text_encoder does not fit CLIPTextModel: 1 missing .*layer_norm1.weight"):
        load(folder)


def test_text_encoder_of_pickle_alone(folder: Path) -> None:
    path = folder / "text_encoder" / "model.safetensors"
    path.rename(path.with_name("pytorch_model.bin"))
    with pytest.raises(sfumato.WeightsError, match=r"only pickle weights \(pytorch_model.bin\), which can run code"):
        load(folder)


def contents(folder: Path) -> dict[Path, bytes]:
    return {p.relative_to(folder): p.read_bytes() for p in folder.rglob("*") if p.is_file()}


@pytest.mark.parametrize("component", ["vae", "tokenizer", "scheduler"])
def test_interrupted_save_leaves_the_old_pipeline(folder: Path, component: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Whichever component is being written: no mixture of old and new ones."""
    pipe, before = load(folder), contents(folder)
    with torch.no_grad():
        for network in pipe.modules().values():
            for parameter in network.parameters():
                parameter.zero_()

    def interrupted(*args: Any, **kwargs: Any) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(type(pipe.components[component]), "save_pretrained", interrupted)
    with pytest.raises(KeyboardInterrupt):
        pipe.save_pretrained(folder)
    assert contents(folder) == before


def test_killed_save_leaves_the_old_pipeline(folder: Path) -> None:
    code = f"""
import os, sfumato
pipe = sfumato.DiffusionPipeline.from_pretrained({str(folder)!r})
pipe.unet.bfloat16(), pipe.vae.bfloat16()
type(pipe.unet).save_pretrained = lambda *args, **kwargs: os.kill(os.getpid(), 9)
pipe.save_pretrained({str(folder)!r})
"""
    expected = draw(load(folder))
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == -9
    np.testing.assert_array_equal(draw(load(folder)), expected)
    load(folder).save_pretrained(folder)  # and saving works again
    np.testing.assert_array_equal(draw(load(folder)), expected)


def test_ready_components_of_the_wrong_kind(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sfumato.UNet2DConditionModel, "from_folder", lambda *a: pytest.fail("loaded before the error"))
    with pytest.raises(TypeError, match=r"vae is '.*/vae', expected an autoencoder: load it by the `from_pretrained`"):
        load(folder, vae=str(folder / "vae"))


def test_save_to_a_file(folder: Path) -> None:
    with pytest.raises(NotADirectoryError, match=r"save_directory=.*is a file; pass a folder"):
        load(folder).save_pretrained(folder / "model_index.json")
    with pytest.raises(ValueError, match=r"save_directory='': pass the folder to write to"):
        load(folder).save_pretrained("")
    with pytest.raises(ValueError, match=r"safe_serialization=False asks for pickle"):
        load(folder).save_pretrained(folder, safe_serialization=False)
