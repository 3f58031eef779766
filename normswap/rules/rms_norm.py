"""RMSNorm -> BatchlessNorm, approximately, from calibration data.

RMSNorm computes                y = weight * x / sqrt(mean(x^2) + eps)             the mean of each sample over its axes
and BatchlessNorm               y = weight' * (x - mean) / std + bias'             as in `layer_norm.py`

The bias' is new: RMSNorm does not centre. Shapes: x (*, *normalized_shape); every parameter has the normalized_shape.

Source: Zhang & Sennrich 2019, arXiv:1910.07467.
"""

from __future__ import annotations

from torch import nn

from normswap.detect.sites import Rule, Site
from normswap.rules import per_sample, plain


def recognises(site: Site) -> bool:
    return isinstance(site.module, nn.RMSNorm) and type(site.module).forward is nn.RMSNorm.forward


def check(site: Site) -> str | None:
    return plain.why_not_plain(site, {nn.RMSNorm.forward})


def build(site: Site, std: str) -> nn.Module:
    assert isinstance(site.module, nn.RMSNorm)
    shape = site.module.normalized_shape
    return per_sample.uncalibrated(site.module, shape, range(-len(shape), 0), std)


RULE = Rule("rms_norm", recognises, check, build, per_sample.per_sample)
