"""`normswap fold` on files that no exporter of torch wrote: nothing to fold, nothing like it seen before, and damaged ones."""

from __future__ import annotations

import functools
import random
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnx.reference
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from onnx import TensorProto, helper, parser
from onnx.numpy_helper import from_array
from seeded import SEEDED
from torch import nn
from typer.testing import CliRunner

from fixtures import strange_onnx
from normswap.api.fold import fold_onnx
from normswap.cli.app import app
from normswap.errors import LoadError, NormswapError, UsageError
from normswap.export.any_file import fold

RNG = np.random.default_rng(3)
EXACT = 1e-9


def text(body: str, *arrays: onnx.TensorProto, head: str = "float[b,4] x) => (float[ob,oc] y", imports: str = '"": 20') -> onnx.ModelProto:
    proto = parser.parse_model(f"<ir_version: 9, opset_import: [{imports}]> g ({head}) {{ {body} }}")
    proto.graph.initializer.extend(arrays)
    return proto


def tensor(name: str, *shape: int) -> onnx.TensorProto:
    return from_array(RNG.standard_normal(shape).astype(np.float32), name)


def exported(model: nn.Module, *args: Any, opset: int = 20, **options: Any) -> onnx.ModelProto:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # torch's own
        program = torch.onnx.export(model.eval(), args, dynamo=True, opset_version=opset, verbose=False, **options)
    assert program is not None
    return program.model_proto


class Mlp(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.Sequential(nn.Linear(4, 8), nn.ReLU(), nn.Linear(8, 8), nn.Tanh(), nn.Linear(8, 3), nn.Softmax(-1))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.layers(x)  # type: ignore[no-any-return]


@functools.cache
def float_net() -> onnx.ModelProto:
    return exported(nn.Sequential(nn.Conv2d(3, 4, 3), nn.ReLU(), nn.Flatten(), nn.Linear(64, 5)), torch.randn(1, 3, 6, 6))


def quantized(path: Path, how: str) -> onnx.ModelProto:
    from onnxruntime import quantization

    onnx.save(float_net(), path / "q.onnx")
    if how == "dynamic":
        quantization.quantize_dynamic(path / "q.onnx", path / "r.onnx")
    else:

        class Reader(quantization.CalibrationDataReader):
            def __init__(self) -> None:
                name = onnx.load(path / "q.onnx").graph.input[0].name
                self.rows = iter([{name: np.random.default_rng(i).standard_normal((1, 3, 6, 6)).astype(np.float32)} for i in range(3)])

            def get_next(self) -> dict[str, Any] | None:
                return next(self.rows, None)

        form = quantization.QuantFormat.QDQ if how == "qdq" else quantization.QuantFormat.QOperator
        quantization.quantize_static(path / "q.onnx", path / "r.onnx", Reader(), quant_format=form)
    return onnx.load(path / "r.onnx")


def ml(op_type: str, **attributes: Any) -> onnx.ModelProto:
    node = helper.make_node(op_type, ["x"], ["y"], domain="ai.onnx.ml", **attributes)
    value = (helper.make_tensor_value_info(name, TensorProto.FLOAT, ["n", None]) for name in "xy")
    graph = helper.make_graph([node], "g", [next(value)], [next(value)])
    return helper.make_model(graph, opset_imports=[helper.make_opsetid("", 20), helper.make_opsetid("ai.onnx.ml", 3)], ir_version=9)


def already_folded(path: Path) -> onnx.ModelProto:
    from normswap.api.convert import convert
    from normswap.api.export import export_onnx

    model = nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.ReLU(), nn.Conv2d(4, 5, 1)).eval()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        export_onnx(convert(model, torch.randn(2, 3, 6, 5)), path=path / "folded.onnx")
    return onnx.load(path / "folded.onnx")


