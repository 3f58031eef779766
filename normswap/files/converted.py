"""Saves a converted model as a directory with recipe.json and model.safetensors, and loads its weights again.

The weights are the model's state dict, so any safetensors reader can load them into a converted model. Nothing is pickled: the architecture
comes from the user's own factory, and the recipe says which of its layers are BatchlessNorm and how each trains.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Collection, Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import nn

from normswap.errors import LoadError, SwapError
from normswap.files.atomic import writing
from normswap.files.recipe import MODES, RECIPE, Recipe, replaced_of, sites_of, weight_norms_of, write_recipe
from normswap.layer import weight_norm
from normswap.layer.batchless_norm import BatchlessNorm
from normswap.layer.parametrized import put_back
from normswap.layer.producer import PRODUCERS, inputs_of
from normswap.layer.rms_norm import centre, kept_centred
from normswap.models.copying import copy_with, on_meta, unclear_names
from normswap.models.inputs import Inputs

WEIGHTS = "model.safetensors"
WRAPPERS = ("torch._dynamo.", "torch.nn.parallel.", "torch.optim.swa_utils")  # modules of torch whose classes wrap one model


def unwrapped(model: nn.Module) -> nn.Module:
    """The model inside torch.compile, DistributedDataParallel or AveragedModel, whose names have no prefix of the wrapper."""
    while type(model).__module__.startswith(WRAPPERS):
        (model,) = model.children()
    return model


def plain(model: nn.Module) -> nn.Module:
    """The model, or a copy in which the weights that `keep_centred` parametrized are plain ones."""
    if not kept_centred(model):
        return model
    whole = copy_with(model, {})
    for module, name in kept_centred(whole):
        put_back(module, name)
    return whole


# --- written ----------------------------------------------------------------------------------------------------------------------------


def save(
    model: nn.Module,
    directory: Path,
    *,
    source: str | None = None,
    factory: str | None = None,
    module: str | None = None,
    inputs: Inputs | None = None,
) -> None:
    """Write recipe.json and model.safetensors into `directory`, a temporary one that exists. `seal` has to follow.

    source, factory, module, inputs: entries of the recipe.
    """
    if valueless := on_meta(model):
        raise SwapError(f"{valueless[0]} is on the meta device: it has no values that could be saved", hint="load the weights first")
    if module is None and (others := _state_without_tensors(model)):
        raise SwapError(
            f"{others[0]} of {type(model).__name__} is state that is no tensor, which {WEIGHTS} cannot hold",
            hint="save the whole model with torch.save(model, path)",
        )
    if unclear := unclear_names(model):
        raise SwapError(
            f"{type(model).__name__} cannot be saved by the names of its tensors: a module of it {next(iter(unclear.values()))}",
            hint="rename that child",
        )
    write_recipe(model, directory, source=source, factory=factory, module=module, inputs=inputs)
    state = _tensors(model)
    first_names = _first_names(state)
    own = {name: tensor.contiguous() for name, tensor in state.items() if first_names[name] == name}
    places = Counter(tensor.untyped_storage().data_ptr() for tensor in own.values())
    saved = {name: t.clone() if places[t.untyped_storage().data_ptr()] > 1 else t for name, t in own.items()}  # no shared storage
    aliases = {name: first for name, first in first_names.items() if name != first}
    with writing(WEIGHTS):
        save_file(saved, directory / WEIGHTS, metadata={"format": "pt", **aliases})


def picklable(model: nn.Module) -> nn.Module:
    """The model, or a copy with its weight norms put into the weights, as torch pickles no parametrization. `load_weights` undoes it."""
    if not weight_norms_of(model):
        return model
    whole = copy_with(model, {})
    weight_norm.put_away(whole)
    return whole


def _tensors(model: nn.Module) -> dict[str, torch.Tensor]:
    return {name: tensor for name, tensor in model.state_dict().items() if isinstance(tensor, torch.Tensor)}


def _state_without_tensors(model: nn.Module) -> list[str]:
    """The names in the state dict whose values are not tensors: `_extra_state` may be anything."""
    return [name for name, value in model.state_dict().items() if not isinstance(value, torch.Tensor)]


def _first_names(state: Mapping[str, torch.Tensor]) -> dict[str, str]:
    """name -> the first name in `state` of the same tensor."""
    first: dict[Any, str] = {}
    place = {name: (t.data_ptr(), t.shape, t.stride(), t.dtype) if t.numel() else name for name, t in state.items()}
    return {name: first.setdefault(place[name], name) for name in state}


def _missing(state: Mapping[str, torch.Tensor], saved: Collection[str]) -> list[str]:
    """The names of the tensors in a state that were saved under none of their names."""
    first = _first_names(state)
    there = {first[name] for name in saved if name in first}
    return [name for name in state if first[name] not in there]


# --- read -------------------------------------------------------------------------------------------------------------------------------


def load_weights(model: nn.Module, directory: Path, recipe: Recipe) -> None:
    """Load the saved weights into a model whose norms were swapped; raises LoadError if it is not the model that was saved."""
    if not (directory / WEIGHTS).is_file():  # reading a pipe would block
        raise LoadError(f"there is no file {directory / WEIGHTS}", hint="was the directory copied whole?")
    _set_modes(model, recipe)
    _set_weight_norms(model, directory, recipe)
    _set_centrings(model, directory, recipe)
    _check_sites(model, directory, recipe)
    _set_training(model, directory, recipe)
    saved = _read_weights(directory)
    _set_dtypes(model, saved)
    try:
        _, unexpected = model.load_state_dict(saved, strict=False)
    except RuntimeError as error:
        detail = " ".join(line.strip() for line in str(error).splitlines()[:4])
        raise _does_not_fit(directory, detail) from error
    # State that is not a tensor is only in model.pt.
    for what, names in (
        ("it has no", _state_without_tensors(model)),
        ("it has no", _missing(_tensors(model), saved)),
        ("the architecture has no", unexpected),
    ):
        if names:
            raise _does_not_fit(directory, f"{what} {names[0]}" + (f" and {len(names) - 1} more" if len(names) > 1 else ""))
    _set_frozen(model, recipe)


def _read_weights(directory: Path) -> dict[str, torch.Tensor]:
    try:
        return dict(load_file(directory / WEIGHTS))
    except (OSError, SafetensorError) as error:
        raise LoadError(f"{directory / WEIGHTS} cannot be read: {error}", hint="was the file copied whole?") from error


def _set_modes(model: nn.Module, recipe: Recipe) -> None:
    layers = {name: module for name, module in model.named_modules() if isinstance(module, BatchlessNorm)}
    for name, layer in layers.items():
        layer.run.name = name
    for site in recipe.sites:
        if site["name"] in layers:
            for name in MODES:
                setattr(layers[site["name"]], name, site.get(name, getattr(BatchlessNorm, name)))


def _set_weight_norms(model: nn.Module, directory: Path, recipe: Recipe) -> None:
    """Give the layers of a model that the recipe names torch's weight norm, unless they have it."""
    modules = dict(model.named_modules())
    for entry in recipe.weight_norms:
        layer = modules.get(entry["name"])
        if not isinstance(layer, PRODUCERS):
            raise LoadError(
                f"{entry['name'] or 'the model'} of the given architecture is no conv or linear layer, but {directory} was saved with one",
                hint="the factory must build the model that was converted",
            )
        weight_norm.prepare(layer, bias=entry["bias"])


