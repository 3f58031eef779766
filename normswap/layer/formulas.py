"""The formulas of Batchless normalization as functions of tensors, without modules or state. Imports nothing of normswap.

Symbols (shapes are those of the statistics, broadcast against x):

    x      the layer's input            mean, std      its population mean and standard deviation
    z      (x - mean) / std             p              the stored parameter of std
    C      the number of (mean, std) pairs

Source: Berger & Uc Cetina, "Batchless Normalization", arXiv:2212.14729.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Literal, NamedTuple, cast

import torch
from torch import Tensor

StdForm = Literal["log", "abs", "inv"]
STD_FORMS: tuple[StdForm, ...] = ("log", "abs", "inv")
Reduction = Literal["mean", "sum"]
REDUCTIONS: tuple[Reduction, ...] = ("mean", "sum")
Stats = Literal["natural", "raw"]
STATS: tuple[Stats, ...] = ("natural", "raw")

# Keeps `abs` and `inv` finite at p = 0. Small enough to vanish next to any std that float32 statistics produce.
TINY = 1e-12

# The largest part of a variance that one step of the statistics may take away. One batch takes no more at a momentum up to .9.
MOST = 0.9


def std_of(parameter: Tensor, form: StdForm) -> Tensor:
    """The standard deviation for a stored parameter p.

    log: std = exp(p)      abs: std = |p| + TINY      inv: std = 1 / (|p| + TINY)

    The paper stores `inv` without the absolute value, so a large step can flip the sign of the whole layer; here it cannot.
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


def applied(x: Tensor, scale: Tensor, shift: Tensor, factor: Tensor | None = None, bias: Tensor | None = None) -> Tensor:
    """x * scale + shift; with a factor f per sample, f (x * scale + shift - bias) + bias. All broadcast against x.

    The result has the dtype of x, and is contiguous, or channels last if that is its memory format.
    """
    if factor is not None:
        scale, shift = scale * factor, torch.lerp(torch.zeros_like(shift) if bias is None else bias, shift, factor)
    # The statistics are float32 or wider, so half precision inputs are widened inside the operation (what is saved for backward is x
    # as it came) and the result is rounded once.
    return laid_out(torch.addcmul(shift, x, scale).to(x.dtype))


