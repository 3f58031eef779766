"""A few models of timm and transformers, one for each flavour of norm, measured as the sweep of benchmarks/libraries.py measures all.

The sweep's last results are committed: benchmarks/results/coverage_{timm,transformers}.json, and docs/coverage.md with the tables.
"""

from __future__ import annotations

import json
import warnings
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import normswap
from benchmarks import libraries
from benchmarks.libraries import Case, Suite
from normswap.detect.sites import Plan
from normswap.layer.formulas import std_of_variance
from normswap.rules import batch_norm

SUITES = {library: Suite(library) for library in libraries.LIBRARIES}

# family -> norms swapped exactly, swapped approximately, kept
SELECTED: dict[tuple[str, str], tuple[int, int, int]] = {
    ("timm", "resnet/resnet10t"): (14, 0, 0),  # BatchNorm2d
    ("timm", "levit/levit"): (52, 0, 0),  # BatchNorm1d over tokens
    ("timm", "sknet/skresnet34"): (68, 0, 0),  # BatchNormAct2d
    ("timm", "vision_transformer/test"): (0, 13, 0),  # LayerNorm, no graph
    ("timm", "byobnet/gcresnext26ts"): (31, 8, 0),  # LayerNorm2d on one pixel
    ("timm", "convnext/convnext"): (0, 15, 0),  # SimpleNorm2d
    ("timm", "cpubone/cpubone"): (19, 7, 0),  # GroupNorm1
    ("timm", "convnext/convnextv2"): (0, 17, 12),  # GlobalResponseNorm stays
    ("transformers", "Bert"): (0, 5, 0),
    ("transformers", "Cohere"): (0, 7, 0),  # a weight for each head and channel
    ("transformers", "Detr"): (17, 11, 0),  # frozen BatchNorm of its own
    ("transformers", "T5"): (0, 12, 0),  # encoder and decoder
    ("transformers", "Wav2Vec2"): (0, 7, 0),  # GroupNorm over time
}

# What others stand for: torchvision's resnet18 for BatchNorm2d, `gcresnext26ts` for BatchNormAct2d, `Bert` for LayerNorm, and the tests of
# the rules for BatchNorm1d over tokens and for what stays.
SLOW = {"resnet/resnet10t", "levit/levit", "sknet/skresnet34", "vision_transformer/test", "convnext/convnextv2"}


def case(library: str, family: str) -> Case:
    return next(case for case in SUITES[library].cases if case.family == family)


@pytest.mark.filterwarnings("default")  # of the libraries
@pytest.mark.parametrize(("library", "family"), [pytest.param(*name, marks=[pytest.mark.slow] * (name[1] in SLOW)) for name in SELECTED])
def test_model_converts_whole(library: str, family: str) -> None:
    record = libraries.measure(case(library, family))
    assert record["findings"] == []
    assert record["parity"]["passed"]
    assert (record["exact"], record["approximate"], sum(record["skipped"].values())) == SELECTED[library, family]
    assert record["batch norms"] <= record["exact"]


# -- what the sweep must notice -------------------------------------------------------------------------------------------------------


class ByHand(nn.Module):
    """Nothing that normswap looks for: a root of a sum, and of no mean."""

    def forward(self, x: Tensor) -> Tensor:
        return x * torch.rsqrt(x.square().sum(-1, keepdim=True) + 1e-6)


