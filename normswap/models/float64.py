"""Run any model in float64, whatever it holds and whatever its code asks for."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Mapping
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.overrides import TorchFunctionMode


@contextlib.contextmanager
def in_float64(otherwise: torch.dtype = torch.float32) -> Iterator[None]:
    """Inside, every operation on floating tensors computes in float64, autocast is off and new tensors are float64.

    otherwise: the dtype that the model has outside, for what torch derives from it: the eps of an rms_norm that is given none.
    """
    before = torch.get_default_dtype()
    torch.set_default_dtype(torch.float64)
    try:
        with torch.autocast("cpu", enabled=False), _Float64(otherwise):
            yield
    finally:
        torch.set_default_dtype(before)


class _Float64(TorchFunctionMode):
    """Makes a model compute in float64, whatever it holds and whatever its code asks for.

    Each floating tensor is widened where an operation reads it, so no second set of weights exists; requests for a narrower dtype
    (`x.float()`, `dtype=torch.float32`) get float64. Tensors that an operation writes into are left as they are.
    """

    NARROW = frozenset({torch.float32, torch.float16, torch.bfloat16})
    CASTS = frozenset({Tensor.float, Tensor.half, Tensor.bfloat16})
    RMS_NORMS = frozenset({F.rms_norm, torch.rms_norm, torch.ops.aten.rms_norm.default})

    def __init__(self, otherwise: torch.dtype) -> None:
        super().__init__()
        self.eps = torch.finfo(torch.promote_types(otherwise, torch.float32)).eps  # half precision is widened to float32 there

    def _widen(self, value: Any) -> Any:
        if isinstance(value, Tensor):
            if value.is_complex():
                return value.to(torch.complex128)
            return value.double() if value.dtype in self.NARROW else value
        if isinstance(value, torch.dtype):
            return torch.float64 if value in self.NARROW else value
        if type(value) in (list, tuple):
            return type(value)(self._widen(v) for v in value)
        return value

    def __torch_function__(self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Mapping[str, Any] | None = None) -> Any:
        kwargs = kwargs or {}
        name = getattr(func, "__name__", "")
        if name == "__get__":  # an attribute: nothing is computed, but `weight.dtype` has to look as the operations will see it
            return self._widen_dtype(func(*args, **kwargs))
        if func in self.CASTS:
            func = Tensor.double
        if func in self.RMS_NORMS and (args[3] if len(args) > 3 else kwargs.get("eps")) is None:
            args, kwargs = args[:3], {**kwargs, "eps": self.eps}
        written = name in ("__setitem__", "__set__") or (name.endswith("_") and not name.endswith("__"))
        head = args[:1] if written else ()
        wide = (*head, *(self._widen(a) for a in args[len(head) :]))
        return func(*wide, **{k: v if k == "out" else self._widen(v) for k, v in kwargs.items()})

    def _widen_dtype(self, value: Any) -> Any:
        return torch.float64 if isinstance(value, torch.dtype) and value in self.NARROW else value
