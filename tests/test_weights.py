"""Weights in and out: broken files are named, loading holds one copy, saving is all or nothing."""

from __future__ import annotations

import errno
import json
import pickle
import shutil
import subprocess
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import diffusers
import pytest
import tiny
import torch
import transformers
from safetensors.torch import load_file, save_file

import sfumato
from sfumato import weights

STEM = "diffusion_pytorch_model"
WEIGHTS, INDEX = f"{STEM}.safetensors", f"{STEM}.safetensors.index.json"
DTYPES = [torch.float32, torch.float16, torch.bfloat16, torch.float64]


@pytest.fixture(scope="module")
def reference() -> Any:
    with torch.random.fork_rng():
        torch.manual_seed(0)
        return tiny.unet().eval()


@pytest.fixture
def folder(reference: Any, tmp_path: Path) -> Path:
    reference.save_pretrained(tmp_path / "unet")
    return tmp_path / "unet"


@pytest.fixture
def sharded(reference: Any, tmp_path: Path) -> Path:
    reference.save_pretrained(tmp_path / "sharded", max_shard_size="200KB")
    return tmp_path / "sharded"


def load(folder: Path, **options: Any) -> Any:
    return sfumato.UNet2DConditionModel.from_pretrained(folder, **options)


def assert_same_weights(got: Any, expected: Any) -> None:
    a, b = got.state_dict(), expected.state_dict()
    assert a.keys() == b.keys()
    for key in a:
        assert a[key].dtype == b[key].dtype
        assert torch.equal(a[key], b[key]), key


def files(folder: Path) -> dict[str, bytes]:
    return {p.name: p.read_bytes() for p in folder.iterdir()}


# --- broken files


def test_missing_weights(folder: Path) -> None:
    (folder / WEIGHTS).unlink()
    with pytest.raises(sfumato.WeightsError, match=rf"no weights in {folder}: expected {WEIGHTS}, download it again"):
        load(folder)


@pytest.mark.parametrize("keep", [0, 4, 8, 100, -1000, -1])
def test_truncated_weights(folder: Path, keep: int) -> None:
    data = (folder / WEIGHTS).read_bytes()
    (folder / WEIGHTS).write_bytes(data[:keep])
    with pytest.raises(sfumato.WeightsError, match=rf"{folder / WEIGHTS} cannot be read as safetensors .*download it again"):
        load(folder)


@pytest.mark.parametrize("junk", [b"\xff" * 64, b"<html>404</html>" * 8, (10**9).to_bytes(8, "little") + b"{}"])
def test_corrupt_weights(folder: Path, junk: bytes) -> None:
    (folder / WEIGHTS).write_bytes(junk)
    with pytest.raises(sfumato.WeightsError, match=rf"{folder / WEIGHTS} cannot be read as safetensors .*download it again"):
        load(folder)


def test_missing_shard(sharded: Path) -> None:
    shards = sorted(p.name for p in sharded.glob("*.safetensors"))
    (sharded / shards[1]).unlink()
    with pytest.raises(sfumato.WeightsError, match=rf"lacks 1 of {len(shards)} shards, first '{shards[1]}': download again"):
        load(sharded)


@pytest.mark.parametrize(
    "text", ["{", "[]", "{}", '{"weight_map": 5}', '{"weight_map": ["a"]}', '{"weight_map": {"a": 5}}', "\xff"]
)
def test_broken_index(sharded: Path, text: str) -> None:
    (sharded / INDEX).write_text(text, encoding="latin-1")
    with pytest.raises(sfumato.WeightsError, match=rf"{INDEX} is not a valid shard index .*download it again"):
        load(sharded)


def test_name_in_two_shards(sharded: Path) -> None:
    first, second, *_ = sorted(sharded.glob("*.safetensors"))
    key = next(iter(load_file(first)))
    save_file({**load_file(second), key: torch.zeros(1)}, second)
    with pytest.raises(sfumato.WeightsError, match=rf"'{key}' stands in two weight files, the second is .*{second.name}"):
        load(sharded)


