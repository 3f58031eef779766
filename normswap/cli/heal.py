"""`normswap heal`: converts SRC approximately, trains the result towards SRC without labels, and writes it as `convert` does."""

from __future__ import annotations

import os
import tempfile
from dataclasses import dataclass, fields, replace
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, ClassVar

import typer

from normswap.cli.convert import ConvertOptions, convert_to_directory
from normswap.cli.options import AlsoOnnx, Debug, Exporting, Json, OutputDirectory, Running, Selecting, Source
from normswap.cli.terminal import Progress, print_json, print_tables, work
from normswap.files import atomic

if TYPE_CHECKING:
    from normswap.api.convert import Conversion
    from normswap.api.heal import DivergedError, Healing
    from normswap.api.request import Request
    from normswap.files.load import Loaded
    from normswap.report.conversion import Report

CALIBRATION = 40_000  # positions, of which the conversion is calibrated and repaired
MINUTES = 15.0  # where no budget is given
RANKED = 8  # batches, on which --keep ranks the norms


@dataclass(frozen=True, kw_only=True)
class Training:
    """The options for training towards the original."""

    panel: ClassVar[str] = "Healing"

    data: Annotated[
        str | None,
        typer.Option(
            metavar="DATA",
            help="A directory of images; text files or a directory of them, for an hf: model or with --tokenizer; or as for convert. "
            "The first part calibrates.",
        ),
    ] = None
    minutes: Annotated[float | None, typer.Option(metavar="M", help=f"How long to train; default {MINUTES:g}, without --tokens.")] = None
    tokens: Annotated[int | None, typer.Option(metavar="N", help="How many tokens, or samples, to train on.")] = None
    keep: Annotated[int, typer.Option(metavar="K", help="Keep the K norms whose removal alone costs most.")] = 0
    lr: Annotated[float | None, typer.Option(metavar="X", help="Learning rate of Adam; default 2e-4.")] = None
    loss: Annotated[
        str | None,
        typer.Option(
            metavar="SPEC",
            help="Added to the distance: kl, for outputs that are scores of classes or tokens; or package.module:callable, which takes "
            "a batch, the output, and that of SRC.",
        ),
    ] = None
    accumulate: Annotated[int, typer.Option(metavar="N", help="Batches in a step, of all processes together.")] = 1
    metric: Annotated[
        str | None,
        typer.Option(metavar="SPEC", help="Measured before and after: package.module:callable, which takes the model; or neighbours."),
    ] = None
    tokenizer: Annotated[
        str | None, typer.Option(metavar="DIR", help="Of transformers, for data that are text; default: the directory of an hf: model.")
    ] = None
    length: Annotated[int, typer.Option(metavar="N", help="Tokens of a text at most, for data that are text.")] = 128


@dataclass(frozen=True, kw_only=True)
class HealOptions(Exporting, Training, Selecting, Running):
    """Every option of the command."""

    onnx: AlsoOnnx = True


def heal(
    source: Source,
    output: OutputDirectory = None,
    *,
    options: HealOptions,
    as_json: Json = False,
    debug: Debug = False,
) -> None:
    """Swap LayerNorm and the like, and train the result back to the original.

    Converts approximately, repairs, then trains the result, without labels, to put out what SRC puts out, and saves it as convert
    does. An interrupted run goes on where it was if the same command is given again. Under torchrun, several processes share each step.
    """
    with work(debug) as progress:
        from normswap.report.conversion import calibration_table, report_table

        report, directory, raised = _healed(source, output, options, progress)
    if directory is not None:
        if as_json:
            print_json(report.json())
        else:
            text = f"{report.summary()}\n  written to {directory}{os.sep}"
            print_tables(report_table(report), calibration_table(report), text=text)
    with work(debug):
        if raised is not None:
            raise raised


