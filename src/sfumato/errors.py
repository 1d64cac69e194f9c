"""Errors that name the cause and the remedy. Each also is the built-in type a caller would expect."""

from __future__ import annotations

import difflib
from collections.abc import Collection, Iterable
from typing import Any


class SfumatoError(Exception):
    """Base of every error that the library raises on purpose."""


class ConfigError(SfumatoError, ValueError):
    """A configuration that cannot be read or does not fit its class."""


class WeightsError(SfumatoError, OSError):
    """Weights that are missing, corrupt, or do not fit the network."""


class HubError(SfumatoError, OSError):
    """A repository or file that cannot be found, here or on the hub."""


def did_you_mean(name: str, candidates: Iterable[str]) -> str:
    """Returns ``"; did you mean 'x'?"`` for the nearest candidate, or an empty string when none is near."""
    near = difflib.get_close_matches(name, [c for c in candidates if not c.startswith("_")], n=1, cutoff=0.6)
    return f"; did you mean {near[0]!r}?" if near else ""


def refuse_unknown(names: Iterable[str], known: Collection[str], what: str, error: type[Exception] = TypeError) -> None:
    """Raises ``error`` for the first of ``names`` that is not ``known``: ``what``, the name, and what is near."""
    for name in names:
        if name not in known:
            raise error(f"{what} {name!r}{did_you_mean(name, known)}")


def check_choice(key: str, value: object, choices: Iterable[object]) -> None:
    """Raises :class:`ConfigError` when a configuration value is none of the choices."""
    options = list(choices)
    if value not in options:
        near = did_you_mean(str(value), [str(option) for option in options])
        raise ConfigError(f"{key}={value!r} is unknown: expected one of {', '.join(map(repr, options))}{near}")


def check_shape(name: str, tensor: Any, shape: tuple[int | None, ...], note: str = "") -> None:
    """Raises :class:`ValueError` unless ``tensor`` has ``shape``, where ``None`` is any number; ``note`` says what to do."""
    if tensor is None:
        raise ValueError(f"{name} is missing: this network needs it{note and f'; {note}'}")
    given = tuple(tensor.shape)
    if len(given) != len(shape) or any(want not in (None, got) for got, want in zip(given, shape, strict=True)):
        wanted = ", ".join("any" if size is None else str(size) for size in shape)
        raise ValueError(f"{name} has shape {given}, expected ({wanted}){note and f': {note}'}")
