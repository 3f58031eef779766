"""What coupling, feedback and guard cost: operations of one training step (forward, backward, SGD with momentum), counted and not timed.

    python -m benchmarks.training_cost            prints the tables of docs/benchmarks.md and writes benchmarks/results/training_cost.json

Convolutions and products of matrices count as two operations per multiplication and sum, as in torch.utils.flop_counter. Any other operator
counts one for each element that it writes or reads, whichever are more: a sum those that it reads, a sum of two tensors those that it
writes; a batch norm in train mode those of its parts; a `foreach` as many operators as it is handed tensors, as it runs on a CPU. Views are
free. The tensors have no content (FakeTensor), so the largest step takes seconds.
"""

from __future__ import annotations

import argparse
import importlib
import itertools
import json
import sys
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch._decomp import get_decompositions
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.nn import functional as F
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from torch.utils.flop_counter import flop_registry

import normswap
from normswap.layer.batchless_norm import BatchlessNorm

ROOT = Path(__file__).resolve().parent.parent
KEPT = ROOT / "benchmarks" / "results" / "training_cost.json"
BATCHES = (1, 8, 64)
ROWS = ("batchnorm", "plain", "coupled", "coupled+feedback", "default")
FAKE = FakeTensorMode()
ATEN = torch.ops.aten
ALLOCATE = (ATEN.empty, ATEN.empty_like, ATEN.empty_strided, ATEN.new_empty, ATEN.new_empty_strided)
FLOPS = {**flop_registry, ATEN.mv: lambda matrix, vector, out_val: 2 * matrix.numel()}  # which it does not have
PARTS = get_decompositions([ATEN.native_batch_norm, ATEN.native_batch_norm_backward])


def _in_eval_mode(func: Any, args: Any) -> bool:
    """Whether a batch norm is one with given statistics, which is one scale and one shift: an operator like any other."""
    return func is ATEN.native_batch_norm.default and not args[5]


