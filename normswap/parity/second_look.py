"""Measures tensors again that failed, or that no probe could judge, before the candidate fails."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

from torch import nn

from normswap.parity.comparison import Findings
from normswap.parity.noise import SAMPLES, noise_nearby
from normswap.parity.probes import Runner
from normswap.parity.reference import Judgement
from normswap.parity.same_function import is_same, rows_of_file


def look_again(judgement: Judgement, candidate: nn.Module | Path, findings: Findings, noise_runner: Callable[[], Runner] | None) -> None:
    """Measure the limits of failing rows again, if a lack of precision is the only reason why the candidate failed.

    noise_runner: makes the runner of the model or file whose noise sets the limit; noise is then measured at more inputs. Without it, a
    file that is the same function in float64 passes with an error of up to CAP.
    """
    rows = findings.precision
    failing = {key for key, row in rows.items() if not row.passed and row.problem is None and not row.non_finite}
    others = [row for key, row in rows.items() if key not in failing]
    if not failing or not all(row.passed for row in (*others, *findings.function.values())):
        return
    again = judgement.at({key.probe for key in failing})
    if noise_runner is not None:
        in_float64 = judgement.reference.unrounded_runner(judgement.probes) if judgement.float64 else None
        noise = noise_nearby(again, noise_runner(), in_float64)
        for key in failing:
            limit = judgement.precision.limit(max(rows[key].noise, noise.get(key, 0.0)))
            rows[key] = replace(rows[key], noise=limit.noise, tolerance=max(limit.tolerance, rows[key].tolerance), unjudged=limit.unjudged)
        findings.passes += 2 * SAMPLES * len(again.probes)
    elif isinstance(candidate, Path) and judgement.float64:
        same = rows_of_file(again, candidate)
        for key in failing:
            if is_same(same, key):
                rows[key] = replace(rows[key], tolerance=max(rows[key].tolerance, judgement.precision.cap))
        findings.passes += 2 * len(again.probes)


def look_at_unjudged(judgement: Judgement, path: Path, findings: Findings) -> None:
    """Add rows in float64 for the outputs of a file whose precision no probe could judge: they can still be the same function or not."""
    judged = {key.name for key, row in findings.precision.items() if row.unjudged is None}
    lost = {key.name for key in findings.precision} - judged
    if lost:
        findings.function |= {key: row for key, row in rows_of_file(judgement, path).items() if key.name in lost}
        findings.passes += 2 * len(judgement.probes)
