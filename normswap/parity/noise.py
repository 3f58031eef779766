"""Measures noise, the error of a computation that is correct by definition: a candidate's error may be ten times as large.

For a module, noise is the error of the reference in its own dtype (`reference.truth_of`). For an ONNX file it is measured here: the error
of its baseline, the same graph before any fold, in the same runtime at the same level. A single noise may be small by chance, so before a
candidate fails it is measured again, at inputs that differ in their last digits.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from pathlib import Path

import torch

from normswap.errors import described
from normswap.parity.comparison import LimitOf, Rows, compare_at
from normswap.parity.limits import Limit
from normswap.parity.measure import error
from normswap.parity.probes import Runner
from normswap.parity.reference import Baseline, Judgement, Key, Truth
from normswap.parity.result import NOTHING_FINITE
from normswap.parity.rounding import moved_probe
from normswap.parity.run_onnx import draws, onnx_runner
from normswap.parity.same_function import fits, rows_of_file

SAMPLES = 3  # number of inputs near a probe
INPUT_ULPS = 4  # distance of these inputs from the probe, in units of the last place


def precision_limit(judgement: Judgement, noise: Mapping[Key, float]) -> LimitOf:
    """A function that gives the limit of each tensor in a candidate's own precision. noise: of tensors whose noise is a baseline's."""

    def limit(key: Key, truth: Truth) -> Limit:
        here = noise.get(key, truth.noise)
        if truth.unjudged is not None:
            return Limit(here, math.nan, truth.unjudged)
        return judgement.precision.limit(here) if truth.is_rounded or here != 0 else Limit(here, 0.0)

    return limit


def baseline_of(judgement: Judgement, path: Path, level: str) -> Baseline:
    """The measurement of a file before any fold, made once for each file and level."""
    known = judgement.baselines.get((path, level))
    if known is None or not {probe.name for probe in judgement.probes} <= {key.probe for key in known.noise}:
        known = judgement.baselines[path, level] = _measured(judgement, path, level)
    return known


def _measured(judgement: Judgement, path: Path, level: str) -> Baseline:
    rows: Rows = {}
    try:
        run = onnx_runner(path, level)
        for probe in judgement.probes:
            rows |= compare_at(judgement, probe, judgement.by_key(probe, run(probe)), precision_limit(judgement, {}))
    except Exception as error:
        return Baseline({}, f"before anything was folded, the file raised {described(error)}", 0)
    noise = {key: row.max_rel for key, row in rows.items()}
    doubted = {key: row for key, row in rows.items() if row.problem not in (None, NOTHING_FINITE) or not (row.passed or row.unjudged)}
    if not doubted:
        return Baseline(noise, None, len(judgement.probes))
    wide, passes = rows_of_file(judgement.at({key.probe for key in doubted}), path)
    # A file is the same function as itself, also where only onnxruntime can run it: what its optimisations move is noise, up to the cap.
    most = judgement.precision.cap if judgement.reference.model == path else 0.0
    wrong = None
    for key, row in doubted.items():
        if row.problem is not None or row.non_finite or not (row.max_rel <= most or fits(wide, key)):
            what = row.problem or (f"has {row.non_finite} non-finite mismatches" if row.non_finite else f"is {row.max_rel:.1e} off")
            wrong = f"{row.name} at the probe {row.probe!r} {what} before anything was folded: {_cause(judgement, path)}"
            break
    return Baseline(noise, wrong, len(judgement.probes) + passes)


def _cause(judgement: Judgement, path: Path) -> str:
    """Why a file in which nothing is folded may compute something else than the reference."""
    if not isinstance(judgement.reference.model, Path):
        return draws(path) or "torch.onnx.export wrote another function"
    others = "than onnx's evaluator" if judgement.float64 else "when it optimises the graph"
    return draws(path) or f"onnxruntime computes something else from the file {others}"


def noise_nearby(judgement: Judgement, run: Runner, in_float64: Runner | None) -> dict[Key, float]:
    """The largest error of each tensor at SAMPLES inputs that differ from the probe in the last digits.

    run: runs the model or file whose noise is measured. in_float64: runs the reference; without it, the error is the distance from the
    output of `run` at the probe itself.
    """
    found: dict[Key, float] = {}
    floors = {key: truth.scale_floor for key, truth in judgement.truths.items()}
    for probe in judgement.probes:
        size = INPUT_ULPS * max((torch.finfo(t.dtype).eps for t in probe.tensors() if t.is_floating_point()), default=0.0)
        near = [moved_probe(probe, size, seed) for seed in range(SAMPLES)]
        truths = [run(probe)] * SAMPLES if in_float64 is None else [in_float64(moved.in_float64()) for moved in near]
        for moved, truth in zip(near, truths, strict=True):
            values = judgement.by_key(probe, run(moved))
            for key, value in judgement.by_key(probe, truth).items():
                if key in floors and key in values and values[key].shape == value.shape:
                    noise = error(values[key], value, None, floors[key]).max_rel
                    found[key] = max(found.get(key, 0.0), 0.0 if math.isnan(noise) else noise)
    return found
