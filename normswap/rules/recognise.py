"""Recognises which normalization a layer computes by running it; the name of its class plays no part.

A copy of the layer with random parameters is run on random data in float64, without its dropout and activation (`drop`, `act`,
`activation`). Its output is compared with each of these candidates,

    (x - m) / sqrt(v + eps)      m, v: mean and variance of one sample's x over the candidate's axes       layer_norm, group_norm
    (x - m) / (sqrt(v) + eps)    v with or without Bessel's correction                                     layer_norm
    x / sqrt(r + eps)            r: its mean square                                                        rms_norm
    x / sqrt(v + eps)            v with or without Bessel's correction (timm: with)                        simple_norm
    x / sqrt(r + eps)            r: the mean square of one channel over space                              filter_response_norm
    x                            no normalization                                                          affine

up to one weight and one bias per channel, fitted by least squares. Only an exact fit is a match, so a layer that does anything else (a
gate, a residual, an activation under another name) matches none. The names of its parameters, whether it multiplies by weight or by
1 + weight, and the order of its casts do not matter. eps is one of the numbers among the layer's attributes, or a common one.

`recognise_frozen` does the same for a layer that normalizes by running statistics, which are drawn at random.
"""

from __future__ import annotations

import copy
import dataclasses
import math
from collections.abc import Hashable, Iterable, Iterator
from dataclasses import dataclass
from typing import cast

import torch
from torch import Tensor, nn
from torch.nn.parameter import is_lazy

from normswap.models.float64 import in_float64
from normswap.models.watching import forward

EXACT = 1e-9  # relative; float64 leaves 1e-14, and an eps that is wrong by 1e-6 leaves 1e-6
_CUSTOMARY_EPS = (1e-5, 1e-6, 1e-12, 1e-8, 1e-3, 0.0, torch.finfo(torch.float32).eps, torch.finfo(torch.float64).eps)
AFTER = ("drop", "act", "activation")  # names of children that a norm applies to its normalized output
ANY = 7  # number of channels with which a layer is tried that has no size of its own


@dataclass(frozen=True)
class Normalizes:
    """The normalization that a layer was found to compute.

    axis: of the channels, -1 or 1, or (-2, -1) for one weight per head and channel; `channels` then has two sizes. groups: number of groups
    of channels that share statistics. sized: whether the layer fixes the number of channels; if not, `channels` means nothing.
    """

    kind: str
    axis: int | tuple[int, ...]
    channels: int | tuple[int, ...]
    eps: float
    groups: int = 1
    sized: bool = True


_FOUND: dict[Hashable, Normalizes | None] = {}  # by class, settings and shapes of a layer, whatever the values of its tensors


def recognise(module: nn.Module) -> Normalizes | None:
    """The normalization that `module` computes, or None if it is no known one. Cached for layers of the same class, settings and shapes."""
    kind = _kind(module)
    if kind not in _FOUND:
        _FOUND[kind] = _try_layouts(module)
    return _FOUND[kind]


def _kind(module: nn.Module) -> Hashable:
    def fixed(value: object) -> Hashable:
        return value if isinstance(value, (int, float, str, bool, type(None), torch.Size)) else (type(value), id(value))

    own = (*module._parameters.items(), *module._buffers.items())
    return (
        type(module),
        tuple((name, fixed(value)) for name, value in sorted(vars(module).items()) if not name.startswith("_") and name != "training"),
        tuple((name, None if tensor is None else (tensor.shape, tensor.is_meta)) for name, tensor in own),
        tuple((name, type(child)) for name, child in module._modules.items()),
    )


def _try_layouts(module: nn.Module) -> Normalizes | None:
    bare = bare_copy(module)
    if bare is None:
        return None
    numbers = [v for v in vars(module).values() if type(v) is int and 1 < v < 1 << 20]
    numbers += [v[-1] for v in vars(module).values() if isinstance(v, (tuple, list)) and v and type(v[-1]) is int and v[-1] > 1]
    pairs = {tuple(p.shape) for p in module.parameters(recurse=False) if p.dim() == 2}
    # A parameter with one element for all channels (ScaleNorm) does not tell how many channels there are.
    sizes = sorted({n for p in module.parameters(recurse=False) if p.dim() < 2 and (n := p.numel()) > 1} | {*numbers}, reverse=True)
    layouts: list[tuple[int | tuple[int, ...], tuple[int, ...]]] = [((-2, -1), pair) for pair in sorted(pairs)]
    layouts += [(axis, (channels,)) for channels in sizes for axis in (-1, 1)]
    if (shape := getattr(module, "input_shape", None)) is not None:  # it says how many channels each axis could have
        layouts = [(-1, (shape[-1],)), (1, (shape[1],))]
    for axis, channels in layouts:
        if found := _along(bare, module, axis, channels):
            return found
    if layouts:
        return None
    # A layer without a size takes any number of channels: two numbers have to give the same result.
    free = [_along(bare, module, -1, (channels,)) for channels in (ANY, ANY + 4)]
    if free[0] is None or free[1] is None or dataclasses.replace(free[1], channels=ANY) != free[0]:
        return None
    return dataclasses.replace(free[0], sized=False)


