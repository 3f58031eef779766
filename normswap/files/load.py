"""Where a model comes from: a file, or a name that builds one. The only reader of model files.

    load(source)   a .pt, .pth, .pt2 or .safetensors file, or a spec
    build(spec)    torchvision:NAME[@WEIGHTS], timm:NAME[@TAG], hf:DIRECTORY, package.module:factory

What a file is, its bytes say, not its name. Nothing is downloaded unless the spec has an `@`, and nothing in a file runs: see `pickles` for
files of torch.save. A file of torch.export (.pt2) is a program, and is read only if the user trusts it.
"""

from __future__ import annotations

import contextlib
import importlib
import inspect
import logging
import os
import pickle
import re
import sys
import warnings
import zipfile
from collections import OrderedDict
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any, Literal

import torch
from torch import nn

from normswap.errors import LoadError, UsageError, described, first_line, shown
from normswap.files import pickles, saved_transformers
from normswap.layer.batchless_norm import AUXES, PARAMETER_OF_FORM, BatchlessNorm, Source
from normswap.layer.formulas import REDUCTIONS, STATS, STD_FORMS
from normswap.models import archives, wellformed
from normswap.models.copying import on_meta
from normswap.models.spec import SPEC, make_working_directory_importable

SPECS = "torchvision:NAME[@WEIGHTS], timm:NAME[@TAG], hf:DIRECTORY or package.module:factory"


@dataclass(frozen=True)
class Loaded:
    """A model and how it came."""

    model: nn.Module | torch.export.ExportedProgram
    source: str
    stem: str  # a name for what is made of it
    form: Literal["module", "state_dict", "exported_program", "factory"]
    factory: str | None  # the spec that builds the architecture again, where there is one


def load(
    source: str, *, arch: str | None = None, trust_packages: Sequence[str] = (), trust: bool = False, trust_pickle: bool = False
) -> Loaded:
    """The model that `source` names.

    `arch` is the spec that builds the architecture, for a file that holds only a state dict. `trust_packages` are packages whose
    nn.Module classes a pickle may use; `trust` runs whatever the file says, and is what a .pt2 needs. `trust_pickle` is its old name.
    """
    trust = trust or trust_pickle
    for package in trust_packages:
        _check_package(package)
    if _is_spec(source) and not Path(source).exists():
        if arch is not None:
            raise UsageError(f"--arch is for files that hold a state dict; {source} builds its own architecture", hint="leave --arch out")
        return Loaded(build(source), source, _stem_of_spec(source), "factory", source)

    path = _existing_file(source)
    found = _read(path, trust_packages, trust)
    model: nn.Module | torch.export.ExportedProgram
    form: Literal["module", "state_dict", "exported_program"]
    if isinstance(found, torch.export.ExportedProgram):
        model, form = found, "exported_program"
    elif isinstance(found, nn.Module):
        model, form = found, "module"
    elif arch is not None:
        return Loaded(_fill(build(arch), found, path.name, arch), source, path.stem, "state_dict", arch)
    else:
        raise UsageError(
            f"{path.name} holds the weights of a model ({len(found)} tensors), not the model",
            hint=f"say what they are the weights of, with --arch {SPECS}",
        )
    if arch is not None:
        raise UsageError(f"--arch is for files that hold a state dict; {path.name} holds the whole model", hint="leave --arch out")
    return Loaded(model, source, path.stem, form, None)


# --- names that build a model -------------------------------------------------------------------------------------------------------


def build(spec: str) -> nn.Module:
    """A new model. Weights that are drawn at random are drawn from seed 0, and the caller's generator is left as it was."""
    kind, _, rest = spec.partition(":")
    name, _, weights = rest.partition("@")
    if not _is_spec(spec) or not rest:
        raise UsageError(f"{spec!r} does not name an architecture", hint=f"expected {SPECS}")
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        if kind == "torchvision":
            return _torchvision(name, weights)
        if kind == "timm":
            return _timm(name, weights)
        if kind == "hf":
            return _transformers(rest)
        return _factory(spec)


