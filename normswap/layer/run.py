"""The training run of a layer: what forward and backward passes leave for the next optimizer step, and the warnings of that step.

A `Run` belongs to a run of training and not to the layer: it is not in the state dict, and neither copied nor pickled (but for its pace).

    forward      records the mean input of a coupled producer, the terms of aux="explicit", and that the statistics should learn: `pending`
    backward     `Passes` counts how often a gradient has reached the statistics
    step         `optimizer_step` reads all of this

With aux="auto" backward adds the gradient of the term with weight 1, as it cannot see what the loss was multiplied by. The step can: it
knows the number of backward passes since the last step, and what was done to the gradients after the last one (`gradient_scale`). If
`attach` was not called for these, the step corrects the gradients, and warns with a message below.
"""

from __future__ import annotations

import functools
import inspect
import itertools
import os
import sys
import threading
import traceback
import warnings
import weakref
from collections.abc import Iterable
from dataclasses import dataclass, field
from typing import Any, NamedTuple, NoReturn, Protocol

import torch
from torch import Tensor, nn
from torch.amp.grad_scaler import GradScaler

from normswap.errors import UsageError
from normswap.layer.formulas import StdForm
from normswap.layer.fsdp import is_part

# The folders that hold no user's code: those of torch, and of normswap (two folders up from this file).
OURS = tuple(os.path.join(folder, "") for folder in (os.path.dirname(inspect.getfile(torch)), os.path.dirname(os.path.dirname(__file__))))

# What to do about a model whose code no longer calls a layer on the output of its producer.
REPAIR = 'call decouple() of the layer, or convert the model as it is now; coupling="none" couples nothing'
FULL = 8  # from this many samples in a step on, the momentum is BatchNorm's


def pace_of(batch: int | None) -> float:
    """What the momentum of the statistics is multiplied by for `batch` samples in a step:  sqrt(batch / 8) below 8, else 1; None: 1.

    The fewer samples, the noisier the moments of a step, and the average has to be over more steps. Measured: docs/benchmarks.md.
    """
    return 1.0 if batch is None else min(1.0, (batch / FULL) ** 0.5)


# --- forward ----------------------------------------------------------------------------------------------------------------------------


class Term(NamedTuple):
    """The NLL of one call of a layer, and its gradients by the parameters, without a history: what `aux_loss` needs."""

    value: Tensor
    parameters: tuple[Tensor, ...]
    gradients: tuple[Tensor, ...]


@dataclass
class Forward:
    """What the forward passes of one thread leave for the backward pass and the step.

    input_mean   the mean input of the producer in its last call, see `coupling`; fresh: whether the layer was not called since then
    pair         where the output of the last call lies, if it was computed with the norm as a `pair`
    interception during a call of the producer, see `hooks`
    terms        the `Term` of each call since `aux_loss` was last read; read: whether `aux_loss` has read these
    """

    input_mean: Tensor | None = None
    fresh: bool = False
    pair: int | None = None
    interception: Any = None
    terms: list[Term] = field(default_factory=list)
    read: bool = True


_others = threading.Lock()  # held while `Run.others` is replaced
_passing = threading.Lock()  # held while a `Passes` is made or takes note of a pass: autograd lets the hooks of several threads run at once


