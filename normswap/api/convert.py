"""The stages of a conversion in order: read this first.

    trace -> match -> judge the original -> swap what is exact -> couple -> compare
                      and, where approximate swaps were asked for: swap all -> calibrate -> compare -> couple

`plan` stops after match, and `inspect` collects facts after it; `convert` runs all stages. The command runs `load` before them, and `save`,
`export` and `report` after them.
"""

from __future__ import annotations

import dataclasses
import functools
import math
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from typing import Any, Generic, TypeVar

from torch import nn
from torch.export import ExportedProgram
from torch.nn.parameter import is_lazy

from normswap.api.request import Request, Selection, To
from normswap.detect.facts import Facts, facts
from normswap.detect.match import APPROXIMATE, FORGOTTEN, match
from normswap.detect.sites import Forward, Plan, Rule, Site, Swap, Trace
from normswap.detect.trace import trace
from normswap.errors import UsageError
from normswap.layer.batchless_norm import Aux, BatchlessNorm
from normswap.layer.formulas import Stats, StdForm
from normswap.models.batches import arguments_of, check_batches, no_batch
from normswap.models.copying import copy_for_running, on_meta
from normswap.models.inputs import Inputs, as_batches, as_inputs, infer
from normswap.models.own_code import BASES
from normswap.models.programs import Model, as_module, inputs_in, like
from normswap.parity.judge import compare, judge
from normswap.parity.probes import Probe
from normswap.parity.reference import Judgement
from normswap.parity.result import Parity, raise_for
from normswap.rules import DEFAULT_RULES, batchless
from normswap.rules.user_rules import all_checked
from normswap.swap.apply import swap, with_layers
from normswap.swap.calibrate import Reestimate, Repair, calibrate
from normswap.swap.fit import Fit
from normswap.swap.rmsnorm import facts_of_rmsnorm, plan_rmsnorm, with_rmsnorms
from normswap.swap.weight_norm import plan_weight_norm, weight_normed
from normswap.training.couple import Coupling, Pair, set_modes
from normswap.training.couple import couple as couple_to_producers

M = TypeVar("M", bound=Model)
Resolve = Callable[[], Inputs | None]
DRIFT_BATCHES = 4


@dataclass(frozen=True)
class Conversion(Generic[M]):
    """A converted model of the same type as the original, its plan, and the measurement that it is still the same function.

    module     the model itself; for an ExportedProgram, the rewritten graph module that was exported again
    parity     the comparison of the exact swaps with the original
    drift      how far the whole model and each swapped layer are from the original on calibration data; None if all swaps are exact
    fits       how well each layer could be calibrated or re-estimated; empty if none was
    pairs      which conv or linear layer each norm is coupled to, or why it is not coupled
    judgement  the truths of the original, to compare further candidates (an ONNX file) with
    centred    with to="rmsnorm": (name, axis) of each parameter whose mean was taken out, for `keep_centred`
    """

    model: M
    module: nn.Module = field(repr=False)
    plan: Plan
    parity: Parity
    inputs: Inputs = field(repr=False)
    judgement: Judgement = field(repr=False)
    drift: Parity | None = None
    fits: tuple[Fit, ...] = ()
    pairs: tuple[Pair, ...] = ()
    centred: tuple[tuple[str, int], ...] = ()

    def raise_if_failed(self) -> None:
        """Raise ParityError unless the model is the same function as the original, or, if approximate, within max_drift of it."""
        raise_for(self.parity)
        if self.drift is not None:
            failed = "approximate, and further from the original than max_drift allows"
            hint = "allow more, calibrate on more or other data, or exclude the layers that `normswap sensitivity` says cost most"
            raise_for(self.drift, failed, hint)


def plan(
    model: Model,
    example_inputs: Any = None,
    *,
    include: Sequence[str] = (),
    exclude: Sequence[str] = (),
    rules: Sequence[Rule] = DEFAULT_RULES,
    approximate: bool = False,
) -> Plan:
    """Decide for every normalization of `model` whether it is swapped, and why not. Changes nothing.

    example_inputs: a tensor, a tuple of positional or a dict of keyword arguments; used only if the model cannot be traced without running
    it. include, exclude: globs on qualified names and kinds. rules: the first that recognises a layer decides about it, so your own
    come first: (MY_RULE, *normswap.DEFAULT_RULES). approximate: swap layers, too, that need calibration data.

    Raises UsageError for a glob that matches nothing, and for a rule of your own that raises or returns a value of the wrong type.
    """
    selection = Selection(include=include, exclude=exclude, rules=rules)
    return _plan(as_module(model), _resolver(model, example_inputs), selection, approximate=approximate)


