"""A JUnit file is valid, counts right, and shows a failing layer to whoever reads it."""

from __future__ import annotations

from pathlib import Path

import pytest
from junit_schema import cases_of
from lxml import etree
from reports import BAD, GOOD, HOSTILES, NAN, difference, parity

from normswap.parity.result import Parity
from normswap.report.junit import Compared, junit


def written(folder: Path, *comparisons: Compared) -> Path:
    path = folder / "junit.xml"
    path.write_text(junit(comparisons), encoding="utf-8")
    return path


def test_a_case_for_each_output_and_layer(tmp_path: Path) -> None:
    made = parity(difference(), sites=(difference("stem", 1e-7), difference("head", 0.5)))
    assert cases_of(written(tmp_path, Compared("a.pt", "b.pt", made, seconds=1.25))) == {
        "b.pt against a.pt: layer stem": "passed",
        "b.pt against a.pt: layer head": "failure",
        "b.pt against a.pt: output output": "passed",
    }


def test_what_was_not_measured_is_no_pass(tmp_path: Path) -> None:
    several = (Compared("a", "b", not_run="no source"), Compared("c", "d", error="it is empty"), Compared("e", "f", Parity(())))
    assert list(cases_of(written(tmp_path, *several)).values()) == ["skipped", "error", "failure"]


@pytest.mark.parametrize("made", [GOOD, BAD, NAN], ids=["good", "bad", "nan"])
def test_the_figures_are_properties(made: Parity, tmp_path: Path) -> None:
    path = written(tmp_path, Compared("a", "b", made))
    cases_of(path)
    found = {each.get("name"): each.get("value") for each in etree.parse(path).iter("property")}
    assert found["normswap_passed"] == str(made.passed).lower()
    assert found["normswap_max_rel"] == f"{made.max_rel:.1e}"


@pytest.mark.parametrize("name", HOSTILES)
def test_a_name_is_no_markup(name: str, tmp_path: Path) -> None:
    """Control characters are not allowed in XML at all."""
    made = parity(difference(name, 0.5, problem=name), sites=(difference(name, 0.5),))
    assert set(cases_of(written(tmp_path, Compared(name, name, made))).values()) == {"failure"}


def test_the_schema_refuses_what_is_not_a_junit_file(tmp_path: Path) -> None:
    (tmp_path / "junit.xml").write_text('<testsuites><testsuite name="a" tests="1" failures="0" errors="0"/></testsuites>')
    with pytest.raises(AssertionError):
        cases_of(tmp_path / "junit.xml")
