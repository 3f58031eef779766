"""Decides whether a candidate computes the same function as a reference, and does so as precisely.

Both run at the same inputs, the probes (`probes.py`), and every tensor that they return is compared. With

    t   the reference's tensor in float64: the truth
    c   the candidate's tensor
    s   the scale: max|t|, but at least 1e-3 of the largest |t| of that output at the probes that are not scaled, so that an output
        that almost vanishes at one probe is not compared with its own small size; and at least 1e-3 of the reference's tensor in its own
        dtype there, as an output that is nothing but rounding (a difference of equal values) has no size in float64

the error of a tensor is  max|c - t| / s  over its elements. It has to answer two questions.

1. Is it the same function? (`same_function.py`) A candidate module runs in float64, too, with next to no rounding: an error of at most 1e-9
   passes. But weights that the reference does not have (of a fused convolution, say) were rounded when they were stored, and a model may
   choose between almost equal values (top-k, nms). So a tensor that fails is measured again, with

       r   how far the candidate's outputs move if its numbers move, at random, by up to half a unit in their last place; numbers that the
           reference has, too, do not move, nor do whole numbers, nor statistics of a BatchlessNorm that has stored unrounded ones
       q   how far the reference's outputs move if its inputs and numbers move by up to 2^-50 of their size; numbers that the candidate
           does not have move by up to half a unit in their last place

   and an error of at most  max(1e-9, 10 r, 10 q)  passes. If q is above CHAOS (1e-2 in float32), the reference's own output depends on
   rounding, and float64 decides nothing; for a file the same holds of r. But an error of more than ten times s, 10 r and 10 q was made by
   no rounding, and fails. A conversion changes only statistics, whose unrounded values are stored: its limit is 1e-9.

2. Is it as precise? (`noise.py`) A candidate in its own dtype, or an ONNX file in a runtime, passes with an error of at most

       max(10 n, FLOOR)       n   the noise: the error of a computation that is correct by definition, in the same runtime and level

   For a module, n is the error of the reference in its own dtype. For an ONNX file, n is the error of its baseline: the same graph before
   any fold, which is itself compared with the reference. FLOOR is 1e-6 in float32. If n is above CAP (1e-4 in float32), precision cannot
   be judged.

A tensor that fails the second question alone is measured again (`second_look.py`), as a single n may be small by chance. A tensor that
cannot be judged at a probe is named in `Parity.unjudged`, and the other probes decide (`verdict.py`). An output whose precision can be
judged at no probe fails if its error is above 10 n at all of them. A file then has to answer the first question, too, in onnx's evaluator.
An output of which float64 decides nothing either, at any probe, passes if another output is judged and its error is at most 10 r or 10 q at
every probe: then all of it is what rounding explains. Else it fails.
The judge fails closed: NaN, a missing output, another shape or dtype, and nothing to compare all fail, and one failing output or layer
fails all.

`limits.py` has the numbers. FLOOR depends on the coarsest dtype of weights, outputs and compared layers; CAP and CHAOS depend on the
coarsest dtype that any operation returns.

Forward passes: 6 probes in float64 and 6 in the reference's own dtype; then 5 and 5 for a module, 6 for an ONNX file at each level and 6
for its baseline; one less of each if the example is a batch of 1. A probe at which the reference raises (a fixed batch size, say) is
dropped and named; the flat probe also if n is above CAP, or the reference returns only 0.

Memory: the float64 run shares the weights and converts each when an operation reads it. Of a layer's output, at most `measure.KEPT` values
per probe and call are kept; the model's outputs are kept whole.
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import nn

from normswap.errors import NormswapError, UsageError, described
from normswap.models.copying import copy_for_running
from normswap.parity.comparison import Findings, LimitOf, compare_at
from normswap.parity.limits import SCALE_SHARE, Limit, Precision, coarsest
from normswap.parity.measure import largest
from normswap.parity.noise import baseline_of, precision_limit
from normswap.parity.probes import Probe, Runner, probes
from normswap.parity.reference import Judgement, Key, Reference, Tensors, Truth, keyed, truth_of
from normswap.parity.result import Parity
from normswap.parity.run_onnx import draws, onnx_dtypes, onnx_runner, runtime
from normswap.parity.run_torch import OwnTensors, module_runner
from normswap.parity.same_function import rows_of_module
from normswap.parity.second_look import look_again, look_at_unjudged
from normswap.parity.verdict import verdict


def judge(
    reference: nn.Module | Path,
    args: tuple[Any, ...],
    kwargs: Mapping[str, Any],
    *,
    sites: Sequence[str] = (),
    asked: Sequence[Probe] | None = None,
    unrounded: nn.Module | None = None,
) -> Judgement:
    """Run the reference in float64, then in its own dtype to measure its noise.

    sites: names of modules whose outputs are compared, too. asked: probes to use, in place of those made from the arguments; the first
    is named "example". unrounded: the model from which the reference was rounded; it then runs in float64 in place of the reference.

    Raises UsageError if the reference cannot run on the example inputs.
    """
    original = Reference(reference, sites, unrounded)
    asked = list(probes(args, kwargs)) if asked is None else list(asked)
    dropped: list[str] = []
    computed_in: set[torch.dtype] = set()
    in_float64: dict[str, Tensors] | None = None
    try:
        in_float64 = _run_all(lambda: original.float64_runner(asked), [probe.in_float64() for probe in asked], dropped, " in float64")
    except NormswapError as error:
        # It has int8 kernels, say. Then the run in its own dtype is the truth.
        dropped.append(f"float64, so judged in its own dtype: {error.message.rpartition('in float64: ')[2]}")
    usable = [probe for probe in asked if in_float64 is None or probe.name in in_float64]
    in_own_dtype = _run_all(lambda: original.own_runner(computed_in), usable, dropped)
    judged = in_own_dtype if in_float64 is None else in_float64
    usable = [probe for probe in usable if probe.name in in_own_dtype]
    dtypes = onnx_dtypes(reference) if isinstance(reference, Path) else {tensor.dtype for tensor in original.tensors}
    dtypes |= {tensor.dtype for values in in_own_dtype.values() for tensor in values.values()}
    precision = Precision(coarsest(dtypes), coarsest(dtypes | computed_in))
    reach = _reach(judged[probe.name] for probe in usable if not probe.scaled)
    truths = {
        probe.name: {
            key: truth_of(value, in_own_dtype[probe.name].get(key), SCALE_SHARE * reach.get((key.name, key.site), 0.0))
            for key, value in judged[probe.name].items()
        }
        for probe in usable
    }
    for probe in [probe for probe in usable if probe.flat]:
        useless = next(filter(None, (_useless(truth, precision) for key, truth in truths[probe.name].items() if not key.site)), None)
        if useless is not None:
            dropped.append(f"{probe.name}: {useless}")
            del truths[probe.name]
    return Judgement(
        reference=original,
        probes=[probe for probe in usable if probe.name in truths],
        truths={key: truth for found in truths.values() for key, truth in found.items()},
        precision=precision,
        dropped=dropped,
        passes=len(judged) + len(in_own_dtype),
        flat=frozenset(probe.name for probe in asked if probe.flat),
        float64=in_float64 is not None,
    )


def _run_all(make: Callable[[], Runner], asked: Sequence[Probe], dropped: list[str], how: str = "") -> dict[str, Tensors]:
    """probe name -> tensors of the reference. Raises UsageError if it cannot run at the example; other probes are then put in `dropped`."""
    found = {}
    try:
        run = make()
    except NormswapError:  # it cannot be copied
        raise
    except Exception as error:  # the file has a custom operator, say
        raise UsageError(
            f"the model cannot be run{how}: {described(error)}",
            hint="a model that cannot be run cannot be compared",
        ) from error
    for probe in asked:
        try:
            found[probe.name] = keyed(probe, run(probe))
        except Exception as error:  # the user's model may raise anything
            if probe.name == "example":
                one_dict = (
                    "; a dict is taken for keyword arguments, so a model that takes one dict is given ({...},)" if probe.kwargs else ""
                )
                raise UsageError(
                    f"the model cannot run on the example inputs{how}: {described(error)}",
                    hint="give inputs that the model takes, in the dtype of its weights, with --input (1x3x64x64:float16, say; "
                    "example_inputs in Python), or as the first batch of the data" + one_dict,
                ) from error
            dropped.append(f"{probe.name}: {described(error)}")
    return found


def _reach(found: Iterable[Tensors]) -> dict[tuple[str, bool], float]:
    """(name, site) -> the largest finite absolute value of that tensor at any of these probes."""
    reach: dict[tuple[str, bool], float] = {}
    for values in found:
        for key, value in values.items():
            reach[key.name, key.site] = max(reach.get((key.name, key.site), 0.0), largest(value))
    return reach


def _useless(truth: Truth, precision: Precision) -> str | None:
    """Why an output at a flat probe cannot judge a candidate; None if it can."""
    if not truth.value.is_floating_point():
        return None
    if not bool(truth.value.any()):
        return "the original returns only 0 there"
    return None if truth.noise <= precision.cap else f"the original itself is {truth.noise:.1e} away from its float64 run there"


def compare(
    judgement: Judgement,
    candidate: nn.Module | Path,
    *,
    level: str = "all",
    tolerance: float | None = None,
    only_like_example: bool = False,
    original: nn.Module | None = None,
    baseline: Path | None = None,
) -> Parity:
    """Compare a candidate with a judged reference: a module, with the sites of the judgement, or an ONNX file in a runtime.

    level: of the runtime, see `onnx_runner`. tolerance: the largest error that passes, in place of all limits. only_like_example: whether
    the candidate takes no other batch size. original: a model of which the candidate should be an independent copy; if the candidate reads
    one of its tensors, it fails. baseline: the file before any fold.
    """
    is_file = isinstance(candidate, Path)
    fitting = [p.name for p in judgement.probes if (p.like_example or not only_like_example) and (is_file or not p.flat)]
    judgement = judgement.at(fitting, sites=not is_file)
    findings = Findings()
    noise: Mapping[Key, float] = {}
    noise_runner: Callable[[], Runner] | None = judgement.reference.own_runner
    if isinstance(candidate, Path):
        make, noise_runner = functools.partial(onnx_runner, candidate, level), None
        if baseline is not None and tolerance is None:
            measured = baseline_of(judgement, baseline, level)
            noise, findings.failure, findings.passes = measured.noise, measured.wrong, measured.passes
            noise_runner = functools.partial(onnx_runner, baseline, level)
    else:
        make = functools.partial(_own_runner, candidate, judgement.reference.sites, original)
        if judgement.float64 and tolerance is None:
            try:
                findings.function, findings.passes = rows_of_module(judgement, candidate)
            except Exception as error:  # if it cannot be run in its own dtype either, the run below says so
                findings.notes.append(f"float64, so judged in its own dtype: the candidate raised {described(error)}")
    limit = precision_limit(judgement, noise) if tolerance is None else _fixed_limit(tolerance)
    if findings.failure is None:
        try:
            run = make()
            for probe in judgement.probes:
                findings.precision |= compare_at(judgement, probe, judgement.by_key(probe, run(probe)), limit)
                findings.passes += 1
        except Exception as error:  # a candidate that raises fails
            findings.failure = f"the candidate raised {described(error)}"
    if findings.failure is None and tolerance is None:
        look_again(judgement, candidate, findings, noise_runner)
        if judgement.float64:
            look_at_unjudged(judgement, candidate, findings, noise_runner)
    parity = verdict(judgement, findings, runtime(level) if is_file else str(judgement.precision.dtype), is_file=is_file)
    if isinstance(candidate, Path) and not parity.passed and (why := draws(candidate)) is not None:
        return dataclasses.replace(parity, failure=why)
    return parity


def _own_runner(candidate: nn.Module, sites: Sequence[str], original: nn.Module | None) -> Runner:
    copied = copy_for_running(candidate)
    if original is None:
        return module_runner(copied, sites)
    foreign = {id(tensor): name for name, tensor in (*original.named_parameters(), *original.named_buffers())}
    return module_runner(copied, sites, functools.partial(OwnTensors, foreign))


def _fixed_limit(tolerance: float) -> LimitOf:
    return lambda key, truth: Limit(truth.noise, tolerance)
