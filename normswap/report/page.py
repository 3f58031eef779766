"""A conversion as one HTML page that needs nothing from anywhere."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from html import escape as html_escape
from typing import TYPE_CHECKING, Any

from normswap.parity.result import Parity
from normswap.report.parity import parity_summary, worst_of
from normswap.report.rows import CALIBRATION, calibration_row, rows_of

if TYPE_CHECKING:
    from normswap.report.conversion import Report


def escape(text: str) -> str:
    """Nothing in it is markup, and all of it can be encoded."""
    return html_escape(text.encode("utf-8", "backslashreplace").decode())


DECADES = 18  # the scale of the page ends at 1; it starts below the rounding of float64


def html(report: Report) -> str:
    """One page that needs nothing from anywhere."""
    rows = "".join(
        f"<tr><td><code>{escape(row.site)}</code></td><td>{escape(row.kind)}</td><td class='what'>{escape(row.what)}</td>"
        f"<td>{escape(row.why_not)}</td><td class='number{'' if row.passed else ' bad'}'>{escape(row.error)}</td></tr>"
        for row in rows_of(report)
    )
    legs = "".join(_leg_html(leg, parity) for leg, parity in report.parities.items())
    legs += "".join(f"<div class='leg'><h3>{escape(leg)}</h3><p>not run: {escape(why)}</p></div>" for leg, why in report.not_run.items())
    facts = [
        ("found by", report.plan.backend),
        *(("note", note) for note in report.plan.notes),
        *((f"onnx {key}", _plain(value)) for key, value in (report.onnx or {}).items() if key not in ("sites", "cuda")),
        *(("onnx", line) for line in report.residue),
        *(("cuda", line) for line in report.cuda),
        ("files", _plain(report.files)),
        ("seconds", ", ".join(f"{stage} {seconds:.1f}" for stage, seconds in report.seconds.items())),
        ("versions", _plain(report.versions)),
    ]
    return PAGE.format(
        title=escape(f"normswap: {report.source}"),
        source=escape(report.source),
        colour="bad" if report.status == "parity failed" else "good",
        verdict=escape(report.verdict),
        legs=f"<section><h2>Measured</h2>{LEGEND}{legs}</section>" if legs else "",
        rows=rows or "<tr><td colspan='5'>The model has no normalization.</td></tr>",
        calibration=_calibration_html(report.fits),
        facts="".join(f"<dt>{escape(name)}</dt><dd>{escape(value)}</dd>" for name, value in facts if value),
    )


def _leg_html(leg: str, parity: Parity) -> str:
    worst = worst_of(parity.outputs)
    scale = ""
    if worst is not None and worst.problem is None:
        allowed, noise, error = map(_position, (worst.tolerance, worst.noise, worst.max_rel))
        scale = (
            f"<div class='scale'><i class='allowed' style='width:{allowed:.1f}%'></i>"
            f"<i class='error' style='left:{error:.1f}%'></i><i class='noise' style='left:{noise:.1f}%'></i></div>"
        )
    colour = "good" if parity.passed else "bad"
    return f"<div class='leg {colour}'><h3>{escape(leg)}</h3>{scale}<p>{escape(parity_summary(parity))}</p></div>"


def _position(error: float) -> float:
    """Per cent of the way along a logarithmic scale."""
    if math.isnan(error):
        return 100.0
    decades = math.log10(error) if error > 0 else -math.inf
    return 100 * min(max(1 + decades / DECADES, 0.0), 1.0)


def _calibration_html(fits: Iterable[Mapping[str, Any]]) -> str:
    *numbers, last = CALIBRATION
    head = "".join(f"<th>{name}</th>" for name in numbers) + f"<th class='words'>{last}</th>"
    rows = ""
    for *cells, remarks in map(calibration_row, fits):
        name, *others = map(escape, cells)
        rows += f"<tr><td><code>{name}</code></td>" + "".join(f"<td>{cell}</td>" for cell in others)
        rows += f"<td class='words{' bad' if remarks else ''}'>{escape(remarks)}</td></tr>"
    return CALIBRATED.format(head=head, rows=rows) if rows else ""


def _plain(value: Any) -> str:
    """A fact about the ONNX file, in words."""
    if isinstance(value, Mapping):
        return ", ".join(f"{key} {_plain(item)}" for key, item in value.items())
    if isinstance(value, (list, tuple)):
        return ", ".join(map(_plain, value))
    return str(value)


CALIBRATED = """<section><h2>Layers with statistics from the data</h2>
<p class="legend">error: relative L2 distance of the layer's output to the original layer's, on the calibration data. samples: values per
channel. kurtosis: the largest of any channel; 3 is normal. position 0: how large it is in a sequence, against the rest.</p>
<table><thead><tr>{head}</tr></thead><tbody>{rows}</tbody></table></section>"""

LEGEND = """<p class="legend">Largest error relative to the largest output, against the original run in float64, on a scale from 1e-18 to 1:
<i class="error"></i> the converted model, <i class="noise"></i> the original in its own precision, <i class="allowed"></i> allowed.</p>"""

PAGE = """<!doctype html>
<html lang="en">
<head>
<meta charset="utf-8">
<meta name="viewport" content="width=device-width, initial-scale=1">
<title>{title}</title>
<style>
:root {{ color-scheme: light dark; --ink: #1c2128; --soft: #59636e; --line: #d5dae0; --page: #fff; --good: #1a7f4b; --bad: #c5221f;
  --fill: #e4f3ea; }}
@media (prefers-color-scheme: dark) {{
  :root {{ --ink: #e4e8ed; --soft: #9aa5b1; --line: #363d46; --page: #14181d; --good: #55c58a; --bad: #ff7b72; --fill: #1d3a2b; }}
}}
body {{ font: 15px/1.5 system-ui, sans-serif; color: var(--ink); background: var(--page);
  max-width: 62rem; margin: 3rem auto; padding: 0 1.25rem; }}
h1 {{ font-size: 1.05rem; font-weight: 500; color: var(--soft); margin: 0; }}
h2 {{ font-size: 1.05rem; margin: 2.5rem 0 .5rem; }}
h3 {{ font-size: 1rem; margin: 0; }}
code {{ font: .92em ui-monospace, monospace; overflow-wrap: anywhere; }}
.verdict {{ font-size: 1.6rem; font-weight: 600; line-height: 1.3; margin: .3rem 0 0; }}
.good .verdict {{ color: var(--good); }} .bad .verdict, .bad p, td.bad {{ color: var(--bad); }}
.legend, dt {{ color: var(--soft); }} .legend {{ font-size: .88rem; }}
.leg {{ margin: 1.2rem 0; }} .leg p {{ margin: .3rem 0 0; font-variant-numeric: tabular-nums; }}
.scale {{ position: relative; height: 1.1rem; margin-top: .4rem; border: 1px solid var(--line); border-radius: 4px; overflow: hidden;
  background: repeating-linear-gradient(to right, transparent 0 calc(100% / 6 - 1px), var(--line) calc(100% / 6 - 1px) calc(100% / 6)); }}
i.allowed {{ background: var(--fill); border-right: 2px solid var(--good); }} i.error {{ background: var(--good); }}
i.noise {{ border: 2px solid var(--soft); box-sizing: border-box; }}
.bad i.error {{ background: var(--bad); }}
.scale i {{ position: absolute; }} .scale i.allowed {{ inset: 0 auto 0 0; opacity: .75; }}
i.error, i.noise {{ width: .6rem; height: .6rem; border-radius: 50%; }} i.noise {{ width: .9rem; height: .9rem; }}
.scale i.error {{ top: .25rem; margin-left: -.3rem; }} .scale i.noise {{ top: .1rem; margin-left: -.45rem; }}
.legend i {{ display: inline-block; vertical-align: -.05rem; }} .legend i.allowed {{ width: 1.2rem; height: .7rem; }}
table {{ border-collapse: collapse; width: 100%; }}
th, td {{ text-align: left; vertical-align: top; padding: .4rem .8rem .4rem 0; border-bottom: 1px solid var(--line); }}
th {{ font-weight: 600; color: var(--soft); font-size: .88rem; }}
td.what {{ white-space: nowrap; }} section .words {{ text-align: left; white-space: normal; }}
th:last-child, .number {{ text-align: right; padding-right: 0; white-space: nowrap; font-variant-numeric: tabular-nums; }}
dl {{ display: grid; grid-template-columns: max-content 1fr; gap: .3rem 1.2rem; font-size: .92rem; }} dd {{ margin: 0; }}
</style>
</head>
<body>
<header class="{colour}"><h1>normswap <code>{source}</code></h1><p class="verdict">{verdict}</p></header>
{legs}
<section><h2>Every normalization of the model</h2>
<table><thead><tr><th>site</th><th>kind</th><th>what</th><th>why not</th><th>max error</th></tr></thead>
<tbody>{rows}</tbody></table></section>
{calibration}
<section><h2>Facts</h2><dl>{facts}</dl></section>
</body>
</html>
"""
