"""What `convert` itself decides: when it raises, and what it says."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

import normswap
from fixtures.nets import randomise
from normswap.errors import ParityError, UsageError


class Chooses(nn.Module):
    """Returns the place of its largest feature: a choice that rounding decides among features that are all but equal."""

    def __init__(self) -> None:
        super().__init__()
        self.norm = nn.BatchNorm1d(997, affine=False)

    def forward(self, x: Tensor) -> Tensor:
        y = self.norm(x)
        return (y * 1e-9 + 1).argmax(1).to(y.dtype)


def test_float64_decides_where_rounding_makes_the_choice_of_the_original() -> None:
    model = randomise(Chooses(), 0).eval()
    parity = normswap.convert(model, torch.randn(5, 997)).parity
    assert parity
    assert parity.unjudged[0].startswith("output at the probe 'example': the original itself is ")
    assert parity.unjudged[0].endswith(" away from its float64 run there")


def test_what_cannot_be_judged_anywhere_is_said_to_be_that() -> None:
    """What the last digits of float64 decide."""

    class Chaotic(Chooses):
        def forward(self, x: Tensor) -> Tensor:
            return torch.sin(self.norm(x) * 1e16)

    model = randomise(Chaotic(), 0).eval()
    with pytest.raises(ParityError) as error:
        normswap.convert(model, torch.randn(5, 997))
    assert "is not judged: output cannot be judged at any probe: " in str(error.value)
    assert "a choice that rounding decides: the original moves by" in str(error.value)
    assert "\nhint: give inputs like those that the model was trained on" in str(error.value)


def test_inputs_that_cannot_be_inferred_are_asked_for() -> None:
    class TwoInputs(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.norm = nn.BatchNorm1d(3)

        def forward(self, x: Tensor, y: Tensor) -> Tensor:
            return self.norm(x + y)  # type: ignore[no-any-return]

    with pytest.raises(UsageError, match=r"^no example inputs that the model takes .*\nhint: give them: --input 1x3x224x224"):
        normswap.convert(TwoInputs())
    assert normswap.convert(TwoInputs(), (torch.randn(2, 3), torch.randn(2, 3))).parity


def test_an_unknown_form_of_std_is_refused() -> None:
    with pytest.raises(UsageError, match=r"^std is 'ln'; expected one of 'log', 'abs', 'inv'$"):
        normswap.convert(nn.BatchNorm1d(3), torch.randn(2, 3), std="ln")


def test_a_model_without_norms_is_a_success() -> None:
    conversion = normswap.convert(nn.Sequential(nn.Linear(3, 5), nn.ReLU()))
    assert conversion.parity
    assert not conversion.plan.swaps
    assert not conversion.plan.skips
