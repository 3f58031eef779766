"""How the statistics of the live BatchlessNorm layers step, and what is noticed on the way. Everything here belongs to a run.

A hook on every optimizer of torch looks, right before it steps, for the statistics that it holds:

    natural   step here, by `formulas.natural_step` at the layer's momentum, and the optimizer does not see them: no learning rate,
              momentum, weight decay, second moment or schedule applies, as none applies to the running statistics of BatchNorm
    raw       are the optimizer's; a warning says so if they were not given to it by `param_groups`

The gradient of aux="auto" has weight 1 when it is added. What the loss was multiplied by is not visible there, but it is at the step: how
many backward passes there were since the last one, and whether a GradScaler is making it. What `attach` was not told of is put right then,
for the task never adds to these gradients, and warned about.
"""

from __future__ import annotations

import functools
import inspect
import itertools
import os
import sys
import threading
import warnings
import weakref
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from types import FrameType
from typing import Any, NamedTuple, NoReturn, Protocol, cast

import torch
import torch.utils.checkpoint
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensor
from torch.amp.grad_scaler import GradScaler, OptState
from torch.optim.optimizer import Optimizer, register_optimizer_step_post_hook, register_optimizer_step_pre_hook
from torch.utils.weak import WeakIdKeyDictionary

from normswap.errors import UsageError
from normswap.layer import coupling, formulas, gradient_trend
from normswap.layer.foreach import bunched, joined, parted, spread
from normswap.layer.formulas import StdForm
from normswap.layer.fsdp import is_part

# where a user's code is not
OURS = tuple(os.path.join(os.path.dirname(file), "") for file in (inspect.getfile(torch), os.path.dirname(__file__)))

MARK = "normswap"  # the key of a parameter group that `param_groups` made for statistics; its value is STATISTICS
STATISTICS = "statistics"
PACE = "normswap_pace"  # the key of such a group for the pace of its layers: a copy of an optimizer, and its state dict, have it too


FULL = 8  # samples of a step from which on BatchNorm's momentum is kept


def pace_of(batch: int | None) -> float:
    """What the momentum of the statistics is multiplied by for `batch` samples in a step:  sqrt(batch / 8) below 8, else 1; None: 1.

    The fewer samples, the noisier the moments of a step, and the average has to be over more steps. Measured: docs/benchmarks.md.
    """
    return 1.0 if batch is None else min(1.0, (batch / FULL) ** 0.5)


class Term(NamedTuple):
    """The NLL of one call of a layer, and its gradients: what `aux_loss` needs. parameters: the leaves; the rest has no history."""

    value: Tensor
    parameters: tuple[Tensor, ...]
    by: tuple[Tensor, ...]


class Passes:
    """Counts the backward passes that have reached a parameter since it last stepped or lost its gradient.

    inner: those of the whole parameter, for one of which FSDP keeps a part here. Its gradient comes when FSDP reduces that of the whole,
    which may be once in several passes.
    """

    def __init__(self, parameter: nn.Parameter, inner: Passes | None = None) -> None:
        self.parameter = weakref.ref(parameter)
        self.inner = inner
        self.count = 0
        self.version = 0
        self.grad: Tensor | None = None
        self.added = False
        parameter.register_hook(self._arrives)  # type: ignore[no-untyped-call]
        parameter.register_post_accumulate_grad_hook(self._passed)  # type: ignore[no-untyped-call]

    def _arrives(self, gradient: Tensor) -> None:
        # DistributedDataParallel may have put another tensor in the place of the gradient of the last pass.
        parameter = self.parameter()
        grad = None if parameter is None else parameter.grad
        self.added = grad is not None
        if grad is not None and self.count and not is_part(grad) and self.changed(grad) and not grad.any():
            self.count = 0  # zero_grad(set_to_none=False) has thrown away what came until now

    def _passed(self, parameter: Tensor) -> None:
        grad = parameter.grad
        passes = 1 if self.inner is None else max(self.inner.count, 1)
        # zero_grad takes the tensor away, and the next pass makes another
        self.count = passes + (self.count if self.added or grad is self.grad else 0)
        self._note(grad)
        if _several() and torch._C._current_graph_task_id() != -1:
            # DistributedDataParallel writes the average of all processes at the end of backward, in a callback that it asks for later.
            engine = torch.autograd.Variable._execution_engine
            engine.queue_callback(lambda: engine.queue_callback(self._averaged))

    def _averaged(self) -> None:
        parameter = self.parameter()
        if parameter is not None:
            self._note(parameter.grad)

    def _note(self, grad: Tensor | None) -> None:
        self.grad, self.version = grad, 0 if grad is None else grad._version

    def changed(self, grad: Tensor, by: int = 0) -> bool:
        """Whether `grad`, that of the parameter, was replaced or written to since the last pass, other than `by` times."""
        return grad is not self.grad or grad._version > self.version + by


