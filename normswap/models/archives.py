"""How much a zip archive unpacks to, asked before it is unpacked: a small file can hold any amount of zeros."""

from __future__ import annotations

import zipfile
from pathlib import Path

FREE = 1 << 30  # bytes that any archive may unpack to
RATIO = 64  # beyond that, times the size of the file: compressed numbers reach 10, zeros 1,000


def problem(path: Path) -> str | None:
    """What is wrong with the size of what is in the file; None if nothing is, or it is no zip archive."""
    try:
        with zipfile.ZipFile(path) as archive:
            unpacked = sum(entry.file_size for entry in archive.infolist())
    except (OSError, ValueError, EOFError, zipfile.BadZipFile, NotImplementedError, UnicodeError):
        return None  # no archive, or a damaged one: who reads it says so
    size = path.stat().st_size
    if unpacked > max(FREE, RATIO * size):
        return f"it unpacks to {unpacked:,} bytes, {unpacked // max(size, 1):,} times its own size"
    return None
