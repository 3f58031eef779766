"""For every file, torch's ONNX exporter reads the source text of some 500 functions to make its table of translations: half of its time.

`import exporter_once` keeps that table, and does not walk through all operators again for every namespace where none was added. Both are
the same for every export of a process: what a call adds of its own goes into a copy. A torch without such functions is left as it is.
"""

from __future__ import annotations

import contextlib
import functools
from typing import Any


def _table_once() -> None:
    from torch.onnx._internal.exporter._registration import ONNXRegistry

    anew: Any = ONNXRegistry.from_torchlib.__func__  # type: ignore[attr-defined]

    @functools.cache
    def kept(*args: Any, **kwargs: Any) -> ONNXRegistry:
        return anew(ONNXRegistry, *args, **kwargs)  # type: ignore[no-any-return]

    def from_torchlib(cls: type[ONNXRegistry], *args: Any, **kwargs: Any) -> ONNXRegistry:
        table, copied = kept(*args, **kwargs), cls()
        vars(copied).update(vars(table), functions={target: list(found) for target, found in table.functions.items()})
        return copied

    ONNXRegistry.from_torchlib = classmethod(from_torchlib)  # type: ignore[assignment,method-assign]


def _operators_once() -> None:
    import torch
    import torch._export.utils as utils

    anew, seen = utils._materialize_cpp_cia_ops, list[list[str]]()

    def when_there_are_more() -> None:
        operators = torch._C._dispatch_get_registrations_for_dispatch_key("CompositeImplicitAutograd")
        if seen != [operators]:
            anew()
            seen[:] = [operators]

    utils._materialize_cpp_cia_ops = when_there_are_more


for once in (_table_once, _operators_once):
    with contextlib.suppress(ImportError, AttributeError):  # names of torch's own, which another version may lack
        once()
