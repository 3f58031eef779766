"""`normswap convert`: SRC into a directory that holds the converted model, its ONNX file and the report."""

from __future__ import annotations

import contextlib
import os
import time
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from normswap.cli.options import AlsoOnnx, Converting, Debug, Exporting, Json, OutputDirectory, Running, Selecting, Source
from normswap.cli.terminal import Progress, print_json, print_tables, work
from normswap.files import atomic

if TYPE_CHECKING:
    from normswap.api.convert import Conversion
    from normswap.api.heal import Healing
    from normswap.api.request import Request
    from normswap.export.to_onnx import Export
    from normswap.files.load import Loaded
    from normswap.report.conversion import Report

    Heal = Callable[[Conversion[Any], Loaded], tuple[Conversion[Any], Healing[Any] | None]]

REPORT, PAGE, ONNX = "report.json", "report.html", "model.onnx"


@dataclass(frozen=True, kw_only=True)
class ConvertOptions(Exporting, Converting, Selecting, Running):
    """Every option of the command."""

    onnx: AlsoOnnx = True


def convert(
    source: Source,
    output: OutputDirectory = None,
    *,
    options: ConvertOptions,
    as_json: Json = False,
    debug: Debug = False,
) -> None:
    """Swap every norm it can, prove it, save it.

    Swaps every normalization that can be swapped exactly, proves that the outputs are the same, saves the model, exports it to ONNX and
    proves that too.
    """
    with work(debug) as progress:
        from normswap.report.conversion import calibration_table, report_table

        report, directory = convert_to_directory(source, output, options, progress)
    if as_json:
        print_json(report.json())
    else:
        exact = report.status == "converted" and "drift" not in report.parities
        written = f"\n  written to {directory}{os.sep}"
        print_tables(report_table(report), calibration_table(report), text=report.summary() + written, passed=exact or None)