def bare_copy(module: nn.Module) -> nn.Module | None:
    """A copy in eval mode with random parameters, without dropout and activation; None if the layer cannot be copied.

    With random parameters, a gate that is still 0 shows in the output, and parameters on the meta device get values. Buffers on the meta
    device cannot get any: None, too.
    """
    if any(buffer.is_meta for buffer in module.buffers()):
        return None
    try:
        bare = copy.deepcopy(module).eval()
    except Exception:
        return None
    if any(parameter.is_meta for parameter in bare.parameters()):
        bare.to_empty(device="cpu")
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for parameter in bare.parameters():
            if parameter.is_floating_point() and not is_lazy(parameter):
                parameter.copy_(torch.randn(parameter.shape, generator=generator))
    for name in AFTER:
        if isinstance(bare._modules.get(name), nn.Module):
            bare._modules[name] = nn.Identity()
    return bare


def _shapes(axis: int | tuple[int, ...], channels: tuple[int, ...]) -> tuple[tuple[int, ...], ...]:
    """Two input shapes to try, of different rank. axis 1: (N, C, H, W) and (N, C, L); last axis: (N, L, C) and (N, H, W, C)."""
    return ((3, *channels, 4, 2), (3, *channels, 5)) if axis == 1 else ((3, 5, *channels), (3, 2, 4, *channels))


def _along(bare: nn.Module, module: nn.Module, axis: int | tuple[int, ...], channels: tuple[int, ...]) -> Normalizes | None:
    generator = torch.Generator().manual_seed(0)
    axes = (axis,) if isinstance(axis, int) else axis
    last = tuple(range(-len(axes), 0))
    for shape in _shapes(axis, channels):
        # Two calls with different means and scales: in one, a factor computed from the whole batch would be fitted as part of the weight.
        xs = [torch.randn(shape, generator=generator, dtype=torch.float64) * scale + mean for scale, mean in ((2, 0.7), (0.5, -1.1))]
        ys = [_run(bare, module, x) for x in xs]
        if any(y is None for y in ys):
            continue
        rows = math.prod(channels)
        y = torch.cat([y.movedim(axes, last).reshape(-1, rows) for y in ys if y is not None])
        for candidates in zip(*(_candidates(module, x, axes) for x in xs), strict=True):
            z = torch.cat([z.movedim(axes, last).reshape(-1, rows) for *_, z in candidates])
            if _fits(z, y):
                kind, eps, groups, _ = candidates[0]
                return Normalizes(kind, axis, channels[0] if isinstance(axis, int) else channels, eps, groups)
    return None


def _run(bare: nn.Module, module: nn.Module, x: Tensor) -> Tensor | None:
    device = next((t.device for t in (*bare.parameters(), *bare.buffers())), torch.device("cpu"))
    try:
        y = forward(bare, (x.to(device),), {}, within=in_float64())
    except Exception:  # another shape was expected
        return None
    if not isinstance(y, Tensor) or y.shape != x.shape or not bool(y.isfinite().all()):
        return None
    return y.cpu().double()


def returns_otherwise(module: nn.Module) -> str | None:
    """How the output of `module` differs from one tensor of the input's shape, as a clause; None if it does not."""
    bare = bare_copy(module)
    if bare is None:
        return None
    heads = tuple(v for name in ("num_heads", "head_dim") if type(v := getattr(module, name, None)) is int)
    sizes = {p.numel() for p in module.parameters(recurse=False)} | {v for v in vars(module).values() if type(v) is int and 1 < v < 1 << 20}
    shapes = [shape for n in sorted(sizes, reverse=True) for axis in (-1, 1) for shape in _shapes(axis, (n,))]
    shapes += [(3, 5, *heads)] if len(heads) == 2 else []
    how: str | None = None
    for shape in shapes:
        try:
            y = forward(bare, (torch.randn(shape, dtype=torch.float64),), {}, within=in_float64())
        except Exception:  # another shape was expected
            continue
        if isinstance(y, Tensor) and y.shape == shape:  # other shapes of the output, if any, came from broadcasting
            return None
        other = "a tensor of another shape than its input's, as BatchlessNorm does not"
        how = f"returns {other if isinstance(y, Tensor) else f'a {type(y).__name__}, and not one tensor as BatchlessNorm does'}"
    return how


def _epsilons(module: nn.Module) -> Iterable[float]:
    return dict.fromkeys((*(v for v in vars(module).values() if type(v) is float and 0 <= v < 0.1), *_CUSTOMARY_EPS))