def _torchvision(name: str, weights: str) -> nn.Module:
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


def _timm(name: str, tag: str) -> nn.Module:
    timm = _import("timm", "timm:")
    if not re.fullmatch(r"\w+(\.\w+)?", name) or not timm.is_model(name):  # hf-hub: and local-dir: would go and look
        raise _unknown("timm", name, timm.list_models())
    if not tag:
        return _module(timm.create_model(name, pretrained=False), name)
    full = name if tag in ("DEFAULT", "default") else f"{name}.{tag}"
    if "." in full and full not in timm.list_pretrained(f"{name.partition('.')[0]}.*"):
        tags = [each.partition(".")[2] for each in timm.list_pretrained(f"{name.partition('.')[0]}.*")]
        raise UsageError(f"timm has no weights {tag} for {name}", hint=f"choose from {', '.join(['DEFAULT', *tags])}")
    with _fetching(f"timm:{name}@{tag}"):
        return _module(timm.create_model(full, pretrained=True), name)


def _transformers(directory: str) -> nn.Module:
    path = Path(directory)
    if not (path / "config.json").is_file():
        raise LoadError(
            f"{directory} is not a directory that transformers saved: it has no config.json",
            hint="hf: takes a local directory, as model.save_pretrained(DIRECTORY) writes it; nothing is fetched from the hub",
        )
    try:
        asks = saved_transformers.problem(path)
    except (OSError, ValueError) as error:
        raise LoadError(f"{directory} cannot be read: {first_line(error)}", hint="copy it, or save it again") from error
    asks = asks or next(
        (f"is not read: in {file.name}, {why}" for file in sorted(path.glob("*.bin")) if (why := archives.problem(file))), None
    )
    if asks is not None:
        raise LoadError(f"{directory} {asks}", hint="save the model alone: model.save_pretrained(DIRECTORY)")
    transformers = _import("transformers", "hf:")
    bars = transformers.utils.logging.is_progress_bar_enabled()
    try:
        with _quiet():
            transformers.utils.logging.disable_progress_bar()
            config = transformers.AutoConfig.from_pretrained(path, local_files_only=True, trust_remote_code=False)
            # The class that was saved, not the bare AutoModel: that one would silently lose the head
            name = (config.architectures or ["AutoModel"])[0]
            cls: Any = getattr(transformers, name, None)
            is_model = isinstance(cls, type) and (issubclass(cls, transformers.PreTrainedModel) or cls is transformers.AutoModel)
            if not is_model:
                raise LoadError(f"{directory} holds a {name}, which the installed transformers {transformers.__version__} does not have")
            model, report = cls.from_pretrained(path, local_files_only=True, output_loading_info=True, trust_remote_code=False)
    except LoadError:
        raise
    except Exception as error:
        raise LoadError(f"transformers cannot load {directory}: {first_line(error)}") from error
    finally:
        if bars:
            transformers.utils.logging.enable_progress_bar()
    if missing := sorted(report["missing_keys"]):
        raise LoadError(f"{directory} lacks weights of {name}: {_few(missing)}", hint="they would be random numbers")
    return _module(model, directory)


def _factory(spec: str) -> nn.Module:
    match = SPEC.fullmatch(spec)
    assert match
    make_working_directory_importable()
    try:
        found: Any = importlib.import_module(match["module"])
    except ModuleNotFoundError as error:
        if error.name and match["module"].startswith(error.name):
            hint = f"it is looked for among the installed packages and in {os.getcwd()}"
            raise LoadError(f"{spec}: there is no module {error.name}", hint=hint) from error
        raise LoadError(f"{spec}: importing {match['module']} needs the module {error.name}, which is not installed") from error
    except Exception as error:
        raise LoadError(f"{spec}: importing {match['module']} raised {described(error)}") from error
    for attribute in match["attribute"].split("."):
        if not hasattr(found, attribute):
            raise LoadError(
                f"{spec}: {match['module']} has no {match['attribute']}", hint="after the colon stands a function or class of that module"
            )
        found = getattr(found, attribute)
    if not callable(found) or isinstance(found, nn.Module):
        raise LoadError(
            f"{spec} is {_a(found)}, not something to call", hint="name a function or class that takes no arguments and returns the model"
        )
    try:
        with contextlib.redirect_stdout(sys.stderr):  # stdout is for results
            model = found()
    except Exception as error:
        raise LoadError(f"{spec}() raised {described(error)}") from error
    return _module(model, f"{spec}()")


