"""The comparison of benchmarks/finetune.py is fair in what can be checked, and its tables in the docs are those of its figures."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from benchmarks import finetune
from normswap.layer.batchless_norm import BatchlessNorm


@pytest.fixture(scope="module")
def domain() -> finetune.Domain:
    return finetune.new_domain()


@pytest.fixture(scope="module")
def start(domain: finetune.Domain) -> nn.Module:
    return finetune.calibrated(finetune.pretrained(), domain.train.images)


@pytest.fixture(scope="module")
def result() -> dict[str, Any]:
    return json.loads(finetune.PATH.read_text())


def norms(model: nn.Module) -> list[nn.Module]:
    return [m for m in model.modules() if isinstance(m, nn.modules.batchnorm._BatchNorm)]


@torch.no_grad()
def test_the_statistics_are_those_of_the_new_domain(start: nn.Module, domain: finetune.Domain) -> None:
    seen: list[torch.Tensor] = []
    for norm in norms(start):
        norm.register_forward_pre_hook(lambda module, inputs: seen.append(inputs[0].transpose(0, 1).flatten(1)))
    start(domain.train.images)
    for norm, x in zip(norms(start), seen, strict=True):
        torch.testing.assert_close(norm.running_mean, x.mean(1), rtol=0.01, atol=0.01)
        torch.testing.assert_close(norm.running_var, x.var(1), rtol=0.01, atol=0.01)
        norm._forward_pre_hooks.clear()
    assert all(norm.momentum == 0.1 for norm in norms(start))


@torch.no_grad()
@pytest.mark.parametrize("method", ["coupled", "natural", "slow", "raw", "batch norm", "frozen"])
def test_every_method_but_group_norm_starts_from_one_function(method: str, start: nn.Module, domain: finetune.Domain) -> None:
    model = finetune.METHODS[method](start, 4)
    assert model.training
    images = domain.test.images[:7]
    torch.testing.assert_close(model.eval()(images), start(images), rtol=1e-4, atol=1e-4)


def test_what_trains(start: nn.Module) -> None:
    layers = {name: [m for m in make(start, 4).modules() if isinstance(m, BatchlessNorm)] for name, make in finetune.METHODS.items()}
    assert {name: len(found) for name, found in layers.items() if found} == {"coupled": 4, "natural": 4, "slow": 4, "raw": 4}
    assert all(layer.producer is not None and layer.trend is not None for layer in layers["coupled"])
    assert not any(layer.producer is not None or layer.trend is not None for layer in layers["natural"])
    assert {layer.momentum for layer in layers["natural"]} == {0.1}
    assert {layer.momentum for layer in layers["slow"]} == {0.1 / 16}
    assert {layer.stats for layer in layers["raw"]} == {"raw"}
    assert not any(norm.training for norm in norms(finetune.METHODS["frozen"](start, 4)))
    assert all(norm.training for norm in norms(finetune.METHODS["batch norm"](start, 4)))
    assert norms(finetune.METHODS["group norm"](start, 4)) == []


def test_coupled_alone_is_told_the_batch(start: nn.Module) -> None:
    paces = []
    for batch in (None, 2):
        model = finetune.METHODS["coupled"](start, 2)
        finetune.parameters_of(model, 0.1, batch)
        paces.append({m.run.pace for m in model.modules() if isinstance(m, BatchlessNorm)})
    assert paces == [{1.0}, {0.5}]


def test_batch_norm_refuses_one_sample(start: nn.Module, domain: finetune.Domain) -> None:
    assert finetune.run(start, domain, "batch norm", 1, 1e-3, 0)["error"].startswith("Expected more than 1 value per channel")


def test_a_run_sees_every_sample_once(start: nn.Module, domain: finetune.Domain, monkeypatch: pytest.MonkeyPatch) -> None:
    seen: list[int] = []
    monkeypatch.setitem(finetune.METHODS, "frozen", lambda model, batch: spied(finetune.frozen(model, batch), seen))
    row = finetune.run(start, domain, "frozen", 64, 1e-3, 0)
    assert seen[: finetune.SAMPLES // 64] == [64] * (finetune.SAMPLES // 64)
    assert len(domain.train.labels) == finetune.SAMPLES
    assert row["finite"]
    assert 0 < row["test"] <= 1


def spied(model: nn.Module, seen: list[int]) -> nn.Module:
    model.register_forward_pre_hook(lambda module, inputs: seen.append(len(inputs[0])))
    return model


def test_the_learning_rate_is_chosen_on_the_validation_set() -> None:
    def row(rate: float, seed: int, validation: float, test: float) -> dict[str, Any]:
        return {"method": "raw", "batch": 4, "rate": rate, "seed": seed, "validation": validation, "test": test}

    rows = [row(1, 0, 0.5, 0.9), row(1, 1, 0.5, 0.9), row(2, 0, 0.9, 0.1), row(2, 1, 0.2, 0.1), row(3, 0, 0.55, 0.2), row(3, 1, 0.55, 0.2)]
    rows.append({"method": "raw", "batch": 4, "rate": 4, "seed": 0, "error": "none"})
    assert {r["rate"] for r in finetune.best(rows, "raw", 4)} == {2}  # .55 both: the smaller
    assert finetune.best(rows, "raw", 1) == []


def test_the_tables_are_those_of_the_figures(result: dict[str, Any], repository: Path) -> None:
    page = (repository / "docs/benchmarks.md").read_text()
    assert finetune.table(result) in page
    for batch in (1, 64):
        assert finetune.rates_table(result, batch) in page
    for accuracy in result["before"].values():
        assert f"{accuracy:.1%}" in page


def test_every_run_is_there_once(result: dict[str, Any]) -> None:
    expected = {
        (method, batch, rate, seed)
        for method in finetune.METHODS
        for batch in finetune.BATCHES
        for rate in finetune.RATES
        for seed in finetune.SEEDS
    }
    assert sorted(map(finetune.key, result["runs"])) == sorted(expected)
    assert {(row["method"], row["batch"]) for row in result["runs"] if "error" in row} == {("batch norm", 1)}
