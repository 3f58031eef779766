"""Is every file the same function? Comparisons of every net, with weights that are 0, tiny and negative, and four peers' folded files.

    python -m benchmarks.onnx_parity                     all nets and all peers, then results/onnx_parity.json and docs/benchmarks.md
    python -m benchmarks.onnx_parity AlphaZero ViT       some nets

The net of `onnx_skeletons`, with BatchlessNorms, a tenth of whose weights are 0, a tenth 1e-7 and a tenth negative, is exported and
held against itself in float64 at batch 1, 2 and 7, at x 1e-3, x 1e3 and all 3. What is shown is the largest error of any output at
any of these, relative to its largest value: of the net in float32 (the noise floor), in onnxruntime at the worst of its four levels, in
onnx's evaluator at the first of them, and of the net in float16 in torch. Each may be 10 times the noise floor. Left
out are inputs at which the net itself is more than 1e-4 from its float64 run in float32, such as x 1e3 for an attention without norms.

Peers: the same net with its own BatchNorms, with weights that are positive or of mixed signs, is exported by torch.onnx.export and taken
through each tool; `normswap fold` is run on that file. "same" says that the result has the operators of our own export, Constant and
Identity aside, with Max(x, a constant) counted as Relu and Gemm as MatMul; what the tool's own file of the net with nothing in the place
of its norms has more or less than ours counts for neither, as it is not of norms. Nets with LayerNorms are left out: those compute other
functions.

Each row is written to build/onnx_parity.jsonl as soon as it is there; a run that was interrupted goes on where it stopped.
"""

from __future__ import annotations

import argparse
import copy
import json
import sys
import tempfile
import warnings
from collections import Counter
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import nn

from benchmarks.onnx_latency import SIGNS, TOOLS, applied, exported_by_torch, same_norms
from benchmarks.onnx_skeletons import NETS, Nothing, inputs, random_norm, with_norms, without_its_operators
from benchmarks.pages import put
from normswap.api.fold import fold_onnx
from normswap.export.norms import alike, operators
from normswap.export.to_onnx import export
from normswap.export.verified import verified_export
from normswap.layer.batchless_norm import BatchlessNorm
from normswap.models.inputs import Inputs
from normswap.parity.judge import judge
from normswap.parity.limits import CAP
from normswap.parity.probes import Probe, probes
from normswap.parity.reference import Judgement
from normswap.parity.run_onnx import REFERENCE, runtime

ROOT = Path(__file__).resolve().parent.parent
RESULTS, RAW, PAGE = ROOT / "build/onnx_parity.jsonl", ROOT / "benchmarks/results/onnx_parity.json", ROOT / "docs/benchmarks.md"
BEGIN, END = "<!-- begin: python -m benchmarks.onnx_parity -->", "<!-- end -->"
WEIGHTS: Mapping[str, tuple[float, ...]] = {"zero": (0.0,), "tiny": (1e-7,), "negative": (-1.0,), "all three": (0.0, 1e-7, -1.0)}
SHARE = 0.1
BATCHES = (1, 2, 7)
PEERS = ("torch", *TOOLS)
Row = dict[str, Any]


def odd_norm(kind: str) -> Callable[[int, int], nn.Module]:
    """A BatchlessNorm, SHARE of whose weights are multiplied by each of the numbers."""
    plain = random_norm(signs=False)

    def make(channels: int, axis: int) -> nn.Module:
        norm = plain(channels, axis)
        assert isinstance(norm, BatchlessNorm)
        assert norm.weight is not None
        with torch.no_grad():
            drawn = torch.rand(channels)
            for number, factor in enumerate(WEIGHTS[kind]):
                norm.weight[(drawn >= number * SHARE) & (drawn < (number + 1) * SHARE)] *= factor
        return norm

    return make


def asked(shape: tuple[int, ...]) -> list[Probe]:
    """Batches of 1, 2 and 7, and the batch of 1 scaled and flat."""
    batches = {batch: inputs((batch, *shape[1:])) for batch in BATCHES}
    first = Probe("example", (batches[2],), {})
    others = [Probe(f"batch of {batch}", (batches[batch],), {}, like_example=False) for batch in (1, 7)]
    return [first, *others, *(probe for probe in probes((batches[1],), {}) if " x " in probe.name or probe.flat)]


