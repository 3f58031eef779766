"""A converted directory: `normswap.save` writes one, `normswap.load` reads it."""

from __future__ import annotations

import sys
import warnings
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.export import ExportedProgram

from normswap.api.convert import Conversion, plan
from normswap.detect.sites import Plan, Rule, Site, Swap
from normswap.errors import LoadError, UnsafePickleError, UsageError
from normswap.files import atomic
from normswap.files.build import build, builds_without_code
from normswap.files.converted import WEIGHTS, difference, load_weights, plain, same_bits, unwrapped
from normswap.files.converted import save as save_directory
from normswap.files.load import load as load_source
from normswap.files.recipe import RECIPE, Recipe, check_files, frozen_of, read_recipe, seal, training_of
from normswap.layer.rms_norm import RMSNorm
from normswap.models import own_code
from normswap.models.copying import copy_for_running, copy_with, on_meta
from normswap.models.inputs import Inputs
from normswap.models.programs import as_module
from normswap.models.spec import is_within
from normswap.models.torch_private import tree_leaves
from normswap.models.watching import forward
from normswap.rules import DEFAULT_RULES, batchless
from normswap.rules.user_rules import all_checked, named
from normswap.swap.apply import swap
from normswap.swap.rmsnorm import to_rmsnorm
from normswap.swap.weight_norm import removing

ALIGNMENT = 64  # bytes: where torch's allocator for CPUs begins a tensor


def save(model: nn.Module | Conversion[Any], directory: str | Path) -> Path:
    """Write recipe.json and model.safetensors into `directory`, whole or not at all; `load` reads them.

    The files are read back and compared with the model bit for bit before the directory appears. A model inside torch.compile or
    DistributedDataParallel is saved without the wrapper, and a weight that `keep_centred` parametrized as a plain one.
    """
    conversion = model if isinstance(model, Conversion) else None
    module = plain(unwrapped(conversion.module if conversion else as_module(model)))  # type: ignore[arg-type]
    with atomic.directory(Path(directory)) as partial:
        save_directory(module, partial, inputs=conversion.inputs if conversion else None)
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
    """The converted model in `directory`, which trains like the one that was saved.

    factory: builds the original architecture, with any weights; None: the pickled model in the directory, or the spec in its recipe
    (`torchvision:resnet18`). rules: those with which the model was converted; None: rules of your own are imported by their names in the
    recipe. Code that the recipe names is imported only if you trust it: a factory with trust=True; a rule with trust=True, or if its
    package is in trust_packages, or if it has been imported already. trust: run any code from the directory, including its .pt2;
    trust_pickle is the old name.

    Raises LoadError if the architecture does not fit the directory, a file was changed after it was written, or a module that is needed
    cannot be imported.
    """
    trust = trust or trust_pickle
    directory = Path(directory)
    if factory is not None and (isinstance(factory, nn.Module) or not callable(factory)):
        raise UsageError(
            f"factory is a {type(factory).__name__}; expected a function that builds the original model, and takes nothing",
            hint="factory=lambda: model",
        )
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
    """`load`, without the check of the files' SHA-256."""
    if factory is None and recipe.module is not None:
        whole = _pickled(directory, recipe.module, trust_packages, trust)
        if recipe.weight_norms and isinstance(whole, nn.Module):  # torch pickles no parametrizations, so they are in the weights there
            load_weights(whole, directory, recipe)
        return whole
    if factory is None and recipe.factory is None:
        raise LoadError(
            f"{directory} holds weights but no architecture", hint="pass what builds the original model: factory=..., or --arch SPEC"
        )
    if factory is None and not (trust or builds_without_code(str(recipe.factory))):
        raise LoadError(
            f"{directory / RECIPE} names {recipe.factory!a} as what builds the model, and to import that is to run code of its choice",
            hint=f"if it is your own: --arch {recipe.factory} (factory=... in Python); --trust (trust=True) takes the directory's word",
        )
    model = unwrapped(as_module(build(recipe.factory) if factory is None else factory()))  # type: ignore[arg-type]
    if on_meta(model):
        raise LoadError(
            f"the given architecture is on the meta device, which has no memory that the weights in {directory} could go to",
            hint="build it on the CPU, without torch.device('meta') around it",
        )
    if recipe.sites or recipe.replaced:
        known = _rules_of(recipe, directory, trust, tuple(trust_packages)) if rules is None else rules
        model = swap(model, _decided(model, recipe, known), std={s["name"]: s.get("std", "log") for s in (*recipe.sites, *recipe.replaced)})
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
    """The plan of the recipe's sites. Norms that are modules are found by their names; for norms in code, the model is traced."""
    known = (*DEFAULT_RULES, batchless.RULE)
    checked = all_checked((*rules, batchless.RULE) if recipe.replaced else rules, known)
    modules = dict(model.named_modules())
    swaps: list[Swap] = []
    others: list[str] = []
    removed = {entry["name"] for entry in recipe.replaced if entry["class"] != RMSNorm.__name__}
    for entry in (*recipe.sites, *recipe.replaced):
        site = Site(entry["name"], tuple(entry.get("aliases", ())), modules.get(entry["name"]), entry.get("calls"))
        if entry["class"] == RMSNorm.__name__ and site.module is not None:
            swaps.append(Swap(site, to_rmsnorm("layer_norm", entry["eps"], entry["axis"])))
            continue
        rule = next((rule for rule in checked if site.module is not None and rule.recognises(site)), None)
        # The values of its weights do not matter, as the saved ones will be loaded.
        if rule is not None and rule.build is not None and rule.check(site) is None:
            swaps.append(Swap(site, rule))
        else:
            others.append(site.name)
    if others:
        planned = plan(model, recipe.example_inputs(), approximate=True, rules=rules)  # inputs: some norms only get a size from them
        swaps += [swap for swap in planned.swaps if swap.name in others]
    swaps = [Swap(s.site, removing(s.rule)) if s.name in removed else s for s in swaps]
    return Plan(tuple(swaps), (), "names")


