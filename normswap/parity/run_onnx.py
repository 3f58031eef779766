"""Runs an ONNX file at a probe: in onnxruntime at one optimisation level, in onnx's reference evaluator, or converted to float64."""

from __future__ import annotations

import contextlib
import tempfile
import warnings
import zlib
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from normswap.errors import UsageError
from normswap.parity.kernels import array_of, kernels, tensor_of
from normswap.parity.measure import sampled
from normswap.parity.probes import Probe, Runner, Values
from normswap.parity.result import RANDOM

if TYPE_CHECKING:
    import onnx

LEVELS = ("disabled", "all")  # of onnxruntime's graph optimisation
MORE_LEVELS = ("disabled", "basic", "extended", "all")
REFERENCE = "reference"  # in place of a level: onnx's own evaluator, which has every kernel in every dtype, and is slow
NO_KERNEL = "NOT_IMPLEMENTED"  # in what onnxruntime says of an operator that it cannot run in a dtype, as Conv in float64
PROVIDER = "ExecutionProvider"  # a level with this ending names an execution provider, which runs the file at the highest level
CPU = f"CPU{PROVIDER}"
BY_POSITION = "#"  # an ONNX file has outputs by position: "#0", "#1" ...


def runtime(level: str) -> str:
    """The name of the runtime and level, for messages."""
    return "onnx's reference evaluator" if level == REFERENCE else f"onnxruntime ({level})"


def onnx_runner(path: Path, level: str, inner: Sequence[str] = ()) -> Runner:
    """Runs a file at one of MORE_LEVELS, in REFERENCE, or in the execution provider that `level` names.

    inner: names of values inside the graph that are returned as well.
    """
    import onnxruntime

    if level == REFERENCE:
        import onnx

        return _evaluator(onnx.load(path), inner)
    options = onnxruntime.SessionOptions()
    options.log_severity_level = 4  # errors are raised as well, so they need not be logged
    options.add_session_config_entry("session.intra_op.allow_spinning", "0")  # spinning threads would slow down other processes
    options.graph_optimization_level = {
        "disabled": onnxruntime.GraphOptimizationLevel.ORT_DISABLE_ALL,
        "basic": onnxruntime.GraphOptimizationLevel.ORT_ENABLE_BASIC,
        "extended": onnxruntime.GraphOptimizationLevel.ORT_ENABLE_EXTENDED,
    }.get(level, onnxruntime.GraphOptimizationLevel.ORT_ENABLE_ALL)
    provider = level if level.endswith(PROVIDER) else CPU
    # TF32 has ten bits of mantissa, far fewer than float32, whose rounding is measured here.
    chosen = [(provider, {"use_tf32": "0"} if provider.startswith("CUDA") else {}), *([] if provider == CPU else [CPU])]
    with _with_outputs(path, inner) as (opened, count):
        session = onnxruntime.InferenceSession(str(opened), options, providers=chosen)
    if session.get_providers()[0] != provider:  # onnxruntime silently falls back if a provider does not start
        raise RuntimeError(f"{provider} did not start")
    if any(value.type == "tensor(bfloat16)" for value in (*session.get_inputs(), *session.get_outputs())):
        raise RuntimeError(f"{NO_KERNEL} : in Python it takes and returns no bfloat16")
    declared = {i.name: i.shape for i in session.get_inputs()}
    outputs = [output.name for output in session.get_outputs()]
    return lambda probe: _split(dict(zip(outputs, session.run(None, _fitting(declared, probe)), strict=True)), count, inner)


def onnx_float64_runner(path: Path, inner: Sequence[str] = (), *, nudge: float = 0.0) -> Runner:
    """Runs a file converted to float64, in onnx's reference evaluator, as onnxruntime has no float64 kernel for Conv.

    nudge: the largest relative change of each constant, which is moved at random.
    """
    import onnx

    model = onnx.load(path)
    _widen(model, nudge)
    return _evaluator(model, inner)


