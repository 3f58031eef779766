"""A dozen models of torchvision, one for each way in which they differ, measured as the sweep of benchmarks/coverage.py measures all.

The sweep's last results are committed: benchmarks/results/coverage.json, and docs/coverage.md with the table.
"""

from __future__ import annotations

import json
from typing import Any

import pytest
import torch
from torch import nn

pytest.importorskip("torchvision")

from benchmarks import coverage
from normswap.layer.formulas import std_of_variance
from normswap.rules import batch_norm

CASES = {case.name: case for case in coverage.cases()}

# name -> (back-end, BatchNorms swapped, other norms kept)
REPRESENTATIVE = {
    "resnet18": ("fx", 20, 0),  # in train mode too
    "googlenet": ("fx", 59, 0),  # auxiliary heads that eval mode does not run
    "efficientnet_b0": ("fx", 49, 0),  # squeeze and excitation, stochastic depth
    "shufflenet_v2_x0_5": ("fx", 56, 0),  # channels split and shuffled
    "regnet_y_400mf": ("fx", 53, 0),
    "densenet121": ("fx", 121, 0),  # BatchNorm before the convolution
    "swin_t": ("fx", 0, 29),  # nothing to swap
    "quantized_mobilenet_v2": ("fx", 52, 0),  # a float model with stubs
    "lraspp_mobilenet_v3_large": ("fx", 47, 0),
    "mc3_18": ("fx", 20, 0),  # BatchNorm3d
    "raft_large": ("walk", 15, 15),  # no graph; BatchNorm in one encoder, InstanceNorm in the other
    "fcos_resnet50_fpn": ("walk", 53, 8),  # GroupNorm in the heads
    "fasterrcnn_mobilenet_v3_large_320_fpn with frozen BatchNorm": ("walk", 46, 0),
}

# What others stand for: `fcos` for what is walked, for detectors and for norms that stay; `Detr` in test_libraries.py and the tests of the
# rules for a frozen BatchNorm.
SLOW = {
    "regnet_y_400mf",
    "swin_t",
    "lraspp_mobilenet_v3_large",
    "raft_large",
    "fasterrcnn_mobilenet_v3_large_320_fpn with frozen BatchNorm",
}


@pytest.fixture(autouse=True)
def _one_in_train_mode(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(coverage, "ALSO_IN_TRAIN_MODE", ("resnet18",))


@pytest.mark.parametrize("name", [pytest.param(name, marks=[pytest.mark.slow] * (name in SLOW)) for name in REPRESENTATIVE])
def test_model_converts_whole(name: str) -> None:
    record = coverage.measure(CASES[name])
    assert record["findings"] == []
    assert record["parity"]["passed"]
    assert record["parity"]["forward passes"] in (18, 22)  # a batch of 1 is no probe of its own where the example is one
    found = record["backend"], record["swapped"], sum(record["skipped"].values())
    assert found == REPRESENTATIVE[name]
    assert record["batch norms"] == record["swapped"]
    assert "batch" not in record["kernels after"]


# -- what the sweep must notice -------------------------------------------------------------------------------------------------------


def findings_of(name: str) -> str:
    return "; ".join(coverage.measure(CASES[name])["findings"])


def test_a_lost_eps_is_noticed(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(batch_norm.formulas, "std_of_variance", lambda var, eps: std_of_variance(var, 0.0))
    assert findings_of("shufflenet_v2_x0_5") == "parity failed, first at conv1.1"


def test_a_norm_that_stays_is_noticed(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(batch_norm, "why_not_statistics", lambda mean, var, eps: "is left" if len(mean) == 64 else None)
    assert findings_of("resnet18") == "5 BatchNorms are not swapped, bn1 the first"


def test_a_norm_missing_from_the_plan_is_noticed(monkeypatch: pytest.MonkeyPatch) -> None:
    # an independent count that knows of more norms than the plan
    monkeypatch.setattr(coverage, "NORMS", (*coverage.NORMS, nn.Linear))
    assert findings_of("resnet18") == "1 norms are not in the plan, fc the first"


def test_heads_that_the_comparison_misses_are_noticed() -> None:
    class Detector(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.backbone, self.forgotten = nn.Conv2d(3, 4, 1), nn.BatchNorm2d(4)

    assert coverage._unseen(coverage.Heads(Detector()), torch.zeros(1, 3, 2, 2)) == ["detector.forgotten"]


# -- what is committed ----------------------------------------------------------------------------------------------------------------


def committed() -> dict[str, Any]:
    return json.loads(coverage.RAW.read_text())  # type: ignore[no-any-return]


def test_committed_table_is_that_of_the_committed_results() -> None:
    between = coverage.PAGE.read_text().partition(coverage.BEGIN)[2].partition(coverage.END)[0]
    assert between.strip() == coverage.table(committed()).strip()


def test_committed_results_cover_every_model_and_are_clean() -> None:
    raw = committed()
    assert [r["name"] for r in raw["records"] if not r["clean"]] == []
    if raw["environment"]["torchvision"] == coverage.environment()["torchvision"]:
        assert [r["name"] for r in raw["records"]] == list(CASES)
