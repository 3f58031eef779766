"""Small ONNX graphs with streams that LayerNorms read: by hand in ONNX's text form, or at random; with random constants."""

from __future__ import annotations

import random
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnx.reference
import onnxruntime
from onnx import parser
from onnx.numpy_helper import from_array

RNG = np.random.default_rng(7)
C = 6
LARGE = 12_000  # rows of a table that is more than 64 kB in any dtype
SHAPES = {
    "w": (4, C),
    "c": (C,),
    "w1": (C, 9),
    "c1": (9,),
    "w2": (9, C),
    "c2": (C,),
    "w3": (C, 3),
    "s": (C,),
    "t": (C,),
    "g": (C,),
    "turned": (C, 4),
    "table": (11, C),
    "positions": (1, 5, C),
    "token": (1, 1, C),
    "square": (C, C),
    "patches": (C, 4, 2),
    "up": (4, C, 2),
    "depthwise": (C, 1, 3),
    "large": (LARGE, C),
    "wide": (9, LARGE),
    "row": (1, C, 1),
    "two": (5, C),
}
INTS = {"shape": [0, -1, C], "minus": [-1], "zero": [0], "one": [1], "two_": [2], "last": [2], "pads": [0, 1, 0, 0, 1, 0], "split": [2, 3]}
NUMBERS = {"half": 0.5, "eps": 1e-3, "power": 2.0, "none": 0.0}

START = "h0 = MatMul(x, w) h = Add(h0, c)"
BLOCK = "n = LayerNormalization <epsilon=0.001> (h, s, t) u = MatMul(n, w1) u1 = Add(u, c1) r = Relu(u1) d = MatMul(r, w2) e = Add(d, c2)"
END = "m = LayerNormalization (k, s, t) y = MatMul(m, w3)"
OTHERS = {  # in float64 graphs
    "perm": np.array([3, 0, 4, 1, 2]),
    "five": np.array([5]),
    "six": np.array([C]),
    "flat": np.array([0, C, -1]),
    "tiles": np.array([1, 2, 1]),
    "far": np.array([-100]),
    "grid": np.array([[0, 1], [3, 2]]),
    "points": np.array([[1], [4]]),
    "places": RNG.standard_normal((5, 3)),
    "scales": np.array([1, 1, 2], np.float32),
    "windows": np.array([0, 5, 1, C]),
    "joined": np.array([0, 1, 5 * C]),
    "joins": RNG.standard_normal((5 * C, 3)),
    "ones": RNG.standard_normal(5 * C),
    "shifts": np.array([0, 0, 1, 0, 0, -1]),
    "picks": np.array([0, 0, 1, 2, 3, 4]),
    "thirds": np.array([2, 4]),
    "one_": np.full((1, 1, C), 1.0),
    "channels": np.array([True, False, True, True, False, True]),
}


def made(
    body: str, inputs: str = "x[b,5,4]", *, opset: int = 17, dtype: str = "double", more: str = "", outputs: str = "y"
) -> onnx.ModelProto:
    """A graph in ONNX's text form with those of the constants above that it reads, in random numbers that have a mean."""
    out = ", ".join(f"{dtype}[{','.join(f'{name}{i}' for i in range(3))}] {name}" for name in outputs.split())
    name, shape = inputs.rstrip("]").split("[")
    kind = "int64" if name == "i" else dtype
    text = f'<ir_version: 8, opset_import: ["": {opset}{more}]> g ({kind}[{shape}] {name}) => ({out}) {{ {body} }}'
    proto = parser.parse_model(text)
    read = {name for node in proto.graph.node for name in node.input}
    kind_of = {"double": np.float64, "float": np.float32, "float16": np.float16}[dtype]
    arrays: dict[str, Any] = {name: RNG.standard_normal(s).astype(kind_of) + kind_of(0.5) for name, s in SHAPES.items()}
    arrays |= {name: np.asarray(value, np.int64) for name, value in INTS.items()} | {"place": np.int64(1)}
    arrays |= {name: np.asarray(value, kind_of) for name, value in NUMBERS.items()} | {
        "mask": np.array([[True], [False], [True], [True], [False]])
    }
    arrays |= OTHERS
    proto.graph.initializer.extend(from_array(np.asarray(arrays[name]), name) for name in sorted(read & arrays.keys()))
    for value in proto.graph.output:
        value.type.tensor_type.ClearField("shape")
    return proto


