"""The page says what the report says, stands alone, and takes nothing that a model says for markup."""

from __future__ import annotations

import base64
import dataclasses
import hashlib
import html
import itertools
import math
import re
import xml.etree.ElementTree as ElementTree
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import html5lib
import pytest
import torch
from reports import BAD, FITS, GOOD, HOSTILE, HOSTILES, NAN, PLAN, RULE, difference, full, parity, swap
from torch import nn

from benchmarks import screenshots
from normswap.detect.sites import Plan, Site, Skip, Swap
from normswap.export.to_onnx import Export
from normswap.layer.batchless_norm import BatchlessNorm
from normswap.parity.result import Parity
from normswap.report import advice
from normswap.report.conversion import Report
from normswap.report.layers import groups_of, layers_of, statistics_of
from normswap.report.page import html as html_of

CONVERTED = Report("model.pt", PLAN, {"torch": GOOD}, files=["model.pt", "model.safetensors", "recipe.json"], directory="out")


def tree(page: str) -> ElementTree.Element:
    """The page as a browser reads it; a parse error that a browser would mend fails."""
    root: ElementTree.Element = html5lib.HTMLParser(strict=True, namespaceHTMLElements=False).parse(page)
    return root


def texts(page: str) -> str:
    return " ".join("".join(tree(page).find("body").itertext()).split())  # type: ignore[union-attr]


def rough(drift: float, *, limit: float = math.inf) -> Report:
    """An approximate conversion."""
    layers = (Swap(Site("a.norm", (), None, 1), dataclasses.replace(RULE, kind="LayerNorm", inexact=lambda site: "because")),)
    measured = parity(difference(error=drift, tolerance=limit), sites=(difference("a.norm", drift / 2, tolerance=limit),))
    fit = dataclasses.replace(FITS[0], name="a.norm", histogram=(1, 2, 5, 2))
    return Report("model.pt", Plan(layers, (), "fx"), {"torch": GOOD, "drift": measured}, fits=[fit])


PAGES = {
    "full": full(),
    "good": CONVERTED,
    "failed": Report("model.pt", PLAN, {"torch": BAD}),
    "approximate": rough(0.84),
    "empty": Report("model.pt", Plan((), (), "fx")),
    "nothing measured": Report("model.pt", PLAN, {"torch": Parity(())}),
}


@pytest.mark.parametrize("report", PAGES.values(), ids=PAGES)
def test_page_is_valid_stands_alone_and_has_labels(report: Report) -> None:
    page = html_of(report)
    root = tree(page)
    elements = list(root.iter())
    ids = [element.get("id") for element in elements if element.get("id") is not None]
    assert len(ids) == len(set(ids))
    assert not {"link", "img", "iframe", "object", "base"} & {element.tag for element in elements}
    assert [element for element in elements for name in ("src", "href", "xlink:href") if not element.get(name, "#").startswith("#")] == []
    assert not re.search(r"https?:|url\(|@import", page)
    for element in elements:
        assert element.get("aria-labelledby", element.get("data-copy")) in {None, *ids}
        assert not [name for name in element.attrib if str(name).startswith("on")]
        label = element.get("aria-label", "").strip() or "".join(element.itertext()).strip() or element.get("aria-labelledby")
        assert element.tag not in {"a", "button", "summary", "svg", "h1", "h2", "h3"} or label, element.attrib
        assert not str(element.tag).endswith("}svg") or element.get("aria-label", "").strip()
        assert element.tag != "a" or element.get("href", "")[1:] in ids
    headings = [int(element.tag[1]) for element in elements if re.fullmatch("h[1-6]", str(element.tag))]
    assert headings[0] == 1
    assert headings.count(1) == 1
    assert all(b - a <= 1 for a, b in itertools.pairwise(headings))
    assert root.get("lang") == "en"


def test_only_the_pages_own_script_may_run() -> None:
    page = html_of(full())
    (script,) = list(tree(page).iter("script"))
    policy = next(element.get("content", "") for element in tree(page).iter("meta") if element.get("http-equiv"))
    assert policy.startswith("default-src 'none'")
    assert f"'sha256-{_sha256(script.text or '')}'" in policy


def _sha256(text: str) -> str:

    return base64.b64encode(hashlib.sha256(text.encode()).digest()).decode()


def test_page_says_what_the_report_says() -> None:
    page = texts(html_of(full()))
    for text in (
        "parity failed: 3 of 4",
        "model.pt",
        "stem.norm",
        "normalizes each sample",
        "onnxruntime (all)",
        "Conv33",
        "Mul01",
        "one note",
        "its output is 62% away; its statistics rest on 64 values",
        "into the layer before it: node_conv",
        "left as BatchNormalization: an output is next to it",
    ):
        assert text in page.replace("Conv 3 3", "Conv33").replace("Mul 0 1", "Mul01"), text


