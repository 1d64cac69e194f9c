"""The names that other programs have for samplers: k-diffusion's, ComfyUI's and AUTOMATIC1111's."""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from .. import registry
from ..errors import did_you_mean

if TYPE_CHECKING:
    from .base import SchedulerMixin

SDE = {"algorithm_type": "sde-dpmsolver++"}
SAMPLERS: dict[str, tuple[str, dict[str, Any]]] = {
    "euler": ("EulerDiscreteScheduler", {}),
    "euler_ancestral": ("EulerAncestralDiscreteScheduler", {}),
    "heun": ("HeunDiscreteScheduler", {}),
    "dpm_2": ("KDPM2DiscreteScheduler", {}),
    "dpm_2_ancestral": ("KDPM2AncestralDiscreteScheduler", {}),
    "lms": ("LMSDiscreteScheduler", {}),
    "dpmpp_sde": ("DPMSolverSDEScheduler", {}),
    "dpmpp_2m": ("DPMSolverMultistepScheduler", {"algorithm_type": "dpmsolver++", "solver_order": 2}),
    "dpmpp_2m_sde": ("DPMSolverMultistepScheduler", {**SDE, "solver_order": 2}),
    "dpmpp_2m_sde_heun": ("DPMSolverMultistepScheduler", {**SDE, "solver_order": 2, "solver_type": "heun"}),
    "dpmpp_3m_sde": ("DPMSolverMultistepScheduler", {**SDE, "solver_order": 3}),
    "dpmpp_2s": ("DPMSolverSinglestepScheduler", {"algorithm_type": "dpmsolver++", "solver_order": 2}),
    "uni_pc": ("UniPCMultistepScheduler", {"solver_type": "bh1"}),
    "uni_pc_bh2": ("UniPCMultistepScheduler", {"solver_type": "bh2"}),
    "deis": ("DEISMultistepScheduler", {"solver_order": 3}),
    "ipndm": ("IPNDMScheduler", {}),
    "sa_solver": ("SASolverScheduler", {}),
    "ddim": ("DDIMScheduler", {}),
    "ddpm": ("DDPMScheduler", {}),
    "plms": ("PNDMScheduler", {"skip_prk_steps": True}),
    "lcm": ("LCMScheduler", {}),
    "tcd": ("TCDScheduler", {}),
}
RAMPS = ("use_karras_sigmas", "use_exponential_sigmas", "use_beta_sigmas")
SPACINGS: dict[str, dict[str, Any]] = {
    "karras": {"use_karras_sigmas": True},
    "exponential": {"use_exponential_sigmas": True},
    "beta": {"use_beta_sigmas": True},
    "normal": {"timestep_spacing": "linspace"},
    "sgm_uniform": {"timestep_spacing": "trailing"},
    "ddim_uniform": {"timestep_spacing": "leading"},
}


def from_name(name: str, config: Mapping[str, Any] | None = None, **overrides: Any) -> SchedulerMixin:
    """Builds the scheduler that k-diffusion, ComfyUI or AUTOMATIC1111 calls ``name``: ``"DPM++ 2M Karras"``, ``"euler_a"``.

    ``name`` is a sampler and, after it, a spacing of its levels, spelled freely (``dpmpp_2m_karras``), or a class name. The
    configuration is ``config``, ``pipe.scheduler.config`` say, with ``overrides``. A ValueError lists the names that there are.
    """
    own = f"{name.removesuffix('Scheduler')}Scheduler"
    if own in registry.PUBLIC:
        return registry.load(own).from_config(config or {}, **overrides)
    words = re.sub(r"[\s-]+", "_", name.strip().lower().replace("++", "pp"))
    words = re.sub(r"^(sample|k)_", "", words).replace("unipc", "uni_pc").replace("dpm2", "dpm_2")
    spacing = next((s for s in SPACINGS if words.endswith(f"_{s}")), None)
    sampler = re.sub(r"_a$", "_ancestral", words.removesuffix(f"_{spacing}"))
    if sampler not in SAMPLERS:
        classes = [c.removesuffix("Scheduler") for c in registry.PUBLIC if c.endswith("Scheduler")]
        near = did_you_mean(name, [*SAMPLERS, *classes]) or did_you_mean(sampler, SAMPLERS)
        known = f"the samplers are {', '.join(SAMPLERS)}, with the spacings {', '.join(SPACINGS)}"
        raise ValueError(f"no scheduler is known as {name!r}{near}; {known}")
    class_name, chosen = SAMPLERS[sampler]
    cls = registry.load(class_name)
    if spacing is not None:  # in place of the one that the configuration has
        others = {key: False for key in RAMPS if key in cls._init_parameters()}
        chosen = {**others, **chosen, **SPACINGS[spacing]}
    return cls.from_config(config or {}, **{**chosen, **overrides})