class Operations(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """Counts the operations of every operator that runs, by its name; and how many operators run (`runs`), with a batch norm as one."""

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.counts: Counter[str] = Counter()
        self.runs = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if func in PARTS and not _in_eval_mode(func, args):
            before = self.runs
            with self:
                result = PARTS[func](*args, **kwargs)
            self.runs = before + 1
            return result
        result = func(*args, **kwargs)
        name = func._overloadpacket.__name__
        if name.startswith("_foreach_"):
            self.runs += len(args[0])
            self.counts[name] += sum(t.numel() for t in args[0])
            return result
        self.runs += not (func.is_view or func.namespace in ("prim", "profiler") or func._overloadpacket in ALLOCATE)
        if func._overloadpacket in FLOPS:
            self.counts[name] += FLOPS[func._overloadpacket](*args, **kwargs, out_val=result)
        elif not func.is_view and func.namespace != "prim":  # what a tensor says of itself
            sizes = [t.numel() for t in tree_leaves((args, kwargs, result)) if isinstance(t, Tensor)]
            self.counts[name] += max(sizes, default=0)
        return result


def digits(strided: tuple[int, ...] = (2, 4)) -> nn.Module:
    """The six convs of benchmarks/training_quality.py; strided: which of them take every other place."""
    widths = (1, 16, 16, 32, 32, 48, 48)
    layers: list[nn.Module] = []
    for number, (i, o) in enumerate(itertools.pairwise(widths)):
        layers += [nn.Conv2d(i, o, 3, stride=2 if number in strided else 1, padding=1), nn.BatchNorm2d(o), nn.ReLU(inplace=True)]
    return nn.Sequential(*layers, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(widths[-1], 10))


def torchvision_net(name: str) -> nn.Module:
    sys.path.insert(0, str(ROOT / "tests/support"))
    importlib.import_module("torchvision_shim")  # before torchvision, which does not import without it on a CPU build of torch
    import torchvision

    return getattr(torchvision.models, name)(weights=None)  # type: ignore[no-any-return]


NETS: dict[str, tuple[Callable[[], nn.Module], tuple[int, int, int]]] = {
    "six convs, 8 x 8": (digits, (1, 8, 8)),
    "six convs without strides, 8 x 8": (lambda: digits(()), (1, 8, 8)),
    "ResNet-18, 32 x 32": (lambda: torchvision_net("resnet18"), (3, 32, 32)),
    "ResNet-18, 224 x 224": (lambda: torchvision_net("resnet18"), (3, 224, 224)),
    "ResNet-50, 32 x 32": (lambda: torchvision_net("resnet50"), (3, 32, 32)),
    "ResNet-50, 224 x 224": (lambda: torchvision_net("resnet50"), (3, 224, 224)),
}


def made(net: str, row: str) -> nn.Module:
    """The model of a row in train mode, its tensors without content."""
    build, shape = NETS[net]
    torch.manual_seed(0)
    model = build().eval()
    if row != "batchnorm":
        x = torch.randn(2, *shape)
        options: dict[str, Any] = {"coupling": "none"} if row == "plain" else {"coupling": "auto", "calibration": [x]}
        model = normswap.convert(model, x, **options).model
        for layer in model.modules():
            if isinstance(layer, BatchlessNorm):
                layer.enable_trend() if row in ("coupled+feedback", "default") else layer.disable_trend()
                layer.limits_samples = row == "default"
    return without_content(model).train()


def without_content(model: nn.Module) -> nn.Module:
    """The model with tensors of `FAKE` in the place of its own. (A parameter that two modules share would be two.)"""
    for module in model.modules():
        own = [(name, tensor, True) for name, tensor in module._parameters.items()]
        for name, tensor, trained in [*own, *((name, tensor, False) for name, tensor in module._buffers.items())]:
            if tensor is not None:
                fake = FAKE.from_tensor(tensor.detach())
                setattr(module, name, nn.Parameter(fake) if trained else fake)
    return model


def operations(model: nn.Module, shape: tuple[int, ...]) -> Operations | None:
    """What was counted in one step: the second one, when the optimizer has its state. None if the model cannot train on it."""
    converted = any(isinstance(m, BatchlessNorm) for m in model.modules())
    parameters: Any = normswap.param_groups(model, lr=0.01) if converted else model.parameters()
    optimizer = torch.optim.SGD(parameters, lr=0.01, momentum=0.9, foreach=False)
    with FAKE:
        x, labels = torch.empty(shape), torch.zeros(shape[0], dtype=torch.int64)
        for _ in range(2):
            counted = Operations()
            with counted:
                optimizer.zero_grad()
                try:
                    F.cross_entropy(model(x), labels).backward()  # type: ignore[no-untyped-call]
                except ValueError:  # BatchNorm, on one value per channel
                    return None
                optimizer.step()
    return counted


def measured(nets: list[str], rows: tuple[str, ...], batches: tuple[int, ...]) -> list[dict[str, Any]]:
    found = []
    for net, row in itertools.product(nets, rows):
        model = made(net, row)
        for batch in batches:
            counted = operations(model, (batch, *NETS[net][1]))
            if counted is not None:
                entry = {"net": net, "batch": batch, "row": row, "operations": counted.counts.total(), "runs": counted.runs}
                found.append({**entry, "by operator": dict(counted.counts.most_common())})
    return found


def extra(entry: dict[str, Any], found: list[dict[str, Any]], reference: str = "plain") -> float:
    """How much more a row takes than the reference, of the same net and batch; in percent."""
    (base,) = (e for e in found if (e["net"], e["batch"], e["row"]) == (entry["net"], entry["batch"], reference))
    return float(100 * (entry["operations"] / base["operations"] - 1))


def table(found: list[dict[str, Any]]) -> list[str]:
    lines = [
        "| net | batch | plain, Mops | plain, against BatchNorm | coupled, against plain | with feedback | with guard, the default |",
        "|---|---|---|---|---|---|---|",
    ]
    for net, batch in sorted({(e["net"], e["batch"]) for e in found}, key=lambda key: (list(NETS).index(key[0]), key[1])):
        row = {e["row"]: e for e in found if (e["net"], e["batch"]) == (net, batch)}
        against = f"{extra(row['plain'], found, 'batchnorm'):+.1f}%" if "batchnorm" in row else "BatchNorm cannot train"
        cells = [f"{row['plain']['operations'] / 1e6:,.1f}", against]
        cells += [f"{extra(row[name], found):+.1f}%" for name in ROWS[2:]]
        lines.append(f"| {net} | {batch} | {' | '.join(cells)} |")
    return lines


def runs(found: list[dict[str, Any]]) -> list[str]:
    """How many operators a step runs at the largest batch: at batch 1 they are up to 2% fewer, as a sum over one sample is none."""
    lines = ["| net | norms | " + " | ".join(ROWS) + " |", "|---|---|" + "---|" * len(ROWS)]
    for net in dict.fromkeys(e["net"] for e in found):
        norms = sum(isinstance(m, nn.modules.batchnorm._BatchNorm) for m in NETS[net][0]().modules())
        row = {e["row"]: e["runs"] for e in found if e["net"] == net and e["batch"] == BATCHES[-1]}
        lines.append(f"| {net} | {norms} | " + " | ".join(f"{row[name]:,}" for name in ROWS) + " |")
    return lines


def operators(found: list[dict[str, Any]], net: str, batch: int, most: int = 12) -> list[str]:
    """Where the operations go, for one net and batch: those of plain, and what the others have beyond it."""
    row = {e["row"]: Counter(e["by operator"]) for e in found if (e["net"], e["batch"]) == (net, batch)}
    total = row["plain"].total()
    names = sorted({n for c in row.values() for n in c}, key=lambda n: -abs(row["default"][n] - row["plain"][n]))[:most]
    lines = ["| operator | plain | coupled | with feedback | with guard |", "|---|---|---|---|---|"]
    for name in names:
        share = [f"{100 * row['plain'][name] / total:.2f}%"]
        share += [f"{100 * (row[r][name] - row['plain'][name]) / total:+.2f}%" for r in ROWS[2:]]
        lines.append(f"| {name} | {' | '.join(share)} |")
    return lines


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--net", nargs="+", choices=NETS, default=list(NETS))
    parser.add_argument("--operators", nargs=2, metavar=("NET", "BATCH"), help="where the operations of this one go")
    options = parser.parse_args()
    if options.operators:
        net, batch = options.operators[0], int(options.operators[1])
        print("\n".join(operators(measured([net], ROWS, (batch,)), net, batch)))
        return
    found = measured(options.net, ROWS, BATCHES)
    print("\n".join([*table(found), "", *runs(found)]))
    if options.net == list(NETS):
        KEPT.write_text(json.dumps({"torch": torch.__version__, "steps": found}, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
