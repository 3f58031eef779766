"""The count of bytes in benchmarks/memory.py, and that docs/benchmarks.md has what it counted."""

from __future__ import annotations

import copy
import json
from pathlib import Path

import pytest
import torch
from torch import nn
from torch.nn import functional as F

import normswap
from benchmarks import memory
from benchmarks.memory import LIMIT, NETS, ROWS, Live, Step, check_table, largest, table
from benchmarks.training_cost import FAKE, without_content
from normswap.layer.batchless_norm import BatchlessNorm
from normswap.training.micro import kept_for_backward


def test_what_lives_is_counted_while_it_lives() -> None:
    x = torch.ones(3, 5)
    with Live(x) as live:
        assert live.bytes == 60
        y = x + 1  # 60 more
        z = (y * 2).view(15)[2:]  # and 60; a view takes nothing
        y.add_(1)
        assert live.bytes == live.peak == 180
        del y
        assert live.bytes == 120
        w = torch.cat([z, z])  # 2 x 13 numbers
        del z
        assert (live.bytes, live.peak) == (60 + 104, 60 + 60 + 104)
        del w
    assert live.bytes == 60


def test_backward_is_counted() -> None:
    weight, x = nn.Parameter(torch.ones(7, 3)), torch.ones(5, 3)
    with Live(weight, x) as live:
        loss = (x @ weight.t()).square().sum()
        loss.backward()  # type: ignore[no-untyped-call]
        del loss
        assert live.bytes == 4 * (21 + 15 + 21)
    # x W, its square, the loss and its gradient, and one of the two in backward
    assert live.peak >= 4 * (21 + 15 + 35 + 35)


def net() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(
        *(nn.Conv2d(3, 11, 3, padding=1), nn.BatchNorm2d(11), nn.ReLU(inplace=True), nn.MaxPool2d(2)),
        *(nn.Conv2d(11, 13, 3, stride=2), nn.BatchNorm2d(13), nn.ReLU(inplace=True), nn.Conv2d(13, 2, 1)),
    )


def model_of(row: str) -> nn.Module:
    model = net().eval()
    if row == "BatchNorm":
        return model
    model = normswap.convert(model, torch.randn(2, 3, 16, 16)).model
    for layer in model.modules():
        if isinstance(layer, BatchlessNorm):
            layer.limits_samples = False  # which asks real tensors whether it has anything to do
    return model


@pytest.mark.parametrize("row", ROWS)
def test_tensors_without_content_give_the_peak_of_real_ones(row: str) -> None:
    model, one = model_of(row), row == "one at a time"
    fake = without_content(copy.deepcopy(model))
    counted = Step(model, torch.randn(6, 3, 20, 28), one_at_a_time=one).peak()
    with FAKE:
        assert Step(fake, torch.empty(6, 3, 20, 28), one_at_a_time=one).peak() == counted
    assert counted > 3 * sum(p.nbytes for p in model.parameters() if p.dim() > 1)


def test_a_peak_holds_what_is_kept_for_backward() -> None:
    """The two counters agree, without the rows that are prepared for the passes, which lived before."""
    model, x = model_of("converted").train(), torch.randn(5, 3, 20, 28)
    model(x)
    prepared = [layer.run.prepared for layer in model.modules() if isinstance(layer, BatchlessNorm)]
    rows = [t for each in prepared for t in (*each.forward, *each.backward)]
    own = (*model.parameters(), *model.buffers(), *rows, x)
    with Live(*own) as live, kept_for_backward(own) as kept:
        before = live.bytes
        loss = F.cross_entropy(model(x), torch.zeros(5, 4, 6, dtype=torch.int64))
        lives = live.bytes - before
    assert abs(lives - sum(kept.values())) <= 8  # the loss, and a number beside it
    loss.backward()  # type: ignore[no-untyped-call]


@pytest.mark.parametrize("found", [0, 1, 6, 7, 8, 13, 14, 15, 100, 12345])
@pytest.mark.parametrize("power", [1, 2, 3])
def test_the_largest(found: int, power: int) -> None:
    """Of peaks that grow as the power, a little above it, a little below it, and with a step."""
    for bend in (1.0, 1.02, 0.98, 0.0):
        asked: list[int] = []

        def peak_of(n: int, bend: float = bend, asked: list[int] = asked) -> int:
            asked.append(n)
            beyond = n > found
            return 1001 * beyond + 7 * n**power if bend == 0 else int(1000 * (n / (found + 0.5)) ** (power * bend)) + beyond

        limit = 1000 + 7 * found**power if bend == 0 else 1000
        assert largest(peak_of, 7, power, limit) == found
        assert len(asked) < 30
        assert {found + 1, *([found] if found else [])} <= {*asked}


def test_lines_are_found_at_once() -> None:
    asked: list[int] = []

    def peak_of(n: int) -> int:
        asked.append(n)
        return 5000 + 17 * n**2

    assert largest(peak_of, 10, 2, 5000 + 17 * 371**2 + 3) == 371
    assert len(asked) <= 5


def test_more_samples_one_at_a_time_take_their_own_bytes(monkeypatch: pytest.MonkeyPatch) -> None:
    """`peak` counts two and three of them. Nine, which it says from these, are counted here."""
    spec = memory.Net(net, 3, 2, 20, 4, 16, 6)
    monkeypatch.setitem(memory.NETS, "small", spec)
    said, alone = (memory.peak("small", "one at a time", n, 20) for n in (9, 1))
    fake = without_content(memory.made("small", "one at a time"))
    with FAKE:
        assert Step(fake, torch.empty(9, 3, 20, 20), one_at_a_time=True).peak() == said
        assert Step(fake, torch.empty(1, 3, 20, 20), one_at_a_time=True).peak() == alone
    assert said < memory.peak("small", "converted", 9, 20) < memory.peak("small", "BatchNorm", 9, 20)


def test_the_tables_are_in_the_docs(repository: Path) -> None:
    kept = json.loads(memory.KEPT.read_text(encoding="utf-8"))
    page = (repository / "docs/benchmarks.md").read_text(encoding="utf-8")
    assert list(kept["nets"]) == list(NETS)
    assert kept["limit"] == LIMIT
    for line in [*table(kept["nets"]), *check_table(kept["check"])]:
        assert line in page


def test_what_the_docs_say_of_it() -> None:
    kept = json.loads(memory.KEPT.read_text(encoding="utf-8"))
    for rows in kept["nets"].values():
        batches = [rows[row]["batch"] for row in ROWS]
        assert batches == sorted(batches)
        assert rows["converted"]["peak"] < rows["BatchNorm"]["peak"]
    for ways in kept["check"].values():
        assert ways["counted"] <= ways["without content"] < 1.1 * ways["counted"]
        assert 1 < ways["process"] / ways["counted"] < 1.25
