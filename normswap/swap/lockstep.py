"""Forward passes that stop inside a module and go on later, so that a layer can be set from all data before any of them passes through it.

Each pass runs in a thread of its own, but never two at once: it runs while `resume` waits for it. So what a model keeps per thread (whether
gradients are on, autocast, function modes) is that of its own pass.
"""

from __future__ import annotations

import contextlib
import threading
from collections.abc import Callable
from typing import Any

import torch


class _Closed(BaseException):
    """Ends a pass that is not wanted any more. Not an Exception, so that no model catches it."""


class Pass:
    """One forward pass that can stop. `run` is called in the pass's own thread, without gradients."""

    def __init__(self, run: Callable[[], Any]) -> None:
        self._run = run
        self._go, self._stopped = threading.Semaphore(0), threading.Semaphore(0)
        self._value: Any = None
        self._error: BaseException | None = None
        self._closed = self._runs = False
        self._devices = torch.get_default_device(), torch.cuda.current_device() if torch.cuda.is_initialized() else None  # type: ignore[no-untyped-call]
        self._thread = threading.Thread(target=self._main, daemon=True)

    def resume(self) -> Any:
        """Go on until the next `stop`, and return what was given to it; None if the pass has ended. Raises what the model raised."""
        self._value, self._runs = None, True
        if self._thread.ident is None:
            self._thread.start()
        else:
            self._go.release()
        self._stopped.acquire()
        self._runs = False
        if self._error is not None:
            raise self._error
        return self._value

    def stop(self, value: Any) -> None:
        """Called inside the pass: hand `value` to `resume`, and wait for the next one."""
        if not self._closed:
            self._value = value
            self._stopped.release()
            self._go.acquire()
        if self._closed:
            raise _Closed

    def close(self) -> None:
        """End the pass where it stopped. One that still runs, as Ctrl-C came meanwhile, is not waited for: it ends where it would stop."""
        self._closed = True
        if self._thread.is_alive() and not self._runs:
            self._go.release()
            self._thread.join()

    def _main(self) -> None:
        default, cuda = self._devices  # of the thread that asked for the pass
        if cuda is not None:
            torch.cuda.set_device(cuda)
        try:
            with torch.no_grad(), torch.device(default) if default.type != "cpu" else contextlib.nullcontext():
                self._run()
        except _Closed:
            pass
        except BaseException as error:
            self._error = error
        finally:
            self._stopped.release()


class Passes:
    """Passes, and which of them a hook is called in."""

    def __init__(self) -> None:
        self.all: list[Pass] = []

    def add(self, run: Callable[[], Any]) -> Pass:
        """A new pass, which has not begun."""
        self.all.append(Pass(run))
        return self.all[-1]

    @property
    def current(self) -> Pass | None:
        """The pass of this thread."""
        here = threading.current_thread()
        return next((each for each in self.all if each._thread is here), None)

    def __enter__(self) -> Passes:
        return self

    def __exit__(self, *error: object) -> None:
        for each in self.all:
            each.close()