@dataclass
class Run(Forward):
    """The training run of a layer: what the main thread and compiled graphs leave, and what belongs to all threads.

    scaler, scale, accumulate   as given to `attach`; scale: the tensor in which the scaler keeps its scale
    share     the weight of the term in one backward pass: 1 / accumulate, but for micro-batches of unequal size
    pace      what the momentum is multiplied by, see `pace_of`
    mask      which positions of the input count
    factor    of each sample in the last forward pass, see `sample_limit`
    passes    the backward passes, counted for aux="auto"
    pending   whether there was a forward pass, since the last step, from which the statistics should learn
    number    counts the runs, in the order in which they were made
    name      of the layer in the model that it was last seen in, for warnings; empty if no model was
    anchor    of a coupled layer, see `following.Anchor`; prepared: what its passes read, see `vectors`
    rounded   whether the statistics were in half precision in a forward pass since the last step
    others    the `Forward` of each other thread; latest: that of the thread that called the producer last, None: the main one
    """

    scaler: GradScaler | None = None
    scale: Tensor | None = None
    accumulate: int = 1
    share: float = 1.0
    pace: float = 1.0
    mask: Tensor | None = None
    factor: Tensor | None = None
    passes: Passes | None = None
    pending: bool = False
    number: int = field(default_factory=itertools.count().__next__)
    name: str = ""
    others: dict[threading.Thread, Forward] = field(default_factory=dict)
    latest: Forward | None = None
    rounded: bool = False
    anchor: Any = None
    prepared: Any = None

    @property
    def here(self) -> Forward:
        """The `Forward` of this thread. A compiled graph serves all threads, and counts as the main one."""
        if torch.compiler.is_compiling() or threading.current_thread() is threading.main_thread():
            return self
        here = self.others.get(threading.current_thread())
        if here is None:
            here = Forward()
            with _others:
                kept = {thread: left for thread, left in self.others.items() if thread.is_alive() or not left.read}
                self.others = {**kept, threading.current_thread(): here}
        return here

    def record_call(self, *, input_mean: Tensor | None = None, pair: Tensor | None = None) -> None:
        """Record a call of the producer: the mean of its input, or its output if it was computed with the norm as a pair."""
        here = self.here
        here.input_mean, here.pair, here.fresh = input_mean, None if pair is None else place_of(pair), True
        if not torch.compiler.is_compiling():
            self.latest = None if here is self else here

    def take_pair(self, x: Tensor, producer: nn.Module) -> bool:
        """Whether x, the norm's input, is normalized already: the producer was called before, as a pair.

        Raises UsageError if x is not the output of that call.
        """
        here, again = self._here_or_latest(), recomputes()
        if here.pair is None:
            return False
        if not here.fresh and not again:
            raise not_called(producer)
        if here.fresh and place_of(x) != here.pair:
            raise UsageError(
                f"what a BatchlessNorm normalizes is not the output of the {type(producer).__name__} that it is coupled to", hint=REPAIR
            )
        here.fresh = False
        return True

    def take_input(self, producer: nn.Module) -> Tensor:
        """The mean of the producer's last input, for the layer that reads its output. Raises UsageError if it was not called before."""
        here = self._here_or_latest()
        if here.input_mean is None or not (here.fresh or recomputes()):
            raise not_called(producer)
        here.fresh = False
        return here.input_mean

    def _here_or_latest(self) -> Forward:
        """A checkpoint that runs a layer again need not run its producer again: the last call then still holds, in whichever thread."""
        here = self.here
        return (self.latest or self) if recomputes() and here.input_mean is None and here.pair is None else here

    def mark_pending(self) -> None:
        """Record a forward pass from which the statistics should learn."""
        if not torch.compiler.is_exporting():
            self.pending = True

    def record_term(self, term: Term) -> None:
        """Record the term of a forward pass, for `aux_loss` to read."""
        self.pending = True
        here = self.here
        if here.read:
            here.terms, here.read = [], False
        here.terms.append(term)

    def to_read(self) -> Forward:
        """The `Forward` whose terms `aux_loss` reads: that of this thread, or that of the only thread with terms."""
        found = [forward for forward in (self, *self.others.values()) if forward.terms]
        here = self.here
        if here.terms or not found:
            return here
        if len(found) > 1:
            raise UsageError(
                f"{len(found)} other threads have called the model, and this one has not: it is not clear whose auxiliary loss is meant",
                hint="read aux_loss(model) in the thread that called the model",
            )
        return found[0]


def place_of(t: Tensor) -> int:
    """What tells the memory of one tensor from that of another that exists at the same time."""
    return int(t.untyped_storage()._cdata)


def not_called(producer: nn.Module) -> UsageError:
    """The error of a coupled layer whose producer was not called before it."""
    return UsageError(f"a BatchlessNorm is coupled to a {type(producer).__name__} that was not called before it", hint=REPAIR)


def records_term(x: Tensor) -> bool:
    """Whether a forward pass in train mode with aux="explicit" leaves a term: it trains, and is not the second run of a checkpoint."""
    if isinstance(x, torch.fx.Proxy) or torch.compiler.is_exporting():
        raise UsageError(
            'a BatchlessNorm with aux="explicit" keeps the term of each call in train mode, which a traced graph cannot',
            hint='convert with aux="auto", whose term becomes part of the graph, or trace in eval mode',
        )
    if torch.compiler.is_compiling():
        return torch.is_grad_enabled()
    return not recomputes() and (torch.is_grad_enabled() or _within_function())


def _within_function() -> bool:
    """Whether this is the forward pass of an autograd.Function, as a reentrant checkpoint is one: backward repeats it with gradients.

    It has no gradients of either mode, where `torch.no_grad` leaves those in forward mode, and differs from inference mode.
    """
    return not (torch.is_grad_enabled() or torch._C._is_fwd_grad_enabled() or torch.is_inference_mode_enabled())


def recomputes() -> bool:
    """Whether this is the second run of a checkpoint, in backward."""
    return not torch.compiler.is_compiling() and torch._C._current_graph_task_id() != -1


def check_precision(layer: Layer, dtype: torch.dtype) -> None:
    """Record statistics in half precision. The layer never stores them so, but FSDP may gather its parameters in that `dtype`.

    The step warns, once for all layers of the model: in a forward pass each layer would have to speak for itself.
    """
    if dtype.itemsize < 4 and not torch.compiler.is_compiling():
        layer.run.rounded = True


