"""Which layers can be swapped at what price: one layer at a time, then the cheapest of them together.

    plan -> exact swaps, proved -> all single layers calibrated in one pass -> each measured -> ranked
         -> with a budget: the longest head of the ranking whose layers, really swapped together, stay inside it

Errors of single layers do not add up to the error of all of them: each layer of a set is calibrated on what those before it produce, and
takes back a part of their error, or makes it worse. So the sum of single errors decides nothing here. A set is swapped, calibrated in
strata as `convert` does it, and measured; what is returned was measured inside the budget.

For outputs o, on all the data, y of the original and z of the swapped model, both in the model's own dtype:

    rel_l2 = sqrt(sum (z - y)^2 / sum y^2)         max_rel = max|z - y| / max|y|         of the worst floating output
    change = |metric(swapped) - metric(original)|

Exact swaps are the same function. They are proved as `convert` proves them, measured together once, and are in every set.
"""

from __future__ import annotations

import hashlib
import inspect
import json
import math
import os
import pickle
import re
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import IO, Any, Literal, get_args

import torch
from torch import Tensor, nn
from torch.export import ExportedProgram
from torch.nn.parameter import is_lazy

from normswap.api import convert as pipeline
from normswap.detect.sites import Plan, Preserves, Rule
from normswap.errors import SwapError, UsageError, described
from normswap.models.copying import copy_for_running
from normswap.models.programs import as_module
from normswap.models.torch_private import tree_flatten
from normswap.parity.probes import Probe
from normswap.parity.runners import Runner, Values, module_runner
from normswap.rules import DEFAULT_RULES
from normswap.swap.apply import swap, with_layers
from normswap.swap.calibrate import MASK, arguments_of, calibrate
from normswap.versions import version_of

By = Literal["rel_l2", "max_rel", "change"]
Metric = Callable[[nn.Module], Any]
Progress = Callable[[str, int, int], None]
CACHE = 1 << 30  # bytes of the original's outputs that are kept; beyond, they are computed again for each layer
ALONE, TOGETHER = "one layer at a time", "layers together"
STATE_VERSION = 1


@dataclass(frozen=True)
class Measurement:
    """What one model with some layers swapped does, on all the data.

    rel_l2, max_rel   distance of the worst floating output from the original's; inf where outputs have another shape or are not finite
    metric, change    what the user's metric says, and how far that is from what it says of the original; None without a metric
    """

    rel_l2: float
    max_rel: float
    metric: float | None = None
    change: float | None = None


@dataclass(frozen=True)
class Layer:
    """One swap. measured: of an approximate one, swapped alone; of an exact one, with all exact ones together.

    calibration_error: relative l2 distance that the fit leaves at the layer's own output; None for an exact swap.
    """

    name: str
    kind: str
    preserves: Preserves
    measured: Measurement
    calibration_error: float | None = None


@dataclass(frozen=True)
class Choice:
    """The layers that stay inside the budget, swapped and measured together.

    names             in the order of the plan, exact swaps included
    approximate       those of them that are approximations
    measured          all of them together, calibrated in strata
    tried             how many sets were measured to find this one
    include, exclude  globs that make `convert` swap exactly these; None if no globs do
    """

    names: tuple[str, ...]
    approximate: tuple[str, ...]
    measured: Measurement
    tried: int
    include: tuple[str, ...] | None
    exclude: tuple[str, ...] | None


@dataclass(frozen=True)
class Sensitivity:
    """Every swap of the plan, the cheapest first: exact ones, then by `by`. chosen: None without a budget."""

    plan: Plan
    layers: tuple[Layer, ...]
    by: By
    batches: int
    metric: float | None = None
    budget: float | None = None
    chosen: Choice | None = field(default=None)


