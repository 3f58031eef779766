"""The ONNX file of a model with RMSNorms in the place of LayerNorms: their biases go into the layers after them."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from exported import assert_same
from torch import Tensor, nn

import normswap
from normswap.layer.rms_norm import RMSNorm

OPERATORS = {20: "ReduceMean", 23: "RMSNormalization"}


def rms(channels: int, **options: Any) -> RMSNorm:
    """With a gain of both signs, one of them zero, and a bias."""
    weight, bias = torch.randn(channels), torch.randn(channels)
    weight[channels // 2] = 0
    return RMSNorm(channels, 1e-3, **{"weight": weight, "bias": bias, **options})


class Block(nn.Module):
    """A residual block; `also`: whether something else reads what the norm puts out."""

    def __init__(self, also: bool = False, **options: Any) -> None:
        super().__init__()
        self.norm, self.up, self.down, self.also = rms(7, **options), nn.Linear(7, 5), nn.Linear(5, 7, bias=False), also

    def forward(self, x: Tensor) -> Tensor:
        y = self.norm(x)
        return x + self.down(self.up(y).relu()) + (y.tanh() if self.also else 0)


@pytest.fixture
def path(tmp_path: Path) -> Path:
    return tmp_path / "model.onnx"


@pytest.mark.parametrize("opset", [None, 20])
def test_the_bias_goes_into_the_layer_after_it(opset: int | None, path: Path) -> None:
    model, x = nn.Sequential(Block(), Block(), nn.Linear(7, 4)).eval(), torch.randn(2, 6, 7)
    result = normswap.export_onnx(model, x, path, opset=opset)
    assert result.opset == (opset or 23)
    assert [(bias.name, bias.how, bias.left) for bias in result.biases] == [(f"{n}.norm.bias", "into_consumers", ()) for n in (0, 1)]
    assert (result.sites, result.extra) == ((), {})
    assert result.nodes[OPERATORS[result.opset]] == 2
    # two residual sums, and the biases of `up` and of the head; in opset 20 also two sums with eps, and no gain
    assert result.nodes["Add"] == {23: 5, 20: 7}[result.opset]
    assert result.nodes.get("Mul", 0) == {23: 0, 20: 2}[result.opset]
    assert_same(model, path, (torch.randn(3, 6, 7),))


@pytest.mark.parametrize("opset", [None, 20])
def test_it_stays_where_something_else_reads_it(opset: int | None, path: Path) -> None:
    model, x = nn.Sequential(Block(also=True), nn.Linear(7, 4)).eval(), torch.randn(2, 6, 7)
    result = normswap.export_onnx(model, x, path, opset=opset)
    (bias,) = result.biases
    assert bias.left in {None: (("Add",),), 20: (("Mul", "Add"),)}[opset]
    assert "Tanh" in bias.reason
    assert result.extra == {}
    assert_same(model, path, (torch.randn(3, 6, 7),))


def test_without_a_bias_there_is_none(path: Path) -> None:
    model = nn.Sequential(Block(bias=None), nn.RMSNorm(7), nn.Linear(7, 4)).eval()
    result = normswap.export_onnx(model, torch.randn(2, 6, 7), path)
    assert (result.opset, result.biases, result.nodes["RMSNormalization"]) == (23, (), 2)


def test_a_converted_model_has_no_more_operators_than_the_original(path: Path) -> None:
    class Net(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.first, self.norm, self.up, self.down, self.last, self.head = (
                nn.Linear(3, 8), nn.LayerNorm(8), nn.Linear(8, 11), nn.Linear(11, 8), nn.LayerNorm(8), nn.Linear(8, 5),
            )  # fmt: skip

        def forward(self, x: Tensor) -> Tensor:
            x = self.first(x)
            return self.head(self.last(x + self.down(self.up(self.norm(x)).relu())))

    model, x = Net().eval(), torch.randn(2, 6, 3)
    with torch.no_grad():
        for layer in (model.norm, model.last):
            layer.weight.normal_()
            layer.bias.normal_()
    conversion = normswap.convert(model, x, to="rmsnorm")
    before = normswap.export_onnx(model, x, path)
    after = normswap.export_onnx(conversion.model, x, path.with_name("rms.onnx"))
    assert sum(after.nodes.values()) == sum(before.nodes.values())
    assert_same(model, path.with_name("rms.onnx"), (torch.randn(3, 6, 3),))
