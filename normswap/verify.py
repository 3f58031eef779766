"""The only judge of numbers: does a candidate compute the reference's function?

The judge is the reference in float64. A tensor passes if its error, max|candidate - judge| / max|judge|, is at most

    min(max(10 x noise, FLOOR), CAP)        noise: the error of the reference in its own dtype; FLOOR and CAP by that dtype

so the limit follows what rounding alone does to this model at this input. FLOOR goes by the coarsest dtype of weights, outputs and layers,
CAP by the coarsest that anything is computed in. It fails closed: NaN, a missing output, another shape or dtype, or nothing to compare all
fail, and one failing output or layer fails all.

Forward passes: 7 probes (`probes.py`) x (judge, reference), and then 5 for every candidate, 7 for an ONNX file. A probe that the reference
itself refuses (a fixed batch size, say) is dropped and named; one of the two flat ones also where the reference by itself is further from
its float64 run than CAP, or all that it gives is 0, so that nothing can be learnt there.

Memory: the judge shares the reference's weights and widens each where an operation reads it. Of a swapped layer's output, at most TAP_SIZE
evenly spread values per probe and call are kept; the model's outputs are kept whole.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from normswap.errors import UsageError, described
from normswap.parity import Difference, Parity
from normswap.probes import Probe, probes
from normswap.runners import BY_POSITION, REFERENCE, Runner, Values, module_runner, onnx_dtypes, onnx_float64_runner, onnx_runner
from normswap.sharing import shadow, to_float64
from normswap.taps import Tap

FLOOR = {torch.float64: 1e-13, torch.float32: 1e-6, torch.float16: 2**-10, torch.bfloat16: 2**-7}
CAP = {torch.float64: 1e-10, torch.float32: 1e-4, torch.float16: 5e-3, torch.bfloat16: 3e-2}
NOISE_FACTOR = 10
NOTHING_FINITE = "has no finite value to compare"
LEVELS = ("disabled", "basic", "extended", "all")  # of onnxruntime's graph optimisation


@dataclass(frozen=True)
class _Truth:
    """The judge's value of one tensor at one probe, and how the reference in its own dtype compares."""

    value: Tensor
    dtype: torch.dtype
    noise: float
    unusable: Tensor | None  # where the reference overflows, or is NaN, in its own dtype only


@dataclass
class Judgement:
    """What the reference computes, in float64, at every probe: made once, held against any number of candidates.

    dtype: the coarsest of its weights, outputs and layers; computed_in: the coarsest that any of its operations returns.
    """

    probes: list[Probe]
    outputs: dict[str, dict[str, _Truth]]
    sites: dict[str, dict[str, _Truth]]
    dropped: list[str]
    dtype: torch.dtype
    computed_in: torch.dtype
    passes: int = 0
    flat: frozenset[str] = frozenset()  # the names of the probes that are for ONNX files only


def verify(
    reference: nn.Module | Path,
    candidate: nn.Module | Path,
    args: tuple[Any, ...],
    kwargs: Mapping[str, Any],
    *,
    sites: Sequence[str] = (),
    tolerance: float | None = None,
) -> Parity:
    """Judge `reference`, then hold `candidate` against it. Each is a module, or an ONNX file."""
    return compare(judge(reference, args, kwargs, sites=sites), candidate, sites=sites, tolerance=tolerance)


