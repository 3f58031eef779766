"""Mean and std of coupled layers follow the weights of their producers, wherever these have moved.

    c = (mean - <W, a> - b) / |W|        s = std / |W|        are the state while a layer trains, see `coupling`; mean and std are stored

An `Anchor` is what the producer was like when mean and std were last right. `follow` moves them from there to the weights of now, and
`take` makes a new anchor. The way does not matter, only where it ends. So it makes no difference who moves a weight, how often, or in
which of several optimizer steps, one inside the other, the moves come:

    before an optimizer step, and whenever its closure is called     follow, the statistics step, take
    after it                                                         follow, all layers together
    before a pass in train mode, a copy, a state dict, eval mode     follow, if a weight has moved since

If somebody else has written to mean or std, as one who loads a state does, they hold for the weights of now: the anchor is dropped. So it
is in eval mode, where nothing follows, and where the producer or its weight is another one. Who has written to a tensor is known from its
version and its memory; that a step has written to it is known anyway, as `p.data.add_` raises no version.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any, NamedTuple, cast

import torch
from torch import Tensor, nn

from normswap.layer import coupling, foreach, formulas
from normswap.layer.coupling import Snapshot
from normswap.layer.fsdp import is_part
from normswap.layer.producer import filters, groups_of, response, spread
from normswap.layer.run import Layer, place_of

Mark = tuple[int, int, int]  # which tensor it is, its version, and where its memory is


class Anchor(NamedTuple):
    """What a producer was like when the mean and std of its layer were last right.

    output_mean, weight_norm   <W, a> + b and |W|, one number per filter each
    spread                     a in the shape of a row of W, see `producer.spread`
    producer, input_mean       the marks of W and b, and of a          own: of mean and the std's parameter
    """

    spread: Tensor
    output_mean: Tensor
    weight_norm: Tensor
    producer: tuple[Mark, ...]
    input_mean: tuple[Mark, ...]
    own: tuple[Mark, ...]

    @property
    def snapshot(self) -> Snapshot:
        return Snapshot(self.output_mean, self.weight_norm)


def kind_of(t: Tensor) -> tuple[Any, ...]:
    """Tensors of one kind can be stacked."""
    return t.device, t.dtype, id(t) if is_part(t) else None


def copy(parameters: Sequence[Tensor], values: Sequence[Tensor]) -> None:
    if len(parameters) == 1:  # it may be a DTensor, for which _foreach_copy_ is not implemented
        parameters[0].copy_(values[0])
    else:
        torch._foreach_copy_(list(parameters), list(values))


def take(layers: Iterable[Layer]) -> None:
    """Make an anchor of each layer's producer: mean and std are right for the weights of now."""
    for layer in layers:
        layer.run.anchor = _anchor(layer)


def anchor_of(layer: Layer) -> Anchor:
    """The anchor, for a pass in train mode: mean and std have followed, and it is that of the weight and input mean of now."""
    found = _marks(layer)
    known: Anchor | None = layer.run.anchor
    if known is not None and (known.producer, known.input_mean, known.own) == found:
        return known
    follow([layer], within_pass=True)
    found, known = _marks(layer), layer.run.anchor
    if known is not None and (known.producer, known.input_mean) == found[:2]:
        return known
    anchor = _anchor(layer)
    if known is None or _same(known.producer, found[0]):
        layer.run.anchor = anchor
    return anchor


@torch.no_grad()
def follow(layers: Iterable[Layer], *, stepped: bool = False, within_pass: bool = False) -> None:
    """Move the mean and std of each layer from its anchor along with the weight of its producer, and renew the anchor.

    stepped: an optimizer has stepped since the anchor was made, with the weights and perhaps with mean and std.
    within_pass: the parameters may be others for the time of a pass, by FSDP or torch.func; then nothing follows.
    """
    late: list[Layer] = []
    for layer in layers:
        anchor = layer.run.anchor
        if anchor is None:
            continue
        if layer.producer_in_training is None:
            layer.run.anchor = None
            continue
        producer, input_mean, own = _marks(layer)
        if stepped:
            late.append(layer)
        elif not (_same(producer, anchor.producer) and _same(own, anchor.own)):
            layer.run.anchor = anchor if within_pass else None
        elif producer != anchor.producer and own == anchor.own and input_mean == anchor.input_mean:
            late.append(layer)
        elif own != anchor.own or producer != anchor.producer:
            layer.run.anchor = None
    for alike in foreach.group_by(late, lambda layer: (layer.std, layer._eps, kind_of(layer.mean))):
        _move(alike)


def _move(layers: list[Layer]) -> None:
    first, means, parameters = layers[0], [layer.mean for layer in layers], [layer.std_parameter for layer in layers]
    anchors = [_anchor(layer, moved=True) for layer in layers]
    before, after = (_stacked(each) for each in ([cast(Anchor, layer.run.anchor) for layer in layers], anchors))
    parameter = foreach.stack(parameters)
    std = formulas.std_of(parameter, first.std)
    moved = coupling.moved(foreach.stack(means), parameter, std, before, after, first.std, eps=first._eps)
    copy(means, foreach.unstack(moved[0], means))
    copy(parameters, foreach.unstack(moved[1], parameters))
    for layer, anchor in zip(layers, anchors, strict=True):
        layer.run.anchor = anchor._replace(own=_marks(layer)[2])


def _stacked(anchors: list[Anchor]) -> Snapshot:
    return Snapshot(foreach.stack([each.output_mean for each in anchors]), foreach.stack([each.weight_norm for each in anchors]))


@torch.no_grad()
def _anchor(layer: Layer, *, moved: bool = False) -> Anchor:
    """The anchor of now. |W| is computed again only if W has moved; moved: W has moved since the anchor was taken, and a has not."""
    weight, bias = _tensors(layer)
    producer = cast(nn.Module, layer.producer_in_training)
    input_mean, known, marks = cast(Tensor, layer.input_mean), layer.run.anchor, _marks(layer)
    rows = filters(producer, input_mean.dtype)
    same = not moved and known is not None and known.producer[0] == marks[0][0] and not is_part(weight)
    weight_norm = cast(Anchor, known).weight_norm if same else torch.linalg.vector_norm(rows, dim=1)
    row = cast(Anchor, known).spread if moved and known.input_mean == marks[1] else spread(input_mean, rows.shape[1], groups_of(producer))
    answer = response(rows, row, groups_of(producer))
    return Anchor(row, answer if bias is None else answer + bias.to(answer.dtype), weight_norm, *marks)


def _tensors(layer: Layer) -> tuple[Tensor, Tensor | None]:
    producer = cast(nn.Module, layer.producer_in_training)
    return cast(Tensor, producer.weight), cast("Tensor | None", producer.bias)


def _marks(layer: Layer) -> tuple[tuple[Mark, ...], tuple[Mark, ...], tuple[Mark, ...]]:
    """The marks of W and b, of a, and of mean and the std's parameter."""
    weight, bias = _tensors(layer)
    producer = (mark(weight),) if bias is None else (mark(weight), mark(bias))
    return producer, (mark(cast(Tensor, layer.input_mean)),), (mark(layer.mean), mark(layer.std_parameter))


def mark(t: Tensor) -> Mark:
    return id(t), t._version, place_of(t)


def _same(marks: tuple[Mark, ...], others: tuple[Mark, ...]) -> bool:
    """Whether these are marks of the same tensors."""
    return [mark[0] for mark in marks] == [mark[0] for mark in others]