_others = threading.Lock()  # held while `Run.others` is made anew


@dataclass
class Forward:
    """What the forward passes of one thread leave.

    seen: the mean input of the producer at its last call, see `coupling`; fresh: whether the layer has not been called since.
    terms: those of the forward passes since `aux_loss` read them; read: whether it has.
    """

    seen: Tensor | None = None
    fresh: bool = False
    terms: list[Term] = field(default_factory=list)
    read: bool = True


@dataclass
class Run(Forward):
    """What the main thread and compiled graphs leave, and what belongs to all threads.

    scaler, scale, accumulate: what `attach` was told. share: the weight of the term in one backward pass, 1 / accumulate unless
    micro-batches of unequal size are run. pace: what the momentum is multiplied by, see `pace_of`. mask: which positions of the
    input count.

    number: of the run, in the order in which layers came to be.

    factor: what `guard` multiplied each sample with in the last forward pass.

    passes: counted for aux="auto". owed: whether there was a forward pass from which the statistics should learn since the last step.

    others: what other threads leave; latest: of the thread that called the producer last.
    """

    scaler: GradScaler | None = None
    scale: Tensor | None = None
    accumulate: int = 1
    share: float = 1.0
    pace: float = 1.0
    mask: Tensor | None = None
    factor: Tensor | None = None
    passes: Passes | None = None
    owed: bool = False
    number: int = field(default_factory=itertools.count().__next__)
    others: dict[threading.Thread, Forward] = field(default_factory=dict)
    latest: Forward | None = None

    @property
    def here(self) -> Forward:
        """That of this thread. A graph is compiled for all of them."""
        if torch.compiler.is_compiling() or threading.current_thread() is threading.main_thread():
            return self
        here = self.others.get(threading.current_thread())
        if here is None:
            here = Forward()
            with _others:
                kept = {thread: left for thread, left in self.others.items() if thread.is_alive() or not left.read}
                self.others = {**kept, threading.current_thread(): here}
        return here

    def saw(self, mean: Tensor) -> None:
        """The producer was called, with inputs of this mean."""
        here = self.here
        here.seen, here.fresh = mean, True
        if not torch.compiler.is_compiling():
            self.latest = None if here is self else here

    def input_seen(self) -> Tensor | None:
        """What the producer saw, for the layer that comes after it; None if it was not called."""
        here, again = self.here, recomputes()
        # A checkpoint that runs the layer again need not run its producer again: what that saw then still holds, in whichever thread.
        if again and here.seen is None:
            here = self.latest or self
        seen = here.seen if here.fresh or again else None
        here.fresh = False
        return seen

    def to_read(self) -> Forward:
        """Whose terms `aux_loss` reads: this thread's, or those of the only one that has some."""
        held = [forward for forward in (self, *self.others.values()) if forward.terms]
        here = self.here
        if here.terms or not held:
            return here
        if len(held) > 1:
            raise UsageError(
                f"{len(held)} other threads have called the model, and this one has not: it is not clear whose auxiliary loss is meant",
                hint="read aux_loss(model) in the thread that called the model",
            )
        return held[0]


Anchor = tuple[Tensor, Tensor]  # where the weight of a producer is: `coupling.place`


