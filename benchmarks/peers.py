"""What else there is to do with a BatchNorm at small batches, from the formulas of their papers and public code. For benchmarks only.

Every function takes a network with BatchNorms that were measured on a first batch, and changes it in place to the method.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm
from torch.nn.utils import parametrize

EPS = 1e-5


def _wide(t: Tensor, x: Tensor) -> Tensor:
    """(C,) or (N, C) against x (N, C, *space)."""
    return t.view(*t.shape, *(1,) * (x.dim() - 2)) if t.dim() == 2 else t.view(1, -1, *(1,) * (x.dim() - 2))


def _mean(x: Tensor) -> Tensor:
    """Over samples and space: (C,)"""
    return x.mean([0, *range(2, x.dim())])


def _space(x: Tensor) -> Tensor:
    """Over space: (N, C)"""
    return x.flatten(2).mean(2) if x.dim() > 2 else x


class Peer(nn.Module):
    """A norm with BatchNorm's weight and bias, and what `progress` is told: the part of the training that is over."""

    def __init__(self, norm: _BatchNorm) -> None:
        super().__init__()
        assert norm.running_mean is not None
        assert norm.running_var is not None
        self.weight, self.bias = norm.weight, norm.bias
        self.momentum = norm.momentum or 0.1
        self.mean, self.var = norm.running_mean.clone(), norm.running_var.clone()
        self.progress = 0.0

    def affine(self, z: Tensor) -> Tensor:
        return z * _wide(self.weight, z) + _wide(self.bias, z)


class _Online(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, layer: OnlineNorm) -> Tensor:
        first = _space(x)
        spread = _space((x - _wide(first, x)).square())
        means, variances = [], []
        for m, v in zip(first, spread, strict=True):
            means.append(layer.mean)
            variances.append(layer.var)
            delta = m - layer.mean
            layer.var = layer.af * layer.var + (1 - layer.af) * v + layer.af * (1 - layer.af) * delta.square()
            layer.mean = layer.mean + (1 - layer.af) * delta
        std = (torch.stack(variances) + EPS).sqrt()
        y = (x - _wide(torch.stack(means), x)) / _wide(std, x)
        ctx.save_for_backward(y, std)
        ctx.layer = layer
        return y

    @staticmethod
    def backward(ctx: Any, g: Tensor) -> tuple[Tensor, None]:
        y, std = ctx.saved_tensors
        layer, rate = ctx.layer, 1 - ctx.layer.ab
        gy, yy, g1, y1 = _space(g * y), _space(y * y), _space(g), _space(y)
        along, level = [], []
        for t in range(len(g)):
            along.append(rate * layer.v)
            level.append(rate * layer.u)
            layer.v = layer.v + gy[t] - along[t] * yy[t]
            layer.u = layer.u + (g1[t] - along[t] * y1[t]) / std[t] - level[t]
        e = (g - _wide(torch.stack(along), g) * y) / _wide(std, g)
        return e - _wide(torch.stack(level), g), None


class OnlineNorm(Peer):
    """Chiley et al. arXiv:1905.05894, with activation clamping, its library's default, and its defaults for the two rates."""

    af, ab = 0.999, 0.99

    def __init__(self, norm: _BatchNorm) -> None:
        super().__init__(norm)
        self.u, self.v = torch.zeros_like(self.mean), torch.zeros_like(self.mean)

    def forward(self, x: Tensor) -> Tensor:
        z = _Online.apply(x, self) if self.training else (x - _wide(self.mean, x)) / _wide((self.var + EPS).sqrt(), x)  # type: ignore[no-untyped-call]
        return self.affine(z).clamp(-5, 5)


class _Moving(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, layer: MABN, chi: Tensor) -> Tensor:
        zz = x / _wide((chi + EPS).sqrt(), x)
        ctx.save_for_backward(zz, chi)
        ctx.layer = layer
        return zz

    @staticmethod
    def backward(ctx: Any, g: Tensor) -> tuple[Tensor, None, None]:
        zz, chi = ctx.saved_tensors
        layer = ctx.layer
        layer.psi.append(_mean(g * zz))
        psi = torch.stack([*layer.psi] if layer.warm else [layer.psi[-1]]).mean(0)
        return (g - zz * _wide(psi, g)) / _wide((chi + EPS).sqrt(), g), None, None


