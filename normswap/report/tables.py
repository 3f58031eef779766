"""A conversion as tables on a terminal."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from normswap.report.rows import CALIBRATION, calibration_row, rows_of

if TYPE_CHECKING:
    from rich.table import Table

    from normswap.report.conversion import Report


def of_plan(report: Report) -> Table:
    """One row for each normalization of the model."""
    from rich import box
    from rich.table import Table
    from rich.text import Text

    table = Table("site", "kind", "what", "why not", "max error", box=box.SIMPLE_HEAD)
    table.columns[0].overflow = table.columns[3].overflow = "fold"
    table.columns[-1].justify = "right"
    for column in (table.columns[2], table.columns[-1]):
        column.no_wrap = True
    for row in rows_of(report):
        # Text, not str: the name of a layer may hold what rich would read as markup
        cells = [Text(cell) for cell in (row.site, row.kind, row.what, row.why_not)]
        table.add_row(*cells, Text(row.error, style="" if row.passed else "bold red"))
    return table


def of_facts(report: Report) -> Table:
    """The same of an inspection, with what is known of each."""
    from rich import box
    from rich.table import Table
    from rich.text import Text

    known, above = {facts["name"]: facts for facts in report.facts}, ""
    rows = []
    for row in rows_of(report):
        facts = known[row.name]
        what = f"{row.what}, or approximate" if facts["approximate"] and row.what == "kept" else row.what
        why_not, above = ("as above" if row.why_not and row.why_not == above else row.why_not), row.why_not
        rows.append((row.site, row.kind, *_facts(facts), facts["folds_into"] or "none", what, why_not))
    columns = ("site", "kind", "input", "batches", "momentum", "eps", "constant", "folds into", "what", "why not")
    told = [index for index in range(len(columns)) if any(row[index] for row in rows)]
    table = Table(*(columns[index] for index in told), box=box.SIMPLE_HEAD)
    for column in table.columns:
        column.overflow = "fold"
    for cells in rows:
        table.add_row(*(Text(cells[index]) for index in told))
    return table


def _facts(facts: Mapping[str, Any]) -> tuple[str, str, str, str, str]:
    """In words: the input, batches seen, momentum, eps, and the channels that are constant. Empty: does not apply, or none."""
    shapes = ", ".join("x".join(map(str, shape)) for shape in facts["shapes"]) or "unknown"
    numbers = (facts["batches"], facts["momentum"], facts["eps"])
    batches, momentum, eps = ("" if n is None else f"{n:g}" if isinstance(n, float) else str(n) for n in numbers)
    constant = [f"{facts[key]} {word}" for key, word in (("dead_channels", "dead"), ("zero_weights", "zero")) if facts[key]]
    return shapes, batches, momentum, eps, ", ".join(constant)


def of_fits(report: Report) -> Table:
    """One row for each layer that was calibrated or re-estimated; what is bad is said in the last column."""
    from rich import box
    from rich.table import Table
    from rich.text import Text

    table = Table(*CALIBRATION, box=box.SIMPLE_HEAD)
    table.columns[0].overflow = table.columns[-1].overflow = "fold"
    for column in table.columns[2:-1]:
        column.justify, column.no_wrap = "right", True
    for *cells, remarks in map(calibration_row, report.fits):
        table.add_row(*map(Text, cells), Text(remarks, style="bold red"))
    return table
