"""A norm and its producer computed as one: the function and every gradient are those of the two one after the other."""

from __future__ import annotations

import copy
import gc
import math
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from producers import F64, KINDS, close, pair_of
from torch import Tensor, nn

import normswap
from normswap.errors import UsageError
from normswap.layer.batchless_norm import BatchlessNorm
from normswap.layer.pair import Call, call_of
from normswap.training.micro import kept_for_backward

pytestmark = pytest.mark.filterwarnings("ignore:Using padding=.same. with even kernel")


def layers(model: nn.Module) -> list[BatchlessNorm]:
    return [m for m in model.modules() if isinstance(m, BatchlessNorm)]


def apart(model: nn.Module) -> nn.Module:
    """A copy whose norms somebody watches, so that they are computed one after the other."""
    copied = copy.deepcopy(model)
    for layer in layers(copied):
        layer.register_forward_pre_hook(lambda module, args: None)
    return copied


def is_pair(model: nn.Module, x: Tensor) -> list[bool]:
    """For each norm, whether it was computed with its producer."""
    copy.deepcopy(model)(x)
    model(x)
    return [layer.run.pair is not None for layer in layers(model)]


def drawn(model: nn.Module, *, stepped: bool, seed: int = 0) -> nn.Module:
    """With a trend that is not 0, as in the middle of training."""
    generator = torch.Generator().manual_seed(seed)
    for layer in layers(model):
        layer.stepped = stepped
        assert layer.trend is not None
        with torch.no_grad():
            layer.trend.copy_(torch.randn(layer.trend.shape, generator=generator, dtype=F64))
    return model


def gradients(model: nn.Module, x: Tensor, *, scale: float = 1.0) -> tuple[Tensor, dict[str, Tensor]]:
    x = x.clone().requires_grad_()
    y = model(x)
    task = torch.randn(y.shape, generator=torch.Generator().manual_seed(4), dtype=F64).to(y.dtype)
    (y * task * scale).sum().backward()
    found = {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}
    assert x.grad is not None
    model.zero_grad()
    return y.detach(), {**found, "x": x.grad}


def agree(model: nn.Module, x: Tensor, tolerance: float = 1e-11) -> None:
    one, two = gradients(model, x), gradients(apart(model), x)
    close(one[0], two[0], tolerance)
    assert one[1].keys() == two[1].keys()
    size = max(float(t.abs().max()) for t in two[1].values())
    for name, value in two[1].items():
        assert float((one[1][name] - value).abs().max()) <= tolerance * max(float(value.abs().max()), 1e-3 * size), name


@pytest.mark.parametrize("stepped", [False, True])
@pytest.mark.parametrize("kind", KINDS)
def test_together_is_one_after_the_other(kind: str, stepped: bool) -> None:
    source, x = pair_of(kind)
    model = drawn(normswap.convert(source, x[:3]).model.train(), stepped=stepped)
    assert is_pair(model, x) == [True]
    x = x * torch.linspace(0.1, 4, len(x), dtype=F64).view(-1, *(1,) * (x.dim() - 1))
    agree(model, x)
    (layer,) = layers(model)
    model(x)
    factor: Any = layer.run.factor
    assert factor is None if not stepped else int((factor < 1).sum()) > 0


