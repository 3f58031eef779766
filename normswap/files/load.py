"""Loads a model from a file, or builds it from a spec. The only reader of model files.

    load(source)   a .pt, .pth, .pt2 or .safetensors file, or a spec, which `build` builds

The format of a file is recognised by its bytes, not by its name. Nothing is downloaded unless the spec has an `@`, and no code in a file
runs: see `pickles` for files of torch.save. A file of torch.export (.pt2) is a program, and is read only if the user trusts it.
"""

from __future__ import annotations

import re
import sys
import zipfile
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any, Literal

import safetensors
import safetensors.torch
import torch
from torch import nn

from normswap.errors import LoadError, UsageError, few, first_line
from normswap.files.build import SPECS, build, is_spec, near, stem_of
from normswap.files.json_file import read_json
from normswap.files.pickles.read import open_archive, read, read_trusted
from normswap.files.state_dict import fill, model_or_state_dict
from normswap.layer.batchless_norm import AUXES, PARAMETER_OF_FORM, BatchlessNorm, Source
from normswap.layer.formulas import REDUCTIONS, STATS, STD_FORMS
from normswap.models import wellformed
from normswap.models.quiet import quiet
from normswap.models.spec import make_working_directory_importable

INDEX = ".index.json"  # the end of the name of a file that lists where weights lie that were saved in parts


@dataclass(frozen=True)
class Loaded:
    """A model and where it came from."""

    model: nn.Module | torch.export.ExportedProgram
    source: str
    stem: str  # the stem of the names of output files
    form: Literal["module", "state_dict", "exported_program", "factory"]
    factory: str | None  # the spec that builds the architecture again, if there is one


def load(
    source: str, *, arch: str | None = None, trust_packages: Sequence[str] = (), trust: bool = False, trust_pickle: bool = False
) -> Loaded:
    """The model that `source` names.

    `arch` is the spec that builds the architecture, for a file that holds only a state dict. `trust_packages` are packages whose
    nn.Module classes a pickle may use. `trust` lets a file run any code, which a .pt2 needs; `trust_pickle` is its old name.
    """
    for package in trust_packages:
        _check_package(package)
    if is_spec(source) and not Path(source).exists():
        if arch is not None:
            raise UsageError(f"--arch is for files that hold a state dict; {source} builds its own architecture", hint="leave --arch out")
        return Loaded(build(source), source, stem_of(source), "factory", source)

    path = _existing_file(source)
    found = _read(path, trust_packages, trust or trust_pickle)
    whole = isinstance(found, nn.Module | torch.export.ExportedProgram)
    if whole and arch is not None:
        raise UsageError(f"--arch is for files that hold a state dict; {path.name} holds the whole model", hint="leave --arch out")
    if whole:
        return Loaded(found, source, path.stem, "module" if isinstance(found, nn.Module) else "exported_program", None)
    if arch is None:
        raise UsageError(
            f"{path.name} holds the weights of a model ({len(found)} tensors), not the model",
            hint=f"say what they are the weights of, with --arch {SPECS}",
        )
    return Loaded(fill(build(arch), found, path.name, arch), source, path.stem, "state_dict", arch)


def _check_package(package: str) -> None:
    if not re.fullmatch(r"[^\W\d]\w*(\.[^\W\d]\w*)*", package) or package.partition(".")[0] in sys.stdlib_module_names:
        raise UsageError(
            f"--trust-package takes the name of a package with models in it, not {package!r}", hint="for example --trust-package my_models"
        )


def _existing_file(source: str) -> Path:
    path = Path(source)
    if path.is_dir():
        if (path / "recipe.json").is_file():
            raise UsageError(
                f"{source} was converted already", hint="give the model that it was made from; normswap revert undoes a conversion"
            )
        index = next(iter(sorted(path.glob(f"*{INDEX}"))), None)
        hint = f"hf:{source} loads it" if (path / "config.json").is_file() else f"give {index or 'a file in it'}"
        raise UsageError(f"{source} is a directory", hint=hint)
    if not path.is_file():
        models = near(source) if re.fullmatch(r"\w+", source) else []
        asked = f"did you mean {' or '.join(models)}?"
        raise UsageError(
            f"there is no file {source}", hint=asked if models else f"a source is a .pt, .pth, .pt2 or .safetensors file, or {SPECS}"
        )
    return path


