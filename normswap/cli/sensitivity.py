"""`normswap sensitivity`: what swapping each layer costs."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path

from normswap.api.sensitivity import By, Sensitivity, sensitivity
from normswap.cli.data import all_rules, batches_of, function_of
from normswap.files.load import load
from normswap.models.inputs import parse


def sensitivity_files(
    source: str,
    *,
    data: str | None = None,
    arch: str | None = None,
    inputs: Sequence[str] = (),
    metric: str | None = None,
    by: By = "rel_l2",
    budget: float | None = None,
    include: Sequence[str] = (),
    exclude: Sequence[str] = (),
    rules: Sequence[str] = (),
    resume: Path | None = None,
    trust_packages: Sequence[str] = (),
    trust: bool = False,
    progress: Callable[[str, int, int], None] = lambda stage, done, total: None,
) -> Sensitivity:
    """`sensitivity` for the command line."""
    given = parse(inputs) if inputs else None
    loaded = load(source, arch=arch, trust_packages=trust_packages, trust=trust)
    return sensitivity(
        loaded.model,
        None if data is None else batches_of(data, loaded.model),
        given,
        metric=None if metric is None else function_of(metric, "--metric", "a function that takes the model and returns a number"),
        by=by,
        budget=budget,
        include=include,
        exclude=exclude,
        rules=all_rules(rules),
        resume=resume,
        progress=progress,
    )
