"""Solvers on training steps: DDPM (arXiv:2006.11239), DDIM (arXiv:2010.02502), PNDM (arXiv:2202.09778) and relatives.

They keep samples in variance-preserving form, ``x_t = sqrt(alpha_bar_t) * x0 + sqrt(1 - alpha_bar_t) * noise``, and are told the
training step at each call: nothing but PNDM's history is state.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from itertools import pairwise
from typing import Any

import numpy as np
import torch
from torch import Tensor

from ..random import Generators, noise_like
from .base import Count, Device, LevelScheduler, SchedulerMixin, StepScheduler, Time, Update, Values
from .noise import one_source
from .prediction import blend, log_snr, mix, noise_coefficients, polynomial_weights, split_variance, wide


class DDPMScheduler(StepScheduler):
    """Ancestral sampling from the posterior of the forward process (arXiv:2006.11239)."""

    config_keys = "BETAS variance_type clip_sample prediction_type BOUNDS SPACING rescale_betas_zero_snr"
    config_defaults = {"variance_type": "fixed_small", "timestep_spacing": "leading"}
    step_takes = "generator=None"
    set_timesteps_takes = "num_inference_steps=None, device=None, timesteps=None"

    def _set_schedule(self, timesteps: np.ndarray, device: Device = None) -> None:
        super()._set_schedule(timesteps, device)
        self._following = dict(pairwise([*timesteps.tolist(), -1]))

    def update(self, output: Tensor, t: int, x: Tensor, generator: Generators, following: int | None = None) -> Update:
        """Posterior mean (eq. 7) plus noise; the step to zero draws none."""
        if following is None and (following := self._following.get(t)) is None:
            raise self._no_such(t)
        step = alpha_bar, previous, beta = self._step(t, following)
        output, predicted = split_variance(output, x.shape[1], self.config["variance_type"])
        (of_x0, of_x), x0 = self._mean(output, x, *step)
        if not t:
            return mix((of_x0, of_x), x0, x), x0
        deviation = self._deviation(max((1 - previous) / (1 - alpha_bar) * beta, 1e-20), beta, predicted)
        return torch.add(noise_like(output, generator, deviation), x0, alpha=of_x0).add_(x, alpha=of_x), x0

    def _step(self, t: int, following: int) -> tuple[float, float, float]:
        """Returns ``alpha_bar`` before and after a step, and the variance of the noise between."""
        alpha_bar, previous = self._alpha_bar[t], self._alpha_bar_at(following)
        return alpha_bar, previous, 1 - alpha_bar / previous

    def _mean(self, output: Tensor, x: Tensor, alpha_bar: float, previous: float, beta: float) -> tuple[Any, Tensor]:
        """Returns the posterior's mean (eq. 7) as weights of the denoised sample and of ``x``, and the former."""
        weights = math.sqrt(previous) * beta / (1 - alpha_bar), math.sqrt(1 - beta) * (1 - previous) / (1 - alpha_bar)
        return weights, self._denoise(output, x, math.sqrt(alpha_bar), math.sqrt(1 - alpha_bar))

    def _deviation(self, small: float, large: float, predicted: Tensor | None) -> Tensor | float:
        """Returns the standard deviation of the noise, between the posterior's variance and beta."""
        kind = self.config["variance_type"]
        if kind not in ("learned", "learned_range"):
            return math.sqrt(large if kind in ("fixed_large", "fixed_large_log") else small)
        if predicted is None:
            raise ValueError(f"variance_type={kind!r} needs twice the sample's channels in model_output; else use 'fixed_small'")
        if kind == "learned":
            return wide(predicted).sqrt()
        fraction = (wide(predicted) + 1) / 2
        return ((fraction * math.log(large) + (1 - fraction) * math.log(small)) / 2).exp()


