"""Reads JSON files that may be malicious, within limits of size and depth."""

from __future__ import annotations

import errno
import json
import os
from pathlib import Path

LARGEST = 64 << 20  # largest size of a recipe or report in bytes; 10,000 layers take 5 MB


def read_json(path: Path) -> object:
    """The content of a JSON file. Raises OSError, or ValueError if it is not JSON, larger than LARGEST or nested too deeply."""
    if not path.is_file():  # reading a pipe would block
        raise FileNotFoundError(errno.ENOENT, os.strerror(errno.ENOENT), str(path))
    if path.stat().st_size > LARGEST:
        raise ValueError(f"it has {path.stat().st_size:,} bytes; expected {LARGEST:,} at most")
    try:
        content: object = json.loads(path.read_text(encoding="utf-8"))
    except RecursionError:
        raise ValueError("it is nested too deeply") from None
    return content