class Layer(Protocol):
    """What a layer with statistics shows of them. A BatchlessNorm, or the statistics in the graph of an exported program."""

    run: Run
    std: StdForm
    aux: Any
    stats: Any
    reduction: Any
    momentum: float
    calls: int
    units: bool
    steps: Tensor | None  # of training, of a layer that is coupled or guarded
    stepped: bool  # whether an optimizer has moved the statistics
    training: bool

    @property
    def mean(self) -> nn.Parameter: ...
    @property
    def std_parameter(self) -> nn.Parameter: ...
    @property
    def tracked(self) -> nn.Parameter | None: ...  # the mean input of the producer, of a layer that is coupled to one
    @property
    def steering(self) -> nn.Parameter | None: ...  # the trend of the gradient, of a layer with feedback
    @property
    def _eps(self) -> float: ...  # what is added to the variance
    @property
    def follows(self) -> nn.Module | None: ...  # that producer, if the statistics move with its weight now
    def anchor(self) -> Anchor: ...  # what is to be known of it before its weight is moved


class InGraph:
    """The statistics of a norm of an exported program: no module, but an operator in the graph that names their parameters."""

    aux: Any = "auto"
    stepped, training = False, True
    tracked = follows = steering = None
    reduction, _eps, calls, units = "mean", 0.0, 1, False  # which only these ask for
    steps: Tensor | None = None

    def __init__(self, mean: nn.Parameter, parameter: nn.Parameter, form: StdForm, stats: str, momentum: float) -> None:
        self._parameters = weakref.ref(mean), weakref.ref(parameter)
        self.std: StdForm = form
        self.stats: Any = stats
        self.momentum = momentum
        self.run = Run()

    @property
    def mean(self) -> nn.Parameter:
        return cast(nn.Parameter, self._parameters[0]())

    @property
    def std_parameter(self) -> nn.Parameter:
        return cast(nn.Parameter, self._parameters[1]())

    def anchor(self) -> Anchor:
        raise NotImplementedError("an exported program has no producers")


_live: weakref.WeakSet[Any] = weakref.WeakSet()
_adopted: WeakIdKeyDictionary = WeakIdKeyDictionary()  # mean -> InGraph, which lives as long as it does
_following: weakref.WeakKeyDictionary[Optimizer, list[tuple[int, list[Layer]]]] = weakref.WeakKeyDictionary()  # while it steps: `_depth`
_anchors: weakref.WeakKeyDictionary[Any, tuple[int, Any]] = weakref.WeakKeyDictionary()  # of these layers; of the outermost of the steps
_hidden: weakref.WeakKeyDictionary[Optimizer, list[tuple[Tensor, Tensor]]] = weakref.WeakKeyDictionary()


# --- noticing --------------------------------------------------------------------------------------------------------------------------


def watch(layer: Layer) -> None:
    """Let the layer's statistics step with the optimizer that holds them; gives it a run of its own."""
    layer.run = Run()
    _install()
    _live.add(layer)
    if layer.aux == "auto":
        watch_passes(layer)


def adopt(mean: Tensor, parameter: Tensor, form: str, stats: str, rate: float) -> InGraph | None:
    """Let the statistics of an exported program step with the optimizer that holds them. None if these are not parameters."""
    if not isinstance(mean, nn.Parameter) or not isinstance(parameter, nn.Parameter) or isinstance(mean.data, FakeTensor):
        return None
    if mean not in _adopted:
        layer = InGraph(mean, parameter, cast(StdForm, form), stats, rate)
        _adopted[mean] = layer
        watch(layer)
    return cast(InGraph, _adopted[mean])


@functools.cache
def _install() -> None:
    register_optimizer_step_pre_hook(_before)
    register_optimizer_step_post_hook(_after)


def watch_passes(layer: Layer) -> None:
    """Count the backward passes that reach the layer's statistics, whichever parameters they are by now."""
    if torch.compiler.is_compiling():
        return
    # While torch.func calls the model, or a tracer looks at it, something else stands in the place of its parameters.
    trained = [p for p in (layer.mean, layer.std_parameter) if isinstance(p, nn.Parameter) and p.requires_grad]
    if not trained:
        return
    parameter, passes = trained[0], layer.run.passes
    if passes is None or passes.parameter() is None:
        layer.run.passes = Passes(parameter)
    elif not any(p is not None and p.parameter() is parameter for p in (passes, passes.inner)):
        # FSDP puts the whole parameter in the place of its part during forward and backward.
        if is_part(passes.parameter()) and not is_part(parameter):
            passes.inner = Passes(parameter)
        else:
            layer.run.passes = Passes(parameter, passes if is_part(parameter) else None)


def _several() -> bool:
    return torch.distributed.is_available() and torch.distributed.is_initialized()


