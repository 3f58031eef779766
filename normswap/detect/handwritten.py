"""Finds normalizations written out by hand in the operations of a graph; `find` lists these and the calls of normalizing functions.

Every hand-written norm has a mean, var or std of x, a square root of it, and x multiplied or divided by that root. The nodes from x to
this product, and a weight and bias applied to it, are copied into a layer. Running that layer (`rules/recognise.py`) shows whether it
computes a known normalization; how the code is written does not matter.
"""

from __future__ import annotations

from collections.abc import Callable, Container, Iterator
from typing import Any, cast

from torch import Tensor, fx, nn

from normswap.detect.functional import Found, Shapes, calls_in
from normswap.models.own_code import attribute, operator_of, rewrite

HAND_WRITTEN = "hand-written"
REDUCTIONS = frozenset({"mean", "var", "std", "var_mean", "std_mean"})
LENGTHS = frozenset({"norm", "linalg_norm", "vector_norm", "linalg_vector_norm"})
_ARITHMETIC = "add sub subtract rsub mul multiply truediv div divide true_divide neg pow square rsqrt sqrt reciprocal abs"
_KEEPING = "to float double half bfloat16 type type_as _to_copy clamp clamp_min maximum clone contiguous alias detach"
_SIZES = "getitem getattr size sym_size dim numel"
ELEMENTWISE = frozenset(f"{_ARITHMETIC} {_KEEPING} {_SIZES}".split())
SCALES = frozenset({"mul", "multiply", "truediv", "div", "divide", "true_divide"})
_THROUGH = ELEMENTWISE - SCALES  # operations that may lie between the root and the product that it scales
_CASTS = frozenset({"to", "float", "double", "half", "bfloat16", "type", "type_as", "_to_copy"})
_REACH = 16  # nodes searched back from the root; the longest known hand-written norm has 10


class HandwrittenNorm(nn.Module):
    """A layer made of the nodes of a hand-written norm and the tensors that they read. `_layer_of_nodes` gives it its forward."""

    def forward(self, x: Tensor) -> Tensor:
        raise NotImplementedError


def find(graph: fx.Graph, root: nn.Module, shapes: Shapes | None = None) -> list[Found]:
    """Every functional and hand-written normalization in `graph`, whose targets are names in `root`, in execution order.

    shapes: node name -> shape, where known; only the shape tells the number of channels of a call without a weight. None if no forward
    pass was watched.
    """
    observed = shapes is not None
    shapes = {**{n.name: shape for n in graph.nodes if (shape := _recorded_shape(n)) is not None}, **(shapes or {})}
    constants = _constants(graph)  # calls that normalize these (a standardised weight) are not norms
    calls = (call for call in calls_in(graph, root, shapes, observed) if call.start not in constants)
    found = [*calls, *_hand_written(graph, root, shapes, constants)]
    place = {node: i for i, node in enumerate(graph.nodes)}
    return sorted(found, key=lambda f: place[f.end])


def scalings(graph: fx.Graph) -> list[fx.Node]:
    """The nodes that scale a value by the root of a mean or variance, or by a vector norm, as every normalization does."""
    constants = _constants(graph)
    statistics = set[fx.Node]()  # reductions and vector norms, and what is computed from these alone
    for node in graph.nodes:
        inputs = [n for n in node.all_input_nodes if n not in constants]
        if inputs and (operator_of(node) in REDUCTIONS | LENGTHS or (operator_of(node) in ELEMENTWISE and statistics.issuperset(inputs))):
            statistics.add(node)
    roots = (node for node in graph.nodes if node in statistics and (_is_root(node) or operator_of(node) in LENGTHS))
    scaled = dict.fromkeys(node for root in roots for node in _scaled_by(root))
    return [node for node in scaled if any(n not in statistics and n not in constants for n in node.all_input_nodes)]


