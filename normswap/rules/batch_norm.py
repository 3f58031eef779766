"""BatchNorm1d/2d/3d and SyncBatchNorm -> BatchlessNorm, exactly.

In eval mode BatchNorm is       y = weight * (x - running_mean) / sqrt(running_var + eps) + bias
and BatchlessNorm is            y = weight * (x - mean) / std + bias
so   mean = running_mean,  std = sqrt(running_var + eps)   gives the same function, up to rounding.

The std is computed in float64 and rounded once. affine=False: no weight and bias. momentum plays no part in eval mode.
Shapes: x (N, C, *space); every parameter (C,).

Source: Ioffe & Szegedy 2015, arXiv:1502.03167, algorithm 2.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import cast

import torch
from torch import Tensor, nn

from normswap.detect.sites import Rule, Site
from normswap.layer import formulas
from normswap.layer.batchless_norm import BatchlessNorm, Source
from normswap.layer.formulas import StdForm
from normswap.models.copying import copy_hooks
from normswap.models.torch_private import AnyBatchNorm
from normswap.rules import plain

NO_STATISTICS = (
    "has no running statistics to start from (track_running_stats=False): it normalizes by each batch's own, in eval mode too, so an exact "
    "swap does not exist"
)
ROUNDED = 1e-4  # relative error of running_var + eps above which a negative running_var must have cancelled eps

FORWARDS = {AnyBatchNorm.forward, nn.SyncBatchNorm.forward}


def recognises(site: Site) -> bool:
    return isinstance(site.module, AnyBatchNorm)


def check(site: Site) -> str | None:
    module = cast(AnyBatchNorm, site.module)
    return plain.why_not_plain(site, FORWARDS) or why_not_statistics(module.running_mean, module.running_var, module.eps)


def why_not_statistics(
    mean: Tensor | None, var: Tensor | None, eps: float, *, names: tuple[str, str] = ("running_mean", "running_var")
) -> str | None:
    """Why (mean, var) cannot become the statistics of a BatchlessNorm, or None. names: what the layer calls the two, for the sentence."""
    if mean is None or var is None:
        return f"{NO_STATISTICS}; give it some: set track_running_stats=True, register the buffers and run batches in train mode"
    if mean.is_meta or var.is_meta:
        return "is on the meta device, so its statistics have no values yet; load the weights first"
    if mean.numel() == 0:
        return "has no channels, so there is nothing to replace; leave it"
    for name, statistic in zip(names, (mean, var), strict=True):
        if statistic.is_complex() or (statistic.is_floating_point() and statistic.itemsize < 2):
            return (
                f"has a {name} of {str(statistic.dtype).removeprefix('torch.')}, which torch does not compute with; convert it to float32"
            )
        bad = int((~statistic.isfinite()).sum())
        if bad:
            return (
                f"has {bad} of {statistic.numel()} values of {name} that are not finite; convert an earlier checkpoint, or one in float32"
            )
    # The sum in the precision of the source layer, and in the float64 of `formulas.std_of_variance`: running_var = -eps may give 0 in only
    # one of them.
    own, exact = (var.detach().to(dtype) + eps for dtype in (torch.promote_types(var.dtype, torch.float32), torch.float64))
    flat = ~((own > 0) & (exact > 0))
    if bool(flat.any()):
        return (
            f"has {int(flat.sum())} of {var.numel()} channels whose {names[1]} + eps is not positive (eps={eps:g}): no std to divide by; "
            f"repair {names[1]} (did a loader subtract eps?) or prune these channels"
        )
    unsure = int(((own.double() - exact).abs() > ROUNDED * exact).sum())
    if unsure:
        return (
            f"has {unsure} of {var.numel()} channels whose {names[1]} cancels eps up to rounding (eps={eps:g}): the std depends on the "
            f"precision; repair {names[1]} (did a loader subtract eps?) or prune these channels"
        )
    return None


def build(site: Site, std: str) -> nn.Module:
    return from_statistics(cast(AnyBatchNorm, site.module), BatchlessNorm, std)


def from_statistics(module: nn.Module, cls: type[BatchlessNorm], std: str, eps: float | None = None) -> BatchlessNorm:
    """A `cls` that computes the same as `module`, which has BatchNorm's tensors under BatchNorm's names; with all that `revert` needs."""
    mean, var = cast(Tensor, module.running_mean), cast(Tensor, module.running_var)
    weight, bias = cast("Tensor | None", module.weight), cast("Tensor | None", module.bias)
    eps = cast(float, module.eps) if eps is None else eps
    trainable = isinstance(module, AnyBatchNorm)  # other sources (a frozen BatchNorm) have buffers only, and stay frozen
    layer = layer_with(cls, Normalization(mean, var, eps, weight, bias), std, trainable=trainable)
    layer.source_mean = mean.detach().clone()
    layer.source_var = var.detach().clone()
    batches = getattr(module, "num_batches_tracked", None)
    layer.register_buffer("source_batches", None if batches is None else batches.detach().clone())
    layer.source = Source(
        cls=type(module),
        eps=eps,
        attributes=plain.plain_attributes(module),
        parameters={name: p.dtype for name, p in module._parameters.items() if p is not None},
        buffers={name: b.dtype for name, b in module._buffers.items() if b is not None},
    )
    copy_hooks(module, layer)
    # Children (the activation of a BatchNormAct2d, an observer that a hook calls) and attributes that others set on `module` stay.
    layer._modules.update(module._modules)
    settings = {*cast("list[str]", getattr(module, "__constants__", ())), "eps"}
    for name, value in layer.source.attributes.items():
        if name not in settings and not hasattr(layer, name):
            setattr(layer, name, value)
    return layer


@dataclass(frozen=True)
class Normalization:
    """weight * (x - mean) / sqrt(var + eps) + bias; every tensor (C,). weight None: 1; bias None: 0."""

    mean: Tensor
    var: Tensor
    eps: float
    weight: Tensor | None
    bias: Tensor | None


@torch.no_grad()
def layer_with(
    cls: type[BatchlessNorm], source: Normalization, std: str, *, channel_axis: int = 1, trainable: bool = True
) -> BatchlessNorm:
    """A `cls` that computes the formula of `source`.

    Its weight and bias are trainable if those of `source` are. Its mean and std are trainable if `trainable` is set, and the weight is
    trainable or None.
    """
    mean, weight = source.mean, source.weight
    layer = cls(
        mean.numel(),
        channel_axis=channel_axis,
        affine=weight is not None or source.bias is not None,
        std=cast(StdForm, std),
        device=mean.device,
        dtype=mean.dtype,
    )
    layer.set_statistics(mean, formulas.std_of_variance(source.var, source.eps))
    for parameter in (layer.mean, layer.std_parameter):
        parameter.requires_grad_(trainable and (weight is None or weight.requires_grad))
    for mine, given in ((layer.weight, weight), (layer.bias, source.bias)):
        if mine is not None:
            if given is not None:
                mine.copy_(given)
            mine.requires_grad_(given is not None and given.requires_grad)
    return layer


RULE = Rule("batch_norm", recognises, check, build)
