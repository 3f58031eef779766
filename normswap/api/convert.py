"""The stages in order: read this first.

    trace -> match -> judge -> swap -> compare -> calibrate -> compare

`plan` stops after match, `inspect` goes from there to `facts`; `convert` goes through. `commands` puts `load` in front and `save`,
`export` and `report` behind.
"""

from __future__ import annotations

import dataclasses
import functools
import math
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from typing import Any, Generic, TypeVar

import torch
from torch import Tensor, nn
from torch.export import ExportedProgram
from torch.nn.parameter import is_lazy

from normswap.detect.facts import Facts, facts
from normswap.detect.match import match
from normswap.detect.sites import Plan, Rule, Site, Swap, Trace
from normswap.detect.trace import trace
from normswap.errors import UsageError
from normswap.layer.batchless_norm import Aux, BatchlessNorm
from normswap.layer.formulas import STD_FORMS, Stats
from normswap.models.copying import copy_for_running, on_meta
from normswap.models.inputs import Inputs, as_batches, as_inputs, infer
from normswap.models.own_code import BASES
from normswap.models.programs import as_module, like
from normswap.models.torch_private import tree_map_only
from normswap.parity.judge import NOTHING_FINITE, Judgement, compare, judge
from normswap.parity.probes import Probe
from normswap.parity.result import Parity, ParityError
from normswap.rules import DEFAULT_RULES
from normswap.rules.user_rules import all_checked
from normswap.swap.apply import swap, with_layers
from normswap.swap.calibrate import REESTIMATE, Fit, Reestimate, arguments_of, calibrate
from normswap.training import couple as pairs
from normswap.training import modes
from normswap.training.couple import Coupling, Pair

M = TypeVar("M", bound="nn.Module | ExportedProgram")
DRIFT_BATCHES = 4


