"""What files can do that somebody made to do harm, and what a kill leaves behind.

    python -m benchmarks.hostile                all, then benchmarks/results/hostile.json and docs/limits.md
    python -m benchmarks.hostile --only WORD    the cases with this word in kind or name, printed

Each file of `fixtures/hostile.py` gets the commands that a user might run on it, in a process of its own that is watched
(`fixtures/sandbox.py`). Then each command that writes is killed at every step that it makes on the disk, and at random times.
"""

from __future__ import annotations

import argparse
import hashlib
import importlib
import json
import random
import shutil
import sys
import tempfile
import time
import warnings
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import onnx
import torch
from torch import nn

import normswap
from benchmarks.pages import put
from fixtures import hostile, sandbox
from fixtures.nets import randomise
from normswap.api.fold import fold_onnx
from normswap.cli.convert import ConvertOptions, convert_to_directory
from normswap.cli.options import Loading
from normswap.cli.revert import revert_directory
from normswap.files import atomic
from normswap.versions import versions

ROOT = Path(__file__).resolve().parent.parent
RAW, PAGE = ROOT / "benchmarks/results/hostile.json", ROOT / "docs/limits.md"
BEGIN, END = "<!-- begin: python -m benchmarks.hostile -->", "<!-- end: python -m benchmarks.hostile -->"


def prepared(workspace: Path) -> Path:
    """Import what innocent files need, before anything is watched. Where the canary says that it ran."""
    sys.path.insert(0, str(ROOT / "tests/support"))
    for module in ("torchvision_shim", "timm", "PIL.ImageChops", "logging.handlers"):
        importlib.import_module(module)
    canary = hostile.write_canary(workspace / "canary")
    sys.path.insert(0, str(canary.parent))
    return canary


def files(workspace: Path, canary: Path, word: str = "") -> list[dict[str, Any]]:
    """One row for each file."""
    rows = []
    everything = hostile.cases()
    for innocent in (True, False):  # first those that import what reading a model takes
        for number, case in enumerate(everything):
            if case.innocent != innocent or (not innocent and word not in f"{case.kind} {case.name}"):
                continue
            directory = workspace / f"{'good' if innocent else 'bad'}{number}"
            commands = case.write(directory)
            if innocent:
                for command in commands:
                    sandbox.captured(command, directory)
            found = sandbox.watched(commands, directory, canary)
            bad = found.bad | ({"refused": found.texts} if innocent and any(found.codes) else {})
            rows.append(
                {
                    "kind": case.kind,
                    "name": case.name,
                    "innocent": innocent,
                    "codes": found.codes,
                    "memory": found.memory,
                    "bad": bad,
                    "texts": found.texts,
                }
            )
            if bad or word:
                print(json.dumps(rows[-1], indent=1), file=sys.stderr, flush=True)
    return rows


# -- kills --------------------------------------------------------------------------------------------------------------------------------

OLD, NEW = 3, 4  # seeds
AT_RANDOM = 12  # kills at random times, for each command
SEED = 7


@dataclass(frozen=True)
class Writer:
    """A command that writes `name`. make: writes it, from other weights with another seed. state: what of it must be whole."""

    command: str
    name: str
    make: Callable[[Path, int], object]
    state: Callable[[Path], object]


def convert(path: Path, seed: int) -> None:
    convert_to_directory(str(path.parent.parent / f"net{seed}.pt"), path, ConvertOptions(inputs=[hostile.INPUT], onnx=False))


def convert_in_steps(path: Path, seed: int) -> None:
    """As where the system cannot exchange two directories in one step."""
    atomic._exchange = atomic._exchange_in_steps
    convert(path, seed)


def save(path: Path, seed: int) -> None:
    normswap.save(normswap.convert(net(seed), torch.randn(2, 3, 7, 6), coupling="none"), path)


def revert(path: Path, seed: int) -> None:
    revert_directory(str(path.parent.parent / f"converted{seed}"), path, Loading())


def fold(path: Path, seed: int) -> None:
    fold_onnx(str(path.parent.parent / f"net{seed}.onnx"), path)


