"""`normswap inspect`: the plan for SRC, and what is known of each norm."""

from __future__ import annotations

from collections.abc import Sequence

from normswap.api import convert as pipeline
from normswap.cli.data import all_rules
from normswap.files.load import load
from normswap.models.inputs import parse
from normswap.report.conversion import Report


def inspect_files(
    source: str,
    *,
    arch: str | None = None,
    inputs: Sequence[str] = (),
    include: Sequence[str] = (),
    exclude: Sequence[str] = (),
    rules: Sequence[str] = (),
    trust_packages: Sequence[str] = (),
    trust: bool = False,
) -> Report:
    """The plan for SRC, and what is known of each norm."""
    known = all_rules(rules)
    loaded = load(source, arch=arch, trust_packages=trust_packages, trust=trust)
    given = parse(inputs) if inputs else None
    plan, facts = pipeline.inspect(loaded.model, given, include=include, exclude=exclude, rules=known)
    return Report(source, plan, facts=facts)
