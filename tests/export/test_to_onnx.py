"""From torch to an ONNX file: every file is run in onnxruntime, at every optimisation level, against the model in float64."""

from __future__ import annotations

import copy
import gc
import os
import random
import subprocess
import sys
import weakref
from collections import UserDict
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnx.reference
import pytest
import torch
from exported import LEVELS, assert_same, flat, norm, normalised, runner
from torch import Tensor, nn
from torch.export import Dim
from torch.optim import swa_utils

import normswap
from normswap.errors import ExportError, NormswapError, UsageError
from normswap.export.to_onnx import Export, export
from normswap.export.verified import verified_export
from normswap.layer.batchless_norm import BatchlessNorm, BatchlessNormAct
from normswap.models.inputs import Inputs
from normswap.parity.judge import compare, judge
from normswap.parity.run_onnx import REFERENCE
from normswap.parity.run_torch import named_tensors


@pytest.fixture
def path(tmp_path: Path) -> Path:
    return tmp_path / "model.onnx"


def run(path: Path, inputs: Sequence[Tensor]) -> list[np.ndarray]:
    return runner(path)(inputs)


def exported(model: nn.Module, path: Path, *shape: int, batches: Sequence[int] = (1, 2, 7), **options: Any) -> Export:
    """Export with a batch of `shape`, and hold the file against the model at several batch sizes."""
    result = export(model, (torch.randn(*shape),), {}, path, **options)
    assert result.path == path
    assert os.listdir(path.parent) == [path.name]
    onnx.checker.check_model(str(path), full_check=True)
    assert_same(model, path, *((torch.randn(batch, *shape[1:]),) for batch in batches))
    return result


class Net(nn.Module):
    """Two convs and a norm on (N, 3, 9, 8), wired by `wiring(self, x)`."""

    def __init__(self, wiring: Callable[[Any, Tensor], Any]) -> None:
        super().__init__()
        self.conv = nn.Conv2d(3, 5, (3, 2))
        self.other = nn.Conv2d(5, 5, 1)
        self.norm = norm(5)
        self.linear = nn.Linear(8, 6)
        self.rows = norm(7)
        self.wiring = wiring

    def forward(self, x: Tensor) -> Any:
        return self.wiring(self, x)


# -- where a norm vanishes, and where it must not ------------------------------------------------------------------------------

CONVS = {
    "conv 1d": (lambda: nn.Conv1d(3, 5, 2), (4, 3, 9)),
    "conv 2d": (lambda: nn.Conv2d(4, 6, (3, 2), stride=(2, 1), padding=1, dilation=(1, 2), groups=2), (3, 4, 9, 8)),
    "conv 2d without bias": (lambda: nn.Conv2d(3, 5, 3, bias=False), (2, 3, 9, 8)),
    "conv 2d, one channel": (lambda: nn.Conv2d(3, 1, 3), (2, 3, 9, 8)),
    "conv 2d, circular": (lambda: nn.Conv2d(3, 5, 3, padding=1, padding_mode="circular"), (2, 3, 9, 8)),
    "conv 3d": (lambda: nn.Conv3d(3, 5, (2, 3, 1)), (2, 3, 7, 6, 4)),
    "transposed 1d": (lambda: nn.ConvTranspose1d(3, 5, 2, bias=False), (2, 3, 9)),
    "transposed 2d": (lambda: nn.ConvTranspose2d(3, 5, (3, 2), stride=2, output_padding=1), (2, 3, 7, 6)),
    "transposed 2d in groups": (lambda: nn.ConvTranspose2d(4, 6, 3, groups=2), (3, 4, 7, 6)),  # R11
    "transposed 3d": (lambda: nn.ConvTranspose3d(3, 5, (1, 3, 2)), (2, 3, 4, 6, 5)),
    "linear": (lambda: nn.Linear(7, 5), (3, 7)),
    "linear without bias": (lambda: nn.Linear(7, 5, bias=False), (3, 7)),
}
LAST_AXIS = {
    "linear on (N, L, D)": (lambda: nn.Linear(8, 5), (3, 7, 8)),
    "linear without bias on (N, L, D)": (lambda: nn.Linear(8, 5, bias=False), (3, 7, 8)),
    "linear on (N, K, L, D)": (lambda: nn.Linear(8, 5), (3, 4, 7, 8)),
}


def channels_of(layer: nn.Module) -> int:
    return next(size for name in ("out_channels", "out_features") if (size := getattr(layer, name, None)) is not None)


MUST_FOLD = {
    "R8: conv and norm called twice": (lambda m, x: m.norm(m.conv(x)) - m.norm(m.conv(x.flip(2))), ("norm", "norm")),
    "R7: a conv called twice, once into the norm": (lambda m, x: m.norm(m.conv(x)) + m.conv(x.flip(2)), ("norm",)),
    "a transposition between": (lambda m, x: m.norm(m.conv(x.transpose(2, 3)).transpose(2, 3)), ("norm",)),
    "a norm after another": (lambda m, x: m.norm(m.norm(m.conv(x))), ("norm", "norm")),
    "one norm after two convs": (lambda m, x: m.norm(m.other(m.norm(m.conv(x)).relu())), ("norm", "norm")),
    "an in-place activation after it": (lambda m, x: m.norm(m.conv(x)).relu_() + 1, ("norm",)),
    "C = 1 on the rows of a linear": (lambda m, x: m.one(m.linear(x.mean(1)[:, :1])), ("one",)),
}
MUST_STAY = {
    "R7: a conv read twice": (lambda m, x: m.norm(y := m.conv(x)) + y, ("norm",)),
    "the conv is an output": (lambda m, x: (m.norm(y := m.conv(x)), y), ("norm",)),
    "one conv called twice on the same input": (lambda m, x: m.norm(m.conv(x)) + m.conv(x), ("norm",)),
    "an activation between, twice": (lambda m, x: m.norm(m.conv(x).relu()) - m.norm(m.conv(x.flip(2)).relu()), ("norm", "norm")),
    "a pooling between": (lambda m, x: m.norm(nn.functional.max_pool2d(m.conv(x), 2)), ("norm",)),
    "a sum between": (lambda m, x: m.norm(m.conv(x) + m.other(m.conv(x.flip(2)))), ("norm",)),
    "a concatenation between": (lambda m, x: m.norm(torch.cat([m.conv(x)[:, :2], m.conv(x.flip(2))[:, 2:]], 1)), ("norm",)),
    "no layer before it": (lambda m, x: m.norm(x.expand(-1, 5, -1, -1) if x.shape[1] == 1 else x.repeat(1, 2, 1, 1)[:, :5]), ("norm",)),
    "R9: the rows of a linear": (lambda m, x: m.rows(m.linear(x.mean(1)[:, 2:])), ("rows",)),
    "R9: the rows of a linear, as many as columns": (lambda m, x: m.rows(m.square(x.mean(1)[:, 2:])), ("rows",)),
    "R17: pre-activation with an in-place ReLU": (lambda m, x: (y := m.conv(x)) + m.other(torch.relu_(m.norm(y))), ("norm",)),
    "a weight that depends on the input": (
        lambda m, x: m.norm(nn.functional.conv2d(x, m.conv.weight * x.mean(), m.conv.bias)),
        ("norm",),
    ),
    "the norm of a slice": (lambda m, x: m.rows(m.wide(x)[:, 1:8]), ("rows",)),
}


