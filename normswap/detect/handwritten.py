"""Normalizations that are no modules: calls of functional norms, and forms written out by hand, found in a graph.

Each gets a layer that computes the same from the same tensors and stands for it in the plan, so that rules, calibration and the judge see
modules only. A hand-written form is found by what is always there: a mean, var or std of x, a square root of it, and x multiplied or
divided by that. The nodes from x to there, and a weight and bias behind it, become the layer as they are; whether they compute a known
normalization is found out by running them (`rules/probing.py`), not by how they are written.
"""

from __future__ import annotations

import operator
from collections.abc import Callable, Container, Hashable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any, cast

import torch
from torch import Tensor, fx, nn
from torch.nn.modules.batchnorm import _BatchNorm
from torch.nn.modules.instancenorm import _InstanceNorm
from torch.utils._pytree import tree_leaves

from normswap.detect import functional
from normswap.detect.super_calls import as_base
from normswap.models.own_code import base_forward, base_of, rewrite

HAND_WRITTEN = "hand-written"
Shapes = Mapping[str, tuple[Any, ...]]  # node name -> shape of its value


@dataclass(frozen=True)
class Found:
    """One call.

    name         of the node that makes the call
    function     its dotted name, or HAND_WRITTEN
    start, end   the node whose value is normalized, and the one whose value is the result
    inside       every node between them
    layer        computes the same; None, with `obstacle`, a clause about the call, if no layer does
    key          equal for two calls with the same tensors and settings
    needs_shape  with the shape of its input known there would be a layer, or a better one
    under        whether the code around it stays, and calls the layer by `super().forward` (`super_calls.py`)
    """

    name: str
    function: str
    start: fx.Node
    end: fx.Node
    inside: frozenset[fx.Node]
    layer: nn.Module | None
    obstacle: str | None
    key: Hashable
    needs_shape: bool = False
    under: bool = False

    @property
    def tensors(self) -> frozenset[int]:
        """Which tensors it reads; the same in train and in eval mode, if it is the same call."""
        return frozenset(id(p) for p in self.layer.parameters()) if self.layer is not None else frozenset()


class BatchNormCall(_BatchNorm):
    """BatchNorm that, like the function, does not ask for the rank of its input. What `revert` gives back for a call."""

    def _check_input_dim(self, input: Tensor) -> None:
        pass


class InstanceNormCall(_InstanceNorm):
    """InstanceNorm that, like the function, takes the second axis for the channels whatever the rank."""

    def forward(self, input: Tensor) -> Tensor:
        return cast(Tensor, self._apply_instance_norm(input))  # type: ignore[no-untyped-call]


class HandwrittenNorm(nn.Module):
    """The nodes of a hand-written form, under the tensors that they read. Made by `_layer_of_nodes`, which gives it its forward."""

    def forward(self, x: Tensor) -> Tensor:
        raise NotImplementedError


class _Obstacle(Exception):
    """Why no layer can stand for a call: a clause about the call. needs_shape: with the shape of its input one could."""

    def __init__(self, reason: str, *, needs_shape: bool = False) -> None:
        super().__init__(reason)
        self.needs_shape = needs_shape


def find(graph: fx.Graph, root: nn.Module, shapes: Shapes | None = None) -> list[Found]:
    """Every functional and hand-written normalization in `graph`, whose targets are names in `root`, in execution order.

    shapes: of the values of nodes, where they are known; for calls without a weight nothing else says how many channels there are. None
    if no forward pass was watched.
    """
    observed = shapes is not None
    shapes = {**{n.name: shape for n in graph.nodes if (shape := _recorded_shape(n)) is not None}, **(shapes or {})}
    calls = [_functional(node, root, shapes, observed) for node in graph.nodes if node.op == "call_function" and _is_norm(node.target)]
    constants = _constants(graph)  # a weight that is standardised is no activation, by whichever function
    found = [*(call for call in calls if call.start not in constants), *_hand_written(graph, root, shapes, constants)]
    place = {node: i for i, node in enumerate(graph.nodes)}
    return sorted(found, key=lambda f: place[f.end])


