"""The last steps from a folded graph to a file: unused nodes go, inputs and outputs get their names, and the opset is set."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

from normswap.errors import ExportError, first_words
from normswap.export.names import DOMAIN, NO_ONNX, unused
from normswap.export.opset import DEFAULT_OPSET, TORCH_OPSET
from normswap.models.quiet import quiet
from normswap.parity.run_onnx import opset_of

if TYPE_CHECKING:
    import onnx
    import onnx_ir as ir


def tidy(model: ir.Model, input_names: Sequence[str], output_names: Sequence[str]) -> None:
    """Remove unused nodes, constants and notes, and give the inputs and outputs their names."""
    from onnx_ir.passes import common

    graph = model.graph
    with quiet():  # it logs each constant that it leaves, as it is an output
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

    # The metadata that torch writes contains paths of this machine.
    for node in graph.all_nodes():
        node.metadata_props.clear()
    for value in (*graph.inputs, *graph.initializers.values(), *graph.outputs, *inner):
        value.metadata_props.clear()
    graph.metadata_props.clear()
    model.metadata_props.clear()


def at_opset(model: ir.Model, opset: int) -> ir.Model:
    """The model in an opset. Raises ExportError if ONNX's converter cannot write it in an older one."""
    import onnx_ir as ir
    from onnx_ir.passes.common._c_api_utils import call_onnx_api

    if model.graph.opset_imports[""] > opset:
        try:
            converted = ir.from_proto(call_onnx_api(lambda proto: _converted(proto, opset), model))
        except Exception as error:
            raise ExportError(
                f"this model cannot be written in opset {opset}: {first_words(error)}",
                hint=f"opset {TORCH_OPSET} and above need no conversion; the default is {DEFAULT_OPSET}",
            ) from error
        count = len(model.graph.inputs)
        for value in converted.graph.inputs[count:]:  # call_onnx_api shows large constants to ONNX's tools as inputs
            value.const_value = model.graph.initializers[str(value.name)].const_value
            converted.graph.register_initializer(value)
        del converted.graph.inputs[count:]
        model = converted
    if model.graph.opset_imports[""] != opset:
        raise ExportError(
            f"opset {opset} was asked for, but this model came out in opset {model.graph.opset_imports['']}",
            hint=f"the default is opset {DEFAULT_OPSET}",
        )
    return model


def _converted(proto: onnx.ModelProto, opset: int) -> onnx.ModelProto:
    import onnx

    for node in proto.graph.node:  # remove attributes with their default value: an older opset may not know their names
        known = onnx.defs.get_schema(node.op_type, opset_of(proto), node.domain).attributes
        for attribute in [a for a in node.attribute if a.name in known and a == known[a.name].default_value]:
            node.attribute.remove(attribute)
    return onnx.version_converter.convert_version(proto, opset)


def check(model: ir.Model) -> None:
    """Raise ExportError if the model is not valid ONNX."""
    from onnx_ir.passes import common

    try:
        common.CheckerPass(full_check=True)(model)
    except Exception as error:
        line = first_words(error.__cause__ or error)
        hint = "most operators take bfloat16 from opset 22 on: --opset 22 (opset=22 in Python)" if "bfloat16" in line else NO_ONNX
        raise ExportError(f"the ONNX graph that torch made is not valid: {line}", hint=hint) from error
