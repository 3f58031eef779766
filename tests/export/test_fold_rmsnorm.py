"""`fold(..., to_rmsnorm=True)`: LayerNorms of any ONNX file become RMSNorms where their input can lose its mean, and the function stays."""

from __future__ import annotations

import contextlib
import io
import json
import re
import warnings
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnxruntime
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from onnx.numpy_helper import from_array, to_array
from stream_graphs import BLOCK, END, RNG, SHAPES, START, block, error, example, made, random_graph, spelled_out
from torch import nn
from typer.testing import CliRunner

import tests.support.torchvision_shim  # noqa: F401
from fixtures import streams
from normswap.api.fold import fold_onnx
from normswap.cli.app import app
from normswap.errors import UsageError
from normswap.export.any_file import Folded, fold

LIMIT = 1e-12


def folded(proto: onnx.ModelProto, folder: Path, limit: float = LIMIT) -> Folded:
    source, target = folder / "in.onnx", folder / "out.onnx"
    onnx.save(proto, source)
    result = fold(source, target, to_rmsnorm=True)
    assert error(source, target, example(proto)) <= limit
    names = [[v.name for v in (*p.graph.input, *p.graph.output)] for p in (proto, onnx.load(target))]
    assert names[0] == names[1]
    return result


def norms_of(result: Folded) -> dict[str, str]:
    """Each LayerNorm, and why it stays."""
    assert result.layer_norms is not None
    return {site.name: site.reason for site in result.sites if site.name in result.layer_norms}


TIED = "tt = Transpose({0}) y = MatMul(m0, tt)"  # a head that shares the weight of the embedding
HALVES = f"hh = Add(h0, c) h = Tanh(hh) {BLOCK} k = Add(h, e) {END}"
OLD = f"{spelled_out('h', 'n')} n0 = Mul(nq, s) n = Add(n0, t) u = MatMul(n, w1) r = Relu(u) d = MatMul(r, w2) k = Add(h, d)"

# name -> (graph, its RMSNormalizations, explicit centrings in it)
FIRES: dict[str, tuple[onnx.ModelProto, int, int]] = {
    "a block": (made(block()), 2, 0),
    "a block in opset 23": (made(block(), opset=23), 2, 0),
    "no bias": (made(f"{START} n = LayerNormalization (h, s) u = MatMul(n, w1) y = Relu(u)"), 1, 0),
    "a gain": (made(block("l = Mul(e, g) k = Add(h, l)")), 2, 0),
    "a gain, and no bias before it": (made(f"{START} {BLOCK} l = Mul(g, d) k = Add(h, l) {END}"), 2, 0),
    "a gain that nothing takes": (made(block("f = Relu(e) l = Mul(f, g) k = Add(h, l)")), 2, 1),
    "a factor and the other sign": (made(block("l = Mul(e, half) l2 = Neg(l) k = Add(l2, h)")), 2, 0),
    "a sum of three": (made(block("k = Sum(h, e, h)")), 2, 0),
    "Gemm": (
        made("h = Gemm <transB=1, alpha=0.5, beta=2.0> (x, turned, c) k = LayerNormalization(h, s, t) y = MatMul(k, w3)", "x[b,4]"),
        1,
        0,
    ),
    "Einsum": (made(f'h0 = Einsum <equation="bld,dc->blc"> (x, w) h = Add(c, h0) {BLOCK} k = Add(h, e) {END}'), 2, 0),
    "embeddings": (made(f"q = Gather(table, i) h = Add(q, positions) {BLOCK} k = Add(h, e) {END}", "i[b,5]"), 2, 0),
    "a small table that the head reads, too": (
        made(f"h = Gather(table, i) {BLOCK} k = Add(h, e) m0 = LayerNormalization(k, s, t) {TIED.format('table')}", "i[b,5]"),
        2,
        0,
    ),
    "a large table that the head reads, too": (
        made(f"h = Gather(large, i) {BLOCK} k = Add(h, e) m0 = LayerNormalization(k, s, t) {TIED.format('large')}", "i[b,5]"),
        2,
        1,
    ),
    "a large weight of two layers of the stream": (
        made(
            f"{START} n = LayerNormalization(h, s, t) u = MatMul(n, w1) v = MatMul(u, wide) r = Relu(v) d = MatMul(r, large) "
            f"q = Sigmoid(v) e = MatMul(q, large) k0 = Add(h, d) k = Add(k0, e) {END}"
        ),
        2,
        0,
    ),
    "patches, a token and positions": (
        made(
            "p = Conv <strides=[2]> (x, patches, c) f = Reshape(p, flat) h0 = Transpose <perm=[0,2,1]> (f) sh = Shape(h0) "
            "b = Gather <axis=0> (sh, zero) o = Concat <axis=0> (b, one, six) tk = Expand(token, o) h1 = Concat <axis=1> (tk, h0) "
            f"h = Add(h1, positions) {BLOCK} k = Add(h, e) {END}",
            "x[b,4,8]",
        ),
        2,
        0,
    ),
    "a transposed convolution, pooled, on axis 1": (
        made(
            "h0 = ConvTranspose(x, up, c) h1 = AveragePool <kernel_shape=[2], strides=[2]> (h0) "
            f"h = Transpose <perm=[0,2,1]> (h1) {BLOCK} k = Add(h, e) {END}",
            "x[b,4,5]",
        ),
        2,
        0,
    ),
    "a branch that cannot be centred": (made(block("f = Tanh(e) k = Add(h, f)")), 2, 1),
    "a stem that is an activation": (made(f"h0 = MatMul(x, w) {HALVES}"), 2, 1),
    "the input itself": (made(f"h = Identity(x) {BLOCK} k = Add(x, e) {END}", "x[b,5,6]"), 2, 1),
    "a softmax and a shape of it": (made(block("k = Add(h, e) a = Softmax(k) sh = Shape(k) z = Reshape(a, sh)"), outputs="y z"), 2, 0),
    "in operators": (made(f"{START} {OLD} {spelled_out('k', 'm')} y = MatMul(mq, w3)", opset=13), 0, 0),
    "in operators, on axis 1": (
        made(f"h = Conv(x, patches, c) {spelled_out('h', 'm', 'axes=[1]')} m0 = Mul(mq, row) y = Relu(m0)", "x[b,4,5]", opset=11),
        0,
        0,
    ),
    "in operators with two differences, and a cut": (
        made(
            f"h0 = MatMul(x, w) h = Tanh(h0) {spelled_out('h', 'n')} nd2 = Sub(h, nm) z = Add(nq, nd2) d = MatMul(z, square) "
            f"k = Add(h, d) {spelled_out('k', 'm')} y = MatMul(mq, w3)",
            opset=13,
        ),
        0,
        1,
    ),
}