class DDIMScheduler(StepScheduler):
    """Deterministic sampling on training steps, stochastic with ``eta > 0`` (arXiv:2010.02502)."""

    config_keys = "BETAS ENDS prediction_type BOUNDS STOPS"
    config_defaults = {"timestep_spacing": "leading"}
    step_takes = "eta=0.0, use_clipped_model_output=False, generator=None, variance_noise=None"

    def _move(self, t: int) -> tuple[float, float]:
        """Returns ``alpha_bar`` before and after the step."""
        return self._alpha_bar[t], self._alpha_bar_at(t - self._stride())

    def update(
        self, output: Tensor, t: int, x: Tensor, eta: float = 0.0, reclip: bool = False, generator: Generators = None,
        noise: Tensor | None = None,
    ) -> Update:  # fmt: skip
        """Eq. 12 with the deviation of eq. 16."""
        if eta and noise is None:
            noise = noise_like(output, generator)
        elif eta and generator is not None:
            raise ValueError("generator and variance_noise exclude each other: pass one of them")
        alpha_bar, previous = self._move(t)
        alpha, sigma = math.sqrt(alpha_bar), math.sqrt(1 - alpha_bar)
        x0 = self._denoise(output, x, alpha, sigma)
        variance = eta**2 * (1 - previous) / (1 - alpha_bar) * (1 - alpha_bar / previous) if eta else 0.0
        if variance > 1 - previous + 1e-9:
            raise ValueError(f"eta={eta} asks for more noise than the next level holds: choose a value in 0..1")
        predicted = "sample" if reclip else self._kind
        predicted_noise = mix(noise_coefficients(predicted, alpha, sigma), x, x0 if reclip else output)
        new = mix((math.sqrt(previous), math.sqrt(max(1 - previous - variance, 0.0))), x0, predicted_noise)
        return new.add_(noise, alpha=math.sqrt(variance)) if eta and noise is not None else new, x0


