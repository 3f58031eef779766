"""Runs a model in float64, whatever the dtype of its tensors and whatever dtypes its code asks for."""

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
    """A context in which operations on floating tensors compute in float64, autocast is off and new tensors are float64.

    otherwise: the model's own dtype, from which torch derives the eps of an rms_norm without one.
    """
    before = torch.get_default_dtype()
    torch.set_default_dtype(torch.float64)
    try:
        with torch.autocast("cpu", enabled=False), _Float64(otherwise):
            yield
    finally:
        torch.set_default_dtype(before)


class _Float64(TorchFunctionMode):
    """The function mode behind `in_float64`.

    It converts each floating tensor when an operation reads it, so there is no second set of weights. Requests for a narrower dtype
    (`x.float()`, `dtype=torch.float32`) get float64. Tensors that an operation writes into stay as they are.
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
        if name == "__get__":  # an attribute: nothing is computed, but `weight.dtype` has to be the dtype that operations will see
            return self._widen_dtype(func(*args, **kwargs))
        if func in self.CASTS:
            func = Tensor.double
        if func in self.RMS_NORMS and (args[3] if len(args) > 3 else kwargs.get("eps")) is None:
            args, kwargs = args[:3], {**kwargs, "eps": self.eps}
        written = name in ("__setitem__", "__set__") or (name.endswith("_") and not name.endswith("__"))
        head = args[:1] if written else ()
        widened = (*head, *(self._widen(a) for a in args[len(head) :]))
        return func(*widened, **{k: v if k == "out" else self._widen(v) for k, v in kwargs.items()})

    def _widen_dtype(self, value: Any) -> Any:
        return torch.float64 if isinstance(value, torch.dtype) and value in self.NARROW else value
