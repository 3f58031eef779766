"""What happens when an optimizer steps: the statistics of the BatchlessNorm layers that it holds move, in two hooks around its `step`.

    before    1  `_advance`: the gradients of the statistics get weight 1 (`_weight`), are hidden from the optimizer (`_hide`), and the
                 statistics step by them (`_step`): mean, std, and of some layers `input_mean` and `trend`
              2  `_clip`: under SGD, the gradient of a producer's weight is shortened to what the statistics can follow
    step      the optimizer of torch moves weights and biases, and statistics with stats="raw"
    after     3  mean and std of coupled layers follow the weights of their producers, see `following`
              4  the hidden gradients come back

If `step` gets a closure, which computes the gradients, 1 and 2 run after the closure. Steps may be one inside the
other, as where an optimizer wraps another one: what a step has done, the others find done.

    stats="natural"   the statistics step here, by `formulas.natural_step` at the layer's momentum. No learning rate, momentum, weight
                      decay, second moment or schedule of the optimizer applies, as none applies to BatchNorm's running statistics
    stats="raw"       the optimizer steps mean and std; a warning says so if they were not given to it by `param_groups`

The hooks are on every optimizer of torch, so that a training loop need not call anything.
"""

from __future__ import annotations

import functools
import weakref
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from typing import Any, NamedTuple, cast

import torch
from torch import Tensor, nn
from torch.optim.optimizer import Optimizer, register_optimizer_step_post_hook, register_optimizer_step_pre_hook

from normswap.errors import UsageError
from normswap.layer import coupling, following, foreach, formulas, gradient_scale, gradient_trend, run, vectors
from normswap.layer.following import Anchor, kind_of
from normswap.layer.run import Layer, Run, Warnings, watch_passes

MARK = "normswap"  # the key of a parameter group that `param_groups` made for statistics; its value is STATISTICS
STATISTICS = "statistics"
PACE = "normswap_pace"  # the key of such a group for the pace of its layers: a copy of an optimizer, and its state dict, have it too

_live: weakref.WeakSet[Any] = weakref.WeakSet()


@dataclass
class Step:
    """What the hook before a step leaves for the one after it.

    coupled   the coupled layers whose producers the optimizer holds, referred to weakly
    hidden    (parameter, its gradient), by the id of the parameter
    checks    see `gradient_scale`
    """

    coupled: list[Any] = field(default_factory=list)
    hidden: dict[int, tuple[Tensor, Tensor]] = field(default_factory=dict)
    checks: gradient_scale.Checks = field(default_factory=gradient_scale.Checks)

    def follow(self) -> None:
        following.follow([layer for layer in (each() for each in self.coupled) if layer is not None], stepped=True)


_steps: weakref.WeakKeyDictionary[Optimizer, Step] = weakref.WeakKeyDictionary()


def watch(layer: Layer) -> None:
    """Let the layer's statistics step with the optimizer that holds them, and give the layer a new `Run`."""
    layer.run = Run()
    _install()
    _live.add(layer)
    if layer.aux == "auto":
        watch_passes(layer)


@functools.cache
def _install() -> None:
    register_optimizer_step_pre_hook(_before)
    register_optimizer_step_post_hook(_after)


# --- before ----------------------------------------------------------------------------------------------------------------------------


