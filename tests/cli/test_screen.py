"""What a person sees on a terminal of a given width: whole words, colours for what is wrong, none with NO_COLOR; and `normswap watch`."""

from __future__ import annotations

import fcntl
import os
import pty
import re
import signal
import struct
import subprocess
import sys
import termios
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import torch

from normswap.demo import digits

REPOSITORY = Path(__file__).parents[2]
COLOUR = re.compile(r"\x1b\[[0-9;]*m")
CONTROL = re.compile(r"\x1b\[[0-9;?]*[A-Za-z]")
HEADER = "step,layer,mean_z,mean_z2,dead_channels,limit_hits\n"


@contextmanager
def screen(folder: Path, *arguments: str, width: int, **more: str) -> Iterator[tuple[subprocess.Popen[bytes], int]]:
    """normswap with its output and errors on a terminal; and our side of that terminal."""
    ours, theirs = pty.openpty()
    fcntl.ioctl(theirs, termios.TIOCSWINSZ, struct.pack("HHHH", 50, width, 0, 0))
    plain = {k: v for k, v in os.environ.items() if k not in {"NO_COLOR", "FORCE_COLOR", "COLUMNS"}}
    environment = {**plain, "PYTHONPATH": str(REPOSITORY), "TERM": "xterm", **more}
    command = [sys.executable, "-m", "normswap", *arguments]
    with subprocess.Popen(command, cwd=folder, env=environment, stdin=subprocess.DEVNULL, stdout=theirs, stderr=theirs) as process:
        os.close(theirs)
        yield process, ours
    os.close(ours)


def read(ours: int, until: str | None = None) -> str:
    """What comes on the terminal, to its end, or until a text is there."""
    seen = b""
    while until is None or until not in seen.decode(errors="replace"):
        try:
            part = os.read(ours, 1 << 16)
        except OSError:  # the other side was closed
            break
        if not part:
            break
        seen += part
    return seen.decode().replace("\r", "")


def verified(folder: Path, width: int, **more: str) -> str:
    """What `verify` says of a network and one of which a bias is off, on a terminal; without what was wiped again."""
    model = digits()
    torch.save(model, folder / "a.pt")
    with torch.no_grad():
        model[4].bias[3] += 1e-3
    torch.save(model, folder / "b.pt")
    with screen(folder, "verify", "a.pt", "b.pt", width=width, **more) as (process, ours):
        text = read(ours)
    assert process.returncode == 3
    return text


def test_words_are_whole_and_what_is_wrong_is_red(tmp_path: Path) -> None:
    text = verified(tmp_path, 60)
    lines = CONTROL.sub("", text).splitlines()
    assert [line for line in lines if len(line.rstrip()) > 60] == []
    assert "\x1b[1;31mdiffers, at example" in text
    assert "\x1b[1;31mFAILED; worst of" in text


def test_no_color_is_plain(tmp_path: Path) -> None:
    text = verified(tmp_path, 80, NO_COLOR="1")
    assert "FAILED; worst of" in text
    assert COLOUR.findall(text) == []


def test_watch_follows_a_file_until_ctrl_c(tmp_path: Path) -> None:
    run = tmp_path / "run.csv"
    run.write_text(HEADER + "0,stem,0.1,1.25,0,\n")
    with screen(tmp_path, "watch", "run.csv", width=80) as (process, ours):
        assert "1.25" in read(ours, until="step 0, 1 in the file")
        with run.open("a") as file:
            file.write("1,stem,0.1,3.5,0,\n")
        assert "3.5" in read(ours, until="step 1, 2 in the file: 1 of 1 layers have a mean z^2")
        process.send_signal(signal.SIGINT)
        read(ours)
    assert process.returncode == 130
