"""BatchlessNorm: what it computes, what it trains, and what it keeps."""

from __future__ import annotations

import copy
import io
import itertools
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.func import functional_call, grad, vmap

from normswap.layer.batchless_norm import PARAMETER_OF_FORM, BatchlessNorm, BatchlessNormAct
from normswap.layer.formulas import STD_FORMS, Reduction, StdForm

# (num_features, channel_axis, input shape), pairwise distinct sizes
LAYOUTS: list[tuple[Any, Any, tuple[int, ...]]] = [
    (3, 1, (5, 3)),
    (3, 1, (5, 3, 7)),
    (3, 1, (2, 3, 5, 4)),
    (3, 1, (2, 3, 5, 4, 6)),
    (3, -1, (5, 3)),
    (3, -1, (2, 7, 3)),
    (3, -1, (2, 5, 4, 3)),
    ((3, 4), (1, 2), (5, 3, 4)),
    ((3, 4), (1, -1), (2, 3, 5, 4)),
    (3, 0, (3, 7)),
    (1, 1, (5, 1, 7)),
    (3, 1, (1, 3, 1, 1)),
]


def filled(num_features: Any, *, dtype: torch.dtype = torch.float64, **options: Any) -> BatchlessNorm:
    """A layer whose statistics and affine hide nothing: no zeros, no ones, every value another."""
    layer = BatchlessNorm(num_features, dtype=dtype, **options)
    with torch.no_grad():
        layer.set_statistics(torch.randn_like(layer.mean) * 2, torch.rand_like(layer.mean) + 0.3)
        for tensor in (layer.weight, layer.bias):
            if tensor is not None:
                tensor.copy_(torch.randn_like(tensor))
    return layer


def formula(layer: BatchlessNorm, x: Tensor) -> Tensor:
    shape = [1] * x.dim()
    for axis, size in zip(layer.channel_axis, layer.sizes, strict=True):
        shape[axis] = size
    tensors = (*layer.statistics(), layer.weight, layer.bias)
    mean, std, weight, bias = (None if t is None else t.detach().double().expand(layer.sizes).reshape(shape) for t in tensors)
    z = (x.double() - mean) / std
    return z if weight is None else weight * z + bias


# --- what it computes -----------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("affine", [True, False])
@pytest.mark.parametrize("form", STD_FORMS)
@pytest.mark.parametrize(("features", "axis", "shape"), LAYOUTS)
def test_forward_is_the_formula(features: Any, axis: Any, shape: tuple[int, ...], form: StdForm, affine: bool) -> None:
    layer = filled(features, channel_axis=axis, std=form, affine=affine)
    x = torch.randn(shape, dtype=torch.float64)
    torch.testing.assert_close(layer(x), formula(layer, x), rtol=1e-12, atol=1e-12)
    assert torch.equal(layer.train()(x), layer.eval()(x))
    scale, shift = layer.folded(x.dim())
    torch.testing.assert_close(x * scale + shift, layer(x), rtol=1e-12, atol=1e-12)


def test_matches_batch_norm_in_eval_mode() -> None:
    source = nn.BatchNorm2d(3, dtype=torch.float64).eval()
    layer = filled(3)
    mean, std = layer.statistics()
    source.load_state_dict(
        {
            "weight": layer.weight,
            "bias": layer.bias,
            "running_mean": mean,
            "running_var": std.square() - source.eps,
            "num_batches_tracked": torch.tensor(0),
        }
    )
    x = torch.randn(2, 3, 5, 4, dtype=torch.float64)
    torch.testing.assert_close(layer(x), source(x), rtol=1e-13, atol=1e-13)


