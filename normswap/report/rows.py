"""What the tables and the page of a conversion show, row by row, in words."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from typing import TYPE_CHECKING, Any, NamedTuple

from normswap.detect.sites import Skip, Swap
from normswap.parity.result import Difference
from normswap.report.parity import worst_of
from normswap.report.words import ROOT

if TYPE_CHECKING:
    from normswap.report.conversion import Report

CALIBRATION = ("layer", "how", "error", "samples", "do not vary", "kurtosis", "position 0", "remarks")


class Row(NamedTuple):
    name: str
    site: str
    kind: str
    what: str
    why_not: str
    error: str
    passed: bool


def rows_of(report: Report) -> Iterator[Row]:
    """One for each normalization of the model."""
    for swap in report.plan.swaps:
        drifts = [d for parity in report.parities.values() for d in parity.sites if d.name == swap.name]
        # In the other legs an approximate swap is not made, or is held against itself.
        own = [d for d in report.parities["drift"].sites if d.name == swap.name] if "drift" in report.parities else []
        exact = [d for leg, parity in report.parities.items() if leg != "drift" for d in parity.sites if d.name == swap.name]
        worst = worst_of(own if own and swap.preserves == "approximate" else exact)
        what = f"swapped, {swap.preserves}" if report.parities else f"would swap, {swap.preserves}"
        yield Row(swap.name, _names(swap), swap.kind, what, "", _error(worst) if worst else "", all(d.passed for d in drifts))
    for skip in report.plan.skips:
        yield Row(skip.name, _names(skip), skip.kind, "kept", skip.reason, "", True)


def _names(decision: Swap | Skip) -> str:
    name = decision.name or ROOT
    if decision.aliases:
        name += f" (also {', '.join(decision.aliases)})"
    if decision.calls not in (None, 1):
        name += f", called {decision.calls} times"
    return name


def _error(d: Difference) -> str:
    return d.problem if d.problem is not None else f"{d.max_rel:.1e}"


def calibration_row(fit: Mapping[str, Any]) -> tuple[str, ...]:
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
