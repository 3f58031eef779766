"""The report of a conversion as one self-contained HTML page, made from the template page.html.

Names and reasons come from a model and may contain anything. jinja2 escapes markup (`autoescape`), `shown` escapes unprintable characters.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from importlib import resources
from typing import Any

from jinja2 import Environment, StrictUndefined

from normswap.errors import shown
from normswap.report.conversion import CALIBRATION, Report, calibration_row, rows_of
from normswap.report.onnx import export_facts
from normswap.report.parity import parity_summary, worst_of

DECADES = 18  # the logarithmic scale of the page ends at 1, and starts below the rounding of float64


def html(report: Report) -> str:
    """The whole page."""
    onnx = {} if report.onnx is None else export_facts(report.onnx)
    facts = [
        ("found by", report.plan.backend),
        *(("note", note) for note in report.plan.notes),
        *((f"onnx {key}", _plain(value)) for key, value in onnx.items() if key not in ("sites", "cuda")),
        *report.onnx_lines,
        ("files", _plain(report.files)),
        ("seconds", ", ".join(f"{stage} {seconds:.1f}" for stage, seconds in report.seconds.items())),
        ("versions", _plain(report.versions)),
    ]
    environment = Environment(autoescape=True, undefined=StrictUndefined, trim_blocks=True, lstrip_blocks=True, finalize=_encodable)
    environment.globals.update(worst_of=worst_of, parity_summary=parity_summary, position=_position)
    template = environment.from_string((resources.files("normswap") / "report/page.html").read_text(encoding="utf-8"))
    fits = [calibration_row(fit) for fit in report.fits]
    return template.render(report=report, rows=list(rows_of(report)), fit_headers=CALIBRATION, fits=fits, facts=[f for f in facts if f[1]])


def _position(error: float) -> float:
    """The position of an error on the logarithmic scale, in per cent of its length."""
    if math.isnan(error):
        return 100.0
    decades = math.log10(error) if error > 0 else -math.inf
    return round(100 * min(max(1 + decades / DECADES, 0.0), 1.0), 1)


def _plain(value: Any) -> str:
    """A fact about the ONNX file, in words."""
    if isinstance(value, Mapping):
        return ", ".join(f"{key} {_plain(item)}" for key, item in value.items())
    if isinstance(value, (list, tuple)):
        return ", ".join(map(_plain, value))
    return str(value)


def _encodable(value: Any) -> Any:
    """Text with unprintable characters escaped, some of which could not be encoded."""
    return shown(value) if isinstance(value, str) else value