def _set_centrings(model: nn.Module, directory: Path, recipe: Recipe) -> None:
    """Let hooks centre what modules of a model take and return, as the recipe says, unless they do."""
    modules = dict(model.named_modules())
    for entry in recipe.centred:
        if entry["name"] not in modules:
            raise LoadError(
                f"the given architecture has no {entry['name']}, of which {directory} centres what it takes or returns",
                hint="the factory must build the model that was converted",
            )
        centre(modules[entry["name"]], entry["place"], entry["axis"])


def _check_sites(model: nn.Module, directory: Path, recipe: Recipe) -> None:
    """Raise LoadError for the first site that the model lacks, or that differs from the recipe."""
    found = {site["name"]: site for site in (*sites_of(model), *replaced_of(model))}
    for site in (*recipe.sites, *recipe.replaced):
        mine = found.get(site["name"])
        different = sorted(key for key in site if mine is not None and mine.get(key) != site[key])
        if mine is None or different:
            lacks = "no BatchlessNorm" if "std" in site else "another layer"
            what = lacks if mine is None else f"{different[0]} {mine[different[0]]!r}"
            expected = f"a {site['class']}" if mine is None else f"{site[different[0]]!r}"
            raise LoadError(
                f"{site['name'] or 'the model'} of the given architecture has {what}, but {directory} was saved with {expected}",
                hint="the factory must build the model that was converted",
            )


