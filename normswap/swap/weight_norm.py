"""`to="weight-norm"`: (model, Plan) -> a copy in which each norm with fixed statistics is in the weight norm of its producer.

The formula is in `layer/weight_norm.py`. A norm stays if no producer feeds it alone, or its producer cannot hold it.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable
from typing import cast

from torch import nn

from normswap.detect.facts import Facts
from normswap.detect.producers import base_of, is_plain
from normswap.detect.sites import Plan, Rule, Site, Skip, Swap
from normswap.detect.super_calls import own_names
from normswap.layer import hooks
from normswap.layer.batchless_norm import BatchlessNorm, BatchlessNormAct
from normswap.layer.weight_norm import Removed, RemovedAct, put_into, why_not
from normswap.models.torch_private import HOOKS
from normswap.swap.apply import swap


def plan_weight_norm(model: nn.Module, planned: Plan, facts: Iterable[Facts]) -> Plan:
    """The plan with a Skip for each norm that cannot go into the weight norm of its producer. facts: about the sites of `planned`."""
    known = {each.name: each for each in facts}
    reasons = {s.name: _why_not(model, s, known[s.name]) for s in planned.swaps}
    swaps = tuple(s for s in planned.swaps if reasons[s.name] is None)
    skips = (Skip(s.site, s.kind, reason) for s in planned.swaps if (reason := reasons[s.name]) is not None)
    return dataclasses.replace(planned, swaps=swaps, skips=(*planned.skips, *skips))


def _why_not(model: nn.Module, s: Swap, facts: Facts) -> str | None:
    if s.producer is None:
        return f"has no conv or linear layer to go into: {s.why_no_producer or facts.why_not_folded}; leave it"
    if facts.folds_into is None:
        return f"cannot go into {s.producer}: {facts.why_not_folded}; leave it"
    norm, producer = s.site.module, model.get_submodule(s.producer)
    if norm is not None and any(getattr(norm, name) for name in HOOKS if name != "_is_full_backward_hook"):
        return "has hooks, which would see another input; remove them, or leave it"
    base = base_of(producer)
    if producer._parameters.get("bias") is None and base is not None and not is_plain(producer):
        names = own_names(type(producer), base)
        if names is None or "bias" not in names:
            return f"cannot go into {s.producer}, which has no bias, and code of its own that would add none; give it a bias, or leave it"
    return why_not(producer, _layer(s))


def weight_normed(model: nn.Module, planned: Plan) -> nn.Module:
    """A copy of `model` in which each planned norm is in the weight norm of its producer. The model itself is not touched."""
    norms = {s.name: _layer(s) for s in planned.swaps}
    result = swap(model, dataclasses.replace(planned, swaps=tuple(Swap(s.site, removing(s.rule)) for s in planned.swaps)))
    for s in planned.swaps:
        producer = result.get_submodule(cast(str, s.producer))
        hooks.release(producer)  # of a norm that was coupled to it
        put_into(producer, norms[s.name])
    return result


def removing(rule: Rule) -> Rule:
    """The rule with a `build` that makes what stands in the place of the norm afterwards."""
    built = rule.build
    assert built is not None

    def build(site: Site, std: str) -> nn.Module:
        return _removed(cast(BatchlessNorm, built(site, std)))

    return dataclasses.replace(rule, build=build)


def _layer(s: Swap) -> BatchlessNorm:
    assert s.rule.build is not None
    return cast(BatchlessNorm, s.rule.build(s.site, "log"))


def _removed(norm: BatchlessNorm) -> Removed:
    """`Removed`, with the children of a norm, the attributes of its source, and its training flag."""
    layer = RemovedAct() if isinstance(norm, BatchlessNormAct) else Removed()
    layer._modules.update(norm._modules)
    for name, value in (norm.source.attributes if norm.source is not None else {}).items():
        if not hasattr(layer, name):
            setattr(layer, name, value)
    return layer.train(norm.training)
