"""BatchNorm without running statistics (track_running_stats=False) -> BatchlessNorm, approximately, from calibration data.

It normalizes by each batch's own statistics, in eval mode too, so its output for one sample depends on the others. BatchlessNorm takes the
statistics of the calibration data, and weight and bias by least squares, as in `layer_norm.py`. Shapes: x (N, C, *space); parameters (C,).
"""

from __future__ import annotations

from typing import cast

from torch import nn
from torch.nn.modules.batchnorm import _BatchNorm

from normswap.detect.sites import Rule, Site
from normswap.rules import per_sample, plain
from normswap.rules.batch_norm import FORWARDS, NO_STATISTICS


def recognises(site: Site) -> bool:
    return isinstance(site.module, _BatchNorm) and site.module.running_mean is None and type(site.module).forward in FORWARDS


def check(site: Site) -> str | None:
    return plain.why_not_plain(site, FORWARDS)


def build(site: Site, std: str) -> nn.Module:
    module = cast(_BatchNorm, site.module)
    return per_sample.uncalibrated(module, (module.num_features,), (1,), std)


def inexact(site: Site) -> str:
    return NO_STATISTICS


RULE = Rule("batch_norm", recognises, check, build, inexact)
