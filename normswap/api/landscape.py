r"""The landscape of the loss along its gradient: how far the loss and the gradient of a model change in one step, on one mini-batch.

    L(x)                       the loss of the mini-batch, x all trainable parameters (or those of one layer)
    g = dL/dx                  x - eta g, for a grid of steps eta, on the same mini-batch:
    loss range                 min .. max of L(x - eta g)
    gradient predictiveness    min .. max of |g(x - eta g) - g(x)|
    effective beta-smoothness  max of |g(x - eta g) - g(x)| / |eta g|

|.| is the l2 norm over all of x. A flat and predictable loss allows large learning rates: on a quadratic, steps below 2 / beta converge.

The steps go along the gradient with which training updates the weights. So the statistics of a BatchlessNorm are not part of x and g, nor
is the term that aux="auto" adds to their gradients; coupled statistics change with the weight of their producer, as in an optimizer step;
and the gradient trend, which a layer removes from its gradient, is not part of g.

All of it happens on a copy: parameters, gradients, buffers, modes, hooks and training state of the model are never written.

Source: Santurkar et al. arXiv:1805.11604, section 3.1.
"""

from __future__ import annotations

import contextlib
import itertools
import math
import random
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, get_args

import numpy as np
import torch
from torch import Tensor, nn
from torch.export import ExportedProgram
from torch.nn import functional as F
from torch.nn.parameter import is_lazy

from normswap.errors import NormswapError, SwapError, UsageError, described, one_of
from normswap.files import atomic
from normswap.layer import following
from normswap.layer.batchless_norm import BatchlessNorm
from normswap.models.copying import copy_with, uncompiled
from normswap.parity.probes import Probe
from normswap.parity.run_torch import OwnTensors

if TYPE_CHECKING:
    from matplotlib.axes import Axes

Mode = Literal["train", "eval"]
Loss = Callable[[Any, Any], Tensor]
Progress = Callable[[str, int, int], None]
STEPS = (0.001, 0.003, 0.01, 0.03, 0.1, 0.3)
PICTURES = (".png", ".svg", ".pdf")


@dataclass(frozen=True)
class Point:
    """The loss and the gradient after one step, at x' = x - step g. loss and change are inf where they are not finite.

    distance    |x' - x|, which is |step g| up to rounding
    loss        L(x')
    change      |g(x') - g(x)|
    smoothness  change / distance
    """

    step: float
    distance: float
    loss: float
    change: float
    smoothness: float


@dataclass(frozen=True)
class Line:
    """The points of one model on one batch, one for each step.

    parameters  number of elements of x    loss      L(x)
    batch       its number, from 1         gradient  |g(x)|
    """

    model: str
    batch: int
    parameters: int
    loss: float
    gradient: float
    points: tuple[Point, ...]

    @property
    def loss_range(self) -> tuple[float, float]:
        return min(p.loss for p in self.points), max(p.loss for p in self.points)

    @property
    def change_range(self) -> tuple[float, float]:
        """The gradient predictiveness: the smaller it is, the better a gradient predicts the next."""
        return min(p.change for p in self.points), max(p.change for p in self.points)

    @property
    def smoothness(self) -> float:
        """The effective beta."""
        return max(p.smoothness for p in self.points)


@dataclass(frozen=True)
class Landscape:
    """A line for each model and batch: all batches of the first model, then those of the next."""

    lines: tuple[Line, ...]
    steps: tuple[float, ...]
    layer: str | None
    mode: Mode

    def plot(self, path: str | Path) -> Path:
        """Plot loss, change of the gradient and smoothness against the step, a colour for each model, as an .svg, .png or .pdf file.

        Raises UsageError for another kind of file, or if matplotlib is not installed.
        """
        check_plot(path)
        with atomic.file(Path(path)) as partial:
            _draw(self, partial)
        return Path(path)


