"""Silence around the code of torch and onnxscript, which print and log about themselves."""

from __future__ import annotations

import contextlib
import io
import logging
import warnings
from collections.abc import Iterator

_TALKATIVE = ("torch.onnx", "torch.export", "torch.fx.experimental.symbolic_shapes", "onnxscript", "onnx_ir")
_KNOWN_WARNINGS: tuple[tuple[type[Warning], str], ...] = (
    (FutureWarning, r"`isinstance\(treespec, LeafSpec\)` is deprecated"),  # torch copies its own tree of the inputs
    (UserWarning, r"# The axis name: batch will not be used"),  # ... for a second input: it has the first one's
)


@contextlib.contextmanager
def quiet() -> Iterator[None]:
    """What torch prints and logs about its own code goes nowhere, and neither does what the model prints; warnings still show."""
    loggers = [logging.getLogger(name) for name in _TALKATIVE]
    levels = [logger.level for logger in loggers]
    nowhere = io.StringIO()
    with warnings.catch_warnings(record=True) as caught, contextlib.redirect_stdout(nowhere), contextlib.redirect_stderr(nowhere):
        for category, message in _KNOWN_WARNINGS:
            warnings.filterwarnings("ignore", message, category)
        try:
            for logger in loggers:
                logger.setLevel(logging.ERROR)
            yield
        finally:
            for logger, level in zip(loggers, levels, strict=True):
                logger.setLevel(level)
    for w in caught:
        warnings.showwarning(w.message, w.category, w.filename, w.lineno)
