"""The reports of `normswap sensitivity` and `normswap landscape`."""

from __future__ import annotations

import shlex
from typing import TYPE_CHECKING, Any

from normswap.report.tables import Listing, table
from normswap.report.words import ROOT, attributes, figure, site_json, strict, text_of
from normswap.versions import versions

if TYPE_CHECKING:
    from normswap.api.landscape import Landscape, Line
    from normswap.api.measurements import Measurement
    from normswap.api.sensitivity import Choice, Sensitivity

SENSITIVITY_VERSION = 1
LANDSCAPE_VERSION = 1


# -- sensitivity -------------------------------------------------------------------------------------------------------------


def sensitivity_json(source: str, found: Sensitivity) -> dict[str, Any]:
    """The ranking and the choice, as strict JSON. docs/sensitivity.md documents it."""
    return {
        "version": SENSITIVITY_VERSION,
        "source": source,
        **attributes(found, "by", "batches", "metric"),
        "layers": [
            {
                "rank": rank,
                **attributes(layer, "name", "kind", "preserves"),
                **strict(layer.measured),
                **attributes(layer, "calibration_error"),
            }
            for rank, layer in enumerate(found.layers, 1)
        ],
        "skips": [{**site_json(skip), "reason": skip.reason} for skip in found.plan.skips],
        **attributes(found, "budget"),
        "chosen": found.chosen and _choice_json(found.chosen),
        "versions": versions(),
    }


def sensitivity_table(found: Sensitivity) -> Listing:
    """A table with one row for each swap, the smallest error first, then one for each norm that stays."""
    metric = found.metric is not None
    numbers = ("rel L2", "max rel", *(("metric", "change") if metric else ()), "fit error")
    headers = ("rank", "layer", "kind", "swap", *numbers, "chosen")
    chosen = () if found.chosen is None else found.chosen.names
    rows = []
    for rank, layer in enumerate(found.layers, 1):
        figures = (*_figures(layer.measured, metric), figure(layer.calibration_error))
        rows.append((str(rank), layer.name or ROOT, layer.kind, layer.preserves, *figures, "yes" if layer.name in chosen else ""))
    rows += [("", skip.name or ROOT, skip.kind, "kept", *("" for _ in numbers), "") for skip in found.plan.skips]
    shown = len(headers) - (found.chosen is None)
    return table(headers[:shown], (row[:shown] for row in rows), numbers=("rank", *numbers, "chosen"))


def sensitivity_summary(found: Sensitivity, data: str | None = None) -> str:
    """The measurements, the choice, and the options of `convert` for it, as plain text. data: the value of `--data`."""
    exact = sum(layer.preserves == "exact" for layer in found.layers)
    count = f"{len(found.layers)} layer{'' if len(found.layers) == 1 else 's'}"
    lines = [f"{count} measured on {found.batches} batch{'' if found.batches == 1 else 'es'}, ranked by {found.by}"]
    if exact:
        lines.append(f"  exact: {exact}, measured together")
    lines += [f"  kept {skip.name or ROOT}: {skip.reason}" for skip in found.plan.skips]
    if found.chosen is None:
        return text_of(lines)
    chosen, words = found.chosen, ("rel L2", "max rel", "metric", "change")
    measured = ", ".join(f"{word} {number}" for word, number in zip(words, _figures(chosen.measured, True), strict=True) if number)
    lines.append(f"  within {found.by} {found.budget:g}: {len(chosen.names)} of {count}, measured together: {measured}")
    arguments = convert_arguments(chosen, data)
    if arguments is None:
        lines.append("  no --include and --exclude select exactly these layers, as the name of a layer is also a kind")
    elif chosen.names:
        lines.append(f"  for normswap convert: {shlex.join(arguments) or '(no options)'}")
    return text_of(lines)


def convert_arguments(chosen: Choice, data: str | None = None) -> list[str] | None:
    """The options with which `normswap convert` swaps exactly the chosen layers; None if there are no such globs."""
    if chosen.include is None or chosen.exclude is None:
        return None
    approximate = ["--approximate", *(() if data is None else ("--data", data))] if chosen.approximate else []
    globs = (("--include", chosen.include), ("--exclude", chosen.exclude))
    return [*approximate, *(word for option, patterns in globs for pattern in patterns for word in (option, pattern))]


def _choice_json(chosen: Choice) -> dict[str, Any]:
    return {
        **attributes(chosen, "names", "approximate"),
        **strict(chosen.measured),
        **attributes(chosen, "tried", "include", "exclude"),
        "arguments": convert_arguments(chosen),
    }


def _figures(measured: Measurement, metric: bool) -> list[str]:
    """The figures of a measurement in words; metric: also those of the user's metric."""
    figures = [figure(measured.rel_l2), figure(measured.max_rel)]
    return [*figures, "" if measured.metric is None else f"{measured.metric:.6g}", figure(measured.change)] if metric else figures


# -- landscape ---------------------------------------------------------------------------------------------------------------


def landscape_json(source: str, found: Landscape, loss: str | None = None) -> dict[str, Any]:
    """The measurements as strict JSON. loss: the value of `--loss`, None for the cross entropy. docs/landscape.md documents it."""
    return {
        "version": LANDSCAPE_VERSION,
        "source": source,
        "loss": loss,
        **attributes(found, "mode", "layer", "steps"),
        "lines": [_line_json(line) for line in found.lines],
        "versions": versions(),
    }


def landscape_table(found: Landscape) -> Listing:
    """A table with one row for each model and batch."""
    numbers = ("batch", "loss", "gradient", "loss range", "change of the gradient", "smoothness")
    rows = []
    for line in found.lines:
        ranges = (f"{low:.3g} .. {high:.3g}" for low, high in (line.loss_range, line.change_range))
        rows.append((line.model, str(line.batch), f"{line.loss:.3g}", f"{line.gradient:.3g}", *ranges, f"{line.smoothness:.3g}"))
    return table(("model", *numbers), rows, numbers=numbers)


def landscape_summary(found: Landscape) -> str:
    """The parameters, the mode and the steps of the measurement, as plain text."""
    what = "all trainable parameters" if found.layer is None else f"the parameters of {found.layer or ROOT}"
    steps = ", ".join(f"{step:g}" for step in found.steps)
    return text_of([f"along the gradient by {what}, in {found.mode} mode, at steps of {steps}"])


def _line_json(line: Line) -> dict[str, Any]:
    loss_range, change_range = strict(line.loss_range), strict(line.change_range)
    return {
        **attributes(line, "model", "batch", "parameters"),
        "at_start": attributes(line, "loss", "gradient"),
        **dict(zip(("loss_min", "loss_max"), loss_range, strict=True)),
        **dict(zip(("change_min", "change_max"), change_range, strict=True)),
        **attributes(line, "smoothness", "points"),
    }
