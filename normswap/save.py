"""A model with BatchlessNorm layers <-> recipe.json + model.safetensors.

The recipe says which layers are BatchlessNorm and of which form; the weights are the model's state dict, so any safetensors reader can load
them into a converted model. Nothing is pickled: the architecture comes from the user's own factory.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import nn

from normswap import recipe_checks
from normswap.batchless import BatchlessNorm
from normswap.errors import LoadError
from normswap.outputs import read_json, recover, writing
from normswap.sharing import shadow
from normswap.versions import version_of

RECIPE, WEIGHTS = "recipe.json", "model.safetensors"
VERSION = 1
WRAPPERS = ("torch._dynamo.", "torch.nn.parallel.", "torch.optim.swa_utils")  # modules of torch whose classes hold one model
MODES = ("aux", "stats", "momentum", "calls")  # how a layer trains: taken from the recipe, as they are no matter of the architecture


@dataclass(frozen=True)
class Recipe:
    """What a converted directory holds.

    sites    one entry per BatchlessNorm: its names and its form
    factory  the SRC that builds the original architecture (`torchvision:resnet18`), if the model came from one
    module   the file with the whole model, if the source was one ("model.pt", "model.pt2")
    inputs   shape and dtype of each example input
    rules    for layers that a rule of the user's built: its kind, where it can be imported (null: nowhere), and their names
    """

    sites: Sequence[Mapping[str, Any]]
    source: str | None = None
    factory: str | None = None
    module: str | None = None
    inputs: Sequence[Mapping[str, Any]] = field(default_factory=tuple)
    rules: Sequence[Mapping[str, Any]] = field(default_factory=tuple)


def save(model: nn.Module, directory: Path, *, source: str | None = None, factory: str | None = None, **more: Any) -> None:
    """Write recipe.json and model.safetensors into `directory`, which exists and is not yet under its final name."""
    from safetensors.torch import save_model

    recipe = {
        "version": VERSION,
        "normswap": version_of("normswap"),
        "torch": version_of("torch"),
        "class": f"{type(model).__module__}.{type(model).__qualname__}",
        "source": source,
        "factory": factory,
        "module": more.get("module"),
        "inputs": list(more.get("inputs", ())),
        "sites": [dict(site) for site in sites_of(model)],
        "rules": rules_of(model),
    }
    (directory / RECIPE).write_text(json.dumps(recipe, indent=2) + "\n", encoding="utf-8")
    with writing(WEIGHTS):
        save_model(_uncoupled(model), str(directory / WEIGHTS), metadata={"format": "pt"})


def unwrapped(model: nn.Module) -> nn.Module:
    """What torch.compile, DistributedDataParallel or AveragedModel was made of: the names in it are those of the architecture."""
    while type(model).__module__.startswith(WRAPPERS):
        (model,) = model.children()
    return model


def _uncoupled(model: nn.Module) -> nn.Module:
    """`model`, or a copy with the same parameters whose layers are all ordinary: coupling is a matter of a training run."""
    if not any(
        isinstance(module, BatchlessNorm) and (module.pair or module.guarded or module.steering is not None) for module in model.modules()
    ):
        return model
    copied = shadow(model)
    for module in copied.modules():
        if isinstance(module, BatchlessNorm):
            module.make_plain()
    return copied


def sites_of(model: nn.Module) -> list[dict[str, Any]]:
    """Every BatchlessNorm of a model, with its names and its form, in `named_modules` order."""
    names: dict[BatchlessNorm, list[str]] = {}
    for name, module in model.named_modules(remove_duplicate=False):
        if isinstance(module, BatchlessNorm):
            names.setdefault(module, []).append(name)
    return [
        {
            "name": first,
            "aliases": aliases,
            "class": type(layer).__name__,
            "num_features": list(layer.sizes),
            "channel_axis": list(layer.channel_axis),
            "shared_axes": list(layer.shared_axes),
            "affine": layer.affine,
            "std": layer.std,
            **{name: getattr(layer, name) for name in MODES},
            "eps": None if layer.source is None else layer.source.eps,
        }
        for layer, (first, *aliases) in names.items()
    ]


def rules_of(model: nn.Module) -> list[dict[str, Any]]:
    """The rules that built BatchlessNorm layers of a model and are not normswap's, with the first name of each layer."""
    names: dict[tuple[str, str | None], list[str]] = {}
    for name, module in model.named_modules():
        if isinstance(module, BatchlessNorm) and module.own_rule is not None:
            names.setdefault(module.own_rule, []).append(name)
    return [{"kind": kind, "rule": spec, "sites": sites} for (kind, spec), sites in names.items()]