def inspect(
    model: Model,
    example_inputs: Any = None,
    *,
    include: Sequence[str] = (),
    exclude: Sequence[str] = (),
    rules: Sequence[Rule] = DEFAULT_RULES,
) -> tuple[Plan, tuple[Facts, ...]]:
    """`plan`, and the facts about each norm: shapes, statistics, hazards. Runs one forward pass, on a copy. Raises as `plan` does."""
    module, resolve = as_module(model), _resolver(model, example_inputs)
    rules = all_checked(rules, DEFAULT_RULES)
    found = _trace(module, resolve, rules)
    exact, all_swaps = (match(found, rules, include=include, exclude=exclude, approximate=a) for a in (False, True))
    known, inputs = facts(module, all_swaps, _forward(resolve)), resolve()
    if inputs is not None:
        planned = match(found, _all_exact(rules), include=include, exclude=exclude)
        known = facts_of_rmsnorm(module, planned, known, inputs.args, inputs.kwargs)
    return exact, known


def convert(
    model: M,
    example_inputs: Any = None,
    *,
    to: To = Request.to,
    calibration: Iterable[Any] | None = Request.calibration,
    approximate: bool = Request.approximate,
    max_drift: float | None = Request.max_drift,
    include: Sequence[str] = Request.include,
    exclude: Sequence[str] = Request.exclude,
    rules: Sequence[Rule] = DEFAULT_RULES,
    std: StdForm = Request.std,
    reestimate: Reestimate | None = Request.reestimate,
    repair: Repair = Request.repair,
    aux: Aux = Request.aux,
    stats: Stats = Request.stats,
    coupling: Coupling = Request.coupling,
) -> Conversion[M]:
    """A copy of `model` whose norms are BatchlessNorm layers, verified to be the same function in eval mode. `model` is not touched.

    example_inputs: as for `plan`; None: the first calibration batch, or a shape that is inferred from the first layer.
    to: what the norms become. "batchless": BatchlessNorm layers. "weight-norm": each BatchNorm or BatchlessNorm with a producer goes into
        torch's weight norm of that producer, exactly, and an identity stands in its place; only the options on inputs, include, exclude
        and rules apply. "rmsnorm": each LayerNorm whose input can lose its mean, as all that writes it and reads it allows that, becomes an
        RMSNorm, exactly; the same options apply. `plan` of the result has the reasons for those that stay.
    calibration: an iterable of batches, each a tensor, a tuple of arguments, or a dict of keyword arguments.
    approximate: also swap norms that take their statistics from each sample (LayerNorm, GroupNorm ...), which gives a model that is not the
        same function. Their statistics, weight and bias come from `calibration`; `drift` says how far the model is from the original.
    max_drift: the largest drift that passes, as max|difference| / max|original| of any output or layer; implies approximate.
    include, exclude, rules: as for `plan`.
    std: how the layers store the standard deviation: as its logarithm ("log"), as it is ("abs"), or as its inverse ("inv").
    reestimate: give layers that have statistics (BatchNorm) those of the calibration data. "exact": weight and bias make up for the
        difference, so the function stays the same, and this is verified. "adapt": weight and bias stay, so the function changes with the
        data, as in AdaBN (Li et al. 2016, arXiv:1603.04779); this needs approximate=True or max_drift.
    repair: "auto": where norms are swapped approximately, the linear layers around them take back, by least squares, what they can of the
        difference. "none": only the new layers are fitted.
    aux, stats: how the statistics train, in train mode; see BatchlessNorm.
    coupling: "auto" couples the statistics of each norm to the weight of its producer, the conv or linear layer before it, if it has one,
        so that training is centred like BatchNorm's; removes the trend from each norm's gradient; and limits the effect of one sample.
        `pairs` has the result for each norm. "none": plain layers. Both are the same in eval mode. See `BatchlessNorm.couple`.

    dtypes, devices and shapes of parameters stay. Raises ParityError if the exact swaps do not give the same function within the limits of
    `verify`, or the drift is above max_drift; UsageError if inputs or calibration data are needed or do not fit; SwapError if the model
    cannot be copied. Source of the layer: docs/method.md.
    """
    request = Request(
        example_inputs=example_inputs,
        to=to,
        calibration=calibration,
        approximate=approximate,
        max_drift=max_drift,
        include=include,
        exclude=exclude,
        rules=rules,
        std=std,
        reestimate=reestimate,
        repair=repair,
        aux=aux,
        stats=stats,
        coupling=coupling,
    )
    conversion = convert_unchecked(model, request)
    conversion.raise_if_failed()
    return conversion


