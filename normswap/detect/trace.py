"""model -> Trace: every normalization of the model, in execution order, with its calls and its producer.

Back-ends, in the order in which they are tried; each sees all that the next one sees:

    graph   the model is a torch.fx.GraphModule: its own graph is read
    fx      torch.fx.symbolic_trace with every norm as a leaf; needs no inputs
    walk    one forward pass, watched by hooks on every module and a TorchFunctionMode on every function call
    names   no forward pass can be run: norm modules only, calls unknown

Whatever the back-end sees, the modules themselves come from `named_modules`, so none is lost. Everything runs on a copy in eval mode that
shares only the parameters, with the random state put back: tracing may leave proxies behind, and a forward pass may change buffers.

Code that reads the statistics of a norm instead of calling it would find none in a BatchlessNorm, so every back-end looks for such
readers: get_attr nodes in a graph, the tracer's attribute look-ups, the functions of a forward pass. Weight and bias stay, so they may be
read.
"""

from __future__ import annotations

import dataclasses
from collections import Counter
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, MutableMapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, fx, nn
from torch.overrides import TorchFunctionMode
from torch.utils._pytree import tree_leaves
from torch.utils.weak import WeakTensorKeyDictionary

from normswap.detect import functional
from normswap.detect.calls import Hit, call_sites, writes_its_own
from normswap.detect.handwritten import ELEMENTWISE, HAND_WRITTEN, LENGTHS, REDUCTIONS, SCALES, attribute, find, scalings
from normswap.detect.sites import Forward, Site, Trace
from normswap.detect.super_calls import under_super
from normswap.errors import SwapError, described
from normswap.models.copying import copy_for_running, unclear_names, uncompiled
from normswap.models.own_code import BASES, is_emptied, place_of

PRODUCERS = (nn.Conv1d, nn.Conv2d, nn.Conv3d, nn.ConvTranspose1d, nn.ConvTranspose2d, nn.ConvTranspose3d, nn.Linear)


@dataclass
class _Seen:
    """What one back-end saw. Modules are known by their first name."""

    order: list[str | int] = field(default_factory=list)  # names of norms at their first execution, and the numbers of hits
    calls: Counter[str] = field(default_factory=Counter)
    unclear: set[str] = field(default_factory=set)  # names of norms inside something that was not looked into
    producers: dict[str, str | None] = field(default_factory=dict)
    readers: dict[str, list[str]] = field(default_factory=dict)
    hits: list[Hit] = field(default_factory=list)
    suspects: dict[str, None] = field(default_factory=dict)  # modules whose code scales by the root of a mean or variance

    def read(self, name: str, reader: str) -> None:
        if reader not in self.readers.setdefault(name, []):
            self.readers[name].append(reader)

    def call(self, name: str, producer: str | None) -> None:
        if name not in self.calls:
            self.order.append(name)
        self.calls[name] += 1
        self.producers[name] = producer if self.calls[name] == 1 else None

    def hit(self, owner: str, function: str, producer: str | None = None) -> int:
        self.order.append(len(self.hits))
        self.hits.append(Hit(owner, function, producer))
        return len(self.hits) - 1


# None for what is no norm, else whether a rule can replace it as a whole.
IsNorm = Callable[[Site], bool | None]


