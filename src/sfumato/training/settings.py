"""What a training run is told: one table of keys, which are the keys of the TOML file, the flags, and their documentation."""

from __future__ import annotations

import dataclasses
import sys
import types
import typing
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, TypeVar

from ..errors import ConfigError, did_you_mean, refuse_unknown

Component = str | dict[str, Any] | None
"""A part of the model: the folder or repository to load it from, or the configuration of a new one."""

_S = TypeVar("_S", bound="Settings")


def option(default: Any, text: str, *, low: float | None = None, high: float | None = None, choices: tuple[str, ...] = ()) -> Any:
    """A key with its default, its documentation, and what it may be: a number in ``low..high`` or one of ``choices``."""
    metadata = {"help": text, "low": low, "high": high, "choices": choices}
    if isinstance(default, (dict, list)):
        return field(default_factory=lambda: default, metadata=metadata)
    return field(default=default, metadata=metadata)


@dataclass(frozen=True, kw_only=True)
class Settings:
    """Keys that every training run has; ``option`` documents each.

    Raises:
        ConfigError: A value has a wrong type, lies outside its range, or contradicts another.
    """

    data: str = option("", "What to learn from: a folder, a .tar, or a name of `datasets`; see docs/training.md.")
    out: str = option("", "Folder of the run: checkpoints, log, samples, cache, and at the end the model.")
    validation_data: str | None = option(None, "Data held out for the validation loss, in any of the layouts.")
    resolution: int = option(512, "Edge of the pictures, in pixels; with aspect buckets the root of their area.", low=8)
    aspect_buckets: bool = option(False, "Keep the pictures' proportions: batches of one shape each, up to 1:2 and 2:1.")
    steps: int = option(1000, "Optimiser steps in all.", low=1)
    batch_size: int = option(8, "Pictures per forward pass, over all processes.", low=1)
    accumulation: int = option(1, "Forward passes per optimiser step.", low=1)
    learning_rate: float = option(1e-4, "Highest learning rate of AdamW.", low=0)
    schedule: str = option(
        "constant", "Learning rate over time.", choices=("constant", "linear", "cosine", "polynomial", "cosine_with_restarts")
    )
    warmup: int = option(0, "Steps over which the learning rate rises from zero.", low=0)
    beta1: float = option(0.9, "AdamW's decay of the mean of gradients.", low=0, high=1)
    beta2: float = option(0.999, "AdamW's decay of the mean of squared gradients.", low=0, high=1)
    weight_decay: float = option(0.01, "AdamW's weight decay.", low=0)
    clip_norm: float = option(1.0, "Largest norm of the gradients; larger ones are scaled down; 0: any.", low=0)
    ema: float = option(0.0, "Decay of the averaged weights, such as 0.9999, which then are what is saved; 0: none.", low=0, high=1)
    precision: str = option("float32", "Arithmetic of the forward pass; weights stay float32.", choices=("float32", "bf16", "fp16"))
    gradient_checkpointing: bool = option(False, "Save memory for about a third more time.")
    seed: int = option(0, "All randomness follows from it and the step.", low=0)
    checkpoint_every: int = option(500, "Steps between checkpoints.", low=1)
    keep: int = option(2, "Checkpoints to keep.", low=1)
    validate_every: int = option(500, "Steps between validations: held-out loss and pictures.", low=1)
    log_every: int = option(10, "Steps between entries of the log.", low=1)
    resume: bool = option(False, "Go on from the newest checkpoint, exactly.")

    may_change = ("out", "steps", "checkpoint_every", "keep", "validate_every", "log_every", "resume")
    """Keys that a resumed run may change; all others decide what is computed."""

    def __post_init__(self) -> None:
        hints = typing.get_type_hints(type(self))
        for f in dataclasses.fields(self):
            value = getattr(self, f.name)
            check(f.name, value, hints[f.name], f.metadata)
            if isinstance(value, list):
                object.__setattr__(self, f.name, tuple(value))
        for name in ("data", "out"):
            if not getattr(self, name):
                raise ConfigError(f"{name} is not given: name it in the configuration or as --{name}")

    @classmethod
    def read(cls: type[_S], path: Path | None, **flags: Any) -> _S:
        """Reads a TOML file; ``flags`` override it.

        Raises:
            ConfigError: The file cannot be read, or a key is unknown or has a wrong value.
        """
        values = {**(read_toml(path) if path else {}), **flags}
        refuse_unknown(values, [f.name for f in dataclasses.fields(cls)], f"{path or 'the call'} has the unknown key", ConfigError)
        return cls(**values)

    def identity(self) -> dict[str, Any]:
        """The keys that a resumed run must not change, as JSON can hold them."""
        kept = {k: v for k, v in dataclasses.asdict(self).items() if k not in self.may_change}
        return {k: list(v) if isinstance(v, tuple) else v for k, v in kept.items()}


