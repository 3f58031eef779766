"""The report says what the plan and the measurements say, as JSON, table and summary, and hides nothing."""

from __future__ import annotations

import dataclasses
import json
import math
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from reports import BAD, DEAD, FACTS, GOOD, HOSTILES, NAN, PLAN, RULE, difference, full, known, parity, rendered, swap
from torch import nn

from normswap.api.heal import Healing
from normswap.detect.sites import Plan, Site, Skip, Swap
from normswap.healing.state import Point
from normswap.parity.result import Parity
from normswap.report import advice
from normswap.report.conversion import Report, calibration_table, report_table
from normswap.report.page import html
from normswap.report.parity import parity_json, parity_table
from normswap.report.tables import Alarm

FAILED = "parity failed: {} normalization layers swapped, and the result is not the same function"


@pytest.mark.parametrize(
    ("plan", "parities", "status", "verdict"),
    [
        (PLAN, {"torch": GOOD}, "converted", "converted: 3 of 4 normalization layers swapped"),
        (PLAN, {}, "planned", "would swap 3 of 4 normalization layers"),
        (PLAN, {"torch": GOOD, "onnxruntime (all)": BAD}, "parity failed", FAILED.format("3 of 4")),
        (PLAN, {"torch": NAN}, "parity failed", FAILED.format("3 of 4")),
        (PLAN, {"torch": Parity(())}, "parity failed", FAILED.format("3 of 4")),
        (Plan((), PLAN.skips, "fx"), {"torch": GOOD}, "nothing to swap", "nothing to swap: 0 of 1 normalization layer can be"),
        (Plan((), (), "fx"), {}, "nothing to swap", "nothing to swap: the model has no normalization"),
        (Plan((), (), "fx"), {"torch": BAD}, "parity failed", FAILED.format("0 of 0")),
    ],
)
def test_status(plan: Plan, parities: dict[str, Parity], status: str, verdict: str) -> None:
    result = Report("model.pt", plan, parities)
    assert result.status == status
    assert result.summary().splitlines()[0] == verdict


def moved(error: float, limit: float = math.inf, **layer: float) -> Parity:
    """The drift of an approximate model whose outputs moved by `error`, and a layer by as much or as said."""
    site = difference("a.norm", layer.get("layer", error), tolerance=limit)
    return parity(difference("out", error, tolerance=limit), sites=(site,))


SWAPPED = "; 3 of 4 normalization layers swapped"
FAR = "approximate, and too far from the original: "


@pytest.mark.parametrize(
    ("drift", "status", "verdict"),
    [
        (moved(0.17), "converted", "approximate: outputs moved by 17%, not usable without healing" + SWAPPED),
        (moved(0.04), "converted", "approximate: outputs moved by 4%" + SWAPPED),
        (moved(0.04, 0.05), "converted", "approximate: outputs moved by 4%, 5% is allowed" + SWAPPED),
        (moved(0.08, 0.05), "parity failed", FAR + "outputs moved by 8%, 5% is allowed" + SWAPPED),
        (moved(0.04, 0.05, layer=0.3), "parity failed", FAR + "the layer a.norm moved by 30%, 5% is allowed" + SWAPPED),
        (moved(math.nan), "parity failed", FAR + "outputs became NaN or infinite, not usable" + SWAPPED),
        (parity(difference(problem="is missing")), "parity failed", FAR + "outputs: is missing" + SWAPPED),
        (parity(failure="the candidate raised"), "parity failed", "approximate, and not measured: the candidate raised" + SWAPPED),
        (Parity(()), "parity failed", "approximate, and not measured: nothing was compared" + SWAPPED),
    ],
)
def test_an_approximate_conversion_says_how_far_it_is_and_never_only_that_it_is_converted(drift: Parity, status: str, verdict: str) -> None:
    result = Report("model.pt", PLAN, {"torch": GOOD, "drift": drift})
    assert (result.status, result.json()["status"], result.verdict) == (status, status, verdict)
    assert "not the same function" not in result.summary()


