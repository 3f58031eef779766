"""How many bytes a training step of ResNet-50 reads and writes outside its convolutions: by counting, on tensors without content.

    python -m benchmarks.traffic        docs/benchmarks.md, results/traffic.json

A step is forward, backward and SGD with momentum .9, in float32. An operator reads each of its tensors and writes its result once (an
expanded tensor is as large as what it was expanded from), views nothing. A batch norm reads its input twice, for the statistics and to
normalize it, and writes it once; its backward pass reads input and gradient twice and writes once. Convolutions and products of matrices
count nothing: they are the same for every row.

    activations   tensors with an axis of samples          weights   those of weights and of their gradients, SGD's included

Tensors of one number per channel, or per channel and sample, are left out: time does not go there by bytes but by operators.
"""

from __future__ import annotations

import argparse
import json
from collections import Counter
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

import normswap
from benchmarks.coverage import environment
from benchmarks.training_cost import ALLOCATE, ATEN, FAKE, FLOPS, made
from normswap.layer.batchless_norm import BatchlessNorm

ROOT = Path(__file__).resolve().parent.parent
KEPT = ROOT / "benchmarks" / "results" / "traffic.json"
NET = "ResNet-50, 224 x 224"
STEPS = {"160 px, batch 4": (4, 160), "224 px, batch 32": (32, 224)}
ROWS = ("batchnorm", "plain", "default")
PARTS = ("activations", "weights")
NORM_READS = {ATEN.native_batch_norm: {0: 2}, ATEN.native_batch_norm_backward: {0: 2, 1: 2}}  # how often each argument is read, if not once
LEAST = 16  # numbers per channel, below which a tensor is left out


class Traffic(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """Counts the bytes that operators read and write, by what the tensors are."""

    def __init__(self, batch: int) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.batch = batch
        self.bytes: Counter[str] = Counter()

    def _add(self, found: Any, times: int = 1) -> None:
        for t in tree_leaves(found):
            if isinstance(t, Tensor) and t.dim() > 1:
                sizes = [size for size, stride in zip(t.shape, t.stride(), strict=True) if stride]
                numbers = torch.Size(sizes).numel()
                samples = t.shape[0] == self.batch
                if numbers >= LEAST * (t.shape[0] * t.shape[1] if samples else max(t.shape)):
                    self.bytes["activations" if samples else "weights"] += times * numbers * t.itemsize

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        packet = func._overloadpacket
        if func.is_view or func.namespace in ("prim", "profiler") or packet in ALLOCATE or packet in FLOPS:
            return result
        times = NORM_READS.get(packet, {})
        for place, each in enumerate(args):
            self._add(each, times.get(place, 1))
        self._add(kwargs)
        self._add(result)  # an operator in place reads what it writes
        return result


def counted(row: str, batch: int, pixels: int) -> dict[str, int]:
    """The bytes of the second step, by part."""
    model = made(NET, row)
    converted = any(isinstance(m, BatchlessNorm) for m in model.modules())
    parameters: Any = normswap.param_groups(model, lr=0.01) if converted else model.parameters()
    optimizer = torch.optim.SGD(parameters, lr=0.01, momentum=0.9, foreach=False)
    with FAKE:
        x, labels = torch.empty(batch, 3, pixels, pixels), torch.zeros(batch, dtype=torch.int64)
        for _ in range(2):
            with Traffic(batch) as traffic:
                optimizer.zero_grad()
                F.cross_entropy(model(x), labels).backward()  # type: ignore[no-untyped-call]
                optimizer.step()
    return {part: traffic.bytes[part] for part in PARTS}


def table(found: dict[str, dict[str, dict[str, int]]]) -> list[str]:
    """The table of docs/benchmarks.md."""
    lines = ["| ResNet-50 | | activations, GB | weights, GB | together, against BatchNorm |", "|---|---|--:|--:|--:|"]
    for name, rows in found.items():
        for row in ROWS:
            each, ratio = rows[row], sum(rows[row].values()) / sum(rows[ROWS[0]].values())
            cells = " | ".join(f"{each[part] / 1e9:.2f}" for part in PARTS)
            lines.append(f"| {name if row == ROWS[0] else ''} | {row} | {cells} | {ratio:.2f} x |")
    return lines


def main() -> None:
    argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter).parse_args()
    found = {name: {row: counted(row, *step) for row in ROWS} for name, step in STEPS.items()}
    KEPT.write_text(json.dumps({"environment": environment(), "steps": found}, indent=1) + "\n", encoding="utf-8")
    print("\n".join(table(found)))


if __name__ == "__main__":
    main()