def _module(made: Any, name: str) -> nn.Module:
    if not isinstance(made, nn.Module):
        raise LoadError(f"{name} returned {_a(made)}, not an nn.Module")
    return made


def _import(module: str, prefix: str) -> Any:
    package = module.partition(".")[0]
    try:
        with _quiet():
            return importlib.import_module(module)
    except ImportError as error:
        raise LoadError(
            f"{prefix} needs the package {package}, which cannot be imported: {first_line(error)}", hint=f"pip install {package}"
        ) from error
    except RuntimeError as error:
        raise pickles.mismatched_torchvision(error) or error from error


@contextlib.contextmanager
def _fetching(what: str) -> Iterator[None]:
    """Building may mean downloading: a missing network is no bug of ours."""
    try:
        with _quiet():
            yield
    except OSError as error:  # urllib, requests and huggingface_hub all derive theirs from it
        raise LoadError(
            f"the weights of {what} cannot be fetched: {first_line(error)}",
            hint="is there a network? without the @ the weights are random",
        ) from error
    except RuntimeError as error:
        if "hash" in str(error):
            raise LoadError(f"the weights of {what} arrived damaged: {first_line(error)}", hint="try again") from error
        raise


def _unknown(package: str, name: str, names: Sequence[str]) -> LoadError:
    import difflib

    close = difflib.get_close_matches(name, names, 3)
    return LoadError(
        f"{package} has no model {name!r}",
        hint=f"did you mean {' or '.join(close)}?" if close else f"python -c 'import {package}' and list_models() lists them",
    )


def _is_spec(text: str) -> bool:
    return text.startswith(("torchvision:", "timm:", "hf:")) or SPEC.fullmatch(text) is not None


def _stem_of_spec(spec: str) -> str:
    kind, _, rest = spec.partition(":")
    if kind == "hf":
        return Path(rest).resolve().name
    name = rest.partition("@")[0]
    return name if kind in ("torchvision", "timm") else name.rpartition(".")[2]


# --- files ----------------------------------------------------------------------------------------------------------------------------


def _existing_file(source: str) -> Path:
    path = Path(source)
    if path.is_dir():
        if (path / "recipe.json").is_file():
            raise UsageError(
                f"{source} was converted already", hint="give the model that it was made from; normswap revert undoes a conversion"
            )
        hint = f"hf:{source} loads it" if (path / "config.json").is_file() else "give a file in it"
        raise UsageError(f"{source} is a directory", hint=hint)
    if not path.is_file():
        raise UsageError(f"there is no file {source}", hint=f"a source is a .pt, .pth, .pt2 or .safetensors file, or {SPECS}")
    return path


