"""Drawings from public npm packages, packed as ``emoji-128.tar`` and ``metadata.jsonl``. Needs ``npm`` and ``resvg-py``.

| style | package | licence of the art |
|---|---|---|
| 3d | @lobehub/fluent-emoji-3d | MIT, Microsoft |
| flat, line | @iconify-json/fluent-emoji-flat, ...-high-contrast | MIT, Microsoft |
| noto, blob | @iconify-json/noto, noto-v1 | Apache-2.0, Google |
| captions | emojibase-data | MIT; data from CLDR, Unicode-3.0 |
"""

from __future__ import annotations

import io
import json
import re
import subprocess
import tarfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from PIL import Image, ImageDraw
from prepare import add

EDGE = 128
ICONS = {
    "flat": "@iconify-json/fluent-emoji-flat@1.2.6",
    "line": "@iconify-json/fluent-emoji-high-contrast@1.2.6",
    "noto": "@iconify-json/noto@1.2.9",
    "blob": "@iconify-json/noto-v1@1.2.5",
}
WEBP = "@lobehub/fluent-emoji-3d@1.1.0"
CAPTIONS = "emojibase-data@17.0.0"


def package(name: str, folder: Path) -> dict[str, bytes]:
    """Fetches a package with npm's client, once, and returns its files: path in the package -> content."""
    folder.mkdir(parents=True, exist_ok=True)
    file = folder / (re.sub(r"^@", "", name).replace("/", "-").replace("@", "-") + ".tgz")
    if not file.is_file():
        try:
            subprocess.run(["npm", "pack", name, "--silent"], cwd=folder, check=True, stdout=subprocess.DEVNULL)
        except (OSError, subprocess.CalledProcessError) as error:
            raise OSError(
                f"{name} cannot be fetched ({error}): install npm (Node.js), check the network, or pass --data"
            ) from error
    with tarfile.open(file) as tar:
        return {m.name.removeprefix("package/"): tar.extractfile(m).read() for m in tar if m.isfile()}  # type: ignore[union-attr]


def code(text: str) -> str:
    """A Unicode sequence as file names have it: ``1F468-200D-FE0F`` -> ``1f468-200d``."""
    return "-".join(part for part in text.lower().split("-") if part != "fe0f")


def descriptions(folder: Path) -> dict[str, dict[str, Any]]:
    """Code -> name, tags and groups of each emoji but flags, keycaps and skin tones."""
    files = package(CAPTIONS, folder)
    groups = json.loads(files["meta/groups.json"])
    found = {}
    for entry in json.loads(files["en/data.json"]):
        group = groups["groups"].get(str(entry.get("group")))
        subgroup = groups["subgroups"].get(str(entry.get("subgroup")))
        if group is not None and group != "flags" and subgroup != "keycap":
            key = code(entry["hexcode"])
            found[key] = {"code": key, "label": entry["label"], "tags": entry.get("tags", []), "group": group, "subgroup": subgroup}
    return found


def slug(label: str) -> str:
    """A name as icon sets spell it: ``man’s shoe`` -> ``mans-shoe``."""
    return re.sub(r"[^a-z0-9]+", "-", re.sub(r"[’'“”().!]", "", label.lower())).strip("-")


def drawn(table: dict[str, Any], icon: str | None) -> dict[str, Any] | None:
    """An icon's entry, or that of the icon it is another name of; not what is turned or mirrored."""
    alias = table.get("aliases", {}).get(icon, {})
    return None if set(alias) - {"parent"} else table["icons"].get(alias.get("parent", icon))


