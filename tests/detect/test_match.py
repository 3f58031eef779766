"""include, exclude, and what is decided for a trace; no model is run here."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from typing import Any

import pytest
from torch import nn

from normswap.detect.match import match
from normswap.detect.sites import Rule, Site, Trace
from normswap.errors import UsageError
from normswap.rules import DEFAULT_RULES

BN, LN = nn.BatchNorm2d(3).eval(), nn.LayerNorm(4)
SITES = (
    Site("stem.norm", (), BN, 1),
    Site("layer1.0.norm", ("again.0.norm",), BN, 2),
    Site("layer1.1.norm", (), LN, 1),
    Site("head.batch_norm", (), None, 1, function="torch.nn.functional.batch_norm"),
)
TRACE = Trace(SITES, "fx", ("a note",))


def names(decided: Any) -> tuple[list[str], list[str]]:
    return [s.name for s in decided.swaps], [s.name for s in decided.skips]


def test_every_site_is_decided_in_order() -> None:
    decided = match(TRACE, DEFAULT_RULES)
    assert names(decided) == (["stem.norm", "layer1.0.norm"], ["layer1.1.norm", "head.batch_norm"])
    assert (decided.backend, decided.notes) == ("fx", ("a note",))
    assert decided.order == tuple(site.name for site in SITES)
    mixed = match(TRACE, DEFAULT_RULES, exclude=["stem.*"])
    assert [decision.name for decision in mixed.decisions] == [site.name for site in SITES]
    assert [decision.name for decision in dataclasses.replace(mixed, order=()).decisions] == [*names(mixed)[0], *names(mixed)[1]]
    swap = decided.swaps[1]
    assert (swap.kind, swap.preserves, swap.calls, swap.aliases, swap.producer) == ("batch_norm", "exact", 2, ("again.0.norm",), None)


@pytest.mark.parametrize(
    ("include", "exclude", "swapped"),
    [
        (["stem.*"], [], ["stem.norm"]),
        (["again.*"], [], ["layer1.0.norm"]),
        (["batch_norm"], [], ["stem.norm", "layer1.0.norm"]),
        (["stem.norm", "layer1.*"], [], ["stem.norm", "layer1.0.norm"]),
        ([], ["layer?.*"], ["stem.norm"]),
        ([], ["again.0.norm"], ["stem.norm"]),
        ([], ["batch_norm"], []),
        (["*"], ["*"], []),
        (["batch_norm"], ["stem.*"], ["layer1.0.norm"]),
        ("stem.*", (), ["stem.norm"]),
        ((), "stem.*", ["layer1.0.norm"]),
    ],
)
def test_include_and_exclude(include: Sequence[str], exclude: Sequence[str], swapped: list[str]) -> None:
    decided = match(TRACE, DEFAULT_RULES, include=include, exclude=exclude)
    assert names(decided)[0] == swapped
    assert len(decided.swaps) + len(decided.skips) == len(SITES)


def test_the_reasons() -> None:
    decided = match(TRACE, DEFAULT_RULES, include=["*norm"], exclude=["stem.*", "layer_norm"])
    assert {s.name: s.reason for s in decided.skips if s.name in ("stem.norm", "layer1.1.norm")} == {
        "stem.norm": "was excluded by name or kind; take it out of exclude to swap it",
        "layer1.1.norm": "was excluded by name or kind; take it out of exclude to swap it",
    }
    (first, *_) = match(TRACE, DEFAULT_RULES, include=["again*"]).skips
    assert first.reason == "is not among those that were asked for; add it to include to swap it"


@pytest.mark.parametrize("option", ["include", "exclude"])
def test_a_pattern_that_nothing_answers_to(option: str) -> None:
    with pytest.raises(UsageError) as raised:
        match(TRACE, DEFAULT_RULES, **{option: ["stem.*", "Stem*"]})  # type: ignore[arg-type]
    assert str(raised.value) == (
        "no normalization of the model is called 'Stem*' or is of that kind\n"
        "hint: the names are 'stem.norm', 'layer1.0.norm', 'layer1.1.norm', 'head.batch_norm'; `normswap inspect` lists them"
    )


def test_many_names_are_cut() -> None:
    trace = Trace(tuple(Site(f"n{i}", (), BN, 1) for i in range(7)), "fx")
    with pytest.raises(UsageError, match="'n4' and 2 more;"):
        match(trace, DEFAULT_RULES, include=["x"])


def test_a_norm_free_model_takes_any_pattern() -> None:
    assert names(match(Trace((), "fx"), DEFAULT_RULES, include=["layer1.*"])) == ([], [])


def test_the_first_rule_that_recognises_speaks() -> None:
    refuses = Rule("mine", lambda site: site.module is BN, lambda site: "is mine")
    decided = match(TRACE, (refuses, *DEFAULT_RULES))
    assert [(s.name, s.kind, s.reason) for s in decided.skips[:2]] == [
        ("stem.norm", "mine", "is mine"),
        ("layer1.0.norm", "mine", "is mine"),
    ]
    assert names(match(TRACE, (*DEFAULT_RULES, refuses))) == names(match(TRACE, DEFAULT_RULES))


def test_no_rule_at_all() -> None:
    decided = match(TRACE, ())
    assert [(s.kind, s.reason) for s in decided.skips] == [
        ("unknown", "no rule recognises BatchNorm2d; add *normswap.DEFAULT_RULES to your rules"),
        ("unknown", "no rule recognises BatchNorm2d; add *normswap.DEFAULT_RULES to your rules"),
        ("unknown", "no rule recognises LayerNorm; add *normswap.DEFAULT_RULES to your rules"),
        ("unknown", "no rule recognises torch.nn.functional.batch_norm; add *normswap.DEFAULT_RULES to your rules"),
    ]
