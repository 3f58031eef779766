"""Outputs appear whole or not at all."""

from __future__ import annotations

import errno
import json
import os
from collections.abc import Callable
from pathlib import Path

import numpy as np
import onnx
import pytest
from safetensors import SafetensorError

from fixtures import hostile, sandbox
from normswap.errors import NormswapError, UsageError
from normswap.files import atomic, external_data

OLD, NEW = (json.dumps({"version": 1, "normswap": version}) for version in ("1", "2"))


def test_a_directory_appears_at_the_end(tmp_path: Path) -> None:
    with atomic.directory(tmp_path / "out") as partial:
        (partial / "recipe.json").write_text(NEW)
        assert not (tmp_path / "out").exists()
    assert (tmp_path / "out" / "recipe.json").read_text() == NEW
    assert os.listdir(tmp_path) == ["out"]


@pytest.mark.parametrize("stop", [RuntimeError, KeyboardInterrupt])
def test_a_directory_that_fails_leaves_what_was_there(tmp_path: Path, stop: type[BaseException]) -> None:
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "recipe.json").write_text(OLD)
    with pytest.raises(stop), atomic.directory(tmp_path / "out") as partial:  # noqa: PT012  the block is the subject
        (partial / "recipe.json").write_text(NEW)
        raise stop
    assert (tmp_path / "out" / "recipe.json").read_text() == OLD
    assert os.listdir(tmp_path) == ["out"]


def test_a_second_run_replaces_all_of_the_first(tmp_path: Path) -> None:
    for names in (("recipe.json", "model.pt"), ("recipe.json",)):
        with atomic.directory(tmp_path / "out") as partial:
            for name in names:
                (partial / name).write_text(OLD)
    assert os.listdir(tmp_path / "out") == ["recipe.json"]
    assert os.listdir(tmp_path) == ["out"]


def test_an_empty_directory_may_be_filled(tmp_path: Path) -> None:
    with atomic.directory(tmp_path) as partial:
        (partial / "recipe.json").touch()
    assert os.listdir(tmp_path) == ["recipe.json"]


def test_a_directory_of_somebody_else_is_refused(tmp_path: Path) -> None:
    (tmp_path / "thesis.tex").touch()
    with pytest.raises(UsageError, match=r"holds files that normswap did not write, and would be replaced: thesis\.tex"):
        atomic.check_output_dir(tmp_path)


@pytest.mark.parametrize("content", ["", "[]", "{}", '{"version": 1}', '{"version": 1, "versions": []}', '{"tests": 3, "passed": 3}'])
def test_a_report_of_somebody_else_is_refused(tmp_path: Path, content: str) -> None:
    """report.json is what many tools call theirs."""
    (tmp_path / "report.json").write_text(content)
    with pytest.raises(UsageError, match=r"would be replaced: report\.json"):
        atomic.check_output_dir(tmp_path)


def test_what_a_user_put_beside_our_files_is_not_deleted(tmp_path: Path) -> None:
    (tmp_path / "recipe.json").write_text(OLD)
    atomic.check_output_dir(tmp_path)
    (tmp_path / "finetuned.pt").touch()
    with pytest.raises(UsageError, match=r"would be replaced: finetuned\.pt"):
        atomic.check_output_dir(tmp_path)


def test_a_file_in_the_way_is_refused(tmp_path: Path) -> None:
    (tmp_path / "out").touch()
    with pytest.raises(UsageError, match="exists and is not a directory"):
        atomic.check_output_dir(tmp_path / "out")


def test_a_link_is_not_followed(tmp_path: Path) -> None:
    (tmp_path / "elsewhere").mkdir()
    (tmp_path / "out").symlink_to(tmp_path / "elsewhere")
    with pytest.raises(UsageError, match="exists and is not a directory"):
        atomic.check_output_dir(tmp_path / "out")


def test_files_are_readable_as_the_umask_says(tmp_path: Path) -> None:
    before = os.umask(0o027)
    try:
        with atomic.directory(tmp_path / "out") as partial:
            (partial / "recipe.json").touch(mode=0o600)
    finally:
        os.umask(before)
    assert (tmp_path / "out" / "recipe.json").stat().st_mode & 0o777 == 0o640
    assert (tmp_path / "out").stat().st_mode & 0o777 == 0o750


def test_a_file_appears_at_the_end(tmp_path: Path) -> None:
    with atomic.file(tmp_path / "m.onnx") as partial:
        partial.write_text(NEW)
        assert not (tmp_path / "m.onnx").exists()
    assert (tmp_path / "m.onnx").read_text() == NEW
    assert os.listdir(tmp_path) == ["m.onnx"]


