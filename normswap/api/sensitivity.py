"""Measures how much each swap changes the outputs: one layer at a time, then the layers with the smallest errors together.

    plan -> exact swaps, verified -> all single layers calibrated in one pass -> each measured -> ranked
         -> with a budget: the longest head of the ranking whose layers, swapped together, stay inside it

The errors of single layers do not add up to the error of all of them: each layer of a set is calibrated on the outputs of the layers before
it, and may correct a part of their error, or increase it. So the sum of single errors is not used. Each set is swapped, calibrated in
strata as in `convert`, and measured; the set that is returned was measured inside the budget.

For outputs o, on all the data, y of the original and z of the swapped model, both in the model's own dtype:

    rel_l2 = sqrt(sum (z - y)^2 / sum y^2)         max_rel = max|z - y| / max|y|         of the worst floating output
    change = |metric(swapped) - metric(original)|       metric="neighbours": the share of samples that keep their nearest neighbour

Exact swaps keep the function. They are verified as in `convert`, measured together once, and are in every set.
"""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Final, Literal, get_args

import torch
from torch import Tensor, nn

from normswap.api.convert import convert, plan
from normswap.api.measurements import Measurement, Measurements
from normswap.api.neighbours import Neighbours
from normswap.api.request import Selection
from normswap.detect.sites import Plan, Preserves, Rule
from normswap.errors import SwapError, UsageError, described, one_of
from normswap.models.batches import MASK, arguments_of, check_batches, no_batch
from normswap.models.copying import copy_for_running
from normswap.models.programs import Model, as_module
from normswap.parity.measure import ratio
from normswap.parity.probes import Probe, Runner, Values
from normswap.parity.run_torch import module_runner
from normswap.rules import DEFAULT_RULES
from normswap.swap.apply import swap, with_layers
from normswap.swap.calibrate import calibrate

By = Literal["rel_l2", "max_rel", "change"]
Metric = Callable[[nn.Module], Any]
NEIGHBOURS: Final = "neighbours"  # the metric that is built in, see `normswap.api.neighbours`
Progress = Callable[[str, int, int], None]
CACHE = 1 << 30  # bytes of the original's outputs that are kept; the rest is computed again for each layer
ALONE, TOGETHER = "one layer at a time", "layers together"


@dataclass(frozen=True)
class Layer:
    """One swap and its measurement: of an approximate swap alone, or of all exact swaps together.

    calibration_error: relative l2 error of the layer's own output after the fit; None for an exact swap.
    """

    name: str
    kind: str
    preserves: Preserves
    measured: Measurement
    calibration_error: float | None = None


@dataclass(frozen=True)
class Choice:
    """The set of layers that stays inside the budget, swapped and measured together.

    names             of the layers, in the order of the plan, exact swaps included
    approximate       names of the layers whose swaps are approximate
    measured          the measurement of all of them together, calibrated in strata
    tried             how many sets were measured to find this one
    include, exclude  globs with which `convert` swaps exactly these layers; None if there are no such globs
    """

    names: tuple[str, ...]
    approximate: tuple[str, ...]
    measured: Measurement
    tried: int
    include: tuple[str, ...] | None
    exclude: tuple[str, ...] | None


@dataclass(frozen=True)
class Sensitivity:
    """Every swap of the plan, the smallest error first: exact swaps, then the others ranked by `by`. chosen: None without a budget."""

    plan: Plan
    layers: tuple[Layer, ...]
    by: By
    batches: int
    metric: float | None = None
    budget: float | None = None
    chosen: Choice | None = None