def with_a_function() -> onnx.ModelProto:
    proto = text("y = own.Twice(x)", imports='"": 20, "own": 1')
    nodes = [helper.make_node("Constant", [], ["two"], value_float=2.0), helper.make_node("Mul", ["a", "two"], ["b"])]
    proto.functions.append(helper.make_function("own", "Twice", ["a"], ["b"], nodes, [helper.make_opsetid("", 20)]))
    return proto


def sparse() -> onnx.ModelProto:
    proto = text("y = MatMul(x, w)", head="float[b,4] x) => (float[ob,oc] y")
    values = helper.make_tensor("w", TensorProto.FLOAT, [2], [1.0, -2.0])
    indices = helper.make_tensor("i", TensorProto.INT64, [2], [1, 9])
    proto.graph.sparse_initializer.append(helper.make_sparse_tensor(values, indices, [4, 3]))
    return proto


SCAN = """
y = Scan <num_scan_inputs = 1, body = step (float[4] row) => (float[4] out) { out = Relu(row) }> (x)
"""
LOOP = """
y = Loop(n, t, x) <body = step (int64 i, bool c, float[b,4] v) => (bool d, float[b,4] w) { w = Add(v, x) d = Identity(c) }>
"""
IF = """
m = ReduceMax <keepdims=0> (x) p = Greater(m, zero)
y = If(p) <then_branch = a () => (float[b,4] u) { u = Mul(x, k) }, else_branch = e () => (float[b,4] v) { v = Neg(x) }>
"""

NOTHING: dict[str, Callable[[Path], onnx.ModelProto]] = {
    "an MLP of torch": lambda path: exported(Mlp(), torch.randn(2, 4)),
    "an MLP at opset 18": lambda path: exported(Mlp(), torch.randn(2, 4), opset=18),
    "a LeNet": lambda path: exported(
        nn.Sequential(nn.Conv2d(1, 4, 3), nn.ReLU(), nn.MaxPool2d(2), nn.Flatten(), nn.Linear(36, 5)), torch.randn(2, 1, 8, 8)
    ),
    "a GRU": lambda path: exported(nn.GRU(4, 5), torch.randn(3, 2, 4)),
    "an LSTM": lambda path: exported(nn.LSTM(4, 5), torch.randn(3, 2, 4)),
    "an embedding": lambda path: exported(nn.Sequential(nn.Embedding(9, 4), nn.Linear(4, 3)), torch.randint(9, (2, 5))),
    "quantised dynamically": lambda path: quantized(path, "dynamic"),
    "quantised, QDQ": lambda path: quantized(path, "qdq"),
    "quantised, QOperator": lambda path: quantized(path, "operator"),
    "a linear regression of sklearn": lambda path: ml("LinearRegressor", coefficients=[0.5, 1.0, 2.0, -1.0], intercepts=[0.25]),
    "a scaler of sklearn": lambda path: ml("Scaler", offset=[0.5] * 4, scale=[2.0] * 4),
    "a tree of sklearn": lambda path: ml(
        "TreeEnsembleRegressor",
        n_targets=1,
        nodes_treeids=[0, 0, 0],
        nodes_nodeids=[0, 1, 2],
        nodes_featureids=[0, 0, 0],
        nodes_modes=["BRANCH_LEQ", "LEAF", "LEAF"],
        nodes_values=[0.5, 0.0, 0.0],
        nodes_truenodeids=[1, 0, 0],
        nodes_falsenodeids=[2, 0, 0],
        target_treeids=[0, 0],
        target_nodeids=[1, 2],
        target_ids=[0, 0],
        target_weights=[1.0, 2.0],
    ),
    "opset 9": lambda path: text("h = MatMul(x, w) y = Relu(h)", tensor("w", 4, 3), imports='"": 9'),
    "opset 13": lambda path: text("h = MatMul(x, w) y = Softmax(h)", tensor("w", 4, 3), imports='"": 13'),
    "an If": lambda path: text(IF, from_array(np.float32(0), "zero"), tensor("k", 4)),
    "a Loop": lambda path: text(LOOP, from_array(np.array(3), "n"), from_array(np.array(True), "t")),
    "a Scan": lambda path: text(SCAN),
    "a sequence": lambda path: text(
        "s = SplitToSequence <axis=1> (x, two) y = ConcatFromSequence <axis=1> (s)", from_array(np.array(2), "two")
    ),
    "strings": lambda path: text('y = StringNormalizer <case_change_action="UPPER"> (x)', head="string[n] x) => (string[m] y"),
    "a custom operator": lambda path: text("h = own.Swirl <angle = 0.5> (x) y = Relu(h)", imports='"": 20, "own": 1'),
    "a function of its own": lambda path: with_a_function(),
    "a sparse weight": lambda path: sparse(),
    "no inputs": lambda path: text("y = RandomNormal <shape=[2,3], seed=1.0> ()", head=") => (float[p,q] y"),
    "an input that is an output": lambda path: text("z = Relu(x)", head="float[b,4] x) => (float[p,q] z, float[b,4] x"),
    "already folded": already_folded,
    "half precision": lambda path: exported(Mlp().half(), torch.randn(2, 4).half()),
    "bfloat16": lambda path: exported(nn.Linear(4, 3).bfloat16(), torch.randn(2, 4).bfloat16(), opset=22),
    "attention": lambda path: exported(nn.TransformerEncoderLayer(8, 2, 16, norm_first=False, batch_first=True), torch.randn(2, 5, 8)),
    "an optional": lambda path: text("o = Optional(x) y = OptionalGetElement(o)"),
}


