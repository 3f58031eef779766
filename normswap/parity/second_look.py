"""Measures tensors again that failed, or that no probe could judge, before the candidate fails."""

from __future__ import annotations

import math
from collections.abc import Callable, Collection
from dataclasses import replace
from pathlib import Path

from torch import nn

from normswap.parity.comparison import Findings, Rows
from normswap.parity.noise import SAMPLES, noise_nearby
from normswap.parity.probes import Runner
from normswap.parity.reference import Judgement, Key
from normswap.parity.same_function import fits, rows_of_file

NoiseRunner = Callable[[], Runner]


def look_again(judgement: Judgement, candidate: nn.Module | Path, findings: Findings, noise_runner: NoiseRunner | None) -> None:
    """Measure the limits of failing rows again, if a lack of precision is the only reason why the candidate failed.

    noise_runner: makes the runner of the model or file whose noise sets the limit; noise is then measured at more inputs. Without it, the
    noise is that of the reference in another runtime, so float64 has to find nothing against the file: then it passes with an error of up
    to CAP, or with what the noise at more inputs allows.
    """
    rows = findings.precision
    failing = {key for key, row in rows.items() if not row.passed and row.problem is None and not row.non_finite}
    others = [row for key, row in rows.items() if key not in failing]
    if not failing or not all(row.passed for row in (*others, *findings.function.values())):
        return
    if noise_runner is not None:
        _measure_noise(judgement, findings, failing, noise_runner)
    elif isinstance(candidate, Path) and judgement.float64:
        wide, passes = rows_of_file(judgement.at({key.probe for key in failing}), candidate)
        findings.passes += passes
        failing = {key for key in failing if fits(wide, key)}
        for key in failing:
            if wide[key].unjudged is None:
                rows[key] = replace(rows[key], tolerance=max(rows[key].tolerance, judgement.precision.cap))
        _measure_noise(judgement, findings, {key for key in failing if not rows[key].within}, judgement.reference.own_runner)


def look_at_unjudged(judgement: Judgement, candidate: nn.Module | Path, findings: Findings, noise_runner: NoiseRunner | None) -> None:
    """Look at the outputs that no probe could judge. In float64 a file can still be the same function or not.

    An output of which float64 says nothing either, at any probe, is undecidable if nothing speaks against it: the candidate differs by no
    more than rounding explains.
    """
    _look_at_precision(judgement, findings, noise_runner or judgement.reference.own_runner)
    if isinstance(candidate, Path) and (lost := _lost(findings.precision)):
        rows, passes = rows_of_file(judgement, candidate)
        findings.function |= {key: row for key, row in rows.items() if key.name in lost}
        findings.passes += passes
    lost = _lost(findings.precision, findings.function)
    wide = [key for key in findings.function if key.name in lost and not key.site]
    findings.undecidable |= {key.name for key in wide} - {key.name for key in wide if not fits(findings.function, key)}


def _look_at_precision(judgement: Judgement, findings: Findings, noise_runner: NoiseRunner) -> None:
    """Let an output fail whose error is beyond the effect of noise at every probe, although the noise is too large to judge it.

    At one probe that may be chance: rounding sometimes moves a choice far. (Float64 does not see what is computed in float16 inside.)
    """
    rows = findings.precision
    for name in _lost(rows):
        keys = {key for key, row in rows.items() if key.name == name and not key.site and not math.isnan(row.tolerance)}
        if keys and not any(rows[key].within for key in keys):
            _measure_noise(judgement, findings, keys, noise_runner)
            if not any(rows[key].within for key in keys):
                rows.update({key: replace(rows[key], unjudged=None) for key in keys})


def _lost(*found: Rows) -> set[str]:
    """The names of the outputs that no row decides."""
    outputs = [(key.name, row) for rows in found for key, row in rows.items() if not key.site]
    return {name for name, _ in outputs} - {name for name, row in outputs if row.unjudged is None}


def _measure_noise(judgement: Judgement, findings: Findings, keys: Collection[Key], noise_runner: NoiseRunner) -> None:
    """Replace the noise and the limits of these rows, if there are any, by those at inputs nearby, where these are larger."""
    rows = findings.precision
    if not keys:
        return
    again = judgement.at({key.probe for key in keys})
    in_float64 = judgement.reference.unrounded_runner(judgement.probes) if judgement.float64 else None
    noise = noise_nearby(again, noise_runner(), in_float64)
    for key in keys:
        limit = judgement.precision.limit(max(rows[key].noise, noise.get(key, 0.0)))
        rows[key] = replace(rows[key], noise=limit.noise, tolerance=max(limit.tolerance, rows[key].tolerance), unjudged=limit.unjudged)
    findings.passes += 2 * SAMPLES * len(again.probes)
