"""Statistics that are coupled to the producer's weight: the same function, the gradient of the formulas, and who is left out."""

from __future__ import annotations

import contextlib
import copy
import io
import itertools
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from producers import F64, KINDS, close, pair_of
from torch import Tensor, nn
from torch.nn.utils import parametrize, prune
from torch.nn.utils.parametrizations import spectral_norm, weight_norm
from torch.utils.flop_counter import FlopCounterMode

import normswap
from normswap.errors import UsageError
from normswap.layer import coupling
from normswap.layer.batchless_norm import KNOWN, BatchlessNorm
from normswap.layer.formulas import STD_FORMS, StdForm
from normswap.layer.producer import TRANSPOSED, channel_mean, filters, groups_of, outputs_of, response
from normswap.training.couple import Pair

pytestmark = pytest.mark.filterwarnings("ignore:Using padding=.same. with even kernel")

G = torch.Generator().manual_seed(3)


def coupled(kind: str, *, data: bool = True, **options: Any) -> tuple[Any, Tensor]:
    source, x = pair_of(kind)
    model = normswap.convert(source, x[:3], coupling="auto", calibration=[x] if data else None, **options).model.train()
    assert isinstance(model, nn.Sequential)
    assert model[1].producer is model[0]
    return model, x


def grads(model: nn.Module) -> dict[str, Tensor]:
    found = {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}
    model.zero_grad()
    return found


def shaped(t: Tensor, x: Tensor) -> Tensor:
    return t.view(-1, *(1,) * (x.dim() - 2))


# --- the function stays ------------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", KINDS)
def test_at_the_swap_coupled_and_plain_are_one_function(kind: str) -> None:
    """Whatever the input mean."""
    source, x = pair_of(kind)
    plain = normswap.convert(source, x[:3], coupling="none").model
    model, _ = coupled(kind)
    for mode in (True, False):
        plain.train(mode)
        model.train(mode)
        for _ in range(2):
            close(model(x), plain(x))
            with torch.no_grad():
                model[1].input_mean.normal_(0, 10)
    close(model(x), source(x))


@pytest.mark.parametrize("kind", KINDS)
def test_the_gradient_is_that_of_the_formulas(kind: str) -> None:
    """Against autograd through mean = <W, a> + b + n c and std = n s as they are written down."""
    model, x = coupled(kind, aux="none")
    conv, norm = model[0], model[1]
    task = torch.randn(model(x).shape, generator=torch.Generator().manual_seed(4), dtype=F64)
    (model(x) * task).sum().backward()
    found = grads(model)
    a, (mean, std) = norm.input_mean.detach(), (t.detach() for t in (norm.mean, norm.log_std.exp()))
    rows = filters(conv, F64)
    bias = 0 if conv.bias is None else conv.bias
    answers = response(rows, a, groups_of(conv)) + bias
    n = rows.norm(dim=1)
    c, s = ((mean - answers) / n).detach(), (std / n).detach()
    y = conv(x)
    z = (y - shaped(answers + n * c, y)) / shaped(n * s, y)
    (nn.functional.silu(shaped(norm.weight, y) * z + shaped(norm.bias, y)) * task).sum().backward()
    expected = grads(model)
    assert found.keys() == expected.keys()
    for name, value in expected.items():
        close(found[name], value, 1e-10)


@pytest.mark.parametrize("kind", KINDS)
def test_the_gradient_has_no_radial_part_and_none_by_the_bias(kind: str) -> None:
    model, x = coupled(kind)
    task = torch.randn(model(x).shape, generator=torch.Generator().manual_seed(4), dtype=F64)
    (model(x) * task).sum().backward()
    w = model[0].weight
    rows, by = (filters(copy_with_weight(model[0], t), F64) for t in (w, w.grad))
    radial = (rows * by).sum(1).abs() / (rows.norm(dim=1) * by.norm(dim=1))
    assert radial.max() < 1e-12
    if model[0].bias is not None:
        assert model[0].bias.grad.abs().max() < 1e-12 * by.abs().max() * len(x) * 100
    plain = normswap.convert(pair_of(kind)[0], x[:3], coupling="none").model.train()
    (plain(x) * task).sum().backward()
    rows, by = (filters(copy_with_weight(plain[0], t), F64) for t in (plain[0].weight, plain[0].weight.grad))  # type: ignore[index]
    assert ((rows * by).sum(1).abs() / (rows.norm(dim=1) * by.norm(dim=1))).max() > 1e-3


def copy_with_weight(producer: nn.Module, weight: Tensor) -> nn.Module:
    copied = copy.deepcopy(producer)
    copied.weight = nn.Parameter(weight.detach().clone())
    return copied


def test_the_task_and_the_likelihood_train_what_is_theirs() -> None:
    model, x = coupled("conv2d", aux="none")
    model[1].nll(model[0](x)).backward()
    assert grads(model).keys() == {"1.mean", "1.log_std"}
    model(x).sum().backward()
    assert grads(model).keys() == {"0.weight", "1.weight", "1.bias"}


# --- the step ----------------------------------------------------------------------------------------------------------------------------


def c_and_s(producer: nn.Module, norm: BatchlessNorm) -> tuple[Tensor, Tensor]:
    """What stays when the weight W moves: c = offset / |W| and s = std / |W|."""
    output_mean, n = norm.snapshot()
    return ((norm.mean - output_mean) / n).detach(), (norm.log_std.exp() / n).detach()