def landscape(
    model: nn.Module | Mapping[str, nn.Module],
    data: Iterable[Any],
    *,
    loss: Loss | None = None,
    steps: Sequence[float] = STEPS,
    layer: str | None = None,
    mode: Mode = "train",
    progress: Progress = lambda stage, done, total: None,
) -> Landscape:
    """Measure how the loss and its gradient change along the gradient, on each batch. `model` is not changed.

        landscape({"before": model, "after": conversion.model}, [(images, labels)])

    model: one, or several under names, all on the same batches.
    data: an iterable of batches (x, y), or (x1, x2, y): the last element goes to loss(output, y), the others are the arguments of the
        model; x may be a dict of keyword arguments. A batch that is a dict goes to both: model(**batch) and loss(output, batch).
    loss: returns one floating number in a tensor; None is the cross entropy.
    steps: the grid of eta; the paper's is 1/2 to 4 times the learning rate.
    layer: the qualified name of a module; x then has its parameters alone, and the others stay fixed.
    mode: of the whole model. In "train" a BatchNorm uses the statistics of the batch, and its running statistics are not updated.
    progress: called with (stage, done, total) after each gradient.

    For each gradient the generators of torch, numpy and Python get the same seed, so that dropout drops the same elements, and the buffers
    start with the same values. Computes len(steps) + 1 gradients for each model and batch.

    Raises UsageError for data, a loss, steps or a layer that do not fit, and if the gradient is 0 or not finite; SwapError for a model that
    cannot be copied.
    """
    models = dict(model) if isinstance(model, Mapping) else {"model": model}
    _check(models, data, steps, mode)
    batches = called_with(data)
    if loss is None and any(target is probe.kwargs for probe, target in batches):
        raise UsageError(
            "the batches are dicts, in which only a loss of your own finds the labels",
            hint="give one, a function of (output, batch): loss=..., or --loss package.module:function; or batches (x, y)",
        )
    lines: list[Line] = []
    for name, each in models.items():
        counter = itertools.count(1)

        def tick(name: str = name, counter: Iterator[int] = counter) -> None:
            progress(name, next(counter), len(batches) * (1 + len(steps)))

        measure = _Measure(name, each, loss or cross_entropy, layer, mode, tick)
        lines += [measure.line(number, *asked, steps) for number, asked in enumerate(batches, 1)]
        del measure  # one copy at a time
    return Landscape(tuple(lines), tuple(steps), layer, mode)


def called_with(data: Iterable[Any]) -> list[tuple[Probe, Any]]:
    """(arguments of the model, second argument of the loss) for each batch; for a batch that is a dict, both hold this dict.

    Raises UsageError for a batch that lacks one of them, and if there is no batch.
    """
    found: list[tuple[Probe, Any]] = []
    for number, batch in enumerate(data, 1):
        name = f"batch {number}"
        if isinstance(batch, Mapping):
            found.append((Probe(name, (), batch), batch))
            continue
        if not isinstance(batch, (tuple, list)) or len(batch) < 2:
            size = f" of {len(batch)}" if isinstance(batch, (tuple, list)) else ""
            raise UsageError(
                f"{name} is a {type(batch).__name__}{size}; expected (x, y), y what the loss takes", hint="a single batch: data=[(x, y)]"
            )
        *args, target = batch
        keyword = len(args) == 1 and isinstance(args[0], Mapping)
        found.append((Probe(name, (), args[0]) if keyword else Probe(name, tuple(args), {}), target))
    if not found:
        raise UsageError("the data hold no batch", hint="give at least one, (x, y)")
    return found


def cross_entropy(output: Any, target: Any) -> Tensor:
    """The cross entropy of logits, averaged over the samples."""
    if not isinstance(output, Tensor):
        raise UsageError(
            f"the model returns a {type(output).__name__}, and the cross entropy takes a tensor of logits",
            hint="give a loss of your own, a function of (output, y): loss=..., or --loss package.module:function",
        )
    return F.cross_entropy(output, target)


def check_plot(path: str | Path) -> None:
    """Raise UsageError unless `path` ends in one of PICTURES and matplotlib is installed."""
    if Path(path).suffix.lower() not in PICTURES:
        raise UsageError(f"{path} is no picture that can be drawn", hint=f"expected a name that ends in {', '.join(PICTURES)}")
    try:
        import matplotlib.figure  # noqa: F401
    except ImportError as error:
        raise UsageError("a plot needs matplotlib, which is not installed", hint="pip install 'normswap[docs]', or matplotlib") from error


def _check(models: Mapping[str, nn.Module], data: Any, steps: Sequence[float], mode: str) -> None:
    if data is None or isinstance(data, (Tensor, Mapping)):
        what = "no data were given" if data is None else f"the data are a {type(data).__name__}; expected an iterable of batches (x, y)"
        raise UsageError(what, hint="give batches with labels: data=[(x, y)], or --data on the command line")
    one_of("mode", mode, get_args(Mode))
    bad = [step for step in steps if not (step > 0 and math.isfinite(step))]
    if bad or not len(steps):
        raise UsageError(f"the steps are {list(steps)}; expected one or more finite numbers above 0")
    if not models:
        raise UsageError("there is no model to measure")
    for name, model in models.items():
        if isinstance(model, ExportedProgram):
            raise UsageError(f"{name} is an exported program, which has no modes", hint="measure the model that it was exported from")
        if not isinstance(model, nn.Module):
            raise UsageError(f"{name} is a {type(model).__name__}; expected a torch.nn.Module")
        lazy = next((key for key, p in model.named_parameters() if is_lazy(p)), None)
        if lazy is not None:
            raise UsageError(f"{lazy} of {name} has no values yet", hint="run one forward pass, load the weights, then measure")


