"""`normswap fold` on files that others wrote: torch's own exporter, graphs in ONNX's text form, and files that are broken."""

from __future__ import annotations

import json
import warnings
from collections.abc import Callable
from pathlib import Path

import numpy as np
import onnx
import onnx_ir as ir
import pytest
import torch
from onnx import parser
from onnx.numpy_helper import from_array, to_array
from onnx_text import CONV, NORM, NORM3, RNG, model_of, run, saved, tensor
from torch import nn
from typer.testing import CliRunner

import normswap.export.any_file
from benchmarks.onnx_skeletons import PreActivation
from fixtures.nets import randomise
from normswap.api.fold import fold_onnx
from normswap.cli.app import app
from normswap.errors import ExportError, LoadError, UsageError
from normswap.export.any_file import Folded, fold
from normswap.parity.result import ParityError
from normswap.report.onnx import fold_json, fold_summary

# -- what folds -----------------------------------------------------------------------------------------------------------------------

FOLDS: dict[str, tuple[onnx.ModelProto, dict[str, int]]] = {
    "conv, norm": (model_of("h = Conv(x, w, c) y = BatchNormalization(h, s, t, m, v)", *CONV, *NORM), {"Conv": 1}),
    "norm, conv": (
        model_of("h = BatchNormalization <epsilon=0.01> (x, s, t, m, v) y = Conv(h, w)", *CONV, *NORM3),
        {"Conv": 1},
    ),
    "the four operations of a norm by hand": (
        model_of(
            "h = Conv(x, w) h1 = Sub(h, m) h2 = Div(h1, s) h3 = Mul(h2, k) y = Add(t, h3)",
            *CONV,
            *(tensor(name, 4, 1, 1, low=0.5) for name in "mskt"),
        ),
        {"Conv": 1},
    ),
    "the four operations, and nowhere to go": (
        model_of("h = Sub(x, m) h1 = Mul(h, s) h2 = Mul(h1, k) y = Add(h2, t)", *(tensor(name, 3, 1, 1, low=0.5) for name in "mskt")),
        {"BatchNormalization": 1},
    ),
    "a number minus x": (model_of("h = Sub(one, x) y = Conv(h, w, c)", *CONV, from_array(np.float32(1), "one")), {"Conv": 1}),
    "through a ReLU": (
        model_of("z = Tanh(x) h = BatchNormalization(z, s, t, m, v) r = Relu(h) y = Conv(r, w, c)", *CONV, *NORM3),
        {"Tanh": 1, "Max": 1, "Conv": 1},
    ),
}


# onnx's own evaluator has the statistics of the batch in it there, and would be the judge of them.
@pytest.mark.parametrize("opset", [13, 11])
def test_a_norm_of_an_older_opset_is_in_inference_mode(opset: int, tmp_path: Path) -> None:
    body = "h = Conv(x, w, c) y = BatchNormalization(h, s, t, m, v)"
    source = saved(tmp_path / "in.onnx", model_of(body, *CONV, *NORM, imports=f'"": {opset}', ir_version=7))
    result = fold_onnx(str(source), tmp_path / "out.onnx")
    assert result.nodes == {"Conv": 1}
    same = [normswap.verify(source, tmp_path / "out.onnx"), normswap.verify(tmp_path / "out.onnx", source)]
    assert all(same)
    other = {tensor.name: tensor for tensor in (*NORM, from_array(1.01 * to_array(NORM[3]), "v"))}
    saved(tmp_path / "other.onnx", model_of(body, *CONV, *other.values(), imports=f'"": {opset}', ir_version=7))
    assert not normswap.verify(source, tmp_path / "other.onnx")


@pytest.mark.parametrize(
    ("body", "opset", "corrected"),
    [
        ("y = BatchNormalization(x, s, t, m, v)", 7, True),
        ("y = BatchNormalization <momentum=0.5> (x, s, t, m, v)", 13, True),
        ("y = BatchNormalization(x, s, t, m, v)", 14, False),
        ("y, n, u = BatchNormalization(x, s, t, m, v)", 9, False),
        ("y = BatchNormalization <spatial=0> (x, s, t, m, v)", 7, False),
        ("y = Relu(x)", 13, False),
    ],
)
def test_the_evaluator_is_corrected_where_it_is_wrong(body: str, opset: int, corrected: bool) -> None:
    from normswap.parity.run_onnx import corrected_operators

    assert bool(corrected_operators(model_of(body, *NORM3, imports=f'"": {opset}', ir_version=7))) == corrected


