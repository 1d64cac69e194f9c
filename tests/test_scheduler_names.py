"""Names that other programs have for samplers, and the list on the command line."""

from __future__ import annotations

from typing import Any

import pytest
from typer.testing import CliRunner

import sfumato
from sfumato import registry
from sfumato.cli.main import app
from sfumato.cli.schedulers import ABOUT
from sfumato.schedulers.names import SAMPLERS, SPACINGS

SD = {"beta_start": 0.00085, "beta_end": 0.012, "beta_schedule": "scaled_linear", "use_exponential_sigmas": True}


@pytest.mark.parametrize(
    ("name", "class_name", "expected"),
    [
        ("dpmpp_2m_karras", "DPMSolverMultistepScheduler", {"use_karras_sigmas": True, "algorithm_type": "dpmsolver++"}),
        ("DPM++ 2M Karras", "DPMSolverMultistepScheduler", {"use_karras_sigmas": True, "use_exponential_sigmas": False}),
        ("DPM++ 2M SDE Exponential", "DPMSolverMultistepScheduler", {"algorithm_type": "sde-dpmsolver++"}),
        ("DPM++ 3M SDE", "DPMSolverMultistepScheduler", {"solver_order": 3, "use_exponential_sigmas": True}),
        ("DPM++ SDE Karras", "DPMSolverSDEScheduler", {"use_karras_sigmas": True}),
        ("Euler a", "EulerAncestralDiscreteScheduler", {}),
        ("sample_euler", "EulerDiscreteScheduler", {}),
        ("k_dpm_2_a", "KDPM2AncestralDiscreteScheduler", {}),
        ("DPM2 a Karras", "KDPM2AncestralDiscreteScheduler", {"use_karras_sigmas": True}),
        ("UniPC", "UniPCMultistepScheduler", {"solver_type": "bh1"}),
        ("PLMS", "PNDMScheduler", {"skip_prk_steps": True}),
        ("euler_sgm_uniform", "EulerDiscreteScheduler", {"timestep_spacing": "trailing"}),
        ("LMS beta", "LMSDiscreteScheduler", {"use_beta_sigmas": True}),
        ("HeunDiscrete", "HeunDiscreteScheduler", {}),
        ("DDIMScheduler", "DDIMScheduler", {}),
    ],
)
def test_names_of_other_programs(name: str, class_name: str, expected: dict[str, Any]) -> None:
    scheduler = sfumato.Scheduler.from_name(name, SD)
    assert type(scheduler).__name__ == class_name
    assert scheduler.config["beta_start"] == 0.00085
    assert {key: scheduler.config[key] for key in expected} == expected
    scheduler.set_timesteps(10)


@pytest.mark.parametrize("name", SAMPLERS)
def test_every_name_builds(name: str) -> None:
    for spacing in ("", *SPACINGS):
        target = getattr(sfumato, SAMPLERS[name][0])
        if spacing and not set(SPACINGS[spacing]) <= set(target._init_parameters()):
            with pytest.raises(ValueError, match=f"{target.__name__} has no configuration key"):
                sfumato.Scheduler.from_name(f"{name}_{spacing}")
        else:
            assert isinstance(sfumato.Scheduler.from_name(f"{name}_{spacing}".rstrip("_")), target)


def test_overrides_take_precedence_and_unknown_names_are_answered() -> None:
    assert sfumato.Scheduler.from_name("dpmpp_2m", SD, solver_order=3).config["solver_order"] == 3
    with pytest.raises(ValueError, match=r"'dpmpp_2mm'; did you mean 'dpmpp_2m'.*karras"):
        sfumato.Scheduler.from_name("dpmpp_2mm")


def test_the_list_has_every_scheduler() -> None:
    public = {name.removesuffix("Scheduler") for name in registry.PUBLIC if name.endswith("Scheduler")} - {""}
    assert set(ABOUT) == public
    shown = CliRunner().invoke(app, ["schedulers"], env={"COLUMNS": "200"})
    assert shown.exit_code == 0 and all(name in shown.output for name in public)
    one = CliRunner().invoke(app, ["schedulers", "uni_pc"], env={"COLUMNS": "200"})
    assert "UniPCMultistep" in one.output and "Euler" not in one.output
    none = CliRunner().invoke(app, ["schedulers", "unipcc"], env={"COLUMNS": "200"})
    assert none.exit_code == 2 and "did you mean 'uni_pc'" in none.output