@pytest.mark.parametrize("case", NOTHING)
def test_a_file_with_nothing_to_fold_stays_as_it_is(case: str, tmp_path: Path) -> None:
    proto = NOTHING[case](tmp_path)
    source, target = tmp_path / "in.onnx", tmp_path / "out.onnx"
    onnx.save(proto, source)
    found = CliRunner().invoke(app, ["fold", str(source), "-o", str(target)])
    assert found.exit_code == 0, found.stderr
    assert "nothing to fold" in found.stdout
    assert target.read_bytes() == source.read_bytes()


def test_there_are_many_of_them() -> None:
    assert len(NOTHING) >= 20


# -- graphs as nobody writes them -----------------------------------------------------------------------------------------------------


def values_of(proto: onnx.ModelProto, x: np.ndarray) -> list[np.ndarray]:
    with np.errstate(all="ignore"), warnings.catch_warnings():
        warnings.simplefilter("ignore")  # the evaluator's own
        return [np.asarray(v) for v in onnx.reference.ReferenceEvaluator(proto).run(None, {proto.graph.input[0].name: x})]  # type: ignore[union-attr]


def keeps_its_function(proto: onnx.ModelProto, directory: Path, *, scale: float = 3.0) -> onnx.ModelProto:
    """Folded as a file, in float64: valid, with the outputs of the same names, and the same values to rounding."""
    onnx.checker.check_model(proto)
    onnx.save(proto, directory / "in.onnx")
    fold(directory / "in.onnx", directory / "out.onnx")
    made = onnx.load(directory / "out.onnx")
    onnx.checker.check_model(made)
    assert [value.name for value in made.graph.output] == [value.name for value in proto.graph.output]
    assert [value.name for value in made.graph.input] == [value.name for value in proto.graph.input]
    shape = [dim.dim_value or 2 for dim in proto.graph.input[0].type.tensor_type.shape.dim]
    x = np.random.default_rng(5).standard_normal(shape) * scale
    for want, got in zip(values_of(proto, x), values_of(made, x), strict=True):
        assert want.shape == got.shape
        np.testing.assert_array_equal(np.isfinite(want), np.isfinite(got))
        known = np.isfinite(want)
        assert np.abs(want - got)[known].max(initial=0) <= EXACT * np.abs(want)[known].max(initial=0)
    return made


@settings(max_examples=80, **SEEDED)
@given(st.randoms(use_true_random=False))
def test_random_strange_graphs_keep_their_function(tmp_path_factory: pytest.TempPathFactory, r: random.Random) -> None:
    keeps_its_function(strange_onnx.generate(r), tmp_path_factory.mktemp("strange"))


