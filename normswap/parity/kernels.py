"""Operators that torch computes for onnx's evaluator, as the evaluator's own (Conv, pooling, Resize) are loops in Python and take minutes.

For variants that torch does not have (auto_pad, sizes that are rounded up, indices as outputs), the evaluator's own code runs.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

MAX_POOLS = {1: F.max_pool1d, 2: F.max_pool2d, 3: F.max_pool3d}
AVERAGES = {1: F.avg_pool1d, 2: F.avg_pool2d, 3: F.avg_pool3d}

Kernel = Callable[[Sequence[Any], Mapping[str, Any]], "Tensor | None"]


def tensor_of(array: Any) -> Tensor:
    """The array as a tensor, copied if torch would warn of it (not writeable) or refuse it (negative strides, be it along an axis of 1)."""
    given = np.asarray(array)
    if given.dtype.name == "bfloat16":  # of ml_dtypes, which torch does not know
        return tensor_of(given.view(np.int16)).view(torch.bfloat16)
    return torch.from_numpy(given if given.flags.writeable and min(given.strides, default=0) >= 0 else given.copy())


def array_of(tensor: Tensor) -> Any:
    """The tensor as an array, for onnx and onnxruntime. numpy itself has no bfloat16; that of ml_dtypes is the one that onnx knows."""
    if tensor.dtype is torch.bfloat16:
        import ml_dtypes

        return tensor.contiguous().view(torch.int16).numpy(force=True).view(ml_dtypes.bfloat16)
    return tensor.numpy(force=True)


def _by_axis(attributes: Mapping[str, Any], name: str, rank: int, otherwise: int) -> tuple[int, ...]:
    return tuple(attributes.get(name) or (otherwise,) * rank)


def _pads(attributes: Mapping[str, Any], rank: int) -> tuple[tuple[int, ...], tuple[int, ...]]:
    pads = _by_axis(attributes, "pads", 2 * rank, 0)
    return pads[:rank], pads[rank:]


def _padded(x: Tensor, attributes: Mapping[str, Any], value: float = 0.0) -> Tensor:
    begins, ends = _pads(attributes, x.dim() - 2)
    flat = [size for pair in zip(reversed(begins), reversed(ends), strict=True) for size in pair]
    return F.pad(x, flat, value=value) if any(flat) else x


def _is_plain(x: Any, attributes: Mapping[str, Any]) -> bool:
    named = attributes.get("auto_pad") not in (None, "NOTSET")
    negative = min(attributes.get("pads") or (0,)) < 0
    return x.ndim - 2 in MAX_POOLS and x.dtype.name in ("float32", "float64") and not (named or negative or attributes.get("ceil_mode"))


def _conv(inputs: Sequence[Any], attributes: Mapping[str, Any], *, transposed: bool = False) -> Tensor | None:
    x, w, b = (*inputs, None)[:3]
    if not _is_plain(x, attributes) or x.ndim != w.ndim or attributes.get("output_shape"):
        return None
    rank = x.ndim - 2
    strides, dilations, more = (
        _by_axis(attributes, name, rank, default) for name, default in (("strides", 1), ("dilations", 1), ("output_padding", 0))
    )
    if any(extra >= max(stride, dilation) for extra, stride, dilation in zip(more, strides, dilations, strict=True)):
        return None
    given = tensor_of(x) if transposed else _padded(tensor_of(x), attributes)
    bias, groups = None if b is None else tensor_of(b), attributes.get("group") or 1
    y = torch.convolution(given, tensor_of(w), bias, strides, (0,) * rank, dilations, transposed, more, groups)
    for axis, (begin, end) in enumerate(zip(*_pads(attributes, rank), strict=True), 2):
        y = y.narrow(axis, begin, y.shape[axis] - begin - end) if transposed else y
    return y


def _max_pool(inputs: Sequence[Any], attributes: Mapping[str, Any]) -> Tensor | None:
    (x,) = inputs
    up = bool(attributes.get("ceil_mode"))
    if not _is_plain(x, {**attributes, "ceil_mode": 0}):
        return None
    rank = x.ndim - 2
    strides, dilations = (_by_axis(attributes, name, rank, 1) for name in ("strides", "dilations"))
    padded = _padded(tensor_of(x), attributes, -torch.inf)
    y = MAX_POOLS[rank](padded, tuple(attributes["kernel_shape"]), stride=strides, dilation=dilations, ceil_mode=up)
    for axis, (begin, stride) in enumerate(zip(_pads(attributes, rank)[0], strides, strict=True), 2):
        # In ONNX no window starts in the padding at the end; torch, for which that padding is part of the input, may add one.
        y = y.narrow(axis, 0, min(y.shape[axis], -(-(x.shape[axis] + begin) // stride)))
    return y


def _average_pool(inputs: Sequence[Any], attributes: Mapping[str, Any]) -> Tensor | None:
    (x,) = inputs
    rank = x.ndim - 2
    if not _is_plain(x, attributes) or any(d != 1 for d in _by_axis(attributes, "dilations", rank, 1)):
        return None

    def mean(values: Tensor) -> Tensor:
        return AVERAGES[rank](
            _padded(values, attributes), tuple(attributes["kernel_shape"]), stride=_by_axis(attributes, "strides", rank, 1)
        )

    y = mean(tensor_of(x))
    whole = attributes.get("count_include_pad") or not any(attributes.get("pads") or ())
    return y if whole else y / mean(torch.ones(x.shape, dtype=y.dtype))


def _resize(inputs: Sequence[Any], attributes: Mapping[str, Any]) -> Tensor | None:
    """Resize by whole factors in mode "nearest", where all rounding modes agree: each value is repeated along each axis."""
    x, _, scales, sizes = (*inputs, None, None, None)[:4]
    way = attributes.get("coordinate_transformation_mode", "half_pixel"), attributes.get("nearest_mode", "round_prefer_floor")
    known = (("asymmetric", "floor"), ("half_pixel", "round_prefer_floor"), ("half_pixel", "round_prefer_ceil"))
    if attributes.get("mode", "nearest") != "nearest" or attributes.get("axes") is not None or way not in known:
        return None
    given = scales is not None and len(scales)
    wanted = list(scales) if given else [] if sizes is None else [b / a for a, b in zip(x.shape, sizes, strict=True)]
    if len(wanted) != x.ndim or any(s != int(s) or s < 1 for s in wanted):
        return None
    y = tensor_of(x)
    for axis, scale in enumerate(wanted):
        y = y.repeat_interleave(int(scale), axis)
    return y


# Activations in the dtype of their input. onnx's evaluator (1.23) computes an erf in float32, and has 1/6 and the like in float32.
_ACTIVATIONS: dict[str, Callable[..., Tensor]] = {
    "Erf": torch.erf,
    "Gelu": lambda x, approximate="none": F.gelu(x, approximate=approximate),
    "HardSwish": F.hardswish,
}


def _activation(name: str) -> type[Any]:
    from onnx.reference.op_run import OpRun

    def _run(self: Any, x: Any, **attributes: Any) -> Any:
        given = tensor_of(x)
        wide = given if given.dtype in (torch.float32, torch.float64) else given.float()
        return (array_of(_ACTIVATIONS[name](wide, **attributes).to(given.dtype)),)

    return type(name, (OpRun,), {"op_domain": "", "_run": _run})


@functools.cache
def kernels() -> tuple[type[Any], ...]:
    """Operator classes for the argument `new_ops` of onnx's evaluator."""
    from onnx.reference.ops import op_average_pool, op_conv, op_conv_transpose, op_max_pool, op_resize

    return (
        _operator("Conv", op_conv.Conv, _conv),
        _operator("ConvTranspose", op_conv_transpose.ConvTranspose, functools.partial(_conv, transposed=True)),
        _operator("MaxPool", op_max_pool.MaxPool, _max_pool),
        _operator("AveragePool", op_average_pool.AveragePool_19, _average_pool),
        _operator("Resize", op_resize.Resize, _resize),
        *map(_activation, _ACTIVATIONS),
    )


def _operator(name: str, base: Any, kernel: Kernel) -> type[Any]:
    def _run(self: Any, *inputs: Any, **attributes: Any) -> Any:
        y = kernel(inputs, attributes) if len(self.output) == 1 else None
        return base._run(self, *inputs, **attributes) if y is None else (y.numpy(),)

    return type(name, (base,), {"op_domain": "", "_run": _run})