def _evaluator(model: Any, inner: Sequence[str]) -> Runner:
    import numpy as np
    from onnx.reference import ReferenceEvaluator

    count = _add_outputs(model.graph, inner)
    evaluator = ReferenceEvaluator(model, new_ops=[*kernels(), *corrected_operators(model)])
    inputs, outputs = list(evaluator.input_names), list(evaluator.output_names)

    def run(probe: Probe) -> tuple[Values, Values]:
        with np.errstate(all="ignore"), warnings.catch_warnings():
            warnings.simplefilter("ignore")  # of an overflow, say, which the comparison will report
            return _split(dict(zip(outputs, evaluator.run(None, _feeds(inputs, probe)), strict=True)), count, inner)

    return run


def _add_outputs(graph: Any, inner: Sequence[str]) -> int:
    """Append inner values of a graph to its outputs; return the number of outputs that it had before."""
    count = len(graph.output)
    known = {output.name for output in graph.output}
    computed = {name for node in graph.node for name in node.output}
    for name in dict.fromkeys(inner):
        if name in computed - known:
            graph.output.add(name=name)
    return count


@contextlib.contextmanager
def _with_outputs(path: Path, inner: Sequence[str]) -> Iterator[tuple[Path, int | None]]:
    """(a copy of the file that also returns the inner values, number of its own outputs). It is beside the file, for external data."""
    if not inner:
        yield path, None
        return
    import onnx

    model = onnx.load(path, load_external_data=False)
    count = _add_outputs(model.graph, inner)
    with tempfile.NamedTemporaryFile(prefix=f".{path.name}.", suffix=".inner", dir=path.parent) as file:
        file.write(model.SerializeToString())
        file.flush()
        yield Path(file.name), count


def _split(values: dict[str, Any], count: int | None, inner: Sequence[str]) -> tuple[Values, Values]:
    """(the first `count` values, or all, as outputs by position; the inner values by name, large ones sampled)."""
    own = enumerate(list(values.values())[:count])
    outputs = {name: tensor for i, value in own for name, tensor in _tensors(f"{BY_POSITION}{i}", value)}
    return outputs, {name: sampled(tensor_of(values[name])) for name in inner if name in values}


def _tensors(name: str, value: Any) -> Iterator[tuple[str, Tensor]]:
    """An output as tensors: each element of a sequence, and for texts, which are equal or not, their checksums."""
    import numpy as np

    if isinstance(value, list | tuple):
        for i, item in enumerate(value):
            yield from _tensors(f"{name}[{i}]", item)
    elif (array := np.asarray(value)).dtype.kind in "OUS":
        yield name, torch.tensor([zlib.crc32(str(text).encode()) for text in array.reshape(-1)]).reshape(array.shape)
    else:
        yield name, tensor_of(array)


def _feeds(names: Sequence[str], probe: Probe) -> dict[str, Any]:
    """The tensors of a probe by the names of the file's inputs: keyword arguments of such a name, the others in order."""
    named = {name: t for name, t in probe.kwargs.items() if isinstance(t, Tensor) and name in names}
    others = replace(probe, kwargs={name: value for name, value in probe.kwargs.items() if name not in named}).tensors()
    if len(named) + len(others) != len(names):
        raise ValueError(f"the file has {len(names)} inputs ({', '.join(names)}), but {len(named) + len(others)} tensors were given")
    in_order = iter(others)
    return {name: array_of(named[name] if name in named else next(in_order)) for name in names}


def _fitting(declared: Mapping[str, Sequence[int | str | None]], probe: Probe) -> dict[str, Any]:
    """`_feeds`. Raises ValueError for a tensor of another shape than the file says."""
    feeds = _feeds(list(declared), probe)
    for name, expected in declared.items():
        found = feeds[name].shape
        if not expected:  # a number, or of a shape that the file does not give: onnxruntime says the same of both
            continue
        if len(found) != len(expected) or any(isinstance(size, int) and size != given for size, given in zip(expected, found, strict=True)):
            shape = " x ".join(str(size if isinstance(size, int) else size or "?") for size in expected)
            raise ValueError(f"its input {name} is {shape}, but {' x '.join(map(str, found)) or 'a number'} was given")
    return feeds