def counts(x: Tensor) -> bool:
    """Whether a forward pass in train mode belongs to the explicit term: it trains, and is not the second run of a checkpoint."""
    if isinstance(x, torch.fx.Proxy) or torch.compiler.is_exporting():
        raise UsageError(
            'a BatchlessNorm with aux="explicit" keeps the term of each call in train mode, which a traced graph cannot',
            hint='convert with aux="auto", whose term becomes part of the graph, or trace in eval mode',
        )
    if torch.compiler.is_compiling():
        return torch.is_grad_enabled()
    return not recomputes() and (torch.is_grad_enabled() or _caller(_is_checkpoint) is not None)


def recomputes() -> bool:
    """Whether this is the second run of a checkpoint, in backward."""
    return not torch.compiler.is_compiling() and torch._C._current_graph_task_id() != -1


def check_precision(parameter: Tensor) -> None:
    """Warn of statistics in half precision. The layer never holds them so, but FSDP can be told to gather its parameters so."""
    if parameter.dtype.itemsize < 4 and not torch.compiler.is_compiling():
        _warn(_ROUNDED.format(dtype=parameter.dtype))


def refuse_replicas() -> NoReturn:
    """A copy that nn.DataParallel made for one of its devices cannot train: it adds up the gradients of all, however many there are."""
    raise UsageError(
        "nn.DataParallel adds up the gradients of the statistics of a BatchlessNorm over its devices, where they should be averaged",
        hint="use torch.nn.parallel.DistributedDataParallel; or one device, eval mode or statistics with requires_grad_(False)",
    )


def owe(run: Run) -> None:
    """There is a forward pass from which the statistics should learn."""
    if not torch.compiler.is_exporting():
        run.owed = True


def note(run: Run, term: Term) -> None:
    run.owed = True
    here = run.here
    if here.read:
        here.terms, here.read = [], False
    here.terms.append(term)


def _frames() -> Iterator[FrameType]:
    frame: FrameType | None = sys._getframe(1)
    while frame is not None:
        yield frame
        frame = frame.f_back


def _caller(wanted: Callable[[FrameType], Any]) -> Any:
    return next((found for found in map(wanted, _frames()) if found is not None), None)


def _is_checkpoint(frame: FrameType) -> bool | None:
    """A reentrant checkpoint runs its forward pass without gradients; the one that gives them comes in backward."""
    return True if frame.f_code is torch.utils.checkpoint.CheckpointFunction.forward.__code__ else None


def _is_scaler(frame: FrameType) -> GradScaler | None:
    found = frame.f_locals.get("self") if frame.f_code.co_name == "step" else None
    return found if isinstance(found, GradScaler) and found.is_enabled() else None


# --- stepping --------------------------------------------------------------------------------------------------------------------------


