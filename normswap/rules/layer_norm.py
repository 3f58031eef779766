"""LayerNorm -> BatchlessNorm, approximately, from calibration data.

LayerNorm computes              y = weight * (x - m) / sqrt(v + eps) + bias        m, v: mean and variance of each sample's x over its axes
and BatchlessNorm               y = weight' * (x - mean) / std + bias'
with mean and std those of each channel over the calibration data, and weight', bias' fitted to LayerNorm's output by least squares.

Shapes: x (*, *normalized_shape); every parameter has the normalized_shape, so the channels lie on the last axes.

Source: Ba, Kiros & Hinton 2016, arXiv:1607.06450.
"""

from __future__ import annotations

from torch import nn

from normswap.detect.sites import Rule, Site
from normswap.rules import per_sample, plain


def recognises(site: Site) -> bool:
    return isinstance(site.module, nn.LayerNorm) and type(site.module).forward is nn.LayerNorm.forward


def check(site: Site) -> str | None:
    return plain.why_not_plain(site, {nn.LayerNorm.forward})


def build(site: Site, std: str) -> nn.Module:
    assert isinstance(site.module, nn.LayerNorm)
    shape = site.module.normalized_shape
    return per_sample.uncalibrated(site.module, shape, range(-len(shape), 0), std)


RULE = Rule("layer_norm", recognises, check, build, per_sample.per_sample)
