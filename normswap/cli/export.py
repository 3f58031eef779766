"""`normswap export`: writes a model, or a converted directory, as an ONNX file."""

from __future__ import annotations

from typing import Annotated

import typer

from normswap.cli.options import Debug, Exporting, Json, OutputFile, Running
from normswap.cli.terminal import print_json, say, work


def export(
    source: Annotated[str, typer.Argument(metavar="SRC", help="A converted directory, or a model as for `convert`.")],
    output: OutputFile,
    *,
    running: Running,
    exporting: Exporting,
    as_json: Json = False,
    debug: Debug = False,
) -> None:
    """Write an ONNX file and prove it.

    Writes an ONNX file with the normalization folded away, and proves that it is the same function.
    """
    with work(debug):
        from normswap.api.export import export_onnx
        from normswap.api.verify import inputs_of
        from normswap.cli.data import opened, parsed
        from normswap.report.onnx import export_json, export_summary

        given = parsed(running.inputs)
        model = opened(source, running)
        result = export_onnx(model, given or inputs_of(source, model), output, **exporting.export_options())
    if as_json:
        print_json(export_json(result))
    else:
        say(export_summary(result), style="bold green")
