"""What a comparison of two models measured, as frozen data: `Parity`; and the error that is raised if it failed.

Error of a tensor:  max_rel = max|candidate - truth| / scale,  truth = the reference's tensor in float64,
scale = max|truth|, but at least 1e-3 of the largest |truth| of that tensor at the inputs that are not scaled.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field

from normswap.errors import NormswapError

NOTHING_FINITE = "has no finite value to compare"
RANDOM = "so no two runs of it can be compared"  # the end of a failure that is of random numbers
NO_NOISE = "make the random numbers an input of the model; `--no-onnx` writes the converted model without an ONNX file"


def worst(errors: Iterable[float]) -> float:
    """The largest error; NaN if any is NaN or there is none. (`max` keeps or drops a NaN depending on the order.)"""
    values = list(errors)
    return float("nan") if not values or any(math.isnan(v) for v in values) else max(values)


@dataclass(frozen=True)
class Difference:
    """One output, or one swapped layer, at one probe.

    noise      max_rel of the reference itself, run as the candidate was: what rounding alone does to this tensor
    tolerance  the largest max_rel that passes here
    non_finite number of elements that are NaN or infinite in only one of the two, or in both but with different values
    problem    why nothing could be compared (missing, wrong shape, wrong dtype), or None
    float64    whether the candidate ran in float64: such rows decide whether it is the same function, the others how precise it is
    unjudged   why this row decides nothing (the reference itself rounds too much there, say), or None
    """

    name: str
    probe: str
    max_abs: float
    max_rel: float
    rel_l2: float
    non_finite: int
    noise: float
    tolerance: float
    problem: str | None = None
    float64: bool = False
    unjudged: str | None = None

    @property
    def passed(self) -> bool:
        return self.within or (self.unjudged is not None and self.problem is None and not self.non_finite)

    @property
    def within(self) -> bool:
        """Whether the error is at most the tolerance: even where a row decides nothing, a larger error speaks against the candidate."""
        # Written so that NaN fails: every comparison with NaN is False.
        return self.problem is None and not self.non_finite and self.max_rel <= self.tolerance


@dataclass(frozen=True)
class Located:
    """The first layer or node at which two models differ: its name in each, the error there, the probe, and how the two were paired.

    by: "name", or "place" in the order of execution, or "value", the nearest one of the same size.
    """

    reference: str
    candidate: str
    error: float
    probe: str
    by: str


@dataclass(frozen=True)
class Parity:
    """Whether a candidate computes the reference's function, and how far it is from it.

    outputs    one Difference per output, at its worst probe; sites: one per swapped layer, in execution order
    candidate  what was compared, e.g. "torch.float32" or "onnxruntime (all)"
    failure    why the comparison as a whole failed (nothing compared, candidate raised), or None
    probes     the inputs that were compared; dropped: probes the reference itself could not run, with its reason
    unjudged   rows that decide nothing: the probe, the output or layer, and the reason
    located    where the two start to differ, if `locate` was called
    all_outputs  one Difference per output, probe and precision, where `outputs` holds the worst of them
    """

    outputs: tuple[Difference, ...]
    sites: tuple[Difference, ...] = ()
    failure: str | None = None
    candidate: str = ""
    probes: tuple[str, ...] = ()
    dropped: tuple[str, ...] = ()
    unjudged: tuple[str, ...] = ()
    located: Located | None = None
    forward_passes: int = 0
    all_outputs: tuple[Difference, ...] = field(default=(), repr=False)

    @property
    def passed(self) -> bool:
        return self.failure is None and bool(self.outputs) and all(d.passed for d in (*self.outputs, *self.sites))

    def __bool__(self) -> bool:
        return self.passed

    @property
    def max_abs(self) -> float:
        """The largest absolute error of any output at any probe; NaN if one could not be compared."""
        return worst(d.max_abs for d in self._judged)

    @property
    def max_rel(self) -> float:
        """The largest error of any output at any probe, relative to its scale; NaN if one could not be compared."""
        return worst(d.max_rel for d in self._judged)

    @property
    def noise(self) -> float:
        """The noise floor: the largest error of the reference itself, run as the candidate was, of any output at any probe."""
        return worst(d.noise for d in self._judged if not d.float64)

    @property
    def smallest_tolerance(self) -> float:
        """The smallest `tolerance` with which every output would have passed; NaN if none would."""
        rows = [d for d in self.all_outputs or self.outputs if not d.float64]
        hopeless = self.failure is not None or any(d.problem is not None or d.non_finite for d in rows)
        return math.nan if hopeless else worst(d.max_rel for d in rows)

    @property
    def _judged(self) -> list[Difference]:
        rows = list(self.all_outputs or self.outputs)
        return [d for d in rows if d.unjudged is None] or rows

    @property
    def first_bad(self) -> str | None:
        """The first swapped layer, in execution order, that differs; else where the two start to differ; else the first such output."""
        site, output = (next((d.name for d in rows if not d.passed), None) for rows in (self.sites, self.outputs))
        if site is not None:
            return site
        return output if self.located is None else self.located.reference


@dataclass(frozen=True)
class Comparisons:
    """All comparisons of one conversion or export, by name.

    parities  the comparisons that were made, in order
    not_run   those that were not made, with the reason; they count neither as passed nor as failed
    """

    parities: Mapping[str, Parity] = field(default_factory=dict)
    not_run: Mapping[str, str] = field(default_factory=dict)

    @property
    def passed(self) -> bool:
        return all(self.parities.values())

    @property
    def failed(self) -> Parity | None:
        """The first that failed."""
        return next((parity for parity in self.parities.values() if not parity), None)


class ParityError(NormswapError):
    """The converted model does not compute the same function as the original. `parity` holds the measurements."""

    exit_code = 3

    def __init__(self, message: str, *, parity: Parity, hint: str | None = None) -> None:
        super().__init__(message, hint=hint)
        self.parity = parity


def raise_for(
    parity: Parity,
    failed: str = "not the same function",
    hint: str = "exclude the layer that differs, or report this with the model's architecture",
) -> None:
    """Raise ParityError unless the measurement passed. failed: how the message describes the candidate; hint: what to do."""
    if parity.passed:
        return
    bad = next((d for d in (*parity.sites, *parity.outputs) if not d.passed), None)
    if parity.failure is not None or bad is None:
        what = parity.failure or "nothing was compared"
        if what.endswith(RANDOM):
            failed, hint = "not judged", NO_NOISE
    elif bad.problem is not None:
        what = f"{bad.name} {bad.problem}"
        if bad.unjudged is not None or bad.problem == NOTHING_FINITE:
            failed = "not judged"
            hint = "give inputs like those that the model was trained on: --input on the command line, example_inputs=... in Python"
    else:
        ran = "run in float64, where rounding is no excuse, " if bad.float64 else ""
        what = (
            f"{ran}first at {bad.name}: error {bad.max_rel:.3g} of max|reference| at the probe {bad.probe!r}, "
            f"{bad.non_finite} non-finite mismatches; at most {bad.tolerance:.3g} passes"
        )
        if not bad.float64 and not bad.non_finite and math.isfinite(bad.noise):
            what += f", as the original itself is {bad.noise:.3g} off there"
    raise ParityError(f"converted, but {parity.candidate} is {failed}: {what}", parity=parity, hint=hint)
