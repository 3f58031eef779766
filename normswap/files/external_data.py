"""Lists and checks the external data of an ONNX file: the files beside it that hold its large tensors.

An ONNX file refers to them by paths. A malicious file may refer to any file on this computer, whose bytes would then become weights of the
model and be written out with it.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path, PurePosixPath, PureWindowsPath
from typing import TYPE_CHECKING

from normswap.errors import LoadError, first_line

if TYPE_CHECKING:
    import onnx


def check_locations(path: Path) -> None:
    """Raise LoadError if the ONNX file at `path` cannot be read, or keeps a tensor in a file outside its own directory."""
    proto = _read(path)
    for tensor in tensors(proto):
        wrong = [f"{e.key} {e.value!a:.60}" for e in tensor.external_data if e.key in ("offset", "length") and not e.value.isdecimal()]
        if tensor.data_type not in type(tensor).DataType.values():
            wrong.append(f"type {tensor.data_type}")
        if wrong:
            raise LoadError(f"{path.name} has a tensor {tensor.name!a:.60} with {wrong[0]}", hint="write it again from its source")
    for location in dict.fromkeys(_locations(proto)):
        if (problem := _problem(path.parent, location)) is not None:
            raise LoadError(
                f"{path.name} keeps weights in {location!a}, which {problem}",
                hint="the files that hold the weights of an ONNX file must be copied into its directory",
            )


def locations(path: Path) -> list[str]:
    """The files in which the ONNX file at `path` keeps tensors, as it names them; empty if it is not an ONNX file."""
    try:
        return list(dict.fromkeys(_locations(_read(path))))
    except LoadError:
        return []


def move(path: Path, names: Mapping[str, str]) -> None:
    """Make the ONNX file at `path` refer to its data files by new names. names: old -> new."""
    proto = _read(path)
    for tensor in tensors(proto):
        for entry in tensor.external_data:
            if entry.key == "location":
                entry.value = names.get(entry.value, entry.value)
    path.write_bytes(proto.SerializeToString())


def _read(path: Path) -> onnx.ModelProto:
    import onnx

    try:
        return onnx.load(str(path), load_external_data=False)
    except Exception as error:  # the errors of protobuf have no common type
        raise LoadError(
            f"{path} is not an ONNX file, or it was cut off: {first_line(error)}", hint="write it again from its source"
        ) from error


def _problem(directory: Path, location: str) -> str | None:
    """Why weights may not or cannot be read from `location`, as a clause that follows "which"; None if they can."""
    parts = {*PurePosixPath(location).parts, *PureWindowsPath(location).parts}
    if not location or PurePosixPath(location).is_absolute() or PureWindowsPath(location).anchor or ".." in parts or "\0" in location:
        return f"is not a file in {directory or '.'}"
    place = directory
    for part in PurePosixPath(location).parts:
        place /= part
        if place.is_symlink():
            return "is a link, which may lead anywhere"
    if not place.exists():
        return "is not there"
    return None if place.is_file() else "is not a file"


def _locations(proto: onnx.ModelProto) -> Iterator[str]:
    import onnx

    for tensor in tensors(proto):
        if tensor.data_location == onnx.TensorProto.EXTERNAL or tensor.external_data:
            yield next((entry.value for entry in tensor.external_data if entry.key == "location"), "")


def tensors(proto: onnx.ModelProto) -> Iterator[onnx.TensorProto]:
    """Every tensor of a model: initializers and attributes, also those of subgraphs, functions and training graphs."""
    graphs = [proto.graph, *(graph for info in proto.training_info for graph in (info.initialization, info.algorithm))]
    attributes = [a for function in proto.functions for a in (*function.attribute_proto, *_attributes(function.node))]
    while graphs or attributes:  # not recursive, as a file may be nested to any depth
        if graphs:
            graph = graphs.pop()
            yield from graph.initializer
            yield from _of_sparse(graph.sparse_initializer)
            attributes.extend(_attributes(graph.node))
        else:
            attribute = attributes.pop()
            yield from (attribute.t, *attribute.tensors)
            yield from _of_sparse((attribute.sparse_tensor, *attribute.sparse_tensors))
            graphs += [attribute.g] * attribute.HasField("g") + list(attribute.graphs)


def _attributes(nodes: Iterable[onnx.NodeProto]) -> Iterator[onnx.AttributeProto]:
    return (attribute for node in nodes for attribute in node.attribute)


def _of_sparse(tensors: Iterable[onnx.SparseTensorProto]) -> Iterator[onnx.TensorProto]:
    for tensor in tensors:
        yield from (tensor.values, tensor.indices)