def _read(path: Path, trust_packages: Sequence[str], trust: bool) -> Any:
    """An ExportedProgram, an nn.Module, or a state dict."""
    if path.suffix == ".onnx":
        raise LoadError(f"{path.name} is an ONNX file; a PyTorch model is needed", hint="give the PyTorch model that it was exported from")
    if path.name.endswith(INDEX):
        return _read_parts(path, trust_packages, trust)
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
            return _read_safetensors(path)
        if start[:4] == b"PK\x03\x04" and _is_program(file, path.name):
            return _read_program(file, path.name, trust)
        if trust_packages or trust:
            make_working_directory_importable()
        found = read_trusted(file, path.name) if trust else read(file, path.name, trust_packages=trust_packages)
    if not isinstance(found, nn.Module):
        found = model_or_state_dict(found, path.name)
    if isinstance(found, nn.Module):
        if (problem := wellformed.problem_of_file(found)) is not None:
            raise LoadError(f"{path.name} {problem[0]}", hint=problem[1] or "save the model again with torch.save(model, path)")
        if (name := _malformed_batchless_norm(found)) is not None:
            raise LoadError(f"{path.name} has a BatchlessNorm {name} as normswap makes none", hint="convert the original model again")
    return found


def _read_parts(path: Path, trust_packages: Sequence[str], trust: bool) -> dict[str, Any]:
    """The weights in all files beside an index (model.safetensors.index.json), which lists the file of each weight."""
    hint = "copy the directory again; an index has a weight_map: the name of a file beside it for each weight"
    try:
        index = read_json(path)
        files = dict(index["weight_map"])  # type: ignore[index]
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise LoadError(f"{path.name} cannot be read as an index of weights: {first_line(error)}", hint=hint) from error
    names = sorted({name for name in files.values() if isinstance(name, str) and name == Path(name).name and not name.endswith(INDEX)})
    if not names or {*names} != {*files.values()}:
        raise LoadError(f"{path.name} names files that do not lie beside it", hint=hint)
    weights: dict[str, Any] = {}
    for name in names:
        part = path.parent / name
        if not part.is_file():
            raise LoadError(f"{path.name} names {name}, which is not there", hint=hint)
        found = _read(part, trust_packages, trust)
        if not isinstance(found, dict):
            raise LoadError(f"{name} holds a whole model, and not the part that {path.name} says", hint=hint)
        weights |= found
    if weights.keys() != files.keys():
        raise LoadError(f"the files of {path.name} hold other weights: {few(sorted(weights.keys() ^ files.keys()))}", hint=hint)
    return weights


def _read_safetensors(path: Path) -> dict[str, torch.Tensor]:
    try:
        return dict(safetensors.torch.load_file(path))
    except (safetensors.SafetensorError, OSError, ValueError) as error:
        raise LoadError(f"{path.name} cannot be read as safetensors: {first_line(error)}", hint="copy or save it again") from error


# --- programs of torch.export -----------------------------------------------------------------------------------------------------------


def _is_program(file: IO[bytes], name: str) -> bool:
    """Whether a zip archive is a file of torch.export; LoadError if it is one of TorchScript, or damaged."""
    names = _zip_names(file)
    if "serialized_exported_program.json" in names:  # the form before torch 2.8
        return True
    if any(part.endswith("/constants.pkl") or "/code/" in part for part in names):  # compressed in parts, unlike other models
        raise LoadError(
            f"{name} is TorchScript: a compiled program, in which layers can no longer be replaced",
            hint="load what it was compiled from: the nn.Module, its state dict with --arch, "
            "or a .pt2 from torch.export.save (with --trust)",
        )
    records = set(open_archive(file, name).get_all_records())
    return "archive_format" in records or "models/model.json" in records


def _zip_names(file: IO[bytes]) -> list[str]:
    try:
        return zipfile.ZipFile(file).namelist()
    except Exception:  # a damaged archive, for which the next reader has a message
        return []


def _read_program(file: IO[bytes], name: str, trust: bool) -> torch.export.ExportedProgram:
    """Load a torch.export program, which runs code from the file: torch evaluates its symbolic sizes and guards as Python, puts its names
    into the source of a forward, and imports the classes in its signature. No check can cover all of that, so the user has to trust it."""
    if not trust:
        raise LoadError(
            f"{name} is a torch.export program (.pt2), and torch runs text from such a file to read it",
            hint="--trust (trust=True in Python) reads it, if you trust whoever made it with everything on this account; "
            "or give the nn.Module that it was exported from",
        )
    file.seek(0)
    try:
        with quiet(show_warnings=False, print_to=sys.stderr):
            return torch.export.load(file)
    except Exception as error:
        raise LoadError(
            f"{name} cannot be loaded as a torch.export program: {first_line(error)}", hint="save it again with this version of torch"
        ) from error


# --- layers of ours ---------------------------------------------------------------------------------------------------------------------


def _malformed_batchless_norm(model: nn.Module) -> str | None:
    """The name of a BatchlessNorm whose attributes the constructor cannot have made; None if there is none."""
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
