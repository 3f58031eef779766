"""An ONNX file, held against the model it was made from; folds that break it are undone."""

from __future__ import annotations

import dataclasses
import functools
import tempfile
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import nn

from normswap.export.float16 import arguments, halved
from normswap.export.onnx_legs import attempt_of, clear, legs_of, with_provider
from normswap.export.rollback import Attempt, settle
from normswap.export.to_onnx import Dynamic, Export, Program
from normswap.files.recipe import recipe_hash
from normswap.models.inputs import Inputs
from normswap.models.programs import Model, as_module
from normswap.parity.judge import compare, judge
from normswap.parity.limits import CAP
from normswap.parity.probes import LARGE, Probe, probes, resized
from normswap.parity.reference import Judgement
from normswap.parity.result import Comparisons
from normswap.parity.run_onnx import LEVELS, REFERENCE, runtime


def verified_export(
    model: Model,
    inputs: Inputs,
    path: Path,
    *,
    judgement: Judgement | None = None,
    half: bool = False,
    thorough: bool = False,
    dynamic: bool | Dynamic = True,
    **options: Any,
) -> tuple[Export, Comparisons]:
    """Write the file, and hold it against the model it was made from, or what that was made from. Folds that break it are undone.

    half: in float16, held against the model in float64 by the limits of float16. Inputs are not scaled by 1000: its range is small.
    thorough: verified at every optimisation level, and in onnx's evaluator. judgement: of the model, if it was judged before.
    """
    judged = functools.partial(_judged, model, inputs, half=half)
    held = judged() if judgement is None or half else judgement
    notes = list[str]()
    if half:
        noise = max((truth.noise for key, truth in held.truths.items() if not key.site), default=0.0)
        if not noise <= CAP[torch.float16]:
            notes.append(f"run by torch in float16, the model itself is {noise:.1e} away from float64")
    if isinstance(model, nn.Module):
        options["metadata"] = {"normswap_recipe": recipe_hash(model), **options.get("metadata", {})}
    program = Program(model, inputs.args, inputs.kwargs, half=half, dynamic=dynamic, **options)
    clear(path)
    first = program.write(path)
    others: tuple[Judgement, list[str]] | None = None
    if _is_free(first):
        others = _other_sizes(judged, first)
        if others[1] and isinstance(model, nn.Module):
            notes.append(f"fixed: {', '.join(others[1])}; the model itself runs at no other size that was tried")
            program = Program(model, inputs.args, inputs.kwargs, half=half, dynamic="batch", **options)
            first, others = program.write(path), None
        elif others[1]:
            notes.append(f"not verified: other sizes of {', '.join(others[1])}; the model runs at none that was tried")
            others = None
    with tempfile.TemporaryDirectory(prefix=".baseline-", dir=path.parent) as folder:
        before = Path(folder) / "baseline.onnx"
        # In half precision the noise is that of torch: onnxruntime 1.32 crashes on the casts around norms that are left in such a graph.
        baseline = before if not half and program.write_baseline(before) else None

        def attempt(undone: Mapping[str, str]) -> Attempt[tuple[Export, Comparisons]]:
            result = first
            if undone:
                clear(path)
                result = program.write(path, undone)
            legs, said = legs_of(held, path, dynamic=result.dynamic, baseline=baseline, thorough=thorough)
            if others is not None:
                level = LEVELS[-1] if runtime(LEVELS[-1]) in legs.parities else REFERENCE
                other = {f"{runtime(level)}, other sizes": compare(others[0], path, level=level, baseline=baseline)}
                legs = dataclasses.replace(legs, parities={**other, **legs.parities})
            result = dataclasses.replace(result, notes=(*result.notes, *notes, *said))
            result, legs = with_provider(result, legs, held, baseline)
            names = list(dict.fromkeys(site.name for site in result.sites))
            tapped = functools.partial(judged, sites=names, inputs_too=True)
            return attempt_of((result, legs), result.sites, undone, result.taps, path, tapped, dynamic=result.dynamic)

        return settle(attempt).result


def _judged(
    model: Model,
    inputs: Inputs,
    asked: Callable[[tuple[Any, ...], Mapping[str, Any]], list[Probe]] | None = None,
    *,
    half: bool,
    sites: Sequence[str] = (),
    inputs_too: bool = False,
) -> Judgement:
    """What the model gives, or what it gives in float16. asked: makes the probes, in place of the usual ones."""
    module, given, wide = as_module(model), (inputs.args, dict(inputs.kwargs)), None
    if half:
        module, given, wide = halved(module), arguments(given), module
    usual = [probe for probe in probes(*given) if not (half and probe.name.endswith(LARGE))] if asked is None else asked(*given)
    return judge(module, *given, unrounded=wide, asked=usual, sites=sites)


def _is_free(result: Export) -> bool:
    """Whether more than the batch size is."""
    return any(axis for found in result.free for axis in found)


def _other_sizes(judged: Callable[..., Judgement], result: Export) -> tuple[Judgement, list[str]]:
    """(what the model gives at other sizes than the example's, the free axes of which the model takes no other size)."""
    others: list[tuple[str, Probe]] = []

    def asked(args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> list[Probe]:
        others.extend(resized(args, kwargs, result.free))
        return [Probe("example", args, kwargs), *(probe for _, probe in others)]

    judgement = judged(asked)
    usable = {probe.name for probe in judgement.probes}
    seen = {axis for axis, probe in others if probe.name in usable}
    return judgement, [axis for axis in dict.fromkeys(axis for axis, _ in others) if axis not in seen]
