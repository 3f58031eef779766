"""What the back-ends see: calls, order, producers, readers, functional norms, and which of them saw it."""

from __future__ import annotations

import dataclasses
import functools
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from surgery import IMAGE, error, net, swapped, untraceable
from torch import Tensor, nn

import normswap
from fixtures.nets import case, randomise

X = torch.randn(IMAGE, generator=torch.Generator().manual_seed(3))
BOTH = pytest.mark.parametrize("backend", ["fx", "walk"])


def planned(backend: str, run: Any, norm: nn.Module | None = None, **parts: nn.Module) -> Any:
    """The plan of a net with this forward, by the back-end that is asked for."""
    model = net(norm, run if backend == "fx" else untraceable(run))
    for name, part in parts.items():
        setattr(model, name, randomise(part, 3).eval())
    found = normswap.plan(model, X)
    assert found.backend == backend
    assert bool(found.notes) == (backend == "walk")
    return found


# -- producers -----------------------------------------------------------------------------------------------------------------

HAS_A_PRODUCER: dict[str, tuple[Any, dict[str, nn.Module]]] = {
    "conv": (lambda s, x: s.norm(s.conv(x)), {}),
    "by keyword": (lambda s, x: s.norm(input=s.conv(input=x)), {}),
    "transposed": (lambda s, x: s.norm(s.up(x)), {"up": nn.ConvTranspose2d(4, 5, 2)}),
    "in a block": (lambda s, x: s.norm(s.block(x)), {"block": nn.Sequential(nn.ReLU(), nn.Conv2d(4, 5, 1))}),
    "activation after": (lambda s, x: F.relu(s.norm(s.conv(x)), inplace=True), {}),
    "norm read twice": (lambda s, x: (lambda y: y + y.relu())(s.norm(s.conv(x))), {}),
    "identity of the conv's input": (lambda s, x: s.norm(s.conv(x)).mean((2, 3)) + x.mean(), {}),
}
PRODUCERS = {"transposed": "up", "in a block": "block.1"}

HAS_NONE: dict[str, tuple[Any, dict[str, nn.Module]]] = {
    "conv has another reader": (lambda s, x: (lambda y: s.norm(y) + y)(s.conv(x)), {}),
    "conv is also an output": (lambda s, x: (lambda y: (s.norm(y), y))(s.conv(x)), {}),
    "conv is also an output in a dict": (lambda s, x: (lambda y: {"a": s.norm(y), "b": [y]})(s.conv(x)), {}),
    "two norms of one conv": (lambda s, x: (lambda y: s.norm(y) + s.other(y))(s.conv(x)), {"other": nn.BatchNorm2d(5)}),
    "conv called twice": (lambda s, x: s.norm(s.conv(x)) + s.conv(x * 2), {}),
    "norm called twice": (lambda s, x: s.norm(s.conv(x)) + s.norm(s.other(x)), {"other": nn.Conv2d(4, 5, 3)}),
    "activation between": (lambda s, x: s.norm(F.relu(s.conv(x))), {}),
    "activation in place between": (lambda s, x: s.norm(F.relu(s.conv(x), inplace=True)), {}),
    "module in place beside": (lambda s, x: (lambda y: (s.act(y), s.norm(y))[1])(s.conv(x)), {"act": nn.ReLU(inplace=True)}),
    "method in place": (lambda s, x: s.norm(s.conv(x).add_(1)), {}),
    "view between": (lambda s, x: s.norm(s.conv(x).flatten(2).unflatten(2, (7, 5))), {}),
    "weight read elsewhere": (lambda s, x: s.norm(s.conv(x)) * s.conv.weight.mean(), {}),
    "no conv at all": (lambda s, x: s.other(x), {"other": nn.BatchNorm2d(4)}),
    "embedding of a norm": (lambda s, x: s.other(s.norm(s.conv(x))), {"other": nn.BatchNorm2d(5)}),
}


@BOTH
@pytest.mark.parametrize("what", HAS_A_PRODUCER)
def test_producer(what: str, backend: str) -> None:
    run, parts = HAS_A_PRODUCER[what]
    (site, *_) = planned(backend, run, **parts).swaps
    assert site.producer == PRODUCERS.get(what, "conv")


