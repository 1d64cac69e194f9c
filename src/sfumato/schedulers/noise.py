"""Noise tables and spacings: how much noise each training step holds, and at which of its levels a sampler stops.

Notation: ``alpha_bar`` is the share of signal variance left after a training step (DDPM's product of ``1 - beta``), and
``sigma = sqrt((1 - alpha_bar) / alpha_bar)`` the ratio of noise to signal.
"""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import torch
from torch import Tensor

from ..errors import ConfigError, did_you_mean


def one_of(key: str, value: Any, *allowed: Any) -> None:
    """Raises a :class:`ConfigError` that names ``key`` unless ``value`` is allowed."""
    if value not in allowed:
        hint = did_you_mean(str(value), [str(a) for a in allowed])
        raise ConfigError(f"{key}={value!r} is not known{hint}; choose one of {', '.join(map(repr, allowed))}")


def one_source(**sources: object) -> None:
    """Raises a ValueError unless exactly one of the named arguments is given."""
    given = [name for name, value in sources.items() if value is not None]
    if len(given) != 1:
        raise ValueError(f"set_timesteps takes exactly one of {', '.join(sources)}; given: {', '.join(given) or 'none'}")


def beta_table(schedule: str, steps: int, start: float, end: float, trained: Any, dtype: torch.dtype) -> Tensor:
    """Returns the noise variance that each of ``steps`` training steps adds.

    The schedules are ``linear`` (arXiv:2006.11239), ``scaled_linear`` (linear in the square root, latent diffusion),
    ``squaredcos_cap_v2`` (arXiv:2102.09672 eq. 17, without ``start`` and ``end``) and ``sigmoid`` (GeoDiff). In float32:
    most models were trained with these rounded tables, and ``1 - alpha_bar`` near zero shows it. ``trained`` replaces the schedule.
    """
    if trained is not None:
        betas = torch.as_tensor(np.asarray(trained), dtype=torch.float32)
        if betas.ndim != 1 or len(betas) < steps:
            raise ConfigError(f"trained_betas has shape {tuple(betas.shape)}, expected num_train_timesteps={steps} numbers or more")
        return betas
    if schedule == "linear":
        return torch.linspace(start, end, steps, dtype=dtype)
    if schedule == "scaled_linear":
        return torch.linspace(start**0.5, end**0.5, steps, dtype=dtype) ** 2
    if schedule == "sigmoid":
        return torch.sigmoid(torch.linspace(-6, 6, steps)) * (end - start) + start
    signal = np.cos((np.arange(steps + 1) / steps + 0.008) / 1.008 * math.pi / 2) ** 2
    return torch.tensor(np.minimum(1 - signal[1:] / signal[:-1], 0.999), dtype=torch.float32)


def noise_tables(betas: Tensor, shift: float, zero_snr: bool) -> tuple[Tensor, Tensor]:
    """Returns the betas, and the shares of signal variance that are left after each training step.

    ``shift`` divides the signal-to-noise ratio; with ``zero_snr`` the shares are shifted and scaled so that the last step holds no
    signal (arXiv:2305.08891, algorithm 1).
    """
    alpha_bar = (1 - betas).cumprod(0)
    alpha_bar = alpha_bar / (shift + (1 - shift) * alpha_bar)
    if zero_snr:
        root = alpha_bar.sqrt()
        alpha_bar = ((root - root[-1]) * (root[0] / (root[0] - root[-1]))) ** 2
        betas = 1 - torch.cat([alpha_bar[:1], alpha_bar[1:] / alpha_bar[:-1]])
        alpha_bar = (1 - betas).cumprod(0)  # in float32, as models were trained
    return betas, alpha_bar


def integer_steps(spacing: str, count: int, steps: int, offset: int = 0, extra: int = 0, top: int | None = None) -> np.ndarray:
    """Returns ``count`` of the training ``steps``, descending, to stop at, before rounding (arXiv:2305.08891, table 2).

    They are ``linspace`` (both ends), ``leading`` (multiples of a whole stride, plus ``offset``) or ``trailing`` (from the last
    down, the stride may be fractional), below ``top``. The former two lay out ``extra`` stops more and leave out the cleanest.
    """
    top = steps if top is None else top
    if spacing == "trailing":
        return np.arange(top, 0, -steps / count).round() - 1
    if spacing == "linspace":
        return np.linspace(0, top - 1, count + extra)[::-1][:count]
    if count + extra > top:
        raise ValueError(f"num_inference_steps={count} is more than timestep_spacing='leading' can place on {top} training steps")
    return np.arange(count + extra, dtype=np.float64)[::-1][:count] * (top // (count + extra)) + offset


def given_steps(timesteps: Any, steps: int) -> np.ndarray:
    """Returns explicit training steps as integers, or raises a ValueError unless they descend strictly within ``steps - 1``..0."""
    stops = np.asarray(timesteps, dtype=np.int64)
    if not len(stops) or (np.diff(stops) >= 0).any() or stops[0] >= steps or stops[-1] < 0:
        raise ValueError(f"timesteps={list(timesteps)} must descend strictly within {steps - 1}..0")
    return stops


def sigma_ramp(
    name: str, high: float, low: float, places: int | np.ndarray, rho: float = 7.0, dtype: torch.dtype = torch.float64
) -> np.ndarray:
    """Returns sigmas from ``high`` down to ``low``, as many as ``places`` or at these places in 0..1, calculated in ``dtype``.

    They are ``karras`` (arXiv:2206.00364 eq. 5), ``exponential`` (uniform in log sigma, as is ``lu``, uniform in lambda,
    arXiv:2206.00927 section 3.4) or ``beta`` (quantiles of Beta(0.6, 0.6), arXiv:2407.12173).
    """
    if name in ("exponential", "lu") and isinstance(places, int):  # rounded like published levels
        return torch.linspace(math.log(high), math.log(low), places, dtype=dtype).exp().numpy()
    place = torch.linspace(0, 1, places, dtype=dtype) if isinstance(places, int) else torch.as_tensor(places, dtype=dtype)
    if name in ("exponential", "lu"):
        return (math.log(high) + place * (math.log(low) - math.log(high))).exp().numpy()
    if name == "karras":
        return ((high ** (1 / rho) + place * (low ** (1 / rho) - high ** (1 / rho))) ** rho).numpy()
    try:
        from scipy.special import betaincinv
    except ImportError as error:
        raise ImportError("use_beta_sigmas needs scipy: `pip install scipy`, or choose use_karras_sigmas") from error
    return low + (high - low) * betaincinv(0.6, 0.6, 1 - place.numpy())


def sigmas_to_steps(sigmas: np.ndarray, table: np.ndarray) -> np.ndarray:
    """Returns the fractional training steps with these noise levels: the ascending ``table`` is interpolated in log sigma.

    Its logarithm is as coarse as its float32: solvers that cut the fraction off show it at the ends.
    """
    return np.interp(np.log(np.maximum(sigmas, 1e-10)), np.log(table), np.arange(len(table)))


def shift_flow(sigmas: np.ndarray, shift: float) -> np.ndarray:
    """Moves flow sigmas in 0..1 towards noise for large pictures (arXiv:2403.03206 eq. 23)."""
    return shift * sigmas / (1 + (shift - 1) * sigmas)
