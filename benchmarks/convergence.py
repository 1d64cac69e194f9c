"""``python -m benchmarks.convergence``: draws the error of every deterministic solver against its evaluations of the network.

The data are a mixture of normal distributions, for which the perfect network and the exact result are known (``tests/mixture.py``).
The plot and the table of ``docs/schedulers.md`` are made by it (matplotlib: the extra ``plot``).
"""

from __future__ import annotations

import argparse
import math
import sys
from pathlib import Path

import torch

ROOT = Path(__file__).parents[1]
sys.path.insert(0, str(ROOT / "tests"))
COUNTS = (11, 17, 23, 35, 47, 71, 95, 143)
GROUPS = {
    "one evaluation a step": ("Euler", "DDIM", "EDM Euler", "Flow Euler", "LMS", "PNDM", "IPNDM", "CogVideoX"),
    "two and three evaluations a step": ("Heun", "KDPM2", "Flow Heun", "DPM++ singlestep", "DPM singlestep"),
    "multistep in log signal-to-noise": ("DPM++ multistep", "DPM multistep", "DEIS", "UniPC", "SA", "EDM DPM++"),
}


def measure() -> dict[str, tuple[float, list[float]]]:
    """Returns each solver's order and its errors at ``COUNTS``."""
    from convergence_cases import CASES, evaluations
    from mixture import error

    found = {}
    for name, case in CASES.items():
        if "inverse" in name:
            continue  # its error is in units of noise
        errors = []
        for count in COUNTS:
            scheduler = case.make(count)
            errors.append(error(scheduler, evaluations(scheduler, case.omit), **case.options))
        found[name] = case.order, errors
        print(f"{name}: " + " ".join(f"{e:.1e}" for e in errors), file=sys.stderr)
    return found


def draw(found: dict[str, tuple[float, list[float]]], path: Path) -> None:
    """Draws a panel for each group of solvers; the line's style tells the order."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(18, 7), layout="constrained")
    panels = figure.subplots(1, len(GROUPS), sharey=True)
    styles = {1: ":", 2: "--", 3: "-.", 4: "-"}
    for axes, (title, prefixes) in zip(panels, GROUPS.items(), strict=True):
        for name, (order, errors) in found.items():
            group = max((p for ps in GROUPS.values() for p in ps if name.startswith(p)), key=len)
            if group in prefixes:
                axes.loglog(COUNTS, errors, styles[int(order)], label=f"{name} ({order:g})", linewidth=1.3)
        axes.set(title=title, xlabel="evaluations of the network")
        axes.grid(alpha=0.3, which="both")
        axes.legend(fontsize=7, ncols=2, title="solver (order)")
    panels[0].set(ylabel="distance to the exact result")
    figure.savefig(path, dpi=80)


def table(found: dict[str, tuple[float, list[float]]]) -> str:
    """Writes the errors as a table."""
    shown = [COUNTS.index(c) for c in (11, 23, 47, 95)]
    lines = ["| solver | order | " + " | ".join(f"{COUNTS[i]}" for i in shown) + " |", "|---|---:" + "|---:" * len(shown) + "|"]
    lines += [f"| {n} | {o:g} | " + " | ".join(f"{e[i]:.1e}" for i in shown) + " |" for n, (o, e) in found.items()]
    return "\n".join(lines) + "\n"


def main() -> None:
    """Measures, draws, and puts the table into the documentation."""
    parser = argparse.ArgumentParser(prog="benchmarks.convergence", description=__doc__)
    parser.parse_args()
    torch.set_num_threads(1)
    found = measure()
    assert all(math.isfinite(e) for _, errors in found.values() for e in errors)
    draw(found, ROOT / "docs" / "convergence.png")
    page = ROOT / "docs" / "schedulers.md"
    head, _, rest = page.read_text().partition("<!-- errors -->\n")
    _, _, tail = rest.partition("<!-- end -->\n")
    page.write_text(f"{head}<!-- errors -->\n{table(found)}<!-- end -->\n{tail}")


if __name__ == "__main__":
    main()