@BOTH
@pytest.mark.parametrize("what", HAS_NONE)
def test_no_producer(what: str, backend: str) -> None:
    run, parts = HAS_NONE[what]
    found = planned(backend, run, **parts).swaps
    last = {"embedding of a norm": found[-1:]}.get(what, [s for s in found if s.calls])
    assert [s.producer for s in last] == [None] * len(last)
    assert last


@BOTH
def test_linear_is_a_producer(backend: str) -> None:
    run = lambda s, x: s.bn(s.linear(x.flatten(1)))  # noqa: E731
    (site, _) = planned(backend, run, linear=nn.Linear(252, 6), bn=nn.BatchNorm1d(6)).swaps
    assert (site.name, site.producer) == ("bn", "linear")


def _write(s: Any, x: Tensor) -> Tensor:
    y = s.conv(x)
    y[:, 0] = 0
    return s.norm(y)


def test_a_conv_whose_output_is_written_into() -> None:
    """`y[:, 0] = 0` returns nothing, and yet it is a use. fx cannot trace it."""
    found = normswap.plan(net(run=_write), X)
    assert (found.backend, found.swaps[0].producer) == ("walk", None)


def test_a_conv_whose_output_is_only_measured() -> None:
    """Shapes and dtypes are not uses: a fold does not change them."""
    (site,) = planned("walk", lambda s, x: (lambda y: s.norm(y).view(y.shape[0], y.size(1), -1))(s.conv(x))).swaps
    assert site.producer == "conv"


@dataclasses.dataclass
class Output:
    features: Tensor
    normed: Tensor


def test_a_conv_whose_output_leaves_in_an_object() -> None:
    model = net(run=untraceable(lambda s, x: (lambda y: Output(y, s.norm(y)))(s.conv(x))))
    (site,) = normswap.plan(model, X).swaps
    assert site.producer is None


def _hooked(conv: nn.Conv2d) -> None:
    conv.register_forward_hook(lambda module, args, output: output * 2)


def _forward_of_its_own(conv: nn.Conv2d) -> None:
    conv.forward = functools.partial(nn.Conv2d.forward, conv)  # type: ignore[method-assign]


@BOTH
@pytest.mark.parametrize(
    "change", [_hooked, _forward_of_its_own, torch.nn.utils.parametrizations.weight_norm, torch.nn.utils.parametrizations.spectral_norm]
)
def test_a_conv_that_does_more_is_no_producer(change: Any, backend: str) -> None:
    run = lambda s, x: s.norm(s.conv(x))  # noqa: E731
    model = net(run=run if backend == "fx" else untraceable(run))
    change(model.conv)
    found = normswap.plan(model, X)
    assert found.backend == backend
    assert [s.producer for s in found.swaps] == [None]
    assert found.skips == ()  # a norm of a weight is no norm of the model


# -- calls and order -----------------------------------------------------------------------------------------------------------


@BOTH
def test_execution_order_and_calls(backend: str) -> None:
    run = lambda s, x: s.c(s.a(s.c(s.norm(s.conv(x)))))  # noqa: E731
    found = planned(backend, run, unused=nn.BatchNorm2d(5), a=nn.BatchNorm2d(5), b=nn.LayerNorm(5), c=nn.BatchNorm2d(5))
    assert [(s.name, s.calls) for s in found.swaps] == [("norm", 1), ("c", 2), ("a", 1), ("unused", 0)]
    assert [(s.name, s.calls) for s in found.skips] == [("b", 0)]


def test_norms_inside_layers_of_torch_nn_are_seen() -> None:
    """fx takes everything under torch.nn for one node, and so would count no call of what is inside."""
    model = nn.Sequential(nn.TransformerEncoderLayer(8, 2, 16, batch_first=True)).eval()
    found = normswap.plan(model, torch.randn(3, 5, 8))
    assert [(s.name, s.calls) for s in found.skips] == [("0.norm1", 1), ("0.norm2", 1)]


# -- functional norms ----------------------------------------------------------------------------------------------------------

