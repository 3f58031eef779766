"""LayerNorm, GroupNorm, InstanceNorm and RMSNorm: recognised, and left as they are.

They compute their statistics from each sample, so no fixed (mean, std) gives the same function: a swap is an approximation that starts
from calibration data, and only exact swaps are made.
"""

from __future__ import annotations

from torch import nn
from torch.nn.modules.instancenorm import _InstanceNorm

from normswap.functional import KINDS
from normswap.plan import Rule, Site


def _per_sample(kind: str, cls: type[nn.Module]) -> Rule:
    def recognises(site: Site) -> bool:
        return KINDS[site.function] == kind if site.function else isinstance(site.module, cls)

    def check(site: Site) -> str:
        what = site.function or type(site.module).__name__
        return f"{what} takes its statistics from each sample, so an exact swap does not exist; an approximate one needs calibration data"

    return Rule(kind, recognises, check)


LAYER_NORM = _per_sample("layer_norm", nn.LayerNorm)
GROUP_NORM = _per_sample("group_norm", nn.GroupNorm)
INSTANCE_NORM = _per_sample("instance_norm", _InstanceNorm)
RMS_NORM = _per_sample("rms_norm", nn.RMSNorm)