@pytest.mark.slow
@settings(max_examples=8000, **SEEDED)
@given(st.randoms(use_true_random=False))
def test_many_random_strange_graphs_keep_their_function(tmp_path_factory: pytest.TempPathFactory, r: random.Random) -> None:
    keeps_its_function(strange_onnx.generate(r), tmp_path_factory.mktemp("strange"))


@pytest.mark.parametrize("number", [541, 664, 974, 1221, 4445, 5949, 5953])
def test_graphs_that_once_went_wrong(number: int, tmp_path: Path) -> None:
    """An output that took another's name; a shift along the batch; shapes that are not known, or follow from what a caller may replace."""
    keeps_its_function(strange_onnx.generate(random.Random(number)), tmp_path)


def double(name: str, *shape: int) -> onnx.TensorProto:
    return from_array(RNG.standard_normal(shape), name)


def ints(name: str, *values: int) -> onnx.TensorProto:
    return from_array(np.array(values), name)


FOUR = "double[2,4,5,6] x) => (double[p,q,r,t] y"
SCALED = (double("s", 1, 4, 1, 1), double("t", 1, 4, 1, 1), double("w", 3, 4, 1, 1))
ONE = from_array(np.ones((1, 4, 1, 1)), "one")
DELICATE: dict[str, tuple[onnx.ModelProto, str]] = {
    "two outputs that a product with 1 separates": (
        text("h = Relu(x) y = Mul(h, one)", ONE, head=f"{FOUR}, double[p,q,r,t] h"),
        "Identity",
    ),
    "an output that is the input": (text("y = Add(x, none)", from_array(np.zeros((1, 4, 1, 1)), "none"), head=FOUR), "Identity"),
    "a slice along an axis that is computed": (
        text(
            "a = Mul(x, s) a1 = Add(a, t) n = Size(x) o = Div(n, n) o1 = Unsqueeze(o, zero) c = Slice(a1, zero, four, o1) y = Conv(c, w)",
            *SCALED,
            ints("zero", 0),
            ints("four", 4),
            head=FOUR,
        ),
        "",
    ),
    "a slice with steps that are computed": (
        text(
            "a = Mul(x, s) a1 = Add(a, t) n = Size(x) o = Div(n, n) o1 = Unsqueeze(o, zero) "
            "c = Slice(a1, zero, four, one, o1) y = Conv(c, w)",
            *SCALED,
            ints("zero", 0),
            ints("one", 1),
            ints("four", 4),
            head=FOUR,
        ),
        "",
    ),
    "a pad that names its axes in another order": (
        text(
            "a = Mul(x, s) c = Pad(a, p, none, o) y = Conv(c, w)",
            SCALED[0],
            double("w", 3, 7, 1, 1),
            ints("p", 0, 0, 0, 1, 0, 0, 0, 2),
            ints("o", 2, 3, 0, 1),
            from_array(np.array(0.0), "none"),
            head=FOUR,
        ),
        "",
    ),
    "a reshape to a shape that a caller may give": (
        text(
            "a = Mul(x, s) c = Reshape(a, p) y = Conv(c, w)",
            SCALED[0],
            double("w", 3, 4, 1, 1),
            ints("p", 2, 4, 5, 6),
            head="double[2,4,5,6] x, int64[4] p) => (double[p,q,r,t] y",
        ),
        "Mul",
    ),
    "a norm in training mode": (
        text(
            "a, m, v = BatchNormalization <training_mode=1> (x, s, s, s, u) y = Conv(a, w)",
            double("s", 4),
            from_array(np.ones(4), "u"),
            SCALED[2],
            head=FOUR,
        ),
        "BatchNormalization",
    ),
    "a constant divided by a value": (
        text("a = Mul(x, x) a1 = Add(a, one) a2 = Div(s, a1) y = Conv(a2, w)", SCALED[0], SCALED[2], ONE, head=FOUR),
        "Div",
    ),
    "a value that a branch reads": (
        text(
            "a = Mul(x, s) a1 = Add(a, t) h = Conv(a1, w) m = ReduceMax <keepdims=0> (x) p = Greater(m, none) "
            "y = If(p) <then_branch = a () => (double[2,3,5,6] u) { u = Tanh(h) }, "
            "else_branch = e () => (double[2,4,5,6] v) { v = Relu(a1) }>",
            *SCALED,
            from_array(np.array(0.0), "none"),
            head=FOUR,
        ),
        "",
    ),
    "names in a branch that the graph has, too": (
        text(
            "a = Mul(x, s) h = Conv(a, w) m = ReduceMax <keepdims=0> (x) p = Greater(m, none) "
            "y = If(p) <then_branch = a () => (double[2,3,5,6] w_folded) { w_folded = Tanh(h) }, "
            "else_branch = e () => (double[2,3,5,6] w_folded_1) { w_folded_1 = Relu(h) }>",
            *SCALED[::2],
            from_array(np.array(0.0), "none"),
            head=FOUR,
        ),
        "",
    ),
    "a weight that is an output": (
        text("a = Mul(x, s) y = Conv(a, w)", *SCALED[::2], head="double[2,4,5,6] x) => (double[p,q,r,t] y, double[3,4,1,1] w"),
        "",
    ),
    "a constant of more axes than the value": (
        text("a = Mul(x, s) y = MatMul(a, w)", double("s", 1, 1, 4), double("w", 4, 3), head="double[2,4] x) => (double[p,q,r] y"),
        "Mul",
    ),
    "one number for all channels": (
        text("a = Mul(x, s) a1 = Add(a, s) y = Conv(a1, w)", from_array(np.array(0.5), "s"), SCALED[2], head=FOUR),
        "",
    ),
}


