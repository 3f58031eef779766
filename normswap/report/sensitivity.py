"""What `normswap sensitivity` says."""

from __future__ import annotations

import shlex
from dataclasses import asdict
from typing import TYPE_CHECKING, Any

from normswap.report.fields import site_json, strict
from normswap.report.words import ROOT
from normswap.versions import versions

if TYPE_CHECKING:
    from rich.table import Table

    from normswap.api.measurements import Measurement
    from normswap.api.sensitivity import Choice, Sensitivity

SENSITIVITY_VERSION = 1


def sensitivity_json(source: str, found: Sensitivity) -> dict[str, Any]:
    """The ranking and the choice, as strict JSON. docs/sensitivity.md documents it."""
    content: dict[str, Any] = {
        "version": SENSITIVITY_VERSION,
        "source": source,
        "by": found.by,
        "batches": found.batches,
        "metric": found.metric,
        "layers": [
            {
                "rank": rank,
                "name": layer.name,
                "kind": layer.kind,
                "preserves": layer.preserves,
                **asdict(layer.measured),
                "calibration_error": layer.calibration_error,
            }
            for rank, layer in enumerate(found.layers, 1)
        ],
        "skips": [{**site_json(skip), "reason": skip.reason} for skip in found.plan.skips],
        "budget": found.budget,
        "chosen": found.chosen and _choice_json(found.chosen),
        "versions": versions(),
    }
    return {key: strict(value) for key, value in content.items()}


def _choice_json(chosen: Choice) -> dict[str, Any]:
    return {
        "names": chosen.names,
        "approximate": chosen.approximate,
        **asdict(chosen.measured),
        "tried": chosen.tried,
        "include": chosen.include,
        "exclude": chosen.exclude,
        "arguments": convert_arguments(chosen),
    }


def convert_arguments(chosen: Choice, data: str | None = None) -> list[str] | None:
    """The options that make `normswap convert` swap exactly the chosen layers; None if no globs do."""
    if chosen.include is None or chosen.exclude is None:
        return None
    asked = ["--approximate", *(() if data is None else ("--data", data))] if chosen.approximate else []
    globs = (("--include", chosen.include), ("--exclude", chosen.exclude))
    return [*asked, *(word for option, patterns in globs for pattern in patterns for word in (option, pattern))]


def sensitivity_table(found: Sensitivity) -> Table:
    """One row for each swap, the cheapest first, then one for each norm that stays."""
    from rich import box
    from rich.table import Table
    from rich.text import Text

    metric = found.metric is not None
    headers = ["rank", "layer", "kind", "swap", "rel L2", "max rel", *(("metric", "change") if metric else ()), "fit error"]
    table = Table(*headers, *(("chosen",) if found.chosen is not None else ()), box=box.SIMPLE_HEAD)
    table.columns[1].overflow = "fold"
    for column in (table.columns[0], *table.columns[4:]):
        column.justify, column.no_wrap = "right", True
    chosen = () if found.chosen is None else found.chosen.names
    for rank, layer in enumerate(found.layers, 1):
        numbers = [*_numbers(layer.measured, metric), "" if layer.calibration_error is None else f"{layer.calibration_error:.1e}"]
        cells = [str(rank), layer.name or ROOT, layer.kind, layer.preserves, *numbers, *(("yes",) if layer.name in chosen else ())]
        table.add_row(*map(Text, cells))
    for skip in found.plan.skips:
        table.add_row("", Text(skip.name or ROOT), Text(skip.kind), "kept")
    return table


def sensitivity_summary(found: Sensitivity, data: str | None = None) -> str:
    """What was measured, then what was chosen, and the options for `convert`. Plain text."""
    exact = sum(layer.preserves == "exact" for layer in found.layers)
    count = f"{len(found.layers)} layer{'' if len(found.layers) == 1 else 's'}"
    lines = [f"{count} measured on {found.batches} batch{'' if found.batches == 1 else 'es'}, ranked by {found.by}"]
    if exact:
        lines.append(f"  exact: {exact}, measured together")
    lines += [f"  kept {skip.name or ROOT}: {skip.reason}" for skip in found.plan.skips]
    if found.chosen is None:
        return "\n".join(lines)
    chosen, words = found.chosen, ("rel L2", "max rel", "metric", "change")
    numbers = ", ".join(f"{word} {number}" for word, number in zip(words, _numbers(chosen.measured, True), strict=True) if number)
    lines.append(f"  within {found.by} {found.budget:g}: {len(chosen.names)} of {count}, measured together: {numbers}")
    arguments = convert_arguments(chosen, data)
    if arguments is None:
        lines.append("  no --include and --exclude tell these layers from the others, as a layer is called like a kind")
    elif chosen.names:
        lines.append(f"  for normswap convert: {shlex.join(arguments) or '(no options)'}")
    return "\n".join(lines)


def _numbers(measured: Measurement, metric: bool) -> list[str]:
    values = [f"{measured.rel_l2:.1e}", f"{measured.max_rel:.1e}"]
    if metric:
        values += ["" if measured.metric is None else f"{measured.metric:.6g}", "" if measured.change is None else f"{measured.change:.1e}"]
    return values
