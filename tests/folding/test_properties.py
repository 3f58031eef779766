"""Folding never changes what a graph computes: random ONNX graphs, and random networks of torch, in float64."""

from __future__ import annotations

import random
import warnings
from collections import Counter
from pathlib import Path

import numpy as np
import onnx
import onnx.reference
import onnx_ir as ir
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from onnx_ir.passes import common
from seeded import SEEDED

from fixtures import random_onnx
from fixtures.random_graphs import generate
from normswap.api.convert import convert_unchecked
from normswap.api.request import Request
from normswap.errors import ExportError
from normswap.export.to_onnx import Program
from normswap.folding import Affine, Constants, Outcome, fold
from normswap.folding.basis import Bases, Change, Conflict
from normswap.folding.find import affines
from normswap.parity.run_onnx import corrected_operators

EXACT = 1e-10


def folded(proto: onnx.ModelProto) -> tuple[list[Outcome], onnx.ModelProto]:
    model = ir.from_proto(proto)
    constants = Constants(model.graph)
    outcomes = fold(model.graph, affines(model.graph, constants), constants)
    common.RemoveUnusedNodesPass()(model)
    return outcomes, ir.to_proto(model)


def difference(before: onnx.ModelProto, after: onnx.ModelProto) -> float:
    """The largest error of any output, relative to its largest value at the larger of two inputs."""
    onnx.checker.check_model(after, full_check=True)
    shape = [d.dim_value for d in before.graph.input[0].type.tensor_type.shape.dim]
    worst, sizes = 0.0, None
    for factor in (3.0, 0.0):
        x = np.random.default_rng(5).standard_normal(shape) * factor
        with np.errstate(all="ignore"):  # the evaluator warns of what its Sigmoid computes and does not use; NaN fails below
            want, got = (onnx.reference.ReferenceEvaluator(proto).run(None, {"x": x}) for proto in (before, after))
        sizes = [float(np.abs(a).max()) for a in want] if sizes is None else sizes
        for a, b, size in zip(want, got, sizes, strict=True):
            assert a.shape == b.shape
            scale = max(size, float(np.abs(a).max())) or 1.0  # one that is 0 at both inputs has no size of its own
            worst = max(worst, float(np.abs(a - b).max()) / scale)
    return worst


def number_of(proto: onnx.ModelProto) -> int:
    return len(proto.graph.node)


def graph_keeps_its_function(proto: onnx.ModelProto) -> None:
    outcomes, after = folded(proto)
    assert difference(proto, after) <= EXACT, onnx.printer.to_text(proto)
    assert number_of(after) <= number_of(proto)
    assert [value.name for value in after.graph.output] == [value.name for value in proto.graph.output]
    for outcome in outcomes:
        assert bool(outcome.left) == bool(outcome.reason), outcome


@settings(max_examples=100, **SEEDED)
@given(st.randoms(use_true_random=False))
def test_random_graphs_keep_their_function(r: random.Random) -> None:
    graph_keeps_its_function(random_onnx.generate(r))


@settings(max_examples=100, **SEEDED)
@given(st.randoms(use_true_random=False))
def test_random_graphs_that_move_values_keep_their_function(r: random.Random) -> None:
    graph_keeps_its_function(random_onnx.generate(r, moving=True))


@pytest.mark.slow
@pytest.mark.parametrize("moving", [False, True])
@settings(max_examples=600, **SEEDED)
@given(r=st.randoms(use_true_random=False))
def test_many_random_graphs_keep_their_function(r: random.Random, moving: bool) -> None:
    graph_keeps_its_function(random_onnx.generate(r, moving=moving))


def older(proto: onnx.ModelProto, opset: int) -> onnx.ModelProto | None:
    """The same graph as opset 7 to 12 writes it, with attributes where there are inputs now; None if it has an operator that is newer."""
    new = {"Einsum": 12, "CumSum": 11, "DepthToSpace": 11, "Sum": 8}
    if any(
        opset < new.get(node.op_type, 0) or (node.op_type == "Gemm" and opset < 11 and len(node.input) < 3) for node in proto.graph.node
    ):
        return None
    found = onnx.ModelProto()
    found.CopyFrom(proto)
    found.opset_import[0].version = opset
    arrays = {tensor.name: onnx.numpy_helper.to_array(tensor) for tensor in found.graph.initializer}
    for node in found.graph.node:
        names = {"Split": ["split"], "Slice": ["starts", "ends", "axes"] * (opset < 10), "Pad": ["pads"] * (opset < 11)}
        names |= {reduce: ["axes"] for reduce in ("ReduceMean", "ReduceSum", "ReduceMax", "ReduceL2")}
        for name, value in zip(names.get(node.op_type, ()), node.input[1:], strict=False):
            node.attribute.append(onnx.helper.make_attribute(name, [int(number) for number in arrays[value].reshape(-1)]))
        if names.get(node.op_type):
            del node.input[1:]
    return found


@pytest.mark.parametrize("opset", range(7, 13))
def test_graphs_of_older_opsets_keep_their_function(opset: int) -> None:
    ways: Counter[str] = Counter()
    for number in range(60):
        proto = older(random_onnx.generate(random.Random(number), moving=bool(number % 3)), opset)
        if proto is None:
            continue
        outcomes, after = folded(proto)
        ways.update(outcome.how for outcome in outcomes)
        x = np.random.default_rng(5).standard_normal([d.dim_value for d in proto.graph.input[0].type.tensor_type.shape.dim])
        after.ir_version = 8
        onnx.checker.check_model(after)
        with np.errstate(all="ignore"):
            want, got = (onnx.reference.ReferenceEvaluator(p, new_ops=corrected_operators(p)).run(None, {"x": x}) for p in (proto, after))
        for a, b in zip(want, got, strict=True):
            assert np.abs(a - b).max() <= EXACT * max(float(np.abs(a).max()), 1e-6), onnx.printer.to_text(proto)
    for way in ("into_producer", "into_consumers", "stream_shift", "into_producers", *["threshold"] * (opset > 7)):
        assert ways[way] >= 2, ways


