"""Plots of schedules: what they show, and what they refuse."""

from __future__ import annotations

import math
import sys
from pathlib import Path

import pytest
import torch

import sfumato.schedulers as schedulers
from sfumato.schedulers.base import LevelScheduler

NAMES = [name for name in schedulers.__all__ if name.endswith("Scheduler") and name != "Scheduler"]

CONFIGS = {
    "VQDiffusionScheduler": {"num_vec_classes": 9},
    "AmusedScheduler": {"mask_token_id": 9},
    "PNDMScheduler": {"skip_prk_steps": True},
}


@pytest.mark.parametrize("name", NAMES)
def test_every_scheduler_plots_or_says_why_not(name: str) -> None:
    scheduler = getattr(schedulers, name)(**CONFIGS.get(name, {}))
    scheduler.set_timesteps(2)
    if isinstance(scheduler, LevelScheduler):
        sigma, log_snr, timestep = (axes.lines[0].get_ydata() for axes in scheduler.plot().axes)
        assert list(timestep) == scheduler.timesteps.tolist()
        for s, snr in zip(sigma, log_snr, strict=True):
            assert math.isnan(s) or snr == pytest.approx(-2 * math.log(s)) or s == 0
    else:
        with pytest.raises(TypeError, match=f"{name} has no levels"):
            scheduler.plot()


def test_panels_show_the_run(tmp_path: Path) -> None:
    scheduler = schedulers.EulerDiscreteScheduler(use_karras_sigmas=True)
    scheduler.set_timesteps(12)
    for t in scheduler.timesteps[:3]:
        scheduler.step(torch.zeros(1, 4, 4, 4), t, torch.zeros(1, 4, 4, 4))
    figure = scheduler.plot()
    assert figure.axes[0].lines[0].get_ydata() == pytest.approx(scheduler.sigmas[:-1].tolist(), rel=1e-6)
    assert scheduler.step_index == 3  # a run goes on undisturbed
    figure.savefig(tmp_path / "schedule.png")
    assert (tmp_path / "schedule.png").read_bytes().startswith(b"\x89PNG")


def test_without_matplotlib_the_extra_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "matplotlib.figure", None)
    with pytest.raises(ImportError, match=r"sfumato\[plot\]"):
        schedulers.DDIMScheduler().plot()
