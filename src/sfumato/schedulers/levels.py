"""How schedulers know a noise level: by its training step, or by its position among the run's sigmas."""

from __future__ import annotations

import math

import numpy as np
import torch

from .base import SchedulerMixin, match_dims
from .noise import SPACINGS, ZERO_SNR_FLOOR, integer_steps, one_of
from .prediction import denoised_coefficients, dynamic_threshold, mix


class LevelScheduler(SchedulerMixin):
    """Base of the schedulers whose levels are mixtures of the clean sample and normal noise."""

    predictions: tuple[str, ...] = ("epsilon", "v_prediction")

    def _levels(self, timesteps: torch.Tensor, sample: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Returns the factors of signal and noise at ``timesteps`` ``(B,)``, ready to multiply ``sample`` ``(B, ...)``."""
        raise NotImplementedError

    def add_noise(self, original_samples: torch.Tensor, noise: torch.Tensor, timesteps: torch.Tensor) -> torch.Tensor:
        """Noises clean samples to the level of ``timesteps``.

        A scheduler with sigmas whose run has begun (or whose begin is set) noises to the level of the run, whatever
        ``timesteps`` says: inpainting brings the source to the level that the sample has reached.

        Args:
            original_samples: ``(B, ...)``.
            noise: Standard normal, as ``original_samples``.
            timesteps: Elements of the schedule, ``(B,)`` or ``(1,)``.
        """
        signal, spread = self._levels(timesteps, original_samples)
        return (signal * original_samples + spread * noise).to(original_samples.dtype)

    def get_velocity(self, sample: torch.Tensor, noise: torch.Tensor, timesteps: torch.Tensor) -> torch.Tensor:
        """Returns ``alpha * noise - sigma * sample`` at ``timesteps``, the target of ``v_prediction`` (arXiv:2202.00512)."""
        signal, spread = self._levels(timesteps, sample)
        size = (signal**2 + spread**2).sqrt()
        return ((signal * noise - spread * sample) / size).to(sample.dtype)


class StepScheduler(LevelScheduler):
    """Base of the solvers that know a noise level by its training step."""

    predictions: tuple[str, ...] = ("epsilon", "sample", "v_prediction")

    def _build(self) -> None:
        one_of("prediction_type", self.config["prediction_type"], self.predictions)
        self._alpha_bar = self._alpha_bar_table().tolist()
        self._final_alpha_bar = 1.0 if self._own("set_alpha_to_one", True) else self._alpha_bar[0]
        self._set_schedule(np.arange(len(self))[::-1], None, torch.int64)

    def _stops(self, num_inference_steps: int | None) -> np.ndarray:
        """Returns the descending training steps of a run, as integers, and notes their number."""
        count = self._check_count(num_inference_steps)
        if count > len(self):
            raise ValueError(f"num_inference_steps={count} is more than the {len(self)} steps this model was trained with")
        c = self.config
        self.num_inference_steps = count
        return integer_steps(c["timestep_spacing"], count, len(self), c["steps_offset"]).round().astype(np.int64)

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

    def _levels(self, timesteps: torch.Tensor, sample: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Returns the factors of signal and noise at ``timesteps`` ``(B,)``, ready to multiply ``sample`` ``(B, ...)``."""
        alpha_bar = self.alphas_cumprod.to(sample.device)[timesteps.to(sample.device)]
        return match_dims(alpha_bar.sqrt(), sample), match_dims((1 - alpha_bar).sqrt(), sample)


class BoundedStepScheduler(StepScheduler):
    """A step solver that can clip or threshold the denoised sample."""

    def _denoise(self, output: torch.Tensor, x: torch.Tensor, alpha_bar: float) -> torch.Tensor:
        c = self.config
        x0 = mix(denoised_coefficients(c["prediction_type"], math.sqrt(alpha_bar), math.sqrt(1 - alpha_bar)), x, output)
        if c["thresholding"]:
            return dynamic_threshold(x0, c["dynamic_thresholding_ratio"], c["sample_max_value"])
        if c["clip_sample"]:
            return x0.clamp(-c["clip_sample_range"], c["clip_sample_range"])
        return x0


class SigmaScheduler(LevelScheduler):
    """Base of the solvers that know a noise level by its position in ``sigmas``.

    Attributes:
        sigmas: Noise levels of the run and the level it ends at, float32 ``(steps + 1,)``, on the CPU.
    """

    sigmas: torch.Tensor

    def _build(self) -> None:
        one_of("prediction_type", self.config["prediction_type"], self.predictions)
        one_of("timestep_spacing", self.config["timestep_spacing"], SPACINGS)
        alpha_bar = self._alpha_bar_table(ZERO_SNR_FLOOR)
        self._table = ((1 - alpha_bar) / alpha_bar).sqrt().numpy()  # float32 (training steps,), ascending
        self._set_levels(np.append(self._table[::-1], 0.0), np.arange(len(self._table))[::-1], None, torch.float32)

    def _set_levels(self, sigmas: np.ndarray, timesteps: np.ndarray, device: str | torch.device | None, dtype: torch.dtype) -> None:
        """Takes over the levels of a run, the level it ends at included, and its timesteps."""
        self.sigmas = torch.from_numpy(sigmas).float()
        self._sigmas = self.sigmas.tolist()
        self._set_schedule(timesteps, device, dtype)

    def _sigmas_at(self, stops: np.ndarray) -> np.ndarray:
        """Returns the table's sigmas at fractional training steps."""
        return np.interp(stops, np.arange(len(self._table)), self._table)

    def _final_sigma(self) -> float:
        return self._bounds()[1] if self._own("final_sigmas_type", "zero") == "sigma_min" else 0.0

    def _bounds(self) -> tuple[float, float]:
        """Returns the table's largest and smallest sigma."""
        return float(self._table[-1]), float(self._table[0])

    def _run_place(self, timesteps: torch.Tensor) -> list[int]:
        """Returns the positions at which samples are to be noised."""
        if self._step_index is not None:
            return [self._step_index]
        if self._begin_index is not None:
            return [self._begin_index]
        return [self.index_for_timestep(t) for t in timesteps.flatten().tolist()]

    def _levels(self, timesteps: torch.Tensor, sample: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        factors = [self._signal_noise(self._sigmas[i]) for i in self._run_place(timesteps)]
        signal, spread = torch.tensor(factors, dtype=torch.float64).unbind(1)
        return match_dims(signal, sample), match_dims(spread, sample)

    def _signal_noise(self, sigma: float) -> tuple[float, float]:
        """Returns the factors of signal and noise at a level, here in variance-exploding form."""
        return 1.0, sigma


def one_source(**sources: object) -> None:
    """Raises unless exactly one of the named arguments is given."""
    given = [name for name, value in sources.items() if value is not None]
    if len(given) != 1:
        raise ValueError(f"set_timesteps takes exactly one of {', '.join(sources)}; given: {', '.join(given) or 'none'}")
