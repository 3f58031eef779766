"""The study of benchmarks/real_finetune.py: its images, its starting points, the runs that it asks for, and its table in the docs."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

pytest.importorskip("sklearn")
pytest.importorskip("efficientnet_lite_pytorch")

from benchmarks import real_finetune
from benchmarks.real_files import efficientnet_lite0
from benchmarks.real_finetune import ROWS, TODAY, best, missing, table
from benchmarks.training_quality import Images, Split
from normswap.layer.batchless_norm import BatchlessNorm

ROW = "BatchNorm, batch 2"
GRID = [ROWS[ROW].first * 2**k for k in range(5)]


# --- data --------------------------------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def images() -> Split:
    return real_finetune.data(0)


def test_every_digit_is_used_once() -> None:
    train, validation, test = real_finetune.parts(0)
    assert torch.cat([train, validation, test]).sort().values.tolist() == list(range(1797))
    assert (len(train), len(validation), len(test)) == (1000, 297, 500)


def test_the_images_are_those_of_the_seed(images: Split) -> None:
    again, other = real_finetune.data(0), real_finetune.data(1)
    for part, same, different in zip(images, again, other, strict=True):
        assert torch.equal(part.x, same.x)
        assert torch.equal(part.y, same.y)
        assert not torch.equal(part.x, different.x)
        assert not torch.equal(part.y, different.y)


def test_the_images_are_what_the_network_reads(images: Split) -> None:
    for part in images:
        assert part.x.shape == (len(part.y), 3, 64, 64)
        assert -1 <= part.x.min() < -0.9
        assert 0.9 < part.x.max() <= 1.01
        assert set(part.y.tolist()) == set(range(10))


def drawn(photograph: Tensor, digit: Tensor, seed: int = 0) -> Tensor:
    return real_finetune._drawn(photograph, digit, torch.Generator().manual_seed(seed))


@pytest.mark.parametrize("level", [20.0, 200.0])
def test_a_digit_covers_its_place_alone(level: float) -> None:
    photograph = torch.full((3, 64, 64), level)
    places = []
    for seed in range(20):
        changed = (drawn(photograph, torch.ones(8, 8), seed) != photograph).all(0)
        rows, columns = changed.any(1).nonzero(), changed.any(0).nonzero()
        side = len(rows)
        assert side == len(columns)
        assert int(changed.sum()) == side * side  # a square, all of it
        assert 40 <= side <= 64
        places.append((int(rows[0]), int(columns[0]), side))
    assert len({place[:2] for place in places}) > 10
    assert len({place[2] for place in places}) > 10


def test_what_is_no_ink_leaves_the_photograph() -> None:
    photograph = 255 * torch.rand(3, 64, 64)
    before = photograph.clone()
    assert torch.equal(drawn(photograph, torch.zeros(8, 8)), before)
    drawn(photograph, torch.ones(8, 8))
    assert torch.equal(photograph, before)  # it is drawn on a copy


@pytest.mark.parametrize(("level", "sign"), [(20.0, 1), (200.0, -1)])
def test_the_colour_can_be_seen(level: float, sign: int) -> None:
    photograph = torch.full((3, 64, 64), level)
    for seed in range(20):
        change = drawn(photograph, torch.ones(8, 8), seed) - photograph
        assert (sign * change[change != 0] > 100).all()


# --- rows --------------------------------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def start(images: Split) -> Tensor:
    return images.train.x[:32]


def test_only_the_last_layer_and_the_statistics_are_new(start: Tensor) -> None:
    found, again = (real_finetune.pretrained(0, start).state_dict() for _ in range(2))
    shipped = efficientnet_lite0()[0].state_dict()
    new = {name for name, value in shipped.items() if found[name].shape != value.shape or not torch.equal(found[name], value)}
    statistics = {name for name in shipped if name.endswith(("running_mean", "running_var", "num_batches_tracked"))}
    assert new == {"_fc.weight", "_fc.bias", *statistics}
    assert all(torch.equal(value, again[name]) for name, value in found.items())


def test_the_statistics_are_those_of_the_first_images(start: Tensor) -> None:
    model: Any = real_finetune.pretrained(0, start)
    norm, seen = model._blocks[2]._bn1, []
    norm.register_forward_pre_hook(lambda module, inputs: seen.append(inputs[0]))
    with torch.no_grad():
        model(start)
    x = seen[0].transpose(0, 1).flatten(1)
    torch.testing.assert_close(norm.running_mean, x.mean(1), rtol=0.01, atol=0.01)
    torch.testing.assert_close(norm.running_var, x.var(1), rtol=0.01, atol=0.01)
    shipped: Any = efficientnet_lite0()[0]
    assert not torch.allclose(shipped._blocks[2]._bn1.running_mean, x.mean(1), rtol=0.05, atol=0.05)
    assert {m.momentum for m in model.modules() if isinstance(m, nn.BatchNorm2d)} == {0.1}


@pytest.mark.parametrize("row", {spec.make: row for row, spec in ROWS.items() if row in TODAY}.values())
def test_what_the_rows_start_from(row: str, start: Tensor) -> None:
    expected = real_finetune.pretrained(0, start)
    model = ROWS[row].make(real_finetune.pretrained(0, start), start).train()
    kinds = (BatchlessNorm, nn.GroupNorm, nn.BatchNorm2d)
    norms = [module for module in model.modules() if isinstance(module, kinds)]
    assert len(norms) == 49
    (kind,) = {next(kind for kind in kinds if isinstance(norm, kind)) for norm in norms}
    assert kind is {"normswap": BatchlessNorm, "GroupNorm": nn.GroupNorm}.get(row.split(",")[0], nn.BatchNorm2d)
    assert {norm.training for norm in norms} == {not row.startswith("frozen")}
    with torch.no_grad():
        close = torch.allclose(model.eval()(start[:3]), expected(start[:3]), rtol=1e-3, atol=1e-3)
    assert close == (kind is not nn.GroupNorm)


def test_a_run_sees_every_image_twice(images: Split, monkeypatch: pytest.MonkeyPatch) -> None:
    few = Split(*(Images(part.x[:n], part.y[:n]) for part, n in zip(images, (8, 5, 7), strict=True)))
    monkeypatch.setattr(real_finetune, "data", lambda seed: few)
    entry = real_finetune.run(ROW, 0.001, 0)
    assert (entry["row"], entry["rate"], entry["seed"], entry["steps"]) == (ROW, 0.001, 0, 8)
    assert entry["validation"] in [round(n / 5, 4) for n in range(6)]
    assert entry["test"] in [round(n / 7, 4) for n in range(8)]
    assert entry["ms"] > 0


# --- which runs, and the table -----------------------------------------------------------------------------------------------------------


def entry(rate: float, validation: float, seed: int = 0, test: float = 0.5, loss: float = 1.0, row: str = ROW) -> dict[str, Any]:
    return {"row": row, "rate": rate, "seed": seed, "validation": validation, "test": test, "loss": loss, "steps": 9, "ms": 10.0 + seed}


def whole(*validations: float) -> list[dict[str, Any]]:
    return [entry(rate, validation) for rate, validation in zip(GRID, validations, strict=True)]


def test_the_grid_comes_first() -> None:
    assert list(missing([], ROW)) == [(rate, 0) for rate in GRID]
    there = [entry(GRID[0], 0.9), entry(GRID[1], 0.1, seed=1), entry(GRID[2], 0.9, row="GroupNorm, batch 2")]
    assert list(missing(there, ROW)) == [(rate, 0) for rate in GRID[1:]]


def test_the_grid_goes_on_while_the_best_is_at_its_edge() -> None:
    assert list(missing(whole(0.9, 0.8, 0.7, 0.6, 0.5), ROW)) == [(GRID[0] / 2, 0)]
    assert list(missing(whole(0.1, 0.2, 0.3, 0.4, 0.5), ROW)) == [(GRID[-1] * 2, 0)]
    assert list(missing([*whole(0.9, 0.8, 0.7, 0.6, 0.5), entry(GRID[0] / 2, 0.95)], ROW)) == [(GRID[0] / 4, 0)]
    assert list(missing([*whole(0.9, 0.8, 0.7, 0.6, 0.5), entry(GRID[0] / 2, 0.85)], ROW)) == [(GRID[0], 1), (GRID[0], 2)]


def test_then_the_other_seeds_and_then_nothing() -> None:
    grid = whole(0.1, 0.2, 0.3, 0.2, 0.1)
    assert list(missing(grid, ROW)) == [(GRID[2], 1), (GRID[2], 2)]
    assert list(missing([*grid, entry(GRID[2], 0, seed=2)], ROW)) == [(GRID[2], 1)]
    assert list(missing([*grid, entry(GRID[2], 0, seed=2), entry(GRID[2], 0, seed=1)], ROW)) == []


def test_validation_with_seed_0_chooses() -> None:
    assert best([], ROW) is None
    assert best([entry(1, 0.3, test=0.9), entry(2, 0.4, test=0.1), entry(3, 0.9, seed=1)], ROW) == 2
    tied = [entry(1, 0.4, loss=0.5), entry(2, 0.4, loss=0.4), entry(3, 0.4, loss=0.6), entry(4, 0.4, loss=float("nan"))]
    assert best(tied, ROW) == 2
    assert best(tied, "GroupNorm, batch 2") is None


def test_a_row_of_the_table() -> None:
    chosen = [entry(GRID[2], 0.3, seed, test) for seed, test in enumerate((0.5, 0.6, 0.7))]
    head = ["| | test accuracy, % | seeds | learning rate | ms per sample |", "|---|--:|--:|--:|--:|"]
    entries = [*whole(0.1, 0.2, 0.3, 0.2, 0.1), *chosen[1:], entry(GRID[1], 0.9, seed=1)]
    assert table(entries).splitlines() == [*head, f"| {ROW} | 60.0 ± 5.8 | 3 | {GRID[2]:g} | 11.0 |"]
    assert table([entry(0.5, 0.3, test=0.7)]).splitlines() == [*head, f"| {ROW} | 70.0 | 1 | 0.5 | 10.0 |"]
    assert table([]).splitlines() == head


def test_the_table_of_the_docs_is_that_of_the_runs(repository: Path) -> None:
    if not real_finetune.KEPT.exists():
        pytest.skip("not run whole yet")
    entries = [json.loads(line) for line in real_finetune.KEPT.read_text(encoding="utf-8").splitlines()]
    assert table(entries) in (repository / "docs/benchmarks.md").read_text(encoding="utf-8")
    assert {row: list(missing(entries, row)) for row in TODAY} == {row: [] for row in TODAY}
    keys = [tuple(entry[key] for key in real_finetune.KEYS) for entry in entries]
    assert len(set(keys)) == len(keys)
