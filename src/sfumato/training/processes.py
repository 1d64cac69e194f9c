"""Where, and in how many processes, a run computes."""

from __future__ import annotations

from typing import Any


def accelerator() -> Any:
    """The ``accelerate.Accelerator`` of this process: its device, its rank, as ``accelerate launch`` configured them, if it did."""
    try:
        from accelerate import Accelerator
    except ImportError as error:
        raise ImportError("training needs accelerate: pip install 'sfumato[train]'") from error
    return Accelerator()