def test_missing_and_unexpected_parameters(folder: Path) -> None:
    tensors = load_file(folder / WEIGHTS)
    tensors["conv_in.wieght"] = tensors.pop("conv_in.weight")
    save_file(tensors, folder / WEIGHTS)
    message = r"does not fit UNet.*: 1 missing \(first 'conv_in.weight'\), 1 unexpected \(first 'conv_in.wieght'; did you mean"
    with pytest.raises(sfumato.WeightsError, match=message):
        load(folder)


def test_wrong_shape(folder: Path) -> None:
    with pytest.raises(
        sfumato.WeightsError, match=r"'conv_in.weight' has shape \(16, 4, 3, 3\), .*expects \(16, 9, 3, 3\); check that config.json"
    ):
        load(folder, in_channels=9)


# --- pickle is never opened


class Bomb:
    """A pickle that leaves a trace when it is opened."""

    def __init__(self, trace: Path) -> None:
        self.trace = trace

    def __reduce__(self) -> Any:
        return Path.touch, (self.trace,)


@pytest.mark.parametrize("name", [f"{STEM}.bin", "model.ckpt", f"{STEM}.pt", "weights.pth"])
def test_pickle_is_never_opened(folder: Path, tmp_path: Path, name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    (folder / name).write_bytes(pickle.dumps(Bomb(tmp_path / "trace")))
    monkeypatch.setattr(torch, "load", lambda *a, **k: pytest.fail("torch.load was called"))
    load(folder)  # beside safetensors it is left alone
    (folder / WEIGHTS).unlink()
    with pytest.raises(
        sfumato.WeightsError, match=rf"only pickle weights \({name}\), which can run code .*convert them to safetensors"
    ):
        load(folder)
    (folder / WEIGHTS).write_bytes((folder / name).read_bytes())  # nor under a false name
    with pytest.raises(sfumato.WeightsError, match="cannot be read as safetensors"):
        load(folder)
    assert not (tmp_path / "trace").exists()


def test_pickle_cannot_be_asked_for(folder: Path, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"use_safetensors=False asks for pickle weights, .*convert"):
        load(folder, use_safetensors=False)
    with pytest.raises(ValueError, match=r"safe_serialization=False asks for pickle weights"):
        load(folder).save_pretrained(tmp_path / "out", safe_serialization=False)


# --- variants, shards, dtypes


@pytest.mark.parametrize("size", ["10GB", "200KB"])
def test_variant_of_the_reference(reference: Any, tmp_path: Path, size: str) -> None:
    half = tiny.unet().half()
    half.load_state_dict(reference.state_dict())
    half.save_pretrained(tmp_path, variant="fp16", max_shard_size=size)
    assert_same_weights(load(tmp_path, variant="fp16", dtype=torch.float16), half)
    with pytest.raises(
        sfumato.WeightsError, match=rf"expected {WEIGHTS}, .*it does hold {STEM}\.fp16.*: pass the matching `variant`"
    ):
        load(tmp_path)
    with pytest.raises(sfumato.WeightsError, match=rf"expected {STEM}\.bf16\.safetensors"):
        load(tmp_path, variant="bf16")


@pytest.mark.parametrize("variant", [None, "fp16"])
@pytest.mark.parametrize("size", ["50KB", "200KB", 300_000, "0.4MB", "5GB"])
def test_shards_both_ways(reference: Any, tmp_path: Path, variant: str | None, size: int | str) -> None:
    reference.save_pretrained(tmp_path / "theirs", max_shard_size=size, variant=variant)
    got = load(tmp_path / "theirs", variant=variant)
    assert_same_weights(got, reference)
    got.save_pretrained(tmp_path / "ours", max_shard_size=size, variant=variant)
    assert_same_weights(diffusers.UNet2DConditionModel.from_pretrained(tmp_path / "ours", variant=variant), reference)
    limit = {"50KB": 50_000, "200KB": 200_000, "0.4MB": 400_000, "5GB": 5 * 10**9}.get(size, size)  # type: ignore[call-overload]
    for shard in (tmp_path / "ours").glob("*.safetensors"):
        tensors = load_file(shard)
        assert len(tensors) == 1 or sum(t.nbytes for t in tensors.values()) <= limit
    assert any(n.endswith(".json") and "index" in n for n in files(tmp_path / "ours")) == (limit < 10**6)


@pytest.mark.parametrize("size", ["5XB", "", "GB", "-5GB", 0, -1, "nan"])
def test_wrong_shard_size(folder: Path, tmp_path: Path, size: Any) -> None:
    with pytest.raises(ValueError, match=rf"max_shard_size={size!r} is not a size: expected bytes, or text such as '5GB'"):
        load(folder).save_pretrained(tmp_path / "out", max_shard_size=size)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_round_trip_in_every_dtype(reference: Any, tmp_path: Path, dtype: torch.dtype) -> None:
    reference.save_pretrained(tmp_path / "a")
    model = load(tmp_path / "a", dtype=dtype)
    assert model.dtype == dtype
    assert all(torch.equal(p, reference.state_dict()[k].to(dtype)) for k, p in model.state_dict().items())
    model.save_pretrained(tmp_path / "b")
    assert {t.dtype for t in load_file(tmp_path / "b" / WEIGHTS).values()} == {dtype}
    assert_same_weights(load(tmp_path / "b", torch_dtype=dtype), model)


def test_default_dtype_is_float32(reference: Any, tmp_path: Path) -> None:
    half = tiny.unet().half()
    half.save_pretrained(tmp_path)
    model = load(tmp_path)
    assert {p.dtype for p in model.parameters()} == {torch.float32}
    assert all(torch.equal(p, half.state_dict()[k].float()) for k, p in model.state_dict().items())


@pytest.mark.parametrize("dtype", ["float16", torch.int8, 16, float])
def test_wrong_dtype(folder: Path, dtype: Any) -> None:
    with pytest.raises(ValueError, match=r"is not a floating-point torch dtype such as torch.float16"):
        load(folder, dtype=dtype)


def test_contradicting_dtypes(folder: Path) -> None:
    with pytest.raises(ValueError, match=r"dtype=torch.float16 and torch_dtype=torch.float32 differ: pass one"):
        load(folder, dtype=torch.float16, torch_dtype=torch.float32)
    assert load(folder, dtype=torch.float16, torch_dtype=torch.float16).dtype == torch.float16


# --- memory


def mapped_file(address: int) -> str:
    """The file that is mapped at an address of this process."""
    for line in Path("/proc/self/maps").read_text().splitlines():
        start, end = (int(x, 16) for x in line.split()[0].split("-"))
        if start <= address < end:
            return line.split()[-1]
    return ""


@pytest.mark.skipif(not Path("/proc/self/maps").exists(), reason="needs Linux")
def test_parameters_are_views_of_the_file(folder: Path) -> None:
    model = load(folder)
    assert {mapped_file(p.data_ptr()) for p in model.parameters()} == {str((folder / WEIGHTS).resolve())}
    with torch.no_grad():
        model.conv_in.weight.add_(1)  # private: neither the file nor another load sees it
    assert not torch.equal(model.conv_in.weight, load(folder).conv_in.weight)


def test_nothing_is_allocated_before_the_weights(folder: Path) -> None:
    config = json.loads((folder / "config.json").read_text())
    assert {p.device.type for p in weights.build_on_meta(sfumato.UNet2DConditionModel, config).parameters()} == {"meta"}


def test_saving_over_the_file_that_is_mapped(folder: Path) -> None:
    model = load(folder)
    with torch.no_grad():
        model.conv_in.weight.mul_(2)
    expected = {k: v.clone() for k, v in model.state_dict().items()}
    model.save_pretrained(folder)
    assert all(torch.equal(v, expected[k]) for k, v in model.state_dict().items())
    assert all(torch.equal(v, expected[k]) for k, v in load(folder).state_dict().items())


# --- saving is all or nothing


@pytest.mark.parametrize("fails_at", [1, 2, 3])
def test_full_disk_while_saving(sharded: Path, monkeypatch: pytest.MonkeyPatch, fails_at: int) -> None:
    model, before, calls = load(sharded), files(sharded), []
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.zero_()

    def write(tensors: Any, path: Path, metadata: Any = None) -> None:
        calls.append(path)
        if len(calls) == fails_at:
            Path(path).write_bytes(b"half")
            raise OSError(errno.ENOSPC, "No space left on device")
        save_file(tensors, path, metadata)

    monkeypatch.setattr(weights, "save_file", write)
    with pytest.raises(
        OSError, match=r"could not write .*\.safetensors \(No space left on device\); the old file is unchanged"
    ) as caught:
        model.save_pretrained(sharded, max_shard_size="200KB")
    assert caught.value.errno == errno.ENOSPC
    assert files(sharded) == before


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Path]:
    place = tmp_path / "disk"
    place.mkdir()
    if (
        not shutil.which("mount")
        or subprocess.run(["mount", "-t", "tmpfs", "-o", "size=1200k", "tmpfs", place], capture_output=True).returncode
    ):
        pytest.skip("cannot mount a file system here")
    yield place
    subprocess.run(["umount", place], check=True)


