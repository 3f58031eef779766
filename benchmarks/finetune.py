"""Fine-tuning to a new domain at small batches: Batchless normalization against what else there is to do with a BatchNorm.

    python -m benchmarks.finetune        goes on where results/finetune.json ends, writes it, and prints the tables of docs/benchmarks.md

The digits classifier of the fixtures, trained on white on black, learns black on white with noise: x -> 1 - x + NOISE * randn. Every method
starts from the same weights, with the BatchNorm statistics measured on the new domain ("calibrated"), sees the same number of samples, and
takes the learning rate that is best on a validation set, in the mean over the seeds. SGD with momentum .9, no weight decay, no schedule.

    natural      normswap.convert(coupling="none"), statistics with BatchNorm's momentum of .1
    slow         the same with a momentum of .1 * batch / 64, so that the average is over as many samples at every batch size
    coupled      normswap.convert(coupling="auto"), with normswap.param_groups(batch=batch)
    raw          normswap.convert(stats="raw", coupling="none"): the statistics learn by the learning rate of the others
    batch norm   in train mode
    frozen       BatchNorm in eval mode, whose weight and bias train
    group norm   GroupNorm with 8 groups in the place of every BatchNorm, its weight 1 and its bias 0
"""

from __future__ import annotations

import copy
import json
import statistics
import sys
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.nn import functional as F

import normswap
from fixtures import train_digits_cnn
from fixtures.train_digits_cnn import accuracy
from normswap import demo
from normswap.demo import Images
from normswap.layer.batchless_norm import BatchlessNorm

ROOT = Path(__file__).resolve().parent.parent
PATH = ROOT / "benchmarks" / "results" / "finetune.json"
NOISE = 0.3
SAMPLES = 1024  # seen once each; the rest of the training set is the validation set
BATCHES = (1, 4, 16, 64)
RATES = (3e-5, 1e-4, 3e-4, 1e-3, 3e-3, 1e-2, 3e-2)
SEEDS = (0, 1)
GROUPS = 8


class Domain(NamedTuple):
    train: Images
    validation: Images
    test: Images


def new_domain() -> Domain:
    generator = torch.Generator().manual_seed(0)

    def moved(data: Images) -> Images:
        return Images(1 - data.images + NOISE * torch.randn(data.images.shape, generator=generator), data.labels)

    train, test = moved(train_digits_cnn.train_set()), moved(train_digits_cnn.test_set())
    first, rest = (Images(train.images[part], train.labels[part]) for part in (slice(SAMPLES), slice(SAMPLES, None)))
    return Domain(first, rest, test)


def pretrained() -> nn.Module:
    return demo.digits()


@torch.no_grad()
def calibrated(model: nn.Module, images: Tensor) -> nn.Module:
    """A copy with the BatchNorm statistics of `images`, each layer's under those of the layers before it."""
    model = copy.deepcopy(model).train()
    norms = [m for m in model.modules() if isinstance(m, nn.modules.batchnorm._BatchNorm)]
    for m in model.modules():
        if isinstance(m, nn.Dropout):
            m.eval()
    momenta = [norm.momentum for norm in norms]
    for norm in norms:
        norm.momentum = 1.0
    model(images)
    for norm, momentum in zip(norms, momenta, strict=True):
        norm.momentum = momentum
    return model.eval()


def natural(model: nn.Module, batch: int) -> nn.Module:
    return normswap.convert(model, torch.zeros(3, 1, 8, 8), coupling="none").model.train()


def slow(model: nn.Module, batch: int) -> nn.Module:
    model = natural(model, batch)
    for layer in model.modules():
        if isinstance(layer, BatchlessNorm):
            layer.momentum *= batch / 64
    return model


def coupled(model: nn.Module, batch: int) -> nn.Module:
    return normswap.convert(model, torch.zeros(3, 1, 8, 8), coupling="auto").model.train()


def raw(model: nn.Module, batch: int) -> nn.Module:
    return normswap.convert(model, torch.zeros(3, 1, 8, 8), stats="raw", coupling="none").model.train()


def batch_norm(model: nn.Module, batch: int) -> nn.Module:
    return copy.deepcopy(model).train()


def frozen(model: nn.Module, batch: int) -> nn.Module:
    model = batch_norm(model, batch)
    for module in model.modules():
        if isinstance(module, nn.modules.batchnorm._BatchNorm):
            module.eval()
    return model


def group_norm(model: nn.Module, batch: int) -> nn.Module:
    model = batch_norm(model, batch)
    assert isinstance(model, nn.Sequential)
    for i, module in enumerate(model):
        if isinstance(module, nn.modules.batchnorm._BatchNorm):
            model[i] = nn.GroupNorm(GROUPS, module.num_features)
    return model


METHODS: dict[str, Callable[[nn.Module, int], nn.Module]] = {
    f.__name__.replace("_", " "): f for f in (coupled, natural, slow, raw, batch_norm, frozen, group_norm)
}


