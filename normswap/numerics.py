"""Pure tensor maths of Batchless normalization: no modules, no state, nothing of ours imported.

Symbols (shapes are those of the statistics, broadcast against x):

    x      the layer's input            mean, std      its population mean and standard deviation
    z      (x - mean) / std             p              the stored parameter of std
    C      the number of (mean, std) pairs

Source: Berger & Uc Cetina, "Batchless Normalization", arXiv:2212.14729.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal

import torch
from torch import Tensor

StdForm = Literal["log", "abs", "inv"]
STD_FORMS: tuple[StdForm, ...] = ("log", "abs", "inv")
Reduction = Literal["mean", "sum"]
REDUCTIONS: tuple[Reduction, ...] = ("mean", "sum")

# Keeps `abs` and `inv` finite at p = 0. Small enough to vanish next to any std that float32 statistics produce.
TINY = 1e-12


def std_of(parameter: Tensor, form: StdForm) -> Tensor:
    """The standard deviation that a stored parameter stands for.

    log: std = exp(p)      abs: std = |p| + TINY      inv: std = 1 / (|p| + TINY)

    The source stores `inv` without the absolute value, so a large step can flip the sign of the whole layer; here it cannot.
    """
    if form == "log":
        return parameter.exp()
    if form == "abs":
        return parameter.abs() + TINY
    return 1 / (parameter.abs() + TINY)


def parameter_of(std: Tensor, form: StdForm) -> Tensor:
    """The parameter that stores `std`: the inverse of `std_of` for p >= 0."""
    if form == "log":
        return std.log()
    if form == "abs":
        return std - TINY
    return 1 / std - TINY


def std_of_variance(variance: Tensor, eps: float) -> Tensor:
    """sqrt(variance + eps) in float64: the std with which BatchNorm in eval mode divides."""
    return (variance.double() + eps).sqrt()


def variance_of_std(std: Tensor, eps: float) -> tuple[Tensor, float]:
    """(variance, eps) in float64 with sqrt(variance + eps) = std and variance >= 0.

    If some std^2 is below eps, no variance >= 0 fits it; then eps becomes 0 for all of them.
    """
    square = std.double().square()
    if bool((square < eps).any()):
        return square, 0.0
    return square - eps, eps


def affine_of(mean: Tensor, std: Tensor, weight: Tensor | None, bias: Tensor | None) -> tuple[Tensor, Tensor]:
    """(scale, shift) with  weight * (x - mean) / std + bias = x * scale + shift."""
    scale = 1 / std if weight is None else weight / std
    shift = -mean * scale if bias is None else bias - mean * scale
    return scale, shift


def affine_under(scale: Tensor, shift: Tensor, mean: Tensor, std: Tensor) -> tuple[Tensor, Tensor]:
    """(weight, bias) with  weight * (x - mean) / std + bias = x * scale + shift: the inverse of `affine_of`.

    Of a layer (mean0, std0, weight0, bias0) whose statistics become (mean, std) and whose function stays, these are
    weight = weight0 * std / std0  and  bias = bias0 + (mean - mean0) * weight0 / std0.
    """
    return scale * std, shift + mean * scale


def axes_shape(sizes: Sequence[int], axes: Sequence[int], ndim: int) -> tuple[int, ...]:
    """The shape with `ndim` dimensions that has `sizes` on `axes` (ascending, negative from the end) and 1 elsewhere."""
    positions = [axis + ndim if axis < 0 else axis for axis in axes]
    if positions != sorted(set(positions)) or (positions and not 0 <= positions[0] <= positions[-1] < ndim):
        raise ValueError(f"axes {tuple(axes)} are not distinct ascending axes of a {ndim}-dimensional tensor")
    shape = [1] * ndim
    for position, size in zip(positions, sizes, strict=True):
        shape[position] = size
    return tuple(shape)


def gaussian_nll(x: Tensor, mean: Tensor, std: Tensor, *, reduction: Reduction = "mean", gauge: bool = True) -> Tensor:
    """The negative log-likelihood of x under N(mean, std^2) per channel, without log(2 pi)/2; a scalar.

        L = mean_c(log std_c) + 1/2 mean(z^2)          reduction "mean": over batch, space and channels (the source's)
        "sum": C times that, so that a channel's gradient does not shrink with the number of channels
        gauge: minus sg(mean_c(log std_c)) + 1/2       no effect on any gradient; L = 0 in expectation when the fit is right

    The gradient reaches mean and std, never x:   dL/dmean = -(m - mean) / (C std^2),  dL/dlog std = (1 - S/std^2) / C
    with m = mean(x) and S = mean((x - mean)^2) over batch and space.

    x: any shape, any float dtype; mean, std: broadcastable to it, with size 1 on the axes that share them. The result has the widest
    of the dtypes, at least float32. Of an empty x (a Poisson-sampled batch may be one) L and its gradients are 0.
    """
    if x.numel() == 0:
        return 0 * (mean.sum() + std.sum())
    dtype = torch.promote_types(torch.promote_types(x.dtype, std.dtype), torch.float32)
    z = (x.detach().to(dtype) - mean) / std
    log_std = std.to(dtype).log().mean()
    loss = log_std + z.square().mean() / 2
    if gauge:
        loss = loss - log_std.detach() - 0.5
    return loss * std.numel() if reduction == "sum" else loss
