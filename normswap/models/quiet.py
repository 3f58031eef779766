"""Silence around the code of other libraries: loading, tracing and exporting make them print, log and warn about themselves."""

from __future__ import annotations

import contextlib
import io
import logging
import warnings
from collections.abc import Iterator
from typing import TextIO

_ABOUT_TORCH: tuple[tuple[type[Warning], str], ...] = (
    (FutureWarning, r"`isinstance\(treespec, LeafSpec\)` is deprecated"),  # torch copies its own tree of the inputs
    (UserWarning, r"# The axis name: batch will not be used"),  # ... for a second input: it has the first one's
)


@contextlib.contextmanager
def quiet(*, show_warnings: bool = True, print_to: TextIO | None = None) -> Iterator[None]:
    """Nothing is logged in the block but errors, and what is printed, by a library or by the model, goes to `print_to`, or nowhere.

    Warnings show when the block ends, but for those of torch about itself; show_warnings=False drops them all.
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
