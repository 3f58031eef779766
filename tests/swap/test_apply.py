"""What a swapped layer computes, and what a swap keeps of everything else."""

from __future__ import annotations

import copy
import threading
import types
from collections.abc import Callable
from typing import Any, cast

import pytest
import torch
import torch.nn.functional as F
import torch.nn.utils.prune
import torchvision_shim  # noqa: F401
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from surgery import IMAGE, error, net, swapped
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

import normswap
from fixtures.nets import CASES, case, randomise
from normswap import BatchlessNorm
from normswap.detect.sites import Plan, Rule, Swap
from normswap.errors import NormswapError, SwapError
from normswap.models.copying import copy_with
from normswap.swap.apply import swap

X = torch.randn(IMAGE, generator=torch.Generator().manual_seed(3))


# -- exact ---------------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("case", [c for c in CASES if c.name != "autocast_region"], ids=lambda c: c.name)
def test_every_net_computes_the_same(case: Any) -> None:
    model = case.make()
    assert error(model, swapped(model, *case.inputs()), *case.inputs()) <= 1e-6


@pytest.mark.parametrize("name", ["batch_norm_2d", "shape_branch", "only_in_list", "graph_module_functional", "root_is_norm"])
def test_the_judge_agrees(name: str) -> None:
    assert normswap.convert(case(name).make(), case(name).inputs()).parity.passed


@pytest.mark.parametrize("std", ["log", "abs", "inv"])
@pytest.mark.parametrize("eps", [0.0, 1e-12, 1e-5, 1e-3, 10.0])
def test_eps_of_any_size(eps: float, std: str) -> None:
    model = net(nn.BatchNorm2d(5, eps=eps)).double()
    model.norm.running_var[0] = 1e-6  # where eps matters
    assert error(model, swapped(model, X.double(), std=std), X.double()) <= 1e-13


NORM_ACTS = {
    "batch_norm_act": lambda timm: timm.BatchNormAct2d(5, act_layer=nn.SiLU),
    "frozen": lambda timm: timm.FrozenBatchNormAct2d(5, act_layer=nn.PReLU, eps=1e-3),
    "no activation": lambda timm: timm.BatchNormAct2d(5, apply_act=False),
    "prelu": lambda timm: timm.BatchNormAct2d(5, act_layer=nn.PReLU, act_kwargs={"num_parameters": 5, "init": 0.3}),
    "dropout": lambda timm: timm.BatchNormAct2d(5, drop_layer=nn.Dropout2d),
}


@pytest.mark.parametrize("make", NORM_ACTS.values(), ids=NORM_ACTS)
def test_norm_act_keeps_its_activation_and_dropout(make: Any) -> None:
    from timm.layers import norm_act

    model = net(make(norm_act))
    result = swapped(model, X)
    assert error(model, result, X) <= 1e-6
    for name in ("act", "drop"):
        mine, theirs = getattr(result.norm, name), getattr(model.norm, name)
        assert type(mine) is type(theirs)
        assert mine is not theirs
        assert list(mine.state_dict()) == list(theirs.state_dict())
        assert not {id(p) for p in mine.parameters()} & {id(p) for p in theirs.parameters()}
    assert error(model, normswap.revert(result), X) == 0


# -- kept ----------------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64])
def test_dtype(dtype: torch.dtype) -> None:
    model, x = net(), X.to(dtype)
    model.to(dtype)
    result = swapped(model, x)
    assert result.conv.weight.dtype == dtype
    assert result.norm.mean.dtype == torch.promote_types(dtype, torch.float32)
    assert error(model, result, x) <= {torch.float16: 2e-3, torch.bfloat16: 2e-2, torch.float64: 1e-14}[dtype]


