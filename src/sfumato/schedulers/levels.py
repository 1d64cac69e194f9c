"""How schedulers know a noise level: by its training step, or by its position among the run's sigmas."""

from __future__ import annotations

import numpy as np
import torch

from ..errors import ConfigError
from .base import Device, SchedulerMixin
from .noise import ZERO_SNR_FLOOR, integer_steps, one_of
from .prediction import denoised_coefficients, dynamic_threshold, mix


class LevelScheduler(SchedulerMixin):
    """Base of the schedulers whose levels are mixtures of the clean sample and normal noise."""

    predictions: tuple[str, ...] = ("epsilon", "v_prediction")

    def _build(self) -> None:
        """Reads what is common of the configuration. Subclasses build their tables here."""
        one_of("prediction_type", self.config["prediction_type"], *self.predictions)
        self._thresholds, self._clips = self._own("thresholding", False), self._own("clip_sample", False)

    def _denoise(self, output: torch.Tensor, x: torch.Tensor, alpha: float, sigma: float) -> torch.Tensor:
        """Returns the denoised sample of ``x = alpha * x0 + sigma * noise``, bounded as the configuration says."""
        c = self.config
        x0 = mix(denoised_coefficients(c["prediction_type"], alpha, sigma), x, output)
        if self._thresholds:
            return dynamic_threshold(x0, c["dynamic_thresholding_ratio"], c["sample_max_value"])
        return x0.clamp(-c["clip_sample_range"], c["clip_sample_range"]) if self._clips else x0

    def _levels(self, timesteps: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Returns the factors of signal and noise at ``timesteps``, all ``(B,)``."""
        raise NotImplementedError

    def _factors(self, timesteps: torch.Tensor, sample: torch.Tensor) -> list[torch.Tensor]:
        """Returns the factors of signal and noise at ``timesteps`` as ``(B, 1, 1, ...)``, ready to multiply ``sample``."""
        shape, dtype = (-1, *[1] * (sample.ndim - 1)), torch.promote_types(sample.dtype, torch.float32)
        return [factor.to(sample.device, dtype).view(shape) for factor in self._levels(timesteps)]

    def add_noise(self, original_samples: torch.Tensor, noise: torch.Tensor, timesteps: torch.Tensor) -> torch.Tensor:
        """Noises clean samples to the level of ``timesteps``.

        A scheduler with sigmas whose run has begun (or whose begin is set) noises to the level of the run, whatever
        ``timesteps`` says: inpainting brings the source to the level that the sample has reached.

        Args:
            original_samples: ``(B, ...)``.
            noise: Standard normal, as ``original_samples``.
            timesteps: Elements of the schedule, ``(B,)`` or ``(1,)``.
        """
        signal, spread = self._factors(timesteps, original_samples)
        return (signal * original_samples + spread * noise).to(original_samples.dtype)

    def get_velocity(self, sample: torch.Tensor, noise: torch.Tensor, timesteps: torch.Tensor) -> torch.Tensor:
        """Returns ``alpha * noise - sigma * sample`` at ``timesteps``, the target of ``v_prediction`` (arXiv:2202.00512)."""
        signal, spread = self._factors(timesteps, sample)
        return ((signal * noise - spread * sample) / (signal**2 + spread**2).sqrt()).to(sample.dtype)


class StepScheduler(LevelScheduler):
    """Base of the solvers that know a noise level by its training step."""

    predictions = ("epsilon", "sample", "v_prediction")

    def _build(self) -> None:
        super()._build()
        self._alpha_bar = self._alpha_bar_table().tolist()
        self._final_alpha_bar = 1.0 if self._own("set_alpha_to_one", True) else self._alpha_bar[0]
        self._set_schedule(np.arange(len(self))[::-1], None, torch.int64)

    def _stops(self, num_inference_steps: int | None) -> np.ndarray:
        """Returns the descending training steps of a run, as integers, and notes their number."""
        count = self._check_count(num_inference_steps)
        if count > len(self):
            raise ValueError(f"num_inference_steps={count} is more than the {len(self)} steps this model was trained with")
        self.num_inference_steps = count
        stops = integer_steps(self.config["timestep_spacing"], count, len(self), self.config["steps_offset"])
        return stops.round().astype(np.int64)

    def set_timesteps(self, num_inference_steps: int, device: Device = None) -> None:
        """Lays out a run of ``num_inference_steps``, at most as many as training steps, with ``timesteps`` on ``device``."""
        self._set_schedule(self._stops(num_inference_steps), device, torch.int64)

    def _training_step(self, timestep: float | torch.Tensor) -> int:
        """Returns the timestep as an integer, without waiting for the device if it is an element of ``timesteps``."""
        if isinstance(timestep, torch.Tensor) and timestep.device.type != "cpu" and timestep.dtype == self.timesteps.dtype:
            # An element of the schedule tells its position by its place in memory; to read its value would stall the device.
            same = timestep.untyped_storage().data_ptr() == self.timesteps.untyped_storage().data_ptr()
            if same and timestep.numel() == 1:
                return int(self._times[timestep.storage_offset()])
        value = float(timestep)
        if value != int(value) or not 0 <= value < len(self._alpha_bar):
            raise ValueError(f"timestep={value:g}, expected a whole number in 0..{len(self) - 1}; pass one of scheduler.timesteps")
        return int(value)

    def _alpha_bar_at(self, step: int) -> float:
        return self._alpha_bar[step] if step >= 0 else self._final_alpha_bar

    def _levels(self, timesteps: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        alpha_bar = self.alphas_cumprod.to(timesteps.device)[timesteps]
        return alpha_bar.sqrt(), (1 - alpha_bar).sqrt()


class SigmaScheduler(LevelScheduler):
    """Base of the solvers that know a noise level by its position in ``sigmas``.

    Attributes:
        sigmas: Noise levels of the run and the level it ends at, float32 ``(steps + 1,)``, on the CPU.
    """

    sigmas: torch.Tensor

    def _build(self) -> None:
        super()._build()
        one_of("timestep_spacing", self.config["timestep_spacing"], "linspace", "leading", "trailing")
        one_of("final_sigmas_type", self._own("final_sigmas_type", "zero"), "zero", "sigma_min")
        ramps = [name for name in ("karras", "exponential", "beta") if self._own(f"use_{name}_sigmas", False)]
        if len(ramps) > 1:
            raise ConfigError(f"use_{ramps[0]}_sigmas and use_{ramps[1]}_sigmas exclude each other: set only one of them to True")
        self._ramp = ramps[0] if ramps else None
        alpha_bar = self._alpha_bar_table(ZERO_SNR_FLOOR)
        self._table = ((1 - alpha_bar) / alpha_bar).sqrt().numpy()  # float32 (training steps,), ascending
        self._bounds = float(self._table[-1]), float(self._table[0])
        self._final_sigma = self._bounds[1] if self._own("final_sigmas_type", "zero") == "sigma_min" else 0.0
        self._set_levels(np.append(self._table[::-1], 0.0), np.arange(len(self._table))[::-1], None, torch.float32)

    def _set_levels(self, sigmas: np.ndarray, timesteps: np.ndarray, device: Device, dtype: torch.dtype) -> None:
        """Takes over the levels of a run, the level it ends at included, and its timesteps."""
        self.sigmas = torch.from_numpy(sigmas).float()
        self._sigmas = self.sigmas.tolist()
        self._set_schedule(timesteps, device, dtype)

    def _sigmas_at(self, stops: np.ndarray) -> np.ndarray:
        """Returns the table's sigmas at fractional training steps."""
        return np.interp(stops, np.arange(len(self._table)), self._table)

    def _levels(self, timesteps: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        begun = self._begin_index if self._step_index is None else self._step_index
        places = [self.index_for_timestep(t) for t in timesteps.flatten().tolist()] if begun is None else [begun]
        factors = torch.tensor([self._signal_noise(self._sigmas[i]) for i in places], dtype=torch.float64)
        return factors[:, 0], factors[:, 1]

    def _signal_noise(self, sigma: float) -> tuple[float, float]:
        """Returns the factors of signal and noise at a level, here in variance-exploding form."""
        return 1.0, sigma


def one_source(**sources: object) -> None:
    """Raises a ValueError unless exactly one of the named arguments is given."""
    given = [name for name, value in sources.items() if value is not None]
    if len(given) != 1:
        raise ValueError(f"set_timesteps takes exactly one of {', '.join(sources)}; given: {', '.join(given) or 'none'}")
