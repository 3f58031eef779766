"""Sets the statistics of approximate layers from calibration data: their sources computed statistics from each sample, and stored none.

Layers are calibrated in strata. A stratum is a set of layers none of which feeds another of them. The strata follow in the order of
execution, and each is calibrated on the outputs of the calibrated layers before it; until then, a layer computes what its source would.
Per channel,

    mean, std        those of the layer's input x over all calibration data
    weight, bias     the least-squares fit of weight * (x - mean) / std + bias to what the source put out in the original model

so that each layer also corrects, as far as an affine per channel can, the error of the layers before it (`moments.py`).

Layers that have statistics already (from BatchNorm) can be re-estimated at the same time: `exact` gives them the statistics of the data and
changes weight and bias so that the function stays the same; `adapt` keeps weight and bias, so the function changes with the data. Constant
channels keep what they had. A layer that is re-estimated exactly keeps its function, so it starts no new stratum.

For each stratum the data pass once through both models, and each forward pass stops when the stratum has been seen; one more forward pass,
of the first batch, finds the strata. A batch is a tensor, a tuple of arguments, or a dict of keyword arguments; positions where its
"attention_mask" is 0 do not count.
"""

from __future__ import annotations

import contextlib
import inspect
import math
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence, Sized
from dataclasses import dataclass, field, replace
from typing import Any, Literal

import torch
from torch import Tensor, nn

from normswap.errors import UsageError, described
from normswap.layer import formulas
from normswap.layer.batchless_norm import BatchlessNorm, BatchlessNormAct
from normswap.models.copying import set_eval, shared_parameters
from normswap.models.torch_private import is_functorch_wrapped
from normswap.models.watching import forward
from normswap.swap.moments import Moments, histogram, sample
from normswap.swap.strata import StratumLabels

MASK = "attention_mask"
FLAT = 1e-6  # a channel is constant if its std is at most this share of the layer's largest std, or of its own mean

# Thresholds beyond which a Fit has a remark.
POOR = 0.5  # error
OUTLIERS = 30.0  # max_kurtosis
FIRST = 5.0  # first_position
FEW = 100  # samples

Reestimate = Literal["exact", "adapt"]
REESTIMATE: tuple[Reestimate, ...] = ("exact", "adapt")


@dataclass(frozen=True)
class Fit:
    """How well one layer could be calibrated.

    error           relative l2 distance of the layer's output to its source's, on the calibration data
    samples         how many values each channel's statistics rest on
    flat_channels   channels whose std is (almost) 0     max_kurtosis   the largest kurtosis of a channel; 3 is normal
    first_position  rms of x at position 0 of a sequence over the rms elsewhere, large if position 0 is an outlier; None without a sequence
    how             "fit" (a layer without statistics), "exact" or "adapt" (re-estimated)
    channels        how many the layer has     kept_channels   how many kept the statistics they had
    remarks         the numbers that are bad, in words; empty if none is
    histogram       counts of (x - mean) / std of part of the data, see `moments.histogram`; empty if there are none
    """

    name: str
    stratum: int
    error: float
    samples: int
    flat_channels: int
    max_kurtosis: float
    first_position: float | None
    how: str = "fit"
    channels: int = 0
    kept_channels: int = 0
    remarks: tuple[str, ...] = ()
    histogram: tuple[int, ...] = ()


@dataclass
class _Site:
    name: str
    layer: BatchlessNorm
    source: nn.Module
    moments: Moments
    how: Literal["fit", "exact", "adapt"] = "fit"
    calls: int = 0  # in one forward pass
    stratum: int = 0
    done: bool = False
    kept: int = 0
    inside: bool = False  # whether the source is running, as a part of the original model
    before_act: Tensor | None = None  # the input of the source's own activation (or dropout) in the original model
    sampled: list[Tensor] = field(default_factory=list)  # rows of its input, for the histogram
    first: list[float] = field(default_factory=lambda: [0.0, 0.0])  # sum of squares and count at position 0
    total: list[float] = field(default_factory=lambda: [0.0, 0.0])


