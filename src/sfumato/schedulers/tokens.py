"""Samplers of pictures that are made of tokens: discrete diffusion and masked generation."""

from __future__ import annotations

import math

import numpy as np
import torch
from torch import Tensor

from ..errors import ConfigError
from ..random import Generators, categorical, rand
from .base import Device, SchedulerMixin, SchedulerOutput, StepResult, StepScheduler, Time


class VQDiffusionScheduler(SchedulerMixin):
    """Discrete diffusion that replaces tokens by random ones or by a mask (arXiv:2111.14822).

    A training step keeps a token with probability ``alpha + beta``, masks it with ``gamma``, and turns it into each other class
    with ``beta`` (eq. 7). ``model_output`` holds the logarithms of the clean tokens' probabilities, ``(B, classes - 1, N)``;
    ``sample`` is int64 ``(B, N)``."""

    config_keys = "num_vec_classes num_train_timesteps alpha_cum_start alpha_cum_end gamma_cum_start gamma_cum_end"
    config_defaults = {"num_train_timesteps": 100}
    step_takes = "generator=None"
    _most = 0
    _position = StepScheduler._training_step  # type: ignore[assignment]

    def _build(self) -> None:
        c, total = self.config, len(self)
        tokens = c["num_vec_classes"] - 1
        kept = np.linspace(c["alpha_cum_start"], c["alpha_cum_end"], total)
        masked = np.linspace(c["gamma_cum_start"], c["gamma_cum_end"], total)
        before_kept, before_masked = np.append(1.0, kept[:-1]), np.append(0.0, masked[:-1])
        alpha, gamma = kept / before_kept, 1 - (1 - masked) / (1 - before_masked)
        # (alpha, beta, gamma) of each training step, alone and accumulated with all before it.
        self._single = np.stack([alpha, (1 - alpha - gamma) / tokens, gamma], 1).tolist()
        self._total = np.stack([kept, (1 - kept - masked) / tokens, masked], 1).tolist()
        if min(beta for table in (self._single, self._total) for _, beta, _ in table) < 0:
            raise ConfigError("alpha_cum and gamma_cum sum to more than 1, the probability of all: lower their start or their end")
        self.mask_class = tokens
        self._set_schedule(np.arange(total)[::-1])

    def update(self, output: Tensor, t: int, tokens: Tensor, generator: Generators) -> Tensor:
        """Draws the tokens of the step before, with the Gumbel trick (section 3.2)."""
        log_p = self.q_posterior(output, tokens, t) if t else output
        uniform = rand(log_p.shape, generator=generator, device=log_p.device)
        gumbel = uniform.add_(1e-30).log_().neg_().add_(1e-30).log_()
        return (log_p - gumbel).argmax(1)

    def q_posterior(self, log_p_x_0: Tensor, x_t: Tensor, t: Time) -> Tensor:
        """Returns the logarithms of the probabilities of the tokens one step before (eqs. 8 and 11), ``(B, classes, N)``.

        ``log_p_x_0`` is of the clean tokens, ``(B, classes - 1, N)``; ``x_t``, ``(B, N)``, are tokens at training step ``t``. The
        mask has minus infinity where the token is not masked.
        """
        t = int(self._time(t))
        (a, b, c), (total_a, total_b, total_c) = self._single[t], self._total[t]
        before_a, before_b, before_c = self._total[t - 1] if t else (1.0, 0.0, 0.0)
        masked = (x_t == self.mask_class).unsqueeze(1)  # (B, 1, N)
        own = x_t.unsqueeze(1).clamp(max=self.mask_class - 1)  # where to put right the class of a token that is not masked

        def divide(p: Tensor) -> Tensor:
            w = p.mul_(torch.where(masked, 1 / total_c, 1 / total_b))
            factor = torch.where(masked, 1.0, total_b / (total_a + total_b))
            return w.scatter_(1, own, w.gather(1, own) * factor)

        w = divide(log_p_x_0.exp())
        whole = w.sum(1, keepdim=True)
        # From each clean class to the step before, and from there to x_t.
        p = w.mul_(before_a).add_(whole, alpha=before_b).mul_(torch.where(masked, c, b))
        p.scatter_(1, own, p.gather(1, own) * torch.where(masked, 1.0, (a + b) / b))
        return torch.cat([p, torch.where(masked, before_c * whole, 0.0)], 1).log()


