"""Training data: pictures with captions, in the layouts that people have.

- a folder with ``metadata.jsonl``: one object a line with ``file_name``, ``text`` (a caption or several), perhaps ``weight``;
- a folder with ``captions.txt``: lines of file name, tab, caption;
- a folder of pictures, each with a ``.txt`` of its name beside it;
- webdataset: a ``.tar``, or a folder of them, of files that belong together by their names: ``0001.png`` with ``0001.txt`` (the
  caption) or ``0001.json`` (``text`` and ``weight`` as above);
- what ``datasets.load_dataset`` or ``load_from_disk`` reads, with columns ``image`` and ``text``; ``name:split`` names a split.
"""

from __future__ import annotations

import json
import tarfile
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

from PIL import Image

from ..errors import ConfigError
from ..media.image import load_image

PICTURES = frozenset({".png", ".jpg", ".jpeg", ".webp", ".bmp", ".gif", ".tif", ".tiff"})


@dataclass(frozen=True)
class Example:
    """One picture.

    Attributes:
        name: Where it is, for messages.
        texts: Its captions; each use draws one of them.
        weight: How often it is drawn, relative to others.
        version: Changes when the picture does.
        read: Returns what :func:`sfumato.media.image.load_image` takes.
    """

    name: str
    texts: tuple[str, ...]
    weight: float
    version: str
    read: Callable[[], Any]

    def picture(self) -> Image.Image:
        """The picture in RGB; a :class:`ConfigError` if it cannot be read."""
        try:
            return load_image(self.read())
        except (OSError, ValueError, TypeError) as error:
            raise ConfigError(f"{self.name} cannot be read as a picture ({error}): mend it or leave it out") from error


def read_examples(data: str, captions: bool = True) -> list[Example]:
    """Lists the examples of a data set; pictures are opened when they are needed.

    Args:
        data: Folder, ``.tar`` or name of a data set.
        captions: Whether each picture must have a caption.

    Raises:
        ConfigError: The layout is not known, a caption or a picture is missing, or nothing is found.
    """
    path = Path(data)
    examples = list(_layout(path, captions)(path) if path.exists() else _datasets(data))
    if not examples:
        raise ConfigError(f"data={data!r} holds no pictures")
    silent = next((e for e in examples if not e.texts), None)
    if captions and silent:
        raise ConfigError(f"{silent.name} has no caption: add it to the captions, or leave the picture out")
    negative = next((e for e in examples if not 0 <= e.weight < float("inf")), None)
    if negative or not any(e.weight for e in examples):
        raise ConfigError(f"{(negative or examples[0]).name} has weight {(negative or examples[0]).weight}: expected above zero")
    return examples


def _layout(path: Path, captions: bool) -> Callable[[Path], Iterator[Example]]:
    """Which layout a path has."""
    if path.is_file():
        if path.suffix == ".tar":
            return _tar
        raise ConfigError(f"data={str(path)!r} is a file, but no .tar: pass a folder, a .tar, or a name of `datasets`")
    listed = {
        "metadata.jsonl": _metadata,
        "captions.txt": _captions_file,
        "dataset_info.json": lambda p: _datasets(str(p), disk=True),
    }
    found = [name for name in listed if (path / name).is_file()]
    tars = any(path.glob("*.tar"))
    if len(found) + tars > 1:
        raise ConfigError(f"data={str(path)!r} has several layouts ({', '.join([*found, *['.tar'] * tars])}): leave one")
    if tars:
        return lambda p: (example for tar in sorted(p.glob("*.tar")) for example in _tar(tar))
    return listed[found[0]] if found else partial(_beside, captions)


def as_texts(text: Any, name: str) -> tuple[str, ...]:
    """A caption or a list of them as a tuple."""
    texts = text if isinstance(text, list) else [] if text is None else [text]
    if not all(isinstance(t, str) for t in texts):
        raise ConfigError(f"{name}: text={text!r}, expected a caption or a list of captions")
    return tuple(t.strip() for t in texts)


def _of_file(path: Path, texts: tuple[str, ...], weight: float = 1.0, listed_in: Path | None = None) -> Example:
    if not path.is_file():
        raise ConfigError(f"{listed_in} names {path.name!r}, which is not there: add the picture or remove the line")
    state = path.stat()
    return Example(str(path), texts, weight, f"{path.name}:{state.st_size}:{state.st_mtime_ns}", lambda: path)


