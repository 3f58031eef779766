"""The page says what the report says, stands alone, and takes nothing that a model says for markup."""

from __future__ import annotations

import dataclasses
import html.parser

import pytest
from reports import FITS, HOSTILE, HOSTILES, PLAN, difference, full, parity, swap

from normswap.detect.sites import Plan, Site, Skip
from normswap.report.conversion import Report
from normswap.report.page import html as html_of


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


def test_page_of_the_calibration() -> None:
    page = html_of(full())
    assert "Layers with statistics from the data" in page
    assert "<td class='words bad'>its output is 62% away; its statistics rest on 64 values</td>" in page
    assert "<td>1 of 4</td><td>2.9</td><td></td><td class='words'></td>" in page
    hostile = dataclasses.replace(FITS[0], name=HOSTILE, remarks=(HOSTILE,))
    hostile_page = html_of(Report("model.pt", PLAN, fits=[hostile]))
    assert "<script>" not in hostile_page
    assert Page(hostile_page).open == []


def test_page_stands_alone_and_is_well_formed() -> None:
    page = html_of(full())
    parsed = Page(page)
    assert parsed.open == []
    assert parsed.links == []
    assert not {"script", "link", "img", "iframe"} & set(parsed.tags)
    assert "http" not in page
    assert "url(" not in page


def test_page_says_what_the_report_says() -> None:
    page = html_of(full())
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


def named(name: str) -> Report:
    """A report that says `name` wherever a model, a file or its user may say what they like."""
    plan = Plan((swap(name, aliases=(name,)),), (Skip(Site(name, (), None, 1), name, name),), name, (name,))
    fit = dataclasses.replace(FITS[0], name=name, remarks=(name,))
    return Report(name, plan, {name: parity(difference(name, problem=name))}, {name: name}, fits=[fit], files=[name])


@pytest.mark.parametrize(("name", "shown"), HOSTILES.items())
def test_page_escapes_names(name: str, shown: str) -> None:
    page = html_of(named(name))
    assert Page(page).tags == Page(html_of(named("a"))).tags
    assert html.unescape(page).count(shown) >= 14
    assert all(character.isprintable() or character == "\n" for character in page)
    assert page.encode()


def test_page_of_an_empty_plan() -> None:
    assert "The model has no normalization." in html_of(Report("model.pt", Plan((), (), "fx")))
