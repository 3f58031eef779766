"""The report of a conversion as one self-contained HTML page, made from the template page.html.

Names and reasons come from a model and may contain anything. jinja2 escapes markup (`autoescape`), `shown` escapes unprintable characters,
and the page's own policy lets a browser run no script but the one of the template.
"""

from __future__ import annotations

import base64
import hashlib
import math
import re
from collections.abc import Mapping, Sequence
from importlib import resources
from typing import Any, NamedTuple

from jinja2 import Environment, StrictUndefined
from markupsafe import Markup, escape

from normswap.errors import shown
from normswap.report import advice, charts
from normswap.report.conversion import CALIBRATION, Report, calibration_row
from normswap.report.layers import FATES, Layer, groups_of, layers_of
from normswap.report.onnx import export_facts
from normswap.report.parity import parity_summary, worst_of
from normswap.report.words import ROOT, figure
from normswap.swap.moments import SPAN

FEW = 12  # layers: with at most so many, groups are open from the start


class Chart(NamedTuple):
    """The errors of the layers of one comparison, drawn."""

    title: str
    svg: Markup
    ticks: list[tuple[float, str]]
    first: str
    last: str


def html(report: Report) -> str:
    """The whole page."""
    layers = layers_of(report)
    script = _part("page.js")
    environment = Environment(autoescape=True, undefined=StrictUndefined, trim_blocks=True, lstrip_blocks=True, finalize=_encodable)
    environment.globals.update(
        worst_of=worst_of,
        parity_summary=parity_summary,
        figure=figure,
        scale=charts.scale,
        histogram=charts.histogram,
        span=SPAN,
        ROOT=ROOT,
        infinity=math.inf,
    )
    environment.filters.update(zip=zip, figures=_figures, dotted=_dotted)
    return environment.from_string(_part("page.html")).render(
        report=report,
        style=Markup(_part("page.css")),
        script=Markup(script),
        script_hash=base64.b64encode(hashlib.sha256(script.encode()).digest()).decode(),
        tone="bad" if report.status == "parity failed" else "rough" if advice.DRIFT in report.parities else "good",
        advice=advice,
        layers=layers,
        fates={fate: sum(layer.fate == fate for layer in layers) for fate in FATES},
        words=FATES,
        groups=groups_of(layers),
        few=len(layers) <= FEW,
        charts=list(_charts(layers)),
        ticks=charts.SCALE.ticks,
        operators=_operators(report),
        calibration=CALIBRATION,
        calibration_row=calibration_row,
        facts=[fact for fact in _facts(report) if fact[1]],
    )


def _part(name: str) -> str:
    """A file of this room."""
    return (resources.files("normswap") / "report" / name).read_text(encoding="utf-8")


def _charts(layers: Sequence[Layer]) -> list[Chart]:
    """One chart for the exact layers and one for the approximate ones: their errors are many powers of ten apart."""
    drawn: dict[str, list[charts.Bar]] = {}
    for layer in layers:
        worst = layer.worst
        if worst is not None and worst.problem is None:
            drift = any(m.difference is worst and m.comparison == advice.DRIFT for m in layer.measured)
            title = "Drift of the approximate layers" if drift else "Error of each layer"
            bar = charts.Bar(layer.row.name or ROOT, worst.max_rel, worst.noise, worst.tolerance, layer.fate)
            drawn.setdefault(title, []).append(bar)
    found = []
    for title, bars in drawn.items():
        axis = charts.axis_of(bars)
        found.append(Chart(title, charts.errors(bars, axis), axis.ticks, bars[0].name, bars[-1].name if len(bars) > 1 else ""))
    return found


def _operators(report: Report) -> list[tuple[str, int, int]]:
    """(operator, how often before, how often after) of the ONNX file, and of it with every swapped norm as one operator of its own."""
    if report.onnx is None:
        return []
    before, after = report.onnx.skeleton, report.onnx.nodes
    rows = [(name, before.get(name, 0), after.get(name, 0)) for name in dict.fromkeys((*before, *after))]
    return [("normalization", len(report.onnx.sites), 0), *rows] if report.onnx.sites else rows


def _facts(report: Report) -> list[tuple[str, str]]:
    onnx = {} if report.onnx is None else export_facts(report.onnx)
    return [
        ("found by", report.plan.backend),
        *(("note", note) for note in report.plan.notes),
        *((f"onnx {key}", _plain(value)) for key, value in onnx.items() if key not in ("sites", "cuda", "nodes", "skeleton")),
        *report.onnx_lines,
        ("files", _plain(report.files)),
        ("seconds", ", ".join(f"{stage} {seconds:.1f}" for stage, seconds in report.seconds.items())),
        ("versions", _plain(report.versions)),
    ]


def _plain(value: Any) -> str:
    """A fact about the ONNX file, in words."""
    if isinstance(value, Mapping):
        return ", ".join(f"{key} {_plain(item)}" for key, item in value.items())
    if isinstance(value, (list, tuple)):
        return ", ".join(map(_plain, value))
    return str(value)


def _figures(text: str) -> Markup:
    """Text in which no line ends inside a number like 1.5e-07 or an option like --no-onnx."""
    return Markup(re.sub(r"\d(?:\.\d+)?e-\d+|--[a-z][a-z-]*", r'<span class="figure">\g<0></span>', str(escape(shown(text)))))


def _dotted(name: str) -> Markup:
    """A qualified name that may go on in the next line after a dot."""
    return Markup(str(escape(shown(name))).replace(".", ".<wbr>"))


def _encodable(value: Any) -> Any:
    """Text with unprintable characters escaped, some of which could not be encoded. Markup is our own, and was made of such text."""
    return shown(value) if isinstance(value, str) and not isinstance(value, Markup) else value