def _recorded_shape(node: fx.Node) -> tuple[Any, ...] | None:
    value = node.meta.get("val", node.meta.get("tensor_meta"))
    shape = getattr(value, "shape", None)
    return None if shape is None else tuple(shape)


def _hand_written(graph: fx.Graph, root: nn.Module, shapes: Shapes, constants: set[fx.Node]) -> Iterator[Found]:
    taken: set[fx.Node] = set()
    for node in graph.nodes:
        if node in taken or node in constants or not _is_root(node):
            continue
        # Two hand-written norms may share a cast or a centred x, but never the product at the end.
        ends = (end for end in _scaled_by(node) if end not in taken)
        hit = next(filter(None, (_span(entry, end, constants) for end in ends for entry in _entries(node, end, constants))), None)
        if hit is None:
            continue
        start, end, nodes = hit
        end, nodes = _with_tail(end, nodes, root)
        taken |= nodes
        layer = _layer_of_nodes(graph, root, start, end, nodes, shapes.get(start.name))
        known = shapes.get(start.name) is not None or any(True for _ in layer.parameters())
        yield Found(end.name, HAND_WRITTEN, start, end, frozenset(nodes), layer, None, (HAND_WRITTEN, id(end)), not known)


def _constants(graph: fx.Graph) -> set[fx.Node]:
    """Nodes that depend on attributes alone, and on no input of the graph and no module: for example a weight that is standardised."""
    found: set[fx.Node] = set()
    for node in graph.nodes:
        computed = node.op in ("call_function", "call_method") and bool(node.all_input_nodes)
        if node.op == "get_attr" or (computed and found.issuperset(node.all_input_nodes)):
            found.add(node)
    return found


def _is_root(node: fx.Node) -> bool:
    op = operator_of(node)
    return op in ("rsqrt", "sqrt", "std") or (op == "pow" and len(node.args) > 1 and node.args[1] in (0.5, -0.5))


def _entries(root: fx.Node, end: fx.Node, constants: set[fx.Node]) -> list[fx.Node]:
    """The nodes that may be the x of the norm with this `root` and `end`, earliest first.

    Such a node is reduced on the way to `root`, after at most squares, casts and centring, and scaled by `end`, after at most casts,
    centring and a constant factor.
    """
    reduced: dict[fx.Node, None] = {}
    cone, queue = set[fx.Node](), [root]
    while queue and len(cone) < _REACH:
        node = queue.pop(0)
        if node in cone or node in constants or operator_of(node) not in ELEMENTWISE | REDUCTIONS:
            continue
        cone.add(node)
        inputs = node.all_input_nodes
        if operator_of(node) in REDUCTIONS and inputs:
            reduced.update(
                dict.fromkeys(_before(inputs[0], lambda x: _is_square(x) or operator_of(x) in _CASTS | {"pow", "square", "abs", "sub"}))
            )
        else:
            queue.extend(inputs)

    def rescaled(x: fx.Node) -> bool:
        return operator_of(x) in SCALES and len([n for n in x.all_input_nodes if n not in constants]) == 1 and not _is_square(x)

    scaled = [x for n in end.all_input_nodes for x in _before(n, lambda x: rescaled(x) or operator_of(x) in _CASTS | {"sub"}, constants)]
    order = {n: i for i, n in enumerate(root.graph.nodes)}
    return sorted((n for n in reduced if n not in constants and n in scaled), key=lambda n: order[n])


def _before(x: fx.Node, goes_on: Callable[[fx.Node], bool], constants: Container[fx.Node] = ()) -> Iterator[fx.Node]:
    """x, then its first input that is no constant, then that node's, and so on while `goes_on` holds for the node."""
    while True:
        yield x
        inputs = [n for n in x.all_input_nodes if n not in constants]
        if not inputs or not goes_on(x):
            return
        x = inputs[0]


def _is_square(x: fx.Node) -> bool:
    return operator_of(x) in ("mul", "multiply") and len(x.args) == 2 and x.args[0] is x.args[1]


