"""How fast is the ONNX file of a model with RMSNorm beside that of the same model with LayerNorm?

    python -m benchmarks.rmsnorm_latency      only where nothing else runs; writes results/rmsnorm_latency.json, a table of docs/rmsnorm.md

The files are those of `export_onnx`: LayerNorm and RMSNorm as it writes them (opset 23, RMSNormalization); RMSNorm in opset 20, where
it is several operators; and what `target="cuda"` writes, run on the CPU. One onnxruntime session each, one thread, interleaved; the median
over rounds of the ratio of processor times, as in benchmarks.onnx_latency. Random weights.
"""

from __future__ import annotations

import importlib
import json
import sys
import tempfile
from pathlib import Path
from typing import Any

from benchmarks.pages import put

ROOT = Path(__file__).resolve().parent.parent
KEPT, PAGE = ROOT / "benchmarks/results/rmsnorm_latency.json", ROOT / "docs/rmsnorm.md"
BEGIN, END = "<!-- begin: python -m benchmarks.rmsnorm_latency -->", "<!-- end of latency -->"
FORMS: dict[str, dict[str, Any]] = {
    "LayerNorm": {},
    "RMSNorm": {},
    "RMSNorm, opset 20": {"opset": 20},
    "RMSNorm, cuda": {"target": "cuda"},
}


def nets() -> dict[str, tuple[Any, Any]]:
    import timm
    import torch
    import transformers as library

    transformers: Any = library

    torch.manual_seed(0)
    config = transformers.GPT2Config(n_embd=256, n_layer=6, n_head=8, vocab_size=8192, use_cache=False, bos_token_id=1, eos_token_id=1)
    tokens = torch.randint(3, 8192, (1, 128))
    return {
        "timm vit_tiny_patch16_224": (timm.create_model("vit_tiny_patch16_224").eval(), torch.randn(1, 3, 224, 224)),
        "transformers GPT-2, 6 blocks of 256, 128 tokens": (transformers.GPT2LMHeadModel(config).eval(), {"input_ids": tokens}),
    }


def measure(model: Any, inputs: Any) -> dict[str, Any]:
    import onnx

    import normswap
    from benchmarks.onnx_latency import count, interleaved, session

    converted = normswap.convert(model, inputs, to="rmsnorm").model
    with tempfile.TemporaryDirectory() as directory:
        sessions: dict[str, Any] = {}
        operators: dict[str, list[int]] = {}
        for name, options in FORMS.items():
            path = Path(directory) / f"{len(sessions)}.onnx"
            normswap.export_onnx(model if name == "LayerNorm" else converted, inputs, path, **options)
            optimized = Path(directory) / "optimized.onnx"
            sessions["ours" if name == "LayerNorm" else name] = session(path, optimized)
            operators[name] = [count(onnx.load(str(p))) for p in (path, optimized)]
        x = inputs["input_ids"] if isinstance(inputs, dict) else inputs
        found = interleaved(sessions, x.numpy())
    milliseconds = found["milliseconds"]
    ratios = {name: round(1 / ratio, 3) for name, ratio in found["ratios"]["ours"].items()}
    return {"operators": operators, "milliseconds": {"LayerNorm": milliseconds.pop("ours"), **milliseconds}, "of LayerNorm": ratios}


def table(rows: dict[str, Any]) -> str:
    lines = ["| model | file | operators | in onnxruntime | ms | of LayerNorm's |", "|---|---|--:|--:|--:|--:|"]
    for net, row in rows.items():
        for name in FORMS:
            counts = " | ".join(map(str, row["operators"][name]))
            lines.append(f"| {net} | {name} | {counts} | {row['milliseconds'][name]:.2f} | {row['of LayerNorm'].get(name, 1):.3f} |")
    return "\n".join(lines)


def main() -> None:
    sys.path.insert(0, str(ROOT / "tests/support"))
    importlib.import_module("torchvision_shim")  # timm and transformers import torchvision where it is installed
    from benchmarks.onnx_latency import environment

    rows = {name: measure(*net) for name, net in nets().items()}
    KEPT.write_text(json.dumps({"environment": environment(), "rows": rows}, indent=1) + "\n", encoding="utf-8")
    put(PAGE, BEGIN, f"\n{table(rows)}\n", END)
    print(table(rows))


if __name__ == "__main__":
    main()