# Between the stream and the last norm: each passes the centring on.
PASSES = {
    "a slice of places": "k = Slice(h, zero, two_, one)",
    "a slice whose end is computed": "sh = Shape(h) en = Gather(sh, one) k = Slice(h, zero, en, one)",
    "reversed": "k = Slice(h, minus, far, one, minus)",
    "one place": "g1 = Gather <axis=1> (h, place) k = Unsqueeze(g1, one)",
    "places in two axes": "g1 = Gather <axis=1> (h, grid) k = ReduceMean <axes=[1], keepdims=0> (g1)",
    "points": "g1 = GatherND <batch_dims=1> (h, points) k = Unsqueeze(g1, one)",
    "parts": "k1, k2 = Split <axis=1> (h, split) k = Concat <axis=1> (k2, k1)",
    "padded with 0": "k = Pad(h, pads)",
    "padded by reflection": 'k = Pad <mode="reflect"> (h, pads)',
    "repeated": "k = Tile(h, tiles)",
    "chosen": "k = Where(mask, h, none)",
    "chosen from two": "h2 = Mul(h, half) k = Where(mask, h, h2)",
    "a mean over places": "k1 = ReduceMean <axes=[1]> (h) k = Add(h, k1)",
    "a sum over places": "k1 = ReduceSum <keepdims=0> (h, one) k = Unsqueeze(k1, one)",
    "attention": "a0 = Softmax(h) a1 = Transpose <perm=[0,2,1]> (a0) a = MatMul(a0, a1) k = MatMul(a, h)",
    "matrices from the left": "ht = Transpose <perm=[0,2,1]> (h) kt = MatMul(ht, places) k = Transpose <perm=[0,2,1]> (kt)",
    "resized": 'ht = Transpose <perm=[0,2,1]> (h) kt = Resize <mode="linear"> (ht, , scales) k = Transpose <perm=[0,2,1]> (kt)',
    "zeros beside it": "sh = Shape(h) z0 = ConstantOfShape(sh) z1 = CastLike(z0, h) k = Concat <axis=1> (z1, h)",
    "the mean of two": "h2 = Neg(h) h3 = Mul(h2, half) k = Mean(h, h3)",
    "in windows": "k0 = Reshape(h, windows) k1 = Transpose <perm=[2,0,1,3]> (k0) k = Squeeze(k1, zero)",
}

