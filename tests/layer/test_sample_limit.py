"""The limit on a sample while the statistics lag behind: what it computes, when it is there, and that each sample has its own."""

from __future__ import annotations

import contextlib
import copy
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import normswap
from normswap.errors import UsageError
from normswap.layer import sample_limit
from normswap.layer.batchless_norm import BatchlessNorm
from normswap.layer.producer import filters
from normswap.training.drift import drift

F64 = torch.float64
SHAPES: dict[str, tuple[tuple[int, ...], tuple[int, ...]]] = {  # of x, of mean
    "channels": ((6, 3), (1, 3)),
    "conv": ((6, 3, 5, 4), (1, 3, 1, 1)),
    "channels last": ((6, 5, 3), (1, 1, 3)),
    "one channel": ((6, 1, 5), (1, 1, 1)),
    "shared": ((6, 3, 5), (1, 1, 5)),
}


def drawn(kind: str, size: float = 1.0) -> tuple[Tensor, Tensor, Tensor]:
    generator = torch.Generator().manual_seed(0)
    shape, sizes = SHAPES[kind]
    x = torch.randn(shape, generator=generator, dtype=F64) * torch.linspace(0.3, 3, shape[0], dtype=F64).view(-1, *(1,) * (len(shape) - 1))
    mean, std = torch.randn(sizes, generator=generator, dtype=F64) / 4, torch.rand(sizes, generator=generator, dtype=F64) + 0.6
    return (size * x + mean).requires_grad_(), mean.requires_grad_(), std.requires_grad_()


@pytest.mark.parametrize("masked", [False, True])
@pytest.mark.parametrize("kind", SHAPES)
def test_the_factor_is_the_formula_and_so_are_its_gradients(kind: str, masked: bool) -> None:
    x, mean, std = drawn(kind)
    counted = torch.tensor([True, True, False, True, True, True]).view(-1, *(1,) * (x.dim() - 1)) if masked else None
    limit, sums = sample_limit.limit(x, mean, std, [0], counted)
    found = limit.factor
    rms = ((x - mean) / std).flatten(1).square().mean(1).sqrt()
    expected = (1.2 / rms).clamp(max=1)
    if masked:
        expected = torch.where(torch.tensor([True, True, False, True, True, True]), expected, 1)
    assert 0 < (expected < 1).sum() < len(x)
    torch.testing.assert_close(found.flatten(), expected, rtol=1e-13, atol=0)
    rows = x[[0, 1, 3, 4, 5]] if masked else x
    torch.testing.assert_close(sums[0], (rows - mean).sum_to_size(mean.shape), rtol=1e-12, atol=1e-12)
    assert torch.autograd.gradcheck(lambda *a: sample_limit.limit(*a, [0], counted)[0].factor, (x, mean, std))  # type: ignore[arg-type]
    by_factor = torch.randn(found.shape, generator=torch.Generator().manual_seed(1), dtype=F64)
    by_x, by_mean, by_std = torch.autograd.grad((found * by_factor).sum(), (x, mean, std))
    slope, *by = sample_limit.gradients(by_factor, sample_limit.Limit(*(t.detach() for t in limit)), std.detach(), [0])
    through = (slope * (x - mean)).detach()
    for one, other in zip((through if counted is None else torch.where(counted, through, 0), *by), (by_x, by_mean, by_std), strict=True):
        torch.testing.assert_close(one, other, rtol=0, atol=1e-15)  # rounding, of a quarter


def test_a_sample_that_fits_is_not_touched_and_passes_no_gradient() -> None:
    x, mean, std = drawn("conv", 0.3)
    limit, _ = sample_limit.limit(x, mean, std, [0])
    limit.factor.sum().backward()
    assert bool((limit.factor == 1).all())
    assert bool((limit.d_factor == 0).all())
    assert bool((x.grad == 0).all())  # type: ignore[union-attr]


def test_without_a_sample_there_is_nothing_to_limit() -> None:
    x, mean, std = drawn("conv")
    limit, (_, _, number) = sample_limit.limit(x[:0], mean, std, [0])
    assert limit.factor.shape == (0, 1, 1, 1)
    assert number == 0


