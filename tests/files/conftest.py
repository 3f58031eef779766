"""Fixtures of the tests of files."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
from own_net import CODE, NET


@pytest.fixture
def package(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """A user's own code in the working directory, which is not on sys.path."""
    (tmp_path / f"{NET}.py").write_text(CODE)
    (tmp_path / f"{NET}_bad.py").write_text("1 / 0")
    (tmp_path / f"{NET}_needy.py").write_text("import no_such_package_at_all")
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", [entry for entry in sys.path if entry])
    yield tmp_path
    for name in [name for name in sys.modules if name.startswith(NET)]:
        del sys.modules[name]
