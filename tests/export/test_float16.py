"""--fp16: the graph of the model in float16, its weights folded from what they were before and rounded once."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnx.reference
import pytest
import torch
from exported import norm, swapped
from torch import Tensor, nn

import normswap
from fixtures.architectures import GPT, AlphaZero, ViT
from normswap.errors import ExportError, UsageError
from normswap.export.float16 import halved
from normswap.export.to_onnx import Export, export
from normswap.export.verified import verified_export
from normswap.layer.batchless_norm import BatchlessNorm
from normswap.models.inputs import as_inputs
from normswap.parity.result import ParityError

CAP = 5e-3


@pytest.fixture
def path(tmp_path: Path) -> Path:
    return tmp_path / "model.onnx"


def constants(path: Path) -> dict[str, np.ndarray]:
    return {i.name: onnx.numpy_helper.to_array(i) for i in onnx.load(path).graph.initializer}


def kinds(path: Path) -> tuple[set[str], list[str], list[str]]:
    """The dtypes of the floating constants, of the inputs and of the outputs."""
    name, graph = onnx.TensorProto.DataType.Name, onnx.load(path).graph
    held = {name(i.data_type) for i in graph.initializer} - {"INT64", "INT32", "BOOL"}
    inputs, outputs = ([name(value.type.tensor_type.elem_type) for value in values] for values in (graph.input, graph.output))
    return held, inputs, outputs


# -- rounded once --------------------------------------------------------------------------------------------------------------------


def test_a_convolution_is_rounded_once(path: Path) -> None:
    model = nn.Sequential(nn.Conv2d(3, 5, 3), norm(5)).eval()
    assert export(model, (torch.randn(2, 3, 9, 8),), {}, path, half=True).folded == ("1",)
    scale, shift = model[1].folded(4)
    found = constants(path)
    weight = model[0].weight.detach().double() * scale.reshape(5, 1, 1, 1)
    np.testing.assert_array_equal(found["0.weight"], weight.half().numpy())
    bias = model[0].bias.detach().double() * scale.flatten() + shift.flatten()
    np.testing.assert_array_equal(found["0.bias"], bias.half().numpy())
    twice = (model[0].weight.detach().half().double() * scale.reshape(5, 1, 1, 1)).half()
    assert (twice.numpy() != found["0.weight"]).any()  # so the test can tell


def test_a_linear_of_three_dimensions_is_rounded_once(path: Path) -> None:
    """Its weight is stored transposed, and its bias is an Add."""
    model = nn.Sequential(norm(7, channel_axis=-1), nn.Linear(7, 5), norm(5, channel_axis=-1)).eval()
    result = export(model, (torch.randn(2, 3, 7),), {}, path, half=True)
    assert result.nodes == {"MatMul": 1, "Add": 1}
    (before, after), linear = (model[i].folded(3) for i in (0, 2)), model[1]
    weight = linear.weight.detach().double().T * before[0].flatten()[:, None] * after[0].flatten()
    bias = linear.bias.detach().double() + linear.weight.detach().double() @ before[1].flatten()
    bias = bias * after[0].flatten() + after[1].flatten()
    found = {array.size: array for array in constants(path).values() if array.dtype == np.float16}
    np.testing.assert_array_equal(found[35], weight.half().numpy())
    np.testing.assert_array_equal(found[5].flatten(), bias.half().numpy())


def test_what_is_not_folded_is_what_torch_rounds_it_to(path: Path) -> None:
    model = nn.Sequential(nn.Conv2d(3, 5, 3), nn.GELU(), nn.Conv2d(5, 4, 2)).eval()
    export(model, (torch.randn(2, 3, 9, 8),), {}, path, half=True)
    found = constants(path)
    for name, parameter in model.named_parameters():
        np.testing.assert_array_equal(found[name], parameter.detach().half().numpy())


# -- what is in float16 --------------------------------------------------------------------------------------------------------------


def test_inputs_outputs_and_weights_are_float16(path: Path) -> None:
    model = nn.Sequential(nn.Conv2d(3, 5, 3), norm(5), nn.ReLU(), nn.Conv2d(5, 4, 1)).eval()
    result = export(model, (torch.randn(2, 3, 9, 8),), {}, path, half=True)
    assert kinds(path) == ({"FLOAT16"}, ["FLOAT16"], ["FLOAT16"])
    assert result.input_names == ("input",)
    assert result.cuda is not None
    assert result.cuda.without_kernel == ()
    onnx.checker.check_model(str(path), full_check=True)


def test_integers_stay_integers(path: Path) -> None:
    result = export(swapped(GPT(blocks=1)), (torch.randint(13, (2, 9)),), {}, path, half=True)
    assert kinds(path) == ({"FLOAT16"}, ["INT64"], ["FLOAT16"])
    assert result.nodes["Attention"] == 1


def test_what_the_model_computes_in_float32_on_purpose_stays_so(path: Path) -> None:
    class Careful(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.linear, self.norm = nn.Linear(7, 5), norm(5)

        def forward(self, x: Tensor) -> Tensor:
            y = self.norm(self.linear(x))
            return y * torch.rsqrt(y.float().square().mean(-1, keepdim=True) + 1e-3).to(y.dtype)

    assert export(Careful().eval(), (torch.randn(3, 7),), {}, path, half=True).nodes["Cast"] == 2
    assert "Cast" not in export(Careful().eval(), (torch.randn(3, 7),), {}, path).nodes


def test_float32_is_the_default(path: Path) -> None:
    export(nn.Sequential(nn.Conv2d(3, 5, 3), norm(5)).eval(), (torch.randn(2, 3, 9, 8),), {}, path)
    assert kinds(path) == ({"FLOAT"}, ["FLOAT"], ["FLOAT"])


def test_nothing_of_the_model_changes(path: Path) -> None:
    model = nn.Sequential(nn.Conv2d(3, 5, 3), nn.BatchNorm2d(5), norm(5)).train()
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    x = torch.randn(2, 3, 9, 8)
    export(model, (x,), {}, path, half=True)
    assert model.training
    assert x.dtype == torch.float32
    assert type(model[2]) is BatchlessNorm
    for name, tensor in model.state_dict().items():
        assert tensor.dtype == before[name].dtype
        assert torch.equal(tensor, before[name])


# -- the same function -----------------------------------------------------------------------------------------------------------------


def tower() -> nn.Module:
    return normswap.convert(AlphaZero(blocks=1).eval(), torch.randn(3, 5, 6, 8)).module


NETS: dict[str, tuple[Callable[[], nn.Module], tuple[int, ...]]] = {
    "conv": (lambda: nn.Sequential(nn.Conv2d(3, 5, 3), norm(5), nn.ReLU(), norm(5), nn.Conv2d(5, 4, 1), norm(4)).eval(), (2, 3, 9, 8)),
    "ViT": (lambda: swapped(ViT(blocks=1)), (2, 3, 12, 12)),
    "AlphaZero": (tower, (3, 5, 6, 8)),
}


def exported(name: str, path: Path) -> tuple[nn.Module, Tensor, Export]:
    make, shape = NETS[name]
    model, x = make(), torch.randn(shape)
    return model, x, normswap.export_onnx(model, x, path, half=True)


@pytest.mark.parametrize("name", NETS)
def test_the_file_is_within_the_limit_of_float16(name: str, path: Path) -> None:
    model, x, result = exported(name, path)
    assert result.parity is not None
    assert result.parity.max_rel <= CAP
    with torch.no_grad():
        want, halfway = model.double()(x.half().double()), halved(model)(x.half())
    got = onnx.reference.ReferenceEvaluator(onnx.load(path)).run(None, {result.input_names[0]: x.half().numpy()})
    for a, b, c in zip(got, *((t if isinstance(t, tuple) else (t,)) for t in (halfway, want)), strict=True):
        size = float(c.abs().max())
        assert a.dtype == np.float16
        assert np.abs(a.astype(float) - c.numpy()).max() <= CAP * size  # the file, in the arithmetic of float16
        assert float((b.double() - c).abs().max()) <= CAP * size  # the model, in torch


def test_a_wrong_fold_is_rolled_back(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from normswap.folding import into_producer

    monkeypatch.setattr(into_producer, "set_bias", lambda node, bias: None)
    _, _, result = exported("conv", path)
    assert result.residue
    assert all(site.reason.startswith("rolled back: folded, ") for site in result.sites if site.left)
    assert result.comparisons.passed


def test_a_wrong_file_is_not_written(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from normswap.folding import into_producer, write

    written = write.write_remainder
    monkeypatch.setattr(into_producer, "set_bias", lambda node, bias: None)
    monkeypatch.setattr(write, "write_remainder", lambda affine, scale, shift, *rest: written(affine, scale, shift + 1, *rest))
    with pytest.raises(ParityError, match=r"converted, but onnxruntime .* is not the same function"):
        exported("conv", path)
    assert not path.exists()


# -- what float16 cannot hold ----------------------------------------------------------------------------------------------------------


def test_a_weight_that_overflows_is_an_error(path: Path) -> None:
    model = nn.Sequential(nn.Conv2d(3, 5, 3), norm(5)).eval()
    with torch.no_grad():
        model[0].weight[2, 1] = -7e4
    with pytest.raises(ExportError, match=r"0\.weight holds 7e\+04, and the largest number of float16 is 65504") as caught:
        export(model, (torch.randn(2, 3, 9, 8),), {}, path, half=True)
    assert caught.value.hint == "write this model in float32, without --fp16"
    assert not path.exists()


class Scaled(nn.Module):
    """With buffers that its forward reads, and one that it does not."""

    def __init__(self, read: float, unread: float) -> None:
        super().__init__()
        self.conv = nn.Conv2d(3, 5, 3)
        self.register_buffer("read", torch.tensor([read]))
        self.register_buffer("unread", torch.tensor([unread]))

    def forward(self, x: Tensor) -> Tensor:
        return self.conv(x) * self.read


def test_only_what_the_file_reads_has_to_fit(path: Path) -> None:
    x = torch.randn(2, 3, 9, 8)
    assert export(Scaled(0.5, 1e6).eval(), (x,), {}, path, half=True).nodes == {"Conv": 1, "Mul": 1}
    with pytest.raises(ExportError, match=r"^read holds 1e\+06, and the largest number of float16 is 65504"):
        export(Scaled(1e6, 0.5).eval(), (x,), {}, path, half=True)


def wide_batch_norm(affine: bool) -> nn.Sequential:
    torch.manual_seed(5)
    model = nn.Sequential(nn.Conv2d(3, 5, 3), nn.BatchNorm2d(5, affine=affine), nn.ReLU(), nn.Conv2d(5, 4, 1)).eval()
    with torch.no_grad():
        model[0].weight.mul_(300)
        model[1].running_var.copy_(torch.tensor([1.4e5, 2.0, 3e5, 65504.0, 6e4]))
        model[1].running_mean.uniform_(-100, 100)
        if affine:
            model[1].weight.uniform_(0.5, 1.5)
            model[1].bias.uniform_(-1, 1)
    return model


@pytest.mark.parametrize("affine", [True, False])
@pytest.mark.parametrize("converted", [True, False])
def test_a_variance_need_not_fit(affine: bool, converted: bool, path: Path) -> None:
    """It is 1.4e5, its root is 374, and the folded weights are ordinary numbers; `source_var` is a copy that is not in the file."""
    model, x = wide_batch_norm(affine), torch.randn(2, 3, 9, 8)
    result = normswap.export_onnx(normswap.convert(model, x) if converted else model, x, path, half=True)
    assert result.nodes == {"Conv": 2, "Relu": 1}
    assert result.parity is not None
    assert result.parity.max_rel <= CAP


@pytest.mark.parametrize("affine", [True, False])
def test_a_batch_norm_in_half_precision_is_the_same_function(affine: bool) -> None:
    model = wide_batch_norm(affine)[1]
    x = 300 * torch.randn(4, 5, 6, 7)
    small = halved(nn.Sequential(model))[0]
    assert bool(small.running_var.isfinite().all())
    assert small.running_var[1] == 2.0  # what fits is rounded, and no more
    with torch.no_grad():
        want, got = model.double()(x.double()), small.double()(x.double())
    assert float((want - got).abs().max()) <= 2e-3 * float(want.abs().max())


def test_a_mean_that_overflows_is_an_error_where_it_is_read(path: Path) -> None:
    model, x = wide_batch_norm(True), torch.randn(2, 3, 9, 8)
    with torch.no_grad():
        model[1].running_mean[2] = 7e4
    with pytest.raises(ExportError, match=r"^1\.running_mean holds 7e\+04, and the largest number of float16 is 65504"):
        export(model, (x,), {}, path, half=True)


def test_an_infinite_mask_is_no_overflow() -> None:
    model = nn.Linear(3, 2)
    model.register_buffer("mask", torch.tensor([0.0, -torch.inf]))
    assert halved(model).mask.dtype == torch.float16


@pytest.mark.parametrize(("std", "left"), [(1e-6, ("1",)), (1e-2, ())])
def test_a_norm_that_float16_cannot_hold_stays(std: float, left: tuple[str, ...], path: Path) -> None:
    model = nn.Sequential(nn.Conv2d(3, 5, 3), norm(5)).eval()
    with torch.no_grad():
        model[1].set_statistics(torch.full((5,), 0.1), torch.full((5,), std))
        model[1].weight.fill_(1)
    assert export(model, (torch.randn(2, 3, 9, 8),), {}, path, half=True).residue == left
    assert export(model, (torch.randn(2, 3, 9, 8),), {}, path).residue == ()


class Cancels(nn.Module):
    """Its two weights are rounded to multiples of 0.5, and their sum is 0.2."""

    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(2, 1, bias=False)
        with torch.no_grad():
            self.linear.weight.copy_(torch.tensor([[1000.3, -1000.1]]))

    def forward(self, x: Tensor) -> Tensor:
        return self.linear(x.expand(-1, 2))  # type: ignore[no-any-return]


def test_a_model_that_needs_more_than_float16_is_not_written(path: Path) -> None:
    with pytest.raises(ParityError, match=r"is not judged: output cannot be judged at any probe: the original itself is") as caught:
        normswap.export_onnx(Cancels().eval(), torch.rand(3, 1) + 1, path, half=True)
    assert caught.value.hint is not None
    assert caught.value.hint.startswith("torch's own model.half() is ")
    assert caught.value.hint.endswith(" away there: if that is as much, write this model in float32")
    assert not path.exists()


def test_the_rounding_of_torch_is_told_where_it_is_large(path: Path) -> None:
    _, found = verified_export(nn.Linear(7, 5).eval(), as_inputs(torch.randn(3, 7)), path, half=True)
    assert found.passed
    result, found = verified_export(Cancels().eval(), as_inputs(torch.rand(3, 1) + 1), path, half=True)
    assert not any(found.parities.values())
    (note,) = result.notes
    assert note.startswith("run by torch in float16, the model itself is ")


def test_an_exported_program_has_its_dtypes(path: Path) -> None:
    x = torch.randn(3, 7)
    program = torch.export.export(nn.Linear(7, 5).eval(), (x,))
    with pytest.raises(UsageError, match="an ExportedProgram computes in the dtypes that it was exported with"):
        export(program, (x,), {}, path, half=True)


def test_a_model_that_does_not_run_in_float16_says_so(path: Path) -> None:
    class Fixed(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.linear = nn.Linear(7, 5)

        def forward(self, x: Tensor) -> Any:
            return self.linear(x.float())

    with pytest.raises(UsageError, match=r"the model cannot run on the example inputs: "):
        normswap.export_onnx(Fixed().eval(), torch.randn(3, 7), path, half=True)


# -- whole nets, by hand -----------------------------------------------------------------------------------------------------------------


@pytest.mark.slow
@pytest.mark.parametrize("name", ["resnet18", "densenet121", "mobilenet_v3_large", "vgg16_bn"])
def test_whole_nets_are_as_near_as_torch_makes_them(name: str, path: Path) -> None:
    """Networks with random weights are ill-conditioned: rounding their weights alone is more than the limit, which refuses some of them."""
    import torchvision
    from test_to_onnx import relative, run

    model = getattr(torchvision.models, name)(num_classes=10)
    with torch.no_grad():
        for module in model.modules():
            if isinstance(module, nn.BatchNorm2d):
                module.momentum = None
        model.train()(torch.randn(8, 3, 64, 64))
    module, x = normswap.convert(model.eval(), torch.randn(2, 3, 64, 64)).module, torch.randn(2, 3, 64, 64).half()
    export(module, (x.float(),), {}, path, half=True)
    (got,) = run(path, (x,))
    with torch.no_grad():
        torch_half, want = halved(module)(x), module.double()(x.double())
    assert relative(got, want) <= max(CAP, 1.5 * relative(torch_half.numpy(), want))
