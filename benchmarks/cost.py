"""What a conversion costs: seconds and bytes, for ResNet-152.

    python -m benchmarks.cost            prints the table and writes benchmarks/results/cost.json

Times are interleaved and reported as the median of the ratios, so that a noisy machine cancels out. Memory is the peak resident set of a
process of its own (ru_maxrss, from the operating system), above that of a process that only imports the same packages.
"""

from __future__ import annotations

import copy
import importlib
import json
import os
import platform
import resource
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from importlib import metadata
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
REPEATS = 5


def resnet152() -> object:
    """ResNet-152 with randomised statistics; the factory that the command is given."""
    sys.path.insert(0, str(ROOT / "tests/support"))
    importlib.import_module("torchvision_shim")  # before torchvision, which does not import without it on a CPU build of torch
    import torchvision

    from fixtures.nets import randomise

    model = torchvision.models.resnet152(weights=None)
    randomise(model, 0)
    return model.eval()


def weights_of(model: object) -> int:
    import torch

    assert isinstance(model, torch.nn.Module)
    return sum(t.numel() * t.element_size() for t in (*model.parameters(), *model.buffers()))


# --- each in a process of its own; prints its peak ---------------------------------------------------------------------------------


def only_import() -> None:
    for name in ("onnx", "onnxruntime", "onnxscript", "normswap.api.convert", "normswap.cli.convert"):
        importlib.import_module(name)


def only_model() -> None:
    only_import()
    resnet152()


def one_forward() -> None:
    import torch

    only_import()
    model = resnet152()
    with torch.no_grad():
        model(torch.randn(3, 3, 224, 224))  # type: ignore[operator]


def python_convert() -> None:
    import torch

    import normswap

    only_import()
    normswap.convert(resnet152(), torch.randn(1, 3, 224, 224))  # type: ignore[type-var]


def command() -> None:
    import tempfile

    from normswap.cli.convert import ConvertOptions, convert_to_directory

    only_import()
    with tempfile.TemporaryDirectory() as scratch:
        convert_to_directory("benchmarks.cost:resnet152", Path(scratch) / "out", ConvertOptions(inputs=["1x3x224x224"]))


PROCESSES: dict[str, Callable[[], None]] = {f.__name__: f for f in (only_import, only_model, one_forward, python_convert, command)}


def peak_of(name: str) -> int:
    """ru_maxrss of a process that runs one of the functions above, in bytes."""
    out = subprocess.run([sys.executable, "-m", "benchmarks.cost", name], cwd=ROOT, check=True, capture_output=True, text=True)
    return int(out.stdout.split()[-1])


# --- times --------------------------------------------------------------------------------------------------------------------------


def surgery_ratio() -> dict[str, float]:
    """plan + swap (convert without its verification) against copy.deepcopy + torch.fx.symbolic_trace, in seconds."""
    import torch

    from normswap.api.convert import plan
    from normswap.swap.apply import swap

    model = resnet152()
    assert isinstance(model, torch.nn.Module)
    ours, theirs = [], []
    for _ in range(REPEATS):
        start = time.perf_counter()
        swap(model, plan(model))
        ours.append(time.perf_counter() - start)
        start = time.perf_counter()
        copy.deepcopy(model)
        torch.fx.symbolic_trace(model)
        theirs.append(time.perf_counter() - start)
    return {
        "normswap_seconds": statistics.median(ours),
        "deepcopy_and_symbolic_trace_seconds": statistics.median(theirs),
        "median_ratio": statistics.median(a / b for a, b in zip(ours, theirs, strict=True)),
    }


def help_ratio() -> dict[str, float]:
    """`normswap --help` against `import torch`, in user + system seconds of the process."""
    ours, theirs = [], []
    for _ in range(REPEATS):
        ours.append(_cpu_seconds([sys.executable, "-m", "normswap", "--help"]))
        theirs.append(_cpu_seconds([sys.executable, "-c", "import torch"]))
    return {
        "help_seconds": statistics.median(ours),
        "import_torch_seconds": statistics.median(theirs),
        "median_ratio": statistics.median(a / b for a, b in zip(ours, theirs, strict=True)),
    }


def _cpu_seconds(arguments: list[str]) -> float:
    before = resource.getrusage(resource.RUSAGE_CHILDREN)
    subprocess.run(arguments, cwd=ROOT, check=True, capture_output=True)
    after = resource.getrusage(resource.RUSAGE_CHILDREN)
    return after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime


def main() -> None:
    weights = weights_of(resnet152())
    peaks = {name: peak_of(name) for name in PROCESSES}
    base = peaks["only_import"]
    forward = peaks["one_forward"] - peaks["only_model"]
    result = {
        "machine": f"{platform.processor() or platform.machine()}, {os.cpu_count()} cores",
        "versions": {name: metadata.version(name) for name in ("torch", "onnx", "onnxruntime", "onnxscript")},
        "weights_bytes": weights,
        "one_forward_bytes": forward,
        "python_convert_bytes": peaks["python_convert"] - base,
        "python_convert_less_one_forward_per_weights": (peaks["python_convert"] - base - forward) / weights,
        "command_bytes": peaks["command"] - base,
        "command_per_weights": (peaks["command"] - base) / weights,
        "surgery": surgery_ratio(),
        "help": help_ratio(),
    }
    print(json.dumps(result, indent=2))
    (ROOT / "benchmarks" / "results" / "cost.json").write_text(json.dumps(result, indent=2) + "\n", encoding="utf-8")


if __name__ == "__main__":
    if len(sys.argv) > 1:
        PROCESSES[sys.argv[1]]()
        print(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024)
    else:
        main()