def check_same(model: nn.Module, again: nn.Module, directory: Path, inputs: Inputs | None) -> None:
    """Raise LoadError unless `again`, read from `directory`, equals `model` in its tensors, in how it trains, and in its outputs."""
    what = difference(model, directory) or difference(again, directory)
    if what is None and (training_of(model), frozen_of(model)) != (training_of(again), frozen_of(again)):
        what = "how its layers train"
    if what is None and inputs is not None:
        first, second = (_outputs(module, inputs) for module in (model, again))
        if not _equal(first, second) and _equal(first, _outputs(model, inputs)):  # unless the model is not deterministic
            what = "its output for the example inputs"
    if what is not None:
        raise LoadError(
            f"what was written cannot be read back as it was: {what} differs", hint="report this, with the architecture of the model"
        )


def _outputs(model: nn.Module, inputs: Inputs) -> list[Any]:
    copied = copy_for_running(model, of_parameters=_aligned)  # in eval mode; the forward pass may change its buffers
    return tree_leaves(forward(copied, inputs.args, inputs.kwargs, seed=0))


def _aligned(parameter: nn.Parameter) -> nn.Parameter:
    """The parameter, at an address at which torch puts new tensors: a matrix product may be rounded differently elsewhere.

    What is read from a file in place, as transformers reads .safetensors, lies wherever the file has it.
    """
    plain = type(parameter) is nn.Parameter and parameter.layout is torch.strided and parameter.device.type == "cpu"
    if not plain or parameter.data_ptr() % ALIGNMENT == 0:
        return parameter
    return nn.Parameter(parameter.detach().clone(), requires_grad=parameter.requires_grad)


def _equal(a: list[Any], b: list[Any]) -> bool:
    tensors = [[t for t in leaves if isinstance(t, Tensor)] for leaves in (a, b)]
    return len(tensors[0]) == len(tensors[1]) and all(map(same_bits, *tensors))


def _rules_of(recipe: Recipe, directory: Path, trust: bool, packages: tuple[str, ...]) -> tuple[Rule, ...]:
    """The rules with which a converted directory was made: the user's rules in its recipe, imported again, then the default ones."""
    own = []
    for entry in recipe.rules:
        where = f"{directory} has layers that a rule of its author built ({entry['kind']}: {', '.join(entry['sites'])})"
        hint = "pass the rules that it was converted with: normswap.load(directory, rules=(MY_RULE, *normswap.DEFAULT_RULES))"
        if entry["rule"] is None:
            raise LoadError(f"{where}, and does not say where that rule can be imported", hint=hint)
        if not (trust or is_within(entry["rule"].partition(":")[0], packages) or _is_imported(entry["rule"])):
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
    """Whether the rule that package.module:NAME names has been imported already."""
    module, _, name = spec.partition(":")
    return module in sys.modules and isinstance(vars(sys.modules[module]).get(name), Rule)
