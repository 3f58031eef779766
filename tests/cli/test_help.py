"""--help, -h and completion: what a newcomer reads first, in 80 columns, and that it costs no torch."""

from __future__ import annotations

import os
import shlex
import subprocess
import sys
from pathlib import Path

import pytest
import typer
from typer.testing import CliRunner

from normswap.cli.app import app
from normswap.cli.help import EXAMPLES

ROOT = Path(__file__).parents[2]
COMMANDS = typer.main.get_command(app).commands  # type: ignore[attr-defined]
HEADINGS = {
    "convert": [
        "Arguments:",
        "Reading the model:",
        "Which layers:",
        "The new layers, and calibration:",
        "The ONNX file:",
        "Options:",
        "Example:",
    ],
    "fold": ["Arguments:", "Options:", "Example:"],
    "verify": ["Arguments:", "Reading the model:", "Options:", "Example:"],
}


def help_of(*words: str) -> str:
    done = CliRunner().invoke(app, [*words], env={"COLUMNS": "80", "TERMINAL_WIDTH": "80"})
    assert done.exit_code == 0, done.output
    return done.stdout


@pytest.mark.parametrize("name", ["", *COMMANDS])
def test_h_is_help_and_fits(name: str) -> None:
    words = [name] if name else []
    text = help_of(*words, "-h")
    assert text == help_of(*words, "--help")
    assert [line for line in text.splitlines() if len(line) > 80] == []


@pytest.mark.parametrize("name", HEADINGS)
def test_options_are_in_groups(name: str) -> None:
    lines = help_of(name, "-h").splitlines()
    assert [line for line in lines if line and not line.startswith((" ", "Usage"))] == HEADINGS[name]


@pytest.mark.parametrize("name", COMMANDS)
def test_every_option_is_shown_and_the_example_is_one(name: str) -> None:
    text = help_of(name, "-h")
    for parameter in COMMANDS[name].params:
        assert all(option in text for option in parameter.opts if option.startswith("-"))
    command, *words = shlex.split(text.splitlines()[-1])
    assert [command, *words] == shlex.split(EXAMPLES[name])
    assert (command, words[0]) == ("normswap", name)
    COMMANDS[name].make_context(name, words[1:], resilient_parsing=False)  # its options are there, and have values


def test_help_imports_no_torch() -> None:
    script = "import sys; sys.argv = ['normswap', 'convert', '-h']; from normswap.cli.app import main; sys.exit = lambda *a: None; main()"
    script += "\nassert not {'torch', 'numpy', 'onnx'} & set(sys.modules), 'heavy'"
    done = subprocess.run([sys.executable, "-c", script], env=os.environ | {"PYTHONPATH": str(ROOT)}, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


@pytest.mark.parametrize("shell", ["bash", "zsh", "fish"])
def test_completion(shell: str) -> None:
    """What `normswap --show-completion` prints asks normswap itself, by these variables."""
    asked = {"_NORMSWAP_COMPLETE": f"complete_{shell}", "COMP_WORDS": "normswap con", "COMP_CWORD": "1"}
    asked |= {"_TYPER_COMPLETE_ARGS": "normswap con", "_TYPER_COMPLETE_FISH_ACTION": "get-args", "PYTHONPATH": str(ROOT)}
    done = subprocess.run([sys.executable, "-m", "normswap"], env=os.environ | asked, capture_output=True, text=True)
    assert "convert" in done.stdout, done.stderr
    assert "inspect" not in done.stdout


@pytest.mark.parametrize(
    ("name", "hint"),
    [
        ("resnet18", "did you mean torchvision:resnet18"),
        ("resnet81", "did you mean torchvision:resnet18"),
        ("mobilenet_v3_smal", "did you mean torchvision:mobilenet_v3_small"),
        ("thesis", "a source is a .pt"),
        ("resnet18.pt", "a source is a .pt"),
    ],
)
def test_a_name_without_its_library_is_understood(name: str, hint: str) -> None:
    done = CliRunner().invoke(app, ["inspect", name])
    assert (done.exit_code, done.stdout) == (2, "")
    assert done.stderr.startswith(f"error: there is no file {name}\nhint: {hint}")
