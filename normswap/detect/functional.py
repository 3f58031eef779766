"""Normalizations that are function calls: the functions, the meaning of their arguments, and a layer that computes the same as a call.

Arguments come positionally, by keyword or not at all (exporters drop trailing defaults, and which ones depends on the build), so they
are bound through the function's own signature and never indexed. The layer stands for the call in the plan, so that rules, calibration and
the comparison see modules only.
"""

from __future__ import annotations

import inspect
import operator
from collections.abc import Callable, Hashable, Mapping
from dataclasses import dataclass
from typing import Any, cast

import torch
import torch.nn.functional as F
from torch import Tensor, fx, nn

from normswap.models.own_code import as_base, attribute, base_forward, base_of, operator_of
from normswap.models.torch_private import AnyBatchNorm, AnyInstanceNorm, OpOverload, parameters_of, returned_by, tree_leaves

aten = torch.ops.aten

# function -> (dotted name, the kind of norm it computes)
FUNCTIONS: Mapping[Callable[..., Any], tuple[str, str]] = {
    F.batch_norm: ("torch.nn.functional.batch_norm", "batch_norm"),
    torch.batch_norm: ("torch.batch_norm", "batch_norm"),
    aten.batch_norm.default: ("aten.batch_norm", "batch_norm"),
    aten._native_batch_norm_legit_no_training.default: ("aten._native_batch_norm_legit_no_training", "batch_norm"),
    aten._native_batch_norm_legit_functional.default: ("aten._native_batch_norm_legit_functional", "batch_norm"),
    aten._native_batch_norm_legit.default: ("aten._native_batch_norm_legit", "batch_norm"),
    aten._native_batch_norm_legit.no_stats: ("aten._native_batch_norm_legit.no_stats", "batch_norm"),
    torch.native_batch_norm: ("torch.native_batch_norm", "batch_norm"),
    aten.native_batch_norm.default: ("aten.native_batch_norm", "batch_norm"),
    aten.cudnn_batch_norm.default: ("aten.cudnn_batch_norm", "batch_norm"),
    aten.miopen_batch_norm.default: ("aten.miopen_batch_norm", "batch_norm"),
    aten._batch_norm_no_update.default: ("aten._batch_norm_no_update", "batch_norm"),
    aten._batch_norm_with_update.default: ("aten._batch_norm_with_update", "batch_norm"),
    aten._batch_norm_with_update_functional.default: ("aten._batch_norm_with_update_functional", "batch_norm"),
    F.layer_norm: ("torch.nn.functional.layer_norm", "layer_norm"),
    torch.layer_norm: ("torch.layer_norm", "layer_norm"),
    aten.layer_norm.default: ("aten.layer_norm", "layer_norm"),
    aten.native_layer_norm.default: ("aten.native_layer_norm", "layer_norm"),
    F.group_norm: ("torch.nn.functional.group_norm", "group_norm"),
    torch.group_norm: ("torch.group_norm", "group_norm"),
    aten.group_norm.default: ("aten.group_norm", "group_norm"),
    aten.native_group_norm.default: ("aten.native_group_norm", "group_norm"),
    F.instance_norm: ("torch.nn.functional.instance_norm", "instance_norm"),
    torch.instance_norm: ("torch.instance_norm", "instance_norm"),
    aten.instance_norm.default: ("aten.instance_norm", "instance_norm"),
    F.rms_norm: ("torch.nn.functional.rms_norm", "rms_norm"),
    torch.rms_norm: ("torch.rms_norm", "rms_norm"),
    aten.rms_norm.default: ("aten.rms_norm", "rms_norm"),
}

KINDS: Mapping[str, str] = dict(FUNCTIONS.values())


_ALWAYS_TRAINING = {aten._batch_norm_with_update.default, aten._batch_norm_with_update_functional.default}


def _operator(function: Callable[..., Any]) -> OpOverload | None:
    """The aten operator behind a function, whose schema serves as a signature (built-ins like torch.batch_norm have none); None for a
    function written in Python."""
    if isinstance(function, OpOverload):
        return function
    return cast(OpOverload, getattr(aten, function.__name__).default) if inspect.isbuiltin(function) else None


def returns_a_tuple(function: Callable[..., Any]) -> bool:
    """Whether a call returns (output, statistics ...) instead of the output alone."""
    operator = _operator(function)
    return operator is not None and returned_by(operator) > 1


