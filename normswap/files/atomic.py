"""Writes files and directories that appear under their names whole or not at all, and makes sure that Ctrl-C is not lost.

Whatever ends the program, even SIGKILL or a full disk: either the old content is still there, or the new one is there whole. So the old
directory is not moved away first: the new and the old one change names in one step of the file system.

    with directory(path) as partial: ...    write into the directory `partial`
    with file(path) as partial: ...         write the file `partial`, and what belongs to it beside it
"""

from __future__ import annotations

import contextlib
import ctypes
import errno
import filecmp
import os
import re
import shutil
import signal
import sys
import tempfile
import threading
from collections.abc import Iterator
from pathlib import Path
from types import FrameType

from normswap.errors import NormswapError, UsageError, first_line
from normswap.files import external_data
from normswap.files.json_file import read_json

# Every name that normswap writes into a directory. A directory with any other file is not replaced.
WRITTEN = frozenset(
    {"recipe.json", "report.json", "report.html", "model.safetensors", "model.pt", "model.pt2", "model.onnx", "model.onnx.data"}
)


def check_output_dir(path: Path) -> None:
    """Raise UsageError unless `path` may become a directory: it does not exist, is empty, or holds only files that normswap wrote."""
    path = Path(os.path.abspath(path))
    if path.is_symlink() or (path.exists() and not path.is_dir()):
        raise UsageError(f"{path} exists and is not a directory", hint="choose another directory with -o")
    others = _others(path) if path.is_dir() else []
    if others:
        what = ", ".join(others[:3]) + (" ..." if len(others) > 3 else "")
        raise UsageError(f"{path} holds files that normswap did not write, and would be replaced: {what}", hint="choose another directory")


def _others(path: Path) -> list[str]:
    """The entries of a directory that normswap did not write."""
    entries = sorted(entry.name for entry in path.iterdir())
    others = [name for name in entries if name not in WRITTEN]
    if not others and entries and not any(_names_normswap(path / name) for name in ("recipe.json", "report.json")):
        return entries
    return others


def _names_normswap(path: Path) -> bool:
    """Whether a recipe or report names the normswap that wrote it."""
    try:
        content = read_json(path)
    except (OSError, ValueError):
        return False
    return isinstance(content, dict) and "version" in content and ("normswap" in content or "normswap" in (content.get("versions") or ()))


@contextlib.contextmanager
def directory(path: Path) -> Iterator[Path]:
    """A temporary directory beside `path` that is renamed to `path` when the block ends, or removed if it raises.

    A directory at `path` is replaced, if `check_output_dir` allows it.
    """
    path = Path(os.path.abspath(path))
    recover(path)
    check_output_dir(path)
    with _scratch(path) as partial:
        partial.chmod(0o777 & ~_umask())  # mkdtemp makes private directories
        yield partial
        for file in partial.iterdir():
            _finish(file)
        _sync(partial)
        raise_if_interrupted()
        with _alone_in(path.parent):
            _take_the_place_of(partial, path)
            _sync(path.parent)


@contextlib.contextmanager
def file(path: Path) -> Iterator[Path]:
    """A temporary file beside `path` that is renamed to `path` when the block ends, or removed if it raises.

    Files that were written next to it (the external data of a large ONNX file) are moved, too, under another name if theirs is taken: two
    files cannot be replaced in one step, so the old pair stays whole until the new pair is.
    """
    path = Path(os.path.abspath(path))
    if path.is_dir():
        raise UsageError(f"{path} is a directory; expected the name of a file to write")
    with _scratch(path) as scratch:
        partial = scratch / path.name
        yield partial
        raise_if_interrupted()
        with _alone_in(path.parent):
            before = _data_of(path)
            _place_data(scratch, path)
            _finish(partial)
            os.replace(partial, path)
            _sync(path.parent)
            for name in before - _data_of(path):
                (path.parent / name).unlink(missing_ok=True)


@contextlib.contextmanager
def writing(name: str) -> Iterator[None]:
    """Turn any exception in the block into a NormswapError that names the file, as each library has its own type for a full disk."""
    try:
        yield
    except NormswapError:
        raise
    except Exception as error:
        why = error.strerror if isinstance(error, OSError) and error.strerror else first_line(error)
        raise NormswapError(f"{name} cannot be written: {why}", hint=_ROOM) from error


