"""The only judge of numbers: does a candidate compute the reference's function, and as precisely as the reference does?

The truth is what the reference gives in float64. The error of a tensor is

    max|candidate - truth| / scale        scale = max|truth| there, but at least REACH x what that tensor reaches at unscaled probes

1. The same function: a candidate module runs in float64 too, where hardly anything is rounded. Its error may be SAME at most, or 10 times
   what rounding its own tensors to their dtype does (`second_look.py`), if that is more.
2. As precise: a candidate in its own dtype, or an ONNX file in a runtime, may have an error of

       max(10 x noise, FLOOR)             noise: the error of the reference itself there

   For a module, noise is that of the reference in its own dtype. For an ONNX file it is that of its baseline (the same graph before
   anything was folded) in the same runtime at the same level; the baseline itself is held against the reference.

Where noise is above CAP, the second says nothing, and that row is left to the others; it is named in `Parity.unjudged`. What is judged
nowhere fails. It fails closed: NaN, a missing output, another shape or dtype, or nothing to compare all fail, and one failing output or
layer fails all. FLOOR goes by the coarsest dtype of weights, outputs and layers, CAP by the coarsest that anything is computed in.

Forward passes: 6 probes (`probes.py`) in float64 and 6 in the reference's own dtype; then 5 and 5 for a module, 6 for an ONNX file at each
level and 6 for its baseline; one less of each where the example is a batch of 1. What fails is looked at again (`second_look.py`) before it
is called a failure. A probe that the reference itself refuses (a fixed batch size, say) is dropped and named; the flat one also where the
reference itself is further from its float64 run than CAP, or all that it gives is 0.

Memory: the float64 run shares the weights and widens each where an operation reads it. Of a swapped layer's output, at most TAP_SIZE evenly
spread values per probe and call are kept; the model's outputs are kept whole.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from normswap.errors import UsageError, described
from normswap.models.copying import copy_for_running, to_float64
from normswap.parity import second_look
from normswap.parity.probes import Probe, probes
from normswap.parity.result import NOTHING_FINITE, Difference, Parity
from normswap.parity.runners import BY_POSITION, REFERENCE, Runner, Values, module_runner, onnx_dtypes, onnx_float64_runner, onnx_runner
from normswap.parity.second_look import Key, Rerun
from normswap.parity.taps import Tap

SAME = 1e-9
REACH = 1e-3
FLOOR = {torch.float64: 1e-13, torch.float32: 1e-6, torch.float16: 2**-10, torch.bfloat16: 2**-7}
CAP = {torch.float64: 1e-10, torch.float32: 1e-4, torch.float16: 5e-3, torch.bfloat16: 3e-2}
CHAOS = {torch.float64: 1e-2, torch.float32: 1e-2, torch.float16: 0.1, torch.bfloat16: 0.1}
NOISE_FACTOR = 10
LEVELS = ("disabled", "all")  # of onnxruntime's graph optimisation
MORE_LEVELS = ("disabled", "basic", "extended", "all")


@dataclass(frozen=True)
class _Truth:
    """What the reference gives of one tensor at one probe in float64, and how the reference in its own dtype compares.

    least: the smallest scale that an error may be relative to. unusable: where the reference overflows, or is NaN, in its own dtype only.
    untold: why its own dtype cannot be compared with float64, if so.
    """

    value: Tensor
    dtype: torch.dtype
    noise: float
    least: float = 0.0
    unusable: Tensor | None = None
    untold: str | None = None


@dataclass
class Judgement:
    """What the reference computes, in float64, at every probe: made once, held against any number of candidates.

    dtype: the coarsest of its weights, outputs and layers; computed_in: the coarsest that any of its operations returns.
    float64: whether the truth is that of float64; else that of the reference's own dtype, as it cannot be run in float64.
    """

    probes: list[Probe]
    outputs: dict[str, dict[str, _Truth]]
    sites: dict[str, dict[str, _Truth]]
    dropped: list[str]
    dtype: torch.dtype
    computed_in: torch.dtype
    passes: int = 0
    flat: frozenset[str] = frozenset()  # the names of the probes that are for ONNX files only
    float64: bool = True
    rerun: Rerun | None = field(default=None, repr=False)
    tensors: Sequence[Tensor] = field(default=(), repr=False)  # the reference's own: what a candidate shares with it was not rounded
    baselines: dict[tuple[Path, str], _Baseline] = field(default_factory=dict, repr=False)

    def passed_on(self, candidate: nn.Module) -> Judgement:
        """The same, which lets go of the reference: where it would be run again, a candidate is that was found to be the same function."""
        return replace(self, rerun=_rerun(candidate, (), self), tensors=(), baselines={})


@dataclass(frozen=True)
class _Baseline:
    """What one runtime makes of a file before anything was folded in it: its errors, and what is wrong with the file itself, if so."""

    noise: Mapping[Key, float]
    wrong: str | None
    passes: int


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
                    copy_for_running(wide or reference, to_float64),
                    sites,
                    in_float64=second_look.own_dtype(wide or reference, asked),
                    inputs=inputs,
                )
            ),
            [second_look.widened(probe) for probe in asked],
            dropped,
            " in float64",
        )
    except UsageError as error:
        # Int8 kernels, say. Then the reference in its own dtype is the truth.
        dropped.append(f"float64, so judged in its own dtype: {error.message.rpartition('in float64: ')[2]}")
    usable = [p for p in asked if judged is None or p.name in judged]
    computed_in: set[torch.dtype] = set()
    if isinstance(reference, Path):
        path = reference
        own = _run_all(lambda: onnx_runner(path, "disabled", taps), usable, dropped, "")
        seen = onnx_dtypes(reference)
        tensors: Sequence[Tensor] = ()
    else:
        run = module_runner(copy_for_running(reference), sites, dtypes=computed_in, inputs=inputs)
        own = _run_all(lambda: run, usable, dropped, "")
        tensors = second_look.tensors(reference)
        seen = {t.dtype for t in tensors}
    in_float64 = judged is not None
    judged = own if judged is None else judged
    seen |= {t.dtype for values in own.values() for part in values for t in part.values()}
    usable = [p for p in usable if p.name in own]
    outputs, tapped = (
        {p.name: _truths(judged[p.name][part], own[p.name][part], reach) for p in usable}
        for part in (0, 1)
        for reach in [_reach(judged[p.name][part] for p in usable if not p.scaled)]
    )
    computed = coarsest(seen | computed_in)
    for probe in [p for p in usable if p.flat]:
        useless = next(filter(None, (_useless(truth, CAP[computed]) for truth in outputs[probe.name].values())), None)
        if useless is not None:
            dropped.append(f"{probe.name}: {useless}")
            del outputs[probe.name], tapped[probe.name]
    made = Judgement(
        probes=[p for p in usable if p.name in outputs],
        outputs=outputs,
        sites=tapped,
        dropped=dropped,
        dtype=coarsest(seen),
        computed_in=computed,
        passes=len(judged) + len(own),
        flat=frozenset(p.name for p in asked if p.flat),
        float64=in_float64,
        tensors=tensors,
    )
    made.rerun = _rerun(reference, sites, made, wide=wide, taps=taps, inputs=inputs)
    return made


def _rerun(
    reference: nn.Module | Path,
    sites: Sequence[str],
    judgement: Judgement,
    *,
    wide: nn.Module | None = None,
    taps: Sequence[Tap] = (),
    inputs: bool = False,
) -> Rerun:
    eps = torch.finfo(judgement.dtype).eps
    if isinstance(reference, Path):
        path = reference
        return Rerun(
            wide=lambda shared: onnx_float64_runner(path, taps, nudge=0.0 if shared is None else eps / 2),
            own=lambda: onnx_runner(path, "disabled", taps),
        )
    module, judged = reference, wide or reference
    dtype = second_look.own_dtype(judged, judgement.probes)

    def in_float64(shared: Sequence[Tensor] | None) -> Runner:
        amount = None if shared is None else second_look.rounded_by(judged, shared, eps, second_look.CHOICE)
        return module_runner(second_look.nudged(judged, amount), sites, in_float64=dtype, inputs=inputs)

    return Rerun(in_float64, lambda: module_runner(copy_for_running(module), sites, inputs=inputs))


def _useless(truth: _Truth, cap: float) -> str | None:
    """Why nothing can be learnt at a flat probe, if so."""
    if not truth.value.is_floating_point():
        return None
    if not bool(truth.value.any()):
        return "what the original gives there is 0"
    return None if truth.noise <= cap else f"the original itself is {truth.noise:.1e} away from its float64 run there"


def coarsest(dtypes: set[torch.dtype]) -> torch.dtype:
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
    baseline: Path | None = None,
    again: bool = True,
) -> Parity:
    """Hold a candidate against a judgement: a module, or an ONNX file in onnxruntime at one optimisation level.

    level: "disabled", "basic", "extended", "all", REFERENCE for onnx's own evaluator, or the name of an execution provider.
    tolerance: the largest error that passes, in place of all limits. only_like_example: the candidate takes no other batch size. only: the
    names of the probes to compare at. taps: where an ONNX file has the outputs of the `sites`. original: a model of which the candidate
    claims to be an independent copy; reading one of its tensors is a failure. baseline: the file before anything was folded in it.
    again: whether what fails is measured again before it is called a failure.
    """
    held = held_at(judgement, candidate, only_like_example=only_like_example)
    held = held if only is None else [p for p in held if p.name in only]
    rows = _Rows()
    make: Callable[[], Runner]
    noise: Mapping[Key, float] = {}
    noisy = None if judgement.rerun is None else judgement.rerun.own  # runs that of which the noise is the candidate's limit
    if isinstance(candidate, Path):
        make = functools.partial(onnx_runner, candidate, level, taps)
        noisy = None
        if baseline is not None and tolerance is None:
            known = _baseline(judgement, baseline, level, held)
            noise, rows.failure, rows.passes = known.noise, known.wrong, known.passes
            noisy = functools.partial(onnx_runner, baseline, level)
    else:
        make = functools.partial(_own_runner, candidate, sites, original)
        if judgement.float64 and tolerance is None:
            try:
                rows.add(*_in_float64(judgement, candidate, held, sites))
            except Exception as error:  # whether it can be run at all is for its own dtype to say
                rows.notes.append(f"float64, so judged in its own dtype: the candidate raised {described(error)}")
    if rows.failure is None:
        try:
            run = make()
            for probe in held:
                values = run(probe)
                for tapped, truths, found in _parts(judgement, probe, values, tapped=bool(sites)):
                    limits = _own_limits(judgement, probe, truths, noise, tolerance)
                    rows.found |= _differences(truths, found, probe, limits, tapped=tapped)
                rows.passes += 1
        except Exception as error:  # a candidate that raises is a candidate that fails, whatever it raises
            rows.failure = f"the candidate raised {described(error)}"
    if rows.failure is None and tolerance is None and again:
        rows.add(*_second_look(judgement, candidate, held, rows.found, noisy, taps))
        if isinstance(candidate, Path) and judgement.float64:
            rows.add(*_lost(judgement, candidate, held, rows.found))
    name = runtime(level) if isinstance(candidate, Path) else str(judgement.dtype)
    return _parity(judgement, name, held, rows, sites, is_file=isinstance(candidate, Path))


@dataclass
class _Rows:
    """What was found of a candidate: its rows, why the comparison as a whole failed, notes, the forward passes."""

    found: dict[Key, Difference] = field(default_factory=dict)
    failure: str | None = None
    notes: list[str] = field(default_factory=list)
    passes: int = 0

    def add(self, found: Mapping[Key, Difference], passes: int) -> None:
        self.found |= found
        self.passes += passes


def _own_runner(candidate: nn.Module, sites: Sequence[str], original: nn.Module | None) -> Runner:
    foreign = None if original is None else {id(t): n for n, t in (*original.named_parameters(), *original.named_buffers())}
    return module_runner(copy_for_running(candidate), sites, foreign=foreign)


def _parts(
    judgement: Judgement, probe: Probe, values: tuple[Values, Values], *, tapped: bool
) -> Iterator[tuple[bool, Mapping[str, _Truth], Values]]:
    """(whether these are tapped values, what the reference has of them, what was found), of the outputs and, with `tapped`, of the taps."""
    yield False, judgement.outputs[probe.name], values[0]
    if tapped:
        yield True, judgement.sites[probe.name], values[1]


def _lost(judgement: Judgement, path: Path, held: Sequence[Probe], found: Mapping[Key, Difference]) -> tuple[dict[Key, Difference], int]:
    """Outputs of a file of which no input tells how precise they are: whether they are the same function can still be told."""
    lost = {k.name for k in found if not k.tapped} - {k.name for k, d in found.items() if d.unjudged is None}
    if not lost:
        return {}, 0
    return {k: d for k, d in in_float64_of_file(judgement, path, held).items() if k.name in lost}, 2 * len(held)


def _parity(judgement: Judgement, name: str, held: Sequence[Probe], rows: _Rows, sites: Sequence[str], *, is_file: bool) -> Parity:
    """The rows, put together: one Difference for each output, and one for each site over all its calls."""
    outputs, tapped = ([d for key, d in rows.found.items() if key.tapped is which] for which in (False, True))
    truths = [truth for p in held for at in (judgement.outputs, judgement.sites) for truth in at[p.name].values()]
    failure = rows.failure
    if failure is None and not outputs:
        failure = "nothing was compared: the model returns no tensor"
    elif failure is None and not any(truth.value.numel() for truth in truths):
        failure = "nothing was compared: every tensor that the model returns is empty"
    by_output, by_call = (_telling({k: d for k, d in rows.found.items() if k.tapped is which}, keep=not which) for which in (False, True))
    by_site: dict[str, list[Difference]] = {}  # the calls of one layer become one row
    for of_call in by_call.values():
        by_site.setdefault(of_call[0].name, []).extend(of_call)
    order = {site: i for i, site in enumerate(sites)}
    dropped = [text for text in judgement.dropped if is_file or text.partition(": ")[0] not in judgement.flat]
    return Parity(
        outputs=tuple(map(_worst, by_output.values())),
        sites=tuple(sorted(map(_worst, by_site.values()), key=lambda d: order.get(d.name, 0))),
        failure=failure,
        candidate=name,
        probes=tuple(p.name for p in held),
        dropped=(*dropped, *rows.notes),
        unjudged=_unjudged((*outputs, *tapped)),
        forward_passes=judgement.passes + rows.passes,
        all_outputs=tuple(outputs),
    )


def _in_float64(
    judgement: Judgement, candidate: nn.Module, held: Sequence[Probe], sites: Sequence[str]
) -> tuple[dict[Key, Difference], int]:
    """(the rows of a candidate in float64, the forward passes). What differs is measured against what rounding its tensors does."""
    dtype = second_look.own_dtype(candidate, held)

    def make(amount: second_look.Amount | None) -> Runner:
        return module_runner(second_look.nudged(candidate, amount), sites, in_float64=dtype)

    values = _run_wide(judgement, make(None), held)
    found: dict[Key, Difference] = {}
    for probe in held:
        for tapped, truths, mine in _parts(judgement, probe, values[probe.name], tapped=bool(sites)):
            limits = {k: (0.0, 0.0 if _is_exact(t) else SAME, None) for k, t in truths.items()}
            found |= _differences(truths, mine, probe, limits, tapped=tapped, float64=True)
    failing = {key for key, d in found.items() if not d.passed and d.problem is None}
    if not failing or judgement.rerun is None:
        return found, len(held)
    eps = torch.finfo(judgement.dtype).eps
    rounded = second_look.rounded_by(candidate, judgement.tensors, eps)
    scales = _scales(judgement, held)
    moved = second_look.movement(_run_wide(judgement, make(rounded), held), values, scales)
    truths_of = {p.name: (_values(judgement.outputs[p.name]), _values(judgement.sites[p.name])) for p in held}
    chosen: dict[Key, float] = {}
    passes = 2 * len(held)
    for seed in range(second_look.CHOICES):
        near = [second_look.moved(second_look.widened(probe), second_look.CHOICE, seed, judgement.probes[0]) for probe in held]
        now = _run_wide(judgement, judgement.rerun.wide(second_look.tensors(candidate)), near)
        passes += len(held)
        for key, size in second_look.movement(now, truths_of, scales).items():
            chosen[key] = max(chosen.get(key, 0.0), size)
        if all(_chaos(chosen.get(key, 0.0), judgement) for key in failing):
            break
    for key in failing:
        row, rounding, choice = found[key], moved.get(key, 0.0), chosen.get(key, 0.0)
        why = _chaos(choice, judgement)
        if why is not None and (not row.non_finite or math.isinf(choice)):
            found[key] = replace(row, unjudged=why, non_finite=0)
        elif why is None and _chaos(rounding, judgement) is None:
            found[key] = replace(row, tolerance=max(row.tolerance, NOISE_FACTOR * max(rounding, choice)))
    return found, passes


def _run_wide(judgement: Judgement, run: Runner, held: Sequence[Probe]) -> dict[str, tuple[Values, Values]]:
    """By probe, (outputs, tapped values) of what is run in float64, under the reference's names."""
    found = {}
    for probe in held:
        outputs, tapped = run(second_look.widened(probe))
        found[probe.name] = _paired(judgement.outputs[probe.name], outputs), tapped
    return found