class _Names:
    """First name and aliases of every module of one model, and what is shared among them."""

    def __init__(self, model: nn.Module, decided: Mapping[str, bool]) -> None:
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
        self.listed = {key: module for key, module in self.modules.items() if self.all[key][0] in decided}
        self.norms = {key: module for key, module in self.listed.items() if decided[self.all[key][0]]}
        owners: dict[int, set[int]] = {}
        for key, module in self.modules.items():
            for parameter in module.parameters(recurse=False):
                owners.setdefault(id(parameter), set()).add(key)
        self.owners = owners
        self.unclear = unclear_names(model)
        self.shares_a_weight = {key for keys in owners.values() if len(keys) > 1 for key in keys}
        # The tensors that a norm has and its replacement has not.
        self.statistics = {
            id(tensor): module
            for module in self.norms.values()
            for name, tensor in module._buffers.items()
            if tensor is not None and name not in ("weight", "bias")
        }

    def first(self, module: nn.Module) -> str:
        return self.all[id(module)][0]

    def may_produce(self, module: nn.Module) -> bool:
        """Whether the module is a conv or linear whose output is W x + b and nothing else, with a W of its own."""
        cls = type(module)  # a subclass that only builds itself otherwise, like torchvision's Conv3DSimple, is as plain as its base
        base = next((b for b in PRODUCERS if isinstance(module, b)), None)
        same = base is not None and all(getattr(cls, f, None) is getattr(base, f, None) for f in ("forward", "_conv_forward"))
        plain = same and "forward" not in module.__dict__ and not hasattr(module, "parametrizations")
        own = id(module) not in self.shares_a_weight and id(module) not in self.unclear
        return plain and own and not module._forward_hooks and "weight" in module._parameters

    def tied(self, module: nn.Module) -> tuple[str, ...]:
        """All names of the first of its parameters that another module holds, too."""
        for parameter in module.parameters(recurse=False):
            if len(holders := self.owners[id(parameter)]) > 1:
                holding = ((self.all[key][0], self.modules[key]) for key in self.modules if key in holders)
                return tuple(f"{name}.{own}".lstrip(".") for name, part in holding for own, p in part._parameters.items() if p is parameter)
        return ()

    def inside(self, module: nn.Module) -> list[nn.Module]:
        return [part for part in module.modules() if id(part) in self.listed]


def _decided(model: nn.Module, is_norm: IsNorm) -> dict[str, bool]:
    """First name of every norm -> whether it is one call: what no rule replaces as a whole may hold, in its own code, what one replaces.

    Asked once, of the model: its copies have the same names.
    """
    answers = ((name, module, is_norm(Site(name, (), module, None))) for name, module in model.named_modules() if not is_emptied(module))
    return {name: answer or not writes_its_own(module) for name, module, answer in answers if answer is not None}


def trace(model: nn.Module, forward: Callable[[], Forward | None], is_norm: IsNorm) -> Trace:
    """Find every norm of `model`. `forward` gives the arguments of one forward pass; it is asked only if the graph cannot be had."""
    if isinstance(model, torch.jit.ScriptModule):
        raise SwapError(
            "the model is TorchScript, whose layers cannot be replaced", hint="convert the model that it was scripted or traced from"
        )
    for name, module in model.named_modules():
        if isinstance(module, nn.parallel.DistributedDataParallel):
            raise SwapError(
                f"{name or 'the model'} is wrapped in DistributedDataParallel, which keeps the parameters that it was given",
                hint="convert what it wraps, its `module`, and wrap the result",
            )
    decided = _decided(model, is_norm)
    names = _Names(model, decided)
    notes: list[str] = []
    if names.unclear:
        notes.append("torch.fx cannot trace the model: it calls modules by their names, and a child's own name has a dot in it")
    elif isinstance(model, fx.GraphModule):
        return _result(names, _see_graph(model, model.graph, names), "graph", notes, model, forward)
    if id(model) in names.norms:
        return _result(names, _Seen(order=[""], calls=Counter({"": 1})), "fx", notes, model, forward)
    if names.unclear:
        pass
    elif "forward" in model.__dict__:
        notes.append("torch.fx cannot trace the model: it reads the forward of the class, and this object has one of its own")
    else:
        copied = copy_for_running(model)
        tracer = _Tracer(copied, _Names(copied, decided))
        for name, module in copied.named_modules():
            if not tracer.is_leaf_module(module, name):  # the hooks of a leaf are not run; those of others would be handed proxies to keep
                module._forward_hooks.clear()
                module._forward_pre_hooks.clear()
        try:
            with torch.random.fork_rng():
                graph = tracer.trace(copied)
        except Exception as error:  # tracing runs the user's code on proxies, which may raise anything at all
            notes.append(f"torch.fx could not trace the model: {described(error)}")
        else:
            return _result(names, _see_graph(copied, graph, tracer.names, tracer.seen), "fx", notes, copy_for_running(model), forward)
    arguments = forward()
    if arguments is None:
        notes.append(
            "no example inputs are known, so no forward pass was watched: calls and functional norms are unknown; give example inputs"
        )
        return _result(names, None, "names", notes, model, forward)
    copied = copy_for_running(model)  # a new one: the tracer may have left proxies in the other
    seen, failed = _Watch(copied, _Names(copied, decided)).run(*arguments)
    if failed is not None:
        notes.append(
            f"the forward pass stopped early, so calls after that point were not seen: {described(failed)}; give inputs that it takes"
        )
    return _result(names, seen, "walk", notes, copy_for_running(model), forward)