_ROOM = "is there room on the disk, and may you write there?"


# -- temporary directories -----------------------------------------------------------------------------------------------------------------


@contextlib.contextmanager
def _scratch(path: Path) -> Iterator[Path]:
    """A temporary directory beside `path`. Those that killed runs for the same path left are removed."""
    with writing(str(path)):
        path.parent.mkdir(parents=True, exist_ok=True)
        with _alone_in(path.parent):  # so that no other run removes this directory before it is locked
            _remove_left_over(path)
            partial = Path(tempfile.mkdtemp(prefix=f".{path.name}.", suffix=".partial", dir=path.parent))
            lock = _lock(partial)
    _scratch_dirs.add(partial)
    try:
        yield partial
    except OSError as error:
        if error.filename is None or partial not in Path(os.fsdecode(error.filename)).parents:
            raise
        with writing(Path(os.fsdecode(error.filename)).name):
            raise
    finally:
        shutil.rmtree(partial, ignore_errors=True)
        _unlock(lock)
        _scratch_dirs.discard(partial)


_scratch_dirs: set[Path] = set()  # the temporary directories of this process, which nobody else writes into


def _remove_left_over(path: Path) -> None:
    aside = _left_over(path, "old") if os.path.lexists(path) else []
    for entry in (*_left_over(path, "partial"), *aside):
        if (lock := _lock(entry)) is not None:
            shutil.rmtree(entry, ignore_errors=True)
            _unlock(lock)


def _left_over(path: Path, suffix: str) -> list[Path]:
    """The temporary directories beside `path` that were made for it."""
    name = re.compile(rf"\.{re.escape(path.name)}\.[a-z0-9_]{{8}}\.{suffix}")
    try:
        found = [entry for entry in path.parent.iterdir() if name.fullmatch(entry.name)]
    except OSError:
        return []
    return sorted(entry for entry in found if entry.is_dir() and not entry.is_symlink())


def _lock(directory: Path, *, wait: bool = False) -> int | None:
    """A lock on a directory, released when this process ends; None if another process has it, or the system has no such locks."""
    try:
        import fcntl

        opened = os.open(directory, os.O_RDONLY)
    except (ImportError, OSError):
        return None
    try:
        fcntl.flock(opened, fcntl.LOCK_EX | (0 if wait else fcntl.LOCK_NB))
    except OSError:
        os.close(opened)
        return None
    return opened


def _unlock(lock: int | None) -> None:
    if lock is not None:
        os.close(lock)


@contextlib.contextmanager
def _alone_in(directory: Path) -> Iterator[None]:
    """Lock a directory in the block, so that only one run at a time finishes in it. This run's temporary directories are locked already."""
    lock = None if directory in _scratch_dirs else _lock(directory, wait=True)
    try:
        yield
    finally:
        _unlock(lock)


def _finish(path: Path) -> None:
    """Give a file the permissions of the umask, and flush it to the disk."""
    path.chmod(0o666 & ~_umask())  # safetensors makes its files private
    _sync(path)


def _sync(path: Path) -> None:
    """Flush a file, or the names in a directory, to the disk; not every file system can do so for a directory, which is ignored."""
    is_directory = path.is_dir()
    try:
        opened = os.open(path, os.O_RDONLY)
        try:
            os.fsync(opened)
        finally:
            os.close(opened)
    except OSError:
        if not is_directory:
            raise


def _umask() -> int:
    mask = os.umask(0)
    os.umask(mask)
    return mask


# -- replacing a directory -----------------------------------------------------------------------------------------------------------------


def _take_the_place_of(new: Path, path: Path) -> None:
    """Rename `new` to `path`; a directory that had this name before is then called `new`."""
    try:
        os.rename(new, path)  # works if `path` does not exist, or is an empty directory
        return
    except OSError as error:
        if error.errno not in (errno.ENOTEMPTY, errno.EEXIST):
            raise
    _exchange(new, path)
    if others := _others(new):  # files were put there during this run
        _exchange(new, path)
        raise UsageError(
            f"{path} holds files that normswap did not write, and would be replaced: {others[0]}", hint="choose another directory"
        )


