"""Which nodes of an ONNX file run on CUDA: by ONNX Runtime's table of kernels, and, where there is a CUDA provider, by running the file.

The table (cuda_kernels.json) is made from ONNX Runtime's docs/OperatorKernels.md by benchmarks/cuda_kernels.py. A kernel that is
registered without a last opset serves only the version of the operator that was current then: MaxPool has a kernel "12+" and changed in
opset 22, so from 22 on it has none. Later releases may have more kernels than the table, hardly fewer.
"""

from __future__ import annotations

import functools
import json
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from importlib import resources
from pathlib import Path
from typing import TYPE_CHECKING, Any

from normswap.parity.run_onnx import CPU

if TYPE_CHECKING:
    import onnx

PROVIDER = "CUDAExecutionProvider"
MAIN = ("", "ai.onnx")  # two names of one domain
# Operators without a kernel of their own: a constant is stored before the first run.
STORED = frozenset({"Constant"})


@dataclass(frozen=True)
class Missing:
    """A floating-point node that has no CUDA kernel. opset: the one in which its operator last changed."""

    node: str
    op: str
    dtype: str
    opset: int

    def __str__(self) -> str:
        return f"{self.op} {self.node} ({self.dtype}, opset {self.opset})".replace("  ", " ")


@dataclass(frozen=True)
class Placement:
    """Where the kernels of one run of a file ran.

    floating   how many floating-point kernels ran
    elsewhere  those of them that did not run on `provider`, as "type name"
    kernels    for each norm, how many kernels ran for the operators that are left of it
    """

    provider: str
    floating: int
    elsewhere: tuple[str, ...]
    kernels: Mapping[str, int]


@dataclass(frozen=True)
class Cuda:
    """What is known of a file on CUDA.

    table           the source and version of the list of kernels
    floating        how many floating-point nodes the file has
    without_kernel  those of them that have no CUDA kernel in that table
    run             how it was computed on CUDA, or None: it was not run
    why             why it was not run, else ""
    """

    table: str
    floating: int
    without_kernel: tuple[Missing, ...] = ()
    run: Placement | None = None
    why: str = "it was not asked for"

    @property
    def status(self) -> str:
        """ "not run"; "passed": it ran, every floating-point node on CUDA; "partly": it ran, some of them elsewhere."""
        if self.run is None:
            return "not run"
        return "partly" if self.run.elsewhere or not self.run.floating else "passed"


@functools.cache
def _table() -> dict[str, Any]:
    found: dict[str, Any] = json.loads((resources.files("normswap") / "export/cuda_kernels.json").read_text(encoding="utf-8"))
    return found


def has_kernel(op: str, since: int, dtype: str, domain: str = "") -> bool:
    """Whether there is a CUDA kernel for the version of an operator that came with opset `since`, on tensors of `dtype` (float32 ...)."""
    name = op if domain in MAIN else f"{domain}::{op}"
    return any(
        dtype in dtypes and (since == first if last is None else first <= since <= last)
        for first, last, dtypes in _table()["kernels"].get(name, ())
    )


def of_file(proto: onnx.ModelProto) -> Cuda:
    """What the table of kernels says of a model whose shapes onnx can infer. The model need not hold its weights."""
    floating, missing = 0, []
    for node, dtype in _floating(proto):
        floating += 1
        since = _since(node, proto)
        if not has_kernel(node.op_type, since, dtype, node.domain):
            op = node.op_type if node.domain in MAIN else f"{node.domain}::{node.op_type}"
            missing.append(Missing(node.name, op, dtype, since))
    table = _table()
    return Cuda(f"{table['source']} ({table['version']})", floating, tuple(missing))


def _since(node: onnx.NodeProto, proto: onnx.ModelProto) -> int:
    """The opset, up to that of the file, in which the operator last changed."""
    import onnx

    versions = {"" if entry.domain in MAIN else entry.domain: entry.version for entry in proto.opset_import}
    domain = "" if node.domain in MAIN else node.domain
    try:
        return int(onnx.defs.get_schema(node.op_type, versions.get(domain, 1), domain).since_version)
    except onnx.defs.SchemaError:
        return int(versions.get(domain, 1))


