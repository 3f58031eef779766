"""The measurement of benchmarks/trend.py, and that docs/benchmarks.md has what it found."""

from __future__ import annotations

import itertools
import json
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

import normswap
from benchmarks import trend
from benchmarks.training_quality import Images
from fixtures.nets import randomise

F64 = torch.float64
CLOSE = {"rtol": 0.0, "atol": 2e-12}  # TINY, the eps, leaves TINY / variance of the part along z: 1.7e-12 here


def made() -> tuple[nn.Module, Images]:
    torch.manual_seed(0)
    widths = (2, 5, 7)
    net = nn.Sequential(*(layer for i, o in itertools.pairwise(widths) for layer in (nn.Conv2d(i, o, 3), nn.BatchNorm2d(o), nn.ReLU())))
    net = nn.Sequential(*net, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(7, 10)).to(F64)
    x = torch.randn(12, 2, 8, 9, dtype=F64)
    model = normswap.convert(randomise(net, 0).eval(), x, calibration=[x]).model.train()
    return model, Images(x, torch.randint(10, (12,)))


def test_the_terms_of_a_batch_as_its_trend_give_its_exact_gradient() -> None:
    model, images = made()
    by, terms = trend.exact(model, images)
    trend.set_trends(model, terms)
    for found, expected in zip(trend.gradients(model, images), by, strict=True):
        torch.testing.assert_close(found, expected, **CLOSE)


def test_another_trend_gives_another_gradient() -> None:
    model, images = made()
    by, terms = trend.exact(model, images)
    trend.set_trends(model, [0.9 * term for term in terms])
    assert max(float((f - e).norm() / e.norm()) for f, e in zip(trend.gradients(model, images), by, strict=True)) > 0.01


def test_the_exact_gradient_is_that_of_batch_norm_where_the_statistics_fit() -> None:
    model, images = made()
    layers = trend.norms(model)
    seen: dict[nn.Module, torch.Tensor] = {}
    for layer in layers:  # one after the other, as each changes the inputs of the next
        hook = layer.register_forward_pre_hook(lambda module, args: seen.update({module: args[0].detach()}))
        model(images.x)
        hook.remove()
        layer.set_statistics(seen[layer].mean((0, 2, 3)), (seen[layer].var((0, 2, 3), unbiased=False)).sqrt())
    by, _ = trend.exact(model, images)
    norm = nn.Sequential(*(nn.BatchNorm2d(m.num_features, eps=trend.TINY).to(F64) if m in layers else m for m in model.children()))  # type: ignore[attr-defined]
    for layer, other in zip(layers, (m for m in norm if isinstance(m, nn.BatchNorm2d)), strict=True):
        other.load_state_dict({"weight": layer.get_parameter("weight"), "bias": layer.get_parameter("bias")}, strict=False)
    for layer in layers:
        layer.decouple()
    for found, expected in zip(trend.gradients(norm, images), by, strict=True):
        torch.testing.assert_close(found, expected, **CLOSE)


def test_the_docs_have_what_was_measured(repository: Path) -> None:
    found: list[dict[str, Any]] = json.loads((repository / "benchmarks/results/trend.json").read_text())["found"]
    page = (repository / "docs/benchmarks.md").read_text()
    for entry in found:
        for line in trend.table(entry):
            assert line in page


@pytest.mark.parametrize("what", ["length", "direction", "signal"])
def test_a_table_has_medians_of_the_stages(what: str) -> None:
    row: dict[str, list[float]] = {name: [0.0] * 21 for name in ("length", "direction", "signal")}
    row[what] = [1.0] * 7 + [2.0] * 7 + [4.0] * 7
    cells = trend.table({"steps": 3, "rows": {"none": row}})[-1].split(" | ")
    place = 1 + 3 * ["length", "direction", "signal"].index(what)
    assert [cell.rstrip(" |") for cell in cells[place : place + 3]] == ["2.00", "1.00", "4.00"]
