"""Whole commands on kinds of source that the command-line tests do not go through."""

from __future__ import annotations

from pathlib import Path

import onnx
import pytest
import torch
from onnx import numpy_helper
from torch import nn

import normswap
from fixtures.nets import randomise
from normswap.cli.convert import ConvertOptions, convert_to_directory
from normswap.cli.options import Loading
from normswap.cli.revert import revert_directory
from normswap.errors import LoadError, UsageError


@pytest.fixture(scope="module")
def program(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A .pt2 with a free batch size: torch.export leaves its marks on the example inputs that the file holds."""
    conv, linear = nn.Conv2d(3, 5, 3), nn.Linear(5 * 7 * 6, 4)
    model = nn.Sequential(conv, nn.BatchNorm2d(5, eps=1e-3), nn.ReLU(), nn.Flatten(), linear, nn.BatchNorm1d(4))
    x = torch.randn(2, 3, 9, 8)
    exported = torch.export.export(randomise(model, 0).eval(), (x,), dynamic_shapes=({0: torch.export.Dim.DYNAMIC},))
    path = tmp_path_factory.mktemp("program") / "net.pt2"
    torch.export.save(exported, path)
    return path


@pytest.fixture(scope="module")
def converted(program: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    _, directory = convert_to_directory(str(program), tmp_path_factory.mktemp("converted") / "out", ConvertOptions(trust=True))
    return directory


def test_a_program_becomes_a_program_and_an_onnx_file_without_norms(program: Path, converted: Path) -> None:
    files = {"model.onnx", "model.pt2", "model.safetensors", "recipe.json", "report.html", "report.json"}
    assert {p.name for p in converted.iterdir()} == files
    with pytest.raises(LoadError, match=r"model\.pt2 is a torch\.export program"):
        normswap.load(converted)
    model = normswap.load(converted, trust=True)
    assert isinstance(model, torch.export.ExportedProgram)
    assert model.module()(torch.randn(5, 3, 9, 8)).shape == (5, 4)
    assert not any("batch_norm" in str(node.target) for node in model.graph.nodes if node.op == "call_function")
    report = normswap.verify(program, converted, trust=True)
    assert report
    assert "batch 3" in report.probes
    assert normswap.verify(program, converted / "model.onnx", trust=True)
    assert {node.op_type for node in onnx.load(converted / "model.onnx").graph.node} == {"Conv", "Relu", "Reshape", "Gemm"}


def test_two_programs_are_compared_at_the_inputs_that_are_in_them(program: Path, converted: Path) -> None:
    parity = normswap.verify(program, converted / "model.pt2", trust=True)
    assert parity
    assert "example" in parity.probes


def test_a_program_cannot_be_reverted(converted: Path, tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="holds an exported program, which cannot be reverted"):
        revert_directory(str(converted), tmp_path / "back.pt2", Loading(trust=True))
    assert not list(tmp_path.iterdir())


def test_an_onnx_file_against_another(converted: Path, tmp_path: Path) -> None:
    """The reference may be ONNX too: it is judged in float64."""
    model = onnx.load(converted / "model.onnx")
    bias = next(t for t in model.graph.initializer if len(t.dims) == 1)
    bias.CopyFrom(numpy_helper.from_array(numpy_helper.to_array(bias) * 1.001, bias.name))
    onnx.save(model, tmp_path / "other.onnx")
    assert normswap.verify(converted / "model.onnx", converted / "model.onnx")
    assert not normswap.verify(converted / "model.onnx", tmp_path / "other.onnx")


def test_a_float64_model_is_verified_where_it_can_run(tmp_path: Path) -> None:
    """onnxruntime has no float64 convolution; the file is verified all the same, and the report says where."""
    model = randomise(nn.Sequential(nn.Conv2d(3, 5, 3), nn.BatchNorm2d(5)), 0).double().eval()
    torch.save(model, tmp_path / "net.pt")
    report, directory = convert_to_directory(str(tmp_path / "net.pt"), tmp_path / "out", ConvertOptions(inputs=["2x3x9x8:float64"]))
    assert list(report.parities) == ["torch", "onnx's reference evaluator"]
    assert all(report.parities.values())
    assert report.onnx is not None
    assert "onnxruntime cannot run this file" in report.onnx.notes[0]
    assert normswap.verify(tmp_path / "net.pt", directory)


def test_external_data_comes_along(tmp_path: Path) -> None:
    from normswap.files import atomic

    with atomic.file(tmp_path / "m.onnx") as partial:
        partial.write_text("refers to m.onnx.data")
        partial.with_name("m.onnx.data").write_text("weights")
    assert {p.name for p in tmp_path.iterdir()} == {"m.onnx", "m.onnx.data"}