def _candidates(module: nn.Module, x: Tensor, axes: tuple[int, ...]) -> Iterator[tuple[str, float, int, Tensor]]:
    """(kind, eps, groups, the normalized x) of every known formula."""
    yield "affine", 0.0, 1, x
    channels = x.shape[axes[-1]]
    numbers = {v for v in vars(module).values() if type(v) is int and 0 < v <= channels and channels % v == 0}
    over = [axes[-1:], *([axes] if len(axes) > 1 else [])]
    for eps in _epsilons(module):
        for dims in over:
            centred, square = x - x.mean(dims, keepdim=True), x.square().mean(dims, keepdim=True)
            yield "rms_norm", eps, 1, x / (square + eps).sqrt()
            for correction in (0, 1):
                variance = x.var(dims, correction=correction, keepdim=True)
                for root in ((variance + eps).sqrt(), variance.sqrt() + eps):
                    yield "layer_norm", eps, 1, centred / root
                yield "simple_norm", eps, 1, x / (variance + eps).sqrt()
        if axes == (1,):
            space = tuple(range(2, x.dim()))
            yield "filter_response_norm", eps, 1, x / (x.square().mean(space, keepdim=True) + eps).sqrt()
            for groups in sorted({1, channels, *numbers}):
                parts = x.reshape(x.shape[0], groups, -1)
                centred = parts - parts.mean(-1, keepdim=True)
                yield "group_norm", eps, groups, (centred / (parts.var(-1, correction=0, keepdim=True) + eps).sqrt()).reshape(x.shape)
        elif axes == (-1,):
            for groups in sorted({*numbers, *(channels // n for n in numbers)} - {1, channels}):
                parts = x.reshape(*x.shape[:-1], groups, -1)
                centred = parts - parts.mean(-1, keepdim=True)
                yield "layer_norm", eps, groups, (centred / (parts.var(-1, correction=0, keepdim=True) + eps).sqrt()).flatten(-2)
                yield "rms_norm", eps, groups, (parts / (parts.square().mean(-1, keepdim=True) + eps).sqrt()).flatten(-2)


def _fits(z: Tensor, y: Tensor) -> bool:
    """Whether y = a z + b with one a and b per column, up to EXACT. A constant y would fit any z, so it does not count as a fit."""
    centred, target = z - z.mean(0), y - y.mean(0)
    slope = (centred * target).sum(0) / centred.square().sum(0).clamp(min=1e-300)
    residual = (target - slope * centred).abs().max()
    return bool(target.abs().max() > 0) and bool(residual <= EXACT * target.abs().max())


def recognise_frozen(module: nn.Module) -> float | None:
    """The eps with which `module` computes BatchNorm from its running statistics, in eval and train mode; None if it does not.

    module: has BatchNorm's tensors under BatchNorm's names. A copy of it is run with random statistics, weights and biases.
    """
    kind = ("frozen", _kind(module))
    if kind not in _FROZEN:
        _FROZEN[kind] = _try_frozen(module)
    return _FROZEN[kind]


_FROZEN: dict[Hashable, float | None] = {}


def _try_frozen(module: nn.Module) -> float | None:
    bare = bare_copy(module)
    tensors = {n: getattr(bare, n, None) for n in ("running_mean", "running_var", "weight", "bias")}
    mean, var = tensors["running_mean"], tensors["running_var"]
    if bare is None or not isinstance(mean, Tensor) or not isinstance(var, Tensor) or mean.dim() != 1 or mean.shape != var.shape:
        return None
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for name, tensor in tensors.items():
            if tensor is not None:
                drawn = torch.rand(tensor.shape, generator=generator) + 0.3
                tensor.copy_(drawn if name == "running_var" else drawn - 0.9)
    known = {n: None if t is None else t.detach().cpu().double() for n, t in tensors.items()}
    for shape in ((3, len(mean), 4, 2), (3, len(mean), 5), (3, len(mean))):
        x = torch.randn(shape, generator=generator, dtype=torch.float64)
        ys = [_run(bare.train(mode), module, x) for mode in (False, True)]
        if any(y is None for y in ys):
            continue
        for eps in _epsilons(module):
            column = (1, -1, *(1 for _ in shape[2:]))
            m, v, w, b = (None if t is None else t.reshape(column) for t in known.values())
            assert m is not None
            assert v is not None
            expected = (x - m) / (v + eps).sqrt() * (1 if w is None else w) + (0 if b is None else b)
            unchanged = all(t is None or torch.equal(t.detach().cpu().double(), cast(Tensor, known[n])) for n, t in tensors.items())
            if unchanged and all(bool((cast(Tensor, y) - expected).abs().max() <= EXACT * expected.abs().max()) for y in ys):
                return eps
        return None
    return None