def test_layers_are_in_the_order_of_execution() -> None:
    plan = dataclasses.replace(PLAN, order=("head.norm", "body.norm", "stem.norm", ""))
    layers = layers_of(dataclasses.replace(CONVERTED, plan=plan))
    assert [(layer.number, layer.row.name, layer.fate) for layer in layers] == [
        (1, "head.norm", "kept"),
        (2, "body.norm", "swapped"),
        (3, "stem.norm", "swapped"),
        (4, "", "swapped"),
    ]
    assert [layer.row.name for layer in layers_of(CONVERTED)] == ["stem.norm", "body.norm", "", "head.norm"]


def test_rows_that_say_the_same_are_one_and_what_failed_comes_first() -> None:
    many = Plan(tuple(swap(f"block.{i}.norm") for i in range(40)), PLAN.skips, "fx")
    sites = tuple(difference(f"block.{i}.norm", 4e-3 if i == 7 else 1e-7) for i in range(40))
    groups = groups_of(layers_of(Report("model.pt", many, {"torch": parity(difference(), sites=sites)})))
    assert [(group.fate, len(group.layers), group.errors) for group in groups] == [
        ("failed", 1, "4.0e-03"),
        ("kept", 1, ""),
        ("swapped", 39, "1.0e-07"),
    ]


def test_the_statistics_are_those_of_the_converted_layer() -> None:

    layer = BatchlessNorm(3)
    layer.set_statistics(torch.tensor([0.5, -1.25, 2.0]), torch.tensor([0.25, 4.0, 1.0]))
    found = statistics_of(nn.Sequential(layer, nn.ReLU()), Plan((swap("0"), swap("1"), swap("missing")), (), "fx"))
    assert found == {"0": (("channels", "3"), ("mean", "-1.25 to 2"), ("std", "0.25 to 4"), ("weight", "1"), ("bias", "0"))}
    page = texts(html_of(Report("model.pt", Plan((swap("0"),), (), "fx"), {"torch": GOOD}, statistics=found)))
    assert "mean-1.25 to 2" in page


@pytest.mark.parametrize(
    ("report", "why", "what"),
    [
        (
            PAGES["failed"],
            "torch: first at the layer body.norm, at the input 'batch of 3': the error is 4.0e-03 of the largest value, "
            "where 1.0e-06 is allowed; the original's own rounding is 1.0e-07",
            ("Convert without this layer: --exclude 'body.norm'.", "check its formula"),
        ),
        (
            Report("model.pt", PLAN, {"torch": GOOD, "onnxruntime (all)": BAD}),
            "onnxruntime (all): first at the layer body.norm",
            ("Convert without an ONNX file: --no-onnx. The PyTorch model passed.",),
        ),
        (
            Report("model.pt", PLAN, {"torch": parity(difference(error=3e-4, float64=True))}),
            "first at the output output, at the input 'batch of 3': run in float64, where rounding is no excuse, the error is 3.0e-04",
            ("report this with the architecture",),
        ),
        (
            Report("model.pt", PLAN, {"torch": parity(difference(problem="cannot be judged at any probe: it overflows"))}),
            "cannot be judged at any probe: it overflows",
            ("Give inputs like those that the model was trained on",),
        ),
        (Report("model.pt", PLAN, {"torch": parity(failure="the candidate raised")}), "torch: the candidate raised", ()),
        (Report("model.pt", PLAN, {"torch": Parity(())}), "torch: nothing was compared", ()),
        (Report("model.pt", PLAN, {"torch": parity(difference(non_finite=3))}), "3 values are infinite or not a number", ()),
        (rough(0.84, limit=0.1), "drift: first at the layer a.norm", ("normswap sensitivity measures each", "raise --max-drift")),
    ],
)
def test_a_failure_says_why_and_what_to_do(report: Report, why: str, what: tuple[str, ...]) -> None:
    page = texts(html_of(report))
    assert why in page
    for text in what:
        assert text in page
    assert "No model was written, only this report." in page
    assert "Load it" not in page


def test_a_success_says_what_it_rests_on_and_gives_no_advice() -> None:
    page = texts(html_of(CONVERTED))
    assert (
        "The same function. In torch, no output is further from the original than 2.0e-07 of its largest value; the original's own "
        "rounding reaches 1.0e-07. The closest to a limit uses 20% of it."
    ) in page
    assert "What to do" not in page


@pytest.mark.parametrize(
    ("drift", "verdict", "says"),
    [
        (0.84, "approximate: outputs moved by 84%, not usable without healing; ", "the largest output. That is too far"),
        (0.05, "approximate: outputs moved by 5%; ", "the largest output. It is another function"),
    ],
)
def test_an_approximate_model_is_not_called_the_same(drift: float, verdict: str, says: str) -> None:
    page = texts(html_of(rough(drift)))
    assert verdict in page
    assert says in page
    assert "converted:" not in page
    assert "The same function" not in page


def test_the_histogram_is_there_where_data_were_given() -> None:
    assert "against a Gaussian" in html_of(rough(0.05))
    assert "against a Gaussian" not in html_of(CONVERTED)


