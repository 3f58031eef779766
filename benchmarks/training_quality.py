"""Does a converted network learn as well as with BatchNorm, at any batch size? Against BatchNorm and what else there is.

    python -m benchmarks.training_quality run [--quick] [--task ...] [--batch ...] [--row ...] [--lr ...] [--seed ...] [--part 1/2]
    python -m benchmarks.training_quality collect        what was run, into results/training_quality*.jsonl and docs/training_quality.md
    python -m benchmarks.training_quality report         the tables of docs/benchmarks.md, and docs/training_quality.svg

Every run is one line of JSON in build/training_quality.jsonl. Those that are there or in docs are not run again, so it goes on where it was
interrupted, and `--part 1/2` and `--part 2/2` share it out to two processes.

Every row starts from the same weights and from statistics of the same first images, sees the same samples in the same order, and is
trained by SGD with momentum .9 on a cosine schedule, no weight decay. The learning rate is the one with the best mean accuracy on the
validation sets of all seeds, and of equal ones the one with the lower training loss; what is reported is that of the test sets. Each seed
has its own split, weights and order.

    adapt     (a) a net of three convs that learned the digits of scikit-learn, on inverted, noisy ones: 300 images
    scratch   (b) a net of six convs from scratch, on the digits
    clutter   (c) a ResNet-20 with 8, 16 and 32 channels from scratch, on digits that are scaled, rotated, shifted and cluttered, 32 x 32,
              until its training loss is about .02; "clutter, short" in a third of that, where it is at .6
    preact    (d) a net of three blocks whose norms come before the convs, on the digits
    mlp       (e) three linear layers on the digits        parity   the parity of 3 of 16 bits
"""

from __future__ import annotations

import argparse
import copy
import functools
import itertools
import json
import math
import statistics
import time
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import torch
from sklearn.datasets import load_digits
from torch import Tensor, nn
from torch.nn import functional as F
from torch.nn.modules.batchnorm import _BatchNorm

import normswap
from benchmarks import peers
from normswap.layer.batchless_norm import BatchlessNorm

ROOT = Path(__file__).resolve().parent.parent
RUNNING, KEPT, FRESH, DETAILS, PLOT = (
    ROOT / "build" / "training_quality.jsonl",
    ROOT / "benchmarks" / "results" / "training_quality.jsonl",
    ROOT / "benchmarks" / "results" / "training_quality_fresh.jsonl",
    ROOT / "docs" / "training_quality.md",
    ROOT / "docs" / "training_quality.svg",
)
RATES = (0.0003, 0.001, 0.003, 0.01, 0.03, 0.1, 0.3)
WIDE = ("batchnorm", "default")  # the rows that are run at all of them: where does the one train, and the other not?
TARGET = 0.5  # a training loss to reach
KEYS = ("task", "row", "batch", "lr", "seed")
START = 256  # images that the first statistics are measured on


class Images(NamedTuple):
    x: Tensor
    y: Tensor


class Split(NamedTuple):
    train: Images
    validation: Images
    test: Images


# --- data --------------------------------------------------------------------------------------------------------------------------------


def _digits(seed: int, train: int = 1347, validation: int = 150) -> Split:
    data = load_digits()
    x, y = torch.tensor(data.images, dtype=torch.float32)[:, None] / 16, torch.tensor(data.target)
    order = torch.randperm(len(x), generator=torch.Generator().manual_seed(seed))
    parts = slice(train), slice(train, train + validation), slice(train + validation, None)
    return Split(*(Images(x[order[part]], y[order[part]]) for part in parts))


def _inverted(seed: int) -> Split:
    generator = torch.Generator().manual_seed(seed)
    clean = _digits(seed, 1000, 300)
    moved = Split(*(Images(1 - part.x + 0.3 * torch.randn(part.x.shape, generator=generator), part.y) for part in clean))
    return moved._replace(train=Images(moved.train.x[:300], moved.train.y[:300]))


