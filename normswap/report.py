"""Says what was decided, what was measured and what was written: as JSON, as one HTML page, as a table. Measures nothing itself.

docs/report.md documents the JSON.
"""

from __future__ import annotations

import math
import platform
import shlex
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import asdict, dataclass, field
from html import escape
from importlib import metadata
from typing import TYPE_CHECKING, Any, Literal, NamedTuple

from normswap.parity import Difference, Parity
from normswap.plan import Plan, Skip, Swap

if TYPE_CHECKING:
    from rich.table import Table

    from normswap.cuda import Cuda
    from normswap.fold import Folded
    from normswap.folding import Fate
    from normswap.landscape import Landscape, Line
    from normswap.sensitivity import Choice, Measurement, Sensitivity

SCHEMA_VERSION = 1
PACKAGES = ("normswap", "torch", "torchvision", "timm", "onnx", "onnxscript", "onnxruntime", "safetensors", "numpy")

Status = Literal["converted", "planned", "nothing to swap", "parity failed"]


@dataclass(frozen=True)
class Report:
    """One conversion, or one plan where nothing was measured.

    source    what was converted, as the user named it
    parities  by leg ("torch", "onnxruntime (all)"), in the order they were measured; empty for a plan
    not_run   the legs that were not measured, and why
    onnx      opset, nodes by operator, where each norm went, and what the file has on top of the model without norms; None without ONNX
    seconds   by stage, in order
    files     what was written, relative to the output directory
    fits      for each layer that was calibrated or re-estimated, how well that went (`calibrate.Fit`)
    facts     of an inspection, what is known of each norm (`facts.Facts`); the table then shows that
    """

    source: str
    plan: Plan
    parities: Mapping[str, Parity] = field(default_factory=dict)
    onnx: Mapping[str, Any] | None = None
    versions: Mapping[str, str] = field(default_factory=dict)
    seconds: Mapping[str, float] = field(default_factory=dict)
    files: tuple[str, ...] = ()
    fits: tuple[Mapping[str, Any], ...] = ()
    facts: tuple[Mapping[str, Any], ...] = ()
    not_run: Mapping[str, str] = field(default_factory=dict)

    @property
    def status(self) -> Status:
        if not all(parity.passed for parity in self.parities.values()):
            return "parity failed"
        if not self.plan.swaps:
            return "nothing to swap"
        return "converted" if self.parities else "planned"

    def json(self) -> dict[str, Any]:
        """Strict JSON, keys in the documented order. What JSON has no number for is the string "nan", "inf" or "-inf"."""
        content: dict[str, Any] = {
            "version": SCHEMA_VERSION,
            "status": self.status,
            "source": self.source,
            "plan": {
                "backend": self.plan.backend,
                "notes": self.plan.notes,
                "swaps": [{**_site(swap), "preserves": swap.preserves} for swap in self.plan.swaps],
                "skips": [{**_site(skip), "reason": skip.reason} for skip in self.plan.skips],
            },
            "facts": [dict(known) for known in self.facts],
            "parities": {leg: parity_json(parity) for leg, parity in self.parities.items()},
            "legs": legs_json(self.parities, self.not_run),
            "calibration": [dict(fit) for fit in self.fits],
            "onnx": self.onnx,
            "seconds": self.seconds,
            "versions": self.versions,
            "files": self.files,
        }
        return {key: _strict(value) for key, value in content.items()}

    def summary(self) -> str:
        """The verdict, then one line for each comparison, warning and note. Plain text."""
        lines = [self.verdict, *legs_summary(self.parities, self.not_run)]
        lines += self._residue()
        lines += [f"  cuda: {line}" for line in self._cuda()]
        approximate = sum(known["approximate"] for known in self.facts)
        if approximate:
            lines.append(f"  with --approximate --data DATA: would swap {approximate} more, approximately")
        warnings = [(trap["text"], known["name"]) for known in self.facts for trap in known["warnings"]]
        lines += [f"  warning: {names} {text}" for text, names in _by_text(warnings)]
        unseen = [(f"has an input of unknown shape: {known['unseen']}", known["name"]) for known in self.facts if known["unseen"]]
        lines += [f"  note: {names} {text}" for text, names in _by_text(unseen)]
        return "\n".join([*lines, *(f"  note: {note}" for note in self.plan.notes)])

    def _residue(self) -> list[str]:
        """What of the norms is left in the ONNX file, and why."""
        sites = (self.onnx or {}).get("sites", ())
        left = [site for site in sites if site["left"]]
        gone = [f"  onnx: {len(sites) - len(left)} of {len(sites)} calls of norms cost nothing"] if sites else []
        said = [(f"in the file as {' and '.join(site['left'])}: {site['reason']}", site["name"]) for site in left]
        return [*gone, *(f"  onnx: {names} {text}" for text, names in _by_text(said))]

    def _cuda(self) -> list[str]:
        told = (self.onnx or {}).get("cuda")
        return [] if told is None else cuda_lines(told)

    @property
    def verdict(self) -> str:
        """The status in one sentence."""
        total = len(self.plan.swaps) + len(self.plan.skips)
        count = f"{len(self.plan.swaps)} of {total} normalization layer{'' if total == 1 else 's'}"
        nothing = f"{count} can be" if total else "the model has no normalization"
        return {
            "converted": f"converted: {count} swapped",
            "planned": f"would swap {count}",
            "nothing to swap": f"nothing to swap: {nothing}",
            "parity failed": f"parity failed: {count} swapped, and the result is not the same function",
        }[self.status]

    def table(self) -> Table:
        """One row for each normalization of the model."""
        from rich import box
        from rich.table import Table
        from rich.text import Text

        if self.facts:
            return self._table_of_facts()
        table = Table("site", "kind", "what", "why not", "max error", box=box.SIMPLE_HEAD)
        table.columns[0].overflow = table.columns[3].overflow = "fold"
        table.columns[-1].justify = "right"
        for column in (table.columns[2], table.columns[-1]):
            column.no_wrap = True
        for row in self._rows():
            # Text, not str: the name of a layer may hold what rich would read as markup
            cells = [Text(cell) for cell in (row.site, row.kind, row.what, row.why_not)]
            table.add_row(*cells, Text(row.error, style="" if row.passed else "bold red"))
        return table

    def calibration_table(self) -> Table:
        """One row for each layer that was calibrated or re-estimated; what is bad is said in the last column."""
        from rich import box
        from rich.table import Table
        from rich.text import Text

        table = Table(*CALIBRATION, box=box.SIMPLE_HEAD)
        table.columns[0].overflow = table.columns[-1].overflow = "fold"
        for column in table.columns[2:-1]:
            column.justify, column.no_wrap = "right", True
        for *cells, remarks in map(_calibration_row, self.fits):
            table.add_row(*map(Text, cells), Text(remarks, style="bold red"))
        return table

    def _table_of_facts(self) -> Table:
        from rich import box
        from rich.table import Table
        from rich.text import Text

        known, above = {facts["name"]: facts for facts in self.facts}, ""
        rows = []
        for row in self._rows():
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

    def html(self) -> str:
        """One page that needs nothing from anywhere."""
        rows = "".join(
            f"<tr><td><code>{escape(row.site)}</code></td><td>{escape(row.kind)}</td><td class='what'>{escape(row.what)}</td>"
            f"<td>{escape(row.why_not)}</td><td class='number{'' if row.passed else ' bad'}'>{escape(row.error)}</td></tr>"
            for row in self._rows()
        )
        legs = "".join(_leg_html(leg, parity) for leg, parity in self.parities.items())
        legs += "".join(f"<div class='leg'><h3>{escape(leg)}</h3><p>not run: {escape(why)}</p></div>" for leg, why in self.not_run.items())
        facts = [
            ("found by", self.plan.backend),
            *(("note", note) for note in self.plan.notes),
            *((f"onnx {key}", _plain(value)) for key, value in (self.onnx or {}).items() if key not in ("sites", "cuda")),
            *(("onnx", line.partition("onnx: ")[2]) for line in self._residue()),
            *(("cuda", line) for line in self._cuda()),
            ("files", _plain(self.files)),
            ("seconds", ", ".join(f"{stage} {seconds:.1f}" for stage, seconds in self.seconds.items())),
            ("versions", _plain(self.versions)),
        ]
        return PAGE.format(
            title=escape(f"normswap: {self.source}"),
            source=escape(self.source),
            colour="bad" if self.status == "parity failed" else "good",
            verdict=escape(self.verdict),
            legs=f"<section><h2>Measured</h2>{LEGEND}{legs}</section>" if legs else "",
            rows=rows or "<tr><td colspan='5'>The model has no normalization.</td></tr>",
            calibration=_calibration_html(self.fits),
            facts="".join(f"<dt>{escape(name)}</dt><dd>{escape(value)}</dd>" for name, value in facts if value),
        )

    def _rows(self) -> Iterator[Row]:
        for swap in self.plan.swaps:
            drifts = [d for parity in self.parities.values() for d in parity.sites if d.name == swap.name]
            # In the other legs an approximate swap is not made, or is held against itself.
            own = [d for d in self.parities["drift"].sites if d.name == swap.name] if "drift" in self.parities else []
            exact = [d for leg, parity in self.parities.items() if leg != "drift" for d in parity.sites if d.name == swap.name]
            worst = _worst(own if own and swap.preserves == "approximate" else exact)
            what = f"swapped, {swap.preserves}" if self.parities else f"would swap, {swap.preserves}"
            yield Row(swap.name, _names(swap), swap.kind, what, "", _error(worst) if worst else "", all(d.passed for d in drifts))
        for skip in self.plan.skips:
            yield Row(skip.name, _names(skip), skip.kind, "kept", skip.reason, "", True)


