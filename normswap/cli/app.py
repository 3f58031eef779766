"""The command line: parses, calls `commands`, prints, exits. Decides nothing.

Results go to stdout, everything else to stderr. Exit codes: 0 done, 1 cannot convert, 2 usage, 3 converted but parity failed, 130 Ctrl-C.
torch and the stages are imported when a command runs, so that `normswap --help` answers at once.
"""

from __future__ import annotations

import contextlib
import json
import os
import sys
import traceback
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager
from enum import Enum
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from normswap.errors import NormswapError, shown
from normswap.files import atomic
from normswap.versions import version_of

if TYPE_CHECKING:
    from rich.console import Console, RenderableType
    from rich.table import Table
    from rich.text import Text

INTERRUPTED = 130  # 128 + SIGINT, as shells have it
PARITY_FAILED = 3

app = typer.Typer(
    help="Swap the normalization of a trained PyTorch model for Batchless normalization, without changing an output.",
    no_args_is_help=True,
    add_completion=False,
    rich_markup_mode=None,  # rich would double the time of --help
    pretty_exceptions_enable=False,
)


class Std(str, Enum):
    """How the standard deviation is stored."""

    log = "log"
    abs = "abs"
    inv = "inv"


class Reestimate(str, Enum):
    """Whether layers that have statistics get those of the data, and what that does to the function."""

    exact = "exact"
    adapt = "adapt"


class Coupling(str, Enum):
    """Whether the statistics of a layer train with the weight of the conv or linear before it."""

    auto = "auto"
    none = "none"


Source = Annotated[
    str,
    typer.Argument(
        metavar="SRC",
        help="A model file (.pt .pth .pt2 .safetensors), torchvision:NAME[@WEIGHTS], timm:NAME, hf:DIRECTORY or package.module:factory.",
    ),
]
Arch = Annotated[
    str | None,
    typer.Option("--arch", metavar="SPEC", help="What a bare state dict belongs to: torchvision:NAME, package.module:factory ..."),
]
Inputs = Annotated[
    list[str] | None,
    typer.Option("--input", metavar="SPEC", help="Example input: 1x3x224x224[:dtype], or a .pt or .npz file. Repeat for more inputs."),
]
Include = Annotated[
    list[str] | None, typer.Option("--include", metavar="GLOB", help="Swap only layers whose name or kind matches. Repeatable.")
]
Exclude = Annotated[list[str] | None, typer.Option("--exclude", metavar="GLOB", help="Keep layers whose name or kind matches. Repeatable.")]
Rules = Annotated[
    list[str] | None,
    typer.Option("--rule", metavar="PKG.MOD:RULE", help="A normswap.Rule for norms of your own; goes before normswap's. Repeatable."),
]
Opset = Annotated[int | None, typer.Option("--opset", metavar="N", help="ONNX opset to write; default 20, or 23 for its Attention.")]
Fp16 = Annotated[bool, typer.Option("--fp16", help="ONNX file with weights, inputs and outputs in float16.")]
ExternalData = Annotated[
    bool, typer.Option("--external-data", help="Weights of the ONNX file in FILE.data beside it; above 1.5 GiB they always are.")
]


Thorough = Annotated[
    bool, typer.Option("--thorough", help="Verify at every optimisation level of onnxruntime, and in onnx's own evaluator: slower.")
]


class Dynamic(str, Enum):
    """Which sizes of the inputs an ONNX file leaves free."""

    batch = "batch"
    spatial = "spatial"
    none = "none"


Free = Annotated[Dynamic, typer.Option("--dynamic", help="Free sizes in the ONNX file: batch; spatial, also height, width, length; none.")]


class Target(str, Enum):
    """What an ONNX file is written for."""

    portable = "portable"
    ort_cpu = "ort-cpu"
    ort_fused = "ort-fused"


