"""What `normswap fold` says."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from normswap.report.onnx import fates_json
from normswap.report.parity import legs_json, legs_summary, parity_json
from normswap.versions import versions

if TYPE_CHECKING:
    from rich.table import Table

    from normswap.export.any_file import Folded

FOLD_VERSION = 1
WAYS = {
    "": "stays",
    "into_producer": "into the layer before it",
    "into_consumers": "into what reads it",
    "stream_shift": "into what reads it and what comes before",
    "threshold": "through a ReLU into what reads it",
    "into_producers": "into all that comes before it",
}


def fold_json(source: str, result: Folded) -> dict[str, Any]:
    """What folding one ONNX file did, as strict JSON. docs/report.md documents it."""
    return {
        "version": FOLD_VERSION,
        "status": "folded" if result.changed else "rolled back" if result.rolled_back else "nothing to fold",
        "source": source,
        "path": str(result.path),
        "nodes_before": dict(result.before),
        "nodes": dict(result.nodes),
        "bytes_before": result.bytes_before,
        "bytes": result.bytes,
        "sites": fates_json(result.sites),
        "notes": list(result.notes),
        "parity": None if result.parity is None else parity_json(result.parity),
        "legs": legs_json(result.legs.parities, result.legs.not_run),
        "versions": versions(),
    }


def fold_table(result: Folded) -> Table:
    """One row for each norm, and for each chain of products and sums with constants."""
    from rich import box
    from rich.table import Table
    from rich.text import Text

    table = Table("site", "what", "left", "why", box=box.SIMPLE_HEAD)
    for column in table.columns:
        column.overflow = "fold"
    for site in result.sites:
        table.add_row(*map(Text, (site.name, WAYS[site.how], ", ".join(site.left), site.reason)))
    return table


def operators_table(result: Folded) -> Table:
    """How often each operator occurs before and after, as onnxslim shows it. Also where nothing was changed."""
    from rich import box
    from rich.table import Table
    from rich.text import Text

    table = Table("operator", box=box.SIMPLE_HEAD)
    for title in ("before", "after"):
        table.add_column(title, justify="right")
    for name in dict.fromkeys((*result.before, *result.nodes)):
        table.add_row(*map(Text, (name, str(result.before.get(name, 0)), str(result.nodes.get(name, 0)))))
    table.add_section()
    table.add_row("all operators", *(str(sum(nodes.values())) for nodes in (result.before, result.nodes)))
    table.add_row("file", *(_kilobytes(size) for size in (result.bytes_before, result.bytes)))
    return table


def _kilobytes(size: int) -> str:
    return f"{size / 1000:,.1f} kB"


def fold_summary(result: Folded) -> str:
    """What was folded, and what was measured. Plain text."""
    gone = sum(not site.left for site in result.sites)
    before, after = (sum(nodes.values()) for nodes in (result.before, result.nodes))
    unchanged = "nothing was folded: what could be was rolled back, as it did not pass" if result.rolled_back else "nothing to fold"
    lines = [f"folded {gone} of {len(result.sites)}: {before} nodes before, {after} after" if result.changed else unchanged]
    lines += legs_summary(result.legs.parities, result.legs.not_run)
    lines += [f"  note: {note}" for note in result.notes]
    return "\n".join([*lines, f"  {'wrote' if result.changed else 'copied to'} {result.path}"])
