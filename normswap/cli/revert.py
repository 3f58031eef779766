"""`normswap revert`: the BatchNorm of a converted directory, given back."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import torch
from torch.export import ExportedProgram

from normswap.api import convert as pipeline
from normswap.api.directory import load
from normswap.api.sources import factory_of, inputs_of
from normswap.api.verify import verify
from normswap.errors import UsageError
from normswap.files import atomic
from normswap.files.recipe import read_recipe
from normswap.swap.revert import revert


def revert_files(
    source: str,
    output: Path,
    *,
    skip: bool = False,
    arch: str | None = None,
    trust_packages: Sequence[str] = (),
    trust: bool = False,
) -> Path:
    """Give the model of a converted directory its BatchNorm back, prove it, and write it to `output`.

    skip: leave the layers as they are that cannot be reverted.
    A name that ends in .safetensors gets the state dict; any other a pickled module if the directory holds one, else a state dict.
    """
    directory = Path(source)
    recipe = read_recipe(directory)
    converted = load(directory, factory_of(arch), trust_packages=trust_packages, trust=trust)
    if isinstance(converted, ExportedProgram):
        raise UsageError(f"{source} holds an exported program, which has no layers to give back", hint="keep the .pt2 it was made from")
    model = revert(converted, skip=skip)
    pipeline.check(verify(converted, model, inputs_of(source, converted)))
    with atomic.file(output) as partial, atomic.writing(str(output)):
        if output.suffix == ".safetensors":
            from safetensors.torch import save_model

            save_model(model, str(partial), metadata={"format": "pt"})
        else:
            torch.save(model if recipe.module else model.state_dict(), partial)
    return output