@torch._disable_dynamo  # type: ignore[attr-defined]
def _before(optimizer: Optimizer, args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[Any, Any] | None:
    """The hook before `step(self, closure=None)`: does 1 and 2 at once, or after the closure, which computes the gradients."""
    groups = {id(parameter): group for group in optimizer.param_groups for parameter in group["params"]}
    layers = _in_order(groups, ((layer, _statistics(layer)) for layer in _live if layer.aux != "none"))
    producers = ((layer, layer.producer_in_training) for layer in _live)
    coupled = _in_order(groups, ((layer, [*producer.parameters(False)]) for layer, producer in producers if producer is not None))
    step = _steps.setdefault(optimizer, Step())
    step.coupled = [weakref.ref(layer) for layer in coupled]
    if not layers and not coupled:
        return None
    for layer in layers if run.recomputes() else ():
        if layer.run.pending and any(p.requires_grad and id(p) not in groups for p in _statistics(layer)):
            raise UsageError(
                "an optimizer steps some of the statistics of a BatchlessNorm in the middle of a backward pass, but all must step together",
                hint="give optimizers that step inside backward only the groups of normswap.param_groups(model, lr=...) without the key "
                '"normswap", and step the groups with it after backward',
            )
    following.follow(coupled)

    def begin() -> None:
        _advance(optimizer, groups, layers, step)
        following.take(coupled)
        _clip(optimizer, groups, coupled)

    closure = kwargs.get("closure", args[1] if len(args) > 1 else None)
    if closure is None:
        begin()
        return None
    following.take(coupled)

    def computed() -> Any:
        step.follow()  # an optimizer that calls the closure several times has moved the weights in between
        loss = closure()
        begin()
        return loss

    return (args, {**kwargs, "closure": computed}) if "closure" in kwargs else ((args[0], computed, *args[2:]), kwargs)


def _statistics(layer: Layer) -> list[nn.Parameter]:
    return [p for p in (layer.mean, layer.std_parameter, layer.input_mean, layer.trend) if p is not None]


def _in_order(groups: dict[int, Any], layers: Iterable[tuple[Layer, list[nn.Parameter]]]) -> list[Layer]:
    """The layers of which the optimizer holds parameters, in the optimizer's order: all processes gather their DTensors in the same order.

    Layers with a forward pass since the last step come first. Otherwise a copy that shares parameters with the model (a measurement makes
    one, and the garbage collector may not have found it yet) would step in the place of the model's layer.
    """
    place = {key: number for number, key in enumerate(groups)}
    found = [(min((place[id(p)] for p in parameters if id(p) in place), default=None), layer) for layer, parameters in layers]
    order = [((not layer.run.pending, not layer.training, at, layer.run.number), layer) for at, layer in found if at is not None]
    return [layer for _, layer in sorted(order, key=lambda one: one[0])]


# --- before, 1: the statistics step -----------------------------------------------------------------------------------------------------


class StepInputs(NamedTuple):
    """The gradients by which one layer steps here, hidden from the optimizer. None for a parameter that does not step here.

    factor        what the gradients have to be multiplied by to have weight 1
    scaled        whether `factor` corrects for the scale of a GradScaler that was not known in backward
    std_gradient  the gradient by the std's parameter, which may step here or in the optimizer: <z^2> follows from it
    """

    layer: Layer
    factor: float
    scaled: bool
    std_gradient: Tensor | None
    by_mean: Tensor | None
    by_parameter: Tensor | None
    by_input_mean: Tensor | None
    by_trend: Tensor | None

    @property
    def kind(self) -> tuple[Any, ...]:
        """Layers of one kind step together."""
        layer = self.layer
        raw = id(layer) if layer.stats == "raw" else None  # a raw gradient depends on the number of channels, so each is its own kind
        each = layer.std, layer._eps, layer.momentum, layer.run.pace, layer.steps is None, raw, self.factor, self.scaled
        return *each, *(t is None for t in self[3:]), kind_of(layer.mean)


@torch.no_grad()
def _advance(optimizer: Optimizer, groups: dict[int, dict[str, Any]], layers: list[Layer], step: Step) -> None:
    """Step the statistics of these layers by their gradients, and warn where the loss is not scaled as `attach` says."""
    warnings = Warnings()
    unscaled_by = gradient_scale.corrections(optimizer, layers, step.checks, warnings)
    trains = any(p.grad is not None for group in optimizer.param_groups for p in group["params"])
    inputs: list[StepInputs] = []
    raw_gradients: list[tuple[Tensor, float]] = []
    for layer in layers:
        if layer.run.rounded:
            layer.run.rounded = False
            warnings.add(run.ROUNDED, [layer])
        given = [p for p in _statistics(layer) if id(p) in groups and p.grad is not None]
        if not given:
            if layer.run.pending and trains:
                warnings.add(run.UNREACHED if layer.aux == "auto" else run.LOST if layer.run.read else run.FORGOTTEN, [layer])
            layer.run.pending, layer.run.read = False, True
            continue
        layer.run.pending, layer.stepped = False, True
        layer.run.pace = groups[id(given[0])].get(PACE, layer.run.pace)
        passes, unscaled = _accumulated(layer), unscaled_by.get(layer, 1.0)
        if passes != 1:
            warnings.add(run.ACCUMULATED, [layer])
        ours = (layer.mean, layer.std_parameter, layer.input_mean, layer.trend)
        natural = [p if any(p is g for g in given) and (layer.stats == "natural" or n > 1) else None for n, p in enumerate(ours)]
        std_gradient = layer.std_parameter.grad
        # Hidden now and not later, as a copy that shares parameters must not step them again.
        by: list[Any] = [None if p is None else _hide(optimizer, step, p) for p in natural]
        inputs.append(StepInputs(layer, passes * unscaled, unscaled != 1, std_gradient, *by))
        given = [p for p in given if p.grad is not None]
        if layer.stats == "raw":
            raw_gradients += [(cast(Tensor, p.grad), passes * unscaled) for p in given]
            if any(groups[id(p)].get(MARK) != STATISTICS for p in given):
                warnings.add(run.UNGROUPED, [layer])
        if layer.run.passes is not None:
            layer.run.passes.count = 0
            watch_passes(layer)
    warnings.say()
    for alike in foreach.group_by(inputs, lambda one: one.kind):
        _step(optimizer, alike)
    for grad, factor in raw_gradients:
        if factor != 1:
            grad.mul_(factor)


def _accumulated(layer: Layer) -> float:
    """The factor that gives the gradients weight 1 for the number of backward passes."""
    known = layer.run
    if layer.aux != "auto" or known.passes is None or known.passes.count <= known.accumulate or gradient_scale.is_replaced(layer):
        return 1.0
    return known.accumulate / known.passes.count


def _hide(optimizer: Optimizer, step: Step, parameter: nn.Parameter) -> Tensor:
    """Take a gradient away from the optimizer until its step is over."""
    grad = cast(Tensor, parameter.grad)
    step.hidden[id(parameter)] = parameter, grad
    parameter.grad = None
    # It needs no state, but torch.distributed.checkpoint expects an entry for every parameter that is trained.
    optimizer.state.setdefault(parameter, {})
    return grad


def _step(optimizer: Optimizer, inputs: list[StepInputs]) -> None:
    """Step the statistics of layers of one kind: the trend, then the input mean, then mean and std."""
    # A GradScaler leaves the gradients of fused optimizers scaled, and sets these two attributes.
    scale, bad = (cast("Tensor | None", getattr(optimizer, name, None)) for name in ("grad_scale", "found_inf"))
    layers = [one.layer for one in inputs]
    first, means, parameters = layers[0], [layer.mean for layer in layers], [layer.std_parameter for layer in layers]
    factor, rate = inputs[0].factor, first.momentum * first.run.pace

    def by(grads: Iterable[Tensor | None], axis: int = 0, factor: float = factor) -> Tensor | None:
        found = [grad for grad in grads if grad is not None]
        if not found:
            return None
        grad = formulas.times(foreach.stack(found, axis), factor)
        return grad if scale is None else grad / scale.to(grad.device)

    def becomes(old: Sequence[Tensor], value: Tensor, axis: int = 0) -> None:
        if bad is not None:
            value = torch.where(bad.to(value.device) == 0, value, foreach.stack(old, axis))
        following.copy(old, foreach.unstack(value, old, axis))

    mean, parameter = foreach.stack(means), foreach.stack(parameters)
    by_trend = by((one.by_trend for one in inputs), 1, 1.0)
    # If backward did not know the scale of the loss, it could not take out the trend, whose gradient then means nothing: the trend stays.
    if by_trend is not None and not inputs[0].scaled:
        trends, std_gradient = [cast(Tensor, layer.trend) for layer in layers], by(one.std_gradient for one in inputs)
        square = torch.ones_like(mean) if std_gradient is None else _square(first, parameter, std_gradient)
        becomes(trends, gradient_trend.stepped(foreach.stack(trends, 1), by_trend, square, first.run.pace, each=trends), 1)
    if first.steps is not None:
        counts, by_input_mean = [cast(Tensor, layer.steps) for layer in layers], by(one.by_input_mean for one in inputs)
        steps = foreach.stack(counts) + 1
        becomes(counts, steps)
        if by_input_mean is not None:
            # No output depends on input_mean, so over the first steps it may be their mean: the k-th step has the rate 1/k.
            input_means = [cast(Tensor, layer.input_mean) for layer in layers]
            share = (1 / steps.to(by_input_mean.dtype)).clamp(min=rate)
            becomes(input_means, foreach.stack(input_means) - foreach.expand(share, input_means) * by_input_mean)
    by_mean, by_parameter = by(one.by_mean for one in inputs), by(one.by_parameter for one in inputs)
    mean, parameter = formulas.natural_step(mean, parameter, by_mean, by_parameter, first.std, rate)
    becomes(means, mean)
    becomes(parameters, parameter)


def _square(layer: Layer, parameter: Tensor, by_parameter: Tensor) -> Tensor:
    """<z^2> of the inputs, from the gradient by the std's parameter."""
    std = formulas.std_of(parameter, layer.std)
    modes: dict[str, Any] = {"stats": layer.stats, "reduction": layer.reduction}
    # std stands in for the gradient by mean, on which only d depends.
    _, r = formulas.misfit_of((std, by_parameter), layer._eps / std.square(), std, parameter, layer.std, **modes)
    return 1 + (r / layer.calls if layer.stats == "raw" else r)  # the natural gradient is the mean over the calls already


# --- before, 2: the producers -----------------------------------------------------------------------------------------------------------


@torch.no_grad()
def _clip(optimizer: Optimizer, groups: dict[int, dict[str, Any]], coupled: list[Layer]) -> None:
    """Clip the gradients of the producers' weights for SGD. The length of the steps of other optimizers does not depend on the gradient."""
    if not isinstance(optimizer, torch.optim.SGD):
        return
    found: dict[int, tuple[Layer, nn.Module, dict[str, Any]]] = {}  # one for each weight, which two norms may be coupled to
    for layer in coupled:
        producer = layer.producer_in_training
        weight = cast("nn.Parameter | None", getattr(producer, "weight", None))  # a closure may have called eval()
        if producer is not None and weight is not None and weight.grad is not None and id(weight) in groups:
            found.setdefault(id(weight), (layer, producer, groups[id(weight)]))
    scale = cast("Tensor | None", getattr(optimizer, "grad_scale", None))
    for alike in foreach.group_by(found.values(), lambda one: (id(one[2]), kind_of(one[0].mean))):
        layer, _, group = alike[0]
        reach = group["lr"] / (1 - min(group["momentum"], 0.99))
        reach = reach if scale is None else reach / scale.to(layer.mean.device)
        coupling.clip([producer for _, producer, _ in alike], [cast(Anchor, layer.run.anchor).weight_norm for layer, _, _ in alike], reach)


# --- after, 3 and 4 ---------------------------------------------------------------------------------------------------------------------


@torch._disable_dynamo  # type: ignore[attr-defined]
def _after(optimizer: Optimizer, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
    """After `step`: the statistics of coupled layers follow the weights, and the hidden gradients come back."""
    step = _steps.get(optimizer)
    if step is None:
        return
    step.follow()
    vectors.prepare(layer for layer in (each() for each in step.coupled) if layer is not None)
    for parameter, grad in step.hidden.values():
        if parameter.grad is None:
            parameter.grad = grad
    step.hidden.clear()
