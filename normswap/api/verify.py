"""`normswap.verify`: measures whether two models, directories or files compute the same function; and opens both sides."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from torch import nn
from torch.export import ExportedProgram

from normswap.api.convert import given_to
from normswap.api.directory import load
from normswap.errors import LoadError, UsageError
from normswap.files import atomic, external_data
from normswap.files.build import build
from normswap.files.load import load as load_source
from normswap.files.recipe import read_recipe, sites_of
from normswap.models.inputs import Inputs, as_inputs, infer, tensors_taken
from normswap.models.programs import Model, as_module, inputs_in
from normswap.parity.judge import compare, judge
from normswap.parity.limits import SAME
from normswap.parity.locate import locate
from normswap.parity.result import Parity
from normswap.parity.run_onnx import LEVELS, MORE_LEVELS, NO_KERNEL, REFERENCE, input_names, onnx_inputs


def verify(
    reference: Model | str | Path,
    candidate: Model | str | Path,
    inputs: Any = None,
    *,
    tolerance: float | None = None,
    thorough: bool = False,
    arch: str | None = None,
    trust_packages: Sequence[str] = (),
    trust: bool = False,
) -> Parity:
    """Measure whether `candidate` computes the same function as `reference`. A mismatch raises nothing: `bool(parity)` is False.

    Each side is a module, an ExportedProgram, a model file, a converted directory or an .onnx file.

    inputs: a tensor, a tuple, or a dict of keyword arguments; None: those of a converted directory, or inferred ones.
    tolerance: the largest max|difference| / max|reference| that passes, in place of the limits that docs/verify.md describes.
    thorough: run an .onnx candidate at each of onnxruntime's optimisation levels, not only at "disabled" and "all".
    arch: the spec that builds the architecture of a file or directory that holds weights alone (`torchvision:resnet18`).
    trust_packages, trust: packages whose classes a pickle may use, and whether a file may run any code, as for `load`.

    If the comparison failed, `first_bad` names the layer or node where the two start to differ. Raises LoadError if a side cannot be read,
    UsageError if the reference cannot run on the inputs or none are known.
    """
    loaded = [_loaded(side, arch, trust_packages, trust) for side in (reference, candidate)]
    a, b = sides = [side if isinstance(side, Path) else as_module(side) for side in loaded]
    known = _given(sides, inputs) if inputs is not None else next(filter(None, map(inputs_of, (reference, candidate), loaded)), None)
    module, file = (next((side for side in sides if isinstance(side, kind)), None) for kind in (nn.Module, Path))
    if known is not None and isinstance(module, nn.Module) and isinstance(file, Path):
        known = _as_taken(known, module, file)
    if known is None:
        raise UsageError("no inputs are known that both models take", hint="give them: --input 1x3x224x224, or inputs=... in Python")
    sites = []
    if isinstance(a, nn.Module) and isinstance(b, nn.Module):
        names = dict(a.named_modules(remove_duplicate=False))
        sites = [site["name"] for site in sites_of(b) if site["name"] in names]
    judgement = judge(a, known.args, known.kwargs, sites=sites)
    levels: Sequence[str] = (LEVELS[-1],)
    if isinstance(b, Path):
        levels = MORE_LEVELS if thorough else LEVELS
    baseline = a if isinstance(a, Path) else None
    parities = [compare(judgement, b, tolerance=tolerance, level=level, baseline=baseline) for level in levels]
    if any(NO_KERNEL in (parity.failure or "") for parity in parities):  # onnxruntime has no Conv in float64 or bfloat16, for example
        parities = [compare(judgement, b, tolerance=tolerance, level=REFERENCE, baseline=baseline)]
    parity = next((parity for parity in parities if not parity), parities[-1])
    bad = next((d for d in parity.outputs if not d.passed and d.problem is None), None)
    if bad is None:
        return parity
    probe = next(probe for probe in judgement.probes if probe.name == bad.probe)
    return dataclasses.replace(parity, located=locate(a, b, probe, max(SAME, bad.tolerance)))


def load_any(source: str, *, arch: str | None = None, trust_packages: Sequence[str] = (), trust: bool = False) -> Model:
    """The model of a converted directory, or of anything that the command line takes as SRC."""
    atomic.recover(Path(source))
    if Path(source).is_dir():
        return load(source, factory_of(arch), trust_packages=trust_packages, trust=trust)
    return load_source(source, arch=arch, trust_packages=trust_packages, trust=trust).model


def factory_of(arch: str | None) -> Callable[[], nn.Module] | None:
    """A function that builds the architecture of --arch; None without one."""
    return None if arch is None else lambda: build(arch)


def inputs_of(named: Model | str | Path, loaded: Model | Path) -> Inputs | None:
    """The inputs of a model: those in its program, those with which it was saved, those that an ONNX file declares, or inferred ones."""
    if isinstance(loaded, ExportedProgram) and (stored := inputs_in(loaded)) is not None:
        return stored
    if isinstance(named, (str, Path)) and Path(named).is_dir():
        known = read_recipe(Path(named)).example_inputs()
        if known:
            return known
    if isinstance(loaded, Path):
        declared = onnx_inputs(loaded)
        return None if declared is None else Inputs(declared, origin="declared")
    return infer(as_module(loaded))


def _as_taken(known: Inputs, module: nn.Module, file: Path) -> Inputs:
    """Inferred inputs of a model without those that an ONNX file lacks, and with those that it takes more, by the names of arguments."""
    taken, names = tensors_taken(module), input_names(file)
    if known.origin not in ("inferred", "declared") or not set(names) <= set(taken):
        return known
    given = {**dict(zip(names if known.origin == "declared" else taken, known.args, strict=False)), **known.kwargs}
    if set(names) == set(given):
        return dataclasses.replace(known, args=(), kwargs=given)
    declared = onnx_inputs(file, batch=1, free=next(iter(given.values())).shape[-1])
    if declared is None:
        return known
    own = dict(zip(names, declared, strict=True))
    same = {name: x for name, x in given.items() if name in own and x.shape == own[name].shape}
    return dataclasses.replace(known, args=(), kwargs={**own, **same})


def _given(sides: Sequence[nn.Module | Path], inputs: Any) -> Inputs:
    module = next((side for side in sides if isinstance(side, nn.Module)), None)
    return as_inputs(inputs) if module is None else given_to(module, inputs)


def _loaded(side: Model | str | Path, arch: str | None, trust_packages: Sequence[str], trust: bool) -> Model | Path:
    """One side of a comparison as a model, or as the path of an ONNX file."""
    if not isinstance(side, (str, Path)):
        return side
    path = Path(side)
    if path.suffix == ".onnx":
        if not path.is_file():
            raise LoadError(f"{side} does not exist", hint="give the path of an .onnx file")
        external_data.check_locations(path)
        return path
    takes_arch = path.is_dir() or path.suffix in (".safetensors", ".pt", ".pth")  # the other side may need no --arch
    return load_any(str(side), arch=arch if takes_arch else None, trust_packages=trust_packages, trust=trust)
