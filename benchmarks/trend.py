"""How well must feedback know what BatchNorm takes out of a gradient, in a deep network?

    python -m benchmarks.trend            prints the table of docs/benchmarks.md and writes benchmarks/results/trend.json

The ResNet-20 of the study (benchmarks/training_quality.py) trains for some steps. Then the weights stay, the statistics settle, and over 40
batches of 64 the gradient of each conv is measured with the trend as it was learned, with none, and with that which
other samples have at these very weights: without any delay, and with the noise of that many samples. Held against the gradient with
BatchNorm's own terms, those of the same batch. Running statistics in the forward pass throughout, and no guard.

    length      of the mean gradient, relative to BatchNorm's        direction    the cosine between the two
    signal      the length of the mean gradient over that of a batch's deviation from it

each the median over the convs, and over those of the first stage and of the last.
"""

from __future__ import annotations

import argparse
import copy
import json
import statistics
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

import normswap
from benchmarks import training_quality as study
from normswap.layer.batchless_norm import BatchlessNorm

KEPT = Path(__file__).resolve().parent.parent / "benchmarks" / "results" / "trend.json"
BATCH, LR, SEED, BATCHES, SETTLE = 64, 0.03, 0, 40, 60
OTHERS = (64, 256, 4000)
TINY = 1e-12  # in place of BatchNorm's eps, with which its backward pass leaves a trace of the part along z
STAGES = {"all": slice(None), "first": slice(0, 7), "last": slice(14, 21)}  # of the 21 convs


def norms(model: nn.Module) -> list[BatchlessNorm]:
    return [m for m in model.modules() if isinstance(m, BatchlessNorm)]


def trends_of(model: nn.Module) -> list[Tensor]:
    return [layer.get_parameter("trend").detach().clone() for layer in norms(model)]


def set_trends(model: nn.Module, trends: list[Tensor]) -> None:
    for layer, trend in zip(norms(model), trends, strict=True):
        layer.get_parameter("trend").data.copy_(trend)


def gradients(model: nn.Module, images: study.Images) -> list[Tensor]:
    """Of each conv."""
    model.zero_grad()
    F.cross_entropy(model(images.x), images.y).backward()  # type: ignore[no-untyped-call]
    return [p.grad.flatten() for p in model.parameters() if p.dim() == 4 and p.grad is not None]


def exact(model: nn.Module, images: study.Images) -> tuple[list[Tensor], list[Tensor]]:
    """(the gradients with BatchNorm's terms in the backward pass, these terms as the trend of each norm): of a plain copy of the model."""
    plain = copy.deepcopy(model)
    trends: dict[nn.Module, Tensor] = {}
    inputs: dict[nn.Module, Tensor] = {}

    def see(layer: nn.Module, args: tuple[Tensor, ...], output: Tensor) -> None:
        inputs[layer] = args[0].detach()

    def project(layer: nn.Module, by_input: Any, by_output: Any) -> tuple[Tensor]:
        assert isinstance(layer, BatchlessNorm)
        x, g = inputs[layer], by_input[0]
        mean, std = (t.detach().view(1, -1, 1, 1) for t in layer.statistics())
        own_mean = x.mean((0, 2, 3), keepdim=True)
        own_std = (x.var((0, 2, 3), unbiased=False, keepdim=True) + TINY).sqrt()
        z = (x - own_mean) / own_std
        level, slope = g.mean((0, 2, 3), keepdim=True), (g * z).mean((0, 2, 3), keepdim=True)
        # level + slope z, as a line over the z of the running statistics, and by z in place of x
        line = torch.stack([slope * std / own_std, level + slope * (mean - own_mean) / own_std]) * std
        trends[layer] = line.flatten(1) * (x.numel() / x.shape[1])
        return (g - level - slope * z,)

    for layer in norms(plain):
        layer.make_plain()
        layer.register_forward_hook(see)
        layer.register_full_backward_hook(project)
    found = gradients(plain, images)
    return found, [trends[layer] for layer in norms(plain)]