# What does not pass it on, and is kept. name -> (body, with k for the last norm, the start of its reason)
ITS_OWN = "it would take a centring of its own to save that of one LayerNorm: its stream is written by "
SEES = {
    "another layer": ("k = Identity(h) z = MatMul(h, w3)", "its stream is also read by MatMul"),
    "an activation": ("k = Identity(h) z = Relu(h)", "its stream is also read by Relu"),
    "an output": ("k = Identity(h) z = Neg(h)", "its stream is an output of the model"),
    "its mean read elsewhere": ("k = Identity(h) z = ReduceMean <axes=[-1]> (h)", "its stream is also read by ReduceMean"),
    "a softmax over places": ("k = Identity(h) z = Softmax <axis=1> (h)", "its stream is also read by Softmax"),
    "a norm over two axes": ("k = Identity(h) z = LayerNormalization <axis=-2> (h, two)", "its stream is also read by LayerNormalization"),
    "a norm that also has it as its scale": (
        "k = Identity(h) z0 = Gather <axis=0> (h, place) z1 = Gather <axis=0> (z0, place) z = LayerNormalization(h, z1)",
        "its stream is also read by LayerNormalization",
    ),
    "a depthwise convolution": (
        "ht = Transpose <perm=[0,2,1]> (h) kt = Conv <group=6, pads=[1,1]> (ht, depthwise) k = Transpose <perm=[0,2,1]> (kt)",
        f"{ITS_OWN}Conv",
    ),
    "a norm with gains": ("k = LayerNormalization(h, s, t)", f"{ITS_OWN}LayerNormalization"),
    "padded with another number": ("k = Pad(h, pads, half)", f"{ITS_OWN}Pad"),
    "moved along the channels": ("k = Pad(h, shifts)", f"{ITS_OWN}Pad"),
    "channels picked": ("k = Gather <axis=2> (h, picks)", f"{ITS_OWN}Gather"),
    "channels joined": ("ka, kb = Split <axis=2> (h, thirds) k = Concat <axis=2> (kb, ka)", f"{ITS_OWN}Concat"),
    "chosen by channel": ("k = Where(channels, h, none)", f"{ITS_OWN}Where"),
    "chosen from another number": ("k = Where(mask, h, half)", f"{ITS_OWN}Where"),
    "the larger of two": ("h2 = Neg(h) k = Max(h, h2)", f"{ITS_OWN}Max"),
    "a product with itself": ("k = Mul(h, h)", f"{ITS_OWN}Mul"),
    "divided by it": ("k = Div(one_, h)", f"{ITS_OWN}Div"),
    "a number divided by it": ("k = Div(half, h)", f"{ITS_OWN}Div"),
    "its mean as an output": ("z = ReduceMean <axes=[-1]> (h) k = Sub(h, z)", f"{ITS_OWN}Sub"),
    "running sums along the channels": ("k = CumSum(h, two_)", f"{ITS_OWN}CumSum"),
}


@pytest.mark.parametrize("case", FIRES)
def test_the_function_stays(case: str, tmp_path: Path) -> None:
    proto, count, cuts = FIRES[case]
    result = folded(proto, tmp_path)
    reasons = norms_of(result)
    assert reasons
    assert not any(reasons.values()), reasons
    assert result.nodes.get("RMSNormalization", 0) == count
    assert "LayerNormalization" not in result.nodes
    assert result.nodes.get("Sub", 0) == cuts
    assert sum("at run time" in note for note in result.notes) == (cuts > 0)


@pytest.mark.parametrize("case", PASSES)
def test_passes_it_on(case: str, tmp_path: Path) -> None:
    result = folded((made(f"{START} {PASSES[case]} {END}")), tmp_path)
    assert set(norms_of(result).values()) == {""}
    assert result.nodes["RMSNormalization"] == 1
    assert "Sub" not in result.nodes


@pytest.mark.parametrize("case", SEES)
def test_stays_where_the_mean_counts(case: str, tmp_path: Path) -> None:
    body, why = SEES[case]
    outputs = "y h" if case == "an output" else "y z" if " z = " in f" {body}" else "y"
    result = folded((made(f"{START} {body} {END}", outputs=outputs)), tmp_path)
    reason = norms_of(result)["m"]
    assert reason.startswith(why)
    assert reason.endswith("; leave it")
    assert "m" not in {node.output[0] for node in onnx.load(tmp_path / "out.onnx").graph.node if node.op_type == "RMSNormalization"}


def test_nothing_to_do_is_a_copy(tmp_path: Path) -> None:
    """Also of the opset."""
    result = folded(made(f"{START} k = Identity(h) {END}", outputs="y h"), tmp_path)
    assert result.nodes == result.before
    assert (tmp_path / "in.onnx").read_bytes() == (tmp_path / "out.onnx").read_bytes()