class Row(NamedTuple):
    name: str
    site: str
    kind: str
    what: str
    why_not: str
    error: str
    passed: bool


def report(
    source: str,
    plan: Plan,
    parities: Mapping[str, Parity] | None = None,
    *,
    onnx: Mapping[str, Any] | None = None,
    seconds: Mapping[str, float] | None = None,
    files: Iterable[str] = (),
    fits: Iterable[Mapping[str, Any]] = (),
    facts: Iterable[Mapping[str, Any]] = (),
    not_run: Mapping[str, str] | None = None,
) -> Report:
    """Collects what the stages found, and the versions that they ran with."""
    measured = dict(parities or {})
    return Report(
        source, plan, measured, onnx, versions(), dict(seconds or {}), tuple(files), tuple(fits), tuple(facts), dict(not_run or {})
    )


def versions() -> dict[str, str]:
    """Of Python and of each package that can change a number and is installed."""
    found = {"python": platform.python_version()}
    for package in PACKAGES:
        try:
            found[package] = metadata.version(package)
        except metadata.PackageNotFoundError:
            continue
    return found


# -- one Parity, which `verify` also shows alone ---------------------------------------------------------------------------------


def parity_json(parity: Parity) -> dict[str, Any]:
    """One comparison, as strict JSON."""
    content: dict[str, Any] = {
        "passed": parity.passed,
        "candidate": parity.candidate,
        "failure": parity.failure,
        "max_abs": parity.max_abs,
        "max_rel": parity.max_rel,
        "smallest_tolerance": parity.smallest_tolerance,
        "first_bad": parity.first_bad,
        "probes": parity.probes,
        "dropped": parity.dropped,
        "forward_passes": parity.forward_passes,
        "outputs": [{**asdict(d), "passed": d.passed} for d in parity.outputs],
        "sites": [{**asdict(d), "passed": d.passed} for d in parity.sites],
    }
    return {key: _strict(value) for key, value in content.items()}


