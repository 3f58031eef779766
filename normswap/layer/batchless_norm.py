"""BatchlessNorm, the layer: it normalizes by a learned mean and standard deviation instead of those of the batch."""

from __future__ import annotations

import functools
import itertools
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal, NamedTuple, cast

import torch
from torch import Tensor, nn

from normswap.errors import UsageError
from normswap.layer import coupling, following, formulas, gradient_trend, hooks, optimizer_step, pair, sample_limit, train_pass, vectors
from normswap.layer.coupling import Coupled, Snapshot
from normswap.layer.export_operator import in_graph
from normswap.layer.formulas import REDUCTIONS, STATS, STD_FORMS, Misfit, Reduction, Stats, StdForm
from normswap.layer.fsdp import is_part
from normswap.layer.gradient_trend import TrendTerm
from normswap.layer.producer import inputs_of, outputs_of
from normswap.layer.run import Run, Term, check_precision, records_term, refuse_replicas, watch_passes
from normswap.layer.sample_limit import Limit
from normswap.layer.train_pass import Given
from normswap.layer.vectors import Options

Aux = Literal["auto", "explicit", "none"]
AUXES: tuple[Aux, ...] = ("auto", "explicit", "none")
KNOWN = 10**9  # where `BatchlessNorm.steps` starts if the input mean was measured from data; otherwise at 0
MOMENTUM, EPS = 0.1, 1e-5  # BatchNorm's own defaults, for a layer that was not made from one
PARAMETER_OF_FORM: Mapping[StdForm, str] = {"log": "log_std", "abs": "abs_std", "inv": "inv_std"}


@dataclass(frozen=True)
class Source:
    """The layer that a BatchlessNorm was made from, without its tensors: enough to build that layer again.

    cls         the source's class          eps      the constant that it adds to the variance
    attributes  its plain attributes
    parameters, buffers   name -> dtype of its tensors
    """

    cls: type[nn.Module]
    eps: float
    attributes: Mapping[str, Any] = field(default_factory=dict)
    parameters: Mapping[str, torch.dtype] = field(default_factory=dict)
    buffers: Mapping[str, torch.dtype] = field(default_factory=dict)


def _shape(x: Tensor, sizes: Sequence[int], axes: tuple[int, ...]) -> tuple[int, ...]:
    """The shape with `sizes` on `axes` and 1 elsewhere. Raises ValueError if x has other sizes on these axes, or is not floating-point."""
    ndim = x.dim()
    if any(not -ndim <= axis < ndim or x.shape[axis] != size for axis, size in zip(axes, sizes, strict=True)):
        raise ValueError(
            f"BatchlessNorm has {' x '.join(map(str, sizes))} channels on axis {', '.join(map(str, axes))}, "
            f"but its input has the shape {tuple(x.shape)}"
        )
    if not x.is_floating_point():  # the result would be rounded to x's dtype
        raise ValueError(f"BatchlessNorm takes floating-point inputs, but its input is {x.dtype}")
    return formulas.axes_shape(sizes, axes, ndim)


INSTANCE_NORMS = (nn.InstanceNorm1d, nn.InstanceNorm2d, nn.InstanceNorm3d)


def _unbatched(cls: type[nn.Module]) -> int:
    """The rank of a single sample, without a batch, which this InstanceNorm takes as well."""
    return next(rank for rank, base in enumerate(INSTANCE_NORMS, 2) if issubclass(cls, base))


def _affine(x: Tensor, scale: Tensor, shift: Tensor, axes: tuple[int, ...]) -> Tensor:
    """x * scale + shift, where scale and shift have the sizes of x on `axes`."""
    shape = _shape(x, scale.shape, axes)
    return formulas.applied(x, scale.view(shape), shift.view(shape))


class Settings(NamedTuple):
    """The settings of a layer that its forward pass in train mode reads: how it normalizes, and how its statistics learn.

    sizes, axes   of the channels, as in `BatchlessNorm.sizes` and `channel_axis`
    rate          the momentum            eps   what the source layer adds to the variance
    share         what the NLL's gradient of this call is multiplied by
    """

    sizes: tuple[int, ...]
    axes: tuple[int, ...]
    form: StdForm
    stats: Stats
    reduction: Reduction
    rate: float
    eps: float
    share: float


