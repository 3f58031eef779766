"""The norms that libraries write themselves -> BatchlessNorm, approximately, from calibration data: recognised by what they compute.

timm's LayerNorm2d and RmsNorm, its GroupNorm1 and LayerNormAct2d, torchvision's LayerNorm2d, the RMSNorms of transformers and their like
are run on random data (`probing.py`): a layer that is found to compute one of the known formulas is swapped as that formula's own class
would be; any other is left as it is. A dropout and an activation of the layer's own (`drop`, `act`) are kept.
"""

from __future__ import annotations

from typing import Any, cast

import torch
from torch import nn

from normswap.plan import Rule, Site
from normswap.rules import from_data, tensors, unknown
from normswap.rules.probing import probe


def recognises(site: Site) -> bool:
    if not unknown.recognises(site) or isinstance(site.module, torch.jit.ScriptModule):
        return False
    return probe(cast(nn.Module, site.module)) is not None


def check(site: Site) -> str | None:
    return tensors.why_not_plain(site, {type(cast(nn.Module, site.module)).forward}, known=None)


def build(site: Site, std: str) -> nn.Module:
    module = cast(Any, site.module)
    found = probe(module)
    assert found is not None
    after = any(isinstance(module._modules.get(name), nn.Module) for name in ("drop", "act"))
    return from_data.uncalibrated(module, (found.channels,), (found.axis,), std, after=after)


RULE = Rule("flavour", recognises, check, build, from_data.per_sample)