def legs_json(parities: Mapping[str, Parity], not_run: Mapping[str, str]) -> list[dict[str, Any]]:
    """Every leg in one line each: the noise floor first, and what was not run last. docs/report.md documents it."""
    rows: list[dict[str, Any]] = []
    exact = [parity for leg, parity in parities.items() if leg != "drift"]
    if exact:
        rows.append({"leg": "original", "status": "noise floor", "max_rel": exact[-1].noise, "probes": exact[-1].probes, "reason": None})
    for leg, parity in parities.items():
        status = "passed" if parity.passed else "failed"
        rows.append({"leg": leg, "status": status, "max_rel": parity.max_rel, "probes": parity.probes, "reason": parity.failure})
    rows += [{"leg": leg, "status": "not run", "max_rel": None, "probes": (), "reason": why} for leg, why in not_run.items()]
    return [_strict(row) for row in rows]


def legs_summary(parities: Mapping[str, Parity], not_run: Mapping[str, str]) -> list[str]:
    """One line for each leg."""
    measured = [f"  {leg}: {parity_summary(parity)}" for leg, parity in parities.items()]
    return [*measured, *(f"  {leg}: not run: {why}" for leg, why in not_run.items())]


def parity_summary(parity: Parity) -> str:
    """One comparison in one line."""
    worst = _worst(parity.outputs)
    parts = []
    if parity.failure is not None:
        parts.append(parity.failure)
    elif worst is None:
        parts.append("nothing was compared")
    elif worst.problem is not None:
        parts.append(f"output {worst.name!r}: {worst.problem}")
    else:
        numbers = f"max error {worst.max_rel:.1e}, allowed {worst.tolerance:.1e}, rounding of the original {worst.noise:.1e}"
        parts.append(f"{numbers}, over {len(parity.probes)} inputs")
    if not parity.passed:
        parts.insert(0, "FAILED")
        if parity.first_bad is not None:
            parts.append(f"first to differ: {parity.first_bad or ROOT}")
        if parity.outputs and math.isfinite(parity.smallest_tolerance):
            parts.append(f"the outputs would pass at tolerance {parity.smallest_tolerance:.1e}")
    if parity.dropped:
        parts.append(f"not compared: {', '.join(parity.dropped)}")
    return "; ".join(parts)


