"""Removes operators that do nothing (Identity, Dropout in inference, a Cast to the type that is there), so that folds go past them."""

from __future__ import annotations

import onnx_ir as ir

from normswap.folding.affine import Constants


def remove(graph: ir.Graph, constants: Constants) -> None:
    """Remove every operator that does nothing, except one that has to stay as an output of the graph needs a name of its own."""
    for node in list(graph.all_nodes()):
        if gives_what_it_takes(node, constants):
            _remove(node)


def gives_what_it_takes(node: ir.Node, constants: Constants) -> bool:
    x = node.inputs[0] if node.domain == "" and node.inputs else None
    if x is None:
        return False
    if node.op_type == "Cast":
        return x.dtype is not None and x.dtype == node.attributes.get_int("to", 0)
    if node.op_type == "Dropout":
        mask = any(value.uses() or value.is_graph_output() for value in node.outputs[1:])
        switch = node.inputs[2] if len(node.inputs) > 2 else None  # before opset 12 there was none: then it is always in inference
        off = switch is None or ((value := constants.of(switch)) is not None and not value.any())
        return off and not mask
    return node.op_type == "Identity"


def _remove(node: ir.Node) -> None:
    x, y = node.inputs[0], node.outputs[0]
    assert x is not None
    assert node.graph is not None
    if y.is_graph_output():
        producer = x.producer()
        if producer is None or producer.graph is not node.graph or x.is_graph_output():
            return
        x.name, y.name = y.name, x.name
    x.shape = y.shape if x.shape is None else x.shape
    x.type = y.type if x.type is None else x.type
    ir.convenience.replace_all_uses_with(y, x, replace_graph_outputs=True)
    node.graph.remove(node, safe=True)
