"""`normswap verify`, and `normswap.verify`: whether two models, directories or files compute the same."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from torch import nn

from normswap.api.convert import given_to
from normswap.api.sources import Model, inputs_of, load_any
from normswap.errors import LoadError, UsageError
from normswap.files import external_data
from normswap.files.recipe import sites_of
from normswap.models.inputs import Inputs, as_inputs, parse
from normswap.models.programs import as_module
from normswap.parity.judge import LEVELS, MORE_LEVELS, SAME, compare, judge
from normswap.parity.locate import locate
from normswap.parity.result import Parity


def verify(
    reference: Model | str | Path,
    candidate: Model | str | Path,
    inputs: Any = None,
    *,
    tolerance: float | None = None,
    thorough: bool = False,
    **loading: Any,
) -> Parity:
    """Measure whether `candidate` computes what `reference` computes. Never raises on a mismatch: ask `bool(parity)`.

    Each side is a module, an ExportedProgram, a model file, a converted directory or an .onnx file. inputs: a tensor, a tuple, or a dict of
    keyword arguments; None takes those of a converted directory, or infers them. tolerance: the largest max|difference| / max|reference|
    that passes, in place of the limits described in `verify.py`. An .onnx candidate is run in onnxruntime with nothing and with everything
    optimised; thorough: at each of its levels. `first_bad` of what failed names the layer or node where the two start to differ.

    Raises LoadError if a side cannot be read, UsageError if the reference cannot run on the inputs or none are known.
    """
    sides = [_open(side, **loading) for side in (reference, candidate)]
    known = _given(sides, inputs) if inputs is not None else next(filter(None, map(inputs_of, (reference, candidate), sides)), None)
    if known is None:
        raise UsageError("no inputs are known that both models take", hint="give them: --input 1x3x224x224, or inputs=... in Python")
    a, b = sides
    sites = []
    if isinstance(a, nn.Module) and isinstance(b, nn.Module):
        ours = dict(a.named_modules(remove_duplicate=False))
        sites = [site["name"] for site in sites_of(b) if site["name"] in ours]
    judgement = judge(a, known.args, known.kwargs, sites=sites)
    levels: Sequence[str] = (LEVELS[-1],)
    if isinstance(b, Path):
        levels = MORE_LEVELS if thorough else LEVELS
    baseline = a if isinstance(a, Path) else None
    parities = [compare(judgement, b, sites=sites, tolerance=tolerance, level=level, baseline=baseline) for level in levels]
    parity = next((parity for parity in parities if not parity), parities[-1])
    bad = next((d for d in parity.outputs if not d.passed and d.problem is None), None)
    if bad is None:
        return parity
    probe = next(probe for probe in judgement.probes if probe.name == bad.probe)
    return dataclasses.replace(parity, located=locate(a, b, probe, max(SAME, bad.tolerance)))


def _given(sides: Sequence[nn.Module | Path], inputs: Any) -> Inputs:
    module = next((side for side in sides if isinstance(side, nn.Module)), None)
    return as_inputs(inputs) if module is None else given_to(module, inputs)


def verify_files(
    reference: str,
    candidate: str,
    *,
    arch: str | None = None,
    inputs: Sequence[str] = (),
    tolerance: float | None = None,
    thorough: bool = False,
    trust_packages: Sequence[str] = (),
    trust: bool = False,
) -> Parity:
    """`verify` for the command line."""
    given = parse(inputs) if inputs else None
    return verify(
        reference,
        candidate,
        given,
        tolerance=tolerance,
        thorough=thorough,
        arch=arch,
        trust_packages=trust_packages,
        trust=trust,
    )


def _open(side: Model | str | Path, **loading: Any) -> nn.Module | Path:
    """A module, or the path of an ONNX file."""
    if not isinstance(side, (str, Path)):
        return as_module(side)
    if Path(side).suffix == ".onnx":
        if not Path(side).is_file():
            raise LoadError(f"{side} does not exist", hint="give the path of an .onnx file")
        external_data.check_locations(Path(side))
        return Path(side)
    if not _takes_arch(str(side)):
        loading = {**loading, "arch": None}
    return as_module(load_any(str(side), **loading))


def _takes_arch(source: str) -> bool:
    """Whether --arch may be meant for this side: a file of weights, or a directory."""
    return Path(source).is_dir() or Path(source).suffix in (".safetensors", ".pt", ".pth")
