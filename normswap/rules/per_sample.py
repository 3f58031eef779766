"""Norms of torch that compute their statistics from each input -> BatchlessNorm, approximately, from calibration data.

    layer_norm      y = weight * (x - m) / sqrt(v + eps) + bias    m, v: mean and variance of each sample over its last axes
    group_norm      the same                                       m, v: of each sample over space and a group of channels
    instance_norm   the same                                       m, v: of each sample and channel over space
    rms_norm        y = weight * x / sqrt(mean(x^2) + eps)         the mean of each sample over its last axes
    batch_norm      the same as layer_norm                         m, v: of each channel over the batch (no running statistics)

and BatchlessNorm   y = weight' * (x - mean) / std + bias'

with mean and std those of each channel over the calibration data, and weight', bias' fitted to the source's output by least squares. Where
the source has no bias, bias' is new.

Shapes: for layer_norm and rms_norm x (*, *normalized_shape), and every parameter has the normalized_shape, so the channels lie on the last
axes. For the others x (N, C, *space), and every parameter (C,).

Sources: Ba, Kiros & Hinton 2016, arXiv:1607.06450; Wu & He 2018, arXiv:1803.08494; Ulyanov, Vedaldi & Lempitsky 2016, arXiv:1607.08022;
Zhang & Sennrich 2019, arXiv:1910.07467.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Sequence
from typing import Any, cast

import torch
from torch import nn

from normswap.detect.functional import InstanceNormCall
from normswap.detect.sites import Rule, Site
from normswap.layer.batchless_norm import BatchlessNorm, BatchlessNormAct
from normswap.layer.formulas import StdForm
from normswap.models.copying import copy_hooks
from normswap.models.torch_private import AnyBatchNorm, AnyInstanceNorm
from normswap.rules import batch_norm, plain

Channels = tuple[Sequence[int], Sequence[int]]  # (sizes, axes of x): how many channels there are on which axis; often one of each

# The channels of each class of torch.
CHANNELS: dict[type[nn.Module], Callable[[Any], Channels]] = {
    nn.LayerNorm: lambda norm: (norm.normalized_shape, range(-len(norm.normalized_shape), 0)),
    nn.RMSNorm: lambda norm: (norm.normalized_shape, range(-len(norm.normalized_shape), 0)),
    nn.GroupNorm: lambda norm: ((norm.num_channels,), (1,)),
    AnyInstanceNorm: lambda norm: ((norm.num_features,), (1,)),
    AnyBatchNorm: lambda norm: ((norm.num_features,), (1,)),
}
INSTANCE_NORM_FORWARDS = {AnyInstanceNorm.forward, InstanceNormCall.forward}


def inexact(site: Site) -> str:
    """Why the swap of a norm that takes its statistics from each sample is not exact."""
    what = site.function or type(site.module).__name__
    return f"{what} takes its statistics from each sample, so an exact swap does not exist"


def uncalibrated(module: nn.Module, channels: Channels, std: str, *, after: bool = False) -> BatchlessNorm:
    """A BatchlessNorm with mean 0, std 1 and weight 1, on the device of `module`, trainable if that is. Its `source` is None.

    after: whether `module` has a dropout and an activation, `drop` and `act`, which the new layer takes over.
    """
    sizes, axes = channels
    tensors = [*module.parameters(recurse=False), *module.buffers(recurse=False)]
    floats = [t for t in tensors if t.is_floating_point()]
    cls = BatchlessNormAct if after else BatchlessNorm
    layer = cls(
        sizes[0] if len(sizes) == 1 else tuple(sizes),
        channel_axis=axes[0] if len(axes) == 1 else tuple(axes),
        std=cast(StdForm, std),
        device=floats[0].device if floats else torch.device("cpu"),
        dtype=floats[0].dtype if floats else None,
    )
    own = list(module.parameters(recurse=False))
    layer.requires_grad_(not own or any(p.requires_grad for p in own))
    layer._modules.update({name: child for name, child in module._modules.items() if name not in ("drop", "act", "activation")})
    if after:
        for name in ("drop", "act"):
            setattr(layer, name, module._modules.get(name) or nn.Identity())
        if isinstance(activation := module._modules.get("activation"), nn.Module):  # transformers' name for `act`
            layer.act = activation
    copy_hooks(module, layer)
    return layer


def _rule(
    kind: str,
    cls: type[nn.Module],
    forwards: Collection[Callable[..., Any]],
    recognises: Callable[[Site], bool] | None = None,
    why: Callable[[Site], str] = inexact,
) -> Rule:
    """The rule for a class in CHANNELS. By default it does not recognise a subclass with its own forward, which later rules may."""

    def is_plain(site: Site) -> bool:
        return isinstance(site.module, cls) and type(site.module).forward in forwards

    def check(site: Site) -> str | None:
        return plain.why_not_plain(site, forwards)

    def build(site: Site, std: str) -> nn.Module:
        module = cast(nn.Module, site.module)
        return uncalibrated(module, CHANNELS[cls](module), std)

    return Rule(kind, recognises or is_plain, check, build, why)


def _untracked(site: Site) -> bool:
    module = site.module
    return isinstance(module, AnyBatchNorm) and module.running_mean is None and type(module).forward in batch_norm.FORWARDS


LAYER_NORM = _rule("layer_norm", nn.LayerNorm, {nn.LayerNorm.forward})
GROUP_NORM = _rule("group_norm", nn.GroupNorm, {nn.GroupNorm.forward})
RMS_NORM = _rule("rms_norm", nn.RMSNorm, {nn.RMSNorm.forward})
INSTANCE_NORM = _rule("instance_norm", AnyInstanceNorm, INSTANCE_NORM_FORWARDS, lambda site: isinstance(site.module, AnyInstanceNorm))
BATCH_NORM = _rule("batch_norm", AnyBatchNorm, batch_norm.FORWARDS, _untracked, lambda site: batch_norm.NO_STATISTICS)
