"""Loading and saving the components of a pipeline folder, whichever library they come from."""

from __future__ import annotations

import errno
import json
import tempfile
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from .. import registry, weights
from ..config import ConfigMixin, plain, read_json
from ..errors import ConfigError, HubError, WeightsError, did_you_mean
from ..files import write_atomically
from ..hub import Source
from ..models.base import ModelMixin, checked_dtype
from ..schedulers.base import SchedulerMixin

_NETWORK = ("a network", lambda c: isinstance(c, torch.nn.Module))
_AUTOENCODER = ("an autoencoder", lambda c: isinstance(c, torch.nn.Module) and hasattr(c, "decode"))
_SCHEDULER = ("a scheduler of this library", lambda c: isinstance(c, SchedulerMixin))
_PROCESSOR = ("a tokenizer or processor", lambda c: callable(c) and not isinstance(c, (type, torch.nn.Module)))
_KINDS: dict[str, tuple[str, Callable[[Any], bool]]] = {
    "unet": ("a denoiser", lambda c: isinstance(c, torch.nn.Module) and not hasattr(c, "decode")),
    **dict.fromkeys(("vae", "vqvae"), _AUTOENCODER),
    **dict.fromkeys(("text_encoder", "text_encoder_2", "text_encoder_3", "image_encoder"), _NETWORK),
    **dict.fromkeys(("transformer", "controlnet", "adapter", "safety_checker", "depth_estimator"), _NETWORK),
    **dict.fromkeys(("scheduler", "low_res_scheduler"), _SCHEDULER),
    **dict.fromkeys(("tokenizer", "tokenizer_2", "tokenizer_3", "feature_extractor"), _PROCESSOR),
}
_TRANSFORMERS_WEIGHTS = "model.safetensors"
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
    """Returns the public pipeline class that a ``model_index.json`` names."""
    name = index.get("_class_name")
    if not isinstance(name, str):
        raise ConfigError("model_index.json lacks '_class_name': is this a pipeline folder?")
    offered = [n for n, module in registry.PUBLIC.items() if module.startswith("families.")]
    if name not in offered:
        near = did_you_mean(name, offered)
        raise ConfigError(f"model_index.json asks for {name!r}, which is no pipeline offered here{near}")
    return registry.load(name)


@dataclass(frozen=True)
class LoadRequest:
    """Where to load from and in which form."""

    source: Source
    variant: str | None
    dtypes: dict[str, torch.dtype]
    device: Any

    def read_index(self, filename: str) -> dict[str, Any]:
        """Reads ``model_index.json``."""
        try:
            return read_json(self.source.file(filename))
        except HubError as error:
            folder = self.source.name
            if (Path(folder) / "config.json").is_file():
                remedy = "load it with its own class, or pass the parent"
                raise HubError(f"{folder} holds a single network (config.json), no pipeline: {remedy}") from error
            raise

    def fetch(self, wanted: dict[str, Any]) -> Path:
        """Makes the files of the wanted components present and returns the pipeline's folder."""
        folder = self._fetch_weights(wanted, self.variant)
        if self.variant:
            plain_only = [n for n in wanted if not any((folder / n).glob(f"*.{self.variant}*"))]
            if len(plain_only) == len(wanted):
                raise HubError(f"{self.source.name} has no files of variant={self.variant!r}: leave it out, or choose another")
            folder = self._fetch_weights(plain_only, None)
        for name in wanted:
            if not (folder / name).is_dir():
                raise HubError(f"{folder} has no folder {name!r}, which its model_index.json names: download the rest")
        return folder

    def _fetch_weights(self, names: Iterable[str], variant: str | None) -> Path:
        patterns = [*_TEXT_FILES, *weights.weight_patterns(variant, weights.WEIGHTS_NAME, _TRANSFORMERS_WEIGHTS)]
        return self.source.fetch([f"{name}/{pattern}" for name in names for pattern in patterns])

    def load(self, folder: Path, name: str, library: str, class_name: str) -> Any:
        """Loads one component."""
        dtype = self.dtypes.get(name, self.dtypes["default"])
        place, cls = folder / name, component_class(name, library, class_name)
        if issubclass(cls, ModelMixin):
            return cls.from_folder(place, self._variant_of(place, cls.weights_name), dtype, self.device)
        if issubclass(cls, ConfigMixin):
            return cls.from_config(read_json(place / cls.config_name))
        return self._from_transformers_class(cls, place, dtype)

    def _variant_of(self, folder: Path, name: str) -> str | None:
        """The variant, where this component has files of it; a pipeline's variant may cover some components only."""
        if self.variant is None:
            return None
        stem = name.removesuffix(".safetensors")
        return self.variant if any(folder.glob(f"{stem}*.{self.variant}*")) else None

    def _from_transformers_class(self, cls: Any, folder: Path, dtype: torch.dtype) -> Any:
        if not hasattr(cls, "base_model_prefix"):
            check_tokenizer_files(cls, folder)
            try:
                return cls.from_pretrained(folder, local_files_only=True)
            except Exception as error:
                raise ConfigError(f"{folder} cannot be loaded as a {cls.__name__} ({error}): download it again") from error
        refuse_kernels(read_json(folder / "config.json"), folder)
        variant = self._variant_of(folder, _TRANSFORMERS_WEIGHTS)
        weights.find_weight_files(folder, variant, name=_TRANSFORMERS_WEIGHTS)
        options = {"variant": variant, "dtype": dtype, "use_safetensors": True, "local_files_only": True}
        try:
            model, report = cls.from_pretrained(folder, output_loading_info=True, **options)
        except Exception as error:
            raise WeightsError(f"{folder} cannot be loaded as a {cls.__name__} ({error}): download it again") from error
        if report["missing_keys"]:
            missing = sorted(report["missing_keys"])
            raise WeightsError(f"{folder} lacks {len(missing)} parameters of {cls.__name__}, such as {missing[0]}: download again")
        return model.to(self.device).eval()