def _values(truths: Mapping[str, _Truth]) -> Values:
    return {name: truth.value for name, truth in truths.items()}


def _scales(judgement: Judgement, held: Sequence[Probe]) -> Mapping[Key, float]:
    """By row, the least scale of an error."""
    return {
        Key(p.name, name, tapped, True): truth.least
        for p in held
        for tapped, at in ((False, judgement.outputs), (True, judgement.sites))
        for name, truth in at[p.name].items()
    }


def _second_look(
    judgement: Judgement,
    candidate: nn.Module | Path,
    held: Sequence[Probe],
    found: dict[Key, Difference],
    noisy: Callable[[], Runner] | None,
    taps: Sequence[Tap],
) -> tuple[dict[Key, Difference], int]:
    """What is less precise than it may be, measured again: one sample of noise may be a small one by chance."""
    failing = {k: d for k, d in found.items() if not k.float64 and not d.passed and d.problem is None and not d.non_finite}
    if not failing or any(not d.passed and k not in failing for k, d in found.items()):
        return found, 0
    looked = [p for p in held if any(key.probe == p.name for key in failing)]
    if noisy is not None and judgement.rerun is not None:
        wide = judgement.rerun.wide(None) if judgement.float64 else None
        noise = second_look.noise_again(wide, noisy(), looked, _by_name(judgement, looked))
        for key in failing:
            more = max(found[key].noise, noise.get(key, 0.0))
            limit, untold = _limit(more, judgement)
            found[key] = replace(found[key], noise=more, tolerance=max(limit, found[key].tolerance), unjudged=untold)
        return found, 2 * second_look.SAMPLES * len(looked)
    if isinstance(candidate, Path) and judgement.float64:
        same = in_float64_of_file(judgement, candidate, looked, taps)
        cap = CAP[judgement.computed_in]
        for key in failing:
            if _is_same(same, key):
                found[key] = replace(found[key], tolerance=max(found[key].tolerance, cap))
        return found, 2 * len(looked)
    return found, 0


