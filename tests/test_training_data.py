"""Training data: layouts, buckets, the order of examples, the cache."""

from __future__ import annotations

import io
import json
import tarfile
from collections import Counter
from collections.abc import Callable
from pathlib import Path

import datasets
import numpy as np
import pytest
import tiny
import torch
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image

from sfumato.errors import ConfigError
from sfumato.training.cache import SHARD, cached, fingerprint
from sfumato.training.components import Pictures, as_bytes, held_out_batches
from sfumato.training.data import Example, read_examples
from sfumato.training.sampling import Sampler, bucket_sizes, generator, nearest_bucket
from sfumato.training.text_to_image import Captions

TEXTS = ("red cat", "blue cat", "a cat, unlike the others")


def write_pictures(folder: Path) -> list[Path]:
    folder.mkdir(exist_ok=True)
    paths = [folder / f"{k} x.png" for k in range(3)]
    for k, path in enumerate(paths):
        tiny.picture(k).save(path)
    return paths


def beside(folder: Path) -> Path:
    for path, text in zip(write_pictures(folder), TEXTS, strict=True):
        path.with_suffix(".txt").write_text(text + "\n")
    return folder


def captions_file(folder: Path) -> Path:
    lines = [f"{path.name}\t{text}" for path, text in zip(write_pictures(folder), TEXTS, strict=True)]
    (folder / "captions.txt").write_text("\n".join(lines) + "\n")
    return folder


def metadata(folder: Path) -> Path:
    lines = [json.dumps({"file_name": p.name, "text": t}) for p, t in zip(write_pictures(folder), TEXTS, strict=True)]
    (folder / "metadata.jsonl").write_text("\n".join(lines))
    return folder


def add(tar: tarfile.TarFile, name: str, data: bytes) -> None:
    entry = tarfile.TarInfo(name)
    entry.size = len(data)
    tar.addfile(entry, io.BytesIO(data))


def webdataset(folder: Path) -> Path:
    """Two shards; one caption in a text file, two in JSON."""
    folder.mkdir()
    source = folder.parent / "source"
    for k, (path, text) in enumerate(zip(write_pictures(source), TEXTS, strict=True)):
        with tarfile.open(folder / f"shard-{k // 2}.tar", "a") as tar:
            add(tar, f"{k:04d}.png", path.read_bytes())
            add(tar, f"{k:04d}.txt" if k == 0 else f"{k:04d}.json", (text if k == 0 else json.dumps({"text": text})).encode())
    return folder


def on_disk(folder: Path) -> Path:
    pictures = [tiny.picture(k) for k in range(3)]
    datasets.Dataset.from_dict(
        {"image": pictures, "text": list(TEXTS)},
        features=datasets.Features({"image": datasets.Image(), "text": datasets.Value("string")}),
    ).save_to_disk(folder)
    return folder


@pytest.mark.parametrize("layout", [beside, captions_file, metadata, webdataset, on_disk])
def test_layouts_hold_the_same(layout: Callable[[Path], Path], tmp_path: Path) -> None:
    examples = read_examples(str(layout(tmp_path / "data")))
    assert [e.texts for e in examples] == [(text,) for text in TEXTS]
    for k, example in enumerate(examples):
        assert np.array_equal(np.asarray(example.picture()), np.asarray(tiny.picture(k)))
        assert example.weight == 1
    assert len({e.version for e in examples}) == 3
    assert [e.version for e in read_examples(str(tmp_path / "data"))] == [e.version for e in examples]


def test_a_name_of_datasets_is_loaded(tmp_path: Path) -> None:
    """``load_dataset`` reads a folder of parquet by its name and split."""
    table = datasets.load_from_disk(str(on_disk(tmp_path / "disk")))
    (tmp_path / "named").mkdir()
    table.to_parquet(tmp_path / "named" / "train.parquet")
    assert [e.texts for e in read_examples(f"{tmp_path / 'named'}:train[:2]")] == [(text,) for text in TEXTS[:2]]


