"""A sample of the files that were made to do harm, and innocent ones like them. `python -m benchmarks.hostile` runs them all."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest

from fixtures import hostile, sandbox

CASES = hostile.cases(transformers=False)
# one of each area, and those in which something was found
SAMPLE = {
    "pickle: a call": "builtins.eval",
    "pickle: an import": f"{hostile.CANARY}.Net",
    "pickle: a name of a layer": "a carriage return",
    "pickle: a name of a parameter": "a quotation mark",
    "pickle: inside itself": "through another",
    "pickle: too deep": "1,000 layers",
    "pickle: too many names": "2^40",
    "pickle: a bomb of tuples": "as an attribute",
    "pickle: values inside values": "tuples",
    "pickle: eps of a BatchNorm": "10^300",
    "pickle: a layer without a state": "none",
    "zip: two of one name": "the good one first",
    "pt2: a size": "as a Symbol",
    "pt2: a signature that imports": "defaultdict",
    "safetensors: names": "lines",
    "onnx: weights elsewhere": "..",
    "onnx: weights through a link": "a directory",
    "onnx: types": "of no number",
    "input: pickled objects": ".npy",
    "recipe: a factory": f"{hostile.CANARY}:build",
    "recipe: a rule": "a module",
    "recipe: a path": "../evil.pt",
    "recipe: no recipe": "nested",
    "recipe: no files": "a pipe for the weights",
    "recipe: an output": "a link",
}


@pytest.fixture(scope="module")
def canary(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = hostile.write_canary(tmp_path_factory.mktemp("canary"))
    sys.path.insert(0, str(path.parent))
    try:
        directory = tmp_path_factory.mktemp("warm")
        for number, case in enumerate(CASES):  # import what reading a model takes
            if case.innocent:
                for command in case.write(directory / str(number)):
                    sandbox.captured(command, directory)
        yield path
    finally:
        sys.path.remove(str(path.parent))


@pytest.mark.parametrize("kind", SAMPLE)
def test_nothing_runs_and_every_error_has_words(kind: str, canary: Path, tmp_path: Path) -> None:
    (case,) = (case for case in CASES if (case.kind, case.name) == (kind, SAMPLE[kind]))
    found = sandbox.watched(case.write(tmp_path / "made"), tmp_path / "made", canary)
    assert found.bad == {}
    assert found.memory < 1 << 30
    assert all(code in (1, 2) for code in found.codes), found.texts
    assert all(text.startswith("error: ") for text in found.texts)


@pytest.mark.parametrize("case", [case for case in CASES if case.innocent], ids=lambda case: f"{case.kind}, {case.name}")
def test_innocent_files_are_read(case: hostile.Case, canary: Path, tmp_path: Path) -> None:
    found = sandbox.watched(case.write(tmp_path / "made"), tmp_path / "made", canary)
    assert found.bad == {}
    assert set(found.codes) == {0}, found.texts


def test_the_watch_sees_what_it_is_for(canary: Path, tmp_path: Path) -> None:
    """The same payloads, with the user's word."""
    commands = {
        "a call": (["inspect", "a.pt", "--trust"], hostile._called("builtins.eval", hostile.pw.text(hostile.RUN))),
        "a process": (["inspect", "a.pt", "--trust"], hostile._called("os.system", hostile.pw.text("true"))),
        "an import": (["inspect", "a.pt", "--trust"], hostile._pickled(hostile.pw.new("this.X"))),
        "a factory": (["inspect", f"{hostile.CANARY}:build"], lambda path: None),
    }
    seen = {}
    for what, (command, make) in commands.items():
        directory = tmp_path / what
        directory.mkdir()
        make(directory / "a.pt")
        seen[what] = set(sandbox.watched([command], directory, canary).bad)
    assert "ran" in seen["a call"]
    assert "ran" in seen["a process"]
    assert "imported" in seen["an import"]
    assert seen["a factory"] >= {"ran", "imported"}


def test_there_are_many_of_them() -> None:
    bad = [case for case in CASES if not case.innocent]
    assert len(bad) >= 100
    assert len({case.kind for case in bad}) >= 40
    assert len({(case.kind, case.name) for case in CASES}) == len(CASES)
