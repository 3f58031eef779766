"""The only judge of numbers: does a candidate compute the reference's function?

The judge is the reference in float64. A tensor passes if its error, max|candidate - judge| / max|judge|, is at most

    min(max(10 x noise, FLOOR), CAP)        noise: the error of the reference in its own dtype; FLOOR and CAP by that dtype

so the limit follows what rounding alone does to this model at this input. It fails closed: NaN, a missing output, another shape or dtype,
or nothing to compare all fail, and one failing output or layer fails all.

Forward passes: 5 probes x (judge, reference, candidate) = 15 for a torch candidate and 5 more for every further candidate:

    the example inputs; a seeded batch of 1; a seeded batch of 3; the batch of 1 with its floats x 1e-3, and x 1e3

Seeded floats are drawn from the example's own values, so ranges and masks stay what they were; integers are whole rows of the example.
A probe that the reference itself refuses (a fixed batch size, say) is dropped and named.

Memory: the judge runs first and is freed before the reference runs, and both before a candidate is made. Of a swapped layer's output, at
most TAP_SIZE evenly spread values per probe and call are kept; the model's outputs are kept whole.
"""

from __future__ import annotations

import contextlib
import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode
from torch.utils._pytree import keystr, tree_flatten, tree_flatten_with_path, tree_unflatten

from normswap.errors import UsageError
from normswap.parity import Difference, Parity
from normswap.sharing import converted, shadow, to_float64

FLOOR = {torch.float64: 1e-13, torch.float32: 1e-6, torch.float16: 2**-10, torch.bfloat16: 2**-7}
CAP = {torch.float64: 1e-10, torch.float32: 1e-4, torch.float16: 5e-3, torch.bfloat16: 3e-2}
NOISE_FACTOR = 10
TAP_SIZE = 4096


@dataclass(frozen=True)
class Probe:
    """One set of arguments for a forward pass. `like_example`: it has the example's shapes."""

    name: str
    args: tuple[Any, ...]
    kwargs: Mapping[str, Any]
    like_example: bool = True


Values = dict[str, Tensor]
# Runs one probe; returns the outputs by name and the tapped layers by (name, call).
Runner = Callable[[Probe], tuple[Values, Values]]


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
    reference: nn.Module,
    candidate: nn.Module | Path,
    args: tuple[Any, ...],
    kwargs: Mapping[str, Any],
    *,
    sites: Sequence[str] = (),
    tolerance: float | None = None,
) -> Parity:
    """Judge `reference`, then hold `candidate` (a module, or an ONNX file) against it."""
    return compare(judge(reference, args, kwargs, sites=sites), candidate, tolerance=tolerance)


def judge(reference: nn.Module, args: tuple[Any, ...], kwargs: Mapping[str, Any], *, sites: Sequence[str] = ()) -> Judgement:
    """Run the reference in float64, free it, then run it in its own dtype to learn its noise.

    sites: names of modules whose outputs are tapped. Raises UsageError if the reference cannot run on the example inputs.
    """
    probes = list(_probes(args, kwargs))
    outputs: dict[str, Values] = {}
    taps: dict[str, Values] = {}
    dropped: list[str] = []
    passes = 0
    judge_run = _module_runner(converted(reference, to_float64), sites, in_float64=True)
    for probe in probes:
        try:
            outputs[probe.name], taps[probe.name] = judge_run(_cast(probe, to_float64))
            passes += 1
        except Exception as error:  # the user's model may raise anything
            if probe is probes[0]:
                raise UsageError(
                    f"the model cannot run on the example inputs in float64, the precision it is judged in: {_first_line(error)}",
                    hint="give inputs that the model takes with --input (example_inputs in Python)",
                ) from error
            dropped.append(f"{probe.name}: {_first_line(error)}")
    del judge_run
    result = Judgement([p for p in probes if p.name in outputs], {}, {}, dropped, torch.float64)
    own_run = _module_runner(shadow(reference), sites)
    dtypes = {t.dtype for t in (*reference.parameters(), *reference.buffers()) if t.is_floating_point()}
    for probe in list(result.probes):
        try:
            own_outputs, own_taps = own_run(probe)
        except Exception as error:  # as above
            if probe is probes[0]:
                raise UsageError(
                    f"the model cannot run on the example inputs: {_first_line(error)}",
                    hint="give inputs that the model takes with --input (example_inputs in Python)",
                ) from error
            dropped.append(f"{probe.name}: {_first_line(error)}")
            result.probes.remove(probe)
            continue
        passes += 1
        dtypes |= {t.dtype for t in (*own_outputs.values(), *own_taps.values()) if t.is_floating_point()}
        result.outputs[probe.name] = _truths(outputs[probe.name], own_outputs)
        result.sites[probe.name] = _truths(taps.pop(probe.name), own_taps)
    # The coarsest dtype that takes part sets the limits: half precision inside a float32 model is half precision.
    result.dtype = max(dtypes & FLOOR.keys() or {torch.float32}, key=lambda d: torch.finfo(d).eps)
    result.passes = passes
    return result


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
    probes = [p for p in judgement.probes if p.like_example or not only_like_example]
    worst: dict[str, Difference] = {}
    worst_site: dict[str, Difference] = {}
    passes = 0
    failure: str | None = None
    try:
        run = _onnx_runner(candidate, level) if isinstance(candidate, Path) else _module_runner(shadow(candidate), sites)
        for probe in probes:
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
        probes=tuple(p.name for p in probes),
        dropped=tuple(judgement.dropped),
        forward_passes=judgement.passes + passes,
    )


