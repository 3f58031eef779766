"""What `needed` and `is_blind` say of an operator is true: centring what they name centres the result, or leaves it as it is.

Each case is one operator of aten on parameters, and the axes of its results that pass a centring on. Said is held against computed.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from normswap.detect.channels import is_blind, needed
from normswap.models.recording import Op, Recorder, Value

aten: Any = torch.ops.aten
MASK = torch.tensor([[True], [False], [True]])
ROUNDING = 1e-14  # of sums of float64 around 1: 2e-15 was the most of all cases
NUMBERS = torch.tensor([4, 0, 2, 2])


class Net(nn.Module):
    def __init__(self, function: Callable[..., Any], shapes: tuple[tuple[int, ...], ...]) -> None:
        super().__init__()
        generator = torch.Generator().manual_seed(0)
        values = (torch.randn(shape, generator=generator, dtype=torch.float64) + 0.7 for shape in shapes)
        self.tensors = nn.ParameterList(values)
        self.function = function

    def forward(self) -> Any:
        return self.function(*self.tensors)

    def with_centred(self, axes: dict[int, int]) -> list[Tensor]:
        """The results where tensor number i is centred on axis axes[i]."""
        with torch.no_grad():
            given = [t - t.mean(axes[i], keepdim=True) if i in axes else t.clone() for i, t in enumerate(self.tensors)]
            found = self.function(*given)
        return list(found) if isinstance(found, (list, tuple)) else [found]


def recorded(net: Net) -> Op:
    record = Recorder(net).run((), {})
    assert record.failed is None
    (op,) = [op for op in record.ops if op.inputs]
    return op


def number_of(value: Value, net: Net) -> int:
    return next(i for i, t in enumerate(net.tensors) if t is value.tensor)


def normalized(x: Tensor, weight: Tensor, bias: Tensor) -> Any:
    return aten.native_layer_norm(x, (x.shape[-1],), weight, bias, 1e-5)[0]


def over(x: Tensor, *shape: int, weight: Tensor | None = None, bias: Tensor | None = None) -> Any:
    return aten.native_layer_norm(x, shape, weight, bias, 1e-5)[0]


# name -> (function, shapes of its tensors, (result, axis) of those that pass a centring on)
PASSES: dict[str, tuple[Callable[..., Any], tuple[tuple[int, ...], ...], set[tuple[int, int]]]] = {
    "clone": (lambda x: aten.clone(x), ((2, 3),), {(0, 0), (0, 1)}),
    "neg": (lambda x: aten.neg(x), ((2, 3),), {(0, 0), (0, 1)}),
    "relu": (lambda x: aten.relu(x), ((2, 3),), set()),
    "view, joined": (lambda x: aten.view(x, (2, 12)), ((2, 3, 4),), {(0, 0)}),
    "view, split": (lambda x: aten.view(x, (2, 3, 4)), ((2, 12),), {(0, 0)}),
    "view, before": (lambda x: aten.view(x, (6, 4)), ((2, 3, 4),), {(0, 1)}),
    "view, other sizes": (lambda x: aten.view(x, (4, 3, 2)), ((2, 3, 4),), set()),
    "view, same size elsewhere": (lambda x: aten.view(x, (3, 2, 4)), ((2, 3, 4),), {(0, 2)}),
    "permute": (lambda x: aten.permute(x, (2, 0, 1)), ((2, 3, 4),), {(0, 0), (0, 1), (0, 2)}),
    "transpose": (lambda x: aten.transpose(x, 0, -1), ((2, 3, 4),), {(0, 0), (0, 1), (0, 2)}),
    "t": (lambda x: aten.t(x), ((2, 3),), {(0, 0), (0, 1)}),
    "expand": (lambda x: aten.expand(x, (5, 3, 4)), ((1, 3, 4),), {(0, 1), (0, 2)}),
    "expand, a new axis": (lambda x: aten.expand(x, (5, 3)), ((3,),), {(0, 1)}),
    "unsqueeze": (lambda x: aten.unsqueeze(x, -2), ((2, 3),), {(0, 0), (0, 2)}),
    "squeeze": (lambda x: aten.squeeze(x, 1), ((2, 1, 3),), {(0, 0), (0, 1)}),
    "select": (lambda x: aten.select(x, 1, 2), ((2, 3, 4),), {(0, 0), (0, 1)}),
    "slice": (lambda x: aten.slice(x, 1, 0, 2), ((2, 3, 4),), {(0, 0), (0, 2)}),
    "slice, default axis": (lambda x: aten.slice(x), ((2, 3),), {(0, 1)}),
    "cat": (lambda x, y: aten.cat([x, y], -1), ((2, 3), (2, 4)), {(0, 0)}),
    "split": (lambda x: aten.split(x, 2, 1), ((3, 4),), {(0, 0), (1, 0)}),
    "split with sizes": (lambda x: aten.split_with_sizes(x, [1, 3], 1), ((3, 4),), {(0, 0), (1, 0)}),
    "index_select": (lambda x: aten.index_select(x, 0, NUMBERS), ((5, 3),), {(0, 1)}),
    "roll": (lambda x: aten.roll(x, [1], [0]), ((2, 3),), {(0, 1)}),
    "roll, no axis": (lambda x: aten.roll(x, [1]), ((2, 3),), set()),
    "flip": (lambda x: aten.flip(x, [1]), ((2, 3),), {(0, 0)}),
    "stack": (lambda x, y: aten.stack([x, y], 1), ((3, 4), (3, 4)), {(0, 0), (0, 2)}),
    "unbind": (lambda x: aten.unbind(x, 1), ((3, 2, 4),), {(0, 0), (0, 1), (1, 0), (1, 1)}),
    "pad": (lambda x: aten.constant_pad_nd(x, [1, 2]), ((2, 3),), {(0, 0)}),
    "pad with ones": (lambda x: aten.constant_pad_nd(x, [1, 2], 1.0), ((2, 3),), set()),
    "pad, the other axis": (lambda x: aten.constant_pad_nd(x, [0, 0, 1, 2]), ((2, 3),), {(0, 1)}),
    "repeat": (lambda x: aten.repeat(x, (1, 2, 1)), ((2, 3, 4),), {(0, 0), (0, 2)}),
    "mean": (lambda x: aten.mean(x, [1]), ((2, 3, 4),), {(0, 0), (0, 1)}),
    "mean, kept": (lambda x: aten.mean(x, [1], True), ((2, 3, 4),), {(0, 0), (0, 2)}),
    "sum, two axes": (lambda x: aten.sum(x, [0, -1]), ((2, 3, 4),), {(0, 0)}),
    "sum of all": (lambda x: aten.sum(x), ((2, 3),), set()),
    "pool": (lambda x: aten.avg_pool2d(x, [2, 2]), ((2, 3, 4, 6),), {(0, 1)}),
    "interpolation": (lambda x: aten.upsample_nearest2d(x, [8, 9]), ((2, 3, 4, 5),), {(0, 1)}),
    "add": (lambda x, y: aten.add(x, y), ((2, 3), (2, 3)), {(0, 0), (0, 1)}),
    "add, broadcast": (lambda x, y: aten.add(x, y, alpha=0.3), ((2, 3, 4), (4,)), {(0, 2)}),
    "add, one for all channels": (lambda x, y: aten.add(x, y), ((2, 3), (2, 1)), {(0, 0)}),
    "add a number": (lambda x: aten.add(x, 2.0), ((2, 3),), set()),
    "sub": (lambda x, y: aten.sub(x, y), ((2, 3), (3,)), {(0, 1)}),
    "mul by one per sample": (lambda x, y: aten.mul(x, y), ((2, 3), (2, 1)), {(0, 1)}),
    "mul by a gain": (lambda x, y: aten.mul(x, y), ((2, 3), (3,)), {(0, 0)}),
    "mul of two": (lambda x, y: aten.mul(x, y), ((2, 3), (2, 3)), set()),
    "mul of itself": (lambda x: aten.mul(x, x), ((2, 3),), set()),
    "mul by a number": (lambda x: aten.mul(x, 0.3), ((2, 3),), {(0, 0), (0, 1)}),
    "div by one per sample": (lambda x, y: aten.div(x, y), ((2, 3), (2, 1)), {(0, 1)}),
    "div a sample's by channels": (lambda x, y: aten.div(x, y), ((2, 1), (3,)), {(0, 0)}),
    "div, rounded": (lambda x, y: aten.div(x, y, rounding_mode="floor"), ((2, 3), (2, 1)), set()),
    "where": (lambda x, y: aten.where(MASK, x, y), ((3, 4), (3, 4)), {(0, 1)}),
    "where, a number": (lambda x: aten.where(MASK, x, 0.5), ((3, 4),), set()),
    "masked_fill with 0": (lambda x: aten.masked_fill(x, MASK, 0.0), ((3, 4),), {(0, 1)}),
    "masked_fill with 1": (lambda x: aten.masked_fill(x, MASK, 1.0), ((3, 4),), set()),
    "mm": (lambda x, y: aten.mm(x, y), ((2, 3), (3, 4)), {(0, 0), (0, 1)}),
    "addmm": (lambda b, x, y: aten.addmm(b, x, y), ((4,), (2, 3), (3, 4)), {(0, 1)}),
    "addmm, scaled": (lambda b, x, y: aten.addmm(b, x, y, beta=0.5, alpha=3), ((2, 4), (2, 3), (3, 4)), {(0, 0), (0, 1)}),
    "addmm without its bias": (lambda b, x, y: aten.addmm(b, x, y, beta=0), ((4,), (2, 3), (3, 4)), set()),
    "bmm": (lambda x, y: aten.bmm(x, y), ((5, 2, 3), (5, 3, 4)), {(0, 1), (0, 2)}),
    "baddbmm": (lambda b, x, y: aten.baddbmm(b, x, y), ((5, 2, 4), (5, 2, 3), (5, 3, 4)), {(0, 1), (0, 2)}),
    "conv": (lambda x, w, b: _conv(x, w, b), ((2, 3, 7), (4, 3, 2), (4,)), {(0, 1)}),
    "conv without a bias": (lambda x, w: _conv(x, w, None), ((2, 3, 7), (4, 3, 2)), {(0, 1)}),
    "conv, transposed": (lambda x, w, b: _conv(x, w, b, transposed=True), ((2, 3, 7), (3, 4, 2), (4,)), {(0, 1)}),
    "conv, grouped": (lambda x, w, b: _conv(x, w, b, groups=2), ((2, 4, 7), (6, 2, 3), (6,)), set()),
    "conv, transposed, grouped": (lambda x, w, b: _conv(x, w, b, transposed=True, groups=2), ((2, 4, 7), (4, 3, 2), (6,)), set()),
    "embedding": (lambda w: aten.embedding(w, NUMBERS), ((5, 3),), {(0, 1)}),
    "layer norm": (normalized, ((2, 3), (3,), (3,)), set()),
    "softmax": (lambda x: aten._softmax(x, -1, False), ((2, 3),), set()),
}


def _conv(x: Tensor, w: Tensor, b: Tensor | None, *, transposed: bool = False, groups: int = 1) -> Any:
    return aten.convolution(x, w, b, [2], [1], [1], transposed, [0], groups)


@pytest.mark.parametrize("case", PASSES)
def test_a_result_is_centred_where_what_it_needs_is(case: str) -> None:
    function, shapes, expected = PASSES[case]
    net = Net(function, shapes)
    op, plain = recorded(net), net.with_centred({})
    found = set()
    for index, result in enumerate(plain):
        for axis in range(result.dim()):
            pairs = needed(op, index, axis)
            if pairs is None:
                continue
            found.add((index, axis))
            centred = net.with_centred({number_of(value, net): a for value, a in pairs})
            assert torch.allclose(centred[index], result - result.mean(axis, keepdim=True), rtol=0, atol=ROUNDING), (index, axis)
            # each of them is needed: with one left as it was, the result keeps a mean
            for value, _ in pairs:
                others = net.with_centred({number_of(v, net): a for v, a in pairs if v is not value})
                assert (others[index] - centred[index]).abs().max() > 1e-2, (index, axis)  # of values around 1
    assert found == expected


def test_zeros_have_no_mean() -> None:
    op = recorded(Net(lambda x: aten.zeros_like(x), ((2, 3),)))
    assert needed(op, 0, 0) == needed(op, 0, 1) == []


# name -> (function, shapes of its tensors, (tensor, axis) of those whose mean is not seen)
BLIND: dict[str, tuple[Callable[..., Any], tuple[tuple[int, ...], ...], set[tuple[int, int]]]] = {
    "layer norm": (normalized, ((2, 3), (3,), (3,)), {(0, 1)}),
    "layer norm over two axes": (lambda x: over(x, 3, 4), ((2, 3, 4),), set()),
    "layer norm over one of three": (lambda x: over(x, 4), ((2, 3, 4),), {(0, 2)}),
    "layer norm by itself": (lambda x: over(x, 3, weight=x), ((3,),), set()),
    "layer norm plus itself": (lambda x: over(x, 3, bias=x), ((3,),), set()),
    "layer norm, and its mean": (lambda x: aten.native_layer_norm(x, (3,), None, None, 1e-5)[:2], ((2, 3),), set()),
    "softmax": (lambda x: aten._softmax(x, 1, False), ((2, 3, 4),), {(0, 1)}),
    "softmax, from the end": (lambda x: aten._softmax(x, -1, False), ((2, 3, 4),), {(0, 2)}),
    "log softmax": (lambda x: aten._log_softmax(x, -2, False), ((2, 3, 4),), {(0, 1)}),
    "zeros like": (lambda x: aten.zeros_like(x), ((2, 3),), {(0, 0), (0, 1)}),
    "group norm": (lambda x: aten.native_group_norm(x, None, None, 2, 4, 3, 2, 1e-5), ((2, 4, 3),), set()),
    "relu": (lambda x: aten.relu(x), ((2, 3),), set()),
    "max": (lambda x: aten.argmax(x, 1), ((2, 3),), set()),
}


@pytest.mark.parametrize("case", BLIND)
def test_what_is_blind_does_not_see_a_mean(case: str) -> None:
    function, shapes, expected = BLIND[case]
    net = Net(function, shapes)
    op, plain = recorded(net), net.with_centred({})
    found = {
        (number_of(value, net), axis)
        for value in dict.fromkeys(op.inputs)
        for axis in range(len(value.shape))
        if value.tensor is not None and is_blind(op, value, axis)
    }
    assert found == expected
    for number, axis in found:
        results = net.with_centred({number: axis})
        assert all(torch.allclose(a, b, rtol=0, atol=ROUNDING) for a, b in zip(results, plain, strict=True))
