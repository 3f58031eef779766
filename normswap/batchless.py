"""BatchlessNorm: normalization by learned statistics instead of those of the batch."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, cast

import torch
from torch import Tensor, nn

from normswap import numerics
from normswap.numerics import REDUCTIONS, STD_FORMS, Reduction, StdForm

PARAMETER_OF_FORM: Mapping[StdForm, str] = {"log": "log_std", "abs": "abs_std", "inv": "inv_std"}


@dataclass(frozen=True)
class Source:
    """What a BatchlessNorm was made from, apart from its tensors: enough to build the source layer again.

    cls         the source's class          eps      the constant that it adds to the variance
    attributes  its plain attributes, as found
    parameters, buffers   name -> dtype of its tensors
    """

    cls: type[nn.Module]
    eps: float
    attributes: Mapping[str, Any] = field(default_factory=dict)
    parameters: Mapping[str, torch.dtype] = field(default_factory=dict)
    buffers: Mapping[str, torch.dtype] = field(default_factory=dict)


def _shape(x: Tensor, sizes: Sequence[int], axes: tuple[int, ...]) -> tuple[int, ...]:
    """The shape that broadcasts `sizes` on `axes` against x. ValueError if x has not exactly these sizes there, or is not floating."""
    ndim = x.dim()
    if any(not -ndim <= axis < ndim or x.shape[axis] != size for axis, size in zip(axes, sizes, strict=True)):
        raise ValueError(
            f"BatchlessNorm has {' x '.join(map(str, sizes))} channels on axis {', '.join(map(str, axes))}, "
            f"but its input has the shape {tuple(x.shape)}"
        )
    if not x.is_floating_point():  # the result would be rounded to x's dtype
        raise ValueError(f"BatchlessNorm takes floating-point inputs, but its input is {x.dtype}")
    return numerics.axes_shape(sizes, axes, ndim)


def _affine(x: Tensor, scale: Tensor, shift: Tensor, axes: tuple[int, ...]) -> Tensor:
    shape = _shape(x, scale.shape, axes)
    # The statistics are float32 or wider, so half precision inputs are widened inside the operation (what is saved for backward is x
    # as it came) and the result is rounded once.
    return _laid_out(torch.addcmul(shift.view(shape), x, scale.view(shape)).to(x.dtype))


def _laid_out(y: Tensor) -> Tensor:
    """Contiguous, or channels last if it is that: what the layers of torch return, so that a `view` of their output goes on working."""
    if y.is_contiguous() or (y.dim() in (4, 5) and y.movedim(1, -1).is_contiguous()):
        return y
    return y.contiguous()


# A leaf for torch.fx: it looks at the input's shape, which a tracer cannot.
torch.fx.wrap("_affine")


class BatchlessNorm(nn.Module):
    r"""Normalize each channel by a learned mean and standard deviation.

        y = weight * (x - sg(mean)) / sg(std) + bias          sg: no gradient passes

    Train and eval mode compute the same function, and each sample's output depends on that sample alone. The task's loss trains
    weight and bias; `mean` and `std` are trained by the Gaussian negative log-likelihood of the input, `nll(x)`, whose gradient
    does not reach x.

    Args:
        num_features: the number of channels, or one size per channel axis.
        channel_axis: the axis, or ascending axes, of the input on which the channels lie. Default 1: (N, C, *space), any rank.
            Negative axes count from the end: -1 for (N, ..., C).
        shared_axes: those of the channel axes on which mean and std have size 1, shared by weights and biases that still differ.
        affine: whether there are weight and bias. Without them they are 1 and 0.
        std: how the standard deviation is stored: "log" (log_std; its curvature does not depend on the scale), "abs" (abs_std) or
            "inv" (inv_std). See `numerics.std_of`.
        reduction: of the NLL, "mean" over everything (the source's) or "sum" over channels.
        dtype: of the parameters, at least float32.

    Shape: x (N, C, *space) of any float dtype, C on `channel_axis`; y the same shape, dtype and memory format. Parameters: the sizes
    of the channel axes, and 1 on the shared ones for mean and std.

    Parameters stay in float32 when the model is moved to half precision, as a variance above 65504 is not a float16; the output
    has the input's dtype.

    Raises ValueError, when built, for an unknown `std` or `reduction` or wrong axes, and when called for a wrong shape.

    Source: Berger & Uc Cetina, "Batchless Normalization", arXiv:2212.14729.
    """

    mean: nn.Parameter
    weight: nn.Parameter | None
    bias: nn.Parameter | None
    own_rule: tuple[str, str | None] | None = None  # (kind, spec) of the rule that built it, if that is not one of normswap's

    def __init__(
        self,
        num_features: int | Sequence[int],
        *,
        channel_axis: int | Sequence[int] = 1,
        shared_axes: Sequence[int] = (),
        affine: bool = True,
        std: StdForm = "log",
        reduction: Reduction = "mean",
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        sizes = (num_features,) if isinstance(num_features, int) else tuple(num_features)
        axes = (channel_axis,) if isinstance(channel_axis, int) else tuple(channel_axis)
        if std not in STD_FORMS:
            raise ValueError(f"std is {std!r}; expected one of {', '.join(map(repr, STD_FORMS))}")
        if reduction not in REDUCTIONS:
            raise ValueError(f"reduction is {reduction!r}; expected one of {', '.join(map(repr, REDUCTIONS))}")
        if len(sizes) != len(axes) or any(size < 1 for size in sizes):
            raise ValueError(f"num_features {sizes} must give one positive size for each of the channel axes {axes}")
        if any((a < 0) == (b < 0) and a >= b for a, b in itertools.pairwise(axes)):
            raise ValueError(f"channel_axis {axes} must be distinct and ascending")
        if not set(shared_axes) <= set(axes):
            raise ValueError(f"shared_axes {tuple(shared_axes)} are not all channel axes; the channel axes are {axes}")
        self.num_features = num_features
        self.channel_axis = axes
        self.shared_axes = tuple(shared_axes)
        self.affine = affine
        self.std = std
        self.reduction = reduction
        self.source: Source | None = None
        like = {"device": device, "dtype": torch.promote_types(dtype or torch.get_default_dtype(), torch.float32)}
        shape = tuple(1 if axis in self.shared_axes else size for size, axis in zip(sizes, axes, strict=True))
        self.mean = nn.Parameter(torch.zeros(shape, **like))  # type: ignore[arg-type]
        self.register_parameter(PARAMETER_OF_FORM[std], nn.Parameter(numerics.parameter_of(torch.ones(shape, **like), std)))  # type: ignore[arg-type]
        self.register_parameter("weight", nn.Parameter(torch.ones(sizes, **like)) if affine else None)  # type: ignore[arg-type]
        self.register_parameter("bias", nn.Parameter(torch.zeros(sizes, **like)) if affine else None)  # type: ignore[arg-type]
        # What the source layer measured, so that `revert` can give back an untrained layer bit for bit. Part of the state dict, hence
        # of every checkpoint; never read by forward.
        self.register_buffer("source_mean", None)
        self.register_buffer("source_var", None)
        self.register_buffer("source_batches", None)

    @property
    def std_parameter(self) -> nn.Parameter:
        """The parameter that stores the standard deviation: `log_std`, `abs_std` or `inv_std`."""
        return cast(nn.Parameter, getattr(self, PARAMETER_OF_FORM[self.std]))

    def statistics(self, dtype: torch.dtype | None = None) -> tuple[Tensor, Tensor]:
        """(mean, std), differentiable, computed in `dtype` (None: as stored). Everything reads the statistics here and nowhere else."""
        mean, parameter = (self.mean, self.std_parameter) if dtype is None else (self.mean.to(dtype), self.std_parameter.to(dtype))
        return mean, numerics.std_of(parameter, self.std)

    def affine_map(self) -> tuple[Tensor, Tensor]:
        """(scale, shift) of the same map as y = x * scale + shift. The gradient reaches weight and bias only."""
        mean, std = self.statistics()
        return numerics.affine_of(mean.detach(), std.detach(), self.weight, self.bias)

    @torch.no_grad()
    def folded(self, ndim: int) -> tuple[Tensor, Tensor]:
        """`affine_map` computed in float64 and shaped to broadcast against an input with `ndim` dimensions."""
        # exp in float64: rounding it to float32 first is the largest error of the whole fold
        mean, std = self.statistics(torch.float64)
        weight, bias = (None if t is None else t.double() for t in (self.weight, self.bias))
        scale, shift = (t.expand(self.sizes) for t in numerics.affine_of(mean, std, weight, bias))
        shape = numerics.axes_shape(self.sizes, self.channel_axis, ndim)
        return scale.reshape(shape), shift.reshape(shape)

    @property
    def sizes(self) -> tuple[int, ...]:
        """The size of each channel axis."""
        return (self.num_features,) if isinstance(self.num_features, int) else tuple(self.num_features)

    def forward(self, input: Tensor) -> Tensor:
        scale, shift = self.affine_map()
        return _affine(input, scale.expand(self.sizes), shift.expand(self.sizes), self.channel_axis)

    def nll(self, x: Tensor, *, gauge: bool = True) -> Tensor:
        """The Gaussian NLL of x under the statistics, a scalar; the gradient reaches `mean` and the std's parameter, never x.

        See `numerics.gaussian_nll` for the formula.
        """
        _shape(x, self.sizes, self.channel_axis)
        shape = numerics.axes_shape(self.mean.shape, self.channel_axis, x.dim())
        mean, std = self.statistics()
        return numerics.gaussian_nll(x, mean.view(shape), std.view(shape), reduction=self.reduction, gauge=gauge)

    @torch.no_grad()
    def set_statistics(self, mean: Tensor, std: Tensor) -> None:
        """Store (mean, std), computed in float64 and rounded once. Shapes: that of `mean`."""
        self.mean.copy_(mean)
        self.std_parameter.copy_(numerics.parameter_of(std.double(), self.std))

    def extra_repr(self) -> str:
        shared = f", shared_axes={self.shared_axes}" if self.shared_axes else ""
        return f"{self.num_features}, channel_axis={self.channel_axis}{shared}, affine={self.affine}, std={self.std!r}"

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> BatchlessNorm:
        def keep_precision(tensor: Tensor) -> Tensor:
            moved = fn(tensor)
            if tensor.is_floating_point() and moved.is_floating_point() and moved.dtype.itemsize < min(4, tensor.dtype.itemsize):
                return tensor.to(moved.device, torch.float32 if tensor.dtype.itemsize > 4 else tensor.dtype)
            return moved

        # Children (a source layer's own activation) follow the model's dtype as ever; only these parameters do not.
        for child in self.children() if recurse else ():
            child._apply(fn)  # type: ignore[no-untyped-call]
        super()._apply(keep_precision, recurse=False)  # type: ignore[no-untyped-call]
        return self


class BatchlessNormAct(BatchlessNorm):
    """BatchlessNorm followed by the dropout and activation that the source layer applied itself (timm's norm-act layers).

        y = act(drop(norm(x)))

    `drop` and `act` are the source's own modules under the source's own names, so their state-dict keys stay.
    """

    drop: nn.Module
    act: nn.Module

    def forward(self, x: Tensor) -> Tensor:
        return cast(Tensor, self.act(self.drop(super().forward(x))))