def _result(
    names: _Names, seen: _Seen | None, backend: str, notes: list[str], model: nn.Module, forward: Callable[[], Forward | None]
) -> Trace:
    """model: what may be traced and run to find out about calls: a copy, or the GraphModule itself."""
    found: dict[str, Site] = {}
    owners = {hit.owner for hit in seen.hits} if seen is not None else set()
    idle: list[str] = []
    unclear: list[Site] = []
    for key, module in names.listed.items():
        first, *aliases = names.all[key]
        if key in names.unclear:
            unclear.append(Site(first, tuple(aliases), module, None, obstacle=f"{names.unclear[key]}: rename that child"))
            continue
        if key not in names.norms and seen is not None and first not in seen.unclear:
            idle += [first] if first not in owners else []
            continue  # the calls in its code are listed instead
        found[first] = Site(
            name=first,
            aliases=tuple(aliases),
            module=module,
            calls=None if seen is None or first in seen.unclear or isinstance(module, torch.jit.ScriptModule) else seen.calls[first],
            parents=tuple(type(parent) for parent in names.parents.get(key, ())),
            readers=(*(() if seen is None else seen.readers.get(first, ())), *_fast_paths(module, names.parents.get(key, ()))),
            tied=names.tied(module),
            producer=None if seen is None else seen.producers.get(first),
        )
    calls: dict[int, list[Site]] = {}
    if seen is not None and (seen.hits or seen.suspects or idle):
        all_names = {aliases[0]: aliases for aliases in names.all.values()}
        of_calls, suspicions = call_sites(model, seen.hits, all_names, forward, idle=idle, suspects=tuple(seen.suspects))
        for number, site in of_calls:
            calls.setdefault(number, []).append(site)
        notes = [*notes, *suspicions]
    sites: list[Site] = []
    for place in seen.order if seen is not None else ():
        sites += calls.pop(place, []) if isinstance(place, int) else [found.pop(place)] if place in found else []
    return Trace((*sites, *found.values(), *unclear, *(site for rest in calls.values() for site in rest)), backend, tuple(notes))


def _fast_paths(norm: nn.Module, parents: Iterable[nn.Module]) -> Iterator[str]:
    """torch's encoder layers, in eval mode, hand the tensors of their norms to one fused function, where they can."""
    for parent in parents:
        if isinstance(parent, nn.TransformerEncoderLayer) and norm in (parent.norm1, parent.norm2):
            attention = parent.self_attn
            if parent.activation_relu_or_gelu and attention.batch_first and attention.in_proj_bias is not None:
                yield (
                    f"the fast path of {type(parent).__name__} (set its activation_relu_or_gelu = 0, and use_nested_tensor = False of the "
                    "encoder, to do without it)"
                )


class _Tracer(fx.Tracer):
    """Keeps every norm and producer as one node, whatever package its class is from, and looks into everything that holds a norm."""

    def __init__(self, model: nn.Module, names: _Names) -> None:
        super().__init__()
        self.model, self.names, self.seen = model, names, _Seen()

    def is_leaf_module(self, m: nn.Module, module_qualified_name: str) -> bool:
        if id(m) in self.names.norms or self.names.may_produce(m) or (isinstance(m, BASES) and not is_emptied(m)):
            return True
        return super().is_leaf_module(m, module_qualified_name) and not self.names.inside(m)

    def getattr(self, attr: str, attr_val: Any, parameter_proxy_cache: dict[str, Any]) -> Any:
        norm = self.names.statistics.get(id(attr_val))
        if norm is not None:
            self.seen.read(self.names.first(norm), f"the forward of {self.scope.module_path or type(self.model).__name__}")
        return super().getattr(attr, attr_val, parameter_proxy_cache)


