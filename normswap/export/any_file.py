"""Folds the normalization of any ONNX file into its layers, without the model that it was made from.

1. The file is read and checked, and the shapes of its values are inferred (`folding/shapes.py`).
2. Operators that do nothing are removed (`folding/noops.py`).
3. Its affines are found (`folding/find.py`) and folded where that is exact (`folding/decide.py`).
4. With `to="rmsnorm"`, its LayerNorms become RMSNorms where that is exact (`rmsnorm.py`), in opset 23, and their biases are folded.
5. If anything could be done, the new graph is shortened (`simplify.py`) and written, else in the opset that the file had; if nothing, the
   file is copied as it is.

`verify` then says whether the two files are the same function, before the new one gets its name.
"""

from __future__ import annotations

import contextlib
import functools
import shutil
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING

from normswap.errors import ExportError, LoadError, first_line
from normswap.export import rmsnorm
from normswap.export.file import write
from normswap.export.names import unused
from normswap.export.norms import operators
from normswap.export.opset import NEWER_OPSET, raise_opset
from normswap.export.simplify import norms_stay, simplify
from normswap.files import external_data
from normswap.parity.result import Comparisons, Parity
from normswap.parity.run_onnx import opset_of
from normswap.versions import version_of

if TYPE_CHECKING:
    import onnx
    import onnx_ir as ir

    from normswap.folding import Outcome

OLDEST = 7  # the opset from which on sums and products broadcast
MODERN = 13  # what every converter can reach
LISTED = 4  # the IR version from which on a weight need not be among the inputs of the graph


@dataclass(frozen=True)
class Folded:
    """An ONNX file that was folded, or copied because there was nothing to fold.

    before, nodes  how often each operator occurs in the file that came in, and in the one that was written
    bytes_before, bytes  how large they are, with the files that their weights lie in
    sites          a `normswap.folding.Outcome` for each affine, and for each norm that is no affine
    layer_norms    the names of those of the sites that RMSNorms were to be made of, None if that was not asked for
    notes          why nothing was folded, if the sites do not say it
    parity         the result of comparing the two files, None before that
    comparisons    the results of all comparisons of the new file
    """

    path: Path
    before: Mapping[str, int]
    nodes: Mapping[str, int]
    bytes_before: int
    bytes: int
    sites: tuple[Outcome, ...] = ()
    notes: tuple[str, ...] = ()
    layer_norms: tuple[str, ...] | None = None
    parity: Parity | None = None
    comparisons: Comparisons = field(default_factory=Comparisons, repr=False)

    @property
    def rolled_back(self) -> bool:
        """Whether everything that could be folded was rolled back, as the file did not pass."""
        return not self.changed and any(site.reason.startswith("rolled back") for site in self.sites)

    @property
    def changed(self) -> bool:
        return any(site.touched or site.rewritten for site in self.sites)


