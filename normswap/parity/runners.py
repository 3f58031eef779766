"""Run a model, whatever it is, at a probe: a torch module in its own dtype or in float64, an ONNX file in onnxruntime or in float64."""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import math
import tempfile
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from normswap.errors import SwapError, UsageError
from normswap.models import float64
from normswap.models.copying import uncompiled
from normswap.models.torch_private import is_functorch_wrapped, keystr, tree_flatten_with_path
from normswap.parity.kernels import kernels
from normswap.parity.probes import Probe
from normswap.parity.taps import Tap, key

if TYPE_CHECKING:
    import onnx

TAP_SIZE = 4096
REFERENCE = "reference"  # in place of an optimisation level: onnx's own evaluator, which has every kernel in every dtype, and is slow
PROVIDER = "ExecutionProvider"  # a level that ends so is one: the file runs on it, at the highest level
CPU = f"CPU{PROVIDER}"
BY_POSITION = "#"  # an ONNX file has outputs by position: "#0", "#1" ...

Values = dict[str, Tensor]
# Runs one probe; returns the outputs by name and the tapped layers by "name@call".
Runner = Callable[[Probe], tuple[Values, Values]]


class _Seen(TorchFunctionMode):
    """Collects the dtypes that a model computes in, those of an autocast region inside it included."""

    def __init__(self, dtypes: set[torch.dtype]) -> None:
        super().__init__()
        self.dtypes = dtypes

    def __torch_function__(self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Mapping[str, Any] | None = None) -> Any:
        result = func(*args, **(kwargs or {}))
        if isinstance(result, Tensor):
            self.dtypes.add(result.dtype)
        return result


class OwnTensors(TorchFunctionMode):
    """Stops a model that reads one of these tensors, by id: a copy that still uses the original."""

    def __init__(self, foreign: Mapping[int, str]) -> None:
        super().__init__()
        self.foreign = foreign

    def __torch_function__(self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Mapping[str, Any] | None = None) -> Any:
        kwargs = kwargs or {}
        for value in (*args, *kwargs.values()):
            for tensor in value if isinstance(value, (list, tuple)) else (value,):
                if isinstance(tensor, Tensor) and id(tensor) in self.foreign:
                    raise SwapError(
                        f"it still uses {self.foreign[id(tensor)]} of the original, which a function that was made inside the model holds "
                        "(a lambda or a closure): copying a model does not copy such functions; make it a method"
                    )
        return func(*args, **kwargs)


def module_runner(
    model: nn.Module,
    sites: Sequence[str],
    *,
    in_float64: torch.dtype | None = None,
    dtypes: set[torch.dtype] | None = None,
    foreign: Mapping[int, str] | None = None,
    inputs: bool = False,
) -> Runner:
    """Runs a model that nobody else uses: in eval mode, without gradients, the generator seeded and then put back.

    in_float64: run it so; the dtype that it has otherwise. dtypes: a set into which the dtypes that the model computes in are put. foreign:
    tensors, by id, that it must not read, and their names. inputs: tap also what the sites are given.
    """
    mode: Callable[[], contextlib.AbstractContextManager[Any]] = contextlib.nullcontext
    if in_float64 is not None:
        mode = functools.partial(float64.in_float64, in_float64)
    elif dtypes is not None:
        mode = functools.partial(_Seen, dtypes)
    elif foreign is not None:
        mode = functools.partial(OwnTensors, foreign)
    taps: Values = {}
    modules = dict(model.named_modules(remove_duplicate=False))
    calls: dict[str, int] = {}

    def tap(name: str) -> Callable[..., None]:
        def record(module: nn.Module, args: Any, output: Any) -> None:
            # A tensor of a vmap ends with it; the parts of a nested tensor have no common shape.
            if isinstance(output, Tensor) and not is_functorch_wrapped(output) and not output.is_nested:
                calls[name] = calls.get(name, 0) + 1
                if inputs and args:
                    taps[key(name, calls[name], input=True)] = sampled(args[0])
                taps[key(name, calls[name])] = sampled(output)

        return record

    for name in sites:
        if name in modules:
            modules[name].register_forward_hook(tap(name))

    def run(probe: Probe) -> tuple[Values, Values]:
        taps.clear()
        calls.clear()
        # A model may write into its inputs; the probes must stay what they are.
        args, kwargs = probe.mapped(torch.clone)
        with torch.no_grad(), torch.random.fork_rng(), uncompiled(), mode():
            torch.manual_seed(0)
            output = model(*args, **kwargs)
        return _named(output), dict(taps)

    return run


def sampled(tensor: Tensor) -> Tensor:
    flat = tensor.detach().reshape(-1)
    return flat[:: _step(flat.numel())].clone()


def _step(count: int) -> int:
    """The step with which at most TAP_SIZE of `count` values are taken. Coprime to every axis, so that no channel is always left out."""
    step = max(1, math.ceil(count / TAP_SIZE))
    while math.gcd(step, count) > 1:
        step += 1
    return step


