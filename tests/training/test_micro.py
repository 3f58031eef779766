"""Large batches in micro-batches, and the keys of norms."""

from __future__ import annotations

import copy
import functools
from collections.abc import Callable
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

import normswap
from normswap.errors import UsageError
from normswap.training.loss import layers_of
from normswap.training.micro import MicroBatches

X = torch.randn(64, 2, 7, 5, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
Y = torch.randint(0, 3, (64,), generator=torch.Generator().manual_seed(2))


@functools.cache
def _model(aux: Any) -> nn.Module:
    torch.manual_seed(0)
    model = nn.Sequential(
        nn.Conv2d(2, 4, 3),
        nn.BatchNorm2d(4),
        nn.ReLU(inplace=True),
        nn.Conv2d(4, 3, 2),
        nn.BatchNorm2d(3),
        nn.AdaptiveAvgPool2d(1),
        nn.Flatten(),
    )
    return normswap.convert(model.double().eval(), X[:2], aux=aux, coupling="none").model.train()


def model_of(aux: str = "auto") -> nn.Module:
    return copy.deepcopy(_model(aux))


def loss_of(model: nn.Module) -> Any:
    def loss(x: Tensor, y: Tensor) -> Tensor:
        value = nn.functional.cross_entropy(model(x), y)
        return value + normswap.aux_loss(model) if model[1].aux == "explicit" else value  # type: ignore[index]

    return loss


def grads(model: nn.Module) -> list[Tensor]:
    return [p.grad for p in model.parameters() if p.grad is not None]


@pytest.mark.parametrize("aux", ["auto", "explicit", "none"])
@pytest.mark.parametrize("size", [1, 7, 8, 64, 100])
def test_any_size_gives_the_gradient_of_the_whole(aux: str, size: int) -> None:
    whole, model = model_of(aux), model_of(aux)
    expected = loss_of(whole)(X, Y)
    expected.backward()
    result = normswap.backward_in_micro_batches(model, loss_of(model), X, Y, size=size)
    assert sum(result.sizes) == 64
    assert result.sizes[0] == min(size, 64)
    torch.testing.assert_close(result.loss, expected.detach(), rtol=1e-12, atol=1e-13)
    for found, wanted in zip(grads(model), grads(whole), strict=True):
        torch.testing.assert_close(found, wanted, rtol=1e-12, atol=1e-12)


def test_the_step_takes_them_for_one_pass() -> None:
    """No warning of accumulation, and the statistics step once."""
    whole, model = model_of(), model_of()
    optimizers = [torch.optim.SGD(normswap.param_groups(m, lr=0.1)) for m in (whole, model)]
    for _ in range(3):
        for optimizer in optimizers:
            optimizer.zero_grad()
        loss_of(whole)(X, Y).backward()
        normswap.backward_in_micro_batches(model, loss_of(model), X, Y, size=24)
        for optimizer in optimizers:
            optimizer.step()
    for found, wanted in zip(model.parameters(), whole.parameters(), strict=True):
        torch.testing.assert_close(found, wanted, rtol=1e-10, atol=1e-11)


def test_accumulation_beyond_it_is_still_noticed() -> None:
    model = model_of()
    for _ in range(2):
        normswap.backward_in_micro_batches(model, loss_of(model), X, Y, size=32)
    with pytest.warns(UserWarning, match="more backward passes have reached the statistics"):
        torch.optim.SGD(model.parameters(), lr=0.1).step()


def test_they_are_as_large_as_the_memory_lets_them() -> None:
    """One sample keeps the weights that are computed, too, so eleven fit into 10.5 times its bytes."""
    model = model_of()
    one = normswap.backward_in_micro_batches(model, loss_of(model), X[:1], Y[:1], size=1).activation_bytes
    limit = 10 * one + one // 2
    result = normswap.backward_in_micro_batches(model, loss_of(model), X, Y, max_bytes=limit)
    assert result.sizes == (1, 10, 11, 11, 11, 11, 9)
    assert limit - one < result.activation_bytes <= limit


class Keeps(nn.Module):
    """A mean over samples, and beside it `numbers(samples)` numbers that backward needs."""

    def __init__(self, numbers: Callable[[int], int]) -> None:
        super().__init__()
        self.numbers = numbers
        self.norm = normswap.BatchlessNorm(3).double().eval().requires_grad_(False)
        self.weight = nn.Parameter(torch.zeros(3, dtype=torch.float64))
        self.passes: list[int] = []  # the samples of each forward pass, thrown away or not

    def forward(self, x: Tensor) -> Tensor:
        self.passes.append(len(x))
        beside: Tensor = self.weight.sum().expand(self.numbers(len(x))).exp()
        return self.norm(x + self.weight).sum(1).mean() + beside.mean()  # type: ignore[no-any-return]


def _filled(total: int, numbers: Callable[[int], int], **options: Any) -> tuple[list[int], MicroBatches]:
    """The samples of each forward pass, and the result, whose gradient is that of the whole batch."""
    model = Keeps(numbers)
    x = torch.randn(total, 3, dtype=torch.float64)
    result = normswap.backward_in_micro_batches(model, model, x, **options)
    expected = torch.full((3,), 2.0, dtype=torch.float64)
    torch.testing.assert_close(model.weight.grad, expected, rtol=1e-4, atol=0)  # eps of the norm
    assert sum(result.sizes) == total
    return model.passes, result


def test_what_does_not_depend_on_the_samples_is_not_counted_for_each() -> None:
    """1000 numbers and one per sample: by the first sample two fit into 2100, by the first two more than a thousand."""
    passes, result = _filled(3000, lambda n: 1000 + n, max_bytes=8 * 2100)
    assert result.sizes[:2] == (1, 2)
    assert 1000 < result.sizes[2] < 1100
    assert passes == [*result.sizes]


@given(total=st.integers(1, 90), fixed=st.integers(0, 60), each=st.integers(1, 9), room=st.integers(0, 900))
@settings(max_examples=60, deadline=None)
def test_where_the_bytes_are_a_line_each_is_as_large_as_can_be(total: int, fixed: int, each: int, room: int) -> None:
    """From the third on, and no forward pass is thrown away. (With room for less than two, one at a time.)"""

    def numbers(n: int) -> int:
        return fixed + each * n

    one, two = (_filled(n, numbers, size=n)[1].activation_bytes for n in (1, 2))
    limit = one + 8 * room
    passes, result = _filled(total, numbers, max_bytes=limit)
    assert passes == [*result.sizes]
    assert result.activation_bytes <= limit
    if limit >= 2 * one:
        largest = 1 + (limit - one) // (two - one)
        assert all(size == largest for size in result.sizes[2:-1])
    else:
        assert result.sizes == (1,) * total


@given(total=st.integers(1, 90), fixed=st.integers(0, 60), square=st.integers(1, 3), room=st.integers(0, 900))
@settings(max_examples=60, deadline=None)
def test_nothing_too_large_goes_through_backward(total: int, fixed: int, square: int, room: int) -> None:
    """Where the bytes are no line. What keeps too much runs again with fewer samples, and as many are not tried again."""

    def numbers(n: int) -> int:
        return fixed + square * n * n

    limit = _filled(1, numbers, size=1)[1].activation_bytes + 8 * room
    passes, result = _filled(total, numbers, max_bytes=limit)
    assert result.activation_bytes <= limit
    assert len(passes) - len(result.sizes) <= 2


def test_a_sample_that_is_too_large_by_itself_is_named() -> None:
    """The third of four keeps more than the others. The share of the layers is what it was."""
    model = model_of()

    def loss(x: Tensor, n: Tensor) -> Tensor:
        return model(x).sum() + model[0].weight.sum().expand(int(n.max())).exp().sum()  # type: ignore[index, no-any-return]

    with pytest.raises(UsageError, match=r"^sample 2 of the batch alone keeps \d+ bytes for backward, more than max_bytes = 30000"):
        normswap.backward_in_micro_batches(model, loss, X[:4], torch.tensor([1, 1, 9000, 1]), max_bytes=30000)
    assert all(layer.run.share == 1 for layer in layers_of(model).values())


@pytest.mark.parametrize("aux", ["auto", "explicit"])
def test_a_forward_pass_that_is_thrown_away_leaves_nothing(aux: str) -> None:
    """The terms of the statistics and the gradients are those of the passes that count."""
    whole, model = model_of(aux), model_of(aux)
    loss_of(whole)(X, Y).backward()
    tried: list[int] = []

    def loss(x: Tensor, y: Tensor) -> Tensor:
        tried.append(len(x))
        return loss_of(model)(x, y) + 0 * model[0].weight.sum().expand(50 * len(x) ** 2).exp().mean()  # type: ignore[index, no-any-return]

    result = normswap.backward_in_micro_batches(model, loss, X, Y, max_bytes=150_000)
    assert len(tried) > len(result.sizes)
    for found, wanted in zip(grads(model), grads(whole), strict=True):
        torch.testing.assert_close(found, wanted, rtol=1e-12, atol=1e-12)


def test_what_is_counted_is_what_autograd_keeps() -> None:
    """Two linear layers keep their inputs: the batch and the weights are there anyway, and what two keep costs once."""
    layer = nn.Sequential(nn.Linear(3, 5), nn.Linear(5, 7), normswap.BatchlessNorm(7).requires_grad_(False))
    x = torch.randn(400, 3)

    def loss(x: Tensor) -> Tensor:
        hidden = layer[0](x)
        return layer[1:](hidden).sum() + layer[1](hidden).sum()  # type: ignore[no-any-return]

    result = normswap.backward_in_micro_batches(layer, loss, x, size=400)
    activations, per_channel = 400 * 5 * 4, 7 * 4
    assert activations <= result.activation_bytes <= activations + 12 * per_channel


def test_a_scaler() -> None:
    model, plain = model_of().float(), model_of().float()
    scaler = torch.amp.GradScaler("cpu", init_scale=1024.0)
    normswap.attach(model, scaler=scaler)
    x = X.float()
    normswap.backward_in_micro_batches(model, loss_of(model), x, Y, size=24, scaler=scaler)
    normswap.backward_in_micro_batches(plain, loss_of(plain), x, Y, size=64)
    scaler.unscale_(torch.optim.SGD(model.parameters(), lr=0.1))
    for found, wanted in zip(grads(model), grads(plain), strict=True):
        torch.testing.assert_close(found, wanted, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize(
    ("batch", "options", "message"),
    [
        ((X, Y), {}, "size is None and max_bytes is None; expected one of them"),
        ((X, Y), {"size": 1, "max_bytes": 2}, "size is 1 and max_bytes is 2; expected one of them"),
        ((X, Y), {"size": 0}, "size is 0 and max_bytes is None; expected one of them, at least 1"),
        ((X, Y[:3]), {"size": 1}, "one or more tensors with the same number of samples"),
        ((X[:0], Y[:0]), {"size": 1}, "at least one, in dimension 0"),
        ((), {"size": 1}, "a batch is one or more tensors"),
        ((X, Y), {"max_bytes": 8}, r"sample 0 of the batch alone keeps \d+ bytes for backward, more than max_bytes = 8"),
    ],
)
def test_refusals(batch: tuple[Tensor, ...], options: dict[str, Any], message: str) -> None:
    model = model_of()
    with pytest.raises(UsageError, match=message):
        normswap.backward_in_micro_batches(model, loss_of(model), *batch, **options)
    assert all(layer.run.share == 1 for layer in layers_of(model).values())


def test_a_batch_norm_that_is_left_is_named() -> None:
    model = nn.Sequential(nn.Conv1d(2, 3, 1), nn.BatchNorm1d(3), normswap.BatchlessNorm(3))
    with pytest.warns(UserWarning, match="^1 is a BatchNorm in train mode: it sees one micro-batch at a time"):
        normswap.backward_in_micro_batches(model, lambda x: model(x).sum(), torch.randn(4, 2, 5), size=2)
    model[1].eval()
    normswap.backward_in_micro_batches(model, lambda x: model(x).sum(), torch.randn(4, 2, 5), size=2)


# --- keys --------------------------------------------------------------------------------------------------------------------------------


def test_norm_keys_of_a_resnet() -> None:
    """All 53, whatever they are called: a filter on names misses those of the shortcuts."""
    from torchvision.models import resnet50

    from normswap.swap.apply import swap

    source = resnet50(weights=None).eval()
    keys = normswap.norm_keys(swap(source, normswap.plan(source)))
    assert len([key for key in keys if key.endswith(".mean")]) == 53
    assert len([key for key in keys if key.endswith(".log_std")]) == 53
    assert "layer1.0.downsample.1.mean" in keys
    assert not [key for key in keys if "conv" in key or "fc" in key or "downsample.0" in key]
    assert normswap.norm_keys(source) == [k for k in source.state_dict() if "bn" in k or "downsample.1" in k]


def test_norm_keys_under_every_name() -> None:
    norm = normswap.BatchlessNorm(3, affine=False)
    assert normswap.norm_keys(norm) == ["mean", "log_std"]
    assert normswap.norm_keys(nn.ModuleList([norm, nn.Linear(2, 3), norm])) == ["0.mean", "0.log_std", "2.mean", "2.log_std"]
    assert normswap.norm_keys(nn.Linear(2, 3)) == []


# --- Hugging Face ------------------------------------------------------------------------------------------------------------------------


def test_no_weight_decay_reaches_statistics_that_the_trainer_would_decay() -> None:
    """transformers finds norms by class and name, so it puts these with the weights that decay. They step by themselves."""
    from transformers import Trainer

    torch.manual_seed(0)
    layer = normswap.BatchlessNorm(3, aux="auto")
    model = nn.ModuleDict({"ln_1": layer, "head": nn.Linear(3, 2)})
    names = Trainer.get_decay_parameter_names(None, model)
    assert "ln_1.mean" in names
    parameters = dict(model.named_parameters())
    groups = [
        {"params": [p for n, p in parameters.items() if n in names], "weight_decay": 0.5},
        {"params": [p for n, p in parameters.items() if n not in names], "weight_decay": 0.0},
    ]
    optimizer = torch.optim.AdamW(groups, lr=0.1)
    head = model["head"].weight.detach().clone()
    x = torch.randn(4096, 3) * 3 + 2
    for _ in range(60):
        optimizer.zero_grad()
        (model["head"](layer(x)) * 0).sum().backward()
        optimizer.step()
    mean, std = layer.statistics()
    torch.testing.assert_close(mean.detach(), x.mean(0), rtol=0, atol=0.05)
    torch.testing.assert_close(std.detach(), x.std(0), rtol=0.02, atol=0)
    assert float(model["head"].weight.detach().norm() / head.norm()) < 0.1  # here it does
