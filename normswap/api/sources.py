"""What a command is given as a model, and the inputs that are known of it."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path

from torch import nn
from torch.export import ExportedProgram

from normswap.api.directory import load, restored
from normswap.files import atomic
from normswap.files.build import build
from normswap.files.load import load as load_source
from normswap.files.recipe import read_recipe
from normswap.models.inputs import Inputs, infer
from normswap.parity.runners import onnx_inputs

Model = nn.Module | ExportedProgram


def factory_of(arch: str | None) -> Callable[[], nn.Module] | None:
    """What builds the architecture that --arch names."""
    return None if arch is None else lambda: build(arch)


def load_any(
    source: str, *, arch: str | None = None, trust_packages: Sequence[str] = (), trust: bool = False, trust_pickle: bool = False
) -> Model:
    """The model of a converted directory, or of anything that `load.py` reads. trust_pickle: the old name of trust."""
    trust = trust or trust_pickle
    atomic.recover(Path(source))
    if Path(source).is_dir():
        return load(source, factory_of(arch), trust_packages=trust_packages, trust=trust)
    return load_source(source, arch=arch, trust_packages=trust_packages, trust=trust).model


def inputs_of(side: Model | str | Path, opened: nn.Module | Path) -> Inputs | None:
    """The inputs that one side knows: those it was saved with, those it declares, or inferred ones."""
    if isinstance(side, (str, Path)) and Path(side).is_dir():
        known = restored(read_recipe(Path(side)).inputs)
        if known:
            return known
    if isinstance(side, ExportedProgram) and side.example_inputs:
        return Inputs(tuple(side.example_inputs[0]), dict(side.example_inputs[1]), "program")
    if isinstance(opened, Path):
        declared = onnx_inputs(opened)
        return None if declared is None else Inputs(declared)
    return infer(opened)
