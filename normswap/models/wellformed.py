"""Checks that a model is safe to trace: its names, its nesting and, if it came from a file, the attributes of its layers.

The checks come before the model is traced: torch.fx and torch.export write the names of layers, parameters and buffers into source that
they run, without proper quoting, and a file can contain any names. So names may have letters, digits, `_` and `-` only.
"""

from __future__ import annotations

import math
import re
from collections.abc import Iterator
from typing import Any

from torch import Tensor, nn
from torch.nn.modules.batchnorm import _NormBase
from torch.nn.parameter import is_lazy

NAME = re.compile(r"[\w-]+")
HINT = "names of layers, parameters and buffers have letters, digits, _ and - only"
DEEPEST, MOST = 100, 100_000  # depth of nesting, and number of names; the largest models of torchvision, timm and hf have 15 and 10,000
_NORMS = (_NormBase, nn.LayerNorm, nn.GroupNorm)  # not RMSNorm, whose eps may be None
_OF_EVERY_MODULE = ("training", "_parameters", "_buffers", "_modules", "_forward_hooks", "_forward_pre_hooks", "_backward_hooks")


def problem(model: nn.Module, *, dots: bool = True) -> tuple[str, str | None] | None:
    """(what is wrong with the names or the nesting of a model, a hint); None if nothing is. The text follows "the model".

    dots: whether names of layers may have dots. Two layers may then have the same qualified name, which is harmless.
    """
    if (found := _nesting(model)) is not None:
        return found, None
    for where, module in model.named_modules():
        tensors = [name for name, value in vars(module).items() if isinstance(value, Tensor)]
        for kind, names in (
            ("layer", module._modules.keys()),  # in a ScriptModule these are no dicts, but have keys()
            ("parameter", module._parameters.keys()),
            ("buffer", module._buffers.keys()),
            ("tensor", tensors),
        ):
            for name in names:
                plain = name.replace(".", "_") if dots and kind == "layer" and isinstance(name, str) else name
                if not (isinstance(plain, str) and NAME.fullmatch(plain)):
                    return f"has a {kind} named {quoted(name)}{_inside(where)}", HINT
        if isinstance(module, _NORMS) and type(module).forward.__module__.startswith("torch.nn.") and not _is_number(module.eps):
            return f"has a {type(module).__name__}{_named(where)} with eps {quoted(module.eps)}", "it cannot run so: eps is a number"
    return None


def problem_of_file(model: nn.Module) -> tuple[str, str | None] | None:
    """As `problem`, for a model from a file, which may also lack attributes that a constructor would have set."""
    for where, module in every_module(model):
        if missing := [name for name in _OF_EVERY_MODULE if name not in vars(module)]:
            return f"has a {type(module).__name__} without {missing[0]}{_inside(where)}: no constructor leaves it so", None
        for name, made in vars(nn.Module()).items():
            value = vars(module).get(name, made)
            if made is not None and not isinstance(value, type(made)):
                return f"has a {type(module).__name__}{_named(where)} with {name} {quoted(value)}: no constructor leaves it so", None
        for kind, entries, expected in (("layer", module._modules, nn.Module), ("parameter", module._parameters, nn.Parameter)):
            for name, value in entries.items():
                if value is not None and not isinstance(value, expected):
                    return f"has a {kind} {quoted(name)}{_inside(where)} that is a {type(value).__name__}", None
        for name in vars(module):
            if not NAME.fullmatch(name):
                return f"has an attribute named {quoted(name)}{_inside(where)}", HINT
    if (nesting := _nesting(model)) is not None:
        return nesting, None
    for where, module in model.named_modules():
        if (why := _fault_of_layer(module)) is not None:
            return f"has a {type(module).__name__}{_named(where)} {why}: no constructor leaves it so", None
    return problem(model, dots=False)


def problem_of_names(names: Iterator[str]) -> tuple[str, str | None] | None:
    """As `problem`, for the dotted names of a program's tensors."""
    for name in names:
        if not all(NAME.fullmatch(part) for part in name.split(".")):
            return f"has a tensor named {quoted(name)}", HINT
    return None


def quoted(name: object) -> str:
    """A text for a message: ASCII, in one line, at most 60 characters, without control sequences."""
    text = ascii(name)
    return text if len(text) <= 60 else f"{text[:57]}..."


def _inside(where: str) -> str:
    return f", in {where}" if _is_clean(where) else ""


def _named(where: str) -> str:
    return f" {where}" if _is_clean(where) else ""