def test_training_flags_one_by_one() -> None:
    model = nn.Sequential(nn.BatchNorm2d(4), nn.Sequential(nn.BatchNorm2d(4), nn.ReLU()), nn.BatchNorm2d(4)).eval()
    for name in ("0", "1.1", "2"):
        model.get_submodule(name).train()
    result = swapped(model, X)
    assert [m.training for m in result.modules()] == [m.training for m in model.modules()] == [False, True, False, False, True, True]


def test_requires_grad() -> None:
    model = net()
    model.conv.weight.requires_grad_(False)
    model.norm.bias.requires_grad_(False)
    result = swapped(model, X)
    assert {n: p.requires_grad for n, p in result.named_parameters()} == {
        "conv.weight": False,
        "conv.bias": True,
        "norm.weight": True,
        "norm.bias": False,
        "norm.mean": True,
        "norm.log_std": True,
    }
    model.norm.weight.requires_grad_(False)
    assert not any(p.requires_grad for p in swapped(model, X).norm.parameters())


def test_frozen_batch_norm_comes_out_frozen() -> None:
    result = swapped(case("frozen_batch_norm").make(), X)
    assert not any(p.requires_grad for p in result[1].parameters())


def test_memory_format_and_keys_of_the_untouched() -> None:
    model, (x,) = case("channels_last").make(), case("channels_last").inputs()
    result = swapped(model, x)
    assert result[0].weight.is_contiguous(memory_format=torch.channels_last)
    mine = [key for key in result.state_dict() if key[0] in "03"]
    assert mine == [key for key in model.state_dict() if key[0] in "03"]


def test_class_methods_and_attributes() -> None:
    model, (x,) = case("custom_methods").make(), case("custom_methods").inputs()
    result = swapped(model, x)
    assert type(result) is type(model)
    assert result.trained_on == model.trained_on  # type: ignore[union-attr]
    assert result.trained_on is not model.trained_on
    torch.testing.assert_close(result.features(x), model.features(x))  # type: ignore[operator]


def test_train_mode_still_drops() -> None:
    (x,) = case("functional_dropout").inputs()
    result = swapped(case("functional_dropout").make(), x).train()
    first, second = result(x), result(x)
    assert not torch.equal(first == 0, second == 0)


def test_attributes_that_others_set_on_the_norm() -> None:
    model = net()
    model.norm.tag, model.norm.owner = ["a tag"], [model]
    result = swapped(model, X)
    assert result.norm.tag == ["a tag"]
    assert result.norm.owner[0] is result
    assert result.norm.source.attributes["owner"] is result.norm.owner
    assert not hasattr(result.norm, "eps")  # a setting of BatchNorm's, which would do nothing here


def test_children_of_the_norm_stay() -> None:
    """Observers, say: a module that a hook of the norm calls."""
    model = net()
    model.norm.add_module("observer", nn.PReLU())
    model.norm.register_forward_hook(lambda module, args, output: module.observer(output))
    result = swapped(model, X)
    assert error(model, result, X) <= 1e-6
    assert result.norm.observer.weight is not model.norm.observer.weight


def test_a_custom_forward_set_on_the_model() -> None:
    model = net()
    model.forward = types.MethodType(lambda self, x: self.norm(self.norm(self.conv(x))), model)
    result = swapped(model, X)
    assert error(model, result, X) <= 1e-6
    assert result.forward.__self__ is result
    (site,) = normswap.plan(model, X).swaps
    assert (site.calls, site.producer) == (2, None)


# -- hooks ---------------------------------------------------------------------------------------------------------------------


def test_hooks_of_every_kind() -> None:
    model, fired = net(), []
    norm = model.norm
    norm.register_forward_pre_hook(lambda module, args: fired.append(("pre", type(module))))
    norm.register_forward_pre_hook(lambda module, args, kwargs: fired.append(("pre kwargs", type(module))), with_kwargs=True)
    norm.register_forward_hook(lambda module, args, out: fired.append(("post", type(module))))
    norm.register_forward_hook(lambda module, args, kwargs, out: fired.append(("post kwargs", type(module))), with_kwargs=True)
    norm.register_forward_hook(lambda module, args, out: fired.append(("always", type(module))), always_call=True)
    norm.register_full_backward_pre_hook(lambda module, grad: fired.append(("backward pre", type(module))))
    norm.register_full_backward_hook(lambda module, grad_in, grad_out: fired.append(("backward", type(module))))
    result = swapped(model, X)
    assert fired == []
    result(X).sum().backward()
    assert {name for name, _ in fired} == {"pre", "pre kwargs", "post", "post kwargs", "always", "backward pre", "backward"}
    assert {cls for _, cls in fired} == {BatchlessNorm}


