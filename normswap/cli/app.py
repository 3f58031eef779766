"""The `normswap` command. Each of its commands is in a file of its name.

torch is imported when a command runs, so that `normswap --help` answers at once.
"""

from __future__ import annotations

from typing import Annotated

import typer

from normswap.cli.convert import convert
from normswap.cli.demo import demo
from normswap.cli.export import export
from normswap.cli.fold import fold
from normswap.cli.heal import heal
from normswap.cli.help import Command
from normswap.cli.inspect import inspect
from normswap.cli.landscape import landscape
from normswap.cli.options import spread
from normswap.cli.revert import revert
from normswap.cli.sensitivity import sensitivity
from normswap.cli.verify import verify
from normswap.cli.watch import watch
from normswap.versions import version_of

app = typer.Typer(
    help="Swap the normalization of a trained PyTorch model for Batchless normalization, without changing an output.",
    no_args_is_help=True,
    rich_markup_mode=None,  # rich would double the time of --help
    context_settings={"help_option_names": ["-h", "--help"]},
    pretty_exceptions_enable=False,
)
for command in (demo, convert, inspect, verify, export, fold, heal, revert, sensitivity, landscape, watch):
    app.command(cls=Command)(spread(command))


def _version(wanted: bool) -> None:
    if wanted:
        typer.echo(f"normswap {version_of('normswap')}")
        raise typer.Exit


@app.callback()
def options(
    version: Annotated[bool, typer.Option("--version", callback=_version, is_eager=True, help="Print the version and exit.")] = False,
) -> None:
    pass


def main() -> None:
    """The `normswap` command."""
    app(prog_name="normswap")
