"""The ONNX file of a conversion beside what others make of the same model as it was: operators, bytes, milliseconds.

    pip install -c constraints.txt -e '.[vision,bench]' transformers
    python -m benchmarks.onnx_latency                        operators and bytes of every net
    python -m benchmarks.onnx_latency --latency AlphaZero    and its latency; only where nothing else runs on the machine

A peer's file is what it makes of torch.onnx.export's of the original model, whose BatchNorms have the statistics, weights and biases of our
BatchlessNorms; its LayerNorms are LayerNorms, so that there the two files are not the same function. "without norms" is the same model
with nothing in their place. Biases that are zero, as they are before training, are random: the tools remove a sum with zeros, and a trained
model has none. Operators are counted with those of subgraphs and without Constants, which compute nothing; "onnxruntime" counts those of
the graph that it runs, at ORT_ENABLE_ALL. A tool should find no more to remove in our file than in the one without norms.

Latency is that of one onnxruntime session for each file, with one thread, in seconds of that thread. In the rows of November 2026
"ort-cpu" is what the target "portable" is now, and "ours" had a maximum in the place of a norm and its ReLU between convolutions, as the
target "cuda" still has; where the two are the same file, there is one. In each round all of them have a turn, in an order that rotates;
what is shown is the median over rounds of the ratio of ours to a peer's, so that a slower minute counts for both.

Each row is written to build/onnx_latency.jsonl as soon as it is there; a run that was interrupted goes on where it stopped. Rows that
other versions of the tools have made are made again. The last result is results/onnx_latency.json and the tables of docs/benchmarks.md.
"""

from __future__ import annotations

import argparse
import contextlib
import copy
import importlib
import io
import json
import math
import os
import platform
import statistics
import sys
import tempfile
import time
import warnings
from collections.abc import Callable, Iterable, Mapping
from importlib import metadata
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import nn

from benchmarks.onnx_skeletons import NETS, SQUARE, Nothing, error, inputs, random_norm, with_norms, without_its_operators
from benchmarks.pages import put
from normswap.export.norms import operators
from normswap.export.opset import DEFAULT_OPSET
from normswap.export.to_onnx import export
from normswap.layer.batchless_norm import BatchlessNorm
from normswap.models.quiet import quiet

ROOT = Path(__file__).resolve().parent.parent
RESULTS, RAW, PAGE = ROOT / "build/onnx_latency.jsonl", ROOT / "benchmarks/results/onnx_latency.json", ROOT / "docs/benchmarks.md"
BEGIN, END = "<!-- begin: python -m benchmarks.onnx_latency -->", "<!-- end -->"
FULL = (2, 3, 224, 224)  # what the nets that take any size were made for
BATCHES = (1, 8)
ROUNDS, FEWEST, SECONDS, TURN = 50, 11, 60.0, 0.02  # no more rounds, or no fewer but no longer; a turn takes this long at least
SIGNS = {False: "positive", True: "mixed"}
Row = dict[str, Any]


# --- the files -----------------------------------------------------------------------------------------------------------------------


def slim(proto: Any) -> Any:
    return importlib.import_module("onnxslim").slim(proto)


def sim(proto: Any) -> Any:
    return importlib.import_module("onnxsim").simplify(proto)[0]


def script(proto: Any) -> Any:
    return importlib.import_module("onnxscript.optimizer").optimize(proto)


TOOLS: Mapping[str, Callable[[Any], Any]] = {"onnxslim": slim, "onnxsim": sim, "onnxscript": script}
PEERS = ("torch", *TOOLS)
OURS = ("ours", "ort-cpu")  # the second in old rows alone
FILES = (*OURS, "skeleton", *PEERS)
VERSIONS = ("torch", "onnx", "onnxruntime", "onnxscript", "onnxslim", "onnxsim", "normswap")


def same_norms(original: nn.Module, model: nn.Module) -> None:
    """The norms of `original` get what the BatchlessNorms in their places in `model` hold; a LayerNorm has weight and bias only."""
    places = dict(model.named_modules())
    with torch.no_grad():
        for name, norm in original.named_modules():
            if not isinstance(norm, (nn.modules.batchnorm._BatchNorm, nn.LayerNorm)):
                continue
            new = places[name] if isinstance(places[name], BatchlessNorm) else places[f"{name}.0"]
            assert isinstance(new, BatchlessNorm)
            for ours, theirs in ((new.weight, norm.weight), (new.bias, norm.bias)):
                if theirs is not None:
                    assert ours is not None
                    theirs.copy_(ours)
            if isinstance(norm, nn.modules.batchnorm._BatchNorm):
                assert norm.running_mean is not None
                assert norm.running_var is not None
                mean, std = new.statistics(torch.float64)
                norm.running_mean.copy_(mean.reshape(-1))
                norm.running_var.copy_(std.reshape(-1).square() - norm.eps)