def sensitivity(
    model: nn.Module | ExportedProgram,
    data: Iterable[Any] | None,
    example_inputs: Any = None,
    *,
    metric: Metric | None = None,
    by: By = "rel_l2",
    budget: float | None = None,
    include: Sequence[str] = (),
    exclude: Sequence[str] = (),
    rules: Sequence[Rule] = DEFAULT_RULES,
    resume: str | Path | None = None,
    progress: Progress = lambda stage, done, total: None,
) -> Sensitivity:
    """Swap one layer of `model` at a time, measure what that does to the outputs, and rank the layers. `model` is not touched.

    data: an iterable of batches as for `convert`'s calibration; layers are calibrated, and errors measured, on all of it. A position where
    a batch's "attention_mask" is 0 does not count. metric: takes a model in eval mode, returns a number. by: what ranks the layers, and
    what the budget bounds. budget: the most that the chosen layers, swapped together, may change. resume: a file that keeps what was
    measured; a later call with the same model, data and metric goes on from it. progress(stage, done, total) is told after each forward.

    Needs for each batch one forward of the original, two to calibrate all layers, and one per approximate layer. Each set that is tried for
    the budget takes what `convert` takes to calibrate it; there are at most 1 + log2(layers).

    Raises UsageError if data are missing or do not fit the model, if the model puts out no floating tensor, for a metric that returns no
    number, or a `resume` file of something else; ParityError if the exact swaps do not give the same function.
    """
    _check(data, metric, by, budget)
    assert data is not None
    batches = list(data) if iter(data) is data or not isinstance(data, Sequence) else data
    module = as_module(model)
    if not batches:
        raise UsageError("the data hold no batch", hint="give at least one; some hundred samples are better")
    if example_inputs is None:
        args, kwargs = arguments_of(batches[0], module)
        example_inputs = dict(kwargs) or args
    decided = pipeline.plan(module, example_inputs, include=include, exclude=exclude, rules=rules, approximate=True)

    def prove() -> nn.Module:
        return pipeline.convert(module, example_inputs, include=include, exclude=exclude, rules=rules).module

    def plan(include: Sequence[str], exclude: Sequence[str], approximate: bool) -> Plan:
        return pipeline.plan(module, example_inputs, include=include, exclude=exclude, rules=rules, approximate=approximate)

    with _State(resume, lambda: _key(module, batches, metric, rules)) as state:
        work = _Work(module, decided, prove, batches, metric, state, progress)
        layers = work.layers(by)
        chosen = None
        if budget is not None:
            names, measured, tried = work.choose(layers, by, budget)
            approximate = tuple(n for n in names if work.swaps[n].preserves == "approximate")
            chosen = Choice(names, approximate, measured, tried, *_globs(plan, names, bool(approximate)))
        return Sensitivity(decided, layers, by, len(batches), work.measured(()).metric, budget, chosen)


def value(measured: Measurement, by: By) -> float:
    """What ranks: NaN and a missing metric count as infinitely bad."""
    found: float | None = getattr(measured, by)
    return math.inf if found is None or math.isnan(found) else found


def _check(data: Any, metric: Metric | None, by: str, budget: float | None) -> None:
    if data is None:
        raise UsageError(
            "sensitivity is measured on data, and none were given",
            hint="give data=..., or --data on the command line: some hundred samples",
        )
    if isinstance(data, (Tensor, Mapping)):
        raise UsageError(f"the data are a {type(data).__name__}; expected an iterable of batches", hint="a single batch: [batch]")
    if by not in get_args(By):
        raise UsageError(f"by is {by!r}; expected one of {', '.join(map(repr, get_args(By)))}")
    if by == "change" and metric is None:
        raise UsageError("layers are to be ranked by the change of a metric, and none was given", hint="give metric=..., or --metric")
    if budget is not None and not budget >= 0:
        raise UsageError(f"the budget is {budget}; expected a number that is 0 or more")


# --- measuring ----------------------------------------------------------------------------------------------------------------------