def couple(model: nn.Module, example_inputs: Any = None, *, calibration: Iterable[Any] | None = None) -> tuple[Pair, ...]:
    """Couple a converted model, for example one from `load`, in place. (`convert` couples by itself.)

    Function and parameters stay the same; the state of an earlier coupling is dropped. example_inputs, calibration: as for `convert`.
    Returns for each layer the producer to which it was coupled, or why it was not.

    Raises UsageError if there is no BatchlessNorm, or inputs are needed; SwapError if the model cannot be copied.
    """
    resolve = _resolver(model, example_inputs)
    if calibration is not None:
        check_batches(calibration, "the calibration data are")
    batches: Sequence[Any] = () if calibration is None else list(calibration)
    if batches and example_inputs is None:
        resolve = functools.partial(_first_batch, batches, model)
    layers = [module for module in as_module(model).modules() if isinstance(module, BatchlessNorm)]
    if not layers:
        raise UsageError(f"{type(model).__name__} has no BatchlessNorm to couple", hint="normswap.convert makes them, and couples them")
    sites = trace(model, _forward(resolve), lambda site: True if isinstance(site.module, BatchlessNorm) else None).sites
    _check_values(model)
    inputs = _needed(resolve())
    for layer in layers:
        layer.make_plain()
    return couple_to_producers(model, sites, inputs.args, inputs.kwargs, (arguments_of(batch, model) for batch in batches))


def convert_unchecked(model: M, request: Request, progress: Callable[[int, int], None] = lambda done, total: None) -> Conversion[M]:
    """`convert`, without an exception if the parity or the drift of the converted model failed.

    progress: called with (done, total) after each batch of a calibration.
    """
    if request.aux == "explicit" and isinstance(model, ExportedProgram):
        raise UsageError(
            'an ExportedProgram cannot have aux="explicit": its graph returns its outputs and keeps no term',
            hint='aux="auto" puts the term into the graph',
        )
    module, resolve = as_module(model), _resolver(model, request.example_inputs)
    batches: Iterable[Any] = ()
    if request.calibration is not None:
        check_batches(request.calibration, "the calibration data are")
        batches = list(request.calibration) if iter(request.calibration) is request.calibration else request.calibration
        if request.example_inputs is None:
            resolve = functools.partial(_first_batch, batches, module)
    _check_values(module)
    if request.to != "batchless":
        return _converted_exactly(model, module, request, resolve)
    advice = APPROXIMATE if request.calibration is None else FORGOTTEN
    planned = _plan(module, resolve, request, approximate=request.may_differ, advice=advice)
    inputs = _needed(resolve())
    sites = [s.name for s in planned.swaps if s.site.call is None]  # those that are modules in both models
    exact = dataclasses.replace(planned, swaps=tuple(s for s in planned.swaps if s.preserves == "exact"))
    approximate = [s.name for s in planned.swaps if s.preserves == "approximate"]
    reestimated = {} if request.reestimate is None else dict.fromkeys((s.name for s in exact.swaps), request.reestimate)
    same_function = not approximate and request.reestimate != "adapt"

    judgement = judge(module, inputs.args, inputs.kwargs, sites=sites)  # before `swap`, so that there is only one copy at a time
    converted = swap(module, exact, std=request.std)
    fits: tuple[Fit, ...] = ()
    if request.reestimate == "exact":
        fits = calibrate(converted, _reference(module, exact), (), batches, reestimate=reestimated, progress=progress)
    set_modes(converted, module, exact.swaps, aux=request.aux, stats=request.stats)
    pairs = _coupled(model, request, converted, exact, inputs, batches) if same_function else ()
    parity = compare(judgement, converted, original=module)
    if same_function or not parity:
        return Conversion(like(model, converted, inputs), converted, planned, parity, inputs, judgement, fits=fits, pairs=pairs)

    del converted
    converted = swap(module, planned, std=request.std)
    fits = calibrate(
        converted,
        _reference(module, planned),
        approximate,
        batches,
        reestimate=reestimated,
        repairs=request.repair == "auto",
        progress=progress,
    )
    drift = _drift(module, planned, converted, batches, math.inf if request.max_drift is None else request.max_drift)
    if request.reestimate == "adapt":
        planned = dataclasses.replace(planned, swaps=tuple(_adapted(s) for s in planned.swaps))
    set_modes(converted, module, planned.swaps, aux=request.aux, stats=request.stats)
    pairs = _coupled(model, request, converted, planned, inputs, batches)
    return Conversion(like(model, converted, inputs), converted, planned, parity, inputs, judgement, drift, fits, pairs)


