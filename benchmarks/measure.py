"""How two libraries are measured beside each other in one process."""

from __future__ import annotations

import ctypes
import gc
import re
import statistics
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

Row = tuple[str, str, float, float] | tuple[str, str, float, float, float]
"""What was measured, its unit, the reference's median, ours; where a case knows it, the ratio that nothing can go below."""


def alternate(functions: dict[str, Callable[[], float]], runs: int, warmup: int = 1) -> dict[str, float]:
    """Calls each function in turn and returns the median of its answers."""
    answers: dict[str, list[float]] = {name: [] for name in functions}
    for turn in range(runs + warmup):
        for name, function in functions.items():
            value = function()
            if turn >= warmup:
                answers[name].append(value)
    return {name: statistics.median(values) for name, values in answers.items()}


def seconds(function: Callable[[], Any]) -> float:
    """Wall time of one call."""
    gc.collect()
    start = time.perf_counter()
    function()
    return time.perf_counter() - start


def processor_seconds(function: Callable[[], Any]) -> float:
    """Processor time of one call, of all its threads together, which other work on the machine disturbs less."""
    gc.collect()
    start = time.process_time()
    function()
    return time.process_time() - start


def megabytes(function: Callable[[], Any]) -> float:
    """How far one call raises the memory of the process at its height (Linux)."""

    def held(key: str) -> int:
        return int(re.findall(rf"{key}:\s+(\d+)", Path("/proc/self/status").read_text())[0])

    gc.collect()
    ctypes.CDLL(None).malloc_trim(0)  # gives back what is free, which the call would otherwise take first
    Path("/proc/self/clear_refs").write_text("5")  # sets the height to what is held now
    before = held("VmRSS")
    function()
    return (held("VmHWM") - before) / 1000


def ours_of(reference: Any) -> Any:
    """Our network with the reference's configuration and a copy of its weights."""
    import sfumato

    made = getattr(sfumato, type(reference).__name__).from_config(reference.config).to(reference.dtype)
    made.load_state_dict(reference.state_dict())
    return made.eval()