class _Work:
    """What one call of `sensitivity` measures, in the order in which it is asked."""

    def __init__(
        self,
        module: nn.Module,
        decided: Plan,
        prove: Callable[[], nn.Module],
        batches: Sequence[Any],
        metric: Metric | None,
        state: _State,
        progress: Progress,
    ) -> None:
        self.module, self.plan, self.prove, self.batches = module, decided, prove, batches
        self.metric, self.state, self.progress = metric, state, progress
        self.swaps = {s.name: s for s in decided.swaps}
        self.exact = tuple(s.name for s in decided.swaps if s.preserves == "exact")
        self.original = _Original(module, batches)

    def layers(self, by: By) -> tuple[Layer, ...]:
        """Every swap, measured and ranked."""
        self.measured(())
        alone = [s.name for s in self.plan.swaps if s.preserves == "approximate"]
        together = self.measured(self.exact)
        self._measure_alone([name for name in alone if (name,) not in self.state.rows])
        exact = [Layer(name, self.swaps[name].kind, "exact", together) for name in self.exact]
        ranked = sorted(
            (
                Layer(name, self.swaps[name].kind, "approximate", self.measured((name,)), self.state.calibration_errors.get(name))
                for name in alone
            ),
            key=lambda layer: value(layer.measured, by),  # sorted is stable: among equals, the order of execution
        )
        return (*exact, *ranked)

    def choose(self, layers: Sequence[Layer], by: By, budget: float) -> tuple[tuple[str, ...], Measurement, int]:
        """The longest head of the ranking, found by bisection, that was measured inside the budget; exact swaps always are in it."""
        head = [layer.name for layer in layers if layer.preserves == "approximate" and value(layer.measured, by) <= budget]

        def first(count: int) -> tuple[str, ...]:
            chosen = {*self.exact, *head[:count]}
            return tuple(s.name for s in self.plan.swaps if s.name in chosen)

        fits, too_many, count, tried = 0, len(head) + 1, len(head), 0
        while count > fits:
            tried += 1
            if value(self.measured(first(count)), by) <= budget:
                fits = count
            else:
                too_many = count
            count = (fits + too_many) // 2
        return first(fits), self.measured(first(fits)), tried

    def measured(self, names: tuple[str, ...]) -> Measurement:
        """Of the model in which the named layers are swapped, all together. Measured once."""
        if names not in self.state.rows:
            swaps = [self.swaps[name] for name in names]
            approximate = [s.name for s in swaps if s.preserves == "approximate"]
            if not names:
                candidate = self.module
            elif not approximate:
                candidate = self.prove()
            else:
                chosen = replace(self.plan, swaps=tuple(swaps))
                candidate, reference = swap(self.module, chosen), with_layers(copy_for_running(self.module), chosen)
                stage = f"{TOGETHER}: calibrating {len(approximate)}"
                calibrate(candidate, reference, approximate, self.batches, progress=lambda *count: self.progress(stage, *count))
            stage = f"{TOGETHER}: measuring {len(approximate)}" if approximate else "exact swaps" if names else "the original"
            self.state.add(names, self._measure(names, candidate, self._ticks(stage, len(self.batches))))
        return self.state.rows[names]

    def _measure_alone(self, names: Sequence[str]) -> None:
        """Each layer on its own, all of them calibrated in one pass, as each sees what the original produces."""
        if not names:
            return
        chosen = replace(self.plan, swaps=tuple(self.swaps[name] for name in names))
        calibrated, reference = swap(self.module, chosen), with_layers(copy_for_running(self.module), chosen)
        stage = "calibrating"
        fits = calibrate(calibrated, reference, names, self.batches, alone=True, progress=lambda *count: self.progress(stage, *count))
        errors = {fit.name: fit.error for fit in fits}
        states = {name: calibrated.get_submodule(name).state_dict() for name in names}
        del calibrated
        tick = self._ticks(ALONE, len(names) * len(self.batches))
        for name in names:
            candidate = swap(self.module, replace(self.plan, swaps=(self.swaps[name],)))
            candidate.get_submodule(name).load_state_dict(states[name])
            self.state.add((name,), self._measure((name,), candidate, tick), errors[name])

    def _measure(self, names: tuple[str, ...], candidate: nn.Module, tick: Callable[[], None]) -> Measurement:
        candidate = copy_for_running(candidate)
        run = module_runner(candidate, ())
        sums: dict[str, _Sums] = {}
        for i, probe in enumerate(self.original.probes):
            expected = self.original.outputs(i)
            try:
                found = run(probe)[0] if names else expected
            except Exception as error:  # the user's model may raise anything
                raise SwapError(
                    f"with {', '.join(names)} swapped the model cannot run on batch {i + 1}: {described(error)}",
                    hint="exclude it",
                ) from error
            for name, y in expected.items():
                sums.setdefault(name, _Sums()).add(y, found.get(name), self.original.masks[i])
            tick()
        metric = None if self.metric is None else _number(self.metric, candidate)
        change = None
        if metric is not None:
            change = abs(metric - (self.measured(()).metric or 0.0)) if names else 0.0
        return Measurement(max(s.rel_l2 for s in sums.values()), max(s.max_rel for s in sums.values()), metric, change)

    def _ticks(self, stage: str, total: int) -> Callable[[], None]:
        done = 0

        def tick() -> None:
            nonlocal done
            done += 1
            self.progress(stage, done, total)

        return tick