def example(proto: onnx.ModelProto) -> dict[str, np.ndarray]:
    (value,) = [v for v in proto.graph.input if v.name not in {t.name for t in proto.graph.initializer}]
    shape = [dim.dim_value or 2 for dim in value.type.tensor_type.shape.dim]
    dtype = onnx.helper.tensor_dtype_to_np_dtype(value.type.tensor_type.elem_type)
    if dtype == np.int64:
        return {value.name: RNG.integers(0, 11, shape)}
    return {value.name: (RNG.standard_normal(shape) + 1).astype(dtype)}


def evaluated(path: Path, feeds: dict[str, np.ndarray]) -> list[np.ndarray]:
    """The outputs of a file in onnxruntime, or in onnx's evaluator where that has no kernel for float64."""
    options = onnxruntime.SessionOptions()
    options.graph_optimization_level, options.log_severity_level = onnxruntime.GraphOptimizationLevel.ORT_DISABLE_ALL, 4
    try:
        session = onnxruntime.InferenceSession(str(path), options, providers=["CPUExecutionProvider"])
    except onnxruntime.capi.onnxruntime_pybind11_state.NotImplemented:
        return list(onnx.reference.ReferenceEvaluator(str(path)).run(None, feeds))
    return list(session.run(None, feeds))


def error(a: Path, b: Path, feeds: dict[str, np.ndarray]) -> float:
    pairs = zip(evaluated(a, feeds), evaluated(b, feeds), strict=True)
    return max(float(np.abs(x - y).max() / np.abs(x).max()) for x, y in pairs)


def block(middle: str = "k = Add(h, e)") -> str:
    return f"{START} {BLOCK} {middle} {END}"


def spelled_out(x: str, y: str, axis: str = "axes=[-1]") -> str:
    """LayerNorm as torch wrote it below opset 17."""
    return (
        f"{y}m = ReduceMean <{axis}> ({x}) {y}d = Sub({x}, {y}m) {y}p = Pow({y}d, power) {y}v = ReduceMean <{axis}> ({y}p) "
        f"{y}e = Add({y}v, eps) {y}r = Sqrt({y}e) {y}q = Div({y}d, {y}r)"
    )


# -- at random --------------------------------------------------------------------------------------------------------------------------