def net(wiring: Callable[[Any, Tensor], Any]) -> Net:
    model = Net(wiring)
    model.one, model.square, model.wide = norm(1), nn.Linear(8, 7), nn.Conv2d(3, 9, (3, 2))
    return model


class Table(nn.Module):
    """Every case of a table as a branch of one model: an export takes a second, whatever is in it."""

    def __init__(self, cases: dict[str, tuple[nn.Module, tuple[int, ...]]]) -> None:
        super().__init__()
        self.branch = nn.ModuleList(model for model, _ in cases.values())
        self.names = list(cases)
        self.shapes = [shape for _, shape in cases.values()]

    def forward(self, *inputs: Tensor) -> Any:
        return [branch(x) for branch, x in zip(self.branch, inputs, strict=True)]

    def sites(self, result: Export, case: str) -> tuple[tuple[str, ...], tuple[str, ...]]:
        """(folded, residue) of one branch."""
        start = f"branch.{self.names.index(case)}."
        folded, residue = (tuple(n.removeprefix(start) for n in names if n.startswith(start)) for names in (result.folded, result.residue))
        return folded, residue


TABLES: dict[str, Callable[[], dict[str, tuple[nn.Module, tuple[int, ...]]]]] = {
    "conv, affine": lambda: {k: (nn.Sequential(m := make(), norm(channels_of(m)), nn.ReLU()), shape) for k, (make, shape) in CONVS.items()},
    "conv, not affine": lambda: {  # R10
        k: (nn.Sequential(m := make(), norm(channels_of(m), affine=False), nn.ReLU()), shape) for k, (make, shape) in CONVS.items()
    },
    "last axis": lambda: {k: (nn.Sequential(make(), norm(5, channel_axis=-1)), shape) for k, (make, shape) in LAST_AXIS.items()},
    "must fold": lambda: {k: (net(wiring), (3, 3, 9, 8)) for k, (wiring, _) in MUST_FOLD.items()},
    "must stay": lambda: {k: (net(wiring), (3, 3, 9, 8)) for k, (wiring, _) in MUST_STAY.items()},
}


@pytest.fixture(scope="module")
def tables(tmp_path_factory: pytest.TempPathFactory) -> dict[str, tuple[Table, Export]]:
    torch.manual_seed(1)
    made = {}
    for name, cases in TABLES.items():
        model = Table(cases())
        path = tmp_path_factory.mktemp("table") / "model.onnx"
        made[name] = model, export(model, tuple(torch.randn(3, *shape[1:]) for shape in model.shapes), {}, path)
    return made


@pytest.mark.parametrize("name", TABLES)
def test_tables_compute_what_the_model_computes(name: str, tables: dict[str, tuple[Table, Export]]) -> None:
    model, result = tables[name]
    onnx.checker.check_model(str(result.path), full_check=True)
    assert result.dynamic
    assert_same(model, result.path, *([torch.randn(batch, *shape[1:]) for shape in model.shapes] for batch in (1, 2, 7)))


@pytest.mark.parametrize("table", ["conv, affine", "conv, not affine"])
@pytest.mark.parametrize("case", CONVS)
def test_a_norm_vanishes_into_the_layer_before_it(table: str, case: str, tables: dict[str, tuple[Table, Export]]) -> None:
    model, result = tables[table]
    assert model.sites(result, case) == (("1",), ())
    assert not {"Mul", "Add"} & set(result.nodes)


@pytest.mark.parametrize("case", LAST_AXIS)
def test_a_norm_of_the_last_axis_vanishes_into_a_linear(case: str, tables: dict[str, tuple[Table, Export]]) -> None:
    model, result = tables["last axis"]
    assert result.nodes == {"MatMul": 3, "Add": 3}
    if "without bias" not in case:
        assert model.sites(result, case) == (("1",), ())
    else:  # the layer has no place for the shift
        assert model.sites(result, case) == ((), ("1",))
        (site,) = (site for site in result.sites if site.left)
        assert (site.left, len(site.into)) == (("Add",), 1)
        assert site.reason == "an output of the model is next to it; its scale is 0 in 1 of 5 channels"
        assert result.extra == {"Add": 1}


@pytest.mark.parametrize("case", MUST_FOLD)
def test_a_norm_vanishes(case: str, tables: dict[str, tuple[Table, Export]]) -> None:
    model, result = tables["must fold"]
    assert model.sites(result, case) == (MUST_FOLD[case][1], ())
    assert "Mul" not in result.nodes


@pytest.mark.parametrize("case", MUST_STAY)
def test_a_norm_stays_one_batch_normalization(case: str, tables: dict[str, tuple[Table, Export]]) -> None:
    model, result = tables["must stay"]
    assert model.sites(result, case) == ((), MUST_STAY[case][1])
    assert result.nodes["BatchNormalization"] == len(result.residue)
    assert result.extra == {"BatchNormalization": len(result.residue)}
    assert all(site.reason for site in result.sites if site.left)


def test_a_layer_called_twice_is_stored_once(path: Path) -> None:
    model = Net(lambda m, x: m.norm(m.conv(x)) - m.norm(m.conv(x.flip(2))))
    exported(model, path, 3, 3, 9, 8)
    assert sum(i.dims == [5, 3, 3, 2] for i in onnx.load(path).graph.initializer) == 1


def test_two_convs_that_share_a_weight_are_folded_apart(path: Path) -> None:
    model = nn.Sequential(nn.Conv2d(3, 3, 1), norm(3), nn.ReLU(), nn.Conv2d(3, 3, 1), nn.ReLU())
    model[3].weight = model[0].weight
    assert exported(model, path, 2, 3, 9, 8).folded == ("1",)


