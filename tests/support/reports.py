"""Reports whose every part is known, for the tests of what is said of them."""

from __future__ import annotations

import io
import math
import re
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table
from torch import nn

from normswap.detect.facts import Facts
from normswap.detect.hazards import Hazard
from normswap.detect.sites import Plan, Rule, Site, Skip, Swap
from normswap.export.cuda import Cuda, Missing
from normswap.export.to_onnx import Export
from normswap.folding import Outcome
from normswap.parity.result import Difference, Located, Parity
from normswap.report.conversion import Report
from normswap.swap.fit import Fit

RULE = Rule("BatchNorm2d", lambda site: True, lambda site: None, lambda site, std: nn.Identity())


HOSTILE = "a[red]<script>alert('&')</script>"
HOSTILES = {  # what a layer may be called, and how a terminal and a page show it before markup is escaped
    HOSTILE: HOSTILE,
    "[red]": "[red]",
    "{{ 7 * 7 }}{% raw %}": "{{ 7 * 7 }}{% raw %}",
    "' onclick='alert(1)\" x=\"": "' onclick='alert(1)\" x=\"",
    "a\x1b[2Jb\x9bc\x00": "a\\x1b[2Jb\\x9bc\\x00",
    "a\u202eb": "a\\u202eb",
    "a\udc80b": "a\\udc80b",
}


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


def known(name: str, *warnings: Hazard, **options: Any) -> Facts:
    return Facts(name, warnings=warnings, **options)


TWICE, DEAD = Hazard("called_repeatedly", "is called twice"), Hazard("not_finite", "is not finite")


FACTS = (
    known(
        "stem.norm",
        DEAD,
        shapes=((2, 5, 7, 6),),
        batches=3,
        momentum=0.125,
        eps=1e-5,
        dead_channels=4,
        folds_into="stem.conv",
        couples_to="stem.conv",
    ),
    known(
        "body.norm",
        TWICE,
        DEAD,
        shapes=((2, 5, 7, 6), (3, 5, 1, 1)),
        batches=0,
        momentum="cumulative",
        eps=1e-3,
        zero_weights=1,
        why_not_coupled="it is called twice",
    ),
    known("", DEAD, shapes=((2, 5),), eps=1.0, dead_channels=2, zero_weights=5, why_not_coupled="it is called twice"),
    known("head.norm", DEAD, approximate=True, unseen="no inputs are known"),
)


def full() -> Report:
    return Report(
        "model.pt",
        PLAN,
        {"torch": GOOD, "onnxruntime (all)": NAN},
        not_run={"onnx's reference evaluator": "it would take about 40 s"},
        onnx=Export(
            Path("model.onnx"),
            opset=20,
            nodes={"Conv": 3, "Mul": 1},
            sites=(
                Outcome("stem.norm", "into_producer", ("node_conv",)),
                Outcome("body.norm", left=("BatchNormalization",), reason="an output is next to it"),
            ),
            skeleton={"Conv": 3},
            extra={"BatchNormalization": 1},
            input_names=("x",),
            output_names=("y",),
            free=({0: "batch"},),
            cuda=Cuda(
                "https://a.page (a version)",
                floating=5,
                without_kernel=(Missing("node_max_pool2d", "MaxPool", "float32", 22),),
                why="onnxruntime has no CUDAExecutionProvider here",
            ),
        ),
        seconds={"load": 0.25},
        files=("model.onnx", "report.json"),
        fits=FITS,
        facts=FACTS,
    )


def rendered(table: Table) -> list[list[str]]:
    """The cells of each row."""
    console = Console(file=io.StringIO(), width=400)
    console.print(table)
    lines = console.file.getvalue().splitlines()  # type: ignore[attr-defined]
    return [re.split(r"\s{2,}", line.strip()) for line in lines if line.strip() and "─" not in line][1:]
