"""Outputs appear whole or not at all."""

from __future__ import annotations

import json
import os
from pathlib import Path

import pytest

from normswap import outputs
from normswap.errors import UsageError

OLD, NEW = (json.dumps({"version": 1, "normswap": version}) for version in ("1", "2"))


def test_a_directory_appears_at_the_end(tmp_path: Path) -> None:
    with outputs.directory(tmp_path / "out") as partial:
        (partial / "recipe.json").write_text(NEW)
        assert not (tmp_path / "out").exists()
    assert (tmp_path / "out" / "recipe.json").read_text() == NEW
    assert os.listdir(tmp_path) == ["out"]


@pytest.mark.parametrize("stop", [RuntimeError, KeyboardInterrupt])
def test_a_directory_that_fails_leaves_what_was_there(tmp_path: Path, stop: type[BaseException]) -> None:
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "recipe.json").write_text(OLD)
    with pytest.raises(stop), outputs.directory(tmp_path / "out") as partial:  # noqa: PT012  the block is the subject
        (partial / "recipe.json").write_text(NEW)
        raise stop
    assert (tmp_path / "out" / "recipe.json").read_text() == OLD
    assert os.listdir(tmp_path) == ["out"]


def test_a_second_run_replaces_all_of_the_first(tmp_path: Path) -> None:
    for names in (("recipe.json", "model.pt"), ("recipe.json",)):
        with outputs.directory(tmp_path / "out") as partial:
            for name in names:
                (partial / name).write_text(OLD)
    assert os.listdir(tmp_path / "out") == ["recipe.json"]
    assert os.listdir(tmp_path) == ["out"]


def test_an_empty_directory_may_be_filled(tmp_path: Path) -> None:
    with outputs.directory(tmp_path) as partial:
        (partial / "recipe.json").touch()
    assert os.listdir(tmp_path) == ["recipe.json"]


def test_a_directory_of_somebody_else_is_refused(tmp_path: Path) -> None:
    (tmp_path / "thesis.tex").touch()
    with pytest.raises(UsageError, match=r"holds files that normswap did not write, and would be replaced: thesis\.tex"):
        outputs.check(tmp_path)


@pytest.mark.parametrize("content", ["", "[]", "{}", '{"version": 1}', '{"version": 1, "versions": []}', '{"tests": 3, "passed": 3}'])
def test_a_report_of_somebody_else_is_refused(tmp_path: Path, content: str) -> None:
    """report.json is what many tools call theirs."""
    (tmp_path / "report.json").write_text(content)
    with pytest.raises(UsageError, match=r"would be replaced: report\.json"):
        outputs.check(tmp_path)


def test_what_a_user_put_beside_our_files_is_not_deleted(tmp_path: Path) -> None:
    (tmp_path / "recipe.json").write_text(OLD)
    outputs.check(tmp_path)
    (tmp_path / "finetuned.pt").touch()
    with pytest.raises(UsageError, match=r"would be replaced: finetuned\.pt"):
        outputs.check(tmp_path)


def test_a_file_in_the_way_is_refused(tmp_path: Path) -> None:
    (tmp_path / "out").touch()
    with pytest.raises(UsageError, match="exists and is not a directory"):
        outputs.check(tmp_path / "out")


def test_a_link_is_not_followed(tmp_path: Path) -> None:
    (tmp_path / "elsewhere").mkdir()
    (tmp_path / "out").symlink_to(tmp_path / "elsewhere")
    with pytest.raises(UsageError, match="exists and is not a directory"):
        outputs.check(tmp_path / "out")


def test_files_are_readable_as_the_umask_says(tmp_path: Path) -> None:
    before = os.umask(0o027)
    try:
        with outputs.directory(tmp_path / "out") as partial:
            (partial / "recipe.json").touch(mode=0o600)
    finally:
        os.umask(before)
    assert (tmp_path / "out" / "recipe.json").stat().st_mode & 0o777 == 0o640
    assert (tmp_path / "out").stat().st_mode & 0o777 == 0o750


def test_a_file_appears_at_the_end(tmp_path: Path) -> None:
    with outputs.file(tmp_path / "m.onnx") as partial:
        partial.write_text(NEW)
        assert not (tmp_path / "m.onnx").exists()
    assert (tmp_path / "m.onnx").read_text() == NEW
    assert os.listdir(tmp_path) == ["m.onnx"]


def test_a_file_that_fails_leaves_what_was_there(tmp_path: Path) -> None:
    (tmp_path / "m.onnx").write_text(OLD)
    with pytest.raises(KeyboardInterrupt), outputs.file(tmp_path / "m.onnx") as partial:  # noqa: PT012  the block is the subject
        partial.write_text(NEW)
        raise KeyboardInterrupt
    assert (tmp_path / "m.onnx").read_text() == OLD
    assert os.listdir(tmp_path) == ["m.onnx"]


def test_a_file_cannot_replace_a_directory(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="is a directory"), outputs.file(tmp_path):
        pass
