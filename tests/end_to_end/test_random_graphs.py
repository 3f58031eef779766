"""Random networks: every norm is in the plan, with its calls, and every BatchNorm swap is exact. fixtures/random_graphs.py makes them.

30 here, the same ones every time, and 100 with `-m slow`; 2,000 in `python -m benchmarks.random_graphs`, whose last result is
results/random_graphs.json.
"""

from __future__ import annotations

import json
import random
import warnings
from collections import Counter
from typing import Any

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from torch import nn

import fixtures.random_graphs as generator
import normswap
from benchmarks import random_graphs
from benchmarks.random_graphs import RAW, check, numbered, summary
from fixtures.random_graphs import DECOYS, FORMS, Expected, RandomGraph, generate
from normswap.layer import formulas
from normswap.swap import apply


def findings(graph: RandomGraph) -> list[str]:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # torch.export's own
        return check(graph).findings


SAME = settings(derandomize=True, deadline=None, database=None, suppress_health_check=list(HealthCheck))


@settings(SAME, max_examples=30)
@given(st.randoms(use_true_random=False))
def test_plans_are_complete_and_batch_norms_exact(r: random.Random) -> None:
    graph = generate(r)
    assert findings(graph) == [], repr(graph)


@pytest.mark.slow
@settings(SAME, max_examples=100)
@given(st.randoms(use_true_random=False))
def test_more_plans_are_complete_and_batch_norms_exact(r: random.Random) -> None:
    graph = generate(r)
    assert findings(graph) == [], repr(graph)


# -- what the generator makes --------------------------------------------------------------------------------------------------------------

SAMPLE = [numbered(0, number) for number in range(400)]


def test_every_form_and_mode_is_generated() -> None:
    source = "".join(graph.source for graph in SAMPLE)
    assert {graph.mode for graph in SAMPLE} == set(generator.MODES)
    for form in FORMS:  # up to the first of the names that are filled in
        written = form.init.split("nn.")[-1] if form.module else form.call
        assert written.split("{")[0].strip() in source, form
    for decoy in DECOYS:
        assert decoy.split("{x}")[-1] in source
    expected = sum((graph.expected for graph in SAMPLE), Counter[Expected]())
    assert {site.calls for site in expected} >= {0, 1, 2, 3}
    assert {site.aliases for site in expected} >= {0, 1}
    assert {site.verdict for site in expected} == {"exact", "approximate", "kept"}
    assert any("+=" in graph.source for graph in SAMPLE)


def test_a_graph_is_the_same_every_time() -> None:
    graph = numbered(0, 5)
    assert graph == numbered(0, 5)
    assert graph != numbered(1, 5)
    a, b = graph.make(), graph.make()
    assert all(torch.equal(x, y) for x, y in zip(a.state_dict().values(), b.state_dict().values(), strict=True))


@pytest.mark.parametrize("decoy", DECOYS)
def test_what_only_looks_like_a_norm_is_not_expected(decoy: str) -> None:
    """And a plan that had it would be one too long."""
    source = f"class Net(nn.Module):\n    def forward(self, v0):\n        return {decoy.replace('{x}', 'v0')}\n"
    graph = RandomGraph("user", source, (3, 7, 4), Counter())
    assert findings(graph) == []
    wrong = RandomGraph("user", source, (3, 7, 4), Counter({Expected("", "layer_norm", "approximate", 1, 0): 1}))
    assert findings(wrong)[0] == f"missing from the plan: 1 x {Expected('', 'layer_norm', 'approximate', 1, 0)}"


# -- what the check must notice ------------------------------------------------------------------------------------------------------------


def of(*init: str, forward: str, expected: Counter[Expected], mode: generator.Mode = "user") -> RandomGraph:
    lines = "".join(f"        {line}\n" for line in ("super().__init__()", *init))
    source = f"class Net(nn.Module):\n    def __init__(self):\n{lines}\n    def forward(self, v0):\n        {forward}\n"
    return RandomGraph(mode, source, (3, 6, 5, 4), expected)


ONE = Counter({Expected("norm", "batch_norm", "exact", 1, 0): 1})
SMALL_EPS = of("self.norm = nn.BatchNorm2d(6, eps=1e-3)", forward="return self.norm(v0)", expected=ONE)


def test_a_plain_batch_norm_has_no_findings() -> None:
    assert findings(SMALL_EPS) == []


