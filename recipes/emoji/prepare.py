"""From packed drawings to training data: captions, colours, what is held out, and a vocabulary."""

from __future__ import annotations

import io
import json
import random
import tarfile
from collections import Counter
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
from concepts import HELD_OUT
from PIL import Image

COLOURS = {"red": 0, "orange": 30, "yellow": 52, "green": 120, "blue": 215, "purple": 275, "pink": 325}
"""Hues in degrees."""

Drawing = tuple[dict[str, Any], bytes]


def read_pack(data: Path) -> list[Drawing]:
    """The drawings of ``emoji-128.tar`` with their lines of ``metadata.jsonl``."""
    described = {m["file"]: m for m in map(json.loads, (data / "metadata.jsonl").read_text(encoding="utf-8").splitlines())}
    with tarfile.open(data / "emoji-128.tar") as tar:
        files = {m.name.removeprefix("./"): tar.extractfile(m).read() for m in tar if m.isfile()}  # type: ignore[union-attr]
    return [(described[name], picture) for name, picture in files.items()]


def captions(label: str, style: str, tags: list[str], rng: random.Random) -> list[str]:
    """Twelve captions, of which each step draws one: the label alone, with its style in two orders, with tags."""
    texts = [label] * 2 + [f"{label}, {style} style"] * 5 + [f"{style} {label}"] * 2
    for k in range(3):
        chosen = rng.sample(tags, min(len(tags), rng.randint(1, 3)))
        texts.append(", ".join([label, *chosen, *([f"{style} style"] if k else [])]))
    return texts


def main_hue(picture: Image.Image) -> float | None:
    """The hue, in degrees, of a drawing that has one colour; ``None`` for several, or none."""
    hue, saturation, value = (np.asarray(c, dtype=np.float32) for c in picture.convert("HSV").split())
    strong = (saturation > 90) & (value > 60)
    if strong.mean() < 0.05:
        return None
    angle = hue[strong] * (2 * np.pi / 256)
    centre = np.exp(1j * angle).mean()
    return float(np.degrees(np.angle(centre)) % 360) if abs(centre) > 0.96 else None


def recoloured(picture: Image.Image, shift: float) -> Image.Image:
    """Turns every hue by ``shift`` degrees."""
    hue, saturation, value = picture.convert("HSV").split()
    turned = (np.asarray(hue, dtype=np.int32) + round(shift * 256 / 360)) % 256
    return Image.merge("HSV", (Image.fromarray(turned.astype(np.uint8)), saturation, value)).convert("RGB")


def in_colours(description: dict[str, Any], data: bytes) -> Iterator[tuple[str, Image.Image]]:
    """A one-coloured drawing in other colours, each with its label: ``blue star``."""
    if description["group"] in ("smileys-emotion", "people-body", "symbols") or description["style"] == "line":
        return
    picture = Image.open(io.BytesIO(data)).convert("RGB")
    hue = main_hue(picture)
    if hue is None:
        return
    words = description["label"].split()
    noun = " ".join(words[1:] if words[0] in COLOURS else words)
    for colour, wanted in COLOURS.items():
        shift = (wanted - hue + 180) % 360 - 180
        if abs(shift) > 20:
            yield f"{colour} {noun}", recoloured(picture, shift)


def training_set(drawings: list[Drawing], out: Path, concepts: Iterable[str] | None, colours: float, size: int) -> None:
    """Writes ``train.tar`` and ``held-out.tar`` in the layout of webdataset, and ``texts.txt`` for the vocabulary.

    Args:
        drawings: All of them.
        out: Folder to write to.
        concepts: Labels to teach; ``None``: all but people.
        colours: Weight of a concept's drawings in other colours, beside 1 of its own.
        size: Edge in pixels.
    """
    wanted = set(concepts) if concepts is not None else {m["label"] for m, _ in drawings if m["group"] != "people-body"}
    rng, held_out = random.Random(0), set(HELD_OUT)
    chosen = [(m, data) for m, data in drawings if m["label"] in wanted]
    parts: dict[str, list[tuple[str, str, list[str], str, Image.Image]]] = {"train": [], "held-out": []}
    for m, data in chosen:
        held = (m["label"], m["style"]) in held_out
        own = (m["label"], "own", captions(m["label"], m["style"], m["tags"], rng), m["file"])
        parts["held-out" if held else "train"].append((*own, Image.open(io.BytesIO(data)).convert("RGB")))
        if colours and not held:
            for label, picture in in_colours(m, data):
                texts = captions(label, m["style"], [], rng)
                parts["train"].append((m["label"], "coloured", texts, f"{m['file']} {label}", picture))
    for part, entries in parts.items():
        counts = Counter((concept, kind) for concept, kind, *_ in entries)
        with tarfile.open(out / f"{part}.tar", "w") as tar:
            for k, (concept, kind, texts, name, picture) in enumerate(entries):
                weight = (colours if kind == "coloured" else 1.0) / counts[concept, kind]
                record = {"text": texts, "weight": weight if part == "train" else 1.0, "name": name}
                add(tar, f"{k:06d}.json", json.dumps(record).encode())
                buffer = io.BytesIO()
                picture.resize((size, size), Image.Resampling.LANCZOS).save(buffer, "WEBP", lossless=True)
                add(tar, f"{k:06d}.webp", buffer.getvalue())
    texts = sorted({t for entries in parts.values() for _, _, texts, *_ in entries for t in texts})
    (out / "texts.txt").write_text("\n".join(texts) + "\n", encoding="utf-8")


def add(tar: tarfile.TarFile, name: str, data: bytes) -> None:
    """Adds a file that is the same at each making."""
    entry = tarfile.TarInfo(name)
    entry.size = len(data)
    tar.addfile(entry, io.BytesIO(data))


def make_tokenizer(texts: list[str], folder: Path, vocabulary: int, length: int) -> None:
    """Learns a byte-pair vocabulary from captions and writes it in the format of CLIP's tokenizer."""
    import transformers
    from tokenizers import Regex, Tokenizer, models, normalizers, pre_tokenizers, trainers

    tokenizer = Tokenizer(models.BPE(end_of_word_suffix="</w>"))
    tokenizer.normalizer = normalizers.Sequence([normalizers.NFC(), normalizers.Lowercase()])
    words = Regex(r"'s|'t|'re|'ve|'m|'ll|'d|[\p{L}]+|[\p{N}]|[^\s\p{L}\p{N}]+")
    byte_level = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence([pre_tokenizers.Split(words, "removed", invert=True), byte_level])
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    trainer = trainers.BpeTrainer(
        vocab_size=vocabulary - len(alphabet) - 2, end_of_word_suffix="</w>", initial_alphabet=alphabet, show_progress=False
    )
    tokenizer.train_from_iterator(texts, trainer)
    merges = [m if isinstance(m, str) else " ".join(m) for m in json.loads(tokenizer.to_str())["model"]["merges"]]
    made = [m.replace(" ", "") for m in merges]
    entries = dict.fromkeys([*alphabet, *(a + "</w>" for a in alphabet), *made, "<|startoftext|>", "<|endoftext|>"])
    raw = folder / "raw"
    raw.mkdir(parents=True, exist_ok=True)
    (raw / "vocab.json").write_text(json.dumps({t: i for i, t in enumerate(entries)}, ensure_ascii=False), encoding="utf-8")
    (raw / "merges.txt").write_text("#version: 0.2\n" + "\n".join(merges) + "\n", encoding="utf-8")
    transformers.CLIPTokenizer.from_pretrained(raw, model_max_length=length).save_pretrained(folder)
