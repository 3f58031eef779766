"""Graphs in ONNX's text form, saved, and run."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import onnx
import onnxruntime
from onnx import parser
from onnx.numpy_helper import from_array

RNG = np.random.default_rng(61)


def model_of(
    body: str, *arrays: onnx.TensorProto, inputs: str = "float[b,3,6,5] x", imports: str = '"": 20', ir_version: int = 10
) -> onnx.ModelProto:
    proto = parser.parse_model(f"<ir_version: {ir_version}, opset_import: [{imports}]> g ({inputs}) => (float[ob,oc,oh,ow] y) {{ {body} }}")
    proto.graph.initializer.extend(arrays)
    return proto


def tensor(name: str, *shape: int, low: float | None = None) -> onnx.TensorProto:
    array = RNG.standard_normal(shape) if low is None else RNG.uniform(low, low + 1, shape)
    return from_array(array.astype(np.float32), name)


CONV = (tensor("w", 4, 3, 3, 3), tensor("c", 4))


NORM = (tensor("s", 4, low=0.5), tensor("t", 4), tensor("m", 4), tensor("v", 4, low=0.5))


NORM3 = (tensor("s", 3, low=0.5), tensor("t", 3), tensor("m", 3), tensor("v", 3, low=0.5))


def saved(path: Path, proto: onnx.ModelProto) -> Path:
    onnx.save(proto, path)
    return path


def run(path: Path, x: np.ndarray) -> np.ndarray:
    session = onnxruntime.InferenceSession(str(path), providers=["CPUExecutionProvider"])
    return session.run(None, {session.get_inputs()[0].name: x})[0]