@pytest.mark.parametrize("shared", [(1,), (2,), (1, 2)])
def test_shared_axes(shared: tuple[int, ...]) -> None:
    layer = filled((3, 4), channel_axis=(1, 2), shared_axes=shared)
    assert layer.mean.shape == tuple(1 if axis in shared else size for axis, size in ((1, 3), (2, 4)))
    assert layer.weight is not None
    assert layer.weight.shape == (3, 4)
    x = torch.randn(5, 3, 4, 2, dtype=torch.float64)
    torch.testing.assert_close(layer(x), formula(layer, x), rtol=1e-12, atol=1e-12)
    layer.nll(x).backward()
    reduced = tuple({0, 1, 2, 3} - ({1, 2} - set(shared)))
    count = layer.mean.numel()
    std = layer.statistics()[1].detach().unsqueeze(0).unsqueeze(-1)
    mean = layer.mean.detach().unsqueeze(0).unsqueeze(-1)
    expected = -(x.mean(reduced, keepdim=True) - mean) / (count * std.square())
    assert layer.mean.grad is not None
    torch.testing.assert_close(layer.mean.grad, expected.reshape(layer.mean.shape), rtol=1e-11, atol=1e-12)


def test_shared_axes_without_affine() -> None:
    layer = filled((3, 4), channel_axis=(1, 2), shared_axes=(2,), affine=False)
    x = torch.randn(5, 3, 4, dtype=torch.float64)
    torch.testing.assert_close(layer(x), formula(layer, x), rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("form", STD_FORMS)
@pytest.mark.parametrize("variance", [1e-12, 1e12])
def test_extreme_variances(form: StdForm, variance: float) -> None:
    layer = filled(3, std=form, dtype=torch.float32)
    std = torch.full((3,), variance, dtype=torch.float64).sqrt()
    mean = torch.tensor([-1.0, 0.0, 1.0]).double() * std
    layer.set_statistics(mean, std)
    z = torch.randn(5, 3, 7)
    x = (z.double() * std.view(3, 1) + mean.view(3, 1)).float()
    # parameter_of takes TINY off a std of 1e-6: 1e-6 relative; `log` rounds |log std| = 14 to float32: 1e-6 relative
    torch.testing.assert_close(layer(x).double(), formula(layer, x), rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(layer.statistics()[1].double(), std, rtol=2e-6, atol=0)
    loss = layer.nll(x)
    loss.backward()
    assert all(p.grad is None or bool(p.grad.isfinite().all()) for p in layer.parameters())


def test_weight_zero() -> None:
    layer = filled(3, dtype=torch.float32)
    assert layer.weight is not None
    assert layer.bias is not None
    nn.init.zeros_(layer.weight)
    x = torch.randn(2, 3, 5) * 1e6
    assert torch.equal(layer(x), layer.bias.detach().view(3, 1).expand(2, 3, 5))
    layer(x).sum().backward()
    assert layer.weight.grad is not None
    assert bool(layer.weight.grad.any())


def test_a_huge_mean_loses_no_more_than_its_rounding() -> None:
    """x * scale + shift cancels where |mean| >> std; the error is that of float32 next to |mean| / std, as in BatchNorm itself."""
    layer = filled(3, dtype=torch.float32)
    layer.set_statistics(torch.full((3,), 1e4), torch.full((3,), 0.5))
    x = torch.randn(2, 3, 5) + 1e4
    assert layer.weight is not None
    bound = 4 * 2**-24 * 1e4 / 0.5 * float(layer.weight.detach().abs().max())
    torch.testing.assert_close(layer(x).double(), formula(layer, x), rtol=0, atol=bound)


def test_one_sample_one_pixel_and_no_sample() -> None:
    layer = filled(3)
    x = torch.randn(1, 3, 1, 1, dtype=torch.float64)
    torch.testing.assert_close(layer.train()(x), formula(layer, x), rtol=1e-12, atol=1e-12)
    assert bool(layer.nll(x).isfinite())
    assert layer(x[:0]).shape == (0, 3, 1, 1)
    assert layer.nll(x[:0]).item() == 0


@pytest.mark.parametrize("shape", [(3, 5, 7), (4, 5, 4, 3), (3, 5, 33), (2, 5, 4097)])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_sample_does_not_depend_on_its_batch_mates(shape: tuple[int, ...], dtype: torch.dtype) -> None:
    layer = filled(5, dtype=torch.float32).train()
    x = torch.randn(shape).to(dtype)
    y = layer(x)
    mates = torch.cat([x[:1], torch.randn_like(x[1:]) * 1e4])
    assert torch.equal(layer(mates)[:1], y[:1])
    assert all(torch.equal(layer(x[i : i + 1]), y[i : i + 1]) for i in range(len(x)))


# --- what it refuses -------------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("options", "shape", "message"),
    [
        ({}, (2, 4, 5), r"BatchlessNorm has 3 channels on axis 1, but its input has the shape \(2, 4, 5\)"),
        ({}, (3,), r"BatchlessNorm has 3 channels on axis 1, but its input has the shape \(3,\)"),
        ({"channel_axis": -1}, (2, 3, 5), r"3 channels on axis -1, but its input has the shape \(2, 3, 5\)"),
        ({"channel_axis": 1, "num_features": 1}, (2, 3, 5), r"has 1 channels on axis 1, but its input has the shape \(2, 3, 5\)"),
        ({"channel_axis": (1, 2), "num_features": (3, 4)}, (2, 3, 5), r"has 3 x 4 channels on axis 1, 2, but .* \(2, 3, 5\)"),
    ],
)
def test_wrong_shapes(options: dict[str, Any], shape: tuple[int, ...], message: str) -> None:
    layer = BatchlessNorm(**{"num_features": 3, **options})
    for call in (layer, layer.nll):
        with pytest.raises(ValueError, match=message):
            call(torch.randn(shape))


def test_integers_are_refused() -> None:
    for call in (BatchlessNorm(3), BatchlessNorm(3).nll):
        with pytest.raises(ValueError, match=r"takes floating-point inputs, but its input is torch\.int64"):
            call(torch.ones(2, 3, dtype=torch.int64))


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"std": "exp"}, "std is 'exp'; expected one of 'log', 'abs', 'inv'"),
        ({"reduction": "none"}, "reduction is 'none'; expected one of 'mean', 'sum'"),
        ({"num_features": 0}, r"num_features \(0,\) must give one positive size for each of the channel axes \(1,\)"),
        ({"num_features": (3, 4)}, r"num_features \(3, 4\) must give one positive size"),
        ({"num_features": (3, 4), "channel_axis": (2, 1)}, r"channel_axis \(2, 1\) must be distinct and ascending"),
        ({"num_features": (3, 4), "channel_axis": (-1, -1)}, r"channel_axis \(-1, -1\) must be distinct and ascending"),
        ({"shared_axes": (2,)}, r"shared_axes \(2,\) are not all channel axes; the channel axes are \(1,\)"),
    ],
)
def test_wrong_options(options: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        BatchlessNorm(**{"num_features": 3, **options})


# --- what it trains --------------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("form", STD_FORMS)
def test_the_task_trains_weight_and_bias_only(form: StdForm) -> None:
    layer = filled(3, std=form)
    x = torch.randn(5, 3, 7, dtype=torch.float64, requires_grad=True)
    by_y = torch.randn(5, 3, 7, dtype=torch.float64)
    layer(x).backward(by_y)
    assert layer.mean.grad is None
    assert layer.std_parameter.grad is None
    assert layer.weight is not None
    assert layer.bias is not None
    mean, std = (t.detach().view(3, 1) for t in layer.statistics())
    close = {"rtol": 1e-12, "atol": 1e-12}
    torch.testing.assert_close(x.grad, by_y * layer.weight.detach().view(3, 1) / std, **close)
    torch.testing.assert_close(layer.weight.grad, (by_y * (x.detach() - mean) / std).sum((0, 2)), **close)
    torch.testing.assert_close(layer.bias.grad, by_y.sum((0, 2)), **close)


@pytest.mark.parametrize("gauge", [True, False])
@pytest.mark.parametrize("reduction", ["mean", "sum"])
@pytest.mark.parametrize("form", STD_FORMS)
def test_the_nll_trains_mean_and_std_only(form: StdForm, reduction: Reduction, gauge: bool) -> None:
    layer = filled(3, std=form, reduction=reduction)
    x = torch.randn(5, 3, 7, dtype=torch.float64, requires_grad=True)
    layer.nll(x, gauge=gauge).backward()
    assert x.grad is None
    assert layer.weight is not None
    assert layer.bias is not None
    assert layer.weight.grad is None
    assert layer.bias.grad is None
    mean, std = (t.detach() for t in layer.statistics())
    share = 3 if reduction == "mean" else 1
    m, square = x.detach().mean((0, 2)), (x.detach() - mean.view(3, 1)).square().mean((0, 2))
    by_std = {"log": 1 - square / std**2, "abs": 1 / std - square / std**3, "inv": -std + square / std}[form] / share
    torch.testing.assert_close(layer.mean.grad, -(m - mean) / (share * std**2), rtol=1e-11, atol=1e-12)
    torch.testing.assert_close(layer.std_parameter.grad, by_std, rtol=1e-10, atol=1e-11)


def test_second_order_gradients_of_the_task() -> None:
    layer = filled(3)
    x = torch.randn(2, 3, 4, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradgradcheck(layer, (x,))


def test_half_precision_activations_are_saved_as_they_came() -> None:
    saved = []
    layer = filled(3, dtype=torch.float32)
    x = torch.randn(5, 3, 7, dtype=torch.bfloat16, requires_grad=True)
    with torch.autograd.graph.saved_tensors_hooks(lambda t: saved.append(t) or t, lambda t: t):  # type: ignore[func-returns-value]
        y = layer(x)
    assert {t.dtype for t in saved if t.numel() == x.numel()} == {torch.bfloat16}
    y.backward(torch.ones_like(y))
    assert x.grad is not None
    assert x.grad.dtype == torch.bfloat16


# --- precision and layout --------------------------------------------------------------------------------------------------------------


CASTS = [
    lambda m: m.half(),
    lambda m: m.bfloat16(),
    lambda m: m.to(torch.float16),
    lambda m: m.to("cpu", torch.bfloat16),
    lambda m: m.type(torch.float16),
]


@pytest.mark.parametrize("cast", CASTS)
def test_parameters_stay_float32_in_half_precision(cast: Any) -> None:
    layer = filled(3, dtype=torch.float32)
    layer.source_var = torch.full((3,), 1e9)
    before = copy.deepcopy(layer.state_dict())
    model = cast(nn.Sequential(nn.Linear(3, 3), layer))
    assert model[0].weight.dtype != torch.float32
    after = layer.state_dict()
    assert all(torch.equal(after[k], v) and after[k].dtype == torch.float32 for k, v in before.items())
    x = torch.randn(2, 3).to(model[0].weight.dtype)
    assert model(x).dtype == x.dtype


def test_double_and_back() -> None:
    layer = filled(3, dtype=torch.float32)
    before = copy.deepcopy(layer.state_dict())
    layer.double()
    assert {t.dtype for t in layer.parameters()} == {torch.float64}
    layer.float()
    assert all(torch.equal(v, before[k]) for k, v in layer.state_dict().items())
    layer.double().half()
    assert {t.dtype for t in layer.parameters()} == {torch.float32}
    assert BatchlessNorm(3, dtype=torch.bfloat16).mean.dtype == torch.float32


def test_meta_device_and_to_empty() -> None:
    layer = BatchlessNorm(3, device="meta")
    assert layer.mean.is_meta
    layer.half()
    assert layer.mean.dtype == torch.float32
    assert layer.to_empty(device="cpu").mean.device.type == "cpu"


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_precision_is_computed_in_float32_and_rounded_once(dtype: torch.dtype) -> None:
    layer = filled(3, dtype=torch.float32)
    x = torch.randn(2, 3, 5).to(dtype)
    assert torch.equal(layer(x), layer(x.float()).to(dtype))


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32, torch.float64])
def test_the_output_has_the_dtype_of_the_input(dtype: torch.dtype) -> None:
    assert filled(3, dtype=torch.float32)(torch.randn(2, 3).to(dtype)).dtype == dtype