def _converted_exactly(model: M, module: nn.Module, request: Request, resolve: Resolve) -> Conversion[M]:
    """The conversion to another target than BatchlessNorm, where every swap is exact and a norm that has none stays."""
    make: Callable[[nn.Module], nn.Module]
    centred: tuple[tuple[str, int], ...] = ()
    if request.to == "rmsnorm":
        inputs = _needed(resolve())
        rms = plan_rmsnorm(
            module, _plan(module, resolve, _with(request, _all_exact(request.rules)), approximate=False), inputs.args, inputs.kwargs
        )
        planned, sites, make = rms.plan, rms.comparable, functools.partial(with_rmsnorms, planned=rms)
        centred = tuple(rms.streams.centred)
    else:
        selection = _with(request, (*request.rules, batchless.RULE))  # a BatchlessNorm is among the norms that are found
        planned = _plan(module, resolve, selection, approximate=False, advice="leave it")
        inputs = _needed(resolve())
        planned = plan_weight_norm(module, planned, facts(module, planned, _forward(resolve)))
        sites = [s.name for s in planned.swaps if s.site.call is None]
        make = functools.partial(weight_normed, planned=planned)
    judgement = judge(module, inputs.args, inputs.kwargs, sites=sites)
    converted = make(module)
    parity = compare(judgement, converted, original=module)
    return Conversion(like(model, converted, inputs), converted, planned, parity, inputs, judgement, centred=centred)


def _with(selection: Selection, rules: Sequence[Rule]) -> Selection:
    return Selection(include=selection.include, exclude=selection.exclude, rules=rules)


def _all_exact(rules: Sequence[Rule]) -> list[Rule]:
    """The rules, each of which promises an exact swap of every norm that it can swap. `plan_rmsnorm` decides what is exact."""
    return [dataclasses.replace(rule, inexact=None) for rule in all_checked(rules, DEFAULT_RULES)]


def with_model(conversion: Conversion[M], model: Any, original: Model, batches: Iterable[Any]) -> Conversion[M]:
    """The conversion with its approximate model replaced by another one of the same layers, whose drift is measured."""
    module, changed = as_module(original), as_module(model)
    drift = _drift(module, conversion.plan, changed, batches, math.inf)
    return dataclasses.replace(conversion, model=model, module=changed, drift=drift)


def _coupled(
    model: Model, request: Request, converted: nn.Module, planned: Plan, inputs: Inputs, batches: Iterable[Any]
) -> tuple[Pair, ...]:
    if request.coupling == "none":
        return ()
    if isinstance(model, ExportedProgram):
        reason = "is in the graph of an exported program, which keeps no state between steps"
        return tuple(Pair(s.name, reason=reason) for s in planned.swaps)
    sites = [s.site for s in planned.swaps]
    return couple_to_producers(converted, sites, inputs.args, inputs.kwargs, (arguments_of(batch, converted) for batch in batches))


def _reference(module: nn.Module, planned: Plan) -> nn.Module:
    """A copy of the original to run beside a converted model, in which each norm of `planned` that is a call is a module, too."""
    return with_layers(copy_for_running(module), planned)