def test_half_precision_is_squared_in_float32() -> None:
    x = torch.full((2, 3, 5), 400.0, dtype=torch.float16, requires_grad=True)
    limit, _ = sample_limit.limit(x, torch.zeros(1, 3, 1), torch.ones(1, 3, 1), [0])
    torch.testing.assert_close(limit.factor, torch.full((2, 1, 1), 1.2 / 400))


# --- in a layer --------------------------------------------------------------------------------------------------------------------------


def net(**options: Any) -> nn.Module:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Conv2d(2, 4, 3, padding=1), nn.BatchNorm2d(4), nn.SiLU(), nn.Conv2d(4, 3, 3), nn.BatchNorm2d(3)).to(F64)
    for norm in (model[1], model[4]):
        norm.running_mean.normal_()
        norm.running_var.uniform_(0.3, 2)
        nn.init.normal_(norm.weight)
        nn.init.normal_(norm.bias)
    options = {"coupling": "auto", **options}
    return normswap.convert(model.eval(), X[:2], **options).model.train()


X = torch.randn(24, 2, 6, 5, generator=torch.Generator().manual_seed(3), dtype=F64) * torch.linspace(0.1, 4, 24, dtype=F64).view(
    -1, 1, 1, 1
)


def layers(model: nn.Module) -> list[BatchlessNorm]:
    return [m for m in model.modules() if isinstance(m, BatchlessNorm)]


def step(model: nn.Module, lr: float = 1e-3) -> None:
    model(X).square().mean().backward()
    torch.optim.SGD(model.parameters(), lr=lr).step()
    model.zero_grad()


@torch.no_grad()
def written_out(model: Any, x: Tensor) -> Tensor:
    """The forward pass with the sample limit."""
    for module in model:
        if isinstance(module, BatchlessNorm):
            mean, std = (t.detach().view(-1, 1, 1) for t in module.statistics())
            z = (x - mean) / std
            z = z * (1.2 / z.flatten(1).square().mean(1).sqrt()).clamp(max=1).view(-1, 1, 1, 1)
            x = module.weight.view(-1, 1, 1) * z + module.bias.view(-1, 1, 1)
        elif isinstance(module, nn.Conv2d):  # not its own call, which gives the output of its norm in train mode
            x = nn.functional.conv2d(x, module.weight, module.bias, padding=module.padding)
        else:
            x = module(x)
    return x


def test_it_is_there_in_train_mode_from_the_first_step_on() -> None:
    model = net()
    plain = net(coupling="none")
    torch.testing.assert_close(model(X), plain(X), rtol=1e-12, atol=1e-12)
    step(model)
    limited = model(X)
    torch.testing.assert_close(limited, written_out(model, X), rtol=1e-12, atol=1e-12)
    free = model.eval()(X)
    assert float((limited - free).detach().abs().max()) > 0.1
    for layer in layers(model):
        layer.limits_samples = False
    torch.testing.assert_close(model.train()(X), free, rtol=1e-12, atol=1e-12)