def refuse_replicas() -> NoReturn:
    """Refuse to train a replica of nn.DataParallel, which adds up the gradients of all devices instead of averaging them."""
    raise UsageError(
        "nn.DataParallel adds up the gradients of the statistics of a BatchlessNorm over its devices, where they should be averaged",
        hint="use torch.nn.parallel.DistributedDataParallel; or one device, eval mode or statistics with requires_grad_(False)",
    )


# --- backward ---------------------------------------------------------------------------------------------------------------------------


def _call(method: weakref.WeakMethod[Any], t: Tensor) -> None:
    """Call the method, unless its object is gone."""
    known = method()
    if known is not None:
        known(t)


class Passes:
    """Counts the backward passes that have reached a parameter since it last stepped or lost its gradient.

    inner: the Passes of the whole parameter, if FSDP keeps only a part of it (this parameter) here. The part gets a gradient when FSDP
    reduces the gradient of the whole, which may be once in several passes.
    """

    def __init__(self, parameter: nn.Parameter, inner: Passes | None = None) -> None:
        self.parameter = weakref.ref(parameter)
        self.inner = inner
        self.count = 0
        self.version = 0
        self.kept: Tensor | None = None  # a copy of the gradient, as the last pass left it
        self.grad: Tensor | None = None
        self.added = False
        # The hooks stay as long as the parameter, which may outlive the run: copies of a model that share its parameters come and go.
        hooks: list[Any] = [
            parameter.register_hook(functools.partial(_call, weakref.WeakMethod(self._arrives))),  # type: ignore[no-untyped-call]
            parameter.register_post_accumulate_grad_hook(functools.partial(_call, weakref.WeakMethod(self._has_passed))),  # type: ignore[no-untyped-call]
        ]
        for hook in hooks:
            weakref.finalize(self, hook.remove).atexit = False

    def _arrives(self, gradient: Tensor) -> None:
        with _passing:
            # DistributedDataParallel may have put another tensor in the place of the gradient of the last pass.
            parameter = self.parameter()
            grad = None if parameter is None else parameter.grad
            self.added = grad is not None
            if grad is None or (self.count and not is_part(grad) and self.changed(grad) and not grad.any()):
                self.count = 0  # zero_grad has thrown away what came until now

    def _has_passed(self, parameter: Tensor) -> None:
        with _passing:
            grad = parameter.grad  # with what other threads have added by now, whose own hooks then come later
            passes = 1 if self.inner is None else max(self.inner.count, 1)
            # zero_grad takes the tensor away, and the next pass makes another
            self.count = passes + (self.count if self.added or grad is self.grad else 0)
            self._remember(grad)
        if _several() and torch._C._current_graph_task_id() != -1:
            # DistributedDataParallel writes the average of all processes at the end of backward, in a callback that it asks for later.
            engine = torch.autograd.Variable._execution_engine
            engine.queue_callback(lambda: engine.queue_callback(self._averaged))

    def _averaged(self) -> None:
        parameter = self.parameter()
        if parameter is not None:
            with _passing:
                self._remember(parameter.grad)

    def _remember(self, grad: Tensor | None) -> None:
        self.grad, self.version = grad, 0 if grad is None else grad._version
        self.kept = None if grad is None else grad.detach().clone()

    def changed(self, grad: Tensor, by: int = 0) -> bool:
        """Whether `grad`, the parameter's gradient, was replaced or written to more than `by` times since the last pass."""
        return grad is not self.grad or grad._version > self.version + by


def watch_passes(layer: Layer) -> None:
    """Count the backward passes that reach the layer's statistics, also after other parameters have taken their place."""
    if torch.compiler.is_compiling():
        return
    # While torch.func calls the model, or a tracer looks at it, something else stands in the place of its parameters.
    # The std's comes first, as its gradient is 0 nowhere, see `gradient_scale`.
    trained = [p for p in (layer.std_parameter, layer.mean) if isinstance(p, nn.Parameter) and p.requires_grad]
    if not trained:
        return
    parameter = trained[0]
    with _passing:
        passes = layer.run.passes
        if passes is None or passes.parameter() is None:
            layer.run.passes = Passes(parameter)
        elif not any(p is not None and p.parameter() is parameter for p in (passes, passes.inner)):
            # FSDP puts the whole parameter in the place of its part during forward and backward.
            if is_part(passes.parameter()) and not is_part(parameter):
                passes.inner = Passes(parameter)
            else:
                layer.run.passes = Passes(parameter, passes if is_part(parameter) else None)


def _several() -> bool:
    """Whether there are several processes."""
    return torch.distributed.is_available() and torch.distributed.is_initialized()


# --- what has a run ---------------------------------------------------------------------------------------------------------------------