def comparisons(name: str, kind: str) -> Row:
    make, shape = NETS[name]
    torch.manual_seed(0)
    model = with_norms(make(), odd_norm(kind))
    judgement = judge(model, (), {}, asked=asked(shape))
    kept = [p for p in judgement.probes if all(truth.noise <= CAP[torch.float32] for truth in judgement.truths_at(p).values())]
    lost = [p.name for p in judgement.probes if p not in kept]
    judgement = judgement.at([p.name for p in kept])
    with tempfile.TemporaryDirectory() as directory, warnings.catch_warnings():
        warnings.simplefilter("ignore")
        given = Inputs((inputs(shape),))
        result, found = verified_export(
            model, given, Path(directory) / "model.onnx", opset=None, dynamic=True, judgement=judgement, thorough=True
        )
    levels = {name: parity for name, parity in found.parities.items() if name != runtime(REFERENCE)}
    evaluator = found.parities.get(runtime(REFERENCE))
    return {
        "net": name,
        "weights": kind,
        "norms": len(result.sites),
        "left": len(result.residue),
        "reasons": sorted({site.reason for site in result.sites if site.left}),
        "rolled back": sum(site.reason.startswith("rolled back") for site in result.sites),
        "passed": found.passed,
        "not run": dict(found.not_run),
        "noise": max(parity.noise for parity in levels.values()),
        "onnxruntime": max(parity.max_rel for parity in levels.values()),
        "share": max(d.max_rel / d.tolerance for parity in levels.values() for d in parity.all_outputs),
        "evaluator": None if evaluator is None else evaluator.max_rel,
        "evaluated at": 0 if evaluator is None else len(evaluator.probes),
        "probes": [probe.name for probe in judgement.probes],
        "left out": lost,
        "half": in_half(model, judgement),
    }


def in_half(model: nn.Module, judgement: Judgement) -> float | None:
    """The error of the net in float16 at the batch of 1; None if it overflows there."""
    half = copy.deepcopy(model).half()
    probe = next(probe for probe in judgement.probes if probe.name == "batch of 1")
    (x,) = probe.args
    with torch.no_grad():
        got = half(x.half() if x.is_floating_point() else x)
    got = [got] if isinstance(got, torch.Tensor) else list(got)
    pairs = zip(got, judgement.truths_at(probe).values(), strict=True)
    error = max(float((a.double() - b.value).abs().max() / b.value.abs().max()) for a, b in pairs)
    return error if error == error and error < 1 else None


def _operators(nodes: Mapping[str, int]) -> Counter[str]:
    return alike(Counter({name: number for name, number in nodes.items() if name not in ("Constant", "Identity")}))


def _counted(path: Path) -> dict[str, int]:
    import onnx_ir as ir

    return operators(ir.load(str(path)).graph)


def peers(name: str, signs: bool) -> Row | None:
    """What `normswap fold` makes of each peer's file; None for a net with LayerNorms."""
    import onnx

    make, shape = NETS[name]
    torch.manual_seed(0)
    original = make()
    if any(isinstance(module, nn.LayerNorm) for module in original.modules()):
        return None
    model = with_norms(copy.deepcopy(original), random_norm(signs))
    same_norms(original, model)
    x = inputs(shape)
    row: Row = {"net": name, "signs": SIGNS[signs], "peers": {}}
    with tempfile.TemporaryDirectory() as directory, warnings.catch_warnings():
        warnings.simplefilter("ignore")
        ours = _operators(export(model, (x,), {}, Path(directory) / "ours.onnx").nodes)
        exported_by_torch(original, x, Path(directory) / "torch.onnx")
        without = with_norms(original, lambda channels, axis: Nothing())
        bare = _operators(export(without, (x,), {}, Path(directory) / "bare.onnx").nodes)
        exported_by_torch(without, x, Path(directory) / "torch, bare.onnx")
        del model, original, without
        for peer in PEERS:
            path, bare_path = Path(directory) / f"{peer}.onnx", Path(directory) / f"{peer}, bare.onnx"
            if peer != "torch":
                onnx.save(applied(TOOLS[peer], Path(directory) / "torch.onnx"), str(path))
                onnx.save(applied(TOOLS[peer], Path(directory) / "torch, bare.onnx"), str(bare_path))
            before, its_bare = (_counted(file) for file in (path, bare_path))
            result = fold_onnx(str(path), Path(directory) / "folded.onnx")
            theirs = _operators(result.nodes)
            row["peers"][peer] = {
                "before": sum(number for op_type, number in before.items() if op_type != "Constant"),
                "nodes": theirs.total(),
                "ours": ours.total(),
                "more": dict(theirs - ours - (_operators(its_bare) - bare)),
                "less": dict(ours - theirs - (bare - _operators(its_bare))),
                "changed": result.changed,
                "passed": result.comparisons.passed,
                "error": None if result.parity is None else result.parity.max_rel,
                "noise": None if result.parity is None else result.parity.noise,
            }
    return row