def trained(steps: int) -> tuple[nn.Module, study.Images]:
    """The net after so many steps of the default, its statistics settled; and its training set."""
    data = study.TASKS["clutter"].data(SEED).train
    start = data.x[: study.START]
    net = study._measured(copy.deepcopy(study._learned("clutter", SEED)), start)
    model = study.ROWS["default"](net, start, BATCH).train()
    optimizer = torch.optim.SGD(normswap.param_groups(model, lr=LR, batch=BATCH), lr=LR, momentum=0.9)
    order = torch.Generator().manual_seed(SEED)
    for step in range(steps + SETTLE):
        if step == steps:
            learned = trends_of(model)
            optimizer = torch.optim.SGD(normswap.param_groups(model, lr=0.0))
        gradients(model, some(data, BATCH, order))
        optimizer.step()
    set_trends(model, learned)
    for layer in norms(model):
        layer.limits_samples = False
    return model, data


def some(data: study.Images, count: int, order: torch.Generator) -> study.Images:
    rows = torch.randperm(len(data.x), generator=order)[:count]
    return study.Images(data.x[rows], data.y[rows])


def measured(steps: int) -> dict[str, Any]:
    model, data = trained(steps)
    learned = trends_of(model)
    order = torch.Generator().manual_seed(SEED + 1)
    batches = [some(data, BATCH, order) for _ in range(BATCHES)]
    found: dict[str, list[list[Tensor]]] = {"BatchNorm's terms": [], "the same, as a trend": [], "none": [], "as learned": []}
    found |= {f"{count:,} others": [] for count in OTHERS}
    every = exact(model, data)[1]  # changes with the weights only
    for batch in batches:
        own, terms = exact(model, batch)
        found["BatchNorm's terms"].append(own)
        trends = {"the same, as a trend": terms, "none": [torch.zeros_like(t) for t in terms], "as learned": learned}
        for count in OTHERS:
            trends[f"{count:,} others"] = every if count == len(data.x) else exact(model, some(data, count, order))[1]
        for name, trend in trends.items():
            set_trends(model, trend)
            found[name].append(gradients(model, batch))
    stacked = {name: [torch.stack(each) for each in zip(*batchwise, strict=True)] for name, batchwise in found.items()}
    reference = [g.mean(0) for g in stacked["BatchNorm's terms"]]
    rows = {}
    for name, gradient in stacked.items():
        means = [g.mean(0) for g in gradient]
        rows[name] = {
            "length": [float(m.norm() / r.norm()) for m, r in zip(means, reference, strict=True)],
            "direction": [float(F.cosine_similarity(m, r, 0)) for m, r in zip(means, reference, strict=True)],
            "signal": [float(m.norm() / (g - m).norm(dim=1).mean()) for m, g in zip(means, gradient, strict=True)],
        }
    return {"steps": steps, "rows": {n: {k: [round(x, 3) for x in v] for k, v in row.items()} for n, row in rows.items()}}


def table(entry: dict[str, Any]) -> list[str]:
    names = [f"{what}, {stage}" for what in ("length", "direction", "signal") for stage in STAGES]
    lines = [f"after {entry['steps']} steps", "", "| the trend | " + " | ".join(names) + " |", "|---|" + "---|" * len(names)]
    for name, row in entry["rows"].items():
        cells = [statistics.median(row[what][part]) for what in ("length", "direction", "signal") for part in STAGES.values()]
        lines.append(f"| {name} | " + " | ".join(f"{cell:.2f}" for cell in cells) + " |")
    return lines


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--steps", type=int, nargs="+", default=[20, 100])
    options = parser.parse_args()
    torch.set_num_threads(1)
    found = [measured(steps) for steps in options.steps]
    for entry in found:
        print("\n".join([*table(entry), ""]))
    KEPT.write_text(json.dumps({"torch": torch.__version__, "found": found}, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