def _healed(source: str, output: Path | None, options: HealOptions, progress: Progress) -> tuple[Report, Path | None, DivergedError | None]:
    """(the report, the directory, an error to raise when both are shown). There is no directory in any process but the first."""
    from normswap.api.convert import with_model
    from normswap.api.heal import diverged, healed, settings_of
    from normswap.cli.data import Stream, loss_of, metric_of, stream_of
    from normswap.errors import UsageError
    from normswap.healing.processes import joined

    if output is not None:
        atomic.check_output_dir(output)
    if options.data is None:
        raise UsageError("healing learns from data, and none were given", hint="give --data: text files, tensors, package.module:factory")
    if options.keep < 0 or options.length < 1:
        raise UsageError(f"--keep is {options.keep} and --length {options.length}; expected 0 or more, and 1 or more")
    minutes = MINUTES if options.minutes is None and options.tokens is None else options.minutes
    settings = settings_of(minutes=minutes, tokens=options.tokens, lr=options.lr, accumulate=options.accumulate, loss=loss_of(options.loss))
    metric = metric_of(options.metric)
    states: list[Path] = []
    stream: Stream
    calibration: list[Any]
    raised: DivergedError | None = None

    def request_of(request: Request, loaded: Loaded) -> Request:
        nonlocal stream, calibration
        stream = stream_of(options.data or "", loaded.model, source, options, options.tokenizer, options.length)
        calibration = stream.first(CALIBRATION)
        request = replace(request, calibration=calibration, approximate=True)
        return replace(request, exclude=(*request.exclude, *_kept(loaded.model, request, options.keep, progress)))

    def heal(conversion: Conversion[Any], loaded: Loaded) -> tuple[Conversion[Any], Healing[Any] | None]:
        nonlocal raised
        if not conversion.parity:
            return conversion, None  # the report says why
        if not conversion.plan.swaps:
            raise UsageError("no norm is swapped, so there is nothing to heal", hint="normswap inspect says why each one stays")
        if conversion.drift is None:
            raise UsageError("every swap is exact, so there is nothing to heal", hint="normswap convert does it, and needs no data")
        if stream.note is not None:
            conversion = replace(conversion, plan=replace(conversion.plan, notes=(*conversion.plan.notes, stream.note)))
        directory = Path(os.path.abspath(output or f"{loaded.stem}.normswap"))
        states.append(directory.with_name(f"{directory.name}.healing"))
        found = healed(
            conversion,
            loaded.model,
            stream.batches,
            settings,
            held_out=stream.held_out,
            metric=metric,
            checkpoint=states[0],
            progress=lambda distance, done, total: progress(f"heal, distance {distance:.3f}", done, total),
        )
        raised = diverged(found) if found.diverged else None
        return with_model(conversion, found.model, loaded.model, calibration), found

    shared = {f.name: getattr(options, f.name) for f in fields(ConvertOptions) if hasattr(options, f.name) and f.name != "data"}
    converting = ConvertOptions(**shared)
    with joined() as rank:
        if rank == 0:
            report, written = convert_to_directory(source, output, converting, progress, request_of=request_of, heal=heal)
            for state in states:  # kept until the result is written
                state.unlink(missing_ok=True)
            return report, written, raised
        with tempfile.TemporaryDirectory() as scratch:  # what the first process writes is the result
            report, _ = convert_to_directory(
                source, Path(scratch) / "other", replace(converting, onnx=False), request_of=request_of, heal=heal
            )
            return report, None, raised


def _kept(model: Any, request: Request, count: int, progress: Progress) -> list[str]:
    """The globs of the norms whose removal alone costs most."""
    from normswap.api.sensitivity import glob_of, sensitivity
    from normswap.errors import UsageError

    if not count:
        return []
    batches = list(request.calibration or ())[:RANKED]
    options: Any = {"include": request.include, "exclude": request.exclude, "rules": request.rules, "progress": progress}
    found = sensitivity(model, batches, request.example_inputs, **options)
    approximate = [layer.name for layer in found.layers if layer.preserves == "approximate"]
    if count >= len(approximate):
        raise UsageError(
            f"--keep is {count}, and {len(approximate)} norms would be swapped approximately, so none would be left to heal",
            hint="keep fewer of them",
        )
    return [glob_of(name) for name in approximate[-count:]]