def _floating(proto: onnx.ModelProto) -> Iterator[tuple[onnx.NodeProto, str]]:
    """Every node with a floating-point output or input, and the dtype of the first such output, else of the first such input."""
    import onnx

    inferred = onnx.shape_inference.infer_shapes(proto)
    names: dict[int, str] = {
        onnx.TensorProto.FLOAT: "float32",
        onnx.TensorProto.DOUBLE: "float64",
        onnx.TensorProto.FLOAT16: "float16",
        onnx.TensorProto.BFLOAT16: "bfloat16",
    }

    def walk(graph: onnx.GraphProto, outer: Mapping[str, int]) -> Iterator[tuple[onnx.NodeProto, str]]:
        known = dict(outer)
        known.update({value.name: value.type.tensor_type.elem_type for value in (*graph.input, *graph.value_info, *graph.output)})
        known.update({tensor.name: tensor.data_type for tensor in graph.initializer})
        for node in graph.node:
            found = [names[kind] for name in (*node.output, *node.input) if (kind := known.get(name, 0)) in names]
            if found and node.op_type not in STORED:
                yield node, found[0]
            for attribute in node.attribute:
                for inner in (attribute.g, *attribute.graphs):
                    yield from walk(inner, known)

    yield from walk(inferred.graph, {})


# -- running it ------------------------------------------------------------------------------------------------------------------------


def unavailable(path: Path, provider: str = PROVIDER) -> str | None:
    """Why the file cannot be run on the provider here, else None: onnxruntime lacks it, or it does not start (no device, no driver)."""
    import onnxruntime

    if provider not in onnxruntime.get_available_providers():
        return f"onnxruntime has no {provider} here"
    options = onnxruntime.SessionOptions()
    options.log_severity_level = 4
    session = onnxruntime.InferenceSession(str(path), options, providers=_with_cpu(provider))
    # onnxruntime goes on without a provider that does not start
    return None if session.get_providers()[0] == provider else f"{provider} does not start here"


def _with_cpu(provider: str) -> list[str]:
    return [provider, *(other for other in (CPU,) if other != provider)]


def run(path: Path, inputs: Sequence[Any], left: Mapping[str, Sequence[str]], *, provider: str = PROVIDER) -> Placement:
    """Run the file once on `provider`, and on the CPU where the provider has no kernel. The profile then says where each kernel ran.

    inputs: an array per input, in order. left: for each norm, the types of the operators that remain of it.
    """
    import onnxruntime

    with tempfile.TemporaryDirectory() as directory:
        options = onnxruntime.SessionOptions()
        options.log_severity_level = 3
        options.enable_profiling = True
        options.profile_file_prefix = str(Path(directory) / "profile")
        session = onnxruntime.InferenceSession(str(path), options, providers=_with_cpu(provider))
        session.run(None, {known.name: array for known, array in zip(session.get_inputs(), inputs, strict=True)})
        events = json.loads(Path(session.end_profiling()).read_text(encoding="utf-8"))
    kernels = [_Kernel.of(event) for event in events if event.get("cat") == "Node" and event["name"].endswith("_kernel_time")]
    floating = [kernel for kernel in kernels if kernel.floating and not kernel.op.startswith("Memcpy")]
    elsewhere = [f"{kernel.op} {kernel.node}" for kernel in floating if kernel.provider != provider]
    counts = {name: sum(kernel.is_left_of(name, types) for kernel in kernels) for name, types in left.items()}
    return Placement(provider, len(floating), tuple(dict.fromkeys(elsewhere)), counts)


@dataclass(frozen=True)
class _Kernel:
    node: str
    op: str
    provider: str
    floating: bool

    @classmethod
    def of(cls, event: Mapping[str, Any]) -> _Kernel:
        """The kernel that one event of onnxruntime's profile is about."""
        given = event["args"]
        types = {name for key in ("input_type_shape", "output_type_shape") for entry in given.get(key, ()) for name in entry}
        node = event["name"].removesuffix("_kernel_time")
        return cls(node, given["op_name"], given.get("provider", ""), bool(types & {"float", "double", "float16", "bfloat16"}))

    def is_left_of(self, norm: str, types: Sequence[str]) -> bool:
        return any(self.node == f"{norm}.{op}" or self.node.startswith(f"{norm}.{op}_") for op in types)