def _read(path: Path, trust_packages: Sequence[str], trust: bool) -> Any:
    """An ExportedProgram, an nn.Module, or a state dict."""
    if path.suffix == ".onnx":
        raise LoadError(f"{path.name} is an ONNX file; a PyTorch model is needed", hint="give the PyTorch model that it was exported from")
    try:
        file = path.open("rb")
    except OSError as error:
        raise LoadError(f"{path} cannot be opened: {error.strerror}") from error
    with file:
        start = file.read(1024)
        if not start:
            raise LoadError(f"{path.name} is empty", hint="copy or save it again")
        if start.startswith(b"version https://git-lfs"):
            raise LoadError(f"{path.name} is a git-lfs pointer, not the file itself", hint="git lfs pull fetches it")
        if start[257:262] == b"ustar":
            raise LoadError(
                f"{path.name} is a tar file, the format of torch before 0.2, which cannot be read safely",
                hint="load it with an old torch, save again",
            )
        if path.suffix == ".safetensors" or (start[8:9] == b"{" and int.from_bytes(start[:8], "little") < 100 << 20):
            return _safetensors(path)
        if start[:4] == b"PK\x03\x04":
            names = _zip_names(file)
            if "serialized_exported_program.json" in names:  # the form before torch 2.8
                return _program(file, path.name, trust)
            if any(name.endswith("/constants.pkl") or "/code/" in name for name in names):  # compressed in parts, unlike other models
                raise LoadError(
                    f"{path.name} is TorchScript: a compiled program, in which layers can no longer be replaced",
                    hint="load what it was compiled from: the nn.Module, its state dict with --arch, "
                    "or a .pt2 from torch.export.save (with --trust)",
                )
            records = set(pickles.open_archive(file, path.name).get_all_records())
            if "archive_format" in records or "models/model.json" in records:
                return _program(file, path.name, trust)
        if trust_packages or trust:
            make_working_directory_importable()
        found = _trusted(file, path.name) if trust else pickles.read(file, path.name, trust_packages=trust_packages)
    if not isinstance(found, nn.Module):
        found = _state_dict(found, path.name)
    if isinstance(found, nn.Module) and (problem := wellformed.problem_of_file(found)) is not None:
        raise LoadError(f"{path.name} {problem[0]}", hint=problem[1] or "save the model again with torch.save(model, path)")
    if isinstance(found, nn.Module) and (name := _not_ours(found)) is not None:
        raise LoadError(f"{path.name} has a BatchlessNorm {name} as normswap makes none", hint="convert the original model again")
    return found


def _not_ours(model: nn.Module) -> str | None:
    """The name of a BatchlessNorm that is not as the constructor leaves it."""
    needed = {"num_features", "channel_axis", "shared_axes", "affine", "source", "mean", "weight", "bias"}
    words: dict[str, tuple[str, ...]] = {"std": STD_FORMS, "reduction": REDUCTIONS, "aux": AUXES, "stats": STATS}
    for name, layer in model.named_modules():
        if not isinstance(layer, BatchlessNorm):
            continue
        state = {**vars(layer), **layer._parameters, **layer._buffers}
        known = all(isinstance(word := getattr(layer, key, None), str) and word in known for key, known in words.items())
        numbers = type(layer.calls) is int and isinstance(layer.momentum, int | float)
        axes = (*_tuple(layer, "channel_axis"), *_tuple(layer, "shared_axes"))
        numbers = numbers and all(type(axis) is int for axis in axes)
        whole = known and needed | {PARAMETER_OF_FORM[layer.std]} <= state.keys()
        if not (whole and numbers and isinstance(state["affine"], bool) and isinstance(state["source"], Source | None)):
            return str(name)
    return None


def _tuple(layer: nn.Module, name: str) -> tuple[Any, ...]:
    value = getattr(layer, name, None)
    return value if isinstance(value, tuple) else (None,)


def _zip_names(file: IO[bytes]) -> list[str]:
    try:
        return zipfile.ZipFile(file).namelist()
    except Exception:  # of a damaged archive; whoever reads it next says so
        return []


class _Unpickler(pickle.Unpickler):
    """Of a file that is trusted: all of it but what wraps the model, of which some cannot be restored outside a training run."""

    def find_class(self, module: str, name: str, /) -> Any:
        return pickles.stand_in(f"{module}.{name}") or super().find_class(module, name)


class _Pickle:
    """What torch.load asks of a `pickle_module`."""

    Unpickler = _Unpickler

    @staticmethod
    def load(file: IO[bytes], **options: Any) -> Any:
        return _Unpickler(file, **options).load()


