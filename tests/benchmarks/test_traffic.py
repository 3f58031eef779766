"""The count of bytes in benchmarks/traffic.py, and that docs/benchmarks.md has what it counted."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch.nn import functional as F

from benchmarks import traffic
from benchmarks.traffic import PARTS, ROWS, STEPS, Traffic, table

X, W = torch.randn(5, 7, 19, 23), torch.randn(40, 50)  # 5 samples; a weight
N, M = 4 * 5 * 7 * 19 * 23, 4 * 40 * 50


@pytest.mark.parametrize(
    ("call", "activations", "weights"),
    [
        (lambda: X + X, 3 * N, 0),
        (lambda: X.relu_(), 2 * N, 0),
        (lambda: X.sum((2, 3)), N, 0),  # what it writes is a number per channel and sample
        (lambda: X * torch.ones(7, 1, 1), 2 * N, 0),
        (lambda: X.flatten(2).transpose(1, 2)[1:], 0, 0),
        (lambda: X.half(), 1.5 * N, 0),
        (lambda: W.mul_(2), 0, 2 * M),
        (lambda: torch.cat([W, W]), 0, 4 * M),
        (lambda: W @ W.t(), 0, 0),
        (lambda: F.conv2d(X, torch.randn(3, 7, 1, 1)), 0, 0),
        (lambda: torch.native_batch_norm(X, None, None, None, None, True, 0.1, 1e-5), 3 * N, 0),
        (lambda: X[0, 0, 0, 0].expand(5, 7, 19, 23) + X, 2 * N, 0),
    ],
)
def test_bytes(call: Callable[[], Any], activations: float, weights: float) -> None:
    with Traffic(5) as counted:
        call()
    assert {**counted.bytes} == {part: n for part, n in zip(PARTS, (activations, weights), strict=True) if n}


def test_the_table_is_in_the_docs(repository: Path) -> None:
    kept = json.loads(traffic.KEPT.read_text(encoding="utf-8"))["steps"]
    page = (repository / "docs/benchmarks.md").read_text(encoding="utf-8")
    assert list(kept) == list(STEPS)
    assert all(list(rows) == list(ROWS) for rows in kept.values())
    for line in table(kept):
        assert line in page


def test_the_weights_are_the_same_whatever_the_batch() -> None:
    kept = json.loads(traffic.KEPT.read_text(encoding="utf-8"))["steps"]
    small, large = kept.values()
    for row in ("batchnorm", "plain"):
        assert small[row]["weights"] == large[row]["weights"]
        assert large[row]["activations"] / small[row]["activations"] == pytest.approx(8 * 1.4**2, rel=0.02)
