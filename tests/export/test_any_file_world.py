"""`normswap fold` on files of the world: old opsets, weights that are computed, shapes that nobody knows, norms wherever they are."""

from __future__ import annotations

import importlib.util
from collections import Counter
from pathlib import Path

import numpy as np
import onnx
import onnxruntime
import pytest
from onnx import TensorProto, helper
from onnx.numpy_helper import from_array, to_array
from onnx_text import CONV, NORM, NORM3, model_of, run, saved, tensor
from typer.testing import CliRunner

from normswap.api.fold import fold_onnx
from normswap.cli.app import app
from normswap.errors import LoadError, UsageError
from normswap.export.any_file import Folded, fold
from normswap.folding import Outcome

RNG = np.random.default_rng(67)
X = RNG.standard_normal((2, 3, 6, 5)).astype(np.float32)


def whole(name: str, *numbers: int) -> onnx.TensorProto:
    return from_array(np.array(numbers, np.int64), name)


def folded(tmp_path: Path, proto: onnx.ModelProto, x: np.ndarray = X) -> Folded:
    """The file folded, after a comparison in onnxruntime of our own."""
    source = saved(tmp_path / "in.onnx", proto)
    result = fold(source, tmp_path / "out.onnx")
    want, got = run(source, x), run(tmp_path / "out.onnx", x)
    np.testing.assert_allclose(got, want, atol=2e-6 * np.abs(want).max())
    assert opsets(tmp_path / "out.onnx")[""] == opsets(source)[""]
    return result


def opsets(path: Path) -> dict[str, int]:
    return {o.domain: o.version for o in onnx.load(path).opset_import}


def only(result: Folded) -> Outcome:
    (site,) = result.sites
    return site


# -- old opsets ------------------------------------------------------------------------------------------------------------------------

OLD_IR = {7: 3, 8: 3, 9: 4, 10: 5, 11: 6, 12: 7}


def old(body: str, opset: int, *arrays: onnx.TensorProto, inputs: str = "float[b,3,6,5] x") -> onnx.ModelProto:
    proto = model_of(body, *arrays, inputs=inputs, imports=f'"": {opset}', ir_version=OLD_IR[opset])
    if OLD_IR[opset] < 4:  # every weight is listed there
        for array in arrays:
            proto.graph.input.append(helper.make_tensor_value_info(array.name, array.data_type, array.dims))
    return proto


@pytest.mark.parametrize("opset", range(7, 13))
def test_every_opset_from_7_on_folds_and_stays(opset: int, tmp_path: Path) -> None:
    body = "h = Conv(x, w, c) g = BatchNormalization(h, s, t, m, v) y = Relu(g)"
    result = folded(tmp_path, old(body, opset, *CONV, *NORM))
    assert result.nodes == {"Conv": 1, "Relu": 1}
    assert only(result).how == "into_producer"


@pytest.mark.parametrize("opset", [7, 8])
def test_weights_that_an_old_file_lists_as_inputs_are_constants(opset: int, tmp_path: Path) -> None:
    """Before IR version 4 every weight was an input as well; onnxruntime lets nobody replace one."""
    result = folded(tmp_path, old("h = Conv(x, w, c) y = BatchNormalization(h, s, t, m, v)", opset, *CONV, *NORM))
    assert result.nodes == {"Conv": 1}
    assert result.notes == ("IR version 3 lists weights as inputs; the new file has IR version 4, which does not",)
    made = onnx.load(tmp_path / "out.onnx")
    assert made.ir_version == 4
    assert [value.name for value in made.graph.input] == ["x"]


def test_weights_that_a_newer_file_lists_as_inputs_stay_open(tmp_path: Path) -> None:
    inputs = "float[b,3,6,5] x, float[4] s"
    result = folded(tmp_path, model_of("h = Conv(x, w, c) y = BatchNormalization(h, s, t, m, v)", *CONV, *NORM, inputs=inputs))
    assert not result.changed
    assert only(result).reason == (
        "its scale is not a constant: s is an input that a caller may replace: leave it out of the inputs of the file"
    )


# What was an attribute once: (body, opset, constants, what is left of it).
FORMS = {
    "Slice": ("h = Conv(x, w, c) p = Slice <starts=[1], ends=[3], axes=[1]> (h) y = BatchNormalization(p, s, t, m, v)", 9, 2),
    "Slice from its front": ("h = Conv(x, w, c) p = Slice <starts=[0,1], ends=[9,9]> (h) y = BatchNormalization(p, s, t, m, v)", 9, 3),
    "Pad": ("h = Conv(x, w, c) p = Pad <pads=[0,0,1,0,0,0,0,1]> (h) y = Mul(p, k)", 10, 4),
    "a crop": ("h = Conv(x, w, c) p = Pad <pads=[0,0,-1,0,0,0,0,-1]> (h) y = BatchNormalization(p, s, t, m, v)", 10, 4),
    "Squeeze": (
        "h = Conv(x, w, c) p = ReduceMean <axes=[2,3]> (h) q = Squeeze <axes=[2,3]> (p) y0 = BatchNormalization(q, s, t, m, v) "
        "y = Unsqueeze <axes=[2,3]> (y0)",
        11,
        4,
    ),
    "Upsample": ('h = Conv(x, w, c) p = Upsample <mode="nearest"> (h, sizes) y = BatchNormalization(p, s, t, m, v)', 9, 4),
    "Resize": ('h = Conv(x, w, c) p = Resize <mode="linear"> (h, sizes) y = BatchNormalization(p, s, t, m, v)', 10, 4),
    "Dropout": ("h = Conv(x, w, c) p = Dropout <ratio=0.3> (h) y = BatchNormalization(p, s, t, m, v)", 10, 4),
}


