"""model -> Trace: every normalization of the model, in execution order, with its calls and its producer.

Back-ends, in the order in which they are tried; each sees all that the next one sees:

    graph   the model is a torch.fx.GraphModule: its own graph is read
    fx      torch.fx.symbolic_trace with every norm as a leaf; needs no inputs
    walk    one forward pass, watched by hooks on every module and a TorchFunctionMode on every function call
    names   no forward pass can be run: norm modules only, calls unknown

Whatever the back-end sees, the modules themselves come from `named_modules`, so none is lost. Everything runs on a copy in eval mode that
shares only the parameters: tracing may leave proxies behind, and a forward pass may change buffers.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, fx, nn
from torch.overrides import TorchFunctionMode
from torch.utils._pytree import tree_leaves

from normswap import functional
from normswap.plan import Site, Trace
from normswap.sharing import shadow

PRODUCERS = (nn.Conv1d, nn.Conv2d, nn.Conv3d, nn.ConvTranspose1d, nn.ConvTranspose2d, nn.ConvTranspose3d, nn.Linear)

Forward = tuple[tuple[Any, ...], Mapping[str, Any]]


@dataclass
class _Seen:
    """What one back-end saw. Modules are known by their first name."""

    order: list[str] = field(default_factory=list)  # names of sites, at their first execution
    calls: Counter[str] = field(default_factory=Counter)
    producers: dict[str, str | None] = field(default_factory=dict)
    readers: dict[str, list[str]] = field(default_factory=dict)
    functional: dict[str, Site] = field(default_factory=dict)

    def call(self, name: str, producer: str | None) -> None:
        if name not in self.calls:
            self.order.append(name)
        self.calls[name] += 1
        self.producers[name] = producer if self.calls[name] == 1 else None


class _Names:
    """First name and aliases of every module of one model, and what is shared among them."""

    def __init__(self, model: nn.Module, is_norm: Callable[[nn.Module], bool]) -> None:
        self.all: dict[int, list[str]] = {}
        self.modules: dict[int, nn.Module] = {}
        self.parents: dict[int, list[nn.Module]] = {}
        for name, module in model.named_modules(remove_duplicate=False):
            self.all.setdefault(id(module), []).append(name)
            self.modules[id(module)] = module
        for module in self.modules.values():
            for child in module.children():
                self.parents.setdefault(id(child), []).append(module)
        # A norm inside a norm (the BatchNorm that a wrapper holds) is the inner one's business: the rule for the outer one decides.
        self.norms = {key: module for key, module in self.modules.items() if is_norm(module)}
        owners: dict[int, set[int]] = {}
        for key, module in self.modules.items():
            for parameter in module.parameters(recurse=False):
                owners.setdefault(id(parameter), set()).add(key)
        self.shares_a_weight = {key for keys in owners.values() if len(keys) > 1 for key in keys}

    def first(self, module: nn.Module) -> str:
        return self.all[id(module)][0]

    def may_produce(self, module: nn.Module) -> bool:
        """Whether the module is a conv or linear whose output is W x + b and nothing else, with a W of its own."""
        plain = type(module) in PRODUCERS and "forward" not in module.__dict__ and not hasattr(module, "parametrizations")
        return plain and not module._forward_hooks and "weight" in module._parameters and id(module) not in self.shares_a_weight


def trace(model: nn.Module, forward: Callable[[], Forward | None], is_norm: Callable[[nn.Module], bool]) -> Trace:
    """Find every norm of `model`. `forward` gives the arguments of one forward pass; it is asked only if the graph cannot be had."""
    names = _Names(model, is_norm)
    notes: list[str] = []
    if isinstance(model, fx.GraphModule):
        return _result(names, _see_graph(model, model.graph, names, rewritable=True), "graph", notes)
    if id(model) in names.norms:
        return _result(names, _Seen(order=[""], calls=Counter({"": 1})), "fx", notes)
    copied = shadow(model)
    copied_names = _Names(copied, is_norm)
    try:
        graph = _Tracer(is_norm).trace(copied)
    except Exception as error:  # tracing runs the user's code on proxies, which may raise anything at all
        notes.append(f"torch.fx could not trace the model: {_first_line(error)}")
    else:
        return _result(names, _see_graph(copied, graph, copied_names, rewritable=False), "fx", notes)
    arguments = forward()
    if arguments is None:
        notes.append("no example inputs are known, so no forward pass was watched: calls and functional norms are unknown")
        return _result(names, None, "names", notes)
    copied = shadow(model)  # a new one: the tracer may have left proxies in the other
    seen, failed = _Watch(copied, _Names(copied, is_norm)).run(*arguments)
    if failed is not None:
        notes.append(f"the forward pass stopped early, so calls after that point were not seen: {_first_line(failed)}")
    return _result(names, seen, "walk", notes)


def _first_line(error: Exception) -> str:
    text = str(error).strip().splitlines()
    return f"{type(error).__name__}: {text[0]}" if text else type(error).__name__


def _result(names: _Names, seen: _Seen | None, backend: str, notes: list[str]) -> Trace:
    modules: dict[str, Site] = {}
    for key, module in names.norms.items():
        first, *aliases = names.all[key]
        modules[first] = Site(
            name=first,
            aliases=tuple(aliases),
            module=module,
            calls=None if seen is None else seen.calls[first],
            parents=tuple(type(parent) for parent in names.parents.get(key, ())),
            readers=() if seen is None else tuple(seen.readers.get(first, ())),
            producer=None if seen is None else seen.producers.get(first),
        )
    found = {**modules, **(seen.functional if seen else {})}
    order = [name for name in (seen.order if seen else ()) if name in found]
    rest = [name for name in found if name not in set(order)]
    return Trace(tuple(found[name] for name in (*order, *rest)), backend, tuple(notes))


class _Tracer(fx.Tracer):
    """Keeps every norm as one node, whatever package its class is from."""

    def __init__(self, is_norm: Callable[[nn.Module], bool]) -> None:
        super().__init__()
        self._is_norm = is_norm

    def is_leaf_module(self, m: nn.Module, module_qualified_name: str) -> bool:
        return self._is_norm(m) or super().is_leaf_module(m, module_qualified_name)


def _see_graph(root: nn.Module, graph: fx.Graph, names: _Names, *, rewritable: bool) -> _Seen:
    """Read the calls of norms off a graph whose module targets are names in `root`."""
    seen = _Seen()
    called = Counter(id(root.get_submodule(str(node.target))) for node in graph.nodes if node.op == "call_module")
    for node in graph.nodes:
        if node.op == "call_module":
            module = root.get_submodule(str(node.target))
            if id(module) in names.norms:
                seen.call(names.first(module), _producer_of(node, root, names, called))
        elif node.op == "get_attr":
            owner = str(node.target).rpartition(".")[0]
            module = root.get_submodule(owner) if owner and _has_submodule(root, owner) else root
            if id(module) in names.norms:
                seen.readers.setdefault(names.first(module), []).append(_name_of_node(node))
        elif node.op == "call_function" and (function := functional.name_of(node.target)):
            name = _name_of_node(node)
            arguments = _bound(node, root) if rewritable else None
            site = Site(name, (), None, 1, function=function, arguments=arguments, producer=_producer_of(node, root, names, called))
            seen.functional[name] = site
            seen.call(name, site.producer)
    return seen


def _has_submodule(root: nn.Module, name: str) -> bool:
    try:
        root.get_submodule(name)
    except AttributeError:
        return False
    return True


def _name_of_node(node: fx.Node) -> str:
    stack = list(node.meta.get("nn_module_stack", {}).values())
    owner = stack[-1][0] if stack and isinstance(stack[-1], tuple) and isinstance(stack[-1][0], str) else ""
    return f"{owner}.{node.name}" if owner else node.name


def _bound(node: fx.Node, root: nn.Module) -> dict[str, Any]:
    """The arguments of a functional call, with tensors behind get_attr nodes looked up."""

    def value(argument: Any) -> Any:
        if isinstance(argument, fx.Node) and argument.op == "get_attr":
            owner, _, attribute = str(argument.target).rpartition(".")
            return getattr(root.get_submodule(owner), attribute)
        return argument

    assert callable(node.target)
    return {**{name: value(a) for name, a in functional.bind(node.target, node.args, node.kwargs).items()}, "node": node.name}


def _producer_of(node: fx.Node, root: nn.Module, names: _Names, called: Counter[int]) -> str | None:
    """The conv or linear module that feeds this norm call and nothing else."""
    source = node.args[0] if node.args else node.kwargs.get("input")
    if not isinstance(source, fx.Node) or source.op != "call_module" or len(source.users) != 1:
        return None
    module = root.get_submodule(str(source.target))
    return names.first(module) if called[id(module)] == 1 and names.may_produce(module) else None


class _Watch(TorchFunctionMode):
    """Watches one forward pass of a model: norm calls, functional norms, and who else uses a conv's output.

    Tensors are told apart by identity and kept alive until the end, so that no id is used twice.
    """

    def __init__(self, model: nn.Module, names: _Names) -> None:
        super().__init__()
        self.model, self.names, self.seen = model, names, _Seen()
        self.stack: list[nn.Module] = []
        # may_produce is asked before this pass puts its own hooks on the modules
        self.candidates = {key for key, module in names.modules.items() if names.may_produce(module)}
        self.produced: dict[int, tuple[Tensor, nn.Module]] = {}  # output of a conv or linear
        self.uses: Counter[int] = Counter()
        self.module_calls: Counter[int] = Counter()
        self.fed: dict[str, Tensor] = {}  # norm -> the input of its only call so far

    def run(self, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> tuple[_Seen, Exception | None]:
        for module in self.names.modules.values():
            module.register_forward_pre_hook(self._enter, with_kwargs=True)
            module.register_forward_hook(self._leave, with_kwargs=True, always_call=True)
        failed: Exception | None = None
        try:
            with torch.random.fork_rng(), torch.no_grad(), self:
                output = self.model(*args, **kwargs)
            self.uses.update(id(leaf) for leaf in tree_leaves(output) if isinstance(leaf, Tensor))
        except Exception as error:  # the user's model may raise anything; what was seen until then stays true
            failed = error
        for name, tensor in self.fed.items():
            made = self.produced.get(id(tensor))
            if made and self.uses[id(tensor)] == 1 and self.module_calls[id(made[1])] == 1 and self.seen.calls[name] == 1:
                self.seen.producers[name] = self.names.first(made[1])
        return self.seen, failed

    def _inside_norm(self) -> bool:
        return any(id(module) in self.names.norms for module in self.stack)

    def _enter(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        if not self._inside_norm():
            self.module_calls[id(module)] += 1
            if id(module) in self.names.norms:
                tensors = [leaf for leaf in tree_leaves((args, kwargs)) if isinstance(leaf, Tensor)]
                self.uses.update(id(t) for t in tensors)
                name = self.names.first(module)
                self.seen.call(name, None)
                if tensors:
                    self.fed[name] = tensors[0]
        self.stack.append(module)

    def _leave(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], output: Any) -> None:
        if self.stack:
            self.stack.pop()
        if isinstance(output, Tensor) and id(module) in self.candidates:
            self.produced[id(output)] = (output, module)

    def __torch_function__(self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Mapping[str, Any] | None = None) -> Any:
        kwargs = kwargs or {}
        outside = not self._inside_norm()
        if outside and (function := functional.name_of(func)):
            owner = self.names.first(self.stack[-1]) if self.stack else ""
            base = f"{owner}.{func.__name__}" if owner else func.__name__
            name = next(n for n in _numbered(base) if n not in self.seen.functional)
            self.seen.functional[name] = Site(name, (), None, 1, function=function)
            self.seen.call(name, None)
        result = func(*args, **kwargs)
        if outside and any(isinstance(leaf, Tensor) for leaf in tree_leaves(result)):
            self.uses.update(id(leaf) for leaf in tree_leaves((args, kwargs)) if isinstance(leaf, Tensor))
        return result


def _numbered(base: str) -> Iterator[str]:
    yield base
    number = 1
    while True:
        yield f"{base}_{number}"
        number += 1

