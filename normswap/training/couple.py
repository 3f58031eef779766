"""How the layers of a converted model train, set once after the swap: their modes, and which are coupled to their producers.

A producer is the conv or linear whose output a norm normalizes. A coupled layer starts from an estimate of the mean of the producer's
input, which decides the first gradients only, never the function:

    data           its mean over the calibration data
    closed form    without data, of a producer that reads act(norm(...)): the output of norm is taken to be normal, with mean `bias` and
                   standard deviation |weight|, and act is averaged over its quantiles; pooling and dropout between keep the mean
    zero           otherwise
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field, replace
from functools import partial
from typing import Any, Literal, cast

import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from normswap.detect.producers import is_plain, why_hooked
from normswap.detect.sites import Site, Swap
from normswap.errors import described
from normswap.layer import optimizer_step
from normswap.layer.batchless_norm import MOMENTUM, Aux, BatchlessNorm, BatchlessNormAct
from normswap.layer.formulas import Stats
from normswap.layer.producer import channel_mean, inputs_of, outputs_of, rank
from normswap.models.copying import copy_for_running
from normswap.models.watching import forward, input_of

Coupling = Literal["auto", "none"]
COUPLINGS: tuple[Coupling, ...] = ("auto", "none")
QUANTILES = 256  # of a normal distribution, over which an activation is averaged

_PIECEWISE = ("relu", "relu6", "hardtanh", "leaky_relu", "hardswish")
_SMOOTH = ("elu", "selu", "celu", "silu", "gelu", "mish", "softplus", "sigmoid", "tanh")
_ELEMENTWISE = frozenset(name + ending for name in (*_PIECEWISE, *_SMOOTH) for ending in ("", "_"))  # relu, and relu_ in place
_POOLS = frozenset(f"{kind}_pool{n}d" for kind in ("avg", "adaptive_avg") for n in (1, 2, 3))
_KEEPS_THE_MEAN = _POOLS | {"dropout", "feature_dropout", "contiguous", "flatten"}


@dataclass(frozen=True)
class Pair:
    """What `coupling="auto"` made of one layer.

    name      of the layer
    producer  the name of the conv or linear that it is coupled to; None if the layer stays plain
    reason    why the layer stays plain, else None
    start     what its first input mean comes from: "data", "closed form" or "zero"; None if the layer stays plain
    """

    name: str
    producer: str | None = None
    reason: str | None = None
    start: str | None = None


def set_modes(model: nn.Module, original: nn.Module, swaps: Iterable[Swap], *, aux: Aux, stats: Stats) -> None:
    """Set how the new BatchlessNorm layers of `model` train. Layers that `original` had already are left as they are.

    A layer gets the momentum of the layer that it was made from (BatchNorm's default where that is None, a cumulative average), and the
    number of its calls in one forward pass.
    """
    known = {name for name, module in original.named_modules() if isinstance(module, BatchlessNorm)}
    calls = {swap.name: swap.calls for swap in swaps}
    for name, layer in model.named_modules():
        if not isinstance(layer, BatchlessNorm) or name in known:
            continue
        layer.aux, layer.stats = aux, stats
        momentum = None if layer.source is None else layer.source.attributes.get("momentum")
        layer.momentum = float(momentum) if isinstance(momentum, (int, float)) else MOMENTUM
        layer.calls = calls.get(name) or 1
        optimizer_step.watch(layer)
        layer.run.name = name


def couple(
    model: nn.Module, sites: Iterable[Site], args: tuple[Any, ...], kwargs: Mapping[str, Any], batches: Iterable[tuple[Any, Any]] = ()
) -> tuple[Pair, ...]:
    """Couple each BatchlessNorm of `model` to its producer, if it has one. Returns a Pair for each layer.

    sites: where the layers are. args, kwargs: of one forward pass. batches: (args, kwargs) of the calibration data, if there is any.
    """
    sites = tuple(sites)
    modules = dict(model.named_modules())
    reasons = {s.name: _why_not(s, modules) for s in sites}
    wanted = {s.name: cast(str, s.producer) for s in sites if reasons[s.name] is None}
    watcher = _InputMeans(copy_for_running(model), wanted)
    try:
        failed = watcher.run([(args, kwargs)], data=False) or watcher.run(batches, data=True)
    finally:
        watcher.close()
    pairs = []
    for s in sites:
        seen = watcher.producers.get(s.name)
        reason = reasons[s.name] or (failed and f"a forward pass failed: {failed}") or (_why_not_seen(seen) if seen is not None else None)
        if reason is None and seen is not None:
            start, mean = seen.start()
            cast(BatchlessNorm, modules[s.name]).couple(modules[seen.name], mean, known=start == "data")
            pairs.append(Pair(s.name, seen.name, None, start))
        else:
            pairs.append(Pair(s.name, reason=reason))
        layer = modules.get(s.name)
        if isinstance(layer, BatchlessNorm):
            if layer.aux != "none":
                layer.enable_sample_limit()
            if layer.aux == "auto":
                layer.enable_trend()
    return tuple(pairs)


def _why_not(s: Site, modules: Mapping[str, nn.Module]) -> str | None:
    """Why a layer cannot be coupled, as far as can be seen without a forward pass."""
    layer = modules.get(s.name)
    if not isinstance(layer, BatchlessNorm):
        return "is not a BatchlessNorm"
    if s.calls is not None and s.calls != 1:
        return f"is called {s.calls} times in one forward pass"
    if s.producer is None:
        return f"has no producer: {s.why_no_producer or 'it is not known which layer computes its input'}"
    producer = modules[s.producer]
    if (hooked := why_hooked(s.producer, producer)) is not None:
        return hooked
    outputs = outputs_of(producer)
    if layer.sizes != (outputs,) or layer.mean.shape != layer.sizes:
        return (
            f"its statistics have the shape {tuple(layer.mean.shape)} for {' x '.join(map(str, layer.sizes))} channels; "
            f"{s.producer} has {outputs} outputs"
        )
    return None


def _why_not_seen(seen: _Producer) -> str | None:
    """Why a layer cannot be coupled, by what a forward pass has shown."""
    if not seen.inputs:
        return f"a forward pass did not reach it and its producer {seen.name}"
    if not seen.readable:
        return f"its producer {seen.name} has code of its own, and is called with something else than the input of its class"
    if not seen.aligned:
        return f"its channels are not the outputs of its producer {seen.name} but another axis"
    return None


@dataclass
class _Producer:
    """What forward passes show of a producer and its norm.

    inputs       how many inputs of the producer were seen
    readable     whether they were what its class takes, so that their mean is known
    aligned      whether the channels of the norm are the outputs of the producer
    closed_form  the mean of the input in closed form, or None
    total, size  the sum over the calibration data of the inputs' means times their sizes, and of the sizes
    """

    name: str
    module: nn.Module
    inputs: int = 0
    readable: bool = True
    aligned: bool = True
    closed_form: Tensor | None = None
    total: Tensor | None = None
    size: int = 0

    def start(self) -> tuple[str, Tensor]:
        """(what the input mean comes from, the input mean)."""
        if self.total is not None and self.size and self.total.isfinite().all():
            return "data", self.total / self.size
        if self.closed_form is not None:
            return "closed form", self.closed_form
        return "zero", torch.zeros(inputs_of(self.module))


@dataclass
class _Channels:
    """What is known of a tensor: the axis of its channels, and their mean; normal: (mean, std), if they count as normally distributed."""

    tensor: Tensor  # keeps the id from being used again
    axis: int
    mean: Tensor
    normal: tuple[Tensor, Tensor] | None = None


@dataclass
class _InputMeans:
    """Watches forward passes of a copy of the model for the mean input of each producer. wanted: the producer's name by the norm's."""

    model: nn.Module
    wanted: Mapping[str, str]
    producers: dict[str, _Producer] = field(default_factory=dict)
    known: dict[int, _Channels] = field(default_factory=dict)  # by id of the tensor
    data: bool = False
    handles: list[Any] = field(default_factory=list)

    def __post_init__(self) -> None:
        modules = dict(self.model.named_modules())
        for name, producer in self.wanted.items():
            seen = self.producers[name] = _Producer(producer, modules[producer])
            self.handles.append(modules[producer].register_forward_pre_hook(partial(self._of_producer, seen), with_kwargs=True))
            self.handles.append(modules[name].register_forward_pre_hook(partial(self._of_norm, seen), with_kwargs=True))
        for module in modules.values():
            if isinstance(module, BatchlessNorm):
                self.handles.append(module.register_forward_hook(self._after_norm))

    def close(self) -> None:
        """Remove the hooks. Their reference cycle would keep the copy alive, and its layers, which share parameters, would step as well."""
        for handle in self.handles:
            handle.remove()

    def run(self, passes: Iterable[tuple[Any, Any]], *, data: bool) -> str | None:
        """Run the model; returns what failed, in words, or None. data: whether `passes` are calibration data."""
        self.data = data
        try:
            for args, kwargs in passes:
                self.known = {}
                forward(self.model, args, kwargs, within=_KnownMeans(self.known))
        except Exception as error:  # the user's model may raise anything
            return described(error)
        finally:
            self.known = {}
        return None

    def _of_producer(self, seen: _Producer, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        u: Any = args[0] if args else kwargs.get("input")
        seen.inputs += 1
        seen.readable &= is_plain(module) or (_is_input_of(module, u) and len(args) + len(kwargs) == 1)
        if not seen.readable:
            return
        if self.data:
            mean = channel_mean(module, u) * u.numel()
            seen.total = mean if seen.total is None else seen.total + mean
            seen.size += u.numel()
        elif (known := self.known.get(id(u))) is not None:
            axis = u.dim() - 1 - rank(module)
            if axis == known.axis and len(known.mean) == u.shape[axis]:
                seen.closed_form = known.mean

    def _of_norm(self, seen: _Producer, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        x = input_of(args, kwargs)
        channels = cast(BatchlessNorm, module).channel_axis[0] % x.dim()
        seen.aligned &= channels == x.dim() - 1 - rank(seen.module)

    def _after_norm(self, module: nn.Module, args: Any, output: Any) -> None:
        assert isinstance(module, BatchlessNorm)
        if isinstance(output, Tensor) and len(module.channel_axis) == 1:
            ones = torch.ones(module.sizes, device=module.mean.device)
            mean = ones * 0 if module.bias is None else module.bias.detach().float()
            std = ones if module.weight is None else module.weight.detach().float().abs()
            known = _Channels(output, module.channel_axis[0] % output.dim(), mean, (mean, std))
            if isinstance(module, BatchlessNormAct):
                known = replace(known, mean=module.act(_quantiles(mean, std)).mean(1), normal=None)
            self.known[id(output)] = known


def _is_input_of(producer: nn.Module, u: object) -> bool:
    """Whether u is a batch of inputs as the class of the producer takes them: (N, C, *places), or (..., C) of a linear."""
    dims = rank(producer)
    if not isinstance(u, Tensor) or not u.is_floating_point() or (u.dim() != dims + 2 if dims else u.dim() < 2):
        return False
    return int(u.shape[-1 - dims]) == inputs_of(producer)


def _quantiles(mean: Tensor, std: Tensor) -> Tensor:
    """The quantiles of normal distributions, (channels, QUANTILES)."""
    levels = (torch.arange(QUANTILES, dtype=torch.float64) + 0.5) / QUANTILES
    normal: Tensor = torch.special.ndtri(levels).to(mean)
    return mean[:, None] + std[:, None] * normal


class _KnownMeans(TorchFunctionMode):
    """Sees every function of torch, and derives what is known of its result from what is known of its first argument."""

    def __init__(self, known: dict[int, _Channels]) -> None:
        super().__init__()
        self.known = known

    def __torch_function__(self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Mapping[str, Any] | None = None) -> Any:
        kwargs = kwargs or {}
        before = self.known.get(id(args[0])) if args else None
        result = func(*args, **kwargs)
        if not isinstance(result, Tensor):
            return result
        name = getattr(func, "__name__", "")
        # After a function that works in place, what was known of its argument does not hold any more.
        after = None if name.startswith("__") else self._after(before, func, name, args, kwargs, result)
        if after is not None:
            self.known[id(result)] = after
        elif name.endswith("_") or result is (args[0] if args else None):
            self.known.pop(id(result), None)
        return result

    def _after(
        self, before: _Channels | None, func: Any, name: str, args: Any, kwargs: Mapping[str, Any], result: Tensor
    ) -> _Channels | None:
        if before is None or result.dim() <= before.axis or result.shape[before.axis] != len(before.mean):
            return None
        if name in _KEEPS_THE_MEAN:
            same = result.shape == before.tensor.shape
            return replace(before, tensor=result, normal=before.normal if same else None)
        if name in _ELEMENTWISE and before.normal is not None:
            values: Tensor = func(_quantiles(*before.normal), *args[1:], **kwargs)
            return _Channels(result, before.axis, values.mean(1))
        return None
