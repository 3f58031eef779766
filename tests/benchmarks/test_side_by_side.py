"""The page of benchmarks/side_by_side.py has what was measured."""

from __future__ import annotations

import json
from pathlib import Path

from benchmarks.side_by_side import BEGIN, END, JOBS, PAGE, RAW, TITLES, page


def test_the_page_has_what_was_measured() -> None:
    result = json.loads(RAW.read_text(encoding="utf-8"))
    assert page(result) in PAGE.read_text(encoding="utf-8")
    assert JOBS.keys() == TITLES.keys() == result.keys() - {"versions"}
    for job in JOBS:  # each beside at least one other tool
        assert {tool for tool, _, _ in result[job]} > {"normswap"}


def test_the_marks_are_there_once() -> None:
    text = Path(PAGE).read_text(encoding="utf-8")
    assert text.count(BEGIN) == text.count(END) == 1