For = Annotated[
    Target,
    typer.Option(
        "--target",
        help="What the ONNX file is written for: portable, operators of ONNX alone; ort-cpu, the same in the form that is fastest in "
        "onnxruntime on a CPU; ort-fused, also onnxruntime's own operators.",
    ),
]
TrustPackage = Annotated[
    list[str] | None,
    typer.Option("--trust-package", metavar="PKG", help="Let a pickle use the nn.Module classes of this installed package. Repeatable."),
]
Trust = Annotated[
    bool,
    typer.Option(
        "--trust",
        "--trust-pickle",
        help="Let SRC run any code it wants, as a .pt2 must; for files that you would run as a program. --trust-pickle is the old name.",
    ),
]
Json = Annotated[bool, typer.Option("--json", help="Print the result as JSON, and nothing else, on stdout.")]
Debug = Annotated[bool, typer.Option("--debug", help="Show the traceback of an error.")]


def _version(wanted: bool) -> None:
    if wanted:
        typer.echo(f"normswap {version_of('normswap')}")
        raise typer.Exit


@app.callback()
def options(
    version: Annotated[bool, typer.Option("--version", callback=_version, is_eager=True, help="Print the version and exit.")] = False,
) -> None:
    pass


@app.command()
def convert(
    source: Source,
    output: Annotated[Path | None, typer.Option("--output", "-o", metavar="DIR", help="Default: ./<stem of SRC>.normswap/")] = None,
    arch: Arch = None,
    inputs: Inputs = None,
    include: Include = None,
    exclude: Exclude = None,
    rules: Rules = None,
    std: Annotated[Std, typer.Option(help="How the new layers store their standard deviation.")] = Std.log,
    data: Annotated[
        str | None,
        typer.Option(
            metavar="DATA",
            help="Calibration data: a .pt file (a batch or a list of them), an .npz file, a directory of them or package.module:factory.",
        ),
    ] = None,
    approximate: Annotated[
        bool, typer.Option("--approximate", help="Swap layers, too, that can only be approximated: LayerNorm, GroupNorm ... Needs --data.")
    ] = False,
    max_drift: Annotated[
        float | None, typer.Option(metavar="X", help="--approximate, but fail if an output moves by more than X of its largest value.")
    ] = None,
    reestimate: Annotated[
        Reestimate | None,
        typer.Option(
            help="Give BatchNorms the statistics of --data: 'exact' keeps the function, 'adapt' lets it change (needs --approximate)."
        ),
    ] = None,
    coupling: Annotated[
        Coupling,
        typer.Option(help="How it will train: 'auto' couples each layer to the conv or linear before it; 'none' makes plain layers."),
    ] = Coupling.auto,
    onnx: Annotated[bool, typer.Option("--onnx/--no-onnx", help="Also write model.onnx.")] = True,
    target: For = Target.portable,
    opset: Opset = None,
    dynamic: Free = Dynamic.batch,
    fp16: Fp16 = False,
    external_data: ExternalData = False,
    thorough: Thorough = False,
    trust_package: TrustPackage = None,
    trust: Trust = False,
    as_json: Json = False,
    debug: Debug = False,
) -> None:
    """Swap every norm it can, prove it, save it.

    Swaps every normalization that can be swapped exactly, proves that the outputs are the same, saves the model, exports it to ONNX and
    proves that too.
    """
    with _work(debug) as progress:
        from normswap.cli.convert import convert_files

        report, directory = convert_files(
            source,
            output,
            arch=arch,
            inputs=inputs or (),
            include=include or (),
            exclude=exclude or (),
            rules=rules or (),
            std=std.value,
            data=data,
            approximate=approximate,
            max_drift=max_drift,
            reestimate=None if reestimate is None else reestimate.value,
            coupling=coupling.value,
            onnx=onnx,
            export_options=_export_options(target, opset, dynamic, fp16, external_data, thorough),
            trust_packages=trust_package or (),
            trust=trust,
            progress=progress,
        )
    if as_json:
        _print_json(report.json())
    else:
        _print_table(report.table(), report.summary(), f"  written to {directory}{os.sep}", second=report.calibration_table())


