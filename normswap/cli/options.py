"""The options of the commands, each written once: its name, help and default. The defaults of a conversion are in `api/request.py`.

A command has an option as a parameter, or a frozen dataclass of options as a parameter; `spread` makes an option of each field of such a
class. torch is not imported here, so that `normswap COMMAND --help` answers at once.
"""

from __future__ import annotations

import copy
import dataclasses
import functools
import inspect
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated, Any, ClassVar, Literal, get_args, get_type_hints

import typer

from normswap.api.request import Request

Source = Annotated[
    str,
    typer.Argument(
        metavar="SRC",
        help="A model file (.pt .pth .pt2 .safetensors), torchvision:NAME[@WEIGHTS], timm:NAME, hf:DIRECTORY or package.module:factory.",
    ),
]
OutputFile = Annotated[Path, typer.Option("--output", "-o", metavar="FILE", help="The .onnx file to write.")]
OutputDirectory = Annotated[Path | None, typer.Option("--output", "-o", metavar="DIR", help="Default: ./<stem of SRC>.normswap/")]
AlsoOnnx = Annotated[bool, typer.Option("--onnx/--no-onnx", help="Also write model.onnx.")]
INPUT = typer.Option("--input", metavar="SPEC", help="Example input: 1x3x224x224[:dtype], or a .pt or .npz file. Repeat for more inputs.")
Thorough = Annotated[
    bool, typer.Option("--thorough", help="Verify at every optimisation level of onnxruntime, and in onnx's own evaluator: slower.")
]
Json = Annotated[bool, typer.Option("--json", help="Print the result as JSON, and nothing else, on stdout.")]
Debug = Annotated[bool, typer.Option("--debug", help="Show the traceback of an error.")]


@dataclass(frozen=True, kw_only=True)
class Loading:
    """The options for reading a model."""

    panel: ClassVar[str] = "Reading the model"

    arch: Annotated[
        str | None,
        typer.Option("--arch", metavar="SPEC", help="What a bare state dict belongs to: torchvision:NAME, package.module:factory ..."),
    ] = None
    trust_packages: Annotated[
        list[str],
        typer.Option("--trust-package", metavar="PKG", help="Let a pickle use the nn.Module classes of this package. Repeatable."),
    ] = field(default_factory=list)
    trust: Annotated[
        bool,
        typer.Option(
            "--trust",
            "--trust-pickle",
            help="Let SRC run any code it wants, as a .pt2 must; for files you would run as a program. --trust-pickle is the old name.",
        ),
    ] = False


@dataclass(frozen=True, kw_only=True)
class Running(Loading):
    """The options for reading a model and running it on example inputs."""

    panel: ClassVar[str] = "Reading the model"

    inputs: Annotated[list[str], INPUT] = field(default_factory=list)


@dataclass(frozen=True, kw_only=True)
class Selecting:
    """The options that choose which norms are swapped, and by which rules."""

    panel: ClassVar[str] = "Which layers"

    include: Annotated[
        list[str], typer.Option("--include", metavar="GLOB", help="Swap only layers whose name or kind matches. Repeatable.")
    ] = field(default_factory=list)
    exclude: Annotated[list[str], typer.Option("--exclude", metavar="GLOB", help="Keep layers whose name or kind matches. Repeatable.")] = (
        field(default_factory=list)
    )
    rules: Annotated[
        list[str],
        typer.Option("--rule", metavar="PKG.MOD:RULE", help="A normswap.Rule for norms of your own; goes before normswap's. Repeatable."),
    ] = field(default_factory=list)