def fold(
    source: Path,
    target: Path,
    *,
    kept: Mapping[str, str] | None = None,
    shorten: bool = True,
    to_rmsnorm: bool = False,
    refused: str | None = None,
) -> Folded:
    """Write `source`, folded, to `target`. kept: sites that stay as they are, by name, and why. shorten: whether to simplify the graph.

    to_rmsnorm: whether to make RMSNorms of LayerNorms. refused: why RMSNormalization cannot be written, where it cannot.

    Raises LoadError if `source` is no valid ONNX file, ExportError if `target` cannot be written or the graph cannot be shortened.
    """
    import onnx_ir as ir
    from onnx_ir.passes import common

    from normswap.folding import Constants, noops, shapes
    from normswap.folding import fold as fold_affines
    from normswap.folding.find import affines, others

    again = functools.partial(fold, source, target, shorten=shorten, to_rmsnorm=to_rmsnorm)
    kept = {} if kept is None else kept
    proto = read(source)
    size = _size(source)
    model = ir.load(str(source))
    before = dict(operators(model.graph).most_common())
    if "ai.onnx" in model.opset_imports:  # the long form of the empty name
        model.opset_imports[""] = model.opset_imports.pop("ai.onnx")
    open_to_callers, notes = _listed(model)
    constants = Constants(model.graph)
    if (opset := constants.opset) < OLDEST:
        convert = f"`onnx.version_converter.convert_version(model, {MODERN})` makes a newer file of it"
        reason = f"the file has opset {opset}, and files older than opset {OLDEST} are left as they are: {convert}"
        return _copied(source, target, before, _other_norms(others(model, (), constants, reason), ()), (reason,))
    raised = to_rmsnorm and opset < NEWER_OPSET and rmsnorm.LAYER_NORM in before and refused is None
    if raised and (why := raise_opset(model)) is not None:
        return again(kept=kept, refused=f"RMSNormalization needs opset {NEWER_OPSET}, and the file cannot be raised to it: {why}")
    constants = Constants(model.graph)
    with _unknown(model, open_to_callers):
        shapes.infer(model)
    noops.remove(model.graph, constants)
    found = affines(model.graph, constants)
    norms = rmsnorm.find(model.graph, constants, [site.name for site in found]) if to_rmsnorm else []
    taken = {node for norm in norms for node in norm.nodes}
    rest = [(node, reason) for node, reason in others(model, found, constants) if node not in taken]
    sites = fold_affines(model.graph, found, constants, kept)
    made = rmsnorm.convert(model.graph, norms, constants, kept, refused)
    if raised and not made.operators:
        stay = {site.name: site.reason for site in made.outcomes if not site.how}
        return again(kept={**kept, **stay}, refused="no LayerNorm of the file can be an RMSNorm")
    sites = [*sites, *made.outcomes, *fold_affines(model.graph, made.biases, constants, kept)]
    everything = (*sites, *_other_norms(rest, [site.name for site in sites]))
    layer_norms = tuple(norm.name for norm in norms) if to_rmsnorm else None
    if not any(site.touched or site.rewritten for site in sites):
        note = (
            f"{len(open_to_callers)} of its weights are inputs that a caller may replace: "
            "`onnx_ir.passes.common.RemoveInitializersFromInputsPass` makes constants of them"
        )
        copied = _copied(source, target, before, everything, (note,) if open_to_callers else ())
        return replace(copied, layer_norms=layer_norms)
    common.RemoveUnusedNodesPass()(model)
    constants.restore_names()
    if shorten:
        _shorten(model, open_to_callers)
    model.metadata_props["normswap_version"] = version_of("normswap")
    _with_base(model, source)
    declared = functools.partial(_as_declared, old=proto)
    _check(model, declared)
    nodes = dict(operators(model.graph).most_common())
    after = write(model, target, edit=declared)
    if raised:
        notes = (*notes, f"written in opset {NEWER_OPSET}, which has RMSNormalization; the file has opset {opset}")
    return Folded(target, before, nodes, size, after, everything, (*notes, *made.notes), layer_norms)


def _listed(model: ir.Model) -> tuple[list[str], tuple[str, ...]]:
    """(the weights that a caller may replace, notes). Before IR version 4 weights had to be inputs, and none is replaceable."""
    graph = model.graph
    names = [str(value.name) for value in graph.inputs if value.name in graph.initializers]
    if model.ir_version >= LISTED:
        return names, ()
    for value in [value for value in graph.inputs if value.name in graph.initializers]:
        graph.inputs.remove(value)
    old, model.ir_version = model.ir_version, LISTED
    return [], (f"IR version {old} lists weights as inputs; the new file has IR version {LISTED}, which does not",) if names else ()


def _other_norms(norms: Sequence[tuple[ir.Node, str]], taken: Sequence[str]) -> tuple[Outcome, ...]:
    """An Outcome for each norm that cannot be folded at all, under a name that no affine has."""
    from normswap.folding import Outcome

    names, found = set(taken), []
    for node, reason in norms:
        name = unused(str(node.name or node.outputs[0].name), names)
        names.add(name)
        found.append(Outcome(name, left=(f"{node.domain}::{node.op_type}" if node.domain else node.op_type,), reason=reason))
    return tuple(found)


@contextlib.contextmanager
def _unknown(model: ir.Model, names: Sequence[str]) -> Iterator[None]:
    """Hide the values of weights that a caller may replace, so that no shape and no sum is computed from them."""
    values = {name: model.graph.initializers.pop(name) for name in names}
    tensors = {name: value.const_value for name, value in values.items()}
    for value in values.values():
        value.const_value = None
    try:
        yield
    finally:
        for name, value in values.items():
            value.const_value = tensors[name]
            model.graph.initializers[name] = value