def test_removing_a_hook_there_leaves_it_here() -> None:
    model, fired = net(), []
    handle = model.norm.register_forward_hook(lambda *_: fired.append(1))
    result = swapped(model, X)
    handle.remove()
    result(X)
    assert fired == [1]
    result.norm._forward_hooks.clear()
    model.norm.register_forward_hook(lambda *_: fired.append(2))
    result(X)
    assert fired == [1]


def test_a_hook_that_is_a_method_of_the_model_belongs_to_the_copy() -> None:
    """Or else the converted model writes into the original."""
    model = net()
    model.seen = []
    model.norm.register_forward_hook(types.MethodType(lambda self, *_: self.seen.append(1), model))
    result = swapped(model, X)
    result(X)
    assert (len(model.seen), len(result.seen)) == (0, 1)


def test_a_hook_that_computes_the_input_stands_between_the_conv_and_the_norm() -> None:
    model = net()
    model.norm.register_forward_pre_hook(lambda module, args: (args[0] * 2,))
    (site,) = normswap.plan(model, X).swaps
    assert site.producer is None
    assert error(model, swapped(model, X), X) <= 1e-6


# -- the original --------------------------------------------------------------------------------------------------------------


def snapshot(model: nn.Module) -> dict[str, Any]:
    return {
        "state": {k: v.clone() for k, v in model.state_dict().items()},
        "versions": [t._version for t in (*model.parameters(), *model.buffers())],
        "objects": [id(t) for t in (*model.parameters(), *model.buffers(), *model.modules())],
        "flags": [m.training for m in model.modules()],
        "grads": [(p.requires_grad, p.grad) for p in model.parameters()],
        "attributes": [[(k, id(v)) for k, v in m.__dict__.items() if k not in ("training",)] for m in model.modules()],
        "hooks": [len(m._forward_hooks) + len(m._forward_pre_hooks) + len(m._backward_hooks) for m in model.modules()],
        "random": torch.get_rng_state(),
    }


def assert_unchanged(before: dict[str, Any], after: dict[str, Any]) -> None:
    for key in ("versions", "objects", "flags", "grads", "attributes", "hooks"):
        assert before[key] == after[key], key
    assert torch.equal(before["random"], after["random"])
    assert before["state"].keys() == after["state"].keys()
    assert all(torch.equal(a, b) for a, b in zip(before["state"].values(), after["state"].values(), strict=True))


@pytest.mark.parametrize(
    "name", ["batch_norm_act", "root_spectral_norm", "shape_branch", "also_in_list", "graph_module_functional", "norm_hook"]
)
def test_the_original_is_not_touched(name: str) -> None:
    model = case(name).make().train()
    before = snapshot(model)
    normswap.convert(model, case(name).inputs())
    assert_unchanged(before, snapshot(model))


class Messy(nn.Module):
    """Counts, remembers and draws in forward; a tracer leaves proxies in it."""

    def __init__(self, traceable: bool) -> None:
        super().__init__()
        self.conv, self.norm, self.traceable = nn.Conv2d(4, 5, 3), nn.BatchNorm2d(5), traceable
        self.register_buffer("steps", torch.zeros(()))
        self.history: list[Any] = []
        self.last: Any = None

    def forward(self, x: Tensor) -> Tensor:
        self.steps += 1
        self.last = x
        self.history.append(x)
        if not self.traceable and float(x.sum()) > 1e9:
            return x
        return cast(Tensor, self.norm(self.conv(x)) + 0 * torch.rand(1))


