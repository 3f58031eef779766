"""`normswap landscape`: how predictable a training step is, before and after a swap."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any, Literal

from torch import nn

from normswap.api import convert as pipeline
from normswap.api.landscape import STEPS, Landscape, Mode, called_with, check_plot, landscape
from normswap.api.verify import load_any
from normswap.cli.data import batches_of, function_of
from normswap.errors import UsageError
from normswap.files import atomic
from normswap.models.programs import Model

Form = Literal["original", "converted", "coupled"]


def landscape_files(
    source: str,
    *,
    data: str | None = None,
    loss: str | None = None,
    forms: Sequence[Form] = (),
    steps: Sequence[float] = (),
    layer: str | None = None,
    mode: Mode = "train",
    plot: Path | None = None,
    arch: str | None = None,
    trust_packages: Sequence[str] = (),
    trust: bool = False,
    progress: Callable[[str, int, int], None] = lambda stage, done, total: None,
) -> Landscape:
    """`landscape` for the command line, before and after a swap.

    forms: SRC as it is, converted, and converted with coupling="auto" from the data; none for all of them if a norm of SRC can be swapped,
    else SRC as it is. steps: none for those of `landscape`.
    """
    if plot is not None:
        check_plot(plot)
    if data is None:
        raise UsageError("a landscape is measured on data, and none were given", hint="--data: batches (x, y)")
    model = load_any(source, arch=arch, trust_packages=trust_packages, trust=trust)
    batches = batches_of(data, model)
    found = landscape(
        dict(_forms(model, forms, batches)),  # type: ignore[arg-type]  # a program: that is refused there
        batches,
        loss=None if loss is None else function_of(loss, "--loss", "a function of (output, y) that returns one number"),
        steps=steps or STEPS,
        layer=layer,
        mode=mode,
        progress=progress,
    )
    if plot is not None:
        with atomic.file(plot) as partial, atomic.writing(str(plot)):
            found.plot(partial)
    return found


def _forms(model: Model, asked: Sequence[Form], data: Sequence[Any]) -> Iterator[tuple[Form, Model]]:
    calibration = [dict(probe.kwargs) or probe.args for probe, _ in called_with(data)]
    module = isinstance(model, nn.Module)  # a program has no modes, and `landscape` says so
    swapped = module and bool(pipeline.plan(model, calibration[0]).swaps)
    for form in asked or (("original", "converted", "coupled") if swapped else ("original",)):
        if form == "original":
            yield form, model
        elif not swapped:
            raise UsageError(
                f"there is nothing to measure as {form}: no norm of the model can be swapped exactly",
                hint="`normswap inspect` tells why; --as original measures the model as it is",
            )
        else:
            options: dict[str, Any] = {"coupling": "auto", "calibration": calibration} if form == "coupled" else {"coupling": "none"}
            yield form, pipeline.convert(model, calibration[0], **options).model