@pytest.mark.parametrize("optimizer", ["sgd", "adamw", "lbfgs"])
@pytest.mark.parametrize("kind", ["grouped", "transposed", "linear"])
def test_the_statistics_move_with_the_weight(kind: str, optimizer: str) -> None:
    """Without the likelihood, a, c and s stay, and the function is that of the formulas with the new weight."""
    model, x = coupled(kind, aux="none")
    conv, norm = model[0], model[1]

    before, weight = c_and_s(conv, norm), conv.weight.detach().clone()
    parameters = [p for name, p in model.named_parameters() if name not in ("1.mean", "1.log_std", "1.input_mean")]
    steps: dict[str, Callable[[], torch.optim.Optimizer]] = {
        "sgd": lambda: torch.optim.SGD(parameters, lr=0.1, momentum=0.9, weight_decay=0.1),
        "adamw": lambda: torch.optim.AdamW(parameters, lr=0.05),
        "lbfgs": lambda: torch.optim.LBFGS(parameters, max_iter=4),
    }
    step = steps[optimizer]()

    def closure() -> Tensor:
        step.zero_grad()
        loss = model(x).square().mean()
        loss.backward()
        for found, expected in zip(c_and_s(conv, norm), before, strict=True):  # in the middle of a step, too
            close(found, expected, 1e-11)
        return loss

    for _ in range(4):
        step.step(closure)  # type: ignore[arg-type]
    assert (conv.weight - weight).abs().max() > 0.01
    for found, expected in zip(c_and_s(conv, norm), before, strict=True):
        close(found, expected, 1e-11)


class Sharpness(torch.optim.Optimizer):
    """As SAM: looks at the loss at a point nearby, goes back, and lets an optimizer step that it wraps."""

    def __init__(self, parameters: list[nn.Parameter]) -> None:
        super().__init__(parameters, {})
        self.base = torch.optim.SGD(self.param_groups, lr=0.1)

    @torch.no_grad()
    def step(self, closure: Any) -> Any:  # type: ignore[override]
        parameters = self.param_groups[0]["params"]
        before = [p.clone() for p in parameters]
        for p in parameters:
            p.mul_(1.5)
        with torch.enable_grad():
            loss = closure()
        for p, value in zip(parameters, before, strict=True):
            p.copy_(value)
        self.base.step()
        return loss


class Shrinks(torch.optim.SGD):
    """Moves weights before and after what its parent does."""

    def step(self, closure: Any = None) -> Any:
        with torch.no_grad():
            for p in self.param_groups[0]["params"]:
                p.mul_(0.7)
            loss = super().step(closure)
            for p in self.param_groups[0]["params"]:
                p.mul_(1.2)
        return loss


class Fails(torch.optim.SGD):
    def step(self, closure: Any = None) -> Any:
        super().step(closure)
        raise KeyboardInterrupt


@pytest.mark.parametrize("kind", ["grouped", "linear"])
@pytest.mark.parametrize("make", [Sharpness, lambda p: Shrinks(p, lr=0.1), lambda p: torch.optim.SGD(p, lr=0.1)])
def test_a_step_inside_another_moves_the_statistics_once(make: Any, kind: str) -> None:
    model, x = coupled(kind, aux="none")
    conv, norm = model[0], model[1]

    before, weight = c_and_s(conv, norm), conv.weight.detach().clone()
    step = make([*conv.parameters()])

    def closure() -> Tensor:
        step.zero_grad()
        loss = model(x).square().mean()
        loss.backward()
        return loss

    for _ in range(3):
        step.step(closure)
        for found, expected in zip(c_and_s(conv, norm), before, strict=True):
            close(found, expected, 1e-11)
    assert (conv.weight - weight).abs().max() > 1e-3


@pytest.mark.parametrize("inner", [False, True])
def test_what_a_failed_step_left_behind_moves_nothing_later(inner: bool) -> None:
    model, x = coupled("conv2d", aux="none")
    conv, norm = model[0], model[1]
    model(x).square().mean().backward()
    state = copy.deepcopy(model.state_dict())
    torch.optim.SGD(conv.parameters())  # torch hooks the step of a class when one of it is made, and else the inner step is not seen
    step = Fails(conv.parameters(), lr=0.1)
    with pytest.raises(KeyboardInterrupt):
        step.step()
    assert not torch.equal(norm.mean, state["1.mean"])
    model.load_state_dict(state)
    after = step if inner else torch.optim.SGD(conv.parameters(), lr=0.0)
    for group in after.param_groups:
        group["lr"] = 0.0
    with contextlib.suppress(KeyboardInterrupt):
        after.step()
    assert torch.equal(norm.mean, state["1.mean"])
    assert torch.equal(norm.log_std, state["1.log_std"])


