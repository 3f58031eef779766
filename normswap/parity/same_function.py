"""Decides in float64, where rounding hardly matters, whether a candidate computes the same function (question 1 of `judge.py`)."""

from __future__ import annotations

import functools
import math
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path

from torch import nn

from normswap.parity.comparison import LimitOf, Rows, compare_at
from normswap.parity.limits import CHOICE, NOISE_FACTOR, SAME, Limit
from normswap.parity.measure import distance
from normswap.parity.reference import Judgement, Key, Tensors, Truth
from normswap.parity.rounding import float64_runner, moved_probe, rounded_by
from normswap.parity.run_onnx import onnx_float64_runner
from normswap.parity.run_torch import tensors_of

CHOICES = 8  # number of runs of the reference with its numbers moved a little


def rows_of_module(judgement: Judgement, module: nn.Module) -> tuple[Rows, int]:
    """(a row for each tensor of a module in float64, number of forward passes). A tensor that differs by more than SAME is compared with
    the effect of rounding."""
    precision, truths = judgement.precision, judgement.truths
    run = functools.partial(float64_runner, module, judgement.reference.sites, judgement.probes)
    found = judgement.in_float64(run())
    rows = _compare(judgement, found, lambda key, truth: Limit(0.0, SAME if truth.is_rounded else 0.0))
    failing = {key for key, row in rows.items() if not row.passed and row.problem is None}
    if not failing:
        return rows, len(judgement.probes)
    rounded = rounded_by(module, judgement.reference.tensors, precision.eps)
    rounding = movement(judgement.in_float64(run(rounded)), found, truths)
    choice, passes = _choice(judgement, module, failing)
    for key in failing:
        moved = choice.get(key, 0.0)
        undecided = precision.undecided(moved)
        if undecided is None:
            if precision.undecided(rounding.get(key, 0.0)) is None:
                most = NOISE_FACTOR * max(rounding.get(key, 0.0), moved)
                rows[key] = replace(rows[key], tolerance=max(rows[key].tolerance, most))
        elif not rows[key].non_finite or math.isinf(moved):
            rows[key] = replace(rows[key], unjudged=undecided, non_finite=0)
    return rows, passes + 2 * len(judgement.probes)


def _choice(judgement: Judgement, module: nn.Module, failing: set[Key]) -> tuple[dict[Key, float], int]:
    """(how far each tensor of the reference moves at most if its numbers and inputs move by CHOICE of their size, forward passes).

    The outputs of a model that chooses between almost equal values (nms, top-k) sometimes move far more. So the numbers are moved CHOICES
    times, or until every failing tensor has moved that far.
    """
    precision, truths = judgement.precision, judgement.truths
    before = {key: truth.value for key, truth in truths.items()}
    most: dict[Key, float] = {}
    for seed in range(CHOICES):
        run = judgement.reference.unrounded_runner(judgement.probes, tensors_of(module), precision.eps)
        near = [moved_probe(probe.in_float64(), CHOICE, seed, judgement.probes[0]) for probe in judgement.probes]
        for key, size in movement(judgement.in_float64(run, near), before, truths).items():
            most[key] = max(most.get(key, 0.0), size)
        if all(precision.undecided(most.get(key, 0.0)) for key in failing):
            break
    return most, (seed + 1) * len(judgement.probes)


def rows_of_file(judgement: Judgement, path: Path) -> Rows:
    """A row for each tensor of an ONNX file in float64; its limit is the effect of rounding the file's constants.

    No rows if onnx's evaluator cannot run the file.
    """
    precision, truths = judgement.precision, judgement.truths
    try:
        found = judgement.in_float64(onnx_float64_runner(path))
        moved = movement(judgement.in_float64(onnx_float64_runner(path, nudge=precision.eps / 2)), found, truths)
    except Exception:  # an operator that onnx's evaluator does not have
        return {}

    def limit(key: Key, truth: Truth) -> Limit:
        rounding = moved.get(key, 0.0)
        return Limit(0.0, max(SAME, NOISE_FACTOR * rounding), precision.undecided(rounding))

    return _compare(judgement, found, limit)


def _compare(judgement: Judgement, found: Tensors, limit: LimitOf) -> Rows:
    return {key: row for probe in judgement.probes for key, row in compare_at(judgement, probe, found, limit, float64=True).items()}


def is_same(rows: Rows, key: Key) -> bool:
    """Whether the rows in float64 decide that this tensor is the same."""
    row = rows.get(key)
    return row is not None and row.passed and row.unjudged is None


def movement(now: Tensors, before: Tensors, truths: Mapping[Key, Truth]) -> dict[Key, float]:
    """The distance of each tensor in `now`, computed with moved numbers, from the same tensor in `before`."""
    floors = {key: truth.scale_floor for key, truth in truths.items()}
    return {key: distance(now.get(key), value, floors.get(key, 0.0)) for key, value in before.items()}