def _by_name(judgement: Judgement, held: Sequence[Probe]) -> Mapping[str, tuple[Sequence[str], Sequence[str]]]:
    return {p.name: (list(judgement.outputs[p.name]), list(judgement.sites[p.name])) for p in held}


def in_float64_of_file(judgement: Judgement, path: Path, held: Sequence[Probe], taps: Sequence[Tap] = ()) -> dict[Key, Difference]:
    """The rows of an ONNX file that is run in float64: is it the function of the reference, up to what rounding its constants does?

    No rows where onnx's evaluator cannot run it.
    """
    try:
        values = _run_wide(judgement, onnx_float64_runner(path, taps), held)
        again = _run_wide(judgement, onnx_float64_runner(path, taps, nudge=torch.finfo(judgement.dtype).eps / 2), held)
        moved = second_look.movement(again, values, _scales(judgement, held))
    except Exception:  # an operator that onnx's evaluator does not have
        return {}
    found: dict[Key, Difference] = {}
    for probe in held:
        for tapped, truths, mine in _parts(judgement, probe, values[probe.name], tapped=bool(taps)):
            limits: dict[str, Limit] = {}
            for name in truths:
                rounding = moved.get(Key(probe.name, name, tapped, True), 0.0)
                limits[name] = 0.0, max(SAME, NOISE_FACTOR * rounding), _chaos(rounding, judgement)
            found |= _differences(truths, mine, probe, limits, tapped=tapped, float64=True)
    return found