class _Enough(Exception):
    """Stops a forward pass once all layers of the stratum have been called."""


def calibrate(
    model: nn.Module,
    original: nn.Module,
    names: Sequence[str],
    batches: Iterable[Any],
    *,
    reestimate: Mapping[str, Reestimate] | None = None,
    alone: bool = False,
    progress: Callable[[int, int], None] = lambda done, total: None,
) -> tuple[Fit, ...]:
    """Set the statistics, weights and biases of the named BatchlessNorm layers of `model` from data; changes nothing but `model`.

    original: the model that `model` was made from, in eval mode; a copy that nobody else uses. reestimate: layers that have statistics
    already -> how they are re-estimated; a layer that cannot be keeps its statistics, and its Fit says why. alone: calibrate each layer as
    if it were the only one swapped, on the outputs of the original's layers; one pass calibrates all, and every Fit has stratum 1.
    progress(done, total) is called after each batch of each stratum. Raises UsageError if there is no batch, the model cannot run on one,
    or a layer cannot be fitted.
    """
    batches = batches if isinstance(batches, Sequence) or iter(batches) is not batches else list(batches)
    modules, sources = dict(model.named_modules()), dict(original.named_modules())
    shared = shared_parameters(model)
    sites, kept = [], []
    for name, how in {**dict.fromkeys(names, "fit"), **(reestimate or {})}.items():
        layer = modules[name]
        assert isinstance(layer, BatchlessNorm)
        reason = _why_not(layer, how, shared)
        if reason is not None and how == "fit":
            raise UsageError(f"{name} {reason}", hint="exclude it from the conversion")
        if reason is not None:
            kept.append(_kept(name, how, layer, reason))
            continue
        sites.append(_Site(name, layer, sources[name], Moments.empty(math.prod(layer.sizes)), how))  # type: ignore[arg-type]
    with _Calibration(model, original, sites, alone) as calibration:
        return (*calibration.run(batches, progress), *kept)


def _why_not(layer: BatchlessNorm, how: str, shared: Mapping[int, Sequence[str]]) -> str | None:
    """Why calibration may not change the weight and bias of this layer; None if it may."""
    if how == "adapt":
        return None
    if layer.weight is None or layer.bias is None:
        return "has no weight and bias, which would have to make up for the new statistics"
    for parameter in (layer.weight, layer.bias):
        if id(parameter) in shared:
            return f"shares a parameter: {' and '.join(shared[id(parameter)])} are one tensor, so calibration would change all"
    if layer.source is not None and not {"weight", "bias"} <= layer.source.parameters.keys() | layer.source.buffers.keys():
        return f"was made from a {layer.source.cls.__name__} without weight or bias, so a revert could not restore it"
    return None


def _kept(name: str, how: str, layer: BatchlessNorm, reason: str) -> Fit:
    channels = math.prod(layer.sizes)
    return Fit(name, 0, 0.0, 0, 0, math.nan, None, how, channels, channels, (f"keeps its statistics: {reason}",))


class _Unreadable(Exception):
    """The input of a layer is a tensor whose values calibration cannot read."""


