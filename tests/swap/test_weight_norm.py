"""`to="weight-norm"`: each norm with fixed statistics goes into torch's weight norm of its producer, and the function stays."""

from __future__ import annotations

import contextlib
import copy
import json
from pathlib import Path
from typing import Any

import onnx
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.utils import parametrizations, parametrize

import normswap
from fixtures.nets import randomise
from normswap.errors import LoadError, UsageError
from normswap.layer.batchless_norm import BatchlessNorm
from normswap.layer.weight_norm import Removed, RemovedAct, is_over_outputs

LIMIT = 1e-12


def converted(model: nn.Module, x: Tensor, **options: Any) -> normswap.Conversion[nn.Module]:
    return normswap.convert(randomise(model, 3).double().eval(), x.double(), to="weight-norm", **options)


def error(model: nn.Module, other: nn.Module, x: Tensor) -> float:
    with torch.no_grad():
        a, b = (m.double().eval()(x.double()) for m in (model, other))
    return float((a - b).abs().max() / a.abs().max())


def without_parametrizations(model: nn.Module) -> nn.Module:
    for module in model.modules():
        if parametrize.is_parametrized(module):
            parametrize.remove_parametrizations(module, "weight")
    return model


class Functional(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(3, 5, 3)
        self.register_buffer("m", torch.randn(5))
        self.register_buffer("v", torch.rand(5) + 0.5)
        self.w = nn.Parameter(torch.randn(5))

    def forward(self, x: Tensor) -> Tensor:
        return F.batch_norm(self.conv(x), self.m, self.v, self.w).relu()  # type: ignore[arg-type]


class Padded(nn.Conv1d):
    """A conv with code of its own, which adds its bias."""

    def forward(self, x: Tensor) -> Tensor:
        return F.conv1d(F.pad(x, (1, 2)), self.weight, self.bias)


class Biasless(nn.Conv1d):
    def __init__(self, *args: int) -> None:
        super().__init__(*args, bias=False)  # type: ignore[misc]

    def forward(self, x: Tensor) -> Tensor:
        return F.conv1d(F.pad(x, (1, 2)), self.weight)


FIRES = {
    "conv1d with groups": (nn.Sequential(nn.Conv1d(6, 9, 3, groups=3), nn.BatchNorm1d(9)), (2, 6, 15)),
    "depthwise, no bias": (nn.Sequential(nn.Conv2d(5, 5, 3, groups=5, bias=False), nn.BatchNorm2d(5)), (2, 5, 7, 8)),
    "conv3d, no affine": (nn.Sequential(nn.Conv3d(2, 3, 2), nn.BatchNorm3d(3, affine=False)), (2, 2, 4, 5, 6)),
    "transposed": (nn.Sequential(nn.ConvTranspose2d(6, 9, 3, bias=False), nn.BatchNorm2d(9)), (2, 6, 5, 7)),
    "transposed with groups": (nn.Sequential(nn.ConvTranspose2d(6, 9, (3, 2), groups=3), nn.BatchNorm2d(9)), (2, 6, 5, 7)),
    "linear": (nn.Sequential(nn.Linear(6, 7, bias=False), nn.BatchNorm1d(7), nn.Tanh(), nn.Linear(7, 2)), (4, 6)),
    "in code": (Functional(), (2, 3, 8, 9)),
    "a conv with code of its own": (nn.Sequential(Padded(3, 4, 3, bias=False), nn.BatchNorm1d(4)), (2, 3, 11)),
    "sync": (nn.Sequential(nn.Conv2d(3, 4, 3), nn.SyncBatchNorm(4)), (2, 3, 8, 9)),
}


@pytest.mark.parametrize("case", FIRES)
def test_the_function_stays(case: str) -> None:
    model, shape = FIRES[case]
    x = torch.randn(shape)
    before = {name: value.clone() for name, value in model.double().state_dict().items()}
    randomised = {name: value.clone() for name, value in randomise(model, 3).state_dict().items()}
    conversion = converted(model, x)
    assert before.keys() == randomised.keys()
    assert len(conversion.plan.swaps) == 1
    assert error(model, conversion.model, x) <= LIMIT
    assert sum(is_over_outputs(module) for module in conversion.model.modules()) == 1
    assert all(torch.equal(value, randomised[name]) for name, value in model.state_dict().items())  # the original is untouched
    assert not any(isinstance(module, nn.modules.batchnorm._BatchNorm) for module in conversion.model.modules())
    assert error(model, without_parametrizations(conversion.model), x) <= LIMIT


def test_g_is_gamma_times_the_length_of_the_filter_over_the_std_and_w_stays() -> None:
    conv, norm = nn.Conv2d(3, 5, (2, 3), bias=False), nn.BatchNorm2d(5, eps=0.25)
    model = nn.Sequential(conv, norm)
    after = converted(model, torch.randn(2, 3, 6, 7)).model
    weight = after[0].parametrizations.weight  # type: ignore[index]
    sigma = (norm.running_var + 0.25).sqrt()  # type: ignore[operator]
    torch.testing.assert_close(weight.original0.flatten(), norm.weight * conv.weight.flatten(1).norm(dim=1) / sigma)
    assert torch.equal(weight.original1, conv.weight)
    torch.testing.assert_close(after[0].bias, norm.bias - norm.weight * norm.running_mean / sigma)  # type: ignore[index, operator]
    assert type(after[1]) is Removed  # type: ignore[index]


def test_a_weight_of_zero_gives_a_constant_channel() -> None:
    model = nn.Sequential(nn.Linear(3, 4), nn.BatchNorm1d(4)).double().eval()
    randomise(model, 3)
    with torch.no_grad():
        model[1].weight[2] = 0
    x = torch.randn(5, 3, dtype=torch.float64)
    after = normswap.convert(model, x, to="weight-norm").model
    assert error(model, after, x) <= LIMIT
    assert not bool(after[0].weight[2].any())


def test_a_batchless_norm_goes_in_too_and_leaves_its_producer_alone() -> None:
    model = randomise(nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.ReLU(), nn.Conv2d(4, 2, 1)), 3).eval()
    x = torch.randn(2, 3, 8, 9)
    batchless = normswap.convert(model, x).model
    conversion = normswap.convert(batchless, x, to="weight-norm")
    assert [(s.kind, s.producer) for s in conversion.plan.swaps] == [("batchless", "0")]
    assert conversion.parity.passed
    assert not conversion.model[0]._forward_hooks  # of the coupling
    assert isinstance(batchless[1], BatchlessNorm)
    assert batchless[0]._forward_hooks