def icons(name: str, folder: Path, known: dict[str, dict[str, Any]]) -> Iterator[tuple[str, Image.Image]]:
    """Code and rendering of each icon of a set that is an emoji, matched by code point or by name."""
    import resvg_py

    files = package(name, folder)
    table, by_code = json.loads(files["icons.json"]), json.loads(files.get("chars.json", b"{}"))
    names = {code(key): icon for key, icon in by_code.items()}
    for key, about in known.items():
        body = next(filter(None, (drawn(table, icon) for icon in (names.get(key), slug(about["label"])))), None)
        if body is None:
            continue
        width, height = body.get("width", table.get("width", 16)), body.get("height", table.get("height", 16))
        box = f"{body.get('left', 0)} {body.get('top', 0)} {width} {height}"
        namespaces = 'xmlns="http://www.w3.org/2000/svg" xmlns:xlink="http://www.w3.org/1999/xlink"'
        svg = f'<svg {namespaces} viewBox="{box}">{body["body"]}</svg>'.replace("currentColor", "#000")
        scale = {"width": EDGE} if width >= height else {"height": EDGE}
        yield key, Image.open(io.BytesIO(bytes(resvg_py.svg_to_bytes(svg_string=svg, **scale))))


def renderings(folder: Path, known: dict[str, dict[str, Any]]) -> Iterator[tuple[str, Image.Image]]:
    """Code and picture of the emoji in three dimensions."""
    for path, data in package(WEBP, folder).items():
        key = code(Path(path).stem)
        if path.endswith(".webp") and key in known:
            yield key, Image.open(io.BytesIO(data))


def on_white(picture: Image.Image) -> Image.Image:
    """A drawing of 128 x 128 pixels in RGB, centred on white."""
    picture = picture.convert("RGBA")
    scale = EDGE / max(picture.size)
    picture = picture.resize((round(picture.width * scale), round(picture.height * scale)), Image.Resampling.LANCZOS)
    ground = Image.new("RGBA", (EDGE, EDGE), "white")
    ground.alpha_composite(picture, ((EDGE - picture.width) // 2, (EDGE - picture.height) // 2))
    return ground.convert("RGB")


def write_pack(out: Path, drawings: Iterator[tuple[dict[str, Any], Image.Image]]) -> None:
    """Writes ``emoji-128.tar`` (lossless WebP, ``STYLE/CODE.webp``) and ``metadata.jsonl``, in the order of their names."""
    out.mkdir(parents=True, exist_ok=True)
    entries = {}
    for about, picture in drawings:
        buffer = io.BytesIO()
        picture.save(buffer, "WEBP", lossless=True)
        entries[f"{about['style']}/{about['code']}.webp"] = (about, buffer.getvalue())
    with tarfile.open(out / "emoji-128.tar", "w") as tar:
        for name in sorted(entries):
            add(tar, name, entries[name][1])
    lines = [json.dumps({"file": name, **entries[name][0]}, ensure_ascii=False) for name in sorted(entries)]
    (out / "metadata.jsonl").write_text("\n".join(lines) + "\n", encoding="utf-8")  # last: it says that the pack is whole


def make_pack(out: Path, packages: Path) -> None:
    """Fetches, renders and packs all drawings."""
    known = descriptions(packages)

    def every() -> Iterator[tuple[dict[str, Any], Image.Image]]:
        for key, picture in renderings(packages, known):
            yield {**known[key], "style": "3d"}, on_white(picture)
        for style, name in ICONS.items():
            for key, picture in icons(name, packages, known):
                yield {**known[key], "style": style}, on_white(picture)

    write_pack(out, every())


def make_smoke_pack(out: Path) -> None:
    """Draws a pack of four fruits in five styles without any package, for a trial of the whole chain."""
    fruits = {"banana": "gold", "strawberry": "crimson", "cherries": "purple", "lemon": "yellow"}

    def every() -> Iterator[tuple[dict[str, Any], Image.Image]]:
        for k, (label, colour) in enumerate(fruits.items()):
            for j, style in enumerate(("3d", *ICONS)):
                picture = Image.new("RGB", (EDGE, EDGE), "white")
                box = (16 + 8 * k, 40 - 8 * k, 112 - 8 * k, 88 + 8 * k)
                fill = None if style == "line" else colour
                ImageDraw.Draw(picture).ellipse(box, fill=fill, outline="black", width=2 + 2 * j)
                about = {
                    "code": f"{k:04x}",
                    "label": label,
                    "tags": [colour, "fruit"],
                    "group": "food-drink",
                    "subgroup": "food-fruit",
                }
                yield {**about, "style": style}, picture

    write_pack(out, every())
