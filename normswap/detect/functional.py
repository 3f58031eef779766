"""Normalizations that are function calls: which functions they are, and what each argument of a call means.

Arguments come positionally, by keyword or not at all (exporters drop trailing defaults, and which ones depends on the build), so they
are bound through the function's own signature and never indexed.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Mapping
from typing import Any, cast

import torch
import torch.nn.functional as F

aten = torch.ops.aten

# function -> (dotted name, the kind of norm it computes)
FUNCTIONS: Mapping[Callable[..., Any], tuple[str, str]] = {
    F.batch_norm: ("torch.nn.functional.batch_norm", "batch_norm"),
    torch.batch_norm: ("torch.batch_norm", "batch_norm"),
    aten.batch_norm.default: ("aten.batch_norm", "batch_norm"),
    aten._native_batch_norm_legit_no_training.default: ("aten._native_batch_norm_legit_no_training", "batch_norm"),
    aten._native_batch_norm_legit_functional.default: ("aten._native_batch_norm_legit_functional", "batch_norm"),
    aten._native_batch_norm_legit.default: ("aten._native_batch_norm_legit", "batch_norm"),
    aten._native_batch_norm_legit.no_stats: ("aten._native_batch_norm_legit.no_stats", "batch_norm"),
    torch.native_batch_norm: ("torch.native_batch_norm", "batch_norm"),
    aten.native_batch_norm.default: ("aten.native_batch_norm", "batch_norm"),
    aten.cudnn_batch_norm.default: ("aten.cudnn_batch_norm", "batch_norm"),
    aten.miopen_batch_norm.default: ("aten.miopen_batch_norm", "batch_norm"),
    aten._batch_norm_no_update.default: ("aten._batch_norm_no_update", "batch_norm"),
    aten._batch_norm_with_update.default: ("aten._batch_norm_with_update", "batch_norm"),
    aten._batch_norm_with_update_functional.default: ("aten._batch_norm_with_update_functional", "batch_norm"),
    F.layer_norm: ("torch.nn.functional.layer_norm", "layer_norm"),
    torch.layer_norm: ("torch.layer_norm", "layer_norm"),
    aten.layer_norm.default: ("aten.layer_norm", "layer_norm"),
    aten.native_layer_norm.default: ("aten.native_layer_norm", "layer_norm"),
    F.group_norm: ("torch.nn.functional.group_norm", "group_norm"),
    torch.group_norm: ("torch.group_norm", "group_norm"),
    aten.group_norm.default: ("aten.group_norm", "group_norm"),
    aten.native_group_norm.default: ("aten.native_group_norm", "group_norm"),
    F.instance_norm: ("torch.nn.functional.instance_norm", "instance_norm"),
    torch.instance_norm: ("torch.instance_norm", "instance_norm"),
    aten.instance_norm.default: ("aten.instance_norm", "instance_norm"),
    F.rms_norm: ("torch.nn.functional.rms_norm", "rms_norm"),
    torch.rms_norm: ("torch.rms_norm", "rms_norm"),
    aten.rms_norm.default: ("aten.rms_norm", "rms_norm"),
}

KINDS: Mapping[str, str] = dict(FUNCTIONS.values())


_ALWAYS_TRAINING = {aten._batch_norm_with_update.default, aten._batch_norm_with_update_functional.default}


def _operator(function: Callable[..., Any]) -> torch._ops.OpOverload | None:
    """The aten operator that a function is; None for one that is written in Python. Built-ins (torch.batch_norm) have no signature."""
    if isinstance(function, torch._ops.OpOverload):
        return function
    return cast(torch._ops.OpOverload, getattr(aten, function.__name__).default) if inspect.isbuiltin(function) else None


def returns_a_tuple(function: Callable[..., Any]) -> bool:
    """Whether a call gives (output, statistics ...) instead of the output."""
    operator = _operator(function)
    return operator is not None and len(operator._schema.returns) > 1


def name_of(function: object) -> str | None:
    """The dotted name of a function that normalizes; None for any other."""
    try:
        found = FUNCTIONS.get(function)  # type: ignore[call-overload]
    except TypeError:  # unhashable
        return None
    return found[0] if found else None


def bind(function: Callable[..., Any], args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> dict[str, Any]:
    """The arguments of a call by parameter name, defaults filled in, under the names that torch.nn.functional gives them."""
    operator = _operator(function)
    if operator is not None:
        schema = operator._schema.arguments
        bound = {a.name: a.default_value for a in schema if a.has_default_value()}
        bound = {**bound, **dict(zip((a.name for a in schema), args, strict=False)), **kwargs}
        if "epsilon" in bound:  # cudnn's and miopen's name for it
            bound["eps"] = bound.pop("epsilon")
        if operator in _ALWAYS_TRAINING:
            bound["training"] = True
        return bound
    arguments = inspect.signature(function).bind(*args, **kwargs)
    arguments.apply_defaults()
    return dict(arguments.arguments)