def scalings(graph: fx.Graph) -> list[fx.Node]:
    """The nodes that scale a value by the root of a mean or variance, or by a norm: what every normalization does, and little else."""
    constants = _constants(graph)
    statistics = set[fx.Node]()  # and what is computed from nothing else
    for node in graph.nodes:
        inputs = [n for n in node.all_input_nodes if n not in constants]
        if inputs and (_op(node) in REDUCTIONS | LENGTHS or (_op(node) in ELEMENTWISE and statistics.issuperset(inputs))):
            statistics.add(node)
    roots = (node for node in graph.nodes if node in statistics and (_is_root(node) or _op(node) in LENGTHS))
    scaled = dict.fromkeys(node for root in roots for node in _scaled_by(root))
    return [node for node in scaled if any(n not in statistics and n not in constants for n in node.all_input_nodes)]


def _recorded_shape(node: fx.Node) -> tuple[Any, ...] | None:
    value = node.meta.get("val", node.meta.get("tensor_meta"))
    shape = getattr(value, "shape", None)
    return None if shape is None else tuple(shape)


def _is_norm(target: Any) -> bool:
    return target is base_forward or functional.name_of(target) is not None


# --- functional calls -------------------------------------------------------------------------------------------------------------------


def _functional(node: fx.Node, root: nn.Module, shapes: Shapes, observed: bool) -> Found:
    function = cast("Callable[..., Any]", node.target)
    if function is base_forward:
        base = as_base(root, cast("type[nn.Module]", base_of(root)))
        start = cast(fx.Node, node.args[0])
        return Found(node.name, f"torch.nn.{type(base).__name__}.forward", start, node, frozenset({node}), base, None, ("base", id(root)))
    name = cast(str, functional.name_of(function))
    kind = functional.KINDS[name]
    bound = functional.bind(function, node.args, node.kwargs)
    arguments = {key: value if key == "input" else _value(value, root) for key, value in bound.items()}
    start, end = arguments.pop("input"), node
    layer: nn.Module | None = None
    obstacle, needs_shape = None, False
    try:
        end = _output(node, function)
        if isinstance(arguments.get("weight"), Tensor) and "normalized_shape" in arguments:
            arguments["normalized_shape"] = tuple(arguments["weight"].shape)  # which a graph may compute from its input
        if kind == "batch_norm" and arguments.get("running_mean") is None and _one_sample(start):
            raise _Obstacle(
                "is an instance norm that was decomposed for one batch size; convert the program before run_decompositions()"
                if isinstance(node.target, torch._ops.OpOverload)
                else "normalizes a view of all samples as the channels of one, so that its channels depend on the batch size; "
                "write it as F.group_norm or F.instance_norm"
            )
        _constant(arguments)
        layer = _LAYERS[kind](arguments, _channels(shapes.get(start.name), name, observed))
        layer.eval()
    except _Obstacle as error:
        obstacle, needs_shape = str(error), error.needs_shape
    tensors = tuple((key, id(value) if isinstance(value, Tensor) else repr(value)) for key, value in sorted(arguments.items()))
    own = any(isinstance(value, Tensor) for value in arguments.values())
    return Found(
        node.name, name, start, end, frozenset({node, end}), layer, obstacle, (name, tensors) if own else (name, id(node)), needs_shape
    )


def _value(argument: Any, root: nn.Module) -> Any:
    """A tensor behind a get_attr node as itself."""
    if isinstance(argument, fx.Node) and argument.op == "get_attr":
        return attribute(root, str(argument.target), argument)
    return argument


def attribute(root: nn.Module, path: str, default: Any = None) -> Any:
    """What a get_attr node reads."""
    owner, _, name = path.rpartition(".")
    try:
        return getattr(root.get_submodule(owner), name, default)
    except AttributeError:  # an attribute of something that is not a module
        return default


