"""How far the statistics of each layer are from those of its input, read from the gradients of one step."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor, nn

from normswap.layer import formulas
from normswap.layer.batchless_norm import BatchlessNorm
from normswap.training.loss import layers_of


class Drift(NamedTuple):
    """How far one layer's statistics are off, over the samples of one step; scalars on the layer's device, 0 where the statistics fit.

    mean_z      the root mean square, over channels, of the mean of z = (x - mean) / std
    mean_z2     the mean, over channels, of the mean of z^2, minus 1: the variance is too small if it is positive
    held        the share of samples that the sample limit scaled down in the last forward pass; None for a layer without a limit
    """

    mean_z: Tensor
    mean_z2: Tensor
    held: Tensor | None = None


@torch.no_grad()
def drift(model: nn.Module) -> dict[str, Drift]:
    """The Drift of every layer whose statistics have a gradient, by name. Call it after the last backward of a step and before the step.

    It is computed from the gradients of mean and std, which tell the first two moments of z (`formulas.nll_gradients`) over all
    micro-batches and processes. The gradients have to be as backward left them: unscaled, not clipped, and after `attach`. Layers that are
    frozen, in eval mode or converted with aux="none" have no gradient, and are left out. Nothing is copied to the host.

    Raises UsageError if the model has no BatchlessNorm layer.
    """
    return {name: found for name, layer in layers_of(model).items() if (found := _of(layer)) is not None}


def _of(layer: BatchlessNorm) -> Drift | None:
    mean, parameter = layer.mean, layer.std_parameter
    if layer.aux == "none" or mean.grad is None or parameter.grad is None:
        return None
    std = layer.statistics()[1]
    f = layer._eps / std.square()
    modes = {"stats": layer.stats, "reduction": layer.reduction}
    d, r = formulas.misfit_of((mean.grad, parameter.grad), f, std, parameter, layer.std, **modes)  # type: ignore[arg-type]
    if layer.stats == "raw":  # the natural gradient is the mean over the calls already
        d, r = d / layer.calls, r / layer.calls
    factor = layer.run.factor if layer.limits_samples else None
    if factor is not None and torch._C._functorch.is_functorch_wrapped_tensor(factor):
        factor = None  # it comes from a forward pass in a transform of torch.func, and cannot be read outside of that
    return Drift((d / std).square().mean().sqrt(), r.mean(), None if factor is None else (factor < 1).to(r.dtype).mean())