@settings(max_examples=20, deadline=None)
@given(data=st.data())
def test_any_conv(data: st.DataObject) -> None:
    """Ranks, strides, groups, padding modes, biases, affine or not, in-place activations, few places or many."""
    draw = data.draw
    torch.manual_seed(draw(st.integers(0, 99)))
    dims, groups, transposed = draw(st.integers(1, 3)), draw(st.sampled_from([1, 1, 2, 3])), draw(st.booleans())
    kernel = tuple(draw(st.integers(1, 3)) for _ in range(dims))
    options: dict[str, Any] = {name: draw(st.integers(1, 2)) for name in ("stride", "dilation")}
    options |= {"groups": groups, "bias": draw(st.booleans())}
    if transposed:
        cls: Any = (nn.ConvTranspose1d, nn.ConvTranspose2d, nn.ConvTranspose3d)[dims - 1]
    else:
        cls = (nn.Conv1d, nn.Conv2d, nn.Conv3d)[dims - 1]
        options["padding_mode"] = draw(st.sampled_from(["zeros", "zeros", "reflect", "circular", "replicate"]))
        options["padding"] = draw(st.sampled_from([0, 1, "valid"] + (["same"] if options["stride"] == 1 else [])))
    inputs, outputs = groups * draw(st.integers(1, 3)), groups * draw(st.integers(1, 4))
    norm: Any = (nn.BatchNorm1d, nn.BatchNorm2d, nn.BatchNorm3d)[dims - 1](outputs, affine=draw(st.booleans()))
    norm.running_mean.normal_()
    norm.running_var.uniform_(0.3, 2)
    if norm.affine:
        nn.init.normal_(norm.bias)
        with torch.no_grad():
            norm.weight.copy_(torch.randn(outputs).sign() * (0.5 + torch.rand(outputs)))
            norm.weight[0] = draw(st.sampled_from([1.0, -0.3]))
    after = draw(st.sampled_from([nn.ReLU(), nn.ReLU(inplace=True), nn.SiLU(inplace=True), nn.Identity()]))
    model = nn.Sequential(cls(inputs, outputs, kernel, **options), norm, after).to(F64).eval()
    x = torch.randn(draw(st.integers(1, 3)), inputs, *(draw(st.integers(5, 7)) for _ in range(dims)), dtype=F64)
    converted = drawn(normswap.convert(model, x).model.train(), stepped=draw(st.booleans()))
    assert is_pair(converted, x) == [True]
    agree(converted, 2 * x, 1e-9)


def test_a_weight_of_nothing_keeps_the_statistics_of_its_channel() -> None:
    """Its output is its bias, which does not tell the input: the statistics stay where they are, and nothing is divided by 0."""
    source, x = pair_of("conv2d")
    with torch.no_grad():
        source[1].weight[2] = 0  # type: ignore[index, operator]
        source[1].weight[3] = 1e-12  # type: ignore[index, operator]
    model: Any = drawn(normswap.convert(source, x[:3]).model.train(), stepped=True)
    before = [t.detach().clone() for t in model[1].statistics()]
    _, found = gradients(model, x)
    assert all(t.isfinite().all() for t in found.values())
    assert found["1.mean"][2] == 0
    assert found["1.log_std"][2] == 0
    assert (found["1.mean"][[0, 1, 4]] != 0).all()
    apart_model: Any = apart(model)
    for each in (model, apart_model):
        for layer in layers(each):
            layer.stepped = False  # the limit counts a channel that it knows nothing of as 0
            with torch.no_grad():
                layer.trend[:, 2:4] = 0  # type: ignore[index]
    one, two = (gradients(each, x)[1] for each in (model, apart_model))
    for name, value in two.items():
        rows = [0, 1, 4] if name in ("1.mean", "1.log_std", "1.trend") else slice(None)
        value, other = (t[:, rows] if name == "1.trend" else t[rows] for t in (value, one[name]))
        close(other / value.abs().max(), value / value.abs().max(), 1e-9)
    model(x).sum().backward()
    torch.optim.SGD(normswap.param_groups(model, lr=0.0)).step()
    for old, new in zip(before, model[1].statistics(), strict=True):
        assert new[2] == old[2]
        assert (new != old)[[0, 1, 4]].all()


@pytest.mark.parametrize("size", [0.0, 1e-30, 1e-3])
def test_a_dead_filter(size: float) -> None:
    source, x = pair_of("conv2d")
    with torch.no_grad():
        source[0].weight[1] *= size  # type: ignore[index, operator]
        source[1].running_var[1] = 0  # type: ignore[index, operator]
    agree(drawn(normswap.convert(source, x[:3]).model.train(), stepped=True), x, 1e-10)


