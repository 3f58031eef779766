"""What planted faults do to a net, measured by code that the judge has no part in, and whether `normswap.verify` catches them.

At the inputs that `verify` makes, the truth is the original in float64. A fault moves an output by max|faulty - truth| / scale, where the
faulty model runs in float64 and in its own dtype, a faulty file in onnxruntime. The noise is the same of what is right, in float32 or in
onnxruntime, and at least the spacing of float32. Scale is max|truth| at that input, and at least 1e-3 of what that output reaches at the
inputs that are not scaled.
"""

from __future__ import annotations

import copy
import functools
import math
import tempfile
import time
import zlib
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import onnx
import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves, tree_map

import normswap
from benchmarks.libraries import Case, Record
from benchmarks.onnx_latency import session
from fixtures.faults import KINDS, OF_NORMS, in_onnx, in_torch
from normswap.models.inputs import as_inputs
from normswap.parity.probes import Probe, probes
from normswap.parity.result import Parity

SPACING = float(torch.finfo(torch.float32).eps)
UNLIKE = (math.inf, math.inf, "example")  # outputs of another dtype
Values = list[Tensor]
Run = Callable[[Probe], Values]
Noise = Mapping[str, list[float]]


class Truth:
    """What a model gives at each probe in float64, the scale of each output there, and the noise of the model in its own dtype."""

    def __init__(self, model: nn.Module, arguments: Any) -> None:
        given = as_inputs(arguments)
        self.probes = [p for p in probes(given.args, given.kwargs) if _runs(model, p)]
        run = wide(model)
        self.values = {p.name: run(p) for p in self.probes}
        self.dtypes = [t.dtype for t in outputs_of(model, self.probes[0])]
        plain = [p.name for p in self.probes if not p.flat and " x " not in p.name]
        reach = [max(map(_largest, outputs)) for outputs in zip(*(self.values[name] for name in plain), strict=True)]
        self.scales = {name: [max(_largest(t), 1e-3 * r) for t, r in zip(ts, reach, strict=True)] for name, ts in self.values.items()}
        least: Noise = {p.name: [SPACING] * len(reach) for p in self.probes}
        self.noise = self.with_noise_of(functools.partial(outputs_of, model), least)

    def moved(self, name: str, found: Values) -> list[float]:
        """How far each output is from the truth at a probe; infinity for another shape, or for NaN where the truth is a number."""
        truths = self.values[name]
        if len(truths) != len(found):
            return [math.inf] * len(truths)
        return [_distance(t, f, scale) for t, f, scale in zip(truths, found, self.scales[name], strict=True)]

    def with_noise_of(self, run: Run, noise: Noise) -> Noise:
        """`noise`, or what something that is right does, where that is more."""
        return {p.name: [max(pair) for pair in zip(noise[p.name], self.moved(p.name, run(p)), strict=True)] for p in self.probes}

    def worst(self, run: Run, noise: Noise, *, flat: bool) -> tuple[float, float, str]:
        """(times the noise, moved, the probe), where something is furthest from the truth. flat: look at the flat probes, too."""
        found = [(0.0, 0.0, "")]
        for probe in (p for p in self.probes if flat or not p.flat):
            rows = zip(self.moved(probe.name, run(probe)), noise[probe.name], strict=True)
            found += [(moved / least if least < math.inf else 0.0, moved, probe.name) for moved, least in rows]
        return max(found)


def _runs(model: nn.Module, probe: Probe) -> bool:
    try:
        outputs_of(model, probe)
    except Exception:  # a batch of 3, for a model with a fixed size
        return False
    return True


@torch.no_grad()
def outputs_of(model: nn.Module, probe: Probe) -> Values:
    torch.manual_seed(0)
    args, kwargs = tree_map(lambda x: x.clone() if isinstance(x, Tensor) else x, (probe.args, dict(probe.kwargs)))
    output = model(*args, **kwargs)
    return [t for t in tree_leaves(dict(output) if isinstance(output, Mapping) else output) if isinstance(t, Tensor)]


def widened(probe: Probe) -> Probe:
    return Probe(probe.name, *probe.mapped(lambda x: x.double() if x.is_floating_point() else x))


def _largest(t: Tensor) -> float:
    return float(t.double().abs().nan_to_num(0, 0, 0).max()) if t.numel() else 0.0


def _distance(truth: Tensor, found: Tensor, scale: float) -> float:
    if truth.shape != found.shape:
        return math.inf
    difference = (truth.double() - found.double()).abs()[truth.double().isfinite()]
    if not bool(difference.isfinite().all()):
        return math.inf
    most = _largest(difference)
    return most if most == 0 else most / scale if scale else math.inf


def in_runtime(proto: Any, path: Path) -> Run:
    """An ONNX file in onnxruntime, as people use it."""
    onnx.save(proto, str(path))
    runner = session(path)
    names = [value.name for value in runner.get_inputs()]

    def run(probe: Probe) -> Values:
        tensors = probe.kwargs if probe.kwargs else dict(zip(names, probe.tensors(), strict=True))
        return [torch.from_numpy(array) for array in runner.run(None, {name: tensors[name].numpy() for name in names})]

    return run


