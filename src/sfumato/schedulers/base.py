"""What all schedulers share: the public protocol, the position in the schedule, copies, files.

A scheduler is a noise table, a spacing, a kind of prediction and one solver method ``update``. Its run state is an index and,
for multistep solvers, a short history; ``fresh()`` gives a copy without either, which shares all tables.
"""

from __future__ import annotations

import copy
import enum
import operator
import os
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar, TypeVar

import numpy as np
import torch

from ..config import ConfigMixin, read_json
from ..outputs import BaseOutput
from .noise import beta_table, rescale_zero_terminal_snr

Betas = np.ndarray | list[float] | None
Device = str | torch.device | None
Update = tuple[torch.Tensor, torch.Tensor | None]
"""What a solver returns: the sample at the next level, and the denoised sample where it has one."""

_S = TypeVar("_S", bound="SchedulerMixin")


KarrasDiffusionSchedulers = enum.Enum(
    "KarrasDiffusionSchedulers",
    "DDIMScheduler DDPMScheduler PNDMScheduler LMSDiscreteScheduler EulerDiscreteScheduler HeunDiscreteScheduler "
    "EulerAncestralDiscreteScheduler DPMSolverMultistepScheduler DPMSolverSinglestepScheduler KDPM2DiscreteScheduler "
    "KDPM2AncestralDiscreteScheduler DEISMultistepScheduler UniPCMultistepScheduler DPMSolverSDEScheduler EDMEulerScheduler",
)
"""Schedulers that a Stable Diffusion pipeline can exchange for each other through ``from_config``."""


@dataclass
class SchedulerOutput(BaseOutput):
    """Result of one step.

    Attributes:
        prev_sample: Sample at the next, less noisy level, in the shape and dtype of the input sample.
        pred_original_sample: The clean sample as predicted from this step, where the solver has it; float32 for half precision.
    """

    prev_sample: torch.Tensor
    pred_original_sample: torch.Tensor | None = None


StepResult = SchedulerOutput | tuple[torch.Tensor, ...]


