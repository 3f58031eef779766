"""What the benchmarks import of normswap is there, also in code that they hand to another process as text."""

from __future__ import annotations

import importlib
import re
from pathlib import Path

import pytest

IMPORT = re.compile(r"^[ \t]*from (normswap[\w.]*) import ([\w, ]+)$", re.MULTILINE)
BENCHMARKS = sorted((Path(__file__).resolve().parents[2] / "benchmarks").glob("*.py"))


@pytest.mark.parametrize("path", BENCHMARKS, ids=lambda path: path.stem)
def test_every_import_of_normswap_finds_what_it_names(path: Path) -> None:
    for module, names in IMPORT.findall(path.read_text(encoding="utf-8")):
        found = importlib.import_module(module)
        for name in names.split(","):
            name = name.split(" as ")[0].strip()
            if not hasattr(found, name):
                importlib.import_module(f"{module}.{name}")


def test_text_for_another_process_is_seen() -> None:
    found = IMPORT.findall((Path(__file__).resolve().parents[2] / "benchmarks/convert_cost.py").read_text(encoding="utf-8"))
    assert ("normswap.cli.app", "main") in found