def test_a_difference_from_the_mean_has_none(tmp_path: Path) -> None:
    body = "h0 = Tanh(x) hm = ReduceMean <axes=[-1]> (h0) k = Sub(h0, hm) m = LayerNormalization(k, s) y = MatMul(m, w3)"
    result = folded(made(body, "x[b,5,6]"), tmp_path)
    assert {name: bool(reason) for name, reason in norms_of(result).items()} == {"hm": True, "m": False}
    assert result.nodes == {"Tanh": 1, "ReduceMean": 1, "Sub": 1, "RMSNormalization": 1, "MatMul": 1}


def test_behind_what_sees_the_mean_the_stream_is_cut(tmp_path: Path) -> None:
    body = block("k = Add(h, e) z = MatMul(h, w3) o = LayerNormalization(k, g)") + " p = MatMul(o, w3)"
    result = folded(made(body, outputs="y z p"), tmp_path)
    assert {name: bool(reason) for name, reason in norms_of(result).items()} == {"n": True, "o": False, "m": False}
    assert result.nodes["Sub"] == result.nodes["ReduceMean"] == 1
    assert result.notes[-1] == "the mean was taken out of 2 constants (weights, biases, tables), and at run time out of k"


# -- what is not one operator over one axis, or not to be changed -----------------------------------------------------------------------


@pytest.mark.parametrize(
    ("body", "options", "why"),
    [
        ("m = LayerNormalization <axis=1> (h, two, two) y = MatMul(m, w3)", {}, "it normalizes over 2 axes; leave it"),
        ("m, mean = LayerNormalization(h, s) y0 = MatMul(m, w3) m2 = CastLike(mean, y0) y = Add(y0, m2)", {}, "the mean or the deviation"),
        ("m, , std = LayerNormalization(h, s) y0 = MatMul(m, w3) m2 = CastLike(std, y0) y = Add(y0, m2)", {}, "the mean or the deviation"),
        ("m0 = LayerNormalization(token, s) m = Add(m0, h) y = MatMul(m, w3)", {}, "its input is a constant; leave it"),
        ("m0 = ReduceMean(h, minus) y = Sub(h, m0)", {"opset": 18}, "its result is an output of the model; leave it"),
        ("hh = Reshape(h, some) m = LayerNormalization(hh, s) y = Relu(m)", {}, "its rank is not known"),
        ("hh = Reshape(h, some) m = ReduceMean <axes=[-1]> (hh) d = Sub(hh, m) y = Relu(d)", {}, "its rank is not known"),
    ],
)
def test_norms_that_stay_by_themselves(body: str, options: dict[str, Any], why: str, tmp_path: Path) -> None:
    proto = made(f"{START} {body}", **options)
    if "some" in body:  # a shape of unknown length
        proto.graph.input.append(onnx.helper.make_tensor_value_info("some", onnx.TensorProto.INT64, [None]))
        onnx.save(proto, tmp_path / "in.onnx")
        result = fold(tmp_path / "in.onnx", tmp_path / "out.onnx", to_rmsnorm=True)
    else:
        result = folded(proto, tmp_path)
    (reason,) = norms_of(result).values()
    assert reason.startswith(why)
    assert "RMSNormalization" not in result.nodes


def quantised(proto: onnx.ModelProto, name: str) -> onnx.ModelProto:
    """The weight as int8, with a scale."""
    (tensor,) = [t for t in proto.graph.initializer if t.name == name]
    array = to_array(tensor)
    proto.graph.initializer.remove(tensor)
    proto.graph.initializer.extend(
        [from_array(np.round(array / 0.02).clip(-127, 127).astype(np.int8), "q"), from_array(np.asarray(0.02, array.dtype), "qs")]
    )
    proto.graph.node.insert(0, onnx.helper.make_node("DequantizeLinear", ["q", "qs"], [name], "dequantize"))
    return proto


def test_a_quantised_weight_stays(tmp_path: Path) -> None:
    source, target = tmp_path / "in.onnx", tmp_path / "out.onnx"
    onnx.save(quantised(made(block(), dtype="float"), "w2"), source)
    result = fold(source, target, to_rmsnorm=True)
    assert norms_of(result) == {"n": "", "m": ""}
    assert result.nodes["Sub"] == 1  # the branch is cut behind the product
    assert "DequantizeLinear" in result.nodes
    onnx.save(quantised(made(f"{START} {END.replace('k', 'h')}", dtype="float"), "w"), source)
    (reason,) = norms_of(fold(source, target, to_rmsnorm=True)).values()
    assert reason.endswith("its stream is written with w, which is quantised, which stays as it is; leave it")


