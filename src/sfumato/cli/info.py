"""``sfumato info``: what a checkpoint, or a picture, is made of."""

from __future__ import annotations

import json
import math
from collections import Counter
from collections.abc import Iterable
from dataclasses import replace
from pathlib import Path
from typing import Annotated, Any, NamedTuple

import typer
from rich.console import Console
from rich.table import Table

from ..errors import HubError, SfumatoError, WeightsError
from ..hub import EMBEDDED_MODEL, Source

EXAMPLES = """
[bold]Examples[/bold]

sfumato info ./my-model

sfumato info stable-diffusion-v1-5/stable-diffusion-v1-5

sfumato info a-red-apple-7.png
"""

console = Console()


class Part(NamedTuple):
    """One component: its class, and what its weights amount to."""

    name: str
    class_name: str
    parameters: int
    size: int
    dtypes: str


def info(
    source: Annotated[
        str | None, typer.Argument(help="Pipeline folder, hub repository, or a PNG of `sfumato generate`. Default: embedded model.")
    ] = None,
    revision: Annotated[str | None, typer.Option(help="Branch, tag or commit of the hub repository.")] = None,
) -> None:
    """Shows the components, sizes, dtypes and licence of a checkpoint, or the recipe of a picture. Downloads no weights."""
    try:
        if source and source.lower().endswith(".png") and Path(source).is_file():
            from ..media.image import read_recipe

            console.print_json(json.dumps(read_recipe(source)))
            return
        show(str(source or EMBEDDED_MODEL), revision)
    except (SfumatoError, ValueError, OSError) as error:
        Console(stderr=True).print(f"[red]error:[/red] {error}", highlight=False, soft_wrap=True)
        raise typer.Exit(1) from None


def show(name: str, revision: str | None) -> None:
    """Prints the table of a checkpoint."""
    from ..config import read_json

    source = Source(name, revision)
    index = read_json(source.file("model_index.json"))
    parts = [describe(source, part, entry) for part, entry in index.items() if isinstance(entry, list) and entry[:1] != [None]]
    table = Table(title=f"{index.get('_class_name', '?')}  ·  {name}", title_justify="left")
    for heading in ("component", "class", "parameters", "size", "dtype"):
        table.add_column(heading, justify="right" if heading in ("parameters", "size") else "left")
    for part in parts:
        cells = (f"{part.parameters:,}", human(part.size), part.dtypes) if part.parameters else ("", "", "")
        table.add_row(part.name, part.class_name, *cells)
    table.add_section()
    table.add_row("total", "", f"{sum(p.parameters for p in parts):,}", human(sum(p.size for p in parts)), "")
    console.print(table)
    console.print(f"licence: {licence(source) or 'not stated'}")


def human(size: float) -> str:
    """Bytes as text."""
    for unit in ("B", "KB", "MB"):
        if size < 1000:
            return f"{size:.0f} {unit}" if unit == "B" else f"{size:.1f} {unit}"
        size /= 1000
    return f"{size:.2f} GB"


def describe(source: Source, name: str, entry: list[str]) -> Part:
    """Reads the headers of a component's weights."""
    parameters, size, dtypes = 0, 0, Counter[str]()
    for tensor in (t for header in headers(source, name) for t in header):
        start, end = tensor["data_offsets"]
        parameters, size = parameters + math.prod(tensor["shape"]), size + end - start
        dtypes[tensor["dtype"]] += end - start
    return Part(name, entry[1], parameters, size, ", ".join(d for d, _ in dtypes.most_common()))


def headers(source: Source, part: str) -> list[list[dict[str, Any]]]:
    """The tensors that each safetensors file of a component lists, of its plain files where it has several variants.

    A repository is asked; where the hub cannot be reached, the files that the cache has of it are read.
    """
    folder = Path(source.name)
    if not source.is_local:
        from huggingface_hub import HfApi

        api, repository, revision = HfApi(token=source.token), str(source.name), source.revision
        try:
            siblings = api.model_info(repository, revision=revision).siblings or []  # one request: listing files would retry
            files = [Path(s.rfilename) for s in siblings if s.rfilename.startswith(f"{part}/")]
            chosen = [f.as_posix() for f in plain_files(f for f in files if f.suffix == ".safetensors")]
            metadata = [api.parse_safetensors_file_metadata(repository, f, revision=revision) for f in chosen]
            return [[vars(t) for t in m.tensors.values()] for m in metadata]
        except Exception:  # whichever transport the hub client uses
            folder = replace(source, local_files_only=True).fetch([f"{part}/*"])
            if not (folder / part).is_dir():
                raise HubError(f"the hub cannot be reached and the cache has no {part!r} of {source.name}: connect once") from None
    return [read_header(p) for p in plain_files((folder / part).glob("*.safetensors"))]


def plain_files(files: Iterable[Path]) -> list[Path]:
    """Sorts, and leaves variants out where the plain files are there too."""
    every = sorted(files)
    return [f for f in every if "." not in f.name.removesuffix(".safetensors")] or every


def read_header(path: Path) -> list[dict[str, Any]]:
    """The tensors that the JSON header of a safetensors file lists."""
    with path.open("rb") as file:
        length = int.from_bytes(file.read(8), "little")
        if not 0 < length < min(100_000_000, path.stat().st_size):
            raise WeightsError(f"{path} is not a safetensors file, or is truncated: download it again")
        try:
            return [entry for key, entry in json.loads(file.read(length)).items() if key != "__metadata__"]
        except ValueError as error:
            raise WeightsError(f"{path} has a broken header ({error}): download it again") from error


def licence(source: Source) -> str | None:
    """The licence tag of the model card, if there is a card."""
    try:
        card = source.file("README.md").read_text(encoding="utf-8", errors="replace")
    except HubError:
        return None
    head = card.split("---")[1] if card.startswith("---") else ""
    tags = [line.split(":", 1)[1].strip() for line in head.splitlines() if line.startswith("license:")]
    return tags[0] if tags else None
