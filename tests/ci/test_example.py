"""examples/ci as a user's repository: its commands, the Action's script and the hook, while all is well and with one bias off."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from junit_schema import cases_of

ROOT = Path(__file__).parents[2]


@pytest.fixture(scope="module")
def repository(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A copy of the example, with its models made."""
    folder = tmp_path_factory.mktemp("example") / "repository"
    shutil.copytree(ROOT / "examples/ci", folder)
    made = run(folder, sys.executable, "make_models.py")
    assert made.returncode == 0, made.stderr
    return folder


def run(folder: Path, *command: object, **environment: str) -> subprocess.CompletedProcess[str]:
    python = Path(sys.executable).parent
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "PATH": f"{python}:{os.environ['PATH']}", **environment}
    return subprocess.run(list(map(str, command)), cwd=folder, env=environment, capture_output=True, text=True)


def check(folder: Path, **inputs: str) -> subprocess.CompletedProcess[str]:
    """The script of the Action, as action.yml runs it."""
    return run(folder, "bash", ROOT / ".github/compare.sh", GITHUB_STEP_SUMMARY=str(folder / "summary.md"), **inputs)


def test_the_commands_of_the_example_pass(repository: Path) -> None:
    tested = run(repository, sys.executable, "-m", "pytest", "-q", "-p", "normswap.ci.plugin", "--normswap", "models", "-W", "error")
    assert "3 passed" in tested.stdout, tested.stdout + tested.stderr  # its own test, and two comparisons
    verified = run(repository, sys.executable, "-m", "normswap", "verify", "models", "--junit", "models.xml")
    assert (verified.returncode, verified.stderr) == (0, "")
    assert "2 of 2 comparisons passed, 0 failed" in verified.stdout
    assert set(cases_of(repository / "models.xml").values()) == {"passed"}


@pytest.fixture(scope="module")
def good(repository: Path) -> subprocess.CompletedProcess[str]:
    return check(repository, NORMSWAP_REFERENCE="models")


def test_the_script_of_the_action(repository: Path, good: subprocess.CompletedProcess[str], broken: Path) -> None:
    assert good.returncode == 0, good.stdout
    assert "::error" not in good.stdout
    assert "2 of 2 comparisons passed" in (repository / "summary.md").read_text()
    shutil.copy(broken / "off.pt", repository / "off.pt")
    bad = check(repository, NORMSWAP_REFERENCE="models/digits.pt", NORMSWAP_CANDIDATE="off.pt", NORMSWAP_JUNIT="bad.xml")
    assert bad.returncode == 3
    (annotation,) = [line for line in bad.stdout.splitlines() if line.startswith("::error ")]
    assert annotation.startswith("::error title=normswap verify::not the same function: off.pt and models/digits.pt%0A  layer     4%0A")
    cases = cases_of(repository / "bad.xml")
    assert cases["off.pt against models/digits.pt: layer 1"] == "passed"
    assert cases["off.pt against models/digits.pt: layer 4"] == "failure"
    shutil.copytree(broken, repository / "broken")
    worse = check(repository, NORMSWAP_REFERENCE="broken", NORMSWAP_JUNIT="worse.xml", NORMSWAP_TRUST_PACKAGE="one two")
    assert worse.returncode == 3
    (annotation,) = [line for line in worse.stdout.splitlines() if line.startswith("::error ")]
    assert annotation.startswith("::error title=normswap verify::FAILED: 1 of 2 comparisons passed, 1 failed%0Anot the same function: ")
    assert "%0A  figure    error " in annotation
    missing = check(repository, NORMSWAP_REFERENCE="nothing-here")
    assert missing.returncode == 2
    assert "::error title=normswap verify::error: there is no directory nothing-here" in missing.stdout
    (repository / "python").write_text('#!/bin/sh\n[ "$1" = -c ] && exec ' + sys.executable + ' "$@"\nexit 137\n')
    (repository / "python").chmod(0o755)
    killed = check(repository, NORMSWAP_REFERENCE="models", PATH=f"{repository}:{os.environ['PATH']}")
    assert killed.returncode == 137
    assert "::error title=normswap verify::it ended with exit code 137; the log has what it printed" in killed.stdout


def test_what_a_model_says_is_no_command_of_the_runner(good: subprocess.CompletedProcess[str]) -> None:
    lines = good.stdout.splitlines()
    stop = re.fullmatch(r"::stop-commands::([0-9a-f]{32})", lines[0])
    assert stop is not None
    assert f"::{stop[1]}::" in lines


def test_the_action_and_the_hook_run_what_is_there() -> None:
    yaml = pytest.importorskip("yaml")
    action = yaml.safe_load((ROOT / "action.yml").read_text())
    _, compare = action["runs"]["steps"]
    assert action["runs"]["using"] == "composite"
    assert compare["run"] == 'bash "$GITHUB_ACTION_PATH/.github/compare.sh"'
    script = (ROOT / ".github/compare.sh").read_text()
    assert all(f"${{{name}" in script or f"${name}" in script for name in compare["env"])
    assert {f"${{{{ inputs.{name} }}}}" for name in action["inputs"]} == set(compare["env"].values())
    (hook,) = yaml.safe_load((ROOT / ".pre-commit-hooks.yaml").read_text())
    assert (hook["entry"], hook["args"], hook["pass_filenames"]) == ("normswap verify", ["."], False)
    assert all(
        re.search(hook["files"], name) for name in ("models/a/recipe.json", "recipe.json", "a/other.onnx", "model.onnx.data", "source.pth")
    )
    assert not any(re.search(hook["files"], name) for name in ("models/report.json", "a/myrecipe.json", "a/pt"))
