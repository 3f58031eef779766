"""onnxscript reads the source of its 500 operators again for each export, a third of what a small export takes. Here: once."""

from __future__ import annotations

import functools

from onnxscript._internal import values

traced = getattr(values, "TracedOnnxFunction", None)  # a private name: where a version lacks it, exports take longer, and nothing else
described = vars(traced).get("function_ir") if traced else None
if isinstance(described, property) and described.fget:
    traced.function_ir = property(functools.cache(described.fget))  # type: ignore[union-attr]