def test_copies_have_it_and_plain_layers_frozen_ones_and_those_of_opacus_do_not() -> None:
    model = net()
    step(model)
    torch.testing.assert_close(copy.deepcopy(model)(X), model(X), rtol=0, atol=0)
    private = copy.deepcopy(model)
    torch.testing.assert_close(normswap.for_opacus(private)(X), model.eval()(X), rtol=1e-12, atol=1e-12)
    model.train()
    for layer in layers(model):
        layer.mean.requires_grad_(False)
        layer.std_parameter.requires_grad_(False)
    frozen = model(X)
    torch.testing.assert_close(frozen, model.eval()(X), rtol=1e-12, atol=1e-12)
    plain = net(coupling="none")
    step(plain)
    torch.testing.assert_close(plain(X), plain.eval()(X), rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("batch", [0, 1])
def test_with_channels_last_each_place_is_limited_by_itself(batch: int) -> None:
    """Which axis has the samples cannot be seen: a transformer of torch has its batch second, by default."""
    torch.manual_seed(0)
    source = nn.Sequential(nn.Linear(5, 7), nn.LayerNorm(7), nn.Tanh()).to(F64).eval()
    x = torch.randn(9, 6, 5, dtype=F64)
    model = normswap.convert(source, x, calibration=[x], approximate=True).model.train()
    model(x).square().mean().backward()
    torch.optim.SGD(model.parameters(), lr=0.01).step()
    other = x.clone()
    other.select(batch, 2).mul_(50)
    keep = [i for i in range(x.shape[batch]) if i != 2]
    with torch.no_grad():
        before, after = (model(t).movedim(batch, 0) for t in (x, other))
    assert torch.equal(before[keep], after[keep])
    layer: Any = model[1]  # type: ignore[index]
    assert layer.run.factor.shape == (9, 6, 1)
    assert int((layer.run.factor < 1).sum()) > 0


def test_what_fits_passes_as_it_is() -> None:
    """Statistics of the data, and samples that are alike."""
    x = X / X.flatten(1).norm(dim=1).view(-1, 1, 1, 1)
    model: Any = net()
    with torch.no_grad():
        for layer, upto in zip(layers(model), (1, 4), strict=True):
            y = model[:upto].eval()(x)
            layer.set_statistics(y.mean((0, 2, 3)), 1.5 * y.std((0, 2, 3)))
            layer.stepped = True
    torch.testing.assert_close(model.train()(x), model.eval()(x), rtol=1e-12, atol=1e-12)


def test_a_sample_does_not_see_the_others() -> None:
    model = net()
    step(model)
    alone = torch.cat([model(x[None]) for x in X])
    torch.testing.assert_close(model(X), alone, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("parts", [1, 3, 24])
def test_micro_batches_add_up(parts: int) -> None:
    """1 x 24, 8 x 3 and 24 x 1."""

    def gradients(sizes: int) -> dict[str, Tensor]:
        model = net()
        step(model, 0.1)
        normswap.attach(model, accumulate=sizes)
        for x in X.chunk(sizes):
            (model(x).square().mean() / sizes).backward()
        return {name: p.grad for name, p in model.named_parameters() if p.grad is not None}

    expected = gradients(1)
    found = gradients(parts)
    assert found.keys() == expected.keys()
    for name in expected:
        torch.testing.assert_close(found[name], expected[name], rtol=1e-9, atol=1e-11)


def test_the_gradient_of_a_coupled_producer_has_no_radial_part() -> None:
    model: Any = net(calibration=[X])
    for layer in layers(model):
        layer.stepped = True
    assert not torch.allclose(model(X), model.eval()(X))  # some are limited
    model.train()(X).sin().sum().backward()
    for conv in (model[0], model[3]):
        w, by = (filters(conv, F64, t) for t in (conv.weight.detach(), conv.weight.grad))
        assert float(((w * by).sum(1).abs() / (w.norm(dim=1) * by.norm(dim=1))).max()) < 1e-12


@pytest.mark.filterwarnings("ignore:`torch.jit.script` is deprecated:DeprecationWarning")  # torch's own, to decompose what it derives
@pytest.mark.parametrize("masked", [False, True])
def test_forward_mode_by_the_input(masked: bool) -> None:
    """What the plain layer can: the same derivative as backward, and a Hessian in either order."""
    model: Any = net()
    step(model)
    for layer in layers(model):
        nn.init.normal_(layer.trend)  # type: ignore[arg-type]
    x, along = X[[5, 9, 23], :, :4, :4], torch.randn(3, 2, 4, 4, dtype=F64)

    def function(x: Tensor) -> Tensor:
        with normswap.masked(model[1], torch.tensor([True, False, True])) if masked else contextlib.nullcontext():
            return model(x)  # type: ignore[no-any-return]

    value, change = torch.func.jvp(function, (x,), (along,))
    assert 0 < sum(int((layer.run.factor < 1).sum()) for layer in layers(model)) < 6
    tangent = (function(x + 1e-5 * along) - function(x - 1e-5 * along)) / 2e-5
    torch.testing.assert_close(value, function(x), rtol=1e-13, atol=1e-13)  # rounding: forward mode computes conv and norm apart
    torch.testing.assert_close(change, tangent, rtol=0, atol=1e-10)  # 2e-16 / 1e-5 of rounding, and (1e-5)^2 of the difference
    for layer in layers(model):
        nn.init.zeros_(layer.trend)  # type: ignore[arg-type]  # backward takes it away, in the second pass as well
    gradient = torch.func.grad(lambda x: function(x).square().sum())
    torch.testing.assert_close(torch.func.jacfwd(gradient)(x), torch.func.jacrev(gradient)(x), rtol=0, atol=1e-15)  # rounding: up to 0.05


def test_padding_does_not_count() -> None:
    """A sequence that is padded by anything is limited as it would be without."""
    torch.manual_seed(0)
    layer = BatchlessNorm(3, channel_axis=-1, dtype=F64, aux="auto").train()
    layer.limits_samples = layer.stepped = True
    x = 3 * torch.randn(2, 5, 3, dtype=F64)
    padded = torch.cat([x, torch.full((2, 4, 3), 1e3, dtype=F64)], 1)
    with normswap.masked(layer, torch.arange(9).expand(2, 9) < 5):
        found = layer(padded)
    torch.testing.assert_close(found[:, :5], layer(x), rtol=1e-12, atol=1e-12)
    assert not torch.allclose(found[:, :5], layer.eval()(x))


def test_a_layer_that_limits_samples_cannot_be_traced_in_train_mode() -> None:
    layer = BatchlessNorm(3)
    layer.limits_samples = layer.stepped = True
    with pytest.raises(UsageError, match="a BatchlessNorm that limits samples cannot be traced in train mode"):
        torch.fx.symbolic_trace(nn.Sequential(layer.train()))
    torch.fx.symbolic_trace(nn.Sequential(layer.eval()))


def test_the_drift_says_how_many_were_limited() -> None:
    model = net()
    model(X).sum().backward()
    assert all(found.limit_hits is None for found in drift(model).values())
    model = net()
    step(model)
    model(X).sum().backward()
    for name, layer in model.named_modules():
        if isinstance(layer, BatchlessNorm):
            share = drift(model)[name].limit_hits
            assert share is not None
            assert 0 < float(share) <= 1


def test_the_drift_after_per_sample_gradients_knows_of_no_sample_that_was_limited() -> None:
    """A transform of torch.func leaves nothing that can be read after it."""
    model = net()
    step(model)
    model(X).sum().backward()
    assert all(found.limit_hits is not None for found in drift(model).values())
    parameters, buffers = dict(model.named_parameters()), dict(model.named_buffers())

    def loss(parameters: dict[str, Tensor], x: Tensor) -> Tensor:
        return torch.func.functional_call(model, (parameters, buffers), (x[None],)).square().mean()  # type: ignore[no-any-return]

    torch.func.vmap(torch.func.grad(loss), (None, 0))(parameters, X)
    assert all(found.limit_hits is None for found in drift(model).values())


def test_a_layer_whose_limit_was_turned_off_limited_nothing() -> None:
    model = net()
    step(model)
    model(X).sum().backward()
    limiting = {name: layer for name, layer in model.named_modules() if isinstance(layer, BatchlessNorm)}
    first, *others = limiting
    limiting[first].limits_samples = False
    assert drift(model)[first].limit_hits is None
    assert all(drift(model)[name].limit_hits is not None for name in others)
    model.zero_grad()
    model(X).sum().backward()
    assert drift(model)[first].limit_hits is None
    limiting[first].limits_samples = True
    model(X).sum().backward()
    assert drift(model)[first].limit_hits is not None


def test_what_layers_are_late_by_does_not_multiply() -> None:
    """20 layers whose std is a fifth too small each."""
    torch.manual_seed(0)
    chain = nn.Sequential()
    for _ in range(20):
        linear = nn.Linear(7, 7, bias=False, dtype=F64)
        nn.init.orthogonal_(linear.weight)
        layer = BatchlessNorm(7, dtype=F64, aux="auto")
        layer.set_statistics(torch.zeros(7, dtype=F64), torch.full((7,), 0.8, dtype=F64))
        layer.limits_samples = layer.stepped = True
        chain += nn.Sequential(linear, layer)
    x = torch.randn(5, 7, dtype=F64)
    x /= x.square().mean(1, keepdim=True).sqrt()
    rms = chain.train()(x).square().mean(1).sqrt()
    torch.testing.assert_close(rms, torch.full((5,), 1.2, dtype=F64), rtol=1e-9, atol=0)
    free = chain.eval()(x).square().mean(1).sqrt()
    torch.testing.assert_close(free, torch.full((5,), 0.8**-20, dtype=F64), rtol=1e-9, atol=0)
