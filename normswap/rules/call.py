"""A call of a normalizing function that no layer can stand for: listed under the kind of norm it computes, and left as it is.

A call that a layer can stand for (`normswap.calls`) comes with that layer, and the rule for the layer speaks for it.
"""

from __future__ import annotations

from collections.abc import Callable

from normswap.detect.functional import KINDS
from normswap.detect.sites import Rule, Site


def _of(kind: str) -> Callable[[Site], bool]:
    return lambda site: site.module is None and site.function is not None and KINDS.get(site.function) == kind


def check(site: Site) -> str:
    return site.obstacle or f"is a call of {site.function} that no layer stands for; make it a layer"


RULES = tuple(Rule(kind, _of(kind), check) for kind in dict.fromkeys(KINDS.values()))