def test_a_healed_conversion_is_judged_by_its_distance() -> None:
    points = tuple(
        Point(step, 640 * step, 30.0 * step, 0.5, distance, distance**2) for step, distance in ((0, 0.31), (7, 0.045), (9, 0.052))
    )
    healing: Healing[Any] = Healing(nn.Identity(), points, (0.9, 0.5, 0.8125), 2, 1, False, False)
    result = Report("model.pt", PLAN, {"torch": GOOD, "drift": moved(0.17)}, healing=healing)
    assert result.verdict == "approximate: outputs moved by 17%" + SWAPPED
    assert [line for line in result.summary().splitlines() if "healed" in line] == [
        "  healed: distance 3.1e-01 -> 4.5e-02 in 9 steps, 5760 tokens or samples, 4.5 minutes",
        "  healed: metric 0.5 -> 0.8125, of the original 0.9",
        "  healed: the data were used 3 times; fresh data are better, as what is repeated is learnt by heart",
        "  healed: the distance grew 1 time, and it went back to the best weights with half the learning rate",
    ]
    assert result.json()["healing"]["metric"] == {"original": 0.9, "before": 0.5, "after": 0.8125}
    assert "went from 3.1e-01 to 4.5e-02 of what the outputs vary by" in advice.basis(result)
    short = dataclasses.replace(healing, metric=None, epochs=0, rolled_back=0, ended=True)
    lines = Report("model.pt", PLAN, {"torch": GOOD, "drift": moved(0.17)}, healing=short).summary().splitlines()
    assert [line for line in lines if "healed" in line][1:] == ["  healed: the data ended before the budget"]


def test_where_the_exact_swaps_of_an_approximate_conversion_differ_that_is_what_failed() -> None:
    for drift in (moved(0.04), moved(0.08, 0.05)):
        assert Report("model.pt", PLAN, {"torch": BAD, "drift": drift}).verdict == FAILED.format("3 of 4")


def test_table_has_every_norm_and_the_worst_error_of_each() -> None:
    rows = rendered(report_table(Report("model.pt", PLAN, {"torch": GOOD, "onnxruntime (all)": BAD})))
    assert rows == [
        ["stem.norm", "BatchNorm2d", "swapped, exact", "1.0e-07"],
        ["body.norm (also body.again), called 2 times", "BatchNorm2d", "swapped, exact", "4.0e-03"],
        ["(the model)", "BatchNorm2d", "swapped, exact", "3.0e-07"],
        ["head.norm", "LayerNorm", "kept", "normalizes each sample by its own statistics"],
    ]


def test_an_approximate_swap_shows_its_drift_and_an_exact_one_its_error() -> None:
    """Any drift is allowed unless --max-drift says so; that must not make it the smallest error of all."""
    rough = Swap(Site("head.norm", (), None, 1), dataclasses.replace(RULE, kind="LayerNorm", inexact=lambda site: "because"))
    plan = Plan((*PLAN.swaps[:1], rough), (), "fx")
    sites = [(difference("stem.norm", 1e-7), difference("head.norm", 2e-7))]
    sites.append((difference("stem.norm", 0.125, tolerance=math.inf), difference("head.norm", 0.25, tolerance=math.inf)))
    exact, drift = (parity(difference(), sites=each) for each in sites)
    assert rendered(report_table(Report("model.pt", plan, {"torch": exact, "drift": drift}))) == [
        ["stem.norm", "BatchNorm2d", "swapped, exact", "1.0e-07"],
        ["head.norm", "LayerNorm", "swapped, approximate", "2.5e-01"],
    ]
    limited = parity(difference(), sites=(sites[1][0], difference("head.norm", 0.25, tolerance=0.1)))
    table = report_table(Report("model.pt", plan, {"torch": exact, "drift": limited}))
    assert [isinstance(row[-1], Alarm) for row in table.rows] == [False, True]
    assert rendered(report_table(Report("model.pt", plan, {"torch": exact})))[1][-1] == "2.0e-07"