def _chaos(moved: float, judgement: Judgement) -> str | None:
    """Why nothing can be said in float64, if so. moved: how far an output goes when numbers of the model are rounded otherwise."""
    if moved <= CHAOS[judgement.computed_in]:
        return None
    return f"a choice that rounding decides: the original moves by {moved:.1e} of its output when its weights are rounded otherwise"


def _is_same(in_float64: Mapping[Key, Difference], key: Key) -> bool:
    row = in_float64.get(key.wide())
    return row is not None and row.passed and row.unjudged is None


def _baseline(judgement: Judgement, path: Path, level: str, held: Sequence[Probe]) -> _Baseline:
    """What a runtime makes of a file before anything was folded in it. Measured once for each level."""
    known = judgement.baselines.get((path, level))
    if known is None or not {p.name for p in held} <= {key.probe for key in known.noise}:
        known = judgement.baselines[path, level] = _measured(judgement, path, level, held)
    return known


def _measured(judgement: Judgement, path: Path, level: str, held: Sequence[Probe]) -> _Baseline:
    try:
        run = onnx_runner(path, level)
        rows: dict[Key, Difference] = {}
        for probe in held:
            truths = judgement.outputs[probe.name]
            rows |= _differences(truths, run(probe)[0], probe, _own_limits(judgement, probe, truths, {}, None))
    except Exception as error:
        return _Baseline({}, f"before anything was folded, the file raised {described(error)}", 0)
    noise = {key: d.max_rel for key, d in rows.items()}
    doubted = {key: d for key, d in rows.items() if d.problem not in (None, NOTHING_FINITE) or not (d.passed or d.unjudged)}
    if not doubted:
        return _Baseline(noise, None, len(held))
    looked = [p for p in held if any(key.probe == p.name for key in doubted)]
    same = in_float64_of_file(judgement, path, looked)
    for key, d in doubted.items():
        if d.problem is not None or d.non_finite or not _is_same(same, key):
            what = d.problem or (f"has {d.non_finite} non-finite mismatches" if d.non_finite else f"is {d.max_rel:.1e} off")
            wrong = f"{d.name} at the probe {d.probe!r} {what} before anything was folded: torch.onnx.export wrote another function"
            return _Baseline(noise, wrong, 3 * len(held))
    return _Baseline(noise, None, 3 * len(held))


