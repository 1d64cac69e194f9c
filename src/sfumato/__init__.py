"""Sfumato: diffusion models as compositions.

Public names load on first use; importing the package imports neither torch nor any network.
"""

from __future__ import annotations

import importlib
from typing import Any

from . import registry

__version__ = "0.1.0"

_SUBMODULES = ("config", "errors", "families", "hub", "media", "models", "pipelines", "schedulers", "utils")


def __getattr__(name: str) -> Any:
    if name in _SUBMODULES:
        return importlib.import_module(f"sfumato.{name}")
    value = registry.load(name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted([*registry.PUBLIC, *_SUBMODULES, "__version__"])
