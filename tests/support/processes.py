"""Runs several processes at a time, and shows what they said if one fails."""

from __future__ import annotations

import os
import subprocess
from pathlib import Path
from typing import Any

REPOSITORY = Path(__file__).parents[2]


TIMEOUT = 240  # seconds, for all cases together


def run(commands: list[list[str]], **options: Any) -> None:
    """Run these at the same time. None is left behind, whatever happens."""
    environment = os.environ | {"PYTHONPATH": str(REPOSITORY), "OMP_NUM_THREADS": "1"}
    running = [subprocess.Popen(c, env=environment, stderr=subprocess.PIPE, text=True, **options) for c in commands]
    try:
        for process in running:
            _, errors = process.communicate(timeout=TIMEOUT)
            assert process.returncode == 0, errors
    finally:
        for process in running:
            process.kill()
            process.communicate()  # which closes its pipe
