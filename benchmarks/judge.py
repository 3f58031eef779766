"""The judge, judged: does it catch what is wrong, and does it let pass what is right?

    python -m benchmarks.judge                            measures what is missing, then writes results/judge.json and docs/judge.md
    python -m benchmarks.judge --only faults timm         these slices
    python -m benchmarks.judge --only torchvision --shard 0/2     every second of them: two machines can share the work
    python -m benchmarks.judge --only timm --match 'mixnet*' --redo
    python -m benchmarks.judge report                     only writes benchmarks/results/judge.json and docs/judge.md from what was measured

faults      small nets, each with every kind of planted fault (fixtures/faults.py), in the converted model and in the exported file. What a
            fault does is measured by code that the judge has no part in (judge_faults.py); one of more than 20 x the noise must be caught
torchvision, timm, transformers, random, real
            conversions that are right: every refusal is listed with its reason

Each model runs in a process of its own. A result is appended to results/judge.jsonl at once; interrupted with Ctrl-C, the next
run goes on where this one stopped. To put together what two machines have measured, append one's file to the other's. A conversion that
takes more than --seconds of processor time counts as refused.
"""

from __future__ import annotations

import argparse
import fnmatch
import json
import os
import sys
import tempfile
import time
import warnings
from collections import Counter
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from torch import nn

import normswap
from benchmarks import judge_nets
from benchmarks.coverage import commit, environment, say
from benchmarks.judge_faults import planted, reason
from benchmarks.judge_nets import SLICES, real_files
from benchmarks.libraries import Case, Record, isolated
from benchmarks.pages import put
from fixtures.faults import KINDS
from normswap.api.fold import fold_onnx
from normswap.errors import ExportError

ROOT = Path(__file__).resolve().parent.parent
RESULTS, RAW, PAGE = ROOT / "benchmarks/results/judge.jsonl", ROOT / "benchmarks/results/judge.json", ROOT / "docs/judge.md"
BEGIN, END = "<!-- begin: python -m benchmarks.judge report -->", "<!-- end -->"
WITH_FILES = ("random", "real")  # the slices in which a file is made of each model as well, unless --onnx asks for all
MUST = 20  # times the noise: from here on a fault must be caught
SECONDS = 900

# -- right conversions ---------------------------------------------------------------------------------------------------------------------


def converted(case: Case, *, files: bool) -> Record:
    """Convert a model, and export it. refused: at which step, and why; cannot: why no file can be made of it, which judges nothing."""
    started = time.process_time()
    refused: dict[str, str] = {}
    cannot: dict[str, str] = {}
    model, arguments = case.make()
    made = time.process_time()
    step = "convert"
    with tempfile.TemporaryDirectory() as directory:
        try:
            conversion = normswap.convert(model, arguments)
            if files:
                step = "export"
                normswap.export_onnx(conversion, path=Path(directory) / "model.onnx")
        except Exception as error:  # whatever it is, the conversion is right and did not come through
            (cannot if isinstance(error, ExportError) else refused)[step] = reason(error)
    record = {"family": case.family, "name": case.name, "refused": refused, "cannot": cannot, "files": files}
    return record | {"to build": round(made - started, 1), "seconds": round(time.process_time() - started, 1)}


def folded(case: Case) -> Record:
    """Fold the norms of a file that somebody else has written."""
    started = time.process_time()
    refused: dict[str, str] = {}
    with tempfile.TemporaryDirectory() as directory:
        try:
            result = fold_onnx(str(real_files()[case.name]), Path(directory) / "folded.onnx")
            if left := result.nodes.get("BatchNormalization", 0) if not result.changed else 0:
                refused["fold"] = f"none of {left} BatchNormalizations was folded: {'; '.join(result.notes)}"
        except Exception as error:
            refused["fold"] = reason(error)
    return {"family": case.family, "name": case.name, "refused": refused, "seconds": round(time.process_time() - started, 1)}


def cases_of(slices: Sequence[str]) -> list[Case]:
    found = judge_nets.planted() if "faults" in slices else []
    found += judge_nets.right(slices)
    if "real" in slices:
        found += [Case("real", name, _no_module) for name in real_files()]
    return found


def _no_module() -> tuple[nn.Module, Any]:
    raise RuntimeError("a file, not a module")


def measure(case: Case, *, files: bool = False) -> Record:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # torch.export's own
        if case.family == "faults":
            return planted(case)
        if case.build is _no_module:
            return folded(case)
        return converted(case, files=files or case.family in WITH_FILES)


# -- all of them ---------------------------------------------------------------------------------------------------------------------------


def recorded() -> dict[tuple[str, str], Record]:
    """The last result of each; a line that was cut short counts as none."""
    found: dict[tuple[str, str], Record] = {}
    for line in RESULTS.read_text(encoding="utf-8").splitlines() if RESULTS.exists() else ():
        try:
            record = json.loads(line)
        except json.JSONDecodeError:
            continue
        found[record["family"], record["name"]] = record
    return found