def judge(
    reference: nn.Module | Path,
    args: tuple[Any, ...],
    kwargs: Mapping[str, Any],
    *,
    sites: Sequence[str] = (),
    asked: Sequence[Probe] | None = None,
    wide: nn.Module | None = None,
    taps: Sequence[Tap] = (),
    inputs: bool = False,
) -> Judgement:
    """Run the reference in float64, free it, then run it in its own dtype to learn its noise.

    sites: names of modules whose outputs are tapped, and whose inputs, too, with `inputs`; taps: what is tapped of an ONNX file. asked:
    probes to judge at, in place of those made of the arguments; the first is called "example". wide: what to run in float64 in place of the
    reference: the model that it was rounded from.

    Raises UsageError if the reference cannot run on the example inputs.
    """
    dropped: list[str] = []
    asked = list(probes(args, kwargs)) if asked is None else list(asked)
    judged: dict[str, tuple[Values, Values]] | None = None
    try:
        judged = _run_all(
            lambda: (
                onnx_float64_runner(reference, taps)
                if isinstance(reference, Path)
                else module_runner(
                    shadow(wide or reference, to_float64), sites, in_float64=_own_dtype(wide or reference, asked), inputs=inputs
                )
            ),
            [Probe(p.name, *p.mapped(to_float64), p.like_example) for p in asked],
            dropped,
            " in float64",
        )
    except UsageError as error:
        # Int8 kernels, say. Then the reference in its own dtype is the judge: it has no noise, so the limit is the tightest there is.
        dropped.append(f"float64, so judged in its own dtype: {error.message.rpartition('in float64: ')[2]}")
    usable = [p for p in asked if judged is None or p.name in judged]
    computed_in: set[torch.dtype] = set()
    if isinstance(reference, Path):
        path = reference
        own = _run_all(lambda: onnx_runner(path, "disabled", taps), usable, dropped, "")
        seen = onnx_dtypes(reference)
    else:
        run = module_runner(shadow(reference), sites, dtypes=computed_in, inputs=inputs)
        own = _run_all(lambda: run, usable, dropped, "")
        seen = {t.dtype for t in (*reference.parameters(), *reference.buffers())}
    judged = own if judged is None else judged
    seen |= {t.dtype for values in own.values() for part in values for t in part.values()}
    outputs, tapped = {}, {}
    for probe in (p for p in usable if p.name in own):
        try:
            truths = [_truths(*pair) for pair in zip(judged[probe.name], own[probe.name], strict=True)]
        except ValueError as error:  # shapes that depend on values may come out differently in float64
            _refuse(probe, error, dropped, " in float64 as in its own dtype")
        else:
            outputs[probe.name], tapped[probe.name] = truths
    computed = _coarsest(seen | computed_in)
    for probe in [p for p in usable if p.flat and p.name in outputs]:
        useless = next(filter(None, (_useless(truth, CAP[computed]) for truth in outputs[probe.name].values())), None)
        if useless is not None:
            dropped.append(f"{probe.name}: {useless}")
            del outputs[probe.name], tapped[probe.name]
    return Judgement(
        probes=[p for p in usable if p.name in outputs],
        outputs=outputs,
        sites=tapped,
        dropped=dropped,
        dtype=_coarsest(seen),
        computed_in=computed,
        passes=len(judged) + len(own),
        flat=frozenset(p.name for p in asked if p.flat),
    )


def _useless(truth: _Truth, cap: float) -> str | None:
    """Why nothing can be learnt at a flat probe, if so."""
    if not truth.value.is_floating_point():
        return None
    if not bool(truth.value.any()):
        return "what the original gives there is 0"
    return None if truth.noise <= cap else f"the original itself is {truth.noise:.1e} away from its float64 run there"


def _own_dtype(model: nn.Module, asked: Sequence[Probe]) -> torch.dtype:
    """The coarsest of its weights, or, if it has none, of what it is given."""
    tensors = [*model.parameters(), *model.buffers()] or [t for probe in asked for t in probe.tensors()]
    return _coarsest({t.dtype for t in tensors})


def _coarsest(dtypes: set[torch.dtype]) -> torch.dtype:
    return max(dtypes & FLOOR.keys() or {torch.float32}, key=lambda dtype: torch.finfo(dtype).eps)


def _run_all(make: Callable[[], Runner], asked: Sequence[Probe], dropped: list[str], how: str) -> dict[str, tuple[Values, Values]]:
    found = {}
    try:
        run = make()
    except Exception as error:  # an operator of somebody's own, say
        raise UsageError(
            f"the model cannot be run{how}: {described(error)}",
            hint="what cannot be run cannot be held against anything",
        ) from error
    for probe in asked:
        try:
            found[probe.name] = run(probe)
        except Exception as error:  # the user's model may raise anything
            _refuse(probe, error, dropped, how)
    return found


def _refuse(probe: Probe, error: Exception, dropped: list[str], how: str) -> None:
    """Without the example nothing can be judged; any other probe is dropped and named."""
    if probe.name == "example":
        raise UsageError(
            f"the model cannot run on the example inputs{how}: {described(error)}",
            hint="give inputs that the model takes with --input (example_inputs in Python)",
        ) from error
    dropped.append(f"{probe.name}: {described(error)}")


