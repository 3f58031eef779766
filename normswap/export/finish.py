"""What makes a file of a folded graph: nothing in it that nobody needs, the names that were asked for, and the opset."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

from normswap.errors import ExportError, first_words
from normswap.export.opset import DEFAULT_OPSET, DOMAIN, NO_ONNX, TORCH_OPSET, unused
from normswap.export.simplify import lean, norms_stay
from normswap.parity.run_onnx import opset_of
from normswap.versions import version_of

if TYPE_CHECKING:
    import onnx
    import onnx_ir as ir


def tidy(model: ir.Model, input_names: Sequence[str], output_names: Sequence[str]) -> None:
    """Remove what nothing needs, and give the inputs and outputs their names."""
    from onnx_ir.passes import common

    graph = model.graph
    with norms_stay(model):
        lean(model)  # again: without the norms there is more to shorten
    common.DeduplicateInitializersPass()(model)
    common.RemoveUnusedNodesPass()(model)  # unused constants, too
    model.opset_imports.pop(DOMAIN, None)

    inner = [value for node in graph.all_nodes() for value in node.outputs if not value.is_graph_output()]
    names = {*input_names, *graph.initializers}
    outputs: list[str] = []
    for name in output_names:
        outputs.append(unused(name, {*names, *outputs}))
    taken = {*names, *outputs, *(str(value.name) for value in inner)}
    for value in inner:
        if value.name in {*input_names, *outputs}:
            value.name = unused(f"{value.name}_", taken)
            taken.add(value.name)
    for value, name in zip((*graph.inputs, *graph.outputs), (*input_names, *outputs), strict=True):
        value.name = name

    # What torch notes holds the paths of this machine.
    for node in graph.all_nodes():
        node.metadata_props.clear()
    for value in (*graph.inputs, *graph.initializers.values(), *graph.outputs, *inner):
        value.metadata_props.clear()
    graph.metadata_props.clear()
    model.metadata_props.clear()


def at_opset(proto: onnx.ModelProto, opset: int) -> onnx.ModelProto:
    import onnx

    if opset_of(proto) > opset:
        _drop_defaults(proto)
        try:
            proto = onnx.version_converter.convert_version(proto, opset)
        except Exception as error:
            raise ExportError(
                f"this model cannot be written in opset {opset}: {first_words(error)}",
                hint=f"opset {TORCH_OPSET} and above need no conversion; the default is {DEFAULT_OPSET}",
            ) from error
    if opset_of(proto) != opset:
        raise ExportError(
            f"opset {opset} was asked for, but this model came out in opset {opset_of(proto)}",
            hint=f"the default is opset {DEFAULT_OPSET}",
        )
    onnx.helper.set_model_props(proto, {"normswap_version": version_of("normswap")})
    return proto


def _drop_defaults(proto: onnx.ModelProto) -> None:
    """Remove attributes that say what is so without them: an older opset may not know their names."""
    import onnx

    for node in proto.graph.node:
        known = onnx.defs.get_schema(node.op_type, opset_of(proto), node.domain).attributes
        for attribute in [a for a in node.attribute if a.name in known and a == known[a.name].default_value]:
            node.attribute.remove(attribute)


def check(proto: onnx.ModelProto) -> None:
    import onnx

    try:
        onnx.checker.check_model(proto, full_check=True)
    except Exception as error:
        line = first_words(error)
        hint = "most operators take bfloat16 from opset 22 on" if "bfloat16" in line else NO_ONNX
        raise ExportError(f"the ONNX graph that torch made is not valid: {line}", hint=hint) from error