# --- probes ---------------------------------------------------------------------------------------------------------------------------


def _probes(args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> Iterator[Probe]:
    leaves, _ = tree_flatten((args, dict(kwargs)))
    batches = {leaf.shape[0] for leaf in leaves if isinstance(leaf, Tensor) and leaf.dim() > 0}
    batch = batches.pop() if len(batches) == 1 else None  # without one common first axis there is no batch axis to vary
    yield Probe("example", args, kwargs)
    single = _seeded(args, kwargs, batch, 1, seed=1)
    one, three = (f"batch {n}" if batch is not None else f"seed {n}" for n in (1, 3))
    yield Probe(one, *single, like_example=batch in (None, 1))
    yield Probe(three, *_seeded(args, kwargs, batch, 3, seed=2), like_example=batch in (None, 3))
    for factor in (1e-3, 1e3):
        scaled = _mapped(single, lambda t, f=factor: t * f if t.is_floating_point() or t.is_complex() else t)
        yield Probe(f"{one} x {factor:g}", *scaled, like_example=batch in (None, 1))


Arguments = tuple[tuple[Any, ...], Mapping[str, Any]]


def _mapped(arguments: Arguments, function: Callable[[Tensor], Tensor]) -> Arguments:
    leaves, spec = tree_flatten((arguments[0], dict(arguments[1])))
    args, kwargs = tree_unflatten([function(leaf) if isinstance(leaf, Tensor) else leaf for leaf in leaves], spec)
    return args, kwargs


def _seeded(args: tuple[Any, ...], kwargs: Mapping[str, Any], batch: int | None, size: int, *, seed: int) -> Arguments:
    generator = torch.Generator().manual_seed(seed)

    def redraw(tensor: Tensor) -> Tensor:
        resized = tensor.dim() > 0 and batch is not None
        shape = (size, *tensor.shape[1:]) if resized else tuple(tensor.shape)
        if tensor.is_floating_point() or tensor.is_complex():
            if tensor.numel() == 0:
                return tensor.new_zeros(shape)
            index = torch.randint(tensor.numel(), (math.prod(shape),), generator=generator)
            return tensor.detach().reshape(-1)[index.to(tensor.device)].reshape(shape)
        return tensor[torch.arange(size, device=tensor.device) % max(tensor.shape[0], 1)] if resized else tensor

    return _mapped((args, kwargs), redraw)


def _cast(probe: Probe, function: Callable[[Tensor], Tensor]) -> Probe:
    args, kwargs = _mapped((probe.args, probe.kwargs), function)
    return Probe(probe.name, args, kwargs, probe.like_example)


# --- runners --------------------------------------------------------------------------------------------------------------------------


class _Float64(TorchFunctionMode):
    """Makes a model that asks for a narrower dtype in its code (`x.float()`, `dtype=torch.float32`) compute in float64 all the same."""

    NARROW = frozenset({torch.float32, torch.float16, torch.bfloat16})
    CASTS = frozenset({Tensor.float, Tensor.half, Tensor.bfloat16})

    def __torch_function__(self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Mapping[str, Any] | None = None) -> Any:
        def widen(value: Any) -> Any:
            return torch.float64 if isinstance(value, torch.dtype) and value in self.NARROW else value

        if func in self.CASTS:
            func = Tensor.double
        return func(*(widen(a) for a in args), **{k: widen(v) for k, v in (kwargs or {}).items()})


@contextlib.contextmanager
def _default_float64() -> Iterator[None]:
    before = torch.get_default_dtype()
    torch.set_default_dtype(torch.float64)
    try:
        with torch.autocast("cpu", enabled=False), _Float64():
            yield
    finally:
        torch.set_default_dtype(before)


def _module_runner(model: nn.Module, sites: Sequence[str], *, in_float64: bool = False) -> Runner:
    """Runs a model that nobody else uses: in eval mode, without gradients, the generator seeded and then put back."""
    taps: Values = {}
    modules = dict(model.named_modules(remove_duplicate=False))
    calls: dict[str, int] = {}

    def tap(name: str) -> Callable[..., None]:
        def record(module: nn.Module, args: Any, output: Any) -> None:
            if isinstance(output, Tensor):
                calls[name] = calls.get(name, 0) + 1
                flat = output.detach().reshape(-1)
                # An odd step, so that it does not fall in with even channel counts and always hit the same channels.
                taps[f"{name}@{calls[name]}"] = flat[:: (flat.numel() // TAP_SIZE) | 1].clone()

        return record

    for name in sites:
        if name in modules:
            modules[name].register_forward_hook(tap(name))

    def run(probe: Probe) -> tuple[Values, Values]:
        taps.clear()
        calls.clear()
        # A model may write into its inputs; the probes must stay what they are.
        args, kwargs = _mapped((probe.args, probe.kwargs), torch.clone)
        with torch.no_grad(), torch.random.fork_rng(), _default_float64() if in_float64 else contextlib.nullcontext():
            torch.manual_seed(0)
            output = model(*args, **kwargs)
        return _named(output), dict(taps)

    return run


def _named(output: Any) -> Values:
    """The tensors of a model's output, in order, each under its path."""
    found = {}
    for path, leaf in tree_flatten_with_path(output)[0]:
        if isinstance(leaf, (bool, int, float)):
            leaf = torch.tensor(leaf)
        if isinstance(leaf, Tensor):
            found[f"output{keystr(path)}"] = leaf.detach()
    return found


def _onnx_runner(path: Path, level: str) -> Runner:
    import onnxruntime

    options = onnxruntime.SessionOptions()
    options.log_severity_level = 3
    options.graph_optimization_level = {
        "disabled": onnxruntime.GraphOptimizationLevel.ORT_DISABLE_ALL,
        "basic": onnxruntime.GraphOptimizationLevel.ORT_ENABLE_BASIC,
        "extended": onnxruntime.GraphOptimizationLevel.ORT_ENABLE_EXTENDED,
        "all": onnxruntime.GraphOptimizationLevel.ORT_ENABLE_ALL,
    }[level]
    session = onnxruntime.InferenceSession(str(path), options, providers=["CPUExecutionProvider"])
    names = [i.name for i in session.get_inputs()]

    def run(probe: Probe) -> tuple[Values, Values]:
        tensors = [leaf for leaf in tree_flatten((probe.args, dict(probe.kwargs)))[0] if isinstance(leaf, Tensor)]
        if len(tensors) != len(names):
            raise ValueError(f"the file has {len(names)} inputs ({', '.join(names)}), but {len(tensors)} tensors were given")
        found = session.run(None, {name: tensor.numpy(force=True) for name, tensor in zip(names, tensors, strict=True)})
        return {f"#{i}": torch.from_numpy(value) for i, value in enumerate(found)}, {}

    return run


# --- numbers --------------------------------------------------------------------------------------------------------------------------


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
            raise ValueError(f"{name} has the shape {tuple(value.shape)} in float64 and {None if mine is None else tuple(mine.shape)} otherwise")
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
    if found and all(name.startswith("#") for name in found):  # an ONNX file has outputs by position
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