@pytest.mark.parametrize("form", STD_FORMS)
@pytest.mark.parametrize("door", ["auto", "explicit"])
def test_training_is_that_of_the_formulas(door: Any, form: StdForm) -> None:
    """Ten steps against an explicit model with the state (W, a, c, s), every update written down."""
    model, x = coupled("conv2d", aux=door, std=form)
    conv, norm = model[0], model[1]
    reference = {name: p.detach().clone().requires_grad_() for name, p in (("w", conv.weight), ("g", norm.weight), ("b", norm.bias))}
    w, a = reference["w"], norm.input_mean.detach().clone()
    mean, std = (t.detach().clone() for t in norm.statistics())

    def snapshot() -> tuple[Tensor, Tensor]:
        rows = w.flatten(1)
        return rows @ a.repeat_interleave(conv.weight[0, 0].numel()), rows.norm(dim=1)

    c, s = (((mean - snapshot()[0]) / snapshot()[1]).detach(), (std / snapshot()[1]).detach())
    trend = torch.zeros(2, len(w), dtype=F64)
    options: dict[str, Any] = {"lr": 0.05, "momentum": 0.9}
    steps = torch.optim.SGD(normswap.param_groups(model, lr=0.05), momentum=0.9), torch.optim.SGD([*reference.values()], **options)
    data = torch.randn(10, *x.shape, generator=torch.Generator().manual_seed(5), dtype=F64) + 1
    clipped: list[Tensor] = []
    for batch in data:
        loss = 30 * model(batch).square().mean()
        steps[0].zero_grad()
        (loss + normswap.aux_loss(model) if door == "explicit" else loss).backward()
        steps[0].step()

        y = nn.functional.conv2d(batch, w, None, padding=conv.padding)
        output_mean, n = snapshot()
        z = (y - shaped(output_mean + n * c, y)) / shaped(n * s, y)
        number = z[:, 0].numel()
        left: list[Tensor] = []
        if door == "auto":  # the trend
            fixed, (slope, level) = z.detach(), (shaped(t / number, y) for t in trend)
            z.register_hook(lambda g, f=fixed, a=slope, b=level, left=left: left.append(g - a * f - b) or left[0])  # type: ignore[misc, func-returns-value]
        expected = 30 * nn.functional.silu(shaped(reference["g"], y) * z + shaped(reference["b"], y)).square().mean()
        close(loss.detach(), expected.detach(), 1e-9)
        steps[1].zero_grad()
        expected.backward()
        with torch.no_grad():
            for r in left:
                square = fixed.square().mean((0, 2, 3)).clamp(min=1)
                missed = torch.stack([(r * fixed).sum((0, 2, 3)) / square, r.sum((0, 2, 3))])
                growth = (missed * trend).sum(1, keepdim=True) / trend.square().sum(1, keepdim=True).clamp(min=1e-300)
                trend += 0.1 * missed + 0.5 * growth.clamp(-1, 3) * trend
            deviation = y - shaped(output_mean + n * c, y)
            eta, eps = norm.momentum, norm.source.eps
            variance = (n * s).square() * (1 - eta) + eta * (deviation.square().mean((0, 2, 3)) + eps)
            s = variance.sqrt() / n
            c = c + eta * deviation.mean((0, 2, 3)) / n
            delta = eta * (batch.mean((0, 2, 3)) - a)
            a, c = a + delta, c - w.flatten(2).sum(2) @ delta / n
            shorter = (0.2 * w.flatten(1).norm(dim=1) / (0.05 / (1 - 0.9) * w.grad.flatten(1).norm(dim=1))).clamp(max=1)
            w.grad *= shorter[:, None, None, None]
            clipped += [shorter < 1]
        steps[1].step()
    assert 0 < torch.stack(clipped).double().mean() < 1
    close(norm.input_mean.detach(), a, 1e-9)
    assert (norm.trend is not None) == (door == "auto")
    if door == "auto":
        close(norm.trend.detach(), trend, 1e-9)
    close(conv.weight.detach(), w.detach(), 1e-9)
    output_mean, n = snapshot()
    close(norm.statistics()[0].detach(), (output_mean + n * c).detach(), 1e-9)
    close(norm.statistics()[1].detach(), (n * s).detach(), 1e-9)


def lengths(producer: Any, t: Tensor) -> list[float]:
    """|t| of each filter, one after the other."""
    if not isinstance(producer, TRANSPOSED):
        return [float(row.norm()) for row in t]
    inputs, outputs = producer.in_channels // producer.groups, producer.out_channels // producer.groups
    return [float(t[g * inputs : (g + 1) * inputs, o].norm()) for g in range(producer.groups) for o in range(outputs)]


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("reach", [0.4, 7.0])
def test_a_long_gradient_is_shortened_filter_by_filter(kind: str, reach: float) -> None:
    producer: Any = pair_of(kind)[0][0]  # type: ignore[index]
    sizes = torch.logspace(-3, 1, outputs_of(producer), dtype=F64)
    gradient = torch.randn(producer.weight.shape, dtype=F64, generator=torch.Generator().manual_seed(3))
    if isinstance(producer, TRANSPOSED):
        per = sizes.view(producer.groups, 1, -1).expand(-1, producer.in_channels // producer.groups, -1).flatten(0, 1)
    else:
        per = sizes
    gradient *= per.view(*per.shape, *(1,) * (gradient.dim() - per.dim())) / reach
    producer.weight.grad = gradient.clone()
    coupling.clip([producer], [filters(producer, F64).norm(dim=1).detach()], reach)
    before, after, most = (lengths(producer, t) for t in (gradient, producer.weight.grad, producer.weight.detach()))
    limits = [0.2 * length / reach for length in most]
    assert any(b > m for b, m in zip(before, limits, strict=True))
    assert any(b < m for b, m in zip(before, limits, strict=True))
    for b, a, m in zip(before, after, limits, strict=True):
        assert a == pytest.approx(min(b, m), rel=1e-12)


def test_a_weight_under_two_norms_is_shortened_once() -> None:
    model, x = coupled("conv2d")
    alone = copy.deepcopy(model)
    model.add_module("other", BatchlessNorm(5, aux="auto").to(F64))
    model.other.couple(model[0], model[1].input_mean.detach())
    found = []
    for each in (model, alone):
        hidden = each[0](x)
        (1e4 * each[1](hidden).square().mean()).backward()
        before = each[0].weight.grad.clone()
        torch.optim.SGD([*each[0].parameters(), *each[1].parameters()], lr=0.05).step()
        found.append(float(each[0].weight.grad.norm() / before.norm()))
    assert found[0] < 0.1
    assert found[0] == pytest.approx(found[1], rel=1e-12)


def test_a_filter_of_nothing_can_grow() -> None:
    producer = nn.Linear(3, 2, dtype=F64)
    nn.init.zeros_(producer.weight)
    producer.weight.grad = torch.full_like(producer.weight, 7.0)
    coupling.clip([producer], [torch.zeros(2, dtype=F64)], 0.5)
    assert lengths(producer, producer.weight.grad) == pytest.approx([4e-4, 4e-4])


@pytest.mark.parametrize("what", ["uncoupled", "frozen", "eval", "no gradient"])
def test_no_other_gradient_is_shortened(what: str) -> None:
    model, x = coupled("conv2d")
    if what == "uncoupled":
        model[1].decouple()
    (1e6 * model(x).square().mean()).backward()
    if what == "frozen":
        for p in (model[1].mean, model[1].std_parameter):
            p.requires_grad_(False)
    if what == "eval":
        model.eval()
    if what == "no gradient":
        model[0].weight.grad = None
    before = {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}
    torch.optim.SGD(normswap.param_groups(model, lr=1e-9)).step()
    for name in ("0.weight", "1.weight", "1.bias"):
        if name in before:
            close(model.get_parameter(name).grad, before[name], 0)  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("stats", "kind"),
    [
        *(("natural", kind) for kind in KINDS),
        # the statistics do not see what the producer is: a kind without places, one with groups and one that is transposed
        *(pytest.param("raw", k, marks=[] if k in ("linear", "grouped", "transposed") else [pytest.mark.slow]) for k in KINDS),
    ],
)
def test_micro_batches_are_the_batch(stats: Any, kind: str) -> None:
    """1 x 24, 8 x 3 and 24 x 1: the same gradients, and the same model after the steps."""
    found = []
    for parts in (1, 8, 24):
        model, x = coupled(kind, stats=stats)
        normswap.attach(model, accumulate=parts)
        step = torch.optim.SGD(normswap.param_groups(model, lr=0.01), momentum=0.9)
        for _ in range(2):
            step.zero_grad()
            for part in x.chunk(parts):
                (model(part).square().mean() / parts).backward()
            gradients = {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}
            step.step()
        assert {"0.weight", "1.mean", "1.input_mean"} <= gradients.keys()
        found.append({**gradients, **{f"after {name}": p.detach() for name, p in model.named_parameters()}})
    for other in found[1:]:
        for name, value in found[0].items():
            close(other[name], value, 1e-9)


