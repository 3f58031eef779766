"""`normswap verify`: measures whether two models, directories or files compute the same function."""

from __future__ import annotations

from typing import Annotated

import typer

from normswap.cli.options import Debug, Json, Running, Thorough
from normswap.cli.terminal import PARITY_FAILED, print_json, print_tables, work


def verify(
    reference: Annotated[str, typer.Argument(metavar="REFERENCE", help="A model file, a converted directory or an .onnx file.")],
    candidate: Annotated[str, typer.Argument(metavar="CANDIDATE", help="The same; it must compute what REFERENCE computes.")],
    *,
    tolerance: Annotated[
        float | None, typer.Option(metavar="X", help="Largest max|difference| / max|reference| that passes; default: by precision.")
    ] = None,
    thorough: Thorough = False,
    running: Running,
    as_json: Json = False,
    debug: Debug = False,
) -> None:
    """Measure whether two models are the same.

    Measures whether CANDIDATE computes what REFERENCE computes; exits with 3 if it does not, naming the first layer that differs.
    """
    with work(debug):
        from normswap.api.verify import verify
        from normswap.cli.data import parsed
        from normswap.report.parity import parity_json, parity_summary, parity_table

        parity = verify(
            reference,
            candidate,
            parsed(running.inputs),
            tolerance=tolerance,
            thorough=thorough,
            arch=running.arch,
            trust_packages=running.trust_packages,
            trust=running.trust,
        )
    if as_json:
        print_json(parity_json(parity))
    else:
        print_tables(parity_table(parity), text=parity_summary(parity))
    if not parity.passed:
        raise typer.Exit(PARITY_FAILED)
