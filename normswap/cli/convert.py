"""`normswap convert`: SRC into a directory that holds the converted model, its ONNX file and the report."""

from __future__ import annotations

import contextlib
import dataclasses
import gc
import json
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager
from pathlib import Path
from types import MappingProxyType
from typing import Any

import torch
from torch.export import ExportedProgram

from normswap.api import convert as pipeline
from normswap.api.directory import check_same, opened, recorded
from normswap.cli.data import all_rules, batches_of
from normswap.export.verified import verified_export
from normswap.files import atomic
from normswap.files.converted import save
from normswap.files.load import load
from normswap.files.recipe import read_recipe, seal
from normswap.models.inputs import parse
from normswap.models.programs import as_module
from normswap.parity.result import Legs, ParityError
from normswap.report.conversion import Report, report
from normswap.report.onnx import export_facts
from normswap.swap.calibrate import Reestimate
from normswap.training.couple import Coupling

Advance = Callable[[int, int], None]
Progress = Callable[[str], AbstractContextManager[Advance]]
REPORT, PAGE, ONNX = "report.json", "report.html", "model.onnx"


def _silent(stage: str) -> AbstractContextManager[Advance]:
    return contextlib.nullcontext(lambda done, total: None)


def convert_files(
    source: str,
    output: Path | None,
    *,
    arch: str | None = None,
    inputs: Sequence[str] = (),
    include: Sequence[str] = (),
    exclude: Sequence[str] = (),
    rules: Sequence[str] = (),
    std: str = "log",
    data: str | None = None,
    approximate: bool = False,
    max_drift: float | None = None,
    reestimate: Reestimate | None = None,
    coupling: Coupling = "auto",
    onnx: bool = True,
    export_options: Mapping[str, Any] = MappingProxyType({}),
    trust_packages: Sequence[str] = (),
    trust: bool = False,
    progress: Progress = _silent,
) -> tuple[Report, Path]:
    """Convert SRC into a directory. export_options: those of `export_onnx`, for its model.onnx.

    Raises ParityError after writing a directory that holds the report alone.
    """
    if output is not None:
        atomic.check_output_dir(output)
    given = parse(inputs) if inputs else None
    known = all_rules(rules)
    clock = _Clock(progress)
    with clock("load"):
        loaded = load(source, arch=arch, trust_packages=trust_packages, trust=trust)
    batches = None if data is None else batches_of(data, loaded.model)
    output = output or Path(f"{loaded.stem}.normswap")
    with atomic.directory(output) as partial:
        with clock("convert and verify") as advance:
            conversion = pipeline.attempt(
                loaded.model,
                given,
                calibration=batches,
                approximate=approximate,
                max_drift=max_drift,
                include=include,
                exclude=exclude,
                rules=known,
                std=std,
                reestimate=reestimate,
                progress=advance,
                # A program is to load where there is no normswap, and without modes it cannot say that it is not for training.
                aux="none" if isinstance(loaded.model, ExportedProgram) else "auto",
                coupling=coupling,
            )
        form, factory = loaded.form, loaded.factory
        del loaded  # the original is not needed any more, and there is to be room for the exporter's copies
        gc.collect()
        parities = {"torch": conversion.parity}
        if conversion.drift is not None:
            parities["drift"] = conversion.drift
        facts: dict[str, Any] | None = None
        not_run: Mapping[str, str] = {"onnxruntime": "the model failed before" if onnx else "no ONNX file was asked for"}
        if all(parities.values()):
            with clock("save"):
                _save(conversion, partial, form=form, source=source, factory=factory)
            if onnx:
                # An approximate model is held against itself: how far it is from the original is what the drift says.
                judgement = conversion.judgement.passed_on(conversion.module) if conversion.drift is None else None
                conversion = dataclasses.replace(conversion, judgement=judgement or conversion.judgement)
                with clock("export and verify"):
                    exported, of_file = verified_export(
                        conversion.module, conversion.inputs, partial / ONNX, judgement=judgement, **export_options
                    )
                parities.update(of_file.parities)
                not_run = of_file.not_run
                facts = export_facts(exported)
        legs = Legs(parities, not_run)
        if legs.failed is not None:
            for file in partial.iterdir():
                file.unlink()
        files = sorted({file.name for file in partial.iterdir()} | {REPORT, PAGE})
        result = report(
            source,
            conversion.plan,
            legs.parities,
            not_run=legs.not_run,
            onnx=facts,
            seconds=clock.seconds,
            files=files,
            fits=map(dataclasses.asdict, conversion.fits),
        )
        (partial / REPORT).write_text(json.dumps(result.json(), indent=2, allow_nan=False) + "\n", encoding="utf-8")
        (partial / PAGE).write_text(result.html(), encoding="utf-8")
        if legs.failed is None:
            seal(partial)
    if legs.failed is not None:
        try:
            pipeline.check(legs.failed)
        except ParityError as error:
            error.hint = f"{output / PAGE} has every measurement; nothing else was written"
            raise
    return result, output


class _Clock:
    """Announces a stage while it runs, gives the function to tell how far it is, and keeps how long it took."""

    def __init__(self, progress: Progress) -> None:
        self.progress, self.seconds = progress, dict[str, float]()

    @contextlib.contextmanager
    def __call__(self, stage: str) -> Iterator[Advance]:
        atomic.raise_if_interrupted()
        start = time.perf_counter()
        with self.progress(stage) as advance:
            yield advance
        self.seconds[stage] = round(time.perf_counter() - start, 3)


def _save(conversion: pipeline.Conversion[Any], directory: Path, *, form: str, source: str, factory: str | None) -> None:
    """Write the model, read it back, and hold the two against each other."""
    model, name = conversion.model, None
    if isinstance(model, ExportedProgram):
        name = "model.pt2"
        with atomic.writing(name):
            torch.export.save(model, directory / name)
    elif form == "module":
        name = "model.pt"
        with atomic.writing(name):
            torch.save(model, directory / name)
    module = as_module(model)
    save(module, directory, source=source, factory=factory, module=name, inputs=recorded(conversion.inputs))
    # The file is trusted, as it was written a moment ago, and by this process.
    again = as_module(opened(directory, read_recipe(directory), None, trust=True))
    check_same(module, again, directory, conversion.inputs)
