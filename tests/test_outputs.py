"""Outputs appear whole or not at all."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from normswap import outputs
from normswap.errors import UsageError


def test_a_directory_appears_at_the_end(tmp_path: Path) -> None:
    with outputs.directory(tmp_path / "out", marker="mark") as partial:
        (partial / "mark").write_text("new")
        assert not (tmp_path / "out").exists()
    assert (tmp_path / "out" / "mark").read_text() == "new"
    assert os.listdir(tmp_path) == ["out"]


@pytest.mark.parametrize("stop", [RuntimeError, KeyboardInterrupt])
def test_a_directory_that_fails_leaves_what_was_there(tmp_path: Path, stop: type[BaseException]) -> None:
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "mark").write_text("old")
    with pytest.raises(stop), outputs.directory(tmp_path / "out", marker="mark") as partial:  # noqa: PT012  the block is the subject
        (partial / "mark").write_text("new")
        raise stop
    assert (tmp_path / "out" / "mark").read_text() == "old"
    assert os.listdir(tmp_path) == ["out"]


def test_a_second_run_replaces_all_of_the_first(tmp_path: Path) -> None:
    for names in (("mark", "only_first"), ("mark",)):
        with outputs.directory(tmp_path / "out", marker="mark") as partial:
            for name in names:
                (partial / name).touch()
    assert os.listdir(tmp_path / "out") == ["mark"]
    assert os.listdir(tmp_path) == ["out"]


def test_an_empty_directory_may_be_filled(tmp_path: Path) -> None:
    with outputs.directory(tmp_path, marker="mark") as partial:
        (partial / "mark").touch()
    assert os.listdir(tmp_path) == ["mark"]


def test_a_directory_of_somebody_else_is_refused(tmp_path: Path) -> None:
    (tmp_path / "thesis.tex").touch()
    with pytest.raises(UsageError, match="holds files that normswap did not write, and would be replaced"):
        outputs.check(tmp_path, marker="mark")


def test_a_file_in_the_way_is_refused(tmp_path: Path) -> None:
    (tmp_path / "out").touch()
    with pytest.raises(UsageError, match="exists and is not a directory"):
        outputs.check(tmp_path / "out", marker="mark")


def test_a_link_is_not_followed(tmp_path: Path) -> None:
    (tmp_path / "elsewhere").mkdir()
    (tmp_path / "out").symlink_to(tmp_path / "elsewhere")
    with pytest.raises(UsageError, match="exists and is not a directory"):
        outputs.check(tmp_path / "out", marker="mark")


def test_files_are_readable_as_the_umask_says(tmp_path: Path) -> None:
    before = os.umask(0o027)
    try:
        with outputs.directory(tmp_path / "out", marker="mark") as partial:
            (partial / "mark").touch(mode=0o600)
    finally:
        os.umask(before)
    assert (tmp_path / "out" / "mark").stat().st_mode & 0o777 == 0o640
    assert (tmp_path / "out").stat().st_mode & 0o777 == 0o750


def test_a_file_appears_at_the_end(tmp_path: Path) -> None:
    with outputs.file(tmp_path / "m.onnx") as partial:
        partial.write_text("new")
        assert not (tmp_path / "m.onnx").exists()
    assert (tmp_path / "m.onnx").read_text() == "new"
    assert os.listdir(tmp_path) == ["m.onnx"]


def test_a_file_that_fails_leaves_what_was_there(tmp_path: Path) -> None:
    (tmp_path / "m.onnx").write_text("old")
    with pytest.raises(KeyboardInterrupt), outputs.file(tmp_path / "m.onnx") as partial:  # noqa: PT012  the block is the subject
        partial.write_text("new")
        raise KeyboardInterrupt
    assert (tmp_path / "m.onnx").read_text() == "old"
    assert os.listdir(tmp_path) == ["m.onnx"]


def test_a_file_cannot_replace_a_directory(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="is a directory"), outputs.file(tmp_path):
        pass
