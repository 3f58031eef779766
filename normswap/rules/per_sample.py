"""What the rules share whose replacement starts from calibration data: the empty layer that `calibrate` fills, and why it is not exact."""

from __future__ import annotations

from collections.abc import Sequence
from typing import cast

import torch
from torch import nn

from normswap.detect.sites import Site
from normswap.layer.batchless_norm import BatchlessNorm, BatchlessNormAct
from normswap.layer.formulas import StdForm
from normswap.models.copying import copy_hooks


def per_sample(site: Site) -> str:
    """Why such a swap is not exact."""
    what = site.function or type(site.module).__name__
    return f"{what} takes its statistics from each sample, so an exact swap does not exist"


def uncalibrated(module: nn.Module, sizes: Sequence[int], axes: Sequence[int], std: str, *, after: bool = False) -> BatchlessNorm:
    """A BatchlessNorm with mean 0, std 1 and weight 1, on the source's device, trainable if the source is. `source` stays None.

    after: the source has a dropout and an activation of its own, `drop` and `act`, which come along.
    """
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
