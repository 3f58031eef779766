"""The forward pass in train mode as one function: its derivatives of higher order, in forward mode, and what it asks for."""

from __future__ import annotations

import contextlib
import copy
from typing import Any

import pytest
import torch
from producers import KINDS, PRODUCERS
from torch import Tensor, nn
from torch.autograd import forward_ad

import normswap
from normswap.layer.batchless_norm import BatchlessNorm

pytestmark = pytest.mark.filterwarnings("ignore:.torch.jit.script. is deprecated:DeprecationWarning")  # by torch

F64 = torch.float64


def limiting(channels: int = 3, **options: Any) -> BatchlessNorm:
    torch.manual_seed(0)
    layer = BatchlessNorm(channels, aux="auto", dtype=F64, **options).train()
    layer.limits_samples = layer.stepped = True
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
    layer = limiting(options.pop("num_features", 3), **options)  # type: ignore[call-overload]
    x = 3 * torch.randn(shape, dtype=F64) * torch.linspace(0.2, 2, shape[0], dtype=F64).view(-1, *(1,) * (len(shape) - 1))
    return layer, x.requires_grad_()


@pytest.mark.parametrize("kind", LAYERS)
def test_the_second_derivative_by_the_input(kind: str) -> None:
    """With samples that are limited, through their factors."""
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
    torch.testing.assert_close(found, (ahead - behind) / 2e-6, rtol=0, atol=1e-8)  # rounding of up to 10, over 2e-6


@pytest.mark.parametrize("limited", [True, False])
@pytest.mark.parametrize("kind", ["conv", "channels last"])
def test_forward_mode_by_weight_and_bias(kind: str, limited: bool) -> None:
    layer, x = case(kind)
    layer.stepped = limited
    values = {name: layer.get_parameter(name).detach() for name in ("weight", "bias")}
    along = {name: torch.randn_like(value) for name, value in values.items()}

    def function(values: dict[str, Tensor]) -> Tensor:
        return torch.func.functional_call(layer, values, (x.detach(),))  # type: ignore[no-any-return]

    value, change = torch.func.jvp(function, (values,), (along,))
    assert torch.equal(value, layer(x))
    moved = {name: v + along[name] for name, v in values.items()}
    torch.testing.assert_close(change, function(moved) - value, rtol=0, atol=1e-14)  # it is linear in them; rounding of up to 15


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


@pytest.mark.parametrize("batch", [1, 2])
@pytest.mark.parametrize("limited", [False, True])
def test_the_strides_of_the_input_stay(limited: bool, batch: int) -> None:
    """Also of one sample, where others are the same to `is_contiguous`: with these convolution_backward of torch 2.13 is wrong."""
    layer = limiting(8)
    layer.stepped = limited
    layer.enable_trend()
    x = torch.randn(batch, 8, 5, 6, dtype=F64).to(memory_format=torch.channels_last).requires_grad_()
    hidden = nn.Conv2d(8, 8, 3, groups=4, dtype=F64).to(memory_format=torch.channels_last)(x)
    y = layer(hidden)
    (by,) = torch.autograd.grad(y.square().sum(), hidden)
    assert hidden.is_contiguous(memory_format=torch.channels_last)
    assert y.stride() == by.stride() == hidden.stride()


def net(kinds: list[str]) -> nn.Module:
    torch.manual_seed(1)
    layers: list[nn.Module] = []
    for number, kind in enumerate(kinds):
        i, o = 3 + number, 4 + number
        layers += [nn.Conv2d(i, o, 3, padding=1), nn.BatchNorm2d(o, eps=1e-3 if kind == "eps" else 1e-5), nn.SiLU()]
    source = nn.Sequential(*layers).to(F64)
    for kind, norm in zip(kinds, source[1::3], strict=True):
        norm.running_mean.normal_()  # type: ignore[operator, union-attr]
        norm.running_var.uniform_(0.3, 2)  # type: ignore[operator, union-attr]
        if kind == "eps":
            norm.running_var.fill_(5e-4)  # type: ignore[operator, union-attr]  # less than half of its std, and far more than another's
    model = normswap.convert(source.eval(), torch.randn(2, 3, 6, 5, dtype=F64)).model.train()
    for kind, layer in zip(kinds, model[1::3], strict=True):  # type: ignore[index, call-overload]
        if kind == "plain":
            layer.make_plain()
        elif kind == "coupled":
            layer.disable_trend()
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

    def groups(model: Any) -> list[dict[str, Any]]:
        """A conv and its norm each, every other one at another rate."""
        pairs = [[p for m in model[at : at + 2] for p in m.parameters()] for at in range(0, 3 * len(kinds), 3)]
        return [{"params": both, "lr": rate / (1 if number % 2 else 50)} for number, both in enumerate(pairs)]

    steps = {together: [torch.optim.SGD(groups(together), momentum=0.9)]}
    steps[alone] = [torch.optim.SGD([group], momentum=0.9) for group in groups(alone)]
    start = {name: value.clone() for name, value in together.state_dict().items()}
    for number in range(3):
        x = torch.randn(5, 3, 6, 5, dtype=F64, generator=torch.Generator().manual_seed(number))
        for model, optimizers in steps.items():
            model.zero_grad()
            (model(x).square().mean() * 10).backward()
            for optimizer in optimizers:
                optimizer.step()
    for name, value in alone.state_dict().items():
        torch.testing.assert_close(together.state_dict()[name], value, rtol=0, atol=0)
        if name.endswith(("mean", "std", "trend")) and "source" not in name:
            assert not torch.equal(value, start[name]), name