def sensitivity(
    model: Model,
    data: Iterable[Any] | None,
    example_inputs: Any = None,
    *,
    metric: Metric | Literal["neighbours"] | None = None,
    by: By = "rel_l2",
    budget: float | None = None,
    include: Sequence[str] = Selection.include,
    exclude: Sequence[str] = Selection.exclude,
    rules: Sequence[Rule] = DEFAULT_RULES,
    skip_done: str | Path | None = None,
    progress: Progress = lambda stage, done, total: None,
) -> Sensitivity:
    """Swap one layer of `model` at a time, measure what that does to the outputs, and rank the layers. `model` is not touched.

    data: an iterable of batches as for `convert`'s calibration; layers are calibrated, and errors measured, on all of it. A position where
        a batch's "attention_mask" is 0 does not count.
    example_inputs, include, exclude, rules: as for `convert`.
    metric: takes a model in eval mode, returns a number. Or "neighbours", for embeddings: the share of samples, of all the data, whose
        nearest neighbour by cosine is the one that it is in the original; 1 of the original. See docs/sensitivity.md.
    by: the figure by which layers are ranked, and to which the budget applies: "rel_l2", "max_rel", or "change" of the metric.
    budget: the largest value of this figure for the chosen layers, swapped together.
    skip_done: a file to which each measurement is written; measurements that it already holds are not repeated. Its norms, number of
        batches and metric must be the same; that weights and data are the same is not checked.
    progress: called with (stage, done, total) after each forward pass.

    Needs for each batch one forward pass of the original, two to calibrate all layers, and one per approximate layer. Each set that is
    tried for the budget is calibrated as in `convert`; there are at most 1 + log2(layers) sets.

    Raises UsageError if data are missing or do not fit the model, if the model returns no floating tensor, if the metric does not return a
    number, or if `skip_done` holds other measurements; ParityError if the exact swaps do not give the same function.
    """
    _check(data, metric, by, budget)
    assert data is not None
    batches = list(data) if iter(data) is data or not isinstance(data, Sequence) else data
    module = as_module(model)
    if not batches:
        raise no_batch("the data")
    if example_inputs is None:
        args, kwargs = arguments_of(batches[0], module)
        example_inputs = dict(kwargs) or args

    def planned(include: Sequence[str], exclude: Sequence[str], approximate: bool) -> Plan:
        return plan(module, example_inputs, include=include, exclude=exclude, rules=rules, approximate=approximate)

    def exact() -> nn.Module:
        """The model with all exact swaps made, which `convert` proves to be the same function."""
        return convert(module, example_inputs, include=include, exclude=exclude, rules=rules).module

    if isinstance(metric, str):
        metric = Neighbours(module, batches)
    decided = planned(include, exclude, True)
    kinds = {s.name: s.kind for s in decided.swaps} | {s.name: s.kind for s in decided.skips}
    with Measurements(skip_done, kinds, len(batches), None if metric is None else _name_of(metric)) as done:
        study = _Study(module, decided, exact, batches, metric, done, progress)
        layers = study.layers(by)
        chosen = None
        if budget is not None:
            names, measured, tried = study.choose(layers, by, budget)
            approximate = tuple(n for n in names if study.swaps[n].preserves == "approximate")
            chosen = Choice(names, approximate, measured, tried, *_globs(planned, names, bool(approximate)))
        return Sensitivity(decided, layers, by, len(batches), study.measured(()).metric, budget, chosen)


def value(measured: Measurement, by: By) -> float:
    """The figure of a measurement by which layers are ranked; inf for NaN and for a missing metric."""
    found: float | None = getattr(measured, by)
    return math.inf if found is None or math.isnan(found) else found


def _check(data: Any, metric: Metric | str | None, by: str, budget: float | None) -> None:
    if data is None:
        raise UsageError(
            "sensitivity is measured on data, and none were given",
            hint="give data=..., or --data on the command line: some hundred samples",
        )
    check_batches(data)
    one_of("by", by, get_args(By))
    if isinstance(metric, str):
        one_of("metric", metric, (NEIGHBOURS,))
    if by == "change" and metric is None:
        raise UsageError("layers are to be ranked by the change of a metric, and none was given", hint="give metric=..., or --metric")
    if budget is not None and not budget >= 0:
        raise UsageError(f"the budget is {budget}; expected a number that is 0 or more")


# --- measuring ----------------------------------------------------------------------------------------------------------------------