def test_the_activation_of_a_norm_act_layer_stays() -> None:
    layers = pytest.importorskip("timm.layers")
    model = nn.Sequential(nn.Conv2d(3, 4, 3), layers.BatchNormAct2d(4, act_layer=nn.SiLU))
    x = torch.randn(2, 3, 8, 9)
    after = converted(model, x).model
    assert error(model, after, x) <= LIMIT
    assert isinstance(after[1], RemovedAct)  # type: ignore[index]
    assert isinstance(after[1].act, nn.SiLU)  # type: ignore[index]


def test_a_norm_under_two_names_is_removed_under_both() -> None:
    class Twice(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.conv, self.norm = nn.Conv2d(3, 4, 1), nn.BatchNorm2d(4)
            self.again = [self.norm]
            self.alias = self.norm

        def forward(self, x: Tensor) -> Tensor:
            return self.again[0](self.conv(x))  # type: ignore[no-any-return]

    after = converted(Twice(), torch.randn(2, 3, 5, 6)).model
    assert isinstance(after.norm, Removed)
    assert after.norm is after.alias is after.again[0]  # type: ignore[index]


def dead_filter() -> nn.Module:
    model = nn.Sequential(nn.Linear(3, 4), nn.BatchNorm1d(4))
    with torch.no_grad():
        model[0].weight[1] = 0
    return model


def hooked() -> nn.Module:
    model = nn.Sequential(nn.Linear(3, 4), nn.BatchNorm1d(4))
    model[1].register_forward_hook(lambda module, args, output: None)
    return model


class Sum(nn.Module):
    """The conv's output has two readers."""

    def __init__(self) -> None:
        super().__init__()
        self.conv, self.norm = nn.Conv2d(3, 4, 1), nn.BatchNorm2d(4)

    def forward(self, x: Tensor) -> Tensor:
        y = self.conv(x)
        return y + self.norm(y)  # type: ignore[no-any-return]


KEPT: dict[str, tuple[nn.Module, tuple[int, ...], str]] = {
    "first": (nn.Sequential(nn.BatchNorm1d(3), nn.Linear(3, 2)), (5, 3), "has no conv or linear layer to go into: its input does not come"),
    "two readers": (
        Sum(),
        (2, 3, 5, 6),
        "has no conv or linear layer to go into: its input is the output of conv, whose output other code",
    ),
    "another axis": (nn.Sequential(nn.Linear(6, 7), nn.BatchNorm1d(7)), (2, 7, 6), "cannot go into 0: its channels lie on another axis"),
    "dead": (dead_filter(), (5, 3), "has a producer with 1 of 4 filters that are 0, and weight norm divides by their length; prune them"),
    "hooks": (hooked(), (5, 3), "has hooks, which would see another input; remove them, or leave it"),
    "no bias to add": (nn.Sequential(Biasless(3, 4, 3), nn.BatchNorm1d(4)), (2, 3, 9), "cannot go into 0, which has no bias, and code"),
    "layer norm": (nn.Sequential(nn.Linear(3, 4), nn.LayerNorm(4)), (5, 3), "LayerNorm takes its statistics from each sample, so an exact"),
    "weight norm already": (
        nn.Sequential(parametrizations.weight_norm(nn.Linear(3, 4)), nn.BatchNorm1d(4)),
        (5, 3),
        "has no conv or linear layer to go into: its input is the output of 0, whose weight is computed from other parameters",
    ),
}


@pytest.mark.parametrize("case", KEPT)
def test_what_cannot_be_done_is_kept_with_the_reason(case: str) -> None:
    model, shape, reason = KEPT[case]
    conversion = converted(model, torch.randn(shape))
    assert not conversion.plan.swaps
    (skip,) = conversion.plan.skips
    assert skip.reason.startswith(reason)
    assert "approximate" not in skip.reason
    assert error(model, conversion.model, torch.randn(shape)) == 0


def test_a_scale_that_does_not_fit_float16_is_kept() -> None:
    model = nn.Sequential(nn.Linear(3, 4), nn.BatchNorm1d(4, eps=0.0)).half().eval()
    with torch.no_grad():
        model[1].running_var.fill_(6e-8)
        model[1].weight.fill_(300.0)
        model[0].weight.fill_(2.0)
    conversion = normswap.convert(model, torch.randn(5, 3).half() * 1e-3, to="weight-norm")
    assert conversion.plan.skips[0].reason.startswith("has a scale that does not fit the float16 of its producer")


def test_include_and_exclude_choose() -> None:
    model = nn.Sequential(nn.Linear(3, 4), nn.BatchNorm1d(4), nn.Linear(4, 5), nn.BatchNorm1d(5))
    conversion = converted(model, torch.randn(6, 3), exclude=["3"])
    assert [s.name for s in conversion.plan.swaps] == ["1"]
    assert isinstance(conversion.model[3], nn.BatchNorm1d)


@pytest.mark.parametrize(
    ("name", "value"), [("approximate", True), ("max_drift", 0.1), ("std", "abs"), ("aux", "none"), ("coupling", "none")]
)
def test_an_option_of_batchless_norm_is_refused(name: str, value: Any) -> None:
    with pytest.raises(UsageError) as raised:
        normswap.convert(nn.Linear(2, 3), torch.randn(1, 2), to="weight-norm", **{name: value})
    assert raised.value.message == f"to='weight-norm' is exact and makes no BatchlessNorm, so it has no {name}"


def test_an_unknown_target_is_refused() -> None:
    with pytest.raises(UsageError, match="to is 'weightnorm'; expected one of"):
        normswap.convert(nn.Linear(2, 3), torch.randn(1, 2), to="weightnorm")  # type: ignore[arg-type]


# -- afterwards ------------------------------------------------------------------------------------------------------------------------


def net() -> nn.Module:
    return nn.Sequential(
        nn.Conv2d(3, 4, 3, bias=False), nn.BatchNorm2d(4), nn.ReLU(), nn.ConvTranspose2d(4, 6, 2, groups=2), nn.BatchNorm2d(6)
    )


def test_it_is_saved_and_loaded(tmp_path: Path) -> None:
    model, x = randomise(net(), 3).eval(), torch.randn(2, 3, 8, 9)
    model[0].weight.requires_grad_(False)
    conversion = normswap.convert(model, x, to="weight-norm")
    directory = normswap.save(conversion, tmp_path / "converted")
    again = normswap.load(directory, net)
    assert isinstance(again, nn.Module)
    assert torch.equal(again.eval()(x), conversion.model(x))
    frozen = [name for name, p in again.named_parameters() if not p.requires_grad]
    assert frozen == ["0.parametrizations.weight.original1"]
    assert [name for name, p in conversion.model.named_parameters() if not p.requires_grad] == frozen
    assert error(model, without_parametrizations(again), x) <= 1e-6


def test_another_architecture_is_refused(tmp_path: Path) -> None:
    directory = normswap.save(normswap.convert(net().eval(), torch.randn(2, 3, 8, 9), to="weight-norm"), tmp_path / "converted")
    with pytest.raises(LoadError, match=r"3 of the given architecture is no conv or linear layer, but .* was saved with one"):
        normswap.load(directory, lambda: nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.ReLU(), nn.Tanh(), nn.BatchNorm2d(6)))
    with pytest.raises(LoadError, match=r"1 of the given architecture has another layer, but .* was saved with a Removed"):
        normswap.load(
            directory,
            lambda: nn.Sequential(nn.Conv2d(3, 4, 3), nn.Tanh(), nn.ReLU(), nn.ConvTranspose2d(4, 6, 2, groups=2), nn.BatchNorm2d(6)),
        )


