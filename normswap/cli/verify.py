"""`normswap verify`: measures whether two models, directories or files compute the same function."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from normswap.cli.options import Debug, Json, Running, Thorough
from normswap.cli.terminal import PARITY_FAILED, print_json, print_tables, work

if TYPE_CHECKING:
    from normswap.parity.result import Parity
    from normswap.report.junit import Compared


def verify(
    reference: Annotated[str, typer.Argument(metavar="REFERENCE", help="A model file, a converted directory or an .onnx file.")],
    candidate: Annotated[
        str | None,
        typer.Argument(
            metavar="[CANDIDATE]",
            help="The same; it must compute what REFERENCE computes. Without it, every converted directory at and below REFERENCE is held "
            "against the model that it was made from, and each of its ONNX files against it.",
            show_default=False,
        ),
    ] = None,
    *,
    tolerance: Annotated[
        float | None, typer.Option(metavar="X", help="Largest max|difference| / max|reference| that passes; default: by precision.")
    ] = None,
    thorough: Thorough = False,
    junit: Annotated[Path | None, typer.Option(metavar="FILE", help="Also write the result as a JUnit file, for CI services.")] = None,
    running: Running,
    as_json: Json = False,
    debug: Debug = False,
) -> None:
    """Measure whether two models are the same.

    Measures whether CANDIDATE computes what REFERENCE computes; exits with 3 if it does not, naming the first layer that differs.
    """
    with work(debug):
        from normswap.files import atomic
        from normswap.report import junit as junit_file
        from normswap.report.check import check_json, check_summary, check_table
        from normswap.report.parity import failure_text, parity_json, parity_summary, parity_table

        made: list[Compared]
        if candidate is None:
            made = list(_of_directories(reference, running, tolerance=tolerance, thorough=thorough))
        else:
            made = [_of_two(reference, candidate, running, tolerance=tolerance, thorough=thorough)]
        if junit is not None:
            with atomic.file(junit) as partial:
                partial.write_text(junit_file.junit(made), encoding="utf-8")
    passed = all(each.parity is None or each.parity.passed for each in made) and not any(each.error for each in made)
    if candidate is None:
        if as_json:
            print_json(check_json(made))
        else:
            print_tables(check_table(made), text=check_summary(made), passed=passed)
    elif (parity := made[0].parity) is not None:
        if as_json:
            print_json(parity_json(parity))
        else:
            why = "" if parity.passed else f"\n{failure_text(reference, candidate, parity)}"
            print_tables(parity_table(parity), text=parity_summary(parity) + why, passed=passed)
    if not passed:
        raise typer.Exit(PARITY_FAILED)


def _of_two(reference: str, candidate: str, running: Running, **options: Any) -> Compared:
    from normswap.api.verify import verify
    from normswap.cli.data import parsed

    loading: dict[str, Any] = {"arch": running.arch, "trust_packages": running.trust_packages, "trust": running.trust}
    return _timed(reference, candidate, lambda: verify(reference, candidate, parsed(running.inputs), **options, **loading))


def _of_directories(folder: str, running: Running, **options: Any) -> Iterator[Compared]:
    """Every comparison of the converted directories below a folder. An error of one does not keep the others from being made."""
    from normswap.api.check import all_checks
    from normswap.errors import NormswapError, UsageError
    from normswap.report.junit import Compared

    if running.inputs or running.arch:
        raise UsageError("--input and --arch are for two models", hint="give CANDIDATE, too")
    made: list[Compared] = []
    for check in all_checks(Path(folder), trust=running.trust, trust_packages=running.trust_packages):
        if check.not_run is not None:
            made.append(Compared(check.reference, check.candidate, not_run=check.not_run))
            continue
        try:
            made.append(_timed(check.reference, check.candidate, lambda check=check: check.run(**options)))  # type: ignore[misc]
        except NormswapError as error:
            made.append(Compared(check.reference, check.candidate, error=str(error)))
    if all(each.not_run is not None for each in made):
        reasons = "; ".join(f"{each.candidate}: {each.not_run}" for each in made)
        raise UsageError(f"nothing can be compared: {reasons}", hint="normswap verify REFERENCE CANDIDATE compares any two models")
    yield from made


def _timed(reference: str, candidate: str, run: Callable[[], Parity]) -> Compared:
    from normswap.report.junit import Compared

    started = time.perf_counter()
    parity = run()
    return Compared(reference, candidate, parity, seconds=time.perf_counter() - started)
