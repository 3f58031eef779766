"""Files and directories that appear under their names whole or not at all."""

from __future__ import annotations

import contextlib
import os
import shutil
import tempfile
from collections.abc import Iterator
from pathlib import Path

from normswap.errors import UsageError


def check(path: Path, *, marker: str) -> None:
    """Raise UsageError unless a directory may appear at `path`: it is free, empty, or was made by us (it holds a file called `marker`)."""
    if path.is_symlink() or (path.exists() and not path.is_dir()):
        raise UsageError(f"{path} exists and is not a directory", hint="choose another directory with -o")
    if path.is_dir() and any(path.iterdir()) and not (path / marker).exists():
        raise UsageError(f"{path} holds files that normswap did not write, and would be replaced", hint="choose another directory with -o")


@contextlib.contextmanager
def directory(path: Path, *, marker: str) -> Iterator[Path]:
    """A temporary directory beside `path` that takes its name when the block ends well, and is gone when it does not.

    What `path` held before is replaced, if `check` allows it.
    """
    check(path, marker=marker)
    path = Path(os.path.abspath(path))
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = Path(tempfile.mkdtemp(prefix=f".{path.name}.", suffix=".partial", dir=path.parent))
    try:
        partial.chmod(0o777 & ~_umask())  # mkdtemp makes it private
        yield partial
        for file in partial.iterdir():
            file.chmod(0o666 & ~_umask())  # safetensors makes its files private too
            _sync(file)
        _take_the_place_of(partial, path)
    finally:
        shutil.rmtree(partial, ignore_errors=True)


@contextlib.contextmanager
def file(path: Path) -> Iterator[Path]:
    """A temporary file beside `path` that takes its name when the block ends well, and is gone when it does not."""
    path = Path(os.path.abspath(path))
    if path.is_dir():
        raise UsageError(f"{path} is a directory; expected the name of a file to write")
    path.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(prefix=f".{path.name}.", suffix=".partial", dir=path.parent) as scratch:
        partial = Path(scratch) / path.name
        yield partial
        _sync(partial)
        os.replace(partial, path)


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
