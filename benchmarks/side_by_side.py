"""Five jobs, each with normswap and with the tools that people use for it: the lines, and what came out. For docs/side_by_side.md.

    pip install opacus timm onnxslim polygraphy onnx-graphsurgeon optimum-onnx
    python -m benchmarks.side_by_side [JOB ...]  runs every line, prints what came out, and writes benchmarks/results/side_by_side.json

Network and data: the digits of examples/digits.py, trained there. A tool that is not installed is left out, and said to be.
"""

from __future__ import annotations

import contextlib
import copy
import importlib
import io
import json
import os
import subprocess
import sys
import tempfile
import warnings
from collections import Counter
from collections.abc import Callable
from importlib import metadata
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnxruntime
import torch
from torch import nn
from torch.nn.functional import cross_entropy

import normswap
from benchmarks.pages import put
from benchmarks.screenshots import working_in

ROOT = Path(__file__).resolve().parent.parent
RAW, PAGE = ROOT / "benchmarks/results/side_by_side.json", ROOT / "docs/side_by_side.md"
BEGIN, END = "<!-- begin: python -m benchmarks.side_by_side -->", "<!-- end -->"
sys.path.insert(0, str(ROOT / "examples"))
digits: Any = importlib.import_module("digits")
Row = tuple[str, str, str]  # tool, its lines, what came out


def moved(original: nn.Module, candidate: nn.Module) -> float:
    """The largest difference of an output on the test images, relative to the largest output."""
    with torch.no_grad():
        a, b = (model.eval()(digits.images[digits.TEST]) for model in (original, candidate))
    return float((a - b).abs().max() / a.abs().max())


def trained_at_one(model: nn.Module, groups: Any, rate: float) -> float:
    """The share of dark digits that a model gets right after 600 steps with one image each."""
    torch.manual_seed(0)
    optimizer = torch.optim.SGD(groups, lr=rate, momentum=0.9)
    for i in torch.randperm(1300)[:600].tolist():
        optimizer.zero_grad()
        cross_entropy(model(1 - digits.images[i : i + 1]), digits.labels[i : i + 1]).backward()  # type: ignore[no-untyped-call]
        optimizer.step()
    right: float = digits.right(model, 1 - digits.images)
    return right


# -- the jobs ----------------------------------------------------------------------------------------------------------------


def private(original: nn.Module) -> list[Row]:
    from opacus.validators import ModuleValidator

    def says(model: nn.Module) -> str:
        errors = len(ModuleValidator.validate(model.train(), strict=False))
        right = digits.right(model, digits.images)
        by = moved(original, model)
        return f"outputs moved by {by:.1e} of the largest; {right:.0%} right before any training; {errors} objections of Opacus"

    fixed = ModuleValidator.fix(copy.deepcopy(original))
    ours = normswap.for_opacus(normswap.convert(original, digits.images[:5]).model)
    return [
        ("Opacus", "`ModuleValidator.fix(model)`", f"BatchNorm becomes GroupNorm; {says(fixed)}"),
        ("normswap", "`normswap.for_opacus(normswap.convert(model, x).model)`", says(ours)),
    ]


def batch_one(original: nn.Module) -> list[Row]:
    freeze_batch_norm_2d = importlib.import_module("timm.layers").freeze_batch_norm_2d

    rates = (1e-3, 3e-4, 1e-4)

    def best(make: Callable[[], nn.Module], groups: Callable[[nn.Module, float], Any]) -> str:
        results = {}
        for rate in rates:
            model = make()
            results[rate] = trained_at_one(model, groups(model, rate), rate)
        rate = max(results, key=results.__getitem__)
        return f"{results[rate]:.0%} right after 600 single images, at the best of three learning rates ({rate:g})"

    return [
        ("torch", "`model.train()`", best(lambda: copy.deepcopy(original).train(), lambda model, rate: model.parameters())),
        (
            "timm",
            "`timm.layers.freeze_batch_norm_2d(model)`",
            best(lambda: freeze_batch_norm_2d(copy.deepcopy(original)).train(), lambda model, rate: model.parameters()),
        ),
        (
            "normswap",
            "`normswap.convert(model, x).model.train()` and `normswap.param_groups(model, lr=..., batch=1)`",
            best(
                lambda: normswap.convert(original, digits.images[:5]).model.train(),
                lambda model, rate: normswap.param_groups(model, lr=rate, batch=1),
            ),
        ),
    ]


def _operators(path: str) -> str:
    counts = Counter(node.op_type for node in onnx.load(path).graph.node)
    return ", ".join(f"{name} {count}" for name, count in sorted(counts.items()))


