"""What healing did, for the report: distances before, on the way and after, what it took, and the metric."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import asdict
from typing import TYPE_CHECKING, Any

from normswap.report.words import figure

if TYPE_CHECKING:
    from normswap.api.heal import Healing


def healing_json(healing: Healing[Any]) -> dict[str, Any]:
    """docs/report.md has the keys."""
    metric = healing.metric
    return {
        "before": healing.before,
        "after": healing.after,
        "metric": None if metric is None else dict(zip(("original", "before", "after"), metric, strict=True)),
        "epochs": healing.epochs,
        "rolled_back": healing.rolled_back,
        "diverged": healing.diverged,
        "ended": healing.ended,
        "curve": [asdict(point) for point in healing.curve],
    }


def healing_lines(healing: Healing[Any]) -> Iterator[str]:
    """In words: the distance, what it took, and what one should know."""
    last = healing.curve[-1]
    minutes = f"{last.seconds / 60:.1f} minutes"
    yield f"distance {figure(healing.before)} -> {figure(healing.after)} in {last.step} steps, {last.tokens} tokens or samples, {minutes}"
    if healing.metric is not None:
        original, before, after = (f"{value:.4g}" for value in healing.metric)
        yield f"metric {before} -> {after}, of the original {original}"
    if healing.ended:
        yield "the data ended before the budget"
    elif healing.epochs:
        yield f"the data were used {healing.epochs + 1} times; fresh data are better, as what is repeated is learnt by heart"
    if healing.rolled_back:
        times = "1 time" if healing.rolled_back == 1 else f"{healing.rolled_back} times"
        yield f"the distance grew {times}, and it went back to the best weights with half the learning rate"