def export(path: Path, seed: int) -> None:
    normswap.export_onnx(net(seed), torch.randn(2, 3, 7, 6), path, external_data=True)


def net(seed: int) -> nn.Module:
    torch.manual_seed(seed)
    return randomise(nn.Sequential(nn.Conv2d(3, 40, 3), nn.BatchNorm2d(40), nn.ReLU(), nn.Conv2d(40, 64, 3)), seed).eval()


def of_directory(path: Path) -> object:
    """What two runs have in common, and whether all files are whole: the recipe has their sums.

    The report holds times, and a pickled model the numbers of its hooks, which go up in a process.
    """
    atomic.recover(path)
    if not path.exists():
        return None
    recipe = json.loads((path / "recipe.json").read_text())
    sums = recipe.pop("files")
    whole = {file.name: hashlib.sha256(file.read_bytes()).hexdigest() for file in path.iterdir() if file.name != "recipe.json"}
    return "partial" if whole != sums else (recipe, sorted(sums), (path / "model.safetensors").read_bytes())


def of_file(path: Path) -> object:
    return path.read_bytes() if path.exists() else None


def of_onnx(path: Path) -> object:
    """Its tensors, wherever they are."""
    if not path.exists():
        return None
    proto = onnx.load(str(path))
    return [(tensor.name, onnx.numpy_helper.to_array(tensor).tobytes()) for tensor in proto.graph.initializer]


WRITERS = (
    Writer("convert", "made", convert, of_directory),
    Writer("convert, in steps", "made", convert_in_steps, of_directory),
    Writer("save", "made", save, of_directory),
    Writer("revert", "made.pt", revert, of_file),
    Writer("fold", "made.onnx", fold, of_file),
    Writer("export, external data", "made.onnx", export, of_onnx),
)


@dataclass
class Trial:
    """One command over one result, killed as often as there are steps, and some times more."""

    writer: Writer
    finished: Path | None  # a directory with what it replaces
    place: Path
    old: object
    new: object

    def __post_init__(self) -> None:
        self.row: dict[str, Any] = {"command": self.writer.command, "over": "nothing" if self.finished is None else "an old result"}
        self.row |= {"kills": 0, "old": 0, "new": 0, "partial": 0, "lost": 0, "left": 0}

    def kill(self, kill: Callable[[Callable[[], object]], bool]) -> bool:
        """Whether it was killed before it ended; if so, what is there is counted."""
        shutil.rmtree(self.place, ignore_errors=True)
        if self.finished is None:
            self.place.mkdir()
        else:
            shutil.copytree(self.finished, self.place)
        path = self.place / self.writer.name
        if not kill(lambda: self.writer.make(path, NEW)):
            return False
        self.row["kills"] += 1
        self.row[self._found(path)] += 1
        with atomic._scratch(path):  # what the next run does first
            pass
        self.row["left"] += sum(entry.name.startswith(".") for entry in self.place.iterdir())
        return True

    def _found(self, path: Path) -> str:
        try:
            state = self.writer.state(path)
        except Exception:  # whatever a half-written file makes its reader raise
            return "partial"
        if state == self.new:
            return "new"
        if state == self.old:
            return "old"
        return "lost" if state is None else "partial"

    def steps(self) -> None:
        step = 1
        while self.kill(lambda action: sandbox.killed_at(step, action, self.place)):  # noqa: B023  called at once
            step += 1

    def at_random(self, dice: random.Random, seconds: float) -> None:
        for _ in range(AT_RANDOM):
            self.kill(lambda action: sandbox.killed_after(dice.uniform(0, seconds), action))