@dataclass(frozen=True)
class Conversion(Generic[M]):
    """A converted model of the kind that came in, what was done to it, and the measurement that it is still the same function.

    module: the model itself, or the rewritten graph that an ExportedProgram was made from again.
    drift: how far the whole model and each swapped layer are from the original on calibration data, of an approximate conversion; else
    None. parity is then that of the exact swaps alone. fits: how well each layer could be calibrated or re-estimated, if it was.
    pairs: which layers are coupled to which conv or linear, and why the others are not.
    judgement: what the original computes, to hold further candidates (an ONNX file) against.
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


def plan(
    model: nn.Module | ExportedProgram,
    example_inputs: Any = None,
    *,
    include: Sequence[str] = (),
    exclude: Sequence[str] = (),
    rules: Sequence[Rule] = DEFAULT_RULES,
    approximate: bool = False,
) -> Plan:
    """Decide for every normalization of `model` whether it is swapped, and why not. Changes nothing.

    example_inputs: a tensor, a tuple of positional or a dict of keyword arguments; used only where the model's graph cannot be had without
    running it. include, exclude: globs on qualified names and kinds. rules: the first that recognises a layer speaks for it, so your own
    come first: (MY_RULE, *normswap.DEFAULT_RULES). approximate: swap those, too, that need calibration data.

    Raises UsageError for a glob that matches nothing, and for a rule of your own that breaks its contract.
    """
    return _plan(as_module(model), _resolver(model, example_inputs), include, exclude, rules, approximate)


def inspect(
    model: nn.Module | ExportedProgram,
    example_inputs: Any = None,
    *,
    include: Sequence[str] = (),
    exclude: Sequence[str] = (),
    rules: Sequence[Rule] = DEFAULT_RULES,
) -> tuple[Plan, tuple[Facts, ...]]:
    """`plan`, and what is known of each norm. Runs one forward pass, on a copy."""
    module, resolve = as_module(model), _resolver(model, example_inputs)
    rules = all_checked(rules, DEFAULT_RULES)
    found = _trace(module, resolve, rules)
    exact, all_swaps = (match(found, rules, include=include, exclude=exclude, approximate=a) for a in (False, True))
    return exact, facts(module, all_swaps, _forward(resolve))


def convert(
    model: M,
    example_inputs: Any = None,
    *,
    calibration: Iterable[Any] | None = None,
    approximate: bool = False,
    max_drift: float | None = None,
    include: Sequence[str] = (),
    exclude: Sequence[str] = (),
    rules: Sequence[Rule] = DEFAULT_RULES,
    std: str = "log",
    reestimate: Reestimate | None = None,
    aux: Aux = "auto",
    stats: Stats = "natural",
    coupling: Coupling = "auto",
) -> Conversion[M]:
    """A copy of `model` whose norms are BatchlessNorm layers, verified to be the same function in eval mode. `model` is not touched.

    example_inputs: as for `plan`; None takes the first calibration batch, or infers a shape from the first layer. std: how the layers store
    it. aux, stats: how their statistics train, in train mode; see BatchlessNorm. coupling: "auto" couples the statistics of each norm
    that has a conv or linear of its own before it to that one's weight, so that its training is centred as BatchNorm's is, and gives
    every norm feedback and a guard; see `BatchlessNorm.couple`, `feedback` and `guard`. `pairs` says of each what became of it. "none": the
    source's plain layer. In eval mode they are the same.

    Norms that take their statistics from each sample (LayerNorm, GroupNorm ...) stay, unless `approximate` or `max_drift` asks for a model
    that is not the same function: then they are swapped too, with statistics, weight and bias from `calibration`, an iterable of batches
    (a tensor, a tuple of arguments, or a dict of keyword arguments each). `drift` says how far that is from the original; max_drift is the
    most that passes, as max|difference| / max|original| of any output or layer.

    reestimate: give layers that have statistics (BatchNorm) those of the calibration data. "exact": weight and bias take up the difference,
    so the function stays, and is verified to. "adapt": weight and bias stay, so the function follows the data, as in AdaBN (Li et al. 2016,
    arXiv:1603.04779); that is an approximate conversion, and has to be asked for as one.

    Raises ParityError if the exact swaps do not give the same function within the limits of `verify`, or the drift is above max_drift;
    UsageError if inputs or calibration data are needed or do not fit; SwapError if the model cannot be copied.
    """
    conversion = attempt(
        model,
        example_inputs,
        calibration=calibration,
        approximate=approximate,
        max_drift=max_drift,
        include=include,
        exclude=exclude,
        rules=rules,
        std=std,
        reestimate=reestimate,
        aux=aux,
        stats=stats,
        coupling=coupling,
    )
    check(conversion.parity)
    if conversion.drift is not None:
        check(
            conversion.drift,
            "approximate, and further from the original than max_drift allows",
            "allow more, calibrate on more or other data, or exclude the layers of which `normswap sensitivity` says that they cost most",
        )
    return conversion


def couple(model: nn.Module, example_inputs: Any = None, *, calibration: Iterable[Any] | None = None) -> tuple[Pair, ...]:
    """Couple a model that is converted already, in place: what `convert` does by itself, for one that `load` gave.

    Each BatchlessNorm that has a conv or linear of its own before it is coupled to that one's weight, and all get feedback and a guard. The
    function and the parameters stay; what the layers had of these from an earlier run is forgotten. example_inputs, calibration: as for
    `convert`. Says of each layer what became of it.

    Raises UsageError if there is no BatchlessNorm, or inputs are needed; SwapError if the model cannot be copied.
    """
    resolve = _resolver(model, example_inputs)
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
    return pairs.couple(model, sites, inputs.args, inputs.kwargs, (arguments_of(batch, model) for batch in batches))


def attempt(
    model: M,
    example_inputs: Any = None,
    *,
    calibration: Iterable[Any] | None = None,
    approximate: bool = False,
    max_drift: float | None = None,
    include: Sequence[str] = (),
    exclude: Sequence[str] = (),
    rules: Sequence[Rule] = DEFAULT_RULES,
    std: str = "log",
    reestimate: Reestimate | None = None,
    aux: Aux = "auto",
    stats: Stats = "natural",
    coupling: Coupling = "none",
    progress: Callable[[int, int], None] = lambda done, total: None,
) -> Conversion[M]:
    """`convert` without the last word: the parity and the drift may have failed."""
    if std not in STD_FORMS:
        raise UsageError(f"std is {std!r}; expected one of {', '.join(map(repr, STD_FORMS))}")
    if reestimate not in (None, *REESTIMATE):
        raise UsageError(f"reestimate is {reestimate!r}; expected one of {', '.join(map(repr, REESTIMATE))}")
    if reestimate is not None and calibration is None:
        raise UsageError(
            "statistics are re-estimated from data, and none were given", hint="give calibration=..., or --data on the command line"
        )
    modes.check(aux, stats)
    pairs.check(coupling)
    if aux == "explicit" and isinstance(model, ExportedProgram):
        raise UsageError(
            'an ExportedProgram cannot have aux="explicit": its graph gives its outputs and keeps nothing',
            hint='aux="auto" puts the term into the graph',
        )
    if max_drift is not None and not max_drift >= 0:
        raise UsageError(f"max_drift is {max_drift}; expected a number that is 0 or more")
    approximate = approximate or max_drift is not None
    if reestimate == "adapt" and not approximate:
        raise UsageError(
            "layers that adapt to the data compute something else than the original",
            hint="ask for it with --approximate or --max-drift, approximate=True or max_drift=...; or 'exact' keeps the function",
        )
    if approximate and calibration is None:
        raise UsageError(
            "an approximate swap starts from data, and none were given", hint="give calibration=..., or --data on the command line"
        )
    module, resolve = as_module(model), _resolver(model, example_inputs)
    batches: Sequence[Any] | Iterable[Any] = ()
    if calibration is not None:
        batches = list(calibration) if iter(calibration) is calibration else calibration
        if example_inputs is None:
            resolve = functools.partial(_first_batch, batches, module)
    _check_values(module)
    decided = _plan(module, resolve, include, exclude, rules, approximate, calibration is not None)
    inputs = _needed(resolve())
    sites = [s.name for s in decided.swaps if s.site.call is None]  # where both models have a module
    exact = dataclasses.replace(decided, swaps=tuple(s for s in decided.swaps if s.preserves == "exact"))
    names = [s.name for s in decided.swaps if s.preserves == "approximate"]
    others = {} if reestimate is None else dict.fromkeys((s.name for s in exact.swaps), reestimate)
    judgement = judge(module, inputs.args, inputs.kwargs, sites=sites)  # before the copy is made, so that the two never exist together
    swapped = swap(module, exact, std=std)
    fits: tuple[Fit, ...] = ()
    coupled: tuple[Pair, ...] = ()
    if reestimate == "exact":
        fits = calibrate(swapped, with_layers(copy_for_running(module), exact), (), batches, reestimate=others, progress=progress)
    modes.prepare(swapped, module, exact.swaps, aux=aux, stats=stats)
    if not (names or reestimate == "adapt"):
        coupled = _coupled(coupling, model, swapped, exact, inputs, batches)
    parity = compare(judgement, swapped, sites=sites, original=module)
    if not (names or reestimate == "adapt") or not parity:
        return Conversion(like(model, swapped, inputs), swapped, decided, parity, inputs, judgement, fits=fits, pairs=coupled)
    del swapped
    approximated = swap(module, decided, std=std)
    reference = with_layers(copy_for_running(module), decided)
    fits = calibrate(approximated, reference, names, batches, reestimate=others, progress=progress)
    drift = _drift(module, decided, approximated, batches, math.inf if max_drift is None else max_drift)
    if reestimate == "adapt":
        decided = dataclasses.replace(decided, swaps=tuple(_adapted(s) for s in decided.swaps))
    modes.prepare(approximated, module, decided.swaps, aux=aux, stats=stats)
    coupled = _coupled(coupling, model, approximated, decided, inputs, batches)
    return Conversion(like(model, approximated, inputs), approximated, decided, parity, inputs, judgement, drift, fits, coupled)


def _coupled(
    word: Coupling, model: nn.Module | ExportedProgram, swapped: nn.Module, decided: Plan, inputs: Inputs, batches: Iterable[Any]
) -> tuple[Pair, ...]:
    if word == "none":
        return ()
    if isinstance(model, ExportedProgram):
        reason = "is in the graph of an exported program, which keeps no state between steps"
        return tuple(Pair(s.name, reason=reason) for s in decided.swaps)
    sites = [s.site for s in decided.swaps]
    return pairs.couple(swapped, sites, inputs.args, inputs.kwargs, (arguments_of(batch, swapped) for batch in batches))


def _needed(inputs: Inputs | None) -> Inputs:
    if inputs is None:
        raise UsageError(
            "no example inputs that the model takes could be inferred from its layers, so nothing can be verified",
            hint="give them: --input 1x3x224x224 on the command line, example_inputs=... in Python",
        )
    return inputs


def _check_values(module: nn.Module) -> None:
    """On the meta device there are none. And each forward pass would draw other weights for a lazy layer (but a norm: ones and zeros)."""
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
    """What was planned as exact is not, once its statistics follow the data."""
    if s.preserves == "approximate":
        return s
    reason = "takes the statistics of the calibration data and keeps its weight and bias, so its function changes"
    return dataclasses.replace(s, rule=dataclasses.replace(s.rule, inexact=lambda site: reason))


def _first_batch(batches: Iterable[Any], module: nn.Module) -> Inputs | None:
    first = next(iter(batches), None)
    return None if first is None else Inputs(*arguments_of(first, module))


def _drift(module: nn.Module, decided: Plan, candidate: nn.Module, batches: Iterable[Any], limit: float) -> Parity:
    """The distance from the original on the first DRIFT_BATCHES calibration batches: random probes would say nothing about such a model."""
    names = ("example", *(f"calibration batch {i}" for i in range(2, DRIFT_BATCHES + 1)))
    asked = [Probe(name, *arguments_of(batch, module)) for name, batch in zip(names, batches, strict=False)]
    sites = [s.name for s in decided.swaps]
    reference = judge(with_layers(copy_for_running(module), decided), (), {}, sites=sites, asked=asked)
    return compare(reference, candidate, sites=sites, tolerance=limit, original=module)


def check(
    parity: Parity,
    failed: str = "not the same function",
    hint: str = "exclude the layer that differs, or report this with the model's architecture",
) -> None:
    """Raise ParityError unless the measurement passed. failed: what the candidate is if not; hint: what to do then."""
    if parity.passed:
        return
    bad = next((d for d in (*parity.sites, *parity.outputs) if not d.passed), None)
    if parity.failure is not None or bad is None:
        what = parity.failure or "nothing was compared"
    elif bad.problem is not None:
        what = f"{bad.name} {bad.problem}"
        if bad.unjudged is not None or bad.problem == NOTHING_FINITE:
            failed = "not judged"
            hint = "give inputs like those that the model was trained on: --input on the command line, example_inputs=... in Python"
    else:
        ran = "run in float64, where rounding is no excuse, " if bad.float64 else ""
        what = (
            f"{ran}first at {bad.name}: error {bad.max_rel:.3g} of max|reference| at the probe {bad.probe!r}, "
            f"{bad.non_finite} non-finite mismatches; at most {bad.tolerance:.3g} passes"
        )
        if not bad.float64 and not bad.non_finite and math.isfinite(bad.noise):
            what += f", as the original itself is {bad.noise:.3g} off there"
    raise ParityError(f"converted, but {parity.candidate} is {failed}: {what}", parity=parity, hint=hint)


def _plan(
    module: nn.Module,
    resolve: Callable[[], Inputs | None],
    include: Sequence[str],
    exclude: Sequence[str],
    rules: Sequence[Rule],
    approximate: bool,
    calibrated: bool = False,
) -> Plan:
    rules = all_checked(rules, DEFAULT_RULES)
    found = _trace(module, resolve, rules)
    return match(found, rules, include=include, exclude=exclude, approximate=approximate, calibrated=calibrated)


def _trace(module: nn.Module, resolve: Callable[[], Inputs | None], rules: Sequence[Rule]) -> Trace:
    def is_norm(site: Site) -> bool | None:
        rule = next((rule for rule in rules if rule.recognises(site)), None)
        return None if rule is None else rule.check(site) is None

    return trace(module, _forward(resolve), is_norm)


def given_to(model: nn.Module | ExportedProgram, example_inputs: Any) -> Inputs:
    """What was given as example inputs; of a list in a file the first batch, as far as the model takes it."""
    given = as_inputs(example_inputs)
    if not given.listed:
        return given
    module = as_module(model)
    return Inputs(*arguments_of(as_batches(given.listed, module, "--input")[0], module))


def _forward(resolve: Callable[[], Inputs | None]) -> Callable[[], tuple[tuple[Any, ...], Any] | None]:
    def forward() -> tuple[tuple[Any, ...], Any] | None:
        inputs = resolve()
        if inputs is None:
            return None
        args, kwargs = tree_map_only(Tensor, torch.clone, (inputs.args, dict(inputs.kwargs)))  # a model may write into its inputs
        return args, kwargs

    return forward


def _resolver(model: nn.Module | ExportedProgram, example_inputs: Any) -> Callable[[], Inputs | None]:
    """A function that gives the inputs: those that were given, those that the program came with, or inferred ones. Inferred once."""

    @functools.cache
    def resolve() -> Inputs | None:
        if example_inputs is not None:
            return given_to(model, example_inputs)
        if isinstance(model, ExportedProgram):
            example = model.example_inputs
            return Inputs(tuple(example[0]), dict(example[1]), "program") if example else None
        return infer(model)

    return resolve