def sweep(todo: Sequence[Case], *, files: bool, seconds: int) -> None:
    RESULTS.parent.mkdir(parents=True, exist_ok=True)
    started = time.monotonic()
    with RESULTS.open("a", encoding="utf-8") as results:
        for done, case in enumerate(todo, 1):
            record = isolated(case, 1, seconds, lambda case: measure(case, files=files))
            if "findings" in record:  # it did not come to an end
                record = {"family": case.family, "name": case.name, "refused": {"all": record["findings"][0]}, "seconds": seconds}
            results.write(json.dumps(record | {"commit": commit()}).replace(f"{ROOT}/", "") + "\n")  # no path of this machine
            results.flush()
            left = (time.monotonic() - started) / done * (len(todo) - done)
            say(f"[{done}/{len(todo)}, {left / 60:.0f} min left] {case.family}, {case.name}: {state(record)} ({record['seconds']} s)")


def state(record: Record) -> str:
    told = [f"{step} refused: {text[:160]}" for step, text in record["refused"].items()]
    told += [f"no file: {text[:160]}" for text in record.get("cannot", {}).values()]
    if "rows" in record:
        told.append(f"{sum(row['caught'] for row in record['rows'])} of {len(record['rows'])} faults caught")
        told += [f"MISSED {row['kind']} in {row['path']}, {row['times']} x the noise at {row['probe']}" for row in missed(record["rows"])]
    return "; ".join(told) or "passed"


def must(row: Record) -> bool:
    return row["times"] is None or row["times"] > MUST  # None: it is no number, or of another shape or dtype


def missed(rows: Sequence[Record]) -> list[Record]:
    return [row for row in rows if must(row) and not row["caught"]]


# -- what came of it -----------------------------------------------------------------------------------------------------------------------


def summary(records: Sequence[Record], sizes: Mapping[str, int]) -> Record:
    """results/judge.json: counts by kind, everything that was missed or refused, and how long it took. sizes: of the slices, when whole."""
    rows = [row | {"net": record["name"]} for record in records for row in record.get("rows", ())]
    by_path = {path: [row for row in rows if row["path"] == path] for path in ("torch", "onnx")}
    slices = {name: [r for r in records if r["family"] == name] for name in SLICES}
    return {
        "environment": environment(),
        "commits": sorted({r.get("commit", "?") for r in records}),
        "kinds": list(KINDS),
        "faults": {"nets": len(slices["faults"]), **{path: _kinds(found) for path, found in by_path.items()}},
        "missed": missed(rows),
        "smallest caught": {path: _smallest(found) for path, found in by_path.items()},
        "slices": {
            name: {
                "models": len(found),
                "of": sizes[name],
                "refused": sum(bool(r["refused"]) for r in found),
                "no file": sum(bool(r.get("cannot")) for r in found),
                "seconds": round(sum(r["seconds"] for r in found)),
                "slowest": [f"{r['name']} {r['seconds']:.0f} s" for r in sorted(found, key=lambda r: -float(r["seconds"]))[:3]],
            }
            for name, found in slices.items()
            if found
        },
        "refused": [{"slice": r["family"], "name": r["name"], "step": s, "why": text} for r in records for s, text in r["refused"].items()],
    }


def _kinds(rows: Sequence[Record]) -> dict[str, Record]:
    return {kind: _counts([row for row in rows if row["kind"] == kind]) for kind in KINDS if any(row["kind"] == kind for row in rows)}


def _counts(rows: Sequence[Record]) -> Record:
    above = [row for row in rows if must(row)]
    return {
        "planted": len(rows),
        "caught": sum(row["caught"] for row in rows),
        "above": len(above),
        "missed": len(missed(rows)),
        "smallest caught": (_smallest(rows) or {}).get("moved"),
    }


def _smallest(rows: Sequence[Record]) -> Record | None:
    """Of the faults that were caught and are more than noise at an output, the one that moved an output least."""
    told = (row for row in rows if row["caught"] and row["moved"] and row["times"] > 1)
    return min(told, key=lambda row: float(row["moved"]), default=None)