@pytest.mark.parametrize("traceable", [True, False])
def test_the_original_is_not_touched_by_tracing(traceable: bool) -> None:
    model = randomise(Messy(traceable), 1).eval()
    before = snapshot(model)
    assert normswap.plan(model, X).backend == ("fx" if traceable else "walk")
    normswap.convert(model, X)
    assert_unchanged(before, snapshot(model))
    assert (model.history, model.last) == ([], None)


def test_a_lazy_model_stays_lazy() -> None:
    model = case("lazy_batch_norm").make()
    normswap.plan(model)
    normswap.convert(model, X)
    assert type(model[1]) is nn.LazyBatchNorm2d  # type: ignore[index]
    assert model[1].has_uninitialized_params()  # type: ignore[index]
    assert type(model[1].running_mean) is nn.UninitializedBuffer  # type: ignore[index]


# -- tensors with a history, which torch refuses to copy --------------------------------------------------------------------------


class Caching(nn.Module):
    """As LevitModel does: in eval mode, what is computed from a parameter is kept for the next time."""

    def __init__(self) -> None:
        super().__init__()
        self.conv, self.norm, self.table = nn.Conv2d(4, 5, 3), nn.BatchNorm2d(5), nn.Parameter(torch.randn(3, 5))
        self.kept: dict[str, list[Tensor]] = {}

    def train(self, mode: bool = True) -> Caching:
        self.kept = {}
        return super().train(mode)

    def forward(self, x: Tensor) -> Tensor:
        shift = self.table[[0, 2]].sum(0) if self.training else self.kept.setdefault("cpu", [self.table[[0, 2]].sum(0)])[0]
        return self.norm(self.conv(x)) + shift[:, None, None]  # type: ignore[no-any-return]


def test_a_cache_is_copied_without_its_history() -> None:
    model = randomise(Caching(), 3).eval()
    expected = model(X)
    assert not model.kept["cpu"][0].is_leaf
    for example in (X, None):
        conversion = normswap.convert(model, example)
        assert [s.name for s in conversion.plan.swaps] == ["norm"]
        copied = conversion.model.kept["cpu"][0]
        assert copied.is_leaf
        assert not copied.requires_grad
        assert torch.equal(copied, model.kept["cpu"][0])
        assert copied.data_ptr() != model.kept["cpu"][0].data_ptr()
        torch.testing.assert_close(conversion.model(X), expected)
    trained = conversion.model.train()
    trained(X).square().sum().backward()
    assert trained.table.grad is not None
    assert trained.table.grad[[0, 2]].all()


def test_a_levit_model_that_was_called() -> None:
    from transformers import LevitConfig, LevitModel

    torch.manual_seed(0)
    sizes = {"hidden_sizes": [32, 48, 64], "num_attention_heads": [2, 3, 4], "key_dim": [8, 8, 8], "depths": [1, 1, 1]}
    model = randomise(LevitModel(LevitConfig(image_size=64, **sizes)), 2).eval()
    x = torch.randn(2, 3, 64, 64)
    expected = model(x).last_hidden_state
    with pytest.raises(RuntimeError, match="support the deepcopy protocol"):
        copy.deepcopy(model)
    conversion = normswap.convert(model, {"pixel_values": x})
    assert len(conversion.plan.swaps) == 26
    torch.testing.assert_close(conversion.model(x).last_hidden_state, expected, rtol=1e-4, atol=1e-4)


def test_the_last_output_is_copied_without_its_history() -> None:
    model = net()
    model.last = model(X)
    copied = normswap.convert(model, X).model.last
    assert torch.equal(copied, model.last)
    assert copied.is_leaf