@pytest.mark.parametrize("case", FORMS)
def test_what_was_an_attribute_once(case: str, tmp_path: Path) -> None:
    body, opset, channels = FORMS[case]
    k = from_array(RNG.uniform(0.5, 1, (4, 1, 1)).astype(np.float32), "k")
    norm = [tensor(name, channels, low=0.5) for name in "stmv"]
    arrays = [
        a
        for a in (*CONV, *norm, k, from_array(np.array([1, 1, 2, 2], np.float32), "sizes"))
        if f" {a.name}" in body.replace(",", " ,").replace("(", " ")
    ]
    result = folded(tmp_path, old(body, opset, *arrays))
    if case == "Slice from its front":
        assert "cuts along several axes" in only(result).reason
    else:
        assert only(result).left == (), result
    assert "BatchNormalization" not in result.nodes or case == "Slice from its front"


@pytest.mark.parametrize("opset", [7, 8])
def test_a_maximum_with_a_constant_needs_opset_8(opset: int, tmp_path: Path) -> None:
    body = "z = Tanh(x) h = BatchNormalization(z, s, t, m, v) r = Relu(h) y = Conv(r, w, c)"
    result = folded(tmp_path, old(body, opset, *CONV, *NORM3))
    assert result.nodes == ({"Tanh": 1, "Max": 1, "Conv": 1} if opset == 8 else {"Tanh": 1, "BatchNormalization": 1, "Relu": 1, "Conv": 1})
    if opset == 7:
        assert "would become a maximum with a number per channel, which opset 7 lacks" in only(result).reason


def test_statistics_for_each_place_of_an_old_file(tmp_path: Path) -> None:
    norm = [tensor(name, 3, 6, 5, low=0.5) for name in "stmv"]
    source = saved(tmp_path / "in.onnx", old("y = BatchNormalization <spatial=0> (x, s, t, m, v)", 8, *norm))
    assert only(fold(source, tmp_path / "out.onnx")).reason == "its scale has 3 dimensions, so it is not one number per channel"


def test_the_long_name_of_onnxs_domain(tmp_path: Path) -> None:
    proto = model_of("h = Conv(x, w, c) y = BatchNormalization(h, s, t, m, v)", *CONV, *NORM)
    proto.opset_import[0].domain = "ai.onnx"
    source = saved(tmp_path / "in.onnx", proto)
    result = fold(source, tmp_path / "out.onnx")
    assert result.nodes == {"Conv": 1}
    np.testing.assert_allclose(run(tmp_path / "out.onnx", X), run(source, X), atol=1e-5)


def test_what_is_older_is_listed_and_says_how(tmp_path: Path) -> None:
    proto = model_of("h = Conv(x, w, c) y = BatchNormalization <is_test=1> (h, s, t, m, v)", *CONV, *NORM)
    proto.opset_import[0].version = 6
    proto.ir_version = 3
    for array in (*CONV, *NORM):
        proto.graph.input.append(helper.make_tensor_value_info(array.name, array.data_type, array.dims))
    source = saved(tmp_path / "in.onnx", proto)
    result = fold(source, tmp_path / "out.onnx")
    assert only(result).left == ("BatchNormalization",)
    assert only(result).reason == (
        "the file has opset 6, and files older than opset 7 are left as they are: `onnx.version_converter.convert_version(model, 13)` "
        "makes a newer file of it"
    )
    assert (tmp_path / "out.onnx").read_bytes() == source.read_bytes()


# -- weights that are computed from constants --------------------------------------------------------------------------------------------

W = RNG.standard_normal((4, 3, 3, 3)).astype(np.float32)
COMPUTED = {
    "Constant": ("w = Constant <value = float[4,3,1,1] {1,2,3,4,5,6,7,8,9,10,11,12}> ()", ()),
    "Identity": ("w = Identity(a)", (from_array(W, "a"),)),
    "Identity of an Identity": ("b = Identity(a) w = Identity(b)", (from_array(W, "a"),)),
    "Transpose": ("w = Transpose <perm=[3,2,0,1]> (a)", (from_array(W.transpose(2, 3, 1, 0).copy(), "a"),)),  # as TensorFlow has them
    "Cast": ("w = Cast <to=1> (a)", (from_array(W.astype(np.float16), "a"),)),
    "Mul": ("w = Mul(a, g)", (from_array(W, "a"), tensor("g", 4, 1, 1, 1))),
    "Unsqueeze": ("w = Unsqueeze(a, axes)", (from_array(W[..., 0].copy(), "a"), whole("axes", 3))),
    "Squeeze": ("w = Squeeze(a, axes)", (from_array(W[None].copy(), "a"), whole("axes", 0))),
    "Reshape": ("w = Reshape(a, shape)", (from_array(W.reshape(-1), "a"), whole("shape", 4, 3, 3, -1))),
    "Split, Squeeze": (
        "a0, a1, a2 = Split <axis=0> (a, parts) w = Squeeze(a1, axes)",
        (from_array(np.stack([W + 1, W, W - 1]), "a"), whole("parts", 1, 1, 1), whole("axes", 0)),
    ),
    "Slice": ("w = Slice(a, from, to)", (from_array(np.concatenate([W, W + 1]), "a"), whole("from", 4), whole("to", 8))),
    "Gather, Concat": (
        "b = Gather(a, i) d = Gather(a, j) w = Concat <axis=0> (b, d)",
        (from_array(W, "a"), whole("i", 3, 0), whole("j", 1, 2)),
    ),
    "the norm of a weight": (
        "q = ReduceL2 <keepdims=1> (a, axes) d = Div(a, q) w = Mul(g, d)",
        (from_array(W, "a"), tensor("g", 4, 1, 1, 1, low=0.5), whole("axes", 1, 2, 3)),
    ),
    "the norm of a weight, by hand": (
        "p = Mul(a, a) r = ReduceSum <keepdims=1> (p, axes) q = Sqrt(r) d = Div(a, q) w = Mul(g, d)",
        (from_array(W, "a"), tensor("g", 4, 1, 1, 1, low=0.5), whole("axes", 1, 2, 3)),
    ),
    "a constant of a shape": ("w = ConstantOfShape <value = float[1] {0.25}> (shape)", (whole("shape", 4, 3, 3, 3),)),
}


