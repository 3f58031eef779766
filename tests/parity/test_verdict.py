"""How the rows of a comparison are put together."""

from __future__ import annotations

import copy
import itertools
from typing import Any

import pytest
import torch
from comparing import SITES, Cancels, Net, changed, compared, ending
from torch import Tensor, nn


def test_a_layer_that_differs_fails_even_if_no_output_does() -> None:
    """Behind a weight of zero nothing is seen."""
    reference = Net()
    reference.bn2.weight.data.zero_()
    parity = changed(lambda net: net.bn1.bias.add_(0.1), reference)
    assert all(d.passed for d in parity.outputs)
    assert not parity
    assert parity.first_bad == "bn1"


def test_sites_are_in_the_order_that_was_asked_for_and_calls_are_one_row() -> None:
    class Twice(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.b, self.a = nn.BatchNorm2d(3), nn.BatchNorm2d(3)

        def forward(self, x: Tensor) -> Any:
            return self.a(self.b(self.b(x)))

    reference = Twice()
    reference.b.running_var.fill_(0.3)  # type: ignore[union-attr]
    parity = compared(reference, sites=("b", "a"))
    assert [d.name for d in parity.sites] == ["b", "a"]
    # only the second call differs
    candidate = copy.deepcopy(reference)
    count = itertools.count(1)
    candidate.b.register_forward_hook(lambda m, i, o: o * 1.01 if next(count) % 2 == 0 else o)
    parity = compared(reference, candidate, sites=("b", "a"))
    assert [d.passed for d in parity.sites] == [False, False]
    assert parity.first_bad == "b"


def test_a_layer_that_is_called_less_often_fails() -> None:
    parity = compared(Net(), Net(lambda m, y: m.bn2(y)), sites=SITES)
    assert [d.problem for d in parity.sites] == [None, "the reference does not return it"]
    parity = compared(Net(lambda m, y: m.bn2(y)), Net(), sites=SITES)
    assert parity.first_bad == "bn2"


def test_a_failure_is_not_hidden_by_a_larger_error_that_passes() -> None:
    """Each input has its own limit: at x 0.001 this reference cancels and may be far off, at x 1000 it may not."""
    parity = compared(Cancels(), Cancels(small=5e-5, large=3e-6))
    assert [(d.probe, d.passed) for d in parity.outputs] == [("batch 1 x 1000", False)]
    assert parity.max_rel > 10 * parity.outputs[0].max_rel


@pytest.mark.parametrize("nothing", [None, "text", [], {}])
def test_a_model_without_tensors_fails(nothing: Any) -> None:
    parity = ending(lambda m, y: nothing, lambda m, y: nothing)
    assert not parity
    assert parity.failure == "nothing was compared: the model returns no tensor"


def test_a_model_with_empty_tensors_only_fails() -> None:
    parity = ending(lambda m, y: y[:0], lambda m, y: y[:0] + 1)
    assert not parity
    assert parity.failure == "nothing was compared: every tensor that the model returns is empty"


def test_a_model_that_is_nowhere_finite_fails() -> None:
    parity = ending(lambda m, y: y * torch.nan, lambda m, y: y * torch.nan)
    assert not parity
    assert parity.outputs[0].problem == "has no finite value to compare"
