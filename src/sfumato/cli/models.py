"""``sfumato models``: which pipelines are here, embedded or in the cache of the hub."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

import typer
from rich.console import Console
from rich.table import Table

from ..errors import SfumatoError
from ..hub import EMBEDDED_MODEL
from .info import human

EXAMPLES = """
[bold]Examples[/bold]

sfumato models

HF_HOME=/data/hub sfumato models
"""


class Model(NamedTuple):
    """A pipeline that needs no download."""

    name: str
    kind: str
    size: int
    place: str


def models() -> None:
    """Lists the pipelines that need no download: the embedded one, and those in the hub's cache."""
    try:
        found = [*embedded(), *in_cache()]
    except (SfumatoError, OSError) as error:
        Console(stderr=True).print(f"[red]error:[/red] {error}", highlight=False, soft_wrap=True)
        raise typer.Exit(1) from None
    table = Table()
    for heading in Model._fields:
        table.add_column(heading, justify="right" if heading == "size" else "left")
    for model in found:
        table.add_row(model.name, model.kind, human(model.size), model.place)
    Console().print(table)


def kind_of(index: Path) -> str:
    """The pipeline class that a ``model_index.json`` names."""
    from ..config import read_json

    return str(read_json(index).get("_class_name", "?"))


def embedded() -> Iterator[Model]:
    """The models that ship inside the package."""
    for folder in sorted(p.parent for p in EMBEDDED_MODEL.parent.glob("*/model_index.json")):
        size = sum(p.stat().st_size for p in folder.rglob("*") if p.is_file())
        yield Model(folder.name, kind_of(folder / "model_index.json"), size, "embedded")


def in_cache() -> Iterator[Model]:
    """The repositories in the hub's cache that are pipelines, by their newest revision."""
    from huggingface_hub import constants, scan_cache_dir
    from huggingface_hub.errors import CacheNotFound

    try:
        repositories = scan_cache_dir(constants.HF_HUB_CACHE).repos
    except CacheNotFound:
        return
    for repository in sorted(repositories, key=lambda r: r.repo_id):
        revision = max(repository.revisions, key=lambda r: r.last_modified, default=None)
        index = next((f.file_path for f in revision.files if f.file_name == "model_index.json"), None) if revision else None
        if repository.repo_type == "model" and index is not None:
            yield Model(repository.repo_id, kind_of(index), repository.size_on_disk, str(repository.repo_path))
