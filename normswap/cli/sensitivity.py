"""`normswap sensitivity`: measures how much swapping each layer changes the outputs."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Literal

import typer

from normswap.cli.options import Debug, Json, Running, Selecting, Source
from normswap.cli.terminal import print_json, print_tables, work


def sensitivity(
    source: Source,
    *,
    data: Annotated[
        str | None,
        typer.Option(metavar="DATA", help="What to measure on: a .pt or .npz file, a directory of them or package.module:factory."),
    ] = None,
    metric: Annotated[
        str | None,
        typer.Option(
            metavar="SPEC",
            help="package.module:callable, which takes the model and returns a number; or neighbours, for embeddings: the share of samples "
            "that keep their nearest neighbour.",
        ),
    ] = None,
    by: Annotated[
        Literal["rel_l2", "max_rel", "change"],
        typer.Option(help="What to rank by, and what the budget bounds; change is that of the metric."),
    ] = "rel_l2",
    budget: Annotated[
        float | None, typer.Option(metavar="X", help="Choose layers that, swapped together, were measured to change at most X.")
    ] = None,
    skip_done: Annotated[
        Path | None,
        typer.Option(metavar="FILE", help="Write each measurement to FILE once it is made, and make none again that is there."),
    ] = None,
    running: Running,
    selecting: Selecting,
    as_json: Json = False,
    debug: Debug = False,
) -> None:
    """Rank layers by what swapping them costs.

    Swaps one layer at a time, measures what that does to the outputs, and ranks the layers. With --budget, chooses those that can be
    swapped together. Writes nothing but the file of --skip-done.
    """
    with work(debug) as progress:
        from normswap.api.sensitivity import sensitivity
        from normswap.cli.data import batches_of, loaded, metric_of, parsed, rules_of
        from normswap.report.studies import sensitivity_json, sensitivity_summary, sensitivity_table

        given = parsed(running.inputs)
        model = loaded(source, running).model
        measure = metric_of(metric)
        found = sensitivity(
            model,
            None if data is None else batches_of(data, model),
            given,
            metric=measure,
            by=by,
            budget=budget,
            include=selecting.include,
            exclude=selecting.exclude,
            rules=rules_of(selecting.rules),
            skip_done=skip_done,
            progress=progress,
        )
    if as_json:
        print_json(sensitivity_json(source, found))
    else:
        print_tables(sensitivity_table(found), text=sensitivity_summary(found, data))
