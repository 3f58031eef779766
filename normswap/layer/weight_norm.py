r"""Weight norm in the place of a norm with fixed statistics, exactly: the norm goes into the conv or linear that feeds it.

    y = gamma (W u + b - mean) / std + beta          the producer W u + b, and the norm
      = g W / |W| u + bias                           torch's weight norm of the producer, where for each output channel

    g = gamma |W| / std      bias = beta + gamma (b - mean) / std

g and bias are computed in float64 and rounded once; W stays as it is, bit for bit. torch has one g for each index of one axis of W. The
output channels of a transposed convolution with several groups lie on two axes: there W becomes the product itself, gamma W / std, and
torch's g is what is left of it, its length.

Shapes: W as the producer has it; g one number per output channel (there, per output channel of a group); bias (outputs,).

Source: Salimans & Kingma 2016, arXiv:1602.07868; the parametrization is torch.nn.utils.parametrizations.weight_norm.
"""

from __future__ import annotations

from typing import Any, cast

import torch
from torch import Tensor, nn
from torch.nn.utils import parametrize

# The class of torch's weight norm: torch has no public name for it.
from torch.nn.utils.parametrizations import _WeightNorm

from normswap.layer import formulas
from normswap.layer.batchless_norm import BatchlessNorm
from normswap.layer.parametrized import put_back
from normswap.layer.producer import PRODUCERS, TRANSPOSED, filters, groups_of, outputs_of


class Removed(nn.Identity):
    """Stands where a norm was that is now in the weights of its producer: returns its input."""


class RemovedAct(Removed):
    """`Removed`, followed by the dropout and the activation that the norm applied itself (timm's norm-act layers).

    y = act(drop(x))
    """

    drop: nn.Module
    act: nn.Module

    def forward(self, input: Tensor) -> Tensor:
        return cast(Tensor, self.act(self.drop(input)))


def axis_of(producer: nn.Module) -> int:
    """The axis of the weight on which its output channels lie: `dim` of torch's weight norm."""
    return 1 if isinstance(producer, TRANSPOSED) else 0


@torch.no_grad()
def scale_of(norm: BatchlessNorm) -> Tensor:
    """gamma / std in float64, one number per channel."""
    parameter = norm.unrounded()
    std = formulas.std_of(norm.std_parameter.double() if parameter is None else parameter, norm.std)
    return ((1 if norm.weight is None else norm.weight.double()) / std).expand(norm.sizes)


@torch.no_grad()
def why_not(producer: nn.Module, norm: BatchlessNorm) -> str | None:
    """Why weight norm of `producer` cannot give what it and `norm` compute, as a clause about the norm; None if it can."""
    lengths, scale = _lengths(producer, scale_of(norm)), scale_of(norm)
    dtype: torch.dtype = cast(Any, producer).weight.dtype
    dead = int((lengths.to(dtype) == 0).sum())
    if dead:
        return f"has a producer with {dead} of {len(lengths)} filters that are 0, and weight norm divides by their length; prune them"
    if not bool((lengths if _is_split(producer) else lengths * scale).to(dtype).isfinite().all()):
        return f"has a scale that does not fit the {str(dtype).removeprefix('torch.')} of its producer; convert the model in float32"
    return None


@torch.no_grad()
def put_into(producer: Any, norm: BatchlessNorm) -> None:
    """Give `producer` torch's weight norm and a bias, so that it computes what it and `norm` computed. Changes the producer in place."""
    weight: nn.Parameter = producer.weight
    scale, mean = scale_of(norm), norm.mean.double().expand(norm.sizes)
    bias = (-mean if producer.bias is None else producer.bias.double() - mean) * scale
    if norm.bias is not None:
        bias = bias + norm.bias.double()
    if producer.bias is None:
        trains = weight.requires_grad or (norm.bias is not None and norm.bias.requires_grad)
        producer.bias = nn.Parameter(bias.to(weight.dtype), requires_grad=trains)
    else:
        producer.bias.copy_(bias)
    lengths = _lengths(producer, scale)
    if _is_split(producer):
        weight.copy_(weight.double() * _per_weight(producer, scale))
    parametrize_weight(producer)
    if not _is_split(producer):
        lengths = lengths * scale
    g: nn.Parameter = producer.parametrizations.weight.original0
    g.copy_(lengths.view(g.shape))
    g.requires_grad_(weight.requires_grad or (norm.weight is not None and norm.weight.requires_grad))


def _lengths(producer: Any, scale: Tensor) -> Tensor:
    """The length of each filter that torch divides by, in float64."""
    split = _is_split(producer)
    rows = (
        (producer.weight.double() * _per_weight(producer, scale)).transpose(0, 1).flatten(1) if split else filters(producer, torch.float64)
    )
    return cast(Tensor, torch.linalg.vector_norm(rows, dim=1))


def _per_weight(producer: Any, scale: Tensor) -> Tensor:
    """`scale`, shaped to broadcast against the weight of a transposed convolution with several groups."""
    rows = scale.view(producer.groups, 1, -1).expand(-1, producer.in_channels // producer.groups, -1).flatten(0, 1)
    return rows.view(*rows.shape, *(1,) * (producer.weight.dim() - 2))


def parametrize_weight(producer: nn.Module) -> None:
    """Give a conv or linear torch's weight norm over its output channels; its function stays."""
    # As torch's `weight_norm` does, without its hook for state dicts of torch 1, because of which a layer could not be pickled, ever after.
    parametrize.register_parametrization(producer, "weight", _WeightNorm(axis_of(producer)), unsafe=True)


def is_over_outputs(module: nn.Module) -> bool:
    """Whether a module is a conv or linear whose weight torch's weight norm, and no other parametrization, computes, per output channel."""
    if not isinstance(module, PRODUCERS) or not parametrize.is_parametrized(module, "weight"):
        return False
    (first, *more) = cast(Any, module).parametrizations["weight"]
    return not more and isinstance(first, _WeightNorm) and first.dim == axis_of(module)


def prepare(module: Any, *, bias: bool) -> None:
    """Give a conv or linear torch's weight norm, and a bias, if it lacks them, for values to be loaded into."""
    if bias and module.bias is None:
        outputs = outputs_of(module)
        module.bias = nn.Parameter(torch.zeros(outputs, dtype=module.weight.dtype, device=module.weight.device))
    if not is_over_outputs(module):
        parametrize_weight(module)


def put_away(model: nn.Module) -> None:
    """Put the weight norms of a model into its weights, in place: the same function, in layers that torch can pickle and fold."""
    for module in model.modules():
        if is_over_outputs(module):
            put_back(module, "weight")


def _is_split(producer: nn.Module) -> bool:
    """Whether the output channels lie on two axes of the weight."""
    return isinstance(producer, TRANSPOSED) and groups_of(producer) > 1
