"""Finds a state dict in what a training script saved, and loads it into its architecture."""

from __future__ import annotations

import re
import sys
from collections import OrderedDict
from collections.abc import Mapping
from typing import Any

import torch
from torch import nn

from normswap.errors import LoadError, described, few, kind_of
from normswap.models.copying import on_meta
from normswap.models.quiet import quiet


def model_or_state_dict(found: Any, name: str) -> nn.Module | dict[str, torch.Tensor]:
    """The module or state dict in what a training script saved: the object itself, or one value of a dict, under any key."""
    if _is_state_dict(found):
        return _without_prefix(found, "")
    if isinstance(found, Mapping):
        models = [key for key, value in found.items() if isinstance(value, nn.Module)]
        if len(models) == 1:
            return found[models[0]]  # type: ignore[no-any-return]
        dicts = models or [key for key, value in found.items() if _is_state_dict(value)]
        if len(dicts) == 1:
            return _without_prefix(found[dicts[0]], "")
        if dicts:
            raise LoadError(
                f"{name} holds {len(dicts)} models: {few([str(key) for key in dicts])}",
                hint="save the one that is meant to a file of its own",
            )
    raise LoadError(f"{name} holds {kind_of(found)}, neither a model nor a state dict", hint="save the model with torch.save(model, path)")


def _is_state_dict(found: Any) -> bool:
    """Whether an object maps names to tensors. The values of `_extra_state` keys may be anything."""
    if not isinstance(found, Mapping) or not found:
        return False
    tensors = [isinstance(value, torch.Tensor) for key, value in found.items() if not str(key).endswith("_extra_state")]
    return bool(tensors) and all(tensors) and all(isinstance(key, str) for key in found)


def _without_prefix(weights: Mapping[str, Any], prefix: str) -> dict[str, Any]:
    """A copy without the prefix in its keys. It keeps `_metadata`, the versions of modules, which torch needs to load old keys."""
    state = OrderedDict((key.removeprefix(prefix), value) for key, value in weights.items())
    versions = getattr(weights, "_metadata", None)
    if isinstance(versions, Mapping) and all(isinstance(key, str) and isinstance(value, Mapping) for key, value in versions.items()):
        kept = {key: value for key, value in versions.items() if f"{key}.".startswith(prefix)}
        state._metadata = {f"{key}.".removeprefix(prefix).removesuffix("."): value for key, value in kept.items()}  # type: ignore[attr-defined]
    return state


def fill(model: nn.Module, weights: Mapping[str, Any], name: str, arch: str) -> nn.Module:
    """Load weights into the model that `arch` built, strictly. name: of the file with the weights.

    The model's own load_state_dict does it, so that its modules can convert keys of older versions.
    """
    if on_meta(model):
        raise LoadError(
            f"{arch} builds a model on the meta device, which has no memory that the weights of {name} could go to",
            hint="build it on the CPU, without torch.device('meta') around it",
        )
    own = model.state_dict().keys()
    for prefix in ("module.", "_orig_mod.", "model."):  # DistributedDataParallel, torch.compile, Lightning
        if all(key.startswith(prefix) for key in weights) and not any(key.startswith(prefix) for key in own):
            weights = _without_prefix(weights, prefix)
    _without_loss(model, weights, name, arch)
    try:
        with quiet(show_warnings=False, print_to=sys.stderr):
            found = model.load_state_dict(weights, strict=True)
    except Exception as error:  # the model's own code may raise anything
        problems = _misfits(error)
    else:  # a model with its own load_state_dict may ignore `strict`
        keys = {what: getattr(found, f"{what}_keys", ()) for what in ("missing", "unexpected")}
        problems = [f"{what}: {few(names)}" for what, names in keys.items() if names]
    if problems:
        raise LoadError(
            f"{name} does not hold the weights of {arch}\n  " + "\n  ".join(problems),
            hint="is --arch the right architecture, with the right number of classes?",
        )
    return model


COMPUTED = (torch.float16, torch.bfloat16, torch.float32, torch.float64)  # what torch's layers compute in


def _without_loss(model: nn.Module, weights: Mapping[str, Any], name: str, arch: str) -> None:
    """Give the model the dtype of the weights, as half stays half and double stays double: copying into float32 would round.

    Numbers of 8 bits are a way to store weights; every one of them is a float32, too. A real parameter would keep the real part alone of a
    complex number, of which torch but warns.
    """
    tensors = {key: value for key, value in weights.items() if isinstance(value, torch.Tensor)}
    dtypes = {value.dtype for value in tensors.values() if value.is_floating_point()}
    if len(dtypes) == 1 and dtypes <= {*COMPUTED}:
        model.to(dtypes.pop())
    own = {key: value for key, value in model.state_dict().items() if isinstance(value, torch.Tensor)}
    lost = [key for key, value in tensors.items() if value.is_complex() and key in own and not own[key].is_complex()]
    if lost:
        raise LoadError(
            f"{name} holds complex numbers where {arch} has real ones, which would lose their imaginary parts: {few(lost)}",
            hint="is --arch the right architecture? If they are 0, save `tensor.real`",
        )


_KEYS = re.compile(r'(Missing|Unexpected) key\(s\) in state_dict: "(.*)"\.', re.DOTALL)
_SIZE = re.compile(
    r"size mismatch for (.*): copying a param with shape torch\.Size\(\[(.*)\]\) from checkpoint, .* torch\.Size\(\[(.*)\]\)\."
)


def _misfits(error: Exception) -> list[str]:
    """The complaints of `load_state_dict`, one line for each kind."""
    _, *complaints = [line.strip() for line in str(error).split("\n\t")]
    if not isinstance(error, RuntimeError) or not complaints:
        return [f"its load_state_dict raised {described(error)}"]
    keys, shapes, others = dict[str, str](), list[str](), list[str]()
    for complaint in complaints:
        if match := _KEYS.fullmatch(complaint):
            keys[match[1].lower()] = few(match[2].split('", "'))
        elif match := _SIZE.fullmatch(complaint):
            sizes = [f"({size}{',' if size.isdigit() else ''})" for size in (match[3], match[2])]
            shapes.append(f"{match[1]} {sizes[0]} against {sizes[1]}")
        else:
            others.append(complaint.splitlines()[0][:300])
    problems = [f"{what}: {keys[what]}" for what in ("missing", "unexpected") if what in keys]
    problems += [f"of another shape (model against file): {few(shapes)}"] * bool(shapes)
    return problems + others[:3]
