"""Which (operator, opset, dtype) ONNX Runtime has a CUDA kernel for: normswap/export/cuda_kernels.json, from its docs/OperatorKernels.md.

    python -m benchmarks.cuda_kernels OperatorKernels.md COMMIT "VERSION, IN WORDS"

ONNX Runtime generates that page from the kernels that it registers; COMMIT is the one that the page was taken from. Only floating-point
tensors are kept: integers and shapes may be computed on the CPU.
"""

from __future__ import annotations

import json
import re
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

TARGET = Path(__file__).resolve().parent.parent / "normswap/export/cuda_kernels.json"
PAGE = "https://github.com/microsoft/onnxruntime/blob/{commit}/docs/OperatorKernels.md"
PROVIDER = "## Operators implemented by CUDAExecutionProvider"
FLOATS = {"bfloat16": "bfloat16", "double": "float64", "float": "float32", "float16": "float16"}
DOMAINS = ("ai.onnx", "com.microsoft")

Row = tuple[str, list[Any]]


def rows(page: str) -> Iterator[Row]:
    """(operator, [first opset, last opset or None, dtypes]) of every CUDA kernel for floats; "domain::type" outside of ai.onnx."""
    section = page.partition(PROVIDER)[2].partition("\n## ")[0]
    domain = name = ""
    for line in section.splitlines():
        if found := re.match(r"\|\*\*Operator Domain:\*\* \*(\S+)\*", line):
            domain = found[1]
            continue
        cells = [cell.strip() for cell in line.strip()[1:-1].split("|")]
        if len(cells) < 4 or not re.match(r"[\d\[]", cells[2]):
            continue
        name = cells[0] or name
        numbers = [int(number) for number in re.findall(r"\d+", cells[2])]
        last = None if cells[2].endswith("+") else numbers[-1]
        # The last column has the types that vary; one that does not is written in the second.
        told = {*re.findall(r"\btensor\((\w+)\)", cells[3]), *re.findall(r"\*\*tensor\((\w+)\)\*\*", cells[1])}
        dtypes = sorted(FLOATS[dtype] for dtype in told & FLOATS.keys())
        if dtypes and domain in DOMAINS:
            yield (name if domain == "ai.onnx" else f"{domain}::{name}"), [numbers[0], last, dtypes]


def table(page: str, commit: str, version: str) -> dict[str, Any]:
    kernels: dict[str, list[list[Any]]] = {}
    for name, row in rows(page):
        kernels.setdefault(name, []).append(row)
    return {"source": PAGE.format(commit=commit), "version": version, "kernels": kernels}


def text(content: dict[str, Any]) -> str:
    """As JSON, one operator a line."""
    head = "".join(f"  {json.dumps(key)}: {json.dumps(value)},\n" for key, value in content.items() if key != "kernels")
    lines = ",\n".join(f"    {json.dumps(name)}: {json.dumps(rows)}" for name, rows in content["kernels"].items())
    return f'{{\n{head}  "kernels": {{\n{lines}\n  }}\n}}\n'


def main() -> None:
    page, commit, version = sys.argv[1:]
    TARGET.write_text(text(table(Path(page).read_text(encoding="utf-8"), commit, version)), encoding="utf-8")


if __name__ == "__main__":
    main()
