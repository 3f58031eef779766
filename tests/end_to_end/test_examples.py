"""The examples run as they are, and each checks itself what it says."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

EXAMPLES = Path(__file__).parents[2] / "examples"


@pytest.mark.parametrize("name", ["finetune_batch_1", "accumulate", "private", "federated", "ship_onnx"])
def test_an_example_runs(name: str, tmp_path: Path) -> None:
    environment = os.environ | {"PYTHONPATH": str(EXAMPLES.parent)}
    ran = subprocess.run([sys.executable, EXAMPLES / f"{name}.py"], cwd=tmp_path, env=environment, capture_output=True, text=True)
    assert ran.returncode == 0, ran.stderr
    assert ran.stdout
    assert list(tmp_path.iterdir()) == []  # nothing is left behind


def test_every_example_is_run() -> None:
    assert {file.stem for file in EXAMPLES.glob("*.py")} == {
        "digits",
        "finetune_batch_1",
        "accumulate",
        "private",
        "federated",
        "ship_onnx",
    }
