"""A model with BatchlessNorm layers <-> recipe.json + model.safetensors.

The recipe says which layers are BatchlessNorm and of which form, how each trains, and what SHA-256 each other file of the directory has.
The weights are the model's state dict, so any safetensors reader can load them into a converted model. Nothing is pickled: the architecture
comes from the user's own factory.
"""

from __future__ import annotations

import hashlib
import json
from collections import Counter
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import nn

from normswap.errors import LoadError, SwapError
from normswap.files import recipe_checks
from normswap.files.atomic import read_json, recover, writing
from normswap.layer.batchless_norm import BatchlessNorm
from normswap.layer.producer import CONVS, TRANSPOSED, input_shape
from normswap.models.copying import on_meta, unclear_names
from normswap.versions import version_of

RECIPE, WEIGHTS = "recipe.json", "model.safetensors"
PRODUCERS = (nn.Linear, *CONVS, *TRANSPOSED)
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
    training of layers that are coupled, steered, guarded or slowed: how they train
    frozen   the parameters that do not train
    files    name -> SHA-256 of the other files; None: of a normswap that recorded none
    """

    sites: Sequence[Mapping[str, Any]]
    source: str | None = None
    factory: str | None = None
    module: str | None = None
    inputs: Sequence[Mapping[str, Any]] = field(default_factory=tuple)
    rules: Sequence[Mapping[str, Any]] = field(default_factory=tuple)
    training: Sequence[Mapping[str, Any]] = field(default_factory=tuple)
    frozen: Sequence[str] | None = None
    files: Mapping[str, str] | None = None


def save(model: nn.Module, directory: Path, *, source: str | None = None, factory: str | None = None, **more: Any) -> None:
    """Write recipe.json and model.safetensors into `directory`, which exists and is not yet under its final name. `seal` comes last."""
    from safetensors.torch import save_file

    if valueless := on_meta(model):
        raise SwapError(f"{valueless[0]} is on the meta device: it has no values that could be saved", hint="load the weights first")
    if more.get("module") is None and (others := _others(model)):
        raise SwapError(
            f"{others[0]} of {type(model).__name__} is state that is no tensor, which {WEIGHTS} cannot hold",
            hint="save the whole model with torch.save(model, path)",
        )
    if unclear := unclear_names(model):
        raise SwapError(
            f"{type(model).__name__} cannot be saved by the names of its tensors: a module of it {next(iter(unclear.values()))}",
            hint="rename that child",
        )
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
        "training": training_of(model),
        "frozen": frozen_of(model),
    }
    _write(directory / RECIPE, recipe)
    state = _tensors(model)
    kept = _first_names(state)
    own = {name: tensor.contiguous() for name, tensor in state.items() if kept[name] == name}
    places = Counter(tensor.untyped_storage().data_ptr() for tensor in own.values())
    held = {name: t.clone() if places[t.untyped_storage().data_ptr()] > 1 else t for name, t in own.items()}  # no two views of one memory
    aliases = {name: first for name, first in kept.items() if name != first}
    with writing(WEIGHTS):
        save_file(held, directory / WEIGHTS, metadata={"format": "pt", **aliases})


def _tensors(model: nn.Module) -> dict[str, torch.Tensor]:
    return {name: tensor for name, tensor in model.state_dict().items() if isinstance(tensor, torch.Tensor)}


def _others(model: nn.Module) -> list[str]:
    """The state that is no tensor: `_extra_state` may be anything."""
    return [name for name, value in model.state_dict().items() if not isinstance(value, torch.Tensor)]


def _first_names(state: Mapping[str, torch.Tensor]) -> dict[str, str]:
    """name -> the first name of the same tensor."""
    first: dict[Any, str] = {}
    place = {name: (t.data_ptr(), t.shape, t.stride(), t.dtype) if t.numel() else name for name, t in state.items()}
    return {name: first.setdefault(place[name], name) for name in state}


def _missing(state: Mapping[str, torch.Tensor], saved: Collection[str]) -> list[str]:
    """The tensors of a state that were not saved, under none of their names."""
    first = _first_names(state)
    there = {first[name] for name in saved if name in first}
    return [name for name in state if first[name] not in there]


def _write(path: Path, recipe: Mapping[str, Any]) -> None:
    path.write_text(json.dumps(recipe, indent=2) + "\n", encoding="utf-8")


def unwrapped(model: nn.Module) -> nn.Module:
    """What torch.compile, DistributedDataParallel or AveragedModel was made of: the names in it are those of the architecture."""
    while type(model).__module__.startswith(WRAPPERS):
        (model,) = model.children()
    return model


# --- the files of a directory -----------------------------------------------------------------------------------------------------------


def seal(directory: Path) -> None:
    """Record the SHA-256 of every other file of the directory in its recipe: when all are written."""
    recipe = json.loads((directory / RECIPE).read_text(encoding="utf-8"))
    recipe["files"] = {path.name: _digest(path) for path in sorted(directory.iterdir()) if path.name != RECIPE and path.is_file()}
    _write(directory / RECIPE, recipe)


def check_files(directory: Path, recipe: Recipe, names: Sequence[str]) -> None:
    """Raise LoadError for one of these files whose contents are not those that the recipe tells of. It may be missing, or no file."""
    for name in names:
        wanted = (recipe.files or {}).get(name)
        if recipe.files is None or not (directory / name).is_file() or (wanted is not None and _digest(directory / name) == wanted):
            continue
        what = "is not among the files of" if wanted is None else "was changed after it was written: its SHA-256 is not the one in"
        raise LoadError(
            f"{directory / name} {what} {RECIPE}",
            hint="convert or copy the model again, or save the changed one with normswap.save; if the change is meant, "
            f'take "files" out of {directory / RECIPE}',
        )


def _digest(path: Path) -> str:
    found = hashlib.sha256()
    with path.open("rb") as file:
        while block := file.read(1 << 20):
            found.update(block)
    return found.hexdigest()


def difference(model: nn.Module, directory: Path) -> str | None:
    """The first tensor of `model` that the weights in `directory` do not hold bit for bit, or the first of theirs that it has not."""
    from safetensors import SafetensorError
    from safetensors.torch import load_file

    try:
        saved = load_file(directory / WEIGHTS)
    except (OSError, SafetensorError) as error:
        raise _unreadable(directory / WEIGHTS, error) from error
    own = _tensors(model)
    other = (name for name, tensor in saved.items() if name not in own or not same_bits(tensor, own[name]))
    return next(other, next(iter(_missing(own, saved)), None))


def same_bits(a: torch.Tensor, b: torch.Tensor) -> bool:
    """Bit for bit: a NaN is itself, and -0 is not 0."""
    if a.dtype != b.dtype or a.shape != b.shape:
        return False
    bits = [t.detach().cpu().contiguous().view(-1).view(torch.uint8) for t in (a, b)]
    return torch.equal(*bits)


# --- how the layers train ----------------------------------------------------------------------------------------------------------------


def training_of(model: nn.Module) -> list[dict[str, Any]]:
    """What each BatchlessNorm has of a training run besides its state: its producer (null: not coupled), feedback, guard and pace."""
    names = {id(module): name for name, module in reversed(list(model.named_modules()))}
    found = []
    for name, layer in model.named_modules():
        if isinstance(layer, BatchlessNorm):
            coupled, feedback = layer.producer is not None, layer.trend is not None
            if coupled or feedback or layer.limits_samples or layer.run.pace != 1:
                told = {"producer": names.get(id(layer.producer)), "feedback": feedback, "guard": layer.limits_samples}
                found.append({"name": name, **told, "pace": layer.run.pace})
    return found


def frozen_of(model: nn.Module) -> list[str]:
    return sorted(name for name, parameter in model.named_parameters() if not parameter.requires_grad)


def _take_training(model: nn.Module, directory: Path, recipe: Recipe) -> None:
    """Let the layers of a model train as the recipe says. Their state is that of a new run until the weights are loaded."""
    modules = dict(model.named_modules())
    for told in recipe.training:
        layer, producer = modules.get(told["name"]), modules.get(told["producer"])
        try:
            if not isinstance(layer, BatchlessNorm) or (producer is None) != (told["producer"] is None):
                raise ValueError("there is no such layer")
            if producer is not None:
                if not isinstance(producer, PRODUCERS):
                    raise ValueError(f"a {type(producer).__name__} is no conv or linear")
                layer.couple(producer, torch.zeros(input_shape(producer), device=layer.mean.device))
            if told["guard"]:
                layer.enable_sample_limit()
            if told["feedback"]:
                layer.enable_trend()
            layer.run.pace = float(told["pace"])
        except (ValueError, TypeError) as error:
            raise LoadError(
                f"{directory / RECIPE} says that {told['name']} is coupled to {told['producer']}, which does not fit: {error}",
                hint="convert the model again",
            ) from error


def _take_frozen(model: nn.Module, recipe: Recipe) -> None:
    """Freeze what was frozen, and nothing else."""
    if recipe.frozen is not None:
        for name, parameter in model.named_parameters():
            if parameter.is_floating_point() or parameter.is_complex():
                parameter.requires_grad_(name not in recipe.frozen)


def _unreadable(path: Path, error: Exception) -> LoadError:
    return LoadError(f"{path} cannot be read: {error}", hint="was the file copied whole?")


# --- which layers ------------------------------------------------------------------------------------------------------------------------


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
        # not in recipes that normswap wrote before it had them
        more = {name: content[name] for name in ("rules", "training", "frozen", "files") if content.get(name) is not None}
        recipe = Recipe(**known, **more)
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
    from safetensors.torch import load_file

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
    _take_training(model, directory, recipe)
    _take_dtypes(model, directory / WEIGHTS)
    try:
        saved = load_file(directory / WEIGHTS)
        _, unexpected = model.load_state_dict(saved, strict=False)
    except (OSError, SafetensorError) as error:
        raise _unreadable(directory / WEIGHTS, error) from error
    except RuntimeError as error:
        detail = " ".join(line.strip() for line in str(error).splitlines()[:4])
        raise _does_not_fit(directory, detail) from error
    # What is no tensor is in model.pt alone.
    for what, names in (
        ("it has no", _others(model)),
        ("it has no", _missing(_tensors(model), saved)),
        ("the architecture has no", unexpected),
    ):
        if names:
            raise _does_not_fit(directory, f"{what} {names[0]}" + (f" and {len(names) - 1} more" if len(names) > 1 else ""))
    _take_frozen(model, recipe)


def _does_not_fit(directory: Path, detail: str) -> LoadError:
    return LoadError(
        f"{directory / WEIGHTS} does not fit the given architecture: {detail}",
        hint="the factory must build the model that was converted",
    )