class PNDMScheduler(StepScheduler):
    """Pseudo linear multistep sampling (arXiv:2202.09778), begun with 12 evaluations of pseudo Runge-Kutta steps.

    Without that warm-up (as latent models use it) the first step is evaluated twice and the order grows from there.
    """

    predictions = LevelScheduler.predictions
    config_keys = "BETAS skip_prk_steps set_alpha_to_one prediction_type SPACING"
    config_defaults = {"set_alpha_to_one": False, "timestep_spacing": "leading"}

    def _stops(self, count: int) -> np.ndarray:
        stops = super()._stops(count)
        if self.config["skip_prk_steps"]:
            return np.concatenate([stops[:2], stops[1:]])
        if count < 4:
            raise ValueError(f"num_inference_steps={count}, the Runge-Kutta warm-up needs 4: set skip_prk_steps=True")
        half = self._stride() // 2
        # From each of the first three steps, two evaluations half-way and one at the next step.
        warm_up = [t for a, b in pairwise(stops[:4]) for t in (a, b + half, b + half, b)]
        return np.array([*warm_up, *stops[3:]])

    def update(self, output: Tensor, t: int, x: Tensor) -> Tensor:
        """One evaluation (arXiv:2202.09778 eqs. 12 and 13); without warm-up the second one repeats the first step (Heun)."""
        warm = self.config["skip_prk_steps"] or self._calls >= 12
        return (self._adams_bashforth if warm else self._runge_kutta)(output, t, x, self._stride())

    def _runge_kutta(self, output: Tensor, t: int, x: Tensor, stride: int) -> Tensor:
        """One of the four evaluations of eq. 13."""
        stage = self._calls % 4
        if stage == 0:
            self._history, self._start = [output, *self._history], (x, [])
        base, outputs = self._start
        outputs.append(output)
        start, reach = int(self._times[self._calls - stage]), t - (0 if stage % 2 else stride // 2)
        weights, outputs = ([1.0], [output]) if stage < 3 else ([1 / 6, 1 / 3, 1 / 3, 1 / 6], outputs)
        return self._transfer(weights, outputs, base, start, reach)

    def _adams_bashforth(self, output: Tensor, t: int, x: Tensor, stride: int) -> Tensor:
        """The polynomial through the last predictions of the noise, integrated (eq. 12)."""
        if self._calls == 1 and self._start is not None:
            x, self._start = self._start, None
            return self._transfer([0.5, 0.5], [output, self._history[0]], x, t + stride, t)
        self._history = [output, *self._history[:3]]
        if self._calls == 0:
            self._start = x
        count = len(self._history)
        weights = polynomial_weights([-float(k) for k in range(count)], [1 / (k + 1) for k in range(count)])
        return self._transfer(weights, self._history, x, t, t - stride)

    def _transfer(self, weights: list[float], outputs: list[Tensor], x: Tensor, t: int, to: int) -> Tensor:
        """Moves ``x`` between training steps along the weighted predictions of the noise (eq. 11, which is DDIM's transfer)."""
        here, there = self._alpha_bar[t], self._alpha_bar_at(to)
        keep, turn = math.sqrt(there / here), math.sqrt(1 - there) - math.sqrt(there * (1 - here) / here)
        if self._kind == "v_prediction":
            keep, turn = keep + turn * math.sqrt(1 - here), turn * math.sqrt(here)
        return blend((keep, *(turn * weight for weight in weights)), (x, *outputs))


class IPNDMScheduler(SchedulerMixin):
    """Adams-Bashforth steps of fourth order for networks with ``x = cos(a) * x0 + sin(a) * noise`` (improved PNDM).

    ``timesteps`` are angles in units of a quarter turn, in 1..0. The network predicts ``cos(a) * noise - sin(a) * x0``.
    """

    config_keys = "num_train_timesteps trained_betas"
    _time_type = torch.float32

    def _build(self) -> None:
        self.set_timesteps(self.config["num_train_timesteps"])

    def _stops(self, count: int) -> np.ndarray:
        trained = self.config["trained_betas"]
        noise = np.sin(np.linspace(1, 0, count + 1) * math.pi / 2) ** 2 if trained is None else np.asarray(trained, np.float64)
        signal = np.sqrt(1 - noise**2)
        self._levels = list(zip(signal.tolist(), noise.tolist(), strict=True))
        return (np.arctan2(noise, signal) / math.pi * 2)[:-1]

    def update(self, output: Tensor, i: int, x: Tensor) -> Tensor:
        """Adams-Bashforth on the predicted noise (arXiv:2202.09778 eq. 12), and its transfer (eq. 11)."""
        (signal, noise), (next_signal, next_noise) = self._levels[i : i + 2]
        self._history = [blend((noise, signal), (x, output)), *self._history[:3]]
        nodes = [-float(k) for k in range(len(self._history))]
        weights = polynomial_weights(nodes, [1 / (k + 1) for k in range(len(nodes))])
        if not signal:  # pure noise, which says nothing of the clean sample: its mean, 0, stands for it
            return x * next_noise
        turn = next_noise - next_signal * noise / signal
        return blend((next_signal / signal, *(turn * w for w in weights)), (x, *self._history))


def _each(solve: Callable[..., Tensor], output: Tensor, timesteps: Tensor, x: Tensor) -> Tensor:
    """Solves each sample ``(1, C, ...)`` of a batch for its own timestep, as sampling parallel in time asks (arXiv:2305.16317)."""
    parts = zip(output.split(1), timesteps.flatten().tolist(), x.split(1), strict=True)
    return torch.cat([solve(o, int(t), wide(sample)) for o, t, sample in parts]).to(x.dtype)


class DDPMParallelScheduler(DDPMScheduler):
    """DDPM that can also step each sample of a batch from its own timestep; see :class:`DDPMScheduler`."""

    def batch_step_no_noise(self, model_output: Tensor, timesteps: Tensor, sample: Tensor) -> Tensor:
        """Returns the posteriors' means (arXiv:2006.11239 eq. 7) at training steps ``timesteps``, ``(B,)``, without noise."""
        stride, channels = self._stride(), sample.shape[1]  # one even stride, whatever the spacing

        def mean(output: Tensor, t: int, x: Tensor) -> Tensor:
            weights, x0 = self._mean(output[:, :channels], x, *self._step(t, t - stride))
            return mix(weights, x0, x)

        return _each(mean, model_output, timesteps, sample)


class DDIMParallelScheduler(DDIMScheduler):
    """DDIM that can also step each sample of a batch from its own timestep; see :class:`DDIMScheduler`."""

    def batch_step_no_noise(
        self, model_output: Tensor, timesteps: Tensor, sample: Tensor, eta: float = 0.0, use_clipped_model_output: bool = False
    ) -> Tensor:
        """Returns the samples of ``step`` (arXiv:2010.02502 eq. 12) at training steps ``timesteps`` ``(B,)``; ``eta`` must be 0."""
        if eta:
            raise ValueError(f"eta={eta} needs noise, which batch_step_no_noise adds none of: leave it at 0, or call step")
        return _each(lambda o, t, x: self.update(o, t, x, 0.0, use_clipped_model_output)[0], model_output, timesteps, sample)


class DDIMInverseScheduler(DDIMScheduler):
    """DDIM from the clean sample to the noise that would give it (arXiv:2010.02502 section 4.3); ``timesteps`` ascend."""

    config_keys = "BETAS ENDS prediction_type clip_sample_range STOPS"
    config_choices = {"timestep_spacing": ("leading", "trailing")}
    step_takes = StepScheduler.step_takes

    def _build(self) -> None:
        super()._build()
        self._set_schedule(np.arange(len(self)))

    def _stops(self, count: int) -> np.ndarray:
        return super()._stops(count)[::-1]

    def _move(self, t: int) -> tuple[float, float]:
        return self._alpha_bar_at(min(t - self._stride(), len(self) - 1)), self._alpha_bar[t]


class RePaintScheduler(DDIMScheduler):
    """Inpainting with an unconditional model: the known region is noised anew at each step (arXiv:2201.09865 algorithm 1)."""

    config_keys = "num_train_timesteps beta_start beta_end beta_schedule eta trained_betas clip_sample"
    step_takes = "original_image, mask, generator=None"
    _most = None  # more than the training steps mean all of them

    def set_timesteps(
        self, num_inference_steps: int, jump_length: int = 10, jump_n_sample: int = 10, device: Device = None
    ) -> None:
        """Lays out a run that goes over each stretch of ``jump_length`` steps ``jump_n_sample`` times (appendix B)."""
        if jump_length < 1:
            raise ValueError(f"jump_length={jump_length}, expected at least 1 (jump_n_sample=1 for a run without jumps)")
        self.num_inference_steps = count = min(self._check_count(num_inference_steps), len(self))
        times: list[int] = []
        for t in range(count)[::-1]:
            times.append(t)
            if t % jump_length == 0 and t < count - jump_length:
                times += [*range(t + 1, t + jump_length + 1), *range(t, t + jump_length)[::-1]] * (jump_n_sample - 1)
        self._set_schedule(np.array(times) * (len(self) // count), device)

    def update(self, output: Tensor, t: int, x: Tensor, picture: Tensor, mask: Tensor, generator: Generators) -> Update:  # type: ignore[override]
        """Eqs. 8b (DDIM's step) outside the known region and 8a within, put together by eq. 8c."""
        eta, previous = self.config["eta"], self._move(t)[1]
        spread = math.sqrt(1 - previous)
        noise = noise_like(output, generator, 1.0 if eta else spread)  # the unknown region needs the noise itself
        unknown, x0 = super().update(output, t, x, eta, False, None, noise if eta else None)
        known = torch.add(noise.mul_(spread) if eta else noise, wide(picture), alpha=math.sqrt(previous))
        return torch.lerp(unknown, known, mask.to(unknown)), x0

    def undo_step(self, sample: Tensor, timestep: Time, generator: Generators = None) -> Tensor:
        """Noises the sample up from ``timestep`` by one step of the run, through each training step (arXiv:2006.11239 eq. 2)."""
        t, x = self._training_step(timestep), wide(sample)
        for beta in self._betas[t : t + self._stride()]:
            x = mix((math.sqrt(1 - beta), math.sqrt(beta)), x, noise_like(sample, generator))
        return x.to(sample.dtype)


class UnCLIPScheduler(DDPMScheduler):
    """DDPM as DALL-E 2's prior and decoders run it (arXiv:2204.06125): even steps from the last training step to the first."""

    predictions = ("epsilon", "sample")

    config_keys = "num_train_timesteps variance_type clip_sample clip_sample_range prediction_type beta_schedule"
    config_defaults = {"variance_type": "fixed_small_log", "beta_schedule": "squaredcos_cap_v2"}
    config_choices = {"variance_type": ("fixed_small_log", "learned_range"), "beta_schedule": ("squaredcos_cap_v2",)}

    step_takes = "prev_timestep=None, generator=None"
    set_timesteps_takes = StepScheduler.set_timesteps_takes
    _least = 2  # from the last training step to the first

    def _stops(self, count: int) -> np.ndarray:
        return (np.arange(count)[::-1] * ((len(self) - 1) / (count - 1))).round().astype(np.int64)

    def update(self, output: Tensor, t: int, x: Tensor, prev_timestep: Time | None, generator: Generators) -> Update:  # type: ignore[override]
        following = t - 1 if prev_timestep is None else self._training_step(prev_timestep)
        return super().update(output, t, x, generator, following)

    def _step(self, t: int, following: int) -> tuple[float, float, float]:
        # The variance in float32, as published samples were made: at the clean end it shows.
        alpha_bar, previous, _ = super()._step(t, following)
        between = self._betas[t] if following == t - 1 else float(1 - np.float32(alpha_bar) / np.float32(previous))
        return alpha_bar, previous, between


class DDPMWuerstchenScheduler(LevelScheduler):
    """DDPM in continuous time, 1 (noise) to 0 (clean), on the cosine table (arXiv:2306.00637, arXiv:2102.09672 eq. 17)."""

    config_keys = "scaler s"
    step_takes = "generator=None"
    set_timesteps_takes = "num_inference_steps=None, timesteps=None, device=None"
    _time_type = torch.float32

    def _lay_out(self, num_inference_steps: Count, device: Device = None, timesteps: Values | Tensor = None) -> None:
        one_source(num_inference_steps=num_inference_steps, timesteps=timesteps)
        even = timesteps is None
        times = torch.linspace(1, 0, self._check_count(num_inference_steps) + 1) if even else torch.as_tensor(timesteps)
        if times.ndim != 1 or len(times) < 2:
            raise ValueError(f"timesteps={timesteps}, expected two times or more, of which the last is where the run ends")
        self.num_inference_steps = len(times) - 1
        self._set_schedule(times.cpu().double().numpy(), device)
        self._alpha_bars = self._share(torch.tensor(self._times)).tolist()

    def _share(self, timesteps: Tensor) -> Tensor:
        scaler, s, t = self.config["scaler"], self.config["s"], timesteps
        t = 1 - (1 - t) ** scaler if scaler > 1 else t**scaler
        signal = torch.cos((t + s) / (1 + s) * (math.pi / 2)) ** 2 / math.cos(s / (1 + s) * math.pi / 2) ** 2
        return signal.clamp(0.0001, 0.9999)

    def _position(self, timestep: Time) -> int:  # type: ignore[override]
        self._count()
        t = self._time(timestep)  # may be (B,) with equal entries
        return min(range(len(self._times) - 1), key=lambda i: abs(self._times[i] - t))

    def update(self, output: Tensor, i: int, x: Tensor, generator: Generators) -> Tensor:
        """Posterior mean and deviation (arXiv:2006.11239 eqs. 11 and 7); the step to time 0 adds no noise."""
        alpha_bar, previous = self._alpha_bars[i], self._alpha_bars[i + 1]
        kept = alpha_bar / previous
        of_x, of_output = 1 / math.sqrt(kept), (kept - 1) / math.sqrt(kept * (1 - alpha_bar))
        deviation = math.sqrt((1 - kept) * (1 - previous) / (1 - alpha_bar)) if self._times[i + 1] else 0.0
        return torch.add(noise_like(output, generator, deviation), x, alpha=of_x).add_(output, alpha=of_output)


class CogVideoXDDIMScheduler(DDIMScheduler):
    """Deterministic DDIM on a table whose signal-to-noise ratio is shifted (arXiv:2408.06072); nothing is clipped."""

    config_keys = "BETAS ENDS prediction_type clip_sample_range sample_max_value STOPS snr_shift_scale"
    config_defaults = {"beta_start": 0.00085, "beta_end": 0.012, "beta_schedule": "scaled_linear", "timestep_spacing": "leading"}

    config_choices = {"beta_schedule": ("linear", "scaled_linear", "squaredcos_cap_v2")}
    _table_type = torch.float64

    def _build(self) -> None:
        super()._build()
        self._clips = False  # the keys of clipping are part of published files but have no effect

    def update(self, output: Tensor, t: int, x: Tensor, eta: float = 0.0, *more: Any) -> Update:
        if eta or more[-1] is not None:
            raise ValueError(
                f"eta={eta} and variance_noise are not for CogVideoX's schedulers: leave them out, or use DDIMScheduler"
            )
        return super().update(output, t, x, 0.0, more[0])


class CogVideoXDPMScheduler(CogVideoXDDIMScheduler):
    """Second-order SDE-DPM-Solver++ (arXiv:2211.01095) on CogVideoX's table; the caller keeps the last denoised sample."""

    step_takes = (
        "model_output, old_pred_original_sample, timestep, timestep_back, sample, eta=0.0, use_clipped_model_output=False,"
        " generator=None, variance_noise=None, return_dict=False"
    )

    def update(self, output: Tensor, t: int, x: Tensor, last: Tensor | None, timestep_back: Time | None, *more: Any) -> Update:  # type: ignore[override]
        """Eq. 18 of arXiv:2211.01095 (appendix A), from the second step on with the extrapolated denoised sample."""
        eta, _, generator, variance_noise = more
        if eta or variance_noise is not None:
            raise ValueError("eta and variance_noise are not for CogVideoX's schedulers: leave them out and pass a generator")
        alpha_bar, previous = self._move(t)
        x0 = slope = self._denoise(output, x, *self._signal_noise(t))
        here = log_snr(alpha_bar, 1 - alpha_bar) / 2
        h = log_snr(previous, 1 - previous) / 2 - here
        keep, fresh = math.sqrt((1 - previous) / (1 - alpha_bar)) * math.exp(-h), -math.expm1(-2 * h)
        noise = noise_like(output, generator, deviation := math.sqrt((1 - previous) * fresh))
        if last is not None and timestep_back is not None and t >= self._stride():
            noise = noise_like(output, generator, deviation)  # of two draws the second counts
            back = self._alpha_bar[self._training_step(timestep_back)]
            slope = torch.lerp(wide(last), x0, 1 + h / (2 * here - log_snr(back, 1 - back)))
        return torch.add(noise, x, alpha=keep).add_(slope, alpha=math.sqrt(previous) * fresh), x0