def _trusted(file: IO[bytes], name: str) -> Any:
    """Whatever the pickle says: the user vouches for it."""
    file.seek(0)
    try:
        with contextlib.redirect_stdout(sys.stderr), warnings.catch_warnings():
            warnings.simplefilter("ignore")
            return pickles.unwrapped(torch.load(file, map_location="cpu", weights_only=False, pickle_module=_Pickle), name)
    except LoadError:
        raise
    except Exception as error:
        hint = None
        if isinstance(error, AttributeError | ImportError):
            hint = "the class must be importable here: run in the directory of its code, or use a state dict with --arch"
        raise LoadError(f"{name} cannot be loaded: {described(error)}", hint=hint) from error


def _safetensors(path: Path) -> dict[str, torch.Tensor]:
    import safetensors
    import safetensors.torch

    try:
        return dict(safetensors.torch.load_file(path))
    except (safetensors.SafetensorError, OSError, ValueError) as error:
        raise LoadError(f"{path.name} cannot be read as safetensors: {first_line(error)}", hint="copy or save it again") from error


# --- programs of torch.export -----------------------------------------------------------------------------------------------------------


def _program(file: IO[bytes], name: str, trust: bool) -> torch.export.ExportedProgram:
    """To read one is to run it: torch evaluates its symbolic sizes and guards as Python, pastes its names into the source of a forward, and
    imports the classes that its signature names. No check from outside can follow all of that, so only the user's word counts."""
    if not trust:
        raise LoadError(
            f"{name} is a torch.export program (.pt2), and torch runs text from such a file to read it",
            hint="--trust (trust=True in Python) reads it, if you trust whoever made it with everything on this account; "
            "or give the nn.Module that it was exported from",
        )
    file.seek(0)
    try:
        with _quiet():
            return torch.export.load(file)
    except Exception as error:
        raise LoadError(
            f"{name} cannot be loaded as a torch.export program: {first_line(error)}", hint="save it again with this version of torch"
        ) from error


# --- state dicts ------------------------------------------------------------------------------------------------------------------------


def _state_dict(found: Any, name: str) -> nn.Module | dict[str, torch.Tensor]:
    """The state dict in what a training script saved: bare, or beside other things under any name."""
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
                f"{name} holds {len(dicts)} models: {_few([str(key) for key in dicts])}",
                hint="save the one that is meant to a file of its own",
            )
    raise LoadError(f"{name} holds {_a(found)}, neither a model nor a state dict", hint="save the model with torch.save(model, path)")


def _is_state_dict(found: Any) -> bool:
    """Names to tensors. Values under `_extra_state` may be anything that was allowed in the file."""
    if not isinstance(found, Mapping) or not found:
        return False
    tensors = [isinstance(value, torch.Tensor) for key, value in found.items() if not str(key).endswith("_extra_state")]
    return bool(tensors) and all(tensors) and all(isinstance(key, str) for key in found)


def _without_prefix(weights: Mapping[str, Any], prefix: str) -> dict[str, Any]:
    """A copy, with what torch keeps beside a state dict: the version of each module, by which it knows the keys of its past."""
    state = OrderedDict((key.removeprefix(prefix), value) for key, value in weights.items())
    told = getattr(weights, "_metadata", None)
    if isinstance(told, Mapping) and all(isinstance(key, str) and isinstance(value, Mapping) for key, value in told.items()):
        kept = {key: value for key, value in told.items() if f"{key}.".startswith(prefix)}
        state._metadata = {f"{key}.".removeprefix(prefix).removesuffix("."): value for key, value in kept.items()}  # type: ignore[attr-defined]
    return state


