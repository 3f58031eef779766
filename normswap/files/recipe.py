"""recipe.json of a converted directory: what was swapped and how, how it trains, and the SHA-256 of each other file.

`Recipe` has the entries. For an entry that is a list of objects, a table (SITE, INPUT, RULE, TRAINING) has their fields: the name, a test
of the value, and the value that is written for a layer or an input. Writing, checking and reading all use these tables. A recipe may be
malicious, like any other file, so all of its values are checked.
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import MISSING, dataclass, field
from pathlib import Path
from typing import Any, Generic, TypeVar

import torch
from torch import Tensor, nn

from normswap.errors import LoadError
from normswap.files import call
from normswap.files.atomic import recover
from normswap.files.json_file import read_json
from normswap.layer.batchless_norm import AUXES, BatchlessNorm
from normswap.layer.formulas import STATS, STD_FORMS
from normswap.layer.rms_norm import RMSNorm, centrings
from normswap.layer.weight_norm import Removed, is_over_outputs
from normswap.models.inputs import HIGH, Inputs, make
from normswap.versions import version_of

RECIPE = "recipe.json"
VERSION = 1
MODULES = ("model.pt", "model.pt2")  # the only file names that a recipe may have for the whole model
LARGEST_INPUT = 2**31  # elements


# --- tests of values --------------------------------------------------------------------------------------------------------------------

Test = Callable[[Any], bool]


def _is(kind: type) -> Test:
    return lambda value: isinstance(value, kind)


_text, _flag, _list = _is(str), _is(bool), _is(list)


def _whole(value: object) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and abs(value) < 2**63


def _positive(value: Any) -> bool:
    return _whole(value) and value > 0


def _number(value: object) -> bool:
    return _whole(value) or (isinstance(value, float) and math.isfinite(value))


def _shape(value: object) -> bool:
    return isinstance(value, list) and all(_whole(size) and size >= 0 for size in value) and math.prod(value) <= LARGEST_INPUT


def _word(*known: object) -> Test:
    return lambda value: isinstance(value, str) and value in known


def _or_none(test: Test) -> Test:
    return lambda value: value is None or test(value)


def _list_of(test: Test) -> Test:
    return lambda value: isinstance(value, list) and all(map(test, value))


# --- the entries of a recipe ------------------------------------------------------------------------------------------------------------


T = TypeVar("T")  # the type that an object in the recipe describes: a layer or an input


@dataclass(frozen=True)
class Field(Generic[T]):
    """One field of an object in the recipe.

    test      whether a value in a recipe that is read is valid
    value_of  layer or input -> the value to write; None: the code that writes the object adds the field
    optional  whether the object may lack it
    mode      whether loading sets it on the layer, as it says how the layer trains; any other value must equal the layer's
    """

    test: Test
    value_of: Callable[[T], Any] | None = None
    optional: bool = False
    mode: bool = False


SITE: Mapping[str, Field[BatchlessNorm]] = {
    "name": Field(_text),
    "aliases": Field(_list_of(_text), optional=True),
    "class": Field(_text, lambda layer: type(layer).__name__),
    "num_features": Field(_list_of(_whole), lambda layer: list(layer.sizes), optional=True),
    "channel_axis": Field(_list_of(_whole), lambda layer: list(layer.channel_axis), optional=True),
    "shared_axes": Field(_list_of(_whole), lambda layer: list(layer.shared_axes), optional=True),
    "affine": Field(_flag, lambda layer: layer.affine, optional=True),
    "std": Field(_word(*STD_FORMS), lambda layer: layer.std),
    "aux": Field(_word(*AUXES), lambda layer: layer.aux, optional=True, mode=True),
    "stats": Field(_word(*STATS), lambda layer: layer.stats, optional=True, mode=True),
    "momentum": Field(_number, lambda layer: layer.momentum, optional=True, mode=True),
    "calls": Field(_positive, lambda layer: layer.calls, optional=True, mode=True),
    "eps": Field(_or_none(_number), lambda layer: None if layer.source is None else layer.source.eps, optional=True),
}
REPLACED: Mapping[str, Field[Any]] = {
    "name": Field(_text),
    "aliases": Field(_list_of(_text)),
    "class": Field(_text, lambda layer: type(layer).__name__),
    "eps": Field(_or_none(_number), lambda layer: layer.eps if isinstance(layer, RMSNorm) else None),
    "axis": Field(_or_none(_whole), lambda layer: layer.axis if isinstance(layer, RMSNorm) else None),
}
CENTRED: Mapping[str, Field[Any]] = {
    "name": Field(_text),
    "place": Field(lambda value: value is None or isinstance(value, str) or (_whole(value) and value >= 0)),
    "axis": Field(_whole),
}
WEIGHT_NORM: Mapping[str, Field[Any]] = {"name": Field(_text), "bias": Field(_flag, lambda producer: producer.bias is not None)}
INPUT: Mapping[str, Field[Tensor]] = {
    "name": Field(_or_none(_text)),
    "shape": Field(_shape, lambda tensor: list(tensor.shape)),
    "dtype": Field(
        _word(*(str(value).removeprefix("torch.") for value in vars(torch).values() if isinstance(value, torch.dtype))),
        lambda tensor: str(tensor.dtype).removeprefix("torch."),
    ),
    "high": Field(_positive, optional=True),  # of integers: the upper bound (exclusive)
}
RULE: Mapping[str, Field[Any]] = {"kind": Field(_text), "rule": Field(_or_none(_text)), "sites": Field(_list_of(_text))}
TRAINING: Mapping[str, Field[BatchlessNorm]] = {
    "name": Field(_text),
    "producer": Field(_or_none(_text)),  # None: not coupled
    "feedback": Field(_flag, lambda layer: layer.trend is not None),
    "guard": Field(_flag, lambda layer: layer.limits_samples),
    "pace": Field(lambda value: _number(value) and 0 < value <= 1, lambda layer: layer.run.pace),
}
MODES = tuple(name for name, each in SITE.items() if each.mode)


def _entry(test: Test, of_each: Mapping[str, Field[Any]] | None = None, **default: Any) -> Any:
    """A dataclass field for an entry of the recipe; of_each: the fields of its objects, if it is a list of objects."""
    return field(metadata={"test": test, "of_each": of_each or {}}, **default)


@dataclass(frozen=True, kw_only=True)
class Recipe:
    """The description of a converted directory. Recipes of an older normswap lack the entries with a default.

    source   the SRC from which the model was read
    factory  the spec that builds the original architecture (`torchvision:resnet18`), if there is one
    module   the file with the whole model ("model.pt", "model.pt2"), if the source was a whole model
    inputs   shape and dtype of each tensor of the example inputs
    call     where these tensors stand, if they are not the arguments themselves: [args, kwargs], as `call.py` writes it
    sites    one object per BatchlessNorm: its names and its form
    replaced      one object per layer that stands where a norm was and is no BatchlessNorm
    weight_norms  one object per conv or linear that has torch's weight norm
    centred       one object per input or output of a module that a hook centres
    rules    one object per rule of the user's: its kind, where it can be imported (null: nowhere), and the layers that it built
    training one object per layer that is coupled, or has a gradient trend, a sample limit or a pace: how it trains
    frozen   the names of the parameters with requires_grad=False
    files    name -> SHA-256 of each other file
    """

    source: str | None = _entry(_or_none(_text))
    factory: str | None = _entry(_or_none(_text))
    module: str | None = _entry(_or_none(_word(*MODULES)))
    inputs: Sequence[Mapping[str, Any]] = _entry(_list, INPUT)
    sites: Sequence[Mapping[str, Any]] = _entry(_list, SITE)
    replaced: Sequence[Mapping[str, Any]] = _entry(_or_none(_list), REPLACED, default=())
    weight_norms: Sequence[Mapping[str, Any]] = _entry(_or_none(_list), WEIGHT_NORM, default=())
    centred: Sequence[Mapping[str, Any]] = _entry(_or_none(_list), CENTRED, default=())
    rules: Sequence[Mapping[str, Any]] = _entry(_or_none(_list), RULE, default=())
    training: Sequence[Mapping[str, Any]] = _entry(_or_none(_list), TRAINING, default=())
    call: Sequence[Any] | None = _entry(_or_none(_list), default=None)
    frozen: Sequence[str] | None = _entry(_or_none(_list_of(_text)), default=None)
    files: Mapping[str, str] | None = _entry(
        _or_none(lambda value: isinstance(value, Mapping) and all(map(_text, value.values()))), default=None
    )

    def example_inputs(self) -> Inputs | None:
        """Inputs of the recorded shapes, the same every time; None if none were recorded."""
        named = [
            (entry["name"], make(entry["shape"], getattr(torch, entry["dtype"]), high=entry.get("high", HIGH), seed=seed))
            for seed, entry in enumerate(self.inputs)
        ]
        if self.call is not None:
            args, kwargs = (call.rebuilt(each, [tensor for _, tensor in named]) for each in self.call)
            return Inputs(args, kwargs)
        args = tuple(tensor for name, tensor in named if name is None)
        return Inputs(args, {name: tensor for name, tensor in named if name is not None}) if named else None


# --- written ----------------------------------------------------------------------------------------------------------------------------


def write_recipe(
    model: nn.Module, directory: Path, *, source: str | None, factory: str | None, module: str | None, inputs: Inputs | None
) -> None:
    """Write the recipe of a model; `seal` adds the other files when all are written."""
    entries, arguments = ([], None) if inputs is None else _recorded(inputs)
    recipe = Recipe(
        source=source,
        factory=factory,
        module=module,
        inputs=entries,
        call=arguments,
        sites=sites_of(model),
        replaced=replaced_of(model),
        weight_norms=weight_norms_of(model),
        centred=centred_of(model),
        rules=rules_of(model),
        training=training_of(model),
        frozen=frozen_of(model),
    )
    written_by = {"version": VERSION, "normswap": version_of("normswap"), "torch": version_of("torch")}
    _write(directory, {**written_by, "class": f"{type(model).__module__}.{type(model).__qualname__}", **vars(recipe)})


def sites_of(model: nn.Module) -> list[dict[str, Any]]:
    """The entry `sites`: every BatchlessNorm of a model with its names and fields, in `named_modules` order."""
    return _layers_of(model, BatchlessNorm, SITE)


def replaced_of(model: nn.Module) -> list[dict[str, Any]]:
    """The entry `replaced`: every other layer of normswap that stands where a norm was."""
    return _layers_of(model, (Removed, RMSNorm), REPLACED)


def weight_norms_of(model: nn.Module) -> list[dict[str, Any]]:
    """The entry `weight_norms`: every conv or linear with torch's weight norm over its output channels."""
    return [{"name": name, **_values(WEIGHT_NORM, module)} for name, module in model.named_modules() if is_over_outputs(module)]


