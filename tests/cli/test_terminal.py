"""Calibration says how far it is, on a terminal; Ctrl-C in the middle of it leaves nothing."""

from __future__ import annotations

import io
import os
import pty
import re
import shutil
import signal
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from rich.console import Console
from torch import nn

import normswap
from normswap.api.convert import convert_unchecked
from normswap.api.request import Request
from normswap.cli.convert import ConvertOptions, _Clock, convert_to_directory
from normswap.cli.terminal import _progress

REPOSITORY = Path(__file__).parents[2]
MODULE = """
import os, pathlib, signal
import torch
from torch import nn

class Net(nn.Module):
    def __init__(self):
        super().__init__()
        self.a, self.b = nn.Linear(6, 8), nn.LayerNorm(8)
        self.c, self.d = nn.Linear(8, 5), nn.BatchNorm1d(5)

    def forward(self, x):
        if x.shape[0] == 97 and "STOP_HERE" in os.environ:  # the second batch of the calibration data: nobody else has as many
            pathlib.Path(os.environ["STOP_HERE"]).touch()
            signal.pause()
        return self.d(self.c(self.b(self.a(x))))

def build():
    return Net().eval()

def data():
    return [torch.randn(n, 6, generator=torch.Generator().manual_seed(n)) for n in (31, 97, 12)]
"""
COMMAND = ["convert", "slow:build", "--data", "slow:data", "--approximate", "--no-onnx", "-o", "out"]


@pytest.fixture
def directory(tmp_path: Path) -> Path:
    (tmp_path / "slow.py").write_text(MODULE)
    return tmp_path


@pytest.fixture(scope="module")
def piped(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, subprocess.CompletedProcess[str]]:
    """Where COMMAND ran without a terminal, and what it said."""
    folder = tmp_path_factory.mktemp("piped")
    (folder / "slow.py").write_text(MODULE)
    command = [sys.executable, "-m", "normswap", *COMMAND]
    return folder, subprocess.run(command, cwd=folder, env=environment(), capture_output=True, text=True)


def environment(**more: str) -> dict[str, str]:
    plain = {k: v for k, v in os.environ.items() if k not in {"NO_COLOR", "FORCE_COLOR", "COLUMNS"}}
    return {**plain, "PYTHONPATH": str(REPOSITORY), "PYTHONDONTWRITEBYTECODE": "1", "TERM": "xterm", **more}


def on_a_terminal(directory: Path, *arguments: str, stop: Path | None = None) -> tuple[int, str, str]:
    """(exit code, stdout, what the terminal that is stderr got). stop: send Ctrl-C when this file appears."""
    ours, theirs = pty.openpty()
    more = {} if stop is None else {"STOP_HERE": str(stop)}
    with subprocess.Popen(
        [sys.executable, "-m", "normswap", *arguments], cwd=directory, env=environment(**more), stdout=subprocess.PIPE, stderr=theirs
    ) as process:
        os.close(theirs)
        seen, sent = b"", False
        while True:
            try:
                part = os.read(ours, 1 << 16)  # the spinner writes many times a second, so this does not wait for long
            except OSError:  # the other side was closed
                break
            seen += part
            if stop is not None and not sent and stop.exists():
                process.send_signal(signal.SIGINT)
                sent = True
            if not part:
                break
        stdout, _ = process.communicate(timeout=60)
    os.close(ours)
    return process.returncode, stdout.decode(), seen.decode()


def test_a_terminal_shows_a_bar_with_the_time_left(directory: Path) -> None:
    code, stdout, terminal = on_a_terminal(directory, *COMMAND)
    assert code == 0, terminal
    assert "\x1b" not in stdout
    assert "convert and verify: calibration" in terminal
    shown = {(int(done), int(total)) for done, total in re.findall(r"(\d+)/(\d+)", terminal)}
    assert shown
    assert {total for _, total in shown} == {3}
    assert re.search(r"-:--:--|\d:\d\d:\d\d", terminal)  # the time left
    assert terminal.rindex("\x1b[?25h") > terminal.rindex("\x1b[?25l")  # the cursor is back


def test_elsewhere_nothing_is_shown(piped: tuple[Path, subprocess.CompletedProcess[str]]) -> None:
    _, ran = piped
    assert (ran.returncode, ran.stderr) == (0, "")
    assert "calibration" not in ran.stdout.splitlines()[0]
    assert "\x1b[" not in ran.stdout


