"""Parity and Difference as data: what passes, what is largest, what is first."""

from __future__ import annotations

import math

import pytest

from normswap.parity.result import Difference, Parity, worst


def difference(
    name: str = "output", *, rel: float = 1e-8, tolerance: float = 1e-6, non_finite: int = 0, problem: str | None = None
) -> Difference:
    return Difference(name, "example", 2 * rel, rel, rel, non_finite, 1e-8, tolerance, problem)


@pytest.mark.parametrize(
    ("found", "passed"),
    [
        (difference(), True),
        (difference(rel=1e-6), True),
        (difference(rel=1.0000001e-6), False),
        (difference(rel=math.nan), False),
        (difference(rel=math.inf), False),
        (difference(rel=math.inf, tolerance=math.nan), False),
        (difference(tolerance=math.nan), False),
        (difference(non_finite=1), False),
        (difference(problem="is missing"), False),
    ],
)
def test_a_difference_passes_only_within_its_limit(found: Difference, passed: bool) -> None:
    assert found.passed is passed


@pytest.mark.parametrize(
    ("parity", "passed"),
    [
        (Parity((difference(),)), True),
        (Parity((difference(),), (difference("bn"),)), True),
        (Parity(()), False),
        (Parity((), (difference("bn"),)), False),
        (Parity((difference(),), failure="the candidate raised"), False),
        (Parity((difference(), difference(rel=1))), False),
        (Parity((difference(),), (difference("bn", rel=1),)), False),
    ],
)
def test_one_failure_fails_all_and_nothing_is_a_failure(parity: Parity, passed: bool) -> None:
    assert parity.passed is bool(parity) is passed


def test_first_bad_is_a_layer_before_an_output() -> None:
    good, bad = difference("bn1"), difference("bn2", rel=1)
    assert Parity((difference("out", rel=1),), (good, bad, difference("bn3", rel=2))).first_bad == "bn2"
    assert Parity((difference("out", rel=1),), (good,)).first_bad == "out"
    assert Parity((difference("out"),), (good,)).first_bad is None


@pytest.mark.parametrize("errors", [[], [math.nan], [1.0, math.nan], [math.nan, 1.0]])
def test_the_worst_of_nothing_or_nan_is_nan(errors: list[float]) -> None:
    assert math.isnan(worst(errors))


def test_the_largest_errors_are_over_all_probes() -> None:
    """The row that came closest to its own limit is not the one with the largest error."""
    near, far = difference(rel=9e-7, tolerance=1e-6), difference(rel=5e-6, tolerance=1e-4)
    parity = Parity((near,), all_outputs=(near, far))
    assert (parity.max_rel, parity.max_abs, parity.smallest_tolerance) == (5e-6, 1e-5, 5e-6)
    assert Parity((near,)).max_rel == 9e-7


@pytest.mark.parametrize(
    "parity",
    [
        Parity((difference(non_finite=1),)),
        Parity((difference(problem="is missing"),)),
        Parity((difference(),), failure="the candidate raised"),
        Parity(()),
    ],
)
def test_no_tolerance_mends_what_is_not_an_error_of_size(parity: Parity) -> None:
    assert math.isnan(parity.smallest_tolerance)