def _scaled_by(root: fx.Node) -> Iterator[fx.Node]:
    """The products and quotients of which the root, or what elementwise operations made of it, is an operand."""
    queue, seen = [root], set[fx.Node]()
    while queue:
        node = queue.pop(0)
        if node in seen:
            continue
        seen.add(node)
        for user in node.users:
            if operator_of(user) in SCALES and len(user.all_input_nodes) == 2:
                yield user
            elif operator_of(user) in _THROUGH:
                queue.append(user)


def _span(entry: fx.Node, end: fx.Node, constants: set[fx.Node]) -> tuple[fx.Node, fx.Node, set[fx.Node]] | None:
    """(entry, end, the nodes after entry up to end), if end depends on nothing but entry and constants through known operations."""
    nodes, queue, reached = set[fx.Node](), [end], False
    while queue:
        node = queue.pop()
        if node is entry:
            reached = True
        elif node not in nodes:
            if node not in constants and operator_of(node) not in ELEMENTWISE | REDUCTIONS:
                return None
            nodes.add(node)
            queue.extend(node.all_input_nodes)
    inside = {n for n in nodes if n not in constants}
    return (entry, end, nodes) if reached and any(operator_of(n) in REDUCTIONS for n in inside) else None


def _with_tail(end: fx.Node, nodes: set[fx.Node], root: nn.Module) -> tuple[fx.Node, set[fx.Node]]:
    """(end, nodes) with a weight and a bias per channel included, if they are applied to `end` next."""
    nodes = set(nodes)
    for ops in ({"mul", "multiply"}, {"add"}):
        users = list(end.users)
        if len(users) != 1 or operator_of(users[0]) not in ops or len(users[0].args) != 2 or users[0].kwargs:
            continue
        other = next((a for a in users[0].args if a is not end), None)
        tensor = attribute(root, str(other.target)) if isinstance(other, fx.Node) and other.op == "get_attr" else None
        if isinstance(tensor, Tensor) and tensor.numel() == max(tensor.shape, default=0) and tensor.numel() > 1:
            end = users[0]
            nodes |= {end, cast(fx.Node, other)}
    return end, nodes


def _layer_of_nodes(
    graph: fx.Graph, root: nn.Module, start: fx.Node, end: fx.Node, nodes: set[fx.Node], shape: tuple[Any, ...] | None
) -> nn.Module:
    layer = HandwrittenNorm()
    own = fx.Graph()
    copies: dict[fx.Node, fx.Node] = {start: own.placeholder("x")}
    for node in graph.nodes:
        if node in nodes:
            if node.op == "get_attr":
                name = str(node.target).replace(".", "_")
                _hold(layer, name, attribute(root, str(node.target)))
                copies[node] = own.get_attr(name)
            else:
                copies[node] = own.node_copy(node, lambda n: copies[n])
    own.output(copies[end])
    # For `rules/recognise.py`: the constants, one of which may be eps, and the sizes of the axes on which the channels may lie.
    arguments: list[Any] = [a for node in nodes for a in (*node.args, *node.kwargs.values())]
    for i, number in enumerate(a for a in arguments if type(a) in (int, float) and 0 < a < 0.1):
        setattr(layer, f"constant_{i}", float(number))
    if shape is not None and all(isinstance(size, int) for size in shape[1:]):
        # A symbolic size (the batch of an exported program) cannot be copied, so None stands for it.
        layer.input_shape = tuple(size if isinstance(size, int) else None for size in shape)  # type: ignore[assignment]
    rewrite(layer, {False: own, True: own})
    return layer.eval()


def _hold(layer: nn.Module, name: str, value: Any) -> None:
    if isinstance(value, nn.Parameter):
        layer.register_parameter(name, value)
    elif isinstance(value, Tensor):
        layer.register_buffer(name, value)
    else:
        setattr(layer, name, value)