def corrected_operators(model: Any) -> list[Any]:
    """Corrected versions of operators that onnx's evaluator (1.23) computes differently from their definition.

    From opset 7 to 13, a BatchNormalization with one output is in inference mode; the evaluator mixes the batch's statistics into it.
    """
    import numpy as np
    from onnx.reference.op_run import OpRun

    norms = [node for node in model.graph.node if node.op_type == "BatchNormalization" and node.domain == ""]
    trains = any(any(node.output[1:]) or any(a.name == "spatial" and not a.i for a in node.attribute) for node in norms)
    if not norms or trains or not 7 <= opset_of(model) < 14:
        return []

    class BatchNormalization(OpRun):
        op_domain = ""

        def _run(self, x: Any, scale: Any, bias: Any, mean: Any, var: Any, epsilon: float, **others: Any) -> tuple[Any]:
            scale, bias, mean, var = (a.reshape(-1, *(1,) * (x.ndim - 2)) for a in (scale, bias, mean, var))
            return ((scale * (x - mean) / np.sqrt(var + epsilon) + bias).astype(x.dtype),)

    return [BatchNormalization]


def onnx_dtypes(path: Path) -> set[torch.dtype]:
    """The floating dtypes in which the file computes: those of its weights and casts."""
    import onnx

    model = onnx.load(path, load_external_data=False)
    known = {
        onnx.TensorProto.FLOAT16: torch.float16,
        onnx.TensorProto.BFLOAT16: torch.bfloat16,
        onnx.TensorProto.FLOAT: torch.float32,
        onnx.TensorProto.DOUBLE: torch.float64,
    }
    attributes = [a for nodes in (model.graph, *model.functions) for node in nodes.node for a in node.attribute]
    found = {tensor.data_type for tensor in model.graph.initializer} | {a.i for a in attributes if a.name == "to"}
    return {known[dtype] for dtype in found & known.keys()}


UNNAMED = {"", "?", "-1", "None", "none"}  # what some tools call every free axis
DRAWING = ("RandomNormal", "RandomNormalLike", "RandomUniform", "RandomUniformLike", "Multinomial", "Bernoulli")


def draws(path: Path) -> str | None:
    """A sentence about a file that draws random numbers; None for any other, and for one that cannot be read."""
    import onnx_ir as ir

    try:
        model = ir.load(str(path))
    except Exception:  # whoever runs it says why
        return None
    nodes = (*model.graph.all_nodes(), *(node for function in model.functions.values() for node in function.all_nodes()))
    random = sorted({node.op_type for node in nodes if node.op_type in DRAWING})
    return f"the file draws random numbers ({', '.join(random)}), {RANDOM}" if random else None


def _numpy_dtype(element_type: int) -> torch.dtype | None:
    """The dtype of an ONNX element type; None if it is not of numbers that torch and numpy, with ml_dtypes, both have."""
    import numpy as np
    import onnx

    try:
        return tensor_of(np.empty(0, onnx.helper.tensor_dtype_to_np_dtype(element_type))).dtype
    except (KeyError, TypeError):
        return None


def input_names(path: Path) -> list[str]:
    """The names of the inputs that a file has to be given."""
    return [value.name for value in _declared(path)]


def _declared(path: Path) -> list[Any]:
    import onnx

    graph = onnx.load(path, load_external_data=False).graph
    constants = {i.name for i in graph.initializer}
    return [value for value in graph.input if value.name not in constants]