def centred_of(model: nn.Module) -> list[dict[str, Any]]:
    """The entry `centred`: every hook that centres what a module takes or returns."""
    return [{"name": name, "place": place, "axis": axis} for name, m in model.named_modules() for place, axis in centrings(m)]


def _layers_of(model: nn.Module, kind: type[nn.Module] | tuple[type[nn.Module], ...], fields: Mapping[str, Field[Any]]) -> list[Any]:
    """The layers of a kind, with their names and fields, in `named_modules` order."""
    names: dict[nn.Module, list[str]] = {}
    for name, module in model.named_modules(remove_duplicate=False):
        if isinstance(module, kind):
            names.setdefault(module, []).append(name)
    return [{"name": first, "aliases": aliases, **_values(fields, layer)} for layer, (first, *aliases) in names.items()]


def rules_of(model: nn.Module) -> list[dict[str, Any]]:
    """The entry `rules`: the user's rules that built BatchlessNorm layers of a model, with the first name of each layer."""
    names: dict[tuple[str, str | None], list[str]] = {}
    for name, module in model.named_modules():
        if isinstance(module, BatchlessNorm) and module.own_rule is not None:
            names.setdefault(module.own_rule, []).append(name)
    return [{"kind": kind, "rule": spec, "sites": sites} for (kind, spec), sites in names.items()]