def runtime(level: str) -> str:
    """What runs an ONNX file there, in words."""
    return "onnx's reference evaluator" if level == REFERENCE else f"onnxruntime ({level})"


def held_at(judgement: Judgement, candidate: nn.Module | Path, *, only_like_example: bool = False) -> list[Probe]:
    """The probes that a candidate is compared at."""
    fitting = (p for p in judgement.probes if p.like_example or not only_like_example)
    return [p for p in fitting if isinstance(candidate, Path) or not p.flat]


def _truths(judged: Values, own: Values, reach: Mapping[str, float]) -> dict[str, _Truth]:
    truths = {}
    for name, value in judged.items():
        mine, least = own.get(name), REACH * reach.get(name, 0.0)
        if mine is None or mine.shape != value.shape:
            shape = None if mine is None else tuple(mine.shape)
            untold = f"its shape is {tuple(value.shape)} in float64 and {shape} in the model's own dtype"
            truths[name] = _Truth(value, value.dtype if mine is None else mine.dtype, math.nan, least, None, untold)
            continue
        unusable = ~mine.isfinite().cpu() & ~second_look.same(mine.cpu(), value.cpu())
        noise = second_look.error(mine, value, unusable, least)[1]
        truths[name] = _Truth(value, mine.dtype, noise, least, unusable if bool(unusable.any()) else None)
    return truths


