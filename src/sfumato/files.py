"""Writing files so that an interruption or a full disk leaves the old file whole."""

from __future__ import annotations

import contextlib
import os
import uuid
from collections.abc import Callable
from pathlib import Path
from typing import Any


def write_atomically(path: Path, write: Callable[[Path], Any]) -> None:
    """Calls ``write`` with a temporary path beside ``path``, then renames it over ``path``.

    Args:
        path: The file to create or replace. Its folder must exist.
        write: Writes the whole content to the path it is given.

    Raises:
        OSError: Writing failed (no space, say); ``path`` is as it was and the temporary file is gone.
    """
    temporary = path.with_name(f".{path.name}.{uuid.uuid4().hex}.tmp")
    try:
        write(temporary)
        with temporary.open("rb+") as file:
            os.fsync(file.fileno())
        temporary.replace(path)
    except OSError as error:
        raise OSError(error.errno, f"could not write {path} ({error.strerror or error}); the old file is unchanged") from error
    finally:
        with contextlib.suppress(OSError):
            temporary.unlink()
