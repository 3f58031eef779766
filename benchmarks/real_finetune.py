"""Fine-tuning a real pretrained network to new images at small batches: EfficientNet-Lite0 with its ImageNet weights.

    python -m benchmarks.real_finetune run [--row ...]      goes on where it was interrupted
    python -m benchmarks.real_finetune table                prints the table; once no run is missing, writes results/real_finetune.jsonl
                                                            and the table of docs/benchmarks.md

Every run is one line of JSON in build/real_finetune.jsonl. Those that are there or in results are not run again, so it goes on where it was
interrupted, and several processes can share it out with `--row`.

The images are made from what scikit-learn carries: a digit, enlarged to between five eighths of the image and all of it, at a random
place, light or dark, on a random crop of one of its two photographs, 64 x 64. Each of the 1797 digits is used in one image: 1000
for training, 297 for validation, 500 for the test. Each seed has its own split, images, last layer and order.

Every row starts from the ImageNet weights, a new last layer for ten classes, and BatchNorm statistics of the same first 256 training
images. BatchNorm moves them by a momentum of .1, as the file's own of .01 forgets in a hundred steps, and there are 62 at batch 32;
normswap by the file's own, which `convert` takes over (docs/training.md, "Which momentum"). Every row sees the training images twice, in
the same order, by SGD with momentum .9 on a cosine schedule, no weight decay, without dropout and stochastic depth.

The learning rate is the one with the best validation accuracy with seed 0, of five in steps of 2, and of more as long as the best of
them is the first or the last; of equal ones the one with the lower training loss. Reported is the test accuracy of three seeds at that
rate. Time is processor time of the training alone, on one thread.
"""

from __future__ import annotations

import argparse
import json
import math
import re
import statistics
import sys
import time
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from sklearn.datasets import load_digits, load_sample_images
from torch import Tensor, nn
from torch.nn import functional as F
from torch.nn.modules.batchnorm import _BatchNorm

import normswap
from benchmarks import peers
from benchmarks import training_quality as study
from benchmarks.real_files import efficientnet_lite0
from benchmarks.training_quality import Images, Split

ROOT = Path(__file__).resolve().parent.parent
RUNNING, KEPT, PAGE = ROOT / "build/real_finetune.jsonl", ROOT / "benchmarks/results/real_finetune.jsonl", ROOT / "docs/benchmarks.md"
BEGIN, END = "<!-- begin: python -m benchmarks.real_finetune table -->", "<!-- end -->"
SIZE, TRAIN, VALIDATION, START, EPOCHS = 64, 1000, 297, 256, 2
MOMENTUM, OWN = 0.1, 0.01  # of BatchNorm's rows, and the file's own
RATES = 5  # of a grid; each twice the one before
KEYS = ("row", "rate", "seed")

Entry = dict[str, Any]


# --- data --------------------------------------------------------------------------------------------------------------------------------


def parts(seed: int) -> tuple[Tensor, Tensor, Tensor]:
    """Which digits of scikit-learn are for training, validation and test."""
    order = torch.randperm(len(load_digits().target), generator=torch.Generator().manual_seed(seed))
    return order[:TRAIN], order[TRAIN : TRAIN + VALIDATION], order[TRAIN + VALIDATION :]


def _photographs() -> list[Tensor]:
    return [torch.tensor(image).permute(2, 0, 1).float() for image in load_sample_images().images]


def _between(low: float, high: float, generator: torch.Generator) -> int:
    return int(low + (high - low) * torch.rand((), generator=generator))


def _crop(photographs: list[Tensor], generator: torch.Generator) -> Tensor:
    """A square of a photograph, between half and twice the size of the image, left and right exchanged or not: (3, SIZE, SIZE)"""
    photograph = photographs[_between(0, len(photographs), generator)]
    side = _between(SIZE / 2, 2 * SIZE, generator)
    top, left = (_between(0, length - side + 1, generator) for length in photograph.shape[1:])
    square = photograph[None, :, top : top + side, left : left + side]
    square = square.flip(3) if _between(0, 2, generator) else square
    return F.interpolate(square, (SIZE, SIZE), mode="bilinear", antialias=True)[0]


def _drawn(photograph: Tensor, digit: Tensor, generator: torch.Generator) -> Tensor:
    """The digit (8, 8), from 0 to 1, somewhere on the photograph, in a light colour where that is dark, in a dark one where it is light."""
    side = _between(5 * SIZE / 8, SIZE, generator)
    top, left = (_between(0, SIZE - side + 1, generator) for _ in range(2))
    image, place = photograph.clone(), (slice(None), slice(top, top + side), slice(left, left + side))
    ink = F.interpolate(digit[None, None], (side, side), mode="bilinear")[0]
    colour = 40 * torch.rand(3, 1, 1, generator=generator) + (215 if image[place].mean() < 128 else 0)
    image[place] += ink * (colour - image[place])
    return image


