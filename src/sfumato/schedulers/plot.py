"""Drawing a schedule: how noisy each step is, and where it lies in the training's time."""

from __future__ import annotations

from typing import TYPE_CHECKING

from .base import LevelScheduler, SchedulerMixin

if TYPE_CHECKING:
    from matplotlib.figure import Figure


def plot(scheduler: SchedulerMixin) -> Figure:
    """Draws the noise levels (sigma over alpha), the log signal-to-noise ratio and the timesteps of the current schedule.

    The figure has three panels over the run's steps; ``figure.savefig("schedule.png")`` writes it.

    Raises:
        TypeError: The scheduler's levels are no mixtures of the clean sample and noise.
        ImportError: matplotlib is not installed.
    """
    if not isinstance(scheduler, LevelScheduler):
        raise TypeError(f"{type(scheduler).__name__} has no levels of signal and noise to plot: choose a scheduler on noise levels")
    try:
        from matplotlib.figure import Figure
    except ImportError as error:
        raise ImportError("scheduler.plot() needs matplotlib: pip install 'sfumato[plot]'") from error
    signal, noise = scheduler.fresh()._levels(scheduler.timesteps.cpu())  # where nothing is left of either, there is a gap
    ratio = noise.double() / signal.double()
    panels = {"sigma": ratio, "log SNR": -2 * ratio.log(), "timestep": scheduler.timesteps.cpu().double()}
    figure = Figure(figsize=(12, 3.5), layout="constrained")
    figure.suptitle(f"{type(scheduler).__name__}, {len(ratio)} steps")
    for axes, (label, values) in zip(figure.subplots(1, 3), panels.items(), strict=True):
        axes.plot(range(len(ratio)), values.masked_fill(~values.isfinite(), float("nan")).tolist(), marker=".")
        axes.set(xlabel="step", ylabel=label, yscale="log" if label == "sigma" else "linear")
    return figure
