"""`normswap landscape`: measures how predictable a training step is, before and after a swap."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

import typer

from normswap.cli.options import Debug, Json, Loading
from normswap.cli.terminal import print_json, print_tables, work

if TYPE_CHECKING:
    from normswap.models.programs import Model

FORMS = ("original", "converted", "coupled")


def landscape(
    source: Annotated[str, typer.Argument(metavar="SRC", help="A model as for `convert`, or a converted directory.")],
    *,
    data: Annotated[
        str | None,
        typer.Option(metavar="DATA", help="Batches (x, y): a .pt or .npz file, a directory of them or package.module:factory."),
    ] = None,
    loss: Annotated[
        str | None,
        typer.Option(metavar="SPEC", help="package.module:function of (output, y) that returns one number. Default: cross entropy."),
    ] = None,
    forms: Annotated[
        list[str] | None,
        typer.Option(
            "--as",
            metavar="|".join(FORMS),
            help="Measure SRC as this only. Repeatable; default: as all three, if a norm can be swapped.",
        ),
    ] = None,
    steps: Annotated[
        list[float] | None,
        typer.Option("--step", metavar="ETA", help="A step along the gradient. Repeatable; default: 0.001 0.003 0.01 0.03 0.1 0.3."),
    ] = None,
    layer: Annotated[str | None, typer.Option(metavar="NAME", help="The gradient by the parameters of this layer alone.")] = None,
    mode: Annotated[
        Literal["train", "eval"], typer.Option(help="The mode of the model; in train, a BatchNorm takes the statistics of the batch.")
    ] = "train",
    plot: Annotated[Path | None, typer.Option(metavar="FILE", help="Also draw it: a .svg, .png or .pdf file. Needs matplotlib.")] = None,
    loading: Loading,
    as_json: Json = False,
    debug: Debug = False,
) -> None:
    """Measure how predictable a training step is.

    Measures how far the loss and the gradient move along the gradient, on each batch, before and after the norms are swapped. Writes
    nothing but the file of --plot.
    """
    with work(debug) as progress:
        from normswap.api.landscape import STEPS, check_plot, landscape
        from normswap.cli.data import batches_of, function_of, opened
        from normswap.errors import UsageError, one_of
        from normswap.files import atomic
        from normswap.report.studies import landscape_json, landscape_summary, landscape_table

        for form in forms or ():
            one_of("--as", form, FORMS)
        if plot is not None:
            check_plot(plot)
        if data is None:
            raise UsageError("a landscape is measured on data, and none were given", hint="--data: batches (x, y)")
        model = opened(source, loading)
        batches = batches_of(data, model)
        found = landscape(
            dict(_models(model, forms or (), batches)),  # type: ignore[arg-type]  # `landscape` refuses an ExportedProgram
            batches,
            loss=None if loss is None else function_of(loss, "--loss", "a function of (output, y) that returns one number"),
            steps=steps or STEPS,
            layer=layer,
            mode=mode,
            progress=progress,
        )
        if plot is not None:
            with atomic.writing(str(plot)):
                found.plot(plot)
    if as_json:
        print_json(landscape_json(source, found, loss))
    else:
        drawn = "" if plot is None else f"\n  drawn in {plot}"
        print_tables(landscape_table(found), text=landscape_summary(found) + drawn)


def _models(model: Model, forms: Sequence[str], batches: Sequence[Any]) -> Iterator[tuple[str, Model]]:
    """(form, model) for each of `forms`: as it is, converted, or converted and coupled. Default: all, if a norm can be swapped."""
    from torch import nn

    from normswap.api.convert import convert, plan
    from normswap.api.landscape import called_with
    from normswap.errors import UsageError

    calibration = [dict(probe.kwargs) or probe.args for probe, _ in called_with(batches)]
    module = isinstance(model, nn.Module)  # `landscape` has a message for an ExportedProgram
    swapped = module and bool(plan(model, calibration[0]).swaps)
    for form in forms or (FORMS if swapped else FORMS[:1]):
        if form == "original":
            yield form, model
        elif not swapped:
            raise UsageError(
                f"there is nothing to measure as {form}: no norm of the model can be swapped exactly",
                hint="`normswap inspect` tells why; --as original measures the model as it is",
            )
        elif form == "coupled":
            yield form, convert(model, calibration[0], calibration=calibration).model
        else:
            yield form, convert(model, calibration[0], coupling="none").model
