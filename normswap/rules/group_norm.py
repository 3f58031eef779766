"""GroupNorm -> BatchlessNorm, approximately, from calibration data.

GroupNorm computes              y = weight * (x - m) / sqrt(v + eps) + bias        m, v: of each sample over space and a group of channels
and BatchlessNorm               y = weight' * (x - mean) / std + bias'             as in `layer_norm.py`

Shapes: x (N, C, *space); every parameter (C,).

Source: Wu & He 2018, arXiv:1803.08494.
"""

from __future__ import annotations

from torch import nn

from normswap.detect.sites import Rule, Site
from normswap.rules import per_sample, plain


def recognises(site: Site) -> bool:
    return isinstance(site.module, nn.GroupNorm) and type(site.module).forward is nn.GroupNorm.forward


def check(site: Site) -> str | None:
    return plain.why_not_plain(site, {nn.GroupNorm.forward})


def build(site: Site, std: str) -> nn.Module:
    assert isinstance(site.module, nn.GroupNorm)
    return per_sample.uncalibrated(site.module, (site.module.num_channels,), (1,), std)


RULE = Rule("group_norm", recognises, check, build, per_sample.per_sample)
