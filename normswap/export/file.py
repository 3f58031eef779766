"""The ONNX file itself: what is in it, whether it is valid, and how its bytes are written. For `export` and `fold`."""

from __future__ import annotations

import contextlib
import os
import secrets
import sys
from collections import Counter
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, BinaryIO

import numpy as np

from normswap.errors import ExportError, UsageError

if TYPE_CHECKING:
    import onnx
    import onnx_ir as ir

STREAMED = 1 << 16  # bytes from which on a tensor is written straight from memory instead of through protobuf
INLINE_LIMIT = 3 << 29  # bytes of tensors beyond which they go to a file of their own; protobuf ends at 2 GiB


def skeleton(model: ir.Model) -> tuple[onnx.ModelProto, dict[str, ir.TensorProtocol]]:
    """(the model with its large constants as inputs, those constants): ONNX's own tools copy a model several times."""
    import onnx_ir as ir

    large: dict[str, ir.TensorProtocol] = {}
    for name, value in list(model.graph.initializers.items()):
        tensor = value.const_value
        assert tensor is not None
        if tensor.nbytes >= STREAMED and tensor.dtype.bitwidth % 8 == 0:
            large[name] = tensor
            value.shape, value.type = ir.Shape(tensor.shape.numpy()), ir.TensorType(tensor.dtype)
            value.const_value = None
            del model.graph.initializers[name]
            model.graph.inputs.append(value)
    return ir.to_proto(model), large


def census(graph: onnx.GraphProto) -> dict[str, int]:
    """How often each operator occurs, those of subgraphs included, the most frequent first."""
    counts: Counter[str] = Counter()

    def count(graph: onnx.GraphProto) -> None:
        for node in graph.node:
            counts[f"{node.domain}::{node.op_type}" if node.domain else node.op_type] += 1
            for attribute in node.attribute:
                for inner in (attribute.g, *attribute.graphs):
                    count(inner)

    count(graph)
    return dict(counts.most_common())


def write(proto: onnx.ModelProto, tensors: Mapping[str, ir.TensorProtocol], path: Path, *, external: bool | None = None) -> None:
    """Write the model, its large constants straight from memory, to `<path>.data` if `external`; if that is None, beyond INLINE_LIMIT.

    Raises UsageError if more than INLINE_LIMIT is not to be external.
    """
    for value in [value for value in proto.graph.input if value.name in tensors]:
        proto.graph.input.remove(value)
    size = sum(tensor.nbytes for tensor in tensors.values())
    if external is False and size > INLINE_LIMIT:
        raise UsageError(
            f"the weights take {size} bytes, and one ONNX file holds {INLINE_LIMIT} at most",
            hint="leave the choice to normswap, or ask for external data",
        )
    if tensors and (size > INLINE_LIMIT if external is None else external):
        data = path.with_name(f"{path.name}.data")
        entries = _external_entries(tensors, data.name)
        with _replacing(data) as file:
            for tensor in tensors.values():
                file.write(_bytes_of(tensor))
        proto.graph.initializer.extend(entries)
        tensors = {}
    with _replacing(path) as file:
        _write_inline(proto, tensors, file)


def _external_entries(tensors: Mapping[str, ir.TensorProtocol], location: str) -> list[onnx.TensorProto]:
    import onnx

    entries, offset = [], 0
    for name, tensor in tensors.items():
        entry = onnx.TensorProto(name=name, data_type=tensor.dtype, dims=tensor.shape.numpy(), data_location=onnx.TensorProto.EXTERNAL)
        for key, value in (("location", location), ("offset", offset), ("length", tensor.nbytes)):
            entry.external_data.add(key=key, value=str(value))
        entries.append(entry)
        offset += tensor.nbytes
    return entries


def _write_inline(proto: onnx.ModelProto, tensors: Mapping[str, ir.TensorProtocol], file: BinaryIO) -> None:
    """The bytes of `proto` with `tensors` among its initializers, without ever holding them.

    A protobuf message is a list of fields in any order, each a key and a value; a message inside a message is a key, a length and its
    own fields. So the large tensors can be appended to the serialized rest of the graph, as long as the lengths are known.
    """
    import onnx

    graph = proto.graph.SerializeToString()
    heads = [onnx.TensorProto(name=n, data_type=t.dtype, dims=t.shape.numpy()).SerializeToString() for n, t in tensors.items()]
    raw_data, initializer, graph_field = (
        message.DESCRIPTOR.fields_by_name[name].number
        for message, name in ((onnx.TensorProto, "raw_data"), (onnx.GraphProto, "initializer"), (onnx.ModelProto, "graph"))
    )
    prefixes, length = [], len(graph)
    for head, tensor in zip(heads, tensors.values(), strict=True):
        body = head + _field(raw_data, tensor.nbytes)
        prefixes.append(_field(initializer, len(body) + tensor.nbytes) + body)
        length += len(prefixes[-1]) + tensor.nbytes
    proto.ClearField("graph")
    file.write(proto.SerializeToString() + _field(graph_field, length) + graph)
    for prefix, tensor in zip(prefixes, tensors.values(), strict=True):
        file.write(prefix)
        file.write(_bytes_of(tensor))


def _field(number: int, length: int) -> bytes:
    """Key and length of a protobuf field of `length` bytes (wire type 2), as varints: seven bits a byte, lowest first."""
    result = bytearray()
    for value in (number << 3 | 2, length):
        while value > 0x7F:
            result.append(value & 0x7F | 0x80)
            value >>= 7
        result.append(value)
    return bytes(result)


def _bytes_of(tensor: ir.TensorProtocol) -> bytes | memoryview:
    """The tensor as ONNX stores it, little-endian, without a copy where the memory is so."""
    if sys.byteorder == "big":
        return tensor.tobytes()
    return np.ascontiguousarray(tensor.numpy()).reshape(-1).view(np.uint8).data


@contextlib.contextmanager
def _replacing(path: Path) -> Iterator[BinaryIO]:
    """A file that appears as `path` once it is complete and on the disk, and not at all if anything fails before."""
    temporary = path.with_name(f".{path.name}.{secrets.token_hex(4)}.tmp")
    try:
        try:
            with open(temporary, "xb") as file:
                yield file
                file.flush()
                os.fsync(file.fileno())
            os.replace(temporary, path)
        except BaseException:
            temporary.unlink(missing_ok=True)
            raise
    except OSError as error:
        raise ExportError(f"{path} cannot be written: {error.strerror or error}") from error
