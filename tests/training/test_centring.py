"""keep_centred: a model with RMSNorm trains as it would have with LayerNorm."""

from __future__ import annotations

import copy
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn
from torch.nn.utils import parametrize

import normswap
from normswap.errors import UsageError

C = 6
OPTIMIZERS: dict[str, Callable[[nn.Module], torch.optim.Optimizer]] = {
    "sgd": lambda model: torch.optim.SGD(model.parameters(), lr=0.05, momentum=0.9, weight_decay=0.1),
    "adamw": lambda model: torch.optim.AdamW(model.parameters(), lr=1e-2),
}


class Block(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.norm, self.up, self.down = nn.LayerNorm(C), nn.Linear(C, 11), nn.Linear(11, C)

    def forward(self, x: Tensor) -> Tensor:
        return x + self.down(self.up(self.norm(x)).tanh())  # type: ignore[no-any-return]


class Twice(nn.Module):
    """One table writes the stream at two places, one block is called twice."""

    def __init__(self) -> None:
        super().__init__()
        self.words, self.block, self.norm, self.head = nn.Embedding(7, C), Block(), nn.LayerNorm(C), nn.Linear(C, 3)

    def forward(self, tokens: Tensor) -> Tensor:
        x = self.words(tokens) + self.words(tokens.flip(1))
        return self.head(self.norm(self.block(self.block(x))))  # type: ignore[no-any-return]


def plain() -> nn.Module:
    return nn.Sequential(nn.Embedding(7, C), Block(), Block(), nn.LayerNorm(C), nn.Linear(C, 3))


def made(make: Callable[[], nn.Module]) -> nn.Module:
    torch.manual_seed(0)
    model = make().double().eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(torch.randn_like(parameter), alpha=0.3)
    return model


def tokens() -> Tensor:
    return torch.randint(7, (4, 5), generator=torch.Generator().manual_seed(1))


def trained(model: nn.Module, optimizer: str) -> Tensor:
    """The outputs after five steps."""
    steps, x = OPTIMIZERS[optimizer](model), tokens()
    for _ in range(5):
        steps.zero_grad()
        nn.functional.cross_entropy(model(x).flatten(0, 1), x.flatten() % 3).backward()  # type: ignore[no-untyped-call]
        steps.step()
    with torch.no_grad():
        return model(x)  # type: ignore[no-any-return]


@pytest.mark.parametrize("optimizer", OPTIMIZERS)
@pytest.mark.parametrize("make", [plain, Twice])
def test_it_trains_as_with_layer_norm(make: Callable[[], nn.Module], optimizer: str) -> None:
    model = made(make)
    conversion = normswap.convert(model, tokens(), to="rmsnorm")
    assert not conversion.plan.skips
    expected = trained(copy.deepcopy(model), optimizer)
    without = trained(copy.deepcopy(conversion.model), optimizer)
    kept = normswap.keep_centred(copy.deepcopy(conversion.model), conversion.centred)
    assert (trained(kept, optimizer) - expected).abs().max() < 1e-12
    assert (without - expected).abs().max() > 1e-3


def test_the_function_stays_and_the_way_back_is_torchs(tmp_path: Path) -> None:
    conversion = normswap.convert(made(plain), tokens(), to="rmsnorm")
    kept = normswap.keep_centred(copy.deepcopy(conversion.model), conversion.centred)
    assert normswap.verify(conversion.model, kept, tokens())
    trained(kept, "sgd")
    directory = normswap.save(kept, tmp_path / "saved")
    again = normswap.load(directory, lambda: plain().double())
    assert torch.equal(again(tokens()), kept(tokens()))
    assert parametrize.is_parametrized(kept[0])  # type: ignore[index]
    parametrize.remove_parametrizations(kept[0], "weight")  # type: ignore[index]
    assert kept[0].weight.mean(1).abs().max() < 1e-15  # type: ignore[index]


def test_a_parametrization_of_the_users_own_is_saved_as_it_is(tmp_path: Path) -> None:
    model = normswap.convert(made(plain), tokens(), to="rmsnorm").model
    parametrize.register_parametrization(model[4], "weight", nn.Tanh())  # type: ignore[index]
    directory = normswap.save(model, tmp_path / "saved")
    assert "4.parametrizations.weight.original" in (directory / "model.safetensors").read_bytes().decode("latin-1")


def test_names_of_another_model_and_a_second_call_are_refused() -> None:
    conversion = normswap.convert(made(plain), tokens(), to="rmsnorm")
    other = nn.Sequential(nn.Linear(2, 3))
    with pytest.raises(UsageError, match=r"^2.down.bias is no parameter of the Sequential") as refused:
        normswap.keep_centred(other, conversion.centred)
    assert "once" in str(refused.value.hint)
    assert not parametrize.is_parametrized(other[0])
    kept = normswap.keep_centred(conversion.model, conversion.centred)
    with pytest.raises(UsageError, match="is no parameter of the Sequential"):
        normswap.keep_centred(kept, conversion.centred)


def test_other_conversions_have_nothing_to_keep() -> None:
    model = nn.Sequential(nn.Conv2d(3, 5, 3), nn.BatchNorm2d(5)).eval()
    conversion = normswap.convert(model, torch.randn(2, 3, 7, 7))
    assert conversion.centred == ()
    assert normswap.keep_centred(conversion.model, conversion.centred) is conversion.model
    assert not any(parametrize.is_parametrized(module) for module in conversion.model.modules())
