"""BatchlessNorm, as the source of a conversion to something else: it is its own layer with fixed statistics."""

from __future__ import annotations

from typing import cast

from torch import nn

from normswap.detect.sites import Rule, Site
from normswap.layer.batchless_norm import BatchlessNorm, BatchlessNormAct
from normswap.rules import plain


def recognises(site: Site) -> bool:
    return isinstance(site.module, BatchlessNorm)


def check(site: Site) -> str | None:
    return plain.why_not_plain(site, {BatchlessNorm.forward, BatchlessNormAct.forward}, None)


def build(site: Site, std: str) -> nn.Module:
    return cast(nn.Module, site.module)


RULE = Rule("batchless", recognises, check, build)
