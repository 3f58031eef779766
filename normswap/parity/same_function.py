"""Decides in float64, where rounding hardly matters, whether a candidate computes the same function (question 1 of `judge.py`)."""

from __future__ import annotations

import functools
import math
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path

from torch import Tensor, nn

from normswap.parity.comparison import Rows, compare_at
from normswap.parity.limits import CHOICE, NOISE_FACTOR, SAME, Limit
from normswap.parity.measure import distance
from normswap.parity.reference import Judgement, Key, Tensors, Truth
from normswap.parity.rounding import float64_runner, moved_probe, rounded_by
from normswap.parity.run_onnx import onnx_float64_runner
from normswap.parity.run_torch import tensors_of

CHOICES = 8  # number of runs of the reference with its numbers moved a little
A_CHOICE = 1.0  # another choice gives another value of the same size: what is off by ten times that was not made by rounding


def rows_of_module(judgement: Judgement, module: nn.Module) -> tuple[Rows, int]:
    """(a row for each tensor of a module in float64, number of forward passes). A tensor that differs by more than SAME is compared with
    the effect of rounding."""
    make = functools.partial(float64_runner, module, judgement.reference.sites, judgement.probes)
    found = judgement.in_float64(make())
    rows, failing = _rows(judgement, found)
    if not failing:
        return rows, len(judgement.probes)
    rounded = rounded_by(module, judgement.reference.tensors, judgement.precision.eps)
    rounding = movement(judgement.in_float64(make(rounded)), found, judgement.truths)
    passes = _excuse(judgement, rows, {key: rounding.get(key, 0.0) for key in failing}, tensors_of(module), CHOICES)
    return rows, passes + 2 * len(judgement.probes)


def rows_of_file(judgement: Judgement, path: Path) -> tuple[Rows, int]:
    """(a row for each tensor of an ONNX file in float64, number of forward passes). A tensor that differs by more than SAME is compared
    with the effect of rounding. If rounding the constants of the file moves it too far to tell, its row decides nothing.

    No rows if onnx's evaluator cannot run the file.
    """
    precision = judgement.precision
    try:
        found = judgement.in_float64(onnx_float64_runner(path))
    except Exception:  # an operator that onnx's evaluator does not have
        return {}, 0
    rows, failing = _rows(judgement, found)
    if not failing:
        return rows, len(judgement.probes)
    rounding = movement(judgement.in_float64(onnx_float64_runner(path, nudge=precision.eps / 2)), found, judgement.truths)
    # What the rounding of the file's constants does is known, so every number of the reference counts as one that the file has. That is a
    # larger movement, and shows most choices, so one more run is enough.
    passes = _excuse(judgement, rows, {key: rounding.get(key, 0.0) for key in failing}, judgement.reference.tensors, 1)
    for key in failing:
        row, undecided = rows[key], precision.undecided(rounding.get(key, 0.0), "file")
        most = NOISE_FACTOR * max(rounding.get(key, 0.0), A_CHOICE)
        if undecided is not None and not row.passed and not row.non_finite and row.max_rel <= most:
            rows[key] = replace(row, tolerance=NOISE_FACTOR * rounding[key], unjudged=undecided)
    return rows, passes + 2 * len(judgement.probes)


def _rows(judgement: Judgement, found: Tensors) -> tuple[Rows, set[Key]]:
    """(the rows of a candidate in float64, with SAME as the limit, the keys of those that fail only by the size of their error)."""

    def limit(key: Key, truth: Truth) -> Limit:
        return Limit(0.0, SAME if truth.is_rounded else 0.0)

    rows = {key: row for probe in judgement.probes for key, row in compare_at(judgement, probe, found, limit, float64=True).items()}
    return rows, {key for key, row in rows.items() if not row.passed and row.problem is None}


def _excuse(judgement: Judgement, rows: Rows, rounding: Mapping[Key, float], shared: Sequence[Tensor], runs: int) -> int:
    """Set the limits of failing rows to the effect of rounding; return the forward passes. If rounding decides what the reference returns,
    the row decides nothing.

    rounding: for each failing row, how far the candidate moves if its numbers are rounded otherwise. shared, runs: as for `_choices`.
    """
    precision = judgement.precision
    for key, moved in rounding.items():
        if precision.undecided(moved) is None:
            rows[key] = replace(rows[key], tolerance=max(rows[key].tolerance, NOISE_FACTOR * moved))
    failing = {key: rows[key] for key in rounding if not rows[key].passed}
    if not failing or not judgement.float64:
        return 0
    choice, passes = _choices(judgement, failing, shared, runs)
    for key, row in failing.items():
        moved = choice.get(key, 0.0)
        undecided = precision.undecided(moved)
        if undecided is None:
            rows[key] = replace(row, tolerance=max(row.tolerance, NOISE_FACTOR * moved))
        elif (not row.non_finite or math.isinf(moved)) and not row.max_rel > NOISE_FACTOR * max(moved, rounding[key], A_CHOICE):
            tolerance = max(row.tolerance, NOISE_FACTOR * max(moved, rounding[key]))
            rows[key] = replace(row, tolerance=tolerance, unjudged=undecided, non_finite=0)
    return passes


def _choices(judgement: Judgement, failing: Rows, shared: Sequence[Tensor], runs: int) -> tuple[dict[Key, float], int]:
    """(how far each tensor of the reference moves at most if its numbers and inputs move by CHOICE of their size, forward passes).

    failing: the rows of a candidate. The outputs of a model that chooses between almost equal values (nms, top-k) sometimes move far more.
    So the numbers are moved `runs` times, or until that explains each failing row. shared: the tensors of the candidate; other numbers of
    the reference move by half a unit in their last place.
    """
    precision, truths = judgement.precision, judgement.truths
    before = {key: truth.value for key, truth in truths.items()}
    plain = next((probe for probe in judgement.probes if not probe.scaled), None)
    errors = {key: math.inf if row.non_finite else row.max_rel for key, row in failing.items()}
    most: dict[Key, float] = {}
    for seed in range(runs):
        run = judgement.reference.unrounded_runner(judgement.probes, shared, precision.eps)
        near = [moved_probe(probe.in_float64(), CHOICE, seed, plain) for probe in judgement.probes]
        for key, size in movement(judgement.in_float64(run, near), before, truths).items():
            most[key] = max(most.get(key, 0.0), size)
        if all(error <= NOISE_FACTOR * most.get(key, 0.0) for key, error in errors.items()):
            break
    return most, (seed + 1) * len(judgement.probes)


def fits(rows: Rows, key: Key) -> bool:
    """Whether this tensor was compared in float64, and no more differs than rounding explains."""
    row = rows.get(key)
    return row is not None and row.within and math.isfinite(row.max_rel)


def movement(now: Tensors, before: Tensors, truths: Mapping[Key, Truth]) -> dict[Key, float]:
    """The distance of each tensor in `now`, computed with moved numbers, from the same tensor in `before`, on the scale of its truth."""
    return {key: distance(now.get(key), value, truths[key].scale if key in truths else None) for key, value in before.items()}