def test_a_weight_that_a_caller_may_replace_stays(tmp_path: Path) -> None:
    proto = made(f"{START} {END.replace('k', 'h')}")
    proto.graph.input.append(onnx.helper.make_tensor_value_info("w", onnx.TensorProto.DOUBLE, SHAPES["w"]))
    result = folded(proto, tmp_path)
    (reason,) = norms_of(result).values()
    assert reason.endswith("its stream is written with w, which is an input that a caller may replace; leave it")
    proto = made(block())
    proto.graph.input.append(onnx.helper.make_tensor_value_info("w1", onnx.TensorProto.DOUBLE, SHAPES["w1"]))
    result = folded(proto, tmp_path)
    assert set(norms_of(result).values()) == {""}
    changed = {**example(proto), "w1": RNG.standard_normal(SHAPES["w1"])}
    assert error(tmp_path / "in.onnx", tmp_path / "out.onnx", changed) <= LIMIT


@pytest.mark.parametrize("inside", [False, True])
def test_a_norm_in_a_branch(inside: bool, tmp_path: Path) -> None:
    """A stream that is written before an If, and one that is written inside it."""
    proto = made(f"{START} {BLOCK} k = Add(h, e) {END} w_ = Relu(square) on = Greater(half, none)", dtype="float")
    inner = [node for node in proto.graph.node if node.output[0] in ("n", "u", "u1", "r", "d", "e", "k", "m", "y")]
    inner += [node for node in proto.graph.node if node.output[0] in ("h0", "h")] if inside else []
    inner.sort(key=lambda node: [n.output[0] for n in proto.graph.node].index(node.output[0]))
    kept = [node for node in proto.graph.node if node not in inner and node.output[0] != "w_"]
    shape = onnx.helper.make_tensor_value_info("y", onnx.TensorProto.FLOAT, None)
    branch = onnx.helper.make_graph(inner, "then", [], [shape])
    other = onnx.helper.make_graph(
        [onnx.helper.make_node("MatMul", ["x", "other"], ["y2"])], "else", [], [onnx.helper.make_tensor_value_info("y2", 1, None)]
    )
    proto.graph.initializer.append(from_array(np.ones((4, 3), np.float32), "other"))
    del proto.graph.node[:]
    proto.graph.node.extend([*kept, onnx.helper.make_node("If", ["on"], ["out"], then_branch=branch, else_branch=other)])
    proto.graph.output[0].name = "out"
    result = folded(proto, tmp_path, 1e-5)
    assert set(norms_of(result).values()) == {""}
    assert result.nodes["RMSNormalization"] == 2


def test_a_bias_that_others_read_has_a_copy_of_its_own(tmp_path: Path) -> None:
    """Exporters store equal constants once: a bias of 0 is that of many layers."""
    proto = made(
        f"{START} n = LayerNormalization(h, c, c) u = MatMul(n, square) v = Add(u, c) r = Relu(v) k = Add(r, c) z = Add(h, r) {END}"
    )
    result = folded(proto, tmp_path)
    assert norms_of(result)["n"] == ""
    stored = {tensor.name: to_array(tensor) for tensor in onnx.load(tmp_path / "out.onnx").graph.initializer}
    assert np.array_equal(stored["c"], to_array(next(t for t in proto.graph.initializer if t.name == "c")))


def test_names_stay(tmp_path: Path) -> None:
    proto = made(block("l = Mul(e, g) k = Add(h, l)"), dtype="float")
    for number, node in enumerate(proto.graph.node):
        node.name = f"node {number}"
    folded(proto, tmp_path, 1e-5)
    new = onnx.load(tmp_path / "out.onnx")
    names = {node.output[0]: node.name for node in proto.graph.node}
    assert [node.name for node in new.graph.node if node.op_type == "RMSNormalization"] == [names["n"], names["m"]]
    assert {"w", "c", "w1", "w2", "w3", "s"} <= {tensor.name for tensor in new.graph.initializer}
    mean = to_array(next(t for t in new.graph.initializer if t.name == "w2")).mean(1)
    assert np.abs(mean).max() <= 1e-6