FIRST = (723, 411, 76, 72, 37, 4)  # which are enough today
MOVING = ("Neg", "Abs", "Tile", "CumSum", "DepthToSpace", "SpaceToDepth", "Einsum")


def test_every_operator_that_moves_values_is_passed() -> None:
    """Each is a neighbour of an affine that is gone, in some graph."""
    passed: Counter[str] = Counter()
    for number in (*FIRST, *range(800)):
        proto = random_onnx.generate(random.Random(number), moving=True)
        outcomes, _ = folded(proto)
        gone = {name for outcome in outcomes if not outcome.left for name in _around(proto, outcome.name)}
        passed.update(gone)
        if all(passed[operator] for operator in MOVING):
            return
    pytest.fail(str(passed))


def _around(proto: onnx.ModelProto, name: str) -> list[str]:
    """What is next to the affine of this name, which is that of its first node."""
    nodes = list(proto.graph.node)
    first = next(i for i, node in enumerate(nodes) if node.name == name)
    own = [nodes[first]] + ([nodes[first + 1]] if nodes[first].op_type == "Mul" and first + 1 < len(nodes) else [])
    reads, gives = {i for node in own for i in node.input}, {o for node in own for o in node.output}
    return [node.op_type for node in nodes if node not in own and (set(node.output) & reads or set(node.input) & gives)]


def test_a_shared_value_is_not_stored_with_a_shift_that_costs_its_digits() -> None:
    """Back through a tiny scale into a value that another norm reads: 1e-8 was lost where the graph itself loses 1e-15."""
    proto = random_onnx.generate(random.Random(2634))
    assert difference(proto, folded(proto)[1]) <= 1e-12


WAYS = ("into_producer", "into_consumers", "stream_shift", "threshold", "into_producers", "stays")


def test_every_way_is_taken_and_refused() -> None:
    ways: Counter[str] = Counter()
    for number in range(250):
        ways.update(
            outcome.how or ("stays" if outcome.left else "nothing") for outcome in folded(random_onnx.generate(random.Random(number)))[0]
        )
        if all(ways[way] >= 5 for way in WAYS):
            return
    pytest.fail(str(ways))


@pytest.mark.parametrize("mistake", ["response", "along"])
def test_a_mistake_is_noticed(mistake: str, monkeypatch: pytest.MonkeyPatch) -> None:
    from normswap.folding import basis, linear

    if mistake == "response":
        monkeypatch.setattr(linear.Linear, "response", lambda self, shift: np.zeros(self.outputs))
    else:
        original = basis.Basis.along
        monkeypatch.setattr(basis.Basis, "along", lambda self, axis, size: tuple(v[::-1] for v in original(self, axis, size)))
    protos = [random_onnx.generate(random.Random(number)) for number in range(40)]
    assert any(difference(proto, folded(proto)[1]) > EXACT for proto in protos)


def keeps_its_function(r: random.Random, directory: Path) -> None:
    """A random network, converted in float64 and written twice: the folded file computes what one does in which nothing was folded.

    Not what torch computes: onnx's evaluator has a Gelu that is right to 3e-8 in float64.
    """
    graph = generate(r)
    inputs = graph.inputs(torch.float64)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # torch.export's own
        # `convert` refuses a network that rounds to near its limit, which is no matter here.
        model = convert_unchecked(graph.make(torch.float64), Request(example_inputs=inputs, coupling="none")).model
        try:
            program = Program(model, inputs, {})
            result = program.write(directory / "folded.onnx")
        except ExportError:
            return  # it branches on its data, or has an operator that ONNX lacks
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr("normswap.folding.decide.ATTEMPTS", ())
            patch.setattr("normswap.folding.ways.scale_alone", refuse)
            patch.setattr("normswap.folding.into_producer.fold", lambda affine, constants, adding=False: None)
            plain = program.write(directory / "plain.onnx")
    assert plain.folded == ()
    if any(a.name == "group" and a.i > 1 for n in onnx.load(plain.path).graph.node if n.op_type == "ConvTranspose" for a in n.attribute):
        return  # onnx's evaluator cannot run one
    feeds = {result.input_names[0]: inputs[0].numpy()}
    with np.errstate(all="ignore"):
        want, got = (onnx.reference.ReferenceEvaluator(onnx.load(e.path)).run(None, feeds) for e in (plain, result))
    assert len(want) == len(got)
    for a, b in zip(want, got, strict=True):
        assert np.abs(a - b).max() <= EXACT * max(float(np.abs(a).max()), 1e-3), repr(graph)


def refuse(affine: Affine, bases: Bases) -> Change:
    raise Conflict("not now")


@settings(max_examples=5, **SEEDED)
@given(st.randoms(use_true_random=False))
def test_random_networks_keep_their_function(tmp_path_factory: pytest.TempPathFactory, r: random.Random) -> None:
    keeps_its_function(r, tmp_path_factory.mktemp("net"))


@pytest.mark.slow
@settings(max_examples=200, **SEEDED)
@given(st.randoms(use_true_random=False))
def test_many_random_networks_keep_their_function(tmp_path_factory: pytest.TempPathFactory, r: random.Random) -> None:
    keeps_its_function(r, tmp_path_factory.mktemp("net"))