def test_a_file_that_fails_leaves_what_was_there(tmp_path: Path) -> None:
    (tmp_path / "m.onnx").write_text(OLD)
    with pytest.raises(KeyboardInterrupt), atomic.file(tmp_path / "m.onnx") as partial:  # noqa: PT012  the block is the subject
        partial.write_text(NEW)
        raise KeyboardInterrupt
    assert (tmp_path / "m.onnx").read_text() == OLD
    assert os.listdir(tmp_path) == ["m.onnx"]


def test_a_file_cannot_replace_a_directory(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="is a directory"), atomic.file(tmp_path):
        pass


@pytest.mark.parametrize("there", [True, False])
def test_a_link_is_replaced_and_what_it_leads_to_is_not(there: bool, tmp_path: Path) -> None:
    target, link = tmp_path / "precious", tmp_path / "m.onnx"
    if there:
        target.write_text("years of work")
    link.symlink_to(target)
    with atomic.file(link) as partial:
        partial.write_text(NEW)
    assert not link.is_symlink()
    assert link.read_text() == NEW
    assert (target.read_text() == "years of work") if there else not target.exists()


def test_a_link_in_the_old_directory_is_not_followed(tmp_path: Path) -> None:
    (tmp_path / "elsewhere").mkdir()
    (tmp_path / "elsewhere" / "precious").touch()
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "recipe.json").write_text(OLD)
    (tmp_path / "out" / "model.pt").symlink_to(tmp_path / "elsewhere")
    with atomic.directory(tmp_path / "out") as partial:
        (partial / "recipe.json").write_text(NEW)
    assert os.listdir(tmp_path / "out") == ["recipe.json"]
    assert os.listdir(tmp_path / "elsewhere") == ["precious"]


# -- killed -------------------------------------------------------------------------------------------------------------------------------


def write(path: Path, content: str) -> None:
    with atomic.directory(path) as partial:
        for name in ("recipe.json", "model.pt", "model.safetensors"):
            (partial / name).write_text(content)


def whole(path: Path) -> set[str]:
    """What the files of the directory say: one thing, if it is whole."""
    files = {file.name: file.read_text() for file in path.iterdir()}
    assert files.keys() == {"recipe.json", "model.pt", "model.safetensors"}
    return set(files.values())


@pytest.mark.parametrize("in_one_step", [True, False])
def test_killed_at_any_step_a_directory_is_the_old_one_or_the_new(in_one_step: bool, tmp_path: Path) -> None:
    out, step, seen = tmp_path / "out", 1, set()

    def action() -> None:
        if not in_one_step:
            atomic._exchange = atomic._exchange_in_steps  # in a fork: as on a system that has no such step
        write(out, NEW)

    write(out, OLD)
    while sandbox.killed_at(step, action, tmp_path):
        atomic.recover(out)  # what loading and writing begin with
        (said,) = whole(out)
        seen.add(said)
        write(out, OLD)
        assert os.listdir(tmp_path) == ["out"]  # what a killed run left is taken away by the next
        step += 1
    assert step > 10
    assert seen == {OLD, NEW}
    assert whole(out) == {NEW}


def test_what_a_killed_run_put_aside_comes_back(tmp_path: Path) -> None:
    write(tmp_path / "out", OLD)
    (tmp_path / "out").rename(tmp_path / ".out.abcd1234.old")
    atomic.recover(tmp_path / "other")
    assert not (tmp_path / "out").exists()
    atomic.recover(tmp_path / "out")
    assert whole(tmp_path / "out") == {OLD}
    assert os.listdir(tmp_path) == ["out"]


def test_what_a_run_still_needs_is_not_taken_away(tmp_path: Path) -> None:
    (tmp_path / ".out.notours.partial").mkdir()
    with atomic.directory(tmp_path / "out") as first:
        (first / "recipe.json").write_text(OLD)
        write(tmp_path / "out", NEW)  # another run, meanwhile
        assert first.exists()
    assert (tmp_path / "out" / "recipe.json").read_text() == OLD  # the last to end
    assert sorted(os.listdir(tmp_path)) == [".out.notours.partial", "out"]


def test_many_runs_into_one_directory_at_once(tmp_path: Path) -> None:
    out = tmp_path / "out"
    write(out, OLD)
    runs = [sandbox.forked(lambda content=content: [write(out, content) for _ in range(40)]) for content in (OLD, NEW, f"{NEW} ")]
    said = set()
    for _ in range(300):
        files = {name: (out / name) for name in ("recipe.json", "model.pt")}
        said |= {file.read_text() for file in files.values()}  # there at every moment
    assert [sandbox.waited(run) for run in runs] == [0, 0, 0]
    assert len(whole(out)) == 1
    assert said <= {OLD, NEW, f"{NEW} "}
    assert os.listdir(tmp_path) == ["out"]