class _Original:
    """The floating outputs of the original on each batch: computed once and kept as far as they fit into CACHE."""

    def __init__(self, module: nn.Module, batches: Sequence[Any]) -> None:
        self.run: Runner = module_runner(copy_for_running(module), ())
        self.probes = [Probe(f"batch {i}", *arguments_of(batch, module)) for i, batch in enumerate(batches, 1)]
        masks = [probe.kwargs.get(MASK) for probe in self.probes]
        self.masks = [mask.bool() if isinstance(mask, Tensor) else None for mask in masks]
        self.kept: dict[int, Values] = {}
        self.bytes = 0

    def outputs(self, i: int) -> Values:
        if i in self.kept:
            return self.kept[i]
        try:
            values = self.run(self.probes[i])[0]
        except Exception as error:  # the user's model may raise anything
            raise UsageError(
                f"the model does not take the data: batch {i + 1}: {described(error)}",
                hint="a batch is a tensor, a tuple of arguments, or a dict of keyword arguments",
            ) from error
        values = {name: v for name, v in values.items() if v.is_floating_point() or v.is_complex()}
        if not any(v.numel() for v in values.values()):
            raise UsageError("the model puts out no floating tensor, so nothing can be measured", hint="let it return what it decides by")
        size = sum(v.numel() * v.element_size() for v in values.values())
        if self.bytes + size <= CACHE:
            # A copy: what a model puts out may be a part of something larger, or of what the next forward writes into.
            self.kept[i] = {name: v.clone() for name, v in values.items()}
            self.bytes += size
        return values


class _Sums:
    """Of one output over the batches, in float64."""

    def __init__(self) -> None:
        self.d2 = self.y2 = self.d = self.y = 0.0

    def add(self, y: Tensor, z: Tensor | None, mask: Tensor | None) -> None:
        if z is None or z.shape != y.shape:
            self.d2 = self.d = math.inf
            return
        y, z = (torch.view_as_real(t.resolve_conj()) if t.is_complex() else t for t in (y, z.to(y.device)))
        if mask is not None and y.dim() == 3 and mask.shape == y.shape[:2]:
            y, z = y[mask.to(y.device)], z[mask.to(y.device)]
        if not y.numel():
            return
        # What the original puts out itself, a masked logit of -inf for one, is no error. Any other infinity or NaN is one.
        same = (y == z) | (y.isnan() & z.isnan())
        d = torch.where(same, 0.0, z.double() - y.double())
        d = torch.where(d.isnan(), math.inf, d)
        y = torch.where(y.isfinite(), y, 0.0).double()
        self.d2 += d.square().sum().item()
        self.y2 += y.square().sum().item()
        self.d, self.y = max(self.d, d.abs().max().item()), max(self.y, y.abs().max().item())

    @property
    def rel_l2(self) -> float:
        return _ratio(math.sqrt(self.d2), math.sqrt(self.y2))

    @property
    def max_rel(self) -> float:
        return _ratio(self.d, self.y)


def _ratio(d: float, y: float) -> float:
    return 0.0 if d == 0 else d / y if y else math.inf


def _number(metric: Metric, model: nn.Module) -> float:
    name = getattr(metric, "__qualname__", type(metric).__qualname__)
    with torch.no_grad(), torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        try:
            found = metric(model)
        except Exception as error:  # it is the user's code
            raise UsageError(f"the metric {name} raised {described(error)}", hint="it is called with the model") from error
    try:
        number = float(found)
    except (TypeError, ValueError, RuntimeError) as error:
        raise UsageError(f"the metric {name} returned a {type(found).__name__}; expected a number") from error
    if not math.isfinite(number):
        raise UsageError(f"the metric {name} returned {number}; expected a finite number")
    return number


# --- what convert is to be told -----------------------------------------------------------------------------------------------------


def _glob(name: str) -> str:
    """A glob that this name answers to, and no other."""
    return re.sub(r"([*?[])", r"[\1]", name)


Globs = tuple[str, ...]


def _globs(
    plan: Callable[[Sequence[str], Sequence[str], bool], Plan], names: Sequence[str], approximate: bool
) -> tuple[Globs, Globs] | tuple[None, None]:
    """The fewest include and exclude globs under which `convert` swaps exactly these; tried out, as a name may be that of a kind, too."""
    ours = tuple(map(_glob, names))
    rest = tuple(_glob(s.name) for s in plan((), (), approximate).swaps if s.name not in names)
    for include, exclude in sorted([((), rest), (ours, ()), (ours, rest)], key=lambda globs: len(globs[0]) + len(globs[1])):
        if {s.name for s in plan(include, exclude, approximate).swaps} == set(names):
            return include, exclude
    return None, None


# --- resuming -----------------------------------------------------------------------------------------------------------------------