def test_what_is_computed_stays_one_object() -> None:
    model = nn.Linear(3, 4)
    model.first = model.second = model.weight * 2
    model.part = model.first[1]
    copied = copy_with(model, {})
    assert copied.first is copied.second
    assert copied.part.untyped_storage().data_ptr() == copied.first.untyped_storage().data_ptr() != model.first.untyped_storage().data_ptr()


def test_a_view_of_a_parameter_follows_its_copy() -> None:
    model = nn.Linear(3, 4)
    model.row, model.flat = model.weight[1], model.weight.view(6, 2)
    copied = copy_with(model, {})
    with torch.no_grad():
        copied.weight += 1
    assert torch.equal(copied.row, copied.weight[1])
    assert torch.equal(copied.flat, copied.weight.view(6, 2))
    copied.row.sum().backward()
    assert copied.weight.grad.tolist() == [[0] * 3, [1] * 3, [0] * 3, [0] * 3]
    assert model.weight.grad is None


@pytest.mark.filterwarnings("ignore:.*weight_norm.* is deprecated")
@pytest.mark.parametrize(
    "wrap",
    [nn.utils.weight_norm, nn.utils.spectral_norm, lambda m: torch.nn.utils.prune.l1_unstructured(m, "weight", 0.4)],
    ids=["weight_norm", "spectral_norm", "pruning"],
)
def test_weights_that_hooks_compute(wrap: Callable[[nn.Module], nn.Module]) -> None:
    model = randomise(nn.Sequential(wrap(nn.Conv2d(4, 5, 3)), nn.BatchNorm2d(5)), 2).eval()
    model(X)
    conversion = normswap.convert(model, X)
    assert len(conversion.plan.swaps) == 1
    torch.testing.assert_close(conversion.model(X), model(X))


# -- refusals ------------------------------------------------------------------------------------------------------------------


def test_a_model_that_cannot_be_copied() -> None:
    model = net()
    model.lock = threading.Lock()
    with pytest.raises(SwapError, match="Net cannot be copied: cannot pickle") as raised:
        normswap.convert(model, X)
    assert "a lock, a file or a generator that a module keeps is the usual cause" in str(raised.value)


def test_an_attribute_of_a_norm_that_cannot_be_copied() -> None:
    model = net()
    decided = normswap.plan(model, X)
    model.norm.lock = threading.Lock()
    with pytest.raises(SwapError, match="what belongs to a BatchNorm2d cannot be copied: cannot pickle"):
        swap(model, decided)


class OwnCopy(nn.Sequential):
    def __deepcopy__(self, memo: Any) -> OwnCopy:
        return OwnCopy(*(copy.deepcopy(child) for child in self))


def test_a_copy_that_is_not_as_planned() -> None:
    model = OwnCopy(nn.Conv2d(4, 5, 3), nn.BatchNorm2d(5)).eval()
    with pytest.raises(SwapError, match="1 was to become a BatchlessNorm, but the copy of the model holds BatchNorm2d there") as raised:
        swap(model, normswap.plan(model, X))
    assert "__deepcopy__ without using the memo" in str(raised.value)


def test_a_rule_without_build() -> None:
    model = net()
    rule = Rule("mine", lambda site: isinstance(site.module, _BatchNorm), lambda site: None)
    with pytest.raises(SwapError, match="norm: the rule 'mine' agreed to a swap but has no build function"):
        swap(model, normswap.plan(model, X, rules=(rule,)))


def test_a_plan_of_a_graph_does_not_fit_a_module() -> None:
    graph = case("graph_module_functional").make()
    decided = normswap.plan(graph)
    with pytest.raises(SwapError, match=r"batch_norm is a call of torch\.nn\.functional\.batch_norm, but the code of Net makes no"):
        swap(net(), decided)
    assert isinstance(decided, Plan)
    assert isinstance(decided.swaps[0], Swap)


def test_torchscript_is_refused() -> None:
    with pytest.raises(NormswapError, match="the model is TorchScript, whose layers cannot be replaced"):
        normswap.plan(cast(Any, _scripted()), X)