@pytest.mark.parametrize("case", COMPUTED)
def test_a_weight_that_is_computed_from_constants_folds(case: str, tmp_path: Path) -> None:
    body, arrays = COMPUTED[case]
    result = folded(tmp_path, model_of(f"{body} h = Conv(x, w, c) y = BatchNormalization(h, s, t, m, v)", *arrays, CONV[1], *NORM))
    assert result.nodes == {"Conv": 1}
    assert only(result).how == "into_producer"


def test_the_parameters_of_a_norm_may_be_computed(tmp_path: Path) -> None:
    body = (
        "s1 = Unsqueeze(s, a) s2 = Squeeze(s1, a) v2 = Mul(v, v) t2 = Identity(s2) h = Conv(x, w, c) "
        "y = BatchNormalization(h, s2, t2, m, v2)"
    )
    result = folded(tmp_path, model_of(body, *CONV, *(a for a in NORM if a.name != "t"), whole("a", 0)))
    assert result.nodes == {"Conv": 1}


def test_a_weight_that_nothing_is_folded_into_is_stored_as_it_was(tmp_path: Path) -> None:
    half = RNG.standard_normal((4, 4, 3, 3)).astype(np.float16)
    body = "h = Conv(x, w, c) g = BatchNormalization(h, s, t, m, v) u = Cast <to=1> (half) r = Tanh(g) y = Conv(r, u)"
    source = saved(tmp_path / "in.onnx", model_of(body, *CONV, *NORM, from_array(half, "half")))
    result = fold(source, tmp_path / "out.onnx", shorten=False)
    assert result.nodes == {"Conv": 2, "Cast": 1, "Tanh": 1}
    held = {i.name: i.data_type for i in onnx.load(tmp_path / "out.onnx").graph.initializer}
    assert held["half"] == TensorProto.FLOAT16


@pytest.mark.parametrize("channels", [1, 3])
def test_one_number_for_all_channels_becomes_no_norm(channels: int, tmp_path: Path) -> None:
    """As in hard-swish: x times six, plus three. With a number per channel it is what is left of a norm."""
    body = "t1 = Tanh(x) a = Div(t1, six) b = Mul(a, k) d = Add(b, k) y = Sigmoid(d)"
    arrays = (from_array(np.float32(6), "six"), from_array(np.linspace(0.5, 1.5, channels, dtype=np.float32).reshape(-1, 1, 1), "k"))
    result = folded(tmp_path, model_of(body, *arrays))
    left = ("BatchNormalization",) if channels == 3 else ("Mul", "Add")
    assert only(result).left == left
    assert result.nodes == {"Tanh": 1, "Sigmoid": 1, **dict.fromkeys(left, 1)}


@pytest.mark.parametrize(("channels", "gone"), [(40, False), (4, True)])
def test_one_product_is_not_worth_a_second_copy_of_a_large_weight(channels: int, gone: bool, tmp_path: Path) -> None:
    """A filter bank that several octaves share, each scaled by itself: the file of basic-pitch would be 3.5 times as large."""
    body = "a = Conv(x, w) b = Conv(u, w) a1 = Mul(a, k) t1 = Tanh(a1) t2 = Tanh(b) y = Sub(t1, t2)"
    arrays = (tensor("w", channels, 3, 15, 15), tensor("k", channels, 1, 1, low=0.5))
    proto = model_of(body, *arrays, inputs="float[b,3,16,17] x, float[b,3,16,17] u")
    source = saved(tmp_path / "in.onnx", proto)
    site = only(fold(source, tmp_path / "out.onnx"))
    assert (site.left == ()) == gone
    assert gone or "108 kB of weights that others use, too, would be stored a second time" in site.reason
    norm = [tensor(name, channels, low=0.5) for name in "stmv"]
    both = model_of(
        body.replace("Mul(a, k)", "BatchNormalization(a, s, t, m, v)"), arrays[0], *norm, inputs="float[b,3,16,17] x, float[b,3,16,17] u"
    )
    assert only(fold(saved(tmp_path / "in.onnx", both), tmp_path / "out.onnx")).how == "into_producer"


