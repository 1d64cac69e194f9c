"""``sfumato models``: what is here."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from huggingface_hub import constants
from typer.testing import CliRunner

from sfumato.cli.main import app


def repository(cache: Path, name: str, files: dict[str, str]) -> None:
    """A repository as the hub's client stores it."""
    folder = cache / f"models--{name.replace('/', '--')}"
    snapshot = folder / "snapshots" / ("0" * 40)
    (folder / "refs").mkdir(parents=True)
    (folder / "blobs").mkdir()
    (folder / "refs" / "main").write_text("0" * 40)
    for path, text in files.items():
        blob = folder / "blobs" / f"{abs(hash(text)):x}"
        blob.write_text(text)
        (snapshot / path).parent.mkdir(parents=True, exist_ok=True)
        (snapshot / path).symlink_to(blob)


def lines(monkeypatch: pytest.MonkeyPatch, cache: Path) -> list[str]:
    monkeypatch.setenv("COLUMNS", "250")
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(cache))
    done = CliRunner().invoke(app, ["models"])
    assert done.exit_code == 0, done.output
    return [line for line in done.stdout.splitlines() if "│" in line]


def test_models(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    repository(tmp_path, "me/pipe", {"model_index.json": json.dumps({"_class_name": "MyPipeline"}), "unet/w": "x" * 2000})
    repository(tmp_path, "me/words", {"config.json": "{}"})
    found = lines(monkeypatch, tmp_path)
    assert any(all(w in line for w in ("emoji-64", "StableDiffusionPipeline", "embedded", "MB")) for line in found)
    assert any(all(w in line for w in ("me/pipe", "MyPipeline", "2.0 KB", "models--me--pipe")) for line in found)
    assert not any("me/words" in line for line in found)


def test_without_a_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert len(lines(monkeypatch, tmp_path / "none")) == 1
