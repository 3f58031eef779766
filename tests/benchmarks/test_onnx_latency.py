"""The comparison of our ONNX files with those of others is fair in what can be checked, and its tables are those of its figures.

benchmarks/onnx_latency.py makes the files; its last result is benchmarks/results/onnx_latency.json, shown in docs/benchmarks.md.
"""

from __future__ import annotations

import copy
import json
from collections.abc import Mapping
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn

from benchmarks.onnx_latency import (
    BEGIN,
    END,
    PAGE,
    PEERS,
    RAW,
    SIGNS,
    above,
    count,
    finds_more,
    interleaved,
    lines_of,
    page,
    same_norms,
    slowest_ratio,
    table,
    verdict,
)
from benchmarks.onnx_skeletons import NETS, random_norm, with_norms


class Activated(nn.BatchNorm2d):
    """As timm has it: with its activation."""

    def __init__(self, channels: int) -> None:
        super().__init__(channels)
        self.act = nn.ReLU()

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.act(super().forward(x))


def pair(*layers: nn.Module) -> tuple[nn.Module, nn.Module]:
    original = nn.Sequential(*layers).eval()
    model = with_norms(copy.deepcopy(original), random_norm(True))
    same_norms(original, model)
    return original, model


def test_the_original_is_the_same_function() -> None:
    original, model = pair(nn.Conv2d(3, 6, 1), nn.BatchNorm2d(6), nn.Conv2d(6, 5, 1), Activated(5), nn.Flatten(), nn.BatchNorm1d(20))
    x = torch.randn(7, 3, 2, 2)
    torch.testing.assert_close(original(x), model(x))
    untouched = nn.BatchNorm2d(6)
    assert not torch.allclose(original[1].running_mean, untouched.running_mean)


def test_a_layer_norm_gets_weight_and_bias_and_stays_what_it_is() -> None:
    original, model = pair(nn.Linear(4, 6), nn.LayerNorm(6), nn.LayerNorm(6, elementwise_affine=False))
    torch.testing.assert_close(original[1].weight, model[1].weight)
    torch.testing.assert_close(original[1].bias, model[1].bias)
    assert isinstance(original[2], nn.LayerNorm)
    assert original[2].weight is None


class Session:
    """What the benchmark asks of an onnxruntime session; it notes its turns."""

    def __init__(self, name: str, turns: list[str]) -> None:
        self.name, self.turns = name, turns

    def get_inputs(self) -> list[Any]:
        return [self]

    def run(self, outputs: None, feeds: Mapping[str, Any]) -> list[Any]:
        assert list(feeds) == [self.name]
        self.turns.append(self.name)
        return []


