"""The count of operations in benchmarks/training_cost.py, and that docs/benchmarks.md has what it counted."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F

from benchmarks.training_cost import BATCHES, NETS, Operations, extra, made, operations, runs, table

X, Y = torch.randn(3, 5, 7), torch.randn(5, 1)


@pytest.mark.parametrize(
    ("call", "counts"),
    [
        (lambda: X + Y, {"add": 105}),
        (lambda: X.sum(), {"sum": 105}),
        (lambda: X.mean((0, 2)), {"mean": 105}),
        (lambda: X.clone(), {"clone": 105}),
        (lambda: X.transpose(0, 1)[2:].view(3, 3, 7, 1)[0], {}),
        (lambda: X[0] @ X[1].T, {"mm": 2 * 5 * 7 * 5}),
        (lambda: X.add_(1), {"add_": 105}),
        (lambda: F.conv1d(X, torch.randn(2, 5, 3)), {"convolution": 2 * 3 * (5 * 3) * (2 * 5)}),
        (lambda: (X.shape, X.device, X.dtype, X.is_contiguous()), {}),
    ],
)
def test_operators(call: Callable[[], Any], counts: dict[str, int]) -> None:
    with Operations() as counted:
        call()
    counted.counts.pop("randn", None)
    assert dict(counted.counts) == counts


def test_backward_is_counted() -> None:
    w = torch.randn(5, 7, requires_grad=True)
    y = torch.randn(4, 5, requires_grad=True) @ w
    with Operations() as counted:
        y.sum().backward()  # type: ignore[no-untyped-call]
    assert counted.counts["mm"] == 2 * (2 * 4 * 5 * 7)


def test_a_batch_norm_is_counted_in_parts_and_computes_the_same() -> None:
    mean, var = torch.zeros(5), torch.ones(5)
    other: tuple[Tensor, Tensor] = (torch.zeros(5), torch.ones(5))
    with Operations() as counted:
        y = F.batch_norm(X, mean, var, training=True)
    torch.testing.assert_close(y, F.batch_norm(X, *other, training=True))
    torch.testing.assert_close((mean, var), other)
    assert "native_batch_norm" not in counted.counts
    assert 3 * 105 < counted.counts.total() < 7 * 105
    assert counted.runs == 1


def test_fake_tensors_give_the_counts_of_real_ones() -> None:
    """Of the smallest net, which is run for real here.

    Without the sample limit, which asks real tensors whether it has anything to do. So does the clip of a filter's step: at this learning
    rate it has, in every conv.
    """
    import copy

    import normswap
    from benchmarks.training_cost import digits

    x = torch.randn(2, 1, 8, 8)
    model = normswap.convert(digits().eval(), x, coupling="auto", calibration=[x]).model.train()
    real = copy.deepcopy(model)
    for layer in real.modules():
        if isinstance(layer, normswap.BatchlessNorm):
            layer.limits_samples = False
    optimizer = torch.optim.SGD(normswap.param_groups(real, lr=100.0), lr=100.0, momentum=0.9, foreach=False)
    labels = torch.zeros(2, dtype=torch.int64)
    for _ in range(2):
        with Operations() as counted:
            optimizer.zero_grad()
            F.cross_entropy(real(x), labels).backward()
            optimizer.step()
    counts = operations(made("six convs, 8 x 8", "coupled+feedback"), (2, 1, 8, 8))
    assert counts is not None
    assert counts.counts.total() == pytest.approx(counted.counts.total(), rel=1e-3)
    assert counts.runs == counted.runs - 2  # which filters are to be shortened, and where they are: asked of real tensors alone


def test_batch_norm_cannot_train_on_one_value() -> None:
    assert operations(made("ResNet-18, 32 x 32", "batchnorm"), (1, 3, 32, 32)) is None


def test_the_tables_are_in_the_docs(repository: Path) -> None:
    kept = json.loads((repository / "benchmarks/results/training_cost.json").read_text())["steps"]
    page = (repository / "docs/benchmarks.md").read_text()
    assert {(e["net"], e["batch"]) for e in kept} == {(net, batch) for net in NETS for batch in BATCHES}
    for line in [*table(kept), *runs(kept)]:
        assert line in page


def test_the_bar_where_it_is_said_to_hold(repository: Path) -> None:
    kept = json.loads((repository / "benchmarks/results/training_cost.json").read_text())["steps"]
    for entry in kept:
        least = 1 if "224" in entry["net"] else 8 if "six" in entry["net"] else 64
        if entry["row"] == "default":
            assert (extra(entry, kept) <= 3) == (entry["batch"] >= least)
