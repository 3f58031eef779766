"""How the statistics of a layer learn in a graph that torch.export makes in train mode: by an operator of ours, `normswap::inject`.

    in_graph(shift, (mean, p), (by_mean, by_p), ...)     shift, unchanged; when a gradient comes back to it, mean and p get by_mean and by_p

torch.export traces through an autograd.Function and loses its backward pass; an operator stays. Its inputs include the parameters of the
statistics, so that they step when the exported program is trained (`InGraph`). A graph that is exported in eval mode has no such operator.
Outside exported graphs the backward pass of the layer adds the term, see `train_pass`.
"""

from __future__ import annotations

import weakref
from typing import Any, cast

import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensor
from torch.utils.weak import WeakIdKeyDictionary

from normswap.layer import optimizer_step
from normswap.layer.formulas import StdForm
from normswap.layer.run import Run

OP = "normswap::inject"


def inject_operator() -> Any:
    """The operator that stands for the term in an exported graph."""
    return torch.ops.normswap.inject.default


def in_graph(
    shift: Tensor, statistics: tuple[Tensor, Tensor], gradients: tuple[Tensor, Tensor], *, form: str, stats: str, rate: float
) -> Tensor:
    """shift, computed in the exported graph by an operator that gives the statistics their gradients.

    statistics: mean and the std's parameter; gradients: by these two. form, stats, rate: how they step, see `optimizer_step`.
    """
    return torch.ops.normswap.inject(shift, *statistics, *gradients, form, stats, rate)  # type: ignore[no-any-return]


@torch.library.custom_op(OP, mutates_args=())
def _inject(
    shift: Tensor, mean: Tensor, parameter: Tensor, by_mean: Tensor, by_parameter: Tensor, form: str, stats: str, rate: float
) -> Tensor:
    return shift.clone()


@_inject.register_fake
def _(shift: Tensor, mean: Tensor, parameter: Tensor, by_mean: Tensor, by_parameter: Tensor, form: str, stats: str, rate: float) -> Tensor:
    return torch.empty_like(shift)


def _set_up(ctx: Any, inputs: tuple[Any, ...], output: Any) -> None:
    _, mean, parameter, by_mean, by_parameter, form, stats, rate = inputs
    adopt(mean, parameter, form, stats, rate)
    ctx.save_for_backward(by_mean, by_parameter)


def _backward(ctx: Any, gradient: Tensor) -> tuple[Any, ...]:
    by_mean, by_parameter = ctx.saved_tensors
    return gradient, by_mean.clone(), by_parameter.clone(), None, None, None, None, None


_inject.register_autograd(_backward, setup_context=_set_up)


# --- the step ---------------------------------------------------------------------------------------------------------------------------


class InGraph:
    """The statistics of a norm in an exported program, as a `run.Layer`: there is no module, only an operator that has them as inputs."""

    aux: Any = "auto"
    stepped, training = False, True
    input_mean = trend = producer_in_training = None
    reduction, _eps, calls = "mean", 0.0, 1  # defaults, as the operator does not record them
    steps: Tensor | None = None

    def __init__(self, mean: nn.Parameter, parameter: nn.Parameter, form: StdForm, stats: str, momentum: float) -> None:
        self._parameters = weakref.ref(mean), weakref.ref(parameter)
        self.std: StdForm = form
        self.stats: Any = stats
        self.momentum = momentum
        self.run = Run()

    @property
    def mean(self) -> nn.Parameter:
        return cast(nn.Parameter, self._parameters[0]())

    @property
    def std_parameter(self) -> nn.Parameter:
        return cast(nn.Parameter, self._parameters[1]())


_adopted: WeakIdKeyDictionary = WeakIdKeyDictionary()  # mean -> its InGraph, which lives as long as mean does


def adopt(mean: Tensor, parameter: Tensor, form: str, stats: str, rate: float) -> InGraph | None:
    """Let the statistics of an exported program step with the optimizer that holds them. None if they are not parameters, or are fake."""
    if not isinstance(mean, nn.Parameter) or not isinstance(parameter, nn.Parameter) or isinstance(mean.data, FakeTensor):
        return None
    if mean not in _adopted:
        layer = InGraph(mean, parameter, cast(StdForm, form), stats, rate)
        _adopted[mean] = layer
        optimizer_step.watch(layer)
    return cast(InGraph, _adopted[mean])
