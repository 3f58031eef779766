"""Normalization that costs nothing: the exported file has the operators of the same model with nothing in the place of its norms.

benchmarks/onnx_skeletons.py builds the nets and measures; its last result is in docs/onnx.md.
"""

from __future__ import annotations

import json
from typing import Any

import pytest

from benchmarks import onnx_skeletons
from benchmarks.onnx_skeletons import BEGIN, END, NETS, PAGE, QUICK, RAW, measure, table

NONE_LEFT = set(NETS) - {"pre-activation", "ResNetV2-50 (timm)", "DenseNet-121"}
HERE = ("pre-activation", "AlphaZero", "ViT", "BERT, hidden state")


def hold(row: dict[str, Any]) -> None:
    """What is left is left of norms that say why, and is one operator for each."""
    assert row["predicted"], "the skeleton that the export claims is not that of the model without norms"
    assert row["error"] <= max(10 * row["own_error"], 1e-6)
    assert sum(row["more"].values()) == row["left"] == sum(row["reasons"].values())
    assert row["equal"] == (row["left"] == 0)
    assert all(row["reasons"])
    if row["signs"] == "positive" or row["net"] in NONE_LEFT:
        assert row["left"] == 0, row["reasons"]
    else:
        assert 0 < row["left"] < row["sites"]
        assert set(row["more"]) == {"BatchNormalization"}
        assert all("negative" in reason for reason in row["reasons"])


@pytest.mark.parametrize(
    "name", [*("pre-activation", "BERT, hidden state"), *(pytest.param(n, marks=pytest.mark.slow) for n in ("AlphaZero", "ViT"))]
)
def test_small_nets(name: str) -> None:
    hold(measure(name, signs=True))


def test_positive_weights_before_padded_convolutions() -> None:
    hold(measure("pre-activation", signs=False))


@pytest.mark.slow
@pytest.mark.parametrize("signs", [False, True])
@pytest.mark.parametrize("name", NETS)
def test_every_net(name: str, signs: bool) -> None:
    hold(measure(name, signs))


def test_the_committed_rows_hold() -> None:
    rows = json.loads(RAW.read_text())
    assert [(row["net"], row["signs"]) for row in rows] == [(name, signs) for name in NETS for signs in ("positive", "mixed")]
    for row in rows:
        hold(row)
    assert PAGE.read_text().partition(BEGIN)[2].partition(END)[0].strip() == table(rows)


def test_quick_nets_are_nets() -> None:
    assert set(HERE) <= set(QUICK) <= set(onnx_skeletons.NETS)