def test_table_of_a_plan_promises_and_measures_nothing() -> None:
    rows = rendered(report_table(Report("model.pt", PLAN)))
    assert rows[0] == ["stem.norm", "BatchNorm2d", "would swap, exact"]


def test_table_of_an_inspection() -> None:
    rows = rendered(report_table(Report("model.pt", PLAN, facts=FACTS)))
    assert rows == [
        ["stem.norm", "BatchNorm2d", "2x5x7x6", "3", "0.125", "1e-05", "4 dead", "stem.conv", "would swap, exact"],
        [
            "body.norm (also body.again), called 2 times",
            *("BatchNorm2d", "2x5x7x6, 3x5x1x1", "0", "cumulative", "0.001", "1 zero", "none", "would swap, exact"),
        ],
        ["(the model)", "BatchNorm2d", "2x5", "1", "2 dead, 5 zero", "none", "would swap, exact"],
        ["head.norm", "LayerNorm", "unknown", "none", "kept, or approximate", "normalizes each sample by its own statistics"],
    ]


def test_a_column_that_says_nothing_is_left_out_and_a_reason_is_not_repeated() -> None:
    skips = tuple(Skip(Site(name, (), None, 1), "LayerNorm", reason) for name, reason in (("a", "one"), ("b", "one"), ("c", "two")))
    facts = [known(name, shapes=((2, 5),), eps=1e-5) for name in "abc"]
    table = report_table(Report("model.pt", Plan((), skips, "fx"), facts=facts))
    assert list(table.headers) == ["site", "kind", "input", "eps", "folds into", "what", "why not"]
    assert [row[-1] for row in rendered(table)] == ["one", "as above", "two"]


def test_summary_of_an_inspection_groups_what_is_the_same() -> None:
    assert Report("model.pt", PLAN, facts=FACTS).summary().splitlines() == [
        "would swap 3 of 4 normalization layers",
        "  paired: 1 of 3 with the conv or linear layer before them, to train with it",
        "  not paired: body.norm, (the model): it is called twice",
        "  with --approximate --data DATA: would swap 1 more, approximately",
        "  warning: stem.norm, body.norm, (the model) and 1 more: each is not finite",
        "  warning: body.norm is called twice",
        "  note: head.norm has an input of unknown shape: no inputs are known",
        "  note: one note",
    ]
    two = [known("a", DEAD), known("b", DEAD)]
    assert "  warning: a, b: each is not finite" in Report("model.pt", PLAN, facts=two).summary().splitlines()


@pytest.mark.parametrize(("name", "shown"), HOSTILES.items())
def test_names_are_not_markup_and_move_no_cursor(name: str, shown: str) -> None:
    plan = Plan((swap(name),), (), "fx", (name,))
    result = Report("model.pt", plan, {name: parity(difference(name, problem=name))}, {name: name})
    assert rendered(report_table(result))[0][0] == shown
    assert result.summary().count(shown) >= 6  # one more is the repr of an output's name
    assert all(character.isprintable() or character == "\n" for character in result.summary())


def test_a_name_with_two_lines_is_on_one() -> None:
    result = Report("model.pt", Plan((swap("a\nb"),), (), "fx", ("a\nb",)), {"a\nb": BAD})
    assert rendered(report_table(result))[0][0] == "a\\nb"
    assert [line[:8] for line in result.summary().splitlines()] == ["parity f", "  a\\nb: ", "  note: "]
    assert rendered(parity_table(parity(difference("a\nb"))))[0][0] == "output a\\nb"


def test_table_of_the_calibration() -> None:
    rows = rendered(calibration_table(full()))
    assert rows == [
        ["body.norm", "fitted", "6.2e-01", "64", "0 of 5", "41.5", "7.2", "its output is 62% away; its statistics rest on 64 values"],
        ["stem.norm", "re-estimated", "3.0e-08", "9000", "1 of 4", "2.9"],
        ["(the model)", "adapted", "keeps its statistics: no forward pass on the data reaches it"],
    ]
    assert calibration_table(full()).headers[-1] == "remarks"