def onnx_inputs(path: Path, batch: int = 2, free: int | None = None) -> tuple[Tensor, ...] | None:
    """Seeded inputs of the shapes that a file declares.

    batch: the size of a dynamic first axis, and of each axis that has the name of one; free: the size of other dynamic axes. If `free` is
    None and there are such axes, returns None, as it does where the file does not say how many axes an input has.

    Raises UsageError for an input that is not a tensor, or whose element type numpy does not have.
    """
    import onnx

    inputs = _declared(path)
    first = {axis.dim_param for value in inputs for axis in value.type.tensor_type.shape.dim[:1]} - UNNAMED
    generator = torch.Generator().manual_seed(0)
    found = []
    for value in inputs:
        kind = value.type.tensor_type
        dtype = _numpy_dtype(kind.elem_type)
        if dtype is None:
            what = value.type.WhichOneof("value") or "value of no type"
            name = onnx.TensorProto.DataType.Name(kind.elem_type).lower() if what == "tensor_type" else what.removesuffix("_type")
            raise UsageError(
                f"the input {value.name} of {path} is a {name}, and numpy has no such numbers to run it on",
                hint="files can only be compared on tensors of numbers",
            )
        if not kind.HasField("shape"):
            return None
        sizes = [
            dim.dim_value if dim.dim_value > 0 else batch if i == 0 or dim.dim_param in first else free
            for i, dim in enumerate(kind.shape.dim)
        ]
        shape = [size for size in sizes if size is not None]
        if len(shape) < len(sizes):
            return None
        floating = dtype.is_floating_point
        found.append((torch.randn(shape, generator=generator) if floating else torch.randint(2, shape, generator=generator)).to(dtype))
    return tuple(found)


def _widen(model: Any, nudge: float = 0.0) -> None:
    """Convert float32, float16 and bfloat16 to float64 everywhere in an ONNX model: tensors, declared types, casts.

    nudge: the largest relative change of each number, which is moved at random. A number in an attribute, such as the slope of a LeakyRelu,
    is a float32 in a file of any dtype, and becomes one of its neighbours.
    """
    import numpy as np
    import onnx
    from onnx import numpy_helper

    narrow = {onnx.TensorProto.FLOAT, onnx.TensorProto.FLOAT16, onnx.TensorProto.BFLOAT16}
    generator = np.random.default_rng(0)

    def nudged(values: Any) -> Any:
        if not nudge or not values.size:
            return values
        size = np.abs(np.nan_to_num(values, posinf=0, neginf=0))
        # Whole numbers are not moved: they were not rounded, and some are sizes, or the factors of a Resize.
        rounded = np.where(values == np.round(values), 0.0, np.maximum(size, size.mean()))
        return values + nudge * rounded * generator.uniform(-1, 1, values.shape)

    def neighbour(number: float) -> float:
        towards = np.float32(generator.choice([-np.inf, np.inf]))
        return float(number if not nudge or number == round(number) else np.nextafter(np.float32(number), towards))

    def widen_tensor(tensor: Any) -> None:
        if tensor.data_type in narrow:
            values = nudged(numpy_helper.to_array(tensor).astype("float64"))
            tensor.CopyFrom(numpy_helper.from_array(values, tensor.name))

    def widen_graph(graph: Any) -> None:
        for tensor in graph.initializer:
            widen_tensor(tensor)
        for value in (*graph.input, *graph.output, *graph.value_info):
            if value.type.tensor_type.elem_type in narrow:
                value.type.tensor_type.elem_type = onnx.TensorProto.DOUBLE
        widen_nodes(graph.node)

    def widen_nodes(nodes: Any) -> None:
        for node in nodes:
            for attribute in node.attribute:
                if node.op_type == "Constant" and attribute.name in ("value_float", "value_floats"):
                    values = nudged(np.asarray(onnx.helper.get_attribute_value(attribute), np.float64))
                    attribute.CopyFrom(onnx.helper.make_attribute("value", numpy_helper.from_array(values)))
                elif attribute.type == onnx.AttributeProto.FLOAT:
                    attribute.f = neighbour(attribute.f)
                elif attribute.type == onnx.AttributeProto.FLOATS:
                    attribute.floats[:] = map(neighbour, attribute.floats)
                elif attribute.type == onnx.AttributeProto.TENSOR:
                    widen_tensor(attribute.t)
                elif attribute.type == onnx.AttributeProto.GRAPH:
                    widen_graph(attribute.g)
                elif attribute.name in ("to", "dtype") and attribute.i in narrow:
                    attribute.i = onnx.TensorProto.DOUBLE

    widen_graph(model.graph)
    for function in model.functions:
        widen_nodes(function.node)


def opset_of(proto: onnx.ModelProto) -> int:
    """The opset of a model: the version of ONNX's own operators; 0 if it declares none."""
    return next((int(entry.version) for entry in proto.opset_import if entry.domain in ("", "ai.onnx")), 0)
