"""``sfumato generate``: the pipelines from the command line."""

from __future__ import annotations

import re
import secrets
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.console import Console

from ..errors import SfumatoError
from ..hub import EMBEDDED_MODEL

EXAMPLES = """
[bold]Examples[/bold]

sfumato generate "a red apple"

sfumato generate "red apple, 3d style" --count 4 --seed 7 --out apples/

sfumato generate "a castle at dawn" --model stable-diffusion-v1-5/stable-diffusion-v1-5 --size 512x768 --steps 25

sfumato generate "a castle in winter" --model ./my-model --image castle.png --strength 0.6

sfumato generate "a red door" --model ./my-model --image house.png --mask door.png --scheduler EulerDiscreteScheduler
"""

console = Console(stderr=True)


def generate(
    prompt: Annotated[str, typer.Argument(help="What the picture shows.", show_default=False)],
    model: Annotated[str | None, typer.Option("--model", "-m", help="Folder or hub repository. Default: embedded model.")] = None,
    steps: Annotated[int | None, typer.Option("--steps", "-n", min=1, help="Denoising steps.")] = None,
    guidance: Annotated[float | None, typer.Option("--guidance", "-g", help="Guidance scale: weight of the prompt.")] = None,
    seed: Annotated[int | None, typer.Option("--seed", "-s", help="Seed; picture k uses seed + k. Default: random.")] = None,
    size: Annotated[str | None, typer.Option(help="WIDTHxHEIGHT in pixels, or one number for a square.")] = None,
    count: Annotated[int, typer.Option("--count", "-c", min=1, help="Number of pictures.")] = 1,
    scheduler: Annotated[str | None, typer.Option(help="See `sfumato schedulers`; 'DPM++ 2M Karras', say.")] = None,
    negative: Annotated[str | None, typer.Option(help="What the picture shall not show.")] = None,
    image: Annotated[str | None, typer.Option(help="Picture to start from (path or URL).")] = None,
    mask: Annotated[str | None, typer.Option(help="Mask for inpainting: white is painted anew (path or URL).")] = None,
    strength: Annotated[float | None, typer.Option(min=0, max=1, help="How far to leave the given picture.")] = None,
    weighted: Annotated[bool, typer.Option("--weighted", help="Read (word:1.3), \\[word] and BREAK; no length limit.")] = False,
    device: Annotated[str | None, typer.Option(help="Device, such as cuda. Without it: the fastest there is.")] = None,
    dtype: Annotated[str | None, typer.Option(help="float32, float16 or bfloat16. Default: float32 on CPU, else float16.")] = None,
    revision: Annotated[str | None, typer.Option(help="Branch, tag or commit of the hub repository.")] = None,
    variant: Annotated[str | None, typer.Option(help="File variant of the repository, such as fp16.")] = None,
    out: Annotated[Path | None, typer.Option("--out", "-o", help="File (.png) or folder. Default: by prompt and seed.")] = None,
) -> None:
    """Makes pictures from text, and from a picture where one is given. Each PNG carries its recipe: `sfumato info PICTURE.png`."""
    if mask and not image:
        raise typer.BadParameter("a mask needs the picture it belongs to: add --image", param_hint="--mask")
    if strength is not None and not image:
        raise typer.BadParameter("strength applies to a given picture: add --image", param_hint="--strength")
    options: dict[str, Any] = {"num_inference_steps": steps, "guidance_scale": guidance, "negative_prompt": negative}
    options |= {"strength": strength, "prompt_syntax": "weighted" if weighted else None}
    if size:
        options["width"], options["height"] = parse_size(size)
    base_seed = secrets.randbelow(2**32) if seed is None else seed
    try:
        target(out, prompt, base_seed, 0, count)  # refuses a wrong name before the work
        task = "Inpainting" if mask else "Image2Image" if image else "Text2Image"
        pipe = load(model, task, scheduler, device, dtype, revision=revision, variant=variant)
        defaults = embedded_defaults() if model is None else {}
        arguments = {**defaults, **{k: v for k, v in options.items() if v is not None}}
        recipe = {"prompt": prompt, "model": model or "embedded", "revision": revision, **arguments, "image": image, "mask": mask}
        pictures = run(pipe, prompt, arguments, image, mask, base_seed, count)
        written = write(pictures, pipe, recipe, base_seed, out, prompt)
    except (SfumatoError, ValueError, TypeError, OSError, ArithmeticError, RuntimeError) as error:
        console.print(f"[red]error:[/red] {error}", highlight=False, soft_wrap=True)
        raise typer.Exit(1) from None
    for path in written:
        typer.echo(path)


