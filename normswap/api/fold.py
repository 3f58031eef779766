"""`normswap fold`: the normalization of an ONNX file into its layers."""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Mapping, Sequence
from pathlib import Path

import torch

from normswap.errors import ExportError, UsageError
from normswap.export.any_file import Folded, fold, shapes_asked, sizes_known
from normswap.export.onnx_legs import attempt_of, check_legs, clear, last_word, legs_of
from normswap.export.rollback import Attempt, settle
from normswap.files import atomic, external_data
from normswap.models.inputs import Inputs, parse
from normswap.parity.judge import Judgement, judge
from normswap.parity.probes import Probe
from normswap.parity.result import Legs
from normswap.parity.runners import onnx_inputs, onnx_runner
from normswap.parity.taps import Tap

SIZES = (64, 48, 32, 128, 224, 320)  # tried, in this order, for axes that a file leaves free


def _declared(path: Path) -> Inputs | None:
    """Random inputs of the sizes that the file declares; for axes that it leaves free, of the first size at which it runs; None if none."""
    found = onnx_inputs(path) if sizes_known(path) else None
    if found is None:
        tried = (onnx_inputs(path, free=size) for size in SIZES)
        found = next((inputs for inputs in tried if inputs is not None and _runs(path, inputs)), None)
    if found is None:
        return None
    asked = shapes_asked(path)
    return Inputs(tuple(torch.full(asked[i][:1], asked[i][1]).to(x) if i in asked else x for i, x in enumerate(found)))


def _runs(path: Path, inputs: tuple[torch.Tensor, ...]) -> bool:
    try:
        onnx_runner(path, "disabled")(Probe("example", inputs, {}))
    except Exception:  # of onnxruntime, or of the inputs
        return False
    return True


def fold_onnx(source: str, output: Path, *, inputs: Sequence[str] = ()) -> Folded:
    """Fold the ONNX file SRC into `output`, after both were run on the same inputs and are the same function."""
    given = parse(inputs) if inputs else None
    path = Path(source)
    if path.is_file():
        external_data.check_locations(path)

    @functools.cache
    def judged(taps: tuple[Tap, ...]) -> Judgement:
        known = given or _declared(path)
        if known is None:
            raise UsageError(f"{source} does not say how large its inputs are", hint="give them: --input 1x3x224x224")
        return judge(path, known.args, known.kwargs, taps=taps)

    tried = 0

    def attempt(undone: Mapping[str, str]) -> Attempt[tuple[Folded, Legs]]:
        nonlocal tried
        tried += 1
        if tried > 1 and not (plain := measured(undone, shorten=False)).passed:
            return plain  # a file that is wrong although the rest stays as it is is not measured twice
        try:
            shorter = measured(undone, shorten=True)
            if shorter.passed:
                return shorter
            why = shorter.why
        except ExportError as error:
            why = error.message
        found = measured(undone, shorten=False)
        result, legs = found.result
        if not found.passed:
            return found
        result = dataclasses.replace(result, notes=(*result.notes, f"the rest of the graph stays as it is: {why}"))
        return dataclasses.replace(found, result=(result, legs))

    def measured(undone: Mapping[str, str], *, shorten: bool) -> Attempt[tuple[Folded, Legs]]:
        clear(partial)
        result = fold(path, partial, undone=undone, shorten=shorten)
        if not result.changed:
            return Attempt((result, Legs()), True)
        legs, _ = legs_of(judged(()), partial, baseline=path)
        moved = [site for site in result.sites if site.touched or site.rewritten]
        return attempt_of((result, legs), moved, undone, result.taps, partial, lambda: judged(result.original_taps))

    with atomic.file(output) as partial:
        result, legs = settle(attempt).result
        check_legs(legs)
    return dataclasses.replace(result, path=output, parity=last_word(legs), legs=legs)
