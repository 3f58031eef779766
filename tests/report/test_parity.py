"""A comparison says what was measured, what differs first, and what could not be compared."""

from __future__ import annotations

import math
from pathlib import Path

import pytest
from reports import BAD, GOOD, NAN, SITES, difference, parity, rendered
from torch import nn

from normswap.parity.result import Difference, Located, Parity
from normswap.report.parity import failure_text, parity_summary, parity_table


@pytest.mark.parametrize(
    ("measured", "line"),
    [
        (GOOD, "worst of 2 inputs: error 2.0e-07, allowed 1.0e-06, rounding of the original 1.0e-07"),
        (
            BAD,
            "FAILED; worst of 2 inputs: error 5.0e-04, allowed 1.0e-06, rounding of the original 1.0e-07; first to differ: body.norm; "
            "the outputs would pass at tolerance 5.0e-04",
        ),
        (NAN, "FAILED; worst of 2 inputs: error nan, allowed 1.0e-06, rounding of the original 1.0e-07; first to differ: stem.norm"),
        (Parity(()), "FAILED; nothing was compared"),
        (
            parity(difference(error=0.25), located=Located("stem", "module.stem", 0.25, "example", "place")),
            "FAILED; worst of 2 inputs: error 2.5e-01, allowed 1.0e-06, rounding of the original 1.0e-07; first to differ: stem, "
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
    large_but_allowed = difference("float16", 2e-3, tolerance=5e-3)
    small_but_not = difference("single", 2e-6)
    assert "error 2.0e-06, allowed 1.0e-06" in parity_summary(parity(large_but_allowed, small_but_not))


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


@pytest.mark.parametrize(
    ("row", "line"),
    [
        (difference("out", 0.84, tolerance=math.inf), "approximate: outputs moved by 84%"),
        (difference("out", 0.0231, tolerance=math.inf), "approximate: outputs moved by 2.3%"),
        (difference("out", 0.04, tolerance=0.05), "approximate: outputs moved by 4%, 5% is allowed"),
        (
            difference("out", math.nan, tolerance=math.inf),
            "FAILED; approximate: outputs became NaN or infinite, not usable; first beyond that: out",
        ),
    ],
)
def test_an_approximate_model_says_how_far_it_moved(row: Difference, line: str) -> None:
    """What the limit is without --max-drift, infinity, is nobody's concern."""
    assert parity_summary(parity(row), approximate=True) == line
    assert "inf," not in parity_summary(parity(row))


def test_a_failure_is_told_in_ten_lines() -> None:
    text = failure_text(
        "a.pt", Path("b.onnx"), parity(difference("logits", 0.5), sites=(difference("stem", 1e-9), difference("head", 0.25)))
    )
    lines = text.splitlines()
    assert lines[0] == "not the same function: b.onnx and a.pt"
    assert lines[1].split() == ["layer", "head"]
    assert "error 2.5e-01 of the largest value, 1.0e-06 is allowed" in lines[3]
    assert len(lines) <= 10
    assert failure_text(nn.Identity(), "b", Parity(())).splitlines() == [
        "not the same function: b and the given Identity",
        "  cause     nothing was compared",
        "  compared  ",
    ]
