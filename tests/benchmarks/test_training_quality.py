"""The study of docs/benchmarks.md: what it compares with does what its papers say, and its tables what its runs say."""

from __future__ import annotations

import copy
import json
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

pytest.importorskip("sklearn")

from benchmarks import peers, training_quality
from benchmarks.training_quality import best_of, details, table

F64 = torch.float64
X = torch.randn(6, 8, 5, 3, generator=torch.Generator().manual_seed(0), dtype=F64) * 2 + 1


def norm() -> nn.BatchNorm2d:
    torch.manual_seed(1)
    layer = nn.BatchNorm2d(8).to(F64)
    assert layer.running_mean is not None
    assert layer.running_var is not None
    layer.running_mean.normal_()
    layer.running_var.uniform_(0.5, 2)
    nn.init.normal_(layer.weight)
    nn.init.normal_(layer.bias)
    return layer


def through(layer: nn.Module, x: Tensor = X) -> tuple[Tensor, Tensor]:
    """(output, gradient by the input)"""
    x = x.clone().requires_grad_()
    y = layer(x)
    (y * torch.randn(y.shape, generator=torch.Generator().manual_seed(2), dtype=F64)).sum().backward()
    assert x.grad is not None
    return y.detach(), x.grad


def test_renorm_is_batch_norm_at_first_and_then_its_own_average() -> None:
    ours, theirs = peers.BatchRenorm(norm()), norm()
    for found, expected in zip(through(ours), through(theirs), strict=True):
        torch.testing.assert_close(found, expected)
    ours = peers.BatchRenorm(norm())
    ours.progress = 1.0
    torch.testing.assert_close(through(ours)[0], norm().eval()(X))  # nothing of it is clipped


def test_online_norm_goes_sample_by_sample() -> None:
    whole, parts = peers.OnlineNorm(norm()), peers.OnlineNorm(norm())
    y, by = through(whole)
    task = torch.randn(X.shape, generator=torch.Generator().manual_seed(2), dtype=F64)
    for i in range(len(X)):
        x = X[i : i + 1].clone().requires_grad_()
        z = parts(x)
        (z * task[i : i + 1]).sum().backward()
        torch.testing.assert_close(z[0].detach(), y[i])
        torch.testing.assert_close(x.grad[0], by[i])  # type: ignore[index]
    torch.testing.assert_close(parts.mean, whole.mean)
    assert y.abs().max() <= 5


def test_online_norm_in_the_long_run_has_no_trend() -> None:
    layer = peers.OnlineNorm(norm())
    layer.af, layer.ab = 0.9, 0.5
    for _ in range(400):
        _, by = through(layer, X[:1] * 0.1)
    assert by.mean((0, 2, 3)).abs().max() < 1e-3


def test_mabn_warms_up_by_its_own_batch_and_then_averages() -> None:
    layer = peers.MABN(norm())
    rms = X.square().mean((0, 2, 3), keepdim=True).add(1e-5).sqrt()
    y, by = through(layer)
    torch.testing.assert_close(y, layer.affine(X / rms).detach())
    assert (by * X).mean((0, 2, 3)).abs().max() < 1e-5  # nothing along the output is left
    for _ in range(200):
        through(layer)
    torch.testing.assert_close(through(layer)[0], layer.eval()(X), rtol=0.1, atol=0.1)
    assert len(layer.chi) == 32 // 6


def test_standardized_and_centred_weights() -> None:
    for change, spread in ((peers.group_norm_standardized, 1.0), (peers.mabn, None)):
        model = nn.Sequential(nn.Conv2d(1, 8, 3), nn.BatchNorm2d(8), nn.Flatten(), nn.Linear(8, 2))
        last = copy.deepcopy(model[3])
        model(torch.randn(4, 1, 3, 3))
        change(model)
        rows = model[0].weight.flatten(1)  # type: ignore[union-attr, operator]
        torch.testing.assert_close(rows.mean(1), torch.zeros(8), rtol=0, atol=1e-6)  # type: ignore[arg-type]
        if spread:
            torch.testing.assert_close(rows.std(1), torch.ones(8), rtol=0, atol=1e-3)  # type: ignore[arg-type]
        assert torch.equal(model[3].weight, last.weight)  # type: ignore[arg-type]