@pytest.mark.parametrize("case", FOLDS)
def test_folds(case: str, tmp_path: Path) -> None:
    proto, nodes = FOLDS[case]
    source = saved(tmp_path / "in.onnx", proto)
    result = fold_onnx(str(source), tmp_path / "out.onnx", inputs=["2x3x6x5"])
    assert result.changed
    assert result.nodes == nodes
    assert result.parity is not None
    assert result.parity.passed
    for batch in (1, 7):
        x = RNG.standard_normal((batch, 3, 6, 5)).astype(np.float32)
        want, got = run(source, x), run(tmp_path / "out.onnx", x)
        np.testing.assert_allclose(got, want, atol=1e-5 * np.abs(want).max())
    made = onnx.load(tmp_path / "out.onnx")
    assert [(o.domain, o.version) for o in made.opset_import] == [("", 20)]
    assert [value.name for value in (*made.graph.input, *made.graph.output)] == ["x", "y"]


def test_a_weight_that_is_folded_twice_keeps_its_name(tmp_path: Path) -> None:
    """It was called k_folded: the second fold did not know the name before the first."""
    body = "z = Tanh(x) f = BatchNormalization(z, s, t, m, v) q = Conv(f, k) n = BatchNormalization(q, s, t, m, v) y = Relu(n)"
    source = saved(tmp_path / "in.onnx", model_of(body, *NORM3, tensor("k", 3, 3, 1, 1)))
    assert fold(source, tmp_path / "out.onnx").nodes == {"Tanh": 1, "Conv": 1, "Relu": 1}
    assert [t.name for t in onnx.load(tmp_path / "out.onnx").graph.initializer] == ["k", "k_bias"]


def test_a_file_of_torchs_exporter(tmp_path: Path) -> None:
    torch.manual_seed(3)
    model = randomise(PreActivation(), 3).eval()
    for module in model.modules():
        if isinstance(module, nn.BatchNorm2d):
            nn.init.uniform_(module.weight, 0.5, 1.5)
    x = torch.randn(2, 3, 12, 10)
    source, target = tmp_path / "in.onnx", tmp_path / "out.onnx"
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # torch's own
        torch.onnx.export(model, (x,), source, dynamic_shapes=({0: "batch"},), dynamo=True, verbose=False, external_data=False)
    result = fold_onnx(str(source), target)
    assert all(site.left == () for site in result.sites)
    assert not {"BatchNormalization", "Mul"} & set(result.nodes)
    assert result.nodes["Add"] == 4
    with torch.no_grad():
        want = model.double()(x.double()).numpy()
    assert np.abs(run(target, x.numpy()) - want).max() <= 1e-5 * np.abs(want).max()
    again = fold_onnx(str(target), tmp_path / "again.onnx")
    assert not again.changed
    assert (tmp_path / "again.onnx").read_bytes() == target.read_bytes()


