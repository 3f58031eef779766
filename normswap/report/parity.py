"""What `normswap verify` says: one Parity, alone or as a leg of a conversion."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from dataclasses import asdict
from typing import TYPE_CHECKING, Any

from normswap.parity.result import Difference, Parity
from normswap.report.fields import strict
from normswap.report.words import ROOT

if TYPE_CHECKING:
    from rich.table import Table


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
        "unjudged": parity.unjudged,
        "located": None if parity.located is None else asdict(parity.located),
        "forward_passes": parity.forward_passes,
        "outputs": [{**asdict(d), "passed": d.passed} for d in parity.outputs],
        "sites": [{**asdict(d), "passed": d.passed} for d in parity.sites],
    }
    return {key: strict(value) for key, value in content.items()}


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
    return [strict(row) for row in rows]


def legs_summary(parities: Mapping[str, Parity], not_run: Mapping[str, str]) -> list[str]:
    """One line for each leg."""
    measured = [f"  {leg}: {parity_summary(parity)}" for leg, parity in parities.items()]
    return [*measured, *(f"  {leg}: not run: {why}" for leg, why in not_run.items())]


def parity_summary(parity: Parity) -> str:
    """One comparison in one line."""
    worst = worst_of(parity.outputs)
    parts = []
    if parity.failure is not None:
        parts.append(parity.failure)
    elif worst is None:
        parts.append("nothing was compared")
    elif worst.problem is not None:
        parts.append(f"output {worst.name!r}: {worst.problem}")
    else:
        numbers = f"max error {worst.max_rel:.1e}, allowed {worst.tolerance:.1e}, rounding of the original {worst.noise:.1e}"
        if worst.float64:
            numbers = f"max error in float64 {worst.max_rel:.1e}, allowed {worst.tolerance:.1e}"
        parts.append(f"{numbers}, over {len(parity.probes)} inputs")
    if not parity.passed:
        parts.insert(0, "FAILED")
        if parity.first_bad is not None:
            parts.append(f"first to differ: {_place(parity)}")
        if parity.outputs and math.isfinite(parity.smallest_tolerance):
            parts.append(f"the outputs would pass at tolerance {parity.smallest_tolerance:.1e}")
    if parity.unjudged:
        parts.append(f"cannot be judged: {', '.join(parity.unjudged)}")
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


def worst_of(differences: Iterable[Difference]) -> Difference | None:
    """The one that is furthest over, or least far under, what it is allowed. What cannot be compared is worst of all."""

    def badness(d: Difference) -> tuple[bool, bool, float]:
        share = d.max_rel / d.tolerance if d.tolerance else d.max_rel
        return d.problem is not None, d.non_finite > 0 or math.isnan(share), 0.0 if math.isnan(share) else share

    return max(differences, key=badness, default=None)


def _place(parity: Parity) -> str:
    where = parity.first_bad or ROOT
    found = parity.located
    if found is None or found.reference != parity.first_bad:
        return where
    other = f", {found.candidate or ROOT} of the candidate" if found.candidate != found.reference else ""
    return f"{where}{other}, {found.error:.1e} off in float64 at the probe {found.probe!r} (paired by {found.by})"


def _verdict(d: Difference) -> str:
    if d.passed:
        return "same"
    if d.problem is not None:
        return d.problem
    return f"{d.non_finite} not finite, at {d.probe}" if d.non_finite else f"differs, at {d.probe}"