@dataclass(frozen=True, kw_only=True)
class TextToImageSettings(Settings):
    """Keys of ``sfumato train text-to-image``."""

    model: str | None = option(None, "Pipeline folder or repository to start from; the keys below replace parts of it.")
    vae: str | None = option(None, "Autoencoder to load.")
    tokenizer: str | None = option(None, "Tokenizer to load.")
    text_encoder: Component = option(None, "Text encoder to load, or in the file a table: the configuration of a new one.")
    unet: Component = option(None, "Denoiser to load, or in the file a table: the configuration of a new one.")
    scheduler: Component = option(None, "Scheduler to load, or in the file a table: configuration keys; prediction_type is learnt.")
    train_text_encoder: bool = option(False, "Train the text encoder too; else its embeddings are cached on disk.")
    caption_dropout: float = option(0.1, "Share of captions left empty, for guidance.", low=0, high=1)
    noise_offset: float = option(0.0, "Noise that a whole channel shares, in standard deviations.", low=0)
    min_snr_gamma: float = option(0.0, "Cap of the signal-to-noise weighting (arXiv:2303.09556), such as 5; 0: none.", low=0)
    timesteps: str = option("uniform", "How noise levels are drawn.", choices=("uniform", "logit-normal"))
    logit_mean: float = option(0.0, "Of the logit-normal density (arXiv:2403.03206): above 0 favours noise.")
    logit_std: float = option(1.0, "Of the logit-normal density.", low=0)
    validation_prompts: list[str] = option([], "Prompts of the validation pictures.")
    validation_inference_steps: int = option(25, "Denoising steps of a validation picture.", low=1)
    validation_guidance: float = option(4.0, "Guidance scale of the validation pictures.", low=0)


@dataclass(frozen=True, kw_only=True)
class AutoencoderSettings(Settings):
    """Keys of ``sfumato train autoencoder``."""

    vae: Component = option(None, "Autoencoder to start from, or in the file a table: the configuration of a new one.")
    kl_weight: float = option(1e-6, "Weight of the divergence to the normal distribution, per latent value.", low=0)
    gradient_weight: float = option(0.5, "Weight of the error of the differences between neighbouring pixels.", low=0)


def read_toml(path: Path) -> dict[str, Any]:
    """Reads a TOML file."""
    if sys.version_info >= (3, 11):
        import tomllib
    else:
        import tomli as tomllib  # of the extra `train`
    try:
        return tomllib.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise ConfigError(f"{path} is missing or not valid TOML: {error}") from error


def check(name: str, value: Any, kind: Any, limits: Mapping[str, Any]) -> None:
    """Refuses a value that is not of its key's type, or is outside its range."""
    kinds = typing.get_args(kind) if isinstance(kind, types.UnionType) else (kind,)
    plain = {bool: "true or false", int: "a whole number", float: "a number", str: "text", list: "a list of texts", dict: "a table"}
    allowed = [typing.get_origin(k) or k for k in kinds]
    fits = type(value) in allowed or (float in allowed and type(value) is int) or (list in allowed and isinstance(value, tuple))
    if isinstance(value, (list, tuple)):
        fits = fits and all(isinstance(v, str) for v in value)
    if not fits:
        wanted = " or ".join(plain[k] for k in allowed if k in plain)
        raise ConfigError(f"{name}={value!r} is a {type(value).__name__}, expected {wanted}")
    if (choices := limits["choices"]) and value not in choices:
        raise ConfigError(f"{name}={value!r} is unknown{did_you_mean(value, choices)}; choose one of {', '.join(choices)}")
    low, high = limits["low"], limits["high"]
    if (low is not None and not value >= low) or (high is not None and not value <= high):
        raise ConfigError(f"{name}={value!r} must be {f'at least {low}' if high is None else f'within {low}..{high}'}")