def test_several_channel_axes_and_shared_ones(path: Path) -> None:
    model = nn.Sequential(nn.Conv2d(3, 5, 1), norm((5, 7), channel_axis=(1, 2)), nn.ReLU(), nn.Conv2d(5, 4, 1), norm(4, shared_axes=(1,)))
    result = exported(model, path, 2, 3, 7, 6)
    assert (result.folded, result.residue) == (("4",), ("1",))


def test_activation_of_the_norm_itself(path: Path) -> None:
    layer = norm(5, BatchlessNormAct)
    layer.drop, layer.act = nn.Dropout(0.5), nn.SiLU(inplace=True)
    model = nn.Sequential(nn.Conv2d(3, 5, 3), layer)
    result = export(model.train(), (torch.randn(2, 3, 9, 8),), {}, path)
    assert result.folded == ("1",)
    assert result.nodes == {"Conv": 1, "Sigmoid": 1, "Mul": 1}
    assert_same(model, path, (torch.randn(7, 3, 9, 8),))


def test_a_subclass_with_a_forward_of_its_own_keeps_it(path: Path) -> None:
    class Doubling(BatchlessNorm):
        def forward(self, x: Tensor) -> Tensor:
            return super().forward(x) * 2

    assert exported(nn.Sequential(nn.Conv2d(3, 5, 3), norm(5, Doubling)), path, 2, 3, 9, 8).folded == ("1",)


def test_layouts_that_a_later_view_relies_on(path: Path) -> None:
    model = Net(lambda m, x: m.norm(m.conv(x).flatten(2).transpose(1, 2).contiguous().transpose(1, 2)).view(-1, 5 * 49))
    assert exported(model, path, 3, 3, 9, 8).folded == ("norm",)


def test_channels_last(path: Path) -> None:
    model = Net(lambda m, x: m.norm(m.conv(x)).permute(0, 2, 3, 1).view(len(x), -1)).to(memory_format=torch.channels_last)
    assert exported(model, path, 3, 3, 9, 8).folded == ("norm",)


# -- whole nets ----------------------------------------------------------------------------------------------------------------


def test_resnet18_has_no_trace_of_its_norms(path: Path) -> None:
    from torchvision.models import resnet18

    result = exported(normalised(resnet18(num_classes=10)), path, 2, 3, 64, 48, batches=(1, 3))
    assert (len(result.folded), result.residue) == (20, ())
    assert result.nodes == {"Conv": 20, "Relu": 17, "Add": 8, "MaxPool": 1, "ReduceMean": 1, "Reshape": 1, "Gemm": 1}


def test_the_digits_net_folds_completely(path: Path, repository: Path) -> None:
    with torch.serialization.safe_globals([]):
        model = torch.load(repository / "fixtures" / "digits_cnn.pt", weights_only=False)
    result = exported(normalised(model), path, 4, 1, 8, 8)
    assert result.folded
    assert result.residue == ()


# -- the model's own Python ----------------------------------------------------------------------------------------------------


def test_every_way_to_reach_a_norm_leads_to_the_same_site(path: Path) -> None:
    model = Net(lambda m, x: m.alias(m.other(m.listed[0](m.conv(x)).relu())))
    model.alias = model.norm
    model.listed = [model.norm]
    model.__dict__["listed"] = [model.norm]
    assert exported(model, path, 3, 3, 9, 8).folded == ("norm", "norm")


def test_hooks_on_a_norm_have_their_effect(path: Path) -> None:
    model = Net(lambda m, x: m.norm(m.conv(x)))
    model.norm.register_forward_hook(lambda module, args, output: output + module.num_features)
    model.norm.register_forward_pre_hook(lambda module, args: (args[0] * module.weight.detach().mean(),))
    assert exported(model, path, 3, 3, 9, 8).residue == ("norm",)


def test_code_that_reads_a_norms_attributes(path: Path) -> None:
    model = Net(lambda m, x: m.norm(m.conv(x)).to(m.norm.weight.dtype) * m.norm.weight.sum() / m.norm.num_features)
    assert exported(model, path, 3, 3, 9, 8).folded == ("norm",)


def test_a_graph_module(path: Path) -> None:
    model = torch.fx.symbolic_trace(nn.Sequential(nn.Conv2d(3, 5, 3), nn.BatchNorm2d(5), nn.ReLU()))
    result = exported(normalised(model), path, 2, 3, 9, 8)
    assert result.folded == ("1",)


@pytest.mark.parametrize("channels", [6, 9000])  # torch leaves the arithmetic on more than 8192 numbers to run time
def test_an_exported_program(channels: int, path: Path) -> None:
    model = nn.Sequential(nn.Linear(7, channels, bias=False), norm(channels), nn.ReLU(), norm(channels)).eval()
    x = torch.randn(3, 7)
    program = torch.export.export(model, (x,), dynamic_shapes=({0: Dim("batch")},))
    code = program.graph_module.code
    result = export(program, (x,), {}, path)
    assert (result.folded, result.residue) == (("1",), ("3",))
    assert result.nodes == {"Gemm": 1, "Relu": 1, "BatchNormalization": 1}
    assert program.graph_module.code == code
    assert_same(model, path, (torch.randn(1, 7),), (torch.randn(5, 7),))


