"""`normswap revert`: turns the model of a converted directory back into one with BatchNorm."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from normswap.cli.options import Debug, Loading
from normswap.cli.terminal import say, work


def revert(
    source: Annotated[str, typer.Argument(metavar="DIR", help="A converted directory.")],
    output: Annotated[Path, typer.Option("--output", "-o", metavar="FILE", help="The model file to write.")],
    *,
    skip: Annotated[bool, typer.Option("--skip", help="Leave layers as they are whose originals were not recorded.")] = False,
    loading: Loading,
    debug: Debug = False,
) -> None:
    """Give a converted model its BatchNorm back.

    A layer that was not trained gets its recorded statistics bit for bit; a trained one gets variance = std^2 - eps.
    """
    with work(debug):
        revert_directory(source, output, loading, skip=skip)
    say(f"wrote {output}")


def revert_directory(source: str, output: Path, loading: Loading, *, skip: bool = False) -> None:
    """Revert the model of a converted directory, verify it, and write it to `output`.

    A name that ends in .safetensors gets the state dict; any other name a pickled module if the directory holds one, else a state dict.
    """
    import torch
    from torch.export import ExportedProgram

    from normswap.api.verify import inputs_of, verify
    from normswap.cli.data import opened
    from normswap.errors import UsageError
    from normswap.files import atomic
    from normswap.files.recipe import read_recipe
    from normswap.parity.result import raise_for
    from normswap.swap.revert import revert

    recipe = read_recipe(Path(source))
    converted = opened(source, loading)
    if isinstance(converted, ExportedProgram):
        raise UsageError(f"{source} holds an exported program, which cannot be reverted", hint="keep the .pt2 it was made from")
    model = revert(converted, skip=skip)
    raise_for(verify(converted, model, inputs_of(source, converted)))
    with atomic.file(output) as partial, atomic.writing(str(output)):
        if output.suffix == ".safetensors":
            from safetensors.torch import save_model

            save_model(model, str(partial), metadata={"format": "pt"})
        else:
            torch.save(model if recipe.module else model.state_dict(), partial)