def test_averaged_gradients_of_two_workers_are_those_of_the_batch() -> None:
    """What DistributedDataParallel does."""
    (whole, x), (model, _) = coupled("grouped"), coupled("grouped")
    whole(x).square().mean().backward()
    parts = []
    for part in x.chunk(2):
        model(part).square().mean().backward()
        parts.append(grads(model))
    for name, value in grads(whole).items():
        close((parts[0][name] + parts[1][name]) / 2, value)


def test_the_input_mean_steps_by_itself() -> None:
    """By the layer's momentum, whatever the optimizer does to weights, with raw statistics too."""
    for stats in ("natural", "raw"):
        model, x = coupled("linear", stats=stats)
        norm = model[1]
        step = torch.optim.AdamW(normswap.param_groups(model, lr=0.3, weight_decay=0.5))
        with torch.no_grad():
            start = norm.input_mean.normal_().clone()
        model(x).square().mean().backward()
        step.step()
        close(norm.input_mean.detach(), 0.9 * start + 0.1 * x.mean(0))
        assert not step.state[norm.input_mean]


@pytest.mark.parametrize("loaded", [False, True])
def test_an_input_mean_that_was_not_measured_is_at_first_that_of_the_first_steps(loaded: bool) -> None:
    """In the k-th step it moves by 1 / k until that is less than the momentum. One that was loaded is taken for measured."""
    model, x = coupled("linear", data=False)
    if loaded:
        other, _ = coupled("linear")
        model.load_state_dict(other.state_dict())
    norm = model[1]
    step = torch.optim.SGD(normswap.param_groups(model, lr=0.01))
    expected = norm.input_mean.detach().clone()
    for k in range(1, 14):
        batch = x + k
        step.zero_grad()
        model(batch).square().mean().backward()
        step.step()
        expected += (0.1 if loaded else max(0.1, 1 / k)) * (batch.mean(0) - expected)
        close(norm.input_mean.detach(), expected)
    assert torch.equal(copy.deepcopy(norm).steps, norm.steps)
    assert norm.steps % KNOWN == 13


@pytest.mark.parametrize("what", ["eval", "frozen", "one frozen"])
def test_what_does_not_learn_stays(what: str) -> None:
    """In eval mode, or frozen, the layer is the plain one: no gradient passes, and nothing moves."""
    model, x = coupled("conv2d")
    plain = normswap.convert(pair_of("conv2d")[0], x[:3], coupling="none").model
    for each in (model, plain):
        if what == "eval":
            each.eval()
        else:
            each.train()
            each[1].mean.requires_grad_(False)  # type: ignore[index, union-attr]
            each[1].log_std.requires_grad_(what != "frozen")  # type: ignore[index, union-attr]
        step = torch.optim.SGD(normswap.param_groups(each, lr=0.1))
        each(x).square().mean().backward()
        step.step()
    for name, p in plain.named_parameters():
        close(model.get_parameter(name).detach(), p.detach())


# --- dead filters ------------------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("size", [0.0, 1e-200, 1e-20, 1e-10, 1e-3])
def test_dead_filters(size: float) -> None:
    """Where eps makes up the std, std and mean - <W, a> - b stay: the gradient is finite and only centred, and nothing runs away."""
    model, x = coupled("conv2d")
    conv, norm = model[0], model[1]
    with torch.no_grad():
        conv.weight[1] *= size
        norm.mean[1] = 0.003  # about one std from the output, which is about 0
        norm.log_std[1] = 0.5 * math.log(norm.source.eps + 1e-7)
    model(x).square().mean().backward()
    by = grads(model)["0.weight"]
    mean, std = (t.detach() for t in norm.statistics())
    answers = response(filters(conv, F64), norm.input_mean.detach(), 1)
    y = nn.functional.conv2d(x, conv.weight, None, padding=conv.padding)
    z = (y - shaped(answers + (mean - answers).detach(), y)) / shaped(std, y)
    nn.functional.silu(shaped(norm.weight, y) * z + shaped(norm.bias, y)).square().mean().backward()
    by_centred = grads(model)["0.weight"]
    close(by[1], by_centred[1])
    assert (by[0] - by_centred[0]).abs().max() > 1e-6
    step = torch.optim.SGD(normswap.param_groups(model, lr=1e-3), momentum=0.9)
    for _ in range(5):
        step.zero_grad()
        model(x).square().mean().backward()
        assert all(p.grad.isfinite().all() for p in model.parameters() if p.grad is not None)
        assert conv.weight.grad[1].abs().max() < 1e4
        step.step()
    assert all(p.isfinite().all() for p in model.parameters())