class _Calibration:
    """The hooks on layers and their sources while data pass through both models.

    They record the input of each layer, and the output of its source in the original model. A layer whose stratum is not calibrated yet
    returns the output of its source instead of its own.
    """

    def __init__(self, model: nn.Module, original: nn.Module, sites: list[_Site], alone: bool) -> None:
        self.model, self.original, self.sites, self.alone = model, original, sites, alone
        self.targets: dict[str, list[Tensor]] = {}  # name -> outputs of its source in the original model, one for each call
        self.labels: StratumLabels | None = None
        self.stratum = 0
        self.pending = 0
        self.source_stands_in = False
        self.mask: Tensor | None = None
        self.handles: list[Any] = []
        self.training = {module: module.training for module in model.modules()}

    def __enter__(self) -> _Calibration:
        set_eval(self.model)
        self.handles = [site.layer.register_forward_hook(self._hook(site), prepend=True, with_kwargs=True) for site in self.sites]
        self.handles += [site.layer.register_forward_pre_hook(self._refuse_unreadable(site), with_kwargs=True) for site in self.sites]
        for site in self.sites:
            self.handles += [
                site.source.register_forward_pre_hook(self._enter(site)),
                site.source.register_forward_hook(self._target(site)),
            ]
            after = _after(site)
            if after is not None:
                self.handles.append(after.register_forward_pre_hook(self._before_act(site), prepend=True))
        return self

    def __exit__(self, *error: object) -> None:
        for handle in self.handles:
            handle.remove()
        for module, flag in self.training.items():
            module.training = flag

    def run(self, batches: Iterable[Any], progress: Callable[[int, int], None]) -> tuple[Fit, ...]:
        unseen = self._find_strata(batches) if self.sites else ()
        if self.alone:
            for site in self.sites:
                site.stratum = 1
        strata = max((site.stratum for site in self.sites), default=0)
        passes = len(batches) if isinstance(batches, Sized) else None
        for self.stratum in range(1, strata + 1):
            count = 0
            for batch in batches:
                self._forward(batch)
                count += 1
                if passes is not None:
                    progress((self.stratum - 1) * passes + count, strata * passes)
            passes = count
            for site in self.sites:
                if site.stratum == self.stratum:
                    _store(site)
        return (*(_fit(site) for site in sorted(self.sites, key=lambda s: s.stratum)), *unseen)

    def _find_strata(self, batches: Iterable[Any]) -> list[Fit]:
        """Set the stratum of each site, and return a Fit with a remark for each re-estimated layer that the data do not reach."""
        first = next(iter(batches), None)
        if first is None:
            raise UsageError("the calibration data hold no batch", hint="give at least one; some hundred samples are better")
        with StratumLabels() as self.labels:
            self._forward(first)
        self.labels = None
        unseen = [site for site in self.sites if not site.calls]
        unfit = [site.name for site in unseen if site.how == "fit"]
        if unfit:
            raise UsageError(
                f"{', '.join(unfit)} see no data: no forward pass on the calibration data reaches them",
                hint="exclude them from the conversion",
            )
        self.sites = [site for site in self.sites if site.calls]
        return [_kept(site.name, site.how, site.layer, "no forward pass on the data reaches it") for site in unseen]

    def _forward(self, batch: Any) -> None:
        args, kwargs = arguments_of(batch, self.model)
        mask = kwargs.get(MASK)
        self.mask = mask.bool() if isinstance(mask, Tensor) else None
        self.targets = {}
        try:
            for model in (self.original, self.model) if self.labels is None else (self.model,):
                self.pending = sum(site.calls for site in self.sites if site.stratum == self.stratum)
                with contextlib.suppress(_Enough):
                    forward(model, args, kwargs)
        except _Unreadable as error:
            raise UsageError(str(error), hint="exclude it from the conversion") from error
        except Exception as error:  # the user's model may raise anything
            raise UsageError(
                f"the model does not take the calibration data: {described(error)}",
                hint="a batch is a tensor, a tuple of arguments, or a dict of keyword arguments",
            ) from error

    def _enter(self, site: _Site) -> Callable[..., None]:
        def hook(module: nn.Module, args: tuple[Any, ...]) -> None:
            site.inside, site.before_act = not self.source_stands_in, None

        return hook

    def _before_act(self, site: _Site) -> Callable[..., None]:
        """Hook on the source's own activation, which the new layer keeps: the activation's input is the target of the fit."""

        def hook(module: nn.Module, args: tuple[Any, ...]) -> None:
            if site.inside and site.before_act is None:
                site.before_act = args[0].clone()  # it may work in place

        return hook

    def _target(self, site: _Site) -> Callable[..., None]:
        """Hook on the source: records its output when the original model runs it, but not when it runs in the place of the layer."""

        def hook(module: nn.Module, args: tuple[Any, ...], output: Tensor) -> None:
            if self.labels is None and site.stratum == self.stratum and not self.source_stands_in:
                # a copy, as a reader may overwrite the output in place
                self.targets.setdefault(site.name, []).append(output.clone() if site.before_act is None else site.before_act)
                self._seen()
            site.inside = False

        return hook

    def _refuse_unreadable(self, site: _Site) -> Callable[..., None]:
        def hook(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
            for x in (*args, *kwargs.values()):
                if isinstance(x, Tensor) and is_functorch_wrapped(x):
                    raise _Unreadable(f"{site.name} is called inside torch.vmap or the like, so it cannot be calibrated")
                if isinstance(x, Tensor) and x.is_nested:
                    raise _Unreadable(f"{site.name} is called on a nested tensor, so it cannot be calibrated")

        return hook

    def _hook(self, site: _Site) -> Callable[..., Tensor | None]:
        """Hook on the layer: records its input, and returns the output of its source until the layer is calibrated."""

        def hook(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], output: Tensor) -> Tensor | None:
            x = args[0] if args else next(iter(kwargs.values()))
            if site.done:
                return None
            self.source_stands_in = True
            y: Tensor = site.source(x)
            self.source_stands_in = False
            if self.labels is not None:
                site.calls += 1
                site.stratum = max(site.stratum, self.labels.of(x) + 1)
                if site.how != "exact":
                    self.labels.mark(y, site.stratum)
            elif site.stratum == self.stratum:
                _record(site, x, self.targets[site.name].pop(0), self.mask)
                self._seen()
            return y

        return hook

    def _seen(self) -> None:
        self.pending -= 1
        if self.pending == 0:
            raise _Enough


