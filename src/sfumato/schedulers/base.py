"""What schedulers share: the public protocol, the position in the schedule, and how they know a noise level.

A scheduler is a noise table, a spacing, a kind of prediction and one solver method ``update``. Its run state is an index and,
for multistep solvers, a short history; ``fresh()`` gives a copy without either, which shares all tables. Solvers know a noise
level by its training step (:class:`StepScheduler`) or by its position among the run's sigmas (:class:`SigmaScheduler`).
"""

from __future__ import annotations

import copy
import enum
import math
import operator
import os
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, ClassVar, TypeVar

import numpy as np
import torch
from torch import Tensor

from .. import registry
from ..config import ConfigMixin, read_json
from ..errors import ConfigError
from ..outputs import BaseOutput
from .keys import DOCS, KEYS, METHODS, document, method, signature
from .names import from_name
from .noise import beta_table, given_steps, integer_steps, noise_tables, one_of, one_source, shift_flow, sigma_ramp, sigmas_to_steps
from .prediction import denoised_coefficients, dynamic_threshold, mix, wide

Device = str | torch.device | None
Time = float | Tensor
Count = int | None
Values = Sequence[float] | None
Run = tuple[np.ndarray, np.ndarray]
"""Noise levels, the one that the run ends at included, and timesteps."""
Update = tuple[Tensor, Tensor | None]
"""What a solver returns: the sample at the next level, and the denoised sample where it has one."""

if TYPE_CHECKING:
    from matplotlib.figure import Figure

_S = TypeVar("_S", bound="SchedulerMixin")

KarrasDiffusionSchedulers = enum.Enum(
    "KarrasDiffusionSchedulers",
    "DDIMScheduler DDPMScheduler PNDMScheduler LMSDiscreteScheduler EulerDiscreteScheduler HeunDiscreteScheduler "
    "EulerAncestralDiscreteScheduler DPMSolverMultistepScheduler DPMSolverSinglestepScheduler KDPM2DiscreteScheduler "
    "KDPM2AncestralDiscreteScheduler DEISMultistepScheduler UniPCMultistepScheduler DPMSolverSDEScheduler EDMEulerScheduler",
)
KarrasDiffusionSchedulers.__doc__ = "Schedulers that a Stable Diffusion pipeline can exchange through ``from_config``."


@dataclass
class SchedulerOutput(BaseOutput):
    """Result of one step, in the sample's shape: ``prev_sample``, at the next, less noisy level, in the sample's dtype.

    ``pred_original_sample`` is the clean sample as predicted from this step, where the solver has it; float32 for half precision.
    """

    prev_sample: Tensor
    pred_original_sample: Tensor | None = None


StepResult = SchedulerOutput | tuple[Tensor, ...]


