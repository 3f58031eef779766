"""Example inputs: given, read from the command line or a file, or inferred from the model's own layers.

as_inputs(x)     a tensor, a tuple, or a dict of keyword arguments
infer(model)     inputs of the first shape that the model accepts, or None
parse(specs)     --input 1x3x224x224[:dtype], or a .pt or .npz file
as_batches(...)  interprets a list in such a file for a model: as batches, or as the arguments of one
"""

from __future__ import annotations

import dataclasses
import inspect
import math
import re
import warnings
import zipfile
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.utils.data import default_collate

from normswap.errors import SwapError, UsageError, described
from normswap.models.copying import copy_for_running
from normswap.models.torch_private import AnyBatchNorm
from normswap.models.watching import forward

SEED = 0
HIGH = 10  # upper bound (exclusive) of integer inputs, where none is known
_SPEC = re.compile(r"(?P<shape>[1-9]\d*(x[1-9]\d*)*)(:(torch\.)?(?P<dtype>\w+))?")
_EXPECTED = "expected a shape such as 1x3x224x224, with a dtype if it is not float32: 1x128:int64, or a .pt or .npz file"
_DTYPES = {
    name: getattr(torch, name)
    for name in ["float16", "bfloat16", "float32", "float64", "int8", "uint8", "int16", "int32", "int64", "bool", "complex64"]
}
_DTYPES |= {"half": torch.float16, "float": torch.float32, "double": torch.float64, "int": torch.int32, "long": torch.int64}

# Sizes of images and clips that models are trained on, the likeliest first. 8 and 28 are the digits of scikit-learn and of MNIST.
_IMAGE_SIZES = (224, 64, 32, 28, 8, 96, 128, 256, 299, 384, 448, 512, 16)
_CLIPS = ((16, 112), (16, 224), (8, 64), (14, 224), (32, 224), (8, 16))  # frames, height and width
_LENGTHS = (256, 64, 32, 16, 128, 512, 1024, 4096, 16000)
_TOKENS = 16


@dataclass(frozen=True)
class Inputs:
    """What a model is called with: model(*args, **kwargs)."""

    args: tuple[Any, ...] = ()
    kwargs: Mapping[str, Any] = field(default_factory=dict)
    origin: str = "given"  # or 'inferred'; 'declared', by an ONNX file; 'program': the example inputs that an ExportedProgram carries
    listed: tuple[Any, ...] = ()  # the elements of a list in a file, the first of which gave args or kwargs; see `as_batches`


def as_inputs(example_inputs: Any) -> Inputs:
    """A tensor is the one argument, a tuple is the arguments, a dict is the keyword arguments."""
    if isinstance(example_inputs, Inputs):
        return example_inputs
    if isinstance(example_inputs, Tensor):
        return Inputs((example_inputs,))
    if isinstance(example_inputs, tuple):
        return Inputs(example_inputs)
    if isinstance(example_inputs, Mapping) and all(isinstance(name, str) for name in example_inputs):
        return Inputs(kwargs=dict(example_inputs))
    raise UsageError(
        f"example inputs are a tensor, a tuple or a dict of keyword arguments, not a {type(example_inputs).__name__}",
        hint="torch.from_numpy makes a tensor of it"
        if isinstance(example_inputs, np.ndarray)
        else "a model that takes one list is called with ([a, b],)",
    )


# --- inferred -------------------------------------------------------------------------------------------------------------------------


def infer(model: nn.Module) -> Inputs | None:
    """Inputs of the first guessed shape that a forward pass accepts; None if none is. Model, statistics and random state do not change.

    A model that takes `input_ids` and an `attention_mask`, as tokenizers of transformers give them, gets both, by name.
    """
    trial = _trial(model)
    if trial is None:
        return None
    for guess in _guesses(model):
        for inputs in (*_with_mask(model, guess), Inputs((guess,), origin="inferred")):
            if _accepts(trial, inputs):
                return inputs
    return None


