"""What torch.onnx.export builds anew for every export, and always the same, is built once for all tests: two thirds of a small export.

That is the table of ONNX functions for torch's operators, for which onnxscript reads the source code of 500 functions, and the listing of
torch's operators. Every export still gets a table of its own, as it adds the user's operators to it. Only tests do this: a command exports
once or twice. Where another torch has these private names elsewhere, the tests run as they would without, and take longer.
"""

from __future__ import annotations

import contextlib
import functools
import sys
from typing import Any

import torch

LIBRARIES = ("torchvision", "torch.ao.quantization.fx._decomposed")  # the table has their operators once they are imported


def _registry() -> None:
    from torch.onnx._internal.exporter._registration import ONNXRegistry

    build = ONNXRegistry.from_torchlib

    @functools.cache
    def built(imported: tuple[bool, ...], options: frozenset[tuple[str, Any]]) -> Any:
        return build(**dict(options))

    def from_torchlib(cls: type, **options: Any) -> Any:
        known = built(tuple(name in sys.modules for name in LIBRARIES), frozenset(options.items()))
        own = cls()
        vars(own).update(vars(known))
        own.functions = {target: list(functions) for target, functions in known.functions.items()}
        return own

    ONNXRegistry.from_torchlib = classmethod(from_torchlib)


def _listing() -> None:
    from torch._export import utils

    materialize, seen = utils._materialize_cpp_cia_ops, list[str]()

    def once() -> None:
        """torch makes every registered operator an attribute of torch.ops, about sixty times an export; one that is there stays there."""
        registered = torch._C._dispatch_get_registrations_for_dispatch_key("CompositeImplicitAutograd")
        if registered != seen:
            materialize()
            seen[:] = registered

    utils._materialize_cpp_cia_ops = once


for part in (_registry, _listing):
    with contextlib.suppress(ImportError, AttributeError):
        part()
