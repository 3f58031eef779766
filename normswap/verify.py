"""The only judge of numbers: does a candidate compute the reference's function?

The judge is the reference in float64. A tensor passes if its error, max|candidate - judge| / max|judge|, is at most

    min(max(10 x noise, FLOOR), CAP)        noise: the error of the reference in its own dtype; FLOOR and CAP by that dtype

so the limit follows what rounding alone does to this model at this input. It fails closed: NaN, a missing output, another shape or dtype,
or nothing to compare all fail, and one failing output or layer fails all.

Forward passes: 5 probes (`probes.py`) x (judge, reference, candidate) = 15 for the first candidate and 5 for every further one. A probe
that the reference itself refuses (a fixed batch size, say) is dropped and named.

Memory: the judge shares the reference's weights and widens each where an operation reads it. Of a swapped layer's output, at most TAP_SIZE
evenly spread values per probe and call are kept; the model's outputs are kept whole.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from normswap.errors import UsageError
from normswap.parity import Difference, Parity
from normswap.probes import Probe, probes
from normswap.runners import BY_POSITION, Runner, Values, module_runner, onnx_float64_runner, onnx_runner
from normswap.sharing import shadow, to_float64

FLOOR = {torch.float64: 1e-13, torch.float32: 1e-6, torch.float16: 2**-10, torch.bfloat16: 2**-7}
CAP = {torch.float64: 1e-10, torch.float32: 1e-4, torch.float16: 5e-3, torch.bfloat16: 3e-2}
NOISE_FACTOR = 10
LEVELS = ("disabled", "basic", "extended", "all")  # of onnxruntime's graph optimisation


@dataclass(frozen=True)
class _Truth:
    """The judge's value of one tensor at one probe, and how the reference in its own dtype compares."""

    value: Tensor
    dtype: torch.dtype
    noise: float
    unusable: Tensor | None  # where the reference itself is not finite


@dataclass
class Judgement:
    """What the reference computes, in float64, at every probe: made once, held against any number of candidates."""

    probes: list[Probe]
    outputs: dict[str, dict[str, _Truth]]
    sites: dict[str, dict[str, _Truth]]
    dropped: list[str]
    dtype: torch.dtype
    passes: int = 0


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


def judge(reference: nn.Module | Path, args: tuple[Any, ...], kwargs: Mapping[str, Any], *, sites: Sequence[str] = ()) -> Judgement:
    """Run the reference in float64, free it, then run it in its own dtype to learn its noise.

    sites: names of modules whose outputs are tapped. Raises UsageError if the reference cannot run on the example inputs.
    """
    dropped: list[str] = []
    asked = list(probes(args, kwargs))
    run = (
        onnx_float64_runner(reference)
        if isinstance(reference, Path)
        else module_runner(shadow(reference, to_float64), sites, in_float64=True)
    )
    judged = _run_all(run, [Probe(p.name, *p.mapped(to_float64), p.like_example) for p in asked], dropped, " in float64, as it is judged")
    del run
    usable = [p for p in asked if p.name in judged]
    run = onnx_runner(reference, "disabled") if isinstance(reference, Path) else module_runner(shadow(reference), sites)
    own = _run_all(run, usable, dropped, "")
    # The coarsest dtype that takes part sets the limits: half precision inside a float32 model is half precision.
    weights = [] if isinstance(reference, Path) else [*reference.parameters(), *reference.buffers()]
    seen = {t.dtype for t in (*weights, *(t for values in own.values() for part in values for t in part.values()))}
    return Judgement(
        probes=[p for p in usable if p.name in own],
        outputs={name: _truths(judged[name][0], values[0]) for name, values in own.items()},
        sites={name: _truths(judged[name][1], values[1]) for name, values in own.items()},
        dropped=dropped,
        dtype=max(seen & FLOOR.keys() or {torch.float32}, key=lambda dtype: torch.finfo(dtype).eps),
        passes=len(judged) + len(own),
    )


def _run_all(run: Runner, asked: Sequence[Probe], dropped: list[str], how: str) -> dict[str, tuple[Values, Values]]:
    found = {}
    for probe in asked:
        try:
            found[probe.name] = run(probe)
        except Exception as error:  # the user's model may raise anything
            if probe.name == "example":
                raise UsageError(
                    f"the model cannot run on the example inputs{how}: {_first_line(error)}",
                    hint="give inputs that the model takes with --input (example_inputs in Python)",
                ) from error
            dropped.append(f"{probe.name}: {_first_line(error)}")
    return found