def _named(output: Any, path: str = "output", within: tuple[int, ...] = ()) -> Values:
    """The tensors and numbers of a model's output, in order, each under its path; also those in objects and dicts of any class."""
    found: Values = {}
    for keys, leaf in tree_flatten_with_path(output)[0]:
        name = f"{path}{keystr(keys)}"
        if isinstance(leaf, Tensor):
            found[name] = leaf.detach() if leaf.layout is torch.strided else leaf.detach().to_dense()
        elif isinstance(leaf, (bool, int, float)):
            found[name] = torch.tensor(leaf, dtype=torch.float64 if isinstance(leaf, float) else None)
        elif dataclasses.is_dataclass(leaf) and not isinstance(leaf, type):
            for field in dataclasses.fields(leaf):
                found |= _named(getattr(leaf, field.name), f"{name}.{field.name}")
        elif isinstance(leaf, Mapping):
            for key, value in leaf.items():
                found |= _named(value, f"{name}[{key!r}]")
        elif hasattr(leaf, "__dict__") and not isinstance(leaf, (type, nn.Module)) and not callable(leaf) and id(leaf) not in within:
            for attribute, value in vars(leaf).items():
                found |= _named(value, f"{name}.{attribute}", (*within, id(leaf)))
    return found


def onnx_runner(path: Path, level: str, taps: Sequence[Tap] = ()) -> Runner:
    """Runs a file in onnxruntime at one level of optimisation, or in onnx's evaluator; `taps` are then what is tapped."""
    import onnxruntime

    if level == REFERENCE:
        import onnx

        return _evaluator(onnx.load(path), taps)
    options = onnxruntime.SessionOptions()
    options.log_severity_level = 4  # what goes wrong is raised as well
    options.add_session_config_entry("session.intra_op.allow_spinning", "0")  # threads that wait by turning cost the time of others
    options.graph_optimization_level = {
        "disabled": onnxruntime.GraphOptimizationLevel.ORT_DISABLE_ALL,
        "basic": onnxruntime.GraphOptimizationLevel.ORT_ENABLE_BASIC,
        "extended": onnxruntime.GraphOptimizationLevel.ORT_ENABLE_EXTENDED,
        "all": onnxruntime.GraphOptimizationLevel.ORT_ENABLE_ALL,
    }.get(level, onnxruntime.GraphOptimizationLevel.ORT_ENABLE_ALL)
    provider = level if level.endswith(PROVIDER) else CPU
    # TF32 has ten bits, and is no way to compute float32 when its rounding is what is measured.
    chosen = [(provider, {"use_tf32": "0"} if provider.startswith("CUDA") else {}), *([] if provider == CPU else [CPU])]
    with _with_outputs(path, taps) as (opened, asked):
        session = onnxruntime.InferenceSession(str(opened), options, providers=chosen)
    if session.get_providers()[0] != provider:  # onnxruntime goes on without a provider that does not start
        raise RuntimeError(f"{provider} did not start")
    names = [i.name for i in session.get_inputs()]
    outputs = [output.name for output in session.get_outputs()]
    return lambda probe: _told(session.run(None, _feeds(names, probe)), outputs, asked, taps)


def onnx_float64_runner(path: Path, taps: Sequence[Tap] = (), *, nudge: float = 0.0) -> Runner:
    """The file with every float widened to float64, in onnx's reference evaluator: onnxruntime has no float64 kernel for Conv.

    nudge: by how much of its size each constant is moved at most, at random.
    """
    import onnx

    model = onnx.load(path)
    _widen(model, nudge)
    return _evaluator(model, taps)


def _evaluator(model: Any, taps: Sequence[Tap]) -> Runner:
    import numpy as np
    from onnx.reference import ReferenceEvaluator

    asked = _add_outputs(model.graph, taps)
    evaluator = ReferenceEvaluator(model, new_ops=[*kernels(), *_corrected(model)])
    names, outputs = list(evaluator.input_names), list(evaluator.output_names)

    def run(probe: Probe) -> tuple[Values, Values]:
        with np.errstate(all="ignore"), warnings.catch_warnings():
            warnings.simplefilter("ignore")  # of an overflow, say: the comparison sees it
            return _told(evaluator.run(None, _feeds(names, probe)), outputs, asked, taps)

    return run