class Layer(Protocol):
    """What a step reads of a layer with statistics: a BatchlessNorm, or the statistics in the graph of an exported program."""

    run: Run
    std: StdForm
    aux: Any
    stats: Any
    reduction: Any
    momentum: float
    calls: int
    steps: Tensor | None  # the steps of training, if the layer is coupled or has a sample limit
    stepped: bool  # whether an optimizer has moved the statistics
    training: bool

    @property
    def mean(self) -> nn.Parameter: ...
    @property
    def std_parameter(self) -> nn.Parameter: ...
    @property
    def input_mean(self) -> nn.Parameter | None: ...  # the mean input of the producer, if the layer is coupled
    @property
    def trend(self) -> nn.Parameter | None: ...  # see `gradient_trend`; None if nothing is taken out of the gradient
    @property
    def _eps(self) -> float: ...  # what is added to the variance
    @property
    def producer_in_training(self) -> nn.Module | None: ...  # the producer, if the statistics move with its weight now


# --- warnings ---------------------------------------------------------------------------------------------------------------------------

# {layers}: what `Warnings.say` counts; {was} and {it} agree with the number.
FORGOTTEN = (
    'an optimizer steps a model converted with aux="explicit", but aux_loss was not called since the last forward pass, so the statistics '
    'of {layers} stay as they are. Add it to the loss: loss + normswap.aux_loss(model). Or convert with aux="auto"'
)
LOST = (
    'an optimizer steps a model converted with aux="explicit", and aux_loss was called, but backward did not go through it, so the '
    "statistics of {layers} stay as they are. Add it to the loss before backward: loss + normswap.aux_loss(model)"
)
UNREACHED = (
    "an optimizer holds the statistics of {layers} that {was} called in train mode since the last step, but no gradient came back to "
    "{it}, as under torch.no_grad or where an output is detached, so they stay as they are. Freeze them if that is meant: layer.eval(), or "
    "requires_grad_(False)"
)
UNGROUPED = (
    'an optimizer steps the statistics of a model converted with stats="raw" like any weight, with its weight decay and momentum: those '
    'of {layers}. Give it normswap.param_groups(model, lr=...) instead of model.parameters(). Or convert with stats="natural"'
)
ACCUMULATED = (
    "more backward passes have reached the statistics of {layers} since the last step than normswap.attach was called for. Their "
    "gradients were corrected now, at the step; until then they were too large. Say normswap.attach(model, accumulate=...)"
)
SCALED = (
    "a GradScaler that normswap.attach was not given has divided the gradients of the statistics of {layers} by its scale. They "
    "were multiplied by it now, at the step; until then they were too small. Say normswap.attach(model, scaler=...)"
)
UNSCALED = (
    "an optimizer steps without the GradScaler that normswap.attach was given. The gradients of the statistics of {layers} were "
    "divided by its scale now, at the step; until then they were too large. Say scaler.scale(loss).backward() and scaler.step(optimizer), "
    "or normswap.attach(model) where there is no scaler any more"
)
CHANGED = (
    "the gradients of the statistics of {layers} were changed between backward and step, as clip_grad_norm_ does. They have the "
    "units of the activations, and may be most of the norm that is clipped. Clip the other parameters only: those in the groups of "
    'normswap.param_groups(model, lr=...) without the key "normswap"'
)
ROUNDED = (
    "the statistics of {layers} were in half precision since the last step, so they were rounded: the param_dtype of a "
    "MixedPrecisionPolicy does that. Give each BatchlessNorm to fully_shard by itself, without that policy and before the model"
)


class Warnings:
    """The warnings of one step: each text once, with the layers that it is about."""

    def __init__(self) -> None:
        self.found: dict[str, list[Layer]] = {}

    def add(self, text: str, layers: Iterable[Layer]) -> None:
        self.found.setdefault(text, []).extend(layers)

    def say(self) -> None:
        for text, layers in self.found.items():
            name = layers[0].run.name
            if len(layers) == 1:
                named, was, it = f"a BatchlessNorm{name and f' ({name})'}", "was", "it"
            else:
                named, was, it = f"{len(layers)} BatchlessNorm layers{name and f' (first: {name})'}", "were", "them"
            warn(text.format(layers=named, was=was, it=it))


def warn(message: str) -> None:
    """Warn at the user's line that called torch or normswap, such as `optimizer.step()`."""
    if sys.version_info >= (3, 12):
        warnings.warn(message, UserWarning, skip_file_prefixes=OURS)
    else:
        files = (frame.f_code.co_filename for frame, _ in traceback.walk_stack(inspect.currentframe()))
        level = sum(1 for _ in itertools.takewhile(lambda file: file.startswith(OURS), files))
        warnings.warn(message, UserWarning, stacklevel=1 + level)