class _Writer:
    def __init__(self, lot: random.Random) -> None:
        self.lot, self.lines = lot, list[str]()

    def new(self, expression: str) -> str:
        self.lines.append(f"v{len(self.lines)} = {expression}")
        return f"v{len(self.lines) - 1}"

    def start(self) -> tuple[str, str]:
        """(the stream, the input of the graph)"""
        kind = self.lot.choice(["linear", "tanh", "table", "conv", "input", "two"])
        if kind == "input":
            return self.new("Identity(x)"), f"x[b,5,{C}]"
        if kind == "table":
            return self.new(f"Gather({self.lot.choice(['table', 'large'])}, i)"), "i[b,5]"
        if kind == "conv":
            return self.new(f"Transpose <perm=[0,2,1]> ({self.new('Conv <strides=[2]> (x, patches, c)')})"), "x[b,4,10]"
        h = self.new(f"Add({self.new('MatMul(x, w)')}, c)")
        if kind == "tanh":
            h = self.new(f"Tanh({h})")
        return (self.new(f"Add({h}, {self.new('MatMul(x, w)')})") if kind == "two" else h), "x[b,5,4]"

    def norm(self, x: str) -> str:
        if self.lot.random() < 0.75:
            weight, bias = self.lot.choice("stgc"), self.lot.choice([", t", ", c", ", s", ""])
            return self.new(f"LayerNormalization <epsilon=0.001> ({x}, {weight}{bias})")
        name = f"o{len(self.lines)}"
        self.lines.append(spelled_out(x, name))
        y = f"{name}q"
        if self.lot.random() < 0.7:
            y = self.new(f"Mul({y}, {self.lot.choice('sg')})")
        return self.new(f"Add({y}, {self.lot.choice('tc')})") if self.lot.random() < 0.7 else y

    def moved(self, x: str) -> str:
        """Something that passes a centring on, or nothing."""
        turned = f"Transpose <perm=[0,2,1]> ({x})"
        halves = f"Slice({x}, two_, five, one)", f"Slice({x}, zero, two_, one)"
        forms = [
            lambda: self.new(f"Neg({x})"),
            lambda: self.new(f"Mul({x}, half)"),
            lambda: self.new(f"Transpose <perm=[0,2,1]> ({self.new(turned)})"),
            lambda: self.new(f"Slice({x}, minus, far, one, minus)"),
            lambda: self.new(f"Slice({x}, minus, far, two_, minus)"),
            lambda: self.new(f"Where(mask, {x}, none)"),
            lambda: self.new(f"Add({x}, {self.new(f'ReduceMean <axes=[1]> ({x})')})"),
            lambda: self.new(f"Gather <axis=1> ({x}, perm)"),
            lambda: self.new(f"Reshape({self.new(f'Reshape({x}, windows)')}, shape)"),
            lambda: self.new(f"Add({x}, positions)"),
            lambda: self.new(f"Concat <axis=1> ({', '.join(self.new(half) for half in halves)})"),
        ]
        return self.lot.choice(forms)() if self.lot.random() < 0.75 else x

    def gained(self, x: str) -> str:
        return self.new(f"Mul({x}, {self.lot.choice('gs')})") if self.lot.random() < 0.35 else x

    def branch(self, x: str) -> str:
        kind = self.lot.choice(["mlp", "mlp", "mlp", "linear", "tanh", "mix"])
        if kind == "mlp":
            wide = self.new(f"MatMul({x}, w1)")
            y = self.new(f"MatMul({self.new(f'Relu({wide})')}, w2)")
            return self.new(f"Add({y}, c2)") if self.lot.random() < 0.7 else y
        if kind == "mix":
            scores = self.new(f"MatMul({self.new(f'Softmax({x})')}, {self.new(f'Transpose <perm=[0,2,1]> ({x})')})")
            return self.new(f"MatMul({scores}, {self.new(f'MatMul({x}, square)')})")
        return self.new(f"MatMul({x}, square)" if kind == "linear" else f"Tanh({x})")

    def block(self, h: str) -> str:
        form = self.lot.choice(["pre", "pre", "pre", "post", "behind", "plain"])
        if form == "pre":
            y = self.gained(self.moved(self.branch(self.norm(self.moved(h)))))
            return self.moved(self.new(f"{self.lot.choice(['Add', 'Add', 'Sub', 'Sum'])}({h}, {y})"))
        if form == "post":
            return self.norm(self.new(f"Add({h}, {self.branch(h)})"))
        y = self.gained(self.norm(self.branch(h)) if form == "behind" else self.branch(self.norm(h)))
        return self.moved(self.new(f"Add({h}, {y})"))


def random_graph(seed: int) -> onnx.ModelProto:
    """One to four blocks with norms before, behind and in operators; gains, moves, tied weights, other readers of the stream, outputs."""
    lot = random.Random(seed)
    writer = _Writer(lot)
    h, x = writer.start()
    before, outputs = [h], list[str]()
    for _ in range(lot.randint(1, 4)):
        h = writer.block(before[-1] if lot.random() < 0.85 else lot.choice(before))
        before.append(h)
        for share, seen in ((0.12, f"MatMul({h}, w3)"), (0.05, f"ReduceMean <axes=[-1]> ({h})"), (0.05, f"Softmax({h})")):
            if lot.random() < share:
                outputs.append(writer.new(seen))
        if lot.random() < 0.03:
            outputs.append(h)
    head = writer.new("Transpose(table)") if lot.random() < 0.3 else "w3"
    outputs.append(writer.new(f"MatMul({writer.norm(h)}, {head})"))
    return made(" ".join(writer.lines), x, outputs=" ".join(dict.fromkeys(outputs)))
