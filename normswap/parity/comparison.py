"""What is compared: the tensors of one candidate at the probes of a judgement, each against its truth, one row for each."""

from __future__ import annotations

import math
from collections.abc import Callable, Collection, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from torch import Tensor, nn

from normswap.parity.limits import Limit
from normswap.parity.measure import NONE, UNKNOWN, error
from normswap.parity.probes import Probe, Runner, Values
from normswap.parity.reference import Judgement, Key, Truth, by_key
from normswap.parity.result import NOTHING_FINITE, Difference

Rows = dict[Key, Difference]
Tensors = dict[Key, Tensor]


@dataclass
class Findings:
    """What was found of one candidate.

    function   rows in float64: is it the same function?
    precision  rows in its own dtype, or in a runtime: is it as precise?
    failure    why the comparison as a whole failed, or None
    notes      what could not be compared, and why
    passes     forward passes
    """

    function: Rows = field(default_factory=dict)
    precision: Rows = field(default_factory=dict)
    failure: str | None = None
    notes: list[str] = field(default_factory=list)
    passes: int = 0


@dataclass(frozen=True)
class Comparison:
    """A candidate, the judgement that it is held against, and the probes at which it is. Of an ONNX file only the outputs are compared."""

    judgement: Judgement
    candidate: nn.Module | Path
    probes: Sequence[Probe]

    def at(self, names: Collection[str]) -> Comparison:
        """The same at fewer probes."""
        return Comparison(self.judgement, self.candidate, [probe for probe in self.probes if probe.name in names])

    def truths_at(self, probe: Probe) -> dict[Key, Truth]:
        return self.judgement.truths_at(probe, sites=isinstance(self.candidate, nn.Module))

    @property
    def truths(self) -> dict[Key, Truth]:
        return {key: truth for probe in self.probes for key, truth in self.truths_at(probe).items()}

    def by_key(self, probe: Probe, found: tuple[Values, Values]) -> Tensors:
        """What a run of the candidate, or of the reference, gave at a probe, under the names that the reference has for it."""
        return by_key(probe, [key.name for key in self.judgement.truths_at(probe)], found)

    def in_float64(self, run: Runner, probes: Sequence[Probe] | None = None) -> Tensors:
        """What a runner in float64 gives. probes: in place of those of the comparison, with their names."""
        found: Tensors = {}
        for probe in self.probes if probes is None else probes:
            found |= self.by_key(probe, run(probe.in_float64()))
        return found

    def rows(self, probe: Probe, found: Tensors, limit: Callable[[Key, Truth], Limit], *, float64: bool = False) -> Rows:
        """A row for each tensor that the reference or the candidate has at a probe. limit: of the error of each."""
        truths = self.truths_at(probe)
        here = {key: value for key, value in found.items() if key.probe == probe.name}
        return {key: _row(key, truths.get(key), here.get(key), limit, float64=float64) for key in dict.fromkeys((*truths, *here))}

    def rows_in_float64(self, found: Tensors, limit: Callable[[Key, Truth], Limit]) -> Rows:
        return {key: row for probe in self.probes for key, row in self.rows(probe, found, limit, float64=True).items()}


def _row(key: Key, truth: Truth | None, value: Tensor | None, limit: Callable[[Key, Truth], Limit], *, float64: bool) -> Difference:
    problem: str | None = None
    found = UNKNOWN
    if truth is None or value is None:
        problem = "the reference does not return it" if truth is None else "is missing"
    elif truth.unjudged is not None and not float64:
        found = NONE
    elif value.shape != truth.value.shape:
        problem = f"has the shape {tuple(value.shape)}, expected {tuple(truth.value.shape)}"
    elif value.dtype != (wanted := truth.value.dtype if float64 else truth.dtype):
        problem = f"has the dtype {value.dtype}, expected {wanted}"
    else:
        found = error(value, truth.value, None if float64 else truth.overflow, truth.scale_floor)
        if math.isnan(found.max_rel) and found.non_finite == 0:
            problem = NOTHING_FINITE
    limits = Limit(math.nan, math.nan) if truth is None else limit(key, truth)
    return Difference(
        key.name.rpartition("@")[0] if key.site else key.name,
        key.probe,
        *found,
        noise=limits.noise,
        tolerance=limits.tolerance,
        problem=problem,
        float64=float64,
        unjudged=limits.unjudged,
    )
