"""Where, and in how many processes, a run computes."""

from __future__ import annotations

from typing import Any


def accelerator() -> Any:
    """The ``accelerate.Accelerator`` of this process: its device, its rank, as ``accelerate launch`` configured them, if it did."""
    try:
        import tensorboard  # noqa: F401 (the log needs it; to say so before any work)
        from accelerate import Accelerator
    except ImportError as error:
        raise ImportError(f"training needs packages that are not installed ({error}): pip install 'sfumato[train]'") from error
    return Accelerator()
