"""What a training step of a converted network costs beside BatchNorm's: processor time, operators, and what is kept for backward.

    python -m benchmarks.training_step [--steps 5] [--net ...]     docs/benchmarks.md, results/training_step.json

A step is forward, backward and SGD with momentum .9, in float32 on one thread. The rows of a net take turns, so that what else the machine
does is the same for all; the figures are medians of the ratios to BatchNorm's step of the same turn.

    weight norm   torch's `parametrizations.weight_norm` on each conv, the norms gone: what a scaled weight costs at least
    none          `convert(..., coupling="none")`
    default       `convert(...)`

Operators: as training_cost counts them, views and allocations left out. Kept: the bytes of all storages that autograd keeps for
backward, besides parameters, buffers and the batch.
"""

from __future__ import annotations

import argparse
import importlib
import json
import statistics
import sys
import time
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.nn.utils.parametrizations import weight_norm

import normswap
from benchmarks.coverage import environment
from benchmarks.training_cost import Operations
from normswap.layer.batchless_norm import BatchlessNorm
from normswap.training.micro import kept_for_backward

ROOT = Path(__file__).resolve().parent.parent
KEPT = ROOT / "benchmarks" / "results" / "training_step.json"
NETS: dict[str, tuple[str, int, int]] = {  # torchvision's name, batch, pixels
    "ResNet-50, 160 px, batch 4": ("resnet50", 4, 160),
    "ResNet-50, 160 px, batch 16": ("resnet50", 16, 160),
    "MobileNetV2, 160 px, batch 8": ("mobilenet_v2", 8, 160),
    "ResNet-18, 32 px, batch 32": ("resnet18", 32, 32),
    "ResNet-18, 32 px, batch 2": ("resnet18", 2, 32),
}
ROWS = ("batchnorm", "weight norm", "none", "default")


def made(name: str, row: str, x: Tensor) -> nn.Module:
    """The network of a row, in train mode, with statistics of the input."""
    sys.path.insert(0, str(ROOT / "tests/support"))
    importlib.import_module("torchvision_shim")  # before torchvision, which does not import without it on a CPU build of torch
    import torchvision

    torch.manual_seed(0)
    model: nn.Module = torchvision.models.get_model(name, weights=None, num_classes=10)
    for norm in model.modules():
        if isinstance(norm, nn.BatchNorm2d):
            norm.momentum = None
    model.train()(torch.cat([x, x.flip(0)])[:8])
    for norm in model.modules():
        if isinstance(norm, nn.BatchNorm2d):
            norm.momentum = 0.1
    if row == "weight norm":
        for parent in list(model.modules()):
            for key, child in list(parent.named_children()):
                if isinstance(child, nn.BatchNorm2d):
                    setattr(parent, key, nn.Identity())
                elif isinstance(child, nn.Conv2d):
                    weight_norm(child)
    elif row != "batchnorm":
        model = normswap.convert(model.eval(), x[:1], coupling="none" if row == "none" else "auto").model
    return model.train()


class Row:
    """A network with its optimizer."""

    def __init__(self, name: str, row: str, x: Tensor) -> None:
        self.model, self.x, self.labels = made(name, row, x), x, torch.arange(len(x)) % 10
        converted = any(isinstance(m, BatchlessNorm) for m in self.model.modules())
        parameters: Any = normswap.param_groups(self.model, lr=0.01) if converted else self.model.parameters()
        self.optimizer = torch.optim.SGD(parameters, lr=0.01, momentum=0.9)
        self.step()
        self.step()

    def step(self) -> float:
        """One step; the processor time that it took."""
        began = time.process_time()
        self.optimizer.zero_grad()
        F.cross_entropy(self.model(self.x), self.labels).backward()  # type: ignore[no-untyped-call]
        self.optimizer.step()
        return time.process_time() - began

    def operators(self) -> int:
        with Operations() as counted:
            self.step()
        return int(counted.runs)

    def kept(self) -> int:
        """The bytes that are kept for backward."""
        with kept_for_backward((*self.model.parameters(), *self.model.buffers(), self.x)) as found:
            loss = F.cross_entropy(self.model(self.x), self.labels)
        total = sum(found.values())
        loss.backward()  # type: ignore[no-untyped-call]
        return total