class _State:
    """What was measured, by the names that were swapped; with a file, every row is on the disk before the next is begun.

    The file has one JSON object per line: first whose measurements these are, then one for each measurement. A last line that was cut off
    is dropped.
    """

    def __init__(self, path: str | Path | None, key: Callable[[], str]) -> None:
        self.path, self.key = None if path is None else Path(path), key
        self.rows: dict[tuple[str, ...], Measurement] = {}
        self.calibration_errors: dict[str, float] = {}
        self.file: IO[str] | None = None

    def __enter__(self) -> _State:
        if self.path is None:
            return self
        header = {"normswap sensitivity": STATE_VERSION, "key": self.key()}
        content = self.path.read_bytes() if self.path.exists() else b""
        if content:
            self._read(content, header)
            whole = content.rfind(b"\n") + 1
            if whole < len(content):
                os.truncate(self.path, whole)
        self.file = self.path.open("a", encoding="utf-8")
        if not content:
            self._write(header)
        return self

    def __exit__(self, *error: object) -> None:
        if self.file is not None:
            self.file.close()

    def add(self, names: tuple[str, ...], measured: Measurement, calibration_error: float | None = None) -> None:
        self.rows[names] = measured
        if calibration_error is not None:
            self.calibration_errors[names[0]] = calibration_error
        self._write({"swapped": names, **asdict(measured), "calibration_error": calibration_error})

    def _read(self, content: bytes, header: Mapping[str, Any]) -> None:
        lines = content.split(b"\n")[:-1]
        try:
            found, *rows = [json.loads(line) for line in lines] or [None]
        except ValueError:
            found, rows = None, []
        if not isinstance(found, dict) or "normswap sensitivity" not in found:
            raise UsageError(f"{self.path} is no file of measurements that can be resumed", hint="give the name of a new file")
        if found != header:
            raise UsageError(
                f"{self.path} holds measurements of another model, other data, another metric or another version of normswap or torch",
                hint="give the name of a new file, or delete this one",
            )
        for row in rows:
            names, error = tuple(row.pop("swapped")), row.pop("calibration_error")
            self.rows[names] = Measurement(**row)
            if error is not None:
                self.calibration_errors[names[0]] = error

    def _write(self, row: Mapping[str, Any]) -> None:
        if self.file is not None:
            self.file.write(json.dumps(row) + "\n")
            self.file.flush()


def _key(module: nn.Module, batches: Sequence[Any], metric: Metric | None, rules: Sequence[Rule]) -> str:
    """A hash of all that a measurement depends on: versions, code of model, metric and rules as far as it can be had, weights, data."""
    digest = hashlib.sha256()

    def add(*parts: Any) -> None:
        for part in parts:
            data = part if isinstance(part, bytes) else str(part).encode()
            digest.update(len(data).to_bytes(8, "little") + data)

    add(STATE_VERSION, version_of("normswap"), torch.__version__, _code(metric))
    for rule in rules:
        add(rule.kind, rule.preserves, _code(rule.build), _code(rule.check))
    for cls in sorted({type(m) for m in module.modules()}, key=lambda cls: f"{cls.__module__}.{cls.__qualname__}"):
        add(_code(cls))
    for name, part in module.named_modules(remove_duplicate=False):
        add(name, type(part).__qualname__, part.extra_repr(), getattr(part, "code", ""))
        own = {key: repr(value) for key, value in vars(part).items() if key[0] != "_" and key != "training"}
        add(*(f"{key}={text}" for key, text in own.items() if " at 0x" not in text))  # an address is another one next time
    for name, tensor in (*module.named_parameters(), *module.named_buffers()):
        add(name, *_content(tensor))
    for batch in batches:
        args, kwargs = arguments_of(batch, module)
        leaves, spec = tree_flatten((args, dict(kwargs)))
        add(spec, *(part for leaf in leaves for part in _content(leaf)))
    return digest.hexdigest()


def _code(thing: Any) -> str:
    """Name and source of a class or function; the name alone where there is no source (a builtin, an interactive session)."""
    thing = thing if thing is None or hasattr(thing, "__qualname__") else type(thing)
    try:
        source = inspect.getsource(thing)
    except (OSError, TypeError):
        source = ""
    return f"{getattr(thing, '__module__', '')}.{getattr(thing, '__qualname__', '')}\n{source}"


def _content(leaf: Any) -> Iterator[Any]:
    if not isinstance(leaf, Tensor):
        yield pickle.dumps(leaf)
    elif is_lazy(leaf) or leaf.is_meta:
        yield f"{leaf.dtype} without content"
    else:
        plain = (
            leaf.detach().dequantize() if leaf.is_quantized else leaf.detach().to_dense() if leaf.layout != torch.strided else leaf.detach()
        )
        yield f"{leaf.dtype} {tuple(leaf.shape)}"
        yield plain.cpu().resolve_conj().resolve_neg().contiguous().reshape(-1).view(torch.uint8).numpy().tobytes()