def with_biases(model: nn.Module) -> nn.Module:
    """`model`, its biases no longer zero."""
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if name.rpartition(".")[2] == "bias" and not parameter.any():
                parameter.normal_(0, 0.02)
    return model


def exported_by_torch(model: nn.Module, x: torch.Tensor, path: Path) -> None:
    with quiet(), torch.no_grad():
        shapes = ({0: "batch"},)
        program = torch.onnx.export(model.eval(), (x,), dynamo=True, dynamic_shapes=shapes, opset_version=DEFAULT_OPSET, verbose=False)
        assert program is not None
        program.save(str(path))


def count(proto: Any) -> int:
    import onnx_ir as ir

    return sum(number for name, number in operators(ir.from_proto(proto).graph).items() if name != "Constant")


def session(path: Path, optimized: Path | None = None) -> Any:
    import onnxruntime

    options = onnxruntime.SessionOptions()
    options.graph_optimization_level = onnxruntime.GraphOptimizationLevel.ORT_ENABLE_ALL
    options.intra_op_num_threads = options.inter_op_num_threads = 1
    options.log_severity_level = 3
    if optimized is not None:
        options.optimized_model_filepath = str(optimized)
    return onnxruntime.InferenceSession(str(path), options, providers=["CPUExecutionProvider"])


def run(runner: Any, x: np.ndarray[Any, Any]) -> list[Any]:
    return runner.run(None, {runner.get_inputs()[0].name: x})  # type: ignore[no-any-return]


def applied(tool: Callable[[Any], Any], path: Path) -> Any:
    """What `tool` makes of a file; what it prints goes nowhere."""
    import onnx

    with contextlib.redirect_stdout(io.StringIO()), contextlib.redirect_stderr(io.StringIO()):
        return tool(onnx.load(str(path)))


def measure(name: str, signs: bool, latency: bool) -> Row:
    """One row: the counts of every file, what each tool removes, and the latency if asked for."""
    import onnx

    make, shape = NETS[name]
    shape = FULL if shape == SQUARE else shape
    torch.manual_seed(0)
    original = with_biases(make())
    layers = any(isinstance(module, nn.LayerNorm) for module in original.modules())
    model = with_norms(copy.deepcopy(original), random_norm(signs))
    same_norms(original, model)
    x = inputs(shape)
    row: Row = {"net": name, "signs": SIGNS[signs], "input": list(shape[1:]), "layer_norms": layers, "failed": {}, "removed": {}}
    with tempfile.TemporaryDirectory() as directory, warnings.catch_warnings():
        warnings.simplefilter("ignore")
        paths = {file: Path(directory) / f"{file}.onnx" for file in FILES}
        row["norms"] = len(export(model, (x,), {}, paths["ours"], opset=DEFAULT_OPSET).sites)
        exported_by_torch(original, x, paths["torch"])
        export(with_norms(original, lambda channels, axis: Nothing()), (x,), {}, paths["skeleton"], opset=DEFAULT_OPSET)
        del model, original
        counts = {file: count(onnx.load(str(paths[file]))) for file in ("ours", "skeleton", "torch")}
        for tool, apply in TOOLS.items():
            try:
                result = applied(apply, paths["torch"])
                counts[tool] = count(result)
                onnx.save(result, str(paths[tool]))
                row["removed"][tool] = {file: counts[file] - count(applied(apply, paths[file])) for file in ("ours", "skeleton")}
            except Exception as e:
                row["failed"][tool] = f"{type(e).__name__}: {(str(e).splitlines() or [''])[0][:200]}"
                counts.pop(tool, None)
        sessions = {}
        for file in counts:
            optimized = Path(directory) / "optimized.onnx"
            sessions[file] = session(paths[file], optimized)
            row[file] = {"nodes": counts[file], "bytes": paths[file].stat().st_size, "onnxruntime": count(onnx.load(str(optimized)))}
        other = inputs((3, *shape[1:])).numpy()
        want = run(sessions["torch"], other)
        for file in set(counts) - {"skeleton"} - ({"ours"} if layers else set()):
            row[file]["error"] = error([torch.from_numpy(a) for a in run(sessions[file], other)], [torch.from_numpy(a) for a in want])
        row["latency"] = {str(batch): interleaved(sessions, inputs((batch, *shape[1:])).numpy()) for batch in BATCHES} if latency else None
    return row