def _set_training(model: nn.Module, directory: Path, recipe: Recipe) -> None:
    """Couple the layers of a model, and set how they train, as in the recipe. Loading the weights then restores their state."""
    modules = dict(model.named_modules())
    for entry in recipe.training:
        layer, producer = modules.get(entry["name"]), modules.get(entry["producer"])
        try:
            if not isinstance(layer, BatchlessNorm) or (producer is None) != (entry["producer"] is None):
                raise ValueError("there is no such layer")
            if producer is not None:
                if not isinstance(producer, PRODUCERS):
                    raise ValueError(f"a {type(producer).__name__} is not a conv or linear layer")
                layer.couple(producer, torch.zeros(inputs_of(producer), device=layer.mean.device))
            if entry["guard"]:
                layer.enable_sample_limit()
            if entry["feedback"]:
                layer.enable_trend()
            layer.run.pace = float(entry["pace"])
        except (ValueError, TypeError) as error:
            raise LoadError(
                f"{directory / RECIPE} says that {entry['name']} is coupled to {entry['producer']}, which does not fit: {error}",
                hint="convert the model again",
            ) from error


def _set_dtypes(model: nn.Module, saved: Mapping[str, torch.Tensor]) -> None:
    """Give each tensor of the model the dtype with which it was saved, as loading converts values to the dtype of the model."""
    for prefix, module in model.named_modules(remove_duplicate=False):
        for tensors in (module._parameters, module._buffers):
            for name, tensor in tensors.items():
                other = saved.get(f"{prefix}.{name}" if prefix else name)
                if tensor is not None and other is not None and tensor.dtype != other.dtype:
                    tensor.data = tensor.data.to(other.dtype)


def _set_frozen(model: nn.Module, recipe: Recipe) -> None:
    """Set requires_grad of all parameters as in the recipe."""
    if recipe.frozen is not None:
        for name, parameter in model.named_parameters():
            if parameter.is_floating_point() or parameter.is_complex():
                parameter.requires_grad_(name not in recipe.frozen)


def _does_not_fit(directory: Path, detail: str) -> LoadError:
    return LoadError(
        f"{directory / WEIGHTS} does not fit the given architecture: {detail}",
        hint="the factory must build the model that was converted",
    )


# --- compared ---------------------------------------------------------------------------------------------------------------------------


def difference(model: nn.Module, directory: Path) -> str | None:
    """The name of the first tensor that differs, bit for bit, between `model` and the weights in `directory`, or is only in one of them."""
    saved, own = _read_weights(directory), _tensors(model)
    other = (name for name, tensor in saved.items() if name not in own or not same_bits(tensor, own[name]))
    return next(other, next(iter(_missing(own, saved)), None))


def same_bits(a: torch.Tensor, b: torch.Tensor) -> bool:
    """Whether two tensors are equal bit for bit: a NaN equals itself, and -0 does not equal 0."""
    if a.dtype != b.dtype or a.shape != b.shape:
        return False
    bits = [t.detach().cpu().contiguous().view(-1).view(torch.uint8) for t in (a, b)]
    return torch.equal(*bits)
