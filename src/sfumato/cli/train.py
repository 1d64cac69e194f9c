"""``sfumato train``: one command for each thing that can be trained; its flags are the keys of its settings."""

from __future__ import annotations

import dataclasses
import inspect
import logging
import types
import typing
from collections.abc import Callable
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.console import Console

from ..errors import SfumatoError
from ..training.settings import AutoencoderSettings, Settings, TextToImageSettings

TEXT_EXAMPLES = """
[bold]Examples[/bold]

sfumato train text-to-image --model stable-diffusion-v1-5/stable-diffusion-v1-5 --data ./pictures --out ./run --steps 2000

sfumato train text-to-image config.toml

sfumato train text-to-image config.toml --learning-rate 5e-5 --precision bf16 --out ./second

sfumato train text-to-image config.toml --resume --steps 20000

A configuration file holds the same keys, with _ for -, and tables for new networks:

  data = "./pictures"

  out = "./run"

  train_text_encoder = true

  \\[unet]

  block_out_channels = \\[64, 96, 160]
"""
AUTOENCODER_EXAMPLES = """
[bold]Examples[/bold]

sfumato train autoencoder config.toml

sfumato train autoencoder --vae ./vae --data ./pictures --out ./run --resolution 128 --steps 5000 --ema 0.999

sfumato train autoencoder config.toml --resume
"""

app = typer.Typer(no_args_is_help=True, rich_markup_mode="rich", help="Train a model; see docs/training.md. Needs the extra train.")


def command(settings: type[Settings], task: Callable[[], Any], text: str) -> Callable[..., None]:
    """A command whose flags are the keys of ``settings`` that are no tables."""

    def run(config: Path | None, **flags: Any) -> None:
        given = {k: v for k, v in flags.items() if v is not None and v != []}
        try:
            read = settings.read(config, **given)
            from ..training.loop import Trainer

            logging.getLogger("sfumato.training").setLevel(logging.INFO)
            logging.basicConfig(format="%(message)s")
            model = Trainer(task()(read), read).run()
        except (SfumatoError, ValueError, TypeError, OSError, ArithmeticError, RuntimeError, ImportError) as error:
            Console(stderr=True).print(f"[red]error:[/red] {error}", highlight=False, soft_wrap=True)
            raise typer.Exit(1) from None
        typer.echo(model)

    file = Annotated[Path | None, typer.Argument(help="TOML file with the keys below; flags override it.", show_default=False)]
    parameters = [inspect.Parameter("config", inspect.Parameter.KEYWORD_ONLY, default=None, annotation=file)]
    hints = typing.get_type_hints(settings)
    for f in dataclasses.fields(settings):
        kinds = typing.get_args(hints[f.name]) if isinstance(hints[f.name], types.UnionType) else (hints[f.name],)
        plain = next(k for k in (bool, int, float, str, list[str]) if k in kinds)
        default = f.default if f.default is not dataclasses.MISSING else []
        note = f" Default: {str(default).lower() if plain is bool else default}." if default not in (None, "", []) else ""
        choices = f" One of {', '.join(f.metadata['choices'])}." if f.metadata["choices"] else ""
        flag = typer.Option(help=f.metadata["help"] + choices + note, show_default=False)
        annotation = Annotated[plain | None, flag]  # type: ignore[valid-type]
        parameters.append(inspect.Parameter(f.name, inspect.Parameter.KEYWORD_ONLY, default=None, annotation=annotation))
    run.__signature__ = inspect.Signature(parameters)  # type: ignore[attr-defined]
    run.__doc__ = text
    return run


def _text_to_image() -> Any:
    from ..training.text_to_image import TextToImage

    return TextToImage


def _autoencoder() -> Any:
    from ..training.autoencoder import Autoencoder

    return Autoencoder


app.command("text-to-image", epilog=TEXT_EXAMPLES)(
    command(TextToImageSettings, _text_to_image, "Trains a denoiser, and its text encoder if asked, on pictures with captions.")
)
app.command("autoencoder", epilog=AUTOENCODER_EXAMPLES)(
    command(AutoencoderSettings, _autoencoder, "Trains an autoencoder on pictures, by L1, edges and divergence.")
)
