"""What files can do that somebody made to do harm, and what a kill leaves behind.

    python -m benchmarks.hostile                all, then docs/hostile.json and docs/limits.md
    python -m benchmarks.hostile --only WORD    the cases with this word in kind or name, printed

Each file of `fixtures/hostile.py` gets the commands that a user might run on it, in a process of its own that is watched
(`fixtures/sandbox.py`). Then each command that writes is killed at every step that it makes on the disk, and at random times.
"""

from __future__ import annotations

import argparse
import contextlib
import importlib
import json
import random
import shutil
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import onnx
import torch
from torch import nn

import normswap
from fixtures import hostile, sandbox
from fixtures.nets import randomise
from normswap import outputs
from normswap.commands.convert import convert_files
from normswap.commands.fold import fold_file
from normswap.commands.revert import revert_files

ROOT = Path(__file__).resolve().parent.parent
RAW = ROOT / "docs/hostile.json"


def prepared(workspace: Path) -> Path:
    """Import what innocent files need, before anything is watched. Where the canary says that it ran."""
    sys.path.insert(0, str(ROOT / "tests"))
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


# -- kills ---------------------------------------------------------------------------------------------------------------------------------

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
    convert_files(str(path.parent.parent / f"net{seed}.pt"), path, inputs=[hostile.INPUT], onnx=False)


def convert_in_steps(path: Path, seed: int) -> None:
    """As where the system cannot exchange two directories in one step."""
    outputs._exchange = outputs._exchange_in_steps
    convert(path, seed)


def save(path: Path, seed: int) -> None:
    normswap.save(normswap.convert(net(seed), torch.randn(2, 3, 7, 6), coupling="none"), path)


def revert(path: Path, seed: int) -> None:
    revert_files(str(path.parent.parent / f"converted{seed}"), path)


def fold(path: Path, seed: int) -> None:
    fold_file(str(path.parent.parent / f"net{seed}.onnx"), path)


def export(path: Path, seed: int) -> None:
    normswap.export_onnx(net(seed), torch.randn(2, 3, 7, 6), path, external_data=True)


def net(seed: int) -> nn.Module:
    return randomise(nn.Sequential(nn.Conv2d(3, 40, 3), nn.BatchNorm2d(40), nn.ReLU(), nn.Conv2d(40, 64, 3)), seed).eval()


def of_directory(path: Path) -> object:
    """What does not hold times, and whether the report is whole."""
    outputs.recover(path)
    if not path.exists():
        return None
    report = path / "report.json"
    if report.exists() and sorted(json.loads(report.read_text())["files"]) != sorted(file.name for file in path.iterdir()):
        return "partial"
    return {file.name: file.read_bytes() for file in path.iterdir() if not file.name.startswith("report.")}


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


def kills(workspace: Path) -> list[dict[str, Any]]:
    """One row for each command, over an old result and where there is none."""
    dice = random.Random(SEED)
    for seed in (3, 4):
        torch.save(net(seed), workspace / f"net{seed}.pt")
        convert_files(str(workspace / f"net{seed}.pt"), workspace / f"converted{seed}", inputs=[hostile.INPUT], onnx=False)
        torch.onnx.export(
            net(seed), (torch.randn(2, 3, 7, 6),), workspace / f"net{seed}.onnx", dynamo=True, verbose=False, external_data=False
        )
    rows = []
    for writer in WRITERS:
        finished: dict[int, Path] = {}
        for seed in (3, 4):
            finished[seed] = workspace / f"{writer.command}{seed}"
            finished[seed].mkdir()
            started = time.perf_counter()
            writer.make(finished[seed] / writer.name, seed)
            seconds = time.perf_counter() - started
        old, new = (writer.state(finished[seed] / writer.name) for seed in (3, 4))
        assert old != new
        for existing in (True, False):
            row: dict[str, Any] = {"command": writer.command, "over": "an old result" if existing else "nothing"}
            row |= {"kills": 0, "old": 0, "new": 0, "partial": 0, "lost": 0, "left": 0}

            def attempt(kill: Callable[[Callable[[], object], Path], bool], writer: Writer = writer, existing: bool = existing) -> bool:
                place = workspace / "place"
                shutil.rmtree(place, ignore_errors=True)
                shutil.copytree(finished[3], place) if existing else place.mkdir()
                path = place / writer.name
                killed = kill(lambda: writer.make(path, 4), place)
                try:
                    state = writer.state(path)
                except Exception:
                    state = "partial"
                word = "new" if state == new else "old" if state == (old if existing else None) else "lost" if state is None else "partial"
                if killed:
                    row["kills"] += 1
                    row[word] += 1
                    with contextlib.suppress(Exception), outputs._scratch(path):  # what the next run does first
                        pass
                    row["left"] += sum(entry.name.startswith(".") for entry in place.iterdir())
                return killed

            step = 1
            while attempt(lambda action, place, step=step: sandbox.killed_at(step, action, place)):
                step += 1
            for _ in range(AT_RANDOM):
                attempt(lambda action, place: sandbox.killed_after(dice.uniform(0, 1.1 * seconds), action))
            rows.append(row)
            print(json.dumps(row), file=sys.stderr, flush=True)
    return rows


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", default="", metavar="WORD")
    asked = parser.parse_args()
    with tempfile.TemporaryDirectory() as directory:
        workspace = Path(directory)
        canary = prepared(workspace)
        killed = kills(workspace)
        rows = files(workspace, canary, asked.only)
    print(Counter(key for row in rows for key in row["bad"]), len(rows), max(row["memory"] for row in rows) >> 20)


if __name__ == "__main__":
    main()
