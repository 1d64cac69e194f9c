"""``python -m benchmarks.run [CASE ...]``: measures both libraries turn by turn and prints medians and ratios.

Within a case the two libraries alternate, so that a machine that drifts drifts for both. Process cases start a fresh interpreter
each time; the others share one process, the same weights and one warm-up each. A ratio below 1 means that Sfumato is faster or
smaller. ``--write`` puts the tables into ``benchmarks/RESULTS.md``.
"""

from __future__ import annotations

import argparse
import inspect
import json
import os
import platform
import re
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from .measure import Row, alternate, ours_of, seconds
from .schedulers import case_schedulers
from .training import case_training
from .transformers import case_sdxl, case_transformers

RESULTS = Path(__file__).parent / "RESULTS.md"
LIBRARIES = ("diffusers", "sfumato")


def process(code: str) -> dict[str, float]:
    """Runs code in a fresh interpreter; its wall time in seconds and its peak memory in MB."""
    # not getrusage, whose peak a child inherits from this process
    measure = f"import re\n{code}\nprint('PEAK', re.search(r'VmHWM:\\s+(\\d+)', open('/proc/self/status').read())[1])"
    environment = {**os.environ, "HF_HUB_OFFLINE": "1", "TQDM_DISABLE": "1"}
    start = time.perf_counter()
    done = subprocess.run(
        [sys.executable, "-W", "ignore", "-c", measure], capture_output=True, text=True, env=environment, check=False
    )
    elapsed = time.perf_counter() - start
    if done.returncode:
        raise RuntimeError(done.stderr)
    return {"time": elapsed, "peak": int(re.findall(r"PEAK (\d+)", done.stdout)[-1]) / 1000}


def processes(code: str, runs: int) -> tuple[dict[str, float], dict[str, float]]:
    """Medians of time and peak memory of ``code`` (with ``{library}`` in it) for both libraries."""
    peaks: dict[str, list[float]] = {name: [] for name in LIBRARIES}

    def once(library: str) -> float:
        found = process(code.replace("{library}", library))
        peaks[library].append(found["peak"])
        return found["time"]

    times = alternate({name: lambda name=name: once(name) for name in LIBRARIES}, runs)
    return times, {name: statistics.median(values) for name, values in peaks.items()}


def case_import(runs: int) -> Iterator[Row]:
    """Process start to the first pipeline class."""
    times, peaks = processes("import {library}; {library}.StableDiffusionPipeline", runs)
    yield "import and first pipeline class", "s", times["diffusers"], times["sfumato"]
    yield "peak memory of it", "MB", peaks["diffusers"], peaks["sfumato"]


def sd15(folder: Path) -> Path:
    """Writes a random checkpoint of Stable Diffusion 1.5's size, 4.3 GB, once."""
    import diffusers
    import torch
    import transformers

    target = folder / "sd15-random"
    if (target / "model_index.json").exists():
        return target
    sys.path.insert(0, str(Path(__file__).parents[1] / "tests"))
    import tiny

    words = tiny.tokenizer(folder / "tokenizer")
    text = transformers.CLIPTextConfig(
        vocab_size=49408, hidden_size=768, intermediate_size=3072, num_hidden_layers=12, num_attention_heads=12, projection_dim=768
    )
    pipe = diffusers.StableDiffusionPipeline(
        unet=sd15_unet(),
        vae=sd_vae(),
        text_encoder=transformers.CLIPTextModel(text),
        tokenizer=words,
        scheduler=diffusers.PNDMScheduler(
            beta_start=0.00085, beta_end=0.012, beta_schedule="scaled_linear", skip_prk_steps=True, steps_offset=1
        ),
        safety_checker=None,
        feature_extractor=None,
        requires_safety_checker=False,
    )
    assert sum(p.numel() for p in pipe.unet.parameters()) == 859_520_964
    with torch.no_grad():
        pipe.save_pretrained(target)
    return target


def sd15_unet() -> Any:
    """The reference's U-Net at Stable Diffusion 1.5's size, random weights."""
    import diffusers

    return diffusers.UNet2DConditionModel(sample_size=64, cross_attention_dim=768, attention_head_dim=8).eval()