def interleaved(sessions: Mapping[str, Any], x: np.ndarray[Any, Any]) -> Row:
    """Milliseconds of each, and each of ours as a multiple of the others': medians over rounds in which each has a turn."""
    names = list(sessions)
    for name in names:
        run(sessions[name], x)
    repeats = max(1, math.ceil(TURN / max(1e-6, seconds_of(sessions["ours"], x, 3))))
    times: dict[str, list[float]] = {name: [] for name in names}
    started = time.perf_counter()
    for done in range(ROUNDS):
        if done >= FEWEST and time.perf_counter() - started > SECONDS:
            break
        turn = done % len(names)
        for name in names[turn:] + names[:turn]:
            times[name].append(1000 * seconds_of(sessions[name], x, repeats))
    return {
        "rounds": len(times["ours"]),
        "milliseconds": {name: round(statistics.median(found), 4) for name, found in times.items()},
        "ratios": {
            mine: {
                name: round(statistics.median(a / b for a, b in zip(times[mine], found, strict=True)), 4)
                for name, found in times.items()
                if name not in OURS
            }
            for mine in OURS
            if mine in times
        },
    }


def seconds_of(runner: Any, x: np.ndarray[Any, Any], repeats: int) -> float:
    """Of the processor for one run, in the mean over `repeats`: what else runs on the machine does not count."""
    start = time.thread_time()
    for _ in range(repeats):
        run(runner, x)
    return (time.thread_time() - start) / repeats


# --- the tables ----------------------------------------------------------------------------------------------------------------------


def above(row: Row, what: str) -> int:
    """How far ours is above the best peer's; below, if it is negative."""
    return int(row["ours"][what]) - min(int(row[peer][what]) for peer in PEERS if peer in row)


def finds_more(row: Row) -> dict[str, tuple[int, int]]:
    """The tools that remove more from our file than from the one without norms: how much from each."""
    return {tool: (n["ours"], n["skeleton"]) for tool, n in row["removed"].items() if n["ours"] > max(0, n["skeleton"])}


def slowest_ratio(row: Row, batch: int, mine: str = "ours") -> float:
    """Of our latency to the best peer's."""
    return float(max(ratio for name, ratio in row["latency"][str(batch)]["ratios"][mine].items() if name in PEERS))


def lines_of(head: Iterable[str], rows: Iterable[Iterable[str]]) -> str:
    head = list(head)
    return "\n".join(["| " + " | ".join(head) + " |", "|" + "---|" * len(head), *("| " + " | ".join(cells) + " |" for cells in rows)])


def table(rows: list[Row]) -> str:
    """The tables of docs/benchmarks.md."""

    def label(row: Row) -> list[str]:
        return [row["net"], row["signs"], str(row["norms"])]

    def nodes(row: Row, file: str) -> str:
        return f"{row[file]['nodes']} → {row[file]['onnxruntime']}" if file in row else "the same" if file in OURS else "failed"

    def size(row: Row, file: str) -> str:
        return f"{row[file]['bytes'] - row['ours']['bytes']:+,}" if file in row else "failed"

    def removable(row: Row) -> str:
        more = finds_more(row)
        return ", ".join(f"{tool}: {ours}, not {bare}" for tool, (ours, bare) in more.items()) or "nothing"

    first = lines_of(
        ("net", "weights", "norms", "ours", "ort-cpu", "without norms", *PEERS, "removable"),
        ([*label(row), *(nodes(row, file) for file in FILES), removable(row)] for row in rows),
    )
    second = lines_of(
        ("net", "weights", "norms", "ours", *PEERS),
        ([*label(row), f"{row['ours']['bytes']:,}", *(size(row, file) for file in PEERS)] for row in rows),
    )
    timed = [row for row in rows if row["latency"]]
    third = lines_of(
        ("net", "weights", "batch", "target", "ours, ms", *PEERS, "to the best"),
        (
            [
                row["net"],
                row["signs"],
                str(batch),
                "portable" if mine == "ours" else mine,
                f"{row['latency'][str(batch)]['milliseconds'][mine]:.3g}",
                *(f"{row['latency'][str(batch)]['ratios'][mine][peer]:.3f}" if peer in row else "failed" for peer in PEERS),
                f"{slowest_ratio(row, batch, mine):.3f}",
            ]
            for row in timed
            for batch in BATCHES
            for mine in row["latency"][str(batch)]["ratios"]
        ),
    )
    return "\n\n".join(
        (
            "Operators of the file → of the graph that onnxruntime makes of it:",
            first,
            "Bytes of our file, and how many more the others have:",
            second,
            f"Latency, ours as a multiple of each ({len(timed)} of {len(rows)} rows measured; the others are not):",
            third,
        )
    )


