"""A gradient that reaches parameters without being in the loss, in a graph that is exported.

    in_graph(shift, mean, p, ...)       shift, unchanged, as an operator: when a gradient comes back to it, mean and p get the given ones.

It saves what it gives and no activation. Elsewhere the term comes in the backward pass of the layer: `train_pass`.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from normswap.layer import optimizer_step

OP = "normswap::inject"


def inject_operator() -> Any:
    """The operator that stands for the term in an exported graph. In eval mode there is none."""
    return torch.ops.normswap.inject.default


@torch.library.custom_op(OP, mutates_args=())
def _inject(
    shift: Tensor, mean: Tensor, parameter: Tensor, by_mean: Tensor, by_parameter: Tensor, form: str, stats: str, rate: float
) -> Tensor:
    """shift. An operator: torch.export traces through an autograd.Function and loses its backward; an operator stays."""
    return shift.clone()


@_inject.register_fake
def _(shift: Tensor, mean: Tensor, parameter: Tensor, by_mean: Tensor, by_parameter: Tensor, form: str, stats: str, rate: float) -> Tensor:
    return torch.empty_like(shift)


def _set_up(ctx: Any, inputs: tuple[Any, ...], output: Any) -> None:
    _, mean, parameter, by_mean, by_parameter, form, stats, rate = inputs
    optimizer_step.adopt(mean, parameter, form, stats, rate)
    ctx.save_for_backward(by_mean, by_parameter)


def _backward(ctx: Any, gradient: Tensor) -> tuple[Any, ...]:
    by_mean, by_parameter = ctx.saved_tensors
    return gradient, by_mean.clone(), by_parameter.clone(), None, None, None, None, None


_inject.register_autograd(_backward, setup_context=_set_up)


def in_graph(
    shift: Tensor, mean: Tensor, parameter: Tensor, by_mean: Tensor, by_parameter: Tensor, *, form: str, stats: str, rate: float
) -> Tensor:
    """shift, with its gradients, in a graph that is being exported. form, stats, rate: what it says of the statistics, see `stepping`."""
    return torch.ops.normswap.inject(shift, mean, parameter, by_mean, by_parameter, form, stats, rate)  # type: ignore[no-any-return]