def test_several_captions_and_weights(tmp_path: Path) -> None:
    folder = tmp_path / "data"
    names = [p.name for p in write_pictures(folder)]
    entries = [{"file_name": names[0], "text": ["a", "b"], "weight": 3}, {"file_name": names[1], "text": "c"}]
    (folder / "metadata.jsonl").write_text("\n".join(map(json.dumps, entries)))
    examples = read_examples(str(folder))
    assert [(e.texts, e.weight) for e in examples] == [(("a", "b"), 3), (("c",), 1)]


def test_pictures_without_captions(tmp_path: Path) -> None:
    write_pictures(tmp_path / "data")
    assert [e.texts for e in read_examples(str(tmp_path / "data"), captions=False)] == [()] * 3
    with pytest.raises(ConfigError, match=r"0 x.png has no caption: write it to 0 x.txt beside it, or list all captions"):
        read_examples(str(tmp_path / "data"))


def spoil(layout: Callable[[Path], Path], file: str, text: str) -> Callable[[Path], None]:
    def make(folder: Path) -> None:
        layout(folder)
        (folder / file).write_text(text)

    return make


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda f: f.mkdir(), "holds no pictures"),
        (lambda f: f.write_text("x"), "is a file, but no .tar"),
        (lambda f: None, "is neither a folder here nor a data set that `datasets` finds"),
        (spoil(metadata, "captions.txt", "x"), r"has several layouts \(metadata.jsonl, captions.txt\): leave one"),
        (spoil(captions_file, "captions.txt", "a.png red cat"), "captions.txt line 1: expected a file name, a tab and a caption"),
        (spoil(captions_file, "captions.txt", "a.png\tred cat"), "captions.txt names 'a.png', which is not there"),
        (spoil(metadata, "metadata.jsonl", "{"), "metadata.jsonl line 1 is not valid JSON"),
        (spoil(metadata, "metadata.jsonl", "[1]"), "metadata.jsonl line 1 holds a list, expected an object"),
        (spoil(metadata, "metadata.jsonl", '{"text": "a"}'), "expected an object with 'file_name' and 'text'"),
        (spoil(metadata, "metadata.jsonl", '{"file_name": "0 x.png", "text": 1}'), "text=1, expected a caption or a list"),
        (spoil(metadata, "metadata.jsonl", '{"file_name": "0 x.png"}'), "0 x.png has no caption: add it"),
        (
            spoil(metadata, "metadata.jsonl", '{"file_name": "0 x.png", "text": "a", "weight": "b"}'),
            "weight='b', expected a number",
        ),
        (
            spoil(metadata, "metadata.jsonl", '{"file_name": "0 x.png", "text": "a", "weight": -1}'),
            "has weight -1.0: expected above",
        ),
        (spoil(metadata, "metadata.jsonl", '{"file_name": "0 x.png", "text": "a", "weight": 0}'), "has weight 0.0: expected above"),
        (spoil(webdataset, "shard-2.tar", "junk" * 999), "shard-2.tar is not a readable, uncompressed .tar"),
    ],
)
def test_spoilt_data_is_explained(make: Callable[[Path], None], message: str, tmp_path: Path) -> None:
    make(tmp_path / "data")
    with pytest.raises(ConfigError, match=message):
        read_examples(str(tmp_path / "data"))


def test_a_tar_without_a_picture_and_a_broken_picture(tmp_path: Path) -> None:
    with tarfile.open(tmp_path / "a.tar", "w") as tar:
        add(tar, "x/7.txt", b"a")
    with pytest.raises(ConfigError, match=r"a.tar:x/7 has no picture, only .txt: pack one of"):
        read_examples(str(tmp_path / "a.tar"))
    with tarfile.open(tmp_path / "b.tar", "w") as tar:
        add(tar, "7.txt", b"a")
        add(tar, "7.png", b"no picture")
    (example,) = read_examples(str(tmp_path / "b.tar"))
    with pytest.raises(ConfigError, match=r"b.tar:7 cannot be read as a picture .*: mend it or leave it out"):
        example.picture()