@dataclass(frozen=True, kw_only=True)
class Converting:
    """The options for the new layers and their calibration."""

    panel: ClassVar[str] = "The new layers, and calibration"

    to: Annotated[
        Literal["batchless", "weight-norm", "rmsnorm"],
        typer.Option(help="What the norms become: batchless; or, exactly, weight-norm (of BatchNorm), rmsnorm (of LayerNorm)."),
    ] = Request.to
    std: Annotated[Literal["log", "abs", "inv"], typer.Option(help="How the new layers store their standard deviation.")] = Request.std
    data: Annotated[
        str | None,
        typer.Option(
            metavar="DATA",
            help="Calibration data: a .pt file (a batch or a list of them), an .npz file, a directory of them or package.module:factory.",
        ),
    ] = None
    approximate: Annotated[
        bool, typer.Option("--approximate", help="Swap layers, too, that can only be approximated: LayerNorm, GroupNorm ... Needs --data.")
    ] = Request.approximate
    max_drift: Annotated[
        float | None, typer.Option(metavar="X", help="--approximate, but fail if an output moves by more than X of its largest value.")
    ] = Request.max_drift
    reestimate: Annotated[
        Literal["exact", "adapt"] | None,
        typer.Option(
            help="Give BatchNorms the statistics of --data: 'exact' keeps the function, 'adapt' lets it change (needs --approximate)."
        ),
    ] = Request.reestimate
    repair: Annotated[
        Literal["auto", "none"],
        typer.Option(
            help="With --approximate: 'auto' lets the linear layers around each swapped layer take back what they can; 'none' not."
        ),
    ] = Request.repair
    coupling: Annotated[
        Literal["auto", "none"],
        typer.Option(help="How it will train: 'auto' couples each layer to the conv or linear before it; 'none' makes plain layers."),
    ] = Request.coupling


@dataclass(frozen=True, kw_only=True)
class Exporting:
    """The options for an ONNX file."""

    panel: ClassVar[str] = "The ONNX file"

    target: Annotated[
        Literal["portable", "cuda"],
        typer.Option(
            help="What the ONNX file is written for: portable, ONNX operators alone; cuda, also onnxruntime's own, each with its meaning."
        ),
    ] = "portable"
    opset: Annotated[int | None, typer.Option(metavar="N", help="ONNX opset to write; default 20, or 23 for its Attention.")] = None
    dynamic: Annotated[
        Literal["batch", "spatial", "none"],
        typer.Option(help="Free sizes in the ONNX file: batch; spatial, also height, width, length; none."),
    ] = "batch"
    fp16: Annotated[bool, typer.Option("--fp16", help="ONNX file with weights, inputs and outputs in float16.")] = False
    external_data: Annotated[
        bool, typer.Option("--external-data", help="Weights of the ONNX file in FILE.data beside it; above 1.5 GiB they always are.")
    ] = False
    thorough: Thorough = False

    def export_options(self) -> dict[str, Any]:
        """The options as keyword arguments of `export_onnx`."""
        return {
            "target": self.target,
            "opset": self.opset,
            "dynamic": self.dynamic,
            "half": self.fp16,
            "external_data": self.external_data or None,
            "thorough": self.thorough,
        }


def spread(command: Callable[..., None]) -> Callable[..., None]:
    """The command with each parameter that is a dataclass replaced by one option for each field of the dataclass."""
    hints = get_type_hints(command, include_extras=True)
    groups: dict[str, Any] = {name: hint for name, hint in hints.items() if dataclasses.is_dataclass(hint)}
    parameters = []
    for parameter in inspect.signature(command).parameters.values():
        if parameter.name in groups:
            types = get_type_hints(groups[parameter.name], include_extras=True)
            for option in dataclasses.fields(groups[parameter.name]):
                default = [] if option.default is dataclasses.MISSING else option.default
                annotation = _in_panel(types[option.name], _panel(groups[parameter.name], option.name))
                parameters.append(inspect.Parameter(option.name, parameter.KEYWORD_ONLY, default=default, annotation=annotation))
        else:
            parameters.append(parameter.replace(annotation=hints[parameter.name]))

    @functools.wraps(command)
    def run(**given: Any) -> None:
        for name, group in groups.items():
            given[name] = group(**{option.name: given.pop(option.name) for option in dataclasses.fields(group)})
        command(**given)

    run.__signature__ = inspect.Signature(parameters)  # type: ignore[attr-defined]
    run.__annotations__ = {parameter.name: parameter.annotation for parameter in parameters}
    return run


def _panel(group: type, name: str) -> str | None:
    """The heading of an option in the help: that of the class that declares it."""
    owner = next(cls for cls in group.__mro__ if name in vars(cls).get("__annotations__", {}))
    return vars(owner).get("panel")


def _in_panel(annotation: Any, panel: str | None) -> Any:
    """The annotation of an option, Annotated[type, typer.Option(...)], with its heading."""
    kind, information = get_args(annotation)
    information = copy.copy(information)
    information.rich_help_panel = panel
    return Annotated[kind, information]