def arguments_of(batch: Any, model: nn.Module) -> tuple[tuple[Any, ...], Mapping[str, Any]]:
    """(args, kwargs) for a batch. Of a tuple, like a data set's (input, label), the model gets only as many elements as it takes."""
    if isinstance(batch, Mapping):
        return (), batch
    if not isinstance(batch, (tuple, list)):
        return (batch,), {}
    parameters = [p for p in inspect.signature(model.forward).parameters.values() if p.kind in (p.POSITIONAL_ONLY, p.POSITIONAL_OR_KEYWORD)]
    variadic = any(p.kind is p.VAR_POSITIONAL for p in inspect.signature(model.forward).parameters.values())
    return tuple(batch) if variadic else tuple(batch)[: len(parameters)], {}


def _record(site: _Site, x: Tensor, y: Tensor, mask: Tensor | None) -> None:
    axes = [axis % x.dim() for axis in site.layer.channel_axis]
    rows_x, rows_y = (t.movedim(axes, list(range(-len(axes), 0))).reshape(-1, site.moments.mean.numel()) for t in (x, y))
    sequence = x.dim() == 3 and axes == [2]
    masked = mask is not None and sequence and mask.shape == x.shape[:2]
    if masked:
        assert mask is not None
        keep = mask.reshape(-1).to(rows_x.device)
        rows_x, rows_y = rows_x[keep], rows_y[keep]
    if sequence:
        first = x[:, 0].double()
        site.first[0] += first.square().sum().item()
        site.first[1] += first.numel()
        site.total[0] += rows_x.double().square().sum().item()
        site.total[1] += rows_x.numel()
    site.moments.add(rows_x, rows_y)
    sample(rows_x, site.sampled)


def _after(site: _Site) -> nn.Module | None:
    """The first child (dropout or activation) that the source applies to its normalized x and the new layer keeps; None without one."""
    parts = [site.source._modules.get(name) for name in ("drop", "act", "activation")] if isinstance(site.layer, BatchlessNormAct) else []
    return next((part for part in parts if part is not None), None)