def test_a_filter_that_is_pruned_while_it_trains() -> None:
    model, x = coupled("conv2d")
    step = torch.optim.ASGD(normswap.param_groups(model, lr=1.0), lambd=0.0)  # it goes as far as its gradient says
    model(x).sum().backward()
    model[0].weight.grad[2] = model[0].weight.detach()[2]  # the step takes all of it away
    step.step()
    assert model[0].weight[2].abs().max() == 0
    assert all(p.isfinite().all() for p in model.parameters())
    model(x).sum().backward()
    assert all(p.grad.isfinite().all() for p in model.parameters())


# --- who is coupled, and from where ------------------------------------------------------------------------------------------------------


class Net(nn.Module):
    """A part for every reason to be left out, all of which run."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.good, self.good_norm = nn.Conv2d(2, 4, 3), nn.BatchNorm2d(4)
        self.first_norm = nn.BatchNorm2d(2)
        self.shared, self.shared_norm = nn.Conv2d(4, 4, 1), nn.BatchNorm2d(4)
        self.hooked, self.hooked_norm = nn.Conv2d(4, 5, 1), nn.BatchNorm2d(5)
        self.hooked.register_forward_pre_hook(lambda m, args: (args[0] * 2,))
        self.parametrized, self.parametrized_norm = weight_norm(nn.Conv2d(5, 6, 1)), nn.BatchNorm2d(6)
        self.read, self.read_norm = nn.Conv2d(6, 7, 1), nn.BatchNorm2d(7)
        self.twice = nn.BatchNorm2d(7)
        self.tokens, self.tokens_norm = nn.Linear(7, 9), nn.BatchNorm1d(9)

    def forward(self, x: Tensor) -> Tensor:
        x = self.good_norm(self.good(self.first_norm(x)))
        x = self.shared_norm(self.shared(x)) + self.shared(x)
        x = self.parametrized_norm(self.parametrized(self.hooked_norm(self.hooked(x))))
        y = self.read(x)
        x = self.read_norm(y) + y
        x = self.twice(self.twice(x))
        return self.tokens_norm(self.tokens(x.flatten(2)[:, :, :7].expand(-1, 7, 7).repeat(1, 2, 1)[:, :9]))  # type: ignore[no-any-return]


def test_who_is_coupled_and_why_the_others_are_not() -> None:
    none = "has no producer: its input is the output of {}, {}".format
    conversion = normswap.convert(Net().eval(), torch.randn(3, 2, 6, 5), coupling="auto")
    found = {each.name: each for each in conversion.pairs}
    assert found.pop("good_norm") == Pair("good_norm", "good", None, "closed form")
    expected = {
        "first_norm": "has no producer: its input does not come straight from a conv or linear layer",
        "shared_norm": none("shared", "which computes 2 outputs in one forward pass"),
        "hooked_norm": "its producer hooked has hooks, which may change what it computes",
        "parametrized_norm": none("parametrized", "whose weight is computed from other parameters"),
        "read_norm": none("read", "whose output other code reads as well"),
        "twice": "is called 2 times in one forward pass",
        "tokens_norm": "its channels are not the outputs of its producer tokens but another axis",
    }
    assert found.keys() == expected.keys()
    for name, each in found.items():
        assert each.producer is each.start is None
        assert each.reason is not None
        assert each.reason.startswith(expected[name]), name
        layer = conversion.model.get_submodule(name)
        assert isinstance(layer, BatchlessNorm)
        assert layer.producer is None
        assert layer.input_mean is None
    hooked = conversion.model.get_submodule("hooked")
    assert len(hooked._forward_pre_hooks) == 1


def test_none_couples_nothing() -> None:
    source, x = pair_of("conv2d")
    conversion = normswap.convert(source, x, coupling="none")
    assert conversion.pairs == ()
    assert not conversion.model[0]._forward_pre_hooks  # type: ignore[index, union-attr]
    with pytest.raises(UsageError, match="coupling is 'maybe'; expected one of 'auto', 'none'"):
        normswap.convert(source, x, coupling="maybe")  # type: ignore[arg-type]


def test_a_calibrated_layer_norm_is_coupled_too() -> None:
    torch.manual_seed(0)
    source, x = nn.Sequential(nn.Linear(7, 5), nn.LayerNorm(5), nn.Tanh()), torch.randn(64, 6, 7) + 1
    conversion = normswap.convert(source.eval(), x, calibration=[x], approximate=True, coupling="auto")
    assert conversion.pairs == (Pair("1", "0", None, "data"),)
    layer: Any = conversion.model[1]
    close(layer.input_mean.detach(), x.mean((0, 1)), 1e-5)


@pytest.mark.parametrize("fill", [None, math.nan, math.inf])
def test_data_that_say_nothing_are_not_started_from(fill: float | None) -> None:
    source, x = pair_of("conv2d")
    bad = x[:0] if fill is None else torch.full_like(x, fill)
    conversion = normswap.convert(source, x[:3], calibration=[bad])
    assert [each.start for each in conversion.pairs] == ["zero"]
    assert not conversion.model[1].input_mean.any()  # type: ignore[index, union-attr, operator]
    conversion = normswap.convert(source, x[:3], calibration=[x[:0], x])
    assert [each.start for each in conversion.pairs] == ["data"]


@pytest.mark.parametrize(
    "act", [nn.ReLU(inplace=True), nn.ReLU6(), nn.GELU(), nn.SiLU(inplace=True), nn.LeakyReLU(0.2), nn.Hardswish(), nn.Tanh()]
)
def test_the_closed_form(act: nn.Module) -> None:
    """Through the activation and a pooling, against a sample."""
    torch.manual_seed(0)
    norm = nn.BatchNorm2d(3)
    with torch.no_grad():
        norm.weight.copy_(torch.tensor([0.5, -1.5, 2.0]))
        norm.bias.copy_(torch.tensor([0.4, -0.3, 1.0]))
    source = nn.Sequential(norm, act, nn.AvgPool2d(2), nn.Dropout(0.3), nn.Conv2d(3, 4, 3, padding=1), nn.BatchNorm2d(4)).eval()
    x = torch.randn(2000, 3, 10, 12)
    conversion = normswap.convert(source, x[:2], coupling="auto")
    assert conversion.pairs[1] == Pair("5", "4", None, "closed form")
    layer: Any = conversion.model[5]
    with torch.no_grad():
        sampled = channel_mean(source[4], source[:4](x))
    assert (layer.input_mean - sampled).abs().max() < 0.02


@pytest.mark.parametrize("between", [nn.MaxPool2d(2), nn.Softmax(1), nn.PReLU(3), nn.Conv2d(3, 3, 1)])
def test_without_a_closed_form_it_is_zero(between: nn.Module) -> None:
    source = nn.Sequential(nn.BatchNorm2d(3), nn.Sequential(between), nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4)).eval()
    conversion = normswap.convert(source, torch.randn(2, 3, 10, 12), coupling="auto")
    assert conversion.pairs[1] == Pair("3", "2", None, "zero")


# --- what surrounds it -------------------------------------------------------------------------------------------------------------------


def test_copies_pickles_and_states_keep_the_pair() -> None:
    model, x = coupled("grouped")
    file = io.BytesIO()
    torch.save(model, file)
    file.seek(0)
    for other in (copy.deepcopy(model), torch.load(file, weights_only=False)):
        assert other[1].producer is other[0]
        assert other[1].producer is not model[0]
        assert list(other.state_dict()) == list(model.state_dict())
        other(x).sum().backward()
        close(other[1].input_mean.grad, other[1].input_mean.detach() - channel_mean(other[0], x))
    assert type(model[0]) is nn.Conv2d
    assert [name for name, _ in model[0].named_parameters()] == ["weight", "bias"]
    assert len(list(model.named_modules())) == 4


def test_the_states_of_coupled_and_plain_layers_fit_each_other() -> None:
    model, x = coupled("grouped")
    plain = normswap.convert(pair_of("grouped")[0], x[:3], coupling="none").model.train()
    step = torch.optim.SGD(normswap.param_groups(model, lr=0.1))
    model(x).square().mean().backward()
    step.step()
    plain.load_state_dict(model.state_dict())
    close(plain(x), model(x))
    mean = model[1].input_mean.detach().clone()
    fresh, _ = coupled("grouped")
    fresh.load_state_dict(plain.state_dict())
    close(fresh(x), model(x))
    fresh.load_state_dict(model.state_dict())
    close(fresh[1].input_mean.detach(), mean)


def test_reverted_and_exported_it_is_an_ordinary_layer(tmp_path: Path) -> None:
    torch.manual_seed(0)
    source = nn.Sequential(nn.Conv2d(2, 4, 3, padding=1), nn.BatchNorm2d(4), nn.ReLU(), nn.Flatten(), nn.Linear(48, 3)).eval()
    x = torch.randn(5, 2, 4, 3)
    conversion = normswap.convert(source, x, coupling="auto")
    model = conversion.model
    untouched = normswap.revert(model)
    assert not untouched[0]._forward_pre_hooks
    for name, tensor in source.state_dict().items():
        assert torch.equal(untouched.state_dict()[name], tensor)
    model.train()
    step = torch.optim.SGD(normswap.param_groups(model, lr=0.1))
    for _ in range(3):
        step.zero_grad()
        model(x).square().mean().backward()
        step.step()
    model.eval()
    reverted = normswap.revert(model)
    assert isinstance(reverted[1], nn.BatchNorm2d)
    assert not reverted[0]._forward_pre_hooks
    assert not reverted[0]._forward_pre_hooks_with_kwargs
    assert model[0]._forward_pre_hooks
    close(reverted(x), model(x), 1e-5)
    program = torch.export.export(model, (x,))
    close(program.module()(x), model(x), 1e-6)
    exported = normswap.export_onnx(model, x, tmp_path / "model.onnx")
    assert exported.parity.passed
    loaded = normswap.load(normswap.save(model, tmp_path / "saved"), lambda: copy.deepcopy(source))
    assert loaded[1].producer is loaded[0]  # how it trains comes back
    assert torch.equal(loaded(x), model(x))
    assert model[1].producer is model[0]  # saving leaves the model as it is


def test_a_producer_that_was_replaced_is_an_error() -> None:
    model, x = coupled("linear")
    model[0] = nn.Linear(7, 5).to(F64)
    with pytest.raises(UsageError, match="coupled to a Linear that was not called before it") as error:
        model(x)
    assert "decouple()" in str(error.value.hint)
    model.eval()(x)
    model.train()[1].decouple()
    model(x).sum().backward()


@pytest.mark.parametrize("kind", ["grouped", "linear", "conv2d"])
@pytest.mark.parametrize(
    ("compute", "undo"),
    [
        (lambda m: prune.l1_unstructured(m, "weight", 0.3), lambda m: prune.remove(m, "weight")),
        (weight_norm, lambda m: parametrize.remove_parametrizations(m, "weight")),
        (spectral_norm, lambda m: parametrize.remove_parametrizations(m, "weight")),
    ],
)
def test_while_the_weight_is_computed_the_statistics_are_plain(compute: Any, undo: Any, kind: str) -> None:
    """What a step makes of it is not known before the next forward pass. The mean of the input is followed on."""
    models = [coupled(kind)[0] for _ in range(2)]
    x = coupled(kind)[1]
    for model in models:
        torch.manual_seed(0)
        compute(model[0])
    models[1][1].decouple()
    close(models[0](x), models[1](x), 1e-12)
    for model in models:
        step = torch.optim.SGD(model.parameters(), lr=0.1)
        for _ in range(3):
            step.zero_grad()
            model(x).square().mean().backward()
            step.step()
    state, plain = models[0].state_dict(), models[1].state_dict()
    assert state.keys() - plain.keys() == {"1.input_mean"}
    for name, value in plain.items():
        close(state[name], value, 1e-11)
    model = models[0]
    before = model[1].input_mean.detach().clone()
    model(x + 1).sum().backward()
    torch.optim.SGD([model[1].input_mean], lr=0.1).step()
    assert (model[1].input_mean - before).abs().max() > 0.01
    assert model[1].producer_in_training is None
    undo(model[0])
    assert model[1].producer_in_training is model[0]


@pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore:.*reduce_range:UserWarning")
def test_a_layer_that_quantization_aware_training_put_in_the_place_of_the_producer() -> None:
    """It has the producer's weight and its hooks, which torch moves as if they took no keyword arguments."""
    source, x = pair_of("conv2d")
    model: Any = normswap.convert(source.float(), x[:3].float()).model.train()
    producer = model[0]
    producer.qconfig = torch.ao.quantization.get_default_qat_qconfig("fbgemm")
    torch.ao.quantization.prepare_qat(model, inplace=True)
    assert model[0] is not producer
    assert model[0].weight is model[1].producer.weight
    step = torch.optim.SGD(model.parameters(), lr=0.1)
    model(x.float()).square().mean().backward()
    step.step()
    close(model[1].input_mean.detach(), channel_mean(producer, x.float()), 1e-6)