def compare(
    judgement: Judgement,
    candidate: nn.Module | Path,
    *,
    level: str = "all",
    tolerance: float | None = None,
    sites: Sequence[str] = (),
    only_like_example: bool = False,
    only: Collection[str] | None = None,
    original: nn.Module | None = None,
    taps: Sequence[Tap] = (),
) -> Parity:
    """Hold a candidate against a judgement: a module, or an ONNX file in onnxruntime at one optimisation level.

    level: "disabled", "basic", "extended", "all", REFERENCE for onnx's own evaluator, or the name of an execution provider.
    only_like_example: the candidate takes no other batch size. only: the names of the probes to compare at. taps: where an ONNX file has
    the outputs of the `sites`. original: a model of which the candidate claims to be an independent copy; reading one of its tensors is a
    failure.
    """
    name = runtime(level) if isinstance(candidate, Path) else str(judgement.dtype)
    foreign = None if original is None else {id(t): n for n, t in (*original.named_parameters(), *original.named_buffers())}
    held = held_at(judgement, candidate, only_like_example=only_like_example)
    held = held if only is None else [p for p in held if p.name in only]
    outputs: list[dict[str, Difference]] = []
    tapped_at: list[dict[str, Difference]] = []
    passes = 0
    failure: str | None = None
    try:
        run = (
            onnx_runner(candidate, level, taps) if isinstance(candidate, Path) else module_runner(shadow(candidate), sites, foreign=foreign)
        )
        for probe in held:
            values, tapped = run(probe)
            passes += 1
            outputs.append(_differences(judgement, judgement.outputs[probe.name], values, probe, tolerance))
            if sites:
                tapped_at.append(_differences(judgement, judgement.sites[probe.name], tapped, probe, tolerance, tapped=True))
    except Exception as error:  # a candidate that raises is a candidate that fails, whatever it raises
        failure = f"the candidate raised {described(error)}"
    truths = [truth for p in held for at in (judgement.outputs, judgement.sites) for truth in at[p.name].values()]
    if failure is None and not any(outputs):
        failure = "nothing was compared: the model returns no tensor"
    elif failure is None and not any(truth.value.numel() for truth in truths):
        failure = "nothing was compared: every tensor that the model returns is empty"
    by_output, by_call = _telling(outputs), _telling(tapped_at)
    by_site: dict[str, list[Difference]] = {}  # the calls of one layer become one row
    for found in by_call.values():
        by_site.setdefault(found[0].name, []).extend(found)
    order = {site: i for i, site in enumerate(sites)}
    return Parity(
        outputs=tuple(map(_worst, by_output.values())),
        sites=tuple(sorted(map(_worst, by_site.values()), key=lambda d: order.get(d.name, 0))),
        failure=failure,
        candidate=name,
        probes=tuple(p.name for p in held),
        dropped=tuple(text for text in judgement.dropped if isinstance(candidate, Path) or text.partition(": ")[0] not in judgement.flat),
        forward_passes=judgement.passes + passes,
        all_outputs=tuple(itertools.chain.from_iterable(by_output.values())),
    )


def runtime(level: str) -> str:
    """What runs an ONNX file there, in words."""
    return "onnx's reference evaluator" if level == REFERENCE else f"onnxruntime ({level})"


def held_at(judgement: Judgement, candidate: nn.Module | Path, *, only_like_example: bool = False) -> list[Probe]:
    """The probes that a candidate is compared at."""
    fitting = (p for p in judgement.probes if p.like_example or not only_like_example)
    return [p for p in fitting if isinstance(candidate, Path) or not p.flat]


def _error(candidate: Tensor, truth: Tensor, unusable: Tensor | None) -> tuple[float, float, float, int]:
    """(max_abs, max_rel, rel_l2, non-finite mismatches) of a candidate against the judge's value of the same shape."""
    wide = torch.complex128 if truth.is_complex() else torch.float64
    a, b = candidate.to("cpu", wide).reshape(-1), truth.to("cpu", wide).reshape(-1)
    overflows = torch.zeros_like(b, dtype=torch.bool) if unusable is None else unusable.reshape(-1)
    usable = b.isfinite() & ~overflows
    # Where the reference itself overflows, the candidate has to overflow too; where the function is infinite or NaN, it has to be the same;
    # elsewhere it must not.
    mismatches = int(((a.isfinite() != usable) | ~(usable | overflows | _same(a, b))).sum())
    both = usable & a.isfinite()
    if not bool(both.any()):
        return (0.0, 0.0, 0.0, mismatches) if a.numel() == 0 else (math.nan, math.nan, math.nan, mismatches)
    difference, reference = (a - b)[both], b[both]
    return (
        difference.abs().max().item(),
        _ratio(difference.abs().max().item(), reference.abs().max().item()),
        _ratio(difference.norm().item(), reference.norm().item()),
        mismatches,
    )