# --- derivatives of derivatives, through a producer ---------------------------------------------------------------------------------------


def coupled(*, limited: bool = False, kind: str = "grouped") -> tuple[Any, Tensor]:
    torch.manual_seed(2)
    producer = nn.Linear(6, 9) if kind == "linear" else nn.Conv2d(6, 9, 3, padding=1, groups=3)
    norm: Any = nn.BatchNorm1d(9) if kind == "linear" else nn.BatchNorm2d(9)
    norm.running_mean.normal_()
    norm.running_var.uniform_(0.3, 2)
    nn.init.normal_(norm.weight)
    x = 2 * torch.randn(7, 6, *(() if kind == "linear" else (5, 4)), dtype=F64)
    source = nn.Sequential(producer, norm, nn.SiLU()).to(F64).eval()
    model: Any = normswap.convert(source, x[:3], calibration=[x]).model.train()
    model[1].aux, model[1].stepped = "none", limited
    return model, x


@pytest.mark.parametrize("kind", ["linear", "grouped"])
@pytest.mark.parametrize("limited", [False, True])
@pytest.mark.parametrize("by", ["input", "weights"])
def test_a_gradient_penalty_reaches_the_producer(by: str, limited: bool, kind: str) -> None:
    """Against differences, with the statistics moved along as the formulas say."""
    model, x = coupled(limited=limited, kind=kind)
    conv, norm = model[0], model[1]
    direction = torch.randn(conv.weight.shape, dtype=F64)

    def penalty() -> Tensor:
        inputs = x.clone().requires_grad_()
        leaves = [inputs] if by == "input" else [conv.weight, norm.weight]
        return torch.stack([g.square().sum() for g in torch.autograd.grad(model(inputs).pow(3).mean(), leaves, create_graph=True)]).sum()

    penalty().backward()  # type: ignore[no-untyped-call]
    found = float((conv.weight.grad * direction).sum())
    around = []
    for step in (1e-5, -1e-5):
        moved = copy.deepcopy(model)
        with torch.no_grad():
            moved[1].snapshot()
            moved[0].weight.add_(step * direction)  # mean and std follow in the next pass
        original, model = model, moved
        conv, norm = model[0], model[1]
        around.append(float(penalty().detach()))
        model = original
    assert found == pytest.approx((around[0] - around[1]) / 2e-5, rel=1e-6)  # what a difference leaves out
    assert limited == (norm.run.factor is not None and bool((norm.run.factor < 1).any()))


@pytest.mark.parametrize("limited", [False, True])
def test_the_gradient_of_a_derivative_in_forward_mode(limited: bool) -> None:
    model, x = coupled(limited=limited)
    along = torch.randn_like(x)

    def function(x: Tensor) -> Tensor:
        return torch.func.jvp(lambda x: model(x).pow(2).mean(), (x,), (along,))[1]  # type: ignore[no-any-return]

    found = torch.func.grad(function)(x)
    direction = torch.randn_like(x)
    expected = (function(x + 1e-6 * direction) - function(x - 1e-6 * direction)) / 2e-6
    torch.testing.assert_close((found * direction).sum(), expected, rtol=1e-8, atol=0)  # rounding of 1, over 2e-6 and the result


# --- what does not count ------------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("limits", [False, True])
def test_what_is_masked_may_be_nan(limits: bool) -> None:
    """No gradient but that of the masked places sees it, as no gradient comes to these."""
    layer, _ = case("conv")
    layer.stepped = limits
    layer.enable_trend()
    x = torch.randn(4, 3, 6, dtype=F64) * torch.tensor([0.3, 0.3, 5, 5], dtype=F64).view(4, 1, 1)
    mask = torch.ones(4, 6, dtype=torch.bool)
    mask[0, 4:] = mask[2, :2] = False
    found = []
    for value in (torch.nan, 0.7):
        layer.zero_grad()
        spoilt = torch.where(mask[:, None], x, value).requires_grad_()
        with normswap.masked(layer, mask):
            torch.where(mask[:, None], layer(spoilt), 0).pow(3).sum().backward()
        assert spoilt.grad is not None
        found.append([spoilt.grad, *(p.grad for p in layer.parameters())])
    for one, other in zip(*found, strict=True):
        torch.testing.assert_close(one, other, rtol=0, atol=0)


