"""data -> statistics, stratum by stratum: for layers whose source took its statistics from each sample, so that no file holds them.

A stratum is a set of layers none of which feeds another of them. They are calibrated in the order of execution, each on what the already
swapped layers before it produce; until its turn comes a layer computes what its source would. Per channel,

    mean, std        those of the layer's input x over all calibration data
    weight, bias     the least-squares fit of weight * (x - mean) / std + bias to what the source put out in the original model

so that each layer also takes back, as far as a map per channel can, the error that those before it have made (`moments.py`).

One pass over the data per stratum through both models, each forward stopped when the stratum has been seen; one more forward, of the
first batch, finds the strata. A batch is a tensor, a tuple of arguments, or a dict of keyword arguments; positions where its
"attention_mask" is 0 do not count.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterable, Mapping, Sequence, Sized
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode
from torch.utils._pytree import tree_leaves

from normswap.batchless import BatchlessNorm
from normswap.errors import UsageError
from normswap.moments import Moments

MASK = "attention_mask"
FLAT = 1e-6  # a channel whose std is below this share of the largest one carries nothing


@dataclass(frozen=True)
class Fit:
    """How well one layer could be calibrated.

    error           relative l2 distance of the layer's output to its source's, on the calibration data
    samples         how many values each channel's statistics rest on
    flat_channels   channels whose std is (almost) 0     max_kurtosis   the largest of the channels' kurtoses; 3 is normal
    first_position  rms of x at position 0 of a sequence over the rms elsewhere, None without one: large where it is an outlier
    """

    name: str
    stratum: int
    error: float
    samples: int
    flat_channels: int
    max_kurtosis: float
    first_position: float | None


@dataclass
class _Site:
    name: str
    layer: BatchlessNorm
    source: nn.Module
    moments: Moments
    calls: int = 0  # in one forward
    stratum: int = 0
    done: bool = False
    first: list[float] = field(default_factory=lambda: [0.0, 0.0])  # sum of squares and count at position 0
    total: list[float] = field(default_factory=lambda: [0.0, 0.0])


class _Enough(Exception):
    """Stops a forward once the stratum has seen all that it will see."""


def calibrate(
    model: nn.Module,
    original: nn.Module,
    names: Sequence[str],
    batches: Iterable[Any],
    *,
    alone: bool = False,
    progress: Callable[[int, int], None] = lambda done, total: None,
) -> tuple[Fit, ...]:
    """Set the statistics, weights and biases of the named BatchlessNorm layers of `model` from data; changes `model` and nothing else.

    original: the model that `model` was made from, in eval mode; a copy that nobody else uses. alone: calibrate each layer as if it were
    the only one that is swapped, on what the original's layers produce; one pass does for all of them, and the fits say stratum 1.
    progress(done, total) is told after each forward, in strata times batches. Raises UsageError if there is no batch or the model does not
    take them.
    """
    batches = batches if isinstance(batches, Sequence) or iter(batches) is not batches else list(batches)
    modules, sources = dict(model.named_modules()), dict(original.named_modules())
    sites = []
    for name in names:
        layer = modules[name]
        assert isinstance(layer, BatchlessNorm)
        sites.append(
            _Site(name, layer, sources[name], Moments.empty(layer.weight.numel() if layer.weight is not None else layer.mean.numel()))
        )
    with _Calibration(model, original, sites, alone) as calibration:
        return calibration.run(batches, progress)


class _Calibration:
    """Hooks on the layers while they are calibrated: they record, and stand in for layers whose turn has not come."""

    def __init__(self, model: nn.Module, original: nn.Module, sites: list[_Site], alone: bool) -> None:
        self.model, self.original, self.sites, self.alone = model, original, sites, alone
        self.targets: dict[str, list[Tensor]] = {}  # what each source of the stratum put out, call by call
        self.labels: _Labels | None = None
        self.stratum = 0
        self.pending = 0
        self.standing_in = False
        self.mask: Tensor | None = None
        self.handles: list[Any] = []
        self.training = {module: module.training for module in model.modules()}

    def __enter__(self) -> _Calibration:
        self.model.eval()
        self.handles = [site.layer.register_forward_hook(self._hook(site), prepend=True) for site in self.sites]
        self.handles += [site.source.register_forward_hook(self._target(site)) for site in self.sites]
        return self

    def __exit__(self, *error: object) -> None:
        for handle in self.handles:
            handle.remove()
        for module, flag in self.training.items():
            module.training = flag

    def run(self, batches: Iterable[Any], progress: Callable[[int, int], None]) -> tuple[Fit, ...]:
        self._find_strata(batches)
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
        return tuple(_fit(site) for site in sorted(self.sites, key=lambda s: s.stratum))

    def _find_strata(self, batches: Iterable[Any]) -> None:
        first = next(iter(batches), None)
        if first is None:
            raise UsageError("the calibration data hold no batch", hint="give at least one; some hundred samples are better")
        with _Labels() as self.labels:
            self._forward(first)
        self.labels = None
        unseen = [site.name for site in self.sites if not site.calls]
        if unseen:
            raise UsageError(
                f"{', '.join(unseen)} see no data: no forward pass on the calibration data reaches them",
                hint="exclude them from the conversion",
            )

    def _forward(self, batch: Any) -> None:
        args, kwargs = arguments_of(batch, self.model)
        mask = kwargs.get(MASK)
        self.mask = mask.bool() if isinstance(mask, Tensor) else None
        self.targets = {}
        try:
            for model in (self.original, self.model) if self.labels is None else (self.model,):
                self.pending = sum(site.calls for site in self.sites if site.stratum == self.stratum)
                with torch.no_grad(), contextlib.suppress(_Enough), torch.random.fork_rng(devices=[]):
                    model(*args, **kwargs)
        except Exception as error:  # the user's model may raise anything
            raise UsageError(
                f"the model does not take the calibration data: {type(error).__name__}: {(str(error).splitlines() or [''])[0]}",
                hint="a batch is a tensor, a tuple of arguments, or a dict of keyword arguments",
            ) from error

    def _target(self, site: _Site) -> Callable[..., None]:
        """On the source, in the original model: keeps what it puts out, but not when it stands in for the layer."""

        def hook(module: nn.Module, args: tuple[Any, ...], output: Tensor) -> None:
            if self.labels is None and site.stratum == self.stratum and not self.standing_in:
                # a copy, as whoever reads the output may work in place
                self.targets.setdefault(site.name, []).append(output.clone())
                self._seen()

        return hook

    def _hook(self, site: _Site) -> Callable[..., Tensor | None]:
        """On the layer: records its input, and answers what its source would until it is calibrated."""

        def hook(module: nn.Module, args: tuple[Any, ...], output: Tensor) -> Tensor | None:
            x = args[0]
            if site.done:
                return None
            self.standing_in = True
            y: Tensor = site.source(x)
            self.standing_in = False
            if self.labels is not None:
                site.calls += 1
                site.stratum = max(site.stratum, self.labels.of(x) + 1)
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


class _Labels(TorchFunctionMode):
    """Labels each tensor with the number of the last stratum that it depends on. Tensors are kept alive, so that no id is used twice."""

    def __init__(self) -> None:
        super().__init__()
        self.labels: dict[int, tuple[Tensor, int]] = {}

    def of(self, value: Any) -> int:
        return max((self.labels[id(t)][1] for t in tree_leaves(value) if id(t) in self.labels), default=0)

    def mark(self, value: Any, label: int) -> None:
        for tensor in tree_leaves(value):
            if isinstance(tensor, Tensor):
                self.labels[id(tensor)] = (tensor, label)

    def __torch_function__(self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Mapping[str, Any] | None = None) -> Any:
        kwargs = kwargs or {}
        result = func(*args, **kwargs)
        label = self.of((args, kwargs))
        if label:
            self.mark(result, label)
            if args and getattr(func, "__name__", "") in ("__setitem__",):
                self.mark(args[0], label)
        return result


def arguments_of(batch: Any, model: nn.Module) -> tuple[tuple[Any, ...], Mapping[str, Any]]:
    """How a batch is passed to the model. Of a pair that a data set yields, (input, label), only what the model takes is passed."""
    if isinstance(batch, Mapping):
        return (), batch
    if not isinstance(batch, (tuple, list)):
        return (batch,), {}
    import inspect

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


@torch.no_grad()
def _store(site: _Site) -> None:
    moments, layer = site.moments, site.layer
    weight, bias, _ = moments.fit()
    shape, device = layer.mean.shape, layer.mean.device
    std = torch.where(moments.std > 0, moments.std, 1.0)  # a constant channel has weight 0, so any std will do
    layer.set_statistics(moments.mean.reshape(shape).to(device), std.reshape(shape).to(device))
    assert layer.weight is not None
    assert layer.bias is not None
    layer.weight.copy_(weight.reshape(layer.weight.shape))
    layer.bias.copy_(bias.reshape(layer.bias.shape))
    site.done = True


def _fit(site: _Site) -> Fit:
    moments = site.moments
    std = moments.std
    flat = std <= FLAT * std.max()
    kurtosis = moments.kurtosis[~flat]
    rest = site.total[1] - site.first[1]
    elsewhere = ((site.total[0] - site.first[0]) / rest) ** 0.5 if rest > 0 else 0.0
    return Fit(
        name=site.name,
        stratum=site.stratum,
        error=moments.fit()[2],
        samples=moments.count,
        flat_channels=int(flat.sum()),
        max_kurtosis=kurtosis.max().item() if kurtosis.numel() else float("nan"),
        first_position=(site.first[0] / site.first[1]) ** 0.5 / elsewhere if elsewhere > 0 else None,
    )
