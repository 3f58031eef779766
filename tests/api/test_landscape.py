"""The landscape along the gradient: closed forms, real steps of SGD as the reference, and a model that stays as it was."""

from __future__ import annotations

import copy
import importlib
import json
import math
import random
import re
import subprocess
import sys
import threading
import warnings
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, cast

import numpy as np
import pytest
import torch
import torchvision
from click.testing import Result
from torch import Tensor, nn
from torch.nn import functional as F
from torch.nn.utils.parametrizations import spectral_norm
from typer.testing import CliRunner

import normswap
from fixtures.nets import randomise
from normswap.api.landscape import Landscape, Line, Loss
from normswap.cli.app import app
from normswap.errors import SwapError, UsageError
from normswap.layer.batchless_norm import BatchlessNorm
from normswap.report.studies import landscape_json, landscape_summary, landscape_table

MODULE = importlib.import_module("normswap.api.landscape")
F64 = torch.float64
STATISTIC = r"\.(mean|log_std|abs_std|inv_std|input_mean|trend)$"


class Quadratic(nn.Module):
    """L(w) = 1/2 sum h w^2, whatever x is; loss `as_it_is`."""

    def __init__(self, w: Sequence[float], h: Sequence[float]) -> None:
        super().__init__()
        self.w = nn.Parameter(torch.tensor(w, dtype=F64))
        self.h = torch.tensor(h, dtype=F64)

    def forward(self, x: Tensor) -> Tensor:
        return (self.h * self.w.square()).sum() / 2


def as_it_is(output: Any, target: Any) -> Any:
    return output


NOTHING = [(torch.zeros(1), None)]


def one(model: nn.Module, data: Any = NOTHING, loss: Loss | None = as_it_is, **options: Any) -> Line:
    return normswap.landscape(model, data, loss=loss, **options).lines[0]


# -- closed forms ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("w", "h"), [([3.0], [2.0]), ([1.0, 0.0], [5.0, 40.0]), ([1.0, -2.0, 0.5], [0.1, 3.0, 7.0]), ([1.0, 1.0], [2.0, -3.0])]
)
def test_a_quadratic(w: list[float], h: list[float]) -> None:
    """g = h w, so that g moves by eta h^2 w: beta is the same at each step, and the curvature where w is an eigenvector."""
    steps = [0.01, 0.5, 0.05, 2.0]
    line = one(Quadratic(w, h), steps=steps)
    size = math.sqrt(sum((b * a) ** 2 for a, b in zip(w, h, strict=True)))
    beta = math.sqrt(sum((b * b * a) ** 2 for a, b in zip(w, h, strict=True))) / size
    losses = [sum(b * (a * (1 - step * b)) ** 2 for a, b in zip(w, h, strict=True)) / 2 for step in steps]
    assert line.gradient == pytest.approx(size, rel=1e-12)
    assert line.loss == pytest.approx(sum(b * a * a for a, b in zip(w, h, strict=True)) / 2, rel=1e-12)
    assert [p.step for p in line.points] == steps
    assert [p.loss for p in line.points] == pytest.approx(losses, rel=1e-12)
    assert [p.distance for p in line.points] == pytest.approx([step * size for step in steps], rel=1e-12)
    assert [p.change for p in line.points] == pytest.approx([step * beta * size for step in steps], rel=1e-12)
    assert [p.smoothness for p in line.points] == pytest.approx([beta] * 4, rel=1e-12)
    assert line.loss_range == pytest.approx((min(losses), max(losses)), rel=1e-12)
    assert line.change_range == pytest.approx((0.01 * beta * size, 2 * beta * size), rel=1e-12)
    assert line.smoothness == pytest.approx(beta, rel=1e-12)
    assert line.parameters == len(w)


def test_the_largest_smoothness_may_lie_inside_the_grid() -> None:
    """L = 1 - cos w, from the steepest place: g is cos of how far it went."""

    class Wave(Quadratic):
        def forward(self, x: Tensor) -> Tensor:
            return (1 - self.w.cos()).sum()

    steps = [0.1, 2.0, 40.0]
    line = one(Wave([math.pi / 2], [1.0]), steps=steps)
    betas = [abs(math.cos(step) - 1) / step for step in steps]
    assert betas[1] == max(betas)
    assert line.smoothness == pytest.approx(betas[1], rel=1e-12)


def test_a_linear_loss_is_perfectly_predictable() -> None:
    class Linear(Quadratic):
        def forward(self, x: Tensor) -> Tensor:
            return (self.h * self.w).sum()

    line = one(Linear([1.0, 2.0], [3.0, 4.0]), steps=[0.1, 1.0])
    assert line.change_range == (0, 0)
    assert line.smoothness == 0
    assert line.loss_range == pytest.approx((11 - 25, 11 - 2.5))


def test_least_squares() -> None:
    """A real layer and a real loss: the Hessian by the weight is 2 x'x / n, for each output."""
    x, y = torch.randn(20, 3, dtype=F64), torch.randn(20, 2, dtype=F64)
    layer = nn.Linear(3, 2, bias=False).double()
    line = one(layer, [(x, y)], F.mse_loss, steps=[0.1, 0.3])
    hessian = 2 * x.T @ x / y.numel()
    g = layer.weight.detach() @ hessian - 2 * y.T @ x / y.numel()
    assert line.gradient == pytest.approx(g.norm().item(), rel=1e-12)
    assert line.smoothness == pytest.approx(((g @ hessian).norm() / g.norm()).item(), rel=1e-12)


# -- a step of SGD is the reference --------------------------------------------------------------------------------------------