def peers_case(word: str) -> str:
    return f"peers, {word}"


def case_of(row: Row) -> tuple[str, str]:
    return row["net"], row["weights"] if "weights" in row else peers_case(row["signs"])


def measure(name: str, case: str) -> Row | None:
    signs = {peers_case(word): signs for signs, word in SIGNS.items()}
    return peers(name, signs[case]) if case in signs else comparisons(name, case)


def cases(names: list[str]) -> list[tuple[str, str]]:
    """(net, weights), the small nets first and with each kind by itself; then the peers."""
    small = [name for name in names if name in list(NETS)[:8]]
    one_by_one = [(name, kind) for name in small for kind in WEIGHTS if kind != "all three"]
    return [*one_by_one, *((name, "all three") for name in names), *((name, peers_case(word)) for name in names for word in SIGNS.values())]


# --- the tables ----------------------------------------------------------------------------------------------------------------------


def tables(rows: list[Row]) -> str:
    lines = [
        "| net | weights | norms | left | noise floor | onnxruntime | evaluator | float16 in torch |",
        "|---|---|---|---|---|---|---|---|",
    ]
    for row in (row for row in rows if "weights" in row):
        evaluator = "not run" if row["evaluator"] is None else f"{row['evaluator']:.1e}"
        half = "overflows" if row["half"] is None else f"{row['half']:.1e}"
        back = f" ({row['rolled back']} rolled back)" if row["rolled back"] else ""
        numbers = f"{row['noise']:.1e} | {row['onnxruntime']:.1e} | {evaluator} | {half}"
        lines.append(f"| {row['net']} | {row['weights']} | {row['norms']} | {row['left']}{back} | {numbers} |")
    lines += ["", "| net | weights | " + " | ".join(PEERS) + " |", "|---" * (len(PEERS) + 2) + "|"]
    for row in (row for row in rows if "peers" in row):
        lines.append(f"| {row['net']} | {row['signs']} | " + " | ".join(_cell(row["peers"][peer]) for peer in PEERS) + " |")
    return "\n".join(lines)


def _cell(found: Row) -> str:
    words = [f"{sign}{count} {name}" for sign, key in (("+", "more"), ("-", "less")) for name, count in found[key].items()]
    error = "unchanged" if found["error"] is None else f"{found['error']:.1e}"
    return f"{found['before']} to {found['nodes']}: {'same' if not words else ', '.join(words)}; {error}"


def verdict(row: Row) -> list[str]:
    """What is wrong with a row: nothing, if all is well."""
    if "peers" in row:
        return [
            f"{row['net']}, {row['signs']}, {peer}: not the same function" for peer, found in row["peers"].items() if not found["passed"]
        ]
    found = [] if row["passed"] and row["share"] <= 1 else [f"{row['net']}, {row['weights']}: a comparison failed"]
    if row["half"] is not None and row["half"] > CAP[torch.float16]:
        found.append(f"{row['net']}, {row['weights']}: {row['half']:.1e} off in float16")
    return found


def publish(rows: list[Row]) -> None:
    RAW.write_text(json.dumps(rows, indent=1) + "\n", encoding="utf-8")
    put(PAGE, BEGIN, tables(rows), END)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("nets", nargs="*", choices=[*NETS, []], metavar="NET")
    names = parser.parse_args().nets
    torch.set_num_threads(1)
    without_its_operators()
    RESULTS.parent.mkdir(exist_ok=True)
    lines = RESULTS.read_text(encoding="utf-8").splitlines() if RESULTS.exists() else []
    done = {(entry["net"], entry["case"]): entry["row"] for entry in map(json.loads, lines)}
    with RESULTS.open("a", encoding="utf-8") as file:
        for name, case in cases(list(names or NETS)):
            if (name, case) not in done:
                done[name, case] = measure(name, case)
                file.write(json.dumps({"net": name, "case": case, "row": done[name, case]}) + "\n")
                file.flush()
                row = done[name, case]
                print(name, case, *(verdict(row) if row else ()), sep=", ", file=sys.stderr, flush=True)
    rows = [done[key] for key in cases(list(NETS)) if done.get(key) is not None]
    publish(rows)
    print(tables(rows), *(line for row in rows for line in verdict(row)), sep="\n")


if __name__ == "__main__":
    main()
