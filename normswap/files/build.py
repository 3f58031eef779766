"""Builds a model from a name: `build(spec)`.

    torchvision:NAME[@WEIGHTS]    timm:NAME[@TAG]       random weights, or downloaded ones if there is an @
    hf:DIRECTORY                                        a model that transformers saved; other files in the directory are not used
    package.module:factory                              the user's own function or class, called without arguments

The first three only build models of an installed package; the last one imports and runs code.
"""

from __future__ import annotations

import contextlib
import difflib
import importlib
import inspect
import re
import sys
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import nn

from normswap.errors import LoadError, UsageError, described, few, first_line, kind_of
from normswap.files.json_file import read_json
from normswap.files.pickles.review import mismatched_torchvision
from normswap.models.inputs import archive_problem
from normswap.models.quiet import quiet
from normswap.models.spec import SPEC, imported

SPECS = "torchvision:NAME[@WEIGHTS], timm:NAME[@TAG], hf:DIRECTORY or package.module:factory"
_WITHOUT_CODE = ("torchvision:", "timm:", "hf:")


def is_spec(text: str) -> bool:
    """Whether a SRC has the form of a spec. (`load` prefers a file of that name.)"""
    return builds_without_code(text) or SPEC.fullmatch(text) is not None


def builds_without_code(spec: str) -> bool:
    """Whether a spec builds a model of an installed package. The other kind imports a module and calls a function of it."""
    return spec.startswith(_WITHOUT_CODE)


def stem_of(spec: str) -> str:
    """The stem of the names of output files for a model that `spec` builds."""
    kind, _, rest = spec.partition(":")
    if kind == "hf":
        return Path(rest).resolve().name
    name = rest.partition("@")[0]
    return name if kind in ("torchvision", "timm") else name.rpartition(".")[2]


def build(spec: str) -> nn.Module:
    """A new model. Random weights are drawn with seed 0, and the caller's generator is restored."""
    kind, _, rest = spec.partition(":")
    name, _, weights = rest.partition("@")
    if not is_spec(spec) or not rest:
        raise UsageError(f"{spec!r} does not name an architecture", hint=f"expected {SPECS}")
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        if kind == "torchvision":
            return _from_torchvision(name, weights)
        if kind == "timm":
            return _from_timm(name, weights)
        if kind == "hf":
            return _from_transformers(rest)
        return _from_factory(spec)


# --- torchvision and timm -----------------------------------------------------------------------------------------------------------


def _from_torchvision(name: str, weights: str) -> nn.Module:
    models = _import("torchvision.models", "torchvision:")
    if name not in models.list_models():
        raise _unknown("torchvision", name, models.list_models())
    arguments: dict[str, Any] = {"weights": None}
    if weights:
        choices = models.get_model_weights(name)
        weights = weights.rpartition(".")[2]
        if weights not in choices.__members__:
            raise UsageError(f"torchvision has no weights {weights} for {name}", hint=f"choose from {', '.join(choices.__members__)}")
        arguments = {"weights": choices[weights], "progress": False}
    elif "weights_backbone" in inspect.signature(models.get_model_builder(name)).parameters:
        arguments["weights_backbone"] = None  # its default is to download
    with _fetching(f"torchvision:{name}@{weights}"):
        return _module(models.get_model(name, **arguments), name)


def _from_timm(name: str, tag: str) -> nn.Module:
    timm = _import("timm", "timm:")
    if not re.fullmatch(r"\w+(\.\w+)?", name) or not timm.is_model(name):  # refuses hf-hub: and local-dir:, which load files
        raise _unknown("timm", name, timm.list_models())
    if not tag:
        return _module(timm.create_model(name, pretrained=False), name)
    full = name if tag in ("DEFAULT", "default") else f"{name}.{tag}"
    known = timm.list_pretrained(f"{name.partition('.')[0]}.*")
    if "." in full and full not in known:
        tags = [each.partition(".")[2] for each in known]
        raise UsageError(f"timm has no weights {tag} for {name}", hint=f"choose from {', '.join(['DEFAULT', *tags])}")
    with _fetching(f"timm:{name}@{tag}"):
        return _module(timm.create_model(full, pretrained=True), name)


