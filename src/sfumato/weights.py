"""Weights in and out: safetensors only, mapped rather than read, assigned rather than copied.

A network is built on the meta device, so that no memory is spent on initial values, and the tensors of the file become its
parameters. With no dtype or device change nothing is copied at all: the parameters are views of the mapped file.
"""

from __future__ import annotations

import errno
import json
import os
import re
from collections.abc import Iterable, Mapping
from functools import partial
from pathlib import Path
from typing import Any, TypeVar

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import nn

from .errors import WeightsError, did_you_mean
from .files import write_together

WEIGHTS_NAME = "diffusion_pytorch_model.safetensors"
_SIZES = {"": 1, "KB": 10**3, "MB": 10**6, "GB": 10**9, "TB": 10**12}
_PICKLE_SUFFIXES = (".bin", ".ckpt", ".pt", ".pth")

_M = TypeVar("_M", bound=nn.Module)


def refuse_pickle(use_safetensors: bool | None) -> None:
    """Refuses ``use_safetensors=False``."""
    if use_safetensors is False:
        raise ValueError("use_safetensors=False asks for pickle weights, which can run code; convert them to safetensors")


def output_folder(save_directory: str | os.PathLike, safe_serialization: bool) -> Path:
    """Makes the folder that ``save_pretrained`` writes to; refuses none, a file, and ``safe_serialization=False``."""
    if not save_directory:
        raise ValueError(f"save_directory={save_directory!r}: pass the folder to write to")
    if not safe_serialization:
        raise ValueError("safe_serialization=False asks for pickle weights; only safetensors is written")
    folder = Path(save_directory)
    if folder.is_file():
        raise NotADirectoryError(f"save_directory={str(folder)!r} is a file; pass a folder")
    folder.mkdir(parents=True, exist_ok=True)
    return folder


def with_variant(name: str, variant: str | None) -> str:
    """``model.safetensors`` -> ``model.fp16.safetensors``; ``x.index.json`` -> ``x.index.fp16.json``."""
    if variant is None:
        return name
    if name.endswith(".index.json"):
        return name.removesuffix(".index.json") + f".index.{variant}.json"
    return name.removesuffix(".safetensors") + f".{variant}.safetensors"


def weight_patterns(variant: str | None, *names: str) -> list[str]:
    """What to fetch of a component's weights: the single file or the shards of this variant alone, and their index."""
    stems = [with_variant(name, variant).removesuffix(".safetensors") for name in names]
    return [p for stem in stems for p in (f"{stem}.safetensors", f"{stem}-*-of-*.safetensors")] + ["*.index*.json"]


def find_weight_files(folder: Path, variant: str | None = None, name: str = WEIGHTS_NAME) -> list[Path]:
    """Lists the safetensors files of a component folder: one file, or the shards that its index names."""
    single = folder / with_variant(name, variant)
    if single.is_file():
        return [single]
    index = folder / with_variant(f"{name}.index.json", variant)
    if index.is_file():
        try:
            shards = sorted(set(json.loads(index.read_text())["weight_map"].values()))
            missing = [s for s in shards if not (folder / s).is_file()]
        except (ValueError, KeyError, AttributeError, TypeError) as error:
            raise WeightsError(f"{index} is not a valid shard index ({error!r}): download it again") from error
        if missing:
            raise WeightsError(f"{folder} lacks {len(missing)} of {len(shards)} shards, first {missing[0]!r}: download again")
        return [folder / s for s in shards]
    pickles = sorted(p.name for p in folder.glob("*") if p.suffix in _PICKLE_SUFFIXES)
    if pickles:
        remedy = "which can run code when opened; convert them to safetensors, or use a revision that has safetensors"
        raise WeightsError(f"{folder} holds only pickle weights ({pickles[0]}), {remedy}")
    others = sorted(p.name for p in folder.glob("*.safetensors"))
    hint = f"; it does hold {', '.join(others[:4])}: pass the matching `variant`" if others else ""
    raise WeightsError(f"no weights in {folder}: expected {single.name}, download it again (pickles are not read){hint}")


def read_tensors(files: Iterable[Path], device: torch.device | str = "cpu") -> dict[str, torch.Tensor]:
    """Maps safetensors files into memory: tensor name -> tensor on ``device``; on CPU a view of the file, read on first use."""
    tensors: dict[str, torch.Tensor] = {}
    for file in files:
        try:
            with safe_open(file, framework="pt", device=str(device)) as opened:
                found = {key: opened.get_tensor(key) for key in opened.keys()}  # noqa: SIM118 (not a mapping)
        except (SafetensorError, OSError) as error:
            cause = f"({error}): it is missing, truncated or corrupt, download it again"
            raise WeightsError(f"{file} cannot be read as safetensors {cause}") from error
        if doubled := tensors.keys() & found.keys():
            raise WeightsError(f"{sorted(doubled)[0]!r} stands in two weight files, the second is {file}")
        tensors.update(found)
    return tensors


