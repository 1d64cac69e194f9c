"""``sfumato``: pictures from the command line."""

from __future__ import annotations

from typing import Annotated

import typer

from . import generate as generate_command
from . import info as info_command
from . import models as models_command
from . import schedulers as schedulers_command
from . import train as train_command

app = typer.Typer(
    name="sfumato",
    no_args_is_help=True,
    rich_markup_mode="rich",
    pretty_exceptions_show_locals=False,
    help="Diffusion models: pictures from text. [bold]sfumato generate 'a red apple'[/bold] works offline, out of the box.",
)
app.command("generate", epilog=generate_command.EXAMPLES)(generate_command.generate)
app.command("info", epilog=info_command.EXAMPLES)(info_command.info)
app.command("models", epilog=models_command.EXAMPLES)(models_command.models)
app.command("schedulers", epilog=schedulers_command.EXAMPLES)(schedulers_command.schedulers)
app.add_typer(train_command.app, name="train")


def _version(show: bool) -> None:
    if show:
        from .. import __version__

        typer.echo(f"sfumato {__version__}")
        raise typer.Exit


@app.callback()
def main(
    version: Annotated[bool, typer.Option("--version", callback=_version, is_eager=True, help="Print the version.")] = False,
) -> None:
    """Diffusion models: pictures from text. `sfumato generate "a red apple"` works offline, out of the box."""
