"""The report of `normswap verify` on one comparison, and the lines of every command on its comparisons."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from pathlib import PurePath
from typing import Any

from normswap.errors import shown
from normswap.parity.result import Difference, Parity
from normswap.report.tables import Alarm, Good, Listing, table
from normswap.report.words import ROOT, attributes, figure, strict

USABLE = 0.1  # an approximate model whose outputs move by more of the largest one is called not usable as it is


def parity_json(parity: Parity) -> dict[str, Any]:
    """One comparison, as strict JSON. docs/report.md documents it."""
    facts = ("passed", "candidate", "failure", "max_abs", "max_rel", "smallest_tolerance", "first_bad")
    inputs = ("probes", "dropped", "unjudged", "located", "forward_passes")
    return {
        **attributes(parity, *facts, *inputs),
        "outputs": [{**strict(d), "passed": d.passed} for d in parity.outputs],
        "sites": [{**strict(d), "passed": d.passed} for d in parity.sites],
    }


def comparisons_json(parities: Mapping[str, Parity], not_run: Mapping[str, str]) -> list[dict[str, Any]]:
    """Every comparison in short, as strict JSON: the noise floor first, those that were not run last. docs/report.md documents it."""
    rows: list[tuple[str, str, float | None, tuple[str, ...], str | None]] = []
    exact = [parity for name, parity in parities.items() if name != "drift"]
    if exact:
        rows.append(("original", "noise floor", exact[-1].noise, exact[-1].probes, None))
    for name, parity in parities.items():
        rows.append((name, "passed" if parity.passed else "failed", parity.max_rel, parity.probes, parity.failure))
    rows += [(name, "not run", None, (), why) for name, why in not_run.items()]
    return [strict(dict(zip(("leg", "status", "max_rel", "probes", "reason"), row, strict=True))) for row in rows]


def comparisons_summary(parities: Mapping[str, Parity], not_run: Mapping[str, str]) -> list[str]:
    """One line for each comparison, measured or not."""
    measured = [f"  {name}: {parity_summary(parity, approximate=name == 'drift')}" for name, parity in parities.items()]
    return [*measured, *(f"  {name}: not run: {why}" for name, why in not_run.items())]


def parity_summary(parity: Parity, *, approximate: bool = False) -> str:
    """One comparison in one line. approximate: it is of an approximate model, and says how far that is from the original."""
    worst = worst_of(parity.outputs)
    parts = []
    if parity.failure is not None:
        parts.append(parity.failure)
    elif worst is None:
        parts.append("nothing was compared")
    elif worst.problem is not None:
        parts.append(f"output {worst.name!r}: {worst.problem}")
    elif approximate or math.isinf(worst.tolerance):
        parts.append(f"approximate: {_moved(worst)}")
    else:
        numbers = f"error {figure(worst.max_rel)}, allowed {figure(worst.tolerance)}, rounding of the original {figure(worst.noise)}"
        if worst.float64:
            numbers = f"error in float64 {figure(worst.max_rel)}, allowed {figure(worst.tolerance)}"
        parts.append(f"worst of {len(parity.probes)} inputs: {numbers}" if len(parity.probes) > 1 else numbers)
    if not parity.passed:
        parts.insert(0, "FAILED")
        if parity.first_bad is not None:
            parts.append(f"first {'beyond that' if approximate else 'to differ'}: {_place(parity)}")
        if not approximate and parity.outputs and math.isfinite(parity.smallest_tolerance):
            parts.append(f"the outputs would pass at tolerance {figure(parity.smallest_tolerance)}")
    if parity.unjudged:
        parts.append(f"cannot be judged: {', '.join(parity.unjudged)}")
    if parity.dropped:
        parts.append(f"not compared: {', '.join(parity.dropped)}")
    return shown("; ".join(parts), line=True)


def drift_summary(drift: Parity, *, healed: bool = False) -> str:
    """The verdict on an approximate model: how far its outputs moved, and whether they, or else a layer, moved too far.

    healed: whether it was trained towards the original already; then whoever healed it judges by the distance whether it is usable.
    """
    if drift.failure is not None:
        return f"approximate, and not measured: {drift.failure}"
    bad = worst_of(d for d in drift.outputs if not d.passed) or worst_of(d for d in drift.sites if not d.passed)
    said = bad or worst_of(drift.outputs)
    if said is None:
        return "approximate, and not measured: nothing was compared"
    what = "outputs" if said in drift.outputs else f"the layer {said.name or ROOT}"
    found = _moved(said, what) if said.problem is None else f"{what}: {said.problem}"
    if said.problem is None and what == "outputs" and USABLE < said.max_rel < math.inf and not said.non_finite and not healed:
        found += ", not usable without healing"
    return shown(f"approximate{', and too far from the original' if bad else ''}: {found}", line=True)


def _moved(worst: Difference, what: str = "outputs") -> str:
    """How far the outputs of an approximate model, or those of one layer, are from the original's, in words."""
    if worst.non_finite or not math.isfinite(worst.max_rel):
        return f"{what} became NaN or infinite, not usable"
    moved = f"{what} moved by {100 * worst.max_rel:.2g}%"
    if math.isfinite(worst.tolerance):
        moved += f", {100 * worst.tolerance:.2g}% is allowed"
    return moved