def name_of(function: object) -> str | None:
    """The dotted name of a function that normalizes; None for any other."""
    try:
        found = FUNCTIONS.get(function)  # type: ignore[call-overload]
    except TypeError:  # unhashable
        return None
    return found[0] if found else None


def bind(function: Callable[..., Any], args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> dict[str, Any]:
    """The arguments of a call by parameter name, defaults filled in, under the names that torch.nn.functional gives them."""
    operator = _operator(function)
    if operator is not None:
        schema = parameters_of(operator)
        bound = {a.name: a.default_value for a in schema if a.has_default_value()}
        bound = {**bound, **dict(zip((a.name for a in schema), args, strict=False)), **kwargs}
        if "epsilon" in bound:  # cudnn's and miopen's name for it
            bound["eps"] = bound.pop("epsilon")
        if operator in _ALWAYS_TRAINING:
            bound["training"] = True
        return bound
    arguments = inspect.signature(function).bind(*args, **kwargs)
    arguments.apply_defaults()
    return dict(arguments.arguments)


# --- calls as layers -----------------------------------------------------------------------------------------------------------------

Shapes = Mapping[str, tuple[Any, ...]]  # node name -> shape of its value


@dataclass(frozen=True)
class Found:
    """One normalization in a graph: a call of a function, or several operations that make up a hand-written norm.

    name         of the node that makes the call
    function     its dotted name, or HAND_WRITTEN
    start, end   the node whose value is normalized, and the one whose value is the result
    inside       every node after start, up to end
    layer        a layer that computes the same; None if there is none
    obstacle     why `layer` is None: a clause about the call
    key          equal for two calls with the same tensors and settings
    needs_shape  knowing the shape of the input would give a layer, or a better one
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
        """The ids of the layer's parameters, by which a call in eval mode is compared with the one in train mode."""
        return frozenset(id(p) for p in self.layer.parameters()) if self.layer is not None else frozenset()


class BatchNormCall(AnyBatchNorm):
    """BatchNorm that, like F.batch_norm, takes inputs of any rank. `revert` puts it in the place of a swapped call."""

    def _check_input_dim(self, input: Tensor) -> None:
        pass


class InstanceNormCall(AnyInstanceNorm):
    """InstanceNorm that, like F.instance_norm, has its channels on axis 1 whatever the rank of the input."""

    def forward(self, input: Tensor) -> Tensor:
        return cast(Tensor, self._apply_instance_norm(input))  # type: ignore[no-untyped-call]


class _NoLayer(Exception):
    """No layer can stand for a call; the text is a clause about the call. needs_shape: one could, if the input's shape were known."""

    def __init__(self, reason: str, *, needs_shape: bool = False) -> None:
        super().__init__(reason)
        self.needs_shape = needs_shape


def calls_in(graph: fx.Graph, root: nn.Module, shapes: Shapes, observed: bool) -> list[Found]:
    """Every call of a normalizing function in `graph`, whose targets are names in `root`. observed: whether a forward pass was watched."""
    nodes = [node for node in graph.nodes if node.op == "call_function"]
    return [
        _call_of_base(node, root) if node.target is base_forward else _call(node, root, shapes, observed)
        for node in nodes
        if node.target is base_forward or name_of(node.target) is not None
    ]


def _call_of_base(node: fx.Node, root: nn.Module) -> Found:
    layer, x = as_base(root, cast("type[nn.Module]", base_of(root))), cast(fx.Node, node.args[0])
    return Found(node.name, f"torch.nn.{type(layer).__name__}.forward", x, node, frozenset({node}), layer, None, ("base", id(root)))


def _call(node: fx.Node, root: nn.Module, shapes: Shapes, observed: bool) -> Found:
    function = cast("Callable[..., Any]", node.target)
    name = cast(str, name_of(function))
    kind = KINDS[name]
    bound = bind(function, node.args, node.kwargs)
    arguments = {key: value if key == "input" else _value(value, root) for key, value in bound.items()}
    start, end = arguments.pop("input"), node
    layer: nn.Module | None = None
    obstacle, needs_shape = None, False
    try:
        end = _output(node, function)
        if isinstance(arguments.get("weight"), Tensor) and "normalized_shape" in arguments:
            arguments["normalized_shape"] = tuple(arguments["weight"].shape)  # which a graph may compute from its input
        if kind == "batch_norm" and arguments.get("running_mean") is None and _one_sample(start):
            raise _NoLayer(
                "is an instance norm that was decomposed for one batch size; convert the program before run_decompositions()"
                if isinstance(node.target, OpOverload)
                else "normalizes a view of all samples as the channels of one, so that its channels depend on the batch size; "
                "write it as F.group_norm or F.instance_norm"
            )
        _refuse_computed(arguments)
        layer = _LAYERS[kind](arguments, _channels(shapes.get(start.name), name, observed))
        layer.eval()
    except _NoLayer as error:
        obstacle, needs_shape = str(error), error.needs_shape
    settings = tuple((key, id(value) if isinstance(value, Tensor) else repr(value)) for key, value in sorted(arguments.items()))
    key = (name, settings) if any(isinstance(value, Tensor) for value in arguments.values()) else (name, id(node))
    return Found(node.name, name, start, end, frozenset({node, end}), layer, obstacle, key, needs_shape)


def _value(argument: Any, root: nn.Module) -> Any:
    """The tensor that a get_attr node reads; any other argument as it is."""
    if isinstance(argument, fx.Node) and argument.op == "get_attr":
        return attribute(root, str(argument.target), argument)
    return argument


def _output(node: fx.Node, function: Callable[..., Any]) -> fx.Node:
    """The node whose value is the normalized tensor: some functional forms return (output, statistics ...)."""
    if not returns_a_tuple(function):
        return node
    items = [user for user in node.users if user.target is operator.getitem]
    outputs = [user for user in items if user.args[1] == 0]
    if len(items) != len(node.users) or len(outputs) != 1:
        raise _NoLayer("returns a tuple that the graph uses as a whole; take its output alone, [0]")
    if any(user.users for user in items if user.args[1] != 0):
        raise _NoLayer("returns batch statistics that the graph reads; leave it, or change the code that reads them")
    return outputs[0]


def _one_sample(start: fx.Node) -> bool:
    """Whether `start` is a view of shape (1, N * C, ...), in which all samples are channels of one sample."""
    if operator_of(start) == "contiguous":
        start = cast(fx.Node, start.args[0])
    sizes: tuple[Any, ...] = start.args[1:] if operator_of(start) in ("view", "reshape", "_unsafe_view") else ()
    if sizes and isinstance(sizes[0], (list, tuple)):
        sizes = tuple(sizes[0])
    return bool(sizes) and type(sizes[0]) is int and sizes[0] == 1


def _refuse_computed(arguments: Mapping[str, Any]) -> None:
    for key, value in arguments.items():
        node = next((v for v in tree_leaves(value) if isinstance(v, fx.Node)), None)
        if node is not None and key not in ("momentum", "N", "HxW"):
            what = f"{'an' if key[0] in 'aeiou' else 'a'} {key.replace('training', 'training flag')}"
            raise _NoLayer(
                f"takes {what} that the graph computes ({node}), so it is not a constant; leave it, or make that a parameter or a number"
            )


def _channels(shape: tuple[Any, ...] | None, name: str, observed: bool) -> Callable[[], int]:
    def channels() -> int:
        if shape is None:
            which = " that reach it" if observed else ""
            raise _NoLayer(
                f"is a call of {name} without weight and bias, so only its input says how many channels there are; "
                f"give example inputs{which}",
                needs_shape=True,
            )
        if len(shape) < 2 or not isinstance(shape[1], int):
            raise _NoLayer(f"has an input of shape {tuple(shape)}, which leaves the number of channels open; export it with a fixed number")
        return shape[1]

    return channels


Arguments = dict[str, Any]


def _batch_norm(arguments: Arguments, channels: Callable[[], int]) -> nn.Module:
    if arguments.get("training", False) and arguments.get("running_mean") is not None:
        raise _NoLayer("normalizes by each batch's own statistics (training=True was traced); trace the model in eval mode")
    return _with_statistics(BatchNormCall, arguments, channels)


def _instance_norm(arguments: Arguments, channels: Callable[[], int]) -> nn.Module:
    if arguments["use_input_stats"] and arguments.get("running_mean") is not None:
        raise _NoLayer("normalizes by each sample's own statistics (use_input_stats=True was traced); trace the model in eval mode")
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
    """The number of channels: the size of the running mean, weight or bias if the call has one, else that of the input."""
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
