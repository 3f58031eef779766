"""The report says what the plan and the measurements say, in three forms, and hides nothing."""

from __future__ import annotations

import dataclasses
import html.parser
import io
import json
import math
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from rich.console import Console
from rich.table import Table
from torch import nn

from normswap.detect.facts import Facts
from normswap.detect.hazards import Hazard
from normswap.detect.sites import Plan, Rule, Site, Skip, Swap
from normswap.parity.result import Difference, Located, Parity
from normswap.report.conversion import Report, report
from normswap.report.parity import parity_json, parity_summary, parity_table
from normswap.swap.calibrate import Fit

RULE = Rule("BatchNorm2d", lambda site: True, lambda site: None, lambda site, std: nn.Identity())
HOSTILE = "a[red]<script>alert('&')</script>"


def swap(name: str, **facts: Any) -> Swap:
    return Swap(Site(name, facts.pop("aliases", ()), None, facts.pop("calls", 1), **facts), RULE)


def difference(name: str = "output", error: float = 2e-7, **facts: Any) -> Difference:
    facts = {"max_abs": 3 * error, "rel_l2": error / 2, "non_finite": 0, "noise": 1e-7, "tolerance": 1e-6} | facts
    return Difference(name, "batch of 3", max_rel=error, **facts)


def parity(*outputs: Difference, **facts: Any) -> Parity:
    return Parity(outputs, probes=("example", "batch of 1"), candidate="torch.float32", **facts)


PLAN = Plan(
    (swap("stem.norm", producer="stem.conv"), swap("body.norm", aliases=("body.again",), calls=2), swap("")),
    (Skip(Site("head.norm", (), None, None), "LayerNorm", "normalizes each sample by its own statistics"),),
    backend="fx",
    notes=("one note",),
)
SITES = (difference("stem.norm", 1e-7), difference("body.norm", 2e-7), difference("body.norm", 4e-7), difference("", 3e-7))
GOOD = parity(difference(), sites=SITES)
BAD = parity(difference(error=5e-4), sites=(SITES[0], difference("body.norm", 4e-3)))
NAN = parity(
    difference(error=math.nan),
    difference("other"),
    sites=(difference("stem.norm", math.inf),),
    located=Located("stem", "module.stem", 0.25, "example", "place"),
)


FITS = (
    Fit("body.norm", 2, 0.62, 64, 0, 41.5, 7.2, channels=5, remarks=("its output is 62% away", "its statistics rest on 64 values")),
    Fit("stem.norm", 1, 3e-8, 9000, 1, 2.9, None, "exact", 4, 1),
    Fit("", 0, 0.0, 0, 0, math.nan, None, "adapt", 3, 3, ("keeps its statistics: no forward pass on the data reaches it",)),
)


def known(name: str, *warnings: tuple[str, str], **options: Any) -> dict[str, Any]:
    return dataclasses.asdict(Facts(name, warnings=tuple(Hazard(*warning) for warning in warnings), **options))


TWICE, DEAD = ("called_repeatedly", "is called twice"), ("not_finite", "is not finite")
FACTS = (
    known("stem.norm", DEAD, shapes=((2, 5, 7, 6),), batches=3, momentum=0.125, eps=1e-5, dead_channels=4, folds_into="stem.conv"),
    known("body.norm", TWICE, DEAD, shapes=((2, 5, 7, 6), (3, 5, 1, 1)), batches=0, momentum="cumulative", eps=1e-3, zero_weights=1),
    known("", DEAD, shapes=((2, 5),), eps=1.0, dead_channels=2, zero_weights=5),
    known("head.norm", DEAD, approximate=True, unseen="no inputs are known"),
)


def rendered(table: Table) -> list[list[str]]:
    """The cells of each row."""
    console = Console(file=io.StringIO(), width=400)
    console.print(table)
    lines = console.file.getvalue().splitlines()  # type: ignore[attr-defined]
    return [re.split(r"\s{2,}", line.strip()) for line in lines if line.strip() and "─" not in line][1:]


# -- status and summary ------------------------------------------------------------------------------------------------------


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
    result = report("model.pt", plan, parities)
    assert result.status == status
    assert result.summary().splitlines()[0] == verdict