def _same(a: Tensor, b: Tensor) -> Tensor:
    return (a == b) | (a.isnan() & b.isnan())


def _ratio(error: float, scale: float) -> float:
    return 0.0 if error == 0 else error / scale if scale > 0 else math.inf


def _truths(judged: Values, own: Values) -> dict[str, _Truth]:
    truths = {}
    for name, value in judged.items():
        mine = own.get(name)
        if mine is None or mine.shape != value.shape:
            shape = None if mine is None else tuple(mine.shape)
            raise ValueError(f"{name} has the shape {tuple(value.shape)} in float64 and {shape} in the model's own dtype")
        unusable = ~mine.isfinite().cpu() & ~_same(mine.cpu(), value.cpu())
        noise = _error(mine, value, unusable)[1]
        truths[name] = _Truth(value, mine.dtype, noise, unusable if bool(unusable.any()) else None)
    return truths


def _is_exact(truth: _Truth | None) -> bool:
    """Whether a tensor holds integers or booleans, of which no rounding makes others."""
    return truth is not None and not (truth.dtype.is_floating_point or truth.dtype.is_complex)


def _limit(noise: float, judgement: Judgement, *, exact: bool) -> float:
    if exact and noise == 0:
        return 0.0
    cap = CAP[judgement.computed_in]
    return min(max(NOISE_FACTOR * noise, FLOOR[judgement.dtype]), cap) if math.isfinite(noise) else cap


def _differences(
    judgement: Judgement,
    truths: Mapping[str, _Truth],
    found: Values,
    probe: Probe,
    tolerance: float | None,
    *,
    tapped: bool = False,
) -> dict[str, Difference]:
    if any(name.startswith(BY_POSITION) for name in (*truths, *found)):  # then position is all that they have in common
        found = dict(zip([*truths, *list(found)[len(truths) :]], found.values(), strict=False))
    result = {}
    for name in dict.fromkeys((*truths, *found)):
        truth, value = truths.get(name), found.get(name)
        problem: str | None = None
        errors = (math.nan, math.nan, math.nan, 0)
        if truth is None or value is None:
            problem = "the reference does not return it" if truth is None else "is missing"
        elif value.shape != truth.value.shape:
            problem = f"has the shape {tuple(value.shape)}, expected {tuple(truth.value.shape)}"
        elif value.dtype != truth.dtype:
            problem = f"has the dtype {value.dtype}, expected {truth.dtype}"
        else:
            errors = _error(value, truth.value, truth.unusable)
            if math.isnan(errors[1]) and errors[3] == 0:
                problem = NOTHING_FINITE
        noise = math.nan if truth is None else truth.noise
        limit = tolerance if tolerance is not None else _limit(noise, judgement, exact=_is_exact(truth))
        row = name.rpartition("@")[0] if tapped else name
        result[name] = Difference(row, probe.name, *errors, noise=noise, tolerance=limit, problem=problem)
    return result


def _telling(outcomes: Sequence[Mapping[str, Difference]]) -> dict[str, list[Difference]]:
    """By key, what was found at each probe, without the probes that tell nothing.

    Where reference and candidate agree in that nothing is finite (half precision x 1e3), nothing is learnt: such a row counts only if there
    is no other.
    """
    rows: dict[str, list[Difference]] = {}
    for key, difference in itertools.chain.from_iterable(outcome.items() for outcome in outcomes):
        rows.setdefault(key, []).append(difference)
    return {key: [d for d in found if d.problem != NOTHING_FINITE] or found for key, found in rows.items()}


def _worst(found: Sequence[Difference]) -> Difference:
    """The first that failed, else the one that came closest to failing."""
    return next((d for d in found if not d.passed), None) or max(found, key=_share)


def _share(difference: Difference) -> float:
    """How much of its limit an error uses up."""
    return _ratio(difference.max_rel, difference.tolerance)
