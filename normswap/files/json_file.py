"""JSON files that somebody else may have made: read within limits, or refused."""

from __future__ import annotations

import errno
import json
import os
from pathlib import Path

LARGEST = 64 << 20  # bytes of a recipe or report; one of 10,000 layers has 5 MB


def read_json(path: Path) -> object:
    """What a file of JSON holds. Raises OSError, or ValueError for what is no JSON of a size and depth that we would have written."""
    if not path.is_file():  # a pipe would be waited for
        raise FileNotFoundError(errno.ENOENT, os.strerror(errno.ENOENT), str(path))
    if path.stat().st_size > LARGEST:
        raise ValueError(f"it has {path.stat().st_size:,} bytes; expected {LARGEST:,} at most")
    try:
        content: object = json.loads(path.read_text(encoding="utf-8"))
    except RecursionError:
        raise ValueError("it is nested too deeply") from None
    return content
