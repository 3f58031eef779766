"""Traces the `forward` of one module to graphs, and gives the module a new `forward` made of rewritten graphs.

A normalization in the `forward` of a module, as a call of F.layer_norm or written by hand, can only be replaced by rewriting that code. So
the smallest module whose code holds it is traced alone, with its children as leaves, once in train and once in eval mode. The rewritten
module keeps class, methods, attributes, hooks and state-dict keys: only `forward` is new, and runs the graph of the current mode.

Code that torch.fx would trace wrongly without an error is refused: a `forward` set on the object, regions of no_grad or autocast,
attributes that `forward` sets, code that depends on which optional arguments are given.
"""

from __future__ import annotations

import functools
import inspect
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any, cast

import torch
from torch import Tensor, fx, nn
from torch.fx.proxy import TraceError

from normswap.errors import described
from normswap.models.torch_private import (
    AnyBatchNorm,
    AnyInstanceNorm,
    OpOverload,
    format_import_block,
    forward_from_source,
    name_in_aten,
    sys_importer,
)

BASES: tuple[type[nn.Module], ...] = (AnyBatchNorm, AnyInstanceNorm, nn.LayerNorm, nn.GroupNorm, nn.RMSNorm)
TENSORS = ("weight", "bias", "running_mean", "running_var", "num_batches_tracked")  # that a layer of BASES may have
_RANKS = (2, 3, 4, 5)
_ASSERTIONS = frozenset({"_assert", "_assert_is_none", "eq"})


class NotTraceableError(Exception):
    """The code of a module cannot be traced to a graph; the text is a clause that follows "because"."""


def base_of(module: nn.Module) -> type[nn.Module] | None:
    """The class of torch's norm that the class of `module` is or is derived from; None if there is none."""
    return _base(type(module)) if isinstance(module, BASES) else None


def _base(cls: type[nn.Module]) -> type[nn.Module]:
    return next(c for c in cls.__mro__ if c.__module__.startswith("torch.nn.modules.") and issubclass(c, BASES))


def as_base(module: nn.Module, cls: type[nn.Module]) -> nn.Module:
    """A layer of class `cls` with the tensors and settings of `module`, whose class is derived from `cls`. In eval mode."""
    layer = cls.__new__(cls)
    nn.Module.__init__(layer)
    layer.__dict__.update({name: module.__dict__[name] for name in getattr(cls, "__constants__", ()) if name in module.__dict__})
    layer.__dict__.update({name: module.__dict__[name] for name in ("momentum", "eps", "process_group") if name in module.__dict__})
    for name in ("weight", "bias"):
        layer.register_parameter(name, getattr(module, name, None))
    for name in ("running_mean", "running_var", "num_batches_tracked"):
        if name in module._buffers:
            layer.register_buffer(name, module._buffers[name])
    return layer.eval()


def base_forward(x: Tensor, module: str) -> Tensor:
    """The target of a graph node for `super().forward(x)` in a class derived from a norm of torch. It cannot be run."""
    raise AssertionError


def operator_of(node: fx.Node) -> str:
    """The plain name of the function or method that a node calls, without its namespace and overload; "" if it calls none."""
    if node.op == "call_method":
        return str(node.target)
    if node.op != "call_function":
        return ""
    if isinstance(node.target, OpOverload):
        return name_in_aten(node.target)
    return getattr(node.target, "__name__", "")


def attribute(root: nn.Module, path: str, default: Any = None) -> Any:
    """The attribute of `root` that a get_attr node with the target `path` reads."""
    owner, _, name = path.rpartition(".")
    try:
        return getattr(root.get_submodule(owner), name, default)
    except AttributeError:  # an attribute of something that is not a module
        return default


def place_of(node: fx.Node) -> str:
    """The name of the module in whose code the node was traced; "" if the tracer recorded none."""
    stack = list(node.meta.get("nn_module_stack", {}).values())
    return stack[-1][0] if stack and isinstance(stack[-1], tuple) and isinstance(stack[-1][0], str) else ""


def graphs_of(module: nn.Module, *, at_ranks: bool = True) -> Mapping[bool, fx.Graph]:
    """training -> the graph of `module.forward`, with the children as leaves. Raises NotTraceableError.

    at_ranks: whether a norm whose code reads the rank of its input may be traced at each rank that it accepts, if all give one graph.

    `module` should be a copy that nobody else uses, as torch.fx stores constants on it. Its mode is restored.
    """
    if isinstance(module, fx.GraphModule):
        return {False: module.graph}
    if "forward" in module.__dict__:
        raise NotTraceableError("its forward is set on the object")
    training = module.training
    try:
        graphs = {}
        for mode in (False, True):
            module.training = mode
            graphs[mode] = _trace(module, at_ranks)
    finally:
        module.training = training
    return graphs


