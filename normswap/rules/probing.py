"""Finds out what a layer normalizes by running it: by structure, not by the name of its class.

A copy of the layer is run on random data in float64, its own dropout and activation (`drop`, `act`) left out, and its output is compared
with what each candidate would give before its weight and bias,

    (x - m) / sqrt(v + eps)      m, v: mean and variance of one sample's x over the candidate's axes       layer_norm, group_norm
    (x - m) / (sqrt(v) + eps)    v with or without Bessel's correction                                     layer_norm
    x / sqrt(r + eps)            r: its mean square                                                        rms_norm

up to one weight and one bias per channel, fitted by least squares. Only an exact fit is a match, so a layer that does anything else (a
gate, a residual, an activation under another name) is none. What its parameters are called, whether it multiplies by weight or by
1 + weight, and in which order it casts do not matter. eps is one of the numbers that the layer has as attributes, or a customary one.
"""

from __future__ import annotations

import copy
from collections.abc import Hashable, Iterator
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from normswap.precision import in_float64

EXACT = 1e-9  # relative; float64 leaves 1e-14, and an eps that is wrong by 1e-6 leaves 1e-6
_CUSTOMARY_EPS = (1e-5, 1e-6, 1e-12, 1e-8, 1e-3, 0.0, torch.finfo(torch.float32).eps, torch.finfo(torch.float64).eps)
AFTER = ("drop", "act")


@dataclass(frozen=True)
class Normalizes:
    """What a layer was found to compute. axis: where its channels lie, -1 or 1; groups: of channels that share statistics."""

    kind: str
    axis: int
    channels: int
    eps: float
    groups: int = 1


_FOUND: dict[Hashable, Normalizes | None] = {}  # by what a layer is, apart from the values of its tensors


def probe(module: nn.Module) -> Normalizes | None:
    """What `module` normalizes, or None if it is no known normalization. Takes some milliseconds for the first of its kind."""
    kind = _kind(module)
    if kind not in _FOUND:
        _FOUND[kind] = _probe(module)
    return _FOUND[kind]


def _kind(module: nn.Module) -> Hashable:
    def fixed(value: object) -> Hashable:
        return value if isinstance(value, (int, float, str, bool, type(None), torch.Size)) else (type(value), id(value))

    own = (*module._parameters.items(), *module._buffers.items())
    return (
        type(module),
        tuple((name, fixed(value)) for name, value in sorted(vars(module).items()) if not name.startswith("_") and name != "training"),
        tuple((name, None if tensor is None else tensor.shape) for name, tensor in own),
        tuple((name, type(child)) for name, child in module._modules.items()),
    )


def _probe(module: nn.Module) -> Normalizes | None:
    sizes = {p.numel() for p in module.parameters(recurse=False)} | {v for v in vars(module).values() if type(v) is int and 1 < v < 1 << 20}
    sizes |= {v[-1] for v in vars(module).values() if isinstance(v, (tuple, list)) and v and type(v[-1]) is int and v[-1] > 1}
    try:
        bare = copy.deepcopy(module).eval()
    except Exception:  # a layer that cannot be copied cannot be tried
        return None
    for name in AFTER:
        if isinstance(bare._modules.get(name), nn.Module):
            bare._modules[name] = nn.Identity()
    shape = getattr(module, "input_shape", None)  # where it is known, it says how many channels each axis could have
    places = [(c, axis) for c in sorted(sizes, reverse=True) for axis in (-1, 1)] if shape is None else [(shape[-1], -1), (shape[1], 1)]
    return next((found for channels, axis in places if (found := _along(bare, module, channels, axis))), None)


def _along(bare: nn.Module, module: nn.Module, channels: int, axis: int) -> Normalizes | None:
    shape = (3, 5, channels) if axis == -1 else (3, channels, 4, 2)
    generator = torch.Generator().manual_seed(0)
    # Two calls on data of two kinds: a factor that a layer takes from the whole batch would pass for a part of the weight in one.
    xs = [torch.randn(shape, generator=generator, dtype=torch.float64) * scale + mean for scale, mean in ((2, 0.7), (0.5, -1.1))]
    ys = [_run(bare, module, x) for x in xs]
    if any(y is None for y in ys):
        return None
    y = torch.cat([y.movedim(axis, -1).reshape(-1, channels) for y in ys if y is not None])
    for candidates in zip(*(_candidates(module, x, axis) for x in xs), strict=True):
        z = torch.cat([z.movedim(axis, -1).reshape(-1, channels) for _, z in candidates])
        if _fits(z, y):
            found: Normalizes = candidates[0][0]
            return found
    return None


def _run(bare: nn.Module, module: nn.Module, x: Tensor) -> Tensor | None:
    device = next((t.device for t in (*module.parameters(), *module.buffers())), torch.device("cpu"))
    try:
        with torch.no_grad(), torch.random.fork_rng(devices=[]), in_float64():
            y = bare(x.to(device))
    except Exception:  # another shape was expected
        return None
    if not isinstance(y, Tensor) or y.shape != x.shape or not bool(y.isfinite().all()):
        return None
    return y.cpu().double()


def _candidates(module: nn.Module, x: Tensor, axis: int) -> Iterator[tuple[Normalizes, Tensor]]:
    channels = x.shape[axis]
    numbers = [v for v in vars(module).values() if type(v) is float and 0 <= v < 0.1]
    for eps in dict.fromkeys((*numbers, *_CUSTOMARY_EPS)):
        mean = x.mean(axis, keepdim=True)
        for correction in (0, 1):
            variance = x.var(axis, correction=correction, keepdim=True)
            for root in ((variance + eps).sqrt(), variance.sqrt() + eps):
                yield Normalizes("layer_norm", axis, channels, eps), (x - mean) / root
        yield Normalizes("rms_norm", axis, channels, eps), x / (x.square().mean(axis, keepdim=True) + eps).sqrt()
        if axis == 1:
            for groups in {1, channels, *(v for v in vars(module).values() if type(v) is int and 0 < v <= channels and channels % v == 0)}:
                parts = x.reshape(x.shape[0], groups, -1)
                centred = parts - parts.mean(-1, keepdim=True)
                z = centred / (parts.var(-1, correction=0, keepdim=True) + eps).sqrt()
                yield Normalizes("group_norm", axis, channels, eps, groups), z.reshape(x.shape)


def _fits(z: Tensor, y: Tensor) -> bool:
    """Whether y = a z + b with one a and b per column, exactly. A constant y fits everything, and so proves nothing."""
    centred, target = z - z.mean(0), y - y.mean(0)
    slope = (centred * target).sum(0) / centred.square().sum(0).clamp(min=1e-300)
    residual = (target - slope * centred).abs().max()
    return bool(target.abs().max() > 0) and bool(residual <= EXACT * target.abs().max())
