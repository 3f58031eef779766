r"""Calibrates approximate layers and repairs the linear layers around them, in closed form: no labels, no gradients, one pass.

The layers are taken in the order of execution. Original and converted model run on every batch and stop at each layer (`lockstep`). There,
x is the layer's input in the converted model, x' and y' are the input and output of its source in the original. Three things are set:

    producer    the linear W whose output is x, or a part of the sum that x is:  x = r + W h + b
                    only the layer reads x:  y' ~ s x + s D h + t, W <- W + D           (a norm behind the sum, as in BERT)
                    x is read elsewhere:     x' ~ x + D h + t,  W <- W + D,  b <- b + t   (a stream of residuals, as in ViT)
    the layer   mean and std of x;  y' ~ weight (x - mean) / std + bias                 (`fit`)
    readers     the linears W_j that read the layer's output y, if nothing else does:
                    y' ~ y + A y + t,  W_j <- W_j (I + A),  b_j <- b_j + W_j t

each by least squares with a ridge on D and A, so that weights stay where the data say nothing (`least_squares`). The first and the third
are done only where they bring a held-out fifth of the samples closer to the original.

Source: target-space training, Rohwer, NeurIPS 1989, in closed form; docs/approximate.md has what it was worth on real models.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterable, Sequence
from typing import Any, NamedTuple, cast

import torch
from torch import Tensor, nn

from normswap.models.batches import arguments_of, mask_of, told
from normswap.models.copying import uncompiled
from normswap.models.torch_private import is_functorch_wrapped, tree_map_only
from normswap.models.watching import input_of
from normswap.swap.fit import Fitting, part_after, record, store
from normswap.swap.least_squares import HELD_OUT, Joint, Map, Sums, best, best_jointly
from normswap.swap.lockstep import Pass, Passes
from normswap.swap.wiring import Around, Wiring, weight_of


class OutOfOrder(Exception):
    """Why the layers cannot be taken one after the other: this needs each to be called once, in one order on all batches."""


class Arrival(NamedTuple):
    """What one batch brings to a layer.

    x, h                 the layer's input and that of its producer, in the converted model
    source_x, source_y   input and output of the layer's source in the original
    mask, held_out       of samples or positions: which count; which of them decide what is accepted
    """

    x: Tensor
    h: Tensor | None
    source_x: Tensor
    source_y: Tensor
    mask: Tensor | None
    held_out: Tensor

    def at(self, part: Any) -> Arrival:
        """What belongs to the part of the layer's output that is read: see `Around.part`."""
        if part is None:
            return self
        x, source_x, source_y = (t[part] for t in (self.x, self.source_x, self.source_y))
        return self._replace(x=x, h=None if self.h is None else self.h[part], source_x=source_x, source_y=source_y, mask=None)

    def rows(self, t: Tensor) -> tuple[Tensor, Tensor]:
        """(rows of t that are to be fitted, those held out), each (rows, channels)."""
        held_out = self.held_out.to(t.device).view(-1, *(1,) * (t.dim() - 2)).expand(t.shape[:-1])
        counts = torch.ones_like(held_out) if self.mask is None or self.mask.shape != t.shape[:-1] else self.mask.to(t.device)
        return t[counts & ~held_out], t[counts & held_out]


def repair(
    model: nn.Module,
    original: nn.Module,
    sites: Sequence[Fitting],
    batches: Iterable[Any],
    progress: Callable[[int, int], None],
) -> None:
    """Calibrate the layers of `sites`, and repair the linears around them; changes nothing but `model`, which is in eval mode.

    original: as for `calibrate`. progress(done, total) is called after each batch of each layer. Raises OutOfOrder, with the model as it
    was, if this cannot be done here; UsageError if the model does not take a batch.
    """
    around, order = _around(original, sites, *arguments_of(next(iter(batches)), model))
    before = {name: t.clone() for name, t in model.state_dict().items()}
    stops, modules = _Stops(model, original, sites, around), dict(model.named_modules())
    with uncompiled(), torch.random.fork_rng(), torch.no_grad(), stops, stops.passes:
        try:
            stops.begin(batches)
            for number, site in enumerate(sorted(sites, key=lambda site: order.index(site.name))):
                arrivals = stops.arrivals(site, functools.partial(_tick, progress, number, len(sites)))
                _calibrate(site, around[site.name], arrivals, modules)
            stops.finish()
        except OutOfOrder:
            model.load_state_dict(before)
            raise


