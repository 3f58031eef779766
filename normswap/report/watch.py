"""What `normswap watch` shows of a CSV file that `Drift.to_csv` wrote: the last step, and the course of mean z^2."""

from __future__ import annotations

import csv
import io
import math
from collections.abc import Sequence
from dataclasses import dataclass

from normswap.errors import LoadError
from normswap.report.tables import Alarm, Listing, table
from normswap.report.words import ROOT

HEADER = ("step", "layer", "mean_z", "mean_z2", "dead_channels", "limit_hits")
BARS = "▁▂▃▄▅▆▇█"
COURSE = 16  # steps of the curve
LOW, HIGH = 0.5, 2.0  # of mean z^2; at 1 the statistics fit


@dataclass(frozen=True)
class Run:
    """The lines of a file: the last step, and for each layer its last figures and the course of mean_z2."""

    step: int
    steps: int
    last: dict[str, tuple[float, float, float, float | None]]  # mean_z, mean_z2, dead_channels, limit_hits
    course: dict[str, list[float]]


def run_of(text: str, name: str) -> Run:
    """Read the content of a file. A last line that is not whole yet is left out. Raises LoadError if the file is another one."""
    lines = list(csv.reader(io.StringIO(text[: text.rfind("\n") + 1])))
    if not lines or tuple(lines[0]) != HEADER:
        raise LoadError(
            f"{name} does not begin with {','.join(HEADER)}", hint="normswap.drift(model).to_csv(path, step) writes such a file"
        )
    last: dict[str, tuple[float, float, float, float | None]] = {}
    course: dict[str, list[float]] = {}
    steps: dict[int, None] = {}
    for number, line in enumerate(lines[1:], 2):
        try:
            step, layer, z2 = int(line[0]), line[1], float(line[3])
            last[layer] = (float(line[2]), z2, float(line[4]), float(line[5]) if line[5] else None)
        except (ValueError, IndexError):
            raise LoadError(f"line {number} of {name} is not one that normswap wrote: {','.join(line)[:80]!a}") from None
        steps[step] = None
        course.setdefault(layer, []).append(z2)
    if not steps:
        raise LoadError(f"{name} has no step yet", hint="wait for the first one")
    return Run(list(steps)[-1], len(steps), last, course)


def watch_table(run: Run) -> Listing:
    """A table with one row for each layer."""
    numbers = ("mean z", "mean z^2", "dead", "limit hits")
    rows = []
    for layer, (z, z2, dead, hits) in run.last.items():
        of_z2 = f"{z2:.3g}" if LOW <= z2 <= HIGH else Alarm(f"{z2:.3g}")
        of_dead = Alarm(f"{dead:.0f}") if dead else "0"
        cells = (f"{z:.3g}", of_z2, of_dead, "" if hits is None else f"{100 * hits:.3g}%")
        rows.append((layer or ROOT, *cells, curve(run.course[layer][-COURSE:])))
    return table(("layer", *numbers, "course of mean z^2"), rows, numbers=(*numbers, "course of mean z^2"))


def watch_summary(run: Run) -> str:
    """How many layers are off at the last step, in one line."""
    off = sum(not LOW <= z2 <= HIGH for _, z2, _, _ in run.last.values())
    dead = sum(dead for _, _, dead, _ in run.last.values())
    fits = (
        "the statistics of all layers fit"
        if not off
        else f"{off} of {len(run.last)} layers have a mean z^2 below {LOW:g} or above {HIGH:g}"
    )
    return f"step {run.step}, {run.steps} in the file: {fits}" + (f"; {dead:.0f} dead channels" if dead else "")


def curve(values: Sequence[float]) -> str:
    """Values as a row of bars, on a logarithmic scale from 1/4 (the lowest) to 4 (the highest)."""
    return "".join(BARS[_height(value)] if math.isfinite(value) else "!" for value in values)


def _height(value: float) -> int:
    place = (math.log2(max(value, 2.0**-10)) + 2) / 4  # 0 at 1/4, 1 at 4
    return round(min(max(place, 0.0), 1.0) * (len(BARS) - 1))