def _scripted() -> nn.Module:
    import warnings

    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return torch.jit.script(nn.Sequential(nn.Conv2d(4, 5, 3), nn.BatchNorm2d(5)).eval())


def test_a_part_in_torchscript_is_listed() -> None:
    model = nn.Sequential(nn.BatchNorm2d(4), _scripted()).eval()
    decided = normswap.plan(model, X)
    assert [s.name for s in decided.swaps] == ["0"]
    assert [(s.name, s.reason) for s in decided.skips] == [
        ("1.1", "is TorchScript (BatchNorm2d), which cannot be replaced; convert the model before it is scripted")
    ]


# -- random nets ---------------------------------------------------------------------------------------------------------------


class Random(nn.Module):
    """A chain of steps over 4 channels: each is a module of `parts` by index, a residual, or an activation in place."""

    def __init__(self, parts: list[nn.Module], steps: list[tuple[str, int]]) -> None:
        super().__init__()
        self.parts, self.steps = nn.ModuleList(parts), steps

    def forward(self, x: Tensor) -> Tensor:
        kept = x
        for what, index in self.steps:
            if what == "part":
                x = self.parts[index](x)
            elif what == "keep":
                kept = x
            elif what == "add":
                x = x + kept
            elif what == "in place":
                x = F.leaky_relu(x.clone() if x is kept else x, inplace=True)
            elif what == "again":
                x = self.parts[index](self.parts[index](x))
        return x


def _part(kind: str, affine: bool, eps: float) -> nn.Module:
    if kind == "conv":
        return nn.Conv2d(4, 4, 3, padding=1)
    if kind == "transposed":
        return nn.ConvTranspose2d(4, 4, 3, padding=1, groups=2)
    if kind == "linear":
        return nn.Linear(7, 7)
    return nn.BatchNorm2d(4, affine=affine, eps=eps)


PARTS = st.lists(
    st.tuples(st.sampled_from(["conv", "transposed", "linear", "norm", "norm"]), st.booleans(), st.sampled_from([0.0, 1e-5, 0.1])),
    min_size=1,
    max_size=5,
)
STEPS = st.lists(
    st.tuples(st.sampled_from(["part", "part", "keep", "add", "in place", "again"]), st.integers(0, 4)), min_size=1, max_size=8
)


@settings(max_examples=30, deadline=None, derandomize=True, suppress_health_check=[HealthCheck.too_slow])
@given(parts=PARTS, steps=STEPS, aliased=st.booleans())
def test_random_nets(parts: Any, steps: Any, aliased: bool) -> None:
    made = [_part(*part) for part in parts]
    if aliased:
        made.append(made[0])
    steps = [(what, index % len(made)) for what, index in steps]
    model = randomise(Random(made, steps), 5).double().eval()
    x = X.double()
    decided = normswap.plan(model, x)
    assert {s.name for s in decided.swaps} == {n for n, m in model.named_modules() if isinstance(m, _BatchNorm)}
    called = [i for what, i in steps if what == "part"] + [i for what, i in steps if what == "again" for _ in range(2)]
    for site in decided.swaps:
        assert site.calls == sum(model.parts[i] is model.get_submodule(site.name) for i in called)
    candidate = swap(model, decided)
    assert error(model, candidate, x) <= 1e-11
    assert error(model, normswap.revert(candidate), x) == 0
    walked = normswap.plan(_Untraceable(model), x)
    assert walked.backend == "walk"
    mine = [(s.name.removeprefix("inner."), s.calls, s.producer and s.producer.removeprefix("inner.")) for s in walked.swaps]
    assert mine == [(s.name, s.calls, s.producer) for s in decided.swaps]


class _Untraceable(nn.Module):
    def __init__(self, inner: nn.Module) -> None:
        super().__init__()
        self.inner = inner

    def forward(self, x: Tensor) -> Tensor:
        return cast(Tensor, self.inner(x)) if bool(x.isfinite().all()) else x
