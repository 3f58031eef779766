"""One test per bug of a peer (R numbers: the regression list of issue 2), named after it."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from surgery import error, swapped
from torch import nn
from torch.nn.modules.batchnorm import _BatchNorm

import normswap
from fixtures.nets import case, randomise
from normswap import BatchlessNorm


def norms(model: nn.Module) -> list[str]:
    return [name for name, module in model.named_modules(remove_duplicate=False) if isinstance(module, _BatchNorm)]


def converted(name: str) -> Any:
    model = case(name).make()
    conversion = normswap.convert(model, case(name).inputs())
    assert error(model, conversion.model, *case(name).inputs()) <= 1e-6
    return conversion


def assert_exported(name: str, path: Path) -> None:
    """The ONNX file, with whatever was folded in it, computes what the model does."""
    exported = normswap.export_onnx(converted(name), case(name).inputs(), path / "model.onnx")
    assert exported.parity.passed


def test_r01_resnet18_is_exact() -> None:
    """Opacus: output off by 0.68 of its size."""
    from torchvision.models import resnet18

    model = randomise(resnet18(weights=None), 1).eval()
    conversion = normswap.convert(model, torch.randn(2, 3, 64, 64))
    assert conversion.parity.max_rel <= 1e-5
    assert norms(conversion.model) == []
    assert len(conversion.plan.swaps) == 20


def test_r02_every_norm_act_of_efficientnet() -> None:
    """Opacus leaves 49 norms and calls the model valid; torch's SyncBatchNorm conversion drops the activations: error 244."""
    import timm

    model = timm.create_model("efficientnet_b0", pretrained=False).eval()
    x = torch.randn(1, 3, 64, 64)
    decided = normswap.plan(model, x)
    assert (len(decided.swaps), decided.skips) == (49, ())
    candidate = swapped(model, x)
    assert norms(candidate) == []
    assert error(model, candidate, x) <= 1e-4
    assert sum(type(m) is nn.SiLU for m in candidate.modules()) == sum(type(m) is nn.SiLU for m in model.modules()) > 0


@pytest.mark.parametrize("name", ["aliased_same_parent", "aliased_two_parents", "aliased_block"])
def test_r03_a_shared_norm_stays_shared(name: str) -> None:
    """Opacus converts the first name only; SyncBatchNorm's conversion makes two layers of one."""
    model = case(name).make()
    result = converted(name).model
    assert norms(result) == []
    found = [m for _, m in result.named_modules(remove_duplicate=False) if isinstance(m, BatchlessNorm)]
    assert len(found) == len(norms(model)) == 2
    assert found[0] is found[1]


@pytest.mark.parametrize("name", ["affine_false", "frozen_batch_norm"])
def test_r04_no_affine_and_frozen(name: str) -> None:
    """Opacus skips them silently and calls the model valid."""
    decided = converted(name).plan
    assert [s.name for s in decided.swaps] == ["1"]


def test_r05_other_norms_next_to_batch_norm() -> None:
    """Opacus: the option for one fixer is a TypeError in another."""
    decided = converted("other_norms").plan
    assert [s.name for s in decided.swaps] == ["1"]
    assert [(s.name, s.kind) for s in decided.skips] == [("2", "instance_norm"), ("3", "group_norm"), ("4", "layer_norm")]


def test_r06_hooks_of_the_norm_fire() -> None:
    """SyncBatchNorm's conversion loses them; fx.fuse ignores them: error 20."""
    model, (x,) = case("norm_hook").make(), case("norm_hook").inputs()
    result = converted("norm_hook").model
    assert len(result.norm._forward_hooks) == 1
    with torch.no_grad():
        assert float(result(x).abs().max()) == pytest.approx(float(model(x).abs().max()))
        assert float(result(x).abs().max()) > 50  # x 100


def test_r07_a_conv_with_a_second_reader_is_not_folded(tmp_path: Path) -> None:
    """fx.fuse changes the path that does not go through the norm: error 1.55."""
    assert converted("shared_conv").plan.swaps[0].producer is None
    assert_exported("shared_conv", tmp_path)


def test_r08_conv_and_norm_called_twice_are_not_folded_twice(tmp_path: Path) -> None:
    """fx.fuse folds once per call: error 0.43."""
    swap = converted("conv_and_norm_twice").plan.swaps[0]
    assert (swap.calls, swap.producer) == (2, None)
    assert_exported("conv_and_norm_twice", tmp_path)


def test_r09_linear_on_a_sequence(tmp_path: Path) -> None:
    """fx.fuse folds channels into features: error 1.65."""
    assert_exported("linear_on_sequence", tmp_path)


def test_r10_linear_before_a_norm_without_affine(tmp_path: Path) -> None:
    """torch's fuse_linear_bn_eval: TypeError."""
    assert_exported("linear_affine_false", tmp_path)


