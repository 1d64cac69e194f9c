"""What ControlNets share: outputs that are zero before training, the sizes and weights of what they follow to start from."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, TypeVar

import torch
from torch import nn

from ...errors import ConfigError
from ..base import ModelMixin
from ..layers.compute import Linear

_M = TypeVar("_M", bound=nn.Module)
_N = TypeVar("_N", bound=ModelMixin)


def zeroed(layer: _M) -> _M:
    """Sets the parameters of a layer to zero, so that it adds nothing before training (arXiv:2302.05543, section 3.1)."""
    for parameter in layer.parameters():
        nn.init.zeros_(parameter)
    return layer


def residual_layers(dim: int, count: int) -> nn.ModuleList:
    """One layer for each of ``count`` blocks, which makes a residual of the block's tokens."""
    return nn.ModuleList(zeroed(Linear(dim, dim)) for _ in range(count))


def following(cls: type[_N], other: ModelMixin, load_weights: bool, **own: Any) -> _N:
    """Builds a ControlNet with the configuration of a network that it follows, but for ``own``, in float32.

    With ``load_weights`` it has the weights of the other where they have the same names.

    Raises:
        ConfigError: A weight has another shape.
    """
    known = cls._init_parameters()
    network = cls(**{**{key: value for key, value in other.config.items() if key in known}, **own})
    source, target = other.state_dict() if load_weights else {}, network.state_dict()
    shared = {key: source[key] for key in target if key in source}
    for key, value in shared.items():
        if value.shape != target[key].shape:
            raise ConfigError(
                f"{cls.__name__} cannot take {key!r} of shape {tuple(value.shape)}, it has {tuple(target[key].shape)}: "
                "ask for other sizes, fewer layers than the transformer's, or load_weights_from_transformer=False"
            )
    network.load_state_dict({**target, **shared})
    return network


def add_residuals(name: str, lists: Sequence[Sequence[torch.Tensor] | None]) -> list[torch.Tensor] | None:
    """Adds the residuals of several networks, list by list; ``None`` if no network has any.

    Raises:
        ValueError: The networks have different numbers of them, which belong to different blocks.
    """
    given = [residuals for residuals in lists if residuals is not None]
    if len(counts := {len(residuals) for residuals in given}) > 1:
        raise ValueError(f"{name}: the networks answer {sorted(counts)} residuals, which do not add up: join those of one depth")
    return [sum(each[1:], each[0]) for each in zip(*given, strict=True)] if given else None
