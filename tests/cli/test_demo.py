"""`normswap demo` from an empty folder: what it writes, what it says, and what it does not need."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from click.testing import Result
from typer.testing import CliRunner

import normswap
from fixtures import train_digits_cnn
from normswap import demo
from normswap.cli.app import app
from normswap.parity.result import Difference, Parity, ParityError

ROOT = Path(__file__).parents[2]
WRITTEN = ["model.onnx", "model.safetensors", "recipe.json", "report.html", "report.json"]
# Run with this, a process can neither open a connection nor import what only normswap[vision] brings.
ALONE = """
import socket, sys
for name in ("torchvision", "timm", "transformers", "sklearn"):
    sys.modules[name] = None  # as if it were not installed
def refuse(*args, **options):
    raise AssertionError("the demo opens a connection")
socket.socket.connect = socket.create_connection = socket.getaddrinfo = refuse
from normswap.cli.app import main
sys.argv = ["normswap", "demo"]
main()
"""


def run(*arguments: object) -> Result:
    return CliRunner().invoke(app, [str(argument) for argument in arguments])


@pytest.fixture(scope="module")
def ran(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, str]:
    """The directory in which the demo ran, and what it said."""
    folder = tmp_path_factory.mktemp("empty")
    environment = os.environ | {"PYTHONPATH": str(ROOT)}
    done = subprocess.run([sys.executable, "-W", "error", "-c", ALONE], cwd=folder, env=environment, capture_output=True, text=True)
    assert (done.returncode, done.stderr) == (0, "")
    return folder, done.stdout


def test_it_needs_no_network_and_no_other_package(ran: tuple[Path, str]) -> None:
    folder, _ = ran
    assert [path.name for path in folder.iterdir()] == ["normswap-demo"]
    assert sorted(path.name for path in (folder / "normswap-demo").iterdir()) == WRITTEN


def test_it_says_what_was_done_with_figures(ran: tuple[Path, str]) -> None:
    folder, text = ran
    report = json.loads((folder / "normswap-demo/report.json").read_text())
    assert "swapped   4 of 4 BatchNorm layers\n" in text
    assert f"the largest error is {report['parities']['torch']['max_rel']:.1e} of an output" in text
    assert f"{sum(report['onnx']['nodes'].values())} operators, none of them normalization" in text
    assert "450 digits that it has not seen: the same answer for 450; right are\n" in text
    assert "          449 before, 449 after, 449 in onnxruntime\n" in text
    assert all(f"  {name} " in text for name in WRITTEN if name != "model.safetensors")
    assert [line for line in text.splitlines() if len(line) > 80] == []


def test_the_commands_that_it_names_work(ran: tuple[Path, str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    _, text = ran
    torch.save(torch.nn.Sequential(torch.nn.Conv2d(3, 5, 3), torch.nn.BatchNorm2d(5)).eval(), tmp_path / "MODEL.pt")
    monkeypatch.chdir(tmp_path)
    commands = [line[2:].partition("   ")[0].split() for line in text.splitlines() if line.startswith("  normswap ")]
    assert [words[1] for words in commands] == ["inspect", "convert", "verify"]
    for words in commands:
        done = run(*words[1:])
        assert (done.exit_code, done.stderr) == (0, ""), words


def test_what_it_wrote_loads(ran: tuple[Path, str]) -> None:
    folder, _ = ran
    model = normswap.load(folder / "normswap-demo", demo.build)
    assert isinstance(model, torch.nn.Module)
    assert sum(isinstance(module, normswap.BatchlessNorm) for module in model.modules()) == 4


def test_it_replaces_its_own_directory_and_no_other(ran: tuple[Path, str], tmp_path: Path) -> None:
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "thesis.txt").write_text("five years")
    refused = run("demo", "-o", tmp_path / "out")
    assert (refused.exit_code, refused.stdout) == (2, "")
    assert "holds files that normswap did not write" in refused.stderr
    assert [path.name for path in (tmp_path / "out").iterdir()] == ["thesis.txt"]
    (tmp_path / "out" / "thesis.txt").unlink()
    shutil.copytree(ran[0] / "normswap-demo", tmp_path / "out", dirs_exist_ok=True)
    os.utime(tmp_path / "out" / "recipe.json", (0, 0))
    assert run("demo", "-o", tmp_path / "out").exit_code == 0
    assert (tmp_path / "out" / "recipe.json").stat().st_mtime > 0
    assert sorted(path.name for path in (tmp_path / "out").iterdir()) == WRITTEN


def test_a_failure_has_the_exit_code_of_convert(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*args: object, **options: object) -> None:
        raise ParityError("not the same function", parity=Parity((Difference("output", "example", 1.0, 0.5, 0.5, 0, 1e-7, 1e-6),)))

    monkeypatch.setattr("normswap.api.convert.convert_unchecked", fail)
    failed = run("demo", "-o", tmp_path / "out")
    assert (failed.exit_code, failed.stdout, failed.stderr) == (3, "", "error: not the same function\n")


def test_the_network_and_the_digits_are_those_of_the_fixtures() -> None:
    pickled = torch.load(ROOT / "fixtures/digits_cnn.pt", weights_only=False)
    weights = demo.digits().state_dict()
    assert all(torch.equal(value, weights[name]) for name, value in pickled.state_dict().items())
    for ours, theirs in zip(demo.images(), train_digits_cnn.test_set(), strict=True):
        assert torch.equal(ours, theirs)
    assert not demo.digits().training


def test_accuracy_counts_the_right_answers() -> None:
    answers = torch.tensor([[1.0, 3.0, 2.0], [4.0, 0.0, 1.0], [0.0, 2.0, 5.0], [9.0, 1.0, 0.0]])
    assert demo.accuracy(answers, torch.tensor([1, 0, 1, 2])) == 0.5
