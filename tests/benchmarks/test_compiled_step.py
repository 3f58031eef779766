"""That docs/benchmarks.md has what benchmarks/compiled_step.py measured."""

from __future__ import annotations

import json
from pathlib import Path

from benchmarks import compiled_step
from benchmarks.compiled_step import BASE, NETS, PARTS, ROWS, table


def test_the_table_is_in_the_docs(repository: Path) -> None:
    kept = json.loads(compiled_step.KEPT.read_text(encoding="utf-8"))["nets"]
    page = (repository / "docs/benchmarks.md").read_text(encoding="utf-8")
    assert [*kept] == [net for net in NETS if net in kept]
    for rows in kept.values():
        assert list(rows) == list(ROWS)
        assert rows[BASE]["time"] == 1
        assert all(list(found["ms"]) == list(PARTS) for found in rows.values())
    for line in table(kept):
        assert line in page