def _output(node: fx.Node, function: Callable[..., Any]) -> fx.Node:
    """The node whose value is the normalized tensor: some functional forms return (output, statistics ...)."""
    if not functional.returns_a_tuple(function):
        return node
    items = [user for user in node.users if user.target is operator.getitem]
    outputs = [user for user in items if user.args[1] == 0]
    if len(items) != len(node.users) or len(outputs) != 1:
        raise _Obstacle("returns a tuple that the graph uses as a whole; take its output alone, [0]")
    if any(user.users for user in items if user.args[1] != 0):
        raise _Obstacle("returns batch statistics that the graph reads; leave it, or change the code that reads them")
    return outputs[0]


def _one_sample(start: fx.Node) -> bool:
    """Whether this is a view of all samples as the channels of one."""
    if _op(start) == "contiguous":
        start = cast(fx.Node, start.args[0])
    sizes: tuple[Any, ...] = start.args[1:] if _op(start) in ("view", "reshape", "_unsafe_view") else ()
    if sizes and isinstance(sizes[0], (list, tuple)):
        sizes = tuple(sizes[0])
    return bool(sizes) and type(sizes[0]) is int and sizes[0] == 1


def _constant(arguments: Mapping[str, Any]) -> None:
    for key, value in arguments.items():
        node = next((v for v in tree_leaves(value) if isinstance(v, fx.Node)), None)
        if node is not None and key not in ("momentum", "N", "HxW"):
            what = f"{'an' if key[0] in 'aeiou' else 'a'} {key.replace('training', 'training flag')}"
            raise _Obstacle(
                f"takes {what} that the graph computes ({node}), so it is not a constant; leave it, or make that a parameter or a number"
            )


def _channels(shape: tuple[Any, ...] | None, name: str, observed: bool) -> Callable[[], int]:
    def channels() -> int:
        if shape is None:
            which = " that reach it" if observed else ""
            raise _Obstacle(
                f"is a call of {name} without weight and bias, so only its input says how many channels there are; "
                f"give example inputs{which}",
                needs_shape=True,
            )
        if len(shape) < 2 or not isinstance(shape[1], int):
            raise _Obstacle(
                f"has an input of shape {tuple(shape)}, which leaves the number of channels open; export it with a fixed number"
            )
        return shape[1]

    return channels


Arguments = dict[str, Any]


def _batch_norm(arguments: Arguments, channels: Callable[[], int]) -> nn.Module:
    if arguments.get("training", False) and arguments.get("running_mean") is not None:
        raise _Obstacle("normalizes by each batch's own statistics (training=True was traced); trace the model in eval mode")
    return _with_statistics(BatchNormCall, arguments, channels)


def _instance_norm(arguments: Arguments, channels: Callable[[], int]) -> nn.Module:
    if arguments["use_input_stats"] and arguments.get("running_mean") is not None:
        raise _Obstacle("normalizes by each sample's own statistics (use_input_stats=True was traced); trace the model in eval mode")
    return _with_statistics(InstanceNormCall, arguments, channels)


def _with_statistics(cls: Callable[..., nn.Module], arguments: Arguments, channels: Callable[[], int]) -> nn.Module:
    mean, var = cast("list[Tensor | None]", [arguments.get(name) for name in ("running_mean", "running_var")])
    tracks = mean is not None and var is not None
    momentum = arguments.get("momentum")
    kept = {"momentum": momentum} if isinstance(momentum, float) else {}  # how the swapped layer's statistics train
    layer: Any = cls(_size(arguments, channels), eps=arguments["eps"], affine=False, track_running_stats=tracks, **kept)
    if mean is not None and var is not None:
        layer.running_mean, layer.running_var, layer.num_batches_tracked = mean.detach(), var.detach(), None
    return _with_affine(layer, arguments)


def _size(arguments: Arguments, channels: Callable[[], int]) -> int:
    """The number of channels: of any tensor that comes with them, else of the input."""
    given = (arguments.get(name) for name in ("running_mean", "weight", "bias"))
    return next((tensor.shape[0] for tensor in given if tensor is not None), None) or channels()


def _layer_norm(arguments: Arguments, channels: Callable[[], int]) -> nn.Module:
    return _with_affine(nn.LayerNorm(arguments["normalized_shape"], arguments["eps"], elementwise_affine=False), arguments)


