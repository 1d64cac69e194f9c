"""Loading and saving the components of a pipeline folder, whichever library they come from."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from .. import registry, weights
from ..config import plain, read_json
from ..errors import ConfigError, HubError, WeightsError
from ..files import write_atomically
from ..hub import Source
from ..models.base import ModelMixin, checked_dtype, single_device

OUR_LIBRARIES = ("diffusers", "sfumato")
# What a component of another library may consist of, beside weights: configuration, vocabularies, and nothing executable.
_TEXT_FILES = ("*.json", "*.txt", "*.model", "*.jinja")


def dtypes(dtype: Any, torch_dtype: Any) -> dict[str, torch.dtype]:
    """Normalises the two spellings of dtype, single or by component, to a dictionary with a ``"default"``."""
    if isinstance(dtype, dict) or isinstance(torch_dtype, dict):
        table = dtype if isinstance(dtype, dict) else torch_dtype
        checked = {name: checked_dtype(value, None) for name, value in table.items()}
        return {"default": torch.float32, **{k: v for k, v in checked.items() if v is not None}}
    return {"default": checked_dtype(dtype, torch_dtype) or torch.float32}


def pipeline_class(index: dict[str, Any]) -> type:
    """Returns the public pipeline class that a ``model_index.json`` names.

    Raises:
        ConfigError: It names none, or one that is not offered.
    """
    name = index.get("_class_name")
    if not isinstance(name, str):
        raise ConfigError("model_index.json lacks '_class_name': is this a pipeline folder?")
    try:
        return registry.load(name)  # type: ignore[no-any-return]
    except AttributeError as error:
        raise ConfigError(f"the repository asks for {name}, which is not offered here ({error})") from None


@dataclass(frozen=True)
class LoadRequest:
    """Where to load from and in which form."""

    source: Source
    variant: str | None
    dtypes: dict[str, torch.dtype]
    device_map: Any

    def read_index(self, filename: str) -> dict[str, Any]:
        """Reads ``model_index.json``.

        Raises:
            HubError: There is none.
        """
        try:
            return read_json(self.source.file(filename))
        except HubError as error:
            folder = Path(self.source.name)
            if folder.is_dir() and (folder / "config.json").is_file():
                raise HubError(
                    f"{folder} holds a single network (config.json), not a pipeline: load it with its own class, or pass the parent folder"
                ) from error
            raise

    def fetch(self, wanted: dict[str, Any]) -> Path:
        """Makes the files of the wanted components present and returns the pipeline's folder.

        Raises:
            HubError: A component's folder is missing.
        """
        suffix = f".{self.variant}" if self.variant else ""
        patterns = []
        for name in wanted:
            patterns += [f"{name}/{p}" for p in _TEXT_FILES]
            patterns += [f"{name}/*{suffix}.safetensors", f"{name}/*{suffix}-*-of-*.safetensors"]
        folder = self.source.fetch(patterns)
        if self.variant and not self.source.is_local and not any(folder.glob(f"*/*.{self.variant}*")):
            raise HubError(f"{self.source.name} has no files of variant {self.variant!r}: leave `variant` out, or choose another")
        for name in wanted:
            if not (folder / name).is_dir():
                raise HubError(f"{folder} has no folder {name!r}, which its model_index.json names: the checkpoint is incomplete")
        return folder

    def load(self, folder: Path, name: str, library: str, class_name: str) -> Any:
        """Loads one component."""
        dtype = self.dtypes.get(name, self.dtypes["default"])
        place = folder / name
        if library == "transformers":
            return self._load_transformers(place, class_name, dtype)
        if library not in OUR_LIBRARIES and class_name not in registry.PUBLIC:
            raise ConfigError(
                f"component {name!r} is a {library}.{class_name}; no code outside the library is run: pass {name}=..."
            )
        cls = registry.load(class_name)
        if issubclass(cls, ModelMixin):
            return cls.from_folder(place, self._variant_of(place, weights.WEIGHTS_NAME), dtype, single_device(self.device_map))
        if hasattr(cls, "from_config"):
            return cls.from_config(read_json(place / cls.config_name))
        return self._from_transformers_class(cls, place, dtype)

    def _variant_of(self, folder: Path, name: str) -> str | None:
        """The variant, where this component has files of it; a pipeline's variant may cover some components only."""
        if self.variant is None:
            return None
        stem = name.removesuffix(".safetensors")
        return self.variant if any(folder.glob(f"{stem}*.{self.variant}*")) else None

    def _load_transformers(self, folder: Path, class_name: str, dtype: torch.dtype) -> Any:
        import transformers

        cls = getattr(transformers, class_name, None)
        if cls is None:
            # Older checkpoints name classes that transformers has renamed since.
            cls = getattr(transformers, class_name.replace("FeatureExtractor", "ImageProcessor"), None)
        if cls is None:
            raise ConfigError(
                f"{folder.name!r} is a transformers.{class_name}, which transformers {transformers.__version__} lacks"
            )
        return self._from_transformers_class(cls, folder, dtype)

    def _from_transformers_class(self, cls: Any, folder: Path, dtype: torch.dtype) -> Any:
        if not hasattr(cls, "base_model_prefix"):
            return cls.from_pretrained(folder, local_files_only=True)
        variant = self._variant_of(folder, "model.safetensors")
        weights.find_weight_files(folder, variant, name="model.safetensors")
        try:
            model = cls.from_pretrained(folder, variant=variant, dtype=dtype, use_safetensors=True, local_files_only=True)
        except Exception as error:
            raise WeightsError(f"{folder} cannot be loaded as a {cls.__name__}: {error}") from error
        return model.to(single_device(self.device_map)).eval()


def describe(component: Any) -> list[str | None]:
    """The ``[library, class]`` entry of a component in ``model_index.json``."""
    if component is None:
        return [None, None]
    cls = type(component)
    name = cls.__name__
    if cls.__module__.startswith("transformers."):
        public = name.removesuffix("Fast") if name.endswith("TokenizerFast") else name
        return ["transformers", public]
    if name in registry.FORMAT_LIBRARY:
        return [registry.FORMAT_LIBRARY[name], name]
    return ["diffusers", name]


def save_component(component: Any, folder: Path, variant: str | None, max_shard_size: int | str) -> None:
    """Writes one component."""
    folder.mkdir(parents=True, exist_ok=True)
    if isinstance(component, ModelMixin):
        component.save_pretrained(folder, variant=variant, max_shard_size=max_shard_size)
    elif isinstance(component, torch.nn.Module):
        component.save_pretrained(folder, variant=variant, max_shard_size=max_shard_size)  # type: ignore[operator]
    else:
        component.save_pretrained(folder)


def write_index(path: Path, config: dict[str, Any]) -> None:
    """Writes ``model_index.json``, atomically."""
    text = json.dumps({k: plain(v) for k, v in sorted(config.items()) if k != "_name_or_path"}, indent=2) + "\n"
    write_atomically(path, lambda temporary: temporary.write_text(text, encoding="utf-8"))
