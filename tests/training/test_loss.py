"""The automatic and the explicit auxiliary loss: the same gradients, whatever surrounds the layers."""

from __future__ import annotations

import copy
import functools
import io
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.func import functional_call, grad, vmap
from torch.optim.swa_utils import AveragedModel
from torch.utils.checkpoint import checkpoint

import normswap
from normswap.errors import NormswapError, UsageError
from normswap.layer.batchless_norm import BatchlessNorm
from normswap.layer.formulas import STATS, STD_FORMS, Stats, StdForm
from normswap.layer.producer import filters, response

X = torch.randn(6, 2, 7, 5, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
DOORS = ("auto", "explicit")
ALL_DOORS = (*DOORS, "auto coupled", "explicit coupled")  # the door, and the coupling of the statistics


def source(dtype: torch.dtype = torch.float64, act: Callable[[], nn.Module] = lambda: nn.ReLU(inplace=True)) -> nn.Module:
    """conv, norm, in-place activation, twice, with statistics that do not fit."""
    torch.manual_seed(0)
    model = nn.Sequential(
        nn.Conv2d(2, 4, 3), nn.BatchNorm2d(4), act(), nn.Conv2d(4, 3, 2), nn.BatchNorm2d(3, momentum=0.03, eps=1e-3), act(), nn.Flatten()
    )
    for norm in (model[1], model[4]):
        norm.running_mean.normal_()
        norm.running_var.uniform_(0.3, 2)
        nn.init.normal_(norm.weight)
        nn.init.normal_(norm.bias)
    return model.to(dtype)


def converted(aux: str = "auto", *, dtype: torch.dtype = torch.float64, **options: Any) -> nn.Module:
    """A model of its own; the conversion is made once for each kind. aux: one of ALL_DOORS."""
    door, _, coupled = aux.partition(" ")
    model = copy.deepcopy(_converted(door, dtype, coupling="auto" if coupled else "none", **options))
    for layer in model.modules():
        if isinstance(layer, BatchlessNorm):
            layer.stepped = True  # the limit holds from the first step on
    return model


@functools.cache
def _converted(aux: str, dtype: torch.dtype, **options: Any) -> nn.Module:
    model = normswap.convert(source(dtype).eval(), X[:2].to(dtype), aux=aux, **options).model.train()  # type: ignore[arg-type]
    for layer in model.modules():
        if isinstance(layer, BatchlessNorm) and layer.trend is not None:
            nn.init.normal_(layer.trend, std=0.1, generator=torch.Generator().manual_seed(7))
    return model


def task(y: Tensor) -> Tensor:
    return y.float().square().mean() if y.dtype != torch.float64 else y.square().mean()


def loss_of(model: nn.Module, x: Tensor = X, forward: Callable[[Tensor], Tensor] | None = None) -> Tensor:
    """What a training loop computes: the door decides whether the term is added here."""
    loss = task((forward or model)(x))
    return loss + normswap.aux_loss(model) if model[1].aux == "explicit" else loss


def grads(model: nn.Module) -> dict[str, Tensor]:
    found = {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}
    model.zero_grad()
    return found


def coupled(layer: BatchlessNorm) -> tuple[Tensor, Tensor]:
    """Mean and std as they are written down, with the gradient through the producer."""
    mean, std = (t.detach() for t in layer.statistics())
    producer: Any = layer.producer_in_training
    if producer is None:
        return mean, std
    assert layer.input_mean is not None
    rows = filters(producer, torch.float64)
    answers = response(rows, layer.input_mean.detach(), getattr(producer, "groups", 1)) + (0 if producer.bias is None else producer.bias)
    n = rows.norm(dim=1)
    return answers + n * ((mean - answers) / n).detach(), n * (std / n).detach()


def without_trend(layer: BatchlessNorm, left: list[tuple[Tensor, Tensor]], x: Tensor) -> Tensor:
    """The forward pass of a layer with a trend and a limit, as it is written down. left: what is left of the gradient by z, and z."""

    def shaped(t: Tensor) -> Tensor:
        return t.view(-1, 1, 1)

    mean, std = coupled(layer)
    z = (x - shaped(mean)) / shaped(std) + torch.zeros((), requires_grad=True)
    limit = 1.2 / z.square().mean((1, 2, 3), keepdim=True).sqrt().clamp(min=1.2) if layer.limits_samples else 1
    z = z + 0  # the trend is taken away from what comes along z alone
    fixed, (slope, level) = z.detach(), layer.trend.detach() / (z[:, 0].numel() * layer.calls)

    def take_trend(g: Tensor) -> Tensor:
        r: Tensor = g - shaped(slope) * fixed - shaped(level)
        left.append((r, fixed))
        return r

    z.register_hook(take_trend)  # type: ignore[no-untyped-call]
    z = z * limit
    return z if layer.weight is None or layer.bias is None else shaped(layer.weight) * z + shaped(layer.bias)


def reference(model: nn.Module, x: Tensor = X) -> dict[str, Tensor]:
    """By the formulas of the method, layer by layer, in float64, from inputs that hooks record."""
    model = copy.deepcopy(model).double()
    seen: dict[nn.Module, list[Tensor]] = {}
    layers = [m for m in model.modules() if isinstance(m, BatchlessNorm)]
    left: dict[nn.Module, list[tuple[Tensor, Tensor]]] = {}
    for layer in layers:
        if layer.aux == "auto" and layer.trend is not None and layer._learns:
            left[layer] = []
            layer.forward = functools.partial(without_trend, layer, left[layer])  # type: ignore[method-assign]
        layer.aux = "none"
        for module in (layer, layer.producer):
            if module is not None:
                module.register_forward_pre_hook(lambda m, args: seen.setdefault(m, []).append(args[0].detach()))
    task(model(x.double())).backward()
    for layer, parts in left.items():
        if parts:
            layer.trend.grad = -sum(torch.stack([(r * z).sum((0, 2, 3)), r.sum((0, 2, 3))]) for r, z in parts)  # type: ignore[assignment]
    for layer in layers:
        by_mean, by_parameter = torch.zeros_like(layer.mean), torch.zeros_like(layer.mean)
        for a in seen.get(layer, []):
            mean, std, p = (t.detach().view(-1, 1, 1) for t in (*layer.statistics(), layer.std_parameter))
            m, square = a.mean((0, 2, 3), keepdim=True), (a - mean).square().mean((0, 2, 3), keepdim=True)
            slope = {"log": torch.ones_like(p), "abs": p, "inv": -p}[layer.std]  # dp/dlog std for p > 0
            eps = layer.source.eps if layer.source else 0.0
            channels = len(mean) if layer.reduction == "mean" else 1
            if layer.stats == "natural":
                by_mean += (-(m - mean)).flatten()
                by_parameter += (-((square + eps) / std**2 - 1) / 2 * slope).flatten()
            else:
                by_mean += (-(m - mean) / (channels * std**2)).flatten()
                by_parameter += ((1 - square / std**2) / channels / slope).flatten()
        if layer.mean.requires_grad:
            layer.mean.grad = by_mean
        if layer.std_parameter.requires_grad:
            layer.std_parameter.grad = by_parameter
        if layer.producer_in_training is not None:
            conv: Any = layer.producer
            layer.input_mean.grad = torch.zeros_like(layer.input_mean)
            for u in seen.get(conv, []):
                layer.input_mean.grad += layer.input_mean.detach() - u.mean((0, 2, 3))
    return grads(model)


def assert_close(found: dict[str, Tensor], expected: dict[str, Tensor], rtol: float = 1e-11, atol: float = 1e-13) -> None:
    assert found.keys() == expected.keys()
    for name in expected:
        torch.testing.assert_close(found[name].double(), expected[name].double(), rtol=rtol, atol=atol, msg=lambda m, n=name: f"{n}: {m}")


# --- what the two doors add --------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("stats", STATS)
@pytest.mark.parametrize("form", STD_FORMS)
@pytest.mark.parametrize("aux", ALL_DOORS)
def test_both_doors_give_the_gradient_of_the_formulas(aux: str, form: StdForm, stats: Stats) -> None:
    model = converted(aux, std=form, stats=stats)
    loss_of(model).backward()
    assert_close(grads(model), reference(model))


@pytest.mark.parametrize("aux", DOORS)
@pytest.mark.parametrize("reduction", ["mean", "sum"])
@pytest.mark.parametrize("form", STD_FORMS)
def test_raw_is_the_gradient_of_nll(form: StdForm, reduction: Any, aux: Any) -> None:
    layer = BatchlessNorm(3, std=form, reduction=reduction, aux=aux, stats="raw", dtype=torch.float64)
    with torch.no_grad():
        layer.mean.normal_()
        layer.std_parameter.uniform_(-2, -0.3)  # negative: the sign of the gradient of abs and inv
    x = torch.randn(5, 3, 4, dtype=torch.float64)
    layer(x).sum().backward() if aux == "auto" else (layer(x).sum() + normswap.aux_loss(layer)).backward()
    found = grads(layer)
    layer.nll(x).backward()
    for name in ("mean", f"{form}_std"):
        torch.testing.assert_close(found[name], dict(layer.named_parameters())[name].grad, rtol=1e-11, atol=1e-13)


def test_natural_does_not_depend_on_the_reduction() -> None:
    x = torch.randn(5, 3, 4)
    layers = [BatchlessNorm(3, reduction=r, aux="auto") for r in ("mean", "sum")]  # type: ignore[arg-type]
    for layer in layers:
        layer(x).sum().backward()
    assert all(torch.equal(a, b) for a, b in zip(grads(layers[0]).values(), grads(layers[1]).values(), strict=True))


@pytest.mark.parametrize("stats", STATS)
def test_aux_loss_is_the_sum_of_the_nll(stats: Stats) -> None:
    model = converted("explicit", stats=stats)
    inputs: dict[nn.Module, Tensor] = {}
    for layer in (model[1], model[4]):
        layer.register_forward_pre_hook(lambda m, args: inputs.update({m: args[0].detach()}))
    model(X)
    expected = sum(layer.nll(a) for layer, a in inputs.items())  # type: ignore[operator, misc]
    torch.testing.assert_close(normswap.aux_loss(model), expected, rtol=1e-12, atol=1e-13)


def test_the_shift_is_not_changed_and_nothing_is_saved() -> None:
    """The output is that of the plain layer bit for bit, and autograd keeps two numbers per channel more."""
    saved: list[int] = []
    x = torch.randn(6, 3, 40, requires_grad=True)
    plain, layer = BatchlessNorm(3), BatchlessNorm(3, aux="auto")
    sizes = []
    for module in (plain, layer):
        saved.clear()
        with torch.autograd.graph.saved_tensors_hooks(lambda t: saved.append(t.numel()) or t, lambda t: t):  # type: ignore[func-returns-value]
            module(x)
        sizes.append(sorted(saved))
    assert torch.equal(plain(x), layer(x))
    assert [n for n in sizes[1] if n > 3] == [n for n in sizes[0] if n > 3]


def test_without_affine_the_input_is_not_saved() -> None:
    saved: list[int] = []
    layer = BatchlessNorm(3, affine=False, aux="auto")
    with torch.autograd.graph.saved_tensors_hooks(lambda t: saved.append(t.numel()) or t, lambda t: t):  # type: ignore[func-returns-value]
        layer(torch.randn(6, 3, 40, requires_grad=True)).sum().backward()
    assert max(saved) == 3
    assert layer.mean.grad is not None


# --- when nothing is added ---------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("aux", ALL_DOORS)
def test_eval_mode_leaves_the_statistics(aux: str) -> None:
    model = converted(aux).eval()
    task(model(X)).backward()
    assert not {name for name in grads(model) if name.endswith(("mean", "std"))}


def test_none_is_the_task_alone() -> None:
    model = converted("none")
    task(model(X)).backward()
    assert not {name for name in grads(model) if name.endswith(("mean", "std"))}


@pytest.mark.parametrize("aux", ALL_DOORS)
def test_frozen_statistics_get_nothing(aux: str) -> None:
    model = converted(aux)
    model[1].mean.requires_grad_(False)
    model[1].log_std.requires_grad_(False)
    model[4].mean.requires_grad_(False)
    loss_of(model).backward()
    expected = reference(model)
    assert "1.mean" not in expected
    assert "4.log_std" in expected
    assert_close(grads(model), expected)


def test_a_frozen_layer_computes_no_moments() -> None:
    layer = BatchlessNorm(3, aux="auto").requires_grad_(False)
    with torch.profiler.profile() as profile:
        layer(torch.randn(2, 3, 5, requires_grad=True))
    assert not [event for event in profile.events() if event.name == "aten::mean"]


@pytest.mark.parametrize("aux", ALL_DOORS)
def test_no_grad(aux: str) -> None:
    model = converted(aux)
    with torch.no_grad():
        y = model(X)
    assert not y.requires_grad
    loss_of(model).backward()
    assert_close(grads(model), reference(model))


def test_an_output_that_the_loss_does_not_use() -> None:
    model = converted()
    model[4](torch.randn(2, 3, 5, 5, dtype=torch.float64))
    task(model[1](torch.randn(2, 4, 5, 5, dtype=torch.float64))).backward()
    assert {name for name in grads(model) if name.endswith("mean")} == {"1.mean"}


@pytest.mark.parametrize("aux", ALL_DOORS)
def test_empty_batches(aux: str) -> None:
    model = converted(aux)
    loss = model(X[:0]).sum()
    (loss + normswap.aux_loss(model) if aux.startswith("explicit") else loss).backward()
    found = grads(model)
    assert all(float(found[name].abs().sum()) == 0 for name in found if name.endswith(("mean", "std")))


# --- what surrounds the layers -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("aux", ALL_DOORS)
def test_a_frozen_trunk(aux: str) -> None:
    """The input of the norm needs no gradient; its statistics do."""
    model = converted(aux)
    model[0].requires_grad_(False)
    loss_of(model).backward()
    assert_close(grads(model), reference(model))


@pytest.mark.parametrize("aux", ALL_DOORS)
@pytest.mark.parametrize("k", [2, 6])
def test_accumulation(aux: str, k: int) -> None:
    model = converted(aux)
    if aux.startswith("auto"):
        normswap.attach(model, accumulate=k)
    for part in X.chunk(k):
        (loss_of(model, part) / k).backward()
    expected = reference(model)
    # the task's loss is a mean over equal parts too, and so is the square around the mean
    assert_close(grads(model), expected)


@pytest.mark.parametrize("aux", ALL_DOORS)
@pytest.mark.parametrize("scale", [1.0, 65536.0])
def test_grad_scaler(aux: str, scale: float) -> None:
    model = converted(aux)
    scaler = torch.amp.GradScaler("cpu", init_scale=scale)
    optimizer = torch.optim.SGD(normswap.param_groups(model, lr=0.0))
    if aux.startswith("auto"):
        normswap.attach(model, scaler=scaler)
    scaler.scale(loss_of(model, X)).backward()
    scaler.unscale_(optimizer)
    assert_close(grads(model), reference(model))


def test_a_scaler_whose_scale_changes() -> None:
    model = converted(dtype=torch.float32)
    scaler = torch.amp.GradScaler("cpu", init_scale=1024.0, growth_interval=1)
    optimizer = torch.optim.SGD(normswap.param_groups(model, lr=0.0))
    normswap.attach(model, scaler=scaler)
    expected = reference(model)
    for _ in range(3):
        before = scaler.get_scale()
        scaler.scale(loss_of(model, X.float())).backward()
        scaler.unscale_(optimizer)
        assert_close(grads(model), expected, rtol=1e-4, atol=1e-5)
        loss_of(model, X.float())  # nothing comes of a forward pass alone
        scaler.step(optimizer)
        scaler.update()
        assert scaler.get_scale() == 2 * before


def test_a_scaler_that_was_updated_between_forward_and_backward() -> None:
    model = converted(dtype=torch.float32)
    scaler = torch.amp.GradScaler("cpu")
    normswap.attach(model, scaler=scaler)
    loss = loss_of(model, X.float())
    scaler.update(512.0)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        scaler.scale(loss).backward()


def test_a_disabled_scaler_scales_nothing() -> None:
    model = converted()
    normswap.attach(model, scaler=torch.amp.GradScaler("cpu", enabled=False))
    loss_of(model).backward()
    assert_close(grads(model), reference(model))


@pytest.mark.parametrize("aux", ALL_DOORS)
def test_bf16_autocast(aux: str) -> None:
    model = converted(aux, dtype=torch.float32).to(memory_format=torch.channels_last)
    outputs: list[Tensor] = []
    model[1].register_forward_hook(lambda m, args, y: outputs.append(y))
    with torch.autocast("cpu", torch.bfloat16):
        loss = loss_of(model, X.float().to(memory_format=torch.channels_last))
    loss.backward()
    assert outputs[0].dtype == torch.bfloat16
    assert outputs[0].is_contiguous(memory_format=torch.channels_last)
    found, expected = grads(model), reference(model)
    assert {t.dtype for t in found.values()} == {torch.float32}
    for name in ("1.mean", "1.log_std", "4.mean", "4.log_std"):
        torch.testing.assert_close(found[name].double(), expected[name], rtol=3e-2, atol=3e-2)


@pytest.mark.parametrize("act", [lambda: nn.ReLU(inplace=True), lambda: nn.SiLU(inplace=True), nn.GELU])
@pytest.mark.parametrize("aux", DOORS)
def test_in_place_activations(aux: str, act: Callable[[], nn.Module]) -> None:
    model = normswap.convert(source(act=act).eval(), X[:2], aux=aux, coupling="none").model.train()  # type: ignore[arg-type]
    loss_of(model).backward()
    assert_close(grads(model), reference(model))


@pytest.mark.parametrize("inplace", [False, True])
def test_full_backward_hooks_do_what_they_do_on_batch_norm(inplace: bool) -> None:
    """torch makes views of what a module with such a hook returns, and refuses to overwrite them, whatever the module."""

    def train(model: nn.Module) -> None:
        model[0].register_full_backward_hook(lambda m, i, o: None)
        model[1].register_full_backward_hook(lambda m, i, o: None)
        task(model(X.clone().requires_grad_())).backward()

    ours = normswap.convert(source(act=lambda: nn.ReLU(inplace)).eval(), X[:2], coupling="none").model.train()
    expected = reference(ours)
    for model in (ours, source(act=lambda: nn.ReLU(inplace))):
        if inplace:
            with pytest.raises(RuntimeError, match="is a view and is being modified inplace"):
                train(model)
        else:
            train(model)
    if not inplace:
        assert_close(grads(ours), expected)


@pytest.mark.parametrize("reentrant", [True, False])
@pytest.mark.parametrize("aux", ALL_DOORS)
def test_checkpoints(aux: str, reentrant: bool) -> None:
    model = converted(aux)

    def forward(x: Tensor) -> Tensor:
        return checkpoint(model[3:], checkpoint(model[:3], x, use_reentrant=reentrant), use_reentrant=reentrant)  # type: ignore[index, no-any-return]

    for _ in range(2):  # the second run of the first pass is not in the second's term
        loss_of(model, X.clone().requires_grad_(), forward).backward()
        assert_close(grads(model), reference(model))


@pytest.mark.parametrize("aux", ALL_DOORS)
def test_copies_after_a_forward_pass(aux: str) -> None:
    model = converted(aux)
    loss = loss_of(model)
    average, clone = AveragedModel(model), copy.deepcopy(model)
    file = io.BytesIO()
    torch.save(model, file)
    file.seek(0)
    loaded = torch.load(file, weights_only=False)
    loss.backward()
    expected = reference(model)
    assert_close(grads(model), expected)
    for other in (average.module, clone, loaded):
        assert not grads(other)
        loss_of(other).backward()
        assert_close(grads(other), expected)
    average.update_parameters(model)


def test_a_copy_starts_without_what_the_run_was_told() -> None:
    """A scaler can be neither copied nor pickled in the middle of an iteration, and is nobody's but the run's."""
    model = converted()
    scaler = torch.amp.GradScaler("cpu")
    normswap.attach(model, scaler=scaler, accumulate=4)
    with normswap.masked(model, torch.zeros(6, dtype=torch.bool)):
        scaler.scale(loss_of(model)).backward()
        scaler.unscale_(torch.optim.SGD(model.parameters(), lr=0.1))
        clone = copy.deepcopy(model)
        torch.save(model, io.BytesIO())
    loss_of(clone).backward()
    assert_close(grads(clone), reference(clone))


@pytest.mark.parametrize("aux", ALL_DOORS)
def test_two_forward_passes_before_one_backward(aux: str) -> None:
    model = converted(aux)
    first, second = task(model(X[:4])), task(model(X[4:]))
    loss = first + second
    (loss + normswap.aux_loss(model) if aux.startswith("explicit") else loss).backward()
    found, parts = grads(model), [reference(model, X[:4]), reference(model, X[4:])]
    assert_close(found, {name: parts[0][name] + parts[1][name] for name in parts[0]})


class Twice(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.conv, self.norm = nn.Conv2d(2, 2, 1, dtype=torch.float64), nn.BatchNorm2d(2, dtype=torch.float64)

    def __getitem__(self, index: int) -> nn.Module:
        return self.norm

    def forward(self, x: Tensor) -> Tensor:
        return self.norm(self.conv(self.norm(x).relu_()))  # type: ignore[no-any-return]


@pytest.mark.parametrize("stats", STATS)
@pytest.mark.parametrize("aux", DOORS)
def test_a_norm_called_twice(aux: Any, stats: Stats) -> None:
    """The sum of both calls, as of two norms; of the natural gradient the mean, as the layer knows that there are two."""
    model = normswap.convert(Twice().eval(), X[:2], aux=aux, stats=stats).model.train()
    assert model.norm.calls == 2
    loss_of(model).backward()
    expected = reference(model)
    if stats == "natural":
        expected = {name: g / 2 if name in ("norm.mean", "norm.log_std") else g for name, g in expected.items()}
    assert_close(grads(model), expected)


def test_retained_graphs_and_autograd_grad() -> None:
    model = converted()
    expected = reference(model)
    loss = loss_of(model)
    names, parameters = zip(*model.named_parameters(), strict=True)
    for _ in range(2):
        assert_close(dict(zip(names, torch.autograd.grad(loss, parameters, retain_graph=True), strict=True)), expected)
    assert not grads(model)
    loss.backward()
    assert_close(grads(model), expected)


def test_double_backward() -> None:
    """A gradient penalty: the term is a constant in the graph of the gradient, and comes once."""
    model = normswap.convert(source(act=nn.GELU).eval(), X[:2], coupling="none").model.train()
    plain = copy.deepcopy(model)
    for layer in (plain[1], plain[4]):
        layer.aux = "none"
    found = []
    for each in (model, plain):
        x = X.clone().requires_grad_()
        loss = task(each(x))
        (by_x,) = torch.autograd.grad(loss, x, create_graph=True)
        (loss + by_x.square().sum()).backward()
        found.append(grads(each))
    statistics = {name: g for name, g in reference(model).items() if name.endswith(("mean", "std"))}
    assert_close(found[0], {**found[1], **statistics})


@pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::FutureWarning", "ignore::UserWarning:torch")
@pytest.mark.parametrize("aux", [pytest.param(aux, marks=[] if "coupled" in aux else [pytest.mark.slow]) for aux in ALL_DOORS])
def test_compiles_whole(aux: str) -> None:
    model = converted(aux)
    compiled = torch.compile(lambda x: loss_of(model, x), fullgraph=True, backend="aot_eager")
    for _ in range(2):
        compiled(X).backward()
        assert_close(grads(model), reference(model))


@pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::FutureWarning", "ignore::UserWarning:torch")
def test_compiled_with_a_scaler() -> None:
    """The scale is an input of the graph: it changes without another compilation."""
    model = converted(dtype=torch.float32)
    scaler = torch.amp.GradScaler("cpu", init_scale=8.0)
    normswap.attach(model, scaler=scaler, accumulate=2)
    compiled = torch.compile(model, fullgraph=True, backend="aot_eager")
    counters = torch._dynamo.utils.counters
    frames = None
    for scale in (8.0, 2.0):
        scaler.update(scale)
        for part in X.float().chunk(2):
            scaler.scale(task(compiled(part)) / 2).backward()
        assert_close({n: g / scale for n, g in grads(model).items()}, reference(model), rtol=1e-4, atol=1e-5)
        assert frames in (None, counters["stats"]["unique_graphs"])
        frames = counters["stats"]["unique_graphs"]


@pytest.mark.parametrize("stats", STATS)
@pytest.mark.parametrize("aux", ALL_DOORS)
def test_per_sample_gradients(aux: str, stats: Stats) -> None:
    model = converted(aux, stats=stats)
    parameters = {name: p.detach() for name, p in model.named_parameters()}

    class WithLoss(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.model = model

        def forward(self, x: Tensor) -> Tensor:
            return loss_of(self.model, x)

    def loss(parameters: dict[str, Tensor], sample: Tensor) -> Tensor:
        return functional_call(WithLoss(), {f"model.{n}": p for n, p in parameters.items()}, (sample[None],))  # type: ignore[no-any-return]

    found = vmap(grad(loss), (None, 0))(parameters, X)
    for i in range(len(X)):
        assert_close({name: g[i] for name, g in found.items()}, reference(model, X[i : i + 1]))
    assert not any(g.requires_grad for g in found.values())


@pytest.mark.parametrize("aux", ALL_DOORS)
def test_micro_batches_add_up(aux: str) -> None:
    """1 x 64, 8 x 8 and 64 x 1 are one gradient: the promise of the method, which BatchNorm breaks."""
    x = torch.randn(64, 2, 7, 5, dtype=torch.float64)
    found = []
    for k in (1, 8, 64):
        model = converted(aux)
        if aux.startswith("auto"):
            normswap.attach(model, accumulate=k)
        for part in x.chunk(k):
            (loss_of(model, part) / k).backward()
        found.append(grads(model))
    for other in found[1:]:
        assert_close(other, found[0], rtol=1e-12, atol=1e-12)


def test_batch_norm_does_not() -> None:
    """The test above is one: it fails for the layer that was replaced."""
    x, found = torch.randn(64, 2, 7, 5, dtype=torch.float64), []
    for k in (1, 8):
        model = source().train()
        for part in x.chunk(k):
            (task(model(part)) / k).backward()
        found.append(grads(model))
    with pytest.raises(AssertionError):
        assert_close(found[1], found[0], rtol=1e-6, atol=1e-6)


# --- masks -------------------------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("fill", [0.0, 1e30, float("nan")])
@pytest.mark.parametrize("aux", DOORS)
@pytest.mark.parametrize("axis", [1, -1])
def test_padding_does_not_count(axis: int, aux: Any, fill: float) -> None:
    layer = BatchlessNorm(3, channel_axis=axis, aux=aux, dtype=torch.float64)
    x = torch.randn(4, 3, 7, dtype=torch.float64).movedim(1, axis)
    lengths = torch.tensor([7, 1, 0, 4])
    mask = torch.arange(7) < lengths[:, None]
    padded = torch.where(mask.unsqueeze(axis), x, fill)
    with normswap.masked(layer, mask):
        y = layer(padded)
    loss = y.movedim(axis, -1)[mask].square().sum()
    (loss + normswap.aux_loss(layer) if aux == "explicit" else loss).backward()
    valid = x.movedim(axis, -1)[mask]
    torch.testing.assert_close(layer.mean.grad, -(valid.mean(0) - layer.mean.detach()), rtol=1e-12, atol=1e-13)
    expected = -(valid.square().mean(0) + 1e-5 - 1) / 2
    torch.testing.assert_close(layer.std_parameter.grad, expected, rtol=1e-12, atol=1e-13)


@pytest.mark.parametrize("stats", STATS)
def test_a_mask_that_lets_nothing_count(stats: Stats) -> None:
    layer = BatchlessNorm(3, aux="auto", stats=stats)
    with normswap.masked(layer, torch.zeros(4, dtype=torch.bool)):
        layer(torch.randn(4, 3, 7)).sum().backward()
    assert layer.mean.grad is not None
    assert layer.std_parameter.grad is not None
    assert float(layer.mean.grad.abs().sum() + layer.std_parameter.grad.abs().sum()) == 0


def test_a_mask_of_whole_samples_and_its_end() -> None:
    model = converted()
    keep = torch.tensor([True, False, True, True, False, True])
    with normswap.masked(model, keep):
        loss_of(model).backward()
    found, expected = grads(model), reference(model, X[keep])
    assert_close({n: found[n] for n in ("1.mean", "1.log_std")}, {n: expected[n] for n in ("1.mean", "1.log_std")})
    loss_of(model).backward()
    assert_close(grads(model), reference(model))


@pytest.mark.parametrize(
    ("mask", "message"),
    [
        (
            torch.ones(6),
            r"the mask of a BatchlessNorm is torch.float32 of shape \(6,\); expected torch.bool of shape \(6, 5, 3\), or the first",
        ),
        (torch.ones(5, dtype=torch.bool), r"torch.bool of shape \(5,\); expected torch.bool of shape \(6, 5, 3\)"),
        (torch.ones(6, 5, 3, 1, dtype=torch.bool), r"of shape \(6, 5, 3, 1\); expected .* those of its input \(6, 4, 5, 3\) that are not"),
    ],
)
def test_wrong_masks(mask: Tensor, message: str) -> None:
    model = converted()
    with normswap.masked(model, mask), pytest.raises(ValueError, match=message):
        model(X)


# --- what cannot be done is said ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("model", "message"),
    [
        (lambda: converted("auto"), r'1 has aux="auto": it adds its term by itself in backward, so that it would count twice'),
        (lambda: converted("none"), r'every layer has aux="none", so there is no auxiliary loss'),
        (lambda: converted("explicit"), r"there was no forward pass in train mode with gradients"),
        (lambda: nn.Linear(2, 3), r"Linear has no BatchlessNorm layer"),
        (lambda: 3, r"a int has no layers"),
    ],
)
def test_aux_loss_of_what_has_none(model: Callable[[], Any], message: str) -> None:
    with pytest.raises(UsageError, match=message):
        normswap.aux_loss(model())


VERBS: dict[str, Callable[[Any], Any]] = {
    "aux_loss": normswap.aux_loss,
    "attach": lambda given: normswap.attach(given, accumulate=2),
    "backward_in_micro_batches": lambda given: normswap.backward_in_micro_batches(given, lambda x: x.sum(), X, size=1),
    "convert": lambda given: normswap.convert(given, X),
    "drift": normswap.drift,
    "for_opacus": normswap.for_opacus,
    "norm_keys": normswap.norm_keys,
    "param_groups": lambda given: normswap.param_groups(given, lr=0.1),
    "revert": normswap.revert,
    "verify": lambda given: normswap.verify(converted(), given, X),
}


@pytest.mark.parametrize("verb", VERBS)
def test_a_conversion_in_the_place_of_its_model_is_refused_with_a_hint(verb: str) -> None:
    given = normswap.convert(nn.Sequential(nn.Linear(3, 5), nn.BatchNorm1d(5)).eval(), torch.randn(4, 3))
    with pytest.raises(NormswapError, match="Conversion") as caught:
        VERBS[verb](given)
    assert "conversion.model" in str(caught.value.hint)


def test_aux_loss_after_a_forward_pass_that_does_not_count() -> None:
    model = converted("explicit")
    model.eval()(X)
    with torch.no_grad():
        model.train()(X)
    with pytest.raises(UsageError, match="there was no forward pass in train mode"):
        normswap.aux_loss(model)


def test_aux_loss_of_frozen_layers_is_nothing() -> None:
    model = converted("explicit").requires_grad_(False)
    model(X)
    assert float(normswap.aux_loss(model)) == 0


def test_aux_loss_read_twice_is_the_same_and_begins_anew() -> None:
    model = converted("explicit")
    model(X[:3])
    first = normswap.aux_loss(model)
    assert torch.equal(first, normswap.aux_loss(model))
    model(X)
    fresh = converted("explicit")
    fresh(X)
    assert torch.equal(normswap.aux_loss(model), normswap.aux_loss(fresh))


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"accumulate": 0}, "accumulate is 0; expected the number of backward passes per step, at least 1"),
        ({"accumulate": 2.0}, "accumulate is 2.0; expected the number"),
        ({"accumulate": True}, "accumulate is True; expected the number"),
        ({"scaler": 1024.0}, "scaler is a float; expected a torch.amp.GradScaler"),
    ],
)
def test_attach_refuses(options: dict[str, Any], message: str) -> None:
    with pytest.raises(UsageError, match=message):
        normswap.attach(converted(), **options)


@pytest.mark.parametrize("aux", ["explicit", "none"])
def test_attach_is_for_the_automatic_term(aux: str) -> None:
    with pytest.raises(UsageError, match='no layer of this model has aux="auto": there is nothing to attach'):
        normswap.attach(converted(aux), accumulate=2)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"aux": "on"}, "aux is 'on'; expected one of 'auto', 'explicit', 'none'"),
        ({"stats": "adam"}, "stats is 'adam'; expected one of 'natural', 'raw'"),
    ],
)
def test_unknown_modes(options: dict[str, Any], message: str) -> None:
    with pytest.raises(UsageError, match=message):
        normswap.convert(source().eval(), X[:2], **options)
    with pytest.raises(ValueError, match=message):
        BatchlessNorm(3, **options)


def test_explicit_terms_cannot_be_traced() -> None:
    model = converted("explicit")
    with pytest.raises(UsageError, match="keeps the term of each call in train mode, which a traced graph cannot"):
        torch.fx.symbolic_trace(model)
    torch.fx.symbolic_trace(model.eval())
