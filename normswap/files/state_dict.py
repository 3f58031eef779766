"""Finds a state dict in what a training script saved, and loads it into its architecture."""

from __future__ import annotations

import re
import sys
from collections import OrderedDict
from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import nn

from normswap.errors import LoadError, described, few, kind_of
from normswap.models.copying import on_meta
from normswap.models.quiet import quiet

PREFIXES = ("module.", "model.")  # DistributedDataParallel, Lightning
COUNTER = "num_batches_tracked"
WRAPPERS = ("_orig_mod.", "_fsdp_wrapped_module.", "_checkpoint_wrapped_module.")  # of torch, around any module: compile, FSDP, checkpoints


def model_or_state_dict(found: Any, name: str) -> nn.Module | dict[str, torch.Tensor]:
    """The module or state dict in what a training script saved: the object itself, or one value of a dict, under any key."""
    held = _held(found, "")
    if len(held) > 1:
        raise LoadError(
            f"{name} holds {len(held)} models: {few(list(held))}",
            hint="save the one that is meant to a file of its own",
        )
    for model in held.values():
        return model if isinstance(model, nn.Module) else _renamed(model, lambda key: key)
    raise LoadError(f"{name} holds {kind_of(found)}, neither a model nor a state dict", hint="save the model with torch.save(model, path)")


def _held(found: Any, path: str) -> dict[str, Any]:
    """path -> the modules or, if there are none, the state dicts in an object: itself, or what lies least deep in dicts of names."""
    if isinstance(found, nn.Module) or _is_state_dict(found):
        return {path: found}
    level, seen = {path: found}, set[int]()
    while level:
        inner = {path: value for path, value in level.items() if isinstance(value, Mapping) and id(value) not in seen}
        seen |= {id(value) for value in inner.values()}  # a dict may hold itself
        level = {
            f"{path}.{key}" if path else key: value for path, held in inner.items() for key, value in held.items() if isinstance(key, str)
        }
        held = {path: value for path, value in level.items() if isinstance(value, nn.Module)}
        held = held or {path: value for path, value in level.items() if _is_state_dict(value)}
        if held:
            return held
    return {}


def _is_state_dict(found: Any) -> bool:
    """Whether an object maps names to tensors. The values of `_extra_state` keys may be anything."""
    if not isinstance(found, Mapping) or not found:
        return False
    tensors = [isinstance(value, torch.Tensor) for key, value in found.items() if not str(key).endswith("_extra_state")]
    return bool(tensors) and all(tensors) and all(isinstance(key, str) for key in found)


def _renamed(weights: Mapping[str, Any], rename: Callable[[str], str | None]) -> dict[str, Any]:
    """A copy with new names, without what `rename` gives None for. It keeps `_metadata`, the versions of modules, for torch's old keys."""
    state = OrderedDict((name, value) for key, value in weights.items() if (name := rename(key)) is not None)
    versions = getattr(weights, "_metadata", None)
    if isinstance(versions, Mapping) and all(isinstance(key, str) and isinstance(value, Mapping) for key, value in versions.items()):
        kept = [(rename(f"{key}." if key else ""), value) for key, value in versions.items()]
        state._metadata = {name.removesuffix("."): value for name, value in kept if name is not None}  # type: ignore[attr-defined]
    return state


def _below(prefix: str) -> Callable[[str], str | None]:
    return lambda key: key.removeprefix(prefix) if key.startswith(prefix) else None


def _as_the_model_names_them(given: Mapping[str, Any], own: Mapping[str, Any], name: str) -> dict[str, Any]:
    """A copy of the weights, without what was put before or into the names of the model by that in which it was trained."""
    wrappers = [part for part in WRAPPERS if not any(part in key for key in own)]
    plain = _renamed(given, lambda key: re.sub("|".join(map(re.escape, wrappers)), "", key) if wrappers else key)
    weights = plain if len(plain) == len(given) else _renamed(given, lambda key: key)
    foreign = [prefix for prefix in PREFIXES if not any(key.startswith(prefix) for key in own)]
    while weights and (prefix := next((p for p in foreign if all(key.startswith(p) for key in weights)), None)) is not None:
        weights = _renamed(weights, _below(prefix))
    if weights.keys() & own.keys() or not own:
        return weights
    # None of the names is known. There may be one place, or several, where the file has all of them: below the name of an attribute.
    first = next(iter(own))
    places = [key.removesuffix(first) for key in weights if key.endswith(f".{first}")]
    whole = [place for place in places if all(key.endswith(COUNTER) for key in own.keys() ^ _renamed(weights, _below(place)).keys())]
    if len(whole) > 1:
        raise LoadError(
            f"{name} holds {len(whole)} models: {few([place[:-1] for place in whole])}",
            hint="save the one that is meant to a file of its own",
        )
    return _renamed(weights, _below(whole[0])) if whole else weights


def fill(model: nn.Module, weights: Mapping[str, Any], name: str, arch: str) -> nn.Module:
    """Load weights into the model that `arch` built, strictly. name: of the file with the weights.

    The model's own load_state_dict does it, so that its modules can convert keys of older versions.
    """
    if on_meta(model):
        raise LoadError(
            f"{arch} builds a model on the meta device, which has no memory that the weights of {name} could go to",
            hint="build it on the CPU, without torch.device('meta') around it",
        )
    own = model.state_dict()
    weights = _as_the_model_names_them(weights, own, name)
    for key in own.keys() - weights.keys():
        if key.endswith(COUNTER) and key.removesuffix(COUNTER) + "running_var" in weights:  # taken out by hand; no output depends on it
            weights[key] = own[key]
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
        part = re.search(r"-\d+-of-\d+\.", name)
        raise LoadError(
            f"{name} does not hold the weights of {arch}\n  " + "\n  ".join(problems),
            hint="it is one part of several: give the .index.json beside it"
            if part
            else "is --arch the right architecture, with the right number of classes?",
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