@contextlib.contextmanager
def _fetching(what: str) -> Iterator[None]:
    """Turn the errors of a failed download in the block into LoadErrors."""
    try:
        with quiet(show_warnings=False, print_to=sys.stderr):
            yield
    except OSError as error:  # the errors of urllib, requests and huggingface_hub are derived from it
        raise LoadError(
            f"the weights of {what} cannot be fetched: {first_line(error)}",
            hint="is there a network? without the @ the weights are random",
        ) from error
    except RuntimeError as error:
        if "hash" in str(error):
            raise LoadError(f"the weights of {what} arrived damaged: {first_line(error)}", hint="try again") from error
        raise


def _unknown(package: str, name: str, names: Sequence[str]) -> LoadError:
    close = difflib.get_close_matches(name, names, 3)
    return LoadError(
        f"{package} has no model {name!r}",
        hint=f"did you mean {' or '.join(close)}?" if close else f"python -c 'import {package}' and list_models() lists them",
    )


def near(name: str, limit: int = 3) -> list[str]:
    """Specs of torchvision and timm whose name is `name`, or near it: the nearest first. Empty where neither can be imported."""
    found: dict[str, float] = {}
    for package in ("torchvision", "timm"):
        try:
            module = importlib.import_module("torchvision.models" if package == "torchvision" else package)
        except Exception:  # it is not installed, or does not fit the installed torch: then it has nothing to propose
            continue
        for close in difflib.get_close_matches(name, module.list_models(), limit, cutoff=0.75):
            found[f"{package}:{close}"] = difflib.SequenceMatcher(None, name, close).ratio()
    return sorted(found, key=lambda spec: -found[spec])[:limit]


# --- transformers -------------------------------------------------------------------------------------------------------------------


def _from_transformers(directory: str) -> nn.Module:
    path = Path(directory)
    if not (path / "config.json").is_file():
        raise LoadError(
            f"{directory} is not a directory that transformers saved: it has no config.json",
            hint="hf: takes a local directory, as model.save_pretrained(DIRECTORY) writes it; nothing is fetched from the hub",
        )
    try:
        problem = _asks_for_more(path)
    except (OSError, ValueError) as error:
        raise LoadError(f"{directory} cannot be read: {first_line(error)}", hint="copy it, or save it again") from error
    if problem is not None:
        raise LoadError(f"{directory} {problem}", hint="save the model alone: model.save_pretrained(DIRECTORY)")
    transformers = _import("transformers", "hf:")
    bars = transformers.utils.logging.is_progress_bar_enabled()
    try:
        with quiet(show_warnings=False, print_to=sys.stderr):
            transformers.utils.logging.disable_progress_bar()
            config = transformers.AutoConfig.from_pretrained(path, local_files_only=True, trust_remote_code=False)
            # The class that was saved, as AutoModel would silently drop the head
            name = (config.architectures or ["AutoModel"])[0]
            cls: Any = getattr(transformers, name, None)
            is_model = isinstance(cls, type) and (issubclass(cls, transformers.PreTrainedModel) or cls is transformers.AutoModel)
            if not is_model:
                raise LoadError(f"{directory} holds a {name}, which the installed transformers {transformers.__version__} does not have")
            model, report = cls.from_pretrained(path, local_files_only=True, output_loading_info=True, trust_remote_code=False)
    except LoadError:
        raise
    except Exception as error:
        cause = error.__cause__ or error  # transformers hides what went wrong in one of its imports
        unfit = mismatched_torchvision(cause) if isinstance(cause, Exception) else None
        raise unfit or LoadError(f"transformers cannot load {directory}: {first_line(error)}") from error
    finally:
        if bars:
            transformers.utils.logging.enable_progress_bar()
    if missing := sorted(report["missing_keys"]):
        raise LoadError(f"{directory} lacks weights of {name}: {few(missing)}", hint="they would be random numbers")
    return _module(model, directory)


_OTHER_MODELS = ("architecture", "backbone")  # keys of a configuration whose values may name another model
_WEIGHTS = "transformers_weights"  # key of a configuration whose value names a file


