"""The command line. Commands are thin: they read options, call the library and show what it returns.

Nothing heavy is imported here: `errata --help` must answer at once. Each command imports what it needs when it runs.
"""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Annotated

import typer

from errata import __version__
from errata.cli.output import guarded

__all__ = ["app", "main"]

app = typer.Typer(
    name="errata",
    help="Correct what a language model believes, measure what that did, and take it back.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    rich_markup_mode="rich",
)
atlas_app = typer.Typer(help="atlas, the small model that comes with errata.", no_args_is_help=True)
app.add_typer(atlas_app, name="atlas")

AsJson = Annotated[bool, typer.Option("--json", help="Print exactly one JSON object on standard output.")]


def _version(value: bool) -> None:
    if value:
        typer.echo(f"errata {__version__}")
        raise typer.Exit


@app.callback()
def root(
    version: Annotated[
        bool, typer.Option("--version", callback=_version, is_eager=True, help="Print the version.")
    ] = False,
) -> None:
    pass


@atlas_app.command("train")
@guarded
def atlas_train(
    size: Annotated[str, typer.Option(help="small, base (the shipped one) or large.")] = "base",
    minutes: Annotated[
        float | None, typer.Option(help="Train for about this long instead of the size's own number of steps.")
    ] = None,
    steps: Annotated[int | None, typer.Option(help="Train for exactly this many steps.")] = None,
    seed: Annotated[int, typer.Option(help="Seed of the initial weights and of the order of documents.")] = 0,
    out: Annotated[Path, typer.Option(help="Folder of the run; a run found there is resumed.")] = Path("errata-atlas"),
    as_json: AsJson = False,
) -> None:
    """Train an atlas: deterministic, resumable after a kill, with a learning curve."""
    from errata.cli.atlas import train

    train(size, minutes, steps, seed, out, as_json, "errata " + " ".join(sys.argv[1:]))


def main() -> None:
    """Entry point of the `errata` command."""
    app()
