"""What every test runs under: torchvision that imports, an exporter that starts fast, fixed seeds, one thread (as `-n 2` is worth more)."""

from __future__ import annotations

import os
import signal
from collections.abc import Iterator
from pathlib import Path

os.environ["OMP_NUM_THREADS"] = "1"  # in processes that tests start, too: two threads each, on cores in use, take ten times as long

import one_registry  # noqa: F401  before the first export
import pytest
import torch
import torchvision_shim  # noqa: F401  before anything imports torchvision
from warm import Warm

from normswap.models.watching import manual_seed


@pytest.fixture(autouse=True)
def _seeded() -> None:
    manual_seed(0)


@pytest.fixture(autouse=True, scope="session")
def _one_thread() -> None:
    torch.set_num_threads(1)
    torch.manual_seed(0)  # and for the accelerator, when a test first uses it


@pytest.fixture(scope="session")
def warm() -> Iterator[Warm]:
    with Warm() as warm:
        yield warm


@pytest.fixture
def repository() -> Path:
    return Path(__file__).parent.parent


# What the caller's environment says of terminals and of CI: tests read what a pipe is given, and pytest and rich write more or less, wide
# or coloured, where one of these is set. (`-n 2` sets COLUMNS for its workers; CI makes pytest's summary repeat whole messages.)
for name in (
    "COLUMNS",
    "LINES",
    "CI",
    "BUILD_NUMBER",
    "NO_COLOR",
    "FORCE_COLOR",
    "PY_COLORS",
    "TTY_COMPATIBLE",
    "TTY_INTERACTIVE",
    "PYTEST_ADDOPTS",
):
    os.environ.pop(name, None)

# A shell starts what runs in the background with Ctrl-C ignored, and every process that a test starts would inherit that.
signal.signal(signal.SIGINT, signal.default_int_handler)