def _corrected(model: Any) -> list[Any]:
    """Operators that onnx's evaluator (1.23) computes otherwise than ONNX defines them.

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

        def _run(self, x: Any, scale: Any, bias: Any, mean: Any, var: Any, epsilon: float = 1e-5, **others: Any) -> tuple[Any]:
            scale, bias, mean, var = (a.reshape(-1, *(1,) * (x.ndim - 2)) for a in (scale, bias, mean, var))
            return ((scale * (x - mean) / np.sqrt(var + epsilon) + bias).astype(x.dtype),)

    return [BatchNormalization]


def _add_outputs(graph: Any, taps: Sequence[Tap]) -> int:
    """Give the graph the tapped values as outputs, after those that it has; how many it had."""
    count = len(graph.output)
    known = {output.name for output in graph.output}
    computed = {name for node in graph.node for name in node.output}
    for name in dict.fromkeys(tap.value for tap in taps):
        if name in computed - known:
            graph.output.add(name=name)
    return count


@contextlib.contextmanager
def _with_outputs(path: Path, taps: Sequence[Tap]) -> Iterator[tuple[Path, int | None]]:
    """(a file like this one that gives the tapped values, too, how many outputs it had). Beside it, for the weights that lie there."""
    if not taps:
        yield path, None
        return
    import onnx

    model = onnx.load(path, load_external_data=False)
    count = _add_outputs(model.graph, taps)
    with tempfile.NamedTemporaryFile(prefix=f".{path.name}.", suffix=".tapped", dir=path.parent) as file:
        file.write(model.SerializeToString())
        file.flush()
        yield Path(file.name), count


def _told(found: Any, names: Sequence[str], asked: int | None, taps: Sequence[Tap]) -> tuple[Values, Values]:
    """The outputs by position, and what the taps tell of the norms."""
    values = dict(zip(names, found, strict=True))
    tapped = {}
    for tap in taps:
        if tap.value in values:
            tapped[tap.key] = sampled(torch.as_tensor(tap.original(values[tap.value])))
    return _by_position(found[:asked]), tapped


def onnx_dtypes(path: Path) -> set[torch.dtype]:
    """The floating dtypes of the file's weights and casts: those that it computes in."""
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


# By the number that ONNX has for each (TensorProto.DataType).
_FED = {
    1: torch.float32,
    2: torch.uint8,
    3: torch.int8,
    4: torch.uint16,
    5: torch.int16,
    6: torch.int32,
    7: torch.int64,
    9: torch.bool,
    10: torch.float16,
    11: torch.float64,
    12: torch.uint32,
    13: torch.uint64,
    14: torch.complex64,
    15: torch.complex128,
}


def onnx_inputs(path: Path, batch: int = 2, free: int | None = None) -> tuple[Tensor, ...] | None:
    """Seeded inputs of the shapes that the file declares, `batch` for a free first axis, `free` for others; None if that is not given.

    Raises UsageError for an input that is no tensor of numbers that numpy has.
    """
    import onnx

    graph = onnx.load(path, load_external_data=False).graph
    constants = {i.name for i in graph.initializer}
    generator = torch.Generator().manual_seed(0)
    found = []
    for value in graph.input:
        if value.name in constants:
            continue
        kind = value.type.tensor_type
        dtype = _FED.get(kind.elem_type)
        if dtype is None:
            what = value.type.WhichOneof("value") or "value of no type"
            name = onnx.TensorProto.DataType.Name(kind.elem_type).lower() if what == "tensor_type" else what.removesuffix("_type")
            raise UsageError(
                f"the input {value.name} of {path} is a {name}, and numpy has no such numbers to run it on",
                hint="a file can only be held against another one on tensors of numbers",
            )
        known = (dim.dim_value if dim.HasField("dim_value") and dim.dim_value > 0 else None for dim in kind.shape.dim)
        sizes = [size or (batch if i == 0 else free) for i, size in enumerate(known)]
        shape = [size for size in sizes if size is not None]
        if len(shape) < len(sizes):
            return None
        floating = dtype.is_floating_point
        found.append((torch.randn(shape, generator=generator) if floating else torch.randint(2, shape, generator=generator)).to(dtype))
    return tuple(found)


def _feeds(names: Sequence[str], probe: Probe) -> dict[str, Any]:
    tensors = probe.tensors()
    if len(tensors) != len(names):
        raise ValueError(f"the file has {len(names)} inputs ({', '.join(names)}), but {len(tensors)} tensors were given")
    return {name: tensor.numpy(force=True) for name, tensor in zip(names, tensors, strict=True)}


def _by_position(found: Any) -> Values:
    return {f"{BY_POSITION}{i}": torch.as_tensor(value) for i, value in enumerate(found)}


def _widen(model: Any, nudge: float = 0.0) -> None:
    """Turn float32, float16 and bfloat16 into float64 everywhere in an ONNX model: tensors, declared types, casts."""
    import numpy as np
    import onnx
    from onnx import numpy_helper

    narrow = {onnx.TensorProto.FLOAT, onnx.TensorProto.FLOAT16, onnx.TensorProto.BFLOAT16}
    generator = np.random.default_rng(0)

    def widen_tensor(tensor: Any) -> None:
        if tensor.data_type in narrow:
            values = numpy_helper.to_array(tensor).astype("float64")
            if nudge and values.size:
                size = np.abs(np.nan_to_num(values, posinf=0, neginf=0))
                # A whole number was not rounded, and a size or a factor of Resize is a whole number.
                rounded = np.where(values == np.round(values), 0.0, np.maximum(size, size.mean()))
                values = values + nudge * rounded * generator.uniform(-1, 1, values.shape)
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
                    values = np.asarray(onnx.helper.get_attribute_value(attribute), np.float64)
                    attribute.CopyFrom(onnx.helper.make_attribute("value", numpy_helper.from_array(values)))
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
    """The version of ONNX's own operators, 0 if there is none."""
    return next((int(entry.version) for entry in proto.opset_import if entry.domain in ("", "ai.onnx")), 0)