def training_of(model: nn.Module) -> list[dict[str, Any]]:
    """The entry `training`: for each BatchlessNorm that is coupled, or has a trend, a limit or a pace, its fields in TRAINING."""
    names = {id(module): name for name, module in reversed(list(model.named_modules()))}
    return [
        {"name": name, "producer": names.get(id(layer.producer)), **_values(TRAINING, layer)}
        for name, layer in model.named_modules()
        if isinstance(layer, BatchlessNorm)
        and (layer.producer is not None or layer.limits_samples or layer.trend is not None or layer.run.pace != 1)
    ]


def frozen_of(model: nn.Module) -> list[str]:
    """The names of the parameters with requires_grad=False, sorted."""
    return sorted(name for name, parameter in model.named_parameters() if not parameter.requires_grad)


def _recorded(inputs: Inputs) -> tuple[list[dict[str, Any]], list[Any] | None]:
    """The entries `inputs`: shape and dtype of each tensor, an upper bound of integers; and `call`. Empty if it cannot be recorded."""
    named: list[tuple[str | None, Any]] = [*((None, value) for value in inputs.args), *inputs.kwargs.items()]
    arguments = None
    if not all(isinstance(value, Tensor) for _, value in named):
        tensors: list[Tensor] = []
        try:
            arguments = [call.recorded(tuple(inputs.args), tensors), call.recorded(dict(inputs.kwargs), tensors)]
        except call.NotRecordable:
            return [], None
        named = [(None, tensor) for tensor in tensors]
    return [{"name": name, **_values(INPUT, tensor), **_bound(tensor)} for name, tensor in named], arguments


def _bound(tensor: Tensor) -> dict[str, int]:
    integers = not (tensor.is_floating_point() or tensor.is_complex() or tensor.dtype == torch.bool)
    return {"high": max(int(tensor.max()) + 1, 1)} if integers and tensor.numel() else {}


def _values(fields: Mapping[str, Field[T]], described: T) -> dict[str, Any]:
    return {name: each.value_of(described) for name, each in fields.items() if each.value_of is not None}


