"""Why the rows of benchmarks/training_quality.py stand the learning rates that they stand: the landscape of the loss as training goes on.

    python -m benchmarks.landscape            prints the table of docs/benchmarks.md and draws docs/landscape.svg

The six convs from scratch on the digits, batch 64, each row trained at a learning rate at which all of them learn. Measured on one batch
that is the same for all, at the start and after one and four epochs, at the steps that are learning rates of the study.
"""

from __future__ import annotations

import copy
from pathlib import Path

import torch
from torch import nn

import normswap
from benchmarks import training_quality as study
from normswap.api.landscape import Line

ROOT = Path(__file__).resolve().parent.parent
ROWS = ("batchnorm", "plain", "coupled", "coupled+feedback")
STEPS = (0.003, 0.01, 0.03, 0.1, 0.3)
BATCH, RATE, SEED = 64, 0.003, 0
EPOCHS = (0, 1, 4)


def trained(row: str, epochs: int, data: study.Split) -> nn.Module:
    start = data.train.x[: study.START]
    model = study.ROWS[row](study._measured(copy.deepcopy(study._learned("scratch", SEED)), start), start, BATCH).train()
    if epochs:
        torch.manual_seed(SEED)
        study._train(model, data.train, BATCH, epochs, RATE, SEED, paced=False)
    return model


def cells(line: Line) -> str:
    (_, loss), (_, change) = line.loss_range, line.change_range
    return f"{line.loss:.2f} | {loss:.3g} | {line.gradient:.2f} | {change:.3g} | {line.smoothness:.3g}"


def main() -> None:
    torch.set_num_threads(1)
    data = study.TASKS["scratch"].data(SEED)
    batch = (data.validation.x[:BATCH], data.validation.y[:BATCH])
    print("| epochs | row | loss | largest loss | gradient | largest change | smoothness |", "|---|---|---|---|---|---|---|", sep="\n")
    for epochs in EPOCHS:
        found = normswap.landscape({row: trained(row, epochs, data) for row in ROWS}, [batch], steps=STEPS)
        for line in found.lines:
            print(f"| {epochs} | {line.model} | {cells(line)} |")
    found.plot(ROOT / "docs" / "landscape.svg")


if __name__ == "__main__":
    main()