def _reach(values: Iterable[Values]) -> dict[str, float]:
    """By name, the largest finite number of a tensor at any of these probes."""
    reach: dict[str, float] = {}
    for found in values:
        for name, value in found.items():
            wide = value if value.is_complex() else value.double()
            finite = wide[wide.isfinite()]
            reach[name] = max(reach.get(name, 0.0), finite.abs().max().item() if finite.numel() else 0.0)
    return reach


def _is_exact(truth: _Truth) -> bool:
    """Whether a tensor holds integers or booleans, of which no rounding makes others."""
    return not (truth.dtype.is_floating_point or truth.dtype.is_complex)


Limit = tuple[float, float, "str | None"]  # (noise, the largest error that passes, why the row decides nothing)


def _own_limits(
    judgement: Judgement, probe: Probe, truths: Mapping[str, _Truth], noise: Mapping[Key, float], tolerance: float | None
) -> dict[str, Limit]:
    limits: dict[str, Limit] = {}
    for name, truth in truths.items():
        here = noise.get(Key(probe.name, name), truth.noise)
        if tolerance is not None:
            limits[name] = here, tolerance, None
        elif truth.untold is not None:
            limits[name] = here, math.nan, truth.untold
        elif _is_exact(truth) and here == 0:
            limits[name] = here, 0.0, None
        else:
            limits[name] = here, *_limit(here, judgement)
    return limits


