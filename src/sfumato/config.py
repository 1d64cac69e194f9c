"""Configuration: an object remembers the arguments it was built with, and can be rebuilt from them.

A configurable class needs no decorator and no schema: its ``__init__`` signature is the schema. The recorded values go to
JSON and back under the key names of the diffusers checkpoint format. Keys that a class does not know are kept, so that
``Euler.from_config(ddim.config)`` and the way back lose nothing.
"""

from __future__ import annotations

import functools
import inspect
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any, ClassVar, TypeVar

import numpy as np

from .errors import ConfigError, did_you_mean, refuse_unknown
from .files import write_atomically

FORMAT_VERSION = "0.42.1"
"""The release of the diffusers checkpoint format that written files declare."""

_C = TypeVar("_C", bound="ConfigMixin")


class FrozenConfig(dict):
    """A read-only dictionary whose keys also answer as attributes: ``config.in_channels``."""

    def __getattr__(self, name: str) -> Any:
        try:
            return self[name]
        except KeyError:
            raise AttributeError(f"the configuration has no key {name!r}{did_you_mean(name, self)}") from None

    def _refuse(self, *args: Any, **kwargs: Any) -> Any:
        raise TypeError("a configuration is read-only: build a changed object with `from_config(config, key=value)`")

    __setattr__ = __setitem__ = __delitem__ = __delattr__ = _refuse
    pop = popitem = update = setdefault = clear = _refuse

    def __reduce__(self) -> Any:
        return FrozenConfig, (dict(self),)


def plain(value: Any) -> Any:
    """Returns ``value`` as JSON can hold it."""
    if isinstance(value, (np.ndarray, np.generic)):
        return value.tolist()
    if isinstance(value, Path):
        return value.as_posix()
    if isinstance(value, (tuple, list)):
        return [plain(item) for item in value]
    if isinstance(value, Mapping):
        return {key: plain(item) for key, item in value.items()}
    return value


class ConfigMixin:
    """Records the constructor's arguments as ``self.config``.

    Class attributes: ``config_name``, the file that holds the configuration inside a checkpoint folder; ``ignore_for_config``,
    constructor arguments that are not configuration (modules, say).
    """

    config_name: ClassVar[str] = "config.json"
    ignore_for_config: ClassVar[tuple[str, ...]] = ()
    _config: FrozenConfig

    def __init_subclass__(cls, **kwargs: Any) -> None:
        super().__init_subclass__(**kwargs)
        if (init := cls.__dict__.get("__init__")) is None:
            return
        signature = inspect.signature(init)

        @functools.wraps(init)
        def recording_init(self: ConfigMixin, *args: Any, **kwargs: Any) -> None:
            # The outermost constructor's arguments are the configuration; a super().__init__ inside adds nothing.
            if "_config" not in self.__dict__:
                kept = self.__dict__.pop("_kept_keys", {})
                self.__dict__["_config"] = FrozenConfig({**kept, **_bind(type(self), signature, args, kwargs)})
            init(self, *args, **kwargs)

        cls.__init__ = recording_init  # type: ignore[method-assign, assignment]

    @property
    def config(self) -> FrozenConfig:
        """The arguments this object was built with, defaults included, and any unknown keys it was loaded with."""
        return self._config

    def register_to_config(self, **changes: Any) -> None:
        """Replaces recorded values. Used by constructors that resolve an argument, and by pipelines."""
        self.__dict__["_config"] = FrozenConfig({**self._config, **changes})

    @classmethod
    def _init_parameters(cls) -> dict[str, inspect.Parameter]:
        parameters = inspect.signature(cls.__init__).parameters
        return {name: p for name, p in parameters.items() if name != "self" and name not in cls.ignore_for_config}

    @classmethod
    def from_config(cls: type[_C], config: Mapping[str, Any] | None = None, **overrides: Any) -> _C:
        """Builds an object from another's configuration, of this class or of a related one.

        Values that the other object merely took from its own defaults are not carried over: this class's defaults apply,
        as they do in the reference.

        Args:
            config: A configuration mapping (``other.config`` or parsed JSON).
            **overrides: Values that take precedence.

        Raises:
            ConfigError: A required key is missing, or a value has the wrong type for the constructor.
        """
        if not isinstance(config, Mapping):
            remedy = "to read a folder or a hub repository use `from_pretrained`"
            raise ConfigError(f"{cls.__name__}.from_config takes a configuration mapping, not {type(config).__name__}; {remedy}")
        known = cls._init_parameters()
        refuse_unknown(overrides, known, f"{cls.__name__} has no configuration key", ConfigError)
        defaulted = set(config.get("_use_default_values", ()))
        same_class = config.get("_class_name") in (None, cls.__name__)
        values = {k: v for k, v in config.items() if same_class or k not in defaulted}
        arguments = {k: v for k, v in {**values, **overrides}.items() if k in known}
        missing = [n for n, p in known.items() if p.default is p.empty and p.kind is not p.VAR_KEYWORD and n not in arguments]
        if missing:
            raise ConfigError(f"the configuration of {cls.__name__} lacks the required key(s) {', '.join(missing)}")
        self = cls.__new__(cls)
        # in place before the constructor runs, which may ask what kind of object the configuration comes from
        self.__dict__["_kept_keys"] = {k: v for k, v in values.items() if k not in known and not k.startswith("_")}
        try:
            self.__init__(**arguments)  # type: ignore[misc]
        except TypeError as error:
            raise ConfigError(f"{cls.__name__} cannot be built: a configuration value has a wrong type ({error})") from error
        still_default = [k for k in known if k not in arguments or (same_class and k in defaulted and k not in overrides)]
        self.register_to_config(_use_default_values=still_default)
        return self

    def to_json_string(self) -> str:
        """The configuration as the JSON text that ``save_config`` writes."""
        public = {k: plain(v) for k, v in sorted(self._config.items()) if not k.startswith("_")}
        return json.dumps({"_class_name": type(self).__name__, "_diffusers_version": FORMAT_VERSION, **public}, indent=2) + "\n"

    def save_config(self, save_directory: str | Path) -> None:
        """Writes the configuration file into ``save_directory``, atomically."""
        folder = Path(save_directory)
        folder.mkdir(parents=True, exist_ok=True)
        text = self.to_json_string()
        write_atomically(folder / self.config_name, lambda path: path.write_text(text, encoding="utf-8"))


def _bind(cls: type[ConfigMixin], signature: inspect.Signature, args: tuple, kwargs: dict[str, Any]) -> FrozenConfig:
    """Maps constructor arguments to configuration keys, defaults included."""
    known = cls._init_parameters()
    if not any(p.kind is p.VAR_KEYWORD for p in signature.parameters.values()):
        refuse_unknown(kwargs, signature.parameters, f"{cls.__name__}() has no argument")
    bound = signature.bind(None, *args, **kwargs)
    given = [name for name in bound.arguments if name in known]
    bound.apply_defaults()
    values = {k: list(v) if isinstance(v, (tuple, list)) else v for k, v in bound.arguments.items() if k in known}
    defaulted = [name for name in known if name not in given]
    return FrozenConfig({**values, "_class_name": cls.__name__, "_use_default_values": defaulted})


def read_json(path: Path) -> dict[str, Any]:
    """Reads a JSON object; a :class:`ConfigError` if the file is missing, not valid JSON, or holds something else."""
    try:
        data = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise ConfigError(f"{path} is missing or not valid JSON ({error}): download or write the file again") from error
    if not isinstance(data, dict):
        raise ConfigError(f"{path} holds a JSON {type(data).__name__}, expected an object of configuration keys")
    return data