def parity_table(parity: Parity) -> Table:
    """One row for each output, then one for each swapped layer."""
    from rich import box
    from rich.table import Table
    from rich.text import Text

    table = Table("what", "max abs", "max rel", "rel L2", "allowed", "verdict", box=box.SIMPLE_HEAD)
    table.columns[0].overflow = "fold"
    for column in table.columns[1:5]:
        column.justify, column.no_wrap = "right", True
    for kind, differences in (("output", parity.outputs), ("layer", parity.sites)):
        for d in differences:
            numbers = [f"{number:.1e}" for number in (d.max_abs, d.max_rel, d.rel_l2, d.tolerance)]
            table.add_row(Text(f"{kind} {d.name or ROOT}"), *numbers, Text(_verdict(d), style="" if d.passed else "bold red"))
    return table


# -- words and numbers -----------------------------------------------------------------------------------------------------------

ROOT = "(the model)"


def _names(decision: Swap | Skip) -> str:
    name = decision.name or ROOT
    if decision.aliases:
        name += f" (also {', '.join(decision.aliases)})"
    if decision.calls not in (None, 1):
        name += f", called {decision.calls} times"
    return name


def _site(decision: Swap | Skip) -> dict[str, Any]:
    return {
        "name": decision.name,
        "aliases": decision.aliases,
        "kind": decision.kind,
        "calls": decision.calls,
        "producer": decision.producer,
        "function": decision.site.function,
    }


LISTED = 3  # names before "and N more"


def _by_text(said: Iterable[tuple[str, str]]) -> Iterator[tuple[str, str]]:
    """(text, the names that it was said of), each text once."""
    names: dict[str, list[str]] = {}
    for text, name in said:
        names.setdefault(text, []).append(name or ROOT)
    for text, found in names.items():
        more = f" and {len(found) - LISTED} more: each" if len(found) > LISTED else ": each" if len(found) > 1 else ""
        yield text, ", ".join(found[:LISTED]) + more


