"""Files and directories that appear under their names whole or not at all."""

from __future__ import annotations

import contextlib
import json
import os
import shutil
import tempfile
from collections.abc import Iterator
from pathlib import Path

from normswap import interrupts
from normswap.errors import UsageError

# Every name that is ever written into a directory. One that holds anything else is somebody's.
OURS = frozenset(
    {"recipe.json", "report.json", "report.html", "model.safetensors", "model.pt", "model.pt2", "model.onnx", "model.onnx.data"}
)


def check(path: Path) -> None:
    """Raise UsageError unless a directory may appear at `path`: nothing is there, or it is empty, or it holds what we wrote and no more."""
    path = Path(os.path.abspath(path))
    if path.is_symlink() or (path.exists() and not path.is_dir()):
        raise UsageError(f"{path} exists and is not a directory", hint="choose another directory with -o")
    entries = sorted(entry.name for entry in path.iterdir()) if path.is_dir() else []
    others = [name for name in entries if name not in OURS]
    if entries and (others or not any(_says_so(path / name) for name in ("recipe.json", "report.json"))):
        what = ", ".join((others or entries)[:3]) + (" ..." if len(others or entries) > 3 else "")
        raise UsageError(f"{path} holds files that normswap did not write, and would be replaced: {what}", hint="choose another directory")


def _says_so(path: Path) -> bool:
    """Whether a recipe or report names the normswap that wrote it."""
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return False
    return isinstance(content, dict) and "version" in content and ("normswap" in content or "normswap" in (content.get("versions") or ()))


@contextlib.contextmanager
def directory(path: Path) -> Iterator[Path]:
    """A temporary directory beside `path` that takes its name when the block ends well, and is gone when it does not.

    What `path` held before is replaced, if `check` allows it.
    """
    check(path)
    path = Path(os.path.abspath(path))
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = Path(tempfile.mkdtemp(prefix=f".{path.name}.", suffix=".partial", dir=path.parent))
    try:
        partial.chmod(0o777 & ~_umask())  # mkdtemp makes it private
        yield partial
        for file in partial.iterdir():
            file.chmod(0o666 & ~_umask())  # safetensors makes its files private too
            _sync(file)
        interrupts.check()
        _take_the_place_of(partial, path)
    finally:
        shutil.rmtree(partial, ignore_errors=True)


@contextlib.contextmanager
def file(path: Path) -> Iterator[Path]:
    """A temporary file beside `path` that takes its name when the block ends well, and is gone when it does not.

    Files that were written next to it (the external data of a large ONNX file) come along.
    """
    path = Path(os.path.abspath(path))
    if path.is_dir():
        raise UsageError(f"{path} is a directory; expected the name of a file to write")
    path.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(prefix=f".{path.name}.", suffix=".partial", dir=path.parent) as scratch:
        partial = Path(scratch) / path.name
        yield partial
        interrupts.check()
        for written in sorted(Path(scratch).iterdir(), key=lambda file: file == partial):  # what it refers to first, itself last
            _sync(written)
            os.replace(written, path.parent / written.name)


def _sync(path: Path) -> None:
    with path.open("rb") as opened:
        os.fsync(opened.fileno())


def _take_the_place_of(new: Path, path: Path) -> None:
    if not path.exists():
        os.rename(new, path)
        return
    aside = new.with_suffix(".old")  # `new` has a name of its own, so this one is free too
    try:
        os.rename(path, aside)
        os.rename(new, path)
    except BaseException:
        if aside.exists() and not path.exists():
            os.rename(aside, path)
        raise
    finally:
        shutil.rmtree(aside, ignore_errors=True)


def _umask() -> int:
    mask = os.umask(0)
    os.umask(mask)
    return mask
