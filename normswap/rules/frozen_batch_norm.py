"""torchvision's FrozenBatchNorm2d -> BatchlessNorm, exactly. Its tensors are buffers, so the parameters come out frozen too.

    y = x * scale + (bias - running_mean * scale),  scale = weight / sqrt(running_var + eps)

is BatchNorm in eval mode: the formula and shapes of `batch_norm.py`.

Source: torchvision/ops/misc.py. torchvision is not imported, for the reason given in `batch_norm_act.py`.
"""

from __future__ import annotations

import sys
from typing import Any, cast

from torch import nn

from normswap.batchless import BatchlessNorm
from normswap.plan import Rule, Site
from normswap.rules import tensors
from normswap.rules.batch_norm import from_statistics, why_not_statistics


def _class() -> type[nn.Module] | None:
    return getattr(sys.modules.get("torchvision.ops.misc"), "FrozenBatchNorm2d", None)


def recognises(site: Site) -> bool:
    cls = _class()
    return cls is not None and isinstance(site.module, cls)


def check(site: Site) -> str | None:
    module, cls = cast(Any, site.module), cast(type[nn.Module], _class())
    return tensors.why_not_plain(site, {cls.forward}) or why_not_statistics(module.running_mean, module.running_var, module.eps)


def build(site: Site, std: str) -> nn.Module:
    return from_statistics(cast(nn.Module, site.module), BatchlessNorm, std)


RULE = Rule("frozen_batch_norm", recognises, check, build)
