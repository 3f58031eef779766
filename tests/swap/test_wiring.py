"""Which linear makes a layer's input, and which ones read its output."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn

from normswap.swap.wiring import Around, Wiring


class Net(nn.Module):
    """`body` says what happens between the parts."""

    def __init__(self, body: Any) -> None:
        super().__init__()
        self.a, self.b, self.c = nn.Linear(6, 6), nn.Linear(6, 6), nn.Linear(6, 6)
        self.norm, self.drop, self.body = nn.LayerNorm(6), nn.Dropout(0.5), body

    def forward(self, x: Tensor) -> Tensor:
        return self.body(self, x)  # type: ignore[no-any-return]


def _in_place(m: Any, x: Tensor) -> Tensor:
    y = x * 2
    y += m.a(x)
    return m.b(m.norm(y))  # type: ignore[no-any-return]


def _then_relu_in_place(m: Any, x: Tensor) -> Tensor:
    return m.norm(m.a(x).relu_())  # type: ignore[no-any-return]


def _twice(m: Any, x: Tensor) -> Tensor:
    return m.norm(m.a(m.a(x)))  # type: ignore[no-any-return]


def _stream(m: Any, x: Tensor) -> Tensor:
    x = x + m.a(x)
    return x + m.b(m.norm(x))  # type: ignore[no-any-return]


def _read_in_place(m: Any, x: Tensor) -> Tensor:
    x = x + m.a(x)
    y = m.norm(x)
    x[:, 0] = 1
    return m.b(y)  # type: ignore[no-any-return]


@torch.inference_mode()
def _unversioned(m: Any, x: Tensor) -> Tensor:
    """Tensors that do not tell whether they were written into, as they are here."""
    y = m.a(x)
    torch.relu_(y)
    return m.b(m.norm(y))  # type: ignore[no-any-return]


def _sparse(m: Any, x: Tensor) -> Any:
    return m.b(m.norm(m.a(x))), x.to_sparse()


CASES: dict[str, tuple[Any, Around]] = {
    "in inference mode": (_unversioned, Around(None, False, ())),
    "beside a sparse output": (_sparse, Around("a", True, ("b",))),
    "alone": (lambda m, x: m.norm(m.a(x)), Around("a", True, ())),
    "in a sum": (lambda m, x: m.norm(x + m.a(x)), Around("a", True, ())),
    "on the left of a sum": (lambda m, x: m.norm(m.a(x) + x), Around("a", True, ())),
    "behind a dropout that does nothing": (lambda m, x: m.norm(x + m.drop(m.a(x))), Around("a", True, ())),
    "the last of two": (lambda m, x: m.norm(m.a(x) + m.b(x)), Around("b", True, ())),
    "in a sum in place": (_in_place, Around("a", True, ("b",))),
    "a stream": (_stream, Around("a", False, ("b",))),
    "read by two": (lambda m, x: m.b(y := m.norm(x * 2)) + m.c(y), Around(None, True, ("b", "c"))),
    "read by another, too": (lambda m, x: m.b(y := m.norm(x * 2)) + y, Around(None, True, ())),
    "of which a part is read": (lambda m, x: m.b(m.norm(x * 2)[:, 0]), Around(None, True, ("b",), (slice(None), 0))),
    "of which two parts are read": (lambda m, x: m.b((y := m.norm(x * 2))[:, 0]) + y[:, 1], Around(None, True, ())),
    "of which some samples are read": (lambda m, x: m.b(m.norm(x * 2)[1:]), Around(None, True, ())),
    "of which a part that the data decide is read": (
        lambda m, x: m.b(m.norm(x * 2)[:, x[0, :, 0].argsort()]),
        Around(None, True, ()),
    ),
    "read by the caller": (lambda m, x: (m.b(y := m.norm(x * 2)), y), Around(None, True, ())),
    "an input that is an output": (lambda m, x: (y := x + m.a(x), m.norm(y)), Around("a", False, ())),
    "its size is asked": (lambda m, x: m.norm(y := m.a(x)).view(y.shape), Around("a", True, ())),
    "behind an activation": (lambda m, x: m.norm(m.a(x).relu()), Around(None, True, ())),
    "behind an activation in place": (_then_relu_in_place, Around(None, True, ())),
    "in a difference": (lambda m, x: m.norm(x - m.a(x)), Around(None, True, ())),
    "with another factor": (lambda m, x: m.norm(torch.add(x, m.a(x), alpha=2)), Around(None, True, ())),
    "in another shape": (lambda m, x: m.norm(m.a(x).view(-1, 6)), Around(None, True, ())),
    "called twice": (_twice, Around(None, True, ())),
    "written to afterwards": (_read_in_place, Around(None, True, ("b",))),
}


@pytest.mark.parametrize("name", CASES)
def test_the_linears_around_a_layer(name: str) -> None:
    body, expected = CASES[name]
    model = Net(body).eval()
    wiring = Wiring(model, {"norm": model.norm})
    found = wiring.run(model, (torch.randn(3, 5, 6, generator=torch.Generator().manual_seed(0)),), {})
    assert found == {"norm": expected}
    assert wiring.order == ["norm"]


def test_an_input_that_two_layers_read_is_not_read_alone() -> None:
    model = Net(lambda m, x: m.b(m.norm(y := m.a(x)) * m.other(y))).eval()
    model.other = nn.LayerNorm(6)
    found = Wiring(model, {"norm": model.norm, "other": model.other}).run(model, (torch.randn(3, 6),), {})
    assert found == {"norm": Around("a", False, ()), "other": Around("a", False, ())}


def test_a_linear_whose_weight_may_not_be_set_is_none() -> None:
    class Mine(nn.Linear):
        pass

    def shared(model: Net) -> None:
        model.c.weight = model.a.weight

    def computed(model: Net) -> None:
        nn.utils.parametrizations.weight_norm(model.a)

    def of_another_class(model: Net) -> None:
        model.a = Mine(6, 6)

    def with_a_hook(model: Net) -> None:
        model.a.register_forward_hook(lambda module, args, output: output * 2)

    for change in (shared, computed, of_another_class, with_a_hook):
        model = Net(lambda m, x: m.norm(m.a(x))).eval()
        change(model)
        wiring = Wiring(model, {"norm": model.norm})
        assert wiring.run(model, (torch.randn(2, 6),), {})["norm"].producer is None, change.__name__
