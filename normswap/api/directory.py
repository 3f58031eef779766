"""A converted directory: `normswap.save` writes one, `normswap.load` reads it."""

from __future__ import annotations

import sys
import warnings
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.export import ExportedProgram

from normswap.api import convert as pipeline
from normswap.detect.sites import Plan, Rule, Site, Swap
from normswap.errors import LoadError, UnsafePickleError, UsageError
from normswap.files import atomic
from normswap.files.load import build
from normswap.files.load import load as load_source
from normswap.files.recipe import (
    RECIPE,
    WEIGHTS,
    Recipe,
    check_files,
    difference,
    frozen_of,
    load_weights,
    read_recipe,
    same_bits,
    seal,
    training_of,
    unwrapped,
)
from normswap.files.recipe import save as save_directory
from normswap.files.recipe_checks import builds_without_code, is_trusted
from normswap.models import own_code
from normswap.models.copying import copy_for_running, copy_with, on_meta
from normswap.models.inputs import Inputs, make
from normswap.models.programs import as_module
from normswap.models.torch_private import tree_leaves, tree_map_only
from normswap.rules import DEFAULT_RULES
from normswap.rules.user_rules import all_checked, named
from normswap.swap.apply import swap


def save(model: nn.Module | pipeline.Conversion[Any], directory: str | Path) -> Path:
    """Write recipe.json and model.safetensors into `directory`, whole or not at all; `load` reads them.

    What is written is read back, and held against the model bit for bit, before it is there. Of a model that torch.compile or
    DistributedDataParallel wrapped, what they wrapped.
    """
    conversion = model if isinstance(model, pipeline.Conversion) else None
    module = unwrapped(conversion.module if conversion else as_module(model))  # type: ignore[arg-type]
    with atomic.directory(Path(directory)) as partial:
        save_directory(module, partial, inputs=recorded(conversion.inputs) if conversion else ())
        recipe = read_recipe(partial)
        again = copy_with(module, {})
        with torch.no_grad():
            for tensor in again.state_dict().values():
                if isinstance(tensor, Tensor):
                    tensor.zero_()
        load_weights(again, partial, recipe)
        check_same(module, again, partial, conversion.inputs if conversion else None)
        seal(partial)
    return Path(directory)


def load(
    directory: str | Path,
    factory: Callable[[], nn.Module] | None = None,
    *,
    rules: Sequence[Rule] | None = None,
    trust_packages: Sequence[str] = (),
    trust: bool = False,
    trust_pickle: bool = False,
) -> nn.Module | ExportedProgram:
    """The converted model in `directory`, which trains as the one that was saved.

    factory: builds the original architecture, with any weights. None takes the pickled model in the directory, or the spec that the model
    was made from (`torchvision:resnet18`). rules: those that the model was converted with; None finds your own ones where the directory
    says they were. Code that the directory names is imported only if you trust it: a factory with trust=True; a rule, which need not be
    imported if it is already, also if its package is one of trust_packages. trust: run what the directory says, its .pt2 too;
    trust_pickle is the old name.

    Raises LoadError if the directory, or the architecture, is not the one that was saved, a file in it was changed since, or something is
    needed that cannot be imported.
    """
    trust = trust or trust_pickle
    directory = Path(directory)
    recipe = read_recipe(directory)
    pickled = recipe.module if factory is None else None
    check_files(directory, recipe, [name for name in (pickled, WEIGHTS) if name is not None])
    model = opened(directory, recipe, factory, rules=rules, trust_packages=trust_packages, trust=trust)
    if recipe.files is None:
        if pickled is not None and (directory / WEIGHTS).exists() and (name := difference(as_module(model), directory)):
            raise LoadError(f"{directory} holds two models: {name} of {pickled} is not that of {WEIGHTS}", hint="convert the model again")
        warnings.warn(
            f"{directory} was written by a normswap that recorded no SHA-256 of its files: whether they were changed since is not known. "
            "Convert the model again, or save it with normswap.save",
            UserWarning,
            stacklevel=2,
        )
    return model


def opened(
    directory: Path,
    recipe: Recipe,
    factory: Callable[[], nn.Module] | None,
    *,
    rules: Sequence[Rule] | None = None,
    trust_packages: Sequence[str] = (),
    trust: bool = False,
) -> nn.Module | ExportedProgram:
    """`load`, without a look at whether the files are those that were written."""
    if factory is None and recipe.module is not None:
        return _pickled(directory, recipe.module, trust_packages, trust)
    if factory is None and recipe.factory is None:
        raise LoadError(
            f"{directory} holds weights but no architecture", hint="pass what builds the original model: factory=..., or --arch SPEC"
        )
    if factory is None and not (trust or builds_without_code(str(recipe.factory))):
        raise LoadError(
            f"{directory / RECIPE} names {recipe.factory!a} as what builds the model, and to import that is to run code of its choice",
            hint=f"if it is your own: --arch {recipe.factory} (factory=... in Python); --trust (trust=True) takes the directory's word",
        )
    model = as_module(build(recipe.factory) if factory is None else factory())  # type: ignore[arg-type]
    if on_meta(model):
        raise LoadError(
            f"the given architecture is on the meta device, which has no memory that the weights in {directory} could go to",
            hint="build it on the CPU, without torch.device('meta') around it",
        )
    if recipe.sites:
        known = _rules_of(recipe, directory, trust, tuple(trust_packages)) if rules is None else rules
        model = swap(model, _decided(model, recipe, known), std={site["name"]: site["std"] for site in recipe.sites})
    load_weights(model, directory, recipe)
    return model


