"""Which folds have to be undone for a file to be the same function: found by trying.

    1. The file is folded and measured. If it passes, that is it.
    2. Where the outputs of the norms are tapped, the first one that differs is undone, then the first two, four ... of those that still do.
       Those of them without which it passes as well are folded again.
    3. If no tap differs where something is folded, all folds are undone, and as many as can be are made again, by halves.

`attempt` folds and measures without the folds that it is given, so whatever this returns was measured, and last of all unless it failed.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Generic, TypeVar

ROUNDS = 12  # attempts, and up to two more that settle what was found
T = TypeVar("T")


@dataclass(frozen=True)
class Attempt(Generic[T]):
    """One file that was folded and measured.

    result   the file, for the caller
    passed   whether it is the same function
    folded   the names of what was folded in it, in order
    suspects of those whose outputs differ, in order; empty if it passed
    why      what the measurement found, in words
    """

    result: T
    passed: bool
    folded: Sequence[str] = ()
    suspects: Sequence[str] = ()
    why: str = ""


def settle(attempt: Callable[[Mapping[str, str]], Attempt[T]]) -> Attempt[T]:
    """The attempt with the most folds that passed; the first one if none did. `attempt` is given what to undo, by name, and why."""
    first = latest = attempt({})
    undone: dict[str, str] = {}
    count, step = 1, 1
    while not latest.passed and count < ROUNDS and (named := [name for name in latest.suspects if name in latest.folded]):
        undone |= {name: _reason(latest, f"first to differ: {named[0]}") for name in named[:step]}
        latest, count, step = attempt(undone), count + 1, 2 * step
    if latest.passed:
        return _without_innocents(attempt, undone, latest)
    rest = list(dict.fromkeys(latest.folded))
    why = _reason(latest, "no layer by itself differs")
    if not rest or count == ROUNDS:
        return first
    latest, count = attempt(undone | dict.fromkeys(rest, why)), count + 1
    if not latest.passed:
        return first
    halves = True
    while len(rest) > 1 and halves and count < ROUNDS:
        for half in (rest[: len(rest) // 2], rest[len(rest) // 2 :]):
            latest, count = attempt(undone | dict.fromkeys(half, why)), count + 1
            if latest.passed:
                rest = half
                break
        halves = latest.passed
    return latest if latest.passed else attempt(undone | dict.fromkeys(rest, why))


def _without_innocents(attempt: Callable[[Mapping[str, str]], Attempt[T]], undone: Mapping[str, str], found: Attempt[T]) -> Attempt[T]:
    """What was undone beside the one that mattered is folded again, as far as it passes."""
    for name in list(undone) if 1 < len(undone) <= ROUNDS else ():
        fewer = {other: why for other, why in undone.items() if other != name}
        tried = attempt(fewer)
        if tried.passed:
            undone = fewer
        found = tried
    return found if found.passed else attempt(undone)


def _reason(attempt: Attempt[T], where: str) -> str:
    return f"rolled back: folded, {attempt.why} ({where})"
