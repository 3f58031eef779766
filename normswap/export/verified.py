"""Writes an ONNX file and compares it with its model in each runtime that can run it. Folds that break the file are left out.

A fold is exact, but in the file's precision it may round too much. `search` finds the folds that do by measuring: a list of folds that
fails is halved until one of them is left, as `git bisect` does with commits.
"""

from __future__ import annotations

import dataclasses
import functools
import tempfile
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Generic, TypeVar

import torch
from torch import nn

from normswap.export import cuda
from normswap.export.float16 import arguments, halved
from normswap.export.to_onnx import Export, Program, Settings
from normswap.files.recipe import recipe_hash
from normswap.models.inputs import Inputs, notes_on
from normswap.models.programs import Model, as_module
from normswap.parity.judge import compare, judge
from normswap.parity.kernels import array_of
from normswap.parity.limits import CAP
from normswap.parity.probes import LARGE, Probe, probes, resized
from normswap.parity.reference import Judgement
from normswap.parity.result import Comparisons, Parity
from normswap.parity.run_onnx import LEVELS, MORE_LEVELS, NO_KERNEL, REFERENCE, runtime

if TYPE_CHECKING:
    from normswap.folding import Outcome

T = TypeVar("T")
MEASURED = 24  # how often a file is folded and measured at most, before the one more time for the file that is returned


def verified_export(
    model: Model,
    inputs: Inputs,
    path: Path,
    *,
    judgement: Judgement | None = None,
    thorough: bool = False,
    **options: Any,
) -> tuple[Export, Comparisons]:
    """Write the file, and compare it with the model, or with the model of `judgement`. Folds that break the file are left out.

    judgement: of the model, or of the one that it was converted from, if there is one. thorough: compare at every optimisation level, and
    in onnx's evaluator. options: those of `Settings`. With `half`, the file is compared with the model in float64 by the limits of float16,
    and inputs are not scaled by 1000, as the range of float16 is small.
    """
    settings = Settings(**options)
    judged = functools.partial(_judged, model, inputs, half=settings.half)
    reference = judged() if judgement is None or settings.half else judgement
    notes = notes_on(inputs, model, fixed=settings.dynamic != "spatial") if isinstance(model, nn.Module) else []
    if settings.half:
        noise = max((truth.noise for key, truth in reference.truths.items() if not key.site), default=0.0)
        if not noise <= CAP[torch.float16]:
            notes.append(f"run by torch in float16, the model itself is {noise:.1e} away from float64")
    if isinstance(model, nn.Module):
        settings = dataclasses.replace(settings, metadata={"normswap_recipe": recipe_hash(model), **settings.metadata})
    program = Program(model, inputs.args, inputs.kwargs, settings)
    clear(path)
    first = program.write(path)
    others: Judgement | None = None
    if any(axis for axes in first.free for axis in axes):  # more is free than the batch size
        others, refused = _other_sizes(judged, first)
        if refused and isinstance(model, nn.Module):
            notes.append(f"fixed: {', '.join(refused)}; the model itself runs at no other size that was tried")
            program = Program(model, inputs.args, inputs.kwargs, dataclasses.replace(settings, dynamic="batch"))
            first, others = program.write(path), None
        elif refused:
            notes.append(f"not verified: other sizes of {', '.join(refused)}; the model runs at none that was tried")
            others = None
    with tempfile.TemporaryDirectory(prefix=".baseline-", dir=path.parent) as folder:
        baseline = None
        # In half precision the noise is that of torch: onnxruntime 1.32 crashes on the casts around unfolded norms in such a graph.
        if (first.sites or first.biases) and not settings.half:
            baseline = Path(folder) / "baseline.onnx"
            program.write_baseline(baseline)

        def attempt(kept: Mapping[str, str]) -> Attempt[tuple[Export, Comparisons]]:
            result = first
            if kept:
                clear(path)
                result = program.write(path, kept)
            found, more_notes = comparisons(reference, path, dynamic=result.dynamic, baseline=baseline, thorough=thorough)
            if others is not None:
                level = LEVELS[-1] if runtime(LEVELS[-1]) in found.parities else REFERENCE
                other = {f"{runtime(level)}, other sizes": compare(others, path, level=level, baseline=baseline)}
                found = dataclasses.replace(found, parities={**other, **found.parities})
            result = dataclasses.replace(result, notes=(*result.notes, *notes, *more_notes))
            result, found = with_provider(result, found, reference, baseline=baseline)
            return measured((result, found), (*result.sites, *result.biases), kept)

        return search(attempt).result


def _judged(
    model: Model,
    inputs: Inputs,
    asked: Callable[[tuple[Any, ...], Mapping[str, Any]], list[Probe]] | None = None,
    *,
    half: bool,
) -> Judgement:
    """The judgement of the model, or of the model in float16. asked: makes the probes from the inputs; None: the usual ones."""
    module, given, wide = as_module(model), (inputs.args, dict(inputs.kwargs)), None
    if half:
        module, given, wide = halved(module), arguments(given), module
    usual = [probe for probe in probes(*given) if not (half and probe.name.endswith(LARGE))] if asked is None else asked(*given)
    return judge(module, *given, unrounded=wide, asked=usual)