def properties(parity: Parity) -> dict[str, str]:
    """The figures of a comparison, by name, for a test report."""
    facts = {
        "passed": str(parity.passed).lower(),
        "candidate": parity.candidate,
        "max_rel": figure(parity.max_rel),
        "noise": figure(parity.noise),
        "first_bad": parity.first_bad,
        "inputs": str(len(parity.probes)),
    }
    return {name: shown(value, line=True) for name, value in facts.items() if value}


def failure_text(reference: object, candidate: object, parity: Parity) -> str:
    """A comparison that failed, for a reviewer, in at most ten lines: where, at which input, by how much, and why."""
    rows = [d for d in (*parity.sites, *parity.outputs) if not d.passed]
    first = next(iter(rows), None)
    what = "layer" if first is not None and first in parity.sites else "output"
    lines = [("not the same function", f"{_named(candidate)} and {_named(reference)}")]
    if first is None or parity.failure is not None:
        lines.append(("cause", parity.failure or "nothing was compared"))
    else:
        lines.append((what, first.name or ROOT))
        lines.append(("probe", first.probe))
        if first.problem is None:
            lines.append(("figure", _figure_of(first)))
        lines.append(("cause", _cause(first)))
        if parity.located is not None and parity.first_bad != first.name:
            lines.append(("starts at", _place(parity)))
        wrong = [sum(not d.passed for d in rows) for rows in (parity.sites, parity.outputs)]
        total = len(parity.sites), len(parity.outputs)
        lines.append(
            ("in all", f"{wrong[0]} of {total[0]} layers and {wrong[1]} of {total[1]} outputs differ, over {len(parity.probes)} inputs")
        )
    lines.append(("compared", parity.candidate))
    (head, subjects), *rest = lines
    return "\n".join(shown(line, line=True) for line in (f"{head}: {subjects}", *(f"  {name:<9} {text}" for name, text in rest)))


def _named(side: object) -> str:
    return str(side) if isinstance(side, (str, PurePath)) else f"the given {type(side).__name__}"


def _figure_of(d: Difference) -> str:
    wrong = f"{d.non_finite} values that are NaN or infinite in one alone; " if d.non_finite else ""
    rounds = "" if d.float64 or not math.isfinite(d.noise) else f"; the reference itself rounds by {figure(d.noise)}"
    return f"{wrong}error {figure(d.max_rel)} of the largest value, {figure(d.tolerance)} is allowed{rounds}"


def _cause(d: Difference) -> str:
    """Why a row failed, in words."""
    if d.problem is not None:
        return d.problem
    if d.non_finite:
        return "NaN or infinity where the other has a number"
    if d.float64:
        return "it differs in float64, where rounding is no excuse: other weights, or another computation"
    return "more than rounding explains: other weights, another computation, or one of less precision"


def parity_table(parity: Parity) -> Listing:
    """One row for each output, then one for each swapped layer."""
    rows = []
    for kind, differences in (("output", parity.outputs), ("layer", parity.sites)):
        for d in differences:
            numbers = map(figure, (d.max_abs, d.max_rel, d.rel_l2, d.tolerance))
            rows.append((f"{kind} {d.name or ROOT}", *numbers, _verdict(d)))
    numeric = ("max abs", "max rel", "rel L2", "allowed")
    return table(("what", *numeric, "verdict"), rows, numbers=numeric)


def worst_of(differences: Iterable[Difference]) -> Difference | None:
    """The difference with the largest ratio of error to tolerance. One that cannot be compared is worst of all."""

    def badness(d: Difference) -> tuple[bool, bool, float, float]:
        share = d.max_rel / d.tolerance if d.tolerance else d.max_rel
        # of two that may be any distance away, the one that is further
        return d.problem is not None, d.non_finite > 0 or math.isnan(share), 0.0 if math.isnan(share) else share, d.max_rel

    return max(differences, key=badness, default=None)


def _place(parity: Parity) -> str:
    """Where the two models start to differ, in words."""
    where = parity.first_bad or ROOT
    found = parity.located
    if found is None or found.reference != parity.first_bad:
        return where
    other = f", {found.candidate or ROOT} of the candidate" if found.candidate != found.reference else ""
    return f"{where}{other}, {figure(found.error)} off in float64 at the probe {found.probe!r} (paired by {found.by})"


def _verdict(d: Difference) -> str:
    if d.passed:
        return Good("same")
    if d.problem is not None:
        return Alarm(d.problem)
    return Alarm(f"{d.non_finite} not finite, at {d.probe}" if d.non_finite else f"differs, at {d.probe}")