# --- buckets


@given(st.integers(1, 16), st.integers(1, 64), st.floats(1, 4))
def test_buckets(count: int, multiple: int, ratio: float) -> None:
    resolution = count * multiple
    sizes = bucket_sizes(resolution, multiple, ratio)
    assert (resolution, resolution) in sizes and len(set(sizes)) == len(sizes)
    for width, height in sizes:
        assert width % multiple == height % multiple == 0
        assert width * height <= resolution**2
        assert 1 / ratio <= width / height <= ratio
        assert (height, width) in sizes


@given(st.integers(1, 9000), st.integers(1, 9000))
def test_a_picture_goes_where_least_is_cut_off(width: int, height: int) -> None:
    sizes = bucket_sizes(512, 64)

    def kept(size: tuple[int, int]) -> float:
        scale = max(size[0] / width, size[1] / height)
        return size[0] * size[1] / (width * height * scale**2)

    chosen = sizes[nearest_bucket(width, height, sizes)]
    assert kept(chosen) == pytest.approx(max(map(kept, sizes)))


def test_a_resolution_that_does_not_fit() -> None:
    with pytest.raises(ConfigError, match="resolution=500 must be a multiple of 64 for this model, such as 512"):
        bucket_sizes(500, 64)


def test_pictures_cover_their_bucket() -> None:
    """A wide picture loses its sides, not its middle, and keeps its proportions."""
    picture = Image.new("RGB", (300, 100), "white")
    picture.paste("red", (100, 0, 200, 100))
    (pixels,) = as_bytes([picture], (32, 32))
    assert pixels.shape == (3, 32, 32)
    assert pixels[:, 16, 16].tolist() == [255, 0, 0]
    assert pixels[1, :, 3:-3].max() == 0
    (wide,) = as_bytes([picture], (64, 32))
    assert wide.shape == (3, 32, 64)
    assert wide[1, 16, :10].min() > 250 and wide[1, 16, 26:38].max() < 5 and wide[1, 16, 54:].min() > 250


def test_pictures_are_kept_by_bucket(tmp_path: Path) -> None:
    shapes = [(64, 64), (128, 64), (64, 128), (120, 60), (63, 64)]

    def example(k: int) -> Example:
        return Example(f"{k}", ("a",), 1.0, f"{k}", lambda: tiny.picture(k, shapes[k]))

    calls = []

    def encode(pixels: torch.Tensor) -> torch.Tensor:
        calls.append(len(pixels))
        return pixels

    examples = [example(k) for k in range(5)]
    for _ in range(2):
        pictures = Pictures(examples, tmp_path, 64, 16, True, encode, "v")
        assert sorted(map(sorted, pictures.buckets)) == [[0, 4], [1, 3], [2]]
        for bucket in pictures.buckets:
            size = (pictures[bucket].shape[3], pictures[bucket].shape[2])
            assert torch.equal(pictures[bucket], as_bytes([examples[i].picture() for i in bucket], size))
        assert sum(calls) == 5  # the second time all comes from the disk
    Pictures(examples, tmp_path, 64, 16, True, encode, "another")
    assert sum(calls) == 10
    assert sorted(i for batch in held_out_batches(pictures.buckets, 2) for i in batch) == [0, 1, 2, 3, 4]


# --- order


