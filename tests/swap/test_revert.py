"""What `revert` gives back: the recorded layer bit for bit where nothing was trained, sigma^2 - eps where it was."""

from __future__ import annotations

import copy
import io
from typing import Any

import pytest
import torch
from surgery import IMAGE, error, net, swapped
from torch import nn

import normswap
from fixtures.nets import case
from normswap import BatchlessNorm
from normswap.errors import SwapError

X = torch.randn(IMAGE, generator=torch.Generator().manual_seed(3))

SOURCES = [
    "batch_norm_1d",
    "batch_norm_2d",
    "batch_norm_3d",
    "sync_batch_norm",
    "frozen_batch_norm",
    "batch_norm_act",
    "affine_false",
    "momentum_none",
    "eps_0_1",
    "subclass_keeping_forward",
    "root_is_norm",
    "called_twice",
]


def assert_same_layers(back: nn.Module, model: nn.Module) -> None:
    assert list(back.state_dict()) == list(model.state_dict())
    for name, theirs in model.state_dict().items():
        mine = back.state_dict()[name]
        assert mine.dtype == theirs.dtype, name
        assert torch.equal(mine, theirs), name
    for mine, theirs in zip(back.modules(), model.modules(), strict=True):
        assert type(mine) is type(theirs)
        assert mine.training == theirs.training
        assert {n: p.requires_grad for n, p in mine.named_parameters()} == {n: p.requires_grad for n, p in theirs.named_parameters()}
        for name in ("eps", "momentum", "affine", "track_running_stats", "num_features", "process_group"):
            assert getattr(mine, name, "none") == getattr(theirs, name, "none"), name


@pytest.mark.parametrize("std", ["log", "abs", "inv"])
@pytest.mark.parametrize("name", SOURCES)
def test_untrained(name: str, std: str) -> None:
    model = case(name).make()
    for module in model.modules():
        if getattr(module, "num_batches_tracked", None) is not None:
            module.num_batches_tracked.fill_(41)  # type: ignore[operator, union-attr]
    result = swapped(model, *case(name).inputs(), std=std)
    back = normswap.revert(result)
    assert_same_layers(back, model)
    assert any(isinstance(m, BatchlessNorm) for m in result.modules())  # and the converted one is not touched


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64])
def test_untrained_in_other_dtypes(dtype: torch.dtype) -> None:
    model = net(nn.BatchNorm2d(5, eps=1e-3)).to(dtype)
    assert_same_layers(normswap.revert(swapped(model, X.to(dtype))), model)


def test_untrained_after_double() -> None:
    model = net()
    back = normswap.revert(swapped(model, X).double())
    assert_same_layers(back, copy.deepcopy(model).double())


def test_a_float64_model_that_was_moved_to_float32() -> None:
    model = net().double()
    result = swapped(model, X.double()).float()
    back = normswap.revert(result)
    assert {t.dtype for t in (*back.parameters(), *back.buffers()) if t.is_floating_point()} == {torch.float32}
    assert error(result, back, X) <= 1e-6


def test_untrained_after_a_state_dict_round_trip() -> None:
    model = net()
    stream = io.BytesIO()
    torch.save(swapped(model, X).state_dict(), stream)
    stream.seek(0)
    other = net()
    other.norm.running_mean += 1
    other.norm.running_var *= 2
    other.norm.num_batches_tracked += 3
    fresh = swapped(other, X)
    fresh.load_state_dict(torch.load(stream))
    assert_same_layers(normswap.revert(fresh), model)


def test_attributes_come_back() -> None:
    model = net()
    model.norm.tag, model.norm.qconfig = ["mine"], None
    back = normswap.revert(swapped(model, X))
    assert back.norm.tag == ["mine"]
    assert back.norm.tag is not model.norm.tag
    assert back.norm.qconfig is None


def test_hooks_come_back() -> None:
    fired: list[type] = []
    model = net()
    model.norm.register_forward_hook(lambda module, *_: fired.append(type(module)))
    normswap.revert(swapped(model, X))(X)
    assert fired == [nn.BatchNorm2d]


def test_the_reverted_layer_trains_again() -> None:
    back = normswap.revert(swapped(net(), X)).train()
    before = back.norm.running_mean.clone()
    back(X)
    assert not torch.equal(before, back.norm.running_mean)
    assert int(back.norm.num_batches_tracked) == 1


def trained(result: Any, channel: int = 1, factor: float = 1.5) -> Any:
    """One channel's statistics moved."""
    with torch.no_grad():
        result.norm.mean[channel] += 0.25
        result.norm.log_std[channel] += torch.tensor(factor).log()
    return result


def test_trained_channels_are_sigma_squared_minus_eps() -> None:
    model = net(nn.BatchNorm2d(5, eps=0.1))
    result = trained(swapped(model, X))
    back = normswap.revert(result)
    expected = (model.norm.running_var[1].double() + 0.1) * 1.5**2 - 0.1
    assert float(back.norm.running_var[1]) == pytest.approx(float(expected), rel=1e-6)
    assert back.norm.eps == 0.1
    for channel in (0, 2, 3, 4):
        assert torch.equal(back.norm.running_var[channel], model.norm.running_var[channel])
        assert torch.equal(back.norm.running_mean[channel], model.norm.running_mean[channel])
    assert error(result, back, X) <= 1e-6


def test_a_std_below_sqrt_eps_makes_eps_0() -> None:
    result = trained(swapped(net(nn.BatchNorm2d(5, eps=0.5)), X), factor=0.01)
    back = normswap.revert(result)
    assert back.norm.eps == 0.0
    assert bool((back.norm.running_var > 0).all())
    assert error(result, back, X) <= 1e-6


@pytest.mark.parametrize("eps", [1e-5, 1e-3, 0.3, 7.0])
def test_a_dead_channel_does_not_take_eps_away(eps: float) -> None:
    """Its std is sqrt(eps), whose square may be a rounding below eps."""
    model = net(nn.BatchNorm2d(5, eps=eps))
    model.norm.running_var[2:4] = 0.0
    assert_same_layers(normswap.revert(swapped(model, X)), model)
    back = normswap.revert(trained(swapped(model, X)))
    assert back.norm.eps == eps
    assert torch.equal(back.norm.running_var[2:], model.norm.running_var[2:])


def test_trained_weight_and_bias() -> None:
    result = swapped(net(), X)
    with torch.no_grad():
        result.norm.weight += 1
    back = normswap.revert(result)
    assert torch.equal(back.norm.weight, result.norm.weight)
    assert back.norm.weight is not result.norm.weight


def test_without_a_source() -> None:
    result = swapped(net(), X)
    result.second = BatchlessNorm(3)
    result.third = nn.Sequential(BatchlessNorm(3))
    with pytest.raises(SwapError, match=r"^second, third.0 cannot be reverted: no source layer with statistics was recorded") as raised:
        normswap.revert(result)
    assert "--skip (skip=True in Python) reverts the others and leaves these" in str(raised.value)
    back = normswap.revert(result, skip=True)
    assert type(back.norm) is nn.BatchNorm2d
    assert type(back.second) is BatchlessNorm
    assert back.second is not result.second


def test_a_call_in_a_graph_becomes_a_layer() -> None:
    model, (x,) = case("graph_module_functional").make(), case("graph_module_functional").inputs()
    result = swapped(model, x)
    back = normswap.revert(result)
    assert error(model, back, x) == 0
    assert {name for name, _ in back.named_buffers()} == {"batch_norm.running_mean", "batch_norm.running_var"}


def test_nothing_to_revert() -> None:
    model = net()
    back = normswap.revert(model)
    assert_same_layers(back, model)
    assert back is not model