def _is_clean(where: str) -> bool:
    return all(map(NAME.fullmatch, where.split(".")))


def every_module(model: nn.Module) -> Iterator[tuple[str, nn.Module]]:
    """(name, module) for every module, once; works for a model that is not well formed, too."""
    seen, stack = {id(model)}, [("", model)]
    while stack:
        where, module = stack.pop()
        yield where, module
        children = vars(module).get("_modules")
        for name, child in children.items() if isinstance(children, dict) else ():
            if isinstance(child, nn.Module) and id(child) not in seen:
                seen.add(id(child))
                stack.append((f"{where}.{name}".lstrip("."), child))


def _is_number(eps: Any) -> bool:
    """Whether an eps is a number, which may be numpy's or in a tensor."""
    try:
        return not isinstance(eps, str | bytes) and not math.isnan(float(eps))
    except (TypeError, ValueError, OverflowError, RuntimeError):
        return False


def _nesting(model: nn.Module) -> str | None:
    """What is wrong with the nesting of the layers. Not recursive, as a layer that contains itself would make a recursion endless."""
    depths: dict[int, int] = {}
    names: dict[int, int] = {}
    entered: set[int] = set()
    stack = [(model, False)]
    while stack:
        module, done = stack.pop()
        key = id(module)
        children = [child for _, child in module._modules.items() if child is not None]
        if done:
            entered.discard(key)
            depths[key] = 1 + max((depths[id(child)] for child in children), default=0)
            names[key] = 1 + sum(names[id(child)] for child in children)
        elif key not in depths:
            if key in entered:
                return f"has a {type(module).__name__} that contains itself"
            entered.add(key)
            stack.append((module, True))
            stack.extend((child, False) for child in children)
    if depths[id(model)] > DEEPEST:
        return f"has layers inside layers {depths[id(model)]} deep; expected {DEEPEST} at most"
    if names[id(model)] > MOST:
        return f"has layers under {names[id(model)]:,} names, as layers are shared inside shared layers; expected {MOST:,} at most"
    return None


def _fault_of_layer(module: nn.Module) -> str | None:
    """What a layer of torch lacks that every layer of its kind has; None if nothing. The text follows its class and name."""
    for name, value in vars(module).items():
        if isinstance(value, int) and abs(value) >= 2**63:
            return f"with {name} {quoted(value)}"
    of_torch = type(module).__module__.startswith("torch.nn.")
    lacking = [name for name in getattr(module, "__constants__", ()) if not hasattr(module, name)] if of_torch else []
    return f"without {lacking[0]}" if lacking else _fault_of_norm(module)


def _fault_of_norm(module: nn.Module) -> str | None:
    """As `_fault_of_layer`, for a norm, whose settings and shapes of tensors are checked, too."""
    expected: dict[str, type]
    parameters: tuple[str, ...]
    buffers: tuple[str, ...] = ()
    match module:
        case _NormBase():
            expected = {"num_features": int, "eps": float, "momentum": float, "affine": bool, "track_running_stats": bool}
            parameters, buffers = ("weight", "bias"), ("running_mean", "running_var")
        case nn.LayerNorm() | nn.RMSNorm():
            expected, parameters = {"normalized_shape": tuple, "eps": float, "elementwise_affine": bool}, ("weight",)
        case nn.GroupNorm():
            expected = {"num_groups": int, "num_channels": int, "eps": float, "affine": bool}
            parameters = ("weight", "bias")
        case _:
            return None
    for name, kind in expected.items():
        value: Any = getattr(module, name, _Missing)
        if value is None and (name == "momentum" or (name == "eps" and isinstance(module, nn.RMSNorm))):
            continue
        fits = isinstance(value, kind) or (kind is float and type(value) is int)
        if not fits or (isinstance(value, float) and not math.isfinite(value)) or (isinstance(value, int) and abs(value) >= 2**63):
            return f"without {name}" if value is _Missing else f"with {name} {quoted(value)}"
    for name in (*parameters, *buffers):
        if name not in (module._parameters if name in parameters else module._buffers):
            return f"without {name}"
    if isinstance(module, _NormBase):
        for name in (*parameters, *buffers):
            tensor = getattr(module, name)
            if tensor is not None and not is_lazy(tensor) and tuple(tensor.shape) != (module.num_features,):
                return f"with {name} of shape {tuple(tensor.shape)} for {module.num_features} features"
        if (module.running_mean is None) != (module.running_var is None):
            return "with one of running_mean and running_var"
    return None


class _Missing:
    pass
