"""Checkpoints: all that a run needs to go on, in folders that appear whole or not at all.

``checkpoints/step-00000500/`` holds ``state.safetensors`` (weights, averaged weights, the optimiser's moments) and ``state.json``
(the step, the learning rate's schedule, the settings). A folder is written under a temporary name, and renamed when every byte is
on the disk.
"""

from __future__ import annotations

import json
import os
import shutil
import uuid
from pathlib import Path
from typing import Any

import torch

from ..config import read_json
from ..errors import ConfigError
from ..files import write_atomically
from ..weights import read_tensors, save_tensors

FORMAT = 1
TENSORS, STATE = "state.safetensors", "state.json"


def save(folder: Path, step: int, tensors: dict[str, torch.Tensor], state: dict[str, Any], keep: int) -> Path:
    """Writes a checkpoint and removes all but the newest ``keep``.

    Args:
        folder: Of the run's checkpoints.
        step: Optimiser steps made.
        tensors: By name.
        state: What JSON can hold.
        keep: At least one.

    Raises:
        OSError: It could not be written; older checkpoints are as they were.
    """
    folder.mkdir(parents=True, exist_ok=True)
    final = folder / f"step-{step:08d}"
    if final.exists():
        return final
    temporary = folder / f".{final.name}.{uuid.uuid4().hex}.tmp"
    text = json.dumps({"format": FORMAT, "step": step, **state}, indent=2)
    try:
        temporary.mkdir()
        save_tensors(tensors, temporary, TENSORS, max_shard_size="1000TB")
        write_atomically(temporary / STATE, lambda path: path.write_text(text, encoding="utf-8"))
        _sync(temporary)
        temporary.rename(final)
        _sync(folder)
    except OSError as error:
        older = newest(folder)
        remedy = (
            f"free space or name another --out; {f'{older} is whole: go on with --resume' if older else 'there is no older one'}"
        )
        raise OSError(error.errno, f"could not write the checkpoint {final} ({error.strerror or error}): {remedy}") from error
    finally:
        shutil.rmtree(temporary, ignore_errors=True)
    for old in found(folder)[:-keep]:
        hidden = old.rename(folder / f".{old.name}.{uuid.uuid4().hex}.tmp")  # half-removed, it is no checkpoint
        shutil.rmtree(hidden)
    return final


def found(folder: Path) -> list[Path]:
    """The checkpoints of a run, oldest first."""
    return sorted(folder.glob("step-*"))


def newest(folder: Path) -> Path | None:
    """The newest checkpoint."""
    return (found(folder) or [None])[-1]  # type: ignore[list-item]


def remove_unfinished(folder: Path) -> None:
    """Removes what an interruption left behind."""
    for leftover in folder.glob(".step-*.tmp"):
        shutil.rmtree(leftover)


def load(path: Path, settings: dict[str, Any]) -> tuple[int, dict[str, torch.Tensor], dict[str, Any]]:
    """Reads a checkpoint.

    Args:
        path: Its folder.
        settings: What must be as it was.

    Returns:
        The step, the tensors, and the state.

    Raises:
        ConfigError: The settings differ, or the checkpoint is of another format.
        WeightsError: The tensors cannot be read.
    """
    state = read_json(path / STATE)
    if state.get("format") != FORMAT:
        raise ConfigError(f"{path} has format {state.get('format')}, expected {FORMAT}: resume it with the release that wrote it")
    for key, value in settings.items():
        if (old := state["settings"].get(key)) != value:
            remedy = "resume with the old value, or start a new run with another --out"
            raise ConfigError(f"{key}={value!r}, but {path} was trained with {key}={old!r}: {remedy}")
    return state["step"], read_tensors([path / TENSORS]), state


def _sync(folder: Path) -> None:
    """Puts a folder's entries on the disk."""
    handle = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)