class SchedulerMixin(ConfigMixin):
    """Base of all schedulers. A subclass lays out its ``_stops`` and solves a step in ``update``.

    Attributes:
        timesteps: What the network is told at each step, ``(steps,)``, on the device given to ``set_timesteps``.
        num_inference_steps: Number of steps, ``None`` before ``set_timesteps``.
        step_index, begin_index: Position of the next step, and of the first one if it was set; ``None`` before it.
        order: Network evaluations per step.
        init_noise_sigma: Standard deviation of the noise that sampling starts from.
    """

    config_name = "scheduler_config.json"
    config_keys: ClassVar[str]  # names of keys and groups of the catalogue, see keys.py
    config_defaults: ClassVar[Mapping[str, Any]] = {}  # where they differ from the catalogue's
    config_choices: ClassVar[Mapping[str, tuple]] = {}  # of values, where they differ from the catalogue's
    step_takes: ClassVar[str] = ""  # arguments as a def has them, besides the output, the timestep, the sample and return_dict
    set_timesteps_takes: ClassVar[str] = "num_inference_steps, device=None"
    _least: ClassVar[int] = 1  # steps that a run has
    _most: ClassVar[int | None] = None  # at most; 0 stands for the training steps
    order: ClassVar[int] = 1
    _output: ClassVar[Callable[..., Any]] = SchedulerOutput
    init_noise_sigma: float = 1.0
    num_inference_steps: Count = None
    timesteps: Tensor
    step_index: int | None = None
    begin_index: int | None = None
    _times: list[float]
    _time_type, _table_type = torch.int64, torch.float32
    step: Callable[..., StepResult]
    set_timesteps: Callable[..., None]
    update: Callable[..., Any]
    """The solver: from the output, the position, the sample and what else ``step`` takes, the next sample, or an ``Update``."""

    if TYPE_CHECKING:

        def __init__(self, *args: Any, **kwargs: Any) -> None: ...

    def __init_subclass__(cls, **kwargs: Any) -> None:
        if "config_keys" in cls.__dict__:
            taken = signature(cls.config_keys, cls.config_defaults)

            def __init__(self: SchedulerMixin, *args: Any, **kwargs: Any) -> None:
                for name in list(taken.parameters)[1:]:
                    if choices := self.config_choices.get(name, KEYS[name].choices):
                        one_of(name, self.config[name], *choices)
                self._build()

            __init__.__signature__ = taken  # type: ignore[attr-defined]
            cls.__init__ = __init__  # type: ignore[method-assign]
            cls.__doc__ = f"{cls.__doc__}\n\n{document(taken, DOCS)}"
        for name in METHODS:
            if f"{name}_takes" in cls.__dict__:
                setattr(cls, name, method(name, cls.__dict__[f"{name}_takes"]))
        super().__init_subclass__(**kwargs)

    def _build(self) -> None:
        """Checks the configuration and builds the tables. Subclasses extend this in place of a constructor."""

    def _own(self, key: str, default: Any) -> Any:
        """Returns a configuration value if this class has the key: the configuration also keeps keys of related classes."""
        return self.config[key] if key in self._init_parameters() else default

    def __len__(self) -> int:
        return self.config["num_train_timesteps"]

    @classmethod
    def from_pretrained(
        cls: type[_S], pretrained_model_name_or_path: str | os.PathLike, subfolder: str | None = None, *,
        revision: str | None = None, token: str | bool | None = None, cache_dir: str | os.PathLike | None = None,
        local_files_only: bool = False, force_download: bool = False, **overrides: Any,
    ) -> _S:  # fmt: skip
        """Loads a scheduler from a folder or a hub repository (``owner/name``); the file may be that of a related class.

        ``subfolder`` is ``"scheduler"`` in a pipeline's folder; other arguments are of :class:`sfumato.hub.Source`. ``overrides``
        replace values of the file; a :class:`ConfigError` says where one is no key of this class or the file is invalid.
        """
        from ..hub import Source

        source = Source(pretrained_model_name_or_path, revision, token, cache_dir, local_files_only, force_download)
        return cls.from_config(read_json(source.file(cls.config_name, subfolder or "")), **overrides)

    save_pretrained = ConfigMixin.save_config

    from_name = staticmethod(from_name)

    @property
    def compatibles(self) -> list[type[SchedulerMixin]]:
        """Classes that can take this scheduler's configuration through ``from_config``."""
        return [registry.load(name) for name in {type(self).__name__: 0, **KarrasDiffusionSchedulers.__members__}]

    def plot(self) -> Figure:
        """Draws the noise levels (sigma over alpha), the log signal-to-noise ratio and the timesteps of the current schedule.

        The figure has three panels over the run's steps; ``figure.savefig("schedule.png")`` writes it.

        Raises:
            TypeError: The scheduler's levels are no mixtures of the clean sample and noise.
            ImportError: matplotlib is not installed.
        """
        if not isinstance(self, LevelScheduler):
            raise TypeError(f"{type(self).__name__} has no levels of signal and noise to plot: choose a scheduler on noise levels")
        try:
            from matplotlib.figure import Figure
        except ImportError as error:
            raise ImportError("scheduler.plot() needs matplotlib: pip install 'sfumato[plot]'") from error
        signal, noise = self.fresh()._levels(self.timesteps.cpu())  # where nothing is left of either, there is a gap
        ratio = noise.double() / signal.double()
        panels = {"sigma": ratio, "log SNR": -2 * ratio.log(), "timestep": self.timesteps.cpu().double()}
        figure = Figure(figsize=(12, 3.5), layout="constrained")
        figure.suptitle(f"{type(self).__name__}, {len(ratio)} steps")
        for axes, (label, values) in zip(figure.subplots(1, 3), panels.items(), strict=True):
            axes.plot(range(len(ratio)), values.masked_fill(~values.isfinite(), float("nan")).tolist(), marker=".")
            axes.set(xlabel="step", ylabel=label, yscale="log" if label == "sigma" else "linear")
        return figure

    def fresh(self: _S) -> _S:
        """Returns a copy with the same schedule and no run state (index, history), which shares all tables."""
        twin = copy.copy(self)
        twin._reset()
        return twin

    def _reset(self) -> None:
        """Forgets the run: all state there is."""
        self.step_index = self.begin_index = None
        self._calls = 0  # of step
        self._history: list[Tensor] = []  # what multistep solvers extrapolate, the latest first
        self._start: Any = None  # what a step of several evaluations, or a correction, sets out from
        self._path: Callable[[float, float], Tensor] | None = None  # increments of the run's Brownian motion

    def set_begin_index(self, begin_index: int = 0) -> None:
        """Makes the run begin at this position of the schedule (image-to-image starts part of the way)."""
        self.begin_index = begin_index

    def index_for_timestep(self, timestep: Time) -> int:
        """Returns the position of a timestep in the schedule; where it is not there, a ValueError says so.

        Of several the second counts (a run that begins there must not step twice), unless the schedule begins with it.
        """
        value = float(timestep)
        found = [i for i, t in enumerate(self._times) if t == value or math.isclose(t, value, rel_tol=1e-6, abs_tol=1e-6)]
        if not found:
            raise self._no_such(value)
        return found[1] if found[0] > 0 and len(found) > 1 else found[0]

    def _no_such(self, timestep: float) -> ValueError:
        shown = ", ".join([*(f"{t:g}" for t in self._times[:4]), "..."][: len(self._times)])
        return ValueError(f"timestep={timestep:g} is not in the schedule: pass one of scheduler.timesteps ({shown})")

    def _position(self, timestep: Time | None) -> int:
        """Returns the position of this step. Only the first step of a run may wait for the device, to read the timestep."""
        if self.step_index is None:
            if timestep is None:
                raise ValueError("timestep=None in a run's first step: pass an element of scheduler.timesteps")
            self.step_index = self._begin(timestep)
        if self.step_index >= len(self._times):
            raise ValueError(f"the schedule of {len(self._times)} steps is at its end: call set_timesteps before the next run")
        return self.step_index

    def _begin(self, timestep: Time) -> int:
        return self.index_for_timestep(timestep) if self.begin_index is None else self.begin_index

    def _time(self, timestep: Time) -> float:
        """Returns the timestep as a number; to read an element of ``timesteps``, or a view of it, does not wait for the device."""
        if not isinstance(timestep, Tensor) or (timestep.is_cpu and timestep.numel() == 1):
            return float(timestep)
        one = timestep.dtype == self.timesteps.dtype and (timestep.numel() == 1 or not any(timestep.stride()))
        if one and timestep.untyped_storage().data_ptr() == self.timesteps.untyped_storage().data_ptr():
            return self._times[timestep.storage_offset()]  # its place in memory tells its position in the schedule
        values = set(timestep.flatten().tolist())
        if len(values) != 1:
            raise ValueError(f"timestep has the values {sorted(values)}, expected one for the whole batch: call step for each")
        return values.pop()

    def _lay_out(self, num_inference_steps: Count, device: Device = None, timesteps: Values = None) -> None:
        """Lays out a run; see ``set_timesteps``."""
        self._set_schedule(self._chosen(num_inference_steps, timesteps), device)

    def _stops(self, count: int) -> np.ndarray:
        """Returns the timesteps of a run of so many steps."""
        return np.arange(count)[::-1]

    def _chosen(self, count: Count, timesteps: Values) -> np.ndarray:
        """Returns the given training steps, or those of a run of so many."""
        if timesteps is None:
            self.num_inference_steps = self._check_count(count)
            return self._stops(self.num_inference_steps)
        one_source(num_inference_steps=count, timesteps=timesteps)
        self.num_inference_steps = len(timesteps)
        return given_steps(timesteps, len(self))

    def _set_schedule(self, timesteps: np.ndarray, device: Device = None) -> None:
        """Takes over the timesteps of a run and forgets the last run."""
        self.timesteps = torch.tensor(timesteps.tolist(), dtype=self._time_type)
        self._times, self.timesteps = self.timesteps.tolist(), self.timesteps.to(device)
        self._reset()

    def _check_count(self, count: Count) -> int:
        most = math.inf if self._most is None else self._most or len(self)
        if count is None or not self._least <= operator.index(count) <= most:
            limits = f"at least {self._least}" if self._most is None else f"{self._least}..{most}"
            raise ValueError(f"num_inference_steps={count}, expected {limits}")
        return operator.index(count)

    def _count(self) -> int:
        if self.num_inference_steps is None:
            raise ValueError("the schedule is not laid out: call set_timesteps(num_inference_steps) before step")
        return self.num_inference_steps

    def _alpha_bar_table(self, floor: float = 0.0) -> Tensor:
        """Builds ``betas``, ``alphas`` and ``alphas_cumprod`` (one per training step) from the configuration."""
        ends, trained = (self._own("beta_start", 0.0001), self._own("beta_end", 0.02)), self._own("trained_betas", None)
        schedule, shift = self._own("beta_schedule", "squaredcos_cap_v2"), self._own("snr_shift_scale", 1.0)
        zero_snr = self._own("rescale_betas_zero_snr", False)
        self.betas, alpha_bar = noise_tables(beta_table(schedule, len(self), *ends, trained, self._table_type), shift, zero_snr)
        if alpha_bar[-1] == 0:
            alpha_bar[-1] = floor
        self.alphas, self.alphas_cumprod = 1 - self.betas, alpha_bar
        return alpha_bar

    def scale_model_input(self, sample: Tensor, timestep: Time | None = None) -> Tensor:
        """Returns the sample as the network expects it at this timestep: unchanged, unless a scheduler says otherwise."""
        return sample

    def _advance(self, output: Tensor, timestep: Time, sample: Tensor, return_dict: bool, *more: Any) -> StepResult:
        """Solves the step, with what more ``step`` was given; moves on by one position and wraps the result."""
        new = self.update(output, self._position(timestep), wide(sample), *more)
        there, x0 = new if isinstance(new, tuple) else (new, None)
        self._calls += 1
        if self.step_index is not None:
            self.step_index += 1
        if there.dtype != sample.dtype:
            there = there.to(sample.dtype)
        if return_dict:
            return type(self)._output(there, x0)
        return (there,) if x0 is None else (there, x0)