def data(seed: int) -> Split:
    """Images as the network learned to read them: (pixel - 127) / 128."""
    digits, photographs = load_digits(), _photographs()
    generator = torch.Generator().manual_seed(seed)

    def made(rows: Tensor) -> Images:
        shapes = torch.tensor(digits.images[rows], dtype=torch.float32) / 16
        images = torch.stack([_drawn(_crop(photographs, generator), shape, generator) for shape in shapes])
        return Images((images - 127) / 128, torch.tensor(digits.target[rows]))

    return Split(*map(made, parts(seed)))


# --- rows --------------------------------------------------------------------------------------------------------------------------------


@torch.no_grad()
def pretrained(seed: int, start: Tensor) -> nn.Module:
    """The network with a new last layer and the BatchNorm statistics of `start`, each norm's after those of the norms before it."""
    model: Any = efficientnet_lite0()[0]
    torch.manual_seed(seed)
    model._fc = nn.Linear(model._fc.in_features, 10)
    model._dropout, model._global_params = nn.Identity(), model._global_params._replace(drop_connect_rate=0.0)
    norms = [module for module in model.modules() if isinstance(module, _BatchNorm)]
    for norm in norms:
        norm.train().reset_running_stats()
        norm.momentum = None
    model(start)
    for norm in norms:
        norm.momentum = MOMENTUM
    return model.eval()  # type: ignore[no-any-return]


def _normswap(model: nn.Module, start: Tensor) -> nn.Module:
    for module in model.modules():
        if isinstance(module, _BatchNorm):
            module.momentum = OWN
    return normswap.convert(model, start[:2], calibration=[start]).model


def _peer(change: Callable[[nn.Module], None]) -> Callable[[nn.Module, Tensor], nn.Module]:
    def make(model: nn.Module, start: Tensor) -> nn.Module:
        change(model)
        return model

    return make


def _unchanged(model: nn.Module, start: Tensor) -> nn.Module:
    return model


@dataclass(frozen=True)
class Row:
    """first: of the five learning rates. seeds: how many are run at the one that is chosen."""

    make: Callable[[nn.Module, Tensor], nn.Module]
    batch: int
    first: float
    seeds: int = 3


ROWS = {
    "BatchNorm, batch 32": Row(_unchanged, 32, 0.016),
    "BatchNorm, batch 2": Row(_unchanged, 2, 0.0005),
    "frozen BatchNorm, batch 2": Row(_peer(peers.frozen), 2, 0.000125),
    "GroupNorm, batch 2": Row(_peer(peers.group_norm), 2, 3.125e-05),
    "normswap, batch 32": Row(_normswap, 32, 0.016),
    "normswap, batch 2": Row(_normswap, 2, 0.0005),
    "normswap, batch 1": Row(_normswap, 1, 0.00025),
    "normswap (before), batch 2": Row(_normswap, 2, 0.0005, seeds=1),
    "normswap (before), batch 1": Row(_normswap, 1, 0.00025, seeds=1),
}
TODAY = [row for row in ROWS if "(before)" not in row]  # the others are of an older normswap; they are run when they are named


# --- a run -------------------------------------------------------------------------------------------------------------------------------


@torch.no_grad()
def _accuracy(model: nn.Module, images: Images) -> float:
    guesses = torch.cat([model.eval()(part).argmax(1) for part in torch.split(images.x, 128)])
    return round(float((guesses == images.y).float().mean()), 4)