@torch._disable_dynamo  # type: ignore[attr-defined]
def _before(optimizer: Optimizer, args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[Any, Any] | None:
    """Before `step(self, closure=None)`: at once, or after the closure, which computes the gradients."""
    groups = {id(parameter): group for group in optimizer.param_groups for parameter in group["params"]}
    layers = _in_order(groups, ((layer, _statistics(layer)) for layer in _live if layer.aux != "none"))
    followers = _in_order(groups, ((layer, [*p.parameters(False)]) for layer in _live if (p := layer.follows) is not None))
    if not layers and not followers:
        return None
    for layer in layers if recomputes() else ():
        if layer.run.owed and any(p.requires_grad and id(p) not in groups for p in _statistics(layer)):
            raise UsageError(
                "an optimizer steps some of the statistics of a BatchlessNorm in the middle of a backward pass, and they step together",
                hint="let optimizers that step there have the other groups of normswap.param_groups(model, lr=...), and step that of the "
                'key "normswap" after it',
            )
    closure = kwargs.get("closure", args[1] if len(args) > 1 else None)
    depth = _depth()
    _following[optimizer] = [step for step in _following.get(optimizer, []) if step[0] < depth] + [(depth, followers)]
    _catch_up(followers, depth)
    if closure is None:
        _advance(optimizer, groups, layers)
        _anchor(followers, depth)
        _clip(optimizer, groups, followers)
        return None

    _anchor(followers, depth)

    def computed() -> Any:
        _catch_up(followers)  # one that calls it several times has moved the weights in between
        loss = closure()
        _advance(optimizer, groups, layers)
        _anchor(followers, depth)
        _clip(optimizer, groups, followers)
        return loss

    return (args, {**kwargs, "closure": computed}) if "closure" in kwargs else ((args[0], computed, *args[2:]), kwargs)


def _in_order(groups: dict[int, Any], layers: Iterable[tuple[Layer, list[nn.Parameter]]]) -> list[Layer]:
    """Those that the optimizer holds parameters of, in its order: processes that share these gather them in the same one.

    Those that have learned come first. A copy that shares parameters with the model, as a measurement makes and the garbage collector has
    not found yet, would else step in the place of a layer of the model.
    """
    place = {key: number for number, key in enumerate(groups)}
    found = [(min((place[id(p)] for p in parameters if id(p) in place), default=None), layer) for layer, parameters in layers]
    order = [((not layer.run.owed, not layer.training, at, layer.run.number), layer) for at, layer in found if at is not None]
    return [layer for _, layer in sorted(order, key=lambda one: one[0])]


def _statistics(layer: Layer) -> list[nn.Parameter]:
    return [p for p in (layer.mean, layer.std_parameter, layer.tracked, layer.steering) if p is not None]


@torch.no_grad()
def _clip(optimizer: Optimizer, groups: dict[int, dict[str, Any]], followers: list[Layer]) -> None:
    """See that SGD does not move the producers' weights too far. The steps of others have a length that the gradient does not decide."""
    if not isinstance(optimizer, torch.optim.SGD):
        return
    found: dict[int, tuple[Layer, nn.Module, dict[str, Any]]] = {}  # one for each weight, which two norms may be coupled to
    for layer in followers:
        producer = layer.follows
        weight = cast("nn.Parameter | None", getattr(producer, "weight", None))  # a closure may have called eval()
        if producer is not None and weight is not None and weight.grad is not None and id(weight) in groups:
            found.setdefault(id(weight), (layer, producer, groups[id(weight)]))
    scale = cast("Tensor | None", getattr(optimizer, "grad_scale", None))
    for bunch in bunched(found.values(), lambda one: (id(one[2]), _kind(one[0].mean))):
        layer, _, group = bunch[0]
        reach = group["lr"] / (1 - min(group["momentum"], 0.99))
        reach = reach if scale is None else reach / scale.to(layer.mean.device)
        coupling.clip([producer for _, producer, _ in bunch], [_anchors[layer][1][1] for layer, _, _ in bunch], reach)


def _kind(t: Tensor) -> tuple[Any, ...]:
    """Those of the same kind can be joined."""
    return t.device, t.dtype, id(t) if is_part(t) else None


def _depth() -> int:
    """How many steps of optimizers are in progress, one inside the other: that of a parent, or of an optimizer that this one wraps."""
    return sum(frame.f_code is _STEP for frame in _frames())


_STEP = Optimizer.profile_hook_step(lambda: None).__code__


@torch.no_grad()
def _catch_up(followers: list[Layer], depth: int | None = None) -> None:
    """Move statistics along with what a step in progress has made of the weights until now. depth: of a step that begins.

    An anchor that is not of a step around that one was left behind by a step that failed.
    """
    late = []
    for layer in followers:
        outermost, anchor = _anchors.get(layer, (None, None))
        if outermost is not None and depth is not None and outermost >= depth:
            del _anchors[layer]
        elif outermost is not None:
            late.append((layer, cast(Anchor, anchor)))
    follow(late)


@torch.no_grad()
def follow(anchors: Iterable[tuple[Layer, Anchor]]) -> None:
    """Move the mean and std of each layer along with the weight of its producer, which has moved since the anchor."""
    for bunch in bunched(anchors, lambda one: (one[0].std, one[0].units, one[0]._eps, _kind(one[0].mean))):
        layers = [layer for layer, _ in bunch]
        first, means, parameters = layers[0], [layer.mean for layer in layers], [layer.std_parameter for layer in layers]
        before, after = _joined(anchor for _, anchor in bunch), _joined(layer.anchor() for layer in layers)
        parameter = joined(parameters)
        options: dict[str, Any] = {"form": first.std, "units": first.units, "eps": first._eps}
        moved = coupling.moved(joined(means), parameter, formulas.std_of(parameter, first.std), before, after, **options)
        _copy(means, parted(moved[0], means))
        _copy(parameters, parted(moved[1], means))


def _joined(anchors: Iterable[Anchor]) -> Anchor:
    places, sizes = zip(*anchors, strict=True)
    return joined(places), joined(sizes)


def _copy(parameters: Sequence[Tensor], values: Sequence[Tensor]) -> None:
    if len(parameters) == 1:  # which may be a part; DTensor knows no foreach of copies
        parameters[0].copy_(values[0])
    else:
        torch._foreach_copy_(list(parameters), list(values))


@torch.no_grad()
def _anchor(followers: list[Layer], depth: int) -> None:
    """Note where the producers' weights are before the optimizer moves them."""
    for layer in followers:
        outermost, _ = _anchors.get(layer, (depth, None))
        _anchors[layer] = outermost, layer.anchor()


@torch.no_grad()
def _follow(optimizer: Optimizer) -> None:
    """Move statistics along at the end of a step; of one inside another, from where on that goes on."""
    steps = _following.get(optimizer)
    if not steps:
        return
    depth, followers = steps.pop()
    _catch_up(followers)
    for layer in followers:
        outermost, _ = _anchors.pop(layer, (depth, None))
        if outermost < depth:
            _anchors[layer] = outermost, layer.anchor()


@torch._disable_dynamo  # type: ignore[attr-defined]
def _after(optimizer: Optimizer, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
    _follow(optimizer)
    for parameter, grad in _hidden.pop(optimizer, []):
        if parameter.grad is None:
            parameter.grad = grad


class _Taken(NamedTuple):
    """The gradients of a layer that steps here, which the optimizer does not see.

    factor: what they have to be multiplied by; scaled: whether part of that was not known while they came. told: that of the std's
    parameter, whoever steps it.
    """

    layer: Layer
    factor: float
    scaled: bool
    told: Tensor | None
    by_mean: Tensor | None
    by_parameter: Tensor | None
    by_tracked: Tensor | None
    by_steering: Tensor | None

    @property
    def kind(self) -> tuple[Any, ...]:
        """Those of one kind step together."""
        layer = self.layer
        raw = id(layer) if layer.stats == "raw" else None  # whose gradient depends on the number of channels
        each = layer.std, layer._eps, layer.momentum, layer.run.pace, layer.steps is None, raw, self.factor, self.scaled
        return *each, *(t is None for t in self[3:]), _kind(layer.mean)


@torch.no_grad()
def _advance(optimizer: Optimizer, groups: dict[int, dict[str, Any]], layers: list[Layer]) -> None:
    scaler = cast("GradScaler | None", _caller(_is_scaler))
    trains = any(p.grad is not None for group in optimizer.param_groups for p in group["params"])
    taken: list[_Taken] = []
    left: list[tuple[Tensor, float]] = []
    for layer in layers:
        held = [p for p in _statistics(layer) if id(p) in groups and p.grad is not None]
        if not held:
            if layer.run.owed and trains:
                _warn(_UNREACHED if layer.aux == "auto" else _LOST if layer.run.read else _FORGOTTEN)
            layer.run.owed, layer.run.read = False, True
            continue
        layer.run.owed, layer.stepped = False, True
        layer.run.pace = groups[id(held[0])].get(PACE, layer.run.pace)
        passes, unscaled = _weight(optimizer, layer, scaler)
        ours = (layer.mean, layer.std_parameter, layer.tracked, layer.steering)
        natural = [p if any(p is h for h in held) and (layer.stats == "natural" or n > 1) else None for n, p in enumerate(ours)]
        told = layer.std_parameter.grad
        # At once, as a copy that shares parameters must not step them again.
        by: list[Any] = [None if p is None else _take(optimizer, p) for p in natural]
        taken.append(_Taken(layer, passes * unscaled, unscaled != 1, told, *by))
        held = [p for p in held if p.grad is not None]
        if layer.stats == "raw":
            left += [(cast(Tensor, p.grad), passes * unscaled) for p in held]
            if any(groups[id(p)].get(MARK) != STATISTICS for p in held):
                _warn(_UNGROUPED)
        if layer.run.passes is not None:
            layer.run.passes.count = 0
            watch_passes(layer)
    for bunch in bunched(taken, lambda one: one.kind):
        _step(optimizer, bunch)
    for grad, factor in left:
        if factor != 1:
            grad.mul_(factor)


def _take(optimizer: Optimizer, parameter: nn.Parameter) -> Tensor:
    grad = cast(Tensor, parameter.grad)
    _hidden.setdefault(optimizer, []).append((parameter, grad))
    parameter.grad = None
    # None is needed, but torch.distributed.checkpoint asks for that of everything that is trained.
    optimizer.state.setdefault(parameter, {})
    return grad


def _step(optimizer: Optimizer, bunch: list[_Taken]) -> None:
    """Of layers of one kind."""
    # Fused optimizers are handed scaled gradients, and told so.
    scale, bad = (cast("Tensor | None", getattr(optimizer, name, None)) for name in ("grad_scale", "found_inf"))
    layers = [one.layer for one in bunch]
    first, means, parameters = layers[0], [layer.mean for layer in layers], [layer.std_parameter for layer in layers]
    factor, rate = bunch[0].factor, first.momentum * first.run.pace

    def by(grads: Iterable[Tensor | None], kept: int = 0, factor: float = factor) -> Tensor | None:
        found = [grad for grad in grads if grad is not None]
        if not found:
            return None
        grad = formulas.weighed(joined(found, kept), factor)
        return grad if scale is None else grad / scale.to(grad.device)

    def becomes(old: Sequence[Tensor], value: Tensor, kept: int = 0) -> None:
        if bad is not None:
            value = torch.where(bad.to(value.device) == 0, value, joined(old, kept))
        _copy(old, parted(value, old, kept))

    mean, parameter = joined(means), joined(parameters)
    by_steering = by((one.by_steering for one in bunch), 1, 1.0)
    # By a scale that is not known while the gradient passes, none of the trend could be taken away: it stays.
    if by_steering is not None and not bunch[0].scaled:
        trends, told = [cast(Tensor, layer.steering) for layer in layers], by(one.told for one in bunch)
        square = torch.ones_like(mean) if told is None else _square(first, parameter, told)
        becomes(trends, gradient_trend.stepped(joined(trends, 1), by_steering, square, first.run.pace, each=trends), 1)
    if first.steps is not None:
        counted, by_tracked = [cast(Tensor, layer.steps) for layer in layers], by(one.by_tracked for one in bunch)
        steps = joined(counted) + 1
        becomes(counted, steps)
        if by_tracked is not None:
            # It decides no value of the function, so that the first steps may take their own mean: 1/k in the k-th one.
            tracked = [cast(Tensor, layer.tracked) for layer in layers]
            share = (1 / steps.to(by_tracked.dtype)).clamp(min=rate)
            becomes(tracked, joined(tracked) - spread(share, tracked) * by_tracked)
    by_mean, by_parameter = by(one.by_mean for one in bunch), by(one.by_parameter for one in bunch)
    mean, parameter = formulas.natural_step(mean, parameter, by_mean, by_parameter, first.std, rate)
    becomes(means, mean)
    becomes(parameters, parameter)


def _square(layer: Layer, parameter: Tensor, by_parameter: Tensor) -> Tensor:
    """<z^2> of the inputs for which the gradient by the std's parameter is this."""
    std = formulas.std_of(parameter, layer.std)
    modes: dict[str, Any] = {"stats": layer.stats, "reduction": layer.reduction}
    _, r = formulas.misfit_of(std, by_parameter, layer._eps / std.square(), std, parameter, layer.std, **modes)
    return 1 + (r / layer.calls if layer.stats == "raw" else r)  # the natural gradient is the mean over the calls already


@functools.cache
def _unscaling(device: torch.device) -> int:
    """How often GradScaler.unscale_ counts as a change of a gradient: not at all in torch 2.13, though it is one."""
    grad, found, inverse = torch.ones(1, device=device), torch.zeros((), device=device), torch.ones((), device=device)
    torch._amp_foreach_non_finite_check_and_unscale_([grad], found, inverse)
    return grad._version


def _weight(optimizer: Optimizer, layer: Layer, scaler: GradScaler | None) -> tuple[float, float]:
    """What the gradients have to be multiplied by to have weight 1, for the passes and for the scale, and a warning if it is not 1."""
    run, factor, unscaled = layer.run, 1.0, 1.0
    if any(getattr(p, "summed_grad", None) is not None for p in (layer.mean, layer.std_parameter)):
        return factor, unscaled  # Opacus put its own gradient in the place of the one that passes are counted of
    passes = run.passes
    if passes is not None and passes.count:
        parameter = passes.parameter()
        grad = None if parameter is None else parameter.grad
        unchanged = grad is None or not passes.changed(grad, 0 if scaler is None else _unscaling(grad.device))
        # Views of one bucket of DistributedDataParallel are written to together, so that who was cannot be seen.
        if layer.stats == "natural" and not unchanged and not is_part(grad) and not grad._is_view():  # type: ignore[union-attr]
            _warn(_CHANGED)
        if layer.aux == "auto" and passes.count > run.accumulate:
            factor *= run.accumulate / passes.count
            _warn(_ACCUMULATED)
    if layer.aux == "auto" and scaler is not None and scaler is not run.scaler:
        unscaled = scaler.get_scale() / (1 if run.scale is None else run.scale.item())
        _warn(_SCALED)
    if layer.aux == "auto" and scaler is None and run.scaler is not None and run.scale is not None and _scaled(run.scaler, optimizer):
        unscaled /= run.scale.item()
        _warn(_UNSCALED)
    return factor, unscaled


def _scaled(scaler: GradScaler, optimizer: Optimizer) -> bool:
    """Whether the gradients of an optimizer still have the scale in them: nobody called `unscale_`."""
    state = scaler._per_optimizer_states.get(id(optimizer))
    return state is None or state["stage"] is OptState.READY


_FORGOTTEN = (
    'an optimizer steps a model converted with aux="explicit", but its term was not read since the last forward pass, so the statistics '
    'stay as they are. Add it to the loss: loss + normswap.aux_loss(model). Or convert with aux="auto"'
)
_LOST = (
    'an optimizer steps a model converted with aux="explicit", and its term was read, but no gradient of it came, so the statistics stay '
    "as they are. Add it to the loss before backward: loss + normswap.aux_loss(model)"
)
_UNREACHED = (
    "an optimizer holds the statistics of a BatchlessNorm that was called in train mode since the last step, but no gradient came back to "
    "it, as under torch.no_grad or where its output is detached, so they stay as they are. Freeze them if that is meant: layer.eval(), or "
    "requires_grad_(False)"
)
_UNGROUPED = (
    'an optimizer steps the statistics of a model converted with stats="raw" like any weight, with its weight decay and momentum. '
    'Give it normswap.param_groups(model, lr=...) instead of model.parameters(). Or convert with stats="natural"'
)
_ACCUMULATED = (
    "more backward passes have reached the statistics of a BatchlessNorm since the last step than normswap was told of. Their gradients "
    "were divided by the number of passes now, at the step; until then they were too large. Say normswap.attach(model, accumulate=...)"
)
_SCALED = (
    "a GradScaler that normswap was not told of has divided the gradients of the statistics of a BatchlessNorm by its scale. They were "
    "multiplied by it now, at the step; until then they were too small. Say normswap.attach(model, scaler=...)"
)
_UNSCALED = (
    "an optimizer steps without the GradScaler that normswap was told of. The gradients of the statistics of a BatchlessNorm were divided "
    "by its scale now, at the step; until then they were too large. Say scaler.scale(loss).backward() and scaler.step(optimizer), or "
    "normswap.attach(model) where there is no scaler any more"
)
_CHANGED = (
    "the gradients of the statistics of a BatchlessNorm were changed between backward and step, as clip_grad_norm_ does. They have the "
    "units of the activations and would decide the norm of all. Clip the others only, which are the parameters of every group of "
    'normswap.param_groups(model, lr=...) that has no key "normswap"'
)
_ROUNDED = (
    "the statistics of a BatchlessNorm are {dtype} in this forward pass, as the param_dtype of a MixedPrecisionPolicy does, and rounded. "
    "Give each BatchlessNorm to fully_shard by itself, without that policy and before the model"
)


def _warn(message: str) -> None:
    """At the line that called torch or normswap, as that of `optimizer.step()`."""
    ours = list(itertools.takewhile(lambda frame: frame.f_code.co_filename.startswith(OURS), _frames()))
    warnings.warn(message, UserWarning, stacklevel=1 + len(ours))
