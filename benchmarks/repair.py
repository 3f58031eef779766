"""What repair is worth where a swap has a task: a ViT on digits, and a language model of bytes.

    python -m benchmarks.repair        trains both, prints the table, writes results/repair.json and the table of docs/approximate.md

ViT: timm's VisionTransformer, 4 blocks of 64 channels (9 LayerNorms), on scikit-learn's digits: 1297 to train and calibrate, 500 to test.
GPT: transformers' GPT2LMHeadModel, 4 blocks of 128 channels (9 LayerNorms), on docstrings of the standard library, a byte a token; those of
every sixth module are held out. All LayerNorms are swapped; nothing is trained afterwards.
"""

from __future__ import annotations

import importlib
import json
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from sklearn.datasets import load_digits
from torch import Tensor, nn
from torch.nn import functional as F

import normswap
from benchmarks.coverage import environment
from benchmarks.minilm import texts
from benchmarks.pages import put

ROOT = Path(__file__).resolve().parent.parent
KEPT, PAGE = ROOT / "benchmarks/results/repair.json", ROOT / "docs/approximate.md"
BEGIN, END = "<!-- begin: python -m benchmarks.repair -->", "<!-- end -->"
CONTEXT = 128


def _learn(model: nn.Module, loss: Callable[[int], Tensor], steps: int, rate: float) -> None:
    optimizer = torch.optim.AdamW(model.parameters(), lr=rate, weight_decay=0.05)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, rate, total_steps=steps)
    model.train()
    for step in range(steps):
        optimizer.zero_grad()
        loss(step).backward()  # type: ignore[no-untyped-call]
        optimizer.step()
        schedule.step()
    model.eval()


def vit() -> tuple[nn.Module, Any, Callable[[nn.Module], float]]:
    """(the trained network, calibration data, accuracy in percent)"""
    import timm

    digits = load_digits()
    torch.manual_seed(0)
    order = torch.randperm(len(digits.target))
    x, y = torch.tensor(digits.images, dtype=torch.float32)[:, None] / 8 - 1, torch.tensor(digits.target)
    train, test = order[:1297], order[1297:]
    model = timm.models.VisionTransformer(img_size=8, patch_size=2, in_chans=1, num_classes=10, embed_dim=64, depth=4, num_heads=4)

    def loss(step: int) -> Tensor:
        rows = train[torch.randint(len(train), (64,))]
        return F.cross_entropy(model(x[rows]), y[rows])

    @torch.no_grad()
    def accuracy(net: nn.Module) -> float:
        return round(100 * float((net(x[test]).argmax(1) == y[test]).float().mean()), 1)

    _learn(model, loss, 1200, 1e-3)
    return model, list(torch.split(x[train], 128)), accuracy


def windows(parts: list[str]) -> Tensor:
    """The bytes of all texts, one text a line, in rows of CONTEXT."""
    found = torch.tensor(list("\n".join(parts).encode()))
    return found[: len(found) // CONTEXT * CONTEXT].view(-1, CONTEXT)


def gpt() -> tuple[nn.Module, Any, Callable[[nn.Module], float]]:
    """(the trained network, calibration data, cross entropy in nats per byte)"""
    import transformers

    train, test = map(windows, texts())
    torch.manual_seed(0)
    config = transformers.GPT2Config(
        vocab_size=256,
        n_positions=CONTEXT,
        n_embd=128,
        n_layer=4,
        n_head=4,
        resid_pdrop=0.0,
        embd_pdrop=0.0,
        attn_pdrop=0.0,
        bos_token_id=None,
        eos_token_id=None,
    )
    model = transformers.GPT2LMHeadModel(config)

    def loss(step: int) -> Tensor:
        rows = train[torch.randint(len(train), (16,))]
        return model(rows, labels=rows).loss  # type: ignore[no-any-return]

    @torch.no_grad()
    def nats(net: nn.Module) -> float:
        parts = torch.split(test[:200], 50)
        return round(float(torch.stack([net(part, labels=part).loss for part in parts]).mean()), 4)

    _learn(model, loss, 1500, 2e-3)
    rows = train[torch.randperm(len(train))[:800]]
    return model, [{"input_ids": part} for part in torch.split(rows, 32)], nats


def measured(make: Callable[[], tuple[nn.Module, Any, Callable[[nn.Module], float]]]) -> dict[str, Any]:
    """The figure of the original, of one shot, and repaired; and processor seconds of the conversions."""
    model, data, figure = make()
    found: dict[str, Any] = {"original": figure(model)}
    for name, repair in (("one shot", "none"), ("repaired", "auto")):
        began = time.process_time()
        conversion = normswap.convert(model, calibration=data, approximate=True, repair=repair)  # type: ignore[arg-type]
        found[f"{name} seconds"] = round(time.process_time() - began, 1)
        found[name] = figure(conversion.model)
        found["layers"], found[f"{name} linears"] = len(conversion.plan.swaps), sum(len(fit.repaired) for fit in conversion.fits)
    return found


def table(result: dict[str, Any]) -> str:
    """The table of docs/approximate.md."""
    lines = ["| | LayerNorms | original | one shot | repaired | processor seconds |", "|---|--:|--:|--:|--:|--:|"]
    for name, row in result["nets"].items():
        figures = " | ".join(str(row[key]) for key in ("layers", "original", "one shot", "repaired"))
        lines.append(f"| {name} | {figures} | {row['repaired seconds']} |")
    return "\n".join(lines)


def main() -> None:
    sys.path.insert(0, str(ROOT / "tests/support"))
    importlib.import_module("torchvision_shim")  # timm and transformers import torchvision where it is installed
    torch.set_num_threads(1)
    nets = {"ViT on digits, accuracy, %": vit, "GPT on bytes, nats per byte": gpt}
    result = {"environment": environment(), "nets": {name: measured(make) for name, make in nets.items()}}
    KEPT.write_text(json.dumps(result, indent=1) + "\n", encoding="utf-8")
    put(PAGE, BEGIN, table(result), END)
    print(table(result))


if __name__ == "__main__":
    main()