def test_two_layers_may_be_computed_from_one_weight(tmp_path: Path) -> None:
    square = tensor("a", 3, 3, 1, 1)
    body = (
        "w1 = Identity(a) w2 = Transpose <perm=[1,0,2,3]> (a) h = Conv(x, w1) g = BatchNormalization(h, s, t, m, v) "
        "r = Relu(g) h2 = Conv(r, w2) y = BatchNormalization(h2, t, s, m, v)"
    )
    result = folded(tmp_path, model_of(body, square, *NORM3))
    assert result.nodes == {"Conv": 2, "Relu": 1}


NOT_COMPUTED = {
    "quantised": (
        "w = DequantizeLinear(q, a, z)",
        (from_array(RNG.integers(-9, 9, (4, 3, 3, 3)).astype(np.int8), "q"), from_array(np.float32(0.1), "a"), from_array(np.int8(0), "z")),
        "the weight of Conv, w, is quantised, which stays as it is",
    ),
    "quantised, then transposed": (
        "u = DequantizeLinear(q, a, z) w = Transpose <perm=[1,0,2,3]> (u)",
        (from_array(RNG.integers(-9, 9, (3, 4, 3, 3)).astype(np.int8), "q"), from_array(np.float32(0.1), "a"), from_array(np.int8(0), "z")),
        "the weight of Conv, w, is computed from u, which is quantised, which stays as it is",
    ),
    "from the input": (
        "p = ReduceMean <keepdims=0> (x, all) w = Mul(a, p)",
        (from_array(W, "a"), whole("all", 0, 1, 2, 3)),
        "the weight of Conv, w, depends on x, which is an input of the model",
    ),
    "by chance": (
        "w = RandomNormal <shape=[4,3,3,3]> ()",
        (),
        "the weight of Conv, w, is the output of RandomNormal",
    ),
}


@pytest.mark.parametrize("case", NOT_COMPUTED)
def test_a_weight_that_is_no_constant_says_what_it_is(case: str, tmp_path: Path) -> None:
    body, arrays, reason = NOT_COMPUTED[case]
    proto = model_of(f"{body} g = BatchNormalization(x, s, t, m, v) y = Conv(g, w)", *arrays, *NORM3)
    result = fold(saved(tmp_path / "in.onnx", proto), tmp_path / "out.onnx")
    assert reason in only(result).reason.split("; ")
    assert not result.changed


def test_a_constant_that_would_make_the_file_much_larger_is_not_computed(tmp_path: Path) -> None:
    body = "w = ConstantOfShape <value = float[1] {0.5}> (shape) g = BatchNormalization(x, s, t, m, v) y = Conv(g, w)"
    proto = model_of(body, whole("shape", 2000, 3, 30, 30), *NORM3, inputs="float[b,3,31,32] x")
    result = fold(saved(tmp_path / "in.onnx", proto), tmp_path / "out.onnx")
    assert "the weight of Conv, w, is computed in the file, and would make it 21 MiB larger as a constant" in only(result).reason


# -- operators that give what they take ----------------------------------------------------------------------------------------------------

NOTHING = {
    "Identity": "d = Identity(h)",
    "Dropout": "d = Dropout(h)",
    "Dropout with its mask unused": "d, mask = Dropout(h, ratio)",
    "Dropout that is switched off": "d = Dropout(h, ratio, off)",
    "Cast": "d = Cast <to=1> (h)",
    "all of them": "d0 = Dropout(h, ratio) d1 = Identity(d0) d2 = Cast <to=1> (d1) d = Identity(d2)",
}
SWITCHES = (from_array(np.float32(0.4), "ratio"), from_array(np.array(False), "off"), from_array(np.array(True), "on"))


@pytest.mark.parametrize("case", NOTHING)
def test_what_gives_what_it_takes_is_nothing(case: str, tmp_path: Path) -> None:
    after = NOTHING[case].replace("(h", "(g").replace("d =", "y =").replace("d, mask", "y, mask")
    for body in (
        f"h = Conv(x, w, c) {NOTHING[case]} y = BatchNormalization(d, s, t, m, v)",
        f"h = Conv(x, w, c) g = BatchNormalization(h, s, t, m, v) {after}",
    ):
        result = folded(tmp_path, model_of(body, *CONV, *NORM, *SWITCHES))
        assert result.nodes == {"Conv": 1}, body


SOMETHING = {
    "Dropout that is switched on": "d = Dropout(h, ratio, on)",
    "Dropout whose mask is read": "d0, mask = Dropout(h, ratio) m0 = Cast <to=1> (mask) d = Mul(d0, m0)",
    "a Cast that rounds": "d0 = Cast <to=10> (h) d = Cast <to=1> (d0)",
}


@pytest.mark.parametrize("case", SOMETHING)
def test_what_does_something_stays(case: str, tmp_path: Path) -> None:
    body = f"h = Conv(x, w, c) {SOMETHING[case]} y = BatchNormalization(d, s, t, m, v)"
    result = fold(saved(tmp_path / "in.onnx", model_of(body, *CONV, *NORM, *SWITCHES)), tmp_path / "out.onnx")
    assert not result.changed
    assert result.sites[-1].left == ("BatchNormalization",)