def _see_graph(root: nn.Module, graph: fx.Graph, names: _Names, seen: _Seen | None = None) -> _Seen:
    """Read the calls of norms off a graph whose module targets are names in `root`."""
    seen = seen or _Seen()
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
            elif isinstance(module, BASES):  # a class that extends one of torch's norms: what it calls is in its own code
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
    """The module that holds what a get_attr node reads."""
    path = str(node.target).rpartition(".")[0]
    try:
        return root.get_submodule(path)
    except AttributeError:  # an attribute of something that is not a module
        return None


def _producer_of(source: Any, norm: Collection[fx.Node], root: nn.Module, names: _Names, called: Counter[int]) -> str | None:
    """The conv or linear module whose output is `source` and goes to the nodes of this norm and nowhere else."""
    if not isinstance(source, fx.Node) or source.op != "call_module" or not source.users.keys() <= set(norm):
        return None
    module = root.get_submodule(str(source.target))
    return names.first(module) if called[id(module)] == 1 and names.may_produce(module) else None


@dataclass
class _Output:
    """The output of a conv or linear, and how often something read it."""

    maker: nn.Module
    uses: int = 0


# Functions whose result is a plain number and yet depends on the values of a tensor. Others that give no tensor (shape, dtype) do not.
_VALUES = frozenset({"item", "tolist", "numpy", "__bool__", "__float__", "__int__", "__index__", "__array__", "__contains__"})

_ROOTS = frozenset({"rsqrt", "sqrt", "std", "rsqrt_", "sqrt_"})


def _may_be_root(function: str, args: tuple[Any, ...]) -> bool:
    """What a form written by hand cannot do without: whoever calls it may hold one. The caller's graph decides."""
    return function in _ROOTS or (function in ("pow", "__pow__") and any(a in (0.5, -0.5) for a in args if type(a) is float))


_STATISTIC, _ROOT = 1, 2


def _plain_name(function: str) -> str:
    """The name of an operation, whichever side of the operator it stands on, in place or not: `__rtruediv__` is truediv."""
    name = function.strip("_")
    return name[1:] if name in ("rmul", "rdiv", "rtruediv", "radd") else name