def kills(workspace: Path) -> list[dict[str, Any]]:
    """One row for each command, over an old result and where there is none."""
    dice = random.Random(SEED)
    for seed in (OLD, NEW):
        torch.save(net(seed), workspace / f"net{seed}.pt")
        options = ConvertOptions(inputs=[hostile.INPUT], onnx=False)
        convert_to_directory(str(workspace / f"net{seed}.pt"), workspace / f"converted{seed}", options)
        exported = workspace / f"net{seed}.onnx"
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            torch.onnx.export(net(seed), (torch.randn(2, 3, 7, 6),), exported, dynamo=True, verbose=False, external_data=False)
    rows = []
    for writer in WRITERS:
        finished = {seed: workspace / f"{writer.command}{seed}" for seed in (OLD, NEW)}
        for seed, directory in finished.items():
            directory.mkdir()
            started = time.perf_counter()
            writer.make(directory / writer.name, seed)
            seconds = time.perf_counter() - started
        old, new = (writer.state(directory / writer.name) for directory in finished.values())
        assert old != new
        for trial in (
            Trial(writer, finished[OLD], workspace / "place", old, new),
            Trial(writer, None, workspace / "place", None, new),
        ):
            trial.steps()
            trial.at_random(dice, 1.1 * seconds)
            rows.append(trial.row)
            print(json.dumps(trial.row), file=sys.stderr, flush=True)
    return rows


# -- what is committed --------------------------------------------------------------------------------------------------------------------

COUNTS = ("ran", "imported", "wrote", "leaked", "tracebacks", "unexpected", "obeyed", "died")


def summary(rows: list[dict[str, Any]], killed: list[dict[str, Any]]) -> dict[str, Any]:
    bad = [row for row in rows if not row["innocent"]]
    return {
        "files": len(bad),
        "kinds": len({row["kind"] for row in bad}),
        "commands": sum(len(row["codes"]) for row in bad),
        **{name: sum(name in row["bad"] for row in bad) for name in COUNTS},
        "largest memory, MiB": max(row["memory"] for row in bad) >> 20,
        "innocent files": len(rows) - len(bad),
        "innocent files refused": sum(bool(row["bad"]) for row in rows if row["innocent"]),
        **{name: sum(row[name] for row in killed) for name in ("kills", "old", "new", "partial", "lost", "left")},
    }


def table(rows: list[dict[str, Any]], killed: list[dict[str, Any]]) -> str:
    found = summary(rows, killed)
    areas = Counter(row["kind"].partition(":")[0] for row in rows if not row["innocent"])
    kinds = {area: len({row["kind"] for row in rows if row["kind"].partition(":")[0] == area and not row["innocent"]}) for area in areas}
    lines = ["| what | files | kinds |", "|---|---|---|", *(f"| {area} | {count} | {kinds[area]} |" for area, count in areas.items())]
    lines += [f"| **all** | {found['files']} | {found['kinds']} |", ""]
    lines += ["| of these | |", "|---|---|"]
    words = {
        "ran": "ran something, or reached for the network",
        "imported": "had something imported that is no part of torch, torchvision, timm, transformers",
        "wrote": "wrote outside the output",
        "leaked": "put another file's bytes into the output",
        "tracebacks": "ended in a traceback",
        "unexpected": "ended in an error that normswap did not expect",
        "obeyed": "printed what a terminal obeys",
        "died": "crashed, or ran for more than 2 minutes",
        "largest memory, MiB": "took more memory than innocent ones: at most, in MiB",
    }
    lines += [f"| {text} | {found[name]} |" for name, text in words.items()]
    lines += [
        f"| innocent files that look like them | {found['innocent files']} |",
        f"| ... refused | {found['innocent files refused']} |",
        "",
    ]
    lines += [
        "| killed | over | kills | the old one is there | the new one | a part | nothing that was there |",
        "|---|---|---|---|---|---|---|",
    ]
    lines += [
        "| " + " | ".join(str(row[key]) for key in ("command", "over", "kills", "old", "new", "partial", "lost")) + " |" for row in killed
    ]
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", default="", metavar="WORD")
    asked = parser.parse_args()
    with tempfile.TemporaryDirectory() as directory:
        workspace = Path(directory)
        canary = prepared(workspace)
        rows = files(workspace, canary, asked.only)
        if asked.only:
            return
        killed = kills(workspace)
    print(table(rows, killed))
    told = [{key: row[key] for key in ("kind", "name", "innocent", "codes", "bad")} for row in rows]
    content = {"summary": summary(rows, killed), "files": told, "kills": killed, "versions": versions()}
    RAW.write_text(json.dumps(content, indent=1) + "\n", encoding="utf-8")
    put(PAGE, BEGIN, table(rows, killed), END)


if __name__ == "__main__":
    main()
