"""timm's BatchNormAct2d and SyncBatchNormAct -> BatchlessNormAct, exactly: BatchNorm followed by the layer's own dropout and activation.

    y = act(drop(batch_norm(x)))   becomes   y = act(drop(batchless(x)))     `drop` and `act` are kept, under their names

The formula of batch_norm is that of `batch_norm.py`. Shapes: x (N, C, H, W); every parameter (C,).

Source: timm/layers/norm_act.py. timm is not imported: a model can only hold one of its classes if timm has been imported already.
"""

from __future__ import annotations

import sys
from collections.abc import Callable
from typing import Any, cast

from torch import nn

from normswap.detect.sites import Rule, Site
from normswap.layer.batchless_norm import BatchlessNormAct
from normswap.rules import plain
from normswap.rules.batch_norm import from_statistics, why_not_statistics


def _timm_class(name: str) -> type[nn.Module] | None:
    return getattr(sys.modules.get("timm.layers.norm_act"), name, None)


def _classes() -> tuple[type[nn.Module], ...]:
    found = (_timm_class(name) for name in ("BatchNormAct2d", "SyncBatchNormAct", "FrozenBatchNormAct2d"))
    return tuple(cls for cls in found if cls is not None)


def recognises(site: Site) -> bool:
    return isinstance(site.module, _classes())


def check(site: Site) -> str | None:
    module = cast(Any, site.module)
    forwards: set[Callable[..., Any]] = {cls.forward for cls in _classes()}
    return plain.why_not_plain(site, forwards) or why_not_statistics(module.running_mean, module.running_var, module.eps)


def build(site: Site, std: str) -> nn.Module:
    return from_statistics(cast(nn.Module, site.module), BatchlessNormAct, std)


RULE = Rule("batch_norm_act", recognises, check, build)