def _error(a: str, b: str) -> float:
    x = digits.images[digits.TEST].numpy()
    p, q = (onnxruntime.InferenceSession(path).run(None, {"x": x})[0] for path in (a, b))
    return float(np.abs(p - q).max() / np.abs(p).max())


def preactivation() -> nn.Sequential:
    """A network whose norms come before a convolution: BatchNorm, ReLU, Conv, as in many residual networks."""
    torch.manual_seed(0)
    model = nn.Sequential(
        *(nn.Conv2d(1, 16, 3, padding=1), nn.ReLU(), nn.BatchNorm2d(16), nn.Conv2d(16, 16, 1), nn.ReLU()),
        *(nn.Conv2d(16, 8, 3), nn.BatchNorm2d(8), nn.ReLU(), nn.Flatten(), nn.Linear(288, 10)),
    )
    for _ in range(20):
        model(digits.images[:256])
    return model.eval()


def _written(model: nn.Module, path: str, **options: Any) -> None:
    """By torch's older exporter, whose files the other tools know best."""
    axes = {"x": {0: "n"}}
    torch.onnx.export(model, (digits.images[:2],), path, input_names=["x"], dynamic_axes=axes, dynamo=False, opset_version=17, **options)


def fold(original: nn.Module) -> list[Row]:
    plain = "plain.onnx"
    _written(preactivation(), plain, do_constant_folding=False, training=torch.onnx.TrainingMode.PRESERVE)
    rows: list[Row] = [("the file", "", _operators(plain))]
    onnxslim = importlib.import_module("onnxslim")
    with contextlib.redirect_stdout(io.StringIO()):
        onnxslim.slim(plain, "slim.onnx")
    _run("polygraphy", "surgeon", "sanitize", plain, "--fold-constants", "--cleanup", "-o", "sanitized.onnx")
    passed = bool(normswap.fold_onnx(plain, "folded.onnx").parity)
    made = (
        ("onnxslim", "`onnxslim plain.onnx slim.onnx`", "slim.onnx", "not compared unless asked"),
        (
            "Polygraphy",
            "`polygraphy surgeon sanitize plain.onnx --fold-constants --cleanup -o out.onnx`",
            "sanitized.onnx",
            "not compared unless asked",
        ),
        ("normswap", "`normswap fold plain.onnx -o folded.onnx`", "folded.onnx", f"compared by the tool, passed: {passed}"),
    )
    return [*rows, *((tool, line, f"{_operators(path)}; error {_error(plain, path):.0e}; {how}") for tool, line, path, how in made)]


def compare(original: nn.Module) -> list[Row]:
    wrong = copy.deepcopy(original)
    with torch.no_grad():
        wrong.get_submodule("4").bias[0] += 1e-3  # type: ignore[index, operator]
    _written(original, "a.onnx")
    _written(wrong, "wrong.onnx")
    # the same function from other operators, so that it is rounded otherwise
    normswap.export_onnx(normswap.convert(original, digits.images[:5]), digits.images[:5], "same.onnx")
    theirs, ours = [], []
    output = onnx.load("a.onnx").graph.output[0].name
    for name in ("wrong", "same"):
        renamed = onnx.load(f"{name}.onnx")  # Polygraphy pairs outputs by their names
        for values, wanted in ((renamed.graph.input, "x"), (renamed.graph.output, output)):
            _rename(renamed, values[0].name, wanted)
        onnx.save(renamed, "candidate.onnx")
        _run("polygraphy", "run", "a.onnx", "--onnxrt", "--save-outputs", "a.json", "--input-shapes", "x:[4,1,8,8]")
        done = _run("polygraphy", "run", "candidate.onnx", "--onnxrt", "--load-outputs", "a.json", "--input-shapes", "x:[4,1,8,8]")
        theirs.append(f"{name}: {'passed' if done.returncode == 0 else 'failed'}")
        parity = normswap.verify("a.onnx", f"{name}.onnx", digits.images[:4])
        ours.append(f"{name}: {'passed' if parity else f'failed, first at {parity.first_bad}'}")
    line = "`polygraphy run a.onnx --onnxrt --save-outputs a.json`, then `polygraphy run b.onnx --onnxrt --load-outputs a.json`"
    return [("Polygraphy", line, "; ".join(theirs)), ("normswap", "`normswap verify a.onnx b.onnx`", "; ".join(ours))]