def test_a_fold_leaves_a_norm_in_operators_as_runtimes_know_it(tmp_path: Path) -> None:
    """They compute ReduceMean, Sub, Pow ... Mul, Add in one, and lost it where the Mul and the Add were folded."""
    proto = made(f"{START} {OLD} {spelled_out('k', 'm')} y = MatMul(mq, w3)", opset=13, dtype="float")
    source, target = tmp_path / "in.onnx", tmp_path / "out.onnx"
    onnx.save(proto, source)
    for to_rmsnorm, name in ((False, "LayerNormalization"), (True, "SimplifiedLayerNormalization")):
        fold(source, target, to_rmsnorm=to_rmsnorm)
        options = onnxruntime.SessionOptions()
        options.optimized_model_filepath, options.log_severity_level = str(tmp_path / "optimized.onnx"), 4
        onnxruntime.InferenceSession(str(target), options, providers=["CPUExecutionProvider"])
        assert [node.op_type for node in onnx.load(tmp_path / "optimized.onnx").graph.node].count(name) == 1
    assert any(node.op_type == "Add" and "t" in node.input for node in onnx.load(source).graph.node)


# -- the opset --------------------------------------------------------------------------------------------------------------------------


def test_the_opset_is_raised(tmp_path: Path) -> None:
    result = folded(made(block(), opset=17), tmp_path)
    assert [entry.version for entry in onnx.load(tmp_path / "out.onnx").opset_import] == [23]
    assert result.notes[0] == "written in opset 23, which has RMSNormalization; the file has opset 17"
    folded(made(f"{START} {OLD} y = MatMul(k, w3)", opset=13), tmp_path)
    assert [entry.version for entry in onnx.load(tmp_path / "out.onnx").opset_import] == [13]


def test_a_file_that_cannot_be_raised(tmp_path: Path) -> None:
    """With functions, which are not inlined. What needs no RMSNormalization is done all the same."""
    source, target = tmp_path / "in.onnx", tmp_path / "out.onnx"
    old = f"{spelled_out('h', 'z')} d0 = MatMul(zq, square) h2 = Add(h, d0) {BLOCK.replace('(h,', '(h2,')} k = Add(h2, e) {END}"
    proto = made(f"x2 = Add(x, x) {START.replace('x', 'x2')} {old}", dtype="float")
    proto.graph.node[0].CopyFrom(onnx.helper.make_node("twice", ["x"], ["x2"], domain="own"))
    twice = onnx.helper.make_node("Add", ["a", "a"], ["b"])
    proto.functions.append(onnx.helper.make_function("own", "twice", ["a"], ["b"], [twice], [onnx.helper.make_opsetid("", 17)]))
    proto.opset_import.append(onnx.helper.make_opsetid("own", 1))
    onnx.save(proto, source)
    result = fold(source, target, to_rmsnorm=True)
    reasons = norms_of(result)
    assert reasons.pop("zm") == ""
    assert set(reasons) == {"n", "m"}
    for reason in reasons.values():
        assert reason.startswith("RMSNormalization needs opset 23, and the file cannot be raised to it: it has functions")
    assert error(source, target, example(proto)) <= 1e-5
    assert [entry.version for entry in onnx.load(target).opset_import if entry.domain == ""] == [17]


def test_a_layer_norm_that_onnx_does_not_know_in_that_opset(tmp_path: Path) -> None:
    """onnxruntime's optimizer writes LayerNormalization into files of any opset."""
    result = folded(made(block(), opset=13, dtype="float"), tmp_path, 1e-5)
    for reason in norms_of(result).values():
        assert reason.startswith("RMSNormalization needs opset 23, and the file cannot be raised to it: ONNX's converter has no rule")
    assert result.nodes == result.before


# -- other dtypes, other files ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", ["float", "float16"])
def test_dtypes_by_the_judge(dtype: str, tmp_path: Path) -> None:
    source, target = tmp_path / "in.onnx", tmp_path / "out.onnx"
    onnx.save(made(block("l = Mul(e, g) k = Add(h, l)"), dtype=dtype), source)
    result = fold_onnx(source, target, to="rmsnorm")
    assert set(norms_of(result).values()) == {""}
    assert result.nodes["RMSNormalization"] == 2
    assert result.parity
    types = {value.type.tensor_type.elem_type for value in (*onnx.load(target).graph.input, *onnx.load(target).graph.output)}
    assert types == {onnx.TensorProto.FLOAT if dtype == "float" else onnx.TensorProto.FLOAT16}


@pytest.mark.parametrize("opset", [17, 20, 23])
def test_external_data(opset: int, tmp_path: Path) -> None:
    source, target = tmp_path / "in.onnx", tmp_path / "out" / "out.onnx"
    target.parent.mkdir()
    proto = made(f"h = Gather(large, i) {BLOCK} k = Add(h, e) {END}", "i[b,5]", dtype="float", opset=opset)
    feeds = example(proto)
    onnx.save(proto, source, save_as_external_data=True, location="weights.bin", size_threshold=100)
    result = fold_onnx(source, target, to="rmsnorm")
    assert set(norms_of(result).values()) == {""}
    assert error(source, target, feeds) <= 1e-5