class _Measure:
    """Measures one model, on a copy whose parameters are moved along the gradient and back."""

    def __init__(self, name: str, model: nn.Module, loss: Loss, layer: str | None, mode: Mode, tick: Callable[[], None]) -> None:
        self.name, self.loss, self.mode, self.tick = name, loss, mode, tick
        self.foreign = {id(t): key for key, t in (*model.named_parameters(), *model.named_buffers())}
        self.model = copy_with(model, {}, name)
        try:
            self.model.train(mode == "train")
        except NotImplementedError as error:
            raise UsageError(f"{name} is the graph of an exported program, which has no modes", hint="measure the model itself") from error
        self.task = _task(name, self.model, layer)
        self.norms = [m for m in self.model.modules() if isinstance(m, BatchlessNorm)]
        self.start = [(p, p.detach().clone()) for p in self.model.parameters()]
        self.values = {id(b): b.detach().clone() for b in self.model.buffers()}
        self.buffers = [(m, dict(m._buffers)) for m in self.model.modules()]  # kept alive, so that ids are not reused
        tensors = [*self.model.parameters(), *self.model.buffers()]
        self.devices = sorted({t.device.index or 0 for t in tensors if t.device.type == "cuda"})

    def line(self, number: int, probe: Probe, target: Any, steps: Sequence[float]) -> Line:
        where = f"{self.name}, {probe.name}"
        loss, gradient = self._gradient(probe, target)
        size = _norm(gradient)
        if not (math.isfinite(loss) and math.isfinite(size)):
            raise UsageError(f"{where}: the loss is {loss} and the norm of its gradient {size} before any step, so there is no direction")
        if size == 0:
            raise UsageError(f"{where}: the gradient is 0, so there is no direction to step along")
        points = [self._point(where, step, probe, target, gradient) for step in steps]
        return Line(self.name, number, sum(p.numel() for p in self.task), loss, size, tuple(points))

    def _point(self, where: str, step: float, probe: Probe, target: Any, gradient: Sequence[Tensor]) -> Point:
        self._move(step, gradient)
        task = {id(p) for p in self.task}
        distance = _norm([p.detach().double() - before.double() for p, before in self.start if id(p) in task])
        if distance == 0:
            raise UsageError(f"{where}: a step of {step:g} along the gradient changes no parameter, as it is lost in rounding")
        try:
            loss, found = self._gradient(probe, target)
        finally:
            self._back()
        change = _finite(_norm([a.double() - b.double() for a, b in zip(found, gradient, strict=True)]))
        return Point(step, distance, _finite(loss), change, _finite(change / distance))

    @torch.no_grad()
    def _move(self, step: float, gradient: Sequence[Tensor]) -> None:
        """Move the copy to x - step g; coupled statistics follow the weight of their producer, as in an optimizer step."""
        coupled = [norm for norm in self.norms if norm.producer_in_training is not None]
        following.take(coupled)
        for parameter, g in zip(self.task, gradient, strict=True):
            parameter.sub_(g, alpha=step)
        following.follow(coupled)

    @torch.no_grad()
    def _back(self) -> None:
        for parameter, value in self.start:
            parameter.copy_(value)

    def _gradient(self, probe: Probe, target: Any) -> tuple[float, list[Tensor]]:
        """(loss, gradient by each parameter of the task) at the current parameters of the copy."""
        copies = {key: value.clone() for key, value in self.values.items()}
        for module, buffers in self.buffers:  # a buffer that two modules share stays shared
            module._buffers.update({key: None if b is None else copies[id(b)] for key, b in buffers.items()})
        args, kwargs = probe.mapped(torch.clone)
        with _seeded(self.devices), torch.enable_grad(), uncompiled():
            loss = self._loss(probe.name, args, kwargs, target)
            try:
                found = torch.autograd.grad(loss, self.task, allow_unused=True)
            except RuntimeError as error:
                raise UsageError(f"{self.name}, {probe.name}: the backward pass failed: {described(error)}") from error
        if all(g is None for g in found):
            raise UsageError(f"{self.name}, {probe.name}: the loss does not depend on the parameters that the gradient is asked for")
        self.tick()
        pairs = zip(found, self.task, strict=True)
        return loss.item(), [torch.zeros_like(p) if g is None else g for g, p in pairs]

    def _loss(self, batch: str, args: tuple[Any, ...], kwargs: Mapping[str, Any], target: Any) -> Tensor:
        where = f"{self.name}, {batch}"
        try:
            with OwnTensors(self.foreign):
                output = self.model(*args, **kwargs)
        except SwapError as error:
            raise SwapError(f"{self.name} cannot be measured, as that is done on a copy: {error.message}") from error
        except NormswapError:
            raise
        except Exception as error:  # the user's model may raise anything
            alone = "more than 1 value per channel" in str(error)
            raise UsageError(
                f"{where}: the model cannot run in {self.mode} mode: {described(error)}",
                hint="a BatchNorm wants a larger batch; or measure the converted model alone: --as converted --as coupled"
                if alone
                else "a batch is (x, y), or (x1, x2, y); the model is called with all but the last",
            ) from error
        try:
            loss = self.loss(output, target)
        except NormswapError:
            raise
        except Exception as error:  # the user's loss may raise anything, too
            raise UsageError(f"{where}: the loss raised {described(error)}", hint="it is called with (output, y)") from error
        if not isinstance(loss, Tensor) or loss.numel() != 1 or not loss.is_floating_point():
            what = f"{loss.dtype} of shape {tuple(loss.shape)}" if isinstance(loss, Tensor) else f"a {type(loss).__name__}"
            raise UsageError(f"{where}: the loss is {what}; expected one floating number in a tensor")
        if not loss.requires_grad:
            raise UsageError(f"{where}: no gradient comes back from the loss", hint="let neither the model nor the loss detach it")
        return loss.reshape(())