@pytest.mark.parametrize("case", DELICATE)
def test_delicate_graphs(case: str, tmp_path: Path) -> None:
    """What must stay is there; "" where it may go."""
    proto, stays = DELICATE[case]
    made = keeps_its_function(proto, tmp_path)
    if stays:
        assert stays in {node.op_type for node in made.graph.node}


@pytest.mark.parametrize(
    ("head", "body", "said"),
    [
        (
            "string[b] n, float[b,4,5,6] x) => (float[p,q,r,t] y, string[b] n",
            "a = Mul(x, s) y = Conv(a, w)",
            "the input n of .* is a string,",
        ),
        (
            "seq(float[b,4]) n, float[b,4,5,6] x) => (float[p,q,r,t] y, int64 m",
            "a = Mul(x, s) y = Conv(a, w) m = SequenceLength(n)",
            "the input n of .* is a sequence,",
        ),
    ],
)
def test_a_file_that_cannot_be_run_is_not_folded(head: str, body: str, said: str, tmp_path: Path) -> None:
    proto = text(body, head=head, imports='"": 22')
    proto.graph.initializer.extend(
        from_array(RNG.standard_normal(shape).astype(np.float32), name) for name, shape in (("s", (1, 4, 1, 1)), ("w", (3, 4, 1, 1)))
    )
    onnx.save(proto, tmp_path / "in.onnx")
    with pytest.raises(UsageError, match=said):
        fold_onnx(str(tmp_path / "in.onnx"), tmp_path / "out.onnx")
    assert not (tmp_path / "out.onnx").exists()