@pytest.mark.parametrize(
    ("measured", "line"),
    [
        (GOOD, "max error 2.0e-07, allowed 1.0e-06, rounding of the original 1.0e-07, over 2 inputs"),
        (
            BAD,
            "FAILED; max error 5.0e-04, allowed 1.0e-06, rounding of the original 1.0e-07, over 2 inputs; first to differ: body.norm; "
            "the outputs would pass at tolerance 5.0e-04",
        ),
        (NAN, "FAILED; max error nan, allowed 1.0e-06, rounding of the original 1.0e-07, over 2 inputs; first to differ: stem.norm"),
        (Parity(()), "FAILED; nothing was compared"),
        (
            parity(difference(error=0.25), located=Located("stem", "module.stem", 0.25, "example", "place")),
            "FAILED; max error 2.5e-01, allowed 1.0e-06, rounding of the original 1.0e-07, over 2 inputs; first to differ: stem, "
            "module.stem of the candidate, 2.5e-01 off in float64 at the probe 'example' (paired by place); "
            "the outputs would pass at tolerance 2.5e-01",
        ),
        (Parity((), failure="the candidate raised KeyError"), "FAILED; the candidate raised KeyError"),
        (parity(difference(problem="is missing")), None),
        (parity(difference(), dropped=("batch of 1 (needs two)",)), None),
    ],
)
def test_parity_in_one_line(measured: Parity, line: str | None) -> None:
    if line is not None:
        assert parity_summary(measured) == line
    assert ("FAILED" in parity_summary(measured)) == (not measured.passed)


def test_what_could_not_be_compared_is_named() -> None:
    missing = parity(difference("logits", math.nan, problem="is missing"), difference("aux", 1.0))
    assert parity_summary(missing).startswith("FAILED; output 'logits': is missing; first to differ: logits")
    dropped = parity(difference(), dropped=("batch of 1 (the model needs two)",))
    assert parity_summary(dropped).endswith("; not compared: batch of 1 (the model needs two)")


def test_the_worst_output_is_the_one_furthest_over_what_it_is_allowed() -> None:
    large_but_allowed = difference("half", 2e-3, tolerance=5e-3)
    small_but_not = difference("single", 2e-6)
    assert "max error 2.0e-06, allowed 1.0e-06" in parity_summary(parity(large_but_allowed, small_but_not))


# -- table -------------------------------------------------------------------------------------------------------------------


def test_table_has_every_norm_and_the_worst_error_of_each() -> None:
    rows = rendered(report("model.pt", PLAN, {"torch": GOOD, "onnxruntime (all)": BAD}).table())
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
    assert rendered(report("model.pt", plan, {"torch": exact, "drift": drift}).table()) == [
        ["stem.norm", "BatchNorm2d", "swapped, exact", "1.0e-07"],
        ["head.norm", "LayerNorm", "swapped, approximate", "2.5e-01"],
    ]
    limited = parity(difference(), sites=(sites[1][0], difference("head.norm", 0.25, tolerance=0.1)))
    table = report("model.pt", plan, {"torch": exact, "drift": limited}).table()
    assert table.columns[-1]._cells[1].style == "bold red"  # type: ignore[union-attr]
    assert rendered(report("model.pt", plan, {"torch": exact}).table())[1][-1] == "2.0e-07"


def test_table_of_a_plan_promises_and_measures_nothing() -> None:
    rows = rendered(report("model.pt", PLAN).table())
    assert rows[0] == ["stem.norm", "BatchNorm2d", "would swap, exact"]


def test_table_of_one_parity() -> None:
    lost = parity(
        difference(error=5e-4), difference("mask", non_finite=7), difference("box", math.nan, problem="is missing"), sites=SITES[:1]
    )
    assert rendered(parity_table(lost)) == [
        ["output output", "1.5e-03", "5.0e-04", "2.5e-04", "1.0e-06", "differs, at batch of 3"],
        ["output mask", "6.0e-07", "2.0e-07", "1.0e-07", "1.0e-06", "7 not finite, at batch of 3"],
        ["output box", "nan", "nan", "nan", "1.0e-06", "is missing"],
        ["layer stem.norm", "3.0e-07", "1.0e-07", "5.0e-08", "1.0e-06", "same"],
    ]