def _exchange(new: Path, path: Path) -> None:
    """Swap the names of two directories, in one step if the system can do that."""
    try:
        libc = ctypes.CDLL(None, use_errno=True)
        if sys.platform == "darwin":
            failed = libc.renamex_np(os.fsencode(new), os.fsencode(path), 2)  # RENAME_SWAP
        else:
            failed = libc.renameat2(-100, os.fsencode(new), -100, os.fsencode(path), 2)  # from AT_FDCWD, RENAME_EXCHANGE
        number = ctypes.get_errno() if failed else 0
    except (OSError, AttributeError, TypeError):  # no C library, or one without the function
        number = errno.ENOSYS
    if number in (errno.ENOSYS, errno.EINVAL, errno.ENOTSUP):
        _exchange_in_steps(new, path)
    elif number:
        raise OSError(number, os.strerror(number), str(path))


def _exchange_in_steps(new: Path, path: Path) -> None:
    """Swap the names of two directories in three steps. If the run is killed after the first, `recover` undoes it."""
    aside = new.with_suffix(".old")  # `new` has a unique name, so this one is free, too
    os.rename(path, aside)
    try:
        os.rename(new, path)
    except BaseException:
        os.rename(aside, path)
        raise
    os.rename(aside, new)


def recover(path: Path) -> None:
    """Restore the directory at `path` if a run was killed in `_exchange_in_steps`, on a system that cannot swap names in one step."""
    path = Path(os.path.abspath(path))
    if os.path.lexists(path):
        return
    for entry in _left_over(path, "old"):
        with _alone_in(path.parent):
            if not os.path.lexists(path):
                entry.rename(path)


# -- files beside a file -------------------------------------------------------------------------------------------------------------------


def _data_of(path: Path) -> set[str]:
    """The files beside the ONNX file at `path` that hold its weights and have a name that normswap gives."""
    name = re.compile(rf"{re.escape(path.name)}(\.\d+)?\.data")
    ours = {entry.name for entry in path.parent.iterdir() if name.fullmatch(entry.name)}
    if not ours or not path.is_file():
        return set()
    return ours & set(external_data.locations(path))


def _place_data(scratch: Path, path: Path) -> None:
    """Move the data files of the new file beside `path`, without replacing those of the old file, which is still there."""
    moved = {}
    written = sorted(entry.relative_to(scratch) for entry in scratch.rglob("*") if entry.is_file() and entry != scratch / path.name)
    for name in written:
        target = path.parent / name
        if target.is_file() and filecmp.cmp(scratch / name, target, shallow=False):
            continue
        number = 0
        while os.path.lexists(target):
            target = path.with_name(f"{path.name}{f'.{number}' if number else ''}.data")
            number += 1
        if target != path.parent / name:
            moved[str(name)] = target.name
        target.parent.mkdir(parents=True, exist_ok=True)
        _finish(scratch / name)
        os.rename(scratch / name, target)
    if moved:
        external_data.move(scratch / path.name, moved)


# -- interrupts ----------------------------------------------------------------------------------------------------------------------------

_interrupted = False


@contextlib.contextmanager
def remember_interrupts() -> Iterator[None]:
    """After a SIGINT in the block, `raise_if_interrupted` raises KeyboardInterrupt, and the block ends with one in any case.

    Python raises KeyboardInterrupt wherever the program is at that moment. In a destructor, in a callback from C or inside another
    library's `except:` the exception is lost, and the work would go on. So the command line remembers the signal. If SIGINT is ignored, as
    in a shell's background, or has another handler, or this is not the main thread, nothing is changed.
    """
    if threading.current_thread() is not threading.main_thread() or signal.getsignal(signal.SIGINT) is not signal.default_int_handler:
        yield
        return

    def remember(number: int, frame: FrameType | None) -> None:
        global _interrupted
        _interrupted = True
        signal.default_int_handler(number, frame)

    global _interrupted
    signal.signal(signal.SIGINT, remember)
    try:
        yield
    finally:  # also in place of another error, as C++ turns a KeyboardInterrupt into a RuntimeError
        signal.signal(signal.SIGINT, signal.default_int_handler)
        try:
            raise_if_interrupted()
        finally:
            _interrupted = False


def raise_if_interrupted() -> None:
    """Raise KeyboardInterrupt if a SIGINT came in the block of `remember_interrupts` and did not end it."""
    if _interrupted:
        raise KeyboardInterrupt
