"""Sampling algorithms; ``registry.py`` says which class lies in which module. Names load on first use."""

from __future__ import annotations

from typing import Any

from .. import registry

__all__ = sorted(name for name, module in registry.PUBLIC.items() if module.startswith("schedulers."))


def __getattr__(name: str) -> Any:
    if name not in __all__:
        raise AttributeError(f"sfumato.schedulers has no {name!r}")
    return registry.load(name)
