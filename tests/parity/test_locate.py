"""Where two models start to differ: by name, by place, past what was folded, and not where nothing differs."""

from __future__ import annotations

import copy
import warnings
from pathlib import Path

import onnx
import pytest
import torch
import torch.nn.functional as F
from onnx import numpy_helper
from torch import Tensor, nn
from torch.nn.utils.fusion import fuse_conv_bn_eval

import normswap
from fixtures.nets import randomise

X = torch.randn(2, 3, 12, 10, generator=torch.Generator().manual_seed(5))


class Block(nn.Module):
    """Two branches and a sum, with a ReLU that is no module."""

    def __init__(self) -> None:
        super().__init__()
        self.conv1, self.bn1 = nn.Conv2d(3, 7, 3, padding=1), nn.BatchNorm2d(7)
        self.conv2, self.bn2 = nn.Conv2d(7, 5, 3, padding=1), nn.BatchNorm2d(5)
        self.side, self.bn3 = nn.Conv2d(3, 5, 1), nn.BatchNorm2d(5)
        self.head = nn.Linear(5, 4)

    def forward(self, x: Tensor) -> Tensor:
        y = self.bn2(self.conv2(F.relu(self.bn1(self.conv1(x)))))
        return self.head(F.relu(y + self.bn3(self.side(x))).mean((2, 3)))  # type: ignore[no-any-return]


class Wrapped(nn.Module):
    def __init__(self, inner: nn.Module) -> None:
        super().__init__()
        self.inner = inner

    def forward(self, x: Tensor) -> Tensor:
        return self.inner(x)  # type: ignore[no-any-return]


def net() -> Block:
    torch.manual_seed(2)
    return randomise(Block(), 3).eval()


def with_fault(model: nn.Module, name: str) -> nn.Module:
    faulty = copy.deepcopy(model)
    with torch.no_grad():
        faulty.get_parameter(name).mul_(1.3)
    return faulty


@pytest.mark.parametrize("name", ["conv1", "bn1", "conv2", "bn2", "side", "bn3", "head"])
def test_the_layer_with_the_fault_is_named(name: str) -> None:
    parity = normswap.verify(net(), with_fault(net(), f"{name}.weight"), X)
    assert not parity
    assert parity.first_bad == name
    assert parity.located is not None
    assert (parity.located.candidate, parity.located.by) == (name, "name")
    assert parity.located.error > 1e-3


@pytest.mark.parametrize("name", ["conv1", "bn2", "side", "head"])
def test_other_names_are_paired_by_place(name: str) -> None:
    parity = normswap.verify(net(), Wrapped(with_fault(net(), f"{name}.weight")), X)
    assert not parity
    assert parity.located is not None
    assert (parity.located.reference, parity.located.candidate, parity.located.by) == (name, f"inner.{name}", "place")


def fused(model: Block) -> Block:
    """Each norm folded into its convolution, as torch does it."""
    result = copy.deepcopy(model)
    for conv, norm in (("conv1", "bn1"), ("conv2", "bn2"), ("side", "bn3")):
        setattr(result, conv, fuse_conv_bn_eval(getattr(result, conv), getattr(result, norm)))
        setattr(result, norm, nn.Identity())
    return result


def test_what_was_folded_is_passed_over() -> None:
    assert normswap.verify(net(), fused(net()), X)
    parity = normswap.verify(net(), with_fault(fused(net()), "conv2.weight"), X)
    assert not parity
    assert parity.first_bad == "conv2"
    parity = normswap.verify(net(), with_fault(fused(net()), "head.weight"), X)
    assert parity.first_bad == "head"


def test_what_passes_is_not_located() -> None:
    for candidate in (net(), Wrapped(net()), fused(net())):
        parity = normswap.verify(net(), candidate, X)
        assert parity
        assert parity.located is None
        assert parity.first_bad is None


@pytest.fixture(scope="module")
def files(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """(as torch writes it, as normswap folds it)."""
    folder = tmp_path_factory.mktemp("files")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # torch's own
        torch.onnx.export(
            net(),
            (X,),
            folder / "torch.onnx",
            dynamo=True,
            verbose=False,
            external_data=False,
            dynamic_shapes=({0: torch.export.Dim("batch", min=1, max=64)},),
        )
        normswap.export_onnx(normswap.convert(net(), X), path=folder / "ours.onnx")
    return folder / "torch.onnx", folder / "ours.onnx"


def file_with_fault(path: Path, name: str) -> Path:
    proto = onnx.load(path)
    weight = next(tensor for tensor in proto.graph.initializer if tensor.name == name)
    weight.CopyFrom(numpy_helper.from_array(numpy_helper.to_array(weight) * 1.3, name))
    onnx.save(proto, path.with_name("faulty.onnx"))
    return path.with_name("faulty.onnx")


@pytest.mark.parametrize("name", ["conv1.weight", "conv2.weight", "side.weight"])
def test_the_node_with_the_fault_is_named(files: tuple[Path, Path], name: str) -> None:
    for path, by in ((files[0], "name"), (files[1], "place")):
        parity = normswap.verify(files[0], file_with_fault(path, name), X)
        assert not parity
        assert parity.located is not None
        assert f"(Conv of {name})" in parity.located.candidate
        assert path is files[1] or parity.located.by == by


def test_files_of_one_function_pass(files: tuple[Path, Path]) -> None:
    for pair in (files, files[::-1], (files[0], files[0])):
        parity = normswap.verify(*pair, X)
        assert parity
        assert parity.located is None


class Acting(nn.BatchNorm2d):
    """A norm with its activation as a child, as timm has it: the norm returns what the child did, in place or not."""

    def __init__(self, channels: int) -> None:
        super().__init__(channels)
        self.drop, self.act = nn.Identity(), nn.Hardswish()

    def forward(self, x: Tensor) -> Tensor:
        return self.act(self.drop(super().forward(x)))  # type: ignore[no-any-return]


def deep() -> nn.Module:
    """Layers of one shape, one after the other, in blocks."""
    torch.manual_seed(2)
    blocks = [nn.Sequential(nn.Conv2d(c, 7, 3, padding=1, bias=False), Acting(7)) for c in (3, 7, 7, 7)]
    return randomise(nn.Sequential(*blocks), 3).eval()


@pytest.mark.parametrize("number", range(4))
def test_in_a_file_that_was_folded_the_layer_with_the_fault_is_named(number: int, tmp_path: Path) -> None:
    """Nothing there has a name of the model: the convolutions hold the norms, and all values have one shape."""
    normswap.export_onnx(normswap.convert(deep(), X), X, tmp_path / "good.onnx")
    proto = onnx.load(tmp_path / "good.onnx")
    convolution = [node for node in proto.graph.node if node.op_type == "Conv"][number]
    bias = next(tensor for tensor in proto.graph.initializer if tensor.name == convolution.input[2])
    bias.CopyFrom(numpy_helper.from_array(numpy_helper.to_array(bias) + numpy_helper.to_array(bias).dtype.type(1e-3), bias.name))
    onnx.save(proto, tmp_path / "faulty.onnx")
    parity = normswap.verify(normswap.convert(deep(), X).model, tmp_path / "faulty.onnx", X)
    assert parity.located is not None
    assert parity.located.reference == f"{number}.1.norm"
    assert parity.located.candidate.startswith(f"{convolution.output[0]} (Conv of ")
    assert parity.located.by == "value"
    assert 1e-5 < parity.located.error < 1e-2