def sd_vae() -> Any:
    """The reference's autoencoder at Stable Diffusion's size, random weights."""
    import diffusers

    blocks = {"down_block_types": ("DownEncoderBlock2D",) * 4, "up_block_types": ("UpDecoderBlock2D",) * 4}
    return diffusers.AutoencoderKL(block_out_channels=(128, 256, 512, 512), layers_per_block=2, sample_size=512, **blocks).eval()


def case_load(runs: int) -> Iterator[Row]:
    """Process start to a loaded pipeline of Stable Diffusion 1.5's size, float32."""
    folder = Path(os.environ.get("SFUMATO_BENCH_CACHE", tempfile.gettempdir())) / "sfumato-bench"
    folder.mkdir(exist_ok=True)
    path = sd15(folder)
    code = f"import {{library}}; {{library}}.StableDiffusionPipeline.from_pretrained({str(path)!r}, safety_checker=None)"
    times, peaks = processes(code, runs)
    yield "process start to loaded SD-1.5-size pipeline", "s", times["diffusers"], times["sfumato"]
    yield "peak memory of it", "MB", peaks["diffusers"], peaks["sfumato"]
    touch = f"import {{library}}; p = {{library}}.StableDiffusionPipeline.from_pretrained({str(path)!r}, safety_checker=None)\n"
    touch += "for m in (p.unet, p.vae, p.text_encoder):\n    for t in m.state_dict().values(): t.sum()"
    times, peaks = processes(touch, runs)
    yield "the same with every weight read once", "s", times["diffusers"], times["sfumato"]
    yield "peak memory of it", "MB", peaks["diffusers"], peaks["sfumato"]


def case_unet(runs: int) -> Iterator[Row]:
    """One forward of the U-Net at Stable Diffusion 1.5's size."""
    import torch

    reference = sd15_unet()
    ours = ours_of(reference)
    for dtype in (torch.float32, torch.bfloat16):
        reference.to(dtype), ours.to(dtype)
        for side in (32, 64):
            x, t, states = torch.randn(2, 4, side, side, dtype=dtype), torch.tensor(500), torch.randn(2, 77, 768, dtype=dtype)

            def forward(model: Any, x: Any = x, t: Any = t, states: Any = states) -> float:
                with torch.no_grad():
                    return seconds(lambda: model(x, t, states))

            found = alternate({"diffusers": lambda f=forward: f(reference), "sfumato": lambda f=forward: f(ours)}, runs)
            yield f"U-Net forward 2x4x{side}x{side} {str(dtype)[6:]}", "s", found["diffusers"], found["sfumato"]