def test_every_file_is_first_equally_often(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("benchmarks.onnx_latency.TURN", 0.0)  # one run in each turn
    monkeypatch.setattr("benchmarks.onnx_latency.SECONDS", 1e9)
    turns: list[str] = []
    found = interleaved({name: Session(name, turns) for name in ("ours", "torch")}, np.zeros(1))
    assert found["rounds"] == 50
    assert {mine: set(ratios) for mine, ratios in found["ratios"].items()} == {"ours": {"torch"}}
    assert set(found["milliseconds"]) == {"ours", "torch"}
    rounds = turns[-100:]
    assert rounds[:4] == ["ours", "torch", "torch", "ours"]
    assert rounds.count("ours") == rounds.count("torch") == 50


def row(ours: int, *peers: int, **more: Any) -> dict[str, Any]:
    files = {name: {"nodes": n, "bytes": 10 * n, "onnxruntime": n - 1} for name, n in zip(PEERS, peers, strict=False)}
    mine = {"nodes": ours, "bytes": 10 * ours, "onnxruntime": ours - 1}
    base = {"net": "N", "signs": "mixed", "norms": 3, "removed": {}, "latency": None}
    return {**base, "ours": mine, "skeleton": mine, **files, **more}


def test_the_best_peer_is_the_smallest() -> None:
    assert above(row(5, 7, 5, 6), "nodes") == 0
    assert above(row(5, 7, 8, 6), "bytes") == -10
    assert above(row(5, 7, 4, 6), "nodes") == 1


def test_tools_may_remove_as_much_as_from_the_file_without_norms() -> None:
    removed = {"onnxslim": {"ours": 2, "skeleton": 2}, "onnxsim": {"ours": 3, "skeleton": 1}, "onnxscript": {"ours": 0, "skeleton": 4}}
    assert finds_more(row(5, 6, removed=removed)) == {"onnxsim": (3, 1)}


def test_the_tables_say_what_is_missing() -> None:
    timing = {
        "rounds": 9,
        "milliseconds": {"ours": 2.0, "torch": 4.0},
        "ratios": {"ours": {"skeleton": 2.0, "torch": 0.5, "onnxslim": 1.25, "onnxsim": 1.0}},
    }
    timed = row(5, 7, 6, 6, latency={"1": timing, "8": timing})
    text = table([timed, row(5, 7)])
    assert slowest_ratio(timed, 8) == 1.25
    assert "| N | mixed | 3 | 5 → 4 | the same | 5 → 4 | 7 → 6 | 6 → 5 | 6 → 5 | failed | nothing |" in text
    assert "| N | mixed | 3 | 50 | +20 | +10 | +10 | failed |" in text
    assert "(1 of 2 rows measured; the others are not)" in text
    assert "| N | mixed | 8 | portable | 2 | 0.500 | 1.250 | 1.000 | failed | 1.250 |" in text
    assert lines_of(["a", "b"], [["1", "2"]]) == "| a | b |\n|---|---|\n| 1 | 2 |"


def test_the_verdict_names_what_is_above() -> None:
    removed = {"onnxsim": {"ours": 3, "skeleton": 1}}
    text = verdict([row(5, 5, 6, 7), row(1009, 9, 20, 30, net="M", removed=removed)])
    assert "* operators: no more than the best peer in 1 of 2; above it: M (mixed) by 1,000\n" in text
    assert "* operators in onnxruntime: no more than the best peer in 1 of 2; above it: M (mixed) by 1,000\n" in text
    assert "* bytes: no more than the best peer in 1 of 2; above it: M (mixed) by 10,000\n" in text
    assert text.endswith("* a tool removes more than without norms in 1 of 2: M (mixed)")
    clean = verdict([row(5, 5, 6, 7)])
    assert "above" not in clean
    assert clean.endswith("in 0 of 1")


def test_constants_are_not_counted_and_subgraphs_are() -> None:
    import onnx
    from onnx import helper

    def const(name: str) -> Any:
        return helper.make_node("Constant", [], [name], value=helper.make_tensor(name, onnx.TensorProto.FLOAT, [], [1.0]))

    branch = helper.make_graph(
        [const("k"), helper.make_node("Identity", ["k"], ["o"])], "b", [], [helper.make_value_info("o", onnx.TypeProto())]
    )
    node = helper.make_node("If", ["c"], ["y"], then_branch=branch, else_branch=branch)
    proto = helper.make_model(helper.make_graph([const("c"), node], "g", [], []))
    assert count(proto) == 3


def test_the_committed_rows_are_those_of_the_page() -> None:
    raw = json.loads(RAW.read_text())
    rows = raw["rows"]
    order = [(name, word) for name in NETS for word in SIGNS.values()]
    assert [(r["net"], r["signs"]) for r in rows] == order
    for r in rows:
        assert above(r, "nodes") <= 0
        assert above(r, "bytes") <= 0
        assert finds_more(r) == {}
        assert r["net"] in NETS
        assert r["failed"] == {}
        assert all(r[file]["error"] < 1e-4 for file in ("ours", *PEERS) if "error" in r[file])
    assert PAGE.read_text().partition(BEGIN)[2].partition(END)[0].strip() == page(raw)