@pytest.mark.parametrize("body", ["a = Mul(x, s) h = Conv(a, w) y = own.Swirl(h)", "h = own.Swirl(x) a = Mul(h, s) y = Conv(a, w)"])
def test_what_nobody_can_run_is_not_folded(body: str, tmp_path: Path) -> None:
    """The norm could go, but nothing could show that the file is still the same function."""
    arrays = (tensor("s", 1, 4, 1, 1), tensor("w", 3, 4, 1, 1))
    proto = text(body, *arrays, head="float[2,4,5,6] x) => (float[p,q,r,t] y", imports='"": 20, "own": 1')
    proto.graph.value_info.append(
        helper.make_tensor_value_info("h", TensorProto.FLOAT, [2, 4, 5, 6] if body.startswith("h") else [2, 3, 5, 6])
    )
    onnx.save(proto, tmp_path / "in.onnx")
    with pytest.raises(UsageError, match=r"the model cannot be run: .*Swirl") as caught:
        fold_onnx(str(tmp_path / "in.onnx"), tmp_path / "out.onnx")
    assert caught.value.hint == "a model that cannot be run cannot be compared"
    assert not (tmp_path / "out.onnx").exists()


def measured(number: int, dtype: int, directory: Path) -> str:
    """Folds a strange graph in float32 or half precision: "folded", or the error that says why not."""
    onnx.save(strange_onnx.narrowed(strange_onnx.generate(random.Random(number)), dtype), directory / "in.onnx")
    (directory / "out.onnx").unlink(missing_ok=True)
    try:
        result = fold_onnx(str(directory / "in.onnx"), directory / "out.onnx")
    except NormswapError as error:
        assert not (directory / "out.onnx").exists()
        return error.message
    assert result.comparisons.passed
    return "folded"


# 45 and 54 are at their limit, and what is left of their norms is written otherwise.
@pytest.mark.parametrize("number", [0, 1, 2, 3, 4, 5, 6, 7, 45, 46, 54])
def test_strange_graphs_in_half_precision(number: int, tmp_path: Path) -> None:
    for dtype in (TensorProto.FLOAT, TensorProto.FLOAT16):
        said = measured(number, dtype, tmp_path)
        assert said == "folded" or "two nodes with same node name" in said  # which onnxruntime does not load


@pytest.mark.slow
def test_many_strange_graphs_in_half_precision(tmp_path: Path) -> None:
    said = [measured(number, dtype, tmp_path) for number in range(300) for dtype in (TensorProto.FLOAT, TensorProto.FLOAT16)]
    others = [message for message in said if message != "folded" and "cannot be run" not in message]
    assert others == []


# -- damaged ones -------------------------------------------------------------------------------------------------------------------------


def whole(path: Path) -> bytes:
    """A small file with something of everything: half a kilobyte, of which weights are a third."""
    body = """
        z = Tanh(x) h = BatchNormalization <epsilon=0.01> (z, s, t, m, v) r = Relu(h) p = MaxPool <kernel_shape=[2,2], strides=[1,1]> (r)
        q = Transpose <perm=[0,2,3,1]> (p) k = MatMul(q, w) l = Add(k, b) y = Transpose <perm=[0,3,1,2]> (l)
    """
    vectors = [from_array(np.arange(1, 4, dtype=np.float32), name) for name in "stmvb"]
    proto = text(body, *vectors, from_array(np.eye(3, dtype=np.float32), "w"), head="float[b,3,6,5] x) => (float[o,p,q,r] y")
    onnx.save(proto, path)
    return path.read_bytes()


def is_said_or_sound(data: bytes, directory: Path) -> int:
    """Folds a damaged file from the command line: an error in one line and no file, or a file that was measured. Never a traceback."""
    source, target = directory / "in.onnx", directory / "out.onnx"
    source.write_bytes(data)
    target.unlink(missing_ok=True)
    found = CliRunner().invoke(app, ["fold", str(source), "-o", str(target), "--input", "2x3x6x5"])
    assert found.exception is None or isinstance(found.exception, SystemExit), found.exception
    assert found.exit_code in (0, 1, 2, 3)
    assert target.exists() == (found.exit_code == 0)
    if found.exit_code:
        assert found.stderr.startswith("error: "), found.stderr
    else:
        assert "FAILED" not in found.stdout
        assert "nothing to fold" in found.stdout or "onnxruntime (all): worst of" in found.stdout
    return found.exit_code