def test_it_trains_as_torchs_weight_norm_does() -> None:
    """A step of the result is a step of the same layers under `torch.nn.utils.parametrizations.weight_norm`."""
    model, x = randomise(nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4)), 3).eval(), torch.randn(2, 3, 8, 9)
    ours = normswap.convert(model, x, to="weight-norm").model.train()
    theirs = nn.Sequential(parametrizations.weight_norm(nn.Conv2d(3, 4, 3)))
    theirs.load_state_dict(copy.deepcopy(ours).state_dict())
    for net in (ours, theirs):
        net(x).square().mean().backward()
        torch.optim.SGD(net.parameters(), lr=0.1).step()
    for (name, a), (other, b) in zip(ours.named_parameters(), theirs.named_parameters(), strict=True):
        assert name == other
        torch.testing.assert_close(a, b)


@pytest.mark.parametrize("frozen", ["one weight", "all", "no_grad", "inference_mode"])
def test_its_file_has_plain_layers(frozen: str, tmp_path: Path) -> None:
    model, x = randomise(net(), 3).eval(), torch.randn(2, 3, 8, 9)
    model.requires_grad_(frozen != "all")
    model[0].weight.requires_grad_(frozen != "one weight")
    mode = {"no_grad": torch.no_grad, "inference_mode": torch.inference_mode}.get(frozen, contextlib.nullcontext)
    with mode():
        conversion = normswap.convert(model, x, to="weight-norm")
        export = normswap.export_onnx(conversion, x, tmp_path / "model.onnx")
        again = normswap.load(normswap.save(conversion, tmp_path / "converted"), net)
    assert export.parity
    assert [node.op_type for node in onnx.load(tmp_path / "model.onnx").graph.node] == ["Conv", "Relu", "ConvTranspose"]
    assert isinstance(again, nn.Module)
    with torch.no_grad():
        # two roundings of float32 between 1 and 2, where the largest output is, were measured: 2.4e-7
        torch.testing.assert_close(again.eval()(x), model(x), rtol=0, atol=3e-7)


