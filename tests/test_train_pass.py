"""The forward pass in train mode as one function: its derivatives of higher order, in forward mode, and what it asks for."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.autograd import forward_ad

import normswap
from normswap.batchless import BatchlessNorm

pytestmark = pytest.mark.filterwarnings("ignore:.torch.jit.script. is deprecated:DeprecationWarning")  # by torch

F64 = torch.float64


def guarded(channels: int = 3, **options: Any) -> BatchlessNorm:
    torch.manual_seed(0)
    layer = BatchlessNorm(channels, aux="auto", dtype=F64, **options).train()
    layer.guarded = layer.stepped = True
    with torch.no_grad():
        for parameter in layer.parameters():
            parameter.uniform_(0.2, 1.1)
    return layer


LAYERS = {
    "conv": ({}, (5, 3, 4)),
    "channels last": ({"channel_axis": -1}, (2, 4, 3)),
    "without affine": ({"affine": False}, (5, 3, 4)),
    "shared": ({"channel_axis": (1, 3), "shared_axes": (3,), "num_features": (3, 2)}, (5, 3, 4, 2)),
}


def case(kind: str) -> tuple[BatchlessNorm, Tensor]:
    options, shape = LAYERS[kind]
    options = dict(options)
    layer = guarded(options.pop("num_features", 3), **options)  # type: ignore[call-overload]
    x = 3 * torch.randn(shape, dtype=F64) * torch.linspace(0.2, 2, shape[0], dtype=F64).view(-1, *(1,) * (len(shape) - 1))
    return layer, x.requires_grad_()


@pytest.mark.parametrize("kind", LAYERS)
def test_the_second_derivative_by_the_input(kind: str) -> None:
    """With samples that are held, through what they are multiplied with."""
    layer, x = case(kind)
    assert torch.autograd.gradcheck(layer, x)
    assert torch.autograd.gradgradcheck(layer, x)
    assert layer.run.factor is not None
    assert 0 < int((layer.run.factor < 1).sum()) < layer.run.factor.numel()


@pytest.mark.parametrize("kind", LAYERS)
def test_a_backward_pass_over_dual_numbers(kind: str) -> None:
    """Forward over reverse, without torch.func: grad mode is off in backward, and still it is differentiated."""
    layer, x = case(kind)
    along = torch.randn_like(x)

    def gradient(x: Tensor) -> Tensor:
        return torch.autograd.grad(layer(x).pow(3).sum(), x)[0]

    with forward_ad.dual_level():
        found = forward_ad.unpack_dual(gradient(forward_ad.make_dual(x.detach(), along).requires_grad_())).tangent
    ahead, behind = (gradient((x + step * along).detach().requires_grad_()) for step in (1e-6, -1e-6))
    torch.testing.assert_close(found, (ahead - behind) / 2e-6, rtol=1e-6, atol=1e-5)


@pytest.mark.parametrize("held", [True, False])
@pytest.mark.parametrize("kind", ["conv", "channels last"])
def test_forward_mode_by_weight_and_bias(kind: str, held: bool) -> None:
    layer, x = case(kind)
    layer.stepped = held
    values = {name: layer.get_parameter(name).detach() for name in ("weight", "bias")}
    along = {name: torch.randn_like(value) for name, value in values.items()}

    def function(values: dict[str, Tensor]) -> Tensor:
        return torch.func.functional_call(layer, values, (x.detach(),))  # type: ignore[no-any-return]

    value, change = torch.func.jvp(function, (values,), (along,))
    assert torch.equal(value, layer(x))
    moved = {name: v + along[name] for name, v in values.items()}
    torch.testing.assert_close(change, function(moved) - value, rtol=1e-11, atol=1e-11)  # it is linear in them


def test_forward_mode_by_a_producer_is_refused_and_not_left_out() -> None:
    torch.manual_seed(0)
    source = nn.Sequential(nn.Linear(4, 3), nn.BatchNorm1d(3))
    source[1].running_mean.normal_()  # type: ignore[operator, union-attr]
    source[1].running_var.uniform_(0.3, 2)  # type: ignore[operator, union-attr]
    x = torch.randn(6, 4)
    model = normswap.convert(source.eval(), x).model.train()
    weight = model.get_parameter("0.weight").detach()

    def function(weight: Tensor) -> Tensor:
        return torch.func.functional_call(model, {"0.weight": weight}, (x,))  # type: ignore[no-any-return]

    with pytest.raises(NotImplementedError, match="no forward-mode derivative of a BatchlessNorm in train mode by its statistics or its"):
        torch.func.jvp(function, (weight,), (torch.ones_like(weight),))
    model.eval()
    torch.func.jvp(function, (weight,), (torch.ones_like(weight),))


def test_a_gradient_that_is_not_there_still_brings_the_term() -> None:
    """A function after the layer may say that its gradient is none at all."""

    class Nothing(torch.autograd.Function):
        @staticmethod
        def forward(ctx: Any, x: Tensor) -> Tensor:
            return x.clone()

        @staticmethod
        def backward(ctx: Any, gradient: Tensor) -> None:
            return None

    layer, x = case("conv")
    Nothing.apply(layer(x)).sum().backward()  # type: ignore[no-untyped-call]
    for parameter in (layer.mean, layer.std_parameter):
        assert parameter.grad is not None
        assert bool((parameter.grad != 0).all())
    assert layer.weight is not None
    assert layer.weight.grad is None or not layer.weight.grad.any()


@pytest.mark.parametrize("trained", [True, False])
def test_what_is_saved(trained: bool) -> None:
    """The input once, if a gradient asks for it."""
    layer = BatchlessNorm(3, aux="auto")
    assert layer.weight is not None
    layer.weight.requires_grad_(trained)
    saved: list[int] = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: saved.append(t.numel()) or t, lambda t: t):  # type: ignore[func-returns-value]
        layer(torch.randn(6, 3, 40, requires_grad=True)).sum().backward()
    assert sum(size for size in saved if size > 3) == (6 * 3 * 40 if trained else 0)


def net(kinds: list[str]) -> nn.Module:
    torch.manual_seed(1)
    layers: list[nn.Module] = []
    for number, kind in enumerate(kinds):
        i, o = 3 + number, 4 + number
        layers += [nn.Conv2d(i, o, 3, padding=1), nn.BatchNorm2d(o, eps=1e-3 if kind == "eps" else 1e-5), nn.SiLU()]
    source = nn.Sequential(*layers).to(F64)
    for norm in source[1::3]:
        norm.running_mean.normal_()  # type: ignore[operator, union-attr]
        norm.running_var.uniform_(0.3, 2)  # type: ignore[operator, union-attr]
    model = normswap.convert(source.eval(), torch.randn(2, 3, 6, 5, dtype=F64)).model.train()
    for kind, layer in zip(kinds, model[1::3], strict=True):  # type: ignore[index, call-overload]
        if kind == "plain":
            layer.make_plain()
        elif kind == "coupled":
            layer.unsteer()
        elif kind == "slow":
            layer.momentum = 0.03
        elif kind == "raw":
            layer.stats = "raw"
    return model


@pytest.mark.filterwarnings("ignore:an optimizer steps the statistics of a model converted with stats=.raw.")
@pytest.mark.parametrize("clipped", [True, False])
def test_layers_that_step_together_step_as_alone(clipped: bool) -> None:
    """One optimizer for all of them, and one for each with its producer: of the same kind and of other kinds."""
    kinds = ["", "", "plain", "slow", "eps", "coupled", "", "raw", "plain", "raw"]
    together, alone = net(kinds), net(kinds)
    rate = 3.0 if clipped else 0.01
    pairs = [[p for m in alone[at : at + 2] for p in m.parameters()] for at in range(0, len(kinds) * 3, 3)]  # type: ignore[index, call-overload]
    steps = {together: [torch.optim.SGD(together.parameters(), lr=rate, momentum=0.9)]}
    steps[alone] = [torch.optim.SGD(pair, lr=rate, momentum=0.9) for pair in pairs]
    start = {name: value.clone() for name, value in together.state_dict().items()}
    for number in range(3):
        x = torch.randn(5, 3, 6, 5, dtype=F64, generator=torch.Generator().manual_seed(number))
        for model, optimizers in steps.items():
            model.zero_grad()
            (model(x).square().mean() * 10).backward()
            for optimizer in optimizers:
                optimizer.step()
    for name, value in alone.state_dict().items():
        torch.testing.assert_close(together.state_dict()[name], value, rtol=1e-9, atol=1e-11)
        if name.endswith(("mean", "std", "trend")) and "source" not in name:
            assert not torch.equal(value, start[name]), name
