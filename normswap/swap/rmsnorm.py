"""`to="rmsnorm"`: (model, Plan) -> a copy in which each LayerNorm that can be is an RMSNorm, and its stream has no mean.

`detect/streams.py` finds what has to lose its mean, `layer/rms_norm.py` has the layer. All weights are changed in float64 and rounded once.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, cast

import torch
from torch import Tensor, nn

from normswap.detect.channels import needed
from normswap.detect.facts import Facts
from normswap.detect.sites import Plan, Rule, Site, Skip, Swap
from normswap.detect.streams import Streams, streams
from normswap.errors import SwapError, described
from normswap.layer.rms_norm import RMSNorm, centre
from normswap.models.copying import copy_for_running, copy_hooks
from normswap.models.recording import ModuleCall, Op, Record, Recorder
from normswap.swap.apply import swap

KINDS = ("layer_norm", "flavour")  # of the norms that may compute LayerNorm
_MOVES = ("permute", "transpose", "clone", "alias", "detach")


@dataclass(frozen=True)
class RMSPlan:
    """The plan, whose swaps become RMSNorm, and what has to change for that. layer_norms: names of all that compute LayerNorm."""

    plan: Plan
    streams: Streams
    layer_norms: frozenset[str]

    @property
    def comparable(self) -> list[str]:
        """The names of the swapped layers whose outputs stay: all but those that a hook centres."""
        centred = {cut.name for cut in self.streams.cuts if cut.place is None}
        return [s.name for s in self.plan.swaps if s.name not in centred]


def plan_rmsnorm(model: nn.Module, planned: Plan, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> RMSPlan:
    """Decide which of the norms of `planned` become RMSNorm. planned: with the approximate swaps, among which LayerNorm is."""
    copied = copy_for_running(model)
    record = Recorder(copied).run(args, kwargs)
    found = {s.name: _layer_norm(s, record) for s in planned.swaps}
    layers = {name: each for name, each in found.items() if isinstance(each, _LayerNorm)}
    wanted = [op for each in layers.values() for op in each.ops]
    result = streams(copied, record, wanted) if record.failed is None else Streams()
    swaps, skips = [], list(planned.skips)
    for s in planned.swaps:
        each = found[s.name]
        reason = each if isinstance(each, str) else next((r for op in each.ops if (r := result.reasons.get(id(op))) is not None), None)
        if record.failed is not None:
            reason = f"is in a model whose forward pass failed: {described(record.failed)}; give inputs that it takes"
        if reason is None and isinstance(each, _LayerNorm):
            swaps.append(Swap(s.site, to_rmsnorm(s.kind, each.eps, each.axis)))
        else:
            skips.append(Skip(s.site, s.kind, f"{reason}; leave it" if isinstance(each, _LayerNorm) and not record.failed else str(reason)))
    return RMSPlan(dataclasses.replace(planned, swaps=tuple(swaps), skips=tuple(skips)), result, frozenset(layers))


def facts_of_rmsnorm(
    model: nn.Module, planned: Plan, known: tuple[Facts, ...], args: tuple[Any, ...], kwargs: Mapping[str, Any]
) -> tuple[Facts, ...]:
    """The facts, and for each LayerNorm among the swaps of `planned` whether it could be an RMSNorm, and why not."""
    if not any(s.site.module is not None and s.kind in KINDS for s in planned.swaps):
        return known
    try:
        rms = plan_rmsnorm(model, planned, args, kwargs)
    except SwapError:  # the model cannot be copied, which the facts say
        return known
    reasons: dict[str, str | None] = {s.name: s.reason for s in rms.plan.skips}
    reasons.update(dict.fromkeys(s.name for s in rms.plan.swaps))
    return tuple(
        dataclasses.replace(each, to_rmsnorm=reasons[each.name] is None, why_not_rmsnorm=reasons[each.name])
        if each.name in rms.layer_norms
        else each
        for each in known
    )


def with_rmsnorms(model: nn.Module, planned: RMSPlan) -> nn.Module:
    """A copy of `model` in which each planned norm is an RMSNorm, and its stream is centred. The model itself is not touched."""
    result = swap(model, planned.plan)
    parameters = dict(result.named_parameters(remove_duplicate=False))
    with torch.no_grad():
        exact: dict[str, Tensor] = {}  # in float64
        for fold in planned.streams.folds:
            gain = parameters[fold.gain]
            for name, axis in fold.rows:
                rows = exact.get(name, parameters[name].double())
                shape = [1] * rows.dim()
                shape[axis] = -1
                exact[name] = rows * gain.double().view(shape)
            exact[fold.gain] = torch.ones_like(gain, dtype=torch.float64)
        for name, axis in planned.streams.centred:
            rows = exact.get(name, parameters[name].double())
            exact[name] = rows - rows.mean(axis, keepdim=True)
        for name, value in exact.items():
            parameters[name].copy_(value)
    for cut in planned.streams.cuts:
        centre(result.get_submodule(cut.name), cut.place, cut.axis)
    return result


@dataclass(frozen=True)
class _LayerNorm:
    """A layer that computes LayerNorm over one axis. ops: its calls of it."""

    ops: tuple[Op, ...]
    eps: float
    axis: int


def _layer_norm(s: Swap, record: Record) -> _LayerNorm | str:
    """What a site computes in each of its calls, if that is LayerNorm over one axis; else why it stays, as a clause about it."""
    module = s.site.module
    if s.site.call is not None:
        return "is a call in the code of a module; make it a layer, nn.LayerNorm, to have it replaced"
    calls = [call for call in record.calls if call.name == s.name]
    inside = {id(call): [op for op in record.ops if call in op.stack] for call in calls}
    norms = [[op for op in inside[id(call)] if op.name == "native_layer_norm"] for call in calls]
    if not calls:
        return "is never called; leave it"
    if module is None or any(len(each) != 1 for each in norms):
        return f"is a {type(module).__name__}, which does not compute LayerNorm; leave it"
    if any(op.name not in (*_MOVES, "native_layer_norm") for call in calls for op in inside[id(call)]):
        return f"is a {type(module).__name__}, which does more than normalize; leave it"
    ops = [op for (op,) in norms]
    tensors = {id(value.tensor) for op in ops for value in op.args[2:4] if value is not None}
    own = {id(t) for name, t in module._parameters.items() if t is not None and name in ("weight", "bias")}
    axes = {_axis(op, call) for op, call in zip(ops, calls, strict=True)}
    if any(len(op.args[1]) != 1 for op in ops):
        return "normalizes over several axes; leave it"
    if len(axes) != 1 or None in axes or len({op.args[4] for op in ops}) != 1 or not tensors <= own:
        return f"is a {type(module).__name__}, which does more than normalize; leave it"
    return _LayerNorm(tuple(ops), float(ops[0].args[4]), cast(int, axes.pop()))


def _axis(op: Op, call: ModuleCall) -> int | None:
    """The axis of the channels of the layer's input and output, from the end; None if they are on different ones."""
    before, after = (op.args[0], len(op.args[0].shape) - 1), (op.outputs[0], len(op.outputs[0].shape) - 1)
    while before[0].op is not None and call in before[0].op.stack:
        found = needed(before[0].op, before[0].index, before[1])
        if found is None or len(found) != 1:
            return None
        (before,) = found
    while call not in after[0].returned:
        following = [
            (each, axis)
            for use, _ in after[0].uses
            for each in use.outputs
            for axis in range(len(each.shape))
            if needed(use, each.index, axis) == [after]
        ]
        if len(following) != 1:
            return None
        (after,) = following
    mine, result = before[1] - len(before[0].shape), after[1] - len(after[0].shape)
    return mine if mine == result and any(c is call for c, _ in before[0].taken) else None


def to_rmsnorm(kind: str, eps: float, axis: int) -> Rule:
    """The rule that makes an RMSNorm with the weight and the bias of a layer that was found to compute LayerNorm over that axis."""

    def build(site: Site, std: str) -> nn.Module:
        module = cast(Any, site.module)
        weight, bias = (module._parameters.get(name) for name in ("weight", "bias"))
        channels = next((len(t) for t in (weight, bias) if t is not None), None) or int(module.normalized_shape[0])
        layer = RMSNorm(channels, eps, axis=axis, weight=weight, bias=bias)
        copy_hooks(module, layer)
        return layer

    return Rule(kind, lambda site: site.module is not None, lambda site: None, build)