def test_the_command_converts_a_pickled_model_and_verify_reads_the_directory(tmp_path: Path) -> None:
    from normswap.cli.convert import ConvertOptions, convert_to_directory

    torch.save(randomise(net(), 3).eval(), tmp_path / "net.pt")
    report, directory = convert_to_directory(
        str(tmp_path / "net.pt"), tmp_path / "out", ConvertOptions(to="weight-norm", inputs=["2x3x8x9"], onnx=False)
    )
    assert report.status == "converted"
    recipe = json.loads((directory / "recipe.json").read_text())
    assert recipe["weight_norms"] == [{"name": "0", "bias": True}, {"name": "3", "bias": True}]
    loaded = normswap.load(directory)
    assert isinstance(loaded, nn.Module)
    assert sum(is_over_outputs(module) for module in loaded.modules()) == 2
    assert normswap.verify(tmp_path / "net.pt", directory, torch.randn(2, 3, 8, 9))


# -- torchvision -----------------------------------------------------------------------------------------------------------------------

# name -> (BatchNorms, those with a producer)
QUICK = {"resnet18": (20, 20), "mobilenet_v3_small": (34, 34)}
SLOW = {
    "vgg11_bn": (8, 8),  # its Linears have 124 million weights
    "densenet121": (121, 59),  # the others come before the convolution
    "efficientnet_b0": (49, 49),
    "googlenet": (59, 57),  # two in heads that eval mode does not run
    "inception_v3": (96, 94),
    "mnasnet0_5": (52, 52),
    "mobilenet_v2": (52, 52),
    "regnet_y_400mf": (53, 53),
    "resnext50_32x4d": (53, 53),
    "shufflenet_v2_x0_5": (56, 56),
}


@pytest.mark.parametrize("name", [*QUICK, *(pytest.param(name, marks=pytest.mark.slow) for name in SLOW)])
def test_every_batch_norm_with_a_producer_on_torchvision(name: str) -> None:
    models = pytest.importorskip("torchvision.models")
    options = {"init_weights": False} if name in ("googlenet", "inception_v3") else {}
    model, x = models.get_model(name, **options), torch.randn(2, 3, *((64, 48) if name in QUICK else (96, 96)))
    conversion = converted(model, x)
    norms = [each for each in (*conversion.plan.swaps, *conversion.plan.skips) if each.kind == "batch_norm"]
    assert (len(norms), len(conversion.plan.swaps)) == {**QUICK, **SLOW}[name]
    assert all(each.producer is None for each in conversion.plan.skips)
    assert error(model, conversion.model, x) <= LIMIT
    assert error(model, without_parametrizations(conversion.model), x) <= LIMIT
