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
import math
from collections.abc import Callable, Iterable, Mapping, Sequence, Sized
from typing import Any, Literal

from torch import Tensor, nn

from normswap.errors import UsageError
from normswap.layer.batchless_norm import BatchlessNorm
from normswap.models.batches import Unreadable, arguments_of, mask_of, no_batch, told
from normswap.models.copying import set_eval, shared_parameters
from normswap.models.torch_private import is_functorch_wrapped
from normswap.models.watching import buffers_kept, forward, input_of
from normswap.swap.fit import Fit, Fitting, fit_of, part_after, record, store
from normswap.swap.moments import Moments
from normswap.swap.repair import OutOfOrder, repair
from normswap.swap.strata import StratumLabels

Reestimate = Literal["exact", "adapt"]
REESTIMATE: tuple[Reestimate, ...] = ("exact", "adapt")
Repair = Literal["auto", "none"]
REPAIRS: tuple[Repair, ...] = ("auto", "none")


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
    repairs: bool = False,
    progress: Callable[[int, int], None] = lambda done, total: None,
) -> tuple[Fit, ...]:
    """Set the statistics, weights and biases of the named BatchlessNorm layers of `model` from data; changes nothing but `model`.

    original: the model that `model` was made from, in eval mode; a copy that nobody else uses. reestimate: layers that have statistics
    already -> how they are re-estimated; a layer that cannot be keeps its statistics, and its Fit says why. alone: calibrate each layer as
    if it were the only one swapped, on the outputs of the original's layers; one pass calibrates all, and every Fit has stratum 1. repairs:
    change the linear layers around them, too, where that brings the model closer to the original: see `repair`. progress(done, total) is
    called after each batch of each stratum. Raises UsageError if there is no batch, the model cannot run on one, or a layer cannot be
    fitted.
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
        sites.append(Fitting(name, layer, sources[name], Moments.empty(math.prod(layer.sizes)), how))  # type: ignore[arg-type]
    with buffers_kept(model, BatchlessNorm), _Calibration(model, original, sites, alone) as calibration:
        unseen = calibration.find_strata(batches) if sites else []
        if alone or not repairs or not calibration.repair(batches, progress):
            calibration.run(batches, progress)
        return (*(fit_of(site) for site in sorted(calibration.sites, key=lambda s: s.stratum)), *unseen, *kept)


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


class _Calibration:
    """The hooks on layers and their sources while data pass through both models.

    They record the input of each layer, and the output of its source in the original model. A layer whose stratum is not calibrated yet
    returns the output of its source instead of its own.
    """

    def __init__(self, model: nn.Module, original: nn.Module, sites: list[Fitting], alone: bool) -> None:
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
        self._add_hooks()
        return self

    def _add_hooks(self) -> None:
        self.handles = [site.layer.register_forward_hook(self._hook(site), prepend=True, with_kwargs=True) for site in self.sites]
        self.handles += [site.layer.register_forward_pre_hook(self._refuse_unreadable(site), with_kwargs=True) for site in self.sites]
        for site in self.sites:
            self.handles += [
                site.source.register_forward_pre_hook(self._enter(site)),
                site.source.register_forward_hook(self._target(site)),
            ]
            after = part_after(site)
            if after is not None:
                self.handles.append(after.register_forward_pre_hook(self._before_act(site), prepend=True))

    def __exit__(self, *error: object) -> None:
        self._remove_hooks()
        for module, flag in self.training.items():
            module.training = flag

    def _remove_hooks(self) -> None:
        for handle in self.handles:
            handle.remove()

    def run(self, batches: Iterable[Any], progress: Callable[[int, int], None]) -> None:
        """Calibrate stratum by stratum."""
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
                    store(site)

    def repair(self, batches: Iterable[Any], progress: Callable[[int, int], None]) -> bool:
        """Calibrate layer by layer, and repair the linears around each; False, with nothing changed, if that cannot be done here."""
        if not self.sites or any(site.how != "fit" or site.calls != 1 for site in self.sites):
            return False
        self._remove_hooks()
        try:
            repair(self.model, self.original, self.sites, batches, progress)
        except OutOfOrder:
            self._add_hooks()
            return False
        return True

    def find_strata(self, batches: Iterable[Any]) -> list[Fit]:
        """Set the stratum of each site, and return a Fit with a remark for each re-estimated layer that the data do not reach."""
        first = next(iter(batches), None)
        if first is None:
            raise no_batch()
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
        self.mask = mask_of(kwargs)
        self.targets = {}
        with told():
            for model in (self.original, self.model) if self.labels is None else (self.model,):
                self.pending = sum(site.calls for site in self.sites if site.stratum == self.stratum)
                with contextlib.suppress(_Enough):
                    forward(model, args, kwargs)

    def _enter(self, site: Fitting) -> Callable[..., None]:
        def hook(module: nn.Module, args: tuple[Any, ...]) -> None:
            site.inside, site.before_act = not self.source_stands_in, None

        return hook

    def _before_act(self, site: Fitting) -> Callable[..., None]:
        """Hook on the source's own activation, which the new layer keeps: the activation's input is the target of the fit."""

        def hook(module: nn.Module, args: tuple[Any, ...]) -> None:
            if site.inside and site.before_act is None:
                site.before_act = args[0].clone()  # it may work in place

        return hook

    def _target(self, site: Fitting) -> Callable[..., None]:
        """Hook on the source: records its output when the original model runs it, but not when it runs in the place of the layer."""

        def hook(module: nn.Module, args: tuple[Any, ...], output: Tensor) -> None:
            if self.labels is None and site.stratum == self.stratum and not self.source_stands_in:
                # a copy, as a reader may overwrite the output in place
                self.targets.setdefault(site.name, []).append(output.clone() if site.before_act is None else site.before_act)
                self._seen()
            site.inside = False

        return hook

    def _refuse_unreadable(self, site: Fitting) -> Callable[..., None]:
        def hook(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
            for x in (*args, *kwargs.values()):
                if isinstance(x, Tensor) and is_functorch_wrapped(x):
                    raise Unreadable(f"{site.name} is called inside torch.vmap or the like, so it cannot be calibrated")
                if isinstance(x, Tensor) and x.is_nested:
                    raise Unreadable(f"{site.name} is called on a nested tensor, so it cannot be calibrated")

        return hook

    def _hook(self, site: Fitting) -> Callable[..., Tensor | None]:
        """Hook on the layer: records its input, and returns the output of its source until the layer is calibrated."""

        def hook(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], output: Tensor) -> Tensor | None:
            x = input_of(args, kwargs)
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
                record(site, x, self.targets[site.name].pop(0), self.mask)
                self._seen()
            return y

        return hook

    def _seen(self) -> None:
        self.pending -= 1
        if self.pending == 0:
            raise _Enough
