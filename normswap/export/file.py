"""Writes an ONNX file: whole or not at all, and with its weights in a second file where one file cannot hold them."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, BinaryIO

from normswap.errors import ExportError, UsageError
from normswap.files import atomic

if TYPE_CHECKING:
    import onnx
    import onnx_ir as ir

LARGE = 1 << 16  # bytes from which on a tensor goes to the file beside it
INLINE_LIMIT = 3 << 29  # bytes of large tensors beyond which they go to a file of their own; protobuf ends at 2 GiB


def write(model: ir.Model, path: Path, *, external: bool | None = None, edit: Callable[[onnx.ModelProto], None] | None = None) -> int:
    """Write the model and return how many bytes it takes. The model has no weights afterwards.

    external: whether large constants go to `<path>.data`; None: if there are more than INLINE_LIMIT bytes of them. edit: called with the
    ModelProto right before it is written.

    Raises UsageError if there are more than INLINE_LIMIT bytes and external is False, ExportError if the file cannot be written.
    """
    import onnx_ir as ir

    values = [value for graph in model.graphs() for value in graph.initializers.values()]
    constants = {value: value.const_value for value in values if value.const_value is not None}
    # a tensor of strings has no bytes of its own
    large = {value: tensor for value, tensor in constants.items() if tensor.nbytes >= LARGE and tensor.dtype != ir.DataType.STRING}
    size = sum(tensor.nbytes for tensor in large.values())
    if external is False and size > INLINE_LIMIT:
        raise UsageError(
            f"the weights take {size} bytes, and one ONNX file holds {INLINE_LIMIT} at most",
            hint="leave the choice to normswap, or ask for external data",
        )
    try:
        with atomic.file(path) as partial:
            if size and (size > INLINE_LIMIT if external is None else external):
                beside = ir.external_data.convert_tensors_to_external([*large.values()], partial.parent, f"{partial.name}.data")
                for value, tensor in zip(large, beside, strict=True):
                    value.const_value = tensor
                large.clear()
            # of those that stay in the file, only one is copied at a time: protobuf would hold every weight twice
            streamed = {str(value.name): tensor for value, tensor in large.items() if value.graph is model.graph}
            for name in streamed:
                del model.graph.initializers[name]
            proto = ir.to_proto(model)
            if edit is not None:
                edit(proto)
            for value in constants:
                value.const_value = None
            constants.clear()
            large.clear()
            with partial.open("wb") as file:
                _write_inline(proto, streamed, file)
            return sum(file.stat().st_size for file in partial.parent.iterdir())
    except OSError as error:
        raise ExportError(f"{path} cannot be written: {error.strerror or error}") from error


def _write_inline(proto: onnx.ModelProto, tensors: dict[str, ir.TensorProtocol], file: BinaryIO) -> None:
    """Write `proto` with `tensors` among the initializers of its graph.

    A protobuf message is a list of fields in any order, each a key and a value; a message inside a message is a key, a length and its own
    fields (https://protobuf.dev/programming-guides/encoding/). So tensors can follow the rest of the graph once the length is known.
    """
    import onnx

    graph = proto.graph.SerializeToString()
    proto.ClearField("graph")
    graph_field, initializer, raw_data = (
        message.DESCRIPTOR.fields_by_name[name].number
        for message, name in ((onnx.ModelProto, "graph"), (onnx.GraphProto, "initializer"), (onnx.TensorProto, "raw_data"))
    )
    heads, length = [], len(graph)
    for name, tensor in tensors.items():
        head = onnx.TensorProto(name=name, data_type=tensor.dtype, dims=tensor.shape.numpy()).SerializeToString()
        head += _key(raw_data, tensor.nbytes)
        heads.append(_key(initializer, len(head) + tensor.nbytes) + head)
        length += len(heads[-1]) + tensor.nbytes
    file.write(proto.SerializeToString() + _key(graph_field, length) + graph)
    for head, name in zip(heads, list(tensors), strict=True):
        file.write(head)
        file.write(tensors.pop(name).tobytes())


def _key(number: int, length: int) -> bytes:
    """Key and length of a protobuf field of `length` bytes: two varints, seven bits a byte, the lowest first."""
    result = bytearray()
    for value in (number << 3 | 2, length):
        while value > 0x7F:
            result.append(value & 0x7F | 0x80)
            value >>= 7
        result.append(value)
    return bytes(result)
