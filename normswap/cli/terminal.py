"""Runs the body of a command, with its output streams, exit codes and progress on the terminal.

Results go to stdout, everything else to stderr. Exit codes: 0 done, 1 cannot convert, 2 usage, 3 converted but parity failed, 130 Ctrl-C.
"""

from __future__ import annotations

import contextlib
import json
import os
import sys
import traceback
from collections.abc import Callable, Iterator
from typing import TYPE_CHECKING, Any

import typer

from normswap.errors import NormswapError, shown
from normswap.files import atomic

if TYPE_CHECKING:
    from rich.console import Console

    from normswap.report.tables import Listing

INTERRUPTED = 130  # 128 + SIGINT, as shells have it
PARITY_FAILED = 3
STYLES = {"error:": "bold red", "FAILED": "bold red", "not the same function": "bold red", "hint:": "bold", "warning:": "yellow"}

Progress = Callable[[str, int, "int | None"], None]


@contextlib.contextmanager
def work(debug: bool) -> Iterator[Progress]:
    """Run the work of a command before it prints its result: stdout goes to stderr, and every error becomes a message and an exit code.

    Yields progress(stage, done, total), which shows the progress of a stage; the total is None if nothing is counted.
    """
    try:
        # models print while they load, and torch's exporter prints its progress
        with contextlib.redirect_stdout(sys.stderr), atomic.remember_interrupts(), _progress() as progress:
            yield progress
    except NormswapError as error:
        _fail(f"error: {error.message}", f"hint: {error.hint}" if error.hint else "", code=error.exit_code, debug=debug)
    except KeyboardInterrupt:
        _fail("interrupted", code=INTERRUPTED, debug=debug)
    except OSError as error:
        where = f"{error.filename}: " if error.filename is not None else ""
        _fail(f"error: {where}{error.strerror or error}", code=1, debug=debug)
    except Exception as error:
        what = (str(error).strip().splitlines() or ["no message"])[0]
        hint = "" if debug else "hint: normswap did not expect this; run it again with --debug to see where it comes from"
        _fail(f"error: {type(error).__name__}: {what}", hint, code=1, debug=debug)


def _fail(*lines: str, code: int, debug: bool) -> None:
    if debug:
        say(traceback.format_exc(), err=True)
    for line in filter(None, lines):
        say(line, err=True)
    raise typer.Exit(code) from None


@contextlib.contextmanager
def _progress(console: Console | None = None) -> Iterator[Progress]:
    """Yields a function that shows the current stage on a terminal, with a spinner, a bar and the time left; elsewhere it does nothing."""
    from rich import progress

    console = console or console_of(err=True)
    if not console.is_terminal:
        yield lambda stage, done, total: None
        return
    count = progress.TextColumn("{task.fields[count]}")
    columns = (progress.SpinnerColumn(), progress.TextColumn("{task.description}", markup=False), progress.BarColumn(), count)
    with contextlib.ExitStack() as visible:  # nothing is drawn before the first stage
        bar = progress.Progress(*columns, progress.TimeRemainingColumn(), console=console, transient=True)

        def show(stage: str, done: int, total: int | None) -> None:
            if not bar.live.is_started:
                visible.enter_context(bar)
            running = [task for task in bar.tasks if task.description == shown(stage, line=True)]
            for task in bar.tasks:
                if task not in running:
                    bar.remove_task(task.id)
            task_id = running[0].id if running else bar.add_task(shown(stage, line=True), total=total, count="")
            ends = not running or done == total  # the first and last state of a stage are drawn at once
            bar.update(task_id, completed=done, total=total, count="" if total is None else f"{done}/{total}", refresh=ends)

        yield show


def print_json(result: dict[str, Any]) -> None:
    typer.echo(json.dumps(result, indent=2, allow_nan=False))


def print_tables(*tables: Listing, text: str, passed: bool | None = None) -> None:
    """Print the tables that have rows, then the text. passed: the colour of its first line, the verdict."""
    console = console_of()
    if not console.is_terminal and "COLUMNS" not in os.environ:
        console.width = 160  # rich assumes 80 columns for a pipe, and would move reasons
    for table in tables:
        if table.row_count:
            console.print(table)
    say(text, style="" if passed is None else "bold green" if passed else "bold red")


def say(text: str, *, err: bool = False, style: str = "") -> None:
    """Print text with control sequences escaped; on a terminal broken between words, and with colours. style: of the first line."""
    console = console_of(err=err)
    if not console.is_terminal:
        typer.echo(shown(text), err=err)
        return
    from rich.text import Text

    from normswap.report.tables import wrapped

    for number, line in enumerate(shown(text).split("\n")):
        of_line = style if number == 0 and style else next((each for word, each in STYLES.items() if line.lstrip().startswith(word)), "")
        for piece in wrapped(line, console.width):
            console.print(Text(piece, style=of_line), soft_wrap=True)


def console_of(*, err: bool = False) -> Console:
    """The terminal or pipe behind stdout, or stderr. With NO_COLOR, no bold letters either."""
    from rich.console import Console

    return Console(stderr=err, highlight=False, color_system=None if os.environ.get("NO_COLOR") else "auto")
