"""The tables of benchmarks/training_step.py, and that docs/benchmarks.md has what it measured."""

from __future__ import annotations

import json
from pathlib import Path

import torch
from torch import nn

from benchmarks import training_step
from benchmarks.training_cost import Operations
from benchmarks.training_step import NETS, ROWS, lines_of, table


def test_the_tables_are_in_the_docs(repository: Path) -> None:
    kept = json.loads(training_step.KEPT.read_text(encoding="utf-8"))
    page = (repository / "docs/benchmarks.md").read_text(encoding="utf-8")
    assert list(kept["nets"]) == list(NETS)
    assert all(set(rows) == set(ROWS) for rows in kept["nets"].values())
    for line in [*table(kept["nets"]), *lines_of(kept["micro"])]:
        assert line in page


def test_the_bars_that_are_reached() -> None:
    kept = json.loads(training_step.KEPT.read_text(encoding="utf-8"))
    assert all(found["batchnorm"] > 40 * found["default"] for found in kept["micro"].values())
    for rows in kept["nets"].values():
        assert rows["batchnorm"]["time"] == 1
        assert rows["none"]["kept"] > 0.95 * rows["batchnorm"]["kept"]


def test_operators_are_counted_without_views() -> None:
    x = torch.ones(3, 4)
    with Operations() as counted:
        nn.functional.relu(x.view(4, 3).t()) + 1
    assert counted.runs == 2