def compare(
    judgement: Judgement,
    candidate: nn.Module | Path,
    *,
    level: str = "all",
    tolerance: float | None = None,
    sites: Sequence[str] = (),
    only_like_example: bool = False,
) -> Parity:
    """Hold a candidate against a judgement: a module, or an ONNX file in onnxruntime at one optimisation level.

    level: "disabled", "basic", "extended" or "all". only_like_example: the candidate takes no other batch size.
    """
    name = f"onnxruntime ({level})" if isinstance(candidate, Path) else str(judgement.dtype)
    held = [p for p in judgement.probes if p.like_example or not only_like_example]
    worst: dict[str, Difference] = {}
    worst_site: dict[str, Difference] = {}
    passes = 0
    failure: str | None = None
    try:
        run = onnx_runner(candidate, level) if isinstance(candidate, Path) else module_runner(shadow(candidate), sites)
        for probe in held:
            outputs, taps = run(probe)
            passes += 1
            _keep_worst(worst, _differences(judgement.outputs[probe.name], outputs, probe, judgement.dtype, tolerance))
            if sites:
                _keep_worst(worst_site, _differences(judgement.sites[probe.name], taps, probe, judgement.dtype, tolerance, tapped=True))
    except Exception as error:  # a candidate that raises is a candidate that fails, whatever it raises
        failure = f"the candidate raised {_first_line(error)}"
    if failure is None and not worst:
        failure = "nothing was compared: the model returns no tensor"
    by_site: dict[str, Difference] = {}
    for difference in worst_site.values():  # calls of one layer become one row
        _keep_worst(by_site, {difference.name: difference})
    order = {site: i for i, site in enumerate(sites)}
    return Parity(
        outputs=tuple(worst.values()),
        sites=tuple(sorted(by_site.values(), key=lambda d: order.get(d.name, 0))),
        failure=failure,
        candidate=name,
        probes=tuple(p.name for p in held),
        dropped=tuple(judgement.dropped),
        forward_passes=judgement.passes + passes,
    )


def _error(candidate: Tensor, truth: Tensor, unusable: Tensor | None) -> tuple[float, float, float, int]:
    """(max_abs, max_rel, rel_l2, non-finite mismatches) of a candidate against the judge's value of the same shape."""
    wide = torch.complex128 if truth.is_complex() else torch.float64
    a, b = candidate.to("cpu", wide).reshape(-1), truth.to("cpu", wide).reshape(-1)
    usable = b.isfinite() if unusable is None else b.isfinite() & ~unusable.reshape(-1)
    # Where the reference itself overflows, the candidate has to overflow too; elsewhere it must not.
    mismatches = int((a.isfinite() != usable).sum())
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


def _ratio(error: float, scale: float) -> float:
    return 0.0 if error == 0 else error / scale if scale > 0 else math.inf


def _truths(judged: Values, own: Values) -> dict[str, _Truth]:
    truths = {}
    for name, value in judged.items():
        mine = own.get(name)
        if mine is None or mine.shape != value.shape:
            shape = None if mine is None else tuple(mine.shape)
            raise ValueError(f"{name} has the shape {tuple(value.shape)} in float64 and {shape} in the model's own dtype")
        finite = mine.isfinite()
        noise = _error(mine, value, ~finite)[1]
        truths[name] = _Truth(value, mine.dtype, noise, None if bool(finite.all()) else ~finite.cpu())
    return truths


def _limit(noise: float, dtype: torch.dtype) -> float:
    return min(max(NOISE_FACTOR * noise, FLOOR[dtype]), CAP[dtype]) if math.isfinite(noise) else CAP[dtype]


def _differences(
    truths: Mapping[str, _Truth],
    found: Values,
    probe: Probe,
    dtype: torch.dtype,
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
                problem = "has no finite value to compare"
        noise = math.nan if truth is None else truth.noise
        limit = tolerance if tolerance is not None else _limit(noise, dtype)
        row = name.rpartition("@")[0] if tapped else name
        result[name] = Difference(row, probe.name, *errors, noise=noise, tolerance=limit, problem=problem)
    return result


def _keep_worst(worst: dict[str, Difference], found: Mapping[str, Difference]) -> None:
    for key, difference in found.items():
        before = worst.get(key)
        if before is None or (before.passed and (not difference.passed or _share(difference) > _share(before))):
            worst[key] = difference


def _share(difference: Difference) -> float:
    """How much of its limit an error uses up."""
    return _ratio(difference.max_rel, difference.tolerance)


def _first_line(error: Exception) -> str:
    text = str(error).strip().splitlines()
    return f"{type(error).__name__}: {text[0]}" if text else type(error).__name__