def _beside(captions: bool, folder: Path) -> Iterator[Example]:
    for path in sorted(p for p in folder.rglob("*") if p.suffix.lower() in PICTURES):
        text = path.with_suffix(".txt")
        if text.is_file():
            yield _of_file(path, (text.read_text(encoding="utf-8").strip(),))
        elif captions:
            remedy = "or list all captions in captions.txt or metadata.jsonl"
            raise ConfigError(f"{path} has no caption: write it to {text.name} beside it, {remedy}")
        else:
            yield _of_file(path, ())


def _lines(path: Path) -> Iterator[tuple[int, str]]:
    for number, line in enumerate(path.read_text(encoding="utf-8").splitlines(), 1):
        if line.strip():
            yield number, line


def _captions_file(folder: Path) -> Iterator[Example]:
    path = folder / "captions.txt"
    for number, line in _lines(path):
        name, tab, text = line.partition("\t")
        if not tab:
            raise ConfigError(f"{path} line {number}: expected a file name, a tab and a caption, got {line!r}")
        yield _of_file(folder / name.strip(), (text.strip(),), listed_in=path)


def _metadata(folder: Path) -> Iterator[Example]:
    path = folder / "metadata.jsonl"
    for number, line in _lines(path):
        where = f"{path} line {number}"
        entry = _entry(line, where)
        if not isinstance(entry.get("file_name"), str):
            raise ConfigError(f"{where}: expected an object with 'file_name' and 'text', got {line.strip()!r}")
        yield _of_file(folder / entry["file_name"], as_texts(entry.get("text"), where), _weight(entry, where), path)


def _entry(text: str | bytes, where: str) -> dict[str, Any]:
    try:
        entry = json.loads(text)
    except ValueError as error:
        raise ConfigError(f"{where} is not valid JSON: {error}") from error
    if not isinstance(entry, dict):
        raise ConfigError(f"{where} holds a {type(entry).__name__}, expected an object")
    return entry


def _weight(entry: dict[str, Any], where: str) -> float:
    weight = entry.get("weight", 1.0)
    if not isinstance(weight, (int, float)):
        raise ConfigError(f"{where}: weight={weight!r}, expected a number")
    return float(weight)


def _tar(path: Path) -> Iterator[Example]:
    """Files that share a name up to its first dot are one example."""
    try:
        with tarfile.open(path, "r:") as tar:
            members = [(m.name, m.offset_data, m.size) for m in tar if m.isfile()]
    except (tarfile.TarError, OSError) as error:
        raise ConfigError(f"{path} is not a readable, uncompressed .tar ({error}): download or pack it again") from error
    groups: dict[str, dict[str, tuple[int, int]]] = {}
    for name, offset, size in members:
        folder, _, last = name.removeprefix("./").rpartition("/")
        stem, _, suffix = last.partition(".")
        groups.setdefault(f"{folder}/{stem}" if folder else stem, {})[f".{suffix.lower()}"] = (offset, size)
    version = path.stat().st_mtime_ns
    for key, parts in groups.items():
        where = f"{path}:{key}"
        if not (pictures := parts.keys() & PICTURES):
            raise ConfigError(f"{where} has no picture, only {', '.join(sorted(parts))}: pack one of {', '.join(sorted(PICTURES))}")
        place = parts[min(pictures)]
        entry = _entry(_slice(path, *parts[".json"]), where) if ".json" in parts else {}
        text = _slice(path, *parts[".txt"]).decode() if ".txt" in parts else entry.get("text")
        read = partial(_slice, path, *place)
        yield Example(where, as_texts(text, where), _weight(entry, where), f"{path.name}:{place}:{version}", read)


def _slice(path: Path, offset: int, size: int) -> bytes:
    with path.open("rb") as file:
        file.seek(offset)
        return file.read(size)


def _datasets(data: str, disk: bool = False) -> Iterator[Example]:
    try:
        import datasets
    except ImportError as error:
        raise ImportError(f"data={data!r} is no folder here; to read it as a data set: pip install 'sfumato[train]'") from error
    name, _, split = data.partition(":")
    try:
        table: Any = datasets.load_from_disk(data) if disk else datasets.load_dataset(name, split=split or "train")
    except Exception as error:
        raise ConfigError(f"data={data!r} is neither a folder here nor a data set that `datasets` finds ({error})") from error
    if "image" not in table.column_names:
        raise ConfigError(f"data={data!r} has the columns {', '.join(table.column_names)}: expected 'image' and 'text'")
    texts = table["text"] if "text" in table.column_names else [None] * len(table)
    for row, text in enumerate(texts):
        where = f"{data} row {row}"
        yield Example(where, as_texts(text, where), 1.0, f"{table._fingerprint}:{row}", partial(_column, table, row))


def _column(table: Any, row: int) -> Any:
    return table[row]["image"]
