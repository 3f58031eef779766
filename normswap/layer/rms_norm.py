r"""RMSNorm in the place of a LayerNorm whose input has mean 0, exactly; and the hooks that give a value mean 0.

    LayerNorm  y = weight * (x - m) / sqrt(v + eps) + bias       m, v: mean and variance of x over its channels
    RMSNorm    y = weight * x / sqrt(mean(x^2) + eps) + bias     the same where m = 0, as v = mean((x - m)^2)

Shapes: x (*, C), or with C on another axis; weight, bias (C,).

Source: Zhang & Sennrich 2019, arXiv:1910.07467; that the two are equal on streams without a mean: Jiang et al. 2023, arXiv:2305.14858.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, cast

import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.utils import parametrize


class RMSNorm(nn.RMSNorm):
    """torch's RMSNorm, followed by a bias, over the channels on any axis.

    The state dict has the keys of the LayerNorm that it replaces. Raises RuntimeError, as torch's, for another number of channels.
    """

    bias: nn.Parameter | None

    def __init__(self, channels: int, eps: float, *, axis: int = -1, weight: Tensor | None = None, bias: Tensor | None = None) -> None:
        super().__init__(channels, eps=eps, elementwise_affine=False)
        self.axis = axis
        for name, given in (("weight", weight), ("bias", bias)):
            parameter = None if given is None else nn.Parameter(given.detach().clone(), requires_grad=given.requires_grad)
            self.register_parameter(name, parameter)

    def forward(self, x: Tensor) -> Tensor:
        moved = x if self.axis == -1 else x.movedim(self.axis, -1)
        y = F.rms_norm(moved, self.normalized_shape, self.weight, self.eps)
        y = y if self.bias is None else y + self.bias
        return y if self.axis == -1 else y.movedim(-1, self.axis)

    def extra_repr(self) -> str:
        return (
            f"{self.normalized_shape[0]}, eps={self.eps}, axis={self.axis}, weight={self.weight is not None}, bias={self.bias is not None}"
        )


def centred(x: Tensor, axis: int) -> Tensor:
    """x - mean of x over one axis."""
    return x - x.mean(axis, keepdim=True)


class Centred(nn.Module):
    """The parametrization W = C V of torch: V without its mean over one axis."""

    def __init__(self, axis: int) -> None:
        super().__init__()
        self.axis = axis

    def forward(self, weight: Tensor) -> Tensor:
        return centred(weight, self.axis)


def kept_centred(model: nn.Module) -> list[tuple[nn.Module, str]]:
    """Every weight of a model that a `Centred` computes, as the module that has it and its name there."""
    found: list[tuple[nn.Module, str]] = []
    for module in model.modules():
        named = cast(Any, module).parametrizations.items() if parametrize.is_parametrized(module) else ()
        found += [(module, name) for name, parts in named if [type(part) for part in parts] == [Centred]]
    return found


class CentreOutput:
    """A forward hook that centres what a module returns. An object, so that copies and pickles keep it."""

    def __init__(self, axis: int) -> None:
        self.axis = axis

    def __call__(self, module: nn.Module, args: Any, output: Tensor) -> Tensor:
        return centred(output, self.axis)


class CentreInput:
    """A forward pre-hook that centres one argument of a module. place: its number or its name."""

    def __init__(self, axis: int, place: int | str) -> None:
        self.axis, self.place = axis, place

    def __call__(self, module: nn.Module, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> tuple[tuple[Any, ...], dict[str, Any]]:
        if isinstance(self.place, str):
            return args, {**kwargs, self.place: centred(kwargs[self.place], self.axis)}
        place = self.place
        return (*args[:place], centred(args[place], self.axis), *args[place + 1 :]), dict(kwargs)


def centrings(module: nn.Module) -> list[tuple[int | str | None, int]]:
    """(place, axis) of each hook of a module that centres."""
    hooks = [*module._forward_pre_hooks.values(), *module._forward_hooks.values()]
    return [(getattr(hook, "place", None), hook.axis) for hook in hooks if isinstance(hook, CentreInput | CentreOutput)]


def centre(module: nn.Module, place: int | str | None, axis: int) -> None:
    """Register the hook that centres the output of a module (place None), or one of its arguments, unless it is there."""
    if (place, axis) in centrings(module):
        return
    if place is None:
        module.register_forward_hook(CentreOutput(axis))
    else:
        module.register_forward_pre_hook(CentreInput(axis, place), with_kwargs=True)