def test_accumulated_over_micro_batches_it_is_the_whole_batch() -> None:
    """1 x 24, 8 x 3 and 24 x 1."""
    source, x = pair_of("grouped")
    model = drawn(normswap.convert(source, x[:3]).model.train(), stepped=True)
    found = []
    for parts in (1, 3, 24):
        model.zero_grad()
        normswap.backward_in_micro_batches(model, lambda part: model(part).square().mean(), x, size=len(x) // parts)
        found.append({name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None})
    for other in found[1:]:
        for name, value in found[0].items():
            close(other[name], value, 1e-9)


@pytest.mark.filterwarnings("ignore:Using backward.. with create_graph=True")
def test_differentiated_twice() -> None:
    source, x = pair_of("conv1d")
    model = drawn(normswap.convert(source, x[:3]).model.train(), stepped=True)
    found = []
    for each in (model, apart(model)):
        weights = [p for name, p in each.named_parameters() if name in ("0.weight", "1.weight", "1.bias")]
        u = x.clone().requires_grad_()
        first = torch.autograd.grad(each(u).square().sum(), [*weights, u], create_graph=True)
        second = torch.autograd.grad(sum(t.square().sum() for t in first), [*weights, u])  # type: ignore[arg-type]
        found.append([*first, *second])
    for one, two in zip(*found, strict=True):
        close(one.detach() / two.detach().abs().max(), two.detach() / two.detach().abs().max(), 1e-10)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_under_autocast_it_is_as_close_as_rounding_lets_it(dtype: torch.dtype) -> None:
    source, x = pair_of("conv2d")
    model = normswap.convert(source.float(), x[:3].float()).model.train()
    exact = gradients(model, x.float())[1]
    with torch.autocast("cpu", dtype):
        assert model(x.float()).dtype == torch.float32 if isinstance(model[2], nn.Identity) else True  # type: ignore[index]
        rough = gradients(model, x.float())[1]
    for name, value in exact.items():
        assert float((rough[name] - value).abs().max()) < 0.05 * float(value.abs().max()) + 1e-3, name


def test_the_input_of_the_norm_is_not_kept() -> None:
    """What backward keeps: the input of the conv, and z in 8 bits."""
    torch.manual_seed(0)
    source = nn.Sequential(nn.Conv2d(3, 8, 1), nn.BatchNorm2d(8), nn.ReLU(inplace=True), nn.Conv2d(8, 16, 1), nn.BatchNorm2d(16)).eval()
    x = torch.randn(5, 3, 20, 21)
    model = normswap.convert(source, x).model.train()
    with kept_for_backward(model.parameters()) as kept:
        y = model(x)
    places = 5 * 20 * 21
    assert y.requires_grad
    expected = 4 * places * (3 + 8) + places * (8 + 16)  # x and relu(y1) in float32, z1 and z2 in 8 bits
    assert expected <= sum(kept.values()) < expected + 6000


def test_in_float32_the_trend_sees_z_in_steps_of_a_sixteenth() -> None:
    source, x = pair_of("conv2d")
    model = drawn(normswap.convert(source.float(), x[:3].float()).model.train(), stepped=True)
    one, two = gradients(model, x.float())[1], gradients(apart(model), x.float())[1]
    for name in ("x", "0.weight"):
        assert 1e-7 < float((one[name] - two[name]).norm() / two[name].norm()) < 0.03


# --- when ---------------------------------------------------------------------------------------------------------------------------------


def test_it_is_a_pair_only_where_it_trains() -> None:
    source, x = pair_of("conv2d")
    model: Any = normswap.convert(source, x[:3]).model.train()
    assert is_pair(model, x) == [True]
    with torch.no_grad():
        assert is_pair(model, x) == [True]
        close(model(x), source(x))
        raw = F.conv2d(x, model[0].weight, None, padding=model[0].padding)
    with normswap.masked(model, torch.ones(len(x), dtype=torch.bool)):
        assert is_pair(model, x) == [False]
    model[0].eval()
    assert is_pair(model, x) == [False]
    model.train()
    model[1].mean.requires_grad_(False)
    assert is_pair(model, x) == [False]
    model[1].mean.requires_grad_(True)
    model.eval()
    close(model[0](x), raw)
    close(model(x), source(x))


@pytest.mark.parametrize(
    "register",
    [
        lambda conv, norm, seen: conv.register_forward_hook(lambda m, args, output: seen.append(output)),
        lambda conv, norm, seen: norm.register_forward_pre_hook(lambda m, args: seen.append(args[0])),
        lambda conv, norm, seen: torch.nn.modules.module.register_module_forward_hook(
            lambda m, args, output: seen.append(output) if isinstance(m, nn.Conv2d) else None
        ),
        lambda conv, norm, seen: conv.register_full_backward_hook(lambda m, by_input, by_output: None),
        lambda conv, norm, seen: norm.register_full_backward_hook(lambda m, by_input, by_output: None),
    ],
)
def test_hooks_see_what_they_always_saw(register: Any) -> None:
    source, x = pair_of("conv2d")
    model: Any = normswap.convert(source, x[:3]).model.train()
    seen: list[Tensor] = []
    handle = register(model[0], model[1], seen)
    assert is_pair(model, x) == [False]
    for found in seen:
        close(found.detach(), F.conv2d(x, model[0].weight, None, padding=model[0].padding).detach())
    handle.remove()
    assert is_pair(model, x) == [True]


def test_hooks_that_see_only_the_ends_do_not_matter() -> None:
    source, x = pair_of("conv2d")
    model: Any = normswap.convert(source, x[:3]).model.train()
    seen: list[Tensor] = []
    model[0].register_forward_pre_hook(lambda m, args: seen.append(args[0]))
    model[1].register_forward_hook(lambda m, args, output: seen.append(output))
    assert is_pair(model, x) == [True]
    assert len(seen) == 4


def test_something_between_the_two_is_an_error() -> None:
    """Never a wrong output: a model whose code was changed after the conversion."""
    source, x = pair_of("conv2d")
    model: Any = normswap.convert(source, x[:3]).model.train()
    hidden = model[0](x)
    with pytest.raises(UsageError, match="is not the output of the Conv2d that it is coupled to"):
        model[1](2 * hidden)
    with pytest.raises(UsageError, match="is not the output of the Conv2d that it is coupled to"):
        model[1](hidden.clone())
    model[1].decouple()
    close(model[1](model[0](x)), source[:2](x))  # type: ignore[index]


def test_a_conv_that_fails_leaves_nothing_behind() -> None:
    source, x = pair_of("conv2d")
    model: Any = normswap.convert(source, x[:3]).model.train()
    with pytest.raises(RuntimeError, match="channels"):
        model(x[:, :1])
    assert model[1].run.interception is None
    assert not model[1].run.fresh
    assert torch.overrides._len_torch_function_stack() == 0
    agree(model, x)


@pytest.mark.parametrize("reentrant", [False, True])
@pytest.mark.parametrize("parts", [[(0, 3)], [(0, 2)], [(1, 3)], [(0, 1), (1, 3)]], ids=str)
def test_checkpoints(reentrant: bool, parts: list[tuple[int, int]]) -> None:
    """Around both, or around one of them."""
    source, x = pair_of("conv2d")
    model: Any = drawn(normswap.convert(source, x[:3]).model.train(), stepped=True)

    class Checkpointed(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.model = model

        def forward(self, u: Tensor) -> Tensor:
            at = 0
            for first, end in [*parts, (3, 3)]:
                u = self.model[at:first](u)
                u = torch.utils.checkpoint.checkpoint(self.model[first:end], u, use_reentrant=reentrant) if end > first else u
                at = end
            return u

    expected = gradients(model, x)[1]
    found = gradients(Checkpointed(), x)[1]
    for name, value in expected.items():
        close(found[name if name == "x" else f"model.{name}"], value, 1e-10)


def test_one_sample_without_an_axis_for_samples() -> None:
    conv = nn.Conv1d(3, 5, 2, dtype=F64)
    norm = BatchlessNorm(5, channel_axis=-2, aux="auto", dtype=F64).train()
    with torch.no_grad():
        norm.mean.normal_()
        norm.log_std.normal_()
    norm.couple(conv, torch.zeros(3, dtype=F64))
    x = torch.randn(3, 9, dtype=F64)
    y = norm(conv(x))
    assert norm.run.pair is not None
    scale, shift = norm.affine_map()
    close(y, F.conv1d(x, conv.weight, conv.bias) * scale[:, None] + shift[:, None])


def test_a_producer_that_computes_otherwise_is_left_alone() -> None:
    """Its weight is computed from its parameter since the swap."""
    source, x = pair_of("conv2d")
    model: Any = normswap.convert(source, x[:3]).model.train()
    torch.nn.utils.parametrizations.weight_norm(model[0])
    assert is_pair(model, x) == [False]
    model(x).sum().backward()

    class Doubled(nn.Conv2d):
        def forward(self, u: Tensor) -> Tensor:
            return F.conv2d(u, 2 * self.weight, None, padding=self.padding)

    source, _ = pair_of("conv2d")
    other: Any = normswap.convert(source, x[:3]).model.train()
    other[0].__class__ = Doubled
    y = other(x)
    assert other[1].run.pair is None
    scale, shift = other[1].affine_map()
    hidden = F.conv2d(x, 2 * other[0].weight, None, padding=other[0].padding)
    close(y, F.silu(hidden * scale[:, None, None] + shift[:, None, None]))


# --- the arguments of a call ------------------------------------------------------------------------------------------------------------


def test_the_arguments_of_each_function() -> None:
    x, w, b = torch.zeros(2, 4, 9, 8), torch.zeros(6, 2, 3, 2), torch.zeros(6)
    found = call_of(torch.conv2d, (x, w), {"bias": b, "groups": 2, "stride": (2,), "padding": "valid", "dilation": 2})
    assert found is not None
    assert found[3] == Call(2, (2, 2), (0, 0), (2, 2), False, (0, 0), 2)
    assert found[2] is b
    found = call_of(torch.conv2d, (x, w, None, 1, "same"), {"groups": 2})
    assert found is not None
    assert found[3].padding == (0, 0)
    assert found[0].shape == (2, 4, 11, 9)  # 1 + 1 rows, 0 + 1 columns
    found = call_of(torch.conv_transpose1d, (torch.zeros(2, 4, 5), torch.zeros(4, 3, 2), None, 2, 1, 1, 2, 3), {})
    assert found is not None
    assert found[3] == Call(1, (2,), (1,), (3,), True, (1,), 2)
    found = call_of(F.linear, (x,), {"weight": w})
    assert found is not None
    assert found[2:] == (None, Call(0))
    assert call_of(torch.relu, (x,), {}) is None
    assert math.prod(found[1].shape) == 72


@pytest.mark.parametrize("attached", [False, True])
def test_a_graph_that_is_passed_again_gives_the_same_gradients(attached: bool) -> None:
    """What the first pass gave to the gradients, and what others then wrote to them, is not read by the next one."""
    torch.manual_seed(0)
    plain, x = nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.ReLU()).eval(), torch.randn(4, 3, 8, 8)
    model = normswap.convert(plain, x).model.train()
    optimizer = torch.optim.SGD(normswap.param_groups(model, lr=0.01))
    model(x).square().mean().backward()
    optimizer.step()
    model.zero_grad()
    if attached:
        normswap.attach(model, scaler=torch.amp.GradScaler("cpu", init_scale=2.0))
    loss = model(3 * x).square().mean()
    loss.backward(retain_graph=True)
    first = {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}
    assert all(first[f"1.{name}"].any() for name in ("mean", "log_std", "input_mean", "trend"))
    for passes in (2, 3):
        loss.backward(retain_graph=True)
        for name, p in model.named_parameters():
            torch.testing.assert_close(p.grad, passes * first[name])
    model.zero_grad(set_to_none=False)
    loss.backward()
    for name, p in model.named_parameters():
        torch.testing.assert_close(p.grad, first[name])


def test_who_writes_to_one_gradient_has_not_written_to_another() -> None:
    torch.manual_seed(0)
    plain, x = nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4)).eval(), torch.randn(4, 3, 8, 8)
    model = normswap.convert(plain, x).model.train()
    model(x).square().mean().backward()
    gradients: dict[str, Any] = {name: p.grad for name, p in model.named_parameters()}
    before = {name: (grad._version, grad.clone()) for name, grad in gradients.items()}
    gradients["1.mean"].mul_(7)
    gradients["1.weight"].mul_(7)
    for name, (version, value) in before.items():
        if name not in ("1.mean", "1.weight"):
            assert gradients[name]._version == version
            assert torch.equal(gradients[name], value)


def test_copies_that_share_parameters_leave_no_hooks() -> None:
    """Each run has hooks on a parameter; they go with the run, also where the parameter stays."""
    layer = normswap.BatchlessNorm(3, aux="auto").train()
    layer(torch.randn(2, 3, 4)).sum().backward()
    hooks: Any = layer.log_std._post_accumulate_grad_hooks
    before = len(hooks)
    for _ in range(3):
        other = normswap.BatchlessNorm(3, aux="auto").train()
        other.log_std, other.mean = layer.log_std, layer.mean
        other(torch.randn(2, 3, 4)).sum().backward()
        assert len(hooks) == before + 1
        del other
        gc.collect()
    assert len(hooks) == before == 1