def conv_net() -> nn.Module:
    """With a BatchNorm behind a conv, one behind a sum, and one behind a linear; pairwise different sizes."""

    class Net(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.one, self.first = nn.Conv2d(3, 8, 3, padding=1), nn.BatchNorm2d(8)
            self.two, self.second = nn.Conv2d(8, 8, 3, padding=1, bias=False), nn.BatchNorm2d(8)
            self.linear, self.third = nn.Linear(8, 7), nn.BatchNorm1d(7)
            self.last = nn.Linear(7, 5)

        def forward(self, x: Tensor) -> Tensor:
            x = F.relu(self.first(self.one(x)), inplace=True)
            x = F.relu(self.second(x + self.two(x))).mean((2, 3))
            return cast(Tensor, self.last(F.relu(self.third(self.linear(x)))))

    with torch.random.fork_rng():
        torch.manual_seed(3)
        return randomise(Net(), 0).double().eval()


def images(*sizes: int, seed: int = 0) -> list[tuple[Tensor, Tensor]]:
    generator = torch.Generator().manual_seed(seed)
    return [(torch.randn(n, 3, 6, 4, generator=generator, dtype=F64), torch.randint(5, (n,), generator=generator)) for n in sizes]


def task_of(model: nn.Module) -> list[nn.Parameter]:
    return [p for name, p in model.named_parameters() if not re.search(STATISTIC, name)]


def by_sgd(model: nn.Module, batch: tuple[Any, Any], step: float, loss: Any = F.cross_entropy) -> tuple[float, float, float, float, float]:
    """(loss, gradient, loss after, change, distance) of one step of torch's SGD over the parameters of the task, on a copy."""
    model = copy.deepcopy(model).train()
    task = task_of(model)

    def gradient() -> tuple[float, Tensor]:
        model.zero_grad()
        value = loss(model(batch[0]), batch[1])
        value.backward()
        return value.item(), torch.cat([torch.zeros(p.numel()) if p.grad is None else p.grad.flatten() for p in task])

    before, g = gradient()
    x = torch.cat([p.detach().flatten().clone() for p in task])
    torch.optim.SGD(task, lr=step).step()
    distance = (torch.cat([p.detach().flatten() for p in task]) - x).norm().item()
    after, moved = gradient()
    return before, g.norm().item(), after, (moved - g).norm().item(), distance


def plain(model: nn.Module) -> nn.Module:
    return normswap.convert(model, images(2)[0][0], coupling="none").model


def coupled(model: nn.Module, **options: Any) -> nn.Module:
    return normswap.convert(model, images(2)[0][0], calibration=[images(9)[0][0]], coupling="auto", **options).model


def trained(model: nn.Module, batches: int = 4) -> nn.Module:
    """With a trend, and input means of its own."""
    model.train()
    optimizer = torch.optim.SGD(normswap.param_groups(model, lr=0.02), momentum=0.9)
    for x, y in images(*[11] * batches, seed=5):
        optimizer.zero_grad()
        F.cross_entropy(model(x), y).backward()  # type: ignore[no-untyped-call]
        optimizer.step()
    return model


MODELS: dict[str, Callable[[], nn.Module]] = {
    "batchnorm": conv_net,
    "plain": lambda: plain(conv_net()),
    "plain abs": lambda: normswap.convert(conv_net(), images(2)[0][0], std="abs").model,
    "coupled": lambda: coupled(conv_net()),
    "coupled inv": lambda: coupled(conv_net(), std="inv"),
    "trained": lambda: trained(coupled(conv_net())),
    "trained plain": lambda: trained(plain(conv_net())),
    "coupled none": lambda: coupled(conv_net(), aux="none"),
}


@pytest.mark.parametrize("kind", MODELS)
@pytest.mark.parametrize("size", [13, 2])
def test_a_point_is_where_sgd_goes(kind: str, size: int) -> None:
    """What coupling and the gradient trend make of the gradient, and where coupled statistics move, is what happens in training."""
    model, batch = MODELS[kind](), images(size, seed=2)[0]
    steps = [0.003, 0.05]
    line = one(model, [batch], None, steps=steps)
    for point in line.points:
        expected = by_sgd(model, batch, point.step)
        assert (line.loss, line.gradient, point.loss, point.change, point.distance) == pytest.approx(expected, rel=1e-9)
        assert point.smoothness == pytest.approx(expected[3] / expected[4], rel=1e-9)
    assert line.parameters == sum(p.numel() for p in task_of(model))


def test_the_trend_and_the_input_mean_of_a_trained_model_decide() -> None:
    """Or else the test above has nothing to see."""
    model, batch = MODELS["trained"](), images(13, seed=2)
    found = one(model, batch, None)
    for change in (BatchlessNorm.disable_trend, BatchlessNorm.decouple):
        other = copy.deepcopy(model)
        for layer in other.modules():
            if isinstance(layer, BatchlessNorm):
                change(layer)
        assert one(other, batch, None).gradient != pytest.approx(found.gradient, rel=1e-3)


def test_a_library_net() -> None:
    torch.manual_seed(0)
    resnet = torchvision.models.resnet
    model = resnet.ResNet(resnet.BasicBlock, [1, 1, 1, 1], num_classes=7).double()
    batch = (torch.randn(3, 3, 40, 33, dtype=F64), torch.tensor([1, 5, 2]))
    pretrained = copy.deepcopy(model).eval()
    models = {"before": model, "after": normswap.convert(pretrained, batch[0], coupling="auto", calibration=[batch[0]]).model}
    found = normswap.landscape(models, [batch], steps=[0.02])
    for line in found.lines:
        expected = by_sgd(models[line.model], batch, 0.02)
        point = line.points[0]
        assert (line.loss, line.gradient, point.loss, point.change, point.distance) == pytest.approx(expected, rel=1e-7)


def test_frozen_batch_norm_and_plain_statistics_are_the_same() -> None:
    """In eval mode a BatchNorm is the layer that it is converted to, gradients included."""
    data = images(6, 9)
    before = normswap.landscape(conv_net(), data, mode="eval").lines
    after = normswap.landscape(plain(conv_net()), data).lines
    for a, b in zip(before, after, strict=True):
        assert (a.loss, a.gradient, *a.loss_range, *a.change_range) == pytest.approx((b.loss, b.gradient, *b.loss_range, *b.change_range))
    assert normswap.landscape(conv_net(), data).lines[0].loss != pytest.approx(before[0].loss, rel=1e-2)


@pytest.mark.parametrize("mode", ["train", "eval"])
@pytest.mark.parametrize("make", [plain, coupled])
def test_what_the_statistics_learn_does_not_count(make: Any, mode: Any) -> None:
    found = []
    for aux in ("auto", "explicit", "none"):
        model = make(conv_net())
        for layer in model.modules():
            if isinstance(layer, BatchlessNorm):
                layer.aux = aux
        line = one(model, images(6), None, mode=mode)
        found.append(
            [line.loss, line.gradient, *(number for point in line.points for number in (point.loss, point.change, point.distance))]
        )
    assert found[0] == pytest.approx(found[2], rel=1e-12)  # a layer with aux="auto" is computed with its conv, one with another apart
    assert found[1] == found[2]


@pytest.mark.parametrize("layer", ["two", "second", "linear"])
def test_one_layer_alone(layer: str) -> None:
    """A step of SGD that holds the parameters of this layer only; statistics of a norm that is coupled to it move along."""
    model, batch = MODELS["trained"](), images(6)[0]
    line = one(model, [batch], None, layer=layer, steps=[0.05])
    reference = copy.deepcopy(model)
    for name, p in reference.named_parameters():
        if not name.startswith(f"{layer}.") and not re.search(STATISTIC, name):
            p.requires_grad_(False)
    own = [p for p in task_of(reference) if p.requires_grad]
    assert line.parameters == sum(p.numel() for p in own) > 0
    expected = by_sgd(reference, batch, 0.05)
    point = line.points[0]
    assert (line.loss, line.gradient, point.loss, point.change, point.distance) == pytest.approx(expected, rel=1e-9)
    assert one(model, [batch], None).gradient > line.gradient


def test_the_same_dropout_at_every_point() -> None:
    """With one mask for all, the loss is a quadratic: beta is the same at each step."""
    model = nn.Sequential(nn.Dropout(0.5), nn.Linear(7, 3)).double()
    batch = (torch.randn(9, 7, dtype=F64), torch.randn(9, 3, dtype=F64))
    points = one(model, [batch], F.mse_loss, steps=[0.1, 0.2, 0.4]).points
    assert [p.smoothness for p in points] == pytest.approx([points[0].smoothness] * 3, rel=1e-9)
    assert one(model, [batch], F.mse_loss, mode="eval").loss != one(model, [batch], F.mse_loss).loss


def test_what_is_drawn_does_not_depend_on_what_was_drawn_before() -> None:
    model = nn.Sequential(nn.Dropout(0.5), nn.Linear(7, 3))
    batch = (torch.randn(9, 7), torch.randn(9, 3))
    before = one(model, [batch], F.mse_loss)
    torch.rand(3)
    assert one(model, [batch], F.mse_loss) == before


@pytest.mark.parametrize("draw", [lambda: random.random(), lambda: np.random.rand(), lambda: torch.rand(()).item()])
def test_the_same_draw_of_every_generator(draw: Callable[[], float]) -> None:
    class Noisy(Quadratic):
        def forward(self, x: Tensor) -> Tensor:
            return super().forward(x) * (1 + draw())

    states = random.getstate(), np.random.get_state()[1].copy(), torch.get_rng_state()
    points = one(Noisy([3.0], [2.0]), steps=[0.1, 0.2, 0.3]).points
    assert [p.smoothness for p in points] == pytest.approx([points[0].smoothness] * 3, rel=1e-12)
    assert random.getstate() == states[0]
    draw()
    assert one(Noisy([3.0], [2.0]), steps=[0.1, 0.2, 0.3]).points == points
    random.setstate(states[0])
    np.random.seed(1)
    states = states[0], np.random.get_state()[1].copy(), torch.get_rng_state()
    one(Noisy([3.0], [2.0]))
    assert random.getstate() == states[0]
    assert (np.random.get_state()[1] == states[1]).all()
    assert torch.equal(torch.get_rng_state(), states[2])


class Counts(Quadratic):
    """Its function depends on how often it was called; the buffer is written to, or replaced."""

    def __init__(self, replaced: bool, kept: bool = False) -> None:
        super().__init__([3.0], [2.0])
        self.replaced, self.kept = replaced, kept
        self.register_buffer("calls", torch.ones((), dtype=F64))
        self.other = nn.Module()
        self.other.register_buffer("same", self.calls)

    def forward(self, x: Tensor) -> Tensor:
        if self.replaced:
            self.calls = self.other.same = self.calls + 1
        else:
            self.calls += 1
        calls = self.calls if self.kept else self.calls.clone()
        value = super().forward(x) * calls * self.other.same.clone()  # type: ignore[operator]
        self.calls += 1
        return cast(Tensor, value)


@pytest.mark.parametrize("make", [lambda: Counts(True), lambda: Counts(False)])
def test_buffers_are_the_same_at_every_point(make: Callable[[], nn.Module]) -> None:
    model = make()
    points = one(model, steps=[0.1, 0.2, 0.3]).points
    assert [p.smoothness for p in points] == pytest.approx([2.0 * 2 * 2] * 3, rel=1e-12)
    assert cast(Tensor, model.calls) == 1
    assert model.calls is model.other.same  # type: ignore[union-attr]


def test_the_order_of_steps_and_batches_does_not_matter() -> None:
    """Spectral normalization has a vector that each forward in train mode moves; a BatchNorm has running statistics."""
    model = nn.Sequential(spectral_norm(nn.Conv2d(3, 6, 2)), nn.BatchNorm2d(6), nn.Flatten(), nn.Linear(6 * 5 * 3, 5)).double()
    data = images(6, 4)
    there = normswap.landscape(model, data, steps=[0.01, 0.3])
    back = normswap.landscape(model, data[::-1], steps=[0.3, 0.01])
    for a, b in zip(there.lines, back.lines[::-1], strict=True):
        assert (a.loss, a.gradient, a.points) == (b.loss, b.gradient, b.points[::-1])


def test_a_line_for_each_model_and_batch() -> None:
    data, models = images(6, 4), {"a": conv_net(), "b": plain(conv_net())}
    found = normswap.landscape(models, iter(data), steps=[0.01])
    assert [(line.model, line.batch) for line in found.lines] == [("a", 1), ("a", 2), ("b", 1), ("b", 2)]
    alone = normswap.landscape(models["b"], data[1:], steps=[0.01]).lines[0]
    assert (found.lines[3].loss, found.lines[3].points) == (alone.loss, alone.points)
    assert (alone.model, alone.batch) == ("model", 1)


def test_shared_and_sparse_parameters() -> None:
    class Tied(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.embedding = nn.Embedding(11, 4, sparse=True)
            self.unused = nn.Linear(4, 3)
            self.back = nn.Linear(4, 11, bias=False)
            self.other = nn.Embedding(11, 4)
            self.back.weight = self.other.weight

        def forward(self, ids: Tensor) -> Tensor:
            return cast(Tensor, self.back(self.embedding(ids) + self.other(ids)).flatten(0, 1))

    model, ids = Tied().double(), torch.randint(11, (3, 5))
    line = one(model, [(ids, ids.flatten())], None, steps=[0.5])
    dense = copy.deepcopy(model)
    dense.embedding.sparse = False
    expected = by_sgd(dense, (ids, ids.flatten()), 0.5)
    assert (line.gradient, line.points[0].change, line.points[0].distance) == pytest.approx((expected[1], *expected[3:]), rel=1e-9)
    assert line.parameters == 2 * 44 + 15


# -- batches -----------------------------------------------------------------------------------------------------------------


class Two(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.w = nn.Parameter(torch.tensor([2.0, 3.0]))

    def forward(self, a: Tensor, b: Tensor) -> Tensor:
        return (a * self.w[0] - b * self.w[1])[None]


A, B, Y = torch.tensor(5.0), torch.tensor(7.0), torch.tensor([1.0])


@pytest.mark.parametrize(
    ("batch", "loss"),
    [
        ((A, B, Y), F.mse_loss),
        ([A, B, Y], F.mse_loss),
        (({"b": B, "a": A}, Y), F.mse_loss),
        ({"b": B, "a": A}, lambda output, batch: (output - 1).square() * (batch["a"] == 5)),
    ],
)
def test_batches(batch: Any, loss: Any) -> None:
    assert one(Two(), [batch], loss).loss == (10 - 21 - 1) ** 2


def test_what_a_model_of_transformers_says_of_its_loss() -> None:
    from transformers import BertConfig, BertForSequenceClassification

    config = BertConfig(
        vocab_size=30, hidden_size=12, num_hidden_layers=1, num_attention_heads=3, intermediate_size=20, max_position_embeddings=16
    )
    model, ids = BertForSequenceClassification(config).eval(), torch.randint(30, (4, 9))
    line = one(model, [{"input_ids": ids, "labels": torch.tensor([0, 1, 1, 0])}], lambda output, batch: output.loss, mode="eval")
    with torch.no_grad():
        assert line.loss == pytest.approx(F.cross_entropy(model(ids).logits, torch.tensor([0, 1, 1, 0])).item(), rel=1e-5)


def test_a_model_that_writes_into_its_input_gets_the_same_one_each_time() -> None:
    class Writes(Quadratic):
        def forward(self, x: Tensor) -> Tensor:
            x.add_(1)
            return super().forward(x) * x.sum()

    batch = torch.zeros(1)
    assert one(Writes([3.0], [2.0]), [(batch, None)]).smoothness == pytest.approx(2)
    assert batch == 0


# -- the model stays as it was -----------------------------------------------------------------------------------------------


def stops_in_the_middle(model: nn.Module) -> nn.Module:
    """After backward and before the step: gradients, and what coupling and the gradient trend have seen."""
    x, y = images(7, seed=9)[0]
    F.cross_entropy(model.train()(x), y).backward()  # type: ignore[no-untyped-call]
    model.get_submodule("second").eval()
    return model


def state_of(model: nn.Module) -> list[Any]:
    """Everything that may change, to be compared with `==`: tensors with their versions, modes, hooks, runs."""
    tensors = [*model.parameters(), *model.buffers()]
    runs = [
        (
            *(copy.copy(value) for value in vars(m.run).values() if not isinstance(value, (Tensor, list)) and value is not m.run.passes),
            id(m.run.input_mean),
            [id(term) for term in m.run.terms],
            m.run.passes and (m.run.passes.count, m.run.passes.version, id(m.run.passes.grad)),
            id(m.producer),
        )
        for m in model.modules()
        if isinstance(m, BatchlessNorm)
    ]
    hooks = [(len(m._forward_hooks), len(m._forward_pre_hooks)) for m in model.modules()]
    return [
        [(id(t), t.detach().numpy().tobytes(), t._version, t.requires_grad) for t in tensors],
        [None if t.grad is None else (id(t.grad), t.grad.numpy().tobytes()) for t in tensors],
        [m.training for m in model.modules()],
        runs,
        hooks,
        torch.get_rng_state().numpy().tobytes(),
        torch.is_grad_enabled(),
    ]


KEPT: dict[str, Callable[[], nn.Module]] = {
    **{kind: (lambda make=make: stops_in_the_middle(make())) for kind, make in MODELS.items()},  # type: ignore[misc]
    "explicit": lambda: stops_in_the_middle(normswap.convert(conv_net(), images(2)[0][0], aux="explicit").model),
    "eval": conv_net,
}


@pytest.mark.parametrize("kind", KEPT)
@pytest.mark.parametrize("mode", ["train", "eval"])
def test_a_model_is_left_as_it_was(kind: str, mode: Any) -> None:
    model = KEPT[kind]()
    before = state_of(model)
    normswap.landscape(model, images(6, 5), mode=mode)
    assert state_of(model) == before


def test_a_model_is_left_as_it_was_by_a_failure() -> None:
    model = KEPT["trained"]()
    before = state_of(model)
    calls = iter(range(3))

    def fails(output: Tensor, y: Tensor) -> Tensor:
        next(calls)  # StopIteration at the fourth
        return F.cross_entropy(output, y)

    with pytest.raises(UsageError, match="the loss raised StopIteration"):
        normswap.landscape(model, images(6), loss=fails)
    assert state_of(model) == before


@pytest.mark.parametrize("kind", ["batchnorm", "plain", "coupled"])
def test_training_goes_on_as_if_nothing_had_been_measured(kind: str) -> None:
    """No warning either, though there were forward passes after which no optimizer stepped. (Warnings are errors.)"""
    states = []
    for measured in (False, True):
        model = MODELS[kind]().train()
        parameters: Any = model.parameters() if kind == "batchnorm" else normswap.param_groups(model, lr=0.02)
        optimizer = torch.optim.SGD(parameters, lr=0.02, momentum=0.9)
        for x, y in images(5, 5, 5):
            optimizer.zero_grad()
            loss = F.cross_entropy(model(x), y)
            if measured:
                normswap.landscape(model, [(x, y)])
            loss.backward()  # type: ignore[no-untyped-call]
            if measured:
                normswap.landscape(model, [(x, y)], steps=[0.1])
            optimizer.step()
        states.append(model.state_dict())
    assert all(torch.equal(a, b) for a, b in zip(states[0].values(), states[1].values(), strict=True))


def test_without_gradients_around_it() -> None:
    with torch.no_grad():
        assert one(conv_net(), images(6), None) == one(conv_net(), images(6), None)
        assert not torch.is_grad_enabled()


# -- what cannot be measured -------------------------------------------------------------------------------------------------


class Closure(nn.Module):
    """A function that was made inside holds the original's parameter: a copy would not move it."""

    def __init__(self) -> None:
        super().__init__()
        self.w = nn.Parameter(torch.ones(3))
        self.call = lambda x: x * self.w

    def forward(self, x: Tensor) -> Tensor:
        return cast(Tensor, self.call(x))


def frozen() -> nn.Module:
    return conv_net().requires_grad_(False)


def exported() -> Any:
    return torch.export.export(nn.Linear(3, 2), (torch.zeros(4, 3),))


def broken() -> nn.Module:
    model = conv_net()
    with torch.no_grad():
        cast(nn.Linear, model.last).weight[0, 0] = math.nan
    return model


PAIR = images(6)
WRONG: dict[str, tuple[Callable[[], Any], Any, dict[str, Any], str]] = {
    "no data": (conv_net, None, {}, "no data were given\nhint: give batches with labels"),
    "a tensor": (conv_net, PAIR[0][0], {}, "the data are a Tensor; expected an iterable of batches (x, y)"),
    "a dict": (conv_net, {"x": PAIR[0][0]}, {}, "the data are a dict; expected an iterable"),
    "one pair": (conv_net, PAIR[0], {}, "batch 1 is a Tensor; expected (x, y), y what the loss takes\nhint: a single batch: data=[(x, y)]"),
    "no labels": (conv_net, [(PAIR[0][0],)], {}, "batch 1 is a tuple of 1; expected (x, y)"),
    "no batch": (conv_net, [], {}, "the data hold no batch"),
    "dicts": (conv_net, [{"x": PAIR[0][0]}], {}, "the batches are dicts, in which only a loss of your own finds the labels"),
    "no step": (conv_net, PAIR, {"steps": []}, "the steps are []; expected one or more finite numbers above 0"),
    "step 0": (conv_net, PAIR, {"steps": [0.1, 0]}, "the steps are [0.1, 0]; expected"),
    "step nan": (conv_net, PAIR, {"steps": [math.nan]}, "the steps are [nan]; expected"),
    "step inf": (conv_net, PAIR, {"steps": [math.inf]}, "the steps are [inf]; expected"),
    "tiny step": (conv_net, PAIR, {"steps": [1e-30]}, "model, batch 1: a step of 1e-30 along the gradient changes no parameter"),
    "mode": (conv_net, PAIR, {"mode": "test"}, "mode is 'test'; expected one of 'train', 'eval'"),
    "layer": (conv_net, PAIR, {"layer": "three"}, "model has no layer 'three'\nhint: expected a qualified name"),
    "layer without": (lambda: nn.Sequential(nn.ReLU(), nn.Linear(3, 2)), PAIR, {"layer": "0"}, "0 of model has no parameter that the loss"),
    "frozen": (frozen, PAIR, {}, "model has no parameter that the loss trains\nhint: requires_grad_(True)"),
    "no models": (dict, PAIR, {}, "there is no model to measure"),
    "no module": (lambda: "resnet18", PAIR, {}, "model is a str; expected a torch.nn.Module"),
    "lazy": (lambda: nn.LazyLinear(3), PAIR, {}, "weight of model has no values yet"),
    "program": (exported, PAIR, {}, "model is an exported program, which has no modes\nhint: measure the model that it was exported from"),
    "its graph": (lambda: exported().module(), PAIR, {}, "model is the graph of an exported program, which has no modes"),
    "one value": (
        conv_net,
        images(1),
        {},
        "model, batch 1: the model cannot run in train mode: ValueError: Expected more than 1 value per",
    ),
    "one value's hint": (conv_net, images(1), {}, "hint: a BatchNorm wants a larger batch; or measure the converted model alone"),
    "wrong x": (conv_net, [(torch.zeros(2, 4), Y)], {}, "model, batch 1: the model cannot run in train mode: "),
    "wrong x's hint": (conv_net, [(torch.zeros(2, 4), Y)], {}, "hint: a batch is (x, y), or (x1, x2, y); the model is called with all but"),
    "wrong y": (conv_net, [(PAIR[0][0], Y)], {}, "model, batch 1: the loss raised "),
    "no logits": (
        Two,
        [(A, B, Y)],
        {"loss": lambda o, y: MODULE.cross_entropy({}, y)},
        "returns a dict, and the cross entropy takes a tensor",
    ),
    "a loss of two": (
        conv_net,
        PAIR,
        {"loss": lambda o, y: o[0, :2]},
        "the loss is torch.float64 of shape (2,); expected one floating number",
    ),
    "a float": (conv_net, PAIR, {"loss": lambda o, y: o.sum().item()}, "model, batch 1: the loss is a float; expected one floating number"),
    "an integer": (conv_net, PAIR, {"loss": lambda o, y: o.argmax()}, "the loss is torch.int64 of shape (); expected"),
    "detached": (conv_net, PAIR, {"loss": lambda o, y: o.detach().sum()}, "no gradient comes back from the loss"),
    "another's": (
        conv_net,
        PAIR,
        {"layer": "one", "loss": lambda o, y: nn.Parameter(Y).sum()},
        "the loss does not depend on the parameters",
    ),
    "backward": (
        lambda: Counts(False, kept=True),
        NOTHING,
        {"loss": as_it_is},
        "model, batch 1: the backward pass failed: RuntimeError: one of",
    ),
    "flat": (conv_net, PAIR, {"loss": lambda o, y: 0 * o.sum()}, "model, batch 1: the gradient is 0, so there is no direction"),
    "nan": (broken, PAIR, {}, "model, batch 1: the loss is nan and the norm of its gradient nan before any step"),
}


@pytest.mark.parametrize("kind", WRONG)
def test_usage_errors(kind: str) -> None:
    make, data, options, message = WRONG[kind]
    with pytest.raises(UsageError) as caught:
        normswap.landscape(make(), data, **options)
    assert message in str(caught.value)


def test_the_error_names_the_model_and_the_batch() -> None:
    with pytest.raises(UsageError, match=r"^second, batch 2: the model cannot run"):
        normswap.landscape({"first": plain(conv_net()), "second": conv_net()}, images(3, 1))


def test_a_model_that_a_copy_would_not_move() -> None:
    with pytest.raises(SwapError, match=r"^model cannot be measured, as that is done on a copy: it still uses w of the original"):
        normswap.landscape(Closure(), [(torch.ones(2, 3), torch.zeros(2).long())])


def test_a_model_that_cannot_be_copied() -> None:
    model = conv_net()
    model.kept = threading.Lock()
    with pytest.raises(SwapError, match=r"^model cannot be copied: cannot pickle"):
        normswap.landscape(model, images(4))


class Cliff(Quadratic):
    def forward(self, x: Tensor) -> Tensor:
        return self.w.exp().square().sum()


def test_what_is_not_finite_after_a_step_is_infinite() -> None:
    """exp(2 w) from w = 2, upwards: the loss is the negative of it."""
    line = one(Cliff([2.0], [1.0]), loss=lambda output, y: -output, steps=[0.001, 1000.0])
    assert math.isfinite(line.points[0].loss)
    assert [(p.loss, p.change, p.smoothness) for p in line.points[1:]] == [(math.inf, math.inf, math.inf)]
    assert line.loss_range[1] == line.change_range[1] == line.smoothness == math.inf
    found = Landscape((line,), (0.001, 1000.0), None, "train")
    printed = landscape_json("x", found)
    assert printed["lines"][0]["smoothness"] == printed["lines"][0]["points"][1]["loss"] == "inf"
    assert json.loads(json.dumps(printed, allow_nan=False)) == printed


# -- progress, JSON, the plot, the command -----------------------------------------------------------------------------------


def test_progress_is_told_after_each_gradient() -> None:
    told: list[Any] = []
    normswap.landscape({"a": conv_net(), "b": conv_net()}, images(3, 4), steps=[0.1, 0.2], progress=lambda *what: told.append(what))
    assert told == [(name, i, 6) for name in "ab" for i in range(1, 7)]


def keys(value: Any) -> set[str]:
    if isinstance(value, dict):
        return {*value, *(k for v in value.values() for k in keys(v))} if "python" not in value else set()
    return {k for item in value for k in keys(item)} if isinstance(value, (list, tuple)) else set()


def test_the_documented_keys_are_the_keys(repository: Path) -> None:
    documented = set(re.findall(r"^\| `(\w+)` \|", (repository / "docs/landscape.md").read_text(), re.MULTILINE))
    printed = landscape_json("net.pt", normswap.landscape(conv_net(), images(4)))
    assert documented == keys(printed)
    assert json.loads(json.dumps(printed, allow_nan=False)) == printed


def test_the_documented_steps_are_the_default(repository: Path) -> None:
    assert "by default 0.001, 0.003, 0.01, 0.03, 0.1 and 0.3" in (repository / "docs/landscape.md").read_text()
    assert MODULE.STEPS == (0.001, 0.003, 0.01, 0.03, 0.1, 0.3)


def test_the_table_has_a_row_for_every_line() -> None:
    found = normswap.landscape({"a": conv_net(), "b": plain(conv_net())}, images(4, 6), steps=[0.01, 0.3], layer="one")
    table = landscape_table(found)
    assert [row[0] for row in table.rows] == ["a", "a", "b", "b"]
    assert table.rows[0][-1] == f"{found.lines[0].smoothness:.3g}"
    assert landscape_summary(found) == "along the gradient by the parameters of one, in train mode, at steps of 0.01, 0.3"


@pytest.mark.parametrize("name", ["a.svg", "a.png", "b.PDF"])
def test_a_plot(name: str, tmp_path: Path) -> None:
    cliff = one(Cliff([2.0], [1.0]), loss=lambda output, y: -output, steps=[1000.0, 0.001])
    found = Landscape((one(conv_net(), images(4), None), cliff), (1000.0, 0.001), None, "train")
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert found.plot(tmp_path / name) == tmp_path / name
    content = (tmp_path / name).read_bytes()
    assert content.startswith({"a.svg": b"<?xml", "a.png": b"\x89PNG", "b.PDF": b"%PDF"}[name])
    assert [p.name for p in tmp_path.iterdir()] == [name]
    if name == "a.svg":
        found.plot(tmp_path / name)
        assert (tmp_path / name).read_bytes() == content


def test_a_plot_of_another_kind_is_refused(tmp_path: Path) -> None:
    found = normswap.landscape(conv_net(), images(4), steps=[0.1])
    with pytest.raises(UsageError, match=r"x.txt is no picture that can be drawn\nhint: expected a name that ends in .png, .svg, .pdf"):
        found.plot(tmp_path / "x.txt")
    assert not list(tmp_path.iterdir())


def run(*arguments: object) -> Result:
    return CliRunner().invoke(app, [str(argument) for argument in arguments])


@pytest.fixture
def saved(tmp_path: Path) -> Path:
    model = nn.Sequential(nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8), nn.ReLU(), nn.Flatten(), nn.Linear(8 * 4 * 2, 5)).double()
    torch.save(randomise(model, 0).eval(), tmp_path / "net.pt")
    (tmp_path / "data").mkdir()
    for i, batch in enumerate(images(7, 4)):
        torch.save(batch, tmp_path / "data" / f"{i}.pt")
    torch.save(images(1)[0], tmp_path / "one.pt")
    return tmp_path


def test_the_command_measures_before_and_after(saved: Path) -> None:
    result = run(
        "landscape", saved / "net.pt", "--data", saved / "data", "--json", "--plot", saved / "x.svg", "--step", 0.01, "--step", 0.1
    )
    assert (result.exit_code, result.stderr) == (0, "")
    content = json.loads(result.stdout)
    assert [(line["model"], line["batch"]) for line in content["lines"]] == [
        (form, batch) for form in ("original", "converted", "coupled") for batch in (1, 2)
    ]
    assert (content["version"], content["mode"], content["layer"], content["loss"], content["steps"]) == (
        1,
        "train",
        None,
        None,
        [0.01, 0.1],
    )
    assert (saved / "x.svg").exists()
    model = torch.load(saved / "net.pt", weights_only=False)
    line = one(model, images(7), None, steps=[0.01, 0.1])
    assert content["lines"][0]["smoothness"] == line.smoothness
    xs = [x for x, _ in (torch.load(saved / "data" / f"{i}.pt") for i in range(2))]
    made = normswap.convert(model, xs[0], calibration=xs, coupling="auto").model
    assert content["lines"][4]["at_start"]["gradient"] == one(made, images(7), None).gradient


def test_the_command_prints_a_table(saved: Path) -> None:
    result = run(
        "landscape", saved / "net.pt", "--data", saved / "one.pt", "--as", "coupled", "--as", "converted", "--layer", 0, "--mode", "eval"
    )
    assert (result.exit_code, result.stderr) == (0, "")
    lines = result.stdout.splitlines()
    assert [line.split()[0] for line in lines if line.split() and line.split()[0] in ("original", "converted", "coupled")] == [
        "coupled",
        "converted",
    ]
    assert lines[-1] == "along the gradient by the parameters of 0, in eval mode, at steps of 0.001, 0.003, 0.01, 0.03, 0.1, 0.3"


def test_a_converted_directory_is_measured_as_it_is(saved: Path) -> None:
    options = ("--no-onnx", "--input", "2x3x6x4:float64", "--coupling", "none")
    assert run("convert", saved / "net.pt", "-o", saved / "out", *options).exit_code == 0
    result = run("landscape", saved / "out", "--data", saved / "data", "--json")
    assert result.exit_code == 0, result.stderr
    content = json.loads(result.stdout)
    assert [line["model"] for line in content["lines"]] == ["original"] * 2
    direct = json.loads(run("landscape", saved / "net.pt", "--data", saved / "data", "--as", "converted", "--json").stdout)
    assert [line["smoothness"] for line in content["lines"]] == pytest.approx([line["smoothness"] for line in direct["lines"]], rel=1e-9)


def test_a_loss_by_its_name(saved: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (saved / "my_loss_module.py").write_text("def first(output, y):\n    return output[0, 0]\n")
    monkeypatch.syspath_prepend(saved)
    options = ("--as", "original", "--mode", "eval", "--json")
    result = run("landscape", saved / "net.pt", "--data", saved / "one.pt", "--loss", "my_loss_module:first", *options)
    assert result.exit_code == 0, result.stderr
    content = json.loads(result.stdout)
    model = torch.load(saved / "net.pt", weights_only=False)
    assert content["lines"][0]["at_start"]["loss"] == pytest.approx(model(images(1)[0][0])[0, 0].item())
    assert content["loss"] == "my_loss_module:first"


@pytest.mark.parametrize(
    ("options", "code", "message"),
    [
        ([], 2, "error: a landscape is measured on data, and none were given"),
        (["--data", "DIR/net.txt"], 2, "is no file, no directory and no package.module:factory"),
        (["--data", "DIR/data", "--loss", "nowhere:loss"], 2, "error: --loss nowhere:loss: there is no module nowhere"),
        (["--data", "DIR/data", "--loss", "math:pi"], 2, "error: --loss math:pi is a float; expected a function of (output, y)"),
        (["--data", "DIR/data", "--plot", "DIR/x.txt"], 2, "x.txt is no picture that can be drawn"),
        (["--data", "DIR/data", "--step", "-1"], 2, "error: the steps are [-1.0]"),
        (["--data", "DIR/data", "--layer", "nine"], 2, "error: original has no layer 'nine'"),
        (["--data", "DIR/data", "--loss", "torch.nn.functional:mse_loss"], 2, "error: original, batch 1: the loss raised "),
    ],
)
def test_exit_codes(options: list[str], code: int, message: str, saved: Path) -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # mse_loss warns of shapes before it fails
        result = run("landscape", saved / "net.pt", *(o.replace("DIR", str(saved)) for o in options))
    assert (result.exit_code, result.stdout) == (code, "")
    assert message in result.stderr
    assert "Traceback" not in result.stderr
    assert not (saved / "x.txt").exists()


def test_a_model_without_norms_is_measured_as_it_is(saved: Path) -> None:
    torch.save(nn.Sequential(nn.Flatten(), nn.Linear(72, 5)).double(), saved / "linear.pt")
    result = run("landscape", saved / "linear.pt", "--data", saved / "data", "--json")
    assert result.exit_code == 0, result.stderr
    assert {line["model"] for line in json.loads(result.stdout)["lines"]} == {"original"}
    refused = run("landscape", saved / "linear.pt", "--data", saved / "data", "--as", "coupled")
    assert refused.exit_code == 2
    assert "error: there is nothing to measure as coupled: no norm of the model can be swapped exactly" in refused.stderr


def test_a_program_is_refused(saved: Path) -> None:
    model = torch.load(saved / "net.pt", weights_only=False)
    torch.export.save(torch.export.export(model, (images(7)[0][0],)), saved / "net.pt2")
    result = run("landscape", saved / "net.pt2", "--data", saved / "data", "--trust")
    assert (result.exit_code, result.stdout) == (2, "")
    assert "error: original is an exported program, which has no modes" in result.stderr


def test_without_matplotlib(saved: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """It is said before anything is measured; without --plot it is not needed."""
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    monkeypatch.setitem(sys.modules, "matplotlib.figure", None)
    monkeypatch.setattr(MODULE, "copy_with", None)
    result = run("landscape", saved / "net.pt", "--data", saved / "data", "--plot", saved / "x.svg")
    assert (result.exit_code, result.stdout) == (2, "")
    assert "error: a plot needs matplotlib, which is not installed\nhint: pip install 'normswap[docs]'" in result.stderr
    monkeypatch.undo()
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    monkeypatch.setitem(sys.modules, "matplotlib.figure", None)
    measured = run("landscape", saved / "net.pt", "--data", saved / "data")
    assert (measured.exit_code, measured.stderr) == (0, "")


def test_matplotlib_is_imported_for_a_plot_only() -> None:
    """Nor does the command ask for it as it starts, which in this process it has done long ago."""
    script = "import sys, normswap, normswap.cli.app\nnormswap.landscape\nassert 'matplotlib' not in sys.modules"
    subprocess.run([sys.executable, "-c", script], check=True)


def test_the_bar_is_shown_on_a_terminal_only(saved: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    command = ("landscape", saved / "net.pt", "--data", saved / "data", "--json", "--as", "original")
    assert run(*command).stderr == ""
    monkeypatch.setenv("FORCE_COLOR", "1")
    monkeypatch.setenv("TERM", "xterm")
    result = run(*command)
    assert "original" in result.stderr
    assert json.loads(result.stdout)["lines"]