SchedulerMixin.step = method("step", SchedulerMixin.step_takes)
SchedulerMixin.set_timesteps = method("set_timesteps", SchedulerMixin.set_timesteps_takes)
Scheduler = SchedulerMixin  # as users call it: ``Scheduler.from_name("dpmpp_2m_karras")``


class LevelScheduler(SchedulerMixin):
    """Base of the schedulers whose levels are mixtures of the clean sample and normal noise."""

    predictions: tuple[str, ...] = ("epsilon", "v_prediction")

    def _build(self) -> None:
        self._kind: str = self._own("prediction_type", self.predictions[0])
        one_of("prediction_type", self._kind, *self.predictions)
        self._thresholds, self._clips = self._own("thresholding", False), self._own("clip_sample", False)
        self._range = self._own("clip_sample_range", 1.0)  # RePaint clips without having the key

    def _denoise(self, output: Tensor, x: Tensor, alpha: float, sigma: float) -> Tensor:
        """Returns the denoised sample of ``x = alpha * x0 + sigma * noise``, bounded as the configuration says."""
        x0 = mix(self._coefficients(alpha, sigma), x, output)
        if self._thresholds:
            return dynamic_threshold(x0, self.config["dynamic_thresholding_ratio"], self.config["sample_max_value"])
        if self._clips:
            return (x0.clamp if x0 is output else x0.clamp_)(-self._range, self._range)
        return x0

    def _coefficients(self, alpha: float, sigma: float) -> tuple[float, float]:
        """Returns ``(a, b)`` with ``x0 = a * x + b * output``."""
        return denoised_coefficients(self._kind, alpha, sigma)

    _share: Callable[[Tensor], Tensor]
    """Returns the share of signal variance at timesteps ``(B,)``."""

    def _levels(self, timesteps: Tensor) -> tuple[Tensor, Tensor]:
        """Returns the factors of signal and noise at ``timesteps``, all ``(B,)``."""
        share = self._share(timesteps)
        return share.sqrt(), (1 - share).sqrt()

    def _factors(self, timesteps: Tensor, sample: Tensor) -> list[Tensor]:
        shape, dtype = (-1, *[1] * (sample.ndim - 1)), torch.promote_types(sample.dtype, torch.float32)
        return [factor.to(sample.device, dtype).view(shape) for factor in self._levels(timesteps)]

    def add_noise(self, original_samples: Tensor, noise: Tensor, timesteps: Tensor) -> Tensor:
        """Noises clean samples ``(B, ...)`` to the level of ``timesteps``, elements of the schedule, ``(B,)`` or ``(1,)``.

        A scheduler with sigmas whose run has begun (or whose begin is set) noises to the level of the run, whatever ``timesteps``
        says: inpainting brings the source to the level that the sample has reached.
        """
        signal, spread = self._factors(timesteps, original_samples)
        return (signal * original_samples + spread * noise).to(original_samples.dtype)

    def get_velocity(self, sample: Tensor, noise: Tensor, timesteps: Tensor) -> Tensor:
        """Returns ``alpha * noise - sigma * sample`` at ``timesteps``, the target of ``v_prediction`` (arXiv:2202.00512)."""
        signal, spread = self._factors(timesteps, sample)
        return ((signal * noise - spread * sample) / (signal**2 + spread**2).sqrt()).to(sample.dtype)