def _shorten(model: ir.Model, open_to_callers: Sequence[str]) -> None:
    """Shorten a graph whose norms are folded. The names of inputs and outputs stay."""
    names = _interface(model.graph)
    try:
        with _unknown(model, open_to_callers), norms_stay(model):
            simplify(model)
    except Exception as error:  # onnxscript may fail on a graph that is unlike those of torch
        raise ExportError(f"the folded graph cannot be shortened: {first_line(error)}") from error
    if _interface(model.graph) != names:
        raise ExportError("the folded graph cannot be shortened: its inputs or outputs would get other names")


def _interface(graph: ir.Graph) -> list[str | None]:
    return [value.name for value in (*graph.inputs, *graph.outputs)]


def _as_declared(new: onnx.ModelProto, old: onnx.ModelProto) -> None:
    """Declare inputs and outputs as the old file does, and the shapes of those inner values whose shapes it had."""
    declared = {value.name: value for value in (*old.graph.input, *old.graph.output) if value.type.tensor_type.HasField("shape")}
    for value in (*new.graph.input, *new.graph.output):
        if value.name in declared:
            value.CopyFrom(declared[value.name])
    known = {value.name for value in old.graph.value_info}
    kept = [value for value in new.graph.value_info if value.name in known]
    del new.graph.value_info[:]
    new.graph.value_info.extend(kept)


def read(path: Path) -> onnx.ModelProto:
    """Read and check an ONNX file, without the data of its large tensors. Raises LoadError if it is not valid."""
    import onnx

    try:
        proto = onnx.load(str(path), load_external_data=False)
    except FileNotFoundError:
        raise LoadError(f"{path} does not exist", hint="give the path of an .onnx file") from None
    except Exception as error:
        raise LoadError(
            f"{path} is not an ONNX file, or it was cut off: {first_line(error)}", hint="write it again from its source"
        ) from error
    if not proto.graph.node and not proto.graph.output:
        raise LoadError(f"{path} is not an ONNX file: it has no graph", hint="give the path of an .onnx file")
    shaped = all(_has_shape(value) for value in (*proto.graph.input, *proto.graph.output))
    try:
        if shaped and not any(_is_of_onnxruntime(node, proto) for node in proto.graph.node):
            onnx.checker.check_model(str(path))
        else:
            onnx.checker.check_model(_checkable(proto))
    except Exception as error:
        raise LoadError(f"{path} is not a valid ONNX file: {first_line(error)}", hint="write it again from its source") from error
    _check_external(proto, path)
    return proto


def sizes_known(path: Path) -> bool:
    """Whether the file gives the rank of each input, and no negative size."""
    import onnx

    inputs = onnx.load(str(path), load_external_data=False).graph.input
    return all(_has_shape(value) and all(dim.dim_value >= 0 for dim in value.type.tensor_type.shape.dim) for value in inputs)


SHAPES = {"Reshape": 0, "Expand": 1, "Tile": 1}  # operator -> the number that, all along its input 1, leaves a value in its shape


def shapes_asked(path: Path) -> dict[int, tuple[int, int]]:
    """place -> (how many numbers, which), for each input that is the shape for a Reshape, Expand or Tile: random numbers would not fit."""
    import onnx_ir as ir

    from normswap.folding import shapes

    model = ir.load(str(path))
    shapes.infer(model)
    inputs = [value for value in model.graph.inputs if value.name not in model.graph.initializers]
    found = {}
    for place, value in enumerate(inputs):
        for node, index in value.uses():
            given = node.inputs[0]
            if node.op_type in SHAPES and node.domain == "" and index == 1 and given is not None and given.shape is not None:
                found[place] = len(given.shape), SHAPES[node.op_type]
    return found


def _has_shape(value: onnx.ValueInfoProto) -> bool:
    return bool(value.type.WhichOneof("value") != "tensor_type" or value.type.tensor_type.HasField("shape"))


# Norms that onnxruntime knows in ONNX's own domain -> the opset in which ONNX first has that name, if ever.
OF_ONNXRUNTIME = {"SimplifiedLayerNormalization": 1 << 30, "LayerNormalization": 17}