def test_a_lost_eps_is_noticed(monkeypatch: pytest.MonkeyPatch) -> None:
    original = formulas.std_of_variance
    monkeypatch.setattr(formulas, "std_of_variance", lambda var, eps: original(var, 0.0))
    found = findings(SMALL_EPS)
    assert found[0].startswith("parity: Difference(name='norm'")
    assert found[1].startswith("output 0 is ")


def test_a_rounding_error_in_float64_is_noticed(monkeypatch: pytest.MonkeyPatch) -> None:
    original = formulas.std_of_variance
    monkeypatch.setattr(formulas, "std_of_variance", lambda var, eps: original(var, eps).float().double())
    parity, found = findings(SMALL_EPS)
    assert parity.startswith("parity: ")  # in float64, where `convert` decides; the limits in float32 let it pass
    assert found.startswith("output 0 is ")


def test_a_wrong_number_of_calls_is_noticed() -> None:
    graph = of("self.norm = nn.BatchNorm2d(6)", forward="return self.norm(torch.relu(self.norm(v0)))", expected=ONE)
    assert findings(graph) == [
        f"missing from the plan: 1 x {Expected('norm', 'batch_norm', 'exact', 1, 0)}",
        f"too much in the plan: 1 x {Expected('norm', 'batch_norm', 'exact', 2, 0)}",
    ]


def test_an_original_that_changes_is_noticed(monkeypatch: pytest.MonkeyPatch) -> None:
    def spoil(model: nn.Module, *args: Any, **kwargs: Any) -> nn.Module:
        with torch.no_grad():
            next(model.parameters()).add_(1.0)
        return apply.swap(model, *args, **kwargs)

    monkeypatch.setattr("normswap.api.convert.swap", spoil)
    assert "the original's tensors changed" in findings(SMALL_EPS)


def test_a_graph_that_raises_is_a_finding() -> None:
    graph = of("self.norm = nn.BatchNorm2d(7)", forward="return self.norm(v0)", expected=ONE)
    (found,) = findings(graph)
    assert found.startswith("RuntimeError at ")


def test_a_model_beyond_float32_is_said_to_be_and_held_to_float64() -> None:
    """Instance norm of a constant and a little: rounding becomes 1e-4 of the output in the original already."""
    graph = of(
        "self.norm = nn.BatchNorm2d(6)",
        forward="return F.instance_norm(self.norm(v0) * 1e-3 + 100.0, eps=1e-12)",
        expected=ONE + Counter({Expected("", "instance_norm", "approximate", 1, 0): 1}),
    )
    outcome = check(graph)
    assert outcome.ill_conditioned
    assert not check(SMALL_EPS).ill_conditioned


# -- what was found ------------------------------------------------------------------------------------------------------------------------


def test_a_model_that_writes_into_its_inputs_does_not_write_into_the_callers() -> None:
    """In eval mode dropout gives back its input, so that the next operation may overwrite it. No graph can be had of the model."""

    class Writes(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.norm, self.linear = nn.BatchNorm1d(6), nn.LayerNorm(6)

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            x = x.mul_(0.5) if float(x.detach().abs().max()) > 0 else x
            return self.linear(self.norm(x))  # type: ignore[no-any-return]

    x, batches = torch.randn(5, 6), [torch.randn(16, 6), torch.randn(9, 6)]
    kept, kept_batches = x.clone(), [batch.clone() for batch in batches]
    model = Writes().eval()
    assert normswap.plan(model, x).backend == "walk"
    assert torch.equal(x, kept)
    conversion = normswap.convert(model, x, calibration=batches, approximate=True)
    assert torch.equal(x, kept)
    assert all(torch.equal(a, b) for a, b in zip(batches, kept_batches, strict=True))
    halves = torch.cat(kept_batches) * 0.5
    fed = model.norm(halves)
    torch.testing.assert_close(conversion.model.linear.mean.detach(), fed.mean(0).detach(), rtol=1e-4, atol=1e-5)


# -- what is committed ---------------------------------------------------------------------------------------------------------------------


def test_the_committed_result_is_clean() -> None:
    committed = json.loads(RAW.read_text())
    assert committed["findings"] == []
    assert committed["clean"] == committed["graphs"]
    assert random_graphs.line(committed) in random_graphs.PAGE.read_text()


def test_the_summary_counts() -> None:
    records = [random_graphs.measure(0, number) for number in (1, 2)]
    records[1]["findings"] = ["something"]
    found = summary(records)
    assert (found["graphs"], found["clean"], found["findings"]) == (2, 1, [{"number": 2, "findings": ["something"]}])
    assert sum(found["norms"].values()) == sum(numbered(0, 1).expected.values()) + sum(numbered(0, 2).expected.values())
