"""Sampling algorithms."""

from .base import KarrasDiffusionSchedulers, SchedulerMixin, SchedulerOutput
from .discrete import DDIMScheduler, DDPMScheduler, PNDMScheduler
from .dpm import DPMSolverMultistepScheduler
from .euler import EulerAncestralDiscreteScheduler, EulerDiscreteScheduler

__all__ = [
    "DDIMScheduler", "DDPMScheduler", "DPMSolverMultistepScheduler", "EulerAncestralDiscreteScheduler", "EulerDiscreteScheduler",
    "KarrasDiffusionSchedulers", "PNDMScheduler", "SchedulerMixin", "SchedulerOutput",
]  # fmt: skip