def _other_sizes(judged: Callable[..., Judgement], result: Export) -> tuple[Judgement, list[str]]:
    """(the model's judgement at other sizes than the example's, the free axes on which the model runs at no other size)."""
    others: list[tuple[str, Probe]] = []

    def asked(args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> list[Probe]:
        others.extend(resized(args, kwargs, result.free))
        return [Probe("example", args, kwargs), *(probe for _, probe in others)]

    judgement = judged(asked)
    usable = {probe.name for probe in judgement.probes}
    seen = {axis for axis, probe in others if probe.name in usable}
    return judgement, [axis for axis in dict.fromkeys(axis for axis, _ in others) if axis not in seen]


def clear(path: Path) -> None:
    """Remove the ONNX file of an earlier attempt, and the file of its weights."""
    for file in (path, path.with_name(f"{path.name}.data")):
        file.unlink(missing_ok=True)


# -- in each runtime -------------------------------------------------------------------------------------------------------------------


def comparisons(
    judgement: Judgement, path: Path, *, dynamic: bool = True, baseline: Path | None = None, thorough: bool = False
) -> tuple[Comparisons, tuple[str, ...]]:
    """(the comparisons of an ONNX file in onnxruntime with the model of `judgement`, notes). baseline: the file without any fold.

    It runs at the levels that optimise nothing and everything; `thorough`: at all levels, and on the example in onnx's evaluator.
    """
    parities, not_run = dict[str, Parity](), dict[str, str]()
    notes: tuple[str, ...] = ()
    levels = MORE_LEVELS if thorough else LEVELS
    for level in levels:
        parity = compare(judgement, path, level=level, only_like_example=not dynamic, baseline=baseline)
        if parity.failure is not None and NO_KERNEL in parity.failure:
            # onnxruntime has no float64 kernel for Conv, for example. The file is verified in onnx's evaluator then.
            reason = f"onnxruntime cannot run this file ({parity.failure.rpartition(NO_KERNEL)[2].strip(' :')[:120]})"
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


def with_provider(
    result: Export, found: Comparisons, judgement: Judgement, provider: str = cuda.PROVIDER, *, baseline: Path | None = None
) -> tuple[Export, Comparisons]:
    """Add the comparison on `provider`, and where each kernel ran. If onnxruntime has no such provider, both say that it was not run."""
    if result.cuda is None:
        return result, found
    why = found.not_run.get(runtime(LEVELS[-1])) or cuda.unavailable(result.path, provider)
    if why is not None:
        known = dataclasses.replace(result.cuda, why=why)
        return dataclasses.replace(result, cuda=known), Comparisons(found.parities, {**found.not_run, runtime(provider): why})
    parity = compare(judgement, result.path, level=provider, only_like_example=not result.dynamic, baseline=baseline)
    if parity.failure is None:
        arrays = [array_of(tensor) for tensor in judgement.probes[0].tensors()]
        placed = cuda.run(result.path, arrays, {site.name: site.left for site in result.sites}, provider=provider)
        result = dataclasses.replace(result, cuda=dataclasses.replace(result.cuda, run=placed, why=""))
    return result, Comparisons({**found.parities, parity.candidate: parity}, found.not_run)


def main_result(found: Comparisons) -> Parity | None:
    """The comparison in onnxruntime with its default optimisations, or else the last one in a runtime that could run the file."""
    return found.parities.get(runtime(LEVELS[-1])) or next(iter(reversed(list(found.parities.values()))), None)


# -- which folds are left out ----------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Attempt(Generic[T]):
    """One file that was folded and measured.

    result  the file, for the caller
    passed  whether it is the same function
    folded  the names of the norms that were to be folded in it, in order
    why     what the measurement found, in words; "" if it passed
    """

    result: T
    passed: bool
    folded: Sequence[str] = ()
    why: str = ""


def measured(result: tuple[T, Comparisons], outcomes: Sequence[Outcome], kept: Mapping[str, str]) -> Attempt[tuple[T, Comparisons]]:
    """A file and its comparisons as an Attempt. kept: the norms that were not to be folded."""
    failed = result[1].failed
    if failed is None:
        return Attempt(result, True)
    return Attempt(result, False, [outcome.name for outcome in outcomes if outcome.name not in kept], _broken(failed))


def search(attempt: Callable[[Mapping[str, str]], Attempt[T]]) -> Attempt[T]:
    """The passing attempt with the most folds, which is also the last one made; the first attempt if none passed.

    attempt: folds all norms but those that it is given, by name with the reason, and measures. To find one fold in n that breaks the file
    takes about log2(n) + 3 attempts.
    """
    latest = attempt({})
    names, kept, good, tries = list(dict.fromkeys(latest.folded)), dict[str, str](), 0, 2
    if latest.passed or not names or not attempt(_rest(names, latest)).passed:
        return latest
    first = latest
    while not latest.passed and good < len(names) and tries < MEASURED:
        # The file passes with the first `good` folds and without the others, and fails with all of them.
        high = len(names)
        while high - good > 1 and tries < MEASURED:
            middle = (good + high) // 2
            tried, tries = attempt({**kept, **_rest(names[middle:], latest)}), tries + 1
            if tried.passed:
                good = middle
            else:
                high, latest = middle, tried
        if high - good > 1:
            break
        kept[names[good]] = f"rolled back: folded, {latest.why}"
        good, latest, tries = high, attempt(kept), tries + 1
    if latest.passed:
        return latest
    latest = attempt({**kept, **_rest(names[good:], latest)})
    return latest if latest.passed else first


def _rest(names: Sequence[str], failed: Attempt[T]) -> dict[str, str]:
    """The reason to leave out each of these folds while it is not known which of them breaks the file."""
    return dict.fromkeys(names, f"rolled back: with this one or others folded, {failed.why}")


def _broken(parity: Parity) -> str:
    bad = next((d for d in parity.outputs if not d.passed), None)
    if parity.failure is not None or bad is None:
        return f"{parity.candidate}: {parity.failure}"
    if bad.problem is not None or bad.non_finite:
        return f"{bad.name} in {parity.candidate} {bad.problem or f'has {bad.non_finite} non-finite mismatches'}"
    return f"{bad.name} in {parity.candidate} was {bad.max_rel:.1e} off, where at most {bad.tolerance:.1e} passes"
