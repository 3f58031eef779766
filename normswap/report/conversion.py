"""What `normswap convert` and `normswap inspect` say. docs/report.md documents the JSON."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, Literal

from normswap.detect.sites import Plan
from normswap.parity.result import Parity
from normswap.report import page, tables
from normswap.report.fields import site_json, strict
from normswap.report.onnx import cuda_lines, residue_lines
from normswap.report.parity import legs_json, legs_summary, parity_json
from normswap.report.words import by_text
from normswap.versions import versions

if TYPE_CHECKING:
    from rich.table import Table

SCHEMA_VERSION = 1
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
                "swaps": [{**site_json(swap), "preserves": swap.preserves} for swap in self.plan.swaps],
                "skips": [{**site_json(skip), "reason": skip.reason} for skip in self.plan.skips],
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
        return {key: strict(value) for key, value in content.items()}

    def summary(self) -> str:
        """The verdict, then one line for each comparison, warning and note. Plain text."""
        lines = [self.verdict, *legs_summary(self.parities, self.not_run)]
        lines += [f"  onnx: {line}" for line in self.residue]
        lines += [f"  cuda: {line}" for line in self.cuda]
        approximate = sum(known["approximate"] for known in self.facts)
        if approximate:
            lines.append(f"  with --approximate --data DATA: would swap {approximate} more, approximately")
        warnings = [(trap["text"], known["name"]) for known in self.facts for trap in known["warnings"]]
        lines += [f"  warning: {names} {text}" for text, names in by_text(warnings)]
        unseen = [(f"has an input of unknown shape: {known['unseen']}", known["name"]) for known in self.facts if known["unseen"]]
        lines += [f"  note: {names} {text}" for text, names in by_text(unseen)]
        return "\n".join([*lines, *(f"  note: {note}" for note in self.plan.notes)])

    @property
    def residue(self) -> list[str]:
        """What of the norms is left in the ONNX file, and why. In words."""
        return residue_lines((self.onnx or {}).get("sites", ()))

    @property
    def cuda(self) -> list[str]:
        """How the ONNX file runs on CUDA, in words."""
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
        return tables.of_facts(self) if self.facts else tables.of_plan(self)

    def calibration_table(self) -> Table:
        """One row for each layer that was calibrated or re-estimated; what is bad is said in the last column."""
        return tables.of_fits(self)

    def html(self) -> str:
        """One page that needs nothing from anywhere."""
        return page.html(self)


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