def convert_to_directory(
    source: str,
    output: Path | None = None,
    options: ConvertOptions = ConvertOptions(),  # frozen
    progress: Progress = lambda stage, done, total: None,
    *,
    request_of: Callable[[Request, Loaded], Request] = lambda request, loaded: request,
    heal: Heal | None = None,
) -> tuple[Report, Path]:
    """Convert SRC into a directory; returns what was done, and the directory. output: None for ./<stem of SRC>.normswap/.

    request_of: changes the request that the options make. heal: what is done to the conversion before it is saved.

    Raises ParityError after writing a directory that holds the report alone.
    """
    import dataclasses
    import gc
    import json

    from torch.export import ExportedProgram

    from normswap.api.convert import convert_unchecked
    from normswap.api.request import Request
    from normswap.cli.data import batches_of, loaded, parsed, rules_of
    from normswap.export.verified import verified_export
    from normswap.files.recipe import seal
    from normswap.parity.result import Comparisons, ParityError, raise_for
    from normswap.report import page
    from normswap.report.conversion import Report
    from normswap.report.layers import statistics_of

    if output is not None:
        atomic.check_output_dir(output)
    given, rules = parsed(options.inputs), rules_of(options.rules)
    clock = _Clock(progress)
    with clock("load"):
        original = loaded(source, options)
    asked = Request(
        example_inputs=given,
        calibration=None if options.data is None else batches_of(options.data, original.model),
        to=options.to,
        approximate=options.approximate,
        max_drift=options.max_drift,
        include=options.include,
        exclude=options.exclude,
        rules=rules,
        std=options.std,
        reestimate=options.reestimate,
        repair=options.repair,
        # A program must also load without normswap, and has no modes by which the term could be left out in eval mode.
        aux="none" if isinstance(original.model, ExportedProgram) and options.to == Request.to else Request.aux,
        coupling=options.coupling,
    )
    request = request_of(asked, original)
    output = output or Path(f"{original.stem}.normswap")
    with atomic.directory(output) as partial:
        with clock("convert and verify") as count:
            conversion, healing = convert_unchecked(original.model, request, count), None
        if heal is not None:
            with clock("heal"):
                conversion, healing = heal(conversion, original)
        form, factory = original.form, original.factory
        del original  # to free memory for the exporter's copies
        gc.collect()
        parities = {"torch": conversion.parity}
        if conversion.drift is not None:
            parities["drift"] = conversion.drift
        written: Export | None = None
        not_run: Mapping[str, str] = {"onnxruntime": "the model failed before" if options.onnx else "no ONNX file was asked for"}
        if all(parities.values()):
            with clock("save"):
                _save(conversion, partial, form, source=source, factory=factory)
            if options.onnx:
                # The file of an approximate model is compared with that model; its distance from the original is the drift.
                judgement = conversion.judgement.passed_on(conversion.module) if conversion.drift is None else None
                conversion = dataclasses.replace(conversion, judgement=judgement or conversion.judgement)
                with clock("export and verify"):
                    written, of_file = verified_export(
                        conversion.module, conversion.inputs, partial / ONNX, judgement=judgement, **options.export_options()
                    )
                parities.update(of_file.parities)
                not_run = of_file.not_run
        comparisons = Comparisons(parities, not_run)
        if comparisons.failed is not None:
            for file in partial.iterdir():
                file.unlink()
        result = Report(
            source,
            conversion.plan,
            comparisons.parities,
            not_run=comparisons.not_run,
            onnx=written,
            seconds=clock.seconds,
            files=sorted({file.name for file in partial.iterdir()} | {REPORT, PAGE}),
            fits=conversion.fits,
            healing=healing,
            statistics=statistics_of(conversion.module, conversion.plan),
            directory=str(output),
            trust=options.trust,
            trust_packages=options.trust_packages,
        )
        (partial / REPORT).write_text(json.dumps(result.json(), indent=2, allow_nan=False) + "\n", encoding="utf-8")
        (partial / PAGE).write_text(page.html(result), encoding="utf-8")
        if comparisons.failed is None:
            seal(partial)
    try:
        conversion.raise_if_failed()
        if comparisons.failed is not None:
            raise_for(comparisons.failed)
    except ParityError as error:
        error.hint = f"{output / PAGE} has every measurement; nothing else was written"
        raise
    return result, output


class _Clock:
    """Shows a stage while it runs, yields a function that counts its steps, and records how long the stage took."""

    def __init__(self, progress: Progress) -> None:
        self.progress, self.seconds = progress, dict[str, float]()

    @contextlib.contextmanager
    def __call__(self, stage: str) -> Iterator[Callable[[int, int], None]]:
        atomic.raise_if_interrupted()
        start = time.perf_counter()
        self.progress(stage, 0, None)

        def count(done: int, total: int) -> None:
            self.progress(f"{stage}: calibration", done, total)
            if done >= total:
                self.progress(stage, 0, None)

        yield count
        self.seconds[stage] = round(time.perf_counter() - start, 3)


def _save(conversion: Conversion[Any], directory: Path, form: str, **origin: str | None) -> None:
    """Write the model in the form that the original had, read it back, and compare the two. origin: for its recipe."""
    import torch
    from torch.export import ExportedProgram

    from normswap.api.directory import check_same, opened
    from normswap.files.converted import picklable, save
    from normswap.files.recipe import read_recipe
    from normswap.models.programs import as_module

    model, name = conversion.model, None
    if isinstance(model, ExportedProgram):
        name = "model.pt2"
        with atomic.writing(name):
            torch.export.save(model, directory / name)
    elif form == "module":
        name = "model.pt"
        with atomic.writing(name):
            torch.save(picklable(model), directory / name)
    module = as_module(model)
    save(module, directory, module=name, inputs=conversion.inputs, **origin)
    # The file is trusted, as this process has just written it.
    again = as_module(opened(directory, read_recipe(directory), None, trust=True))
    check_same(module, again, directory, conversion.inputs)