def _tick(progress: Callable[[int, int], None], layer: int, layers: int, done: int, batches: int) -> None:
    progress(layer * batches + done, layers * batches)


def _around(original: nn.Module, sites: Sequence[Fitting], args: tuple[Any, ...], kwargs: Any) -> tuple[dict[str, Around], list[str]]:
    if any(part_after(site) is not None for site in sites):
        raise OutOfOrder("a layer applies an activation of its own")
    wiring = Wiring(original, {site.name: site.source for site in sites})
    around = wiring.run(original, args, kwargs)
    if not any(each.producer or each.readers for each in around.values()):
        raise OutOfOrder("no linear is around any layer")
    if sorted(wiring.order) != sorted(site.name for site in sites):
        raise OutOfOrder("a layer is called more than once in a forward pass")
    return around, wiring.order


class _Stops:
    """The hooks that stop the passes of both models at each layer."""

    def __init__(self, model: nn.Module, original: nn.Module, sites: Sequence[Fitting], around: dict[str, Around]) -> None:
        self.model, self.original, self.sites, self.around = model, original, sites, around
        self.passes = Passes()
        self.running: list[tuple[Pass, Pass, Tensor | None]] = []  # of the original, of the converted model; the mask of the batch
        self.read: dict[tuple[Pass | None, str], Tensor] = {}  # what the producers read
        self.handles: list[Any] = []

    def __enter__(self) -> _Stops:
        modules = dict(self.model.named_modules())
        for site in self.sites:
            self.handles.append(site.layer.register_forward_pre_hook(functools.partial(self._arrives, site.name), with_kwargs=True))
            self.handles.append(site.source.register_forward_hook(functools.partial(self._has_passed, site.name), with_kwargs=True))
            producer = self.around[site.name].producer
            if producer is not None:
                self.handles.append(
                    modules[producer].register_forward_pre_hook(functools.partial(self._reads, site.name), with_kwargs=True)
                )
        return self

    def __exit__(self, *error: object) -> None:
        for handle in self.handles:
            handle.remove()

    def begin(self, batches: Iterable[Any]) -> None:
        """Make the passes of all batches."""
        for batch in batches:
            args, kwargs = arguments_of(batch, self.model)
            passes = []
            for model in (self.original, self.model):
                mine, named = tree_map_only(Tensor, torch.clone, (args, dict(kwargs)))  # a model may write into its inputs
                passes.append(self.passes.add(functools.partial(model, *mine, **named)))
            self.running.append((*passes, mask_of(kwargs)))  # type: ignore[arg-type]

    def arrivals(self, site: Fitting, tick: Callable[[int, int], None]) -> list[Arrival]:
        """Run all passes on to this layer. tick(done, total) is called after each batch."""
        found, seen = [], 0
        for original, converted, mask in self.running:
            source_x, source_y = self._next(original, site)
            (x,) = self._next(converted, site)
            numbers = torch.arange(seen, seen + len(x))
            seen += len(x)
            h = self.read.pop((converted, site.name), None)
            found.append(Arrival(x, h, source_x, source_y, mask, numbers % HELD_OUT == HELD_OUT - 1))
            tick(len(found), len(self.running))
        return found

    def finish(self) -> None:
        """Run all passes to their ends: no layer may be called once more."""
        for original, converted, _ in self.running:
            with told():
                after = original.resume(), converted.resume()
            if after != (None, None):
                raise OutOfOrder("a layer is called more than once in a forward pass")

    def _next(self, one: Pass, site: Fitting) -> tuple[Tensor, ...]:
        with told():
            name, *found = one.resume() or (None,)
        if name != site.name:
            raise OutOfOrder("the layers are not called in one order on all batches")
        return tuple(found)

    def _arrives(self, name: str, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        x = _input(args, kwargs)
        if self.passes.current is not None:
            self.passes.current.stop((name, x))

    def _has_passed(self, name: str, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], output: Tensor) -> None:
        if self.passes.current is not None:
            self.passes.current.stop((name, _input(args, kwargs), output))

    def _reads(self, name: str, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        self.read[self.passes.current, name] = input_of(args, kwargs)


def _input(args: tuple[Any, ...], kwargs: dict[str, Any]) -> Tensor:
    x = input_of(args, kwargs)
    if is_functorch_wrapped(x) or x.is_nested or not x.dim():
        raise OutOfOrder("a layer gets a tensor that cannot be read")
    return x


# --- one layer ----------------------------------------------------------------------------------------------------------------------------


def _calibrate(site: Fitting, around: Around, arrivals: list[Arrival], modules: dict[str, nn.Module]) -> None:
    """Repair the producer, calibrate the layer, repair the readers."""
    # Only where each sample or position is a row of channels, as it is for a linear, and where some can be held out.
    rows = all(a.x.dim() > 1 and [axis % a.x.dim() for axis in site.layer.channel_axis] == [a.x.dim() - 1] for a in arrivals)
    rows = rows and any(bool(a.held_out.any()) for a in arrivals)
    read = [a.at(around.part) for a in arrivals]  # views: what is repaired in x is seen there
    if rows and around.producer is not None and all(a.h is not None and a.h.shape[:-1] == a.x.shape[:-1] for a in arrivals):
        producer: Any = modules[around.producer]
        found = _of_layer(read) if around.alone else _of_stream(arrivals, centred=producer.bias is not None)
        if found is not None:
            _add(producer, found)
            for a in arrivals:  # what the producer put out already, and nobody has read yet
                dtype = torch.promote_types(a.x.dtype, torch.float32)
                a.x.add_(cast(Tensor, a.h).to(dtype) @ found.matrix.to(dtype) + found.offset.to(dtype))
            site.repaired += (around.producer,)
    for a in read:
        record(site, a.x, a.source_y, a.mask)
    store(site)
    readers: list[Any] = [modules[name] for name in around.readers]
    if rows and readers:
        found = _of_output(site, read, centred=all(reader.bias is not None for reader in readers))
        if found is not None:
            for reader in readers:
                weight = weight_of(reader).double()
                _add(reader, Map(found.matrix @ weight.T, weight @ found.offset))
            site.repaired += around.readers


def _add(linear: Any, change: Map) -> None:
    weight_of(linear).add_(change.matrix.T)
    if linear.bias is not None:
        linear.bias.add_(change.offset)


def _of_layer(arrivals: list[Arrival]) -> Map | None:
    """What is to be added to the producer of an input that only the layer reads. Its offset is 0, as the layer has a bias."""
    fit, held_out = _summed(Joint.at, ((a, cast(Tensor, a.h), a.x, a.source_y) for a in arrivals))
    found = best_jointly(fit, held_out) if _are_enough(fit.both, held_out.both) else None
    return None if found is None else Map(found[0].matrix / found[1], torch.zeros_like(found[1]))


def _of_stream(arrivals: list[Arrival], *, centred: bool) -> Map | None:
    """What is to be added to the producer of an input that is read elsewhere, too."""
    return _regression(((a, a.h, a.source_x - a.x) for a in arrivals), centred=centred)  # type: ignore[misc]


def _of_output(site: Fitting, arrivals: list[Arrival], *, centred: bool) -> Map | None:
    """What is to be added to the layer's output, in the linears that read it."""
    return _regression(((a, y, a.source_y - y) for a, y in ((a, site.layer(a.x)) for a in arrivals)), centred=centred)


def _regression(pairs: Iterable[tuple[Arrival, Tensor, Tensor]], *, centred: bool) -> Map | None:
    fit, held_out = _summed(functools.partial(Sums.at, centred=centred), pairs)
    return best(fit, held_out, Map.none(fit).left(held_out)) if _are_enough(fit, held_out) else None


def _summed(at: Callable[..., Any], found: Iterable[tuple[Any, ...]]) -> tuple[Any, Any]:
    """(the sums over the rows to be fitted, over those held out) of (arrival, tensors). at: makes sums, from the first rows."""
    parts: list[Any] = []
    for a, *tensors in found:
        for n, rows in enumerate(zip(*map(a.rows, tensors), strict=True)):
            if not parts:
                first = at(*rows)
                parts = [first, first.empty()]
            parts[n].add(*rows)
    fit, held_out = parts
    return fit, held_out


def _are_enough(fit: Sums, held_out: Sums) -> bool:
    """Whether there are more rows than a linear has inputs, and some to decide."""
    return fit.count > fit.uu.shape[0] and held_out.count > 0