def test_an_output_that_is_the_same_value_as_another_keeps_its_name(tmp_path: Path) -> None:
    proto = model_of("h = Conv(x, w, c) y = BatchNormalization(h, s, t, m, v) z = Identity(y)", *CONV, *NORM)
    proto.graph.output.append(helper.make_tensor_value_info("z", TensorProto.FLOAT, None))
    proto.graph.output[1].type.tensor_type.shape.CopyFrom(proto.graph.output[0].type.tensor_type.shape)
    result = fold(saved(tmp_path / "in.onnx", proto), tmp_path / "out.onnx")
    assert result.nodes == {"Conv": 1, "Identity": 1}
    assert [value.name for value in onnx.load(tmp_path / "out.onnx").graph.output] == ["y", "z"]


# -- shapes ----------------------------------------------------------------------------------------------------------------------------

FOLDS_IN = "h = Conv(k, w, c) y = BatchNormalization(h, s, t, m, v)"
UNKNOWN = {
    "after an operator of Microsoft's": ("k = com.microsoft.Gelu(x)", '"": 20, "com.microsoft": 1'),
    "after two of them": ("j = com.microsoft.Gelu(x) l = Tanh(j) k = com.microsoft.Gelu(l)", '"": 20, "com.microsoft": 1'),
    "after a shape that is computed": ("a = Shape(x) b = Mul(a, ones) k = Reshape(x, b)", '"": 20'),
}


@pytest.mark.parametrize("case", UNKNOWN)
def test_a_convolution_knows_its_rank(case: str, tmp_path: Path) -> None:
    before, imports = UNKNOWN[case]
    arrays = [a for a in (*CONV, *NORM, whole("ones", 1, 1, 1, 1)) if a.name != "ones" or "ones" in before]
    for body, shape in (
        (f"{before} {FOLDS_IN}", {"Conv": 1, "BatchNormalization": 0}),
        (f"{before} {FOLDS_IN}".replace("y =", "r =") + " y = Relu(r)", {}),
    ):
        result = folded(tmp_path, model_of(body, *arrays, imports=imports))
        assert only(result).how == "into_producer", shape
    forward = model_of(f"{before} h = BatchNormalization(k, s, t, m, v) y = Conv(h, w)", *CONV, *NORM3, *arrays[6:], imports=imports)
    assert only(folded(tmp_path, forward)).how == "into_consumers"


def test_a_norm_whose_rank_nobody_knows_says_so(tmp_path: Path) -> None:
    body = "k = com.microsoft.Gelu(x) h = BatchNormalization(k, s, t, m, v) y = com.microsoft.Gelu(h)"
    proto = model_of(body, *NORM3, imports='"": 20, "com.microsoft": 1')
    result = fold(saved(tmp_path / "in.onnx", proto), tmp_path / "out.onnx")
    assert only(result).reason.startswith("its rank is not known, as nothing around it tells the shape of its input: give the inputs")


@pytest.mark.parametrize("noted", ["h", "y"])
def test_notes_that_grew_old_count_for_nothing(noted: str, tmp_path: Path) -> None:
    proto = model_of("h = Conv(x, w, c) y = BatchNormalization(h, s, t, m, v)", *CONV, *NORM)
    value = helper.make_tensor_value_info(noted, TensorProto.FLOAT, [2, 9, 9, 9] if noted == "h" else ["b", 4, 9, 9])
    if noted == "h":
        proto.graph.value_info.append(value)
    else:
        proto.graph.output[0].CopyFrom(value)
    result = fold(saved(tmp_path / "in.onnx", proto), tmp_path / "out.onnx")
    assert result.nodes == {"Conv": 1}


@pytest.mark.parametrize("dims", [[-1, 3, -1, -1], ["?", 3, "?", "?"], ["b", 3, "None", "None"]])
def test_sizes_that_say_nothing(dims: list[int | str], tmp_path: Path) -> None:
    """Two axes that are both called "?" are not of one size."""
    proto = model_of("h = Conv(x, w, c) y = BatchNormalization(h, s, t, m, v)", *CONV, *NORM)
    proto.graph.input[0].CopyFrom(helper.make_tensor_value_info("x", TensorProto.FLOAT, dims))
    source = saved(tmp_path / "in.onnx", proto)
    assert fold(source, tmp_path / "out.onnx").nodes == {"Conv": 1}
    assert onnx.load(tmp_path / "out.onnx").graph.input[0] == proto.graph.input[0]
    folded = fold_onnx(str(source), tmp_path / "out.onnx")  # at a size at which it runs
    assert folded.nodes == {"Conv": 1}
    assert folded.comparisons.passed


def test_an_output_without_a_shape(tmp_path: Path) -> None:
    proto = model_of("h = Conv(x, w, c) y = BatchNormalization(h, s, t, m, v)", *CONV, *NORM)
    proto.graph.output[0].type.tensor_type.ClearField("shape")
    result = fold_onnx(str(saved(tmp_path / "in.onnx", proto)), tmp_path / "out.onnx", inputs=["2x3x6x5"])
    assert result.nodes == {"Conv": 1}
    made = onnx.load(tmp_path / "out.onnx")
    onnx.checker.check_model(made)
    assert [dim.dim_value for dim in made.graph.output[0].type.tensor_type.shape.dim][1:] == [4, 4, 3]