@app.command()
def inspect(
    source: Source,
    arch: Arch = None,
    inputs: Inputs = None,
    include: Include = None,
    exclude: Exclude = None,
    rules: Rules = None,
    trust_package: TrustPackage = None,
    trust: Trust = False,
    as_json: Json = False,
    debug: Debug = False,
) -> None:
    """List every norm and what would happen.

    Lists every normalization of a model: what would happen to it, and why not. Changes and writes nothing.
    """
    with _work(debug):
        from normswap.cli.inspect import inspect_files

        report = inspect_files(
            source,
            arch=arch,
            inputs=inputs or (),
            include=include or (),
            exclude=exclude or (),
            rules=rules or (),
            trust_packages=trust_package or (),
            trust=trust,
        )
    if as_json:
        _print_json(report.json())
    else:
        _print_table(report.table(), report.summary())


@app.command()
def verify(
    reference: Annotated[str, typer.Argument(metavar="REFERENCE", help="A model file, a converted directory or an .onnx file.")],
    candidate: Annotated[str, typer.Argument(metavar="CANDIDATE", help="The same; it must compute what REFERENCE computes.")],
    arch: Arch = None,
    inputs: Inputs = None,
    tolerance: Annotated[
        float | None, typer.Option(metavar="X", help="Largest max|difference| / max|reference| that passes; default: by precision.")
    ] = None,
    thorough: Thorough = False,
    trust_package: TrustPackage = None,
    trust: Trust = False,
    as_json: Json = False,
    debug: Debug = False,
) -> None:
    """Measure whether two models are the same.

    Measures whether CANDIDATE computes what REFERENCE computes; exits with 3 if it does not, naming the first layer that differs.
    """
    with _work(debug):
        from normswap.api.verify import verify_files
        from normswap.report.parity import parity_json, parity_summary, parity_table

        parity = verify_files(
            reference,
            candidate,
            arch=arch,
            inputs=inputs or (),
            tolerance=tolerance,
            thorough=thorough,
            trust_packages=trust_package or (),
            trust=trust,
        )
    if as_json:
        _print_json(parity_json(parity))
    else:
        _print_table(parity_table(parity), parity_summary(parity))
    if not parity.passed:
        raise typer.Exit(PARITY_FAILED)


@app.command()
def export(
    source: Annotated[str, typer.Argument(metavar="SRC", help="A converted directory, or a model as for `convert`.")],
    output: Annotated[Path, typer.Option("--output", "-o", metavar="FILE", help="The .onnx file to write.")],
    arch: Arch = None,
    inputs: Inputs = None,
    target: For = Target.portable,
    opset: Opset = None,
    dynamic: Free = Dynamic.batch,
    fp16: Fp16 = False,
    external_data: ExternalData = False,
    thorough: Thorough = False,
    trust_package: TrustPackage = None,
    trust: Trust = False,
    as_json: Json = False,
    debug: Debug = False,
) -> None:
    """Write an ONNX file and prove it.

    Writes an ONNX file with the normalization folded away, and proves that it is the same function.
    """
    with _work(debug):
        from normswap.api.export import export_files
        from normswap.report.onnx import export_json, export_summary

        result = export_files(
            source,
            output,
            inputs=inputs or (),
            arch=arch,
            trust_packages=trust_package or (),
            trust=trust,
            **_export_options(target, opset, dynamic, fp16, external_data, thorough),
        )
    if as_json:
        _print_json(export_json(result))
    else:
        _say(export_summary(result))