def _facts(facts: Mapping[str, Any]) -> tuple[str, str, str, str, str]:
    """In words: the input, batches seen, momentum, eps, and the channels that are constant. Empty: does not apply, or none."""
    shapes = ", ".join("x".join(map(str, shape)) for shape in facts["shapes"]) or "unknown"
    numbers = (facts["batches"], facts["momentum"], facts["eps"])
    batches, momentum, eps = ("" if n is None else f"{n:g}" if isinstance(n, float) else str(n) for n in numbers)
    constant = [f"{facts[key]} {word}" for key, word in (("dead_channels", "dead"), ("zero_weights", "zero")) if facts[key]]
    return shapes, batches, momentum, eps, ", ".join(constant)


def _worst(differences: Iterable[Difference]) -> Difference | None:
    """The one that is furthest over, or least far under, what it is allowed. What cannot be compared is worst of all."""

    def badness(d: Difference) -> tuple[bool, bool, float]:
        share = d.max_rel / d.tolerance if d.tolerance else d.max_rel
        return d.problem is not None, d.non_finite > 0 or math.isnan(share), 0.0 if math.isnan(share) else share

    return max(differences, key=badness, default=None)


def _verdict(d: Difference) -> str:
    if d.passed:
        return "same"
    if d.problem is not None:
        return d.problem
    return f"{d.non_finite} not finite, at {d.probe}" if d.non_finite else f"differs, at {d.probe}"


def _error(d: Difference) -> str:
    return d.problem if d.problem is not None else f"{d.max_rel:.1e}"