def test_large_weights_stay_in_a_file_of_their_own(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("normswap.export.file.INLINE_LIMIT", 100_000)
    wide = (tensor("w", 300, 3, 9, 9), *(tensor(name, 300, low=0.5) for name in "stmv"))
    proto = model_of("h = Conv(x, w) y = BatchNormalization(h, s, t, m, v)", *wide, inputs="float[b,3,11,10] x")
    source = tmp_path / "in" / "model.onnx"
    source.parent.mkdir()
    onnx.save(proto, source, save_as_external_data=True, location="weights.bin", size_threshold=0)
    result = fold_onnx(str(source), tmp_path / "out" / "model.onnx")
    assert result.nodes == {"Conv": 1}
    assert sorted(path.name for path in (tmp_path / "out").iterdir()) == ["model.onnx", "model.onnx.data"]
    x = RNG.standard_normal((2, 3, 11, 10)).astype(np.float32)
    want, got = run(source, x), run(tmp_path / "out" / "model.onnx", x)
    np.testing.assert_allclose(got, want, atol=1e-5 * np.abs(want).max())


# -- what does not --------------------------------------------------------------------------------------------------------------------

UNCHANGED: dict[str, Callable[[], onnx.ModelProto]] = {
    "no norm": lambda: model_of("h = Conv(x, w, c) y = Relu(h)", *CONV),
    "a norm with nothing to take it": lambda: model_of("y = BatchNormalization(x, s, t, m, v)", *NORM3),
    "a norm between two activations": lambda: model_of("a = Tanh(x) h = BatchNormalization(a, s, t, m, v) y = Sigmoid(h)", *NORM3),
    "a norm in training mode": lambda: model_of(
        "h, i, j = BatchNormalization <training_mode=1> (x, s, t, m, v) y = Conv(h, w)", *CONV, *NORM3
    ),
    "weights that a caller may replace": lambda: model_of("h = Conv(x, w) y = Relu(h)", *CONV, inputs="float[b,3,6,5] x, float[4,3,3,3] w"),
    "integers": lambda: model_of(
        "i = Cast <to=7> (x) j = Mul(i, two) k = Add(j, two) y = Cast <to=1> (k)", from_array(np.array([2]), "two")
    ),
    "an operator of somebody's own": lambda: model_of(
        "h = BatchNormalization(x, s, t, m, v) y = own.Swirl(h)", *NORM3, imports='"": 20, "own": 1'
    ),
    "quantised": lambda: model_of(
        "h = BatchNormalization(x, s, t, m, v) q = QuantizeLinear(h, a, z) p = DequantizeLinear(q, a, z) k = DequantizeLinear(i, a, n) "
        "y = Conv(p, k)",
        *NORM3,
        from_array(np.float32(0.1), "a"),
        from_array(np.uint8(3), "z"),
        from_array(np.int8(0), "n"),
        from_array(RNG.integers(-9, 9, (4, 3, 3, 3)).astype(np.int8), "i"),
    ),
    "a weight computed from the input": lambda: model_of(
        "h = BatchNormalization(x, s, t, m, v) p = GlobalAveragePool(x) q = ReduceSum <keepdims=0> (p, all) k = Mul(w, q) y = Conv(h, k)",
        *CONV,
        *NORM3,
        from_array(np.array([0, 1, 2, 3]), "all"),
    ),
    "inside a branch": lambda: model_of(
        "q = ReduceMax <keepdims=0> (x) p = Greater(q, zero) "
        "y = If(p) <then_branch = a () => (float[b,3,6,5] o) { o = BatchNormalization(x, s, t, m, v) }, "
        "else_branch = e () => (float[b,3,6,5] o2) { o2 = Identity(x) }>",
        *NORM3,
        from_array(np.float32(0), "zero"),
    ),
}


@pytest.mark.parametrize("case", UNCHANGED)
def test_nothing_to_fold_is_the_same_bytes(case: str, tmp_path: Path) -> None:
    source, target = saved(tmp_path / "in.onnx", UNCHANGED[case]()), tmp_path / "out.onnx"
    found = CliRunner().invoke(app, ["fold", str(source), "-o", str(target)])
    assert found.exit_code == 0, found.stderr
    assert "nothing to fold" in found.stdout
    assert target.read_bytes() == source.read_bytes()


def test_it_says_why_nothing_was_folded(tmp_path: Path) -> None:
    theirs = fold(saved(tmp_path / "a.onnx", UNCHANGED["weights that a caller may replace"]()), tmp_path / "b.onnx")
    assert theirs.notes == (
        "1 of its weights are inputs that a caller may replace: "
        "`onnx_ir.passes.common.RemoveInitializersFromInputsPass` makes constants of them",
    )


def test_a_copy_takes_its_weights_along(tmp_path: Path) -> None:
    (tmp_path / "in").mkdir()
    source = tmp_path / "in" / "model.onnx"
    onnx.save(model_of("h = Conv(x, w, c) y = Relu(h)", *CONV), source, save_as_external_data=True, location="w.bin", size_threshold=0)
    result = fold_onnx(str(source), tmp_path / "out" / "model.onnx")
    assert not result.changed
    assert (tmp_path / "out" / "w.bin").read_bytes() == (tmp_path / "in" / "w.bin").read_bytes()


def test_what_a_norm_cannot_leave_is_said(tmp_path: Path) -> None:
    result = fold(saved(tmp_path / "a.onnx", UNCHANGED["an operator of somebody's own"]()), tmp_path / "b.onnx")
    assert isinstance(result, Folded)
    assert [site.left for site in result.sites] == [("BatchNormalization",)]
    assert "Swirl" in result.sites[0].reason


# -- what else gets shorter ------------------------------------------------------------------------------------------------------------

# What torch makes of a transposition of the last two axes if it does not know the rank, and a reshape to the shape that is there.
DETOUR = "r = Reshape(y0, p) q = Transpose<perm=[0, 2, 1]>(r) u = Reshape(q, o) y = Reshape(u, o)"
SHAPES = (from_array(np.array([-1, 4, 3]), "p"), from_array(np.array([-1, 4, 3, 4]), "o"))


def detour(before: str, *arrays: onnx.TensorProto, **options: str) -> onnx.ModelProto:
    return model_of(f"{before} {DETOUR}", *CONV, *SHAPES, *arrays, **options)


def test_the_rest_of_a_graph_that_was_folded_is_shortened(tmp_path: Path) -> None:
    source = saved(tmp_path / "in.onnx", detour("h = Conv(x, w, c) y0 = BatchNormalization(h, s, t, m, v)", *NORM))
    result = fold_onnx(str(source), tmp_path / "out.onnx")
    assert result.nodes == {"Conv": 1, "Transpose": 1}
    assert result.notes == ()
    assert result.comparisons.passed


def test_the_rest_of_a_graph_with_nothing_to_fold_is_not(tmp_path: Path) -> None:
    source = saved(tmp_path / "in.onnx", detour("y0 = Conv(x, w, c)"))
    found = CliRunner().invoke(app, ["fold", str(source), "-o", str(tmp_path / "out.onnx")])
    assert found.exit_code == 0
    assert "nothing to fold" in found.stdout
    assert (tmp_path / "out.onnx").read_bytes() == source.read_bytes()


def test_a_shape_that_a_caller_may_replace_stays(tmp_path: Path) -> None:
    inputs = "float[b,3,6,5] x, int64[4] o"
    proto = detour("h = Conv(x, w, c) y0 = BatchNormalization(h, s, t, m, v)", *NORM, inputs=inputs)
    folded = fold(saved(tmp_path / "in.onnx", proto), tmp_path / "out.onnx")
    assert folded.nodes == {"Conv": 1, "Reshape": 3, "Transpose": 1}
    made = onnx.load(tmp_path / "out.onnx").graph
    assert [value.name for value in made.input] == ["x", "o"]
    assert "o" in [initializer.name for initializer in made.initializer]


def test_a_norm_that_stays_is_not_folded_by_what_shortens(tmp_path: Path) -> None:
    body = "h = Conv(x, w, c) y0 = BatchNormalization(h, s, t, m, v) y1 = Conv(y0, w4) y = BatchNormalization(y1, s, t, m, v)"
    proto = model_of(body, *CONV, *NORM, tensor("w4", 4, 4, 1, 1))
    for node in proto.graph.node:
        node.name = f"the_{node.output[0]}"
    source = saved(tmp_path / "in.onnx", proto)
    both = fold(source, tmp_path / "out.onnx")
    assert both.nodes == {"Conv": 2}
    one = fold(source, tmp_path / "out.onnx", kept={both.sites[0].name: "for the test"})
    assert one.nodes == {"Conv": 2, "BatchNormalization": 1}


def test_a_function_stays_one(tmp_path: Path) -> None:
    text = (
        '<ir_version: 10, opset_import: ["": 20, "own": 1]> g (float[b,3,6,5] x) => (float[ob,oc,oh,ow] y) '
        "{ h = Conv(x, w, c) h1 = BatchNormalization(h, s, t, m, v) y = own.Twice(h1) } "
        '<opset_import: ["": 20], domain: "own"> Twice (a) => (b) { b = Add(a, a) }'
    )
    proto = parser.parse_model(text)
    proto.graph.initializer.extend([*CONV, *NORM])
    result = fold_onnx(str(saved(tmp_path / "in.onnx", proto)), tmp_path / "out.onnx")
    assert result.nodes == {"Conv": 1, "own::Twice": 1}
    assert [function.name for function in onnx.load(tmp_path / "out.onnx").functions] == ["Twice"]


def test_shapes_are_those_that_the_file_had_and_notes_stay(tmp_path: Path) -> None:
    proto = model_of("a = Tanh(x) h = Conv(a, w, c) z = BatchNormalization(h, s, t, m, v) y = Sigmoid(z)", *CONV, *NORM)
    proto.graph.value_info.append(onnx.helper.make_tensor_value_info("a", onnx.TensorProto.FLOAT, ["b", 3, 6, 5]))
    proto.graph.node[0].metadata_props.add(key="author", value="somebody")
    proto.metadata_props.add(key="licence", value="theirs")
    proto.producer_name = "a tool"
    fold(saved(tmp_path / "in.onnx", proto), tmp_path / "out.onnx")
    made = onnx.load(tmp_path / "out.onnx")
    assert [node.op_type for node in made.graph.node] == ["Tanh", "Conv", "Sigmoid"]
    assert [value.name for value in made.graph.value_info] == ["a"]
    assert [entry.value for entry in made.graph.node[0].metadata_props] == ["somebody"]
    assert {entry.key for entry in made.metadata_props} == {"licence", "normswap_version"}
    assert made.producer_name == "a tool"


@pytest.mark.parametrize("kind", ["raises", "is wrong", "is not valid"])
def test_what_cannot_be_shortened_is_folded_all_the_same(kind: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def shorten(model: ir.Model) -> None:
        node = next(node for node in model.graph if node.op_type == "Transpose")
        if kind == "raises":
            raise ValueError("a graph that it does not know")
        if kind == "is wrong":
            ir.convenience.replace_all_uses_with(node.outputs[0], node.inputs[0])  # the same number of values in another order
        else:
            node.op_type = "Transposition"

    monkeypatch.setattr("normswap.export.any_file.simplify", shorten)
    source = saved(tmp_path / "in.onnx", detour("h = Conv(x, w, c) y0 = BatchNormalization(h, s, t, m, v)", *NORM))
    result = fold_onnx(str(source), tmp_path / "out.onnx")
    assert result.nodes == {"Conv": 1, "Reshape": 3, "Transpose": 1}
    assert result.comparisons.passed
    (note,) = result.notes
    why = {
        "raises": "the folded graph cannot be shortened: a graph that it does not know",
        "is wrong": "#0 in onnxruntime (disabled) was ",
        "is not valid": "the folded graph is not valid: No Op registered for Transposition",
    }
    assert note.startswith(f"the rest of the graph stays as it is: {why[kind]}")


# -- what is refused --------------------------------------------------------------------------------------------------------------------


def broken(kind: str, path: Path) -> Path:
    data = saved(path, FOLDS["conv, norm"][0]).read_bytes()
    if kind == "cut off":
        path.write_bytes(data[: len(data) // 2])
    elif kind == "empty":
        path.write_bytes(b"")
    elif kind == "something else":
        path.write_bytes(b"PK\x03\x04 this is no protobuf")
    elif kind == "not valid":
        onnx.save(model_of("h = Conv(x, nowhere) y = Relu(h)"), path)
    elif kind == "without its weights":
        onnx.save(model_of("y = Conv(x, w)", CONV[0]), path, save_as_external_data=True, location="gone.bin", size_threshold=0)
        (path.parent / "gone.bin").unlink()
    else:
        path.unlink()
    return path


@pytest.mark.parametrize(
    ("kind", "message"),
    [
        ("cut off", "is not an ONNX file, or it was cut off"),
        ("empty", "it has no graph"),
        ("something else", "is not an ONNX file"),
        ("not valid", "is not a valid ONNX file: .*nowhere"),
        ("without its weights", "keeps weights in .gone.bin., which is not there"),
        ("missing", "does not exist"),
    ],
)
def test_a_broken_file_is_an_error_and_nothing_is_written(kind: str, message: str, tmp_path: Path) -> None:
    source = broken(kind, tmp_path / "in.onnx")
    with pytest.raises(LoadError, match=message):
        fold_onnx(str(source), tmp_path / "out.onnx")
    assert not (tmp_path / "out.onnx").exists()
    found = CliRunner().invoke(app, ["fold", str(source), "-o", str(tmp_path / "out.onnx")])
    assert found.exit_code == 1
    assert found.stderr.startswith("error: ")


def test_a_fold_that_is_wrong_is_undone(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from normswap.folding.linear import Linear

    monkeypatch.setattr(Linear, "response", lambda self, shift: np.zeros(self.outputs))  # forgets W t
    source, target = saved(tmp_path / "in.onnx", FOLDS["norm, conv"][0]), tmp_path / "out.onnx"
    result = fold_onnx(str(source), target, inputs=["2x3x6x5"])
    assert not result.changed
    (site,) = result.sites
    assert site.left == ("BatchNormalization",)
    assert site.reason.startswith("rolled back: folded, #0 in onnxruntime (disabled) was ")
    assert site.reason.endswith(" passes")
    assert fold_json(str(source), result)["status"] == "rolled back"
    assert fold_summary(result).startswith("nothing was folded: what could be was rolled back, as it did not pass\n")
    assert target.read_bytes() == source.read_bytes()


def test_what_fails_is_not_written(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from normswap.folding.linear import Linear

    monkeypatch.setattr(Linear, "response", lambda self, shift: np.zeros(self.outputs))
    monkeypatch.setattr("normswap.api.fold.search", lambda attempt: attempt({}))  # finds nothing that could be undone
    source = saved(tmp_path / "in.onnx", FOLDS["norm, conv"][0])
    with pytest.raises(ParityError):
        fold_onnx(str(source), tmp_path / "out.onnx", inputs=["2x3x6x5"])
    assert not (tmp_path / "out.onnx").exists()
    found = CliRunner().invoke(app, ["fold", str(source), "-o", str(tmp_path / "out.onnx"), "--input", "2x3x6x5"])
    assert found.exit_code == 3


def test_inputs_that_the_file_does_not_say(tmp_path: Path) -> None:
    proto = model_of("h = BatchNormalization(x, s, t, m, v) y = Conv(h, w)", *CONV, *NORM3, inputs="float[b,3,height,width] x")
    source = saved(tmp_path / "in.onnx", proto)
    assert fold_onnx(str(source), tmp_path / "out.onnx").changed  # the first size that is tried, 64, is one at which it runs
    body = "h = BatchNormalization(x, s, t, m, v) k = Conv(h, w) f = Flatten(k) y = MatMul(f, q)"
    nine = model_of(body, *CONV, *NORM3, tensor("q", 168, 5), inputs="float[b,3,height,width] x")
    source = saved(tmp_path / "seven.onnx", nine)
    with pytest.raises(UsageError, match="does not say how large its inputs are") as caught:
        fold_onnx(str(source), tmp_path / "out.onnx")
    assert caught.value.hint == "give them: --input 1x3x224x224"
    assert fold_onnx(str(source), tmp_path / "out.onnx", inputs=["2x3x9x8"]).comparisons.passed


def test_a_directory_that_cannot_be_written(tmp_path: Path) -> None:
    with pytest.raises(ExportError, match="cannot be written"):
        fold(saved(tmp_path / "in.onnx", UNCHANGED["no norm"]()), tmp_path / "missing" / "out.onnx")


def test_in_place(tmp_path: Path) -> None:
    path = saved(tmp_path / "model.onnx", FOLDS["conv, norm"][0])
    assert fold_onnx(str(path), path).changed
    assert [node.op_type for node in onnx.load(path).graph.node] == ["Conv"]


def test_weights_are_rounded_once_from_float64(tmp_path: Path) -> None:
    proto = FOLDS["conv, norm"][0]
    fold(saved(tmp_path / "in.onnx", proto), tmp_path / "out.onnx")
    old = {i.name: to_array(i).astype(np.float64) for i in proto.graph.initializer}
    (weight,) = (to_array(i) for i in onnx.load(tmp_path / "out.onnx").graph.initializer if len(i.dims) == 4)
    scale = old["s"] / np.sqrt(old["v"] + np.float32(1e-5).astype(np.float64))
    np.testing.assert_array_equal(weight, (old["w"] * scale.reshape(4, 1, 1, 1)).astype(np.float32))


def test_json(tmp_path: Path) -> None:
    source = saved(tmp_path / "in.onnx", FOLDS["conv, norm"][0])
    found = json.loads(CliRunner().invoke(app, ["fold", str(source), "-o", str(tmp_path / "out.onnx"), "--json"]).stdout)
    assert (found["version"], found["status"], found["nodes"]) == (1, "folded", {"Conv": 1})
    assert found["nodes_before"] == {"Conv": 1, "BatchNormalization": 1}
    assert found["sites"][0]["how"] == "into_producer"
    assert found["parity"]["passed"] is True