def test_autocast() -> None:
    model = nn.Sequential(nn.Conv1d(3, 3, 1), filled(3, dtype=torch.float32))
    x = torch.randn(2, 3, 5)
    with torch.autocast("cpu", torch.bfloat16):
        y = model(x)
        loss = model[1].nll(model[0](x))  # type: ignore[operator]
        plain = model[1](x)
    assert (y.dtype, plain.dtype, loss.dtype) == (torch.bfloat16, torch.float32, torch.float32)
    torch.testing.assert_close(y.float(), model(x), rtol=5e-2, atol=5e-2)


class Doubled(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.factor = nn.Parameter(torch.tensor(2.0))

    def forward(self, x: Tensor) -> Tensor:
        return x * self.factor


def with_act(act: nn.Module) -> BatchlessNormAct:
    layer = BatchlessNormAct(3)
    layer.drop, layer.act = nn.Identity(), act
    return layer


def test_children_follow_the_dtype() -> None:
    layer = with_act(Doubled())
    x = torch.randn(2, 3)
    expected = BatchlessNorm(3)(x) * 2
    assert torch.equal(layer(x), expected)
    layer.half()
    assert layer.mean.dtype == torch.float32
    assert layer.act.factor.dtype == torch.float16
    assert layer(x.half()).dtype == torch.float16


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
@pytest.mark.parametrize(
    ("shape", "memory_format"),
    [
        ((2, 3, 5, 4), torch.channels_last),
        ((1, 3, 5, 4), torch.channels_last),
        ((2, 3, 5, 4, 6), torch.channels_last_3d),
    ],
)
def test_memory_format_is_kept(shape: tuple[int, ...], memory_format: torch.memory_format, dtype: torch.dtype) -> None:
    layer = filled(3, dtype=torch.float32)
    x = torch.randn(shape).to(dtype)
    y = layer(x.to(memory_format=memory_format))
    assert y.stride() == x.to(memory_format=memory_format).stride()
    assert torch.equal(y, layer(x))
    assert layer(x).is_contiguous()


def test_non_contiguous_inputs() -> None:
    layer = filled(3)
    base = torch.randn(8, 5, 3, 4, dtype=torch.float64)
    for x in (base.permute(0, 2, 1, 3), base.permute(3, 2, 1, 0)[:, :, ::2], base[:1].permute(0, 2, 1, 3).expand(6, 3, 5, 4)):
        torch.testing.assert_close(layer(x), formula(layer, x), rtol=1e-12, atol=1e-12)


# --- what can be done to it ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("form", STD_FORMS)
def test_copies_are_the_same_layer(form: StdForm) -> None:
    layer = filled(3, std=form, dtype=torch.float32)
    x = torch.randn(2, 3, 5, requires_grad=True)
    y = layer(x)
    layer.nll(x).backward()
    buffer = io.BytesIO()
    torch.save(layer, buffer)
    buffer.seek(0)
    fresh = BatchlessNorm(3, std=form)
    assert fresh.load_state_dict(layer.state_dict(), strict=True) == ([], [])
    for other in (copy.deepcopy(layer), torch.load(buffer, weights_only=False), fresh):
        assert torch.equal(other(x), y)
        assert repr(other) == repr(layer)
        assert not {id(p) for p in other.parameters()} & {id(p) for p in layer.parameters()}


def test_state_dict_keys() -> None:
    for form, affine in itertools.product(STD_FORMS, (True, False)):
        keys = {"mean", PARAMETER_OF_FORM[form], *(("weight", "bias") if affine else ())}
        assert set(BatchlessNorm(3, std=form, affine=affine).state_dict()) == keys


def test_repr_names_what_matters() -> None:
    assert repr(BatchlessNorm(3)) == "BatchlessNorm(3, channel_axis=(1,), affine=True, std='log')"
    shared = BatchlessNorm((3, 4), channel_axis=(1, 2), shared_axes=(2,), affine=False, std="inv")
    assert repr(shared) == "BatchlessNorm((3, 4), channel_axis=(1, 2), shared_axes=(2,), affine=False, std='inv')"


@pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::FutureWarning", "ignore::UserWarning:torch")
def test_compiles_whole() -> None:
    """aot_eager: everything but the code generator, which takes half a minute to start."""
    layer = filled(3, dtype=torch.float32)
    compiled = torch.compile(layer, fullgraph=True, backend="aot_eager")
    x = torch.randn(2, 3, 5)
    ours, theirs = x.clone().requires_grad_(), x.clone().requires_grad_()
    y, z = layer(ours), compiled(theirs)
    assert torch.equal(y, z)
    y.sum().backward()
    z.sum().backward()
    assert torch.equal(ours.grad, theirs.grad)  # type: ignore[arg-type]
    nll = torch.compile(layer.nll, fullgraph=True, backend="aot_eager")
    torch.testing.assert_close(nll(x), layer.nll(x))


def test_per_sample_gradients() -> None:
    layer = filled(3)
    parameters = {name: p.detach() for name, p in layer.named_parameters()}
    x = torch.randn(4, 3, 5, dtype=torch.float64)

    class WithLoss(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.layer = layer

        def forward(self, x: Tensor) -> Tensor:
            return self.layer(x).pow(3).sum() + self.layer.nll(x)

    model = WithLoss()

    def loss(parameters: dict[str, Tensor], sample: Tensor) -> Tensor:
        return functional_call(model, {f"layer.{name}": p for name, p in parameters.items()}, (sample.unsqueeze(0),))

    found = vmap(grad(loss), (None, 0))(parameters, x)
    for i in range(4):
        layer.zero_grad()
        model(x[i : i + 1]).backward()
        for name, parameter in layer.named_parameters():
            torch.testing.assert_close(found[name][i], parameter.grad, rtol=1e-12, atol=1e-12)


@pytest.mark.filterwarnings("ignore:`isinstance")  # torch.export of 2.13 uses what torch.utils._pytree deprecates
def test_export_with_a_free_batch() -> None:
    model = nn.Sequential(nn.Conv1d(2, 3, 1), filled(3, dtype=torch.float32)).eval()
    program = torch.export.export(model, (torch.randn(2, 2, 5),), dynamic_shapes=({0: torch.export.Dim.DYNAMIC},))
    x = torch.randn(7, 2, 5)
    torch.testing.assert_close(program.module()(x), model(x))
    assert not any("promote" in str(node.target) for node in program.graph.nodes)


def test_symbolic_trace() -> None:
    model = nn.Sequential(nn.Conv1d(2, 3, 1), filled(3, dtype=torch.float32)).eval()
    traced = torch.fx.symbolic_trace(model)
    for x in (torch.randn(2, 2, 5), torch.randn(3, 2, 9)):
        assert torch.equal(traced(x), model(x))
    with pytest.raises(ValueError, match="BatchlessNorm has 3 channels"):
        torch.fx.symbolic_trace(filled(3))(torch.randn(2, 4, 5))


def test_statistics_are_read_in_one_place() -> None:
    """A subclass that computes its statistics has them everywhere: forward, folded, nll."""

    class Fixed(BatchlessNorm):
        def statistics(self, dtype: torch.dtype | None = None) -> tuple[Tensor, Tensor]:
            return torch.full((3,), 2.0, dtype=dtype), torch.full((3,), 4.0, dtype=dtype)

    layer, x = Fixed(3), torch.randn(2, 3)
    torch.testing.assert_close(layer(x), (x - 2) / 4)
    scale, shift = layer.folded(2)
    assert torch.equal(scale, torch.full((1, 3), 0.25, dtype=torch.float64))
    assert torch.equal(shift, torch.full((1, 3), -0.5, dtype=torch.float64))
    torch.testing.assert_close(layer.nll(x, gauge=False), torch.tensor(4.0).log() + ((x - 2) / 4).square().mean() / 2)