class SchedulerMixin(ConfigMixin):
    """Base of all schedulers.

    Attributes:
        timesteps: What the network is told at each step, ``(steps,)``, on the device given to ``set_timesteps``.
        num_inference_steps: Number of steps, ``None`` before ``set_timesteps``.
        order: Network evaluations per step.
        init_noise_sigma: Standard deviation of the noise that sampling starts from.

    Configuration keys of several classes (each class documents its own):
        num_train_timesteps: Steps the model was trained with.
        beta_start, beta_end, beta_schedule, trained_betas: See :func:`sfumato.schedulers.noise.beta_table`.
        rescale_betas_zero_snr: Rescale the table to zero terminal signal (arXiv:2305.08891).
        prediction_type: See :func:`sfumato.schedulers.prediction.denoised_coefficients`; one of the class's ``predictions``.
        clip_sample, clip_sample_range: Whether and where to clip the denoised sample.
        thresholding, dynamic_thresholding_ratio, sample_max_value: Threshold the denoised sample dynamically, for models in
            pixels; see :func:`sfumato.schedulers.prediction.dynamic_threshold`.
        variance_type: ``learned`` and ``learned_range``: the network appends as many channels of variance to its output.
        timestep_spacing, steps_offset: See :func:`sfumato.schedulers.noise.integer_steps`.
        set_alpha_to_one: The last step ends at the clean sample; else at the level of training step 0.
        use_karras_sigmas, use_exponential_sigmas, use_beta_sigmas: Spacing of the sigmas; at most one.
        final_sigmas_type: The run ends at ``zero`` noise, or at ``sigma_min``, the table's smallest level.

    Arguments of ``step``, which goes one step towards the clean sample:
        model_output: ``(B, C, ...)``, or ``(B, 2C, ...)`` with a learned variance.
        timestep: Of this step, an element of ``timesteps``; solvers on sigmas read it in a run's first step only.
        sample: ``(B, C, ...)``.
        generator: Source of the noise, where a solver adds any.
        variance_noise: The noise itself, in place of ``generator``.
        return_dict: Return a :class:`SchedulerOutput`, else the tuple of its fields.
    """

    config_name = "scheduler_config.json"
    order: ClassVar[int] = 1
    init_noise_sigma: float = 1.0
    num_inference_steps: int | None = None
    timesteps: torch.Tensor
    _times: list[float]
    _step_index: int | None = None
    _begin_index: int | None = None

    def _own(self, key: str, default: Any) -> Any:
        """Returns a configuration value if this class has the key: the configuration also keeps keys of related classes."""
        return self.config[key] if key in self._init_parameters() else default

    def __len__(self) -> int:
        return self.config["num_train_timesteps"]

    @classmethod
    def from_pretrained(
        cls: type[_S], pretrained_model_name_or_path: str | os.PathLike, subfolder: str | None = None, *,
        revision: str | None = None, token: str | bool | None = None, cache_dir: str | os.PathLike | None = None, local_files_only: bool = False,
        force_download: bool = False, **overrides: Any,
    ) -> _S:  # fmt: skip
        """Loads a scheduler from a checkpoint folder or a hub repository; the file may be that of a related class.

        Args:
            pretrained_model_name_or_path: Local folder, or ``owner/repository``.
            subfolder: Where in it the configuration lies (``"scheduler"`` in a pipeline's folder).
            revision, token, cache_dir, local_files_only, force_download: See :class:`sfumato.hub.Source`.
            **overrides: Configuration values that take precedence over the file's.

        Raises:
            HubError: The file cannot be found.
            ConfigError: The file is no valid configuration, or an override is no key of this class.
        """
        from ..hub import Source

        source = Source(pretrained_model_name_or_path, revision, token, cache_dir, local_files_only, force_download)
        return cls.from_config(read_json(source.file(cls.config_name, subfolder or "")), **overrides)

    def save_pretrained(self, save_directory: str | Path) -> None:
        """Writes ``scheduler_config.json`` into ``save_directory``."""
        self.save_config(save_directory)

    @property
    def compatibles(self) -> list[type[SchedulerMixin]]:
        """Classes that can take this scheduler's configuration through ``from_config``."""
        from .. import schedulers

        return [getattr(schedulers, s.name) for s in KarrasDiffusionSchedulers if hasattr(schedulers, s.name)]

    def fresh(self: _S) -> _S:
        """Returns an independent copy with the same schedule and no run state (index, history). Tables are shared."""
        twin = copy.copy(self)
        twin._reset()
        return twin

    def _reset(self) -> None:
        """Forgets the run. Solvers with a history extend this."""
        self._step_index = None
        self._begin_index = None

    @property
    def step_index(self) -> int | None:
        """Position of the next step in the schedule, ``None`` before the first."""
        return self._step_index

    @property
    def begin_index(self) -> int | None:
        """Position at which the run begins, if it was set."""
        return self._begin_index

    def set_begin_index(self, begin_index: int = 0) -> None:
        """Makes the run begin at this position of the schedule (image-to-image starts part of the way)."""
        self._begin_index = begin_index

    def index_for_timestep(self, timestep: float | torch.Tensor) -> int:
        """Returns the position of a timestep in the schedule.

        Of a timestep that occurs more than once the second position counts (a run that begins there must not step twice),
        unless the schedule begins with it.

        Raises:
            ValueError: The schedule does not hold the timestep.
        """
        value = float(timestep)
        found = [i for i, t in enumerate(self._times) if abs(t - value) <= 1e-6 * max(1.0, abs(t))]
        if not found:
            raise self._no_such(value)
        return found[1] if found[0] > 0 and len(found) > 1 else found[0]

    def _no_such(self, timestep: float) -> ValueError:
        shown = ", ".join([*(f"{t:g}" for t in self._times[:4]), "..."][: len(self._times)])
        return ValueError(f"timestep={timestep:g} is not in the schedule: pass one of scheduler.timesteps ({shown})")

    def _position(self, timestep: float | torch.Tensor) -> int:
        """Returns the position of this step. Only the first step of a run may wait for the device, to read the timestep."""
        if self._step_index is None:
            self._step_index = self.index_for_timestep(timestep) if self._begin_index is None else self._begin_index
        if self._step_index >= len(self._times):
            raise ValueError(f"the schedule of {len(self._times)} steps is at its end: call set_timesteps before the next run")
        return self._step_index

    def _set_schedule(self, timesteps: np.ndarray | torch.Tensor, device: Device, dtype: torch.dtype) -> None:
        """Takes over the timesteps of a run and forgets the last run."""
        host = torch.as_tensor(np.ascontiguousarray(timesteps)).to(dtype)
        self.timesteps = host.to(device)
        self._times = host.tolist()
        self._reset()

    def _check_count(self, num_inference_steps: int | None) -> int:
        """Returns a valid number of steps, or raises a ValueError (below 1) or a TypeError (no whole number)."""
        if num_inference_steps is None:
            raise ValueError("num_inference_steps is missing: pass the number of steps")
        count = operator.index(num_inference_steps)
        if count < 1:
            raise ValueError(f"num_inference_steps={count}, expected at least 1")
        return count

    def _count(self) -> int:
        """Returns the number of steps of the run, or raises a ValueError where there is none."""
        if self.num_inference_steps is None:
            raise ValueError("the schedule is not laid out: call set_timesteps(num_inference_steps) before step")
        return self.num_inference_steps

    def _alpha_bar_table(self, floor: float = 0.0) -> torch.Tensor:
        """Builds ``betas``, ``alphas`` and ``alphas_cumprod`` (float32, one per training step) from the configuration."""
        c = self.config
        self.betas = beta_table(c["beta_schedule"], c["num_train_timesteps"], c["beta_start"], c["beta_end"], c["trained_betas"])
        if self._own("rescale_betas_zero_snr", False):
            self.betas = rescale_zero_terminal_snr(self.betas)
        self.alphas = 1.0 - self.betas
        self.alphas_cumprod = self.alphas.cumprod(0)
        if floor and self.alphas_cumprod[-1] == 0:
            self.alphas_cumprod[-1] = floor
        return self.alphas_cumprod

    def scale_model_input(self, sample: torch.Tensor, timestep: float | torch.Tensor | None = None) -> torch.Tensor:
        """Returns the sample as the network expects it at this timestep: unchanged, unless a scheduler says otherwise."""
        return sample

    def _step(self, sample: torch.Tensor, new: Update, return_dict: bool) -> StepResult:
        """Moves on by one position and wraps the solver's ``(next sample, denoised sample or None)``."""
        if self._step_index is not None:
            self._step_index += 1
        result = SchedulerOutput(new[0].to(sample.dtype), new[1])
        return result if return_dict else result.to_tuple()


def wide(sample: torch.Tensor) -> torch.Tensor:
    """Returns the sample in at least float32, in which all solvers calculate."""
    return sample if sample.dtype in (torch.float32, torch.float64) else sample.float()
