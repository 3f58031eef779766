"""Example inputs: given, read from the command line or a file, or inferred from the model's own layers.

as_inputs(x)     a tensor, a tuple, or a dict of keyword arguments
infer(model)     the first shape that the model accepts, or None
parse(specs)     --input 1x3x224x224[:dtype], or a .pt or .npz file
"""

from __future__ import annotations

import math
import random
import re
import warnings
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from normswap.errors import SwapError, UsageError, first_line
from normswap.sharing import shadow

SEED = 0
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
    origin: str = "given"  # 'given', 'inferred', or 'program': the example inputs that an ExportedProgram carries


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
        hint="a model that takes one list is called with ([a, b],)",
    )


# --- inferred -------------------------------------------------------------------------------------------------------------------------


def infer(model: nn.Module) -> Inputs | None:
    """The first guess that a forward of the model accepts. The model, its statistics and the random state stay as they were."""
    trial = _trial(model)
    if trial is None:
        return None
    for guess in _guesses(model):
        if _accepts(trial, guess):
            return Inputs((guess,), origin="inferred")
    return None


def _trial(model: nn.Module) -> nn.Module | None:
    """A copy to run: parameters are shared, for their size; buffers are copied, since a forward may write them."""
    try:
        trial = shadow(model)
    except SwapError:  # locks, handles: not to be copied, so not to be tried
        return None
    for module in trial.modules():  # a copied hook is the same function: it would write to where the user's writes
        module._forward_hooks.clear()
        module._forward_pre_hooks.clear()
    return trial


def _accepts(trial: nn.Module, guess: Tensor) -> bool:
    devices = [guess.device] if guess.device.type == "cuda" else []
    state = random.getstate(), np.random.get_state()
    with torch.no_grad(), torch.random.fork_rng(devices), warnings.catch_warnings():
        warnings.simplefilter("ignore")
        try:
            trial(guess)
        except Exception:  # any complaint is a no
            return False
        finally:
            random.setstate(state[0])
            np.random.set_state(state[1])
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
    """Batches of one that this layer could come first for; None if it says nothing about its input."""
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
        case nn.modules.batchnorm._BatchNorm() if module.affine:
            return [(1, module.num_features, *rest) for rest in ((), (16,), (32, 32), (8, 16, 16))]
    return None


def _fitting(model: nn.Module, first: nn.Module, shapes: list[tuple[int, ...]]) -> Iterator[tuple[int, ...]]:
    """The ladder; then, for images before a fixed linear, every size up to 64 that is on no ladder."""
    yield from shapes
    if isinstance(first, nn.Conv2d) and any(isinstance(module, nn.Linear) for module in model.modules()):
        yield from ((1, first.in_channels, size, size) for size in range(4, 65) if size not in _IMAGE_SIZES)


def make(shape: Sequence[int], dtype: torch.dtype, *, high: int = 10, seed: int = SEED) -> Tensor:
    """Standard normal numbers; small non-negative integers below `high`; fair coins. The same ones every time."""
    generator = torch.Generator().manual_seed(seed)
    if dtype is torch.bool:
        return torch.randint(0, 2, tuple(shape), generator=generator).bool()
    if not (dtype.is_floating_point or dtype.is_complex):
        return torch.randint(0, high, tuple(shape), generator=generator).to(dtype)
    wide = torch.complex128 if dtype.is_complex else torch.float64
    return torch.randn(tuple(shape), generator=generator, dtype=wide).to(dtype)  # so that every width has the same numbers


# --- from the command line ------------------------------------------------------------------------------------------------------------


def parse(specs: Sequence[str]) -> Inputs:
    """Each spec is one positional argument; a file holds all of them."""
    files = [spec for spec in specs if Path(spec).suffix in (".pt", ".pth", ".npz", ".npy")]
    if files and len(specs) > 1:
        raise UsageError(
            f"--input {files[0]} is a file, which holds all inputs, but there are {len(specs)} --input", hint="give one file or only shapes"
        )
    if files:
        return _from_file(Path(files[0]))
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


def _from_file(path: Path) -> Inputs:
    if not path.is_file():
        raise UsageError(f"--input {path}: there is no such file", hint=_EXPECTED)
    try:
        numpy = path.suffix in (".npz", ".npy")
        found = _from_numpy(path) if numpy else torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:  # of a dozen types, for a damaged file
        raise UsageError(
            f"--input {path} cannot be read: {first_line(error)}",
            hint="torch.save tensors, or a tuple or dict of tensors, or numpy.savez arrays",
        ) from error
    if isinstance(found, list):
        found = tuple(found)
    return as_inputs(found)


def _from_numpy(path: Path) -> Any:
    found = np.load(path, allow_pickle=False)
    if isinstance(found, np.ndarray):
        return torch.from_numpy(found)
    with found:
        arrays = {name: torch.from_numpy(found[name]) for name in found.files}
    named = arrays and all(name.isidentifier() and not re.fullmatch(r"arr_\d+", name) for name in arrays)
    return arrays if named else tuple(arrays.values())