class _Study:
    """The measurements of one call of `sensitivity`, each made when it is first needed."""

    def __init__(
        self,
        module: nn.Module,
        decided: Plan,
        exact_model: Callable[[], nn.Module],
        batches: Sequence[Any],
        metric: Metric | None,
        done: Measurements,
        progress: Progress,
    ) -> None:
        self.module, self.plan, self.exact_model, self.batches = module, decided, exact_model, batches
        self.metric, self.done, self.progress = metric, done, progress
        self.swaps = {s.name: s for s in decided.swaps}
        self.exact = tuple(s.name for s in decided.swaps if s.preserves == "exact")
        self.original = _Original(module, batches)

    def layers(self, by: By) -> tuple[Layer, ...]:
        """Every swap, measured and ranked."""
        self.measured(())
        alone = [s.name for s in self.plan.swaps if s.preserves == "approximate"]
        together = self.measured(self.exact)
        self._measure_alone([name for name in alone if (name,) not in self.done.rows])
        exact = [Layer(name, self.swaps[name].kind, "exact", together) for name in self.exact]
        ranked = sorted(
            (
                Layer(name, self.swaps[name].kind, "approximate", self.measured((name,)), self.done.calibration_errors.get(name))
                for name in alone
            ),
            key=lambda layer: value(layer.measured, by),  # sorted is stable: among equals, the order of execution
        )
        return (*exact, *ranked)

    def choose(self, layers: Sequence[Layer], by: By, budget: float) -> tuple[tuple[str, ...], Measurement, int]:
        """(names, measurement, sets tried) of the longest head of the ranking, found by bisection, whose measurement is inside the budget.

        Exact swaps are always in it.
        """
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
        """The measurement of the model in which the named layers are swapped, all together; made once."""
        if names not in self.done.rows:
            swaps = [self.swaps[name] for name in names]
            approximate = [s.name for s in swaps if s.preserves == "approximate"]
            if not names:
                candidate = self.module
            elif not approximate:
                candidate = self.exact_model()
            else:
                chosen = replace(self.plan, swaps=tuple(swaps))
                candidate, reference = swap(self.module, chosen), with_layers(copy_for_running(self.module), chosen)
                stage = f"{TOGETHER}: calibrating {len(approximate)}"
                calibrate(candidate, reference, approximate, self.batches, progress=lambda *count: self.progress(stage, *count))
            stage = f"{TOGETHER}: measuring {len(approximate)}" if approximate else "exact swaps" if names else "the original"
            self.done.add(names, self._measure(names, candidate, self._ticks(stage, len(self.batches))))
        return self.done.rows[names]

    def _measure_alone(self, names: Sequence[str]) -> None:
        """Measure each layer swapped on its own. All are calibrated in one pass, each on the outputs of the original's layers."""
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
            self.done.add((name,), self._measure((name,), candidate, tick), errors[name])

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
        metric = None if self.metric is None else number_of(self.metric, candidate)
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
    """The floating outputs of the original on each batch, which are kept as far as they fit into CACHE."""

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
            # A copy, as an output may be a view of a larger tensor, or of a buffer that the next forward pass overwrites.
            self.kept[i] = {name: v.clone() for name, v in values.items()}
            self.bytes += size
        return values


class _Sums:
    """Sums and maxima of the error and of the original's values of one output, over the batches, in float64."""

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
        # An infinity or NaN that the original returns, too (a masked logit of -inf, say), is not an error. Any other is.
        same = (y == z) | (y.isnan() & z.isnan())
        d = torch.where(same, 0.0, z.double() - y.double())
        d = torch.where(d.isnan(), math.inf, d)
        y = torch.where(y.isfinite(), y, 0.0).double()
        self.d2 += d.square().sum().item()
        self.y2 += y.square().sum().item()
        self.d, self.y = max(self.d, d.abs().max().item()), max(self.y, y.abs().max().item())

    @property
    def rel_l2(self) -> float:
        return ratio(math.sqrt(self.d2), math.sqrt(self.y2))

    @property
    def max_rel(self) -> float:
        return ratio(self.d, self.y)


def _name_of(metric: Metric) -> str:
    return NEIGHBOURS if isinstance(metric, Neighbours) else getattr(metric, "__qualname__", type(metric).__qualname__)


def number_of(metric: Metric, model: nn.Module) -> float:
    """What a metric says of a model, whose modes stay. Raises UsageError if the metric raises, or returns no finite number."""
    modes = {module: module.training for module in model.modules()}
    name = _name_of(metric)
    with torch.no_grad(), torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        try:
            found = metric(model)
        except UsageError:
            raise  # of the metric that is built in
        except Exception as error:  # it is the user's code
            raise UsageError(f"the metric {name} raised {described(error)}", hint="it is called with the model") from error
        finally:
            for module, training in modes.items():
                module.training = training
    try:
        number = float(found)
    except (TypeError, ValueError, RuntimeError) as error:
        raise UsageError(f"the metric {name} returned a {type(found).__name__}; expected a number") from error
    if not math.isfinite(number):
        raise UsageError(f"the metric {name} returned {number}; expected a finite number")
    return number


# --- the globs for a choice -----------------------------------------------------------------------------------------------------------


def glob_of(name: str) -> str:
    """A glob that matches this name and no other."""
    return re.sub(r"([*?[])", r"[\1]", name)


Globs = tuple[str, ...]


def _globs(
    plan: Callable[[Sequence[str], Sequence[str], bool], Plan], names: Sequence[str], approximate: bool
) -> tuple[Globs, Globs] | tuple[None, None]:
    """The fewest include and exclude globs with which `convert` swaps exactly these layers, or (None, None).

    They are tried out, as the name of a layer may also be a kind.
    """
    ours = tuple(map(glob_of, names))
    rest = tuple(glob_of(s.name) for s in plan((), (), approximate).swaps if s.name not in names)
    for include, exclude in sorted([((), rest), (ours, ()), (ours, rest)], key=lambda globs: len(globs[0]) + len(globs[1])):
        if {s.name for s in plan(include, exclude, approximate).swaps} == set(names):
            return include, exclude
    return None, None
