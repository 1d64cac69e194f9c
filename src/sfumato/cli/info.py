"""``sfumato info``: what a checkpoint, or a picture, is made of."""

from __future__ import annotations

import json
from collections import Counter
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.console import Console
from rich.table import Table

EXAMPLES = """
[bold]Examples[/bold]

sfumato info ./my-model

sfumato info stable-diffusion-v1-5/stable-diffusion-v1-5

sfumato info a-red-apple-7.png
"""

console = Console()


@dataclass(frozen=True)
class Part:
    """One component: its class, and what its weights amount to."""

    name: str
    class_name: str
    parameters: int
    size: int
    dtypes: str


def info(
    source: Annotated[
        str | None,
        typer.Argument(
            help="Pipeline folder, hub repository, or a PNG made by `sfumato generate`. Without it: the embedded model."
        ),
    ] = None,
    revision: Annotated[str | None, typer.Option(help="Branch, tag or commit of the hub repository.")] = None,
) -> None:
    """Shows the components, sizes, dtypes and licence of a checkpoint, or the recipe of a picture. Downloads no weights."""
    from ..errors import SfumatoError
    from ..hub import EMBEDDED_MODEL

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
    from ..hub import Source

    source = Source(name, revision)
    index = read_json(source.file("model_index.json"))
    parts = [describe(source, part, entry) for part, entry in index.items() if isinstance(entry, list) and entry[:1] != [None]]
    table = Table(title=f"{index.get('_class_name', '?')}  ·  {name}", title_justify="left")
    for heading, justify in (
        ("component", "left"),
        ("class", "left"),
        ("parameters", "right"),
        ("size", "right"),
        ("dtype", "left"),
    ):
        table.add_column(heading, justify=justify)  # type: ignore[arg-type]
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


def describe(source: Any, name: str, entry: list[str]) -> Part:
    """Reads the headers of a component's weights."""
    parameters, size, dtypes = 0, 0, Counter[str]()
    for shape, dtype, nbytes in tensor_headers(source, name):
        count = 1
        for length in shape:
            count *= length
        parameters, size = parameters + count, size + nbytes
        dtypes[dtype] += nbytes
    return Part(name, entry[1], parameters, size, ", ".join(d for d, _ in dtypes.most_common()))


def tensor_headers(source: Any, part: str) -> list[tuple[list[int], str, int]]:
    """Shape, dtype and bytes of every tensor of a component, read from safetensors headers alone."""
    found = []
    for header in headers(source, part):
        for key, entry in header.items():
            if key != "__metadata__":
                start, end = entry["data_offsets"]
                found.append((entry["shape"], entry["dtype"], end - start))
    return found


def headers(source: Any, part: str) -> list[dict[str, Any]]:
    """The safetensors headers of a component, of its plain files where it has several variants."""
    if source.is_local:
        folder = Path(source.name) / part
        return [read_header(p) for p in plain_files(sorted(folder.glob("*.safetensors")))]
    from huggingface_hub import HfApi

    api = HfApi(token=source.token)
    files = [Path(f) for f in api.list_repo_files(source.name, revision=source.revision) if f.startswith(f"{part}/")]
    chosen = plain_files(sorted(f for f in files if f.suffix == ".safetensors"))
    metadata = [api.parse_safetensors_file_metadata(source.name, f.as_posix(), revision=source.revision) for f in chosen]
    return [
        {k: {"shape": t.shape, "dtype": t.dtype, "data_offsets": t.data_offsets} for k, t in m.tensors.items()} for m in metadata
    ]


def plain_files(files: list[Path]) -> list[Path]:
    """Leaves variants out where the plain files are there too."""
    plain = [f for f in files if "." not in f.name.removesuffix(".safetensors")]
    return plain or files


def read_header(path: Path) -> dict[str, Any]:
    """Reads the JSON header of a safetensors file.

    Raises:
        WeightsError: The file is truncated or is no safetensors file.
    """
    from ..errors import WeightsError

    with path.open("rb") as file:
        length = int.from_bytes(file.read(8), "little")
        if not 0 < length < min(100_000_000, path.stat().st_size):
            raise WeightsError(f"{path} is not a safetensors file, or is truncated: download it again")
        try:
            return json.loads(file.read(length))
        except ValueError as error:
            raise WeightsError(f"{path} has a broken header ({error}): download it again") from error


def licence(source: Any) -> str | None:
    """The licence tag of the model card, if there is a card."""
    from ..errors import HubError

    try:
        card = source.file("README.md").read_text(encoding="utf-8", errors="replace")
    except HubError:
        return None
    head = card.split("---")[1] if card.startswith("---") else ""
    tags = [line.split(":", 1)[1].strip() for line in head.splitlines() if line.startswith("license:")]
    return tags[0] if tags else None