def _fill(model: nn.Module, weights: Mapping[str, Any], name: str, arch: str) -> nn.Module:
    """Strictly, as the model itself takes a state dict: what its modules do about keys of older versions, or names of their own, holds."""
    if on_meta(model):
        raise LoadError(
            f"{arch} builds a model on the meta device, which has no memory that the weights of {name} could go to",
            hint="build it on the CPU, without torch.device('meta') around it",
        )
    own = model.state_dict().keys()
    for prefix in ("module.", "_orig_mod.", "model."):  # DistributedDataParallel, torch.compile, Lightning
        if all(key.startswith(prefix) for key in weights) and not any(key.startswith(prefix) for key in own):
            weights = _without_prefix(weights, prefix)
    dtypes = {value.dtype for value in weights.values() if isinstance(value, torch.Tensor) and value.is_floating_point()}
    if len(dtypes) == 1:
        model.to(dtypes.pop())  # half stays half, double stays double: copying into float32 would round
    try:
        with _quiet():
            found = model.load_state_dict(weights, strict=True)
    except Exception as error:  # the model's own code may raise anything
        problems = _misfits(error)
    else:  # a model that takes state dicts its own way may not be strict
        told = (getattr(found, "missing_keys", ()), getattr(found, "unexpected_keys", ()))
        problems = [f"{what}: {_few(keys)}" for what, keys in zip(("missing", "unexpected"), told, strict=True) if keys]
    if problems:
        raise LoadError(
            f"{name} does not hold the weights of {arch}\n  " + "\n  ".join(problems),
            hint="is --arch the right architecture, with the right number of classes?",
        )
    return model


_KEYS = re.compile(r'(Missing|Unexpected) key\(s\) in state_dict: "(.*)"\.', re.DOTALL)
_SIZE = re.compile(
    r"size mismatch for (.*): copying a param with shape torch\.Size\(\[(.*)\]\) from checkpoint, .* torch\.Size\(\[(.*)\]\)\."
)


def _misfits(error: Exception) -> list[str]:
    """What `load_state_dict` complains of, one kind a line."""
    _, *complaints = [line.strip() for line in str(error).split("\n\t")]
    if not isinstance(error, RuntimeError) or not complaints:
        return [f"its load_state_dict raised {described(error)}"]
    keys, shapes, others = dict[str, str](), list[str](), list[str]()
    for complaint in complaints:
        if match := _KEYS.fullmatch(complaint):
            keys[match[1].lower()] = _few(match[2].split('", "'))
        elif match := _SIZE.fullmatch(complaint):
            sizes = [f"({size}{',' if size.isdigit() else ''})" for size in (match[3], match[2])]
            shapes.append(f"{match[1]} {sizes[0]} against {sizes[1]}")
        else:
            others.append(complaint.splitlines()[0][:300])
    problems = [f"{what}: {keys[what]}" for what in ("missing", "unexpected") if what in keys]
    problems += [f"of another shape (model against file): {_few(shapes)}"] * bool(shapes)
    return problems + others[:3]


# --- small things -----------------------------------------------------------------------------------------------------------------------


def _check_package(package: str) -> None:
    if not re.fullmatch(r"[^\W\d]\w*(\.[^\W\d]\w*)*", package) or package.partition(".")[0] in sys.stdlib_module_names:
        raise UsageError(
            f"--trust-package takes the name of a package with models in it, not {package!r}", hint="for example --trust-package my_models"
        )


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    """Loading prints nothing: no progress bars, no advice of other libraries."""
    before = logging.root.manager.disable
    logging.disable(logging.CRITICAL)
    try:
        with warnings.catch_warnings(), contextlib.redirect_stdout(sys.stderr):
            warnings.simplefilter("ignore")
            yield
    finally:
        logging.disable(before)


def _few(items: Sequence[str], limit: int = 5) -> str:
    return ", ".join(shown(item, line=True) for item in items[:limit]) + (
        f" ... and {len(items) - limit} more" if len(items) > limit else ""
    )


def _a(thing: Any) -> str:
    name = thing.__name__ if isinstance(thing, type) else type(thing).__name__
    return f"a{'n' if name[:1].lower() in 'aeiou' else ''} {name}" if thing is not None else "None"