def assign(model: nn.Module, tensors: Mapping[str, torch.Tensor], dtype: torch.dtype | None, where: Any = "") -> None:
    """Makes ``tensors`` the parameters of ``model``; every tensor and every parameter is accounted for.

    Args:
        model: A network on the meta device; parts of names in its ``keep_in_fp32`` stay float32.
        tensors: Parameter name -> tensor.
        dtype: Floating-point type to convert to, or ``None`` to keep the file's.
        where: What the tensors came from, for messages.
    """
    remedy = "check that config.json belongs to these weights"
    expected = model.state_dict()
    ignorable = getattr(model, "ignorable_keys", ())
    missing = [k for k in expected if k not in tensors]
    extra = [k for k in tensors if k not in expected and not any(part in k for part in ignorable)]
    if missing or extra:
        parts = [f"{len(missing)} missing (first {missing[0]!r})"] if missing else []
        parts += [f"{len(extra)} unexpected (first {extra[0]!r}{did_you_mean(extra[0], missing)})"] if extra else []
        count = f"{', '.join(parts)} of {len(expected)} parameters"
        raise WeightsError(f"{where} does not fit {type(model).__name__}: {count}; {remedy}")
    for key, parameter in expected.items():
        if parameter.shape != tensors[key].shape:
            wanted = f"{type(model).__name__} with this configuration expects {tuple(parameter.shape)}"
            raise WeightsError(f"{where}: {key!r} has shape {tuple(tensors[key].shape)}, {wanted}; {remedy}")
    keep = getattr(model, "keep_in_fp32", ())

    def cast(key: str, tensor: torch.Tensor) -> torch.Tensor:
        if dtype is None or not tensor.is_floating_point():
            return tensor
        return tensor.to(torch.float32 if any(part in key for part in keep) else dtype)

    model.load_state_dict({k: cast(k, tensors[k]) for k in expected}, strict=True, assign=True)
    model.requires_grad_(True)


def parse_size(size: int | str) -> int:
    """``"5GB"`` -> bytes."""
    match = re.fullmatch(r"(\d+(?:\.\d+)?)\s*([KMGT]B|)", str(size).strip().upper())
    if match and (value := int(float(match[1]) * _SIZES[match[2]])) > 0:
        return value
    raise ValueError(f"max_shard_size={size!r} is not a size: expected bytes, or text such as '5GB' or '500MB'")


def save_tensors(
    tensors: Mapping[str, torch.Tensor],
    folder: Path,
    name: str = WEIGHTS_NAME,
    variant: str | None = None,
    max_shard_size: int | str = "10GB",
) -> None:
    """Writes tensors as one safetensors file, or as shards with an index when they exceed ``max_shard_size``.

    All files appear whole, together, or not at all; outdated files are removed after that.
    """
    shards: list[dict[str, torch.Tensor]] = [{}]
    limit, used = parse_size(max_shard_size), 0
    for key, tensor in tensors.items():
        size = tensor.numel() * tensor.element_size()
        if used + size > limit and shards[-1]:
            shards, used = [*shards, {}], 0
        shards[-1][key] = tensor.detach().cpu().contiguous()
        used += size
    single, index = with_variant(name, variant), folder / with_variant(f"{name}.index.json", variant)
    stem = single.removesuffix(".safetensors")
    many = [f"{stem}-{i:05d}-of-{len(shards):05d}.safetensors" for i in range(1, len(shards) + 1)]
    names = many if len(shards) > 1 else [single]
    writers: dict[Path, Any] = {folder / file: partial(_write_shard, shard) for shard, file in zip(shards, names, strict=True)}
    if len(shards) > 1:
        total = sum(t.numel() * t.element_size() for t in tensors.values())
        weight_map = {key: file for shard, file in zip(shards, names, strict=True) for key in shard}
        text = json.dumps({"metadata": {"total_size": total}, "weight_map": weight_map}, indent=2)
        writers[index] = lambda path: path.write_text(text)
    write_together(writers)
    remove_outdated(folder, name, variant, writers)


def _write_shard(shard: dict[str, torch.Tensor], path: Path) -> None:
    try:
        save_file(shard, path, metadata={"format": "pt"})
    except SafetensorError as error:  # the writer's own error for a full disk and the like
        raise OSError(errno.EIO, str(error)) from error


def remove_outdated(folder: Path, name: str, variant: str | None, written: Iterable[Path]) -> None:
    """Removes the weight files of this name and variant that are not among those just ``written``."""
    single = folder / with_variant(name, variant)
    shards = folder.glob(f"{single.name.removesuffix('.safetensors')}-*-of-*.safetensors")
    for old in {single, folder / with_variant(f"{name}.index.json", variant), *shards} - {*written}:
        old.unlink(missing_ok=True)


def build_on_meta(cls: type[_M], config: Mapping[str, Any], **overrides: Any) -> _M:
    """Builds a configurable network without memory for its parameters."""
    with torch.device("meta"):
        return cls.from_config(config, **overrides)  # type: ignore[attr-defined]
