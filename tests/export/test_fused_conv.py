"""--target cuda: onnxruntime runs its own kernel, and every other runtime what the file says that it means."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import onnx
import onnx.reference
import onnxruntime
import pytest
import torch
from exported import assert_same, norm, normalised
from torch import Tensor, nn

import normswap
from normswap.errors import UsageError
from normswap.export.to_onnx import Export, export

FUSED = "com.microsoft::FusedConv"


@pytest.fixture
def path(tmp_path: Path) -> Path:
    return tmp_path / "model.onnx"


class Block(nn.Module):
    """A residual block: its first conv is read by a ReLU alone, its second by a sum."""

    def __init__(self, channels: int, bias: bool) -> None:
        super().__init__()
        self.conv1, self.norm1 = nn.Conv2d(channels, 7, 3, padding=1, stride=2, bias=bias), norm(7)
        self.conv2, self.norm2 = nn.Conv2d(7, 7, (3, 1), padding=(1, 0), dilation=1, groups=7, bias=bias), norm(7)
        self.skip = nn.Conv2d(channels, 7, 1, stride=2)

    def forward(self, x: Tensor) -> Tensor:
        y = self.norm2(self.conv2(self.norm1(self.conv1(x)).relu()))
        return (y + self.skip(x)).relu()


def net(bias: bool = True) -> nn.Module:
    return nn.Sequential(Block(3, bias), nn.Conv2d(7, 5, 1, bias=False), nn.ReLU(), Block(5, bias), nn.Flatten(), nn.LazyLinear(4)).eval()


def written(path: Path, model: nn.Module) -> Export:
    return export(model, (torch.randn(2, 3, 12, 16),), {}, path, target="cuda")


def kernels(path: Path, x: Tensor, level: str = "ORT_DISABLE_ALL") -> list[str]:
    """The operators that onnxruntime ran."""
    options = onnxruntime.SessionOptions()
    options.log_severity_level = 3
    options.enable_profiling = True
    options.profile_file_prefix = str(path.parent / "profile")
    options.graph_optimization_level = getattr(onnxruntime.GraphOptimizationLevel, level)
    session = onnxruntime.InferenceSession(str(path), options, providers=["CPUExecutionProvider"])
    session.run(None, {session.get_inputs()[0].name: x.numpy()})
    events = json.loads(Path(session.end_profiling()).read_text())
    return [event["args"]["op_name"] for event in events if event.get("cat") == "Node" and event["name"].endswith("_kernel_time")]


@pytest.mark.parametrize("bias", [True, False])
def test_onnxruntime_runs_its_kernel_and_others_the_function(bias: bool, path: Path) -> None:
    model, x = net(bias), torch.randn(3, 3, 12, 16)
    model(x)
    result = written(path, model)
    assert result.target == "cuda"
    assert result.nodes[FUSED] == 3
    assert (result.nodes["Conv"], result.nodes["Relu"]) == (4, 2)  # those of the sums
    assert (result.residue, result.extra, result.notes) == ((), {}, ())
    onnx.checker.check_model(str(path), full_check=True)
    ran = kernels(path, x)
    assert (ran.count("FusedConv"), ran.count("Conv"), ran.count("Relu")) == (3, 4, 2)
    assert_same(model, path, *((torch.randn(batch, 3, 12, 16),) for batch in (1, 2, 7)))
    with torch.no_grad():
        want = model.double()(x.double()).numpy()
    (got,) = onnx.reference.ReferenceEvaluator(onnx.load(path)).run(None, {result.input_names[0]: x.numpy()})
    assert np.abs(got - want).max() <= 1e-6 * np.abs(want).max()


def test_a_runtime_that_has_no_such_kernel_runs_the_function(path: Path) -> None:
    """The same file with the operator in a domain that onnxruntime does not know: what it means is all there is."""
    model, x = net(), torch.randn(3, 3, 12, 16)
    model(x)
    written(path, model)
    proto = onnx.load(path)
    for node in proto.graph.node:
        if node.domain:
            node.domain = "elsewhere"
    proto.functions[0].domain = "elsewhere"
    next(entry for entry in proto.opset_import if entry.domain == "com.microsoft").domain = "elsewhere"
    other = path.with_name("other.onnx")
    onnx.save(proto, other)
    assert "FusedConv" not in kernels(other, x)
    assert_same(model, other, (x,))


def test_onnxruntime_optimises_it_as_it_does_the_portable_file(path: Path) -> None:
    model, x = net(), torch.randn(3, 3, 12, 16)
    model(x)
    written(path, model)
    portable = path.with_name("portable.onnx")
    export(model, (x,), {}, portable)
    assert sorted(kernels(path, x, "ORT_ENABLE_ALL")) == sorted(kernels(portable, x, "ORT_ENABLE_ALL"))


def test_a_whole_net(path: Path) -> None:
    from torchvision.models.resnet import BasicBlock, ResNet

    model, x = normalised(ResNet(BasicBlock, [1, 1, 1, 1], num_classes=10)).eval(), torch.randn(2, 3, 64, 48)
    result = normswap.export_onnx(model, x, path, target="cuda")
    assert (result.nodes[FUSED], result.nodes["Conv"], result.nodes["Relu"]) == (5, 7, 4)
    assert (len(result.folded), result.extra) == (12, {})
    assert result.cuda is not None
    assert result.cuda.without_kernel == ()
    assert result.parity


MUST_STAY = {
    "another activation": lambda: nn.Sequential(nn.Conv2d(3, 5, 3), nn.LeakyReLU(0.2)),
    "something between": lambda: nn.Sequential(nn.Conv2d(3, 5, 3), nn.MaxPool2d(2), nn.ReLU()),
    "a norm between that stays": lambda: nn.Sequential(nn.Conv2d(3, 5, 3), nn.GELU(), norm(5), nn.ReLU()),
    "a transposed convolution": lambda: nn.Sequential(nn.ConvTranspose2d(3, 5, 3), nn.ReLU()),
}


@pytest.mark.parametrize("case", MUST_STAY)
def test_what_stays_as_it_is(case: str, path: Path) -> None:
    model = MUST_STAY[case]().eval()
    result = written(path, model)
    assert FUSED not in result.nodes
    assert result.notes == ("nothing was fused: there is no two-dimensional Conv in float32 that a Relu alone reads",)
    proto = onnx.load(path)
    assert len(proto.functions) == 0
    assert [entry.domain for entry in proto.opset_import] == [""]
    assert_same(model, path, (torch.randn(3, 3, 12, 16),))


def test_a_conv_that_something_else_reads_stays(path: Path) -> None:
    class Twice(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.conv = nn.Conv2d(3, 5, 3)

        def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
            y = self.conv(x)
            return y.relu(), y

    assert FUSED not in written(path, Twice().eval()).nodes


def test_other_dtypes_and_other_numbers_of_axes_stay(path: Path) -> None:
    model = nn.Sequential(nn.Conv2d(3, 5, 3), nn.ReLU()).eval()
    assert FUSED not in export(model, (torch.randn(2, 3, 9, 8),), {}, path, target="cuda", half=True).nodes
    line = nn.Sequential(nn.Conv1d(3, 5, 3), nn.ReLU()).eval()
    assert FUSED not in export(line, (torch.randn(2, 3, 9),), {}, path, target="cuda").nodes


def test_the_default_has_operators_of_onnx_alone(path: Path) -> None:
    model = nn.Sequential(nn.Conv2d(3, 5, 3), nn.ReLU()).eval()
    assert export(model, (torch.randn(2, 3, 9, 8),), {}, path).nodes == {"Conv": 1, "Relu": 1}
    assert written(path, model).nodes == {FUSED: 1}
    assert onnx.load(path).graph.output[0].name == "output"


def test_an_old_opset_is_refused(path: Path) -> None:
    with pytest.raises(UsageError, match="the target 'cuda' cannot be converted to opset 17") as caught:
        export(net(), (torch.randn(2, 3, 12, 16),), {}, path, target="cuda", opset=17)
    assert caught.value.hint == "opset 18 and above can be"
