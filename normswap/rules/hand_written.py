"""A normalization written out in the code of a module -> BatchlessNorm, approximately, from calibration data.

`normswap.calls` finds what looks like one and makes a layer of its nodes; here that layer is run (`probing.py`). If it computes LayerNorm,
RMSNorm, GroupNorm or InstanceNorm exactly, with or without a weight and a bias, the code comes to call a BatchlessNorm instead.
"""

from __future__ import annotations

from typing import cast

from torch import nn

from normswap.detect.handwritten import HandwrittenNorm
from normswap.detect.sites import Rule, Site
from normswap.rules import per_sample
from normswap.rules.plain import OWN_RULE
from normswap.rules.recognise import probe


def recognises(site: Site) -> bool:
    return isinstance(site.module, HandwrittenNorm)


def check(site: Site) -> str | None:
    module = cast(nn.Module, site.module)
    found = probe(module)
    if found is not None and found.sized and found.kind != "affine":
        return None
    looks = "is code that looks like a normalization (it scales by the root of a mean or variance)"
    told = getattr(site.module, "input_shape", None) is not None or any(True for _ in module.parameters())
    if not told and (found is None or found.kind != "affine"):
        return f"{looks}, whose number of channels only its input tells; give example inputs of fixed sizes that reach it"
    return f"{looks} and is none that normswap knows; leave it, or make it a layer of its own and {OWN_RULE}"


def build(site: Site, std: str) -> nn.Module:
    module = cast(nn.Module, site.module)
    found = probe(module)
    assert found is not None
    sizes, axes = ((v,) if isinstance(v, int) else v for v in (found.channels, found.axis))
    return per_sample.uncalibrated(module, sizes, axes, std)


RULE = Rule("hand_written", recognises, check, build, per_sample.per_sample)
