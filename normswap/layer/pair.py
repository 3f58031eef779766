r"""The pair: a conv or linear (the producer) and its norm, computed in train mode as one convolution with a scaled weight.

    y = conv(x, k W) + shift          k = weight / std per filter, shift = bias + k (b - mean)          W, b: of the producer

is what the two compute one after the other, without the norm's input, which is neither computed nor kept for backward. What the gradients
need of it follows from the rest. g is the gradient that comes back to y:

    z       the norm's normalized input, (y - bias) / weight
    r       what is left of g:  weight r = weight f g + d z - slope z - level          f, d: `sample_limit`; slope, level: `gradient_trend`
    G, h    the gradients of the convolution by k W and by shift, for r                P = <G, W> per filter

    by W        k (G - h a) - k (P - h <W, a>) / |W|^2 W          what comes through k is in it, so that <W, dL/dW> = 0: see `coupling`
    by weight   (P - h (mean - b)) / std, and what r lacks along z
    by bias     the sum of g
    by b        0, as mean moves with it

Where a filter has far fewer outputs than weights, the output of the convolution is scaled, and not the weight: the same with less to read.

The trend and the limit need z for each output, but roughly: it is kept in 8 bits, in steps of 1/16 from -8 to 8. It is kept as it is in
float64, and where there are far fewer outputs than weights.

Source: weight normalization, arXiv:1602.07868, with the statistics of `coupling`; docs/method.md.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd import forward_ad

from normswap.layer import formulas, sample_limit, vectors
from normswap.layer.train_pass import signed
from normswap.layer.vectors import Backward, Forward, Options


class Call(NamedTuple):
    """The arguments of a convolution besides its tensors. dims: the axes of its kernel, 0 for a linear."""

    dims: int
    stride: tuple[int, ...] = ()
    padding: tuple[int, ...] = ()
    dilation: tuple[int, ...] = ()
    transposed: bool = False
    output_padding: tuple[int, ...] = ()
    groups: int = 1


class Settings(NamedTuple):
    """The options of a pass.

    heavy    whether the output of the convolution is scaled, and not its weight
    share    what the gradients of the statistics are multiplied by          limits   whether samples are limited
    apart    the norm's output for an output of the producer, as a function that autograd can differentiate twice
    """

    call: Call
    heavy: bool
    share: float
    limits: bool
    apart: Callable[[Tensor], Tensor]


class Inputs(NamedTuple):
    """The tensors of a pass, in the order in which autograd gets them. None for each that does not apply.

    weight, producer_bias   of the producer            gamma, beta             of the norm
    mean, parameter         of the norm's statistics   by_input_mean           the gradient of input_mean, for a loss scale of 1
    scale                   of the loss; None for 1
    """

    x: Any
    weight: Any
    producer_bias: Tensor | None
    gamma: Tensor | None
    beta: Tensor | None
    mean: Any
    parameter: Any
    input_mean: Any
    trend: Tensor | None
    by_input_mean: Any
    scale: Tensor | None


class Kept(NamedTuple):
    """What forward keeps for backward besides its inputs.

    z                  the normalized input, in 8 bits; None if nothing needs it
    total              the sums of x and of x^2, (C, 2)
    factor             f of each sample, see `sample_limit`; d_factor: its derivative by z over z, times -(the size of a sample)
    sums               those of each sample, (samples, C, 2). These three are None where no sample is limited
    """

    z: Any
    total: Any
    factor: Any
    d_factor: Any
    sums: Any


INPUTS = len(Inputs._fields)


class Pair(torch.autograd.Function):
    """The pass of a pair: (y, the factor of each sample or None). Its inputs are the fields of `Inputs`, `Prepared` and `Settings`."""

    @staticmethod
    @signed
    def forward(ctx: Any, *inputs: Any) -> tuple[Tensor, Tensor | None]:
        i, prepared, s = Inputs(*inputs[:INPUTS]), *inputs[INPUTS:]
        rows, dtype, call = prepared.forward, i.x.dtype, s.call
        if s.heavy:
            x = _convolution(i.x, i.weight.to(dtype), None, call)
            y = torch.addcmul(_per_channel(rows.shift, call), x, _per_channel(rows.k, call)).to(dtype)
        else:
            x = y = _convolution(i.x, (i.weight * _per_filter(rows.k, i.weight, call)).to(dtype), rows.shift.to(dtype), call)
        y, kept, factor, number = _measured(y, x, rows, i, s)
        # The rows are there between the passes, too, for the next ones: a pass keeps nothing by referring to them.
        ctx.settings, ctx.prepared, ctx.number = s, prepared, number
        ctx.save_for_backward(*i, *kept)
        ctx.set_materialize_grads(False)
        if factor is not None:
            ctx.mark_non_differentiable(factor)
        return y, factor

    @staticmethod
    def backward(ctx: Any, g: Tensor | None, _: Any) -> tuple[Tensor | None, ...]:
        saved = ctx.saved_tensors  # read once, as a checkpoint refuses a second time
        i, kept, s, rows = Inputs(*saved[:INPUTS]), Kept(*saved[INPUTS:]), ctx.settings, ctx.prepared.backward
        # In memory of their own, not in what is kept: the same graph may be passed again.
        first, second = kept.total.unbind(1)
        by_statistics = torch.addcmul(rows.by_level, rows.by_first, first, value=1 / max(ctx.number, 1))
        by_statistics[1:].addcmul_(rows.by_second, second, value=1 / max(ctx.number, 1))
        given = formulas.times(by_statistics, s.share * min(ctx.number, 1)), i.by_input_mean
        by_statistics, by_input_mean = given if i.scale is None else [each * i.scale for each in given]
        # Each with a version of its own, although they share their memory: who writes to one has not written to the other.
        by_mean, by_parameter, of_trend = (each.data for each in by_statistics.unbind())
        if g is None:
            by: tuple[Tensor | None, ...] = (None,) * 6
        elif torch.is_grad_enabled():
            by = _by_inputs_twice(g, i, s)
        else:
            by = _by_inputs(g, rows, i, kept, of_trend, s, need_x=ctx.needs_input_grad[0])
        return *by[:5], by_mean, by_parameter, by_input_mean, by[5], *(None,) * 4


def _measured(y: Tensor, x: Tensor, rows: Forward, i: Inputs, s: Settings) -> tuple[Tensor, Kept, Tensor | None, int]:
    """(y with its samples limited, what backward needs, the factor of each sample, how many values a channel has).

    x: an output of the convolution.
    """
    call, dtype = s.call, rows.k.dtype
    flat = _flat(x, call)
    samples, channels, size = flat.shape
    # per sample and channel; a sum over the last axis and a norm over it are the fastest reductions on a CPU
    sums = flat.new_empty(samples, channels, 2, dtype=dtype)
    torch.sum(flat, 2, dtype=dtype, out=sums[..., 0])
    torch.linalg.vector_norm(flat, dim=2, dtype=dtype, out=sums[..., 1]).square_()
    factor = d_factor = None
    if s.limits:
        factor, d_factor = _limit(sums, size, rows)
    if factor is not None and d_factor is not None:
        centre = y.new_zeros(()) if i.beta is None else _per_channel(i.beta, call)
        y = torch.lerp(centre.to(y.dtype), y, per_sample(factor, y, call).to(y.dtype))
    z = None
    if i.trend is not None or d_factor is not None or s.heavy:
        z = _line(x, rows.to_kept, rows.kept_level, rows, call)
        # Signed: a CPU takes nine times as long to convert to the other 8 bits.
        z = z.round_().clamp_(-128, 127).to(torch.int8) if vectors.bits(Options(x.dtype, s.heavy), dtype) else z
    of_limit = (None,) * 3 if d_factor is None else (factor, d_factor, sums)
    return y, Kept(z, sums.sum(0), *of_limit), factor, samples * size


def _limit(sums: Tensor, size: int, rows: Forward) -> tuple[Tensor, Tensor | None]:
    """(f, its derivative as in `Kept`) of each sample, see `sample_limit`; None if no sample is limited. sums: as in `Kept`."""
    inverse = 1 / max(size * sums.shape[1], 1)
    square = torch.addmv(rows.level.expand(len(sums)), sums.flatten(1), rows.square.flatten(), beta=size * inverse, alpha=inverse)
    # A GPU is not asked, as the CPU would have to wait for it; nor a tensor without content, as FakeTensor is.
    known = square.device.type == "cpu" and type(square) is Tensor
    if known and (not square.numel() or float(square.max()) <= sample_limit.LIMIT**2):
        return torch.ones_like(square), None
    factor = sample_limit.factor_of(square)
    return factor, torch.where(square > sample_limit.LIMIT**2, factor / square, 0)


def _by_inputs(
    g: Tensor, rows: Backward, i: Inputs, kept: Kept, of_trend: Tensor, s: Settings, *, need_x: bool
) -> tuple[Tensor | None, ...]:
    """The gradients by x, W, b, weight, bias and trend, for the gradient g by y."""
    call, x = s.call, i.x
    dtype = rows.k.dtype
    r, total, of_limit = _left(g, rows, i, kept, s)
    if s.heavy:
        over = (0, *range(2, r.dim())) if call.dims else list(range(r.dim() - 1))
        h, p = r.sum(over, dtype=dtype), (r * kept.z).sum(over, dtype=dtype)
        scaled = (r * _per_channel(rows.k, call)).to(g.dtype)
        gx, G, _ = _by_convolution(scaled, x, i.weight.to(x.dtype), call, need_x=need_x, need_h=False)
        by_w, _ = _by_weight(G, rows.k * h, None, rows, i, s)  # with k in G and h
    else:
        weight = (i.weight * _per_filter(rows.k, i.weight, call)).to(x.dtype)
        gx, G, h = _by_convolution(r, x, weight, call, need_x=need_x, need_h=True)
        h = h.to(dtype)
        by_w, p = _by_weight(G, h, rows.k, rows, i, s)
    by = rows.by_h * h
    by[:2].addcmul_(rows.by_p, p)
    by_gamma, by_trend = by[0].add_(of_trend), by[1:]
    if of_limit is not None:
        by_trend += of_limit.t()
        by_gamma.addcmul_(of_limit[:, 0], rows.inverse, value=-1)
    by_bias = None if i.producer_bias is None else torch.zeros_like(i.producer_bias)
    by_beta = None if i.beta is None else total
    return gx, by_w, by_bias, None if i.gamma is None else by_gamma.data, by_beta, None if i.trend is None else by_trend.data


def _by_weight(G: Tensor, h: Tensor, k: Tensor | None, rows: Backward, i: Inputs, s: Settings) -> tuple[Tensor, Tensor]:
    """(k (G' - <G', W> / |W|^2 W), <G', W> / |W|), with G' = G - h a, which takes the memory of G. k: None for 1."""
    call, w = s.call, i.weight.to(h.dtype)
    G = G.to(w.dtype)
    if call.groups == 1 and not call.transposed and G.is_contiguous():
        G.flatten(1).addr_(h, rows.a[0], alpha=-1)
    else:
        G.addcmul_(_per_filter(h, w, call), _per_input(i.input_mean, w, call), value=-1)
    if not call.transposed and w.is_contiguous() and G.is_contiguous() and w.device.type in ("cpu", "cuda"):
        norm, k_norm = (_per_filter(t, w, call) for t in (rows.norm, rows.k_norm))
        by_w, along = torch.ops.aten._weight_norm_interface_backward(G, w, k_norm, norm, 0)
        return by_w.to(i.weight.dtype), along.flatten()
    p = _over_filters(G * w, call) / rows.norm
    by_w = G.addcmul_(_per_filter(-p / rows.norm, w, call), w)
    return (by_w if k is None else by_w * _per_filter(k, w, call)).to(i.weight.dtype), p


def _by_inputs_twice(g: Tensor, i: Inputs, s: Settings) -> tuple[Tensor | None, ...]:
    """The same gradients, which autograd can differentiate again: those of the two layers one after the other."""
    inputs = (i.x, i.weight, i.producer_bias, i.gamma, i.beta, i.trend)
    wanted = [t for t in inputs if t is not None and t.requires_grad]
    y = s.apart(_convolution(i.x, i.weight.to(i.x.dtype), i.producer_bias, s.call))
    found = iter(torch.autograd.grad(y, wanted, g, create_graph=True, allow_unused=True))
    return tuple(next(found) if t is not None and t.requires_grad else None for t in inputs)


def _left(g: Tensor, rows: Backward, i: Inputs, kept: Kept, s: Settings) -> tuple[Tensor, Tensor, Tensor | None]:
    """(r, the sum of g per channel, what comes through the factors of the samples).

    r is what is left of g when the trend is taken out, and with what comes through the factors. The last is (the sum of weight r z, that of
    weight r), (C, 2), as far as they come through the factors; None where no sample is limited.
    """
    call, dtype = s.call, rows.k.dtype
    if i.trend is None and kept.sums is None:
        return g, _sums(g, call, dtype), None
    part = 0.0 if i.trend is None else s.share / max(g.numel() // len(rows.k), 1)
    slope, level = (rows.trend if i.scale is None else rows.trend * i.scale).unbind()
    u, total = kept.z.to(g.dtype), _sums(g, call, dtype)
    if kept.sums is None:
        return torch.add(g, _line(u, slope, level, rows, call), alpha=part).to(g.dtype), total, None
    _, channels, size = _flat(g, call).shape
    along = _flat(g * u, call).sum(2, dtype=dtype)
    inverse = -1 / max(size * channels, 1)
    d = torch.addmv(kept.d_factor, along, rows.of_gamma, beta=0, alpha=inverse).mul_(kept.d_factor)
    slope = _per_both(torch.addr(slope, d, rows.of_inverse, beta=part), g, call)
    r = (u * slope).add_(_per_channel(level, call), alpha=part).addcmul_(g, per_sample(kept.factor, g, call)).to(g.dtype)
    first, second = torch.mv(kept.sums.flatten(1).t(), d).view(channels, 2).unbind(1)
    of_limit = (rows.z_first * first[:, None]).addcmul_(rows.z_level, d.sum(), value=size)
    of_limit[:, 0].addcmul_(rows.z_second, second)
    return r, total, of_limit


# --- shapes -----------------------------------------------------------------------------------------------------------------------------


def _flat(t: Tensor, call: Call) -> Tensor:
    """An output or its gradient as (samples, channels, places). Each row of a linear's input is a sample."""
    return t.flatten(2) if call.dims else t.reshape(-1, t.shape[-1], 1)


def per_sample(v: Tensor, t: Tensor, call: Call) -> Tensor:
    """One number per sample, shaped to broadcast against the output t."""
    return v.view(-1, *(1,) * (t.dim() - 1)) if call.dims else v.view(*t.shape[:-1], 1)


def _line(t: Tensor, slope: Tensor, level: Tensor, rows: Forward | Backward, call: Call) -> Tensor:
    """slope t + level, for an output t, with one slope and level per channel."""
    if t.dtype != slope.dtype or not t.numel():
        return (t * _per_channel(slope, call)).add_(_per_channel(level, call))
    # A batch norm in eval mode, of which a CPU makes one fast loop.
    of = t if call.dims else t.reshape(-1, t.shape[-1])
    return torch.native_batch_norm(of, slope, level, rows.zero, rows.one, False, 0.0, 0.0)[0].view(t.shape)


def _per_both(v: Tensor, t: Tensor, call: Call) -> Tensor:
    """(samples, channels), shaped to broadcast against the output t."""
    return v.view(*t.shape[:2], *(1,) * call.dims) if call.dims else v.view(t.shape)


def _sums(t: Tensor, call: Call, dtype: torch.dtype) -> Tensor:
    """The sum of t per channel."""
    return t.flatten(2).sum(2, dtype=dtype).sum(0) if call.dims else t.reshape(-1, t.shape[-1]).sum(0, dtype=dtype)


def _per_channel(v: Tensor, call: Call) -> Tensor:
    """One number per output channel, shaped to broadcast against the output."""
    return v.view(-1, *(1,) * call.dims) if call.dims else v


def _per_filter(v: Tensor, weight: Tensor, call: Call) -> Tensor:
    """One number per output channel, shaped to broadcast against the weight."""
    if call.transposed and call.groups > 1:
        v = v.view(call.groups, 1, -1).expand(-1, weight.shape[0] // call.groups, -1)
        return v.reshape(weight.shape[0], -1, *(1,) * call.dims)
    return v.view(1, -1, *(1,) * call.dims) if call.transposed else v.view(-1, 1, *(1,) * call.dims)


def _per_input(a: Tensor, weight: Tensor, call: Call) -> Tensor:
    """One number per input channel, shaped to broadcast against the weight."""
    if not call.transposed and call.groups > 1:
        a = a.view(call.groups, 1, -1).expand(-1, weight.shape[0] // call.groups, -1)
        return a.reshape(weight.shape[0], -1, *(1,) * call.dims)
    return a.view(-1, 1, *(1,) * call.dims) if call.transposed else a.view(1, -1, *(1,) * call.dims)


def _over_filters(t: Tensor, call: Call) -> Tensor:
    """The sum over each filter of a tensor with the weight's shape."""
    if not call.transposed:
        return t.sum(list(range(1, t.dim())))
    return t.view(call.groups, -1, *t.shape[1:]).sum((1, *range(3, t.dim() + 1))).flatten()


def is_heavy(x: Tensor, weight: Tensor, call: Call) -> bool:
    """Whether there are far fewer outputs than weights, per filter."""
    places = x.numel() // max(x.shape[1] if call.dims else x.shape[-1], 1)
    for stride in call.stride:
        places = places * stride if call.transposed else places // stride
    return 8 * places < weight.numel() // (weight.shape[1] * call.groups if call.transposed else weight.shape[0])


# --- convolutions -----------------------------------------------------------------------------------------------------------------------


def _convolution(x: Tensor, weight: Tensor, bias: Tensor | None, call: Call) -> Tensor:
    if call.dims == 0:
        return F.linear(x, weight, bias)
    _, stride, padding, dilation, transposed, output_padding, groups = call
    return torch.ops.aten.convolution(x, weight, bias, stride, padding, dilation, transposed, output_padding, groups)  # type: ignore[no-any-return]


def _by_convolution(g: Tensor, x: Tensor, weight: Tensor, call: Call, *, need_x: bool, need_h: bool) -> tuple[Any, Any, Any]:
    """The gradients of a convolution by x, by the weight and by the bias."""
    if call.dims == 0:
        rows = g.reshape(-1, g.shape[-1])
        return g @ weight if need_x else None, rows.t() @ x.reshape(-1, x.shape[-1]), rows.sum(0) if need_h else None
    outputs = weight.shape[1] * call.groups if call.transposed else weight.shape[0]
    found: tuple[Any, Any, Any] = torch.ops.aten.convolution_backward(g, x, weight, [outputs], *call[1:], [need_x, True, need_h])
    return found


CONVOLUTIONS = {torch.conv1d: 1, torch.conv2d: 2, torch.conv3d: 3}
TRANSPOSED_CONVOLUTIONS = {torch.conv_transpose1d: 1, torch.conv_transpose2d: 2, torch.conv_transpose3d: 3}


def call_of(function: Any, args: tuple[Any, ...], kwargs: Any) -> tuple[Tensor, Tensor, Tensor | None, Call] | None:
    """(x, weight, bias, the rest) of a call of a convolution or linear; None of another function."""
    if function is F.linear:
        return (*_bound({"input": None, "weight": None, "bias": None}, args, kwargs), Call(0))
    named: dict[str, Any] = {"input": None, "weight": None, "bias": None, "stride": 1, "padding": 0}
    dims = CONVOLUTIONS.get(function, 0)
    if dims:
        x, weight, bias, stride, padding, dilation, groups = _bound({**named, "dilation": 1, "groups": 1}, args, kwargs)
        dilation = _each(dilation, dims)
        if padding == "same":
            total = [d * (k - 1) for d, k in zip(dilation, weight.shape[2:], strict=True)]
            if any(t % 2 for t in total):
                x, total = F.pad(x, [p for t in reversed(total) for p in (t // 2, t - t // 2)]), [0] * dims
            padding = [t // 2 for t in total]
        padding = _each(0 if padding == "valid" else padding, dims)
        return x, weight, bias, Call(dims, _each(stride, dims), padding, dilation, False, (0,) * dims, groups)
    dims = TRANSPOSED_CONVOLUTIONS.get(function, 0)
    if not dims:
        return None
    x, weight, bias, stride, padding, more, groups, dilation = _bound(
        {**named, "output_padding": 0, "groups": 1, "dilation": 1}, args, kwargs
    )
    stride, padding, dilation = (_each(v, dims) for v in (stride, padding, dilation))
    return x, weight, bias, Call(dims, stride, padding, dilation, True, _each(more, dims), groups)


def _bound(defaults: dict[str, Any], args: tuple[Any, ...], kwargs: Any) -> list[Any]:
    return list({**defaults, **dict(zip(defaults, args, strict=False)), **kwargs}.values())


def _each(value: Any, dims: int) -> tuple[int, ...]:
    return (value,) * dims if isinstance(value, int) else tuple(value) * (dims if len(value) == 1 else 1)


def is_transformed() -> bool:
    """Whether torch.func or forward-mode differentiation looks at the model: an autograd.Function needs rules for these."""
    return torch._C._functorch.maybe_current_level() is not None or forward_ad._current_level >= 0