def _is_of_onnxruntime(node: onnx.NodeProto, proto: onnx.ModelProto) -> bool:
    return node.domain in ("", "ai.onnx") and opset_of(proto) < OF_ONNXRUNTIME.get(node.op_type, 0)


def _checkable(proto: onnx.ModelProto) -> onnx.ModelProto:
    """A copy for ONNX's checker: with a shape for every input and output, and the operators of onnxruntime in a domain of their own.

    Runtimes run files without these shapes, or with such operators, and the checker refuses them. Tensors outside of the file become
    inputs, as the checker could not find them.
    """
    import onnx

    shaped = onnx.ModelProto()
    shaped.CopyFrom(proto)
    for value in (*shaped.graph.input, *shaped.graph.output):
        if not _has_shape(value):
            value.type.tensor_type.shape.SetInParent()
    for node in [node for node in shaped.graph.node if _is_of_onnxruntime(node, proto)]:
        node.domain = "com.microsoft"
        if node.domain not in [entry.domain for entry in shaped.opset_import]:
            shaped.opset_import.append(onnx.helper.make_opsetid(node.domain, 1))
    outside = [tensor for tensor in shaped.graph.initializer if tensor.data_location == onnx.TensorProto.EXTERNAL]
    listed = {value.name for value in shaped.graph.input}
    for tensor in outside:
        shaped.graph.initializer.remove(tensor)
        if tensor.name not in listed:
            shaped.graph.input.append(onnx.helper.make_tensor_value_info(tensor.name, tensor.data_type, tensor.dims))
    return shaped


def _copied(source: Path, target: Path, before: Mapping[str, int], sites: tuple[Outcome, ...], notes: tuple[str, ...]) -> Folded:
    """Copy an ONNX file in which nothing was folded, and the files that hold its large tensors."""
    try:
        shutil.copyfile(source, target)
        for name in external_data.locations(source):
            with contextlib.suppress(shutil.SameFileError):
                (target.parent / name).parent.mkdir(parents=True, exist_ok=True)
                shutil.copyfile(source.parent / name, target.parent / name)
    except OSError as error:
        raise ExportError(f"{target} cannot be written: {error.strerror or error}") from error
    size = _size(target)
    return Folded(target, before, before, size, size, sites, notes)


def _size(path: Path) -> int:
    """How many bytes an ONNX file has, together with the files that hold its large tensors."""
    return sum(file.stat().st_size for file in (path, *(path.parent / name for name in external_data.locations(path))))


def _check_external(proto: onnx.ModelProto, path: Path) -> None:
    """Raise LoadError if a file that holds tensors is too short: onnx's checker looks only whether it exists."""
    import onnx

    for tensor in external_data.tensors(proto):
        if tensor.data_location != onnx.TensorProto.EXTERNAL:
            continue
        entries = {entry.key: entry.value for entry in tensor.external_data}
        place = path.parent / entries.get("location", "")
        try:
            end = int(entries.get("offset", 0)) + int(entries.get("length", 0))
            size = place.stat().st_size
        except (OSError, ValueError) as error:
            raise LoadError(f"{path} is not a valid ONNX file: {first_line(error)}", hint="write it again from its source") from error
        if size < end:
            raise LoadError(
                f"{path} is not a valid ONNX file: {place} has {size:,} bytes, and {tensor.name} is expected to end at {end:,}",
                hint="it was cut off: copy it again",
            )


def _with_base(model: ir.Model, source: Path) -> None:
    """Read the tensors that lie in files beside the source into memory, as the new file is written with its own."""
    import onnx_ir as ir

    ir.external_data.set_base_dir(model.graph, str(source.parent))
    ir.external_data.load_to_model(model)


def _check(model: ir.Model, edit: Callable[[onnx.ModelProto], None]) -> None:
    """Raise ExportError if the file, as it will be written, would not be valid."""
    import onnx
    from onnx_ir.passes.common._c_api_utils import call_onnx_api

    def check(proto: onnx.ModelProto) -> None:
        edit(proto)
        onnx.checker.check_model(_checkable(proto))

    try:
        call_onnx_api(check, model)
    except Exception as error:
        raise ExportError(f"the folded graph is not valid: {first_line(error)}") from error
