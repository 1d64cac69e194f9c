"""Writing files so that an interruption or a full disk leaves the old files whole."""

from __future__ import annotations

import contextlib
import os
import uuid
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any


def write_atomically(path: Path, write: Callable[[Path], Any]) -> None:
    """As :func:`write_together`, for one file."""
    write_together({path: write})


def write_together(writers: Mapping[Path, Callable[[Path], Any]]) -> None:
    """Calls each writer with a temporary path beside its own; when all are written, renames them over their own.

    Args:
        writers: File to create or replace, in a folder that exists -> what writes its whole content to the path it is given.

    Raises:
        OSError: Writing failed (no space, say); the files are as they were, and nothing temporary is left.
    """
    temporary = {path: path.with_name(f".{path.name}.{uuid.uuid4().hex}.tmp") for path in writers}
    try:
        for path, write in writers.items():
            write(temporary[path])
            with temporary[path].open("rb+") as file:
                os.fsync(file.fileno())
        for path in writers:
            temporary[path].replace(path)
    except OSError as error:
        raise OSError(error.errno, f"could not write {path} ({error.strerror or error}); the old file is unchanged") from error
    finally:
        for leftover in temporary.values():
            with contextlib.suppress(OSError):
                leftover.unlink()