def test_an_input_without_a_shape(tmp_path: Path) -> None:
    proto = model_of("h = Conv(x, w, c) y = BatchNormalization(h, s, t, m, v)", *CONV, *NORM)
    proto.graph.input[0].type.tensor_type.ClearField("shape")
    source = saved(tmp_path / "in.onnx", proto)
    with pytest.raises(UsageError, match="does not say how large its inputs are") as caught:
        fold_onnx(str(source), tmp_path / "out.onnx")
    assert caught.value.hint == "give them: --input 1x3x224x224"
    assert fold_onnx(str(source), tmp_path / "out.onnx", inputs=["2x3x6x5"]).nodes == {"Conv": 1}


def test_a_file_without_shapes_that_is_wrong_otherwise_is_still_refused(tmp_path: Path) -> None:
    proto = model_of("h = Conv(x, nowhere) y = Relu(h)")
    proto.graph.output[0].type.tensor_type.ClearField("shape")
    with pytest.raises(LoadError, match=r"is not a valid ONNX file: .*nowhere"):
        fold(saved(tmp_path / "in.onnx", proto), tmp_path / "out.onnx")


def test_weights_beside_a_file_without_shapes(tmp_path: Path) -> None:
    proto = model_of("h = Conv(x, w, c) y = BatchNormalization(h, s, t, m, v)", *CONV, *NORM)
    proto.graph.output[0].type.tensor_type.ClearField("shape")
    (tmp_path / "in").mkdir()
    source = tmp_path / "in" / "model.onnx"
    onnx.save(proto, source, save_as_external_data=True, location="w.bin", size_threshold=0)
    assert fold(source, tmp_path / "out.onnx").nodes == {"Conv": 1}


def test_an_input_that_is_a_shape_is_given_one(tmp_path: Path) -> None:
    proto = model_of(f"k = Reshape(x, shape) {FOLDS_IN}", *CONV, *NORM, inputs="float[2,3,6,5] x, int64[rank] shape")
    assert fold_onnx(str(saved(tmp_path / "in.onnx", proto)), tmp_path / "out.onnx").nodes == {"Reshape": 1, "Conv": 1}


# -- every norm is listed ----------------------------------------------------------------------------------------------------------------

TRAINS = "it is in training mode, so it normalizes by the statistics of each batch: export the model again in eval mode (`model.eval()`)"
EACH = (
    "its statistics are those of each input, so it cannot be folded: to be rid of it, convert the model that the file was made from with "
    "`normswap convert --approximate`"
)
PAIR = (tensor("a", 3), tensor("b", 3))
LISTED = {
    "training mode": ("y, i, j = BatchNormalization <training_mode=1> (x, s, t, m, v)", NORM3, '"": 20', "BatchNormalization", TRAINS),
    "statistics as outputs of an old one": (
        "y, i, j, k, l = BatchNormalization(x, s, t, m, v)",
        NORM3,
        '"": 11',
        "BatchNormalization",
        TRAINS,
    ),
    "LayerNormalization": ("y = LayerNormalization <axis=1> (x, a)", (tensor("a", 3, 6, 5),), '"": 20', "LayerNormalization", EACH),
    "InstanceNormalization": ("y = InstanceNormalization(x, a, b)", PAIR, '"": 20', "InstanceNormalization", EACH),
    "GroupNormalization": ("y = GroupNormalization <num_groups=3> (x, a, b)", PAIR, '"": 21', "GroupNormalization", EACH),
    "RMSNormalization": ("y = RMSNormalization <axis=1> (x, a)", (tensor("a", 3, 6, 5),), '"": 23', "RMSNormalization", EACH),
    "MeanVarianceNormalization": ("y = MeanVarianceNormalization(x)", (), '"": 20', "MeanVarianceNormalization", EACH),
    "LpNormalization": ("y = LpNormalization <axis=1> (x)", (), '"": 20', "LpNormalization", EACH),
    "LRN": ("y = LRN <size=3> (x)", (), '"": 20', "LRN", EACH),
    "one of Microsoft's": (
        "y = com.microsoft.SkipLayerNormalization(x, x, a)",
        (tensor("a", 5),),
        '"": 20, "com.microsoft": 1',
        "com.microsoft::SkipLayerNormalization",
        EACH,
    ),
    "one of onnxruntime's in ONNX's domain": (
        "y = SimplifiedLayerNormalization(x, a)",
        (tensor("a", 5),),
        '"": 20',
        "SimplifiedLayerNormalization",
        EACH,
    ),
    "one that ONNX did not have yet": ("y = LayerNormalization(x, a)", (tensor("a", 5),), '"": 13', "LayerNormalization", EACH),
    "a quantised scale": (
        "q = DequantizeLinear(i, a) y = BatchNormalization(x, q, t, m, v)",
        (from_array(np.array([3, 4, 5], np.int8), "i"), from_array(np.float32(0.1), "a"), *NORM3[1:]),
        '"": 20',
        "BatchNormalization",
        "its scale is not a constant: q is quantised, which stays as it is",
    ),
    "statistics of another number of channels": (
        "y = BatchNormalization(x, s, t, m, v)",
        NORM,
        '"": 20',
        "BatchNormalization",
        "its statistics do not have one number for each channel of its input",
    ),
    "somebody's own": (
        "y = own.batch_norm(x, s)",
        NORM3[:1],
        '"": 20, "own": 1',
        "own::batch_norm",
        "it is an operator of own that folding does not know",
    ),
    "a mean that is computed": (
        "p = ReduceMean <keepdims=0> (x, all) y = BatchNormalization(x, s, t, p, v)",
        (*(NORM3[i] for i in (0, 1, 3)), whole("all", 0, 2, 3)),
        '"": 20',
        "BatchNormalization",
        "its mean is not a constant: p depends on x, which is an input of the model",
    ),
}