class StepScheduler(LevelScheduler):
    """Base of the solvers that know a noise level by its training step, which is the position that ``update`` is given."""

    predictions: tuple[str, ...] = ("epsilon", "sample", "v_prediction")
    _most: ClassVar[int | None] = 0

    def _build(self) -> None:
        super()._build()
        self._alpha_bar, self._betas = self._alpha_bar_table().tolist(), self.betas.tolist()
        self._final_alpha_bar = 1.0 if self._own("set_alpha_to_one", True) else self._alpha_bar[0]
        self._set_schedule(np.arange(len(self))[::-1])

    def _stops(self, count: int) -> np.ndarray:
        spacing, offset = self.config["timestep_spacing"], self.config["steps_offset"]
        return integer_steps(spacing, count, len(self), offset).round().astype(np.int64)

    def _training_step(self, timestep: Time) -> int:
        value = self._time(timestep)
        if value != int(value) or not 0 <= value < len(self):
            raise ValueError(f"timestep={value:g}, expected a whole number in 0..{len(self) - 1}; pass one of scheduler.timesteps")
        return int(value)

    _position = _training_step  # type: ignore[assignment]

    def _stride(self) -> int:
        """Returns the training steps between two stops of an even run."""
        return len(self) // self._count()

    def _alpha_bar_at(self, step: int) -> float:
        return self._alpha_bar[step] if step >= 0 else self._final_alpha_bar

    def _signal_noise(self, step: int) -> tuple[float, float]:
        """Returns the factors of signal and noise at a training step."""
        return math.sqrt(alpha_bar := self._alpha_bar_at(step)), math.sqrt(1 - alpha_bar)

    def _share(self, timesteps: Tensor) -> Tensor:
        return self.alphas_cumprod.to(timesteps.device)[timesteps]