def test_a_norm_that_breaks_the_file_is_rolled_back(tmp_path: Path) -> None:
    """A weight near the largest number of float16 has no room for the mean of the others."""
    source, target = tmp_path / "in.onnx", tmp_path / "out.onnx"
    proto = made(block(), dtype="float16")
    (tensor,) = [t for t in proto.graph.initializer if t.name == "c2"]
    tensor.CopyFrom(from_array(np.array([65000, -65000, -65000, -65000, -65000, -65000], np.float16), "c2"))
    onnx.save(proto, source)
    result = fold_onnx(source, target, to="rmsnorm")
    assert result.rolled_back or result.parity
    for site in result.sites:
        if site.name in ("n", "m"):
            assert site.reason.startswith("rolled back")
    assert result.nodes == result.before


def test_to_is_rmsnorm_or_nothing(tmp_path: Path) -> None:
    onnx.save(made(block(), dtype="float"), tmp_path / "in.onnx")
    plain = fold_onnx(tmp_path / "in.onnx", tmp_path / "out.onnx")
    assert plain.layer_norms is None
    assert plain.nodes["LayerNormalization"] == 2
    with pytest.raises(UsageError, match=r"to is 'layernorm'"):
        fold_onnx(tmp_path / "in.onnx", tmp_path / "out.onnx", to="layernorm")  # type: ignore[arg-type]


def test_the_command(tmp_path: Path) -> None:
    source, target = tmp_path / "in.onnx", tmp_path / "out.onnx"
    onnx.save(made(block("k = Add(h, e)"), dtype="float"), source)
    result = CliRunner().invoke(app, ["fold", str(source), "-o", str(target), "--to", "rmsnorm"])
    assert result.exit_code == 0, result.output
    assert "2 of 2 LayerNorms became RMSNorm" in result.output
    assert "note: written in opset 23" in result.output
    assert re.search(r"^ *m +its mean into all that comes before it +RMSNormalization", result.output, re.MULTILINE)
    found = json.loads(CliRunner().invoke(app, ["fold", str(source), "-o", str(target), "--to", "rmsnorm", "--json"]).stdout)
    assert found["status"] == "folded"
    assert found["layer_norms"] == ["n", "m"]
    assert [(site["how"], site["left"]) for site in found["sites"] if site["name"] in ("n", "m")] == [("rmsnorm", ["RMSNormalization"])] * 2
    assert (found["nodes_before"]["LayerNormalization"], found["nodes"]["RMSNormalization"]) == (2, 2)
    assert found["parity"]["passed"]
    result = CliRunner().invoke(app, ["fold", str(source), "-o", str(target), "--to", "layernorm"])
    assert result.exit_code == 2


# -- files of torch's exporters ----------------------------------------------------------------------------------------------------------


def trained(model: nn.Module) -> nn.Module:
    """In eval mode, with gains, biases and means that are not trivial."""
    generator = torch.Generator().manual_seed(3)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.1 * torch.randn(parameter.shape, generator=generator) + 0.05)
    return model.eval()


def exported(model: nn.Module, x: torch.Tensor, path: Path, opset: int | None) -> Path:
    """By torch's exporter of today, or by that of TorchScript in an opset."""
    shown = io.StringIO()
    with warnings.catch_warnings(), contextlib.redirect_stdout(shown), contextlib.redirect_stderr(shown):
        warnings.simplefilter("ignore")  # those of the exporters
        if opset is None:
            torch.onnx.export(model, (x,), path, dynamo=True, verbose=False, external_data=False, dynamic_shapes=({0: "batch"},))
        else:
            torch.onnx.export(model, (x,), path, dynamo=False, opset_version=opset, input_names=["x"], dynamic_axes={"x": {0: "batch"}})
    return path


def vit() -> tuple[nn.Module, torch.Tensor]:
    import timm

    options = {"img_size": 32, "depth": 2, "embed_dim": 48, "num_heads": 3, "init_values": 0.1, "num_classes": 5}
    return trained(timm.create_model("vit_tiny_patch16_224", pretrained=False, **options)), torch.randn(2, 3, 32, 32)


def convnext() -> tuple[nn.Module, torch.Tensor]:
    import timm

    options = {"depths": (1, 1, 1, 1), "dims": (8, 16, 24, 32), "num_classes": 5}
    return trained(timm.create_model("convnext_atto", pretrained=False, **options)), torch.randn(2, 3, 32, 32)