@pytest.mark.parametrize("case", LISTED)
def test_a_norm_that_cannot_fold_is_listed(case: str, tmp_path: Path) -> None:
    body, arrays, imports, kind, reason = LISTED[case]
    proto = model_of(body, *arrays, imports=imports, ir_version=10)
    source = saved(tmp_path / "in.onnx", proto)
    result = fold(source, tmp_path / "out.onnx")
    assert [(site.left, site.reason) for site in result.sites] == [((kind,), reason)]
    assert (tmp_path / "out.onnx").read_bytes() == source.read_bytes()


NOT_LISTED = {
    "random numbers": "r = RandomNormalLike(x) y = Add(x, r)",
    "an activation": "y = Sigmoid(x)",
    "a length": "n = ReduceL2 <keepdims=1> (x) y = Div(x, n)",
}


@pytest.mark.parametrize("case", NOT_LISTED)
def test_what_is_no_norm_is_not_listed(case: str, tmp_path: Path) -> None:
    assert fold(saved(tmp_path / "in.onnx", model_of(NOT_LISTED[case])), tmp_path / "out.onnx").sites == ()


def test_the_norms_that_stay_are_listed_beside_those_that_fold(tmp_path: Path) -> None:
    body = "h = Conv(x, w, c) g = BatchNormalization(h, s, t, m, v) k = InstanceNormalization(g, s, t) y = LRN <size=3> (k)"
    result = folded(tmp_path, model_of(body, *CONV, *NORM))
    assert [(site.how, site.left) for site in result.sites] == [("into_producer", ()), ("", ("InstanceNormalization",)), ("", ("LRN",))]


def test_norms_inside_functions_and_branches(tmp_path: Path) -> None:
    text = (
        '<ir_version: 10, opset_import: ["": 20, "own": 1]> g (float[b,3,6,5] x) => (float[ob,oc,oh,ow] y) '
        "{ h = Conv(x, w, c) h1 = BatchNormalization(h, s, t, m, v) y = own.Block(h1, s, t, m, v) } "
        '<opset_import: ["": 20], domain: "own"> Block (a, s, t, m, v) => (b) '
        "{ u = BatchNormalization(a, s, t, m, v) b = LRN <size=3> (u) }"
    )
    proto = onnx.parser.parse_model(text)
    proto.graph.initializer.extend([*CONV, *NORM])
    result = folded(tmp_path, proto)
    assert result.nodes == {"Conv": 1, "own::Block": 1}
    assert [(site.how, site.left) for site in result.sites] == [("into_producer", ()), ("", ("BatchNormalization",)), ("", ("LRN",))]
    assert all("it is inside the function own::Block" in site.reason for site in result.sites[1:])
    branch = (
        "q = ReduceMax <keepdims=0> (x) p = Greater(q, zero) y = If(p) <then_branch = a () => (float[b,4,4,3] o) "
        "{ k = Conv(x, w, c) o = BatchNormalization(k, s, t, m, v) }, else_branch = e () => (float[b,4,4,3] o2) "
        "{ k2 = Conv(x, w, c) o2, i, j = BatchNormalization <training_mode=1> (k2, s, t, m, v) }>"
    )
    mixed = folded(tmp_path, model_of(branch, *CONV, *NORM, from_array(np.float32(0), "zero")))
    assert [(site.how, site.left) for site in mixed.sites] == [("into_producer", ()), ("", ("BatchNormalization",))]
    assert mixed.sites[1].reason == TRAINS


# -- what is between, in onnxruntime -----------------------------------------------------------------------------------------------------

BETWEEN = {
    "Neg": ("d = Neg(h)", ()),
    "a crop": ("d = Pad(h, pads)", (whole("pads", 0, 0, -1, 0, 0, 0, 0, -1),)),
    "a crop along one axis": ("d = Pad(h, pads, , axes)", (whole("pads", -1, -1), whole("axes", 3))),
    "DepthToSpace": ("d = DepthToSpace <blocksize=2> (h)", ()),
    "Tile": ("d = Tile(h, n)", (whole("n", 1, 1, 2, 3),)),
    "Einsum": ('d = Einsum <equation="nchw,oc->nohw"> (h, e)', (tensor("e", 4, 4),)),
    "Einsum that turns": ('d0 = Einsum <equation="nchw->nwhc"> (h) d = Transpose <perm=[0,3,2,1]> (d0)', ()),
}


@pytest.mark.parametrize("case", BETWEEN)
def test_a_fold_goes_past(case: str, tmp_path: Path) -> None:
    body, arrays = BETWEEN[case]
    shifted = case != "Einsum"  # it has no bias
    norm = [tensor(n, 1 if case == "DepthToSpace" else 4, low=0.5) for n in "stmv"]
    norm = [a if shifted or a.name in "sv" else from_array(np.zeros(4, np.float32), a.name) for a in norm]
    proto = model_of(f"h = Conv(x, w, c) {body} y = BatchNormalization(d, s, t, m, v)", *CONV, *norm, *arrays)
    result = folded(tmp_path, proto)
    assert only(result).left == (), result
    assert "BatchNormalization" not in result.nodes


# -- what is said ------------------------------------------------------------------------------------------------------------------------