class _Watch(TorchFunctionMode):
    """Watches one forward pass of a model: norm calls, functional norms, and who else uses a conv's output."""

    def __init__(self, model: nn.Module, names: _Names) -> None:
        super().__init__()
        self.model, self.names, self.seen = model, names, _Seen()
        self.stack: list[nn.Module] = []
        # asked before this pass puts its own hooks on the modules
        self.candidates = {key for key, module in names.modules.items() if names.may_produce(module)}
        self.hooked = {key for key, module in names.norms.items() if module._forward_pre_hooks}
        self.weights = {id(p): key for key in self.candidates for p in names.modules[key].parameters(recurse=False)}
        self.outputs: MutableMapping[Tensor, _Output] = WeakTensorKeyDictionary()
        # what depends on parameters and buffers alone: a weight that is standardised is no activation
        self.fixed: MutableMapping[Tensor, None] = WeakTensorKeyDictionary()
        self.fixed.update(dict.fromkeys((*model.parameters(), *model.buffers())))
        self.roots: MutableMapping[Tensor, int] = WeakTensorKeyDictionary()  # what is a statistic of activations, or the root of one
        self.module_calls: Counter[int] = Counter()
        self.fed: dict[str | int, _Output] = {}  # norm -> what its only call so far was given; number of a hit -> what it was given

    def run(self, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> tuple[_Seen, Exception | None]:
        for module in self.names.modules.values():
            if not isinstance(module, torch.jit.ScriptModule):
                module.register_forward_pre_hook(self._enter, with_kwargs=True)
                module.register_forward_hook(self._leave, with_kwargs=True, always_call=True)
        failed: Exception | None = None
        try:
            with torch.random.fork_rng(), torch.no_grad(), uncompiled(), self:
                output = self.model(*args, **kwargs)
            self._use(output)
        except Exception as error:  # the user's model may raise anything; what was seen until then stays true
            failed = error
        for place, given in self.fed.items():
            if given.uses == 1 and self.module_calls[id(given.maker)] == 1:
                producer = self.names.first(given.maker)
                if isinstance(place, int):
                    self.seen.hits[place] = dataclasses.replace(self.seen.hits[place], producer=producer)
                elif self.seen.calls[place] == 1:
                    self.seen.producers[place] = producer
        return self.seen, failed

    def _inside_norm(self) -> bool:
        return any(id(module) in self.names.norms for module in self.stack)

    def _use(self, value: Any) -> None:
        for tensor in _tensors(value):
            if tensor in self.outputs:
                self.outputs[tensor].uses += 1

    def _feed(self, place: str | int, given: Any) -> None:
        """A norm is called with these arguments."""
        first = next(_tensors(given), None)
        if first is not None and first in self.outputs:
            self.fed[place] = self.outputs[first]

    def _enter(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        if not self._inside_norm():
            self.module_calls[id(module)] += 1
            if id(module) in self.names.norms:
                self._use((args, kwargs))
                self.seen.call(self.names.first(module), None)
                self._feed(self.names.first(module), () if id(module) in self.hooked else (args, kwargs))
        self.stack.append(module)

    def _leave(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], output: Any) -> None:
        if self.stack:
            self.stack.pop()
        if isinstance(output, Tensor) and id(module) in self.candidates:
            self.outputs[output] = _Output(module)

    def __torch_function__(self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Mapping[str, Any] | None = None) -> Any:
        kwargs = kwargs or {}
        if self._inside_norm():
            return func(*args, **kwargs)
        given = list(_tensors((args, kwargs)))
        owner = self.names.first(self.stack[-1]) if self.stack else ""
        for tensor in given:
            if id(tensor) in self.names.statistics:
                self.seen.read(self.names.first(self.names.statistics[id(tensor)]), f"the forward of {owner or type(self.model).__name__}")
            if id(tensor) in self.weights and (not self.stack or id(self.stack[-1]) != self.weights[id(tensor)]):
                self.module_calls[self.weights[id(tensor)]] += 1  # code reads the weight of a conv: as in a graph
        fixed = bool(given) and all(tensor in self.fixed for tensor in given)
        function = functional.name_of(func)
        if function and not fixed:
            self._feed(self.seen.hit(owner, function), (args, kwargs))
        elif not fixed and _may_be_root(func.__name__, args):
            self.seen.hit(owner, HAND_WRITTEN)
        result = func(*args, **kwargs)
        if fixed:
            self.fixed.update(dict.fromkeys(_tensors(result)))
        elif not function:
            self._suspect(owner, func.__name__, args, given, result)
        if result is None or func.__name__ in _VALUES or next(_tensors(result), None) is not None:
            self._use(given)
        return result

    def _suspect(self, owner: str, function: str, args: tuple[Any, ...], given: list[Tensor], result: Any) -> None:
        """Follow statistics to their root, and the root to what it scales."""
        name = _plain_name(function)
        marks = [0 if tensor in self.fixed else self.roots.get(tensor, 0) for tensor in given]
        if name in SCALES and len(given) == 2 and _ROOT in marks and not all(marks) and not any(tensor in self.fixed for tensor in given):
            self.seen.suspects[owner] = None
            return
        # What is centred is no statistic: only what is computed from statistics alone is one.
        others = [mark for tensor, mark in zip(given, marks, strict=True) if tensor not in self.fixed]
        mark = max(others, default=0) if name in ELEMENTWISE and all(others) else 0
        if name in REDUCTIONS:
            mark = _ROOT if name in ("std", "std_mean") else _STATISTIC
        elif name in LENGTHS or (mark and _may_be_root(name, args)):
            mark = _ROOT
        if mark:
            self.roots.update(dict.fromkeys(_tensors(result), mark))


def _tensors(value: Any) -> Iterator[Tensor]:
    """The tensors in nested containers, and in the attributes of objects in them (a model may return an object of its own)."""
    for leaf in tree_leaves(value):
        if isinstance(leaf, Tensor):
            yield leaf
        elif dataclasses.is_dataclass(leaf) and not isinstance(leaf, type):
            yield from (part for part in tree_leaves(vars(leaf)) if isinstance(part, Tensor))