class FunctionalNorm(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return torch.nn.functional.layer_norm(x, x.shape[-1:])


def of(*layers: nn.Module) -> Case:
    return Case("family", "model", lambda: (nn.Sequential(nn.Linear(6, 8), *layers), (torch.randn(2, 5, 6),)))


def findings_of(*layers: nn.Module) -> str:
    return "; ".join(libraries.measure(of(*layers))["findings"])


def test_a_clean_model_has_no_findings() -> None:
    assert findings_of(nn.LayerNorm(8), nn.ReLU()) == ""


def test_a_hand_written_norm_is_noticed() -> None:
    assert findings_of(ByHand()) == "hand-written? {'ByHand: rsqrt.default': 1}"


def test_a_norm_of_unknown_kind_is_noticed() -> None:
    class OddNorm(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            return x.sin()

    assert findings_of(OddNorm()).startswith("of unknown kind: OddNorm: ")


def test_norms_that_the_plan_lacks_are_noticed(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(libraries, "plan", lambda *args, **options: Plan((), (), "fx"))
    assert findings_of(nn.LayerNorm(8), FunctionalNorm()).startswith(
        "2 norms are not in the plan, 1 the first: LayerNorm; "
        "a forward pass runs the kernels {'layer': 2} outside of the planned layers, the plan has {}"
    )


def test_calls_that_the_plan_counts_wrongly_are_noticed(monkeypatch: pytest.MonkeyPatch) -> None:
    def twice(*args: Any, **options: Any) -> Plan:
        decided = normswap.plan(*args, **options)
        return replace(decided, swaps=tuple(replace(s, site=replace(s.site, calls=2)) for s in decided.swaps))

    monkeypatch.setattr(libraries, "plan", twice)
    assert findings_of(nn.LayerNorm(8)) == "1 norms are called another number of times, 1 1 and not 2"


def test_a_batch_norm_that_is_kept_is_noticed(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(libraries, "plan", lambda *args, **options: normswap.plan(*args, **options, exclude=["1"]))
    assert findings_of(nn.BatchNorm1d(5)).startswith("1 BatchNorms are not swapped exactly, 1 the first")


def test_what_is_wrong_with_calmed_weights_too_is_no_rounding(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(batch_norm.formulas, "std_of_variance", lambda var, eps: std_of_variance(var, eps * 1.001))
    found = findings_of(nn.BatchNorm1d(5, eps=1e-2))
    assert found.startswith("parity failed at 2 places, {'name': '1', ")
    assert found.endswith(" the first, and with calmed weights, too")


def test_norms_in_code_are_held_against_the_plan() -> None:
    assert findings_of(FunctionalNorm()) == ""


def test_a_crash_and_a_timeout_cost_one_row() -> None:
    def forever() -> tuple[nn.Module, tuple[Tensor]]:
        while True:
            pass

    def raises() -> tuple[nn.Module, tuple[Tensor]]:
        raise RuntimeError("no such model")

    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of fork in a process with threads
        assert libraries.isolated(Case("a", "b", forever), 1, 1)["findings"] == ["took more than 1 s"]
        assert libraries.isolated(Case("a", "b", raises), 1, 60)["findings"] == ["RuntimeError: no such model"]


def test_no_parameter_stays_constant() -> None:
    model, _ = of(nn.LayerNorm(8), nn.PReLU()).make()
    assert all(p.numel() == 1 or bool((p != p.reshape(-1)[0]).any()) for p in model.parameters())


# -- what is committed ----------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("library", SUITES)
def test_committed_table_is_that_of_the_committed_results(library: str) -> None:
    suite, page = SUITES[library], (libraries.ROOT / "docs/coverage.md").read_text()
    between = page.partition(suite.begin)[2].partition(suite.end)[0]
    assert between.strip() == libraries.table(json.loads(suite.raw.read_text())).strip()


@pytest.mark.parametrize("library", SUITES)
def test_committed_results_cover_every_family_and_are_clean(library: str) -> None:
    suite, raw = SUITES[library], json.loads(SUITES[library].raw.read_text())
    assert [r["family"] for r in raw["records"] if not r["clean"]] == []
    assert [r["family"] for r in raw["records"]] == [case.family for case in suite.cases]
    for record in raw["records"]:
        assert record["parity"]["passed"] or record["parity"]["rounding"]["calmed"]["passed"], record["family"]
        assert not record["approximate"] or record["fit"]["error"] is not None, record["family"]
