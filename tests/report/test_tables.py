"""No word of a table is broken, at any width; what does not fit goes below it, and nothing is lost."""

from __future__ import annotations

import io
import re

import pytest
from reports import full, rendered
from rich.console import Console

from normswap.report.conversion import calibration_table, report_table
from normswap.report.tables import Alarm, Good, Listing, table, wrapped

REASON = "normalizes each sample by its own statistics, so that an exact swap does not exist"
LONG = "encoder.stages.3.blocks.11.attention.norm_before"
WIDTHS = (60, 80, 120)


def at(listing: Listing, width: int, **options: object) -> str:
    console = Console(file=io.StringIO(), width=width, **options)  # type: ignore[arg-type]
    console.print(listing)
    return console.file.getvalue()  # type: ignore[attr-defined]


def words(text: str) -> set[str]:
    return set(re.split(r"[\s─,:]+", text))


def short() -> Listing:
    rows = [
        ("a", "BatchNorm2d", "swapped, exact", "", "1.0e-07"),
        ("b.c", "LayerNorm", "kept", REASON, ""),
        ("d", "LayerNorm", "kept", REASON, ""),
    ]
    return table(("site", "kind", "what", "why not", "max error"), rows, numbers=("max error",), below=("why not",))


def wide() -> Listing:
    rows = [(f"{LONG}.{i}", "BatchNorm2d", "swapped, exact", REASON, f"{i}.0e-07") for i in (1, 2, 3, 4)]
    return table(("site", "kind", "what", "why not", "max error"), rows, numbers=("max error",), below=("why not",))


LISTINGS = {"short": short(), "wide": wide(), "report": report_table(full()), "calibration": calibration_table(full())}


@pytest.mark.parametrize("width", WIDTHS)
@pytest.mark.parametrize("name", LISTINGS)
def test_no_word_is_broken_and_none_is_lost(name: str, width: int) -> None:
    listing = LISTINGS[name]
    said, whole = words(at(listing, width)), words(at(listing, 1000))
    assert whole - said <= {"as", "above"} | words(" ".join(listing.headers))  # a paragraph names what it has
    assert said - whole <= {"each", "and", "more", "1", ""}
    assert all(word in said for row in listing.rows for word in words(row[0]) if "(" not in word)


@pytest.mark.parametrize("width", WIDTHS)
@pytest.mark.parametrize("name", LISTINGS)
def test_no_line_is_wider_than_the_terminal(name: str, width: int) -> None:
    longest = max(len(word) for word in words(at(LISTINGS[name], 1000)))
    assert max(map(len, at(LISTINGS[name], width).splitlines())) <= max(width, longest + 4)


def test_a_reason_goes_below_where_it_does_not_fit_and_is_said_once() -> None:
    assert rendered(short()) == [
        ["a", "BatchNorm2d", "swapped, exact", "1.0e-07"],
        ["b.c", "LayerNorm", "kept", REASON],
        ["d", "LayerNorm", "kept", "as above"],
    ]
    narrow = at(short(), 80)
    assert "why not" not in narrow.splitlines()[1]
    assert narrow.count("normalizes each sample") == 1
    assert "  why not: b.c, d: each normalizes each sample" in narrow


def test_rows_become_paragraphs_where_no_table_fits() -> None:
    lines = at(wide(), 60).splitlines()
    assert lines[:2] == [f"  {LONG}.1", "    kind BatchNorm2d what swapped, exact max error 1.0e-07"]
    assert lines[lines.index("  why not:") + 1] == f"      {LONG}.1,"


def test_totals_are_below_a_line() -> None:
    listing = table(("operator", "before"), [("Conv", "3")], numbers=("before",), totals=[("all operators", "3")])
    assert [line.split() for line in at(listing, 80).splitlines() if line.strip() and "─" not in line][-1] == ["all", "operators", "3"]
    assert listing.row_count == 2


def test_colours_say_what_is_wrong_and_what_is_right() -> None:
    listing = table(("what", "verdict"), [("a", Good("same")), ("b", Alarm("differs")), ("c", "not run")])
    coloured = at(listing, 80, force_terminal=True, color_system="standard", _environ={})
    assert "\x1b[32msame" in coloured
    assert "\x1b[1;31mdiffers" in coloured
    assert "mnot run" not in coloured
    assert "\x1b" not in at(listing, 80)


@pytest.mark.parametrize(
    ("line", "width", "lines"),
    [
        ("short", 30, ["short"]),
        ("", 30, [""]),
        ("  torch: max error 1e-7, allowed 1e-6", 30, ["  torch: max error 1e-7,", "      allowed 1e-6"]),
        ("a/path/that/is/longer/than/the/line.pt and more", 25, ["a/path/that/is/longer/than/the/line.pt", "    and more"]),
    ],
)
def test_lines_break_between_words(line: str, width: int, lines: list[str]) -> None:
    assert wrapped(line, width) == lines


def test_a_column_gives_way_down_to_its_longest_word() -> None:
    """The widest column is one word; the other has many, and is the one that can be broken."""
    listing = table(("site", "what"), [(LONG, "swapped, exact, one of the few that share a weight")])
    lines = at(listing, 80).splitlines()
    assert max(map(len, lines)) <= 80
    assert sum(LONG in line for line in lines) == 1
    assert words("swapped, exact, one of the few that share a weight") <= words("\n".join(lines))