def _cluttered(seed: int, train: int = 4000, validation: int = 500) -> Split:
    """Digits turned by up to 30 degrees, 1.6 to 3 times as large, somewhere in 32 x 32, with six pieces of other digits and noise."""
    generator = torch.Generator().manual_seed(1000 + seed)

    def uniform(n: int, low: float, high: float) -> Tensor:
        return low + (high - low) * torch.rand(n, generator=generator)

    def placed(x: Tensor, size: Tensor, turn: Tensor) -> Tensor:
        n = len(x)
        zoom = 32 / (8 * size)
        cos, sin = turn.cos() * zoom, turn.sin() * zoom
        room = (zoom - 1).clamp(min=0)
        across, down = uniform(n, -1, 1) * room, uniform(n, -1, 1) * room
        theta = torch.stack([torch.stack([cos, -sin, across], 1), torch.stack([sin, cos, down], 1)], 1)
        return F.grid_sample(x, F.affine_grid(theta, [n, 1, 32, 32], align_corners=False), align_corners=False)

    def made(part: Images, count: int) -> Images:
        rows = torch.randint(len(part.x), (count,), generator=generator)
        image = placed(part.x[rows], uniform(count, 1.6, 3), uniform(count, -0.5, 0.5))
        for _ in range(6):
            other = part.x[torch.randint(len(part.x), (count,), generator=generator)].clone()
            corner = torch.randint(0, 6, (2,), generator=generator).tolist()
            piece = torch.zeros_like(other)
            window = (..., slice(corner[0], corner[0] + 3), slice(corner[1], corner[1] + 3))
            piece[window] = other[window]
            image = torch.maximum(image, placed(piece, uniform(count, 1.6, 3), uniform(count, -3, 3)))
        return Images(image + 0.1 * torch.randn(image.shape, generator=generator), part.y[rows])

    source = _digits(seed, 1197, 200)
    return Split(made(source.train, train), made(source.validation, validation), made(source.test, 1000))


def _parity(seed: int) -> Split:
    generator = torch.Generator().manual_seed(seed)
    x = torch.randint(0, 2, (6000, 16), generator=generator)
    y = x[:, :3].sum(1) % 2
    parts = slice(4000), slice(4000, 5000), slice(5000, None)
    return Split(*(Images(x[part].float() * 2 - 1, y[part]) for part in parts))


# --- networks ----------------------------------------------------------------------------------------------------------------------------


def _plain(widths: Iterable[int], strided: tuple[int, ...]) -> nn.Module:
    layers: list[nn.Module] = []
    widths = tuple(widths)
    for number, (i, o) in enumerate(itertools.pairwise(widths)):
        layers += [nn.Conv2d(i, o, 3, stride=2 if number in strided else 1, padding=1), nn.BatchNorm2d(o), nn.ReLU(inplace=True)]
    return nn.Sequential(*layers, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(widths[-1], 10))


class _Block(nn.Module):
    """He et al. arXiv:1512.03385, with a projection where the shape changes."""

    def __init__(self, i: int, o: int, stride: int) -> None:
        super().__init__()
        self.conv1, self.bn1 = nn.Conv2d(i, o, 3, stride, 1, bias=False), nn.BatchNorm2d(o)
        self.conv2, self.bn2 = nn.Conv2d(o, o, 3, 1, 1, bias=False), nn.BatchNorm2d(o)
        same = i == o and stride == 1
        self.short = nn.Identity() if same else nn.Sequential(nn.Conv2d(i, o, 1, stride, bias=False), nn.BatchNorm2d(o))

    def forward(self, x: Tensor) -> Tensor:
        y: Tensor = self.bn2(self.conv2(F.relu(self.bn1(self.conv1(x)))))
        return F.relu(torch.add(y, self.short(x)))


def _resnet20() -> nn.Module:
    layers: list[nn.Module] = [nn.Conv2d(1, 8, 3, padding=1, bias=False), nn.BatchNorm2d(8), nn.ReLU()]
    i = 8
    for o, stride in ((8, 1), (16, 2), (32, 2)):
        for k in range(3):
            layers.append(_Block(i, o, stride if k == 0 else 1))
            i = o
    return nn.Sequential(*layers, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(32, 10))