def test_a_norm_that_is_called_again_without_its_producer_is_an_error() -> None:
    model, x = coupled("linear")
    y = model(x)
    with pytest.raises(UsageError, match="was not called before it"):
        model[1](y)


@pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::FutureWarning")
@pytest.mark.parametrize(
    "options", [{}, *(pytest.param(o, marks=pytest.mark.slow) for o in ({"aux": "explicit"}, {"stats": "raw"}))], ids=str
)
def test_compiled_for_any_size_it_trains_as_ever(options: dict[str, Any]) -> None:
    """dynamic=True from the start, where a global float in backward made torch.compile fail from the second coupled layer on."""
    torch._dynamo.reset()
    torch.manual_seed(4)
    source = nn.Sequential(nn.Conv2d(3, 6, 3), nn.BatchNorm2d(6), nn.ReLU(), nn.Conv2d(6, 5, 2), nn.BatchNorm2d(5), nn.Flatten()).to(F64)
    x = torch.randn(7, 3, 6, 5, generator=G, dtype=F64)
    model = normswap.convert(source.eval(), x, **options).model.train()
    other = copy.deepcopy(model)
    compiled = torch.compile(other, dynamic=True, fullgraph=True, backend="eager")
    steps = [torch.optim.SGD(normswap.param_groups(each, lr=0.1), momentum=0.9) for each in (model, other)]
    for batch in (4, 7, 1, 5):
        for run, each, step in zip((model, compiled), (model, other), steps, strict=True):
            step.zero_grad()
            loss = run(x[:batch]).square().mean()
            (loss + normswap.aux_loss(each) if "aux" in options else loss).backward()
            step.step()
    for name, tensor in model.state_dict().items():
        close(other.state_dict()[name], tensor, 1e-10)


@pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::FutureWarning")
def test_compiled_it_trains_as_ever_and_no_batch_is_compiled_anew() -> None:
    """One graph until the first step, one with the sample limit, and one for any size of batch: a fourth is an error."""
    torch._dynamo.reset()
    x = coupled("grouped")[1]
    eager, model = (coupled("grouped")[0] for _ in range(2))
    compiled = torch.compile(model, fullgraph=True, backend="aot_eager")
    steps = [torch.optim.SGD(normswap.param_groups(m, lr=0.1), momentum=0.9) for m in (eager, model)]
    with torch._dynamo.config.patch(recompile_limit=3):
        for size in (9, 9, 8, 7, 3, 5):
            for run, step in zip((eager, compiled), steps, strict=True):
                step.zero_grad()
                run(2 * x[:size]).square().mean().backward()
                step.step()
    assert model[1].stepped
    assert model[1].trend.any()
    for name, value in eager.state_dict().items():
        close(model.state_dict()[name], value, 1e-11)
    torch._dynamo.reset()


def test_it_cannot_be_traced_in_train_mode() -> None:
    model, x = coupled("linear")
    with pytest.raises(Exception, match="cannot be traced in train mode"):
        torch.export.export(model, (x,))
    with pytest.raises(UsageError, match="cannot be traced in train mode"):
        torch.fx.symbolic_trace(model)
    torch.fx.symbolic_trace(model.eval())


def test_couple_by_hand_and_what_it_refuses() -> None:
    linear, layer = nn.Linear(7, 5), BatchlessNorm(5, aux="auto")
    for other, mean in ((nn.Linear(7, 4), torch.zeros(7)), (linear, torch.zeros(6)), (nn.Conv2d(7, 5, 3), torch.zeros(7, 3, 3))):
        with pytest.raises(ValueError, match=r"cannot be coupled to a layer with statistics of shape \(5,\)"):
            layer.couple(other, mean)
    for _ in range(2):
        layer.couple(linear, torch.zeros(7))
    assert len(linear._forward_pre_hooks) == 1
    assert "coupled to a Linear" in repr(layer)
    layer.decouple()
    assert not linear._forward_pre_hooks
    assert "coupled" not in repr(layer)
    assert [name for name, _ in layer.named_parameters()] == ["mean", "log_std", "weight", "bias"]


def test_a_layer_that_lets_nothing_count_learns_nothing() -> None:
    model, x = coupled("conv1d")
    with normswap.masked(model, torch.zeros(24, dtype=torch.bool)):
        model(x).sum().backward()
    assert model[1].input_mean.grad.abs().max() == 0


