"""Writes an ONNX file: whole or not at all, and with its weights in a second file where one file cannot hold them."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING

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

    constants = [value for graph in model.graphs() for value in graph.initializers.values()]
    size = sum(value.const_value.nbytes for value in constants if value.const_value is not None and value.const_value.nbytes >= LARGE)
    if external is False and size > INLINE_LIMIT:
        raise UsageError(
            f"the weights take {size} bytes, and one ONNX file holds {INLINE_LIMIT} at most",
            hint="leave the choice to normswap, or ask for external data",
        )
    try:
        with atomic.file(path) as partial:
            if size and (size > INLINE_LIMIT if external is None else external):
                ir.external_data.unload_from_model(model, partial.parent, f"{partial.name}.data", size_threshold_bytes=LARGE - 1)
            proto = ir.to_proto(model)
            for value in constants:
                value.const_value = None  # so that no more than one copy is there while protobuf makes another
            if edit is not None:
                edit(proto)
            partial.write_bytes(proto.SerializeToString())
            return sum(file.stat().st_size for file in partial.parent.iterdir())
    except OSError as error:
        raise ExportError(f"{path} cannot be written: {error.strerror or error}") from error
