"""The report of `normswap verify DIR`: every comparison of the converted directories below DIR."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from normswap.report.junit import Compared
from normswap.report.parity import failure_text, parity_json
from normswap.report.tables import Alarm, Good, Listing, table
from normswap.report.words import figure, text_of

CHECK_VERSION = 1


def check_json(made: Sequence[Compared]) -> dict[str, Any]:
    """Every comparison, as strict JSON. docs/verify.md documents it."""
    comparisons = [
        {
            "reference": each.reference,
            "candidate": each.candidate,
            "status": _status(each),
            "reason": each.error or each.not_run,
            "parity": None if each.parity is None else parity_json(each.parity),
        }
        for each in made
    ]
    return {"version": CHECK_VERSION, "passed": not any(_is_wrong(each) for each in made), "comparisons": comparisons}


def check_table(made: Sequence[Compared]) -> Listing:
    """A table with one row for each comparison."""
    rows = []
    for each in made:
        error = "" if each.parity is None else figure(each.parity.max_rel)
        status = _status(each)
        rows.append((each.candidate, each.reference, error, Alarm(status) if _is_wrong(each) else Good(status) if each.parity else status))
    return table(("candidate", "reference", "max error", "verdict"), rows, numbers=("max error",))


def check_summary(made: Sequence[Compared]) -> str:
    """How many comparisons passed; then those that failed, with the reason, and those that could not be made. Plain text."""
    passed, wrong = sum(each.parity is not None and each.parity.passed for each in made), [each for each in made if _is_wrong(each)]
    lines = [f"{'FAILED: ' if wrong else ''}{passed} of {len(made)} comparisons passed, {len(wrong)} failed"]
    for each in wrong:
        lines += (_error_text(each) if each.parity is None else failure_text(each.reference, each.candidate, each.parity)).splitlines()
    lines += [f"  not compared: {each.candidate} and {each.reference}: {each.not_run}" for each in made if each.not_run is not None]
    return text_of(lines)


def _error_text(each: Compared) -> str:
    first, *more = str(each.error).splitlines()
    return "\n".join((f"error: {each.candidate}: {first}", *(f"  {line}" for line in more)))


def _is_wrong(each: Compared) -> bool:
    return each.error is not None or (each.parity is not None and not each.parity.passed)


def _status(each: Compared) -> str:
    if each.not_run is not None:
        return "not run"
    return "error" if each.error is not None else "different" if _is_wrong(each) else "same"
