"""A converted directory: `normswap.save` writes one, `normswap.load` reads it."""

from __future__ import annotations

import dataclasses
import sys
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.export import ExportedProgram

from normswap import graphs, outputs, pipeline
from normswap.errors import LoadError, UnsafePickleError, UsageError
from normswap.exported import as_module
from normswap.inputs import Inputs, make
from normswap.load import build
from normswap.load import load as load_source
from normswap.plan import Rule
from normswap.recipe_checks import builds_without_code, is_trusted
from normswap.rules import DEFAULT_RULES
from normswap.rules.own import named
from normswap.save import RECIPE, Recipe, load_weights, read_recipe, unwrapped
from normswap.save import save as save_directory
from normswap.swap import swap


def save(model: nn.Module | pipeline.Conversion[Any], directory: str | Path) -> Path:
    """Write recipe.json and model.safetensors into `directory`, whole or not at all; `load` reads them.

    Of a model that torch.compile or DistributedDataParallel wrapped, what they wrapped.
    """
    conversion = model if isinstance(model, pipeline.Conversion) else None
    module = unwrapped(conversion.module if conversion else as_module(model))  # type: ignore[arg-type]
    with outputs.directory(Path(directory)) as partial:
        save_directory(module, partial, inputs=recorded(conversion.inputs) if conversion else ())
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
    """The converted model in `directory`.

    factory: builds the original architecture, with any weights. None takes the pickled model in the directory, or the spec that the model
    was made from (`torchvision:resnet18`). rules: those that the model was converted with; None finds your own ones where the directory
    says they were. Code that the directory names is imported only if you trust it: a factory with trust=True; a rule, which need not be
    imported if it is already, also if its package is one of trust_packages. trust: run what the directory says, its .pt2 too;
    trust_pickle is the old name.

    Raises LoadError if the directory, or the architecture, is not the one that was saved, or something is needed that cannot be imported.
    """
    trust = trust or trust_pickle
    directory = Path(directory)
    recipe = read_recipe(directory)
    if factory is None and recipe.module is not None:
        try:
            return load_source(str(directory / recipe.module), trust_packages=trust_packages, trust=trust).model
        except UnsafePickleError as error:
            if f"{graphs.__name__}.{graphs._rebuild.__name__}" not in error.wanted:
                raise
            raise UnsafePickleError(
                f"{directory / recipe.module} carries code, as a norm was replaced in the code of one of its modules",
                hint="--arch package.module:factory (factory=... in Python) with what builds the original model reads the weights instead; "
                "or --trust, if you trust whoever made this file with everything on this account",
                wanted=error.wanted,
            ) from error
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
    wanted = {site["name"]: site["std"] for site in recipe.sites}
    if wanted:
        known = _rules_of(recipe, directory, trust, tuple(trust_packages)) if rules is None else rules
        # Which weights it has does not matter: they are about to be loaded. The inputs tell the shapes that no weight tells.
        decided = pipeline.plan(model, restored(recipe.inputs), approximate=True, rules=known)
        chosen = dataclasses.replace(decided, swaps=tuple(s for s in decided.swaps if s.name in wanted))
        model = swap(model, chosen, std=wanted)
    load_weights(model, directory, recipe)
    return model


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
    """Shape and dtype of each input, if each is one tensor; else nothing."""
    named = [*((None, a) for a in inputs.args), *inputs.kwargs.items()]
    if not all(isinstance(value, Tensor) for _, value in named):
        return []
    return [{"name": name, "shape": list(value.shape), "dtype": str(value.dtype).removeprefix("torch.")} for name, value in named]


def restored(entries: Sequence[Mapping[str, Any]]) -> Inputs | None:
    """Seeded inputs of the recorded shapes."""
    if not entries:
        return None
    tensors = [(entry["name"], make(entry["shape"], getattr(torch, entry["dtype"]), seed=i)) for i, entry in enumerate(entries)]
    return Inputs(tuple(t for name, t in tensors if name is None), {name: t for name, t in tensors if name is not None})