FUNCTIONAL = {
    "layer_norm": lambda s, x: F.layer_norm(x, [7]),
    "group_norm": lambda s, x: F.group_norm(x, 2),
    "instance_norm": lambda s, x: F.instance_norm(x),
    "rms_norm": lambda s, x: F.rms_norm(x, [7]),
    "batch_norm": lambda s, x: F.batch_norm(x, None, None, training=True),
    "batch_norm by torch": lambda s, x: torch.batch_norm(x, None, None, None, None, True, 0.1, 1e-5, False),
    "layer_norm by torch": lambda s, x: torch.layer_norm(x, [7]),
}


@BOTH
@pytest.mark.parametrize("kind", FUNCTIONAL)
def test_functional_norms_in_code(kind: str, backend: str) -> None:
    found = planned(backend, lambda s, x: s.norm(s.conv(FUNCTIONAL[kind](s, x))))
    (skip,) = found.skips
    assert skip.kind == kind.partition(" ")[0]
    assert skip.calls == 1
    if backend == "walk":  # what keeps the whole from being traced is in the same code
        assert skip.reason.startswith(f"is a call of {skip.site.function} in the code of Net, which cannot be rewritten because torch.fx ")
        assert skip.reason.endswith("; make it a layer")
    else:
        assert skip.reason.endswith("; ask for an approximate one with approximate=True and calibration=... (--approximate, --data)")


@BOTH
def test_a_weight_that_is_standardised_is_no_norm_of_the_model(backend: str) -> None:
    def run(s: Any, x: Tensor) -> Tensor:
        weight = F.batch_norm(s.conv.weight.reshape(1, 5, -1), None, None, training=True).reshape_as(s.conv.weight)
        y: Tensor = s.norm(F.conv2d(x, weight))
        return y

    found = planned(backend, run)
    assert [s.name for s in (*found.swaps, *found.skips)] == ["norm"]


