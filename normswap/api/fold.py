"""`normswap.fold_onnx`: folds the normalization of any ONNX file into its layers."""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Literal

import torch

from normswap.errors import ExportError, UsageError, one_of
from normswap.export.any_file import Folded, fold, shapes_asked, sizes_known
from normswap.export.verified import Attempt, clear, comparisons, main_result, measured, search
from normswap.files import atomic, external_data
from normswap.models.inputs import Inputs, as_inputs, parse
from normswap.parity.judge import judge
from normswap.parity.noise import baseline_of
from normswap.parity.probes import Probe
from normswap.parity.reference import Judgement
from normswap.parity.result import Comparisons, raise_for
from normswap.parity.run_onnx import LEVELS, NO_KERNEL, draws, onnx_inputs, onnx_runner

SIZES = (64, 48, 32, 128, 224, 320)  # sizes to try, in this order, for the dynamic axes of a file


def fold_onnx(source: str | Path, path: str | Path, *, inputs: Any = None, to: Literal["rmsnorm"] | None = None) -> Folded:
    """Fold the normalization in the ONNX file `source` into its layers, verify that the function is the same, and write it to `path`.

    inputs: on which both files are run: a tensor, a tuple with a tensor for each input of the graph, or specs as the command takes them,
        ["2x3x224x224", "2x16:int64"]. None: random numbers of the dtypes and sizes that the file declares; dynamic axes get the first size
        in SIZES at which the file runs. Inputs and outputs keep their names, dtypes and shapes.
    to: "rmsnorm" also makes an RMSNormalization of each LayerNormalization whose input can lose its mean: the mean is taken out of all
        constants that write the stream. The new file has opset 23 at least, where RMSNormalization is. What cannot be done stays, with a
        reason in `sites`. docs/rmsnorm.md has what is exact.

    Returns a description of the new file: where each norm went, operators before and after, and the measurement. If there is nothing to
    fold, `path` is a copy of `source`. A fold after which the comparison fails is rolled back, and named.

    Raises LoadError if `source` is not a valid ONNX file, UsageError if no inputs are known on which it runs, ExportError if `path` cannot
    be written, ParityError if the new file computes something else. None of them leaves a file.
    """
    if to is not None:
        one_of("to", to, ("rmsnorm",))
    given = _given(inputs)
    source, output = Path(source), Path(path)
    if source.is_file():
        external_data.check_locations(source)

    @functools.cache
    def judged() -> Judgement:
        known = given or _declared(source)
        if known is None:
            raise UsageError(f"{source} does not say how large its inputs are", hint="give them: --input 1x3x224x224")
        return judge(source, known.args, known.kwargs)

    tried = 0

    def attempt(kept: Mapping[str, str]) -> Attempt[tuple[Folded, Comparisons]]:
        nonlocal tried
        tried += 1
        if tried > 1 and not (plain := tried_with(kept, shorten=False)).passed:
            return plain  # it fails even without changes to the rest of the graph, so the shortened form is not measured
        try:
            shorter = tried_with(kept, shorten=True)
            if shorter.passed:
                return shorter
            why = shorter.why
        except ExportError as error:
            why = error.message
        found = tried_with(kept, shorten=False)
        result, compared = found.result
        if not found.passed:
            return found
        result = dataclasses.replace(result, notes=(*result.notes, f"the rest of the graph stays as it is: {why}"))
        return dataclasses.replace(found, result=(result, compared))

    def tried_with(kept: Mapping[str, str], *, shorten: bool) -> Attempt[tuple[Folded, Comparisons]]:
        clear(partial)
        result = fold(source, partial, kept=kept, shorten=shorten, to_rmsnorm=to == "rmsnorm")
        if not result.changed:
            return Attempt((result, Comparisons()), True)
        why = _unlike_itself(judged(), source)
        if why is None:
            compared, _ = comparisons(judged(), partial, baseline=source)
            moved = [site for site in result.sites if site.touched or site.rewritten]
            # onnxruntime draws other numbers where an operator has another place in the graph.
            why = None if compared.failed is None else draws(source)
            if why is None:
                return measured((result, compared), moved, kept)
        left = fold(source, partial, kept=dict.fromkeys((site.name for site in result.sites), f"rolled back: {why}"))
        return Attempt((left, Comparisons()), True)

    with atomic.file(output) as partial:
        result, compared = search(attempt).result
        if compared.failed is not None:
            raise_for(compared.failed)
    return dataclasses.replace(result, path=output, parity=main_result(compared), comparisons=compared)


def _given(inputs: Any) -> Inputs | None:
    if isinstance(inputs, (list, tuple)) and all(isinstance(spec, str) for spec in inputs):
        return parse(inputs) if inputs else None
    return None if inputs is None else as_inputs(inputs)


def _declared(path: Path) -> Inputs | None:
    """Random inputs of the sizes that the file declares; dynamic axes get the first of SIZES at which it runs. None if there is none.

    Some files that leave the batch size open run at 1 alone.
    """
    found = onnx_inputs(path) if sizes_known(path) else None
    if found is None:
        tried = (onnx_inputs(path, batch, size) for batch in (2, 1) for size in SIZES)
        found = next((inputs for inputs in tried if inputs is not None and _runs(path, inputs)), None)
    elif not _runs(path, found):
        found = next((inputs for inputs in [onnx_inputs(path, 1)] if inputs is not None and _runs(path, inputs)), found)
    if found is None:
        return None
    asked = shapes_asked(path)
    return Inputs(tuple(torch.full(asked[i][:1], asked[i][1]).to(x) if i in asked else x for i, x in enumerate(found)))


def _unlike_itself(judgement: Judgement, path: Path) -> str | None:
    """Why a comparison of the file with itself fails, and so that of every fold with it; None if it does not fail."""
    found = (baseline_of(judgement, path, level).wrong for level in LEVELS)
    return next((why for why in found if why is not None and NO_KERNEL not in why), None)


def _runs(path: Path, inputs: tuple[torch.Tensor, ...]) -> bool:
    try:
        onnx_runner(path, "disabled")(Probe("example", inputs, {}))
    except Exception:  # of onnxruntime, or of the inputs
        return False
    return True