def recipe_hash(model: nn.Module) -> str:
    """The SHA-256 of what a recipe says of the model itself, its `sites` and `rules`, as JSON with sorted keys and no spaces.

    A directory and an ONNX file of the same conversion have the same one, wherever and under whatever name the model was.
    """
    told = {"rules": rules_of(model), "sites": sites_of(model)}
    return hashlib.sha256(json.dumps(told, sort_keys=True, separators=(",", ":")).encode()).hexdigest()


def read_recipe(directory: Path) -> Recipe:
    """The recipe of a converted directory. Raises LoadError if it is not one, or of a version that this normswap does not know."""
    path = directory / RECIPE
    recover(directory)
    if directory.exists() and not directory.is_dir():
        raise LoadError(f"{directory} is not a directory", hint="give the directory that `normswap convert SRC -o DIR` wrote")
    try:
        content: Any = read_json(path)
        if (problem := recipe_checks.problem(content)) is not None:
            raise ValueError(problem)
        version = content["version"]
        known = {name: content[name] for name in ("sites", "source", "factory", "module", "inputs")}
        recipe = Recipe(**known, rules=content.get("rules") or ())  # not in recipes that normswap wrote before it had them
    except FileNotFoundError as error:
        raise LoadError(
            f"{directory} is not a converted directory: it has no {RECIPE}", hint="`normswap convert SRC -o DIR` writes one"
        ) from error
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise LoadError(f"{path} is not a recipe that normswap wrote: {error}") from error
    if version != VERSION:
        raise LoadError(f"{path} is a recipe of version {version}; expected {VERSION}", hint="use the normswap that wrote it, or newer")
    return recipe


def _take_dtypes(model: nn.Module, path: Path) -> None:
    """Give each tensor of the model the dtype that it was saved with: loading alone would convert the values to the factory's."""
    from safetensors import SafetensorError, safe_open

    saved: dict[str, torch.dtype] = {}
    try:
        with safe_open(path, framework="pt") as file:
            for name in file.keys():  # noqa: SIM118  the file is no dict
                part = file.get_slice(name)
                saved[name] = (part[:0] if part.get_shape() else file.get_tensor(name)).dtype
    except (OSError, SafetensorError):
        return  # what is wrong with the file is said when it is read
    for prefix, module in model.named_modules(remove_duplicate=False):
        for tensors in (module._parameters, module._buffers):
            for name, tensor in tensors.items():
                dtype = saved.get(f"{prefix}.{name}" if prefix else name)
                if tensor is not None and dtype is not None and tensor.dtype != dtype:
                    tensor.data = tensor.data.to(dtype)


def _take_modes(model: nn.Module, recipe: Recipe) -> None:
    layers = {name: module for name, module in model.named_modules() if isinstance(module, BatchlessNorm)}
    for site in recipe.sites:
        if site["name"] in layers:
            for name in MODES:
                setattr(layers[site["name"]], name, site.get(name, getattr(BatchlessNorm, name)))


def load_weights(model: nn.Module, directory: Path, recipe: Recipe) -> None:
    """Load the saved weights into a model whose norms were swapped; raises LoadError if it is not the model that was saved."""
    from safetensors import SafetensorError
    from safetensors.torch import load_model

    if not (directory / WEIGHTS).is_file():  # a pipe would be waited for
        raise LoadError(f"there is no file {directory / WEIGHTS}", hint="was the directory copied whole?")
    _take_modes(model, recipe)
    found = {site["name"]: site for site in sites_of(model)}
    for site in recipe.sites:
        mine = found.get(site["name"])
        different = sorted(key for key in site if mine is not None and mine.get(key) != site[key])
        if mine is None or different:
            what = "no BatchlessNorm" if mine is None else f"{different[0]} {mine[different[0]]!r}"
            wanted = f"a {site['class']}" if mine is None else f"{site[different[0]]!r}"
            raise LoadError(
                f"{site['name'] or 'the model'} of the given architecture has {what}, but {directory} was saved with {wanted}",
                hint="the factory must build the model that was converted",
            )
    _take_dtypes(model, directory / WEIGHTS)
    try:
        load_model(model, str(directory / WEIGHTS), strict=True)
    except (OSError, SafetensorError) as error:
        raise LoadError(f"{directory / WEIGHTS} cannot be read: {error}", hint="was the file copied whole?") from error
    except RuntimeError as error:
        detail = " ".join(line.strip() for line in str(error).splitlines()[:4])
        raise LoadError(
            f"{directory / WEIGHTS} does not fit the given architecture: {detail}",
            hint="the factory must build the model that was converted",
        ) from error