@torch.no_grad()
def _store(site: _Site) -> None:
    """Store the statistics of the data in the layer, then the weight and bias that, with the stored statistics, give the fitted affine."""
    layer = site.layer
    mean, std = _pooled(site.moments, layer)
    before = [t.clone() for t in (layer.mean, layer.std_parameter, layer.weight, layer.bias) if t is not None]
    flat = _is_flat(mean, std)
    scale, shift = (t.to(layer.mean.device) for t in site.moments.line()) if site.how == "fit" else _map(layer)
    layer.set_statistics(mean, torch.where(std > 0, std, 1.0))  # a constant channel has scale 0, so any std will do
    if site.how != "adapt":
        assert layer.weight is not None
        assert layer.bias is not None
        stored = [t.expand(layer.sizes) for t in layer.statistics(torch.float64)]
        weight, bias = formulas.affine_under(scale.reshape(layer.sizes), shift.reshape(layer.sizes), *stored)
        layer.weight.copy_(weight)
        layer.bias.copy_(bias)
    if site.how != "fit":
        after = [t for t in (layer.mean, layer.std_parameter, layer.weight, layer.bias) if t is not None]
        for old, new in zip(before, after, strict=True):
            new.copy_(torch.where(flat, old, new))
        site.kept = int(flat.expand(layer.sizes).sum())
    site.done = True


def _pooled(moments: Moments, layer: BatchlessNorm) -> tuple[Tensor, Tensor]:
    """(mean, std) of x in the shape and on the device of the layer's mean; pooled over channels that share statistics."""
    mean, square = (t.reshape(layer.sizes) for t in (moments.mean, moments.std**2 + moments.mean**2))
    shared = [axis for axis, (size, own) in enumerate(zip(layer.sizes, layer.mean.shape, strict=True)) if own != size]
    if not shared:
        return mean.to(layer.mean.device), moments.std.reshape(layer.sizes).to(layer.mean.device)
    pooled = mean.mean(shared, keepdim=True)
    std = (square.mean(shared, keepdim=True) - pooled**2).clamp(min=0).sqrt()
    return pooled.to(layer.mean.device), std.to(layer.mean.device)


def _map(layer: BatchlessNorm) -> tuple[Tensor, Tensor]:
    """(scale, shift) of the layer in float64, in the shape of its channels."""
    mean, std = layer.statistics(torch.float64)
    weight, bias = (None if t is None else t.double() for t in (layer.weight, layer.bias))
    scale, shift = formulas.affine_of(mean, std, weight, bias)
    return scale.expand(layer.sizes), shift.expand(layer.sizes)


def _is_flat(mean: Tensor, std: Tensor) -> Tensor:
    return std <= FLAT * torch.maximum(std.max(), mean.abs())


@torch.no_grad()
def _fit(site: _Site) -> Fit:
    moments = site.moments
    flat = _is_flat(moments.mean, moments.std)
    kurtosis = moments.kurtosis[~flat]
    rest = site.total[1] - site.first[1]
    elsewhere = ((site.total[0] - site.first[0]) / rest) ** 0.5 if rest > 0 else 0.0
    scale, shift = (t.reshape(-1).cpu() for t in _map(site.layer))
    mean, std = (t.expand(site.layer.sizes).reshape(-1).cpu() for t in site.layer.statistics())
    fit = Fit(
        name=site.name,
        stratum=site.stratum,
        error=moments.error(scale, shift),
        samples=moments.count,
        flat_channels=int(flat.sum()),
        max_kurtosis=kurtosis.max().item() if kurtosis.numel() else float("nan"),
        first_position=(site.first[0] / site.first[1]) ** 0.5 / elsewhere if elsewhere > 0 else None,
        how=site.how,
        channels=len(flat),
        kept_channels=site.kept,
        histogram=histogram(site.sampled, mean, std, flat),
    )
    return replace(fit, remarks=tuple(_remarks(fit)))


def _remarks(fit: Fit) -> Iterator[str]:
    if fit.error > POOR:
        yield f"its output is {fit.error:.0%} away from the original layer's"
    if fit.flat_channels:
        kept = ", and keep the statistics they had" if fit.kept_channels else ""
        yield f"{fit.flat_channels} of {fit.channels} channels do not vary{kept}"
    if fit.max_kurtosis > OUTLIERS:
        yield f"a few outliers make up the variance of a channel (kurtosis {fit.max_kurtosis:.0f}; 3 is normal)"
    if fit.first_position is not None and fit.first_position > FIRST:
        yield f"position 0 of the sequence is an outlier, {fit.first_position:.0f} times as large as the others"
    if fit.samples < FEW:
        yield f"its statistics rest on {fit.samples} values per channel"
