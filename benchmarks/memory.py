"""How large a batch, and how large an image, a training step in 8 GiB can have: by counting bytes.

    python -m benchmarks.memory [--net ...]        docs/benchmarks.md, results/memory.json

A step is forward, backward and SGD with momentum .9, in float32. Its peak is the most that all its tensors take at one moment: weights,
gradients, momentum and buffers, the batch, what is kept for backward, and what an operator writes. It is the second step, so the momentum
is there. The tensors have no content (FakeTensor), so nothing is allocated. What an operator takes inside, such as the workspace of a
convolution, is not counted. `checked` counts a step of the 2-D U-Net on real tensors as well, and sees by how much the process grows.

    BatchNorm          the network as it is
    converted          `convert(...)`, the whole batch at once
    one at a time      `convert(...)`, by `backward_in_micro_batches(size=1)`
"""

from __future__ import annotations

import argparse
import copy
import ctypes
import functools
import json
import subprocess
import sys
import threading
import weakref
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

import normswap
from benchmarks.coverage import environment
from benchmarks.training_cost import FAKE, torchvision_net, without_content
from normswap.layer.batchless_norm import BatchlessNorm

ROOT = Path(__file__).resolve().parent.parent
KEPT = ROOT / "benchmarks" / "results" / "memory.json"
LIMIT = 8 * 2**30
ROWS = ("BatchNorm", "converted", "one at a time")


@dataclass(frozen=True)
class Net:
    """build: the network; channels: of its images; dims: 2 or 3 axes; pixels: along each of them; step: they are a multiple of it;
    least: they are at least this many; batch: at which the peaks are compared."""

    build: Callable[[], nn.Module]
    channels: int
    dims: int
    pixels: int
    step: int
    least: int
    batch: int


def unet(dims: int, channels: int, features: tuple[int, ...]) -> nn.Module:
    """MONAI's BasicUNet with BatchNorm: two classes for each pixel."""
    from monai.networks.nets.basic_unet import BasicUNet

    model: nn.Module = BasicUNet(dims, channels, 2, features, norm="batch")
    return model


NETS = {
    "ResNet-50": Net(lambda: torchvision_net("resnet50"), 3, 2, 224, 32, 64, 64),
    "U-Net": Net(lambda: unet(2, 3, (64, 128, 256, 512, 1024, 128)), 3, 2, 1024, 16, 32, 4),
    "U-Net, 3-D": Net(lambda: unet(3, 1, (32, 32, 64, 128, 256, 32)), 1, 3, 128, 16, 32, 2),
}


# --- counting ----------------------------------------------------------------------------------------------------------------------------


