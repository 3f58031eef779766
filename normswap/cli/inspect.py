"""`normswap inspect`: lists each norm of SRC with the decision about it and its facts."""

from __future__ import annotations

from normswap.cli.options import Debug, Json, Running, Selecting, Source
from normswap.cli.terminal import print_json, print_tables, work


def inspect(source: Source, *, running: Running, selecting: Selecting, as_json: Json = False, debug: Debug = False) -> None:
    """List every norm and what would happen.

    Lists every normalization of a model: what would happen to it, and why not. Changes and writes nothing.
    """
    with work(debug):
        from normswap.api.convert import inspect
        from normswap.cli.data import loaded, parsed, rules_of
        from normswap.report.conversion import Report, report_table

        rules = rules_of(selecting.rules)
        model = loaded(source, running).model
        plan, facts = inspect(model, parsed(running.inputs), include=selecting.include, exclude=selecting.exclude, rules=rules)
        report = Report(source, plan, facts=facts)
    if as_json:
        print_json(report.json())
    else:
        print_tables(report_table(report), text=report.summary())