def _asks_for_more(directory: Path) -> str | None:
    """What loading a directory would need beyond transformers and its files: code, a kernel, a download, an archive of unlimited size.

    The text follows the name of the directory; None if nothing is needed. Raises OSError or ValueError, as `read_json` does.
    """
    config = read_json(directory / "config.json")
    if not isinstance(config, Mapping):
        return "has a config.json that is no JSON object"
    names = config.get("architectures")
    if names is not None and not (isinstance(names, list) and all(isinstance(name, str) and name.isidentifier() for name in names)):
        return "has a config.json whose architectures are not names of classes"
    if (directory / "adapter_config.json").exists():
        return "holds an adapter (adapter_config.json), which names the model that it belongs to, to be fetched"
    for key, value in _entries(config):
        if "implementation" in key and not _is_identifier(value):
            return f"asks for a kernel from the hub: {key} is {value!a:.80}"
        if key in _OTHER_MODELS and isinstance(value, str) and not re.fullmatch(r"[\w.-]*", value):
            return f"asks for another model, to be fetched: {key} is {value!a:.80}"
        if key == _WEIGHTS and not (value is None or _is_file_name(value)):
            return f"keeps its weights in {value!a:.80}, which is not a file in it"
    for index in sorted(directory.glob("*.index.json")):
        content = read_json(index)
        files = content.get("weight_map") if isinstance(content, Mapping) else None
        if not isinstance(files, Mapping):
            return f"has an {index.name} without a weight_map"
        if outside := [value for value in files.values() if not _is_file_name(value)]:
            return f"keeps weights in {outside[0]!a:.80}, which is not a file in it"
    for file in sorted(directory.glob("*.bin")):
        if (problem := archive_problem(file)) is not None:
            return f"is not read: in {file.name}, {problem}"
    return None


def _entries(config: Any) -> Iterator[tuple[str, Any]]:
    """Every key of a configuration, at any depth, with its value."""
    stack = [config]
    while stack:  # not recursive, as a file may be nested to any depth
        value = stack.pop()
        if isinstance(value, Mapping):
            yield from value.items()
            stack.extend(value.values())
        elif isinstance(value, list):
            stack.extend(value)


def _is_identifier(value: Any) -> bool:
    """Whether a setting is an identifier, a bool or None, or a mapping (with a setting for each part of a model) to such values."""
    if isinstance(value, Mapping):
        return all(map(_is_identifier, value.values()))
    return value is None or isinstance(value, bool) or (isinstance(value, str) and value.isidentifier())


def _is_file_name(name: Any) -> bool:
    return isinstance(name, str) and re.fullmatch(r"[\w][\w.-]*", name) is not None


# --- the user's own -----------------------------------------------------------------------------------------------------------------


def _from_factory(spec: str) -> nn.Module:
    factory = imported(spec, "", "a function or class of that module", LoadError)
    if not callable(factory) or isinstance(factory, nn.Module):
        raise LoadError(
            f"{spec} is {kind_of(factory)}, not something to call",
            hint="name a function or class that takes no arguments and returns the model",
        )
    try:
        with contextlib.redirect_stdout(sys.stderr):  # stdout is for results
            model = factory()
    except Exception as error:
        raise LoadError(f"{spec}() raised {described(error)}") from error
    return _module(model, f"{spec}()")


# --- all of them --------------------------------------------------------------------------------------------------------------------


def _module(made: Any, name: str) -> nn.Module:
    if not isinstance(made, nn.Module):
        raise LoadError(f"{name} returned {kind_of(made)}, not an nn.Module")
    return made


def _import(module: str, prefix: str) -> Any:
    package = module.partition(".")[0]
    try:
        with quiet(show_warnings=False, print_to=sys.stderr):
            return importlib.import_module(module)
    except ImportError as error:
        raise LoadError(
            f"{prefix} needs the package {package}, which cannot be imported: {first_line(error)}", hint=f"pip install {package}"
        ) from error
    except RuntimeError as error:
        raise mismatched_torchvision(error) or error from error