class SigmaScheduler(LevelScheduler):
    """Base of the solvers that know a noise level by its position in ``sigmas``.

    Attributes:
        sigmas: Noise levels of the run and the level it ends at, float32 ``(steps + 1,)``, on the CPU.
        is_flow: Whether samples are mixtures ``(1 - sigma) * x0 + sigma * noise`` (arXiv:2210.02747).
    """

    sigmas: Tensor
    is_flow = False
    _ramp: str | None = None  # the spacing of sigmas, if any
    _takes_times = True  # whether a run can be given its timesteps
    _spread: float | None = None  # standard deviation of the data, where the network takes samples at unit variance
    _continuous = False  # whether the network is told log(sigma) / 4
    _ending, _final_sigma = "zero", 0.0  # final_sigmas_type, where it is no key, and the level that it stands for

    def _build(self) -> None:
        super()._build()
        self._ramp = self._read_ramp()
        self._takes_times = not self._ramp
        alpha_bar = self._alpha_bar_table(floor=2.0**-24)  # zero signal, too, needs a finite sigma: 4096
        self._table = ((1 - alpha_bar) / alpha_bar).sqrt().numpy()  # float32 (training steps,), ascending
        self._bounds = float(self._table[-1]), float(self._table[0])
        self._final_sigma = self._bounds[1] if self._own("final_sigmas_type", self._ending) == "sigma_min" else 0.0
        self._set_levels(np.append(self._table[::-1], 0.0), np.arange(len(self._table))[::-1])
        self._read_flow()

    def _read_ramp(self) -> str | None:
        ramps = [name for name in ("karras", "exponential", "beta") if self._own(f"use_{name}_sigmas", False)]
        if len(ramps) > 1:
            raise ConfigError(f"use_{ramps[0]}_sigmas and use_{ramps[1]}_sigmas exclude each other: set only one of them to True")
        return ramps[0] if ramps else None

    def _read_flow(self) -> None:
        """Reads whether the model is a flow: the configuration says so, or comes from a flow model's scheduler.

        Such a configuration has the key ``shift``, or ``use_flow_sigmas`` where this class has no such key of its own.
        """
        c, defaulted = self.config, self.config["_use_default_values"]
        own = "use_flow_sigmas" in self._init_parameters()
        said = own and "use_flow_sigmas" not in defaulted
        foreign = not said and ("shift" in c or bool(c.get("use_flow_sigmas")))
        if foreign and ("prediction_type" in defaulted or "prediction_type" not in c):
            self._kind = "flow_prediction"
        self.is_flow = foreign or (said and c["use_flow_sigmas"]) or (not own and self._kind == "flow_prediction")
        # static, of a flow's levels: a run's, and that of the table, which set_shift leaves as it is
        self._shift = self._table_shift = (None if said else c.get("shift")) or c.get("flow_shift") or 1.0
        if foreign:  # a saved configuration, which has no defaults, shall say it as well
            adopted = {"use_flow_sigmas": True, "flow_shift": self._shift, "prediction_type": self._kind}
            self.register_to_config(**{key: value for key, value in adopted.items() if key in self._init_parameters()})

    def _set_levels(self, sigmas: np.ndarray, timesteps: np.ndarray, device: Device = None) -> None:
        """Takes over the levels of a run, the level it ends at included, and its timesteps."""
        self.sigmas = torch.from_numpy(np.ascontiguousarray(sigmas)).float()
        self._sigmas = self.sigmas.tolist()
        self._set_schedule(timesteps, device)

    def _lay_out(
        self, num_inference_steps: Count = None, device: Device = None, timesteps: Values = None, sigmas: Values = None,
        mu: float | None = None, num_train_timesteps: Count = None,
    ) -> None:  # fmt: skip
        one_source(num_inference_steps=num_inference_steps, timesteps=timesteps, sigmas=sigmas)
        if mu is not None and not self.config.get("use_dynamic_shifting"):
            raise ValueError(f"mu={mu} needs a scheduler with use_dynamic_shifting=True")
        if timesteps is not None and not self._takes_times:
            spacings = "use_..._sigmas, timestep_type='continuous' or use_flow_sigmas"
            raise ValueError(f"timesteps cannot be set with {spacings}: pass num_inference_steps, or change the configuration")
        self._take(*self._run_levels(num_inference_steps, timesteps, sigmas, mu, num_train_timesteps), device)

    def _take(self, levels: np.ndarray, times: np.ndarray, device: Device) -> None:
        self.num_inference_steps = len(times)
        self._set_levels(levels, times, device)

    def _run_levels(self, count: Count, timesteps: Any, sigmas: Any, mu: float | None, train_steps: Count = None) -> Run:
        if self.is_flow:
            return self._flow_levels(count, timesteps, sigmas, mu)
        if sigmas is not None:
            levels = np.array(sigmas, dtype=np.float64)
            return levels, self._times_of(levels[:-1])
        given = timesteps is not None
        return self._levels_at(np.array(timesteps, np.float64) if given else self._stops(self._check_count(count), train_steps))

    def _stops(self, count: int, train_steps: int | None = None) -> np.ndarray:
        return integer_steps(self.config["timestep_spacing"], count, train_steps or len(self), self.config["steps_offset"])

    def _levels_at(self, stops: np.ndarray) -> Run:
        """Returns the noise levels of a run at these training steps, or as many spaced otherwise, and its timesteps."""
        levels = self._sigmas_at(stops)
        if self._ramp:
            levels = sigma_ramp(self._ramp, *self._ramp_ends(levels), len(stops))
        return np.append(levels, self._final_sigma), self._times_of(levels) if self._ramp or self._continuous else stops

    def _sigmas_at(self, stops: np.ndarray) -> np.ndarray:
        return np.interp(stops, np.arange(len(self._table)), self._table)

    def _ramp_ends(self, levels: np.ndarray) -> tuple[float, float]:
        """Returns the ends of spaced levels: the configuration's, where it has any, else of these levels."""
        high, low = self._own("sigma_max", None), self._own("sigma_min", None)
        return levels[0] if high is None else high, levels[-1] if low is None else low

    def _times_of(self, levels: np.ndarray) -> np.ndarray:
        return levels * len(self) if self.is_flow else sigmas_to_steps(levels, self._table)

    def _flow_levels(self, count: Count, timesteps: Any, sigmas: Any, mu: float | None) -> Run:
        """Returns a flow's noise levels, the last included, and its timesteps: the levels times the number of training steps.

        Levels even in time, or given ones, are shifted (arXiv:2403.03206 eq. 23) by the configuration's ``shift``, or by ``mu``
        (a logarithm, unless ``time_shift_type`` is linear) with ``use_dynamic_shifting``, stretched to end at
        ``shift_terminal``, and spaced anew between their ends if a spacing of sigmas is configured.
        """
        c, total, shift = self.config, len(self), self._shift
        if mu is not None:
            shift = mu if c.get("time_shift_type") == "linear" else math.exp(mu)
        elif c.get("use_dynamic_shifting") and "flow_shift" not in c:
            raise ValueError("use_dynamic_shifting=True needs mu, the logarithm of the shift for this picture's size")
        if sigmas is None:
            given = timesteps is not None
            sigmas = np.asarray(timesteps, np.float64) / total if given else self._even_flow(self._check_count(count))
        levels = shift_flow(np.asarray(sigmas, np.float64), shift)
        if terminal := c.get("shift_terminal"):
            levels = 1 - (1 - levels) * (1 - terminal) / (1 - levels[-1])
        if self._ramp:
            levels = sigma_ramp(self._ramp, levels[0], levels[-1], len(levels))
        if c.get("invert_sigmas"):
            return np.append(1 - levels, 1.0), (1 - levels) * total
        times = levels * total if timesteps is None else np.asarray(timesteps, np.float64)
        return np.append(levels, levels[-1] if self._final_sigma else 0.0), times

    def _even_flow(self, count: int) -> np.ndarray:
        # The table's own end is shifted already, and is shifted again, as released models expect.
        end = np.float64(1 / len(self))
        return np.linspace(1.0, end if self.config.get("use_dynamic_shifting") else shift_flow(end, self._table_shift), count)

    def _levels(self, timesteps: Tensor) -> tuple[Tensor, Tensor]:
        begun = self.begin_index if self.step_index is None else self.step_index
        places = [self.index_for_timestep(t) for t in timesteps.flatten().tolist()] if begun is None else [begun]
        factors = torch.tensor([self._signal_noise(self._sigmas[i]) for i in places], dtype=torch.float64)
        return factors[:, 0], factors[:, 1]

    def scale_model_input(self, sample: Tensor, timestep: Time | None = None) -> Tensor:
        """Scales the sample at this timestep to unit variance if the network expects that, as solvers of ``dx / dsigma`` do."""
        if self._spread is None:
            return sample
        return sample * (1 / math.hypot(self._evaluated(self._position(timestep)), self._spread))

    def _evaluated(self, i: int) -> float:
        """Returns the noise level at which the network is asked at a position of the run."""
        return self._sigmas[i]

    def _signal_noise(self, sigma: float) -> tuple[float, float]:
        """Returns the factors of signal and noise at a level, variance-exploding or of a flow."""
        return 1 - sigma if self.is_flow else 1.0, sigma
