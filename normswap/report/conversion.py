"""The report of `normswap convert` and `normswap inspect`. docs/report.md documents the JSON."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, Literal, NamedTuple

from normswap.detect.facts import Facts
from normswap.detect.sites import Plan, Skip, Swap
from normswap.parity.result import Parity
from normswap.report.healing import healing_json, healing_lines
from normswap.report.onnx import cuda_lines, export_facts, residue_lines
from normswap.report.parity import comparisons_json, comparisons_summary, drift_summary, parity_json, worst_of
from normswap.report.tables import Alarm, Good, Listing, table
from normswap.report.words import ROOT, by_text, figure, site_json, strict, text_of
from normswap.swap.fit import Fit
from normswap.versions import REPORT_VERSION, versions

if TYPE_CHECKING:
    from normswap.api.heal import Healing
    from normswap.export.to_onnx import Export

Status = Literal["converted", "planned", "nothing to swap", "parity failed"]
CALIBRATION = ("layer", "how", "error", "samples", "do not vary", "kurtosis", "position 0", "remarks")


@dataclass(frozen=True)
class Report:
    """The report of one conversion, or of a plan without measurements.

    source    the SRC, as the user named it
    parities  the comparisons by name ("torch", "onnxruntime (all)"), in the order of measurement; empty for a plan
    not_run   the comparisons that were not made, and why
    onnx      the ONNX file that was written, and where each norm went in it; None without one
    seconds   the time of each stage, in order
    files     the names of the written files, relative to the output directory
    fits      the quality of the fit of each layer that was calibrated or re-estimated
    healing   what training towards the original did; None if it was not trained
    facts     the facts about each norm from an inspection, which the table then shows
    statistics  by the name of a swapped layer, (name, range) of its tensors; the page shows them
    directory   where it is written, as the user named it
    trust, trust_packages   the word that the user gave to read the source, which what was made of it needs, too
    """

    source: str
    plan: Plan
    parities: Mapping[str, Parity] = field(default_factory=dict)
    not_run: Mapping[str, str] = field(default_factory=dict)
    onnx: Export | None = None
    seconds: Mapping[str, float] = field(default_factory=dict)
    files: Sequence[str] = ()
    fits: Sequence[Fit] = ()
    healing: Healing[Any] | None = None
    facts: Sequence[Facts] = ()
    statistics: Mapping[str, tuple[tuple[str, str], ...]] = field(default_factory=dict)
    directory: str = ""
    trust: bool = False
    trust_packages: Sequence[str] = ()
    versions: Mapping[str, str] = field(default_factory=versions)

    @property
    def status(self) -> Status:
        """The outcome of the conversion, in one of four phrases. `json` has it, so a phrase never changes; `verdict` says more."""
        if not all(parity.passed for parity in self.parities.values()):
            return "parity failed"
        if not self.plan.swaps:
            return "nothing to swap"
        return "converted" if self.parities else "planned"

    @property
    def verdict(self) -> str:
        """The status in one sentence; of an approximate conversion also how far it is from the original, and if that is too far."""
        total = len(self.plan.swaps) + len(self.plan.skips)
        count = f"{len(self.plan.swaps)} of {total} normalization layer{'' if total == 1 else 's'}"
        nothing = f"{count} can be" if total else "the model has no normalization"
        drift = self.parities.get("drift")
        if drift is not None and all(parity.passed for parity in self.parities.values() if parity is not drift):
            return f"{drift_summary(drift, healed=self.healing is not None)}; {count} swapped"
        return {
            "converted": f"converted: {count} swapped",
            "planned": f"would swap {count}",
            "nothing to swap": f"nothing to swap: {nothing}",
            "parity failed": f"parity failed: {count} swapped, and the result is not the same function",
        }[self.status]

    @property
    def onnx_lines(self) -> list[tuple[str, str]]:
        """(topic, line) in words: the norms that are left in the ONNX file and why, and how the file runs on CUDA."""
        if self.onnx is None:
            return []
        return [*(("onnx", line) for line in residue_lines(self.onnx)), *(("cuda", line) for line in cuda_lines(self.onnx.cuda))]

    def json(self) -> dict[str, Any]:
        """The report as strict JSON, with the keys in the documented order."""
        plan = {
            "backend": self.plan.backend,
            "notes": self.plan.notes,
            "swaps": [{**site_json(swap), "preserves": swap.preserves} for swap in self.plan.swaps],
            "skips": [{**site_json(skip), "reason": skip.reason} for skip in self.plan.skips],
        }
        content = {
            "version": REPORT_VERSION,
            "status": self.status,
            "source": self.source,
            "plan": plan,
            "facts": self.facts,
            "pairs": self.pairs,
            "parities": {name: parity_json(parity) for name, parity in self.parities.items()},
            "legs": comparisons_json(self.parities, self.not_run),
            "calibration": self.fits,
            "healing": None if self.healing is None else healing_json(self.healing),
            "onnx": None if self.onnx is None else export_facts(self.onnx),
            "seconds": self.seconds,
            "versions": self.versions,
            "files": self.files,
        }
        return {key: strict(value) for key, value in content.items()}

    def summary(self) -> str:
        """The verdict, then one line for each comparison, warning and note. Plain text."""
        lines = [self.verdict, *comparisons_summary(self.parities, self.not_run)]
        if self.healing is not None:
            lines += [f"  healed: {line}" for line in healing_lines(self.healing)]
        lines += [f"  {topic}: {line}" for topic, line in self.onnx_lines]
        lines += self._pair_lines()
        lines += self._rmsnorm_lines()
        approximate = sum(known.approximate for known in self.facts)
        if approximate:
            lines.append(f"  with --approximate --data DATA: would swap {approximate} more, approximately")
        warnings = [(warning.text, known.name) for known in self.facts for warning in known.warnings]
        lines += [f"  warning: {names} {text}" for text, names in by_text(warnings)]
        unseen = [(f"has an input of unknown shape: {known.unseen}", known.name) for known in self.facts if known.unseen]
        lines += [f"  note: {names} {text}" for text, names in by_text(unseen)]
        return text_of([*lines, *(f"  note: {note}" for note in self.plan.notes)])

    @property
    def pairs(self) -> dict[str, int] | None:
        """How many swaps an inspection found that would be coupled to a producer; None if this is no inspection."""
        if not self.facts:
            return None
        swapped = {swap.name for swap in self.plan.swaps}
        coupled = sum(known.couples_to is not None for known in self.facts if known.name in swapped)
        return {"paired": coupled, "swaps": len(swapped)}

    def _pair_lines(self) -> list[str]:
        """How many swaps would be coupled to a producer, and why the others would not."""
        pairs = self.pairs
        if pairs is None or not pairs["swaps"]:
            return []
        swapped = {swap.name for swap in self.plan.swaps}
        why_not = [(known.why_not_coupled, known.name) for known in self.facts if known.name in swapped and known.why_not_coupled]
        alone = [f"  not paired: {names.removesuffix(': each')}: {text}" for text, names in by_text(why_not)]
        return [f"  paired: {pairs['paired']} of {pairs['swaps']} with the conv or linear layer before them, to train with it", *alone]

    def _rmsnorm_lines(self) -> list[str]:
        """How many LayerNorms an inspection found that could be an RMSNorm, exactly, and why the others could not."""
        layer_norms = [known for known in self.facts if known.to_rmsnorm is not None]
        if not layer_norms:
            return []
        count = sum(known.to_rmsnorm is True for known in layer_norms)
        why_not = [(known.why_not_rmsnorm, known.name) for known in layer_norms if known.why_not_rmsnorm]
        stay = [f"  no RMSNorm: {names.removesuffix(': each')}: {text}" for text, names in by_text(why_not)]
        return [f"  with --to rmsnorm: {count} of {len(layer_norms)} LayerNorms would be an RMSNorm, exactly", *stay]


class Row(NamedTuple):
    """The texts of the table and the page for one norm of the model."""

    name: str
    site: str
    kind: str
    what: str
    why_not: str
    error: str
    passed: bool


def rows_of(report: Report) -> Iterator[Row]:
    """One row for each norm of the model."""
    for swap in report.plan.swaps:
        drift = report.parities.get("drift", Parity(()))
        own = [d for d in drift.sites if d.name == swap.name]
        exact = [d for name, parity in report.parities.items() if name != "drift" for d in parity.sites if d.name == swap.name]
        # An approximate swap is judged by its drift alone: other comparisons do not include it, or compare it with itself.
        worst = worst_of(own if own and swap.preserves == "approximate" else exact)
        what = f"swapped, {swap.preserves}" if report.parities else f"would swap, {swap.preserves}"
        error = "" if worst is None else figure(worst.max_rel) if worst.problem is None else worst.problem
        yield Row(swap.name, _site(swap), swap.kind, what, "", error, all(d.passed for d in (*own, *exact)))
    for skip in report.plan.skips:
        yield Row(skip.name, _site(skip), skip.kind, "kept", skip.reason, "", True)


def report_table(report: Report) -> Listing:
    """A table with one row for each norm of the model; for an inspection, with the facts about each. Empty columns are left out."""
    if report.facts:
        return _facts_table(report)
    rows = [(row.site, row.kind, row.what, row.why_not, _coloured(row)) for row in rows_of(report)]
    return _filled(("site", "kind", "what", "why not", "max error"), rows)


def _filled(headers: Sequence[str], rows: Sequence[Sequence[str]]) -> Listing:
    """A table of the columns in which a row says something."""
    filled = [index for index in range(len(headers)) if not rows or any(row[index] for row in rows)]
    kept = [headers[index] for index in filled]
    numbers = [name for name in ("max error",) if name in kept]
    return table(kept, ([row[index] for index in filled] for row in rows), numbers=numbers, below=("why not",))


def _coloured(row: Row) -> str:
    """The error of a row; that of an approximate swap is neither right nor wrong, unless it is above a limit."""
    if not row.passed:
        return Alarm(row.error)
    return row.error if "approximate" in row.what else Good(row.error)


def calibration_table(report: Report) -> Listing:
    """A table with one row for each layer that was calibrated or re-estimated; the last column names bad numbers."""
    rows = ((*cells, Alarm(remarks)) for *cells, remarks in map(calibration_row, report.fits))
    return table(CALIBRATION, rows, numbers=CALIBRATION[2:-1], below=CALIBRATION[-1:])


def calibration_row(fit: Fit) -> tuple[str, ...]:
    """The cells of one layer for the headers CALIBRATION; a number that was not measured is empty."""
    seen = fit.samples > 0
    return (
        fit.name or ROOT,
        {"fit": "fitted", "exact": "re-estimated", "adapt": "adapted"}[fit.how] + _repaired(fit),
        figure(fit.error) if seen else "",
        str(fit.samples) if seen else "",
        f"{fit.flat_channels} of {fit.channels}" if seen else "",
        f"{fit.max_kurtosis:.1f}" if seen and math.isfinite(fit.max_kurtosis) else "",
        "" if fit.first_position is None else f"{fit.first_position:.1f}",
        "; ".join(fit.remarks),
    )


def _repaired(fit: Fit) -> str:
    count = len(fit.repaired)
    return f", {count} linear{'' if count == 1 else 's'} repaired" if count else ""


def _facts_table(report: Report) -> Listing:
    """The table of an inspection."""
    known = {facts.name: facts for facts in report.facts}
    headers = ("site", "kind", "input", "batches", "momentum", "eps", "constant", "folds into", "what", "why not")
    rows = []
    for row in rows_of(report):
        facts = known[row.name]
        what = f"{row.what}, or approximate" if facts.approximate and row.what == "kept" else row.what
        rows.append((row.site, row.kind, *_known(facts), facts.folds_into or "none", what, row.why_not))
    return _filled(headers, rows)


def _known(facts: Facts) -> tuple[str, str, str, str, str]:
    """The cells for the input, batches, momentum, eps, and constant channels of a norm. Empty: does not apply, or none."""
    shapes = ", ".join("x".join(map(str, shape)) for shape in facts.shapes) or "unknown"
    numbers = (facts.batches, facts.momentum, facts.eps)
    batches, momentum, eps = ("" if n is None else f"{n:g}" if isinstance(n, float) else str(n) for n in numbers)
    constant = [f"{count} {word}" for count, word in ((facts.dead_channels, "dead"), (facts.zero_weights, "zero")) if count]
    return shapes, batches, momentum, eps, ", ".join(constant)


def _site(decision: Swap | Skip) -> str:
    """The name of a layer, its other names, and how often it is called."""
    name = decision.name or ROOT
    if decision.aliases:
        name += f" (also {', '.join(decision.aliases)})"
    if decision.calls not in (None, 1):
        name += f", called {decision.calls} times"
    return name