def run(row: str, rate: float, seed: int) -> Entry:
    spec, images = ROWS[row], data(seed)
    start = images.train.x[:START]
    model = spec.make(pretrained(seed, start), start).train()
    torch.manual_seed(seed)
    began = time.process_time()
    losses = study._train(model, images.train, spec.batch, EPOCHS, rate, seed, paced=True)
    seconds = time.process_time() - began
    found = {
        "validation": _accuracy(model, images.validation),
        "test": _accuracy(model, images.test),
        "loss": round(statistics.fmean(losses[-max(1, len(losses) // 10) :]), 4),
        "steps": len(losses),
        "ms": round(1000 * seconds / len(losses) / spec.batch, 2),  # of a sample
    }
    return {**dict(zip(KEYS, (row, rate, seed), strict=True)), **found}


# --- all of them -------------------------------------------------------------------------------------------------------------------------


def _read() -> list[Entry]:
    lines = [line for path in (KEPT, RUNNING) if path.exists() for line in path.read_text(encoding="utf-8").splitlines()]
    found = [json.loads(line) for line in lines]
    return list({tuple(entry[key] for key in KEYS): entry for entry in found}.values())


def best(entries: Iterable[Entry], row: str) -> float | None:
    """The learning rate that validation chooses, of those that were run with seed 0."""

    def worth(entry: Entry) -> tuple[float, float]:
        return entry["validation"], -entry["loss"] if math.isfinite(entry["loss"]) else -math.inf

    of_seed_0 = [entry for entry in entries if entry["row"] == row and entry["seed"] == 0]
    return max(of_seed_0, key=worth)["rate"] if of_seed_0 else None


def missing(entries: Iterable[Entry], row: str) -> Iterator[tuple[float, int]]:
    """The runs, rate and seed, that can be said to be missing: of the grid, then beyond its edge, then the other seeds at the best rate."""
    entries = [entry for entry in entries if entry["row"] == row]
    there = {(entry["rate"], entry["seed"]) for entry in entries}
    grid = [(ROWS[row].first * 2**k, 0) for k in range(RATES)]
    if not there.issuperset(grid):
        yield from (each for each in grid if each not in there)
        return
    chosen, rates = best(entries, row), [rate for rate, seed in there if seed == 0]
    assert chosen is not None
    if chosen in (min(rates), max(rates)):
        yield (chosen / 2 if chosen == min(rates) else chosen * 2), 0
        return
    yield from ((chosen, seed) for seed in range(ROWS[row].seeds) if (chosen, seed) not in there)


def _run_all(rows: Iterable[str]) -> None:
    torch.set_num_threads(1)
    RUNNING.parent.mkdir(exist_ok=True)
    for row in rows:
        while (wanted := next(missing(_read(), row), None)) is not None:
            entry = json.dumps(run(row, *wanted))
            with RUNNING.open("a", encoding="utf-8") as file:
                file.write(entry + "\n")
            print(entry, file=sys.stderr, flush=True)


def table(entries: Iterable[Entry]) -> str:
    """Markdown: mean test accuracy in percent, its standard error over the seeds, the learning rate, processor time per sample."""
    entries = list(entries)
    lines = ["| | test accuracy, % | seeds | learning rate | ms per sample |", "|---|--:|--:|--:|--:|"]
    for row in ROWS:
        rate = best(entries, row)
        chosen = [entry for entry in entries if entry["row"] == row and entry["rate"] == rate]
        if not chosen:
            continue
        tests = [100 * entry["test"] for entry in chosen]
        error = f" ± {statistics.stdev(tests) / math.sqrt(len(tests)):.1f}" if len(tests) > 1 else ""
        ms = statistics.median(entry["ms"] for entry in chosen)
        lines.append(f"| {row} | {statistics.fmean(tests):.1f}{error} | {len(tests)} | {rate:g} | {ms:.1f} |")
    return "\n".join(lines)


def _write(entries: list[Entry]) -> None:
    page = PAGE.read_text(encoding="utf-8")
    if BEGIN not in page:
        raise RuntimeError(f"{PAGE.name} has no line {BEGIN}; put it, and {END}, where the table goes")
    ordered = sorted(entries, key=lambda entry: (list(ROWS).index(entry["row"]), entry["rate"], entry["seed"]))
    KEPT.write_text("".join(json.dumps(entry) + "\n" for entry in ordered), encoding="utf-8")
    body = f"{BEGIN}\n{table(entries)}\n\nAll runs: [{KEPT.name}](../benchmarks/results/{KEPT.name}).\n{END}"
    PAGE.write_text(re.sub(f"{re.escape(BEGIN)}.*?{re.escape(END)}", lambda _: body, page, count=1, flags=re.DOTALL), encoding="utf-8")


def _table() -> None:
    entries = _read()
    print(table(entries))
    lacking = [row for row in TODAY if any(missing(entries, row))]
    if lacking:
        print(f"not written: runs are missing of {'; '.join(lacking)}. python -m benchmarks.real_finetune run", file=sys.stderr)
    else:
        _write(entries)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    commands = parser.add_subparsers(dest="command", required=True)
    commands.add_parser("run").add_argument("--row", nargs="+", choices=ROWS, default=TODAY)
    commands.add_parser("table")
    options = parser.parse_args()
    _run_all(options.row) if options.command == "run" else _table()


if __name__ == "__main__":
    main()
