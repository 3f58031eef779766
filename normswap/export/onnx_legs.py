"""What comes of an ONNX file in each runtime that can run it: in onnxruntime, on CUDA, in onnx's evaluator."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, TypeVar

from normswap.export import cuda
from normswap.export.rollback import Attempt
from normswap.export.to_onnx import Export
from normswap.parity.judge import compare
from normswap.parity.reference import Judgement
from normswap.parity.result import Comparisons, Parity, raise_for
from normswap.parity.run_onnx import LEVELS, MORE_LEVELS, REFERENCE, runtime
from normswap.parity.taps import Tap

if TYPE_CHECKING:
    from normswap.folding import Fate

R = TypeVar("R")


def legs_of(
    judgement: Judgement, path: Path, *, dynamic: bool = True, baseline: Path | None = None, thorough: bool = False
) -> tuple[Comparisons, tuple[str, ...]]:
    """(what comes of an ONNX file in onnxruntime, notes). baseline: the file before anything was folded in it.

    At the levels at which nothing and everything is optimised; `thorough`: at all levels, and at the example in onnx's evaluator.
    """
    parities, not_run = dict[str, Parity](), dict[str, str]()
    notes: tuple[str, ...] = ()
    levels = MORE_LEVELS if thorough else LEVELS
    for level in levels:
        parity = compare(judgement, path, level=level, only_like_example=not dynamic, baseline=baseline)
        if parity.failure is not None and "NOT_IMPLEMENTED" in parity.failure:
            # onnxruntime has no float64 kernel for Conv, for one. The file is right or wrong all the same.
            reason = f"onnxruntime cannot run this file ({parity.failure.rpartition('NOT_IMPLEMENTED')[2].strip(' :')[:120]})"
            not_run |= {runtime(name): reason for name in levels if runtime(name) not in parities}
            notes = (f"{reason}, so it was verified in {runtime(REFERENCE)}",)
            break
        parities[runtime(level)] = parity
    if not_run or thorough:
        known = judgement if not_run else judgement.at(["example"])
        parity = compare(known, path, level=REFERENCE, only_like_example=not dynamic, baseline=baseline)
        if parity.failure is not None and not not_run:
            not_run[runtime(REFERENCE)] = parity.failure
        else:
            parities[runtime(REFERENCE)] = parity
    return Comparisons(parities, not_run), notes


def with_provider(result: Export, legs: Comparisons, judgement: Judgement, baseline: Path | None = None) -> tuple[Export, Comparisons]:
    """On CUDA as well, where there is one."""
    known = result.cuda
    if known is None:
        return result, legs
    measured: Mapping[str, Parity] = {}
    if runtime(LEVELS[-1]) in legs.parities:
        result, measured = on_provider(result, judgement, baseline=baseline)
    else:
        result = dataclasses.replace(result, cuda=dataclasses.replace(known, why=legs.not_run[runtime(LEVELS[-1])]))
    name = runtime(cuda.PROVIDER)
    not_run = {} if measured or result.cuda is None else {name: result.cuda.why}
    return result, Comparisons({**legs.parities, **measured}, {**legs.not_run, **not_run})


def on_provider(
    result: Export, judgement: Judgement, provider: str = cuda.PROVIDER, *, baseline: Path | None = None
) -> tuple[Export, Mapping[str, Parity]]:
    """Where onnxruntime has the provider, one more comparison, and where each kernel ran; elsewhere the export says that it was not run."""
    if result.cuda is None:
        return result, {}
    why = cuda.unavailable(result.path, provider)
    if why is not None:
        return dataclasses.replace(result, cuda=dataclasses.replace(result.cuda, why=why)), {}
    parity = compare(judgement, result.path, level=provider, only_like_example=not result.dynamic, baseline=baseline)
    if parity.failure is not None:
        return result, {parity.candidate: parity}
    arrays = [tensor.numpy(force=True) for tensor in judgement.probes[0].tensors()]
    placed = cuda.run(result.path, arrays, {site.name: site.left for site in result.sites}, provider=provider)
    known = dataclasses.replace(result.cuda, run=placed, why="")
    return dataclasses.replace(result, cuda=known), {parity.candidate: parity}


def check_legs(legs: Comparisons) -> None:
    """Raise ParityError for the first that failed."""
    if legs.failed is not None:
        raise_for(legs.failed)


def last_word(legs: Comparisons) -> Parity | None:
    """That of onnxruntime as people use it, or of whatever could run the file."""
    return legs.parities.get(runtime(LEVELS[-1])) or next(iter(reversed(list(legs.parities.values()))), None)


def attempt_of(
    result: tuple[R, Comparisons],
    fates: Sequence[Fate],
    undone: Mapping[str, str],
    taps: Sequence[Tap],
    path: Path,
    judgement: Callable[[], Judgement],
    *,
    dynamic: bool = True,
) -> Attempt[tuple[R, Comparisons]]:
    """What `settle` has to know of a file."""
    legs = result[1]
    if legs.failed is None:
        return Attempt(result, True)
    return Attempt(
        result,
        False,
        folded=[fate.name for fate in fates if fate.name not in undone],  # what stays is written otherwise, too
        why=_broken(legs.failed),
    )


def _broken(parity: Parity) -> str:
    bad = next((d for d in parity.outputs if not d.passed), None)
    if parity.failure is not None or bad is None:
        return f"{parity.candidate}: {parity.failure}"
    if bad.problem is not None or bad.non_finite:
        return f"{bad.name} in {parity.candidate} {bad.problem or f'has {bad.non_finite} non-finite mismatches'}"
    return f"{bad.name} in {parity.candidate} was {bad.max_rel:.1e} off, where at most {bad.tolerance:.1e} passes"


def clear(path: Path) -> None:
    """Take away what an attempt before this one has written."""
    for file in (path, path.with_name(f"{path.name}.data")):
        file.unlink(missing_ok=True)
