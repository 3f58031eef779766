"""What a training step of a converted network costs beside BatchNorm's where torch.compile (inductor, CPU) compiles both.

    python -m benchmarks.compiled_step [--steps 15] [--net ...]     docs/benchmarks.md, results/compiled_step.json

As benchmarks.training_step: processor time of forward, backward and SGD with momentum .9, in float32 on one thread, the rows in turn,
medians of the ratios to the compiled BatchNorm net's step of the same turn. The model is compiled, the optimizer's step is not.

    compiled batchnorm, compiled default     `torch.compile(model)`, of the network as it is and of `convert(...)`
    batchnorm, default                       the same without it
"""

from __future__ import annotations

import argparse
import itertools
import json
import statistics
import sys
import time
from pathlib import Path
from typing import Any

import torch
from torch.nn import functional as F

from benchmarks.coverage import environment
from benchmarks.training_step import Row

ROOT = Path(__file__).resolve().parent.parent
KEPT = ROOT / "benchmarks" / "results" / "compiled_step.json"
NETS: dict[str, tuple[str, int, int]] = {  # torchvision's name, batch, pixels
    "ResNet-18, 64 px, batch 8": ("resnet18", 8, 64),
    "MobileNetV2, 96 px, batch 4": ("mobilenet_v2", 4, 96),
}
BASE = "compiled batchnorm"
ROWS = (BASE, "compiled default", "batchnorm", "default")
PARTS = ("forward", "backward", "step")


class Compiled(Row):
    """A network with its optimizer, compiled if the name of the row says so."""

    def __init__(self, name: str, row: str, x: torch.Tensor) -> None:
        super().__init__(name, row.removeprefix("compiled "), x)
        if row.startswith("compiled "):
            self.model = torch.compile(self.model)  # type: ignore[assignment]
            self.parts()
            self.parts()

    def parts(self) -> dict[str, float]:
        """The processor time of a step, in seconds."""
        times = [time.process_time()]
        self.optimizer.zero_grad()
        loss = F.cross_entropy(self.model(self.x), self.labels)
        times.append(time.process_time())
        loss.backward()  # type: ignore[no-untyped-call]
        times.append(time.process_time())
        self.optimizer.step()
        times.append(time.process_time())
        return {part: after - before for part, (before, after) in zip(PARTS, itertools.pairwise(times), strict=True)}


def measured(net: str, steps: int) -> dict[str, Any]:
    """By row: the ratio of its step to the base's, and the milliseconds of its parts."""
    name, batch, pixels = NETS[net]
    x = torch.randn(batch, 3, pixels, pixels, generator=torch.Generator().manual_seed(0))
    rows = {row: Compiled(name, row, x) for row in ROWS}
    turns = [{row: each.parts() for row, each in rows.items()} for _ in range(steps)]
    found: dict[str, Any] = {}
    for row in ROWS:
        ratio = statistics.median(sum(turn[row].values()) / sum(turn[BASE].values()) for turn in turns)
        ms = {part: round(1000 * statistics.median(turn[row][part] for turn in turns), 1) for part in PARTS}
        found[row] = {"time": round(ratio, 3), "ms": ms}
    return found


def table(found: dict[str, Any]) -> list[str]:
    """The table of docs/benchmarks.md."""
    lines = ["| net | | time | forward, ms | backward, ms | step, ms |", "|---|---|--:|--:|--:|--:|"]
    for net, rows in found.items():
        for row in ROWS:
            ms = " | ".join(f"{rows[row]['ms'][part]:.1f}" for part in PARTS)
            lines.append(f"| {net if row == BASE else ''} | {row} | {rows[row]['time']:.2f} x | {ms} |")
    return lines


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--steps", type=int, default=15)
    parser.add_argument("--net", nargs="*", choices=list(NETS), default=list(NETS), help="the others stay as they were measured")
    options = parser.parse_args()
    torch.set_num_threads(1)
    found = json.loads(KEPT.read_text(encoding="utf-8"))["nets"] if KEPT.exists() else {}
    for net in options.net:
        found[net] = measured(net, options.steps)
        print("\n".join(table({net: found[net]})), file=sys.stderr, flush=True)
    found = {net: found[net] for net in NETS if net in found}
    KEPT.write_text(json.dumps({"environment": environment(), "steps": options.steps, "nets": found}, indent=1) + "\n", encoding="utf-8")
    print("\n".join(table(found)))


if __name__ == "__main__":
    main()
