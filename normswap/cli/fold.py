"""`normswap fold`: folds the normalization of an ONNX file into its layers."""

from __future__ import annotations

from typing import Annotated, Literal

import typer

from normswap.cli.options import INPUT, Debug, Json, OutputFile
from normswap.cli.terminal import print_json, print_tables, work


def fold(
    source: Annotated[str, typer.Argument(metavar="MODEL.ONNX", help="Any ONNX file.")],
    output: OutputFile,
    *,
    inputs: Annotated[list[str] | None, INPUT] = None,
    to: Annotated[
        Literal["rmsnorm"] | None,
        typer.Option(help="Also, exactly: rmsnorm, a LayerNorm whose input can lose its mean becomes an RMSNorm (opset 23)."),
    ] = None,
    as_json: Json = False,
    debug: Debug = False,
) -> None:
    """Fold the normalization of an ONNX file.

    Folds what normalization an ONNX file holds into its layers, and proves that it is the same function. If there is nothing to fold, the
    file is copied as it is.
    """
    with work(debug):
        from normswap.api.fold import fold_onnx
        from normswap.report.onnx import fold_json, fold_summary, fold_table, operators_table

        result = fold_onnx(source, output, inputs=inputs, to=to)
    if as_json:
        print_json(fold_json(source, result))
    else:
        print_tables(fold_table(result), operators_table(result), text=fold_summary(result), passed=result.changed or None)