@app.command()
def fold(
    source: Annotated[str, typer.Argument(metavar="MODEL.ONNX", help="Any ONNX file.")],
    output: Annotated[Path, typer.Option("--output", "-o", metavar="FILE", help="The .onnx file to write.")],
    inputs: Inputs = None,
    as_json: Json = False,
    debug: Debug = False,
) -> None:
    """Fold the normalization of an ONNX file.

    Folds what normalization an ONNX file holds into its layers, and proves that it is the same function. If there is nothing to fold, the
    file is copied as it is.
    """
    with _work(debug):
        from normswap.api.fold import fold_onnx
        from normswap.report.fold import fold_json, fold_summary, fold_table, operators_table

        result = fold_onnx(source, output, inputs=inputs or ())
    if as_json:
        _print_json(fold_json(source, result))
    else:
        _print_table(fold_table(result), fold_summary(result), second=operators_table(result))


@app.command()
def revert(
    source: Annotated[str, typer.Argument(metavar="DIR", help="A converted directory.")],
    output: Annotated[Path, typer.Option("--output", "-o", metavar="FILE", help="The model file to write.")],
    skip: Annotated[bool, typer.Option("--skip", help="Leave layers as they are whose originals were not recorded.")] = False,
    arch: Arch = None,
    trust_package: TrustPackage = None,
    trust: Trust = False,
    debug: Debug = False,
) -> None:
    """Give a converted model its BatchNorm back.

    A layer that was not trained gets its recorded statistics bit for bit; a trained one gets variance = std^2 - eps.
    """
    with _work(debug):
        from normswap.cli.revert import revert_files

        path = revert_files(source, output, skip=skip, arch=arch, trust_packages=trust_package or (), trust=trust)
    _say(f"wrote {path}")


class By(str, Enum):
    """What layers are ranked by."""

    rel_l2 = "rel_l2"
    max_rel = "max_rel"
    change = "change"


@app.command()
def sensitivity(
    source: Source,
    data: Annotated[
        str | None,
        typer.Option(metavar="DATA", help="What to measure on: a .pt or .npz file, a directory of them or package.module:factory."),
    ] = None,
    arch: Arch = None,
    inputs: Inputs = None,
    metric: Annotated[
        str | None, typer.Option(metavar="SPEC", help="package.module:callable, which takes the model and returns a number.")
    ] = None,
    by: Annotated[By, typer.Option(help="What to rank by, and what the budget bounds; change is that of the metric.")] = By.rel_l2,
    budget: Annotated[
        float | None, typer.Option(metavar="X", help="Choose layers that, swapped together, were measured to change at most X.")
    ] = None,
    include: Include = None,
    exclude: Exclude = None,
    rules: Rules = None,
    resume: Annotated[
        Path | None, typer.Option(metavar="FILE", help="Keep what was measured in FILE, and measure nothing again that is in it.")
    ] = None,
    trust_package: TrustPackage = None,
    trust: Trust = False,
    as_json: Json = False,
    debug: Debug = False,
) -> None:
    """Rank layers by what swapping them costs.

    Swaps one layer at a time, measures what that does to the outputs, and ranks the layers. With --budget, chooses those that can be
    swapped together. Writes nothing but the file of --resume.
    """
    with _work(debug), _bar() as progress:
        from normswap.cli.sensitivity import sensitivity_files
        from normswap.report.sensitivity import sensitivity_json, sensitivity_summary, sensitivity_table

        found = sensitivity_files(
            source,
            data=data,
            arch=arch,
            inputs=inputs or (),
            metric=metric,
            by=by.value,
            budget=budget,
            include=include or (),
            exclude=exclude or (),
            rules=rules or (),
            resume=resume,
            trust_packages=trust_package or (),
            trust=trust,
            progress=progress,
        )
    if as_json:
        _print_json(sensitivity_json(source, found))
    else:
        _print_table(sensitivity_table(found), sensitivity_summary(found, data))


class Form(str, Enum):
    """As what SRC is measured."""

    original = "original"
    converted = "converted"
    coupled = "coupled"