class Training(NamedTuple):
    """What a forward pass in train mode does besides normalizing. A field is None where it does not apply.

    statistics   (mean, the std's parameter), if the NLL gives them a gradient
    given        the input mean and its gradient, if the layer is coupled
    mask, scale  which positions of the input count, and what the loss is multiplied by, see `run.Run`
    coupled      the producer, if the gradient passes through its weight and bias
    misfit       the `Misfit` of the input, if it was computed already
    trend        the term that is taken out of the gradient
    limit        the factor of each sample; samples: the axes of the input that have one factor per index
    """

    statistics: tuple[Tensor, Tensor] | None = None
    given: Given = ()
    mask: Tensor | None = None
    scale: Tensor | None = None
    coupled: Coupled | None = None
    misfit: Misfit | None = None
    trend: TrendTerm | None = None
    limit: Limit | None = None
    samples: tuple[int, ...] = ()


def _nll(
    x: Tensor, mean: Tensor, std: Tensor, parameter: Tensor, mask: Tensor | None, settings: Settings, misfit: Misfit | None = None
) -> tuple[Tensor, tuple[Tensor, Tensor]]:
    """(r of the `Misfit` of x, the gradients of the NLL of x by mean and by the std's parameter), detached, in the parameters' shapes.

    misfit: the `Misfit` of x, if it was computed already.
    """
    axes = settings.axes
    _shape(x, settings.sizes, axes)
    shape = formulas.axes_shape(mean.shape, axes, x.dim())
    mean, std, parameter = (t.detach().view(shape) for t in (mean, std, parameter))
    if misfit is None:
        counted = None if mask is None else _mask_of(x, mask, axes)
        misfit = formulas.misfit(formulas.sums(x.detach(), mean, counted), std, eps=settings.eps)
    modes: dict[str, Any] = {"stats": settings.stats, "reduction": settings.reduction}
    gradients = formulas.nll_gradients(misfit, std, parameter, settings.form, **modes)
    sizes = [shape[axis % x.dim()] for axis in axes]
    by_mean, by_parameter = (formulas.times(t.view(sizes), settings.share) for t in gradients)
    return misfit.r, (by_mean, by_parameter)


def _mask_of(x: Tensor, mask: Tensor, axes: tuple[int, ...]) -> Tensor:
    """`mask`, shaped to broadcast against x: its axes are the first of the axes of x that are not channel axes."""
    free = [axis for axis in range(x.dim()) if axis not in {a % x.dim() for a in axes}]
    sizes = tuple(x.shape[axis] for axis in free)
    if mask.dtype != torch.bool or mask.dim() > len(free) or any(m != s for m, s in zip(mask.shape, sizes, strict=False)):
        raise ValueError(
            f"the mask of a BatchlessNorm is {mask.dtype} of shape {tuple(mask.shape)}; expected torch.bool of shape {sizes}, or the first "
            f"of these axes: those of its input {tuple(x.shape)} that are not channels"
        )
    return mask.view(formulas.axes_shape(tuple(mask.shape), free[: mask.dim()], x.dim()))


def _train(
    x: Tensor, mean: Tensor, std: Tensor, weight: Tensor | None, bias: Tensor | None, training: Training, settings: Settings
) -> Tensor:
    """The output of a layer in train mode. mean, std: detached."""
    shape = _shape(x, settings.sizes, settings.axes)
    statistics, mask = training.statistics, training.mask
    gradients = None if statistics is None else _nll(x, mean, std, statistics[1], mask, settings, training.misfit)[1]
    if torch.compiler.is_exporting():  # to a graph of operators, which has no autograd.Function
        slope, shift = (t.expand(settings.sizes) for t in formulas.affine_of(mean, std, weight, bias))
        if statistics is not None and gradients is not None:
            shift = in_graph(shift, statistics, gradients, form=settings.form, stats=settings.stats, rate=settings.rate)
        return formulas.applied(x, slope.view(shape), shift.view(shape))
    given = (*zip(statistics or (), gradients or (), strict=True), *training.given)
    axes = tuple(axis % x.dim() for axis in settings.axes)
    mean, std = (t.view(formulas.axes_shape(t.shape, axes, x.dim())) for t in (mean, std))
    counted = None if mask is None else _mask_of(x, mask, axes)
    limit, coupled, trend = training.limit or (None,) * 4, training.coupled, training.trend or (None,) * 3
    producer = (None,) * 3 if coupled is None else coupled[:3]
    tensors = train_pass.Tensors(x, mean, std, weight, bias, counted, training.scale, *limit, *producer, *trend)
    options = train_pass.Options(axes, shape, training.samples, None if coupled is None else coupled.constants)
    return train_pass.apply(tensors, options, given)