def _limit(noise: float, judgement: Judgement) -> tuple[float, str | None]:
    """(the largest error that passes, why nothing can be said)."""
    cap = CAP[judgement.computed_in]
    if math.isnan(noise):  # nowhere finite: the comparison says so
        return cap, None
    limit = max(NOISE_FACTOR * noise, FLOOR[judgement.dtype])
    return limit, None if noise <= cap else f"the original itself is {noise:.1e} away from its float64 run there"


def _paired(truths: Collection[str], found: Values) -> Values:
    """What was found, under the names that the reference has for it. An ONNX file has outputs by position, and nothing else in common."""
    if any(name.startswith(BY_POSITION) for name in (*truths, *found)):
        return dict(zip([*truths, *list(found)[len(truths) :]], found.values(), strict=False))
    return found


def _differences(
    truths: Mapping[str, _Truth],
    found: Values,
    probe: Probe,
    limits: Mapping[str, Limit],
    *,
    tapped: bool = False,
    float64: bool = False,
) -> dict[Key, Difference]:
    found = _paired(truths, found)
    result = {}
    for name in dict.fromkeys((*truths, *found)):
        truth, value = truths.get(name), found.get(name)
        noise, limit, unjudged = limits.get(name, (math.nan, math.nan, None))
        problem: str | None = None
        errors = (math.nan, math.nan, math.nan, 0)
        wanted = None if truth is None else truth.value.dtype if float64 else truth.dtype
        if truth is None or value is None:
            problem = "the reference does not return it" if truth is None else "is missing"
        elif truth.untold is not None and not float64:
            errors = (0.0, 0.0, 0.0, 0)
        elif value.shape != truth.value.shape:
            problem = f"has the shape {tuple(value.shape)}, expected {tuple(truth.value.shape)}"
        elif value.dtype != wanted:
            problem = f"has the dtype {value.dtype}, expected {wanted}"
        else:
            errors = second_look.error(value, truth.value, None if float64 else truth.unusable, truth.least)
            if math.isnan(errors[1]) and errors[3] == 0:
                problem = NOTHING_FINITE
        row = name.rpartition("@")[0] if tapped else name
        difference = Difference(row, probe.name, *errors, noise=noise, tolerance=limit, problem=problem, float64=float64, unjudged=unjudged)
        result[Key(probe.name, name, tapped, float64)] = difference
    return result


def _telling(found: Mapping[Key, Difference], *, keep: bool) -> dict[str, list[Difference]]:
    """By output or call, what was found at each probe, without the rows that tell nothing.

    Where reference and candidate agree in that nothing is finite (half precision x 1e3), or the reference itself rounds too much, nothing
    is learnt: such a row counts only if there is no other. keep: whether what is judged nowhere is a failure; else it is left out.
    """
    rows: dict[str, list[Difference]] = {}
    for key, difference in found.items():
        rows.setdefault(key.name, []).append(difference)
    telling = {}
    for name, differences in rows.items():
        failed = [d for d in differences if not d.passed and d.problem != NOTHING_FINITE]
        judged = [d for d in differences if d.unjudged is None and d.problem != NOTHING_FINITE]
        if judged or failed:
            telling[name] = list(dict.fromkeys((*failed, *judged)))
        elif any(d.unjudged is not None for d in differences):
            if keep:
                why = next(d for d in differences if d.unjudged is not None)
                telling[name] = [replace(why, problem=f"cannot be judged at any probe: {why.unjudged}")]
        else:
            telling[name] = differences
    return telling


def _unjudged(rows: Sequence[Difference]) -> tuple[str, ...]:
    """What decides nothing, in words; of many rows with one reason, the first."""
    texts: dict[tuple[str, str, bool], str] = {}
    for d in rows:
        if d.unjudged is not None:
            where = f"{d.name or 'the model'} at the probe {d.probe!r}"
            texts.setdefault((d.probe, d.unjudged.partition(":")[0], d.float64), f"{where}: {d.unjudged}")
    return tuple(texts.values())


def _worst(found: Sequence[Difference]) -> Difference:
    """The first that failed, else the one that came closest to failing; of rows in float64 only if there are no others."""
    failed = next((d for d in found if not d.passed), None)
    return failed or max([d for d in found if not d.float64] or found, key=_share)


def _share(difference: Difference) -> float:
    """How much of its limit an error uses up."""
    return second_look.ratio(difference.max_rel, difference.tolerance)
