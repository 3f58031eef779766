"""What the page says of each layer: its source, statistics, formula, where it was folded, its errors. Texts and numbers, no markup."""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from typing import Literal

from torch import Tensor, nn

from normswap.detect.sites import Plan, Skip, Swap
from normswap.layer.batchless_norm import BatchlessNorm
from normswap.parity.result import Difference
from normswap.report.conversion import Report, Row, rows_of
from normswap.report.onnx import WAYS
from normswap.report.words import ROOT, figure
from normswap.swap.fit import Fit

Fate = Literal["failed", "approximate", "kept", "swapped"]
FATES: Mapping[Fate, str] = {  # the worst first
    "failed": "differs",
    "approximate": "swapped, approximate",
    "kept": "kept",
    "swapped": "swapped, exact",
}
FORMULA = "weight * (x - mean) / std + bias"


@dataclass(frozen=True)
class Measured:
    """The error of a layer in one comparison."""

    comparison: str
    difference: Difference


@dataclass(frozen=True)
class Layer:
    """One norm of the model, as the page shows it.

    number      its place in the order of execution, from 1
    row         the texts that the table has of it, too
    source      what it was: the class with its settings, or the function       formula   what it computes now, and from what
    statistics  (name, range) of its tensors     folded    where it went in the ONNX file, one sentence per call
    measured    its errors, one for each comparison that it was in; the one that decides is `worst`
    """

    number: int
    row: Row
    fate: Fate
    source: str
    producer: str
    formula: str
    statistics: tuple[tuple[str, str], ...] = ()
    folded: tuple[str, ...] = ()
    measured: tuple[Measured, ...] = ()
    worst: Difference | None = None
    fit: Fit | None = None

    @property
    def says(self) -> str:
        """Name and fate in a few words, for a label."""
        return f"{self.row.name or ROOT}: {FATES[self.fate]}"


@dataclass(frozen=True)
class Group:
    """Layers of which the same can be said, in the order of execution. errors: the smallest and the largest, in words."""

    fate: Fate
    kind: str
    layers: tuple[Layer, ...]
    why: str
    folded: str
    errors: str


def statistics_of(model: nn.Module, plan: Plan) -> dict[str, tuple[tuple[str, str], ...]]:
    """By the name of each swapped layer, (name, range) of its tensors in the converted `model`. What is no BatchlessNorm is left out."""
    modules = dict(model.named_modules())
    layers = ((swap.name, modules.get(swap.name)) for swap in plan.swaps)
    return {name: tuple(_statistics(layer)) for name, layer in layers if isinstance(layer, BatchlessNorm)}


def _statistics(layer: BatchlessNorm) -> Iterator[tuple[str, str]]:
    yield "channels", " x ".join(map(str, layer.sizes))
    mean, std = layer.statistics()
    for name, tensor in (("mean", mean), ("std", std), ("weight", layer.weight), ("bias", layer.bias)):
        if tensor is not None:
            yield name, _range(tensor.detach())


def _range(tensor: Tensor) -> str:
    low, high = tensor.min().item(), tensor.max().item()
    return f"{low:.3g}" if low == high else f"{low:.3g} to {high:.3g}"


def layers_of(report: Report) -> tuple[Layer, ...]:
    """Every norm of the model in the order of execution."""
    rows = {row.name: row for row in rows_of(report)}
    fits = {fit.name: fit for fit in report.fits}
    measured: dict[str, list[Measured]] = {}
    for name, parity in report.parities.items():
        for difference in parity.sites:
            measured.setdefault(difference.name, []).append(Measured(name, difference))
    folded: dict[str, list[str]] = {}
    for outcome in () if report.onnx is None else report.onnx.sites:
        into = f": {', '.join(outcome.into)}" if outcome.into else ""
        left = f"; left as {' and '.join(outcome.left)}: {outcome.reason}" if outcome.left else ""
        folded.setdefault(outcome.name, []).append(f"{WAYS[outcome.how]}{into}{left}")
    return tuple(
        _layer(number, decision, rows[decision.name], tuple(measured.get(decision.name, ())), folded, report, fits)
        for number, decision in enumerate(report.plan.decisions, 1)
    )


def _layer(
    number: int,
    decision: Swap | Skip,
    row: Row,
    measured: tuple[Measured, ...],
    folded: Mapping[str, list[str]],
    report: Report,
    fits: Mapping[str, Fit],
) -> Layer:
    fit = fits.get(row.name)
    approximate = isinstance(decision, Swap) and decision.preserves == "approximate"
    judged = [m for m in measured if (m.comparison == "drift") == approximate]
    if approximate:  # the other comparisons leave it out, or compare it with itself
        measured = tuple(judged)
    return Layer(
        number,
        row,
        _fate(decision, row),
        source=_source(decision),
        producer=decision.producer or (f"none: {decision.why_no_producer}" if decision.why_no_producer else ""),
        formula=_formula(decision, fit),
        statistics=report.statistics.get(row.name, ()),
        folded=tuple(folded.get(row.name, ())),
        measured=measured,
        worst=_deciding(judged),
        fit=fit,
    )


def _fate(decision: Swap | Skip, row: Row) -> Fate:
    if not row.passed:
        return "failed"
    if isinstance(decision, Skip):
        return "kept"
    return "swapped" if decision.preserves == "exact" else "approximate"


def _source(decision: Swap | Skip) -> str:
    """The class of a norm with its settings, or the function that it was a call of."""
    function, module = decision.site.function, decision.site.module
    if function is not None:
        return function if decision.site.call is None else f"{function}, in the code of {decision.site.call.owner or ROOT}"
    if module is None:
        return decision.kind
    settings = "" if any(True for _ in module.children()) else module.extra_repr()
    return f"{type(module).__name__}({settings})"


def _formula(decision: Swap | Skip, fit: Fit | None) -> str:
    if isinstance(decision, Skip):
        return ""
    if fit is None or fit.how == "exact":
        return FORMULA
    fitted = "weight, bias: the least-squares fit to the original layer's output" if fit.how == "fit" else "weight, bias: the original's"
    return f"{FORMULA}; mean, std: of the calibration data; {fitted}"


def _deciding(measured: Iterable[Measured]) -> Difference | None:
    """The difference that a layer is judged by: the one that is closest to its limit, or beyond it."""
    own = (m.difference for m in measured)
    return max(own, key=lambda d: (not d.passed, d.max_rel / d.tolerance if d.tolerance else 0.0), default=None)


def groups_of(layers: Iterable[Layer]) -> list[Group]:
    """The layers by what became of them, the worst first; each group in the order of execution."""
    found: dict[tuple[Fate, str, str, str], list[Layer]] = {}
    for layer in layers:
        folded = "; ".join(dict.fromkeys(sentence.partition(":")[0] for sentence in layer.folded))
        found.setdefault((layer.fate, layer.row.kind, layer.row.why_not, folded), []).append(layer)
    order = list(FATES)
    groups = [Group(fate, kind, tuple(of), why, folded, _span(of)) for (fate, kind, why, folded), of in found.items()]
    return sorted(groups, key=lambda group: order.index(group.fate))


def _span(layers: Iterable[Layer]) -> str:
    numbers = [layer.worst.max_rel for layer in layers if layer.worst is not None and math.isfinite(layer.worst.max_rel)]
    if not numbers:
        return ""
    low, high = figure(min(numbers)), figure(max(numbers))
    return low if low == high else f"{low} to {high}"