def _trace(module: nn.Module, at_ranks: bool) -> fx.Graph:
    before = {name: id(value) for name, value in _state(module)}
    graph = _trace_once(module, {}, at_ranks)
    with _other_region():
        _trace_once(module, {}, at_ranks)
    after = {name: id(value) for name, value in _state(module)}
    changed = sorted(name for name in before.keys() | after.keys() if before.get(name) != after.get(name))
    if changed:
        raise NotTraceableError(f"its forward sets {', '.join(changed)}")
    defaults = {
        p.name: p.default for p in inspect.signature(module.forward).parameters.values() if p.default is not inspect.Parameter.empty
    }
    if defaults and _nodes(_trace_once(module, defaults, at_ranks), defaults) != _nodes(graph, defaults):
        are = "is" if len(defaults) == 1 else "are"
        raise NotTraceableError(f"what it computes depends on whether {' and '.join(defaults)} {are} given")
    return graph


def _state(module: nn.Module) -> Iterator[tuple[str, object]]:
    for name, value in module.__dict__.items():
        if name in ("_parameters", "_buffers", "_modules"):
            yield from ((key, held) for key, held in value.items())
        elif name != "training" and not name.startswith("_tensor_constant"):  # torch.fx stores tensors that the code makes there
            yield name, value


def _nodes(graph: fx.Graph, defaults: Mapping[str, Any]) -> list[tuple[Any, ...]]:
    """The operations of a graph with defaults filled in for optional arguments, comparable between graphs with other node names."""
    computed = [n for n in graph.nodes if n.op != "placeholder" and getattr(n.target, "__name__", "") not in _ASSERTIONS]
    number = {n: i for i, n in enumerate(computed)}
    places = {n: defaults.get(str(n.target), f"argument {n.target}") for n in graph.nodes if n.op == "placeholder"}

    def known(argument: Any) -> Any:
        return repr(fx.node.map_arg(argument, lambda n: number.get(n, places.get(n, "?"))))

    return [(n.op, n.target, known(n.args), known(n.kwargs)) for n in computed]


def _trace_once(module: nn.Module, concrete: Mapping[str, Any], at_ranks: bool) -> fx.Graph:
    try:
        return _trace_at(module, concrete, None)
    except NotTraceableError as error:
        if not at_ranks or not isinstance(module, BASES) or not isinstance(error.__cause__, TraceError):
            raise
        graphs = list(_at_each_rank(module, concrete, error))
        if not graphs or any(_nodes(graph, {}) != _nodes(graphs[0], {}) for graph in graphs[1:]):
            raise
        return graphs[0]


def _at_each_rank(module: nn.Module, concrete: Mapping[str, Any], unranked: NotTraceableError) -> Iterator[fx.Graph]:
    """The graphs of a norm whose code reads the rank of its input: one for each rank in _RANKS at which the code raises no error."""
    for rank in _RANKS:
        try:
            yield _trace_at(module, concrete, rank)
        except NotTraceableError as error:
            if isinstance(error.__cause__, TraceError) or not isinstance(error.__cause__, (ValueError, AssertionError)):
                raise unranked from error


def _trace_at(module: nn.Module, concrete: Mapping[str, Any], rank: int | None) -> fx.Graph:
    tracer = _OwnCode(rank)
    try:
        with _bases_as_calls(module, tracer), torch.random.fork_rng(devices=[]):
            graph = tracer.trace(module, dict(concrete))
    except NotTraceableError:
        raise
    except Exception as error:  # tracing runs the user's code on proxies, which may raise anything at all
        if isinstance(error, NameError) and "not installed as a submodule" in str(error):
            raise NotTraceableError("it calls a module that is no submodule of it: a list of modules has to be an nn.ModuleList") from error
        raise NotTraceableError(f"torch.fx cannot trace it ({described(error)})") from error
    for node in graph.nodes:
        node.type = None  # annotations may be strings, which mean nothing in the generated code
    return graph


class _OwnCode(fx.Tracer):
    """Traces a module with its children as leaves, and refuses regions of no_grad or autocast. rank: of the first input, if known."""

    def __init__(self, rank: int | None = None) -> None:
        super().__init__()
        self.region, self.rank = _region(), rank

    def proxy(self, node: fx.Node) -> fx.Proxy:
        first = self.rank is not None and node.op == "placeholder" and node.prev.op != "placeholder"
        return _OfRank(node, self) if first else super().proxy(node)

    def is_leaf_module(self, m: nn.Module, module_qualified_name: str) -> bool:
        return True

    def create_node(self, kind: str, *args: Any, **kwargs: Any) -> fx.Node:
        if _region() != self.region:
            raise NotTraceableError("it has a region of its own of no_grad or autocast")
        return super().create_node(kind, *args, **kwargs)


class _OfRank(fx.Proxy):
    """A proxy for a tensor with a known rank."""

    tracer: _OwnCode

    def dim(self) -> int | None:
        return self.tracer.rank

    @property
    def ndim(self) -> int | None:
        return self.tracer.rank