@pytest.mark.parametrize("size", ["10GB", "200KB"])
def test_really_full_disk(reference: Any, small_disk: Path, folder: Path, size: str) -> None:
    model = load(folder)
    model.save_pretrained(small_disk, max_shard_size=size)
    before = files(small_disk)
    with torch.no_grad():
        model.conv_in.weight.zero_()
    with pytest.raises(OSError, match=r"could not write .*No space left on device.*the old file is unchanged"):
        model.save_pretrained(small_disk, max_shard_size=size)
    assert files(small_disk) == before
    assert_same_weights(load(small_disk), reference)


def test_really_full_disk_for_a_component_of_transformers(checkpoint: Callable[[str], tuple[Path, Any]], small_disk: Path) -> None:
    from sfumato.pipelines.loading import save_components

    encoder = transformers.CLIPTextModel.from_pretrained(checkpoint("StableDiffusionPipeline")[0] / "text_encoder")
    options: Any = {"variant": None, "max_shard_size": "10GB"}
    save_components({"text_encoder": encoder}, {}, small_disk, **options)
    before = files(small_disk / "text_encoder")
    (small_disk / "ballast").write_bytes(bytes(950_000))
    with pytest.raises(OSError, match=r"could not write .*text_encoder .*; the old files are unchanged"):
        save_components({"text_encoder": encoder}, {}, small_disk, **options)
    assert files(small_disk / "text_encoder") == before
    assert sorted(p.name for p in small_disk.iterdir()) == ["ballast", "model_index.json", "text_encoder"]


def test_saving_in_another_form_leaves_nothing_outdated(folder: Path, reference: Any) -> None:
    model = load(folder)
    for size, variant in (("200KB", None), ("100KB", None), ("10GB", None), ("200KB", "fp16"), ("10GB", "fp16")):
        model.save_pretrained(folder, max_shard_size=size, variant=variant)
        assert_same_weights(load(folder, variant=variant), reference)
        assert_same_weights(diffusers.UNet2DConditionModel.from_pretrained(folder, variant=variant), reference)
    assert sorted(files(folder)) == ["config.json", f"{STEM}.fp16.safetensors", WEIGHTS]


def test_save_to_a_file(folder: Path) -> None:
    with pytest.raises(NotADirectoryError, match=r"save_directory='.*config.json' is a file; pass a folder"):
        load(folder).save_pretrained(folder / "config.json")