def case_vae(runs: int) -> Iterator[Row]:
    """One decode of Stable Diffusion's autoencoder."""
    import torch

    reference = sd_vae()
    ours = ours_of(reference)
    for dtype in (torch.float32, torch.bfloat16):
        reference.to(dtype), ours.to(dtype)
        for side in (256, 512):
            x = torch.randn(1, 4, side // 8, side // 8, dtype=dtype)

            def decode(model: Any, x: Any = x) -> float:
                with torch.no_grad():
                    return seconds(lambda: model.decode(x))

            found = alternate({"diffusers": lambda d=decode: d(reference), "sfumato": lambda d=decode: d(ours)}, runs)
            yield f"VAE decode {side} px {str(dtype)[6:]}", "s", found["diffusers"], found["sfumato"]


def tiny_pipelines() -> dict[str, Any]:
    """A tiny pipeline in both libraries, the same weights."""
    import sfumato

    sys.path.insert(0, str(Path(__file__).parents[1] / "tests"))
    import tiny

    folder = Path(tempfile.mkdtemp()) / "StableDiffusionPipeline"
    reference = tiny.build("StableDiffusionPipeline", folder)
    ours = sfumato.StableDiffusionPipeline.from_pretrained(folder)
    for pipe in (reference, ours):
        pipe.set_progress_bar_config(disable=True)
    return {"diffusers": reference, "sfumato": ours}


def case_step(runs: int) -> Iterator[Row]:
    """The library's own cost per step: a tiny network on 8x8 latents, 50 steps, by each scheduler."""
    import torch

    import sfumato

    pipes = tiny_pipelines()
    for name in ("DDIMScheduler", "EulerDiscreteScheduler", "DPMSolverMultistepScheduler", "PNDMScheduler"):
        for library, pipe in pipes.items():
            schedulers = sfumato if library == "sfumato" else __import__("diffusers")
            pipe.scheduler = getattr(schedulers, name).from_config(pipe.scheduler.config)

        def call(pipe: Any) -> float:
            generator = torch.Generator().manual_seed(0)
            return (
                seconds(lambda: pipe("a red cat", 16, 16, num_inference_steps=50, generator=generator, output_type="latent"))
                / 50
                * 1000
            )

        found = alternate({library: lambda p=pipe: call(p) for library, pipe in pipes.items()}, runs)
        yield f"one step of a tiny network, {name}", "ms", found["diffusers"], found["sfumato"]


def case_call(runs: int) -> Iterator[Row]:
    """A whole call on a tiny network, 8x8 latents: 50 steps, decoded to PIL."""
    import torch

    pipes = tiny_pipelines()

    def call(pipe: Any) -> float:
        generator = torch.Generator().manual_seed(0)
        return seconds(lambda: pipe("a red cat", 16, 16, num_inference_steps=50, generator=generator))

    found = alternate({library: lambda p=pipe: call(p) for library, pipe in pipes.items()}, runs)
    yield "a whole call on a tiny network, 50 steps", "s", found["diffusers"], found["sfumato"]


CASES: dict[str, Callable[[int], Iterator[Row]]] = {
    "import": case_import, "load": case_load, "unet": case_unet, "vae": case_vae, "step": case_step, "call": case_call,
    "sdxl": case_sdxl, "transformers": case_transformers, "training": case_training, "schedulers": case_schedulers,
}  # fmt: skip


def machine() -> str:
    """What the figures were measured on."""
    import torch

    lines = Path("/proc/cpuinfo").read_text().splitlines() if Path("/proc/cpuinfo").exists() else []
    cpu = next((line.split(":")[1].strip() for line in lines if line.startswith("model name")), platform.processor())
    software = f"torch {torch.__version__}, Python {platform.python_version()}"
    return f"{cpu}, {os.cpu_count()} cores, {torch.get_num_threads()} threads, {software}"


def section(name: str, rows: list[Row], runs: int) -> str:
    """The table of a case."""
    lines, floor = [f"## {name}", "", f"{inspect.getdoc(CASES[name])} Median of {runs}.", ""], any(len(row) > 4 for row in rows)
    lines += ["| what | unit | diffusers | sfumato | ratio |" + " floor |" * floor, "|---|---|---:|---:|---:|" + "---:|" * floor]
    for what, unit, theirs, ours, *floors in rows:
        shares = "".join(f" {share:.2f} |" for share in (ours / theirs, *floors))
        lines.append(f"| {what} | {unit} | {theirs:.3g} | {ours:.3g} |{shares}")
    return "\n".join(lines) + "\n"


def store(name: str, text: str) -> None:
    """Replaces the section of a case in the results file."""
    old = RESULTS.read_text() if RESULTS.exists() else "# Results\n"
    pattern = re.compile(rf"^## {name}\n.*?(?=^## |\Z)", re.DOTALL | re.MULTILINE)
    new = pattern.sub(lambda _: text + "\n", old) if pattern.search(old) else old.rstrip() + "\n\n" + text
    RESULTS.write_text(new.rstrip() + "\n")


def main() -> None:
    """Runs the cases that are named, or all."""
    parser = argparse.ArgumentParser(
        prog="benchmarks.run", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("cases", nargs="*", metavar="CASE", help=f"of {', '.join(CASES)}; all without it")
    parser.add_argument("--runs", type=int, default=5, help="counted turns of each library (default 5)")
    parser.add_argument("--write", action="store_true", help="put the tables into benchmarks/RESULTS.md")
    parser.add_argument("--json", action="store_true", help="print rows as JSON lines instead")
    options = parser.parse_args()
    unknown = [c for c in options.cases if c not in CASES]
    if unknown:
        parser.error(f"no case {unknown[0]!r}: choose from {', '.join(CASES)}")
    print(machine(), file=sys.stderr)
    for name in options.cases or CASES:
        rows = list(CASES[name](options.runs))
        text = "\n".join(json.dumps(r) for r in rows) if options.json else section(name, rows, options.runs)
        print(text, flush=True)
        if options.write:
            store(name, section(name, rows, options.runs).replace("\n\n|", f"\n\n{machine()}\n\n|", 1))


if __name__ == "__main__":
    main()
