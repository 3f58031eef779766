"""The norms that libraries write themselves -> BatchlessNorm, approximately, from calibration data: recognised by what they compute.

timm's LayerNorm2d and RmsNorm, its GroupNorm1 and LayerNormAct2d, torchvision's LayerNorm2d, the RMSNorms of transformers and their like
are run on random data (`probing.py`): a layer that is found to compute one of the known formulas is swapped as that formula's own class
would be; any other is left as it is. A dropout and an activation of the layer's own (`drop`, `act` or `activation`) are kept.
"""

from __future__ import annotations

from typing import Any, cast

import torch
from torch import nn

from normswap.detect.sites import Rule, Site
from normswap.rules import per_sample, plain, unknown
from normswap.rules.recognise import AFTER, probe


def recognises(site: Site) -> bool:
    if not unknown.recognises(site) or isinstance(site.module, torch.jit.ScriptModule):
        return False
    found = probe(cast(nn.Module, site.module))
    return found is not None and found.kind != "affine" and not plain.further_inputs(cast(nn.Module, site.module))


def check(site: Site) -> str | None:
    module = cast(nn.Module, site.module)
    found = probe(module)
    assert found is not None
    if not found.sized:
        return (
            f"is a {type(module).__name__} without a weight or a size of its own, so only data tell how many channels it normalizes; "
            f"give it a weight of ones, or {plain.OWN_RULE}"
        )
    return plain.why_not_plain(site, {type(module).forward}, known=None)


def build(site: Site, std: str) -> nn.Module:
    module = cast(Any, site.module)
    found = probe(module)
    assert found is not None
    after = any(isinstance(module._modules.get(name), nn.Module) for name in AFTER)
    sizes, axes = ((v,) if isinstance(v, int) else v for v in (found.channels, found.axis))
    return per_sample.uncalibrated(module, sizes, axes, std, after=after)


RULE = Rule("flavour", recognises, check, build, per_sample.per_sample)
