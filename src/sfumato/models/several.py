"""Several networks of one class that act as one, saved in numbered folders."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, ClassVar, TypeVar

import torch
from torch import nn

from ..errors import HubError
from ..hub import PathLike, Source
from .base import ModelMixin

_S = TypeVar("_S", bound="Several")


class Several(ModelMixin):
    """Base of networks that hold several of one class; the constructor takes their list.

    The first network's folder is the one that is named, ``controlnet`` say; the others' are ``controlnet_1`` and so on, beside it.

    Class attributes:
        member: The class of the networks.
        holder: Name of the list of networks, in parameter names.
    """

    member: ClassVar[type[ModelMixin]]
    holder: ClassVar[str] = "nets"
    ignore_for_config = ("controlnets",)  # the constructor's argument

    def __init__(self, controlnets: Sequence[Any]) -> None:
        """Takes the list of networks.

        Raises:
            TypeError: It is no list, or something in it is no ``member``.
            ValueError: It is empty.
        """
        super().__init__()
        (name,) = self.ignore_for_config
        if not isinstance(controlnets, (list, tuple)):
            raise TypeError(f"{name} is a {type(controlnets).__name__}: expected a list of {self.member.__name__}")
        for i, network in enumerate(controlnets):
            if not isinstance(network, self.member):
                raise TypeError(f"{name}[{i}] is a {type(network).__name__}: expected a {self.member.__name__}")
        if not controlnets:
            raise ValueError(f"{name} is empty: pass at least one {self.member.__name__}")
        setattr(self, self.holder, nn.ModuleList(controlnets))

    @property
    def members(self) -> list[Any]:
        """The networks."""
        return list(getattr(self, self.holder))

    def check_counts(self, **arguments: Any) -> None:
        """Raises :class:`ValueError` for an argument that does not hold one value for each network."""
        count = len(self.members)
        for name, value in arguments.items():
            is_one = isinstance(value, torch.Tensor) and value.dim() == 0
            if is_one or not isinstance(value, (list, tuple, torch.Tensor)) or len(value) != count:
                got = repr(value) if is_one or not hasattr(value, "__len__") else f"{len(value)} values"
                raise ValueError(f"{name} is {got}: {type(self).__name__} holds {count} networks, pass one value for each")

    @classmethod
    def from_pretrained(cls: type[_S], pretrained_model_name_or_path: PathLike, **options: Any) -> _S:
        """Loads the networks of a local folder and of the numbered ones beside it, in evaluation mode.

        Args:
            pretrained_model_name_or_path: The first network's folder.
            **options: As for one network, :meth:`ModelMixin.from_pretrained`.

        Raises:
            HubError: There is no such folder.
            ConfigError, WeightsError: As for one network.
        """
        if not Source(pretrained_model_name_or_path).is_local:
            remedy = f"load each with {cls.member.__name__}.from_pretrained, and give {cls.__name__} their list"
            raise HubError(f"{pretrained_model_name_or_path} is no folder here; from the hub {remedy}")
        return super().from_pretrained(pretrained_model_name_or_path, **options)

    @classmethod
    def from_folder(
        cls: type[_S], folder: Path, variant: str | None, dtype: torch.dtype, device: torch.device | str | int = "cpu",
        **config_overrides: Any,
    ) -> _S:  # fmt: skip
        """Loads from folders that are here; see :meth:`from_pretrained`. Overrides reach every network."""
        networks: list[ModelMixin] = []
        for place in _numbered(folder):
            if networks and not place.is_dir():
                break
            networks.append(cls.member.from_folder(place, variant, dtype, device, **config_overrides))
        return cls(networks).eval()

    def save_pretrained(
        self, save_directory: PathLike, *, variant: str | None = None, max_shard_size: int | str = "10GB",
        safe_serialization: bool = True,
    ) -> None:  # fmt: skip
        """Writes the first network to ``save_directory``, the others to numbered folders beside it.

        Args:
            save_directory: Folder, made if needed.
            variant, max_shard_size, safe_serialization: As for one network, :meth:`ModelMixin.save_pretrained`.

        Raises:
            FileExistsError: Beside the folder is one more numbered folder, which loading would take for another network.
        """
        options: dict[str, Any] = {"max_shard_size": max_shard_size, "safe_serialization": safe_serialization}
        places = _numbered(Path(save_directory))
        each = [(network, next(places)) for network in self.members]
        if (surplus := next(places)).exists():
            raise FileExistsError(f"{surplus} exists, and would be loaded as a network of {save_directory}: remove it first")
        for network, place in each:
            network.save_pretrained(place, variant=variant, **options)


def _numbered(folder: Path) -> Iterator[Path]:
    """``name``, ``name_1``, ``name_2`` ..."""
    yield folder
    count = 0
    while True:
        count += 1
        yield folder.with_name(f"{folder.name}_{count}")
