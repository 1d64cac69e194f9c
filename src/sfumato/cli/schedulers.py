"""``sfumato schedulers``: the sampling algorithms, and the names that other programs have for them."""

from __future__ import annotations

from typing import Annotated, NamedTuple

import typer
from rich.console import Console
from rich.table import Table

from .. import registry
from ..errors import did_you_mean

EXAMPLES = """
[bold]Examples[/bold]

sfumato schedulers

sfumato schedulers UniPC

sfumato generate "a red apple" --scheduler "DPM++ 2M Karras"
"""

console = Console()


class About(NamedTuple):
    """What to know of an algorithm before choosing it."""

    order: str
    kind: str
    steps: str


# The order of convergence, what is solved, and the steps that give good pictures.
ABOUT: dict[str, About] = {
    "DDPM": About("1", "ancestral, on training steps", "250-1000"),
    "DDPMParallel": About("1", "ancestral, many times at once", "250-1000"),
    "DDIM": About("1", "ODE, with eta SDE", "30-100"),
    "DDIMParallel": About("1", "ODE, many times at once", "30-100"),
    "DDIMInverse": About("1", "ODE, from picture to noise", "50-100"),
    "PNDM": About("2-4", "multistep ODE", "30-50"),
    "IPNDM": About("4", "multistep ODE", "30-50"),
    "LMSDiscrete": About("1-4", "multistep ODE", "25-50"),
    "EulerDiscrete": About("1", "ODE, with churn SDE", "25-50"),
    "EulerAncestralDiscrete": About("1", "ancestral", "25-50"),
    "HeunDiscrete": About("2", "ODE, 2 evaluations a step", "10-25"),
    "KDPM2Discrete": About("2", "ODE, 2 evaluations a step", "10-25"),
    "KDPM2AncestralDiscrete": About("1", "ancestral, 2 evaluations a step", "10-25"),
    "DPMSolverSDE": About("1", "SDE, 2 evaluations a step", "10-25"),
    "DPMSolverMultistep": About("1-2", "multistep ODE or SDE", "15-30"),
    "DPMSolverMultistepInverse": About("1-2", "multistep ODE, from picture to noise", "25-50"),
    "DPMSolverSinglestep": About("1-3", "ODE or SDE", "20-30"),
    "DEISMultistep": About("1-3", "multistep ODE", "15-30"),
    "UniPCMultistep": About("1-4", "predictor-corrector ODE", "8-20"),
    "SASolver": About("1-4", "predictor-corrector SDE", "20-50"),
    "EDMEuler": About("1", "ODE, with churn SDE; EDM models", "25-50"),
    "EDMDPMSolverMultistep": About("1-2", "multistep ODE or SDE; EDM models", "15-30"),
    "CosineDPMSolverMultistep": About("1-2", "multistep SDE; Stable Audio", "50-100"),
    "FlowMatchEulerDiscrete": About("1", "ODE; flow models", "20-50"),
    "FlowMatchHeunDiscrete": About("2", "ODE, 2 evaluations a step; flow models", "10-25"),
    "FlowMatchLCM": About("1", "consistency; distilled flow models", "2-8"),
    "LTXEulerAncestralRF": About("1", "ancestral; flow models", "20-50"),
    "LCM": About("1", "consistency; distilled models", "2-8"),
    "TCD": About("1", "consistency; distilled models", "2-8"),
    "CMStochasticIterative": About("1", "consistency models", "1-4"),
    "SCM": About("1", "consistency; TrigFlow models", "1-4"),
    "ConsistencyDecoder": About("1", "consistency decoder", "2"),
    "KarrasVe": About("2", "SDE; the caller steps", "50"),
    "ScoreSdeVe": About("1", "SDE with corrector; score models", "1000-2000"),
    "ScoreSdeVp": About("1", "SDE; score models", "1000"),
    "RePaint": About("1", "inpainting by resampling", "250"),
    "UnCLIP": About("1", "ancestral; DALL-E 2 kind", "25-50"),
    "DDPMWuerstchen": About("1", "ancestral; Wuerstchen, Stable Cascade", "10-60"),
    "CogVideoXDDIM": About("1", "ODE; CogVideoX", "50"),
    "CogVideoXDPM": About("2", "multistep SDE; CogVideoX", "50"),
    "VQDiffusion": About("-", "tokens, replaced and masked", "100"),
    "Amused": About("-", "tokens, masked", "12"),
}


def schedulers(
    search: Annotated[str, typer.Argument(help="Show those whose class or other name contains this.", show_default=False)] = "",
) -> None:
    """List the sampling algorithms: order, kind, good numbers of steps, and what other programs call them.

    The class name (with or without "Scheduler") or any of the other names goes into `sfumato generate --scheduler`.
    """
    from ..schedulers.names import SAMPLERS, SPACINGS

    table = Table(box=None, header_style="bold")
    for title in ("Scheduler", "Order", "Kind", "Steps", "Other names"):
        table.add_column(title, no_wrap=title in ("Scheduler", "Steps"))
    shown = 0
    for name in registry.PUBLIC:
        short = name.removesuffix("Scheduler")
        if short not in ABOUT:
            continue
        aliases = ", ".join(alias for alias, (target, _) in SAMPLERS.items() if target == name)
        if search.lower() in f"{name} {aliases}".lower():
            table.add_row(short, *ABOUT[short], aliases)
            shown += 1
    if not shown:
        raise typer.BadParameter(f"no scheduler contains {search!r}{did_you_mean(search, [*ABOUT, *SAMPLERS])}")
    console.print(table)
    console.print(f"\nAfter another name may stand a spacing: {', '.join(SPACINGS)} (dpmpp_2m_karras, 'DPM++ 2M Karras').")