def table(found: Record) -> str:
    where = ", ".join(f"{key} {value}" if key != "machine" else value for key, value in found["environment"].items())
    both = [counts for path in ("torch", "onnx") for counts in found["faults"][path].values()]
    total = {key: sum(counts[key] for counts in both) for key in ("planted", "caught", "above", "missed")}
    keys = ("models", "of", "refused", "no file", "seconds")
    models, refused = (sum(s[key] for name, s in found["slices"].items() if name != "faults") for key in ("models", "refused"))
    kinds, nets = len(found["kinds"]), found["faults"]["nets"]
    lines = [
        f"{total['planted']} faults of {kinds} kinds were planted in {nets} nets: {total['caught']} were caught.",
        f"{total['above']} move an output by more than {MUST} x the noise; {total['missed']} of these were missed.",
        f"{refused} of {models} right conversions were refused. Measured at {', '.join(found['commits'])} on {where}.",
        "",
        f"| planted fault |{' | '.join(f' {path}: planted | above | caught | missed | smallest caught' for path in ('torch', 'ONNX'))} |",
        "|---|" + "--:|" * 10,
        *(f"| {kind} | {' | '.join(_cells(found['faults'][path].get(kind)) for path in ('torch', 'onnx'))} |" for kind in found["kinds"]),
        "",
        "| slice | models measured | of | refused | no ONNX file can be made | processor time, s | slowest |",
        "|---|--:|--:|--:|--:|--:|---|",
        *(f"| {name} | {' | '.join(str(s[key]) for key in keys)} | {', '.join(s['slowest'])} |" for name, s in found["slices"].items()),
        "",
    ]
    if found["missed"]:
        lines += [
            "Missed:",
            "",
            *(f"* {r['kind']} in {r['net']}, {r['path']}: {r['times']} x at {r['probe']}" for r in found["missed"]),
            "",
        ]
    if found["refused"]:
        lines += ["Refused:", "", *(f"* {r['slice']}, {r['name']}, {r['step']}: {_text(r['why'])}" for r in found["refused"]), ""]
    return "\n".join(lines)


def _cells(counts: Mapping[str, Any] | None) -> str:
    if counts is None:
        return " | ".join("-" * 5)
    smallest = counts["smallest caught"]
    numbers = [str(counts[key]) for key in ("planted", "above", "caught", "missed")]
    return " | ".join([*numbers, "-" if smallest is None else f"{smallest:.1e}"])


def _miss(row: Record) -> str:
    left_out = "" if row["judged"] else ", which the judge leaves out"
    return f"* {row['kind']} in {row['net']}, {row['path']}: {row['times']} x the noise at {row['probe']}{left_out}"


def _text(words: str) -> str:
    return words.replace("|", "\\|").replace("<", "\\<")[:300]


def with_slices_of(found: Record, before: Record) -> Record:
    """`found`, with the slices of an earlier summary of which no row is at hand."""
    kept = [name for name in before["slices"] if name not in found["slices"]]
    slices = {**found["slices"], **{name: before["slices"][name] for name in kept}}
    planted = ("faults", "missed", "smallest caught") if "faults" in kept else ()
    return {
        **found,
        "commits": sorted({*found["commits"], *(before["commits"] if kept else ())}),
        **{key: before[key] for key in planted},
        "slices": {name: slices[name] for name in SLICES if name in slices},
        "refused": [*found["refused"], *(row for row in before["refused"] if row["slice"] in kept)],
    }


def report() -> Record:
    cases = {(case.family, case.name): case for case in cases_of(SLICES)}
    known = [record for key, record in recorded().items() if key in cases]  # what is no case any more is left out
    found = summary(known, Counter(family for family, _ in cases))
    if RAW.exists():
        found = with_slices_of(found, json.loads(RAW.read_text(encoding="utf-8")))
    RAW.write_text(json.dumps(found, indent=1) + "\n", encoding="utf-8")
    put(PAGE, BEGIN, table(found), END)
    return found


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.judge", description=(__doc__ or "").splitlines()[0])
    parser.add_argument("what", nargs="?", choices=("measure", "report"), default="measure")
    parser.add_argument("--only", nargs="+", choices=SLICES, default=SLICES, help="the slices to measure")
    parser.add_argument("--shard", default="0/1", metavar="I/N", help="measure each N-th model, from the I-th on")
    parser.add_argument("--match", default="*", metavar="GLOB", help="the models to measure, by name")
    parser.add_argument("--redo", action="store_true", help="measure again what was measured at another commit")
    parser.add_argument("--onnx", action="store_true", help="make a file of every model, in all slices")
    parser.add_argument("--seconds", type=int, default=SECONDS, help="of processor time, for one model")
    asked = parser.parse_args(arguments)
    if asked.what == "measure":
        index, count = map(int, asked.shard.split("/"))
        now = commit()
        fresh = {key: r for key, r in recorded().items() if not asked.redo or (r.get("commit") == now and not now.endswith("+"))}
        done = {key for key, record in fresh.items() if record.get("files") or not (asked.onnx and "files" in record)}
        named = [case for case in cases_of(asked.only)[index::count] if fnmatch.fnmatchcase(case.name, asked.match)]
        todo = [case for case in named if (case.family, case.name) not in done]
        say(f"{len(todo)} of {len(named)} models to measure")
        os.environ["OMP_NUM_THREADS"] = "1"
        try:
            sweep(todo, files=asked.onnx, seconds=asked.seconds)
        except KeyboardInterrupt:
            return 130
    found = report()
    return 1 if found["missed"] or found["refused"] else 0


if __name__ == "__main__":
    sys.exit(main())
