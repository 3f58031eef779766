"""What `normswap landscape` says."""

from __future__ import annotations

from dataclasses import asdict
from typing import TYPE_CHECKING, Any

from normswap.report.fields import strict
from normswap.report.words import ROOT
from normswap.versions import versions

if TYPE_CHECKING:
    from rich.table import Table

    from normswap.api.landscape import Landscape, Line

LANDSCAPE_VERSION = 1


def landscape_json(source: str, found: Landscape, loss: str | None = None) -> dict[str, Any]:
    """What was measured, as strict JSON. loss: how it was named, None for the cross entropy. docs/landscape.md documents it."""
    content: dict[str, Any] = {
        "version": LANDSCAPE_VERSION,
        "source": source,
        "loss": loss,
        "mode": found.mode,
        "layer": found.layer,
        "steps": found.steps,
        "lines": [_line_json(line) for line in found.lines],
        "versions": versions(),
    }
    return {key: strict(value) for key, value in content.items()}


def _line_json(line: Line) -> dict[str, Any]:
    (loss_min, loss_max), (change_min, change_max) = line.loss_range, line.change_range
    return {
        "model": line.model,
        "batch": line.batch,
        "parameters": line.parameters,
        "at_start": {"loss": line.loss, "gradient": line.gradient},
        "loss_min": loss_min,
        "loss_max": loss_max,
        "change_min": change_min,
        "change_max": change_max,
        "smoothness": line.smoothness,
        "points": [asdict(point) for point in line.points],
    }


def landscape_table(found: Landscape) -> Table:
    """One row for each model and batch."""
    from rich import box
    from rich.table import Table
    from rich.text import Text

    headers = ("model", "batch", "loss", "gradient", "loss range", "change of the gradient", "smoothness")
    table = Table(*headers, box=box.SIMPLE_HEAD)
    for column in table.columns[1:]:
        column.justify, column.no_wrap = "right", True
    for line in found.lines:
        ranges = (f"{low:.3g} .. {high:.3g}" for low, high in (line.loss_range, line.change_range))
        start = (f"{value:.3g}" for value in (line.loss, line.gradient))
        table.add_row(*map(Text, (line.model, str(line.batch), *start, *ranges, f"{line.smoothness:.3g}")))
    return table


def landscape_summary(found: Landscape) -> str:
    """What was measured, in words. Plain text."""
    what = "all trainable parameters" if found.layer is None else f"the parameters of {found.layer or ROOT}"
    steps = ", ".join(f"{step:g}" for step in found.steps)
    return f"along the gradient by {what}, in {found.mode} mode, at steps of {steps}"
