"""Trace + rules -> Plan: decides for every norm of a model whether it is swapped, changes nothing."""

from __future__ import annotations

import fnmatch
from collections.abc import Sequence

from normswap.detect.sites import Plan, Rule, Site, Skip, Swap, Trace
from normswap.errors import UsageError, listed
from normswap.models.copying import on_meta

APPROXIMATE = "ask for an approximate one with approximate=True and calibration=... (--approximate, --data)"
FORGOTTEN = "ask for an approximate one, from the calibration data that you gave, with approximate=True (--approximate)"


def match(
    trace: Trace,
    rules: Sequence[Rule],
    *,
    include: Sequence[str] = (),
    exclude: Sequence[str] = (),
    approximate: bool = False,
    advice: str = APPROXIMATE,
) -> Plan:
    """Every site as a Swap or a Skip.

    `include` and `exclude` are globs on a site's names and its kind; exclude wins. advice: what to do about a norm that only an
    approximate swap could replace. Raises UsageError for a pattern that matches no site, as it is likely a typing error.
    """
    include, exclude = ((p,) if isinstance(p, str) else p for p in (include, exclude))  # a string is a sequence of strings, too
    decided = [_decide(site, rules, include, exclude, approximate, advice) for site in trace.sites]
    for pattern in (*include, *exclude):
        if trace.sites and not any(_answers(d.site, d.kind, [pattern]) for d in decided):
            raise UsageError(
                f"no normalization of the model is called {pattern!r} or is of that kind",
                hint=f"the names are {listed([repr(site.name) for site in trace.sites], 5)}; `normswap inspect` lists them",
            )
    return Plan(
        swaps=tuple(d for d in decided if isinstance(d, Swap)),
        skips=tuple(d for d in decided if isinstance(d, Skip)),
        backend=trace.backend,
        notes=trace.notes,
        order=tuple(d.name for d in decided),
    )


def _decide(
    site: Site, rules: Sequence[Rule], include: Sequence[str], exclude: Sequence[str], approximate: bool, advice: str
) -> Swap | Skip:
    rule = next((rule for rule in rules if rule.recognises(site)), None)
    if rule is None:
        return Skip(
            site,
            "unknown",
            f"no rule recognises {site.function or type(site.module).__qualname__}; add *normswap.DEFAULT_RULES to your rules",
        )
    if _answers(site, rule.kind, exclude):
        return Skip(site, rule.kind, "was excluded by name or kind; take it out of exclude to swap it")
    if include and not _answers(site, rule.kind, include):
        return Skip(site, rule.kind, "is not among those that were asked for; add it to include to swap it")
    reason = rule.check(site) if site.module is None else site.obstacle or rule.check(site)
    if reason is None and site.module is not None and (valueless := on_meta(site.module)):
        reason = f"is on the meta device, so its {valueless[0]} has no values yet; load the weights first"
    if reason is None and rule.inexact is not None and not approximate:
        reason = f"{rule.inexact(site)}; {advice}"
    if reason is None and rule.inexact is not None and site.calls == 0:
        reason = "is never called, so no data can reach it; leave it, or give calibration data that do"
    if reason is None and rule.inexact is not None and site.tied:
        reason = f"shares a parameter: {' and '.join(site.tied)} are one tensor, so calibration would change all; leave them, or untie them"
    return Swap(site, rule) if reason is None else Skip(site, rule.kind, reason)


def _answers(site: Site, kind: str, patterns: Sequence[str]) -> bool:
    return any(fnmatch.fnmatchcase(name, pattern) for pattern in patterns for name in (*site.names, kind))
