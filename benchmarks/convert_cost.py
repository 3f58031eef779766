"""What `normswap convert` costs: processor time beside torch.onnx.export of the original and one onnxruntime session of the file.

    python -m benchmarks.convert_cost [--runs 3] [--json benchmarks/results/convert_cost.json]

Each is a process of its own on one thread, run in turn; medians of the processor time (user and system) of whole processes.
"""

from __future__ import annotations

import argparse
import json
import os
import resource
import statistics
import subprocess
import sys
import tempfile
from pathlib import Path

MODELS = ("torchvision:resnet50", "torchvision:efficientnet_b0", "timm:vit_tiny_patch16_224")
SHIM = Path(__file__).resolve().parent.parent / "tests" / "support"
START = f"import sys; sys.path.insert(0, {str(SHIM)!r}); import torchvision_shim\n"
EXPORT = """
import onnxruntime, torch, warnings
from normswap.files.build import build
warnings.simplefilter("ignore")
model = build(sys.argv[1]).eval()
x = torch.randn(1, 3, 224, 224)
batch = ({0: torch.export.Dim("batch", min=1, max=64)},)
torch.onnx.export(model, (x,), sys.argv[2], dynamo=True, verbose=False, dynamic_shapes=batch)
options = onnxruntime.SessionOptions()
options.intra_op_num_threads = 1
session = onnxruntime.InferenceSession(sys.argv[2], options)
session.run(None, {session.get_inputs()[0].name: x.numpy()})
"""
CONVERT = """
from normswap.cli.app import main
sys.argv[1:] = ["convert", sys.argv[1], "--input", "1x3x224x224", "-o", sys.argv[2]]
main()
"""


def seconds(code: str, model: str) -> float:
    """Processor time of one process."""
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "MKL_NUM_THREADS": "1"}
    before = resource.getrusage(resource.RUSAGE_CHILDREN)
    with tempfile.TemporaryDirectory() as folder:
        command = [sys.executable, "-c", START + code, model, str(Path(folder) / "out")]
        subprocess.run(command, check=True, capture_output=True, env=environment)
    after = resource.getrusage(resource.RUSAGE_CHILDREN)
    return after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--runs", type=int, default=3)
    parser.add_argument("--models", nargs="*", default=MODELS)
    parser.add_argument("--json", type=Path)
    arguments = parser.parse_args()
    rows = []
    for model in arguments.models:
        pairs = [(seconds(EXPORT, model), seconds(CONVERT, model)) for _ in range(arguments.runs)]
        export, convert = (statistics.median(column) for column in zip(*pairs, strict=True))
        ratio = statistics.median(b / a for a, b in pairs)
        rows.append({"model": model, "export_s": round(export, 2), "convert_s": round(convert, 2), "ratio": round(ratio, 2)})
        print(f"{model:32} export and session {export:6.2f} s   convert {convert:6.2f} s   {ratio:.2f} x", flush=True)
    if arguments.json:
        arguments.json.write_text(json.dumps(rows, indent=2) + "\n")


if __name__ == "__main__":
    main()
