"""Comparisons with weights that are 0, tiny and negative, and the files of other tools: benchmarks/onnx_parity.py; the last result is in
docs/benchmarks.md."""

from __future__ import annotations

import json

import pytest

from benchmarks.onnx_parity import (
    BEGIN,
    END,
    PAGE,
    PEERS,
    RAW,
    SIGNS,
    WEIGHTS,
    Row,
    case_of,
    cases,
    comparisons,
    peers,
    peers_case,
    tables,
    verdict,
)
from benchmarks.onnx_skeletons import NETS

WITH_BATCH_NORM = set(NETS) - {
    *("ViT", "BERT, pooled", "BERT, hidden state", "GPT-2", "ViT-Ti/16 (timm)", "ConvNeXt-A (timm)", "ConvNeXt-T"),
}
ALL = {"example", "batch of 1", "batch of 7", "batch 1 x 0.001", "batch 1 x 1000", "batch 1, all 3"}
WHEN_COMMITTED = ALL | {"batch 1, all 0"}  # the inputs of the code that measured benchmarks/results/onnx_parity.json


def hold(row: Row) -> None:
    assert verdict(row) == []
    if "peers" in row:
        assert list(row["peers"]) == list(PEERS)
        assert all(not found["more"] for found in row["peers"].values()), row
        return
    assert {"example", "batch of 1", "batch of 7"} <= set(row["probes"]) <= WHEN_COMMITTED
    assert 0 <= row["left"] <= row["norms"]
    assert bool(row["left"]) == bool(row["reasons"])
    assert all(row["reasons"])
    assert row["evaluator"] is not None or row["not run"]


@pytest.mark.parametrize(
    ("name", "kind"),
    [
        # tiny and negative weights are among all three; where all are 0, less is left
        *(pytest.param("pre-activation", kind, marks=[pytest.mark.slow] if kind in ("tiny", "negative") else []) for kind in WEIGHTS),
        ("AlphaZero", "all three"),
        ("ViT", "all three"),
        pytest.param("BERT, hidden state", "all three", marks=pytest.mark.slow),
    ],
)
def test_small_nets(name: str, kind: str) -> None:
    row = comparisons(name, kind)
    hold(row)
    if kind == "zero":
        assert row["left"] < row["norms"]


def test_files_of_other_tools() -> None:
    for tool in ("onnxslim", "onnxsim"):
        pytest.importorskip(tool, reason="one of the tools of the extra `bench`")
    for signs in (False, True):
        row = peers("pre-activation", signs)
        assert row is not None
        hold(row)
        assert all(not found["more"] and not found["less"] and found["changed"] for found in row["peers"].values()), row
    assert peers("ViT", False) is None


@pytest.mark.slow
@pytest.mark.parametrize("name", NETS)
def test_every_net(name: str) -> None:
    hold(comparisons(name, "all three"))
    for signs in SIGNS:
        row = peers(name, signs)
        if row is not None:
            hold(row)


def test_the_committed_rows_hold() -> None:
    rows = json.loads(RAW.read_text())
    measured = [case_of(row) for row in rows]
    assert measured == [case for case in cases(list(NETS)) if case in set(measured)]
    assert {name for name, case in measured if case == "all three"} == set(NETS)
    assert {name for name, case in measured if case == peers_case("mixed")} == WITH_BATCH_NORM
    assert {name for name, case in measured if case == peers_case("positive")} == WITH_BATCH_NORM
    for row in rows:
        hold(row)
    assert PAGE.read_text().partition(BEGIN)[2].partition(END)[0].strip() == tables(rows).strip()


@pytest.mark.parametrize(
    ("change", "found"),
    [
        ({}, []),
        ({"passed": False}, ["a net, zero: a comparison failed"]),
        ({"share": 1.2}, ["a net, zero: a comparison failed"]),
        ({"half": 6e-3}, ["a net, zero: 6.0e-03 off in float16"]),
        ({"half": None}, []),
    ],
)
def test_what_is_wrong_is_said(change: Row, found: list[str]) -> None:
    assert verdict({"net": "a net", "weights": "zero", "passed": True, "share": 0.5, "half": 1e-3, **change}) == found
    wrong = {"torch": {"passed": False}, "onnxsim": {"passed": True}}
    assert verdict({"net": "a net", "signs": "mixed", "peers": wrong}) == ["a net, mixed, torch: not the same function"]