def test_a_table_of_operators_is_printed_also_if_nothing_changed(tmp_path: Path) -> None:
    source = saved(tmp_path / "in.onnx", model_of("h = Conv(x, w, c) y = Relu(h)", *CONV))
    found = CliRunner().invoke(app, ["fold", str(source), "-o", str(tmp_path / "out.onnx")])
    assert found.exit_code == 0
    rows = [line.split() for line in found.stdout.splitlines()]
    assert ["operator", "before", "after"] in rows
    assert ["Conv", "1", "1"] in rows
    assert ["all", "operators", "2", "2"] in rows
    size = f"{source.stat().st_size / 1000:,.1f}"
    assert ["file", size, "kB", size, "kB"] in rows


def test_the_table_shows_what_became_less(tmp_path: Path) -> None:
    source = saved(tmp_path / "in.onnx", model_of("h = Conv(x, w, c) g = BatchNormalization(h, s, t, m, v) y = Relu(g)", *CONV, *NORM))
    found = CliRunner().invoke(app, ["fold", str(source), "-o", str(tmp_path / "out.onnx")])
    rows = [line.split() for line in found.stdout.splitlines()]
    assert ["BatchNormalization", "1", "0"] in rows
    assert ["all", "operators", "3", "2"] in rows


# -- real files --------------------------------------------------------------------------------------------------------------------------


def real(package: str, name: str) -> Path:
    found = importlib.util.find_spec(package)
    if found is None or not found.submodule_search_locations:
        pytest.skip(f"{package} is not installed")
    path = Path(next(iter(found.submodule_search_locations))) / name
    if not path.exists():
        pytest.skip(f"{package} has no {name}")
    return path


# (package, file, opset, shape of its input, BatchNormalizations before, sites that are gone, operators before and after)
REAL = [
    ("rapidocr_onnxruntime", "models/ch_ppocr_mobile_v2.0_cls_infer.onnx", 11, (1, 3, 48, 192), 35, 35, 1e-5),
    ("rapidocr_onnxruntime", "models/ch_PP-OCRv4_rec_infer.onnx", 12, (1, 3, 48, 160), 6, 6, 1e-4),
    ("rapidocr_onnxruntime", "models/ch_PP-OCRv4_det_infer.onnx", 12, (1, 3, 96, 64), 3, 3, None),
    ("basic_pitch", "saved_models/icassp_2022/nmp.onnx", 15, (1, 43844, 1), 0, 0, 1e-4),
    ("onnx", "backend/test/data/light/light_shufflenet.onnx", 9, (1, 3, 224, 224), 49, 49, 1e-5),
    ("onnx", "backend/test/data/light/light_inception_v2.onnx", 9, (1, 3, 224, 224), 69, 69, 1e-5),
]


@pytest.mark.parametrize(("package", "name", "opset", "shape", "norms", "gone", "tolerance"), REAL, ids=[Path(row[1]).stem for row in REAL])
def test_a_real_file(
    package: str, name: str, opset: int, shape: tuple[int, ...], norms: int, gone: int, tolerance: float | None, tmp_path: Path
) -> None:
    source = real(package, name)
    result = fold(source, tmp_path / "out.onnx")
    assert result.before.get("BatchNormalization", 0) == norms
    assert sum(not site.left for site in result.sites) >= gone
    own = Counter(node.name for node in onnx.load(source).graph.node if node.op_type == "BatchNormalization")
    assert not [site.name for site in result.sites if site.name in own and site.left]
    assert result.nodes.get("BatchNormalization", 0) <= norms + (package == "basic_pitch")  # which has one spelled out
    assert all(bool(site.left) == bool(site.reason) for site in result.sites)
    assert sum(result.nodes.values()) < sum(result.before.values())
    assert opsets(tmp_path / "out.onnx")[""] == opset
    onnx.checker.check_model(tmp_path / "out.onnx", full_check=True)
    x = RNG.standard_normal(shape).astype(np.float32)
    sessions = [onnxruntime.InferenceSession(str(path), providers=["CPUExecutionProvider"]) for path in (source, tmp_path / "out.onnx")]
    runs = [session.run(None, {session.get_inputs()[0].name: x}) for session in sessions]
    for want, got in zip(*runs, strict=True):
        assert got.shape == want.shape
        if tolerance is not None:  # the detector's own rounding is 3 % at noise: its map is 1e-6 there
            np.testing.assert_allclose(got, want, atol=tolerance * np.abs(want).max())


@pytest.mark.parametrize("opset", [12, 17])
def test_a_norm_without_an_epsilon_has_the_float32_next_to_1e_5(opset: int, tmp_path: Path) -> None:
    """All attributes are float32. In a file in float64 the two differ by more than rounding."""
    proto = model_of(
        "h = MatMul(x, w) y = BatchNormalization(h, s, t, m, v)",
        *(from_array(to_array(t).astype(np.float64), t.name) for t in (tensor("w", 6, 4), *NORM)),
        inputs="double[2,6] x",
        imports=f'"": {opset}',
    )
    proto.graph.output[0].CopyFrom(helper.make_tensor_value_info("y", TensorProto.DOUBLE, [2, 4]))
    folded = fold_onnx(str(saved(tmp_path / "in.onnx", proto)), tmp_path / "out.onnx")
    assert folded.comparisons.passed
    assert "BatchNormalization" not in folded.nodes