@given(st.lists(st.integers(1, 12), min_size=1, max_size=4), st.integers(1, 5), st.integers(0, 3))
def test_every_example_once_an_epoch(sizes: list[int], batch: int, epoch: int) -> None:
    buckets, start = [], 0
    for size in sizes:
        buckets.append(range(start, start + size))
        start += size
    sampler = Sampler(buckets, [1.0] * start, batch, seed=3)
    per_epoch = sum(-(-size // batch) for size in sizes)
    batches = [sampler.batch(epoch * per_epoch + k) for k in range(per_epoch)]
    of = {i: b for b, bucket in enumerate(buckets) for i in bucket}
    assert all(len(b) == batch and len({of[i] for i in b}) == 1 for b in batches)
    counts = Counter(i for b in batches for i in b)
    assert set(counts) == set(range(start))
    assert sum(counts.values()) - start == per_epoch * batch - start  # only what fills up the last batch of a bucket
    again = Sampler(buckets, [1.0] * start, batch, seed=3)
    assert again.batch(epoch * per_epoch) == batches[0]


def test_epochs_and_seeds_differ() -> None:
    sampler = Sampler([range(64)], [1.0] * 64, 64, seed=0)
    assert sampler.batch(0) != sampler.batch(1) != Sampler([range(64)], [1.0] * 64, 64, seed=1).batch(1)


def test_weights_are_how_often() -> None:
    weights = [1.0, 3.0, 0.0, 4.0]
    sampler = Sampler([[0, 2], [1, 3]], weights, 10, seed=0)
    batches = [sampler.batch(k) for k in range(4000)]
    assert all(set(b) <= {0, 2} or set(b) <= {1, 3} for b in batches)
    counts = Counter(i for b in batches for i in b)
    assert counts[2] == 0
    for i in (0, 1, 3):
        assert counts[i] / 40000 == pytest.approx(weights[i] / 8, abs=0.02)


def test_generators_are_apart() -> None:
    draws = {torch.rand(1, generator=generator(*labels)).item() for labels in [(0, "a", 1), (0, "a", 2), (0, "b", 1), (1, "a", 1)]}
    assert len(draws) == 4


def test_captions_are_drawn_and_dropped() -> None:
    examples = [Example("0", ("a", "b"), 1.0, "", tiny.picture), Example("1", ("c",), 1.0, "", tiny.picture)]
    captions = Captions(examples)
    drawn = captions.draw([0, 1] * 4000, 0.25, torch.Generator().manual_seed(0))
    texts = Counter(captions.texts[row] for row in drawn)
    for text, share in {"": 0.25, "a": 0.1875, "b": 0.1875, "c": 0.375}.items():
        assert texts[text] / 8000 == pytest.approx(share, abs=0.02)
    assert all(captions.texts[row] in ("c", "") for row in drawn[1::2])
    assert 0 not in captions.draw([0, 1] * 99, 0.0, torch.Generator().manual_seed(0))


# --- cache


def test_an_interrupted_cache_goes_on(tmp_path: Path) -> None:
    asked: list[range] = []

    def compute(rows: range) -> list[torch.Tensor]:
        asked.append(rows)
        if len(asked) == 2:
            raise KeyboardInterrupt
        return [torch.arange(rows.start, rows.stop).float()[:, None]]

    count = 2 * SHARD + 3
    with pytest.raises(KeyboardInterrupt):
        cached(tmp_path / "c", count, compute, "rows")
    rows = cached(tmp_path / "c", count, compute, "rows")
    assert [(r.start, r.stop) for r in asked] == [(0, SHARD), (SHARD, 2 * SHARD), (SHARD, 2 * SHARD), (2 * SHARD, count)]
    assert len(rows) == count
    assert rows[[0, SHARD, count - 1, 5]][:, 0].tolist() == [0, SHARD, count - 1, 5]


def test_fingerprints_see_weights() -> None:
    first, second = torch.nn.Linear(3, 2), torch.nn.Linear(3, 2)
    second.load_state_dict(first.state_dict())
    assert fingerprint(first, "x") == fingerprint(second, "x") != fingerprint(first, "y")
    second.bias.data[0] += 1
    assert fingerprint(first, "x") != fingerprint(second, "x")
