"""`normswap watch`: shows how far the statistics of each layer are off in a training run, from the CSV file that it writes."""

from __future__ import annotations

import time
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from normswap.cli.options import Debug
from normswap.cli.terminal import console_of, print_tables, work

if TYPE_CHECKING:
    from normswap.report.watch import Run

INTERVAL = 0.5  # seconds between two looks at the file


def watch(
    file: Annotated[
        Path, typer.Argument(metavar="RUN.CSV", help="What normswap.drift(model).to_csv(path, step) writes in a training loop.")
    ],
    *,
    once: Annotated[bool, typer.Option("--once", help="Print the last step and end, as in a pipe.")] = False,
    debug: Debug = False,
) -> None:
    """Watch the statistics of a model in training.

    Shows for each layer how far its statistics are from those of its input at the last step of RUN.CSV, and draws it again when lines
    come. Ctrl-C ends it.
    """
    with work(debug):
        run = _read(file)
    console = console_of()
    if once or not console.is_terminal:
        _show(run)
        return
    with work(debug):
        _follow(file, run)


def _follow(file: Path, run: Run) -> None:
    """Draw the table whenever the file grows, until Ctrl-C."""
    from rich.console import Group
    from rich.live import Live
    from rich.text import Text

    from normswap.report.watch import watch_summary, watch_table

    console = console_of(err=True)  # inside `work`, stdout is stderr
    seen = file.stat().st_size
    with Live(Group(watch_table(run), Text(watch_summary(run))), console=console, auto_refresh=False) as live:
        while True:
            time.sleep(INTERVAL)
            if (size := file.stat().st_size) != seen:
                seen, run = size, _read(file)
                live.update(Group(watch_table(run), Text(watch_summary(run))), refresh=True)


def _show(run: Run) -> None:
    from normswap.report.watch import watch_summary, watch_table

    print_tables(watch_table(run), text=watch_summary(run))


def _read(file: Path) -> Run:
    from normswap.errors import UsageError
    from normswap.report.watch import run_of

    if not file.is_file():
        raise UsageError(f"there is no file {file}", hint="normswap.drift(model).to_csv(path, step) writes one in a training loop")
    return run_of(file.read_text(encoding="utf-8"), str(file))