def _group_norm(arguments: Arguments, channels: Callable[[], int]) -> nn.Module:
    groups = arguments["num_groups"] if "num_groups" in arguments else arguments["group"]  # native_group_norm's name for it
    return _with_affine(nn.GroupNorm(groups, _size(arguments, channels), arguments["eps"], affine=False), arguments)


def _rms_norm(arguments: Arguments, channels: Callable[[], int]) -> nn.Module:
    return _with_affine(nn.RMSNorm(arguments["normalized_shape"], arguments["eps"], elementwise_affine=False), arguments)


_LAYERS: Mapping[str, Callable[[Arguments, Callable[[], int]], nn.Module]] = {
    "batch_norm": _batch_norm,
    "layer_norm": _layer_norm,
    "group_norm": _group_norm,
    "instance_norm": _instance_norm,
    "rms_norm": _rms_norm,
}


def _with_affine(layer: nn.Module, arguments: Arguments) -> nn.Module:
    for name in ("weight", "bias"):
        tensor = arguments.get(name)
        if isinstance(tensor, Tensor) and not isinstance(tensor, nn.Parameter):
            tensor = nn.Parameter(tensor.detach(), requires_grad=False)
        if tensor is not None or name in layer._parameters:
            layer.register_parameter(name, tensor)
    for flag in ("affine", "elementwise_affine"):
        if hasattr(layer, flag):
            setattr(layer, flag, arguments["weight"] is not None)
    return layer


# --- hand-written forms -----------------------------------------------------------------------------------------------------------------

REDUCTIONS = frozenset({"mean", "var", "std", "var_mean", "std_mean"})
LENGTHS = frozenset({"norm", "linalg_norm", "vector_norm", "linalg_vector_norm"})
_ARITHMETIC = "add sub subtract rsub mul multiply truediv div divide true_divide neg pow square rsqrt sqrt reciprocal abs"
_KEEPING = "to float double half bfloat16 type type_as _to_copy clamp clamp_min maximum clone contiguous alias detach"
_SIZES = "getitem getattr size sym_size dim numel"
ELEMENTWISE = frozenset(f"{_ARITHMETIC} {_KEEPING} {_SIZES}".split())
SCALES = frozenset({"mul", "multiply", "truediv", "div", "divide", "true_divide"})
_THROUGH = ELEMENTWISE - SCALES  # between the root and what it scales
_CASTS = frozenset({"to", "float", "double", "half", "bfloat16", "type", "type_as", "_to_copy"})
_REACH = 16  # nodes; the longest known form has 10


def _op(node: fx.Node) -> str:
    if node.op == "call_method":
        return str(node.target)
    if node.op != "call_function":
        return ""
    if isinstance(node.target, torch._ops.OpOverload):
        return node.target._schema.name.rpartition("::")[2]
    return getattr(node.target, "__name__", "")


def _hand_written(graph: fx.Graph, root: nn.Module, shapes: Shapes, constants: set[fx.Node]) -> Iterator[Found]:
    taken: set[fx.Node] = set()
    for node in graph.nodes:
        if node in taken or node in constants or not _is_root(node):
            continue
        # Two of them may share a cast or a centred x, but never what is scaled.
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
    """Nodes that depend on no input of the graph and no module: a weight that is standardised is no activation."""
    found: set[fx.Node] = set()
    for node in graph.nodes:
        computed = node.op in ("call_function", "call_method") and bool(node.all_input_nodes)
        if node.op == "get_attr" or (computed and found.issuperset(node.all_input_nodes)):
            found.add(node)
    return found


def _is_root(node: fx.Node) -> bool:
    op = _op(node)
    return op in ("rsqrt", "sqrt", "std") or (op == "pow" and len(node.args) > 1 and node.args[1] in (0.5, -0.5))