def test_under_a_mask_of_everything_no_digit_is_lost() -> None:
    """With a share that float32 does not have: a third."""
    layer, x = case("conv")
    layer.enable_trend()
    with torch.no_grad():
        layer.trend.normal_()
    normswap.attach(layer, accumulate=3)
    found = []
    for mask in (None, torch.ones(5, 4, dtype=torch.bool)):
        layer.zero_grad()
        with normswap.masked(layer, mask) if mask is not None else contextlib.nullcontext():
            layer(x.detach()).pow(2).sum().backward()
        found.append({name: p.grad for name, p in layer.named_parameters()})
    for name, value in found[0].items():
        torch.testing.assert_close(found[1][name], value, rtol=0, atol=0)


def test_the_sums_of_samples_are_saved_for_a_producer_alone() -> None:
    """With channels last, where every place is a sample, they are as large as the input."""
    saved: list[int] = []
    layer, x = case("channels last")
    with torch.autograd.graph.saved_tensors_hooks(lambda t: saved.append(t.numel()) or t, lambda t: t):  # type: ignore[func-returns-value]
        layer(x).sum().backward()
    assert sum(size == x.numel() for size in saved) == 1


# --- in compiled graphs -----------------------------------------------------------------------------------------------------------------


def _coupled_net(kind: str) -> tuple[nn.Module, torch.Tensor]:
    """A producer and its layer, where samples are limited and the trend takes something out."""
    torch.manual_seed(0)
    make, shape = PRODUCERS[kind]
    producer, x = make().double(), 30 * torch.randn(shape, dtype=F64)
    layer = limiting(producer(x).shape[1])
    layer.couple(producer, torch.randn(shape[1], dtype=F64))
    layer.enable_trend()
    with torch.no_grad():
        layer.trend.normal_()  # type: ignore[union-attr]
    return nn.Sequential(producer, layer).train(), x


# By default those that a graph could get wrong each in a way of its own: no places, padding on one side, padding of another mode, and a
# weight whose groups lie crosswise. Each takes seconds to compile.
COMPILED = ("linear", "conv2d same", "conv2d reflect", "transposed grouped")


@pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::FutureWarning", "ignore:Using padding='same':UserWarning")
@pytest.mark.parametrize("kind", [pytest.param(kind, marks=[] if kind in COMPILED else [pytest.mark.slow]) for kind in KINDS])
def test_a_compiled_pass_has_the_gradients_of_one_that_is_not(kind: str) -> None:
    torch._dynamo.reset()
    model, x = _coupled_net(kind)
    other = copy.deepcopy(model)
    found = []
    for run, own in ((model, model), (torch.compile(other, fullgraph=True, backend="aot_eager"), other)):
        given = x.clone().requires_grad_()
        y = run(given)
        (y * torch.linspace(-1, 2, y.numel(), dtype=F64).view(y.shape)).sum().backward()
        found.append([y.detach(), given.grad, *(p.grad for p in own.parameters())])
    assert bool((model[1].run.factor < 1).any())
    assert len(found[0]) == len([*model.parameters()]) + 2
    for plain, compiled in zip(*found, strict=True):
        torch.testing.assert_close(compiled, plain, rtol=1e-12, atol=1e-12)
    torch._dynamo.reset()


@pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::FutureWarning")
@pytest.mark.parametrize(("kind", "stored"), [("grouped", (1, 2)), ("linear", (0, 1))])
def test_a_compiled_graph_computes_numbers_per_channel_once(kind: str, stored: tuple[int, int]) -> None:
    """Those of the layer in forward and backward, and those of the producer's weight. (A linear has one place for each of the layer's.)"""
    from functorch.compile import make_boxed_func
    from torch._dynamo.backends.common import aot_autograd

    graphs = []

    def kept(graph: torch.fx.GraphModule, _: object) -> Any:
        graphs.append([str(node.target) for node in graph.graph.nodes])
        return make_boxed_func(graph.forward)

    torch._dynamo.reset()
    model, x = _coupled_net(kind)
    torch.compile(model, backend=aot_autograd(fw_compiler=kept, bw_compiler=kept))(x).square().sum().backward()
    assert tuple(sum("cumsum" in target for target in targets) for targets in graphs) == stored
    torch._dynamo.reset()
