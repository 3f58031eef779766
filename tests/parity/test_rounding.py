"""What is moved in a copy of a model, and what is not."""

from __future__ import annotations

import copy

import torch
from comparing import net
from torch import nn

from normswap.parity.rounding import moved_model, rounded_by
from normswap.parity.run_torch import tensors_of


def test_what_the_reference_has_too_was_not_rounded() -> None:
    """A stale weight is one unit in the last place of itself, at most; here it is another number."""
    reference = net()
    candidate = copy.deepcopy(reference)
    with torch.no_grad():
        candidate[3].bias[1] += 3e-7  # type: ignore[index]
    amounts = rounded_by(candidate, tensors_of(reference), 2.0**-23)
    moved = {name for name, tensor in candidate.named_parameters() if amounts(tensor)}
    assert moved == {"3.bias"}


def test_whole_numbers_are_not_nudged() -> None:
    model = nn.Linear(3, 2)
    with torch.no_grad():
        model.weight.copy_(torch.tensor([[1.0, -2.0, 0.0], [0.5, 3.0, 0.25]]))
    twin = moved_model(model, lambda tensor: 1e-3)
    changed = (twin.weight != model.weight.double()).tolist()  # type: ignore[operator, union-attr]
    assert changed == [[False, False, False], [True, False, True]]
    assert torch.equal(model.weight[0], torch.tensor([1.0, -2.0, 0.0]))