def measured(net: str, steps: int) -> dict[str, Any]:
    """The figures of all rows of a net, by row."""
    name, batch, pixels = NETS[net]
    x = torch.randn(batch, 3, pixels, pixels, generator=torch.Generator().manual_seed(0))
    rows = {row: Row(name, row, x) for row in ROWS}
    found: dict[str, Any] = {row: {"operators": each.operators(), "kept": each.kept()} for row, each in rows.items()}
    turns = [{row: each.step() for row, each in rows.items()} for _ in range(steps)]
    for row in ROWS:
        found[row]["time"] = round(statistics.median(turn[row] / turn["batchnorm"] for turn in turns), 3)
    found["batchnorm"]["seconds"] = round(statistics.median(turn["batchnorm"] for turn in turns), 3)
    return found


def micro_batches(pixels: int, batch: int = 64) -> dict[str, int]:
    """What a ResNet-18 keeps for backward: with BatchNorm for a whole batch, and converted for one sample at a time."""
    x, labels = torch.randn(batch, 3, pixels, pixels, generator=torch.Generator().manual_seed(0)), torch.arange(batch) % 10
    whole = Row("resnet18", "batchnorm", x).kept()
    row = Row("resnet18", "default", x[:2])
    row.optimizer.zero_grad()
    made = normswap.backward_in_micro_batches(row.model, lambda x, y: F.cross_entropy(row.model(x), y), x, labels, size=1)
    return {"batch": batch, "batchnorm": whole, "default": made.activation_bytes}


def lines_of(micro: dict[str, dict[str, int]]) -> list[str]:
    """The table of `micro_batches` in docs/benchmarks.md."""
    lines = ["| ResNet-18 | batch | BatchNorm keeps, MB | one sample at a time, MB | less by |", "|---|--:|--:|--:|--:|"]
    for pixels, found in micro.items():
        whole, one = found["batchnorm"], found["default"]
        lines.append(f"| {pixels} px | {found['batch']} | {whole / 1e6:.1f} | {one / 1e6:.2f} | {whole / one:.0f} x |")
    return lines


def table(found: dict[str, dict[str, Any]]) -> list[str]:
    """The table of docs/benchmarks.md."""
    lines = [
        "| net | BatchNorm's step, s | time: weight norm | none | default "
        "| operators: BatchNorm | none | default | kept: weight norm | none | default |",
        "|---|" + "--:|" * 10,
    ]
    for net, rows in found.items():
        base = rows["batchnorm"]
        times = [f"{rows[row]['time']:.2f} x" for row in ROWS[1:]]
        operators = [f"{base['operators']:,}", *(f"{rows[row]['operators'] / base['operators']:.1f} x" for row in ("none", "default"))]
        kept = [f"{rows[row]['kept'] / base['kept']:.2f} x" for row in ROWS[1:]]
        lines.append(f"| {net} | {base['seconds']:.2f} | " + " | ".join([*times, *operators, *kept]) + " |")
    return lines


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--steps", type=int, default=5)
    parser.add_argument("--net", nargs="*", choices=list(NETS), default=list(NETS))
    options = parser.parse_args()
    torch.set_num_threads(1)
    found = json.loads(KEPT.read_text(encoding="utf-8"))["nets"] if KEPT.exists() else {}
    micro = {str(pixels): micro_batches(pixels) for pixels in (32, 64, 224)}
    for net in options.net:
        found[net] = measured(net, options.steps)
        print("\n".join(table({net: found[net]})), file=sys.stderr, flush=True)
    found = {net: found[net] for net in NETS if net in found}
    KEPT.write_text(
        json.dumps({"environment": environment(), "steps": options.steps, "nets": found, "micro": micro}, indent=1) + "\n", encoding="utf-8"
    )
    print("\n".join([*table(found), "", *lines_of(micro)]))


if __name__ == "__main__":
    main()
