"""One object under two names, in a list, in a bound method, or as a parameter of two layers stays one object."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from surgery import IMAGE, error, net, swapped
from torch import Tensor, nn

import normswap
from fixtures.nets import case, randomise
from normswap import BatchlessNorm
from normswap.models.copying import unclear_names

X = torch.randn(IMAGE, generator=torch.Generator().manual_seed(3))


@pytest.mark.parametrize("name", ["aliased_same_parent", "aliased_two_parents", "aliased_block", "in_module_dict"])
def test_names_and_identities(name: str) -> None:
    """Two names are one object after the swap exactly where they were before."""
    model = case(name).make()
    result = swapped(model, *case(name).inputs())
    back = normswap.revert(result)
    for copied in (result, back):
        assert identities(copied) == identities(model)


def identities(model: nn.Module) -> dict[str, str]:
    """name -> the first name of the same object"""
    first: dict[int, str] = {}
    return {name: first.setdefault(id(module), name) for name, module in model.named_modules(remove_duplicate=False)}


def test_plan_lists_aliases_once() -> None:
    (site,) = normswap.plan(case("aliased_two_parents").make()).swaps
    assert (site.name, site.aliases, site.calls) == ("first.1", ("second.1",), 2)
    (site,) = normswap.plan(case("aliased_block").make()).swaps
    assert (site.name, site.aliases, site.calls) == ("block.1", ("again.1",), 2)


def test_a_list_follows() -> None:
    model, (x,) = case("also_in_list").make(), case("also_in_list").inputs()
    result = swapped(model, x)
    assert result.steps[1] is result.norm
    assert result.steps[0] is result.conv
    assert result.steps[0] is not model.conv


def test_attributes_dicts_and_bound_calls_follow() -> None:
    model = net()
    model.by_name = {"norm": model.norm, "nested": [(model.norm,)]}
    model.norm_call = model.norm.__call__
    model.__dict__["plain"] = model.norm
    result = swapped(model, X)
    assert isinstance(result.norm, BatchlessNorm)
    assert result.by_name["norm"] is result.norm
    assert result.by_name["nested"][0][0] is result.norm
    assert result.plain is result.norm
    assert result.norm_call.__self__ is result.norm
    torch.testing.assert_close(result.norm_call(torch.ones(1, 5, 1, 1)), result.norm(torch.ones(1, 5, 1, 1)))


def test_a_norm_that_only_a_bound_forward_reaches_is_skipped() -> None:
    """Its `forward` is BatchNorm's own function, which needs BatchNorm's tensors."""
    model = net(run=lambda self, x: self.normalize(self.conv(x)))
    model.normalize = model.norm.forward
    decided = normswap.plan(model, X)
    assert decided.swaps == ()
    assert {s.name: s.calls for s in decided.skips} == {"batch_norm": 1, "norm": 0}
    assert error(model, swapped(model, X), X) == 0


def tied(one: Any, two: Any) -> bool:
    return one is two


@pytest.mark.parametrize("std", ["log", "abs", "inv"])
def test_tied_parameters_of_two_norms(std: str) -> None:
    model = net(run=lambda self, x: self.second(self.norm(self.conv(x))))
    model.second = nn.BatchNorm2d(5).eval()
    model.second.weight = model.norm.weight
    result = swapped(model, X, std=std)
    assert tied(result.norm.weight, result.second.weight)
    assert not tied(result.norm.bias, result.second.bias)
    assert result.norm.weight is not model.norm.weight
    assert error(model, result, X) <= 1e-6
    back = normswap.revert(result)
    assert tied(back.norm.weight, back.second.weight)
    assert back.norm.weight is not result.norm.weight
    assert error(model, back, X) == 0


def test_tied_parameters_of_a_norm_and_another_layer() -> None:
    model = net(run=lambda self, x: self.norm(self.conv(x)) * self.scale.view(1, -1, 1, 1) + self.parts[0].view(1, -1, 1, 1))
    model.scale = model.norm.weight
    model.parts = nn.ParameterList([model.norm.bias])
    result = swapped(model, X)
    assert isinstance(result.norm, BatchlessNorm)
    assert tied(result.scale, result.norm.weight)
    assert tied(result.parts[0], result.norm.bias)
    assert error(model, result, X) <= 1e-6


def test_tied_parameters_with_a_norm_that_stays() -> None:
    model = net(run=lambda self, x: self.second(self.norm(self.conv(x))))
    model.second = nn.BatchNorm2d(5).eval()
    model.second.weight = model.norm.weight
    result = swapped(model, X, exclude=("second",))
    assert isinstance(result.second, nn.BatchNorm2d)
    assert tied(result.norm.weight, result.second.weight)
    assert error(model, result, X) <= 1e-6


def test_tied_parameters_of_untouched_layers() -> None:
    model = nn.Sequential(nn.Conv2d(4, 4, 1), nn.BatchNorm2d(4), nn.Conv2d(4, 4, 1)).eval()
    model[2].weight = model[0].weight
    result = swapped(model, X)
    assert tied(result[0].weight, result[2].weight)
    assert [s.producer for s in normswap.plan(model, X).swaps] == [None]  # a fold would change the other layer


def test_a_shared_buffer_stays_shared_where_both_stay() -> None:
    model = nn.Sequential(nn.BatchNorm2d(4), nn.BatchNorm2d(4), nn.BatchNorm2d(4)).eval()
    model[1].running_mean = model[0].running_mean
    result = swapped(model, X, include=("2",))
    assert result[1].running_mean is result[0].running_mean
    assert error(model, swapped(model, X), X) <= 1e-6


def test_the_root_is_the_norm() -> None:
    model = case("root_is_norm").make()
    decided = normswap.plan(model)
    assert [(s.name, s.aliases, s.calls, s.producer) for s in decided.swaps] == [("", (), 1, None)]
    result = swapped(model, *case("root_is_norm").inputs())
    assert type(result) is BatchlessNorm
    assert type(normswap.revert(result)) is nn.BatchNorm2d


# -- a child whose own name has a dot in it, which `setattr` allows and `add_module` refuses ---------------------------------------------


class Dotted(nn.Module):
    """Two norms called a.b, a conv beside them, or a block called x.y: what `names` says."""

    def __init__(self, names: str, branch: bool) -> None:
        super().__init__()
        self.names, self.branch = names, branch
        self.a, self.conv, self.last = nn.Module(), nn.Conv2d(3, 4, 1), nn.BatchNorm2d(4)
        if names == "norms":
            self.a.b = nn.BatchNorm2d(3)
            setattr(self, "a.b", nn.BatchNorm2d(3))
        elif names == "convs":
            self.a.b = nn.Conv2d(3, 3, 1)
            setattr(self, "a.b", nn.Conv2d(3, 3, 1))
        elif names == "one":
            setattr(self, "a.b", nn.BatchNorm2d(3))
        else:
            setattr(self, "x.y", nn.Sequential(nn.Conv2d(3, 3, 1), nn.BatchNorm2d(3)))

    def forward(self, x: Tensor) -> Tensor:
        if self.branch and x.sum() > 1e9:  # torch.fx cannot trace it
            return x
        if self.names in ("norms", "convs"):
            x = self.a.b(x)
        inner = self._modules["x.y" if self.names == "block" else "a.b"]
        return self.last(self.conv(inner(x)))  # type: ignore[misc,no-any-return]


NO_WAY = "cannot be found by its name {}, as there is a child whose own name has a dot in it: rename that child"
TWICE = "shares the name a.b with another module, as there is a child whose own name has a dot in it: rename that child"


@pytest.mark.parametrize("branch", [False, True])
@pytest.mark.parametrize(
    ("names", "skips"),
    [
        ("norms", [("a.b", TWICE), ("a.b", TWICE)]),
        ("convs", []),
        ("one", [("a.b", NO_WAY.format("a.b"))]),
        ("block", [("x.y.1", NO_WAY.format("x.y.1"))]),
    ],
)
def test_a_dot_in_the_name_of_a_child(names: str, skips: list[tuple[str, str]], branch: bool) -> None:
    """Every norm is listed, none is mistaken for another, and the rest goes on."""
    model = randomise(Dotted(names, branch), 4).eval()
    x = torch.randn(2, 3, 5, 5)
    conversion = normswap.convert(model, x)
    for decided in (normswap.plan(model, x), normswap.inspect(model, x)[0], conversion.plan):
        assert [(skip.name, skip.reason) for skip in decided.skips] == skips
        assert [swap.name for swap in decided.swaps] == ["last"]
    assert [pair.producer for pair in conversion.pairs] == ["conv"]
    torch.testing.assert_close(conversion.model(x), model(x))


def test_a_conv_that_shares_its_name_is_no_producer() -> None:
    class Net(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.a, self.norm = nn.Module(), nn.BatchNorm2d(4)
            self.a.b = nn.Conv2d(3, 4, 1)
            setattr(self, "a.b", nn.Conv2d(4, 5, 1))

        def forward(self, x: Tensor) -> Tensor:
            return self._modules["a.b"](self.norm(self.a.b(x)))  # type: ignore[misc,no-any-return]

    conversion = normswap.convert(randomise(Net(), 1).eval(), torch.randn(2, 3, 5, 5))
    assert [(pair.name, pair.producer) for pair in conversion.pairs] == [("norm", None)]


def test_names_without_a_dot_are_clear() -> None:
    assert unclear_names(nn.ModuleDict({"a_b": nn.Sequential(nn.ReLU()), "a": nn.ModuleDict({"b": nn.ReLU()})})) == {}
