"""The recipe of the embedded model: the whole chain from nothing, and what its parts promise."""

from __future__ import annotations

import io
import json
import subprocess
import sys
import tarfile
from collections import Counter
from pathlib import Path
from typing import Any

import diffusers
import numpy as np
import pytest
import torch
from PIL import Image

import sfumato
from sfumato.training.settings import AutoencoderSettings, TextToImageSettings
from sfumato.weights import build_on_meta

RECIPE = Path(__file__).parents[1] / "recipes" / "emoji"
sys.path.insert(0, str(RECIPE))

import concepts  # noqa: E402
import drawings  # noqa: E402
import evaluate  # noqa: E402
import prepare  # noqa: E402
import recipe  # noqa: E402


@pytest.fixture(scope="module")
def chain(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """Folders of the work and of the finished pipeline."""
    folder = tmp_path_factory.mktemp("recipe")
    work, out = folder / "work", folder / "emoji"
    run(work, out)
    return work, out


def run(work: Path, out: Path, *stages: str) -> str:
    command = [sys.executable, RECIPE / "recipe.py", *stages, "--size", "smoke", "--work", work, "--out", out]
    done = subprocess.run(list(map(str, command)), capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    return done.stdout + done.stderr


def test_the_chain_ends_in_a_pipeline_for_both_libraries(chain: tuple[Path, Path]) -> None:
    _, out = chain
    pictures = []
    for library in (diffusers, sfumato):
        pipe = library.StableDiffusionPipeline.from_pretrained(out, torch_dtype=torch.float32)
        pipe.set_progress_bar_config(disable=True)
        assert pipe.scheduler.config.prediction_type == "v_prediction" and pipe.scheduler.config.rescale_betas_zero_snr
        call = dict(num_inference_steps=4, guidance_scale=4.0, output_type="np", generator=torch.Generator().manual_seed(0))
        pictures.append(pipe("lemon, flat style", **call).images)
    assert pictures[0].shape == (1, 32, 32, 3)
    np.testing.assert_allclose(pictures[1], pictures[0], atol=1e-4)


def test_the_measure_is_written(chain: tuple[Path, Path]) -> None:
    found = json.loads((chain[0] / "evaluation" / "evaluation.json").read_text())
    assert found["prompts"] == found["concepts"] == 4
    assert 0 <= found["model"]["concept_top1"] <= found["model"]["concept_top5"] <= 1
    assert found["distance_to_nearest_training_picture"] > 0
    assert Image.open(chain[0] / "evaluation" / "neighbours.png").size[0] == 150 + 4 * 72


def test_what_is_held_out_is_not_trained_on(chain: tuple[Path, Path]) -> None:
    names = {part: [r["name"] for r in records(chain[0] / "set" / f"{part}.tar")] for part in ("train", "held-out")}
    described = map(json.loads, (chain[0] / "pack" / "metadata.jsonl").read_text().splitlines())
    held = {m["file"] for m in described if (m["label"], m["style"]) in concepts.HELD_OUT}
    assert len(held) == 4 and set(names["held-out"]) == held
    assert not {name.split(" ")[0] for name in names["train"]} & held
    assert len({name for name in names["train"] if " " not in name}) == 16


def records(path: Path) -> list[dict[str, Any]]:
    with tarfile.open(path) as tar:
        return [json.loads(tar.extractfile(m).read()) for m in tar if m.name.endswith(".json")]  # type: ignore[union-attr]


def test_stages_go_on_where_they_ended(chain: tuple[Path, Path]) -> None:
    work, out = chain
    before = (work / "denoiser" / "model" / "unet" / "diffusion_pytorch_model.safetensors").read_bytes()
    said = run(work, out, "denoiser", "export")
    assert "going on from" in said and "step 20 of 20" not in said
    assert (work / "denoiser" / "model" / "unet" / "diffusion_pytorch_model.safetensors").read_bytes() == before


@pytest.mark.parametrize("size", recipe.SIZES)
def test_sizes_fit_together(size: str) -> None:
    """Every table is known to the settings and to its network, the parts fit, and the whole stays below 45 MB in float16."""
    folder = RECIPE / "sizes" / size
    vae = AutoencoderSettings.read(folder / "autoencoder.toml", data="d", out="o")
    denoiser = TextToImageSettings.read(folder / "denoiser.toml", data="d", out="o")
    text = {**denoiser.text_encoder, "vocab_size": recipe.SIZES[size].vocabulary}  # type: ignore[dict-item]
    tables = {"AutoencoderKL": vae.vae, "UNet2DConditionModel": denoiser.unet, "CLIPTextModel": text}
    networks = {name: build_on_meta(getattr(sfumato, name), table) for name, table in tables.items()}
    for name, table in tables.items():
        assert set(table) <= set(getattr(sfumato, name)._init_parameters())
    assert sum(network.num_parameters() for network in networks.values()) * 2 < 45e6
    config = networks["UNet2DConditionModel"].config
    assert config.cross_attention_dim == networks["CLIPTextModel"].config.hidden_size
    assert networks["CLIPTextModel"].config.max_position_embeddings == recipe.SIZES[size].length
    factor = 2 ** (len(networks["AutoencoderKL"].config.block_out_channels) - 1)
    assert config.sample_size * factor == vae.resolution == denoiser.resolution == recipe.SIZES[size].edge
    scheduler = sfumato.DDIMScheduler.from_config(denoiser.scheduler)
    assert scheduler.alphas_cumprod[-1] == 0 and scheduler.config.timestep_spacing == "trailing"


def test_held_out_pairs() -> None:
    assert len(set(concepts.HELD_OUT)) == 60
    assert Counter(style for _, style in concepts.HELD_OUT) == dict.fromkeys(concepts.STYLES, 12)
    assert {concept for concept, _ in concepts.HELD_OUT} <= set(concepts.CORE)
    assert len(set(concepts.CORE)) == len(concepts.CORE)


def test_concepts_are_drawn_alike_often(tmp_path: Path) -> None:
    """Whatever their number of drawings; those in other colours are ``colours`` times as frequent."""
    drawings.make_smoke_pack(tmp_path)
    prepare.training_set(prepare.read_pack(tmp_path), tmp_path, None, 0.5, 16)
    own, coloured = Counter[str](), Counter[str]()
    labels = {m["file"]: m["label"] for m in map(json.loads, (tmp_path / "metadata.jsonl").read_text().splitlines())}
    for record in records(tmp_path / "train.tar"):
        file, _, colour = record["name"].partition(" ")
        (coloured if colour else own)[labels[file]] += record["weight"]
    assert own == pytest.approx(dict.fromkeys(own, 1.0))
    assert coloured == pytest.approx(dict.fromkeys(own, 0.5))


def test_captions() -> None:
    import random

    texts = [t for seed in range(500) for t in prepare.captions("cat face", "flat", ["cat", "pet", "face"], random.Random(seed))]
    count = Counter(texts)
    for text, share in {"cat face": 2 / 12, "cat face, flat style": 5 / 12, "flat cat face": 2 / 12}.items():
        assert count[text] / len(texts) == pytest.approx(share)
    tagged = [t for t in texts if t not in ("cat face", "cat face, flat style", "flat cat face")]
    assert all(t.startswith("cat face, ") for t in tagged)
    assert sum(t.endswith("flat style") for t in tagged) / len(tagged) == pytest.approx(2 / 3)


@pytest.mark.parametrize("colour", ["red", "green", "blue"])
def test_colours(colour: str) -> None:
    about = {"group": "food-drink", "style": "flat", "label": "gold lemon"}
    picture = Image.new("RGB", (32, 32), "white")
    picture.paste("gold", (8, 8, 24, 24))
    buffer = io.BytesIO()
    picture.save(buffer, "PNG")
    made = dict(prepare.in_colours(about, buffer.getvalue()))
    pixel = np.asarray(made[f"{colour} gold lemon"])[16, 16]
    assert pixel.argmax() == ("red", "green", "blue").index(colour)
    assert (np.asarray(made[f"{colour} gold lemon"])[0, 0] == 255).all()
    assert "yellow gold lemon" not in made  # that is what it is
    buffer.seek(0)
    picture.paste("blue", (8, 8, 16, 24))
    picture.save(buffer, "PNG")
    assert not dict(prepare.in_colours(about, buffer.getvalue()))


def package(folder: Path, file: str, content: dict[str, Any]) -> None:
    folder.mkdir(exist_ok=True)
    with tarfile.open(folder / file, "w:gz") as tar:
        for name, value in content.items():
            prepare.add(tar, f"package/{name}", value if isinstance(value, bytes) else json.dumps(value).encode())


def test_packages_become_drawings(tmp_path: Path) -> None:
    """Icons are matched by code point, then by name; what has no name or is mirrored is left out."""
    pytest.importorskip("resvg_py")

    def square(colour: str) -> dict[str, str]:
        return {"body": f'<path fill="{colour}" d="M0 0H16V16H0z"/>'}

    entries = [("1F34B", "lemon", 4), ("1F34C", "banana", 4), ("1F449", "pointing right", 1), ("1F1E6", "a flag", 9)]
    captions = [{"hexcode": h, "label": name, "tags": [], "group": g, "subgroup": 0} for h, name, g in entries]
    groups = {"groups": {"4": "food-drink", "1": "people-body", "9": "flags"}, "subgroups": {"0": "food-fruit"}}
    package(tmp_path / "p", "emojibase-data-17.0.0.tgz", {"en/data.json": captions, "meta/groups.json": groups})
    aliases = {"pointing-right": {"parent": "banana", "hFlip": True}}
    icons = {"icons": {"citrus": square("#ff0000"), "banana": square("#00ff00")}, "aliases": aliases, "width": 32, "height": 16}
    for name in drawings.ICONS.values():
        file = name.removeprefix("@").replace("/", "-").replace("@", "-") + ".tgz"
        package(tmp_path / "p", file, {"icons.json": icons, "chars.json": {"1f34b": "citrus"}})
    buffer = io.BytesIO()
    Image.new("RGBA", (20, 20), (0, 0, 255, 255)).save(buffer, "WEBP", lossless=True)
    package(tmp_path / "p", "lobehub-fluent-emoji-3d-1.1.0.tgz", {"assets/1f34b-fe0f.webp": buffer.getvalue(), "x.js": b""})
    drawings.make_pack(tmp_path / "pack", tmp_path / "p")
    found = {m["file"]: (m, Image.open(io.BytesIO(data))) for m, data in prepare.read_pack(tmp_path / "pack")}
    assert sorted(found) == sorted(["3d/1f34b.webp", *(f"{s}/1f34{c}.webp" for s in drawings.ICONS for c in "bc")])
    assert found["3d/1f34b.webp"][1].getpixel((64, 64)) == (0, 0, 255)
    about, picture = found["noto/1f34b.webp"]
    assert (about["label"], about["group"], about["style"]) == ("lemon", "food-drink", "noto")
    assert picture.size == (128, 128)
    assert picture.getpixel((32, 64)) == (255, 0, 0)  # half as wide as the icon's box, and centred
    assert picture.getpixel((64, 10)) == (255, 255, 255) and picture.getpixel((100, 64)) == (255, 255, 255)


def test_the_nearest_is_found() -> None:
    known = [Image.new("RGB", (40, 40), (10 * k, 0, 0)) for k in range(5)]
    distances, which = evaluate.nearest([Image.new("RGB", (64, 64), (21, 0, 0))], known, 3)
    assert which[0].tolist() == [2, 3, 1]
    assert distances[0] == pytest.approx(np.array([1, 9, 11]) / 255 / 3**0.5, rel=1e-3)