@pytest.mark.parametrize(
    ("source", "files", "code"),
    [
        ("model.pt", ["model.pt", "recipe.json"], "normswap.load('out')"),
        ("timm:resnet18", ["recipe.json"], "normswap.load('out')"),
        ("model.pt2", ["model.pt2", "recipe.json"], "normswap.load('out', trust=True)"),
        ("nets:build", ["recipe.json"], "normswap.load('out', factory)  # factory: the function that builds your architecture"),
    ],
)
def test_how_to_load_it(source: str, files: list[str], code: str) -> None:
    (block,) = advice.loading(dataclasses.replace(CONVERTED, source=source, files=files))
    assert code in block.text
    compile(block.text, "page", "exec")


@pytest.mark.parametrize(
    ("word", "code"),
    [
        ({"trust_packages": ["mine"]}, "normswap.load('out', trust_packages=['mine'])"),
        ({"trust": True}, "normswap.load('out', trust=True)"),
    ],
)
def test_what_needed_trust_to_be_read_needs_it_to_be_loaded(word: dict[str, Any], code: str) -> None:
    (block,) = advice.loading(dataclasses.replace(CONVERTED, source="net.pt", files=["model.pt", "recipe.json"], **word))
    assert code in block.text


def test_how_to_load_the_file() -> None:
    onnx = Export(Path("model.onnx"), 20, {"Conv": 1}, (), {"Conv": 1}, {}, ("x", "the mask"), ("y",))
    *_, block = advice.loading(dataclasses.replace(CONVERTED, files=["recipe.json", "model.onnx"], onnx=onnx))
    assert "onnxruntime.InferenceSession('out/model.onnx')" in block.text
    assert "{'x': x, 'the mask': x}" in block.text


def named(name: str) -> Report:
    """A report that says `name` wherever a model, a file or its user may say what they like."""
    plan = Plan((swap(name, aliases=(name,)),), (Skip(Site(name + "2", (), None, 1), name, name),), name, (name,))
    fit = dataclasses.replace(FITS[0], name=name, remarks=(name,))
    measured = parity(difference(name, problem=name), sites=(difference(name, 1e-7),))
    return Report(name, plan, {name: measured}, {name: name}, fits=[fit], files=[name], directory=name)


@pytest.mark.parametrize(("name", "shown"), HOSTILES.items())
def test_page_escapes_names(name: str, shown: str) -> None:
    page = html_of(named(name))
    assert [element.tag for element in tree(page).iter()] == [element.tag for element in tree(html_of(named("a"))).iter()]
    assert html.unescape(page).count(shown) >= 14
    assert all(character.isprintable() or character == "\n" for character in page)
    assert page.encode()


def test_code_to_copy_is_no_markup() -> None:
    page = html_of(dataclasses.replace(CONVERTED, directory=HOSTILE))
    assert len(list(tree(page).iter("script"))) == 1
    assert "normswap.load(" in texts(page)


def test_page_of_an_empty_plan() -> None:
    assert "The model has no normalization." in html_of(PAGES["empty"])


def test_a_number_that_is_none_moves_no_bar_off_the_chart() -> None:
    page = html_of(Report("model.pt", PLAN, {"torch": NAN}))
    assert not re.search(r'[xy][12]?="[^"]*(nan|inf)', page)


@pytest.fixture(scope="module")
def browser() -> Iterator[Any]:
    """One, as each page gets a window without a past."""
    pytest.importorskip("playwright.sync_api", reason="pip install -e '.[docs]' to look at the page in a browser")
    if screenshots.chromium() is None:
        pytest.skip("no chromium on this machine: apt-get install chromium")
    with screenshots.browser() as running:
        yield running


# "full" has every part that a page may have, but what it says of a success. The others have fewer of them.
@pytest.mark.parametrize(
    "name", [pytest.param(name, marks=[] if name in ("full", "good") else [pytest.mark.slow]) for name in PAGES if name != "empty"]
)
def test_a_browser_finds_nothing_wrong(name: str, tmp_path: Path, browser: Any) -> None:
    """axe-core, what is wider than the window, errors and requests. Run it alone with: python -m pytest tests/report -k browser"""
    page = tmp_path / "report.html"
    page.write_text(html_of(PAGES[name]), encoding="utf-8")
    assert screenshots.wrong_with(browser, page) == []


@pytest.mark.parametrize(("tolerance", "says"), [(math.inf, "measured, without a limit"), (0.9, "passed"), (0.5, "failed")])
def test_what_has_no_limit_has_not_passed(tolerance: float, says: str) -> None:
    report = Report("model.pt", PLAN, {"torch": GOOD, "drift": parity(difference("out", 0.84, tolerance=tolerance))})
    assert f"<h3>drift: {says}</h3>" in html_of(report)
    assert "<h3>torch: passed</h3>" in html_of(report)
