"""An ONNX file, held against the model it was made from; folds that break it are undone."""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import nn

from normswap.commands.onnx_legs import attempt_of, clear, legs_of, with_provider
from normswap.commands.sources import Model
from normswap.export import Export, export
from normswap.exported import as_module
from normswap.half import arguments, halved
from normswap.inputs import Inputs
from normswap.parity import Legs
from normswap.probes import LARGE, Probe, probes, resized
from normswap.rollback import Attempt, settle
from normswap.runners import REFERENCE
from normswap.save import recipe_hash
from normswap.verify import CAP, LEVELS, Judgement, compare, judge, runtime


def verified_export(
    model: Model, inputs: Inputs, path: Path, *, judgement: Judgement | None = None, half: bool = False, **options: Any
) -> tuple[Export, Legs]:
    """Write the file, and hold it against the model it was made from, or what that was made from. Folds that break it are undone.

    half: in float16, held against the model in float64 by the limits of float16. Inputs are not scaled by 1000: its range is small.
    """
    judged = functools.partial(_judged, model, inputs, half=half)
    held = judged() if judgement is None or half else judgement
    notes = list[str]()
    if half:
        noise = max((truth.noise for outputs in held.outputs.values() for truth in outputs.values()), default=0.0)
        if not noise <= CAP[torch.float16]:
            notes.append(f"run by torch in float16, the model itself is {noise:.1e} away from float64")
    if isinstance(model, nn.Module):
        options["metadata"] = {"normswap_recipe": recipe_hash(model), **options.get("metadata", {})}
    sizes: list[tuple[Judgement, list[str]]] = []  # judged once: which axes are free does not depend on the folds

    def write(undone: Mapping[str, str]) -> Export:
        clear(path)
        return export(model, inputs.args, inputs.kwargs, path, half=half, undone=undone, **options)

    def attempt(undone: Mapping[str, str]) -> Attempt[tuple[Export, Legs]]:
        result = write(undone)
        if not sizes and _is_free(result):
            sizes.append(_other_sizes(judged, result))
            if sizes[0][1] and isinstance(model, nn.Module):
                notes.append(f"fixed: {', '.join(sizes[0][1])}; the model itself runs at no other size that was tried")
                options["dynamic"] = "batch"
                result = write(undone)
        legs, said = legs_of(held, path, dynamic=result.dynamic)
        level = LEVELS[-1] if runtime(LEVELS[-1]) in legs.parities else REFERENCE
        if _is_free(result) and sizes[0][1]:
            said = (*said, f"not verified: other sizes of {', '.join(sizes[0][1])}; the model runs at none that was tried")
        elif _is_free(result):
            other = {f"{runtime(level)}, other sizes": compare(sizes[0][0], path, level=level)}
            legs = dataclasses.replace(legs, parities={**other, **legs.parities})
        result = dataclasses.replace(result, notes=(*result.notes, *notes, *said))
        result, legs = with_provider(result, legs, held)
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
    return judge(module, *given, wide=wide, asked=usual, sites=sites, inputs=inputs_too)


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