def parse_size(text: str) -> tuple[int, int]:
    """``"512x768"`` -> (512, 768); ``"512"`` -> (512, 512)."""
    match = re.fullmatch(r"(\d+)(?:[xX×](\d+))?", text.strip())
    if not match:
        raise typer.BadParameter(f"{text!r} is no size: expected WIDTHxHEIGHT, such as 512x768", param_hint="--size")
    return int(match[1]), int(match[2] or match[1])


def embedded_defaults() -> dict[str, Any]:
    """Call arguments that suit the embedded model."""
    return {"num_inference_steps": 25, "guidance_scale": 4.0}


def load(model: str | None, task: str, scheduler: str | None, device: str | None, dtype: str | None, **files: str | None) -> Any:
    """Loads the pipeline class for a task."""
    with console.status("loading"):
        import torch

        from .. import registry

        if device is None:
            device = "cuda" if torch.cuda.is_available() else "mps" if torch.backends.mps.is_available() else "cpu"
        if model is None:
            torch.set_num_threads(1)  # so small a network gains nothing from threads, and waits for them on a busy machine
        precision: Any = getattr(torch, dtype, dtype) if dtype else (torch.float32 if device == "cpu" else torch.float16)
        kind = registry.load(f"AutoPipelineFor{task}")
        pipe = kind.from_pretrained(model or EMBEDDED_MODEL, dtype=precision, device_map=device, **files)
        if scheduler:
            pipe.scheduler = registry.load("Scheduler").from_name(scheduler, pipe.scheduler.config)
    return pipe


def run(pipe: Any, prompt: str, arguments: dict[str, Any], image: str | None, mask: str | None, seed: int, count: int) -> list[Any]:
    """Makes the pictures; picture k depends on ``seed + k`` alone."""
    import torch

    from ..media.image import load_image

    pictures = {name: load_image(source) for name, source in (("image", image), ("mask_image", mask)) if source}
    generators = [torch.Generator().manual_seed(seed + k) for k in range(count)]
    pipe.set_progress_bar_config(desc="denoising", unit="step", leave=False)
    output = pipe(prompt=prompt, num_images_per_prompt=count, generator=generators, **pictures, **arguments)
    flags = getattr(output, "nsfw_content_detected", None)
    if flags and any(flags):
        console.print("[yellow]the model's safety checker blackened a picture; another seed or prompt may pass[/yellow]")
    return output.images


def write(pictures: list[Any], pipe: Any, recipe: dict[str, Any], seed: int, out: Path | None, prompt: str) -> list[Path]:
    """Saves the pictures, each with the recipe that makes it alone."""
    from .. import __version__
    from ..media.image import save_image

    written = []
    for k, picture in enumerate(pictures):
        path = target(out, prompt, seed + k, k, len(pictures))
        path.parent.mkdir(parents=True, exist_ok=True)
        own = {"sfumato": __version__, **recipe, "seed": seed + k, "size": f"{picture.width}x{picture.height}"}
        own |= {"pipeline": type(pipe).__name__, "scheduler": type(pipe.scheduler).__name__, "dtype": str(pipe.dtype)[6:]}
        save_image(picture, path, recipe=own)
        written.append(path)
    return written


def target(out: Path | None, prompt: str, seed: int, index: int, count: int) -> Path:
    """Where picture ``index`` of ``count`` goes."""
    slug = re.sub(r"[^a-z0-9]+", "-", prompt.lower()).strip("-")[:48] or "picture"
    if out is None or out.is_dir() or not out.suffix:
        return (out or Path()) / f"{slug}-{seed}.png"
    if out.suffix.lower() != ".png":
        raise ValueError(f"--out {out}: pictures are written as .png, which carries the recipe")
    return out if count == 1 else out.with_name(f"{out.stem}-{index}{out.suffix}")
