"""Coupling of producers with code of their own: they are coupled as torch's layers are, or not at all if their input is another one."""

from __future__ import annotations

from collections import UserDict
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import normswap
from fixtures.nets import randomise
from normswap.layer.batchless_norm import BatchlessNorm
from normswap.models.watching import tensors_in
from normswap.training.couple import Pair


class Padded(nn.Conv2d):
    def forward(self, x: Tensor) -> Tensor:
        return F.conv2d(F.pad(x, (2, 2, 2, 2)), self.weight, self.bias, self.stride, (0, 0), self.dilation, self.groups)


class Shuffled(nn.Conv2d):
    """Takes 4 times its input channels for pixels."""

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(F.pixel_shuffle(x, 2))


class Unsqueezed(nn.Conv1d):
    """Takes (N, C), one place of each sample."""

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x[..., None])


class Scaled(nn.Conv2d):
    """Takes a second argument."""

    def forward(self, x: Tensor, scale: float) -> Tensor:
        return super().forward(x * scale)


class Net(nn.Module):
    def __init__(self, layer: nn.Module, norm: nn.Module, run: Callable[[Any, Tensor], Tensor]) -> None:
        super().__init__()
        self.layer, self.norm, self.run = layer, norm, run

    def forward(self, x: Tensor) -> Tensor:
        return self.norm(self.run(self.layer, x))  # type: ignore[no-any-return]


def plain(layer: Any, x: Tensor) -> Tensor:
    return layer(x)  # type: ignore[no-any-return]


def net(layer: nn.Module, norm: nn.Module, run: Callable[[Any, Tensor], Tensor] = plain) -> nn.Module:
    return randomise(Net(layer, norm, run), 5).eval()


def images(*shape: int) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(2)) + 0.4


@pytest.mark.parametrize("data", [False, True])
def test_a_conv_that_pads_by_itself_is_coupled_and_trains(data: bool) -> None:
    """Also on maps that are smaller than its kernel, of which its attributes alone would say that there are no outputs."""
    model = nn.Sequential(
        randomise(nn.Sequential(Padded(3, 4, 5), nn.BatchNorm2d(4), nn.ReLU(), Padded(4, 6, 5, stride=2), nn.BatchNorm2d(6)), 3)
    )
    model.eval()
    for size in (9, 4, 2):
        x = images(3, 3, size, size)
        conversion = normswap.convert(model, x, calibration=[x] if data else None)
        start = ("data", "data") if data else ("zero", "closed form")
        assert conversion.pairs == (Pair("0.1", "0.0", None, start[0]), Pair("0.4", "0.3", None, start[1]))
        trained = conversion.model.train()
        layers = [m for m in trained.modules() if isinstance(m, BatchlessNorm)]
        means = [layer.mean.detach().clone() for layer in layers]
        step = torch.optim.SGD(normswap.param_groups(trained, lr=0.01, batch=3), momentum=0.9)
        for _ in range(3):
            step.zero_grad()
            trained(x).square().mean().backward()
            step.step()
        assert all(bool(tensor.isfinite().all()) for tensor in trained.state_dict().values())
        assert all(bool((layer.mean != mean).any()) for layer, mean in zip(layers, means, strict=True))
        assert all(layer.input_mean is not None and layer.input_mean.shape[0] == n for layer, n in zip(layers, (3, 4), strict=True))


def test_coupling_to_a_conv_that_pads_is_kept_in_a_directory(tmp_path: Any) -> None:
    def build() -> nn.Module:
        return net(Padded(3, 4, 5), nn.BatchNorm2d(4))

    x = images(2, 3, 6, 7)
    loaded: Any = normswap.load(normswap.save(normswap.convert(build(), x), tmp_path / "saved"), build)
    assert loaded.norm.producer is loaded.layer
    assert isinstance(loaded.layer, Padded)


OTHER = "its producer layer has code of its own, and is called with something else than the input of its class"
UNREADABLE: dict[str, tuple[Callable[[], nn.Module], Tensor]] = {
    "other channels": (lambda: net(Shuffled(2, 5, 3), nn.BatchNorm2d(5)), images(3, 8, 5, 6)),
    "no places": (lambda: net(Unsqueezed(7, 5, 1), nn.BatchNorm1d(5)), images(3, 7)),
    "no places, as many samples as channels": (lambda: net(Unsqueezed(7, 5, 1), nn.BatchNorm1d(5)), images(7, 7)),
    "a second argument": (lambda: net(Scaled(3, 5, 2), nn.BatchNorm2d(5), lambda layer, x: layer(x, 0.5)), images(3, 3, 5, 6)),
    "by another keyword": (lambda: net(Padded(3, 5, 2), nn.BatchNorm2d(5), lambda layer, x: layer(x=x)), images(3, 3, 5, 6)),
}


@pytest.mark.parametrize("what", UNREADABLE)
def test_an_input_of_another_kind_is_not_coupled(what: str) -> None:
    make, x = UNREADABLE[what]
    conversion = normswap.convert(make(), x)
    assert conversion.plan.paired == 1
    assert conversion.pairs == (Pair("norm", reason=OTHER),)
    assert bool(conversion.model.train()(x).isfinite().all())


def test_a_conv_that_changes_its_output_is_not_coupled() -> None:
    class Doubled(nn.Conv2d):
        def forward(self, x: Tensor) -> Tensor:
            return super().forward(x) * 2

    conversion = normswap.convert(net(Doubled(3, 4, 2), nn.BatchNorm2d(4)), images(2, 3, 5, 6))
    why_not = "has no producer: its input does not come straight from a conv or linear layer"
    assert conversion.pairs == (Pair("norm", reason=why_not),)


class Held:
    def __init__(self, **values: Any) -> None:
        vars(self).update(values)


@dataclass
class Nested:
    value: Any


@pytest.mark.parametrize("hold", [lambda raw: Held(raw=raw), lambda raw: UserDict(raw=raw), lambda raw: Nested(Nested(raw))])
def test_a_conv_whose_output_the_model_returns_in_an_object_is_not_coupled(hold: Callable[[Tensor], Any]) -> None:
    # In train mode a coupled conv gives the output of its norm, which the caller would find in the object.
    class Features(Net):
        def forward(self, x: Tensor) -> Any:
            raw = self.layer(x)
            return self.norm(raw), hold(raw)

    model = randomise(Features(nn.Conv2d(3, 5, 3), nn.BatchNorm2d(5), plain), 5).eval()
    converted = normswap.convert(model, images(2, 3, 6, 6))
    assert [pair.producer for pair in converted.pairs] == [None]
    x = images(2, 3, 6, 6)
    (_, trained), (_, evaluated) = converted.model.train()(x), converted.model.eval()(x)
    torch.testing.assert_close(*(next(tensors_in(held)) for held in (trained, evaluated)))