@contextmanager
def _other_region() -> Iterator[None]:
    """Gradients switched to the other state and autocast on: a region in the code that changed nothing in the first trace now does."""
    devices = {device: torch.is_autocast_enabled(device) for device in ("cpu", "cuda")}
    try:
        for device in devices:
            torch.set_autocast_enabled(device, True)
        with torch.set_grad_enabled(not torch.is_grad_enabled()):
            yield
    finally:
        for device, enabled in devices.items():
            torch.set_autocast_enabled(device, enabled)


def _region() -> tuple[bool, ...]:
    return (torch.is_grad_enabled(), torch.is_autocast_enabled("cpu"), torch.is_autocast_enabled("cuda"))


@contextmanager
def _bases_as_calls(module: nn.Module, tracer: fx.Tracer) -> Iterator[None]:
    """Trace `super().forward(x)` of a derived norm as one node, as the code of torch's norms checks shapes and counts batches."""
    base = next((base for base in BASES if isinstance(module, base)), None)
    if base is None or type(module).forward is base.forward:
        yield
        return
    original = base.forward

    def forward(self: nn.Module, input: Any) -> Any:
        if isinstance(input, fx.Proxy):
            return tracer.create_proxy("call_function", base_forward, (input, ""), {}, name="norm")
        return original(self, input)

    base.forward = forward
    try:
        yield
    finally:
        base.forward = original


# --- a module with rewritten code -----------------------------------------------------------------------------------------------------

Sources = Mapping[bool, tuple[str, str]]  # training -> (import statements, source of forward)


class Rewritten:
    """A mixin that marks a class made by `rewrite` or `over_layer`, and makes its objects copy and pickle."""

    _original_class: type[nn.Module]
    _sources: Sources | str

    def __reduce_ex__(self, protocol: Any) -> Any:
        return _rebuild, (self._original_class, self._sources), self.__dict__

    def _load_from_state_dict(self, *args: Any) -> None:
        # BatchNorm's method reads num_batches_tracked, which an emptied norm (`is_emptied`) does not have.
        own: Any = nn.Module if is_emptied(cast(nn.Module, self)) else super()
        own._load_from_state_dict(*((self, *args) if own is nn.Module else args))


def rewrite(module: nn.Module, graphs: Mapping[bool, fx.Graph]) -> None:
    """Make `module` run the graphs: its new class is derived from its old one, and differs in `forward` alone."""
    if isinstance(module, fx.GraphModule):
        module.recompile()
        return
    sources = {}
    for training, graph in graphs.items():
        code = graph.python_code("self")
        sources[training] = (format_import_block(code.globals, sys_importer), code.src)
    module.__class__ = _class(module._original_class if isinstance(module, Rewritten) else type(module), sources)


def over_layer(module: nn.Module, name: str) -> None:
    """Make `super().forward(x)`, `weight` and `bias` in the code of a class derived from a norm of torch use the child `name`."""
    module.__class__ = _class_over(type(module), name)


def is_emptied(module: nn.Module) -> bool:
    """Whether the class of `module` is derived from a norm of torch, and `over_layer` or `rewrite` has moved its tensors to a child."""
    tensors = {**module._parameters, **module._buffers}
    left = [tensor for name, tensor in tensors.items() if name != "num_batches_tracked" and tensor is not None]
    return isinstance(module, Rewritten) and isinstance(module, BASES) and not left


def _class(cls: type[nn.Module], sources: Sources) -> type[nn.Module]:
    forwards = {training: forward_from_source(f"{imports}\n{src}", {}) for training, (imports, src) in sources.items()}

    @functools.wraps(cls.forward)
    def forward(self: nn.Module, *args: Any, **kwargs: Any) -> Any:
        return forwards[self.training](self, *args, **kwargs)

    return type(cls.__name__, (Rewritten, cls), {"forward": forward, **_names(cls, sources)})


def _class_over(cls: type[nn.Module], name: str) -> type[nn.Module]:
    """A class derived from `cls` whose method resolution order has, before the norm of torch, a class whose forward calls the child."""
    base = _base(cls)

    def forward(self: nn.Module, input: Tensor) -> Any:
        return getattr(self, name)(input)

    between = type(base.__name__, (base,), {"forward": forward, "__module__": __name__})
    tensors = {tensor: property(_of_child(name, tensor)) for tensor in ("weight", "bias")}
    return type(cls.__name__, (Rewritten, cls, between), {**tensors, **_names(cls, name)})


def _of_child(name: str, attribute: str) -> Callable[[nn.Module], Any]:
    return lambda module: getattr(getattr(module, name), attribute)


def _names(cls: type[nn.Module], sources: Sources | str) -> dict[str, Any]:
    return {"_original_class": cls, "_sources": sources, "__module__": cls.__module__, "__qualname__": cls.__qualname__}


def _rebuild(cls: type[nn.Module], sources: Sources | str) -> nn.Module:
    made = _class_over(cls, sources) if isinstance(sources, str) else _class(cls, sources)
    return made.__new__(made)