def recipe_hash(model: nn.Module) -> str:
    """The SHA-256 of the `sites`, `rules`, `replaced`, `weight_norms` and `centred` of a recipe, as JSON with sorted keys and no spaces.

    A directory and an ONNX file of the same conversion have the same hash, whatever the name of the source was.
    """
    content = {"rules": rules_of(model), "sites": sites_of(model)}
    more = {"replaced": replaced_of(model), "weight_norms": weight_norms_of(model), "centred": centred_of(model)}
    content.update({name: entries for name, entries in more.items() if entries})  # the hash of a BatchlessNorm model stays as it was
    return hashlib.sha256(json.dumps(content, sort_keys=True, separators=(",", ":")).encode()).hexdigest()


def seal(directory: Path) -> None:
    """Record the SHA-256 of every other file of the directory in its recipe. Call it when all files are written."""
    recipe = json.loads((directory / RECIPE).read_text(encoding="utf-8"))
    recipe["files"] = {path.name: _digest(path) for path in sorted(directory.iterdir()) if path.name != RECIPE and path.is_file()}
    _write(directory, recipe)


def _write(directory: Path, recipe: Mapping[str, Any]) -> None:
    (directory / RECIPE).write_text(json.dumps(recipe, indent=2) + "\n", encoding="utf-8")


def _digest(path: Path) -> str:
    found = hashlib.sha256()
    with path.open("rb") as file:
        while block := file.read(1 << 20):
            found.update(block)
    return found.hexdigest()


# --- read -------------------------------------------------------------------------------------------------------------------------------


def read_recipe(directory: Path) -> Recipe:
    """The recipe of a converted directory. Raises LoadError if the directory has none, or one of an unknown version."""
    path = directory / RECIPE
    recover(directory)
    if directory.exists() and not directory.is_dir():
        raise LoadError(f"{directory} is not a directory", hint="give the directory that `normswap convert SRC -o DIR` wrote")
    try:
        content: Any = read_json(path)
        if (problem := _problem(content)) is not None:
            raise ValueError(problem)
        version = content["version"]
        entries = dataclasses.fields(Recipe)
        recipe = Recipe(**{e.name: content[e.name] for e in entries if e.default is MISSING or content.get(e.name) is not None})
    except FileNotFoundError as error:
        raise LoadError(
            f"{directory} is not a converted directory: it has no {RECIPE}", hint="`normswap convert SRC -o DIR` writes one"
        ) from error
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise LoadError(f"{path} is not a recipe that normswap wrote: {error}") from error
    if version != VERSION:
        raise LoadError(f"{path} is a recipe of version {version}; expected {VERSION}", hint="use the normswap that wrote it, or newer")
    return recipe


def _problem(content: object) -> str | None:
    """The first entry or field of a recipe that is not valid, in a few words; None if all are."""
    if not isinstance(content, Mapping):
        return "it is no JSON object"
    for entry in dataclasses.fields(Recipe):
        if not entry.metadata["test"](content.get(entry.name)):
            return f"its {entry.name} is not one"
    for entry in dataclasses.fields(Recipe):
        fields: Mapping[str, Field[Any]] = entry.metadata["of_each"]
        for found in (content.get(entry.name) or ()) if fields else ():
            if not isinstance(found, Mapping):
                return f"one of its {entry.name} is no JSON object"
            if lacking := [name for name, each in fields.items() if name not in found and not each.optional]:
                return f"one of its {entry.name} lacks its {lacking[0]}"
            if wrong := [name for name, each in fields.items() if name in found and not each.test(found[name])]:
                return f"one of its {entry.name} has a {wrong[0]} that is not one"
    arguments = content.get("call")
    if arguments is not None and not _is_call(arguments, len(content["inputs"])):
        return "its call is not one"
    return None


def _is_call(arguments: list[Any], tensors: int) -> bool:
    kinds = [list(each) for each in arguments if isinstance(each, dict)]
    return kinds == [["tuple"], ["dict"]] and all(call.is_recorded(each, tensors) for each in arguments)


def check_files(directory: Path, recipe: Recipe, names: Sequence[str]) -> None:
    """Raise LoadError if one of these files has another SHA-256 than in the recipe, or none there. Missing files are skipped."""
    for name in names:
        expected = (recipe.files or {}).get(name)
        if recipe.files is None or not (directory / name).is_file() or (expected is not None and _digest(directory / name) == expected):
            continue
        what = "is not among the files of" if expected is None else "was changed after it was written: its SHA-256 is not the one in"
        raise LoadError(
            f"{directory / name} {what} {RECIPE}",
            hint="convert or copy the model again, or save the changed one with normswap.save; if the change is meant, "
            f'take "files" out of {directory / RECIPE}',
        )
