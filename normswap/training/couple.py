"""Which layers are coupled to their producers, and what mean input they start from: set once, after the swap.

The starting point decides the first gradients only, never the function:

    data           the mean input over the calibration data
    closed form    without data, of a producer that reads act(norm(...)): norm's output is taken for normal with mean `bias` and standard
                   deviation |weight|, and act is averaged over its quantiles; through pooling and dropout, which keep a mean
    zero           otherwise
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field, replace
from typing import Any, Literal, cast

import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode
from torch.utils._pytree import tree_map_only

from normswap.detect.sites import Site
from normswap.errors import UsageError, described
from normswap.layer.batchless_norm import BatchlessNorm, BatchlessNormAct
from normswap.layer.producer import input_shape, outputs_of, patch_mean, rank
from normswap.models.copying import HOOKS, shadow

Coupling = Literal["auto", "none"]
COUPLINGS: tuple[Coupling, ...] = ("auto", "none")
QUANTILES = 256

_ELEMENTWISE = frozenset(
    f"{name}{ending}"
    for name in (
        "relu",
        "relu6",
        "hardtanh",
        "leaky_relu",
        "elu",
        "selu",
        "celu",
        "silu",
        "gelu",
        "mish",
        "softplus",
        "hardswish",
        "sigmoid",
        "tanh",
    )
    for ending in ("", "_")
)
_POOLS = frozenset(f"{kind}_pool{n}d" for kind in ("avg", "adaptive_avg") for n in (1, 2, 3))
_KEEPS_THE_MEAN = _POOLS | {"dropout", "feature_dropout", "contiguous", "flatten"}


@dataclass(frozen=True)
class Pair:
    """What `coupling="auto"` made of one layer.

    name      of the layer       producer  the name of the conv or linear that it is coupled to; None if it stays plain
    reason    why it stays plain, else None
    start     where its input mean is from: "data", "closed form" or "zero"; None if it stays plain
    """

    name: str
    producer: str | None = None
    reason: str | None = None
    start: str | None = None


def check(word: str) -> None:
    """Raise UsageError for a word that is none of the known ones."""
    if word not in COUPLINGS:
        raise UsageError(f"coupling is {word!r}; expected one of {', '.join(map(repr, COUPLINGS))}")


def couple(
    model: nn.Module, sites: Iterable[Site], args: tuple[Any, ...], kwargs: Mapping[str, Any], batches: Iterable[tuple[Any, Any]] = ()
) -> tuple[Pair, ...]:
    """Couple the BatchlessNorm layers of `model` to their producers where they have one of their own; says of each what became of it.

    sites: where they are. args, kwargs: of one forward pass. batches: those of the calibration data, if there are any.
    """
    sites = tuple(sites)
    modules = dict(model.named_modules())
    reasons = {s.name: _why_not(s, modules) for s in sites}
    wanted = {s.name: cast(str, s.producer) for s in sites if reasons[s.name] is None}
    seen = _See(shadow(model), wanted)
    try:
        failed = seen.run([(args, kwargs)], data=False) or seen.run(batches, data=True)
    finally:
        seen.close()
    found = []
    for s in sites:
        at = seen.sites.get(s.name)
        reason = reasons[s.name] or (failed and f"a forward pass failed: {failed}") or (_misses(at) if at is not None else None)
        if reason is None and at is not None:
            start, mean = at.start()
            cast(BatchlessNorm, modules[s.name]).couple(modules[at.producer_name], mean, known=start == "data")
            found.append(Pair(s.name, at.producer_name, None, start))
        else:
            found.append(Pair(s.name, reason=reason))
        layer = modules.get(s.name)
        if isinstance(layer, BatchlessNorm):
            if layer.aux != "none":
                layer.enable_sample_limit()
            if layer.aux == "auto":
                layer.enable_trend()
    return tuple(found)


def _why_not(s: Site, modules: Mapping[str, nn.Module]) -> str | None:
    layer = modules.get(s.name)
    if not isinstance(layer, BatchlessNorm):
        return "is no BatchlessNorm"
    if s.calls is not None and s.calls != 1:
        return f"is called {s.calls} times in one forward pass"
    if s.producer is None:
        return (
            "has no producer: no conv or linear, called once, without forward hooks and with a weight of its own that is not computed from "
            "others, gives its output to this layer and nowhere else"
        )
    producer = modules[s.producer]
    hooks = [name for name in HOOKS if name != "_is_full_backward_hook" and getattr(producer, name)]
    if hooks:
        return f"its producer {s.producer} has hooks, which may change what it computes"
    outputs = outputs_of(producer)
    if layer.sizes != (outputs,) or layer.mean.shape != layer.sizes:
        return (
            f"its statistics have the shape {tuple(layer.mean.shape)} for {' x '.join(map(str, layer.sizes))} channels; "
            f"{s.producer} has {outputs} outputs"
        )
    return None


def _misses(at: _Site) -> str | None:
    if not at.inputs:
        return f"a forward pass did not reach it and its producer {at.producer_name}"
    if not at.aligned:
        return f"its channels are not the outputs of its producer {at.producer_name} but another axis"
    return None


@dataclass
class _Site:
    producer_name: str
    producer: nn.Module
    inputs: int = 0  # how many were seen
    aligned: bool = True
    closed: Tensor | None = None
    total: Tensor | None = None
    weight: int = 0

    def start(self) -> tuple[str, Tensor]:
        if self.total is not None and self.weight and self.total.isfinite().all():
            return "data", self.total / self.weight
        if self.closed is not None:
            return "closed form", self.closed
        return "zero", torch.zeros(input_shape(self.producer))


@dataclass
class _Known:
    """What is known of a tensor: its channels' axis, and their mean; normal: (mean, std) of channels that are normally distributed."""

    tensor: Tensor  # keeps the id from being used again
    axis: int
    mean: Tensor
    normal: tuple[Tensor, Tensor] | None = None