def parameters_of(model: nn.Module, rate: float, batch: int | None = None) -> Any:
    swapped = any(isinstance(m, BatchlessNorm) for m in model.modules())
    return normswap.param_groups(model, lr=rate, batch=batch) if swapped else model.parameters()


def run(start: nn.Module, domain: Domain, method: str, batch: int, rate: float, seed: int) -> dict[str, Any]:
    """One fine-tuning: the accuracies after it, or the error that it ends with."""
    torch.manual_seed(seed)
    model = METHODS[method](start, batch)
    optimizer = torch.optim.SGD(parameters_of(model, rate, batch if method == "coupled" else None), lr=rate, momentum=0.9)
    result: dict[str, Any] = {"method": method, "batch": batch, "rate": rate, "seed": seed}
    images, labels = domain.train
    try:
        for part in torch.split(torch.randperm(len(labels), generator=torch.Generator().manual_seed(seed)), batch):
            optimizer.zero_grad()
            torch.autograd.backward(F.cross_entropy(model(images[part]), labels[part]))
            optimizer.step()
    except ValueError as error:
        return result | {"error": str(error)}
    model.eval()
    with torch.no_grad():
        finite = bool(model(domain.test.images).isfinite().all())
    return result | {"validation": accuracy(model, domain.validation), "test": accuracy(model, domain.test), "finite": finite}


def key(row: dict[str, Any]) -> tuple[Any, ...]:
    return row["method"], row["batch"], row["rate"], row["seed"]


def best(rows: Iterable[dict[str, Any]], method: str, batch: int) -> list[dict[str, Any]]:
    """The runs, one per seed, at the learning rate with the best mean validation accuracy; the smaller one of equals. [] if none ended."""
    by_rate: dict[float, list[dict[str, Any]]] = {}
    for row in rows:
        if (row["method"], row["batch"]) == (method, batch) and "error" not in row:
            by_rate.setdefault(row["rate"], []).append(row)
    return max((by_rate[r] for r in sorted(by_rate)), key=lambda of: statistics.mean(r["validation"] for r in of), default=[])


def table(result: dict[str, Any]) -> str:
    """Markdown: test accuracy at the best learning rate, and the learning rate."""
    lines = [f"| | {' | '.join(f'batch {batch}' for batch in BATCHES)} |", "|---" * (len(BATCHES) + 1) + "|"]
    for method in METHODS:
        cells = []
        for batch in BATCHES:
            rows = best(result["runs"], method, batch)
            if not rows:
                cells.append("error")
                continue
            tests = [row["test"] for row in rows]
            cells.append(f"{statistics.mean(tests):.1%} ({min(tests):.1%} to {max(tests):.1%}) at {rows[0]['rate']:g}")
        lines.append(f"| {method} | {' | '.join(cells)} |")
    return "\n".join(lines)


def rates_table(result: dict[str, Any], batch: int) -> str:
    """Markdown: mean test accuracy at each learning rate."""
    lines = [f"| batch {batch} | {' | '.join(f'{rate:g}' for rate in RATES)} |", "|---" * (len(RATES) + 1) + "|"]
    for method in METHODS:
        cells = []
        for rate in RATES:
            rows = [row for row in result["runs"] if key(row)[:3] == (method, batch, rate)]
            ended = [row["test"] for row in rows if "error" not in row]
            cells.append(f"{statistics.mean(ended):.1%}" if ended else "error")
        lines.append(f"| {method} | {' | '.join(cells)} |")
    return "\n".join(lines)


def main() -> None:
    torch.set_num_threads(1)
    domain = new_domain()
    original = pretrained()
    start = calibrated(original, domain.train.images)
    settings = {"noise": NOISE, "samples": SAMPLES, "momentum": 0.9, "torch": torch.__version__}
    result: dict[str, Any] = json.loads(PATH.read_text(encoding="utf-8")) if PATH.exists() else {}
    if result.get("settings") != settings:
        before = {"original": accuracy(original, domain.test), "calibrated": accuracy(start, domain.test)}
        result = {"settings": settings, "before": before, "runs": []}
    done = {key(row) for row in result["runs"]}
    for seed in SEEDS:
        for batch in reversed(BATCHES):
            for method in METHODS:
                for rate in RATES:
                    if (method, batch, rate, seed) not in done:
                        result["runs"].append(run(start, domain, method, batch, rate, seed))
                scratch = PATH.with_suffix(".part")
                scratch.write_text(dumped(result), encoding="utf-8")
                scratch.replace(PATH)
                print(seed, batch, method, file=sys.stderr, flush=True)
    print(json.dumps(result["before"]))
    print(table(result))
    for batch in BATCHES:
        print(rates_table(result, batch), sep="\n")


def dumped(result: dict[str, Any]) -> str:
    """JSON with a line for each run."""
    runs = ",\n".join(f"    {json.dumps(row)}" for row in result["runs"])
    head = json.dumps({name: value for name, value in result.items() if name != "runs"}, indent=2)
    return f'{head[:-2]},\n  "runs": [\n{runs}\n  ]\n}}\n'


if __name__ == "__main__":
    main()