_IDS, _MASK = "input_ids", "attention_mask"


def _with_mask(model: nn.Module, guess: Tensor) -> list[Inputs]:
    if guess.dtype is torch.int64 and guess.dim() == 2 and {_IDS, _MASK} <= set(tensors_taken(model)):
        mask = torch.ones_like(guess)
        mask[:, mask.shape[1] - mask.shape[1] // 4 :] = 0  # as after a shorter text, so that a file that ignores the mask is found out
        return [Inputs(kwargs={_IDS: guess, _MASK: mask}, origin="inferred")]
    return []


def tensors_taken(model: nn.Module) -> list[str]:
    """The names of the arguments of a model that may be tensors: those that are said to be, and those of which nothing is said."""
    try:
        parameters = inspect.signature(model.forward).parameters.values()
    except (TypeError, ValueError):  # a forward in C
        return []
    named = [p for p in parameters if p.kind in (p.POSITIONAL_OR_KEYWORD, p.KEYWORD_ONLY)]
    return [p.name for p in named if p.annotation is p.empty or "Tensor" in str(p.annotation)]


def notes_on(inputs: Inputs, model: nn.Module, *, fixed: bool) -> list[str]:
    """What a file with inferred tokens does not take, though the model does. fixed: whether the number of tokens is."""
    given = [*inputs.args, *inputs.kwargs.values()]
    if inputs.origin != "inferred" or given[0].dtype is not torch.int64:
        return []
    taken = tensors_taken(model)
    present = [*taken[: len(inputs.args)], *inputs.kwargs]
    missing = [name for name in taken if name not in present]
    more = f" and {len(missing) - 3} more" if len(missing) > 3 else ""
    notes = []
    if fixed:
        notes.append(
            f"texts have {given[0].shape[1]} tokens in this file, as its inputs were inferred: --dynamic spatial frees their number"
        )
    if missing:
        lacks = f"the file takes {' and '.join(present)}, not {', '.join(missing[:3])}{more}, as its inputs were inferred"
        notes.append(f"{lacks}: give all that you call the model with, --input FILE.npz with the names, to have them")
    return notes


def _trial(model: nn.Module) -> nn.Module | None:
    """A copy to run guesses on, without hooks; it shares the parameters. None if the model cannot be copied."""
    try:
        trial = copy_for_running(model)
    except SwapError:  # it holds a lock or a handle
        return None
    for module in trial.modules():  # a copied hook may be the same function as the user's, with the same side effects
        module._forward_hooks.clear()
        module._forward_pre_hooks.clear()
    return trial


def _accepts(trial: nn.Module, inputs: Inputs) -> bool:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        try:
            forward(trial, inputs.args, inputs.kwargs)
        except Exception:  # whatever the model raises, it does not accept the guess
            return False
    return True


def _guesses(model: nn.Module) -> Iterator[Tensor]:
    first = next((module for module in model.modules() if _shapes(module) is not None), None)
    if first is None:
        return
    weight = next(first.parameters())
    for shape in _fitting(model, first, list(_shapes(first) or ())):
        if isinstance(first, nn.Embedding | nn.EmbeddingBag):
            yield make(shape, torch.int64, high=first.num_embeddings).to(weight.device)
        else:
            yield make(shape, weight.dtype).to(weight.device)


def _shapes(module: nn.Module) -> Sequence[tuple[int, ...]] | None:
    """Input shapes, with batch size 1, of a model whose first layer is `module`; None if the layer does not determine any."""
    match module:
        case nn.Conv2d() | nn.ConvTranspose2d():
            return [(1, module.in_channels, size, size) for size in _IMAGE_SIZES]
        case nn.Conv1d() | nn.ConvTranspose1d():
            return [(1, module.in_channels, length) for length in _LENGTHS]
        case nn.Conv3d() | nn.ConvTranspose3d():
            return [(1, module.in_channels, frames, size, size) for frames, size in _CLIPS]
        case nn.Linear():
            return [(1, module.in_features), (1, _TOKENS, module.in_features)]
        case nn.RNNBase():
            return [(1, _TOKENS, module.input_size)]
        case nn.Embedding() | nn.EmbeddingBag():
            return [(1, min(_TOKENS, module.num_embeddings))]
        case AnyBatchNorm() if module.affine:
            return [(1, module.num_features, *rest) for rest in ((), (16,), (32, 32), (8, 16, 16))]
    return None


def _fitting(model: nn.Module, first: nn.Module, shapes: list[tuple[int, ...]]) -> Iterator[tuple[int, ...]]:
    """The given shapes; then, if a model of images also has linear layers, every size from 4 to 64 that is not in _IMAGE_SIZES."""
    yield from shapes
    if isinstance(first, nn.Conv2d) and any(isinstance(module, nn.Linear) for module in model.modules()):
        yield from ((1, first.in_channels, size, size) for size in range(4, 65) if size not in _IMAGE_SIZES)


def make(shape: Sequence[int], dtype: torch.dtype, *, high: int = HIGH, seed: int = SEED) -> Tensor:
    """A random tensor, the same for each seed: standard normal floats, non-negative integers below `high`, or booleans."""
    generator = torch.Generator().manual_seed(seed)
    if dtype is torch.bool:
        return torch.randint(0, 2, tuple(shape), generator=generator).bool()
    if not (dtype.is_floating_point or dtype.is_complex):
        return torch.randint(0, high, tuple(shape), generator=generator).to(dtype)
    drawn = torch.complex128 if dtype.is_complex else torch.float64
    return torch.randn(tuple(shape), generator=generator, dtype=drawn).to(dtype)  # every dtype gets the same numbers, rounded


# --- from the command line ------------------------------------------------------------------------------------------------------------


def parse(specs: Sequence[str], option: str = "--input") -> Inputs:
    """The inputs of a command: each spec is one positional argument, or one file holds all of them. option: its name in messages."""
    files = [spec for spec in specs if Path(spec).suffix in (".pt", ".pth", ".npz", ".npy")]
    if files and len(specs) > 1:
        raise UsageError(
            f"--input {files[0]} is a file, which holds all inputs, but there are {len(specs)} --input", hint="give one file or only shapes"
        )
    if files:
        return _from_file(Path(files[0]), option)
    return Inputs(tuple(_from_spec(spec, SEED + index) for index, spec in enumerate(specs)))


def _from_spec(spec: str, seed: int) -> Tensor:
    match = _SPEC.fullmatch(spec)
    if match is None:
        raise UsageError(f"--input {spec} is not a shape", hint=_EXPECTED)
    name = match["dtype"] or "float32"
    if name not in _DTYPES:
        raise UsageError(f"--input {spec}: there is no dtype {name}", hint=f"choose from {', '.join(_DTYPES)}")
    shape = [int(size) for size in match["shape"].split("x")]
    if math.prod(shape) > 2**31:
        raise UsageError(f"--input {spec} has {math.prod(shape)} elements", hint="an example may be small: one image, one sentence")
    return make(shape, _DTYPES[name], seed=seed)


def _from_file(path: Path, option: str) -> Inputs:
    if not path.is_file():
        raise UsageError(f"{option} {path}: there is no such file", hint=_EXPECTED)
    if (problem := archive_problem(path)) is not None:
        raise UsageError(f"{option} {path} is not read: {problem}", hint="save it without compression: numpy.savez or torch.save")
    try:
        numpy = path.suffix in (".npz", ".npy")
        found = _from_numpy(path) if numpy else torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:  # of a dozen types, for a damaged file
        raise UsageError(
            f"{option} {path} cannot be read: {described(error)}",
            hint="torch.save tensors, a tuple or dict of them, or a list of batches; or numpy.savez arrays",
        ) from error
    if isinstance(found, list) and not found:
        hint = "a list holds batches: tensors, tuples of arguments or dicts of keyword arguments"
        raise UsageError(f"{option} {path} holds an empty list", hint=hint)
    if isinstance(found, list):
        first = tuple(found) if isinstance(found[0], Tensor) else tuple(found[0]) if isinstance(found[0], list) else found[0]
        return dataclasses.replace(as_inputs(first), listed=tuple(found))
    return as_inputs(found)


UNPACKED = 1 << 30  # bytes to which any archive may unpack
RATIO = 64  # a larger archive may unpack to this many times its size: compressed numbers reach 10, zeros 1,000


def archive_problem(path: Path) -> str | None:
    """A clause about a zip archive that would unpack to far more than its own size; None for any other file.

    Called before an archive is unpacked, as a small file can hold any amount of zeros.
    """
    try:
        with zipfile.ZipFile(path) as archive:
            unpacked = sum(entry.file_size for entry in archive.infolist())
    except (OSError, ValueError, EOFError, zipfile.BadZipFile, NotImplementedError, UnicodeError):
        return None  # not an archive, or a damaged one, for which the reader has a message
    size = path.stat().st_size
    if unpacked > max(UNPACKED, RATIO * size):
        return f"it unpacks to {unpacked:,} bytes, {unpacked // max(size, 1):,} times its own size"
    return None


SAMPLES = 32  # in a batch that is made of single samples


def as_batches(found: Sequence[Any], model: nn.Module, where: str) -> list[Any]:
    """The batches in a list that was read from a file. where: the name of the file in messages.

    Samples of a data set, whose labels are single numbers, are collated to batches. Tensors of different dtypes or sizes are not batches,
    but the arguments of one. Raises UsageError if the tensors may be either.
    """
    if all(map(_is_sample, found)):
        return [default_collate(list(found[i : i + SAMPLES])) for i in range(0, len(found), SAMPLES)]
    if len(found) == 1 or not all(isinstance(value, Tensor) for value in found):
        return list(found)
    parameters = inspect.signature(model.forward).parameters.values()
    positional = [p for p in parameters if p.kind in (p.POSITIONAL_ONLY, p.POSITIONAL_OR_KEYWORD)]
    least = sum(p.default is p.empty for p in positional)
    most = math.inf if any(p.kind is p.VAR_POSITIONAL for p in parameters) else len(positional)
    if least > 1 or len({(value.dtype, value.shape[1:]) for value in found}) > 1:
        return [tuple(found)]
    if len(found) <= most:
        raise UsageError(
            f"{where} holds a list of {len(found)} tensors of one kind, which {type(model).__name__} may take as {len(found)} batches or "
            f"as the {len(found)} arguments of one",
            hint="save a list of tuples, [(a,), (b,)], for batches; a tuple, (a, b), or a dict of keyword arguments for one",
        )
    return list(found)


def _is_sample(value: Any) -> bool:
    """Whether a value is one sample of a data set, not a batch: a tuple, list or dict of tensors and at least one number."""
    parts = list(value.values()) if isinstance(value, Mapping) else list(value) if isinstance(value, (tuple, list)) else []
    numbers = [type(part) in (int, float) or (isinstance(part, Tensor) and part.dim() == 0) for part in parts]
    return any(numbers) and all(number or isinstance(part, Tensor) for number, part in zip(numbers, parts, strict=True))


def _from_numpy(path: Path) -> Any:
    found = np.load(path, allow_pickle=False)
    if isinstance(found, np.ndarray):
        return torch.from_numpy(found)
    with found:
        arrays = {name: torch.from_numpy(found[name]) for name in found.files}
    named = arrays and all(name.isidentifier() and not re.fullmatch(r"arr_\d+", name) for name in arrays)
    return arrays if named else tuple(arrays.values())