class MABN(Peer):
    """Yan et al. arXiv:2001.06838: the moving average of <x^2> over the last 32 samples, no mean; weights before it are centred."""

    window, warm_up, slow = 32, 100, 0.02

    def __init__(self, norm: _BatchNorm) -> None:
        super().__init__(norm)
        self.running = self.var + self.mean.square()
        self.steps, self.warm = 0, False
        self.chi: deque[Tensor] = deque()
        self.psi: deque[Tensor] = deque()

    def forward(self, x: Tensor) -> Tensor:
        if not self.training:
            return self.affine(x / _wide((self.running + EPS).sqrt(), x))
        m = max(1, self.window // len(x))
        if self.chi.maxlen != m:
            self.chi, self.psi = deque(maxlen=m), deque(maxlen=m)
        self.chi.append(_mean(x.detach().square()))
        self.steps += 1
        self.warm = self.steps > max(m, self.warm_up)
        chi = torch.stack([*self.chi] if self.warm else [self.chi[-1]]).mean(0)
        zz: Tensor = _Moving.apply(x, self, chi)  # type: ignore[no-untyped-call]
        if self.warm:
            zz = zz * _wide(((chi + EPS) / (self.running + EPS)).sqrt().clamp(0.2, 5), x)
        self.running = self.running + self.slow * (chi - self.running)
        return self.affine(zz)


class BatchRenorm(Peer):
    """Ioffe, arXiv:1702.03275. The clips are those of BatchNorm for a tenth of the training, then grow to 3 and 5."""

    def forward(self, x: Tensor) -> Tensor:
        mean, std = self.mean, (self.var + EPS).sqrt()
        if not self.training:
            return self.affine((x - _wide(mean, x)) / _wide(std, x))
        own = _mean(x)
        variance = _mean((x - _wide(own, x)).square())
        own_std = (variance + EPS).sqrt()
        grown = min(1.0, max(0.0, (self.progress - 0.1) / 0.4))
        most, far = 1 + 2 * grown, 5 * grown
        r = (own_std / std).clamp(1 / most, most).detach()
        d = ((own - mean) / std).clamp(-far, far).detach()
        with torch.no_grad():
            self.mean = mean + self.momentum * (own.detach() - mean)
            self.var = self.var + self.momentum * (variance.detach() - self.var)
        return self.affine((x - _wide(own, x)) / _wide(own_std, x) * _wide(r, x) + _wide(d, x))


class _Centred(nn.Module):
    def forward(self, weight: Tensor) -> Tensor:
        return weight - weight.flatten(1).mean(1).view(-1, *(1,) * (weight.dim() - 1))


class _Standardized(nn.Module):
    """Qiao et al. arXiv:1903.10520."""

    def forward(self, weight: Tensor) -> Tensor:
        rows = weight.flatten(1)
        return ((rows - rows.mean(1, keepdim=True)) / (rows.std(1, keepdim=True) + 1e-5)).view_as(weight)


def _replaced(model: nn.Module, make: Callable[[_BatchNorm], nn.Module]) -> None:
    for name, module in list(model.named_modules()):
        if isinstance(module, _BatchNorm):
            parent, _, key = name.rpartition(".")
            setattr(model.get_submodule(parent), key, make(module))


def _weights(model: nn.Module, form: Callable[[], nn.Module]) -> None:
    """Of every conv and linear but the last, which no norm follows."""
    layers = [m for m in model.modules() if isinstance(m, (nn.Conv2d, nn.Linear))]
    for layer in layers[:-1]:
        parametrize.register_parametrization(layer, "weight", form())


def group_norm(model: nn.Module) -> None:
    _replaced(model, lambda norm: nn.GroupNorm(8, norm.num_features))


def group_norm_standardized(model: nn.Module) -> None:
    group_norm(model)
    _weights(model, _Standardized)


def online_norm(model: nn.Module) -> None:
    _replaced(model, OnlineNorm)


def mabn(model: nn.Module) -> None:
    _replaced(model, MABN)
    _weights(model, _Centred)


def batch_renorm(model: nn.Module) -> None:
    _replaced(model, BatchRenorm)


def _stay(self: nn.Module, mode: bool = True) -> nn.Module:
    return nn.Module.train(self, False)


def frozen(model: nn.Module) -> None:
    """BatchNorm in eval mode for ever; its weight and bias train."""
    for module in model.modules():
        if isinstance(module, _BatchNorm):
            module.__class__ = type(type(module).__name__, (type(module),), {"train": _stay})
            module.eval()