def _strict(value: Any) -> Any:
    """`value` in the types that JSON has."""
    if isinstance(value, float) and not math.isfinite(value):
        return "nan" if math.isnan(value) else "inf" if value > 0 else "-inf"
    if isinstance(value, Mapping):
        return {str(key): _strict(item) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [_strict(item) for item in value]
    return value


def _plain(value: Any) -> str:
    """A fact about the ONNX file, in words."""
    if isinstance(value, Mapping):
        return ", ".join(f"{key} {_plain(item)}" for key, item in value.items())
    if isinstance(value, (list, tuple)):
        return ", ".join(map(_plain, value))
    return str(value)


CALIBRATION = ("layer", "how", "error", "samples", "do not vary", "kurtosis", "position 0", "remarks")


def _calibration_row(fit: Mapping[str, Any]) -> tuple[str, ...]:
    """The cells of one layer under CALIBRATION; what was not measured is empty."""
    seen = fit["samples"] > 0
    kurtosis, first = fit["max_kurtosis"], fit["first_position"]
    return (
        fit["name"] or ROOT,
        {"fit": "fitted", "exact": "re-estimated", "adapt": "adapted"}[fit["how"]],
        f"{fit['error']:.1e}" if seen else "",
        str(fit["samples"]) if seen else "",
        f"{fit['flat_channels']} of {fit['channels']}" if seen else "",
        f"{kurtosis:.1f}" if seen and math.isfinite(kurtosis) else "",
        f"{first:.1f}" if first is not None else "",
        "; ".join(fit["remarks"]),
    )


# -- the page --------------------------------------------------------------------------------------------------------------------

DECADES = 18  # the scale of the page ends at 1; it starts below the rounding of float64


def _position(error: float) -> float:
    """Per cent of the way along a logarithmic scale."""
    if math.isnan(error):
        return 100.0
    decades = math.log10(error) if error > 0 else -math.inf
    return 100 * min(max(1 + decades / DECADES, 0.0), 1.0)


def _leg_html(leg: str, parity: Parity) -> str:
    worst = _worst(parity.outputs)
    scale = ""
    if worst is not None and worst.problem is None:
        allowed, noise, error = map(_position, (worst.tolerance, worst.noise, worst.max_rel))
        scale = (
            f"<div class='scale'><i class='allowed' style='width:{allowed:.1f}%'></i>"
            f"<i class='error' style='left:{error:.1f}%'></i><i class='noise' style='left:{noise:.1f}%'></i></div>"
        )
    colour = "good" if parity.passed else "bad"
    return f"<div class='leg {colour}'><h3>{escape(leg)}</h3>{scale}<p>{escape(parity_summary(parity))}</p></div>"


def _calibration_html(fits: Iterable[Mapping[str, Any]]) -> str:
    *numbers, last = CALIBRATION
    head = "".join(f"<th>{name}</th>" for name in numbers) + f"<th class='words'>{last}</th>"
    rows = ""
    for *cells, remarks in map(_calibration_row, fits):
        name, *others = map(escape, cells)
        rows += f"<tr><td><code>{name}</code></td>" + "".join(f"<td>{cell}</td>" for cell in others)
        rows += f"<td class='words{' bad' if remarks else ''}'>{escape(remarks)}</td></tr>"
    return CALIBRATED.format(head=head, rows=rows) if rows else ""


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


# -- where the norms of an ONNX file went --------------------------------------------------------------------------------------

FOLD_VERSION = 1
WAYS = {
    "": "stays",
    "into_producer": "into the layer before it",
    "into_consumers": "into what reads it",
    "stream_shift": "into what reads it and what comes before",
    "threshold": "through a ReLU into what reads it",
    "into_producers": "into all that comes before it",
}


def fates_json(sites: Iterable[Fate]) -> list[dict[str, Any]]:
    """Where each norm went. docs/report.md documents it."""
    return [{"name": site.name, "how": site.how, "into": list(site.into), "left": list(site.left), "reason": site.reason} for site in sites]


def cuda_json(cuda: Cuda) -> dict[str, Any]:
    """What is known of the file on CUDA. docs/report.md documents it."""
    return {
        "status": cuda.status,
        "why": cuda.why,
        "table": cuda.table,
        "floating": cuda.floating,
        "without_kernel": [asdict(node) for node in cuda.without_kernel],
        "elsewhere": [] if cuda.run is None else list(cuda.run.elsewhere),
        "kernels": {} if cuda.run is None else dict(cuda.run.kernels),
    }


def cuda_lines(told: Mapping[str, Any]) -> list[str]:
    """The same in words."""
    missing = [f"{node['op']} {node['node']} ({node['dtype']}, opset {node['opset']})" for node in told["without_kernel"]]
    has = f"{told['floating'] - len(missing)} of {told['floating']} floating-point nodes have a CUDA kernel, by onnxruntime's table"
    lines = {
        "not run": [f"not run: {told['why']}; {has}"],
        "passed": [f"ran, every floating-point node on CUDA; {has}"],
        "partly": [f"ran, but not on CUDA: {_listed(told['elsewhere'])}; {has}"],
    }[told["status"]]
    return lines if not missing else [*lines, f"without a kernel: {_listed(missing)}"]


def _listed(names: list[str]) -> str:
    more = f" and {len(names) - LISTED} more" if len(names) > LISTED else ""
    return ", ".join(names[:LISTED]) + more


def fold_json(source: str, result: Folded) -> dict[str, Any]:
    """What folding one ONNX file did, as strict JSON. docs/report.md documents it."""
    return {
        "version": FOLD_VERSION,
        "status": "folded" if result.changed else "nothing to fold",
        "source": source,
        "path": str(result.path),
        "nodes_before": dict(result.before),
        "nodes": dict(result.nodes),
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


def fold_summary(result: Folded) -> str:
    """What was folded, and what was measured. Plain text."""
    gone = sum(not site.left for site in result.sites)
    before, after = (sum(nodes.values()) for nodes in (result.before, result.nodes))
    lines = [f"folded {gone} of {len(result.sites)}: {before} nodes before, {after} after" if result.changed else "nothing to fold"]
    lines += legs_summary(result.legs.parities, result.legs.not_run)
    lines += [f"  note: {note}" for note in result.notes]
    return "\n".join([*lines, f"  {'wrote' if result.changed else 'copied to'} {result.path}"])


# -- one Sensitivity -------------------------------------------------------------------------------------------------------------

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
        "skips": [{**_site(skip), "reason": skip.reason} for skip in found.plan.skips],
        "budget": found.budget,
        "chosen": found.chosen and _choice_json(found.chosen),
        "versions": versions(),
    }
    return {key: _strict(value) for key, value in content.items()}


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


# -- one Landscape ---------------------------------------------------------------------------------------------------------------

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
    return {key: _strict(value) for key, value in content.items()}


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
