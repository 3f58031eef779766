"""The back-ends "graph" and "fx" of `trace`: read the norms, their order, calls, producers and readers from an fx graph.

The graph is the one of a GraphModule, or the one that torch.fx traces with every norm as a leaf. No inputs are needed.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Collection
from typing import Any

from torch import fx, nn

from normswap.detect.backend import Names, Seen
from normswap.detect.handwritten import HAND_WRITTEN, find, scalings
from normswap.detect.super_calls import under_super
from normswap.models.own_code import BASES, attribute, is_emptied, place_of


class Tracer(fx.Tracer):
    """Keeps every norm and producer as one node, whatever package its class is from, and traces into every module that holds a norm."""

    def __init__(self, model: nn.Module, names: Names) -> None:
        super().__init__()
        self.model, self.names, self.seen = model, names, Seen()

    def is_leaf_module(self, m: nn.Module, module_qualified_name: str) -> bool:
        if id(m) in self.names.norms or self.names.may_produce(m) or (isinstance(m, BASES) and not is_emptied(m)):
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
    called = Counter(id(root.get_submodule(str(node.target))) for node in graph.nodes if node.op == "call_module")
    called.update(id(owner) for node in graph.nodes if node.op == "get_attr" and (owner := _owner(root, node)))  # a weight that code reads
    calls = {call.end: call for call in find(graph, root)}
    inside = {node for call in calls.values() for node in call.inside}
    owned = root is graph.owning_module
    suspects = [call.end for call in calls.values() if call.function == HAND_WRITTEN] + [n for n in scalings(graph) if n not in inside]
    seen.suspects.update(dict.fromkeys("" if owned else place_of(node) for node in suspects))
    for node in graph.nodes:
        if node in calls:
            call = calls[node]
            seen.hit(
                "" if owned else place_of(node),
                call.function,
                _producer_of(call.start, call.inside, root, names, called),
            )
        elif node.op == "call_module":
            module = root.get_submodule(str(node.target))
            if id(module) in names.norms:
                source = node.args[0] if node.args else node.kwargs.get("input")
                producer = None if module._forward_pre_hooks else _producer_of(source, {node}, root, names, called)
                seen.call(names.first(module), producer)
            elif isinstance(module, BASES):  # a class derived from one of torch's norms, which is called in the class's own code
                source = node.args[0] if node.args else node.kwargs.get("input")
                passes_on = not module._forward_pre_hooks and under_super(module).passes_on
                producer = _producer_of(source, {node}, root, names, called) if passes_on else None
                seen.hit(names.first(module), f"{type(module).__name__}.forward", producer)
            else:
                seen.unclear.update(names.first(norm) for norm in names.inside(module))
        elif node.op == "get_attr":
            norm = names.statistics.get(id(attribute(root, str(node.target))))
            if norm is not None:
                for user in node.users:
                    seen.read(names.first(norm), f"{place_of(user)}.{user.name}".lstrip("."))
    return seen


def _owner(root: nn.Module, node: fx.Node) -> nn.Module | None:
    """The module whose attribute a get_attr node reads."""
    path = str(node.target).rpartition(".")[0]
    try:
        return root.get_submodule(path)
    except AttributeError:  # an attribute of something that is not a module
        return None


def _producer_of(source: Any, norm: Collection[fx.Node], root: nn.Module, names: Names, called: Counter[int]) -> str | None:
    """The name of the conv or linear layer whose output is `source`, if only the nodes of this norm read it; else None."""
    if not isinstance(source, fx.Node) or source.op != "call_module" or not source.users.keys() <= set(norm):
        return None
    module = root.get_submodule(str(source.target))
    return names.first(module) if called[id(module)] == 1 and names.may_produce(module) else None
