"""Random numbers that come from given generators and nowhere else: the global random state is neither read nor changed."""

from __future__ import annotations

import os
from collections.abc import Callable, Sequence

import torch

Generators = torch.Generator | list[torch.Generator] | None
"""Where noise comes from: one generator for a whole batch, one generator per sample, or ``None`` for fresh entropy."""


def randn(
    shape: Sequence[int],
    *,
    generator: Generators = None,
    device: torch.device | str | None = None,
    dtype: torch.dtype | None = None,
    layout: torch.layout | None = None,
) -> torch.Tensor:
    """Draws standard normal noise.

    A CPU generator draws on the CPU and the result is moved, so a seed gives the same noise on every device.

    Args:
        shape: Of the result; the first dimension is the batch.
        generator: One generator, or a list with one per sample (each draws its own ``(1, ...)``; a list of one draws the whole
            batch). ``None`` draws from a generator seeded by the operating system.
        device: Where the result lies (default CPU).
        dtype: Of the draw and of the result; ``layout`` likewise. The defaults are torch's.

    Raises:
        ValueError: The list's length is not the batch size, or a generator's device can serve neither the CPU nor ``device``.
    """
    layout = layout or torch.strided
    return _draw(lambda s, g: torch.randn(s, generator=g, device=g.device, dtype=dtype, layout=layout), shape, generator, device)


def rand(shape: Sequence[int], *, generator: Generators = None, device: torch.device | str | None = None) -> torch.Tensor:
    """Draws float32 numbers uniform in 0..1; arguments and errors as of :func:`randn`."""
    return _draw(lambda s, g: torch.rand(s, generator=g, device=g.device), shape, generator, device)


def categorical(probabilities: torch.Tensor, *, generator: Generators = None) -> torch.Tensor:
    """Draws the classes of ``probabilities``, ``(B, N, classes)``, as int64 ``(B, N)``; errors as of :func:`randn`."""
    rest = iter(probabilities.split(1) if isinstance(generator, (list, tuple)) and len(generator) > 1 else [probabilities])

    def draw(shape: tuple[int, ...], source: torch.Generator) -> torch.Tensor:
        p = next(rest).flatten(0, 1).to(source.device)
        if source.device.type != "cpu":
            return torch.multinomial(p, 1, generator=source).view(shape)
        if not p.sum().isfinite():
            raise ValueError("probabilities are not finite: look for NaN or infinite logits in the model's output")
        return torch.cat([_categorical(rows, source) for rows in p.split(32)]).view(shape)  # pieces that stay in the cache

    return _draw(draw, probabilities.shape[:2], generator, probabilities.device)


def _categorical(probabilities: torch.Tensor, source: torch.Generator) -> torch.Tensor:
    """Draws a class per row, twice as fast as and equal to torch's multinomial, which takes its logarithms one by one.

    It is the largest of ``p / e``, where ``e`` are exponential, ``-log(1 - u)``, that is the smallest of ``p / log(1 - u)``.
    """
    uniform = torch.empty(probabilities.shape, dtype=torch.float64).uniform_(generator=source)
    return (probabilities / uniform.neg_().log1p_().to(probabilities.dtype)).argmin(-1)


def _draw(
    draw: Callable[[tuple[int, ...], torch.Generator], torch.Tensor], shape: Sequence[int], generator: Generators,
    device: torch.device | str | None,
) -> torch.Tensor:  # fmt: skip
    """Draws ``shape`` from one generator, or sample by sample from a list, and brings the result to ``device``."""
    place = torch.device(device or "cpu")
    if isinstance(generator, (list, tuple)) and len(generator) == 1:
        generator = generator[0]
    if isinstance(generator, (list, tuple)):
        if len(generator) != shape[0]:
            raise ValueError(f"generator has {len(generator)} entries for a batch of {shape[0]}: pass one generator per sample")
        return torch.cat([_draw(draw, (1, *shape[1:]), g, place) for g in generator])
    if generator is None:
        generator = torch.Generator().manual_seed(int.from_bytes(os.urandom(8), "little") >> 1)
    source = generator.device
    if source.type not in ("cpu", place.type):
        raise ValueError(f"a generator on {source} cannot draw for device {place}: use a CPU generator or one on {place.type}")
    return draw(tuple(shape), generator).to(place)