def test_half_precision_models() -> None:
    source, x = pair_of("conv2d")
    model = normswap.convert(source, x[:3], coupling="auto").model.to(torch.bfloat16).train()
    model(x.bfloat16()).float().sum().backward()
    assert model[0].weight.grad.dtype == torch.bfloat16  # type: ignore[index, union-attr]
    assert model[1].input_mean.dtype == torch.float32  # type: ignore[index, union-attr]


# --- cost --------------------------------------------------------------------------------------------------------------------------------


class Elements(torch.utils._python_dispatch.TorchDispatchMode):
    """Counts the elements that operators write or reduce; products of matrices and convolutions are counted as flops."""

    def __init__(self) -> None:
        super().__init__()
        self.count = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        if not func.is_view and "convolution" not in func.name() and func.name().split("::")[1] not in ("mm", "addmm", "bmm"):
            tensors = [t for t in torch.utils._pytree.tree_leaves((args, result)) if isinstance(t, Tensor)]
            self.count += max((t.numel() for t in tensors), default=0)
        return result


def work(model: nn.Module, x: Tensor) -> int:
    """Operations of one training step: forward, backward, optimizer."""
    step = torch.optim.SGD(normswap.param_groups(model, lr=0.01), momentum=0.9, foreach=False)
    for _ in range(2):  # the second has the optimizer's state
        with FlopCounterMode(display=False) as flops, Elements() as elements:
            step.zero_grad()
            model(x).square().mean().backward()
            step.step()
    return int(flops.get_total_flops()) + elements.count


@pytest.mark.parametrize(("batch", "size"), [(64, 8), (2, 8), (1, 32)])
def test_the_cost_is_small(batch: int, size: int) -> None:
    """At most 3 % of the operations of a step."""
    torch.manual_seed(0)
    widths = (1, 16, 16, 32, 32, 48, 48)
    layers = [m for i, o in itertools.pairwise(widths) for m in (nn.Conv2d(i, o, 3, padding=1), nn.BatchNorm2d(o), nn.ReLU())]
    source = nn.Sequential(*layers, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(48, 10)).eval()
    x = torch.randn(batch, 1, size, size)
    plain, model = (normswap.convert(source, x[:1], coupling=c).model.train() for c in ("none", "auto"))  # type: ignore[arg-type]
    assert work(model, x) <= 1.03 * work(plain, x)


# --- a model that was converted before ----------------------------------------------------------------------------------------------------


def _net() -> nn.Module:
    torch.manual_seed(4)
    conv, more, last = nn.Conv2d(2, 5, 3), nn.Conv2d(5, 3, 2, bias=False), nn.Linear(3 * 4 * 3, 6)
    net = nn.Sequential(
        conv, nn.BatchNorm2d(5), nn.ReLU(), more, nn.BatchNorm2d(3), nn.ReLU(), nn.BatchNorm2d(3), nn.Flatten(), last, nn.BatchNorm1d(6)
    )
    for norm in (net[1], net[4], net[6], net[9]):
        norm.running_mean.normal_()
        norm.running_var.uniform_(0.3, 2)
    return net.to(F64).eval()


def _state(model: nn.Module) -> dict[str, list[Any]]:
    return {name: t.tolist() for name, t in model.state_dict().items()}


@pytest.mark.parametrize("data", [False, True])
def test_couple_does_to_a_saved_model_what_convert_does(data: bool, tmp_path: Path) -> None:
    """The same pairs, the same state, the same training; and again to one that was trained, with its function."""
    x = torch.randn(7, 2, 7, 6, generator=G, dtype=F64)
    calibration = [x[:4], x[4:]] if data else None
    conversion = normswap.convert(_net(), x[:3], calibration=calibration)
    plain = normswap.convert(_net(), x[:3], coupling="none")
    loaded = normswap.load(normswap.save(plain, tmp_path / "saved"), _net)
    assert isinstance(loaded, nn.Module)
    assert "1.input_mean" not in loaded.state_dict()
    before = loaded(x)
    pairs = normswap.couple(loaded, x[:3], calibration=iter(calibration) if calibration else None)
    assert pairs == conversion.pairs
    assert [each.producer for each in pairs] == ["0", "3", None, "8"]
    assert {each.start for each in pairs} == ({"data", None} if data else {"zero", "closed form", None})
    assert torch.equal(loaded(x), before)
    assert _state(loaded) == _state(conversion.model)
    for model in (loaded, conversion.model):
        step = torch.optim.SGD(normswap.param_groups(model.train(), lr=0.1), momentum=0.9)
        for _ in range(3):
            step.zero_grad()
            model(x).square().mean().backward()
            step.step()
    assert _state(loaded) == _state(conversion.model)
    trained = loaded.eval()(x)
    assert loaded[1].stepped  # type: ignore[index]
    normswap.couple(loaded, x[:3], calibration=calibration)
    assert torch.equal(loaded(x), trained)
    assert (loaded[1].trend == 0).all()  # type: ignore[index, union-attr]
    assert len(loaded[0]._forward_pre_hooks) == len(loaded[0]._forward_hooks) == 1  # type: ignore[index, arg-type]


def test_couple_says_what_it_cannot_couple() -> None:
    x = torch.randn(7, 2, 7, 6, generator=G, dtype=F64)
    with pytest.raises(UsageError, match=r"Sequential has no BatchlessNorm to couple\nhint: normswap.convert makes them, and couples them"):
        normswap.couple(_net(), x)
    with pytest.raises(UsageError, match="no example inputs that the model takes could be inferred"):
        normswap.couple(nn.Sequential(nn.Bilinear(2, 3, 4), BatchlessNorm(4)))
    # Statistics that nobody trains get no sample limit and no trend.
    plain = normswap.convert(_net(), x, coupling="none", aux="none").model
    before = list(plain.state_dict())
    normswap.couple(plain, x)
    assert not any(layer.limits_samples for layer in plain.modules() if isinstance(layer, BatchlessNorm))
    assert [name for name in plain.state_dict() if name not in before] == [f"{i}.{t}" for i in (1, 4, 9) for t in ("input_mean", "steps")]