def _entries(root: fx.Node, end: fx.Node, constants: set[fx.Node]) -> list[fx.Node]:
    """What may be the x of the norm whose root this is, the earliest first: what is reduced, without squares, casts and centring.

    That is also what `end` scales, without casts, centring and a constant factor; whatever else came before is no part of the norm.
    """
    reduced: dict[fx.Node, None] = {}
    cone, queue = set[fx.Node](), [root]
    while queue and len(cone) < _REACH:
        node = queue.pop(0)
        if node in cone or node in constants or _op(node) not in ELEMENTWISE | REDUCTIONS:
            continue
        cone.add(node)
        inputs = node.all_input_nodes
        if _op(node) in REDUCTIONS and inputs:
            reduced.update(dict.fromkeys(_before(inputs[0], lambda x: _is_square(x) or _op(x) in _CASTS | {"pow", "square", "abs", "sub"})))
        else:
            queue.extend(inputs)

    def rescaled(x: fx.Node) -> bool:
        return _op(x) in SCALES and len([n for n in x.all_input_nodes if n not in constants]) == 1 and not _is_square(x)

    scaled = [x for n in end.all_input_nodes for x in _before(n, lambda x: rescaled(x) or _op(x) in _CASTS | {"sub"}, constants)]
    order = {n: i for i, n in enumerate(root.graph.nodes)}
    return sorted((n for n in reduced if n not in constants and n in scaled), key=lambda n: order[n])


def _before(x: fx.Node, goes_on: Callable[[fx.Node], bool], constants: Container[fx.Node] = ()) -> Iterator[fx.Node]:
    """x, and what it was made of, operation by operation, as long as `goes_on`."""
    while True:
        yield x
        inputs = [n for n in x.all_input_nodes if n not in constants]
        if not inputs or not goes_on(x):
            return
        x = inputs[0]


def _is_square(x: fx.Node) -> bool:
    return _op(x) in ("mul", "multiply") and len(x.args) == 2 and x.args[0] is x.args[1]


def _scaled_by(root: fx.Node) -> Iterator[fx.Node]:
    """The products and quotients that take the root as their factor."""
    queue, seen = [root], set[fx.Node]()
    while queue:
        node = queue.pop(0)
        if node in seen:
            continue
        seen.add(node)
        for user in node.users:
            if _op(user) in SCALES and len(user.all_input_nodes) == 2:
                yield user
            elif _op(user) in _THROUGH:
                queue.append(user)


def _span(entry: fx.Node, end: fx.Node, constants: set[fx.Node]) -> tuple[fx.Node, fx.Node, set[fx.Node]] | None:
    """(entry, end, the nodes after entry up to end), if end depends on nothing but entry and constants through known operations."""
    nodes, queue, reached = set[fx.Node](), [end], False
    while queue:
        node = queue.pop()
        if node is entry:
            reached = True
        elif node not in nodes:
            if node not in constants and _op(node) not in ELEMENTWISE | REDUCTIONS:
                return None
            nodes.add(node)
            queue.extend(node.all_input_nodes)
    inside = {n for n in nodes if n not in constants}
    return (entry, end, nodes) if reached and any(_op(n) in REDUCTIONS for n in inside) else None


def _with_tail(end: fx.Node, nodes: set[fx.Node], root: nn.Module) -> tuple[fx.Node, set[fx.Node]]:
    """Take a weight and a bias per channel along that are applied next, so that they become those of the layer."""
    nodes = set(nodes)
    for ops in ({"mul", "multiply"}, {"add"}):
        users = list(end.users)
        if len(users) != 1 or _op(users[0]) not in ops or len(users[0].args) != 2 or users[0].kwargs:
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
    # For the prober: the constants, one of which may be eps, and the sizes of the axes on which the channels may lie.
    arguments: list[Any] = [a for node in nodes for a in (*node.args, *node.kwargs.values())]
    for i, number in enumerate(a for a in arguments if type(a) in (int, float) and 0 < a < 0.1):
        setattr(layer, f"constant_{i}", float(number))
    if shape is not None and all(isinstance(size, int) for size in shape[1:]):
        # Of a symbolic size (the batch of an exported program) no copy can be made, and no layer could be tried.
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