def test_ctrl_c_in_the_middle_of_calibration(directory: Path, tmp_path: Path) -> None:
    stop = tmp_path / "reached"
    code, stdout, terminal = on_a_terminal(directory, *COMMAND, stop=stop)
    assert (code, stdout) == (130, "")
    assert terminal.splitlines()[-1].endswith("interrupted")
    assert "Traceback" not in terminal
    assert terminal.rindex("\x1b[?25h") > terminal.rindex("\x1b[?25l")
    assert sorted(path.name for path in directory.iterdir()) == ["reached", "slow.py"]


def test_ctrl_c_leaves_what_was_there(directory: Path, tmp_path: Path, piped: tuple[Path, subprocess.CompletedProcess[str]]) -> None:
    shutil.copytree(piped[0] / "out", directory / "out")
    before = {path.name: path.read_bytes() for path in (directory / "out").iterdir()}
    code, _, _ = on_a_terminal(directory, *COMMAND, stop=tmp_path / "reached")
    assert code == 130
    assert {path.name: path.read_bytes() for path in (directory / "out").iterdir()} == before
    assert sorted(path.name for path in directory.iterdir()) == ["out", "reached", "slow.py"]


def _net() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(6, 8), nn.LayerNorm(8), nn.Linear(8, 5), nn.BatchNorm1d(5), nn.LayerNorm(5)).eval()


def _batches() -> list[torch.Tensor]:
    return [torch.randn(n, 6) for n in (5, 9, 4)]


@pytest.mark.parametrize("lazy", [False, True])
def test_progress_counts_strata_times_batches(lazy: bool) -> None:
    """A generator is read once, so its length is known as well."""
    told: list[tuple[int, int]] = []
    batches = iter(_batches()) if lazy else _batches()
    convert_unchecked(_net(), Request(calibration=batches, approximate=True), lambda done, total: told.append((done, total)))
    assert told == [(done, 6) for done in range(1, 7)]


def test_a_loader_without_a_length_is_counted_in_its_first_pass() -> None:
    class Loader:
        def __iter__(self) -> Iterator[torch.Tensor]:
            return iter(_batches())

    told: list[tuple[int, int]] = []
    convert_unchecked(_net(), Request(calibration=Loader(), approximate=True, repair="none"), lambda *counts: told.append(counts))
    assert told == [(4, 6), (5, 6), (6, 6)]
    told.clear()  # a repair makes the passes of all batches first
    convert_unchecked(_net(), Request(calibration=Loader(), approximate=True), lambda *counts: told.append(counts))
    assert told == [(done, 6) for done in range(1, 7)]


def test_what_is_not_calibrated_tells_nothing() -> None:
    told: list[tuple[int, int]] = []
    convert_unchecked(_net(), Request(example_inputs=_batches()[0]), lambda done, total: told.append((done, total)))
    assert told == []


def test_the_spinner_makes_way_and_comes_back() -> None:
    """Twice in one stage: an exact re-estimation before an approximate calibration."""
    screen = io.StringIO()
    console = Console(file=screen, force_terminal=True, width=100)
    with _progress(console) as progress, _Clock(progress)("convert and verify") as count:
        for _ in range(2):
            for done in (1, 2, 3):
                count(done, 3)
    text = re.sub(r"\x1b\[[0-9;?]*[a-zA-Z]", "", screen.getvalue())
    assert text.count("3/3") >= 2
    last = text.rstrip().split("\r")[-1]
    assert "convert and verify " in last
    assert "calibration" not in last


def test_an_error_inside_a_stage_comes_out() -> None:
    screen = io.StringIO()

    def work() -> None:
        with _progress(Console(file=screen, force_terminal=True)) as progress:
            progress("work", 1, 2)
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        work()
    assert screen.getvalue().rindex("\x1b[?25h") > screen.getvalue().rindex("\x1b[?25l")


def test_the_library_is_silent(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    torch.save(_net(), tmp_path / "net.pt")
    torch.save(_batches()[0], tmp_path / "data.pt")
    options = ConvertOptions(data=str(tmp_path / "data.pt"), approximate=True, onnx=False)
    convert_to_directory(str(tmp_path / "net.pt"), tmp_path / "out", options)
    normswap.convert(_net(), calibration=_batches(), reestimate="exact")
    assert capfd.readouterr() == ("", "")
