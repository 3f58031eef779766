"""Does a converted network learn as well as with BatchNorm? From scratch, on scikit-learn's digits: six conv-norm-ReLU layers.

    python benchmarks/training_quality.py results.json --batch 64 4 --row plain centred --lr 0.01 0.03 --seed 0

Every run is one entry of the JSON file, under its settings; those that are there are not run again, so it goes on where it was interrupted.
Rows: BatchNorm in train mode, and BatchlessNorm with statistics that are plain, coupled to the producer's weight in units of its norm
("coupled"), and without units ("centred"). All start from the same weights, and the statistics from 256 training images.
"""

from __future__ import annotations

import argparse
import itertools
import json
import time
from pathlib import Path
from typing import Any

import torch
from sklearn.datasets import load_digits
from torch import Tensor, nn

import normswap
from normswap.batchless import BatchlessNorm

ROWS = ("batchnorm", "plain", "centred", "coupled")
WIDTHS = (1, 16, 16, 32, 32, 48, 48)
EPOCHS = {64: 6, 16: 4, 8: 3, 4: 2, 2: 1, 1: 1}


def digits() -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """(train images, labels, test images, labels): 1347 and 450, the same for every run."""
    data = load_digits()
    x, y = torch.tensor(data.images, dtype=torch.float32)[:, None] / 16, torch.tensor(data.target)
    order = torch.randperm(len(x), generator=torch.Generator().manual_seed(0))
    train, test = order[450:], order[:450]
    return x[train], y[train], x[test], y[test]


def network(row: str, start: Tensor, seed: int) -> nn.Module:
    torch.manual_seed(seed)
    layers: list[nn.Module] = []
    for number, (i, o) in enumerate(itertools.pairwise(WIDTHS)):
        layers += [nn.Conv2d(i, o, 3, stride=2 if number in (2, 4) else 1, padding=1), nn.BatchNorm2d(o), nn.ReLU(inplace=True)]
    source = nn.Sequential(*layers, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(WIDTHS[-1], 10))
    norms = [m for m in source if isinstance(m, nn.BatchNorm2d)]
    for norm in norms:
        norm.momentum = None  # cumulative: the statistics of the first batch
    with torch.no_grad():
        source(start)
    for norm in norms:
        norm.momentum = 0.1
    if row == "batchnorm":
        return source
    options: dict[str, Any] = {"coupling": "none"} if row == "plain" else {"coupling": "auto", "calibration": [start]}
    model = normswap.convert(source.eval(), start[:2], **options).model
    for layer in model.modules():
        if isinstance(layer, BatchlessNorm):
            layer.units = row == "coupled"
    return model


def run(row: str, batch: int, lr: float, seed: int) -> dict[str, Any]:
    x, y, test_x, test_y = digits()
    model = network(row, x[:256], seed).train()
    groups: Any = model.parameters() if row == "batchnorm" else normswap.param_groups(model, lr=lr)
    optimizer = torch.optim.SGD(groups, lr=lr, momentum=0.9)
    generator = torch.Generator().manual_seed(seed)
    steps = EPOCHS[batch] * (len(x) // batch)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, steps)
    began, losses = time.perf_counter(), []
    for _ in range(EPOCHS[batch]):
        for rows in torch.randperm(len(x), generator=generator)[: len(x) // batch * batch].view(-1, batch):
            optimizer.zero_grad()
            loss = nn.functional.cross_entropy(model(x[rows]), y[rows])
            loss.backward()  # type: ignore[no-untyped-call]
            optimizer.step()
            schedule.step()
            losses.append(loss.item())
    seconds = time.perf_counter() - began
    model.eval()
    with torch.no_grad():
        accuracy = (model(test_x).argmax(1) == test_y).float().mean().item()
    last = losses[-max(1, steps // 10) :]
    return {"accuracy": round(accuracy, 4), "loss": sum(last) / len(last), "steps": steps, "ms_per_step": round(1000 * seconds / steps, 2)}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("results", type=Path)
    parser.add_argument("--batch", type=int, nargs="+", default=[64, 4], choices=EPOCHS)
    parser.add_argument("--row", nargs="+", default=list(ROWS), choices=ROWS)
    parser.add_argument("--lr", type=float, nargs="+", default=[0.003, 0.01, 0.03, 0.1])
    parser.add_argument("--seed", type=int, nargs="+", default=[0])
    options = parser.parse_args()
    results = json.loads(options.results.read_text()) if options.results.exists() else {}
    for seed, batch, lr, row in itertools.product(options.seed, options.batch, options.lr, options.row):
        key = f"scratch/{row}/batch {batch}/lr {lr:g}/seed {seed}"
        if key not in results:
            results[key] = run(row, batch, lr, seed)
            options.results.write_text(json.dumps(results, indent=1) + "\n")
        print(key, results[key], flush=True)


if __name__ == "__main__":
    main()