class _PreBlock(nn.Module):
    """He et al. arXiv:1603.05027: every norm reads a sum."""

    def __init__(self, i: int, o: int, stride: int) -> None:
        super().__init__()
        self.bn1, self.conv1 = nn.BatchNorm2d(i), nn.Conv2d(i, o, 3, stride, 1, bias=False)
        self.bn2, self.conv2 = nn.BatchNorm2d(o), nn.Conv2d(o, o, 3, 1, 1, bias=False)
        self.short = nn.Identity() if i == o and stride == 1 else nn.Conv2d(i, o, 1, stride, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        y: Tensor = self.conv2(F.relu(self.bn2(self.conv1(F.relu(self.bn1(x))))))
        return torch.add(y, self.short(x))


def _preact() -> nn.Module:
    blocks = [_PreBlock(16, 16, 1), _PreBlock(16, 32, 2), _PreBlock(32, 48, 2)]
    return nn.Sequential(
        nn.Conv2d(1, 16, 3, padding=1), *blocks, nn.BatchNorm2d(48), nn.ReLU(), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(48, 10)
    )


def _mlp(i: int, width: int, hidden: int, o: int) -> nn.Module:
    layers: list[nn.Module] = [nn.Flatten()]
    for k in range(hidden):
        layers += [nn.Linear(width if k else i, width), nn.BatchNorm1d(width), nn.ReLU()]
    return nn.Sequential(*layers, nn.Linear(width, o))


@dataclass(frozen=True)
class Task:
    """epochs: batch -> how often the training set is seen. learned: what the net learned before. quick: batch -> rates of `--quick`.

    large: whether it takes so long that these are all that there are.
    """

    data: Callable[[int], Split]
    network: Callable[[], nn.Module]
    epochs: dict[int, int]
    seeds: int
    rows: tuple[str, ...]
    quick: Mapping[int, tuple[float, ...]]
    learned: Callable[[int], Split] | None = None
    large: bool = False


PEERS = ("batchnorm", "frozen", "groupnorm", "groupnorm+ws", "online", "mabn", "renorm")
ALL = (*PEERS, "plain", "coupled", "default")
CLOSE = ("batchnorm", "online", "mabn", "default")
FEW = ("batchnorm", "groupnorm+ws", "online", "mabn", "renorm", "plain", "coupled", "default")
SMALL: dict[int, tuple[float, ...]] = {2: (0.001, 0.003, 0.01), 16: (0.003, 0.01, 0.03), 64: (0.01, 0.03, 0.1)}
TASKS = {
    "adapt": Task(
        _inverted,
        lambda: _plain((1, 16, 32, 48), (1, 2)),
        dict.fromkeys((1, 2, 4, 8, 16, 64), 6),
        5,
        ALL,
        {**SMALL, 1: (0.0003, 0.001, 0.003), 4: SMALL[2], 8: SMALL[16]},
        learned=lambda seed: _digits(seed, 1000, 300),
    ),
    "scratch": Task(
        _digits,
        lambda: _plain((1, 16, 16, 32, 32, 48, 48), (2, 4)),
        {1: 1, 2: 1, 4: 2, 8: 3, 16: 4, 64: 6},
        5,
        ALL,
        {**SMALL, 1: SMALL[2], 4: SMALL[2], 8: SMALL[16]},
    ),
    "clutter": Task(
        _cluttered,
        _resnet20,
        dict.fromkeys((2, 16, 64), 24),
        3,
        ("batchnorm", "default"),
        {2: (0.003,), 16: (0.01, 0.03), 64: (0.03, 0.1)},
        large=True,
    ),
    "clutter, short": Task(
        _cluttered, _resnet20, {2: 8, 16: 4, 64: 8}, 3, CLOSE, {2: (0.001, 0.003), 16: (0.01, 0.03), 64: (0.03, 0.1)}, large=True
    ),
    "preact": Task(_digits, _preact, {2: 1, 16: 4, 64: 6}, 3, FEW, SMALL),
    "mlp": Task(_digits, lambda: _mlp(64, 64, 3, 10), {2: 1, 16: 4, 64: 6}, 3, FEW, SMALL),
    "parity": Task(_parity, lambda: _mlp(16, 64, 2, 2), {2: 1, 16: 2, 64: 6}, 3, FEW, SMALL),
}


# --- rows --------------------------------------------------------------------------------------------------------------------------------


def _measured(model: nn.Module, x: Tensor) -> nn.Module:
    """With the BatchNorm statistics of x, those of each layer after those of the layers before it."""
    norms = [m for m in model.modules() if isinstance(m, _BatchNorm)]
    for norm in norms:
        norm.reset_running_stats()
        norm.momentum = None
    with torch.no_grad():
        model.train()(x)
    for norm in norms:
        norm.momentum = 0.1
    return model


def _converted(model: nn.Module, start: Tensor, *, coupled: bool = True, feedback: bool = False, guarded: bool = False) -> nn.Module:
    options: dict[str, Any] = {"calibration": [start], "coupling": "auto"} if coupled else {"coupling": "none"}
    made = normswap.convert(model.eval(), start[:2], **options).model
    for layer in made.modules():
        if isinstance(layer, BatchlessNorm):
            layer.limits_samples = guarded
            layer.enable_trend() if feedback else layer.disable_trend()
    return made


def _peer(change: Callable[[nn.Module], None]) -> Callable[[nn.Module, Tensor, int], nn.Module]:
    def make(model: nn.Module, start: Tensor, batch: int) -> nn.Module:
        change(model)
        return model

    return make


ROWS: dict[str, Callable[[nn.Module, Tensor, int], nn.Module]] = {
    "batchnorm": lambda model, start, batch: model,
    "frozen": _peer(peers.frozen),
    "groupnorm": _peer(peers.group_norm),
    "groupnorm+ws": _peer(peers.group_norm_standardized),
    "online": _peer(peers.online_norm),
    "mabn": _peer(peers.mabn),
    "renorm": _peer(peers.batch_renorm),
    "plain": lambda model, start, batch: _converted(model, start, coupled=False),
    "feedback": lambda model, start, batch: _converted(model, start, coupled=False, feedback=True),
    "guarded": lambda model, start, batch: _converted(model, start, coupled=False, guarded=True),
    "coupled": lambda model, start, batch: _converted(model, start),
    "coupled+feedback": lambda model, start, batch: _converted(model, start, feedback=True),
    "default": lambda model, start, batch: _converted(model, start, feedback=True, guarded=True),  # and param_groups(batch=batch)
}


def _groups(model: nn.Module, lr: float, batch: int | None) -> Any:
    return (
        normswap.param_groups(model, lr=lr, batch=batch)
        if any(isinstance(m, BatchlessNorm) for m in model.modules())
        else model.parameters()
    )


# --- a run -------------------------------------------------------------------------------------------------------------------------------


def _train(model: nn.Module, data: Images, batch: int, epochs: int, lr: float, seed: int, *, paced: bool) -> list[float]:
    optimizer = torch.optim.SGD(_groups(model, lr, batch if paced else None), lr=lr, momentum=0.9)
    order = torch.Generator().manual_seed(seed)
    each = len(data.x) // batch
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, epochs * each)
    told = [m for m in model.modules() if isinstance(m, peers.Peer)]
    losses: list[float] = []
    for _ in range(epochs):
        for rows in torch.randperm(len(data.x), generator=order)[: each * batch].view(-1, batch):
            for peer in told:
                peer.progress = len(losses) / (epochs * each)
            optimizer.zero_grad()
            loss = F.cross_entropy(model(data.x[rows]), data.y[rows])
            loss.backward()  # type: ignore[no-untyped-call]
            optimizer.step()
            schedule.step()
            losses.append(loss.item())
            if not math.isfinite(losses[-1]):
                return losses
    return losses


