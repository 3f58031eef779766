"""Shapes that the graph tells and ONNX's inference does not: they are those that the values have when the model runs."""

from __future__ import annotations

import numpy as np
import onnx_ir as ir
import onnxruntime
import pytest
from onnx import parser
from onnx.numpy_helper import from_array

from normswap.folding import shapes

INTS = {
    "zero": [0],
    "one": [1],
    "two": [2],
    "three": [3],
    "minus": [-1],
    "far": [-(1 << 62)],
    "ends": [1 << 62],
    "last": [-1, 6],
    "copy": [0, 0, -1],
    "pairs": [[2, 3], [-1, 4]],
    "swap": [1, 0],
}

# x is (2, 6, 4, 5) of which the graph knows (b, 6, 4, 5). body -> what is known of y
KNOWN = {
    "s = Shape(x) p = Slice(s, zero, two) q = Concat <axis=0> (p, minus) y = Reshape(x, q)": (None, 6, None),
    "s = Shape(x) p = Slice(s, minus, far, zero, minus) y = Reshape(x, p)": (5, 4, 6, None),
    "s = Shape(x) p = Slice(s, one, ends) q = Concat <axis=0> (minus, p) y = Reshape(x, q)": (None, 6, 4, 5),
    "s = Shape(x) p = Slice(s, one, ends, , two) q = Concat <axis=0> (minus, p) y = Reshape(x, q)": (None, 6, 5),
    "s = Shape(x) g = Gather(s, swap) q = Concat <axis=0> (g, minus) y = Reshape(x, q)": (6, None, None),
    "s = Shape(x) g = Gather(s, place) u = Unsqueeze(g, zero) q = Concat <axis=0> (u, last) y = Reshape(x, q)": (5, None, 6),
    "s = Shape <start=-2> (x) c = Cast <to=7> (s) q = Concat <axis=0> (last, c) y = Reshape(x, q)": (None, 6, 4, 5),
    "s = Shape(x) p = Slice(s, zero, one) t = Mul(p, two) q = Concat <axis=0> (t, minus) y = Reshape(x, q)": (None, None),
    "g = Gather(pairs, place0) q0 = Slice(g, zero, one) q = Concat <axis=0> (q0, minus) y = Reshape(x, q)": (None, None),
    "y = Reshape(x, copy)": (None, 6, 20),
    "s = Shape(x) p = Slice(s, two, three) y0 = Slice(x, zero, p, two) y = Neg(y0)": (None, 6, None, 5),
}


@pytest.mark.parametrize("body", KNOWN)
def test_known_sizes_are_the_true_ones(body: str) -> None:
    proto = parser.parse_model(f'<ir_version: 8, opset_import: ["": 15]> g (float[b,6,4,5] x) => (float y) {{ {body} }}')
    proto.graph.output[0].type.tensor_type.ClearField("shape")
    proto.graph.initializer.extend(from_array(np.asarray(value, np.int64), name) for name, value in INTS.items())
    proto.graph.initializer.extend([from_array(np.int64(3), "place"), from_array(np.int64(0), "place0")])
    model = ir.from_proto(proto)
    shapes.infer(model)
    found = model.graph.outputs[0].shape
    assert found is not None
    known = tuple(size if isinstance(size, int) else None for size in found)
    assert known == KNOWN[body]
    session = onnxruntime.InferenceSession(proto.SerializeToString(), providers=["CPUExecutionProvider"])
    (y,) = session.run(None, {"x": np.zeros((2, 6, 4, 5), np.float32)})
    assert len(y.shape) == len(known)
    assert all(size in (None, true) for size, true in zip(known, y.shape, strict=True))