class AmusedScheduler(SchedulerMixin):
    """Parallel decoding of masked tokens: of the drawn ones, the least confident are masked again (arXiv:2202.04200, 3.2)."""

    config_keys = "mask_token_id masking_schedule"

    def set_timesteps(
        self, num_inference_steps: int, temperature: float | tuple[float, float] | list[float] = (2, 0), device: Device = None
    ) -> None:
        """Lays out a run; ``temperature`` of the choice of masks goes from the first to the second value (0.01 if there is one)."""
        self.num_inference_steps = count = self._check_count(num_inference_steps)
        first, last = temperature if isinstance(temperature, (tuple, list)) else (temperature, 0.01)
        self.temperatures = torch.linspace(first, last, count, device=device)
        self._temperatures = self.temperatures.tolist()
        done = torch.arange(1, count + 1) / count
        # The share of tokens masked after each step, in float32 as the number of them is rounded down.
        self._shares = torch.cos(done * math.pi / 2) if self.config["masking_schedule"] == "cosine" else 1 - done
        self._set_schedule(np.arange(count)[::-1], device)

    def step(
        self, model_output: Tensor, timestep: Time, sample: Tensor, starting_mask_ratio: float = 1.0, generator: Generators = None,
        return_dict: bool = True,
    ) -> StepResult:  # fmt: skip
        """Draws all masked tokens and masks the least confident of them again; see :meth:`SchedulerMixin.step`.

        ``model_output`` are logits, ``(B, N, classes)`` or ``(B, classes, H, W)``; ``sample`` is int64 ``(B, N)`` or ``(B, H, W)``;
        ``starting_mask_ratio`` is the share of masked tokens that the run began with.
        """
        shape, tokens = sample.shape, sample.flatten(1)  # (B, N)
        logits = model_output.flatten(2).transpose(1, 2) if sample.ndim == 3 else model_output
        probabilities = logits.softmax(-1)
        unknown = tokens == self.config["mask_token_id"]
        clean = torch.where(unknown, categorical(probabilities, generator=generator), tokens)
        i, new = self._count() - 1 - int(self._time(timestep)), clean
        if i + 1 < self._count():
            limit = int(starting_mask_ratio * self._shares[i] * tokens.shape[1])
            masks = unknown.sum(1, keepdim=True).sub_(1).clamp_(max=limit).clamp_(min=1)  # (B, 1)
            chosen = probabilities.gather(2, clean.unsqueeze(2)).squeeze(2).masked_fill(~unknown, torch.finfo(logits.dtype).max)
            uniform = rand(tokens.shape, generator=generator, device=tokens.device)
            gumbel = uniform.clamp_(min=1e-20).log_().neg_().clamp_(min=1e-20).log_().neg_()
            confidence = chosen.log().add(gumbel, alpha=self._temperatures[i])
            cut = confidence.sort(1).values.gather(1, masks)
            new = clean.masked_fill(confidence < cut, self.config["mask_token_id"])
        result = SchedulerOutput(new.view(shape), clean.view(shape))
        return result if return_dict else result.to_tuple()

    def add_noise(self, sample: Tensor, timesteps: Time, generator: Generators = None) -> Tensor:
        """Masks the share of tokens that is masked after the step ``timesteps``, at random places."""
        share = self._shares[self._count() - 1 - int(self._time(timesteps))].item()
        chosen = rand(sample.shape, generator=generator, device=sample.device) < share
        return sample.masked_fill(chosen, self.config["mask_token_id"])
