"""InstanceNorm1d/2d/3d -> BatchlessNorm: exactly if it keeps running statistics, approximately, from calibration data, if not.

With track_running_stats=True InstanceNorm in eval mode is BatchNorm in eval mode: the formula of `batch_norm.py`. Without, it computes

    y = weight * (x - m) / sqrt(v + eps) + bias        m, v: of each sample and channel over space

and BatchlessNorm approximates it as in `layer_norm.py`. Shapes: x (N, C, *space); every parameter (C,). An unbatched x (C, *space) has its
channels elsewhere, and is refused by the layer when it is called.

Source: Ulyanov, Vedaldi & Lempitsky 2016, arXiv:1607.08022.
"""

from __future__ import annotations

from typing import cast

from torch import nn
from torch.nn.modules.instancenorm import _InstanceNorm

from normswap.detect.handwritten import InstanceNormCall
from normswap.detect.sites import Rule, Site
from normswap.layer.batchless_norm import BatchlessNorm
from normswap.rules import per_sample, plain
from normswap.rules.batch_norm import from_statistics, why_not_statistics

FORWARDS = {_InstanceNorm.forward, InstanceNormCall.forward}


def _tracks(site: Site) -> bool:
    # In eval mode it uses the running statistics if the flag is still set; the buffers alone do not decide, unlike for BatchNorm.
    return isinstance(site.module, _InstanceNorm) and site.module.track_running_stats and site.module.running_mean is not None


def check_tracked(site: Site) -> str | None:
    module = cast(_InstanceNorm, site.module)
    return plain.why_not_plain(site, FORWARDS) or why_not_statistics(module.running_mean, module.running_var, module.eps)


def build_tracked(site: Site, std: str) -> nn.Module:
    return from_statistics(cast(nn.Module, site.module), BatchlessNorm, std)


def recognises(site: Site) -> bool:
    return isinstance(site.module, _InstanceNorm)


def check(site: Site) -> str | None:
    return plain.why_not_plain(site, FORWARDS)


def build(site: Site, std: str) -> nn.Module:
    assert isinstance(site.module, _InstanceNorm)
    return per_sample.uncalibrated(site.module, (site.module.num_features,), (1,), std)


TRACKED = Rule("instance_norm", _tracks, check_tracked, build_tracked)
RULE = Rule("instance_norm", recognises, check, build, per_sample.per_sample)