def _refuse_traces(x: Any, why: str) -> None:
    if isinstance(x, torch.fx.Proxy) or torch.compiler.is_exporting():
        raise UsageError(
            f"a BatchlessNorm that {why} cannot be traced in train mode: the traced graph would not update its statistics",
            hint='trace in eval mode, or convert with coupling="none"',
        )


# Leaves for torch.fx: they look at the input's shape, which a tracer cannot.
torch.fx.wrap("_affine")
torch.fx.wrap("_train")


class BatchlessNorm(nn.Module):
    r"""Normalize each channel by a learned mean and standard deviation.

        y = weight * (x - sg(mean)) / sg(std) + bias          sg: no gradient passes

    Train and eval mode compute the same function (but for a layer with a sample limit), and each sample's output depends on that sample
    alone. The task's loss trains weight and bias; `mean` and `std` are trained by the Gaussian negative log-likelihood of the input,
    `nll(x)`, whose gradient does not reach x. In eval mode the statistics stay as they are, as BatchNorm's do.

    Args:
        num_features: the number of channels, or one size per channel axis.
        channel_axis: the axis, or ascending axes, of the input on which the channels lie. Default 1: (N, C, *space), any rank.
            Negative axes count from the end: -1 for (N, ..., C).
        shared_axes: the channel axes on which mean and std have size 1, while weight and bias keep their full size.
        affine: whether there are weight and bias. Without them they are 1 and 0.
        std: how the standard deviation is stored: "log" (log_std; its curvature does not depend on the scale), "abs" (abs_std) or
            "inv" (inv_std). See `formulas.std_of`.
        reduction: of the NLL, "mean" over everything (as in the paper) or "sum" over channels.
        aux: how the NLL joins the task's loss in train mode. "none": not by itself, add `nll(x)`. "auto": its gradient is added to those of
            `mean` and the std's parameter, with weight 1, whenever a gradient comes back to the layer's output. "explicit": the loss adds
            `normswap.aux_loss(model)`.
        stats: the gradient that "auto" and "explicit" give: "natural", with which the statistics are BatchNorm's running averages, or
            "raw", that of `nll`. See `formulas.nll_gradients` and `optimizer_step`.
        momentum: the rate at which natural statistics move in a step, as BatchNorm's momentum.
        dtype: of the parameters, at least float32.

    Shape: x (N, C, *space) of any float dtype, C on `channel_axis`; y the same shape, dtype and memory format. Parameters: the sizes
    of the channel axes, and 1 on the shared ones for mean and std.

    Parameters stay in float32 when the model is moved to half precision, as a variance above 65504 is not a float16; the output
    has the input's dtype.

    Raises ValueError, when built, for an unknown `std`, `reduction`, `aux` or `stats` or wrong axes, and when called for a wrong shape.

    Source: Berger & Uc Cetina, "Batchless Normalization", arXiv:2212.14729.
    """

    mean: nn.Parameter
    weight: nn.Parameter | None
    bias: nn.Parameter | None
    input_mean: nn.Parameter | None  # the mean input of the producer, of a coupled layer
    trend: nn.Parameter | None  # (slope, level), stacked: the line over the normalized input that is taken out of the gradient
    own_rule: tuple[str, str | None] | None = None  # (kind, spec) of the rule that built it, if that is not one of normswap's

    run: Run  # not in the state dict; copies and pickles keep its pace alone

    # Class attributes, so that layers pickled before they existed have them.
    aux: Aux = "none"
    stats: Stats = "natural"
    momentum: float = MOMENTUM
    steps: Tensor | None
    limits_samples: bool = False  # whether there is a limit on each sample in train mode, once `stepped`: `sample_limit`
    _producer: tuple[nn.Module, ...] = ()  # in a tuple, so that nn.Module does not make it a child
    stepped: bool = False  # whether an optimizer has moved the statistics
    calls: int = 1  # how often one forward pass of the model calls the layer: the natural gradient is the mean over these calls

    def __init__(
        self,
        num_features: int | Sequence[int],
        *,
        channel_axis: int | Sequence[int] = 1,
        shared_axes: Sequence[int] = (),
        affine: bool = True,
        std: StdForm = "log",
        reduction: Reduction = "mean",
        aux: Aux = "none",
        stats: Stats = "natural",
        momentum: float = MOMENTUM,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        sizes = (num_features,) if isinstance(num_features, int) else tuple(num_features)
        axes = (channel_axis,) if isinstance(channel_axis, int) else tuple(channel_axis)
        if std not in STD_FORMS:
            raise ValueError(f"std is {std!r}; expected one of {', '.join(map(repr, STD_FORMS))}")
        for name, value, known in (("reduction", reduction, REDUCTIONS), ("aux", aux, AUXES), ("stats", stats, STATS)):
            if value not in known:
                raise ValueError(f"{name} is {value!r}; expected one of {', '.join(map(repr, known))}")
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
        self.aux, self.stats, self.momentum = aux, stats, momentum
        self.source: Source | None = None
        like = {"device": device, "dtype": torch.promote_types(dtype or torch.get_default_dtype(), torch.float32)}
        shape = tuple(1 if axis in self.shared_axes else size for size, axis in zip(sizes, axes, strict=True))
        self.mean = nn.Parameter(torch.zeros(shape, **like))  # type: ignore[arg-type]
        self.register_parameter(PARAMETER_OF_FORM[std], nn.Parameter(formulas.parameter_of(torch.ones(shape, **like), std)))  # type: ignore[arg-type]
        self.register_parameter("weight", nn.Parameter(torch.ones(sizes, **like)) if affine else None)  # type: ignore[arg-type]
        self.register_parameter("bias", nn.Parameter(torch.zeros(sizes, **like)) if affine else None)  # type: ignore[arg-type]
        self.register_parameter("input_mean", None)
        self.register_parameter("trend", None)
        # What the source layer measured, so that `revert` can give back an untrained layer bit for bit. Part of the state dict, hence
        # of every checkpoint; never read by forward.
        self.register_buffer("source_mean", None)
        self.register_buffer("source_var", None)
        self.register_buffer("source_batches", None)
        # The optimizer steps of a layer that is coupled or limits samples, counted from KNOWN if input_mean was measured from data. The
        # rate of input_mean and the sample limit depend on it, so a run that goes on from a checkpoint does what it would have done.
        self.register_buffer("steps", None)
        optimizer_step.watch(self)

    def __getstate__(self) -> dict[str, Any]:
        self._follow()
        own = {name: value for name, value in self.__dict__.items() if name != "run"}
        return own if self.run.pace == 1 else {**own, "pace": self.run.pace}

    def __setstate__(self, state: dict[str, Any]) -> None:
        pace = state.get("pace", 1.0)
        super().__setstate__({name: value for name, value in state.items() if name != "pace"})  # type: ignore[no-untyped-call]
        optimizer_step.watch(self)
        self.run.pace = float(pace)

    @property
    def std_parameter(self) -> nn.Parameter:
        """The parameter that stores the standard deviation: `log_std`, `abs_std` or `inv_std`."""
        return cast(nn.Parameter, getattr(self, PARAMETER_OF_FORM[self.std]))

    @torch.no_grad()
    def as_recorded(self) -> Tensor:
        """For each channel, whether the stored std is still that of the source's variance, rounded: it was not trained since the swap."""
        exact, source = self._recorded(), cast(Source, self.source)
        # Round as the swap did, to float32 or wider. The tensors may have been cast to a wider dtype since, so their dtypes do not tell.
        stored = exact.to(torch.promote_types(source.buffers["running_var"], torch.float32))
        return stored.to(self.std_parameter.dtype) == self.std_parameter

    @torch.no_grad()
    def unrounded(self) -> Tensor | None:
        """The std's parameter in float64, before it was rounded at the swap; None if the layer has no source.

        A channel that was trained since then has its stored value.
        """
        if self.source is None or self.source_var is None:
            return None
        return torch.where(self.as_recorded(), self._recorded(), self.std_parameter.double())

    def _recorded(self) -> Tensor:
        """The std's parameter in float64, computed from the source's variance."""
        std = formulas.std_of_variance(cast(Tensor, self.source_var), cast(Source, self.source).eps)
        return formulas.parameter_of(std, self.std)

    @property
    def producer(self) -> nn.Module | None:
        """The conv or linear to whose weight the statistics are coupled."""
        return self._producer[0] if self._producer else None

    @property
    def producer_in_training(self) -> nn.Module | None:
        """The producer, if the statistics move with its weight now: in train mode, unless one of them is frozen.

        None also while its weight is computed from other parameters, by pruning or a parametrization that came after the swap: what a
        step made of such a weight is not known before the next forward pass.
        """
        producer = self._producer_that_trains
        return None if producer is None or "weight" not in producer._parameters else producer

    @property
    def measures_input(self) -> bool:
        """Whether the producer's pre-hook measures the mean of its input for this layer."""
        return self._producer_that_trains is not None and self.aux != "none"

    @property
    def _producer_that_trains(self) -> nn.Module | None:
        frozen = not all(tensor.requires_grad for tensor in self._statistics)
        return None if frozen or not self.training else self.producer

    def fuses(self, producer: nn.Module) -> bool:
        """Whether this call of the producer is computed together with this layer, as a `pair`: in train mode.

        Not where something looks at what is between the two, or transforms it, nor in compiled graphs, whose compiler joins them itself.
        It does not matter whether there are gradients: a checkpoint runs a part of a model once without and once with them.
        """
        if torch.compiler.is_compiling() or self.aux != "auto" or self.stats != "natural" or self.run.mask is not None:
            return False
        if producer is not self.producer_in_training or not producer.training:
            return False
        if pair.is_transformed() or hooks.hooked(producer, self):
            return False
        return not is_part(cast(Tensor, producer.weight)) and not is_part(self.mean)

    def paired(self, x: Tensor, weight: Tensor, bias: Tensor | None, call: pair.Call, seen: Tensor) -> Tensor:
        """The output of this layer, computed together with its producer. weight, bias: of the producer, whose call reads x.

        seen: the mean of the producer's input, which may not be padded as x is.
        """
        check_precision(self, self._statistics[0].dtype)
        own = self.weight, self.bias, self.mean, self.std_parameter, self.input_mean
        trend = self.trend if torch.is_grad_enabled() else None
        heavy, apart = pair.is_heavy(x, weight, call), functools.partial(self._apart, learns=False)
        prepared = vectors.of(self, Options(x.dtype, heavy))
        settings = pair.Settings(call, heavy, self._settings().share, self._limits, apart)
        away = cast(Tensor, self.input_mean).detach() - seen.to(self.mean.dtype)
        by_input_mean = formulas.times(away, settings.share if x.numel() else 0)
        inputs = pair.Inputs(x, weight, bias, *own, trend, by_input_mean, self.run.scale)
        y, factor = pair.Pair.apply(*inputs, prepared, settings)  # type: ignore[no-untyped-call]
        self.run.factor = None if factor is None else pair.per_sample(factor, y, call)
        self.run.mark_pending()
        if torch.is_grad_enabled():
            watch_passes(self)
        return cast(Tensor, y)

    @property
    def _learns(self) -> bool:
        return any(tensor.requires_grad for tensor in self._statistics)

    @property
    def _limits(self) -> bool:
        return self.limits_samples and self.stepped and self._learns

    @property
    def _takes_out_trend(self) -> bool:
        trained = self.aux == "auto" and self._learns and torch.is_grad_enabled()
        return trained and self._parameters.get("trend") is not None  # a replica of nn.DataParallel has none

    @property
    def _statistics(self) -> list[Tensor]:
        """Mean and the std's parameter, not read as attributes: a tracer would give proxies. A replica of nn.DataParallel has tensors."""
        found: Mapping[str, Any] = self.__dict__ if self._is_replicated else self._parameters
        return [found[name] for name in ("mean", PARAMETER_OF_FORM[self.std])]

    @property
    def _is_replicated(self) -> bool:
        """Whether this is a copy that nn.DataParallel made for one of its devices: it has tensors in the place of parameters."""
        return "mean" not in self._parameters

    def couple(self, producer: nn.Module, input_mean: Tensor, *, known: bool = True) -> None:
        """Couple the statistics to the weight of the conv or linear whose output goes to this layer and nowhere else.

            mean = <W, input_mean> + b + |W| c        std = |W| s        |W| per filter

        In train mode the gradient of the task passes through W, and mean and std move with W when an optimizer steps. Coupling does not
        change mean and std, and neither does input_mean, which follows the mean input of the producer from here on. See `coupling`. The
        producer gets a forward pre-hook and is otherwise untouched.

        input_mean: (input channels,); known: whether it was measured from data, and moves by the momentum. Else it becomes the mean
        over the first steps. Raises ValueError for another shape, or if the producer's outputs are not as many as the channels here.
        """
        shape, sizes = (inputs_of(producer),), (outputs_of(producer),)
        if input_mean.shape != shape or tuple(self.mean.shape) != sizes or sizes != self.sizes:
            raise ValueError(
                f"a {type(producer).__name__} with {sizes[0]} outputs and inputs {shape} cannot be coupled to a layer with statistics of "
                f"shape {tuple(self.mean.shape)} by an input mean of shape {tuple(input_mean.shape)}"
            )
        self.decouple()
        self._producer = (producer,)
        self.steps = torch.tensor(KNOWN if known else 0, device=self.mean.device)
        self.input_mean = nn.Parameter(input_mean.detach().to(self.mean, copy=True), requires_grad=self._learns)
        producer.register_forward_pre_hook(hooks.Before(self), with_kwargs=True)
        producer.register_forward_hook(hooks.After(self), always_call=True)

    def decouple(self) -> None:
        """End the coupling: the same function and the same statistics, without the gradient through the producer."""
        self._follow()
        for producer in self._producer:
            hooks.release(producer, self)
        self._producer, self.run.anchor = (), None
        self.input_mean = None
        self.steps = self.steps if self.limits_samples else None

    def enable_sample_limit(self) -> None:
        """From the first step on, limit how large a sample may become in train mode. See `sample_limit`."""
        self.limits_samples = True
        self.steps = torch.tensor(0, device=self.mean.device) if self.steps is None else self.steps

    def enable_trend(self) -> None:
        """Take out of the gradient what BatchNorm's lacks: the mean, and the part along the normalized input. See `gradient_trend`.

        It acts in train mode with aux="auto", if the statistics are trained. Outputs do not change. The trend starts at 0, which takes
        nothing out.
        """
        self.trend = nn.Parameter(torch.zeros(2, *self.mean.shape).to(self.mean), requires_grad=self._learns)

    def disable_trend(self) -> None:
        """Leave the gradient as it is, and forget its trend."""
        self.trend = None

    def make_plain(self) -> None:
        """Drop what belongs to a training run: producer, trend and sample limit. The function and its statistics are the same."""
        self.decouple()
        self.disable_trend()
        self.limits_samples, self.steps = False, None

    def _coupled(self) -> Coupled | None:
        """The producer, if the gradient passes through its weight and bias: in train mode."""
        producer = self.producer_in_training
        if producer is None or self._is_replicated or not torch.is_grad_enabled():
            return None
        if is_part(cast(Tensor, producer.weight)) and not is_part(self.mean):
            raise UsageError(
                f"a BatchlessNorm of {self.num_features} channels is coupled to a conv or linear in another unit of fully_shard. "
                "Its gradient passes through that weight, of which there is only a part here while the norm runs",
                hint='put both into one unit, fully_shard([producer, norm]), or convert with coupling="none"',
            )
        return coupling.coupled_to(producer, cast(Tensor, self.input_mean), self.mean.dtype, eps=self._eps)

    def snapshot(self) -> Snapshot:
        """What mean and std depend on of the producer as it is now."""
        return following.anchor_of(self).snapshot

    def _follow(self, *, within_pass: bool = False) -> None:
        if self.run.anchor is not None:
            following.follow([self], within_pass=within_pass)

    def train(self, mode: bool = True) -> BatchlessNorm:
        self._follow()
        super().train(mode)
        return self

    @property
    def _eps(self) -> float:
        """What the source adds to the variance."""
        return EPS if self.source is None else self.source.eps

    def statistics(self, dtype: torch.dtype | None = None) -> tuple[Tensor, Tensor]:
        """(mean, std), differentiable, computed in `dtype` (None: as stored). Everything reads the statistics here and nowhere else.

        For a coupled layer, too: the gradient by its producer's weight comes from `forward` alone.
        """
        mean, parameter = (self.mean, self.std_parameter) if dtype is None else (self.mean.to(dtype), self.std_parameter.to(dtype))
        return mean, formulas.std_of(parameter, self.std)

    def affine_map(self) -> tuple[Tensor, Tensor]:
        """(scale, shift) of the same map as y = x * scale + shift. The gradient reaches weight and bias only."""
        mean, std = self.statistics()
        return formulas.affine_of(mean.detach(), std.detach(), self.weight, self.bias)

    @torch.no_grad()
    def folded(self, ndim: int) -> tuple[Tensor, Tensor]:
        """`affine_map` computed in float64 and shaped to broadcast against an input with `ndim` dimensions."""
        # exp in float64: rounding it to float32 first is the largest error of the whole fold
        mean, std = self.statistics(torch.float64)
        weight, bias = (None if t is None else t.double() for t in (self.weight, self.bias))
        scale, shift = (t.expand(self.sizes) for t in formulas.affine_of(mean, std, weight, bias))
        shape = formulas.axes_shape(self.sizes, self.channel_axis, ndim)
        return scale.reshape(shape), shift.reshape(shape)

    @property
    def sizes(self) -> tuple[int, ...]:
        """The size of each channel axis."""
        return (self.num_features,) if isinstance(self.num_features, int) else tuple(self.num_features)

    def forward(self, input: Tensor) -> Tensor:
        if self.source is not None and issubclass(self.source.cls, INSTANCE_NORMS) and input.dim() == _unbatched(self.source.cls):
            raise ValueError(
                f"{self.source.cls.__name__} takes an input of shape {tuple(input.shape)} for one sample, and the BatchlessNorm in its "
                "place takes batches alone: give it x[None]"
            )
        if not self.training:
            scale, shift = self.affine_map()
            return _affine(input, scale.expand(self.sizes), shift.expand(self.sizes), self.channel_axis)
        producer = self._producer_that_trains
        if producer is not None and not torch.compiler.is_compiling() and self.run.take_pair(input, producer):
            return input
        return self._apart(input)

    def _apart(self, input: Tensor, *, learns: bool = True) -> Tensor:
        """The output in train mode, where it is not computed together with the producer. learns: whether the statistics get gradients."""
        if not torch.compiler.is_compiling() and not pair.is_transformed():
            self._follow(within_pass=True)
        # Without a history: an operator that records one of a parameter lets go of Python's lock, the functions below hold it, and with
        # torch 2.13 two threads would wait for each other for ever where both happens to one parameter.
        with torch.no_grad():
            mean, std = (t.detach() for t in self.statistics())
        limits = self._limits
        settings = self._settings()
        measured = self._measured(input, mean, std, settings.share, limits=limits) if limits or self._takes_out_trend else {}
        statistics, given = self._recorded_pass(input, std, settings) if learns and self._learns and self.aux != "none" else (None, ())
        coupled = self._coupled()
        if coupled is not None:
            _refuse_traces(input, "is coupled to its producer")
        training = Training(statistics, given, self.run.mask, self.run.scale, coupled, **measured)
        return _train(input, mean, std, self.weight, self.bias, training, settings)

    def _settings(self) -> Settings:
        share = (1 / self.calls if self.stats == "natural" else 1.0) * (self.run.share if self.aux == "auto" else 1.0)
        return Settings(self.sizes, self.channel_axis, self.std, self.stats, self.reduction, self.momentum, self._eps, share)

    def _measured(self, x: Tensor, mean: Tensor, std: Tensor, share: float, *, limits: bool) -> dict[str, Any]:
        """The fields of `Training` that are measured from x: the sample limit, the misfit, and the term of the gradient trend."""
        _refuse_traces(x, "limits samples" if limits else "takes a trend out of its gradient")
        _shape(x, self.sizes, self.channel_axis)
        mean, std = (t.view(formulas.axes_shape(t.shape, self.channel_axis, x.dim())) for t in (mean, std))
        mask = None if self.run.mask is None else _mask_of(x, self.run.mask, self.channel_axis)
        measured: dict[str, Any] = {}
        if limits:
            # Axes before the channels are axes of samples, those behind them lie within a sample. With channels on the last axis it cannot
            # be seen which of the others is the batch (a transformer may have it second): each position counts as a sample.
            samples = tuple(range(min(axis % x.dim() for axis in self.channel_axis)))
            limit, sums = sample_limit.limit(x.detach(), mean, std, samples, mask)
            measured = {"samples": samples, "limit": limit}
            self.run.factor = limit.factor
        else:
            sums = formulas.sums(x.detach(), mean, mask)
        misfit = measured["misfit"] = formulas.misfit(sums, std, eps=self._eps)
        if self._takes_out_trend:
            first, second = misfit.d / std, misfit.r + 1  # <z>, <z^2>
            measured["trend"] = gradient_trend.trend_term(cast(Tensor, self.trend), first, second, sums[2], std, share)
        return measured

    def _recorded_pass(self, x: Tensor, std: Tensor, settings: Settings) -> tuple[tuple[Tensor, Tensor] | None, Given]:
        """(`statistics`, `given`) of `Training`, (None, ()) if backward is not to train them here. Records the forward pass in the run."""
        if self._is_replicated:
            refuse_replicas()
        check_precision(self, self._statistics[0].dtype)
        mean, parameter = self.mean, self.std_parameter
        given = self._input_mean_given(x, settings.share)
        if self.aux == "explicit":
            if records_term(x):
                self.run.record_term(self._term(x, std, given, settings))
            return None, ()
        self.run.mark_pending()
        if not torch.is_grad_enabled():
            return None, ()
        watch_passes(self)
        return (mean, parameter), given

    def _term(self, x: Tensor, std: Tensor, given: Given, settings: Settings) -> Term:
        """The term of this call for `aux_loss`: the NLL of x, and the gradients by mean, by the std's parameter and by input_mean."""
        mean, parameter = self.mean, self.std_parameter
        r, gradients = _nll(x, mean, std, parameter, self.run.mask, settings)
        value = formulas.gaussian_nll_of(r, reduction=settings.reduction)
        return Term(value, (mean, parameter, *(t for t, _ in given)), (*gradients, *(by for _, by in given)))

    def _input_mean_given(self, x: Tensor, share: float) -> Given:
        """((input_mean, its gradient),), with which an SGD step at the rate a is a running average with momentum a; () if not coupled."""
        if self._producer_that_trains is None:
            return ()
        _refuse_traces(x, "is coupled to its producer")
        seen = self.run.take_input(cast(nn.Module, self.producer))
        input_mean, mask = cast(nn.Parameter, self.input_mean), self.run.mask
        by = formulas.times(input_mean.detach() - seen.to(input_mean.dtype), share if x.numel() else 0)
        return ((input_mean, by if mask is None else by * mask.any()),)

    def nll(self, x: Tensor, *, gauge: bool = True) -> Tensor:
        """The Gaussian NLL of x under the statistics, a scalar; the gradient reaches `mean` and the std's parameter, never x.

        See `formulas.gaussian_nll` for the formula.
        """
        _shape(x, self.sizes, self.channel_axis)
        shape = formulas.axes_shape(self.mean.shape, self.channel_axis, x.dim())
        mean, std = self.statistics()
        return formulas.gaussian_nll(x, mean.view(shape), std.view(shape), reduction=self.reduction, gauge=gauge)

    @torch.no_grad()
    def set_statistics(self, mean: Tensor, std: Tensor) -> None:
        """Store (mean, std), both in the shape of `mean`; computed in float64 and rounded once."""
        self.mean.copy_(mean)
        self.std_parameter.copy_(formulas.parameter_of(std.double(), self.std))

    def _save_to_state_dict(self, *args: Any) -> None:
        self._follow()
        super()._save_to_state_dict(*args)

    def _load_from_state_dict(self, state_dict: dict[str, Any], prefix: str, *args: Any) -> None:
        # Outputs do not depend on these three, so the state of a coupled layer can be loaded into a plain one, and the other way round.
        for name, own in (("input_mean", self.input_mean), ("trend", self.trend), ("steps", self.steps)):
            given = state_dict.pop(f"{prefix}{name}", None)
            if own is not None:
                state_dict[f"{prefix}{name}"] = own.detach() if given is None else given
        super()._load_from_state_dict(state_dict, prefix, *args)
        self.run.anchor = None
        if self.steps is not None and not self.steps.is_meta:
            self.stepped = bool(self.steps % KNOWN)

    def extra_repr(self) -> str:
        shared = f", shared_axes={self.shared_axes}" if self.shared_axes else ""
        trained = "" if self.aux == "none" else f", aux={self.aux!r}, stats={self.stats!r}, momentum={self.momentum}"
        coupled = "" if self.producer is None else f", coupled to a {type(self.producer).__name__}"
        return f"{self.num_features}, channel_axis={self.channel_axis}{shared}, affine={self.affine}, std={self.std!r}{trained}{coupled}"

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> BatchlessNorm:
        def keep_precision(tensor: Tensor) -> Tensor:
            moved = fn(tensor)
            if tensor.is_floating_point() and moved.is_floating_point() and moved.dtype.itemsize < min(4, tensor.dtype.itemsize):
                return tensor.to(moved.device, torch.float32 if tensor.dtype.itemsize > 4 else tensor.dtype)
            return moved

        # Children (a source layer's own activation) follow the model's dtype as usual; only this layer's own parameters do not.
        for child in self.children() if recurse else ():
            child._apply(fn)  # type: ignore[no-untyped-call]
        super()._apply(keep_precision, recurse=False)  # type: ignore[no-untyped-call]
        self.run.anchor = None
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