def laid_out(y: Tensor) -> Tensor:
    """y, contiguous or channels last in memory as torch's layers return it, so that a `view` of the output goes on working."""
    if y.is_contiguous() or (y.dim() in (4, 5) and y.movedim(1, -1).is_contiguous()):
        return y
    return y.contiguous()


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

        L = mean_c(log std_c) + 1/2 mean(z^2)          reduction "mean": over batch, space and channels (the paper's)
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


def over(t: Tensor, axes: Sequence[int]) -> Tensor:
    """The sum of t over these axes, which keep the size 1; t itself if there are none (torch would sum over all)."""
    return t.sum(list(axes), keepdim=True) if axes else t


def wide(*tensors: Tensor) -> torch.dtype:
    """The widest dtype of the tensors, at least float32. (torch.promote_types would add an operator to an exported graph.)"""
    return torch.float64 if torch.float64 in {t.dtype for t in tensors} else torch.float32


Sums = tuple[Tensor, Tensor, Tensor | int]  # (sum of the deviations from mean, sum of their squares, their number: an int without a mask)


def sums(x: Tensor, mean: Tensor, mask: Tensor | None = None, *, kept: Sequence[int] = ()) -> Sums:
    """The sums of x - mean and of its square, and the number of its elements, over the axes on which `mean` has size 1 that are not `kept`.

    x: any shape, any float dtype. mean: as many dimensions as x, each of x's size or 1. mask: bool, likewise; x counts where it is True,
    and may be anything elsewhere, NaN included. The sums have the wider of the dtypes, at least float32, and size 1 on the axes that they
    are taken over.
    """
    axes = [axis for axis, size in enumerate(mean.shape) if size == 1 and axis not in kept]
    dtype = wide(x, mean)
    deviation = x.to(dtype) - mean.to(dtype)
    if mask is not None:
        deviation = torch.where(mask, deviation, 0)
    first, second = over(deviation, axes), over(deviation.square(), axes)
    if mask is None:
        return first, second, math.prod([x.shape[axis] for axis in axes])
    return first, second, over(mask.expand(x.shape), axes).to(dtype)


def at_least_one(number: Tensor | int) -> Tensor | int:
    """max(number, 1); for an int without a comparison in Python, as it may be a symbolic size of a traced graph."""
    return number.clamp(min=1) if isinstance(number, Tensor) else cast(int, torch.sym_max(number, 1))  # type: ignore[no-untyped-call]


def at_most_one(number: Tensor | int) -> Tensor | int:
    """min(number, 1): 1, or 0 where nothing counts. Without a comparison in Python, too."""
    return number.clamp(max=1) if isinstance(number, Tensor) else cast(int, torch.sym_min(number, 1))  # type: ignore[no-untyped-call]


class Misfit(NamedTuple):
    """How far an input x is from N(mean, std^2):  d = m - mean,  r = S / std^2 - 1  and  f = eps / std^2.

    m = mean(x) and S = mean((x - mean)^2). d = r = f = 0 where nothing counts, as if the fit were right.
    """

    d: Tensor
    r: Tensor
    f: Tensor


def misfit(moments: Sums, std: Tensor, *, eps: float = 0.0) -> Misfit:
    """The misfit of an input x, from its `sums` and in their shape. std broadcasts against them.

    Everything is measured from `mean`, so that nothing cancels where |mean| is much larger than std.
    """
    first, second, number = moments
    inverse = std.to(first.dtype).square().reciprocal()
    some, number = at_most_one(number), at_least_one(number)
    return Misfit(first / number, second * inverse / number - some, eps * some * inverse)


def gaussian_nll_of(r: Tensor, *, reduction: Reduction = "mean") -> Tensor:
    """`gaussian_nll` with gauge, from r of the input's `Misfit`: mean_c(r) / 2, or the sum. A scalar."""
    return (r.sum() if reduction == "sum" else r.mean()) / 2


def times(t: Tensor, factor: float | Tensor) -> Tensor:
    """factor t, without an operator for a factor of 1: on tensors as small as these, the number of operators decides the time."""
    return t if isinstance(factor, (int, float)) and factor == 1 else t * factor


def slope_of_log(parameter: Tensor, form: StdForm) -> Tensor | float:
    """dp/dlog std of the stored parameter, never 0:   log: 1     abs: sign(p) std     inv: -sign(p) / std     with sign(0) = 1."""
    if form == "log":
        return 1.0
    size = parameter.abs() + TINY
    return torch.where(parameter < 0, -size, size) * (1 if form == "abs" else -1)


def nll_gradients(
    misfit: Misfit, std: Tensor, parameter: Tensor, form: StdForm, *, stats: Stats, reduction: Reduction = "mean"
) -> tuple[Tensor, Tensor]:
    """The gradients of the NLL by mean and by the std's parameter p, for an input x with the misfit (d, r, f).

        raw       -d / std^2            -r / (dp/dlog std)             times 1/C if the reduction is "mean"
        natural   -d                    -(r + f)/2 (dp/dlog std)       whatever the reduction

    natural is the raw one times the inverse of the Fisher information of (mean, log std), which is (1/std^2, 2) per channel. With f, the
    variance tends to S + eps instead of S, as BatchNorm's does, so that a channel that never varies keeps a std. A step of plain SGD at the
    rate a is to first order BatchNorm's running average with momentum a:  mean += a (m - mean),  log std += a/2 ((S + eps)/std^2 - 1).
    `natural_step` is that average exactly. All shapes alike.
    """
    d, r, f = misfit
    slope = slope_of_log(parameter, form)
    if stats == "natural":
        return -d, times((r + f) / -2, slope)
    share = 1 / std.numel() if reduction == "mean" else 1.0
    return -d / std.square() * share, -r / slope * share


def misfit_of(
    gradients: tuple[Tensor, Tensor], f: Tensor, std: Tensor, parameter: Tensor, form: StdForm, *, stats: Stats, reduction: Reduction
) -> tuple[Tensor, Tensor]:
    """(d, r) of the `Misfit` that has these gradients by mean and by p: the inverse of `nll_gradients`. All shapes alike."""
    by_mean, by_parameter = gradients
    slope = slope_of_log(parameter, form)
    if stats == "natural":
        return -by_mean, by_parameter * (-2 / slope) - f
    share = 1 / std.numel() if reduction == "mean" else 1.0
    return -by_mean * std.square() / share, -by_parameter * slope / share


def natural_step(
    mean: Tensor, parameter: Tensor, by_mean: Tensor | None, by_parameter: Tensor | None, form: StdForm, rate: float
) -> tuple[Tensor, Tensor]:
    """(mean, p) after one step against natural gradients: exactly BatchNorm's running averages with momentum `rate`.

        mean  <- mean - rate by_mean                         = (1 - rate) mean  + rate m
        std^2 <- std^2 (1 - 2 rate by_log)                   = (1 - rate) std^2 + rate (S + eps)    by_log = by_parameter / (dp/dlog std)

    log std -= rate by_log, which is the second line to first order, overshoots exponentially where S is far above std^2. A sum of gradients
    (two calls before one step) shrinks the variance at most to 1 - MOST of itself. A statistic whose gradient is None does not step.
    """
    if by_mean is not None:
        mean = mean - rate * by_mean
    if by_parameter is not None:
        growth = torch.log1p((by_parameter * (-2 * rate / slope_of_log(parameter, form))).clamp(min=-MOST)) / 2
        parameter = parameter + growth if form == "log" else parameter * (growth if form == "abs" else -growth).exp()
    return mean, parameter