def test_table_of_an_inspection() -> None:
    rows = rendered(report("model.pt", PLAN, facts=FACTS).table())
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
    table = report("model.pt", Plan((), skips, "fx"), facts=facts).table()
    assert [column.header for column in table.columns] == ["site", "kind", "input", "eps", "folds into", "what", "why not"]
    assert [row[-1] for row in rendered(table)] == ["one", "as above", "two"]


def test_summary_of_an_inspection_groups_what_is_the_same() -> None:
    assert report("model.pt", PLAN, facts=FACTS).summary().splitlines() == [
        "would swap 3 of 4 normalization layers",
        "  with --approximate --data DATA: would swap 1 more, approximately",
        "  warning: stem.norm, body.norm, (the model) and 1 more: each is not finite",
        "  warning: body.norm is called twice",
        "  note: head.norm has an input of unknown shape: no inputs are known",
        "  note: one note",
    ]
    two = [known("a", DEAD), known("b", DEAD)]
    assert "  warning: a, b: each is not finite" in report("model.pt", PLAN, facts=two).summary().splitlines()


def test_names_are_not_markup() -> None:
    plan = Plan((swap(HOSTILE),), (), "fx")
    assert rendered(report("model.pt", plan).table())[0][0] == HOSTILE


def test_table_of_the_calibration() -> None:
    rows = rendered(full().calibration_table())
    assert rows == [
        ["body.norm", "fitted", "6.2e-01", "64", "0 of 5", "41.5", "7.2", "its output is 62% away; its statistics rest on 64 values"],
        ["stem.norm", "re-estimated", "3.0e-08", "9000", "1 of 4", "2.9"],
        ["(the model)", "adapted", "keeps its statistics: no forward pass on the data reaches it"],
    ]
    assert [column.header for column in full().calibration_table().columns][-1] == "remarks"


def test_no_calibration_no_table() -> None:
    plain = report("model.pt", PLAN, {"torch": GOOD})
    assert plain.calibration_table().row_count == 0
    assert "statistics from the data" not in plain.html()


def test_page_of_the_calibration() -> None:
    page = full().html()
    assert "Layers with statistics from the data" in page
    assert "<td class='words bad'>its output is 62% away; its statistics rest on 64 values</td>" in page
    assert "<td>1 of 4</td><td>2.9</td><td></td><td class='words'></td>" in page
    hostile = dataclasses.replace(FITS[0], name=HOSTILE, remarks=(HOSTILE,))
    hostile_page = report("model.pt", PLAN, fits=[dataclasses.asdict(hostile)]).html()
    assert "<script>" not in hostile_page
    assert Page(hostile_page).open == []


# -- JSON --------------------------------------------------------------------------------------------------------------------


def full() -> Report:
    return report(
        "model.pt",
        PLAN,
        {"torch": GOOD, "onnxruntime (all)": NAN},
        not_run={"onnx's reference evaluator": "it would take about 40 s"},
        onnx={
            "opset": 20,
            "dynamic_batch": True,
            "free_axes": ["batch"],
            "nodes": {"Conv": 3, "Mul": 1},
            "folded": ["stem.norm"],
            "residue": ["body.norm"],
            "sites": [
                {"name": "stem.norm", "how": "into_producer", "into": ["node_conv"], "left": [], "reason": ""},
                {"name": "body.norm", "how": "", "into": [], "left": ["BatchNormalization"], "reason": "an output is next to it"},
            ],
            "skeleton": {"Conv": 3},
            "extra": {"BatchNormalization": 1},
            "target": "portable",
            "cuda": {
                "status": "not run",
                "why": "onnxruntime has no CUDAExecutionProvider here",
                "table": "https://a.page (a version)",
                "floating": 5,
                "without_kernel": [{"node": "node_max_pool2d", "op": "MaxPool", "dtype": "float32", "opset": 22}],
                "elsewhere": [],
                "kernels": {},
            },
            "notes": [],
        },
        seconds={"load": 0.25},
        files=("model.onnx", "report.json"),
        fits=map(dataclasses.asdict, FITS),
        facts=FACTS,
    )


