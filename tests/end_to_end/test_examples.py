"""The examples run as they are, and each checks itself what it says."""

from __future__ import annotations

from pathlib import Path

import pytest
from warm import Warm

EXAMPLES = Path(__file__).parents[2] / "examples"


@pytest.mark.parametrize("name", ["finetune_batch_1", "accumulate", "private", "federated", "ship_onnx"])
def test_an_example_runs(name: str, tmp_path: Path, warm: Warm) -> None:
    place = tmp_path / "place"
    place.mkdir()
    ran = warm.run((EXAMPLES / f"{name}.py").read_text(), place, EXAMPLES)
    assert ran.returncode == 0, ran.output
    assert ran.output
    assert list(place.iterdir()) == []  # nothing is left behind


def test_every_example_is_run() -> None:
    assert {file.stem for file in EXAMPLES.glob("*.py")} == {
        "digits",
        "finetune_batch_1",
        "accumulate",
        "private",
        "federated",
        "ship_onnx",
    }
