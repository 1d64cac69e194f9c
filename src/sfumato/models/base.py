"""What every network has: loading, saving, size, place, gradient checkpointing."""

from __future__ import annotations

from pathlib import Path
from typing import Any, ClassVar, TypeVar

import torch
from torch import nn
from torch.utils.checkpoint import checkpoint

from .. import weights
from ..config import ConfigMixin, read_json
from ..errors import ConfigError
from ..hub import PathLike, Source
from .layers.backends import set_backend
from .layers.processors import processors, set_processors

_M = TypeVar("_M", bound="ModelMixin")


def checked_dtype(dtype: torch.dtype | None, torch_dtype: torch.dtype | None) -> torch.dtype | None:
    """Returns the dtype given under either name; a ``ValueError`` if they differ or it is no floating-point dtype."""
    if dtype is not None and torch_dtype is not None and dtype != torch_dtype:
        raise ValueError(f"dtype={dtype} and torch_dtype={torch_dtype} differ: pass one of them")
    value = dtype if dtype is not None else torch_dtype
    if value is not None and not (isinstance(value, torch.dtype) and value.is_floating_point):
        raise ValueError(f"dtype={value!r} is not a floating-point torch dtype such as torch.float16")
    return value


class ModelMixin(nn.Module, ConfigMixin):
    """Base of the networks.

    A network keeps no buffers that are not in its checkpoint: constants are computed in ``forward``.

    Class attributes:
        weights_name: File of the weights in a folder.
        keep_in_fp32: Parts of parameter names that stay float32 whatever dtype is asked for.
        ignorable_keys: Parts of names of checkpoint tensors that hold no information (old position ids, say).
    """

    config_name: ClassVar[str] = "config.json"
    weights_name: ClassVar[str] = weights.WEIGHTS_NAME
    keep_in_fp32: ClassVar[tuple[str, ...]] = ()
    ignorable_keys: ClassVar[tuple[str, ...]] = ()
    is_gradient_checkpointing: bool = False

    @classmethod
    def from_pretrained(
        cls: type[_M], pretrained_model_name_or_path: PathLike, *, subfolder: str | None = None, variant: str | None = None,
        dtype: torch.dtype | None = None, torch_dtype: torch.dtype | None = None,
        device_map: str | int | torch.device | dict[str, Any] | None = None, revision: str | None = None,
        token: str | bool | None = None, cache_dir: PathLike | None = None, local_files_only: bool = False,
        force_download: bool = False, use_safetensors: bool = True, low_cpu_mem_usage: bool = True, **config_overrides: Any,
    ) -> _M:  # fmt: skip
        """Loads a network from a folder or a hub repository, in evaluation mode.

        Args:
            pretrained_model_name_or_path: Folder or ``owner/repository``.
            subfolder, variant: Folder inside it; file variant, such as ``"fp16"``.
            dtype: Floating-point type of the parameters; float32 when not given. ``torch_dtype`` is the same argument.
            device_map: Device to load to.
            revision, token, cache_dir: Of the hub: branch, tag or commit; access token; cache folder.
            local_files_only, force_download: Never use the network; fetch again what is cached.
            use_safetensors, low_cpu_mem_usage: Must be true: pickles are not read, weights are never held twice.
            **config_overrides: Configuration values that replace the file's.

        Raises:
            HubError: Nothing is found under the name.
            ConfigError: The configuration does not fit the class.
            WeightsError: Weights are missing, corrupt, pickled, or do not fit.
        """
        if use_safetensors is False:
            raise ValueError("use_safetensors=False asks for pickle weights, which can run code; convert them to safetensors")
        if low_cpu_mem_usage is False:
            raise ValueError("low_cpu_mem_usage=False is not offered: loading never holds the weights twice")
        source = Source(pretrained_model_name_or_path, revision, token, cache_dir, local_files_only, force_download)
        dtype = checked_dtype(dtype, torch_dtype)
        device = single_device(device_map)
        folder = source.fetch([cls.config_name, *weights.weight_patterns(variant, cls.weights_name)], subfolder or "")
        return cls.from_folder(folder, variant, dtype or torch.float32, device, **config_overrides)

    @classmethod
    def from_folder(
        cls: type[_M], folder: Path, variant: str | None, dtype: torch.dtype, device: torch.device | str | int = "cpu",
        **config_overrides: Any,
    ) -> _M:  # fmt: skip
        """Loads from a folder that is here; see :meth:`from_pretrained`."""
        path = folder / cls.config_name
        if not path.is_file():
            raise ConfigError(f"{folder} has no {cls.config_name}: is it the folder of a {cls.__name__}, or its parent?")
        config = read_json(path)
        written_by = config.get("_class_name", cls.__name__)
        if written_by != cls.__name__:
            raise ConfigError(f"{path} describes a {written_by}, not a {cls.__name__}: load it with sfumato.{written_by}")
        model = weights.build_on_meta(cls, config, **config_overrides)
        model.register_to_config(_name_or_path=str(folder))
        tensors = weights.read_tensors(weights.find_weight_files(folder, variant, cls.weights_name), torch.device(device))
        weights.assign(model, cls.upgrade_state_dict(tensors), dtype, folder)
        return model.eval()

    @classmethod
    def upgrade_state_dict(cls, tensors: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
        """Renames the parameters of a file to ours. The default changes nothing."""
        return tensors

    @classmethod
    def downgrade_state_dict(cls, tensors: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
        """Renames our parameters to those of the file that is written. The default changes nothing."""
        return tensors

    def save_pretrained(
        self, save_directory: PathLike, *, variant: str | None = None, max_shard_size: int | str = "10GB",
        safe_serialization: bool = True,
    ) -> None:  # fmt: skip
        """Writes ``config.json`` and safetensors weights; an interruption leaves the old files whole.

        Args:
            save_directory: Folder, made if needed.
            variant: File variant, such as ``"fp16"``; the parameters are written as they are.
            max_shard_size: Bytes, or text such as ``"5GB"``; larger weights are split.
            safe_serialization: Must be true: pickle files are not written.

        Raises:
            ConfigError: An IP-Adapter is loaded.
        """
        folder = weights.output_folder(save_directory, safe_serialization)
        tensors = self.downgrade_state_dict(dict(self.state_dict()))
        if any(".processor." in name for name in tensors):  # its checkpoint could not be loaded
            raise ConfigError("an IP-Adapter is loaded in this network: save it after `pipe.unload_ip_adapter()`")
        weights.save_tensors(tensors, folder, self.weights_name, variant, max_shard_size)
        self.save_config(folder)

    @property
    def device(self) -> torch.device:
        """Device of the parameters."""
        return next(self.parameters()).device

    @property
    def dtype(self) -> torch.dtype:
        """Floating-point type of the parameters."""
        return next(p.dtype for p in self.parameters() if p.is_floating_point())

    def num_parameters(self, only_trainable: bool = False) -> int:
        """Number of parameters."""
        return sum(p.numel() for p in self.parameters() if p.requires_grad or not only_trainable)

    def set_attention_backend(self, backend: str) -> None:
        """Lets a backend compute all attention of this network.

        ``"native"`` is the default; ``"flash"``, ``"sage"``, ``"xformers"``, ``"flex"`` and others stand in
        :mod:`sfumato.models.layers.backends`.

        Raises:
            ValueError: There is none of this name.
            ImportError: Its package is not installed.
        """
        set_backend(self, backend)

    @property
    def attn_processors(self) -> dict[str, Any]:
        """The processors of the attention layers, by ``<layer>.processor``."""
        return processors(self)

    def set_attn_processor(self, processor: Any) -> None:
        """Puts a processor of the caller's in all attention layers, or those of a mapping as :attr:`attn_processors` returns it."""
        set_processors(self, processor)

    def enable_gradient_checkpointing(self) -> None:
        """Trades time for memory in training: blocks are computed again in the backward pass."""
        self._set_gradient_checkpointing(True)

    def disable_gradient_checkpointing(self) -> None:
        """Undoes :meth:`enable_gradient_checkpointing`."""
        self._set_gradient_checkpointing(False)

    def _set_gradient_checkpointing(self, on: bool) -> None:
        self.is_gradient_checkpointing = on

    def run_block(self, block: nn.Module, *args: Any) -> Any:
        """Calls a block, through gradient checkpointing when that is on and gradients are wanted."""
        if self.is_gradient_checkpointing and torch.is_grad_enabled():
            return checkpoint(block, *args, use_reentrant=False)
        return block(*args)


def single_device(device_map: Any) -> Any:
    """Reads a ``device_map`` that names one device; ``None`` is the CPU.

    Raises:
        ValueError: A strategy or a split over devices, which is not offered yet; or no device of this machine.
    """
    if isinstance(device_map, dict) and list(device_map) == [""]:
        device_map = device_map[""]
    if isinstance(device_map, dict) or device_map in ("auto", "balanced", "sequential"):
        raise ValueError(
            f"device_map={device_map!r} splits a model over devices, which is not offered; name one device, such as 'cuda'"
        )
    try:
        return torch.empty(0, device="cpu" if device_map is None else device_map).device
    except (RuntimeError, AssertionError, TypeError) as error:
        raise ValueError(f"device_map={device_map!r} is no device of this machine ({error}); name one, such as 'cpu'") from error