def _task(name: str, model: nn.Module, layer: str | None) -> list[nn.Parameter]:
    """The trainable parameters of the model, or of one layer, without the statistics of BatchlessNorm layers."""
    modules = dict(model.named_modules(remove_duplicate=False))
    if layer is not None and layer not in modules:
        raise UsageError(
            f"{name} has no layer {layer!r}", hint="expected a qualified name, as `normswap inspect` shows them: layer1.0.conv1"
        )
    statistics = {
        id(p)
        for m in modules.values()
        if isinstance(m, BatchlessNorm)
        for p in (m.mean, m.std_parameter, m.input_mean, m.trend)
        if p is not None
    }
    found = [p for p in (model if layer is None else modules[layer]).parameters() if p.requires_grad and id(p) not in statistics]
    if not found:
        where = name if layer is None else f"{layer} of {name}"
        raise UsageError(f"{where} has no parameter that the loss trains", hint="requires_grad_(True); statistics of norms do not count")
    return found


@contextlib.contextmanager
def _seeded(devices: Sequence[int]) -> Iterator[None]:
    """Seed the generators of torch, numpy and Python with 0 in the block, and restore them. devices: indices of CUDA devices."""
    states = random.getstate(), np.random.get_state()
    with torch.random.fork_rng(devices):
        for generator in (torch.default_generator, *(torch.cuda.default_generators[i] for i in devices)):
            generator.manual_seed(0)
        random.seed(0)
        np.random.seed(0)
        try:
            yield
        finally:
            random.setstate(states[0])
            np.random.set_state(states[1])


def _norm(tensors: Iterable[Tensor]) -> float:
    return math.sqrt(sum(t.detach().abs().double().square().sum().item() for t in tensors))


def _finite(value: float) -> float:
    """The value if it is finite; else inf, also for NaN."""
    return value if math.isfinite(value) else math.inf


# --- the plot ---------------------------------------------------------------------------------------------------------------------------


def _draw(found: Landscape, path: Path) -> None:
    import matplotlib as mpl
    from matplotlib.figure import Figure

    panels: tuple[tuple[str, str, Callable[[Point], float]], ...] = (
        ("loss", "linear", lambda p: p.loss),
        ("change of the gradient", "log", lambda p: p.change),
        ("smoothness: change / distance", "log", lambda p: p.smoothness),
    )
    names = list(dict.fromkeys(line.model for line in found.lines))
    with mpl.rc_context({"svg.hashsalt": "normswap"}):  # so that the same numbers give the same file
        figure = Figure(figsize=(12, 3.6), layout="constrained")
        for axis, (title, scale, value) in zip(figure.subplots(1, len(panels)), panels, strict=True):
            _lines(axis, found, names, value)
            axis.set(xscale="log", yscale=scale, xlabel="step", title=title)
            if title == "loss":
                axis.legend(fontsize=8)
        figure.savefig(path, metadata={"Date": None} if path.suffix.lower() == ".svg" else None)


def _lines(axis: Axes, found: Landscape, names: Sequence[str], value: Callable[[Point], float]) -> None:
    """Draw one value of each model and batch against the step, with a gap where it is infinite."""
    seen = set[str]()
    for line in found.lines:
        points = sorted(line.points, key=lambda p: p.step)
        values = [v if math.isfinite(v := value(p)) else math.nan for p in points]
        label = "_nolegend_" if line.model in seen else line.model
        seen.add(line.model)
        axis.plot([p.step for p in points], values, color=f"C{names.index(line.model)}", marker=".", linewidth=1, label=label)