def environment() -> dict[str, Any]:
    info = Path("/proc/cpuinfo")
    lines = info.read_text().splitlines() if info.exists() else []
    cpu = next((line.split(":")[1].strip() for line in lines if line.startswith("model name")), platform.processor())
    return {"machine": f"{platform.system()} {platform.machine()}, {cpu}, {os.cpu_count()} cores", "versions": versions()}


def versions() -> dict[str, str]:
    found = {}
    for name in VERSIONS:
        with contextlib.suppress(metadata.PackageNotFoundError):
            found[name] = metadata.version(name)
    return found


def publish(rows: list[Row]) -> None:
    raw = {"environment": environment(), "rows": rows}
    RAW.write_text(json.dumps(raw, indent=1) + "\n", encoding="utf-8")
    put(PAGE, BEGIN, page(raw), END)


def page(raw: Row) -> str:
    """What docs/benchmarks.md shows of the figures: the verdicts, the tables, what is missing, and where they were made."""
    where, rows = raw["environment"], raw["rows"]
    there = {(row["net"], row["signs"]) for row in rows}
    missing = [f"{name} ({word})" for word in SIGNS.values() for name in NETS if (name, word) not in there]
    tools = ", ".join(f"{name} {version}" for name, version in where["versions"].items() if name != "normswap")
    gone = [f"Not measured: {', '.join(missing)}."] if missing else []
    return "\n\n".join((verdict(rows), table(rows), *gone, f"{where['machine']}; {tools}."))


def verdict(rows: list[Row]) -> str:
    """How many rows are as small as the best peer's, and which are not."""
    lines = []
    for what, of in (("nodes", "operators"), ("onnxruntime", "operators in onnxruntime"), ("bytes", "bytes")):
        more = [f"{row['net']} ({row['signs']}) by {above(row, what):,}" for row in rows if above(row, what) > 0]
        lines.append(
            f"* {of}: no more than the best peer in {len(rows) - len(more)} of {len(rows)}"
            + ("; above it: " * bool(more))
            + ", ".join(more)
        )
    found = [f"{row['net']} ({row['signs']})" for row in rows if finds_more(row)]
    lines.append(f"* a tool removes more than without norms in {len(found)} of {len(rows)}" + (": " * bool(found)) + ", ".join(found))
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("nets", nargs="*", choices=[*NETS, []], metavar="NET")
    parser.add_argument("--latency", action="store_true", help="measure the latency, too")
    parser.add_argument("--signs", choices=list(SIGNS.values()), help="only norms with such weights")
    asked = parser.parse_args()
    without_its_operators()
    torch.set_num_threads(1)
    RESULTS.parent.mkdir(exist_ok=True)
    done: dict[tuple[str, str], Row] = {}
    for line in RESULTS.read_text(encoding="utf-8").splitlines() if RESULTS.exists() else []:
        record = json.loads(line)
        if record.pop("versions") == versions():
            done[record["net"], record["signs"]] = record
    with RESULTS.open("a", encoding="utf-8") as file:
        for signs, word in SIGNS.items():
            for name in asked.nets or NETS:
                row = done.get((name, word))
                if asked.signs not in (None, word) or (row is not None and (row["latency"] or not asked.latency)):
                    continue
                done[name, word] = measure(name, signs, asked.latency)
                file.write(json.dumps({**done[name, word], "versions": versions()}) + "\n")
                file.flush()
                print(json.dumps(done[name, word]), file=sys.stderr, flush=True)
    rows = [done[name, word] for name in NETS for word in SIGNS.values() if (name, word) in done]
    publish(rows)
    print(table(rows))


if __name__ == "__main__":
    main()