class Mode(str, Enum):
    """The mode of the model."""

    train = "train"
    eval = "eval"


@app.command()
def landscape(
    source: Annotated[str, typer.Argument(metavar="SRC", help="A model as for `convert`, or a converted directory.")],
    data: Annotated[
        str | None,
        typer.Option(metavar="DATA", help="Batches (x, y): a .pt or .npz file, a directory of them or package.module:factory."),
    ] = None,
    loss: Annotated[
        str | None,
        typer.Option(metavar="SPEC", help="package.module:function of (output, y) that returns one number. Default: cross entropy."),
    ] = None,
    forms: Annotated[
        list[Form] | None,
        typer.Option("--as", help="Measure SRC as this only. Repeatable; default: as all three, if a norm can be swapped."),
    ] = None,
    steps: Annotated[
        list[float] | None,
        typer.Option("--step", metavar="ETA", help="A step along the gradient. Repeatable; default: 0.001 0.003 0.01 0.03 0.1 0.3."),
    ] = None,
    layer: Annotated[str | None, typer.Option(metavar="NAME", help="The gradient by the parameters of this layer alone.")] = None,
    mode: Annotated[
        Mode, typer.Option(help="The mode of the model; in train, a BatchNorm takes the statistics of the batch.")
    ] = Mode.train,
    plot: Annotated[Path | None, typer.Option(metavar="FILE", help="Also draw it: a .svg, .png or .pdf file. Needs matplotlib.")] = None,
    arch: Arch = None,
    trust_package: TrustPackage = None,
    trust: Trust = False,
    as_json: Json = False,
    debug: Debug = False,
) -> None:
    """Measure how predictable a training step is.

    Measures how far the loss and the gradient move along the gradient, on each batch, before and after the norms are swapped. Writes
    nothing but the file of --plot.
    """
    with _work(debug), _bar() as progress:
        from normswap.cli.landscape import landscape_files
        from normswap.report.landscape import landscape_json, landscape_summary, landscape_table

        found = landscape_files(
            source,
            data=data,
            loss=loss,
            forms=[form.value for form in forms or ()],
            steps=steps or (),
            layer=layer,
            mode=mode.value,
            plot=plot,
            arch=arch,
            trust_packages=trust_package or (),
            trust=trust,
            progress=progress,
        )
    if as_json:
        _print_json(landscape_json(source, found, loss))
    else:
        _print_table(landscape_table(found), landscape_summary(found), *(() if plot is None else (f"  drawn in {plot}",)))


def _export_options(target: Target, opset: int | None, dynamic: Dynamic, fp16: bool, external_data: bool, thorough: bool) -> dict[str, Any]:
    """As `export_onnx` takes them."""
    return {
        "target": target.value,
        "opset": opset,
        "dynamic": dynamic.value,
        "half": fp16,
        "external_data": external_data or None,
        "thorough": thorough,
    }


def main() -> None:
    """The `normswap` command."""
    app(prog_name="normswap")


# -- around a command ------------------------------------------------------------------------------------------------------------

Advance = Callable[[int, int], None]
Progress = Callable[[str], AbstractContextManager[Advance]]


@contextlib.contextmanager
def _work(debug: bool) -> Iterator[Progress]:
    """What a command does before it prints its result: nothing reaches stdout, and every error ends as an exit code.

    Gives the function that announces a stage while it runs.
    """
    try:
        # models print while they load, and torch's exporter prints its progress
        with contextlib.redirect_stdout(sys.stderr), atomic.remember_interrupts():
            yield _progress()
    except NormswapError as error:
        _fail(f"error: {error.message}", f"hint: {error.hint}" if error.hint else "", code=error.exit_code, debug=debug)
    except KeyboardInterrupt:
        _fail("interrupted", code=INTERRUPTED, debug=debug)
    except OSError as error:
        where = f"{error.filename}: " if error.filename is not None else ""
        _fail(f"error: {where}{error.strerror or error}", code=1, debug=debug)
    except Exception as error:
        what = (str(error).strip().splitlines() or ["no message"])[0]
        hint = "" if debug else "hint: normswap did not expect this; run it again with --debug to see where it comes from"
        _fail(f"error: {type(error).__name__}: {what}", hint, code=1, debug=debug)