@dataclass
class _See:
    """Watches forward passes of a copy of the model."""

    model: nn.Module
    wanted: Mapping[str, str]
    sites: dict[str, _Site] = field(default_factory=dict)
    known: dict[int, _Known] = field(default_factory=dict)
    data: bool = False
    handles: list[Any] = field(default_factory=list)

    def __post_init__(self) -> None:
        modules = dict(self.model.named_modules())
        for name, producer in self.wanted.items():
            site = self.sites[name] = _Site(producer, modules[producer])
            self.handles.append(modules[producer].register_forward_pre_hook(self._fed(site), with_kwargs=True))
            self.handles.append(modules[name].register_forward_pre_hook(self._reached(site), with_kwargs=True))
        for module in modules.values():
            if isinstance(module, BatchlessNorm):
                self.handles.append(module.register_forward_hook(self._normed))

    def close(self) -> None:
        """Leave no cycle through the copy: its layers have the parameters of the model, and optimizers would step them."""
        for handle in self.handles:
            handle.remove()

    def run(self, passes: Iterable[tuple[Any, Any]], *, data: bool) -> str | None:
        """What failed, in words, or None."""
        self.data = data
        try:
            for args, kwargs in passes:
                self.known = {}
                args, kwargs = tree_map_only(Tensor, torch.clone, (args, dict(kwargs)))  # a model may write into its inputs
                with torch.no_grad(), torch.random.fork_rng(devices=[]), _Through(self.known):
                    self.model(*args, **kwargs)
        except Exception as error:  # the user's model may raise anything
            return described(error)
        finally:
            self.known = {}
        return None

    def _fed(self, site: _Site) -> Callable[..., None]:
        def hook(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
            u = args[0] if args else kwargs["input"]
            size = args[1] if len(args) > 1 else kwargs.get("output_size")
            site.inputs += 1
            if self.data:
                mean = patch_mean(module, u, output_size=size) * u.numel()
                site.total = mean if site.total is None else site.total + mean
                site.weight += u.numel()
            elif (known := self.known.get(id(u))) is not None:
                axis = u.dim() - 1 - rank(module)
                if axis == known.axis and len(known.mean) == u.shape[axis]:
                    shape = [1] * u.dim()
                    shape[axis] = -1
                    like = known.mean.view(shape).expand(1 if axis else u.shape[0], *u.shape[1:])
                    site.closed = patch_mean(module, like, output_size=size)

        return hook

    def _reached(self, site: _Site) -> Callable[..., None]:
        def hook(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
            x: Tensor = args[0] if args else next(iter(kwargs.values()))
            channels = cast(BatchlessNorm, module).channel_axis[0] % x.dim()
            site.aligned &= channels == x.dim() - 1 - rank(site.producer)

        return hook

    def _normed(self, module: nn.Module, args: Any, output: Any) -> None:
        assert isinstance(module, BatchlessNorm)
        if isinstance(output, Tensor) and len(module.channel_axis) == 1:
            ones = torch.ones(module.sizes, device=module.mean.device)
            mean = ones * 0 if module.bias is None else module.bias.detach().float()
            std = ones if module.weight is None else module.weight.detach().float().abs()
            known = _Known(output, module.channel_axis[0] % output.dim(), mean, (mean, std))
            if isinstance(module, BatchlessNormAct):
                known = replace(known, mean=module.act(_quantiles(mean, std)).mean(1), normal=None)
            self.known[id(output)] = known


def _quantiles(mean: Tensor, std: Tensor) -> Tensor:
    """(channels, QUANTILES) of normal distributions."""
    levels = (torch.arange(QUANTILES, dtype=torch.float64) + 0.5) / QUANTILES
    normal: Tensor = torch.special.ndtri(levels).to(mean)
    return mean[:, None] + std[:, None] * normal


class _Through(TorchFunctionMode):
    """Follows what is known of a norm's output through the functions that are applied to it."""

    def __init__(self, known: dict[int, _Known]) -> None:
        super().__init__()
        self.known = known

    def __torch_function__(self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Mapping[str, Any] | None = None) -> Any:
        kwargs = kwargs or {}
        before = self.known.get(id(args[0])) if args else None
        result = func(*args, **kwargs)
        if not isinstance(result, Tensor):
            return result
        name = getattr(func, "__name__", "")
        # What works in place changes what was known, too.
        after = None if name.startswith("__") else self._after(before, func, name, args, kwargs, result)
        if after is not None:
            self.known[id(result)] = after
        elif name.endswith("_") or result is (args[0] if args else None):
            self.known.pop(id(result), None)
        return result

    def _after(self, before: _Known | None, func: Any, name: str, args: Any, kwargs: Mapping[str, Any], result: Tensor) -> _Known | None:
        if before is None or result.dim() <= before.axis or result.shape[before.axis] != len(before.mean):
            return None
        if name in _KEEPS_THE_MEAN:
            same = result.shape == before.tensor.shape
            return replace(before, tensor=result, normal=before.normal if same else None)
        if name in _ELEMENTWISE and before.normal is not None:
            values: Tensor = func(_quantiles(*before.normal), *args[1:], **kwargs)
            return _Known(result, before.axis, values.mean(1))
        return None
