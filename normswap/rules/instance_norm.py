"""InstanceNorm1d/2d/3d with running statistics -> BatchlessNorm, exactly. `per_sample.py` has the rule for one without them.

With track_running_stats=True InstanceNorm in eval mode is BatchNorm in eval mode: the formula of `batch_norm.py`.
Shapes: x (N, C, *space); every parameter (C,). An unbatched x (C, *space) has its channels elsewhere, and is refused by the layer when it
is called, also where axis 1 happens to have as many.

Source: Ulyanov, Vedaldi & Lempitsky 2016, arXiv:1607.08022.
"""

from __future__ import annotations

from typing import cast

from torch import nn

from normswap.detect.sites import Rule, Site
from normswap.layer.batchless_norm import BatchlessNorm
from normswap.models.torch_private import AnyInstanceNorm
from normswap.rules import plain
from normswap.rules.batch_norm import from_statistics, why_not_statistics
from normswap.rules.per_sample import INSTANCE_NORM_FORWARDS


def recognises(site: Site) -> bool:
    # In eval mode InstanceNorm uses its running statistics only if track_running_stats is still set; BatchNorm does if it has the buffers.
    return isinstance(site.module, AnyInstanceNorm) and site.module.track_running_stats and site.module.running_mean is not None


def check(site: Site) -> str | None:
    module = cast(AnyInstanceNorm, site.module)
    return plain.why_not_plain(site, INSTANCE_NORM_FORWARDS) or why_not_statistics(module.running_mean, module.running_var, module.eps)


def build(site: Site, std: str) -> nn.Module:
    return from_statistics(cast(nn.Module, site.module), BatchlessNorm, std)


RULE = Rule("instance_norm", recognises, check, build)
