"""Finds where two models start to differ: the first layer, or node of an ONNX file, whose values are not the same.

Both run in float64 at one probe, and the values of their layers or nodes are paired: by name, and those without a common name by aligning
the two sequences of (class or operator, shape). A module and a file have too little in common for that: there each value of the module is
paired with the nearest one of its size in the file, and of several with one partner the nearest counts. A pair that differs is skipped if a
value computed from it, at most HEALED steps later, agrees again: there a layer was folded into its neighbour, and the function is the same.
"""

from __future__ import annotations

import difflib
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from torch import Tensor, nn

from normswap.models.watching import forward
from normswap.parity.measure import distance, sampled
from normswap.parity.probes import Probe, Values
from normswap.parity.result import Located
from normswap.parity.rounding import moved_model
from normswap.parity.run_onnx import onnx_float64_runner, onnx_runner
from normswap.parity.run_torch import float64_mode

HEALED = 3


@dataclass(frozen=True)
class _Value:
    """The output of one layer or node at one call.

    kind: the class or operator. reads: the numbers of the values that are its inputs, as far as known. label: its name in a report.
    """

    name: str
    kind: str
    tensor: Tensor
    reads: frozenset[int]
    label: str


def locate(reference: nn.Module | Path, candidate: nn.Module | Path, probe: Probe, limit: float) -> Located | None:
    """The first layer or node at which the error is above `limit`; None if there is none, or one of the two models cannot be run so."""
    try:
        ours, theirs = (_of_module(m, probe) if isinstance(m, nn.Module) else _of_file(m, probe) for m in (reference, candidate))
    except Exception:  # a model that cannot be run is reported by the comparison
        return None
    alike = isinstance(reference, Path) == isinstance(candidate, Path)
    pairs = _pairs(ours, theirs) if alike else _nearest(ours, theirs)
    errors = {a: distance(theirs[b].tensor, ours[a].tensor) for a, b in pairs}
    readers: dict[int, list[int]] = {}
    for number in errors:
        for read in ours[number].reads:
            readers.setdefault(read, []).append(number)

    def heals(number: int, steps: int = HEALED) -> bool:
        """Whether a value computed from this one, in at most `steps` steps, agrees again."""
        return any(errors[n] <= limit or (steps > 1 and heals(n, steps - 1)) for n in readers.get(number, []))

    nearest = {b: a for a, b in sorted(pairs, key=lambda pair: (-errors[pair[0]], -pair[0]))}
    for a, b in pairs:
        if nearest[b] == a and not errors[a] <= limit and not heals(a):
            by = "value" if not alike else "name" if ours[a].name == theirs[b].name else "place"
            return Located(ours[a].label, theirs[b].label, errors[a], probe.name, by)
    return None


def _of_module(model: nn.Module, probe: Probe) -> list[_Value]:
    """The outputs of all layers of a module, in order of execution; large tensors are sampled."""
    probe = probe.in_float64()
    copied, mode = moved_model(model), float64_mode(model, [probe])
    found: list[_Value] = []
    given: list[Tensor] = []  # kept alive, so that ids are not reused
    numbers: dict[int, int] = {}

    def watch(name: str) -> Callable[..., None]:
        def record(module: nn.Module, args: Any, output: Any) -> None:
            if isinstance(output, Tensor) and not output.is_nested:
                # a block returns what its last layer did: then it reads that, and what reads the block comes after the layer, too
                reads = frozenset(numbers[id(x)] for x in (*args, output) if isinstance(x, Tensor) and id(x) in numbers)
                found.append(_Value(name, type(module).__name__, sampled(output), reads - {len(found)}, name))
                numbers[id(output)] = len(found) - 1
                given.append(output)

        return record

    for name, module in copied.named_modules():
        if name:
            module.register_forward_hook(watch(name))
    forward(copied, probe.args, probe.kwargs, mode(), seed=0)
    return found


def _of_file(path: Path, probe: Probe) -> list[_Value]:
    """The first outputs of all nodes of an ONNX file, in order; large tensors are sampled."""
    import onnx

    graph = onnx.load(path, load_external_data=False).graph
    nodes = [node for node in graph.node if node.op_type != "Constant" and node.output[:1] != [""]]
    weights = {tensor.name for tensor in graph.initializer}
    values = _values(path, probe, [node.output[0] for node in nodes])
    found: list[_Value] = []
    numbers: dict[str, int] = {}
    for node in nodes:
        name = node.output[0]
        if name in values:
            reads = frozenset(numbers[read] for read in node.input if read in numbers)
            numbers[name] = len(found)
            weight = next((f" of {read}" for read in node.input if read in weights), "")
            found.append(_Value(name, node.op_type, values[name], reads, f"{name} ({node.op_type}{weight})"))
    return found


def _values(path: Path, probe: Probe, names: Sequence[str]) -> Values:
    try:
        return onnx_float64_runner(path, names)(probe.in_float64())[1]
    except Exception:  # an operator that onnx's evaluator does not have
        return onnx_runner(path, "disabled", names)(probe)[1]


def _nearest(ours: Sequence[_Value], theirs: Sequence[_Value]) -> list[tuple[int, int]]:
    """(number in ours, number in theirs) of each pair, in order: the value of the same size that is nearest, the first if several are."""
    sized: dict[int, list[int]] = {}
    for number, value in enumerate(theirs):
        sized.setdefault(value.tensor.numel(), []).append(number)
    return [
        (number, min(of_size, key=lambda n: distance(theirs[n].tensor, value.tensor)))
        for number, value in enumerate(ours)
        if (of_size := sized.get(value.tensor.numel()))
    ]


def _pairs(ours: Sequence[_Value], theirs: Sequence[_Value]) -> list[tuple[int, int]]:
    """(number in ours, number in theirs) of each pair of two modules, or two files, in order."""
    by_name: dict[str, list[int]] = {}
    for number, value in enumerate(theirs):
        by_name.setdefault(value.name, []).append(number)
    named = {number: by_name[value.name].pop(0) for number, value in enumerate(ours) if by_name.get(value.name)}
    names = {ours[number].name for number in named}

    def tokens(values: Sequence[_Value]) -> list[str]:
        return [v.name if v.name in names else f"{v.kind} {tuple(v.tensor.shape)}" for v in values]

    blocks = difflib.SequenceMatcher(None, tokens(ours), tokens(theirs), autojunk=False).get_matching_blocks()
    placed = {block.a + i: block.b + i for block in blocks for i in range(block.size) if ours[block.a + i].name not in names}
    return sorted({**placed, **named}.items())
