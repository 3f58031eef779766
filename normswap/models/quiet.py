"""Suppresses what other libraries print, log and warn of while a model is loaded, traced or exported."""

from __future__ import annotations

import contextlib
import io
import logging
import warnings
from collections.abc import Iterator
from typing import TextIO

_ABOUT_TORCH: tuple[tuple[type[Warning], str], ...] = (
    (FutureWarning, r"`isinstance\(treespec, LeafSpec\)` is deprecated"),  # raised when torch copies its own pytree spec
    (UserWarning, r"# The axis name: \w+ will not be used"),  # for a second input, which shares the axis of the first
    (RuntimeWarning, r"Guards may run slower on Python 3\.13\.0"),  # nothing that is traced here is run with guards
)


@contextlib.contextmanager
def quiet(*, show_warnings: bool = True, print_to: TextIO | None = None) -> Iterator[None]:
    """A context that logs only errors, and sends what a library or the model prints to `print_to`, or nowhere.

    Warnings are shown when the block ends, except those in _ABOUT_TORCH; show_warnings=False drops all of them.
    """
    target = print_to or io.StringIO()
    before = logging.root.manager.disable
    with warnings.catch_warnings(record=True) as caught, contextlib.redirect_stdout(target), contextlib.redirect_stderr(target):
        for category, message in _ABOUT_TORCH:
            warnings.filterwarnings("ignore", message, category)
        if not show_warnings:
            warnings.simplefilter("ignore")
        logging.disable(max(before, logging.WARNING))
        try:
            yield
        finally:
            logging.disable(before)
    for warning in caught:
        warnings.showwarning(warning.message, warning.category, warning.filename, warning.lineno)