@functools.cache
def _learned(task: str, seed: int) -> nn.Module:
    """The network as all rows of a seed get it."""
    torch.manual_seed(seed)
    spec = TASKS[task]
    model = spec.network()
    if spec.learned is not None:
        before = spec.learned(seed)
        _measured(model, before.train.x[:START])
        _train(model, before.train, 64, 8, 0.1, seed, paced=False)
    return model


@torch.no_grad()
def _accuracy(model: nn.Module, data: Images) -> float:
    return float((model.eval()(data.x).argmax(1) == data.y).float().mean())


def run(task: str, row: str, batch: int, lr: float, seed: int) -> dict[str, Any]:
    spec = TASKS[task]
    data = spec.data(seed)
    model = ROWS[row](_measured(copy.deepcopy(_learned(task, seed)), data.train.x[:START]), data.train.x[:START], batch).train()
    torch.manual_seed(seed)
    began = time.perf_counter()
    losses = _train(model, data.train, batch, spec.epochs[batch], lr, seed, paced=row == "default")
    seconds = time.perf_counter() - began
    smooth = list(itertools.accumulate(losses, lambda old, new: old + (new - old) * min(1, batch / 256)))
    found = {
        "validation": round(_accuracy(model, data.validation), 4),
        "test": round(_accuracy(model, data.test), 4),
        "finite": math.isfinite(losses[-1]),
        "steps": len(losses),
        "loss": round(statistics.fmean(losses[-max(1, len(losses) // 10) :]), 4),
        "to_target": next((step for step, loss in enumerate(smooth, 1) if loss <= TARGET), None),
        "ms": round(1000 * seconds / len(losses), 2),
    }
    return {**dict(zip(KEYS, (task, row, batch, lr, seed), strict=True)), **found}


# --- all of them -------------------------------------------------------------------------------------------------------------------------


def _read() -> dict[tuple[Any, ...], dict[str, Any]]:
    lines = [line for path in (KEPT, FRESH, RUNNING) if path.exists() for line in path.read_text(encoding="utf-8").splitlines()]
    found = [json.loads(line) for line in lines]
    return {tuple(entry[key] for key in KEYS): entry for entry in found}


def rates_of(row: str, batch: int) -> tuple[float, ...]:
    """Four, half a power of ten apart, and larger for larger batches."""
    first = 0 if batch < 4 else 1 if batch < 16 else 2 if batch < 64 else 3
    return RATES if row in WIDE else RATES[first : first + 4]


def _wanted(options: argparse.Namespace) -> Iterator[tuple[str, str, int, float, int]]:
    """Seed by seed, so that what there is when it is interrupted is complete for some."""
    for seed in range(max(spec.seeds for spec in TASKS.values())) if options.seed is None else options.seed:
        for task in options.task or TASKS:
            spec = TASKS[task]
            for batch, row in itertools.product(spec.epochs, spec.rows):
                grid = spec.quick.get(batch, ()) if options.quick or spec.large else rates_of(row, batch)
                rates = grid if options.lr is None else options.lr
                known = row in ROWS and (options.seed is not None or seed < spec.seeds)
                if known and row in (options.row or spec.rows) and batch in (options.batch or spec.epochs):
                    yield from ((task, row, batch, lr, seed) for lr in rates)


def _run_all(options: argparse.Namespace) -> None:
    torch.set_num_threads(1)
    part, parts = map(int, options.part.split("/"))
    wanted = list(_wanted(options))
    RUNNING.parent.mkdir(exist_ok=True)
    for number, settings in enumerate(wanted):
        if number % parts == part - 1 and settings not in _read():
            entry = run(*settings)
            with RUNNING.open("a", encoding="utf-8") as file:
                file.write(json.dumps(entry) + "\n")
            print(f"{number + 1}/{len(wanted)}", json.dumps(entry), flush=True)


def _sorted() -> tuple[list[dict[str, Any]], list[dict[str, Any]]]:
    """(the runs of the study's seeds, those of seeds beyond them)"""
    found: tuple[list[dict[str, Any]], list[dict[str, Any]]] = ([], [])
    for _, entry in sorted(_read().items()):
        found[entry["seed"] >= TASKS[entry["task"]].seeds].append(entry)
    return found


def _collect(options: argparse.Namespace) -> None:
    found = _sorted()
    for path, entries in zip((KEPT, FRESH), found, strict=True):
        path.write_text("".join(json.dumps(entry) + "\n" for entry in entries), encoding="utf-8")
    DETAILS.write_text(page(found[0]), encoding="utf-8")


class Best(NamedTuple):
    """Of one row of one task at one batch size, at the learning rate that validation chose. range: the stable learning rates."""

    lr: float
    tests: dict[int, float]
    to_target: float | None
    ms: float
    stable: tuple[float, float]


def best_of(entries: Iterable[dict[str, Any]]) -> Best | None:
    """Over the seeds that every learning rate was run with."""
    by_rate: dict[float, dict[int, dict[str, Any]]] = {}
    for entry in entries:
        by_rate.setdefault(entry["lr"], {})[entry["seed"]] = entry
    if not by_rate:
        return None
    seeds = set.intersection(*(set(found) for found in by_rate.values()))
    if not seeds:
        return None
    means = {lr: statistics.fmean(found[s]["validation"] for s in seeds) for lr, found in by_rate.items()}
    losses = {lr: statistics.fmean(found[s]["loss"] for s in seeds) for lr, found in by_rate.items()}
    lr = max(means, key=lambda rate: (means[rate], -losses[rate] if math.isfinite(losses[rate]) else -math.inf))
    chosen = [by_rate[lr][s] for s in sorted(seeds)]
    near = [rate for rate, mean in means.items() if mean >= means[lr] - 0.05]
    targets = [entry["to_target"] for entry in chosen]
    return Best(
        lr,
        {entry["seed"]: entry["test"] for entry in chosen},
        None if None in targets else statistics.fmean(targets),
        statistics.median(entry["ms"] for entry in chosen),
        (min(near), max(near)),
    )


def table(task: str, entries: Iterable[dict[str, Any]]) -> list[str]:
    """Markdown: mean test accuracy in percent, +- the standard error of the difference to BatchNorm, seed by seed; the learning rate."""
    entries = [entry for entry in entries if entry["task"] == task]
    batches = sorted({entry["batch"] for entry in entries})
    lines = ["| | " + " | ".join(f"batch {batch}" for batch in batches) + " |", "|---|" + "---|" * len(batches)]
    best = {(row, batch): best_of(e for e in entries if e["row"] == row and e["batch"] == batch) for row in ROWS for batch in batches}
    for row in ROWS:
        cells = []
        for batch in batches:
            found, reference = best[row, batch], best["batchnorm", batch]
            if found is None:
                cells.append("")
                continue
            paired = [] if reference is None else [100 * (found.tests[s] - reference.tests[s]) for s in found.tests if s in reference.tests]
            error = f" ± {statistics.stdev(paired) / math.sqrt(len(paired)):.1f}" if row != "batchnorm" and len(paired) > 1 else ""
            cells.append(f"{100 * statistics.fmean(found.tests.values()):.1f}{error} ({found.lr:g})")
        if any(cells):
            lines.append(f"| {row} | " + " | ".join(cells) + " |")
    return lines


def details(task: str, entries: Iterable[dict[str, Any]]) -> list[str]:
    """Markdown: of the learning rates that were run, those within 5 points of the best; steps to TARGET, in the mean; ms of a step."""
    entries = [entry for entry in entries if entry["task"] == task]
    lines = ["| batch | row | learning rates | steps to the target | ms |", "|---|---|---|---|---|"]
    for batch, row in itertools.product(sorted({entry["batch"] for entry in entries}), ROWS):
        best = best_of(e for e in entries if e["row"] == row and e["batch"] == batch)
        if best is not None:
            low, high = best.stable
            steps = "not reached" if best.to_target is None else f"{best.to_target:.0f}"
            lines.append(f"| {batch} | {row} | {low:g}{'' if low == high else f' to {high:g}'} | {steps} | {best.ms:.1f} |")
    return lines


def page(entries: list[dict[str, Any]]) -> str:
    """All of `details`, as docs/training_quality.md."""
    tables = ("\n".join([f"## {task}", "", *details(task, entries)]) for task in TASKS if any(entry["task"] == task for entry in entries))
    return "\n\n".join((HEAD, *tables)) + "\n"


HEAD = """# The study of training, in detail

For those who read [benchmarks.md](benchmarks.md) and want what its tables leave out. Of the same runs:

- *learning rates*: those of the runs that come within 5 points of the best on the validation sets, in the mean over the seeds;
- *steps to the target*: until the smoothed training loss is .5, at the learning rate of the table, in the mean over the seeds;
- *ms*: of a step on one core, in the median over the seeds. The machine had other work, up to twice as much as it has cores, so a factor
  of 3 between two rows can be load; [benchmarks.md](benchmarks.md) has operations, which are counted."""

SHOWN = {
    "batchnorm": "k--",
    "default": "C3-",
    "plain": "C7-",
    "online": "C0-",
    "mabn": "C1-",
    "renorm": "C2-",
    "groupnorm+ws": "C4-",
    "frozen": "C5-",
}


def _plot(entries: list[dict[str, Any]]) -> None:
    """Accuracy against the batch size, one picture per task."""
    import matplotlib as mpl

    mpl.use("svg")
    mpl.rcParams["svg.hashsalt"] = "normswap"
    from matplotlib import pyplot as plt

    tasks = [task for task in TASKS if len({e["batch"] for e in entries if e["task"] == task}) > 1]
    figure, axes = plt.subplots(1, len(tasks), figsize=(4.5 * len(tasks), 3.5), squeeze=False)
    for task, axis in zip(tasks, axes[0], strict=True):
        for row, style in SHOWN.items():
            here = [e for e in entries if e["task"] == task and e["row"] == row]
            found = [(batch, best_of(e for e in here if e["batch"] == batch)) for batch in sorted({e["batch"] for e in here})]
            points = [(batch, statistics.fmean(best.tests.values())) for batch, best in found if best is not None]
            if points:
                axis.plot(*zip(*points, strict=True), style, marker=".", label="BatchlessNorm" if row == "default" else row)
        axis.set(xscale="log", xlabel="batch size", title=task)
        axis.set_xticks(batches := sorted(TASKS[task].epochs), [str(b) for b in batches], minor=False)
        axis.minorticks_off()
    axes[0][0].set_ylabel("test accuracy")
    axes[0][-1].legend(fontsize=8)
    figure.tight_layout()
    figure.savefig(PLOT, metadata={"Date": None})


def _report(options: argparse.Namespace) -> None:
    entries = _sorted()[options.fresh]
    if not options.fresh:
        _plot(entries)
    for task in TASKS:
        if any(entry["task"] == task for entry in entries):
            print(f"\n{task}\n")
            print("\n".join((details if options.details else table)(task, entries)))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.set_defaults(call=_report, details=False, fresh=False)
    commands = parser.add_subparsers()
    runs = commands.add_parser("run")
    runs.set_defaults(call=_run_all)
    runs.add_argument("--quick", action="store_true", help="fewer batch sizes, two or three learning rates")
    runs.add_argument("--task", nargs="+", choices=TASKS)
    runs.add_argument("--batch", type=int, nargs="+")
    runs.add_argument("--row", nargs="+", choices=ROWS)
    runs.add_argument("--lr", type=float, nargs="+")
    runs.add_argument("--seed", type=int, nargs="+")
    runs.add_argument("--part", default="1/1")
    commands.add_parser("collect").set_defaults(call=_collect)
    reports = commands.add_parser("report")
    reports.set_defaults(call=_report)
    reports.add_argument("--details", action="store_true", help="which learning rates are stable, steps to a loss of .5, time per step")
    reports.add_argument("--fresh", action="store_true", help="of the seeds beyond those of the study")
    options = parser.parse_args()
    options.call(options)


if __name__ == "__main__":
    main()