def test_an_exported_program_whose_norms_share_their_scale(path: Path) -> None:
    class Pair(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.conv, self.a, self.b = nn.Conv2d(3, 5, 3), norm(5), norm(5)
            self.b.weight, self.b.log_std = self.a.weight, self.a.log_std

        def forward(self, x: Tensor) -> Any:
            y = self.conv(x)
            return self.a(y), self.b(y)  # torch computes y * scale once

    model, x = Pair().eval(), torch.randn(2, 3, 9, 8)
    result = export(torch.export.export(model, (x,)), (x,), {}, path)
    assert (result.folded, result.residue) == ((), ("a", "b"))
    assert_same(model, path, (x,))


def test_an_exported_program_in_half_precision(path: Path) -> None:
    model = nn.Sequential(nn.Conv2d(3, 5, 3), norm(5), nn.ReLU(), norm(5)).half().eval()
    x = torch.randn(2, 3, 9, 8).half()
    result = export(torch.export.export(model, (x,)), (x,), {}, path)
    assert (result.folded, result.residue) == (("1",), ("3",))
    assert_same(model, path, (x,))


def test_nothing_of_the_model_changes(path: Path) -> None:
    model = Net(lambda m, x: m.norm(m.conv(x)))
    model.train()
    model.other.eval()
    before = {name: (tensor.clone(), tensor.data_ptr(), tensor.requires_grad) for name, tensor in model.state_dict(keep_vars=True).items()}
    flags = [(name, type(module), module.training, set(vars(module))) for name, module in model.named_modules()]
    torch_state, python_state = torch.get_rng_state(), random.getstate()
    export(model, (torch.randn(3, 3, 9, 8, generator=torch.Generator().manual_seed(1)),), {}, path)
    assert torch.equal(torch.get_rng_state(), torch_state)
    assert random.getstate() == python_state
    assert [(name, type(module), module.training, set(vars(module))) for name, module in model.named_modules()] == flags
    for name, tensor in model.state_dict(keep_vars=True).items():
        value, pointer, requires_grad = before[name]
        assert torch.equal(tensor, value)
        assert (tensor.data_ptr(), tensor.requires_grad) == (pointer, requires_grad)


def test_a_converted_model_in_train_mode_is_exported_in_eval_mode(path: Path) -> None:
    model = nn.Sequential(nn.Conv2d(3, 5, 3), norm(5), nn.Dropout(0.5)).train()
    assert exported(model, path, 2, 3, 9, 8).nodes == {"Conv": 1}


def test_nothing_is_printed(path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    export(Net(lambda m, x: (m.norm(m.conv(x)), None, print("forward"))[:2]), (torch.randn(3, 3, 9, 8),), {}, path)
    with pytest.raises(ExportError):
        export(Net(lambda m, x: x if m.norm(m.conv(x)).sum() > 0 else -x), (torch.randn(3, 3, 9, 8),), {}, path)
    assert capfd.readouterr() == ("", "")


def test_the_models_own_warnings_are_not_swallowed(path: Path) -> None:
    import warnings

    model = Net(lambda m, x: (warnings.warn("mine", RuntimeWarning, stacklevel=1), m.norm(m.conv(x)))[1])
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        export(model, (torch.randn(3, 3, 9, 8),), {}, path)
    assert "mine" in {str(w.message) for w in caught}


# -- precision -----------------------------------------------------------------------------------------------------------------


class Scaled(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return x * 0.1 + torch.where(x > 0.3, 0.7, x) / 3.3


ACTIVATIONS = (nn.GELU(), nn.GELU("tanh"), nn.Hardswish(), nn.Hardsigmoid(), nn.LeakyReLU(0.2), nn.ELU(0.3), nn.CELU(0.7), Scaled())


@pytest.mark.parametrize("conv", [False, True], ids=["linear", "conv"])
@pytest.mark.parametrize("activation", ACTIVATIONS, ids=str)
def test_a_file_in_float64_is_as_exact_as_onnx_can_be(path: Path, activation: nn.Module, conv: bool) -> None:
    """A number in the code is a float64. One in an attribute (the slope of a LeakyRelu) is a float32 in any file, and rounded."""
    first = nn.Conv2d(3, 5, 2) if conv else nn.Linear(3, 5)
    model = normalised(nn.Sequential(first, nn.BatchNorm2d(5) if conv else nn.BatchNorm1d(5), activation)).double()
    x = torch.randn(2, 3, 4, 4, dtype=torch.float64) if conv else torch.randn(4, 3, dtype=torch.float64)
    _, compared = verified_export(model, Inputs((x,)), path)
    assert compared.failed is None
    if isinstance(activation, (nn.GELU, nn.Hardswish, Scaled)) and (conv or str(activation) != str(nn.GELU("tanh"))):
        # onnxruntime, which has a kernel if there is no conv, has the numbers of that GELU in float32
        assert normswap.verify(model, path, x)
    wrong = copy.deepcopy(model)
    with torch.no_grad():
        wrong[0].bias.add_(1e-5)
    assert not normswap.verify(wrong, path, x)


def test_float64_stays_float64(path: Path) -> None:
    model = nn.Sequential(nn.Conv2d(3, 5, 3), norm(5), nn.ReLU(), norm(5)).double()
    x = torch.randn(2, 3, 9, 8).double()
    result = export(model, (x,), {}, path)
    assert (result.folded, result.residue) == (("1",), ("3",))
    proto = onnx.load(path)
    assert {i.data_type for i in proto.graph.initializer} == {onnx.TensorProto.DOUBLE}
    with torch.no_grad():
        want = model(x).numpy()
    (got,) = onnx.reference.ReferenceEvaluator(proto).run(None, {result.input_names[0]: x.numpy()})
    assert np.abs(got - want).max() <= 1e-13 * np.abs(want).max()


def test_half_precision_computes_the_rest_in_float32(path: Path) -> None:
    model = nn.Sequential(nn.Conv2d(3, 5, 3), norm(5), nn.ReLU(), norm(5)).half()
    x = torch.randn(2, 3, 9, 8).half()
    result = export(model, (x,), {}, path)
    assert (result.folded, result.residue) == (("1",), ("3",))
    assert result.nodes == {"Conv": 1, "Relu": 1, "BatchNormalization": 1, "Cast": 2}
    kinds = {i.name: i.data_type for i in onnx.load(path).graph.initializer}
    assert kinds["0.weight"] == kinds["0.bias"] == onnx.TensorProto.FLOAT16
    assert kinds["3.scale"] == kinds["3.shift"] == onnx.TensorProto.FLOAT
    assert_same(model, path, (x,))


def test_a_norm_that_half_precision_cannot_hold_stays(path: Path) -> None:
    model = nn.Sequential(nn.Conv2d(3, 5, 3), norm(5)).half()
    with torch.no_grad():
        model[1].set_statistics(torch.full((5,), 0.1), torch.full((5,), 1e-6))
        model[1].weight.fill_(1)
    x = torch.randn(2, 3, 9, 8).half()
    assert export(model, (x,), {}, path).residue == ("1",)


def test_bfloat16_needs_an_opset_that_has_it(path: Path) -> None:
    model, x = nn.Sequential(nn.Conv2d(3, 5, 3), norm(5)).bfloat16(), torch.randn(2, 3, 9, 8).bfloat16()
    with pytest.raises(ExportError, match="bfloat16") as caught:
        export(model, (x,), {}, path, opset=20)
    assert caught.value.hint == "most operators take bfloat16 from opset 22 on: --opset 22 (opset=22 in Python)"
    assert export(model, (x,), {}, path, opset=22).folded == ("1",)
    assert export(model.float(), (x.float(),), {}, path).opset == 20


@pytest.mark.parametrize("pool", [False, True])  # in opset 23 MaxPool has no CUDA kernel, and in 20 there is no Conv in bfloat16
def test_a_model_in_bfloat16_is_written_in_an_opset_that_has_it_and_verified(path: Path, pool: bool) -> None:
    model = nn.Sequential(nn.Conv2d(3, 5, 3), norm(5), nn.MaxPool2d(2) if pool else nn.ReLU(), nn.Conv2d(5, 4, 1)).bfloat16()
    x = torch.randn(2, 3, 9, 8).bfloat16()
    result, compared = verified_export(model, Inputs((x,)), path)
    assert (result.opset, result.folded) == (23, ("1",))
    assert compared.failed is None
    assert list(compared.parities) == ["onnx's reference evaluator"]
    wrong = copy.deepcopy(model)
    with torch.no_grad():
        wrong[3].bias.add_(0.5)
    assert not compare(judge(wrong, (x,), {}), path, level=REFERENCE)


def test_a_file_of_bfloat16_that_has_kernels_is_verified(path: Path) -> None:
    x = torch.randn(2, 3).bfloat16()
    assert verified_export(Net(lambda m, x: x.transpose(0, 1)).bfloat16(), Inputs((x,)), path)[1].failed is None


def test_weights_are_rounded_once_from_float64(path: Path) -> None:
    model = nn.Sequential(nn.Conv2d(3, 5, 3), norm(5))
    export(model, (torch.randn(2, 3, 9, 8),), {}, path)
    scale, shift = model[1].folded(4)
    made = {i.name: onnx.numpy_helper.to_array(i) for i in onnx.load(path).graph.initializer}
    weight = model[0].weight.detach().double() * scale.reshape(5, 1, 1, 1)
    np.testing.assert_array_equal(made["0.weight"], weight.float().numpy())
    bias = model[0].bias.detach().double() * scale.flatten() + shift.flatten()
    np.testing.assert_array_equal(made["0.bias"], bias.float().numpy())


def test_extreme_statistics(path: Path) -> None:
    model = nn.Sequential(nn.Conv2d(3, 5, 3), norm(5))
    with torch.no_grad():
        model[1].set_statistics(model[1].mean.clone(), torch.tensor([1e-6, 1e6, 1.0, 1e-3, 1e3]))
    assert exported(model, path, 2, 3, 9, 8).folded == ("1",)


# -- opsets ---------------------------------------------------------------------------------------------------------------------


# below 18, between the oldest and the default, the default, the newest; torch writes those in between as it does these
SLOW_OPSETS = [pytest.param(opset, marks=pytest.mark.slow) for opset in (19, 21, 22)]


@pytest.mark.parametrize("opset", [17, 18, None, 23, *SLOW_OPSETS])
def test_the_file_has_the_opset_that_was_asked_for(opset: int | None, path: Path) -> None:
    pool = nn.AdaptiveAvgPool2d(1)
    model = nn.Sequential(nn.Conv2d(3, 5, 3), norm(5), nn.GELU(), pool, nn.Flatten(), nn.Linear(5, 4), norm(4), nn.Softmax(1), norm(4))
    result = exported(model, path, 2, 3, 9, 8, batches=(3,), opset=opset)
    assert result.opset == (opset or 20)
    assert [(o.domain, o.version) for o in onnx.load(path).opset_import] == [("", result.opset)]
    assert (result.folded, result.residue) == (("1", "6"), ("8",))


def test_an_opset_that_the_model_cannot_have(path: Path) -> None:
    with pytest.raises(ExportError, match=r"this model cannot be written in opset 13: .*Relu") as caught:
        export(nn.Sequential(nn.Conv2d(3, 5, 3), norm(5), nn.ReLU()), (torch.randn(2, 3, 9, 8),), {}, path, opset=13)
    assert caught.value.hint == "opset 18 and above need no conversion; the default is 20"
    assert not path.exists()


def test_another_opset_than_asked_for_is_an_error(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(onnx.version_converter, "convert_version", lambda proto, opset: proto)
    with pytest.raises(ExportError, match="opset 16 was asked for, but this model came out in opset 18"):
        export(nn.Sequential(nn.Conv2d(3, 5, 3), norm(5)), (torch.randn(2, 3, 9, 8),), {}, path, opset=16)


@pytest.mark.parametrize("opset", [6, 999, "20"])
@pytest.mark.parametrize("target", ["portable", "cuda"])
def test_an_opset_that_does_not_exist(opset: Any, target: str, path: Path) -> None:
    with pytest.raises(UsageError, match=f"there is no opset {opset!r}"):
        export(norm(3), (torch.randn(2, 3),), {}, path, opset=opset, target=target)


# -- batch size, names ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("batch", [1, 4])
def test_the_batch_size_is_free_whatever_the_example_has(batch: int, path: Path) -> None:
    result = exported(Net(lambda m, x: m.norm(m.conv(x)).flatten(1)), path, batch, 3, 9, 8)
    assert result.dynamic
    assert result.notes == ()
    assert onnx.load(path).graph.input[0].type.tensor_type.shape.dim[0].dim_param == "batch"


def test_a_fixed_batch_size_on_request(path: Path) -> None:
    result = exported(Net(lambda m, x: m.norm(m.conv(x))), path, 4, 3, 9, 8, batches=(4,), dynamic=False)
    assert not result.dynamic
    assert result.notes == ()


def test_a_model_that_fixes_its_batch_size_says_so(path: Path) -> None:
    result = exported(Net(lambda m, x: m.norm(m.conv(x)).view(4, 5 * 7 * 7)), path, 4, 3, 9, 8, batches=(4,))
    assert not result.dynamic
    assert result.folded == ("norm",)
    assert len(result.notes) == 1
    assert result.notes[0].startswith("the batch size is fixed, as torch refuses a free one:")


class Named(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.conv, self.norm = nn.Conv2d(3, 5, 3), norm(5)

    def forward(self, image: Tensor, *extra: Tensor, mask: Tensor | None = None, flag: bool = True) -> dict[str, Any]:
        y = self.norm(self.conv(image))
        if mask is not None:
            y = y * mask[:, None, None, None]
        return {"logits": y, "aux": (y + extra[0].sum(1)[:, None, None, None], None), "image": image, "again": y}


def test_names_are_those_of_the_model(path: Path) -> None:
    model, image, extra, mask = Named(), torch.randn(3, 3, 9, 8), torch.randn(3, 2), torch.rand(3)
    result = export(model, (image, extra), {"mask": mask}, path)
    assert result.input_names == ("image", "extra_0", "mask")
    assert result.output_names == ("logits", "aux", "image_1", "again")
    with torch.no_grad():
        want = flat(model(image, extra, mask=mask))
    for a, b in zip(run(path, (image, extra, mask)), want, strict=True):
        np.testing.assert_allclose(a, b.numpy(), atol=1e-5)
    assert result.dynamic
    assert run(path, (image[:2], extra[:2], mask[:2]))[0].shape == (2, 5, 7, 6)


def test_several_outputs_are_numbered(path: Path) -> None:
    result = exported(Net(lambda m, x: (m.norm(m.conv(x)), [x.mean(1), x.sum(1)])), path, 3, 3, 9, 8)
    assert result.output_names == ("output", "output_1", "output_2")


@dataclass
class Inner:
    raw: Tensor
    name: str = "raw"


@dataclass
class Outcome:
    logits: Tensor
    inner: Inner
    more: dict[str, Any]


class Holder:
    def __init__(self, **values: Any) -> None:
        vars(self).update(values)


HELD: dict[str, tuple[Callable[[Tensor, Tensor], Any], tuple[str, ...]]] = {
    "a dataclass": (
        lambda y, raw: Outcome(y, Inner(raw), {"mean": y.mean((2, 3)), "none": None}),
        ("logits", "inner_raw", "more_mean"),
    ),
    "an object": (lambda y, raw: Holder(y=y, raw=raw, label="x"), ("y", "raw")),
    "an object in a list": (lambda y, raw: [y, Holder(raw=raw)], ("output", "raw")),
    "a mapping": (lambda y, raw: UserDict(y=y, raw=raw), ("y", "raw")),
    "a text": (lambda y, raw: {"y": y, "kind": "image", "raw": raw}, ("y", "raw")),
    "numbers": (lambda y, raw: (y, 3, True, 2.5), ("output", "output_1", "output_2", "output_3")),
    "sizes": (lambda y, raw: (y, y.shape[0], y.shape[0] * 2, y.shape[2:]), tuple(f"output{i}" for i in ("", "_1", "_2", "_3", "_4"))),
}


@pytest.mark.parametrize("what", HELD)
def test_outputs_in_objects_and_numbers_are_in_the_file(what: str, path: Path) -> None:
    make, names = HELD[what]
    model = Net(lambda m, x: (lambda raw: make(m.norm(raw), raw))(m.conv(x))).eval()
    result, compared = verified_export(model, Inputs((torch.randn(3, 3, 9, 8),)), path)
    assert result.output_names == names
    assert result.dynamic
    assert compared.failed is None
    assert not model._forward_hooks
    for batch in (2, 5):
        x = torch.randn(batch, 3, 9, 8)
        with torch.no_grad():
            want = named_tensors(model(x)).values()
        for got, expected in zip(run(path, (x,)), want, strict=True):
            assert got.dtype == expected.numpy().dtype
            np.testing.assert_allclose(got, expected.numpy(), rtol=0, atol=1e-6)  # 3e-7 here, of values up to 2.3


@pytest.mark.parametrize("wrap", [lambda model: torch.compile(model, backend="eager"), swa_utils.AveragedModel], ids=["compile", "average"])
def test_a_wrapped_model_has_the_names_of_what_it_wraps(wrap: Callable[[nn.Module], nn.Module], path: Path) -> None:
    model = Named().eval()
    image, extra = torch.randn(3, 3, 9, 8), torch.randn(3, 2)
    result, compared = verified_export(wrap(model), Inputs((image, extra)), path)
    assert compared.failed is None
    assert (result.input_names, result.folded) == (("image", "extra_0"), ("norm",))


def test_an_input_that_only_looks_like_a_batch(path: Path) -> None:
    class Masked(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.linear, self.norm = nn.Linear(7, 5), norm(5)

        def forward(self, x: Tensor, mask: Tensor) -> Tensor:
            return self.norm(self.linear(x * mask)) + mask.view(7)[:5]  # mask is (1, 7), whatever the batch

    x, mask = torch.randn(1, 7), torch.rand(1, 7)
    model = Masked()
    assert export(model, (x, mask), {}, path).dynamic
    assert_same(model, path, (torch.randn(4, 7), mask))


def test_the_file_says_nothing_about_this_machine(path: Path) -> None:
    export(Net(lambda m, x: m.norm(m.conv(x))), (torch.randn(3, 3, 9, 8),), {}, path)
    data = path.read_bytes()
    assert str(Path(__file__).parents[2]).encode() not in data
    assert b"site-packages" not in data
    assert {p.key for p in onnx.load(path).metadata_props} == {"normswap_version"}


def test_the_same_model_gives_the_same_file(tmp_path: Path) -> None:
    model, x = Net(lambda m, x: m.norm(m.other(m.conv(x)).relu())), torch.randn(3, 3, 9, 8)
    for name in ("a", "b"):
        export(model, (x,), {}, tmp_path / name)
    assert (tmp_path / "a").read_bytes() == (tmp_path / "b").read_bytes()


# -- what cannot be exported ------------------------------------------------------------------------------------------------------


REFUSED = {
    "control flow that depends on data": (lambda m, x: x if m.norm(m.conv(x)).sum() > 0 else -x, "data-dependent expression"),
    "an operator that ONNX lacks": (
        lambda m, x: torch.linalg.eigvals(x[:, :, :8, :8]).real,
        "ONNX has no operator for aten.linalg_eig.default",
    ),
    "a model that fails": (lambda m, x: m.conv(x[:, :2]), "expected input"),
}


@pytest.mark.parametrize("case", REFUSED)
def test_what_torch_refuses_is_an_export_error(case: str, path: Path) -> None:
    wiring, message = REFUSED[case]
    with pytest.raises(ExportError, match=f"torch cannot make an ONNX graph of this model: .*{message}") as caught:
        export(Net(wiring), (torch.randn(3, 3, 9, 8),), {}, path)
    assert "--no-onnx" in str(caught.value.hint)
    assert os.listdir(path.parent) == []


def test_an_error_names_the_line_of_the_model(path: Path) -> None:
    class Branching(Net):
        def forward(self, x: Tensor) -> Tensor:
            if self.norm(self.conv(x)).sum() > 0:
                return x
            return -x

    with pytest.raises(ExportError, match=r"test_to_onnx\.py, line \d+, in forward"):
        export(Branching(len), (torch.randn(3, 3, 9, 8),), {}, path)


def test_a_model_that_cannot_be_copied_is_an_export_error(path: Path) -> None:
    class Uncopyable(Net):
        def __deepcopy__(self, memo: object) -> Any:
            raise TypeError("cannot pickle this")

    with pytest.raises(ExportError, match="Uncopyable cannot be copied: cannot pickle this"):
        export(Uncopyable(len), (torch.randn(3, 3, 9, 8),), {}, path)


# -- the file ---------------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("error", [KeyboardInterrupt, OSError(28, "No space left on device")])
@pytest.mark.parametrize("step", ["fsync", "replace"])
def test_a_write_that_fails_leaves_what_was_there(error: Any, step: str, path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path.write_bytes(b"an older file")

    def fail(*args: object) -> None:
        raise error

    model, x = nn.Sequential(nn.Conv2d(3, 5, 3), norm(5)), torch.randn(2, 3, 9, 8)
    with monkeypatch.context() as patch:
        patch.setattr(os, step, fail)
        with pytest.raises(KeyboardInterrupt if error is KeyboardInterrupt else ExportError) as caught:
            export(model, (x,), {}, path)
    if error is not KeyboardInterrupt:
        assert str(caught.value) == f"{path} cannot be written: No space left on device"
    assert os.listdir(path.parent) == [path.name]
    assert path.read_bytes() == b"an older file"
    if step == "fsync":
        exported(model, path, 2, 3, 9, 8)


def test_a_directory_that_cannot_be(tmp_path: Path) -> None:
    (tmp_path / "taken").write_text("a file")
    with pytest.raises(NormswapError, match="cannot be written: "):
        export(norm(3), (torch.randn(2, 3),), {}, tmp_path / "taken" / "model.onnx")


def test_the_file_has_the_permissions_of_any_new_file(path: Path) -> None:
    export(norm(3), (torch.randn(2, 3),), {}, path)
    other = path.with_name("other")
    other.touch()
    assert path.stat().st_mode == other.stat().st_mode


def test_large_weights_are_written_from_memory(path: Path) -> None:
    # Above LARGE bytes, in every dtype; read back by protobuf and by onnxruntime.
    model = nn.Sequential(nn.Conv2d(3, 300, 13), norm(300), nn.Conv2d(300, 70, 1))
    exported(model, path, 2, 3, 14, 15)
    proto = onnx.load(path)
    assert {tuple(i.dims) for i in proto.graph.initializer} == {(300, 3, 13, 13), (300,), (70, 300, 1, 1), (70,)}
    assert [i.name for i in proto.graph.input] == ["input"]
    half = copy.deepcopy(model).bfloat16()
    export(half, (torch.randn(2, 3, 14, 15).bfloat16(),), {}, path, opset=22)
    made = {i.name: onnx.numpy_helper.to_array(i) for i in onnx.load(path).graph.initializer}
    np.testing.assert_array_equal(made["2.weight"].astype(np.float32), half[2].weight.detach().float().numpy())


def test_beyond_two_gibibytes_the_weights_go_to_a_file_of_their_own(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("normswap.export.file.INLINE_LIMIT", 400_000)
    model = nn.Sequential(nn.Conv2d(3, 300, 13), norm(300), nn.Conv2d(300, 70, 1))
    result = export(model, (torch.randn(2, 3, 14, 15),), {}, path)
    assert sorted(os.listdir(path.parent)) == ["model.onnx", "model.onnx.data"]
    assert result.folded == ("1",)
    assert path.stat().st_size < 10_000
    onnx.checker.check_model(str(path), full_check=True)
    assert_same(model, path, (torch.randn(3, 3, 14, 15),))


def test_an_export_holds_on_to_no_weight(path: Path) -> None:
    model = nn.Sequential(nn.Conv2d(30, 50, 3), norm(50))
    alive = weakref.ref(model[0].weight)
    export(model, (torch.randn(2, 30, 9, 8),), {}, path)
    del model
    gc.collect()
    assert alive() is None


PEAK = """
import sys, torch
from pathlib import Path
from torch import nn
from normswap.layer.batchless_norm import BatchlessNorm
from normswap.export.to_onnx import export

def peak():
    return next(int(line.split()[1]) for line in open("/proc/self/status") if line.startswith("VmHWM")) * 1024

def model(width, depth):
    return nn.Sequential(*(layer for _ in range(depth) for layer in (nn.Conv2d(width, width, 1), BatchlessNorm(width), nn.ReLU())))

path = Path(sys.argv[1])
export(model(300, 2), (torch.randn(2, 300, 2, 2),), {}, path)  # what torch and onnx themselves need
net = model(2048, 8)
size = sum(p.nbytes for p in net.parameters())
torch.randn(1)
before = peak()
export(net, (torch.randn(2, 2048, 2, 2),), {}, path)
print((peak() - before) / size)
"""


@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="reads the peak memory where Linux keeps it")
def test_memory_is_what_the_folded_weights_take(path: Path, repository: Path) -> None:
    environment = {**os.environ, "PYTHONPATH": str(repository), "PYTHONWARNINGS": "ignore"}
    done = subprocess.run([sys.executable, "-c", PEAK, str(path)], env=environment, capture_output=True, text=True, check=True)
    assert float(done.stdout) < 1.35


def test_importing_it_imports_no_onnx() -> None:
    code = "import sys, normswap.export.to_onnx; print([m for m in ('onnx', 'onnx_ir', 'onnxscript', 'onnxruntime') if m in sys.modules])"
    done = subprocess.run([sys.executable, "-W", "ignore", "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"


def test_a_norm_that_is_called_by_keyword(tmp_path: Path) -> None:
    class ByName(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.conv, self.norm = nn.Conv2d(3, 5, 3), BatchlessNorm(5)

        def forward(self, x: Tensor) -> Tensor:
            return self.norm(input=self.conv(x))  # type: ignore[no-any-return]

    assert export(ByName(), (torch.randn(2, 3, 9, 8),), {}, tmp_path / "m.onnx").folded == ("norm",)


@pytest.mark.parametrize("dtype", [torch.int64, torch.int32, torch.uint8, torch.float32, torch.float16, torch.float64])
@pytest.mark.parametrize("alpha", [1, 2])
def test_a_number_minus_a_mask(dtype: torch.dtype, alpha: int, tmp_path: Path) -> None:
    """`1.0 - mask`, with which models of transformers begin, of integers: torch's own export ends in an error."""

    class Masked(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.conv, self.norm = nn.Conv1d(3, 5, 1), norm(5)

        def forward(self, x: Tensor, mask: Tensor) -> tuple[Tensor, ...]:
            return self.norm(self.conv(x)), torch.rsub(mask, number, alpha=alpha), torch.rsub(mask, 2, alpha=alpha)

    number = 0.1 if dtype is torch.float64 else 1.0  # which float32 would round
    mask = torch.tensor([[1, 1, 0, 2], [0, 1, 1, 1]]).to(dtype)
    model, given = Masked().eval(), (torch.randn(2, 3, 4), mask)
    assert export(model, given, {}, tmp_path / "m.onnx").folded == ("norm",)
    with torch.no_grad():
        _, *expected = model(*given)
    _, *found = runner(tmp_path / "m.onnx", LEVELS[0])(given)
    for e, f in zip(expected, found, strict=True):
        np.testing.assert_array_equal(f, e.numpy(), strict=True)


# -- what an expert would have written ---------------------------------------------------------------------------------------------------


def positive(channels: int) -> Any:
    layer = norm(channels)
    with torch.no_grad():
        layer.weight.abs_().add_(0.1)
    return layer


class Dense(nn.Module):
    """A part of a DenseNet: what a norm reads was put together from what others read, too; a transition ends it."""

    def __init__(self) -> None:
        super().__init__()
        self.stem, self.conv = nn.Conv2d(3, 8, 3), nn.Conv2d(8, 6, 1)
        self.norm1, self.norm2, self.pool = positive(8), positive(14), nn.AvgPool2d(2, 2)
        self.transition = nn.Conv2d(14, 5, 1)

    def forward(self, x: Tensor) -> Tensor:
        x = self.stem(x)
        x = torch.cat([x, self.conv(torch.relu(self.norm1(x)))], 1)
        return self.pool(self.transition(torch.relu(self.norm2(x)))) + x.mean()  # type: ignore[no-any-return]


def test_between_convolutions_onnxruntime_gets_a_norm_instead_of_a_maximum(path: Path) -> None:
    model, x = Dense(), torch.randn(2, 3, 12, 10)
    cuda = export(model, (x,), {}, path, target="cuda")
    assert (cuda.target, cuda.extra, cuda.nodes["Max"]) == ("cuda", {}, 2)
    assert_same(model, path, (x,))
    portable = export(model, (x,), {}, path)
    assert (portable.target, "Max" in portable.nodes, portable.extra) == ("portable", False, {"BatchNormalization": 2})
    assert portable.residue == ("norm1", "norm2")
    assert "would become a maximum, which takes longer in onnxruntime on a CPU than the norm does" in portable.sites[0].reason
    assert_same(model, path, (x,))


def test_elsewhere_a_maximum_is_right_for_onnxruntime_too(path: Path) -> None:
    class Two(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.norm, self.a, self.b = positive(6), nn.Linear(6, 5), nn.Linear(6, 4)

        def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
            x = x.exp()
            return self.a(torch.relu(self.norm(x))), self.b(x)

    model, x = Two(), torch.randn(3, 6)
    result = export(model, (x,), {}, path)
    assert (result.residue, result.nodes["Max"]) == ((), 1)
    assert_same(model, path, (x,))


def test_a_network_without_thresholds_and_fused_operators_is_the_same_for_every_target(path: Path, tmp_path: Path) -> None:
    model, x = nn.Sequential(nn.Conv2d(3, 5, 3), norm(5), nn.LeakyReLU()), torch.randn(2, 3, 9, 8)
    export(model, (x,), {}, path)
    export(model, (x,), {}, tmp_path / "other.onnx", target="cuda")
    assert path.read_bytes() == (tmp_path / "other.onnx").read_bytes()


def test_folded_weights_have_the_names_of_those_they_were_folded_from(path: Path) -> None:
    model = nn.Sequential(nn.Conv2d(3, 5, 3, bias=False), norm(5), nn.ReLU(), nn.Conv2d(5, 4, 1), norm(4), nn.ReLU())
    export(model, (torch.randn(2, 3, 9, 8),), {}, path)
    assert {i.name for i in onnx.load(path).graph.initializer} == {"0.weight", "0.bias", "3.weight", "3.bias"}


def test_a_weight_that_is_still_used_keeps_its_name(path: Path) -> None:
    class Twice(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.conv, self.norm = nn.Conv2d(3, 5, 3), norm(5)

        def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
            return self.conv(x).exp(), self.norm(self.conv(x + 1))

    model, x = Twice(), torch.randn(2, 3, 9, 8)
    assert export(model, (x,), {}, path).residue == ()
    names = {i.name for i in onnx.load(path).graph.initializer}
    assert names >= {"conv.weight", "conv.bias", "conv.weight_folded", "conv.weight_folded_bias"}
    assert_same(model, path, (x,))


def test_the_file_holds_nothing_that_can_be_inferred(path: Path) -> None:
    model = nn.Sequential(nn.Conv2d(3, 5, 3), norm(5), nn.GELU(), norm(5), nn.Conv2d(5, 4, 1))
    export(model, (torch.randn(2, 3, 9, 8),), {}, path)
    proto = onnx.load(path)
    assert not proto.graph.value_info
    inferred = onnx.shape_inference.infer_shapes(proto, strict_mode=True)
    assert {value.name for value in inferred.graph.value_info} == {o for n in proto.graph.node for o in n.output} - {"output"}


def test_equal_constants_are_one(path: Path) -> None:
    model = nn.Sequential(nn.GELU(), norm(5), nn.GELU(), norm(5), nn.GELU())
    result = export(model, (torch.randn(2, 5, 9, 8),), {}, path)
    assert result.nodes["BatchNormalization"] == 2
    assert len(onnx.load(path).graph.initializer) == 6  # two scales, two shifts, one mean and one variance


def test_attention_is_as_short_as_a_person_would_write_it(path: Path) -> None:
    class Attention(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.norm, self.qkv = BatchlessNorm(12, channel_axis=-1), nn.Linear(12, 36)

        def forward(self, x: Tensor) -> Tensor:
            q, k, v = (part.unflatten(-1, (3, 4)).transpose(1, 2) for part in self.qkv(self.norm(x)).chunk(3, -1))
            return nn.functional.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2)

    model, x = Attention(), torch.randn(2, 7, 12)
    result = export(model, (x,), {}, path, opset=20)
    assert result.dynamic
    assert result.nodes == {"Reshape": 4, "Transpose": 4, "MatMul": 3, "Mul": 2, "Add": 1, "Split": 1, "Softmax": 1}
    assert_same(model, path, (x,))


def test_the_bias_of_a_layer_stays_a_vector(path: Path) -> None:
    class Last(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.norm, self.linear = norm(12, channel_axis=-1), nn.Linear(12, 5)

        def forward(self, x: Tensor) -> Tensor:
            return self.linear(self.norm(x.exp()))  # type: ignore[no-any-return]

    model, x = Last(), torch.randn(2, 7, 12)
    assert export(model, (x,), {}, path).residue == ()
    shapes = {i.name: tuple(i.dims) for i in onnx.load(path).graph.initializer}
    assert shapes["linear.bias"] == (5,)  # with more dimensions, onnxruntime makes no Gemm of it
    assert_same(model, path, (x,))