def _needed(inputs: Inputs | None) -> Inputs:
    if inputs is None:
        raise UsageError(
            "no example inputs that the model takes could be inferred from its layers, so nothing can be verified",
            hint="give them: --input 1x3x224x224 on the command line, example_inputs=... in Python",
        )
    return inputs


def _check_values(module: nn.Module) -> None:
    """Raise UsageError for a model whose weights have no values yet, as they are on the meta device or in a lazy layer.

    Lazy norms are allowed, as they always start with ones and zeros; other lazy layers draw new weights in each forward pass.
    """
    if valueless := on_meta(module):
        more = f", one of {len(valueless)} such tensors of the model," if len(valueless) > 1 else ""
        raise UsageError(
            f"{valueless[0]}{more} is on the meta device, where tensors have a shape and no values, so there is no function to keep",
            hint="load the weights first: model.to_empty(device='cpu'), then model.load_state_dict(...)",
        )
    lazy = [name for name, m in module.named_modules() if not isinstance(m, BASES) and any(map(is_lazy, m.parameters(recurse=False)))]
    if lazy:
        are = "is lazy and has" if len(lazy) == 1 else "are lazy and have"
        raise UsageError(
            f"{', '.join(lazy)} {are} no weights yet, so there is no function to keep",
            hint="run one forward pass, load the weights, then convert",
        )


def _adapted(s: Swap) -> Swap:
    """The swap with a rule that is not exact, for a norm whose statistics were re-estimated with "adapt"."""
    if s.preserves == "approximate":
        return s
    reason = "takes the statistics of the calibration data and keeps its weight and bias, so its function changes"
    return dataclasses.replace(s, rule=dataclasses.replace(s.rule, inexact=lambda site: reason))


def _first_batch(batches: Iterable[Any], module: nn.Module) -> Inputs:
    first = next(iter(batches), None)
    if first is None:
        raise no_batch()
    return Inputs(*arguments_of(first, module))


def _drift(module: nn.Module, planned: Plan, candidate: nn.Module, batches: Iterable[Any], limit: float) -> Parity:
    """The distance of an approximate model from the original on the first DRIFT_BATCHES calibration batches, without random probes."""
    names = ("example", *(f"calibration batch {i}" for i in range(2, DRIFT_BATCHES + 1)))
    asked = [Probe(name, *arguments_of(batch, module)) for name, batch in zip(names, batches, strict=False)]
    sites = [s.name for s in planned.swaps]
    reference = judge(_reference(module, planned), (), {}, sites=sites, asked=asked)
    return compare(reference, candidate, tolerance=limit, original=module)


def _plan(module: nn.Module, resolve: Resolve, selection: Selection, *, approximate: bool, advice: str = APPROXIMATE) -> Plan:
    """Trace and match. advice: as for `match`."""
    rules = all_checked(selection.rules, (*DEFAULT_RULES, batchless.RULE))
    found = _trace(module, resolve, rules)
    return match(found, rules, include=selection.include, exclude=selection.exclude, approximate=approximate, advice=advice)


def _trace(module: nn.Module, resolve: Resolve, rules: Sequence[Rule]) -> Trace:
    def is_norm(site: Site) -> bool | None:
        rule = next((rule for rule in rules if rule.recognises(site)), None)
        return None if rule is None else rule.check(site) is None

    return trace(module, _forward(resolve), is_norm)


def given_to(model: Model, example_inputs: Any) -> Inputs:
    """The example inputs as Inputs; for a list in a file, the first batch, without elements that the model does not take."""
    given = as_inputs(example_inputs)
    if not given.listed:
        return given
    module = as_module(model)
    return Inputs(*arguments_of(as_batches(given.listed, module, "--input")[0], module))


def _forward(resolve: Resolve) -> Callable[[], Forward | None]:
    def forward() -> Forward | None:
        inputs = resolve()
        if inputs is None:
            return None
        return inputs.args, inputs.kwargs

    return forward


def _resolver(model: Model, example_inputs: Any) -> Resolve:
    """A function that returns the inputs: given ones, those stored in an ExportedProgram, or inferred ones. The result is cached."""

    @functools.cache
    def resolve() -> Inputs | None:
        if example_inputs is not None:
            return given_to(model, example_inputs)
        if isinstance(model, ExportedProgram):
            return inputs_in(model)
        return infer(model)

    return resolve