def test_a_file_that_comes_into_the_directory_meanwhile_is_not_deleted(tmp_path: Path) -> None:
    write(tmp_path / "out", OLD)
    with pytest.raises(UsageError, match=r"would be replaced: thesis\.tex"), atomic.directory(tmp_path / "out") as partial:  # noqa: PT012  the block is the subject
        (partial / "recipe.json").write_text(NEW)
        (tmp_path / "out" / "thesis.tex").write_text("years of work")
    assert (tmp_path / "out" / "thesis.tex").read_text() == "years of work"
    assert (tmp_path / "out" / "recipe.json").read_text() == OLD
    assert os.listdir(tmp_path) == ["out"]


# -- two files ----------------------------------------------------------------------------------------------------------------------------


def write_pair(path: Path, weight: float, data: str | None = None) -> None:
    """An ONNX file with its weights in a file beside it."""
    with atomic.file(path) as partial:
        name = data or f"{path.name}.data"
        (partial.parent / name).write_bytes(float_bytes(weight))
        partial.write_bytes(hostile.graph(weight=hostile.external(name)).SerializeToString())


def float_bytes(weight: float) -> bytes:
    return np.full((3, 3, 1, 1), weight, np.float32).tobytes()


def weight_of(path: Path) -> float:
    proto = onnx.load(path)
    return float(onnx.numpy_helper.to_array(next(t for t in proto.graph.initializer if t.name == "w")).mean())


def test_a_file_and_its_weights_are_replaced_together(tmp_path: Path) -> None:
    path = tmp_path / "m.onnx"
    for weight, data in ((1.5, "m.onnx.data"), (2.5, "m.onnx.1.data"), (3.5, "m.onnx.data"), (3.5, "m.onnx.data")):
        write_pair(path, weight)
        assert weight_of(path) == weight
        assert external_data.locations(path) == [data]  # the old pair was whole until the new one was
        assert sorted(os.listdir(tmp_path)) == sorted(["m.onnx", data])
    with atomic.file(path) as partial:
        partial.write_bytes(hostile.graph().SerializeToString())
    assert os.listdir(tmp_path) == ["m.onnx"]


def test_killed_at_any_step_a_pair_is_the_old_one_or_the_new(tmp_path: Path) -> None:
    path, step, seen = tmp_path / "m.onnx", 1, set()
    write_pair(path, 1.5)
    while sandbox.killed_at(step, lambda: write_pair(path, 2.5), tmp_path):
        seen.add(weight_of(path))
        write_pair(path, 1.5)
        step += 1
    assert step > 8
    assert seen == {1.5, 2.5}
    assert weight_of(path) == 2.5


def test_weights_of_another_file_are_not_overwritten(tmp_path: Path) -> None:
    write_pair(tmp_path / "a.onnx", 1.5, "weights.bin")
    write_pair(tmp_path / "b.onnx", 2.5, "weights.bin")
    assert (weight_of(tmp_path / "a.onnx"), weight_of(tmp_path / "b.onnx")) == (1.5, 2.5)
    assert external_data.locations(tmp_path / "b.onnx") == ["b.onnx.data"]
    write_pair(tmp_path / "c.onnx", 1.5, "weights.bin")  # the same bytes are no other weights
    assert external_data.locations(tmp_path / "c.onnx") == ["weights.bin"]


# -- what cannot be written ---------------------------------------------------------------------------------------------------------------

FULL: dict[str, tuple[Callable[[], Exception], str]] = {
    "Python": (lambda: OSError(errno.ENOSPC, os.strerror(errno.ENOSPC)), "No space left on device"),
    "torch": (
        lambda: RuntimeError("PytorchStreamWriter failed writing file data/0: file write failed\nmore"),
        "PytorchStreamWriter failed",
    ),
    "safetensors": (lambda: SafetensorError("Error while serializing: I/O error: No space left"), "Error while serializing"),
}


@pytest.mark.parametrize("who", FULL)
def test_a_full_disk_has_one_error_whoever_tells_it(who: str) -> None:
    make, text = FULL[who]
    with pytest.raises(NormswapError, match=rf"^model\.pt cannot be written: {text}") as caught, atomic.writing("model.pt"):
        raise make()
    assert caught.value.hint == "is there room on the disk, and may you write there?"
    assert "\n" not in caught.value.message
    with pytest.raises(UsageError, match=r"^other$"), atomic.writing("model.pt"):
        raise UsageError("other")


@pytest.mark.parametrize("parent", ["file", "nothing\0"])
def test_a_place_that_cannot_be(parent: str, tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    with pytest.raises((NormswapError, ValueError)), atomic.file(tmp_path / parent / "m.onnx"):
        pass
    assert os.listdir(tmp_path) == ["file"]