@pytest.mark.parametrize("step", [pytest.param(23, id="some"), pytest.param(1, id="all", marks=pytest.mark.slow)])
def test_a_file_that_was_cut_off_at_any_length(step: int, tmp_path: Path) -> None:
    data = whole(tmp_path / "whole.onnx")
    assert is_said_or_sound(data, tmp_path) == 0
    for length in range(0, len(data), step):
        assert is_said_or_sound(data[:length], tmp_path) == 1, length


@pytest.mark.parametrize("count", [pytest.param(60, id="some"), pytest.param(3000, id="many", marks=pytest.mark.slow)])
def test_a_file_in_which_bytes_were_changed(count: int, tmp_path: Path) -> None:
    data, codes = whole(tmp_path / "whole.onnx"), set()
    for number in range(count):
        r, damaged = random.Random(number), bytearray(data)
        for _ in range(r.randint(1, 3)):
            damaged[r.randrange(len(damaged))] = r.randrange(256)
        codes.add(is_said_or_sound(bytes(damaged), tmp_path))
    assert {0, 1} <= codes


def large(directory: Path, *, norm: bool, cut: bool = False) -> Path:
    """A file with 2.25 GiB of zeros beside it, none of which are on the disk."""
    directory.mkdir()
    width = 24_576
    with (directory / "weights.bin").open("wb") as file:
        file.truncate(4 * width * width - (4096 if cut else 0))
    weight = TensorProto(name="w", data_type=TensorProto.FLOAT, dims=[width, width], data_location=TensorProto.EXTERNAL)
    for key, value in (("location", "weights.bin"), ("offset", "0"), ("length", str(4 * width * width))):
        weight.external_data.add(key=key, value=value)
    vectors = [from_array(np.full(width, number, np.float32), name) for name, number in (("s", 2), ("t", 3), ("m", 1), ("v", 1))]
    body = "h = Gemm(x, w) y = BatchNormalization(h, s, t, m, v)" if norm else "h = Gemm(x, w) y = Relu(h)"
    proto = text(body, weight, *vectors, head=f"float[b,{width}] x) => (float[p,q] y")
    (directory / "model.onnx").write_bytes(proto.SerializeToString())
    return directory / "model.onnx"


@pytest.mark.slow
def test_more_than_two_gibibytes(tmp_path: Path) -> None:
    folded = fold(large(tmp_path / "norm", norm=True), tmp_path / "out.onnx")
    assert folded.nodes == {"Gemm": 1}
    assert (tmp_path / "out.onnx.data").stat().st_size >= 9 << 28
    made = onnx.load(tmp_path / "out.onnx", load_external_data=False)
    (bias,) = (onnx.numpy_helper.to_array(t, str(tmp_path)) for t in made.graph.initializer if t.name.endswith("bias"))
    np.testing.assert_allclose(bias, 3 - 2 / np.sqrt(1 + 1e-5), rtol=1e-6)
    (tmp_path / "out.onnx.data").unlink()
    (tmp_path / "plain").mkdir()
    plain = fold(large(tmp_path / "in", norm=False), tmp_path / "plain" / "model.onnx")
    assert not plain.changed
    assert (tmp_path / "plain" / "weights.bin").stat().st_size == (tmp_path / "in" / "weights.bin").stat().st_size


@pytest.mark.slow
def test_large_weights_that_were_cut_off(tmp_path: Path) -> None:
    with pytest.raises(
        LoadError, match=r"not a valid ONNX file: .*weights\.bin has 2,415,915,008 bytes, and w is expected to end at 2,415,919,104"
    ):
        fold(large(tmp_path / "cut", norm=True, cut=True), tmp_path / "out.onnx")
    assert not (tmp_path / "out.onnx").exists()
    with (tmp_path / "inline.onnx").open("wb") as file:
        file.truncate(9 << 28)
    with pytest.raises(LoadError, match="is not an ONNX file, or it was cut off"):
        fold(tmp_path / "inline.onnx", tmp_path / "out.onnx")