def plain_export(model: nn.Module, probe: Probe, path: Path) -> None:
    """By torch alone, so that each norm is a BatchNormalization."""
    args, kwargs = tree_map(lambda t: {0: "batch"}, (probe.args, dict(probe.kwargs)))
    shapes = kwargs if kwargs else args
    program = torch.onnx.export(
        model, probe.args, kwargs=dict(probe.kwargs), dynamic_shapes=shapes, dynamo=True, optimize=False, verbose=False
    )
    assert program is not None
    program.save(str(path))


def planted(case: Case) -> Record:
    """Every kind of fault in one net. rows: what came of each; refused: of what is right, what the judge does not let pass."""
    started = time.process_time()
    model, arguments = case.make()
    truth = Truth(model, arguments)
    refused: dict[str, str] = {}
    with tempfile.TemporaryDirectory() as directory:
        home = Path(directory)
        candidate: nn.Module = copy.deepcopy(model)
        try:
            conversion = normswap.convert(model, arguments)
            candidate = conversion.model
            normswap.export_onnx(conversion, path=home / "folded.onnx")
        except normswap.NormswapError as error:
            refused["convert and export"] = reason(error)
        try:
            plain_export(model, truth.probes[0], home / "plain.onnx")
        except Exception as error:  # of torch's own exporter, which is not what is measured
            refused["torch.onnx.export"] = reason(error)
        rows = [*_in_torch(case, truth, model, candidate, arguments, refused), *_in_files(case, truth, model, arguments, home, refused)]
    seconds = round(time.process_time() - started, 1)
    return {"family": case.family, "name": case.name, "rows": rows, "refused": refused, "seconds": seconds}


def _in_torch(case: Case, truth: Truth, model: nn.Module, right: nn.Module, arguments: Any, refused: dict[str, str]) -> Iterator[Record]:
    if not (parity := normswap.verify(model, right, arguments)):
        refused["torch"] = why(parity)
        return
    for kind in KINDS:
        faulty = in_torch(kind, right, lambda m: outputs_of(m, truth.probes[0]), seed_of(case, kind))
        if faulty is None:
            continue
        runs: tuple[Run, ...] = (functools.partial(outputs_of, copy.deepcopy(faulty)), wide(faulty))
        same = [t.dtype for t in outputs_of(copy.deepcopy(faulty), truth.probes[0])] == truth.dtypes
        worst = max(truth.worst(run, truth.noise, flat=False) for run in runs) if same else UNLIKE
        yield _row(kind, "torch", worst, normswap.verify(model, faulty, arguments))


def wide(model: nn.Module) -> Run:
    doubled = copy.deepcopy(model).double()
    return lambda probe: outputs_of(doubled, widened(probe))


def _in_files(case: Case, truth: Truth, model: nn.Module, arguments: Any, home: Path, refused: dict[str, str]) -> Iterator[Record]:
    """Faults of norms in the file in which they are nodes, and all others in the one that normswap has written."""
    for name in ("folded", "plain"):
        path = home / f"{name}.onnx"
        if not path.exists():
            continue
        right = onnx.load(str(path))
        if not (parity := normswap.verify(model, path, arguments)):
            refused[f"{name} file"] = why(parity)
            continue
        runner = in_runtime(right, path)
        noise = truth.with_noise_of(runner, truth.noise)
        row = next(t for t in runner(truth.probes[0]) if t.is_floating_point())[:1].numpy()
        for kind in (kind for kind in KINDS if (kind in OF_NORMS) == (name == "plain")):
            faulty = in_onnx(kind, right, row, seed_of(case, kind))
            if faulty is None:
                continue
            try:
                run = in_runtime(faulty, home / "faulty.onnx")
                same = [t.dtype for t in run(truth.probes[0])] == truth.dtypes
                worst = truth.worst(run, noise, flat=True) if same else UNLIKE
            except Exception:  # no valid file: swapped inputs that do not fit, say
                continue
            yield _row(kind, "onnx", worst, normswap.verify(model, home / "faulty.onnx", arguments))


def seed_of(case: Case, kind: str) -> int:
    return zlib.crc32(f"{case.name}, {kind}".encode())


def _row(kind: str, path: str, worst: tuple[float, float, str], parity: Parity) -> Record:
    times, moved, probe = worst
    numbers = {key: float(f"{value:.3g}") if value < math.inf else None for key, value in (("times", times), ("moved", moved))}
    told = {"caught": not parity, "at": parity.first_bad, "judged": probe in parity.probes}
    return {"kind": kind, "path": path, **numbers, "probe": probe, **told}


def reason(error: BaseException) -> str:
    return f"{type(error).__name__}: {' '.join(str(error).split())[:400]}"


def why(parity: Parity) -> str:
    bad = next((d for d in (*parity.outputs, *parity.sites) if not d.passed), None)
    if parity.failure or bad is None:
        return str(parity.failure)
    return f"{bad.name} at {bad.probe}: {bad.problem or f'{bad.max_rel:.1e} off, where {bad.tolerance:.1e} passes'}"