class Live(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """Counts the bytes of the tensors that operators make, while they exist: `bytes` now, and the most of them, `peak`."""

    def __init__(self, *tensors: Tensor) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.bytes = self.peak = 0
        self._seen: set[int] = set()
        self._lock = threading.RLock()  # backward of a custom function runs in a thread of its own
        self._add(tensors)

    def _add(self, found: Any) -> None:
        with self._lock:
            for t in tree_leaves(found):
                if isinstance(t, Tensor):
                    storage = t.untyped_storage()
                    if storage._cdata not in self._seen:
                        self._seen.add(storage._cdata)
                        self.bytes += storage.nbytes()
                        weakref.finalize(storage, self._freed, storage._cdata, storage.nbytes()).atexit = False
            self.peak = max(self.peak, self.bytes)

    def _freed(self, key: int, size: int) -> None:
        with self._lock:
            self._seen.discard(key)
            self.bytes -= size

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        self._add(result)
        return result


@functools.cache
def _made(net: str, *, converted: bool) -> nn.Module:
    spec = NETS[net]
    torch.manual_seed(0)
    model = spec.build().eval()
    return normswap.convert(model, torch.randn(1, spec.channels, *(spec.least,) * spec.dims)).model if converted else model


def made(net: str, row: str) -> nn.Module:
    """The network of a row, in train mode."""
    return copy.deepcopy(_made(net, converted=row != "BatchNorm")).train()


class Step:
    """The training step of a model, with its batch."""

    def __init__(self, model: nn.Module, x: Tensor, *, one_at_a_time: bool = False) -> None:
        self.model, self.x, self.one_at_a_time = model, x, one_at_a_time
        converted = any(isinstance(m, BatchlessNorm) for m in model.modules())
        parameters: Any = normswap.param_groups(model, lr=0.01) if converted else model.parameters()
        self.optimizer = torch.optim.SGD(parameters, lr=0.01, momentum=0.9)
        with torch.no_grad():
            shape = model.eval()(x[:1]).shape
            model.train()
        self.labels = torch.zeros(len(x), *shape[2:], dtype=torch.int64)

    def run(self) -> None:
        self.optimizer.zero_grad()
        if self.one_at_a_time:
            normswap.backward_in_micro_batches(self.model, lambda x, y: F.cross_entropy(self.model(x), y), self.x, self.labels, size=1)
        else:
            F.cross_entropy(self.model(self.x), self.labels).backward()  # type: ignore[no-untyped-call]
        self.optimizer.step()

    def peak(self) -> int:
        """Of the second step."""
        with Live(*self.model.parameters(), *self.model.buffers(), self.x, self.labels) as live:
            self.run()
            live.peak = 0
            self.run()
        return int(live.peak)


@functools.cache
def peak(net: str, row: str, batch: int, pixels: int) -> int:
    """The peak of a step in bytes. For one at a time, a sample beyond the third adds what it is itself: the peaks of two and three tell."""
    if row == "one at a time" and batch == 1:
        return peak(net, "converted", 1, pixels)
    if row == "one at a time" and batch > 3:
        two, three = (peak(net, row, n, pixels) for n in (2, 3))
        return three + (batch - 3) * (three - two)
    spec = NETS[net]
    model = without_content(made(net, row))
    with FAKE:
        return Step(model, torch.empty(batch, spec.channels, *(pixels,) * spec.dims), one_at_a_time=row == "one at a time").peak()


def largest(peak_of: Callable[[int], int], first: int, power: int = 1, limit: int = LIMIT) -> int:
    """The largest n whose peak, which grows with n, is within the limit; 0 if there is none.

    Looked for from `first` on, where the line through the last two peaks over n ** power says; each end of the range is counted.
    """
    points: list[tuple[int, int]] = []
    low, n = 0, first
    high: int | None = None
    while high is None or high - low > 1:
        points = [*points[-1:], (n**power, peak_of(n))]
        low, high = (n, high) if points[-1][1] <= limit else (low, n)
        n = 2 * low if high is None else (low + high) // 2
        if len(points) == 2 and points[0][1] != points[1][1]:
            (x, y), (other, value) = points
            found = max(x + (limit - y) * (other - x) / (value - y), 0.0)
            n = int(found ** (1 / power))
            n += n <= low  # the line says that low is the largest: look at the one beyond it
        n = max(n, low + 1) if high is None else min(max(n, low + 1), high - 1)
    return low


def measured(net: str) -> dict[str, Any]:
    """For each row the peak at the batch of the net, the largest batch, and the largest image of one sample."""
    spec = NETS[net]
    found: dict[str, Any] = {}
    for row in ROWS:
        batch = largest(functools.partial(peak, net, row, pixels=spec.pixels), spec.batch)
        steps = largest(lambda n, row=row: peak(net, row, 1, n * spec.step), 2 * spec.pixels // spec.step, spec.dims)  # type: ignore[misc]
        found[row] = {"peak": peak(net, row, spec.batch, spec.pixels), "batch": batch, "pixels": steps * spec.step}
        print(net, row, found[row], file=sys.stderr, flush=True)
    return found


# --- a check -----------------------------------------------------------------------------------------------------------------------------

SMALL = ("U-Net", 2, 256)  # net, batch, pixels


def _real(row: str) -> dict[str, int]:
    """In a process of its own: the peak as it is counted on real tensors, and the most memory of the process, less what it had before.

    What it had before were the model and the batch, which a peak includes.
    """
    net, batch, pixels = SMALL
    torch.set_num_threads(1)
    step = Step(made(net, row), torch.randn(batch, NETS[net].channels, pixels, pixels), one_at_a_time=row == "one at a time")
    held = sum(t.nbytes for t in (*step.model.parameters(), *step.model.buffers(), step.x, step.labels))
    counted = step.peak()
    step.optimizer.zero_grad()
    momentum = sum(v["momentum_buffer"].nbytes for v in step.optimizer.state.values() if v.get("momentum_buffer") is not None)
    _libc().malloc_trim(0)
    Path("/proc/self/clear_refs").write_text("5", encoding="ascii")  # the most memory is from here on
    before = _memory("VmRSS")
    step.run()
    return {"counted": counted, "process": _memory("VmHWM") - before + held + momentum}


def _libc() -> ctypes.CDLL:
    return ctypes.CDLL("libc.so.6")


def _memory(name: str) -> int:
    (line,) = (line for line in Path("/proc/self/status").read_text(encoding="ascii").splitlines() if line.startswith(f"{name}:"))
    return 1024 * int(line.split()[1])


def checked() -> dict[str, dict[str, int]]:
    """The peak of a small step in three ways, by row: counted without content, counted on real tensors, and the memory of a process."""
    found = {}
    for row in ROWS:
        code = f"import json; from benchmarks import memory; print(json.dumps(memory._real({row!r})))"
        done = subprocess.run([sys.executable, "-W", "ignore", "-c", code], capture_output=True, text=True, check=True, cwd=ROOT)
        found[row] = {"without content": peak(SMALL[0], row, *SMALL[1:]), **json.loads(done.stdout.splitlines()[-1])}
        print("checked", row, found[row], file=sys.stderr, flush=True)
    return found


# --- the tables --------------------------------------------------------------------------------------------------------------------------


def table(found: dict[str, Any]) -> list[str]:
    """The table of docs/benchmarks.md."""
    lines = ["| net | | peak, GiB | largest batch in 8 GiB | largest image in 8 GiB |", "|---|---|--:|--:|--:|"]
    for net, rows in found.items():
        spec = NETS[net]
        for row in ROWS:
            batch, pixels = rows[row]["batch"], rows[row]["pixels"]
            at = f"{net}, {' x '.join([str(spec.pixels)] * spec.dims)}, batch {spec.batch}" if row == ROWS[0] else ""
            size = " x ".join([f"{pixels:,}"] * spec.dims)
            lines.append(f"| {at} | {row} | {rows[row]['peak'] / 2**30:.2f} | {batch:,} | {size} |")
    return lines


def check_table(found: dict[str, dict[str, int]]) -> list[str]:
    """The second table of docs/benchmarks.md."""
    lines = [
        f"| {SMALL[0]}, {SMALL[2]} x {SMALL[2]}, batch {SMALL[1]}, MB | counted | on real tensors | the process |",
        "|---|--:|--:|--:|",
    ]
    for row, ways in found.items():
        lines.append(f"| {row} | " + " | ".join(f"{ways[way] / 1e6:,.0f}" for way in ("without content", "counted", "process")) + " |")
    return lines


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--net", nargs="*", choices=list(NETS), default=list(NETS), help="the others stay as they were measured")
    options = parser.parse_args()
    found = json.loads(KEPT.read_text(encoding="utf-8")) if KEPT.exists() else {"nets": {}}
    for net in options.net:
        found["nets"][net] = measured(net)
    if "check" not in found or options.net == list(NETS):
        found["check"] = checked()
    nets = {net: found["nets"][net] for net in NETS if net in found["nets"]}
    found = {"environment": environment(), "limit": LIMIT, "nets": nets, "check": found["check"]}
    KEPT.write_text(json.dumps(found, indent=1) + "\n", encoding="utf-8")
    print("\n".join([*table(found["nets"]), "", *check_table(found["check"])]))


if __name__ == "__main__":
    main()
