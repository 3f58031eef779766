"""Combines the rows of a comparison into one Parity, which decides whether the candidate passes."""

from __future__ import annotations

from collections.abc import Collection, Sequence
from dataclasses import replace

from normswap.parity.comparison import Findings
from normswap.parity.measure import ratio
from normswap.parity.reference import Judgement, Key
from normswap.parity.result import NOTHING_FINITE, Difference, Parity


def verdict(judgement: Judgement, findings: Findings, name: str, *, is_file: bool) -> Parity:
    """A Parity with one Difference for each output, and one for each compared layer over all its calls. name: of the candidate."""
    rows = [*findings.function.items(), *findings.precision.items()]
    if is_file:  # a file runs in float64 last, if at all
        rows = [*findings.precision.items(), *findings.function.items()]
    outputs = [(key, row) for key, row in rows if not key.site]
    sites = [(key, row) for key, row in rows if key.site]
    failure = findings.failure
    if failure is None and not outputs:
        failure = "nothing was compared: the model returns no tensor"
    elif failure is None and not any(truth.value.numel() for truth in judgement.truths.values()):
        failure = "nothing was compared: every tensor that the model returns is empty"
    decided = {key.name for key, row in outputs if row.unjudged is None}
    # An output that nothing decides, and nothing speaks against, is named; the others decide, if there are any.
    undecidable = findings.undecidable if decided else frozenset[str]()
    by_site: dict[str, list[Difference]] = {}  # the calls of one layer become one row
    for of_call in _telling(sites, keep=False):
        by_site.setdefault(of_call[0].name, []).extend(of_call)
    order = {site: i for i, site in enumerate(judgement.reference.sites)}
    dropped = [text for text in judgement.dropped if is_file or text.partition(": ")[0] not in judgement.flat]
    return Parity(
        outputs=tuple(map(_worst, _telling(outputs, keep=True, undecidable=undecidable))),
        sites=tuple(sorted(map(_worst, by_site.values()), key=lambda row: order.get(row.name, 0))),
        failure=failure,
        candidate=name,
        probes=tuple(probe.name for probe in judgement.probes),
        dropped=(*dropped, *findings.notes),
        unjudged=_unjudged([row for _, row in (*outputs, *sites)], undecidable),
        forward_passes=judgement.passes + findings.passes,
        all_outputs=tuple(row for _, row in outputs),
    )


def _telling(rows: Sequence[tuple[Key, Difference]], *, keep: bool, undecidable: Collection[str] = ()) -> list[list[Difference]]:
    """For each output or call, its rows at all probes, without those that decide nothing.

    A row decides nothing if reference and candidate have no finite value (half precision x 1e3), or the noise of the reference is too
    large: such a row counts only if there is no other. keep: whether a tensor that no probe can judge fails, unless it is one of
    `undecidable`; else it is left out.
    """
    by_name: dict[str, list[Difference]] = {}
    for key, row in rows:
        by_name.setdefault(key.name, []).append(row)
    telling = []
    for name, found in by_name.items():
        failed = [row for row in found if not row.passed and row.problem != NOTHING_FINITE]
        judged = [row for row in found if row.unjudged is None and row.problem != NOTHING_FINITE]
        unjudged = next((row for row in found if row.unjudged is not None), None)
        if failed or judged:
            telling.append(list(dict.fromkeys((*failed, *judged))))
        elif unjudged is None:
            telling.append(found)
        elif name in undecidable:
            telling.append([unjudged])
        elif keep:
            telling.append([replace(unjudged, problem=f"cannot be judged at any probe: {unjudged.unjudged}")])
    return telling


def _unjudged(rows: Sequence[Difference], undecidable: Collection[str]) -> tuple[str, ...]:
    """A text for each row that decides nothing; of several rows at one probe with the same reason, only the first, and those of outputs
    that nothing decides."""
    texts: dict[tuple[str, str, bool, str], str] = {}
    for row in rows:
        if row.unjudged is not None:
            where = f"{row.name or 'the model'} at the probe {row.probe!r}"
            alone = row.name if row.name in undecidable else ""
            texts.setdefault((row.probe, row.unjudged.partition(":")[0], row.float64, alone), f"{where}: {row.unjudged}")
    return tuple(texts.values())


def _worst(rows: Sequence[Difference]) -> Difference:
    """The first row that failed, else the row closest to its limit, or of rows without a limit the one with the largest error.

    Rows in float64 count only if there are no others.
    """
    failed = next((row for row in rows if not row.passed), None)
    return failed or max([row for row in rows if not row.float64] or rows, key=lambda row: (ratio(row.max_rel, row.tolerance), row.max_rel))
