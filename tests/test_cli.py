"""The command line: pictures that carry what remakes them, errors of one line, help with examples."""

from __future__ import annotations

import json
import shlex
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import tiny
import torch
import typer
from PIL import Image
from safetensors.torch import load_file
from typer.testing import CliRunner, Result

import sfumato
from sfumato.cli.generate import EXAMPLES, parse_size, target
from sfumato.cli.info import EXAMPLES as INFO_EXAMPLES
from sfumato.cli.main import app
from sfumato.media.image import load_image, read_recipe

Checkpoint = Callable[[str], tuple[Path, Any]]


@pytest.fixture
def model(checkpoint: Checkpoint, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("COLUMNS", "200")
    return checkpoint("StableDiffusionPipeline")[0]


def sfu(*arguments: Any) -> Result:
    return CliRunner().invoke(app, [str(a) for a in arguments])


def generate(model: Path, out: Path, *more: Any, prompt: str = "a red cat") -> list[Path]:
    done = sfu("generate", prompt, "--model", model, "--steps", 2, "--size", 32, "--device", "cpu", "--out", out, *more)
    assert done.exit_code == 0, done.output
    return [Path(line) for line in done.stdout.split("\n") if line]


def failure(*arguments: Any) -> str:
    """The one line of an expected error."""
    done = sfu(*arguments)
    assert done.exit_code == 1, (done.output, done.exception)
    lines = done.stderr.strip().splitlines()
    assert len(lines) == 1, done.stderr
    assert lines[0].startswith("error: ")
    return lines[0]


def pixels(path: Path) -> np.ndarray:
    return np.asarray(Image.open(path).convert("RGB")).astype(int)


def remake(recipe: dict[str, Any]) -> np.ndarray:
    """Makes the picture of a recipe by the library alone."""
    from sfumato.pipelines.base import DiffusionPipeline

    pipe = DiffusionPipeline.from_pretrained(recipe["model"])
    pipe = getattr(sfumato, recipe["pipeline"]).from_pipe(pipe)
    pipe.scheduler = getattr(sfumato, recipe["scheduler"]).from_config(pipe.scheduler.config)
    pipe.set_progress_bar_config(disable=True)
    names = ("num_inference_steps", "guidance_scale", "negative_prompt", "strength", "prompt_syntax", "width", "height")
    call = {k: recipe[k] for k in names if k in recipe}
    call |= {k: load_image(recipe[n]) for k, n in (("image", "image"), ("mask_image", "mask")) if recipe.get(n)}
    (picture,) = pipe(recipe["prompt"], generator=torch.Generator().manual_seed(recipe["seed"]), **call).images
    return np.asarray(picture).astype(int)


# --- generate


def test_pictures_and_recipes(model: Path, tmp_path: Path) -> None:
    paths = generate(model, tmp_path / "out", "--seed", 7, "--count", 2, "--negative", "blue", "--guidance", 3)
    assert [p.name for p in paths] == ["a-red-cat-7.png", "a-red-cat-8.png"]
    for k, path in enumerate(paths):
        recipe = read_recipe(path)
        assert recipe["seed"] == 7 + k
        assert recipe["sfumato"] == sfumato.__version__
        assert {k: recipe[k] for k in ("prompt", "num_inference_steps", "guidance_scale", "negative_prompt")} == {
            "prompt": "a red cat", "num_inference_steps": 2, "guidance_scale": 3.0, "negative_prompt": "blue",
        }  # fmt: skip
        # another batch size may round differently in the last bit of float32, so in one level of eight bits
        assert np.abs(remake(recipe) - pixels(path)).max() <= 1, path
    assert not np.array_equal(pixels(paths[0]), pixels(paths[1]))


def test_same_seed_same_bytes(model: Path, tmp_path: Path) -> None:
    first, second, other = (
        generate(model, tmp_path / name, "--seed", seed)[0] for name, seed in (("a.png", 7), ("b.png", 7), ("c.png", 8))
    )
    assert first.read_bytes() == second.read_bytes()
    assert first.read_bytes() != other.read_bytes()
    (again,) = generate(model, tmp_path / "d.png", "--seed", read_recipe(first)["seed"])
    assert again.read_bytes() == first.read_bytes()
    assert np.array_equal(remake(read_recipe(first)), pixels(first))


def test_without_seed_the_recipe_says_which(model: Path, tmp_path: Path) -> None:
    (path,) = generate(model, tmp_path / "a.png")
    assert np.array_equal(remake(read_recipe(path)), pixels(path))


@pytest.mark.parametrize("task", ["image", "inpaint"])
def test_from_a_picture(model: Path, tmp_path: Path, task: str) -> None:
    tiny.picture().save(tmp_path / "in.png")
    tiny.mask().save(tmp_path / "mask.png")
    more = ["--image", tmp_path / "in.png", "--strength", 0.7, *(["--mask", tmp_path / "mask.png"] if task == "inpaint" else [])]
    arguments = [
        "generate",
        "a red cat",
        "--model",
        model,
        "--steps",
        4,
        "--seed",
        7,
        "--device",
        "cpu",
        "--out",
        tmp_path / "out.png",
        *more,
    ]
    done = sfu(*arguments)
    assert done.exit_code == 0, done.output
    recipe = read_recipe(tmp_path / "out.png")
    assert recipe["pipeline"] == f"StableDiffusion{'Img2Img' if task == 'image' else 'Inpaint'}Pipeline"
    assert recipe["strength"] == 0.7
    assert np.array_equal(remake(recipe), pixels(tmp_path / "out.png"))


def test_scheduler_dtype_and_weights(model: Path, tmp_path: Path) -> None:
    (path,) = generate(
        model, tmp_path / "a.png", "--scheduler", "EulerDiscrete", "--dtype", "bfloat16", "--weighted", prompt="(a:1.2) cat"
    )
    recipe = read_recipe(path)
    assert recipe["scheduler"] == "EulerDiscreteScheduler"
    assert recipe["prompt_syntax"] == "weighted"
    assert recipe["dtype"] == "bfloat16"


@pytest.mark.parametrize(
    ("more", "message"),
    [
        (["--model", "/no/such"], "error: '/no/such' is not a folder here, and cannot be a hub repository"),
        (["--size", "33x32"], "error: width=33 must be a positive multiple of 8"),
        (["--scheduler", "EulerDiscret"], "no scheduler is known as 'EulerDiscret'; did you mean 'EulerDiscrete'"),
        (["--dtype", "float61"], "error: dtype='float61' is not a floating-point torch dtype"),
        (["--dtype", "int8"], "is not a floating-point torch dtype"),
        (["--device", "cuad"], "'cuad' is no device of this machine"),
        (["--variant", "fp16"], "has no files of variant='fp16'"),
        (["--out", "picture.jpg"], "--out picture.jpg: pictures are written as .png"),
        (["--image", "/no/picture.png"], "'/no/picture.png' is neither a file nor a URL"),
        (["--guidance", "nan"], "guidance_scale=nan must be a finite number"),
    ],
)
def test_errors_are_one_line(model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, more: list[str], message: str) -> None:
    monkeypatch.chdir(tmp_path)
    base = ["--model", model, "--steps", 2, "--size", 32, "--device", "cpu"]
    assert message in failure("generate", "a red cat", *base, *more)
    assert list(tmp_path.iterdir()) == []


def test_strength_that_leaves_no_step(model: Path, tmp_path: Path) -> None:
    tiny.picture().save(tmp_path / "in.png")
    line = failure("generate", "a", "--model", model, "--steps", 2, "--image", tmp_path / "in.png", "--strength", 0.1)
    assert "strength=0.1 leaves none of 2 steps to make: raise strength to 0.5" in line


def test_model_of_another_kind(checkpoint: Checkpoint, tmp_path: Path) -> None:
    folder, _ = checkpoint("DDPMPipeline")
    assert "the family of DDPMPipeline has no text-to-image pipeline" in failure("generate", "a", "--model", folder)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["generate"], "issing argument"),
        (["generate", "a", "--mask", "m.png"], "add --image"),
        (["generate", "a", "--strength", "0.5"], "add --image"),
        (["generate", "a", "--strength", "1.5"], "--strength"),
        (["generate", "a", "--size", "big"], "'big' is no size: expected WIDTHxHEIGHT"),
        (["generate", "a", "--count", "0"], "--count"),
        (["generate", "a", "--stepz", "3"], "No such option"),
        (["make"], "No such command 'make'"),
    ],
)
def test_misuse_is_explained(arguments: list[str], message: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("COLUMNS", "200")
    done = sfu(*arguments)
    assert done.exit_code == 2
    assert message in done.stderr


@pytest.mark.parametrize(("text", "size"), [("512x768", (512, 768)), (" 64 ", (64, 64)), ("8X16", (8, 16)), ("8×16", (8, 16))])
def test_parse_size(text: str, size: tuple[int, int]) -> None:
    assert parse_size(text) == size


@pytest.mark.parametrize("text", ["", "x", "12x", "a", "1.5", "-8", "8x8x8"])
def test_parse_wrong_size(text: str) -> None:
    with pytest.raises(typer.BadParameter, match="is no size: expected WIDTHxHEIGHT, such as 512x768"):
        parse_size(text)


def test_where_pictures_go(tmp_path: Path) -> None:
    assert target(None, "A red  cat!", 7, 0, 1) == Path("a-red-cat-7.png")
    assert target(tmp_path, "!?", 7, 0, 1) == tmp_path / "picture-7.png"
    assert target(Path("out"), "cat", 8, 1, 2) == Path("out/cat-8.png")
    assert target(Path("x.png"), "cat", 8, 0, 1) == Path("x.png")
    assert target(Path("x.png"), "cat", 8, 1, 2) == Path("x-1.png")


# --- info


def test_info_of_a_folder(model: Path) -> None:
    done = sfu("info", model)
    assert done.exit_code == 0, done.output
    total = 0
    for part, file in (("unet", "diffusion_pytorch_model"), ("vae", "diffusion_pytorch_model"), ("text_encoder", "model")):
        count = sum(t.numel() for t in load_file(model / part / f"{file}.safetensors").values())
        total += count
        (line,) = [x for x in done.stdout.splitlines() if f" {part} " in x]
        assert f"{count:,}" in line
        assert "F32" in line
    assert f"{total:,}" in done.stdout
    assert "StableDiffusionPipeline" in done.stdout
    assert "licence: not stated" in done.stdout


def test_info_of_a_picture(model: Path, tmp_path: Path) -> None:
    (path,) = generate(model, tmp_path / "a.png", "--seed", 7)
    done = sfu("info", path)
    assert done.exit_code == 0
    assert json.loads(done.stdout) == read_recipe(path)


def test_info_errors_are_one_line(checkpoint: Checkpoint, tmp_path: Path) -> None:
    tiny.picture().save(tmp_path / "plain.png")
    assert "holds no recipe" in failure("info", tmp_path / "plain.png")
    assert "has no file 'model_index.json'" in failure("info", tmp_path)
    assert "is not in the cache and the hub cannot be reached" in failure("info", "owner/nothing")
    (tmp_path / "model_index.json").write_text('{"_class_name": "X", "unet": ["diffusers", "UNet2DModel"]}')
    (tmp_path / "unet").mkdir()
    (tmp_path / "unet" / "w.safetensors").write_bytes(b"junk")
    assert "w.safetensors is not a safetensors file, or is truncated: download it again" in failure("info", tmp_path)


# --- help


@pytest.mark.parametrize(("command", "examples"), [("generate", EXAMPLES), ("info", INFO_EXAMPLES)])
def test_help_shows_examples_that_parse(command: str, examples: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("COLUMNS", "200")
    done = sfu(command, "--help")
    assert done.exit_code == 0
    assert "Examples" in done.stdout
    lines = [line for line in examples.splitlines() if line.startswith("sfumato ")]
    assert len(lines) >= 3
    known = done.stdout
    for line in lines:
        assert line[:60] in done.stdout
        assert all(word in known for word in shlex.split(line) if word.startswith("--"))


def test_top_level(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("COLUMNS", "200")
    done = sfu("--help")
    assert done.exit_code == 0
    assert "generate" in done.stdout
    assert "info" in done.stdout
    assert sfu("--version").stdout.strip() == f"sfumato {sfumato.__version__}"
