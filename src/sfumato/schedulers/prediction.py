"""What a network predicts, and the way from there to the clean sample and to the noise.

Everywhere ``x = alpha * x0 + sigma * noise``. Every kind of prediction is a linear mixture of ``x0`` and ``noise``, so both can
be read off as ``a * x + b * output`` with two numbers that depend on the noise level alone.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor

from ..errors import ConfigError


def denoised_coefficients(kind: str, alpha: float, sigma: float) -> tuple[float, float]:
    """Returns ``(a, b)`` with ``x0 = a * x + b * output``, where ``x = alpha * x0 + sigma * noise``.

    The output is ``epsilon`` (the noise), ``sample`` or ``original_sample`` (``x0``), ``flow_prediction`` (``noise - x0``,
    arXiv:2210.02747) or ``v_prediction`` (``alpha * noise - sigma * x0`` at unit variance, arXiv:2202.00512). ``epsilon`` at zero
    signal, where the noise says nothing about ``x0``, is a :class:`ConfigError`.
    """
    if kind == "epsilon":
        if alpha == 0:
            remedy = "the model predicts 'v_prediction' or 'sample': set that prediction_type, or rescale_betas_zero_snr=False"
            raise ConfigError(f"prediction_type='epsilon' is undefined at zero signal-to-noise ratio; {remedy}")
        return 1 / alpha, -sigma / alpha
    if kind == "v_prediction":
        variance = alpha**2 + sigma**2
        return alpha / variance, -sigma / math.sqrt(variance)
    return (1.0, -sigma) if kind == "flow_prediction" else (0.0, 1.0)


def noise_coefficients(kind: str, alpha: float, sigma: float) -> tuple[float, float]:
    """Returns ``(a, b)`` with ``noise = a * x + b * output``; arguments as in :func:`denoised_coefficients`."""
    if kind == "epsilon":
        return 0.0, 1.0
    a, b = denoised_coefficients(kind, alpha, sigma)
    if kind == "v_prediction":  # stays finite at zero noise
        variance = alpha**2 + sigma**2
        return sigma / variance, alpha / math.sqrt(variance)
    if sigma == 0:
        remedy = "begin above it (set_alpha_to_one=False), or use a model of 'epsilon' or 'v_prediction'"
        raise ConfigError(f"prediction_type={kind!r} says nothing about the noise at zero noise: {remedy}")
    return (1 - alpha * a) / sigma, -alpha * b / sigma


def log_snr(alpha: float, sigma: float) -> float:
    """Returns the logarithm of signal over noise, infinite where there is none of either."""
    if not alpha or not sigma:
        return math.inf if alpha else -math.inf
    return math.log(alpha) - math.log(sigma)


def mix(weights: tuple[float, float], x: Tensor, y: Tensor) -> Tensor:
    """Returns ``weights[0] * x + weights[1] * y`` in the precision of ``x``, the wider of the two."""
    a, b = weights
    if a == 0:
        return (y if b == 1 else y * b).to(x.dtype)
    # One rounding at the scale of the sum: with a small signal both terms are large and nearly cancel.
    total = torch.add(x, y, alpha=b / a)
    if a == 1:
        return total
    # Its own multiple more is as exact unless little is left, and takes torch two thirds of the time of a product with a number.
    return total.add_(total, alpha=a - 1) if a > 0.5 else total.mul_(a)


def blend(weights: Sequence[float], tensors: Sequence[Tensor]) -> Tensor:
    """Returns the sum of ``weights[k] * tensors[k]`` as a new tensor, in the precision of the first two."""
    if weights[0] == 1:
        total, done = torch.add(tensors[0], tensors[1], alpha=weights[1]), 2
    else:
        total, done = tensors[0] * weights[0], 1
    for weight, tensor in zip(weights[done:], tensors[done:], strict=True):
        total.add_(tensor, alpha=weight)
    return total


def polynomial_weights(nodes: Sequence[float], moments: Sequence[float]) -> list[float]:
    """Returns the weights of values at ``nodes`` that integrate the polynomial through them exactly, given its ``moments``.

    ``moments[k]`` is the integral of the ``k``-th power. The Vandermonde system is solved by Bjorck and Pereyra's algorithm
    (Mathematics of Computation 24, 1970), in Python numbers: there are at most five.
    """
    weights, last = list(moments), len(nodes) - 1
    for k in range(last):
        for i in range(last, k, -1):
            weights[i] -= nodes[k] * weights[i - 1]
    for k in range(last - 1, -1, -1):
        for i in range(k + 1, last + 1):
            weights[i] /= nodes[i] - nodes[i - k - 1]
        for i in range(k, last):
            weights[i] -= weights[i + 1]
    return weights


def dynamic_threshold(x0: Tensor, ratio: float, max_value: float) -> Tensor:
    """Clips and divides each sample by its magnitudes' quantile ``ratio``, in 1..``max_value`` (Imagen, arXiv:2205.11487 2.3)."""
    limit = torch.quantile(x0.flatten(1).abs(), ratio, dim=1).clamp(1, max_value).view(-1, *[1] * (x0.ndim - 1))
    return x0.clamp(-limit, limit) / limit


def split_variance(output: Tensor, channels: int, variance_type: str | None) -> tuple[Tensor, Tensor | None]:
    """Separates the prediction from the variance that a network with learned variance appends to it in as many channels."""
    if output.shape[1] == channels:
        return output, None
    if output.shape[1] == 2 * channels and variance_type in ("learned", "learned_range"):
        return output[:, :channels], output[:, channels:]
    found = f"model_output has {output.shape[1]} channels for a sample of {channels} with variance_type={variance_type!r}"
    raise ValueError(f"{found}; if half of them are a variance, set variance_type='learned_range' or cut model_output in half")


def wide(sample: Tensor) -> Tensor:
    """Returns the sample in at least float32, in which all solvers calculate."""
    return sample.float() if sample.dtype in (torch.bfloat16, torch.float16) else sample