def test_r11_transposed_conv_in_groups(tmp_path: Path) -> None:
    """torch's fuse_conv_bn_eval: shape error."""
    assert_exported("transposed_conv_groups", tmp_path)


@pytest.mark.parametrize("name", ["eps_1e_3", "eps_0_1"])
def test_r12_eps_survives_a_graph_and_the_mode(name: str) -> None:
    """torchao puts eps back to 1e-5 when an exported graph changes its mode: 41 % off."""
    model, (x,) = case(name).make(), case(name).inputs()
    program = torch.export.export(model, (x,))
    result = normswap.convert(program).model.module()
    with torch.no_grad():
        torch.testing.assert_close(result(x), model(x))
        traced = swapped(torch.fx.symbolic_trace(model), x)
        torch.testing.assert_close(traced.train()(x), model(x))
        torch.testing.assert_close(traced.eval()(x), model(x))


def test_r13_hooks_of_the_root() -> None:
    """A traced graph has none: error 74 for a forward hook, 51 for spectral_norm."""
    assert len(converted("root_hook").model._forward_hooks) == 1
    result = converted("root_spectral_norm").model
    assert len(result._forward_pre_hooks) == 1
    assert {"weight_orig", "weight_u"} <= result.state_dict().keys()


def test_r14_regions_are_kept() -> None:
    """A traced graph has no autocast, no_grad or checkpoint."""
    (x,) = case("autocast_region").inputs()
    seen: list[torch.dtype] = []
    result = converted_region("autocast_region")
    result.conv.register_forward_hook(lambda module, args, output: seen.append(output.dtype))
    result(x)
    assert seen == [torch.bfloat16]

    result = converted_region("no_grad_region")
    result(x).sum().backward()
    assert result.conv.weight.grad is None
    assert result.norm.weight.grad is not None

    result, calls = converted_region("checkpoint_region"), []
    result.conv.register_forward_hook(lambda *_: calls.append(1))
    result(x).sum().backward()
    assert len(calls) == 2  # once more in the backward pass


def converted_region(name: str) -> Any:
    return swapped(case(name).make(), *case(name).inputs())


def test_r15_alias_keys_of_the_state_dict() -> None:
    """A traced graph keeps the keys of one name only."""
    keys = set(converted("aliased_same_parent").model.state_dict())
    assert {key.replace("a.", "b.") for key in keys if key.startswith("a.")} == {key for key in keys if key.startswith("b.")} != set()


def test_r22_an_output_does_not_depend_on_its_batch_mates() -> None:
    """torch.func.replace_all_batch_norm_modules_ destroys the statistics: differs by 0.69."""
    (x,) = case("batch_norm_2d").inputs()
    result = converted("batch_norm_2d").model.train()
    with torch.no_grad():
        alone, together = result(x[:1]), result(torch.cat([x[:1], 100 * x[1:]]))
    torch.testing.assert_close(alone, together[:1])


def test_r26_convert_twice_and_back() -> None:
    """Nothing of this kind exists elsewhere: the second conversion changes nothing, the reversal gives back every bit."""
    model, (x,) = case("batch_norm_2d").make(), case("batch_norm_2d").inputs()
    once = normswap.convert(model, x)
    twice = normswap.convert(once.model, x)
    assert (twice.plan.swaps, twice.plan.skips) == ((), ())
    assert twice.model.state_dict().keys() == once.model.state_dict().keys()
    for mine, theirs in zip(twice.model.state_dict().values(), once.model.state_dict().values(), strict=True):
        assert torch.equal(mine, theirs)
    back = normswap.revert(twice.model)
    assert list(back.state_dict()) == list(model.state_dict())
    for mine, theirs in zip(back.state_dict().values(), model.state_dict().values(), strict=True):
        assert torch.equal(mine, theirs)


def test_r27_the_number_of_arguments_depends_on_flags() -> None:
    """Exporters drop trailing arguments that equal the default, and which do depends on cudnn.enabled."""
    (x,) = case("batch_norm_2d").inputs()
    for enabled in (True, False):
        with torch.backends.cudnn.flags(enabled=enabled):
            program = torch.export.export(case("batch_norm_2d").make(), (x,))
        decided = normswap.plan(program)
        assert (len(decided.swaps), decided.skips) == (2, ())
        assert error(program.module(), swapped(program.module(), x), x) <= 1e-6


def test_r28_momentum_none_lazy_and_qat() -> None:
    """torch.export: a guard on data-dependent values; Opacus and fx.fuse: nothing at all."""
    assert len(converted("momentum_none").plan.swaps) == 1
    (lazy,) = normswap.plan(case("lazy_batch_norm").make()).skips
    assert "run one forward pass before converting" in lazy.reason
    (qat,) = normswap.plan(case("qat_conv_bn").make(), case("qat_conv_bn").inputs()).skips
    assert qat.name == "0.bn"
    assert "quantisation-aware ConvBn2d; convert the float model and quantise the result" in qat.reason