class Block(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return F.layer_norm(F.layer_norm(x, [7]), [7])


@BOTH
def test_functional_norms_are_named_after_their_owner(backend: str) -> None:
    found = planned(backend, lambda s, x: s.norm(s.conv(s.block(x))), block=Block())
    assert [s.name for s in found.skips] == ["block.layer_norm", "block.layer_norm_1"]


@BOTH
def test_a_functional_norm_has_a_producer(backend: str) -> None:
    (skip, *_) = planned(backend, lambda s, x: F.layer_norm(s.conv(x), [5])).skips
    assert skip.producer == "conv"


# -- readers of statistics -----------------------------------------------------------------------------------------------------

READERS = {
    "functional": lambda s, x: F.batch_norm(s.conv(x), s.norm.running_mean, s.norm.running_var, s.norm.weight, s.norm.bias, eps=1e-5),
    "besides a call": lambda s, x: s.norm(s.conv(x)) + s.norm.running_mean.view(1, -1, 1, 1),
    "folded by hand": lambda s, x: s.conv(x) * (s.norm.weight / (s.norm.running_var + 1e-5).sqrt()).view(1, -1, 1, 1),
    "shape": lambda s, x: s.conv(x).view(3, s.norm.running_mean.shape[0], -1),
    "forward called directly": lambda s, x: s.norm.forward(s.conv(x)),
}


@BOTH
@pytest.mark.parametrize("what", READERS)
def test_a_norm_whose_statistics_are_read_is_skipped(what: str, backend: str) -> None:
    """Its replacement has no running_mean, so the code would raise."""
    run = READERS[what]
    model = net(run=run if backend == "fx" else untraceable(run))
    decided = normswap.plan(model, X)
    (skip,) = [s for s in decided.skips if s.name == "norm"]
    assert "reads directly instead of calling the layer" in skip.reason
    # A call that reads them is a norm itself, whose code can be rewritten if it can be traced.
    rewritten = what == "functional" and backend == "fx"
    assert [s.name for s in decided.swaps] == (["batch_norm"] if rewritten else [])
    assert error(model, swapped(model, X), X) <= (1e-6 if rewritten else 0)


@BOTH
def test_a_norm_whose_weight_is_read_is_swapped(backend: str) -> None:
    run = lambda s, x: s.norm(s.conv(x)) * s.norm.weight.view(1, -1, 1, 1)  # noqa: E731
    model = net(run=run if backend == "fx" else untraceable(run))
    assert len(normswap.plan(model, X).swaps) == 1
    assert error(model, swapped(model, X), X) <= 1e-6


# -- the ladder ----------------------------------------------------------------------------------------------------------------


def test_fx_needs_no_inputs() -> None:
    found = normswap.plan(nn.Sequential(nn.BatchNorm2d(4)), rules=normswap.DEFAULT_RULES)
    assert (found.backend, found.notes) == ("fx", ())


def test_walk_says_why() -> None:
    found = normswap.plan(case("shape_branch").make(), case("shape_branch").inputs())
    assert found.backend == "walk"
    assert found.notes == (
        "torch.fx could not trace the model: TypeError: float() argument must be a string or a real number, not 'Proxy'",
    )


def test_a_forward_that_fails_gives_a_note_and_every_norm() -> None:
    def run(s: Any, x: Tensor) -> Tensor:
        y = s.norm(s.conv(x))
        if float(x.sum()) < 1e9:
            raise ValueError("no such thing\nas a second line")
        return s.other(y)

    model = net(run=run)
    model.other = nn.BatchNorm2d(5).eval()
    found = normswap.plan(model, X)
    assert found.backend == "walk"
    assert (
        found.notes[1]
        == "the forward pass stopped early, so calls after that point were not seen: ValueError: no such thing; give inputs that it takes"
    )
    assert [(s.name, s.calls) for s in found.swaps] == [("norm", 1), ("other", 0)]


def test_without_inputs_names_remain() -> None:
    class TakesTwo(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.norm = nn.BatchNorm2d(5)

        def forward(self, x: Tensor, factor: float) -> Tensor:
            return self.norm(x) if float(x.sum()) > factor else x

    found = normswap.plan(TakesTwo().eval())
    assert found.backend == "names"
    assert (
        found.notes[1]
        == "no example inputs are known, so no forward pass was watched: calls and functional norms are unknown; give example inputs"
    )
    assert [(s.name, s.calls, s.producer) for s in found.swaps] == [("norm", None, None)]


def test_a_forward_of_the_object_is_the_one_that_counts() -> None:
    model = net()
    model.forward = functools.partial(lambda self, x: self.norm(self.norm(self.conv(x))), model)
    found = normswap.plan(model, X)
    assert (found.backend, found.swaps[0].calls) == ("walk", 2)
    assert found.notes == ("torch.fx cannot trace the model: it reads the forward of the class, and this object has one of its own",)


def test_a_compiled_model_is_watched_and_not_compiled() -> None:
    found = normswap.plan(torch.compile(net(), backend=_never), X)  # type: ignore[arg-type]
    assert [(s.name, s.calls, s.producer) for s in found.swaps] == [("_orig_mod.norm", 1, "_orig_mod.conv")]


def _never(graph: Any, inputs: Any) -> Any:
    raise AssertionError("compiled")


def test_plan_is_the_same_twice_and_keeps_the_random_state() -> None:
    def run(s: Any, x: Tensor) -> Tensor:
        return s.norm(s.conv(x)) + torch.rand(())

    for forward in (run, untraceable(run)):
        model, before = net(run=forward), torch.get_rng_state()
        assert normswap.plan(model, X).swaps == normswap.plan(model, X).swaps
        assert torch.equal(before, torch.get_rng_state())


@BOTH
def test_a_norm_free_model_is_a_success(backend: str) -> None:
    run = lambda s, x: s.conv(x)  # noqa: E731
    found = planned(backend, run, norm=nn.Identity())
    assert (found.swaps, found.skips) == ((), ())


def test_a_conv_that_only_builds_itself_otherwise_is_a_producer() -> None:
    class Conv1x1(nn.Conv2d):
        def __init__(self, inputs: int, outputs: int) -> None:
            super().__init__(inputs, outputs, 1, bias=False)

    class Standardised(nn.Conv2d):
        def forward(self, input: Tensor) -> Tensor:
            return self._conv_forward(input, self.weight - self.weight.mean(), self.bias)

    class Doubled(nn.Conv2d):
        def _conv_forward(self, input: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
            return super()._conv_forward(input, weight * 2, bias)

    def producer(conv: nn.Conv2d) -> str | None:
        return normswap.plan(nn.Sequential(conv, nn.BatchNorm2d(5))).swaps[0].producer

    assert producer(Conv1x1(3, 5)) == "0"
    assert producer(Standardised(3, 5, 1)) is None
    assert producer(Doubled(3, 5, 1)) is None