def test_no_calibration_no_table() -> None:
    plain = Report("model.pt", PLAN, {"torch": GOOD})
    assert calibration_table(plain).row_count == 0
    assert "calibration:" not in html(plain)


def test_the_summary_says_what_is_left_in_the_file_and_why() -> None:
    lines = [line for line in full().summary().splitlines() if "onnx:" in line]
    assert lines == [
        "  onnx: 1 of 2 calls of norms cost nothing",
        "  onnx: body.norm in the file as BatchNormalization: an output is next to it",
    ]
    assert "body.norm in the file as BatchNormalization" in html(full())


def test_the_summary_says_what_is_known_of_cuda() -> None:
    lines = [line for line in full().summary().splitlines() if "cuda:" in line]
    assert lines == [
        "  cuda: not run: onnxruntime has no CUDAExecutionProvider here; "
        "4 of 5 floating-point nodes have a CUDA kernel, by onnxruntime's table",
        "  cuda: without a kernel: MaxPool node_max_pool2d (float32, opset 22)",
    ]
    assert "without a kernel: MaxPool node_max_pool2d" in html(full())


def test_json_is_strict_and_says_not_a_number_in_words() -> None:
    result = full().json()
    assert json.loads(json.dumps(result, allow_nan=False)) == result  # no tuple, no NaN, no key that is not a string
    failed = result["parities"]["onnxruntime (all)"]
    assert (failed["passed"], failed["max_rel"], failed["outputs"][0]["max_rel"], failed["sites"][0]["max_rel"]) == (
        False,
        "nan",
        "nan",
        "inf",
    )
    assert parity_json(NAN) == failed


def test_json_holds_the_plan() -> None:
    result = full().json()
    assert list(result) == [
        "version",
        "status",
        "source",
        "plan",
        "facts",
        "pairs",
        "parities",
        "legs",
        "calibration",
        "healing",
        "onnx",
        "seconds",
        "versions",
        "files",
    ]
    assert result["version"] == 1
    assert result["plan"]["swaps"][1] == {
        "name": "body.norm",
        "aliases": ["body.again"],
        "kind": "BatchNorm2d",
        "calls": 2,
        "producer": None,
        "why_no_producer": None,
        "function": None,
        "preserves": "exact",
    }
    assert result["plan"]["skips"][0]["reason"] == "normalizes each sample by its own statistics"
    assert result["onnx"]["residue"] == ["body.norm"]
    assert result["versions"]["torch"].startswith("2.")


def test_every_comparison_is_named_and_what_was_not_run_is_no_pass() -> None:
    result = full()
    assert [(row["leg"], row["status"], row["reason"]) for row in result.json()["legs"]] == [
        ("original", "noise floor", None),
        ("torch", "passed", None),
        ("onnxruntime (all)", "failed", None),
        ("onnx's reference evaluator", "not run", "it would take about 40 s"),
    ]
    assert result.json()["legs"][0]["max_rel"] == parity_json(NAN)["outputs"][0]["noise"]
    assert "  onnx's reference evaluator: not run: it would take about 40 s" in result.summary().splitlines()
    assert "not run: it would take about 40 s" in html(result)
    assert Report("model.pt", PLAN).json()["legs"] == []


def keys(value: object) -> Iterator[str]:
    """Every key at every depth, where the keys are the schema's and not data."""
    if isinstance(value, dict):
        for key, item in value.items():
            yield key
            if key == "parities":
                yield from (inner for parity in item.values() for inner in keys(parity))
            elif key not in {"seconds", "versions", "nodes", "skeleton", "extra", "kernels"}:
                yield from keys(item)
    elif isinstance(value, list):
        for item in value:
            yield from keys(item)


def test_the_documented_keys_are_the_keys(repository: Path) -> None:
    documented = set(re.findall(r"^\| `(\w+)` \|", (repository / "docs/report.md").read_text(), re.MULTILINE))
    assert documented == set(keys(full().json()))