class Logits(nn.Module):
    """The logits of GPT-2, whose head has the table of embeddings as its weight. rows: of the table."""

    def __init__(self, rows: int) -> None:
        super().__init__()
        import transformers

        config = transformers.GPT2Config(
            vocab_size=rows,
            n_positions=8,
            n_embd=24,
            n_layer=2,
            n_head=2,
            bos_token_id=None,
            eos_token_id=None,
            attn_implementation="eager",
        )
        self.model = transformers.GPT2LMHeadModel(config)

    def forward(self, ids: torch.Tensor) -> torch.Tensor:
        return self.model(ids, use_cache=False).logits  # type: ignore[no-any-return]


@pytest.mark.parametrize(("opset", "operators"), [(None, 5), (17, 5), (14, 0)])
def test_vit(opset: int | None, operators: int, tmp_path: Path) -> None:
    model, x = vit()
    source, target = exported(model, x, tmp_path / "in.onnx", opset), tmp_path / "out.onnx"
    result = fold_onnx(source, target, inputs=["2x3x32x32"], to="rmsnorm")
    assert list(norms_of(result).values()) == [""] * 5
    assert result.nodes.get("RMSNormalization", 0) == operators
    assert "LayerNormalization" not in result.nodes
    assert "Sub" not in result.nodes
    assert sum(site.name.endswith(".bias") and not site.left for site in result.sites) == 5  # all biases are folded
    assert result.parity
    for size in (1, 3):
        feeds = {onnx.load(source).graph.input[0].name: torch.randn(size, 3, 32, 32).numpy()}
        assert error(source, target, feeds) <= 1e-5


@pytest.mark.parametrize(("rows", "cuts"), [(96, 0), (1000, 1)])
def test_gpt2(rows: int, cuts: int, tmp_path: Path) -> None:
    """A small table is stored twice, of a large one what is looked up is centred."""
    model, ids = trained(Logits(rows)), torch.randint(rows, (2, 7))
    source = exported(model, ids, tmp_path / "in.onnx", None)
    result = fold_onnx(source, tmp_path / "out.onnx", inputs=(ids,), to="rmsnorm")
    assert list(norms_of(result).values()) == [""] * 5
    assert result.nodes["RMSNormalization"] == 5
    assert sum("at run time" in note for note in result.notes) == cuts
    assert result.bytes < result.bytes_before + 20_000
    assert result.parity


@pytest.mark.parametrize("opset", [None, 14])
def test_convnext(opset: int | None, tmp_path: Path) -> None:
    """Depthwise convolutions read the stream, and write what LayerNorm reads: the stem's norm alone can be one."""
    model, x = convnext()
    source = exported(model, x, tmp_path / "in.onnx", opset)
    result = fold_onnx(source, tmp_path / "out.onnx", inputs=["2x3x32x32"], to="rmsnorm")
    assert [bool(reason) for reason in norms_of(result).values()] == [False] + [True] * 8
    assert result.parity


# -- random networks ---------------------------------------------------------------------------------------------------------------------


def random_network(seed: int, opset: int | None, folder: Path) -> tuple[int, int]:
    """How many LayerNorms of a random network are exact, of how many. Asserts that none is wrong."""
    model, x = streams.net(seed)
    source, target = exported(model.double(), x.double(), folder / "in.onnx", opset), folder / "out.onnx"
    result = fold(source, target, to_rmsnorm=True)
    feeds = {onnx.load(source).graph.input[0].name: x.double().numpy()}
    assert error(source, target, feeds) <= LIMIT
    reasons = norms_of(result)
    return sum(not reason for reason in reasons.values()), len(reasons)


@settings(max_examples=8, deadline=None)
@given(seed=st.integers(0, 1 << 20), opset=st.sampled_from([17, 17, 14]))
def test_random_networks(seed: int, opset: int, tmp_path_factory: pytest.TempPathFactory) -> None:
    random_network(seed, opset, tmp_path_factory.mktemp("random"))


@settings(max_examples=40, deadline=None)
@given(seed=st.integers(0, 1 << 30))
def test_random_graphs(seed: int, tmp_path_factory: pytest.TempPathFactory) -> None:
    folded(random_graph(seed), tmp_path_factory.mktemp("random"))


@pytest.mark.slow
def test_many_random_graphs(tmp_path: Path) -> None:
    reasons = [reason for seed in range(600) for reason in norms_of(folded(random_graph(seed), tmp_path)).values()]
    assert reasons.count("") > 0.35 * len(reasons)


@pytest.mark.slow
@pytest.mark.parametrize(("opset", "count"), [(17, 300), (14, 150), (None, 60)])
def test_many_random_networks(opset: int | None, count: int, tmp_path: Path) -> None:
    found = [random_network(seed, opset, tmp_path) for seed in range(count)]
    exact, total = (sum(each) for each in zip(*found, strict=True))
    assert exact > 0.35 * total