def check_tokenizer_files(cls: Any, folder: Path) -> None:
    """Refuses a tokenizer without its vocabulary, which transformers would load as an empty one."""
    parts = dict(getattr(cls, "vocab_files_names", {}))
    whole = parts.pop("tokenizer_file", None)
    if whole and (folder / whole).is_file():
        parts = {}
    missing = [f for f in (*parts.values(), *(["tokenizer_config.json"] if whole else [])) if not (folder / f).is_file()]
    if missing:
        raise ConfigError(f"{folder} lacks {missing[0]!r}, which a {cls.__name__} needs: download it again")


def refuse_kernels(config: Any, folder: Path) -> None:
    """Refuses a configuration that makes transformers fetch an attention kernel, which is code, from the hub."""
    for key, value in config.items() if isinstance(config, dict) else ():
        if key.endswith("_implementation") and "/" in str(value):
            raise ConfigError(f"{folder}/config.json asks for code from the hub, {key}={value!r}, which is not run: remove the key")
        refuse_kernels(value, folder)


def component_class(name: str, library: str, class_name: str) -> type:
    """Returns the class of a component: one of this library's, or a plain one of transformers; no other is imported or run."""
    if library == registry.FORMAT_LIBRARY.get(class_name):
        return registry.load(class_name)
    if library == "transformers":
        import transformers

        # Older checkpoints name classes that transformers has renamed since. Auto classes can run a repository's own code.
        for public in (class_name, class_name.replace("FeatureExtractor", "ImageProcessor")):
            cls = getattr(transformers, public, None)
            if isinstance(cls, type) and hasattr(cls, "from_pretrained") and not public.startswith("Auto"):
                return cls
    elif class_name in registry.PUBLIC:
        cls = registry.load(class_name)
        if isinstance(cls, type) and issubclass(cls, ConfigMixin):
            return cls
    refusal = f"which is not offered here, and no code outside the library is run: pass {name}=..."
    raise ConfigError(f"component {name!r} is a {library}.{class_name}, {refusal}")


def check_kinds(components: Mapping[str, Any]) -> None:
    """Refuses, with a ``TypeError``, a component of another kind than its name says: a path, a class, the wrong way round."""
    for name, component in components.items():
        expected, fits = _KINDS.get(name, ("", lambda _: True))
        if component is not None and not fits(component):
            what = f"a {type(component).__name__}" if type(component).__module__ != "builtins" else repr(component)
            raise TypeError(f"{name} is {what}, expected {expected}: load it by the `from_pretrained` of its class and pass it")


def describe(component: Any) -> list[str | None]:
    """The ``[library, class]`` entry of a component in ``model_index.json``."""
    if component is None:
        return [None, None]
    name = type(component).__name__
    if type(component).__module__.startswith("transformers."):
        return ["transformers", name.removesuffix("Fast") if name.endswith("TokenizerFast") else name]
    return [registry.FORMAT_LIBRARY.get(name, "diffusers"), name]


def save_components(components: Mapping[str, Any], index: Mapping[str, Any], folder: Path, **options: Any) -> None:
    """Writes a pipeline's components and ``model_index.json``; ``options`` are those of a network's ``save_pretrained``.

    All is written to a folder of its own first, within ``folder``, and moved into place when it is whole: whatever fails or is
    interrupted until then leaves the old pipeline as it was.
    """
    present = {name: component for name, component in components.items() if component is not None}
    with tempfile.TemporaryDirectory(prefix=".saving-", dir=folder) as temporary:
        staging = Path(temporary)
        for name, component in present.items():
            _write_component(component, staging / name, folder / name, options)
        text = json.dumps({k: plain(v) for k, v in sorted(index.items()) if k != "_name_or_path"}, indent=2) + "\n"
        write_atomically(staging / "model_index.json", lambda path: path.write_text(text, encoding="utf-8"))
        written = [p.relative_to(staging) for p in staging.rglob("*") if p.is_file()]
        for path in written:
            (folder / path).parent.mkdir(parents=True, exist_ok=True)
            (staging / path).replace(folder / path)
    for name, component in present.items():
        if isinstance(component, torch.nn.Module):
            weights_name = getattr(component, "weights_name", _TRANSFORMERS_WEIGHTS)
            weights.remove_outdated(folder / name, weights_name, options["variant"], [folder / path for path in written])


def _write_component(component: Any, staging: Path, target: Path, options: dict[str, Any]) -> None:
    staging.mkdir()
    try:
        component.save_pretrained(staging, **(options if isinstance(component, torch.nn.Module) else {}))
    except Exception as error:
        if isinstance(component, ConfigMixin) and not isinstance(error, OSError):
            raise  # an argument is wrong; other libraries have errors of their own for a full disk
        message = f"could not write {target} ({error}); the old files are unchanged"
        raise OSError(getattr(error, "errno", None) or errno.EIO, message) from error