def test_frozen_stays_in_eval_mode() -> None:
    model = nn.Sequential(norm(), nn.Dropout())
    peers.frozen(model)
    model.train()
    assert [m.training for m in model] == [False, True]
    torch.testing.assert_close(model[0](X), norm().eval()(X))


@pytest.mark.parametrize("row", training_quality.ROWS)
def test_every_row_runs(row: str, monkeypatch: pytest.MonkeyPatch) -> None:
    task = training_quality.TASKS["mlp"]
    few = training_quality.Split(*(training_quality.Images(part.x[:64], part.y[:64]) for part in task.data(0)))
    monkeypatch.setitem(training_quality.TASKS, "mlp", training_quality.Task(lambda seed: few, task.network, {16: 1}, 1, (row,), {}))
    entry = training_quality.run("mlp", row, 16, 0.01, 0)
    assert entry["steps"] == 4
    assert entry["finite"]


def entry(row: str, lr: float, seed: int, validation: float, test: float, **more: Any) -> dict[str, Any]:
    settings = {"task": "mlp", "row": row, "batch": 4, "lr": lr, "seed": seed}
    return {**settings, "validation": validation, "test": test, "to_target": 7, "ms": 1.0, "finite": True, "loss": 1.0, **more}


def test_validation_chooses_and_the_test_set_is_reported() -> None:
    entries = [entry("plain", lr, seed, lr, 1 - lr + seed / 10) for lr in (0.1, 0.3) for seed in (0, 1)]
    found = best_of([*entries, entry("plain", 0.1, 2, 1.0, 1.0)])  # a seed that not every learning rate has
    assert found is not None
    assert (found.lr, found.stable) == (0.3, (0.3, 0.3))
    assert found.tests == pytest.approx({0: 0.7, 1: 0.8})
    tied = [entry("plain", lr, 0, 0.9, lr, loss=loss) for lr, loss in ((0.1, 0.5), (0.2, 0.4), (0.3, float("nan")))]
    assert best_of(tied) is not None
    assert best_of(tied).lr == 0.2  # type: ignore[union-attr]
    assert best_of([]) is None
    assert best_of([entry("plain", 0.1, 0, 1, 1), entry("plain", 0.3, 1, 1, 1)]) is None


def test_the_tables_of_the_docs_are_those_of_the_runs(repository: Path) -> None:
    entries, fresh = (
        [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]
        for path in (training_quality.KEPT, training_quality.FRESH)
    )
    page = (repository / "docs" / "benchmarks.md").read_text(encoding="utf-8")
    assert f"{len(entries)} runs" in page
    for found in (entries, fresh):
        for task in {entry["task"] for entry in found}:
            assert "\n".join(table(task, found)) in page
    assert all((e["seed"] >= training_quality.TASKS[e["task"]].seeds) == (e in fresh) for e in [*entries, *fresh])
    assert training_quality.DETAILS.read_text(encoding="utf-8") == training_quality.page(entries)
    keys = [tuple(entry[key] for key in training_quality.KEYS) for entry in entries]
    assert sorted(set(keys)) == keys


def test_the_table_has_the_paired_standard_error() -> None:
    entries = [entry("batchnorm", 0.1, s, 1, t) for s, t in ((0, 0.9), (1, 0.8))] + [
        entry("plain", 0.3, s, 1, t) for s, t in ((0, 0.7), (1, 0.62))
    ]
    assert table("mlp", entries) == ["| | batch 4 |", "|---|---|", "| batchnorm | 85.0 (0.1) |", "| plain | 66.0 ± 1.0 (0.3) |"]


def test_details_are_of_the_learning_rate_that_was_chosen() -> None:
    entries = [
        entry("plain", lr, seed, 0.9 - lr / 3, 1, to_target=10 * seed, ms=1.5 + seed) for lr in (0.03, 0.1, 0.3) for seed in (1, 2, 3)
    ]
    entries += [entry("default", 0.1, seed, 1, 1, to_target=None if seed else 3) for seed in (0, 1)]
    assert details("mlp", entries)[2:] == ["| 4 | plain | 0.03 to 0.1 | 20 | 3.5 |", "| 4 | default | 0.1 | not reached | 1.0 |"]
    assert details("parity", entries)[2:] == []