def _fail(*lines: str, code: int, debug: bool) -> None:
    if debug:
        _say(traceback.format_exc(), err=True)
    for line in filter(None, lines):
        _say(line, err=True)
    raise typer.Exit(code) from None


def _progress() -> Progress:
    """On a terminal a spinner with the stage's name, which is a bar with the time left while the stage counts; silence elsewhere."""
    from rich.console import Console

    console = Console(stderr=True)
    if not console.is_terminal:
        return lambda stage: contextlib.nullcontext(lambda done, total: None)
    return lambda stage: _stage(console, stage)


@contextlib.contextmanager
def _stage(console: Console, stage: str) -> Iterator[Advance]:
    """Shows one stage on the terminal, and gives the function to tell how far it is."""
    from rich.progress import BarColumn, MofNCompleteColumn, TextColumn, TimeRemainingColumn
    from rich.progress import Progress as Bar

    columns = (TextColumn("{task.description}", markup=False), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn())

    with contextlib.ExitStack() as visible:  # one at a time: the spinner, or the bar
        visible.enter_context(console.status(f"{stage} ..."))
        running: list[Bar] = []

        def advance(done: int, total: int) -> None:
            if not running:
                visible.close()
                running.append(Bar(*columns, console=console, transient=True))
                running[0].add_task(f"{stage}: calibration", total=total)
                visible.enter_context(running[0])
            running[0].update(running[0].task_ids[0], completed=done, total=total)
            if done >= total:
                running.clear()
                visible.close()
                visible.enter_context(console.status(f"{stage} ..."))

        yield advance


@contextlib.contextmanager
def _bar() -> Iterator[Callable[[str, int, int], None]]:
    """Gives the function that shows how far a stage is, with the time left, on a terminal; silence elsewhere."""
    from rich import progress
    from rich.console import Console

    console = Console(stderr=True)
    if not console.is_terminal:
        yield lambda stage, done, total: None
        return
    columns = (
        progress.TextColumn("{task.description}", markup=False),
        progress.BarColumn(),
        progress.MofNCompleteColumn(),
        progress.TimeRemainingColumn(),
    )
    with progress.Progress(*columns, console=console, transient=True) as bar:
        tasks: dict[str, progress.TaskID] = {}

        def show(stage: str, done: int, total: int) -> None:
            for other in [name for name in tasks if name != stage]:
                bar.remove_task(tasks.pop(other))
            if stage not in tasks:
                tasks[stage] = bar.add_task(shown(stage, line=True))
            bar.update(tasks[stage], completed=done, total=total)

        yield show


def _print_json(result: dict[str, Any]) -> None:
    typer.echo(json.dumps(result, indent=2, allow_nan=False))


def _print_table(table: Table, *lines: str, second: Table | None = None) -> None:
    from rich.console import Console
    from rich.text import Text

    console = Console()
    if not console.is_terminal and "COLUMNS" not in os.environ:
        console.width = 160  # rich takes a pipe for 80 columns wide and breaks names in two
    for each in (table, second):
        if each is not None and each.row_count:
            for column in each.columns:
                column._cells = [Text(shown(cell.plain, line=True), style=cell.style) for cell in map(_text, column._cells)]
            console.print(each)
    _say("\n".join(lines))


def _text(cell: RenderableType) -> Text:
    """A str is not read as markup: it may hold the name of a layer."""
    from rich.text import Text

    return cell if isinstance(cell, Text) else Text(str(cell))


def _say(text: str, *, err: bool = False) -> None:
    typer.echo(shown(text), err=err)