def test_the_summary_says_what_is_left_in_the_file_and_why() -> None:
    lines = [line for line in full().summary().splitlines() if "onnx:" in line]
    assert lines == [
        "  onnx: 1 of 2 calls of norms cost nothing",
        "  onnx: body.norm in the file as BatchNormalization: an output is next to it",
    ]
    assert "body.norm in the file as BatchNormalization" in full().html()


def test_the_summary_says_what_is_known_of_cuda() -> None:
    lines = [line for line in full().summary().splitlines() if "cuda:" in line]
    assert lines == [
        "  cuda: not run: onnxruntime has no CUDAExecutionProvider here; "
        "4 of 5 floating-point nodes have a CUDA kernel, by onnxruntime's table",
        "  cuda: without a kernel: MaxPool node_max_pool2d (float32, opset 22)",
    ]
    assert "without a kernel: MaxPool node_max_pool2d" in full().html()


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
        "parities",
        "legs",
        "calibration",
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
        "function": None,
        "preserves": "exact",
    }
    assert result["plan"]["skips"][0]["reason"] == "normalizes each sample by its own statistics"
    assert result["onnx"]["residue"] == ["body.norm"]
    assert result["versions"]["torch"].startswith("2.")


def test_every_leg_is_named_and_what_was_not_run_is_no_pass() -> None:
    result = full()
    assert [(leg["leg"], leg["status"], leg["reason"]) for leg in result.json()["legs"]] == [
        ("original", "noise floor", None),
        ("torch", "passed", None),
        ("onnxruntime (all)", "failed", None),
        ("onnx's reference evaluator", "not run", "it would take about 40 s"),
    ]
    assert result.json()["legs"][0]["max_rel"] == parity_json(NAN)["outputs"][0]["noise"]
    assert "  onnx's reference evaluator: not run: it would take about 40 s" in result.summary().splitlines()
    assert "not run: it would take about 40 s" in result.html()
    assert report("model.pt", PLAN).json()["legs"] == []


def keys(value: object) -> Iterator[str]:
    """Every key at every depth, where the keys are the schema's and not data."""
    if isinstance(value, dict):
        for key, item in value.items():
            yield key
            if key == "parities":
                yield from (inner for leg in item.values() for inner in keys(leg))
            elif key not in {"seconds", "versions", "nodes", "skeleton", "extra", "kernels"}:
                yield from keys(item)
    elif isinstance(value, list):
        for item in value:
            yield from keys(item)


def test_the_documented_keys_are_the_keys(repository: Path) -> None:
    documented = set(re.findall(r"^\| `(\w+)` \|", (repository / "docs/report.md").read_text(), re.MULTILINE))
    assert documented == set(keys(full().json()))


# -- HTML --------------------------------------------------------------------------------------------------------------------


class Page(html.parser.HTMLParser):
    def __init__(self, page: str) -> None:
        super().__init__()
        self.tags: list[str] = []
        self.open: list[str] = []
        self.links: list[str] = []
        self.feed(page)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append(tag)
        self.links += [value or "" for name, value in attrs if name in {"src", "href"}]
        if tag not in {"meta", "br"}:
            self.open.append(tag)

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag


def test_page_stands_alone_and_is_well_formed() -> None:
    page = full().html()
    parsed = Page(page)
    assert parsed.open == []
    assert parsed.links == []
    assert not {"script", "link", "img", "iframe"} & set(parsed.tags)
    assert "http" not in page
    assert "url(" not in page


def test_page_says_what_the_report_says() -> None:
    page = full().html()
    for text in (
        "parity failed: 3 of 4",
        "model.pt",
        "stem.norm",
        "normalizes each sample",
        "onnxruntime (all)",
        "Conv 3, Mul 1",
        "one note",
    ):
        assert text in page


def test_page_escapes_names() -> None:
    skip = Skip(Site(HOSTILE, (), None, 1), HOSTILE, HOSTILE)
    page = report(
        HOSTILE, Plan((swap(HOSTILE),), (skip,), HOSTILE, (HOSTILE,)), {HOSTILE: parity(difference(HOSTILE, problem=HOSTILE))}
    ).html()
    assert "<script>" not in page
    assert page.count("&lt;script&gt;") >= 9


def test_page_of_an_empty_plan() -> None:
    assert "The model has no normalization." in report("model.pt", Plan((), (), "fx")).html()