def _pickled(directory: Path, name: str, trust_packages: Sequence[str], trust: bool) -> nn.Module | ExportedProgram:
    try:
        return load_source(str(directory / name), trust_packages=trust_packages, trust=trust).model
    except UnsafePickleError as error:
        if f"{own_code.__name__}.{own_code._rebuild.__name__}" not in error.wanted:
            raise
        raise UnsafePickleError(
            f"{directory / name} carries code, as a norm was replaced in the code of one of its modules",
            hint="--arch package.module:factory (factory=... in Python) with what builds the original model reads the weights instead; "
            "or --trust, if you trust whoever made this file with everything on this account",
            wanted=error.wanted,
        ) from error


def _decided(model: nn.Module, recipe: Recipe, rules: Sequence[Rule]) -> Plan:
    """The plan that was carried out. A norm that is a module is found by its name; for those in code, the model has to be looked into."""
    checked = all_checked(rules, DEFAULT_RULES)
    modules = dict(model.named_modules())
    swaps: list[Swap] = []
    others: list[str] = []
    for entry in recipe.sites:
        site = Site(entry["name"], tuple(entry.get("aliases", ())), modules.get(entry["name"]), entry.get("calls"))
        rule = next((rule for rule in checked if site.module is not None and rule.recognises(site)), None)
        # Which weights it has does not matter: they are about to be loaded.
        if rule is not None and rule.build is not None and rule.check(site) is None:
            swaps.append(Swap(site, rule))
        else:
            others.append(site.name)
    if others:
        planned = pipeline.plan(model, restored(recipe.inputs), approximate=True, rules=rules)  # the inputs tell what no weight tells
        swaps += [swap for swap in planned.swaps if swap.name in others]
    return Plan(tuple(swaps), (), "names")


def check_same(model: nn.Module, again: nn.Module, directory: Path, inputs: Inputs | None) -> None:
    """Raise LoadError unless `again`, read from `directory`, is `model`: tensor for tensor, in how it trains, and in what it computes."""
    what = difference(model, directory) or difference(again, directory)
    if what is None and (training_of(model), frozen_of(model)) != (training_of(again), frozen_of(again)):
        what = "how its layers train"
    if what is None and inputs is not None:
        first, second = (_outputs(module, inputs) for module in (model, again))
        if not _equal(first, second) and _equal(first, _outputs(model, inputs)):  # what differs from itself says nothing
            what = "its output for the example inputs"
    if what is not None:
        raise LoadError(
            f"what was written cannot be read back as it was: {what} differs", hint="report this, with the architecture of the model"
        )


def _outputs(model: nn.Module, inputs: Inputs) -> list[Any]:
    copied = copy_for_running(model)  # which is in eval mode, and whose buffers may change
    args, kwargs = tree_map_only(Tensor, torch.clone, (inputs.args, dict(inputs.kwargs)))
    with torch.no_grad(), torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        return tree_leaves(copied(*args, **kwargs))


def _equal(a: list[Any], b: list[Any]) -> bool:
    tensors = [[t for t in leaves if isinstance(t, Tensor)] for leaves in (a, b)]
    return len(tensors[0]) == len(tensors[1]) and all(map(same_bits, *tensors))


def _rules_of(recipe: Recipe, directory: Path, trust: bool, packages: tuple[str, ...]) -> tuple[Rule, ...]:
    """The rules that a converted directory was made with: those that it says are not normswap's, imported again."""
    own = []
    for entry in recipe.rules:
        where = f"{directory} has layers that a rule of its author built ({entry['kind']}: {', '.join(entry['sites'])})"
        hint = "pass the rules that it was converted with: normswap.load(directory, rules=(MY_RULE, *normswap.DEFAULT_RULES))"
        if entry["rule"] is None:
            raise LoadError(f"{where}, and does not say where that rule can be imported", hint=hint)
        if not (trust or is_trusted(entry["rule"], packages) or _is_imported(entry["rule"])):
            package = entry["rule"].partition(":")[0].partition(".")[0]
            raise LoadError(
                f"{where}, and to import {entry['rule']!a} is to run code of its choice",
                hint=f"--trust-package {package} (trust_packages=[{package!a}] in Python), if you trust that package; or {hint}",
            )
        try:
            own.append(named(entry["rule"], "the rule"))
        except UsageError as error:
            raise LoadError(f"{where}: {error.message}", hint=f"make it importable under this name again, or {hint}") from error
    return (*own, *DEFAULT_RULES)


def _is_imported(spec: str) -> bool:
    """Whether the rule that package.module:NAME names can be had without importing anything."""
    module, _, name = spec.partition(":")
    return module in sys.modules and isinstance(vars(sys.modules[module]).get(name), Rule)


def recorded(inputs: Inputs) -> list[dict[str, Any]]:
    """Shape and dtype of each input, and of integers what they stay below, if each is one tensor; else nothing."""
    named = [*((None, a) for a in inputs.args), *inputs.kwargs.items()]
    if not all(isinstance(value, Tensor) for _, value in named):
        return []
    return [{"name": name, "shape": list(t.shape), "dtype": str(t.dtype).removeprefix("torch."), **_range(t)} for name, t in named]


def _range(t: Tensor) -> dict[str, int]:
    integers = not (t.is_floating_point() or t.is_complex() or t.dtype == torch.bool)
    return {"high": max(int(t.max()) + 1, 1)} if integers and t.numel() else {}


def restored(entries: Sequence[Mapping[str, Any]]) -> Inputs | None:
    """Seeded inputs of the recorded shapes."""
    if not entries:
        return None
    tensors = [
        (entry["name"], make(entry["shape"], getattr(torch, entry["dtype"]), seed=i, **{k: entry[k] for k in ("high",) if k in entry}))
        for i, entry in enumerate(entries)
    ]
    return Inputs(tuple(t for name, t in tensors if name is None), {name: t for name, t in tensors if name is not None})
