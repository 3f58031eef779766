"""The back-ends "graph" and "fx" of `trace`: read the norms, their order, calls, producers and readers from an fx graph.

The graph is the one of a GraphModule, or the one that torch.fx traces with every norm as a leaf. No inputs are needed.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Collection
from typing import Any

from torch import Tensor, fx, nn

from normswap.detect.backend import Names, Seen
from normswap.detect.handwritten import HAND_WRITTEN, find, scalings
from normswap.detect.producers import (
    DESCRIPTIONS,
    ELSEWHERE,
    OTHER_INPUT,
    Product,
    Source,
    is_plain,
    product_of,
    source_of,
    why_holding,
    why_other,
    why_several,
)
from normswap.detect.super_calls import under_super
from normswap.models.own_code import BASES, attribute, is_emptied, operator_of, place_of


class Tracer(fx.Tracer):
    """Keeps every norm and producer as one node, whatever package its class is from, and traces into every module that holds a norm."""

    def __init__(self, model: nn.Module, names: Names) -> None:
        super().__init__()
        self.model, self.names, self.seen = model, names, Seen()

    def is_leaf_module(self, m: nn.Module, module_qualified_name: str) -> bool:
        if id(m) in self.names.norms or self.names.is_plain_producer(m) or (isinstance(m, BASES) and not is_emptied(m)):
            return True
        return super().is_leaf_module(m, module_qualified_name) and not self.names.inside(m)

    def getattr(self, attr: str, attr_val: Any, parameter_proxy_cache: dict[str, Any]) -> Any:
        norm = self.names.statistics.get(id(attr_val))
        if norm is not None:
            self.seen.read(self.names.first(norm), f"the forward of {self.scope.module_path or type(self.model).__name__}")
        return super().getattr(attr, attr_val, parameter_proxy_cache)


def see_graph(root: nn.Module, graph: fx.Graph, names: Names, seen: Seen | None = None) -> Seen:
    """Record the norms, calls, producers and readers of a graph whose module targets are names in `root`."""
    seen = seen or Seen()
    products = _Products(root, graph, names)
    calls = {call.end: call for call in find(graph, root)}
    inside = {node for call in calls.values() for node in call.inside}
    owned = root is graph.owning_module
    suspects = [call.end for call in calls.values() if call.function == HAND_WRITTEN] + [n for n in scalings(graph) if n not in inside]
    seen.suspects.update(dict.fromkeys("" if owned else place_of(node) for node in suspects))
    for node in graph.nodes:
        if node in calls:
            call = calls[node]
            place = "" if owned else place_of(node)
            seen.hit(place, call.function, products.source_of(call.start, call.inside, root.get_submodule(place)))
        elif node.op == "call_module":
            module = root.get_submodule(str(node.target))
            if id(module) in names.norms:
                source = node.args[0] if node.args else node.kwargs.get("input")
                own_input = not module._forward_pre_hooks
                seen.call(names.first(module), products.source_of(source, {node}, module) if own_input else OTHER_INPUT)
            elif isinstance(module, BASES):  # a class derived from one of torch's norms, which is called in the class's own code
                source = node.args[0] if node.args else node.kwargs.get("input")
                passes_on = not module._forward_pre_hooks and under_super(module).passes_on
                known = products.source_of(source, {node}, module) if passes_on else OTHER_INPUT
                seen.hit(names.first(module), f"{type(module).__name__}.forward", known)
            else:
                seen.unclear.update(names.first(norm) for norm in names.inside(module))
        elif node.op == "get_attr":
            norm = names.statistics.get(id(attribute(root, str(node.target))))
            if norm is not None:
                for user in node.users:
                    seen.read(names.first(norm), f"{place_of(user)}.{user.name}".lstrip("."))
    return seen


class _Products:
    """The calls of conv and linear layers in a graph, and of their functions in the code of modules."""

    def __init__(self, root: nn.Module, graph: fx.Graph, names: Names) -> None:
        self.root, self.names = root, names
        self.inlined = root is not graph.owning_module  # whether functions are called in the code of modules, which runs as it was traced
        self.runs: Counter[int] = Counter()
        self.readers: dict[int, set[fx.Node]] = {}  # id of a tensor -> the nodes that read its values
        for node in graph.nodes:
            if node.op == "call_module":
                self.runs[id(root.get_submodule(str(node.target)))] += 1
            elif self.inlined and self._product(node) is not None:
                self.runs[id(root.get_submodule(place_of(node)))] += 1
            elif node.op == "get_attr":
                self.readers.setdefault(id(attribute(root, str(node.target))), set()).update(_readers(node))

    def source_of(self, source: Any, norm: Collection[fx.Node], reader: nn.Module) -> Source:
        """Where the input of a norm comes from. source: its input. norm: all its nodes. reader: the norm, or the module that calls it."""
        if not isinstance(source, fx.Node):
            return ELSEWHERE
        if source.op == "call_module":
            maker = self.root.get_submodule(str(source.target))
            if id(maker) not in self.names.unfit:
                return ELSEWHERE
            why_not = None if is_plain(maker) else "whose code was not traced"
        elif (product := self._product(source)) is not None:
            if not self.inlined:
                return source_of(source.name, "which is a call in a graph, and no layer")
            maker = self.root.get_submodule(place_of(source))
            why_not = why_other(maker, product) or why_holding(maker, reader)
        else:
            return ELSEWHERE
        why_not = self.names.unfit.get(id(maker)) or why_not
        if why_not is None:
            tensors = (maker._parameters.get(name) for name in ("weight", "bias"))
            others = set[fx.Node]().union(*(self.readers.get(id(tensor), ()) for tensor in tensors if tensor is not None)) - {source}
            readers = 1 if _readers(source) <= set(norm) else 2
            why_not = why_several(self.runs[id(maker)], len(others), readers)
        return source_of(self.names.first(maker), why_not)

    def _product(self, node: fx.Node) -> Product | None:
        """What a node that calls a conv or linear function multiplies with and adds; None for any other node."""
        product = product_of(operator_of(node), node.args, node.kwargs) if node.op == "call_function" else None
        return None if product is None else product._replace(weight=self._tensor(product.weight), bias=self._tensor(product.bias))

    def _tensor(self, argument: Any) -> Any:
        """The parameter or buffer that an argument reads; any other argument as it is."""
        if isinstance(argument, fx.Node) and argument.op == "get_attr":
            found = attribute(self.root, str(argument.target))
            return found if isinstance(found, Tensor) else argument
        return argument


def _readers(node: fx.Node) -> set[fx.Node]:
    """The nodes that read the values of a node, and not its shape or dtype alone."""
    return {user for user in node.users if not _describes(user)}


def _describes(node: fx.Node) -> bool:
    if node.op == "call_method":
        return node.target in DESCRIPTIONS
    return node.op == "call_function" and node.target is getattr and node.args[1] in DESCRIPTIONS
