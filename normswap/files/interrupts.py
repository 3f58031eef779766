"""Ctrl-C that cannot get lost.

Python raises KeyboardInterrupt wherever the program is at that moment. Where that is a destructor, a callback that C calls or somebody's
`except:`, nothing comes of it, and the work would go on to its end as if nobody had asked it to stop. So the command line remembers it.
"""

from __future__ import annotations

import contextlib
import signal
import threading
from collections.abc import Iterator
from types import FrameType

_interrupted = False


@contextlib.contextmanager
def remembered() -> Iterator[None]:
    """Once SIGINT has come, `check` raises KeyboardInterrupt in the block, and the block ends with one whatever it ended with.

    Where SIGINT is ignored, as in a shell's background, or handled by somebody else, or outside the main thread, it stays so.
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
    finally:  # also in place of another error: C++ makes a RuntimeError of a KeyboardInterrupt
        signal.signal(signal.SIGINT, signal.default_int_handler)
        try:
            check()
        finally:
            _interrupted = False


def check() -> None:
    """Raise KeyboardInterrupt if one was raised in the block of `remembered` and did not end it."""
    if _interrupted:
        raise KeyboardInterrupt