def _rename(model: onnx.ModelProto, old: str, new: str) -> None:
    for values in (model.graph.input, model.graph.output):
        for value in values:
            value.name = new if value.name == old else value.name
    for node in model.graph.node:
        node.input[:] = [new if name == old else name for name in node.input]
        node.output[:] = [new if name == old else name for name in node.output]


def export(original: nn.Module) -> list[Row]:
    """A transformer of two layers, saved by transformers, to ONNX."""
    main_export = importlib.import_module("optimum.exporters.onnx").main_export
    from transformers import BertConfig, BertModel

    torch.manual_seed(0)
    config = BertConfig(vocab_size=50, hidden_size=32, num_hidden_layers=2, num_attention_heads=4, intermediate_size=48)
    model = BertModel(config, add_pooling_layer=False).eval()  # type: ignore[no-untyped-call]
    model.save_pretrained("bert")
    model.config.return_dict = False  # torch 2.13 cannot flatten the outputs of the transformers that Optimum needs
    batches = [{"input_ids": torch.randint(0, 50, (8, 12)), "attention_mask": torch.ones(8, 12, dtype=torch.long)} for _ in range(4)]
    main_export("bert", output="out", task="feature-extraction", library_name="transformers")
    rows: list[Row] = [("Optimum", '`main_export("bert", output="out", task="feature-extraction")`', _norms("out/model.onnx"))]
    exported = normswap.export_onnx(model, batches[0], "kept.onnx")
    says = f"{_norms('kept.onnx')}; compared in onnxruntime, passed: {bool(exported.parity)}"
    rows.append(("normswap", '`normswap.export_onnx(model, x, "kept.onnx")`', says))
    swapped = normswap.convert(model, calibration=batches, approximate=True)
    exported = normswap.export_onnx(swapped, batches[0], "swapped.onnx")
    drift = swapped.drift.max_rel if swapped.drift else float("nan")
    says = f"{_norms('swapped.onnx')}; approximate: outputs moved by {drift:.0%} of the largest"
    return [*rows, ("normswap", "`normswap.convert(model, calibration=batches, approximate=True)`, then the same", says)]


def _norms(path: str) -> str:
    operators = Counter(node.op_type for node in onnx.load(path).graph.node)
    return f"{sum(operators.values())} operators, {operators['LayerNormalization']} of them LayerNormalization"


def _run(*command: str) -> subprocess.CompletedProcess[str]:
    place = Path(sys.executable).parent / command[0]
    return subprocess.run([str(place), *command[1:]], capture_output=True, text=True, env=os.environ | {"HF_HUB_OFFLINE": "1"})


JOBS = {"private": private, "batch one": batch_one, "fold": fold, "compare": compare, "export": export}


TITLES = {
    "private": "Train a BatchNorm network with differential privacy",
    "batch one": "Train on with one image at a time",
    "fold": "Take normalization out of an ONNX file",
    "compare": "Is this file the same function as that one?",
    "export": "Export a transformer",
}


def page(result: dict[str, Any]) -> str:
    """The tables of docs/side_by_side.md."""
    parts = []
    for job, title in TITLES.items():
        rows = "\n".join(f"| {tool} | {line} | {came} |" for tool, line, came in result[job])
        parts.append(f"## {title}\n\n| tool | its lines | what came out |\n|---|---|---|\n{rows}\n")
    versions = ", ".join(f"{tool} {version}" for tool, version in result["versions"].items())
    return "\n".join([*parts, f"Versions: {versions}.\n"])


def main() -> None:
    warnings.simplefilter("ignore")
    sys.path.insert(0, str(ROOT / "tests/support"))
    importlib.import_module("torchvision_shim")
    original = digits.pretrained()
    found = {}
    with tempfile.TemporaryDirectory() as folder, working_in(folder):
        for name, job in JOBS.items():
            if len(sys.argv) > 1 and name not in sys.argv[1:]:
                continue
            try:
                found[name] = job(original)
            except ImportError as error:
                found[name] = [("", "", f"not run: {error}")]
            for row in found[name]:
                print(name, *row, sep=" | ", flush=True)
    tools = ("opacus", "timm", "onnxslim", "polygraphy", "optimum", "optimum-onnx", "transformers", "torch", "onnxruntime")
    before = json.loads(RAW.read_text(encoding="utf-8")) if RAW.exists() else {}
    result = before | found | {"versions": {tool: metadata.version(tool) for tool in tools}}
    RAW.write_text(json.dumps(result, indent=1) + "\n", encoding="utf-8")
    put(PAGE, BEGIN, f"\n{page(result)}", END)


if __name__ == "__main__":
    main()
