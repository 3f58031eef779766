"""Checks that all rules for modules share: whether a layer computes only what its class says, and which attributes it has."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Collection
from typing import Any, cast

from torch import nn
from torch.nn.modules.lazy import LazyModuleMixin

from normswap.detect.sites import Site
from normswap.detect.super_calls import under_super
from normswap.models.own_code import base_of
from normswap.models.torch_private import MODULE_STATE

OWN_RULE = "pass a rule of your own (--rule, docs/writing_rules.md)"
_ONLY = f"if it only normalizes, {OWN_RULE}"
KNOWN = ("weight", "bias", "running_mean", "running_var", "num_batches_tracked")


def why_not_plain(site: Site, forwards: Collection[Callable[..., Any]], known: Collection[str] | None = KNOWN) -> str | None:
    """Why this module may do more than a layer with one of these `forward` functions and the `known` tensors; None if it cannot.

    The text is a clause about the module, as a rule's `check` returns it. known: the names of the parameters and buffers that the rule
    takes over (None: any).
    """
    module = site.module
    assert module is not None
    cls = type(module)
    for what, holder in (("is", cls), *(("sits in", parent) for parent in site.parents)):
        if holder.__module__.startswith(("torch.ao.", "torchao.")):
            return f"{what} a quantised or quantisation-aware {holder.__name__}; convert the float model and quantise the result"
    if isinstance(module, LazyModuleMixin) and module.has_uninitialized_params():
        return "is lazy and has no shape yet; run one forward pass before converting"
    if hasattr(module, "parametrizations"):
        names = ", ".join(sorted(cast(nn.ModuleDict, module.parametrizations)))
        return f"has a parametrized {names}; remove it with torch.nn.utils.parametrize.remove_parametrizations first"
    if cls.forward not in forwards:
        why_not = under_super(module).why_not if base_of(module) is not None else None
        because = f" ({why_not})" if why_not else ""
        return f"is a {cls.__name__}, which overrides forward, so it may do more than normalize{because}; {_ONLY}"
    if cls.__call__ is not nn.Module.__call__:
        return f"is a {cls.__name__}, which overrides __call__, so it may do more than normalize; {_ONLY}"
    if "forward" in module.__dict__:
        return "has a forward of its own, set on the object, so it may do more than normalize; delete it, or convert before it is set"
    stored = {name: tensor for name, tensor in (*module._parameters.items(), *module._buffers.items()) if tensor is not None}
    computed = [name for name in KNOWN if name not in stored and getattr(module, name, None) is not None]
    if computed:
        return f"has a {computed[0]} that is computed (by spectral_norm or weight_norm?) and not stored; remove that first"
    more = [] if known is None else sorted(stored.keys() - set(known))
    if known is not None and more:
        layer = "a BatchNorm" if known is KNOWN else f"the layer that the rule knows ({', '.join(known)})"
        return f"holds {', '.join(more)} besides the tensors of {layer}, so it may do more than normalize; {_ONLY}"
    if site.readers:
        return f"has tensors that {', '.join(site.readers)} reads directly instead of calling the layer; call the layer there, or leave it"
    return None


def further_inputs(module: nn.Module) -> str:
    """The names of the arguments of `forward` after the first (a gate, a condition, a scale), joined by commas."""
    parameters = list(inspect.signature(type(module).forward).parameters.values())[2:]  # self, x
    return ", ".join(p.name for p in parameters if p.kind not in (p.VAR_POSITIONAL, p.VAR_KEYWORD))


def plain_attributes(module: nn.Module) -> dict[str, Any]:
    """The attributes of a module besides tensors, children and nn.Module's own state."""
    return {name: value for name, value in module.__dict__.items() if name not in MODULE_STATE}
