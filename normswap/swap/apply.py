"""(model, Plan) -> a new model with the planned swaps made. The only writer of modules and graphs.

Every replacement goes into the memo of one `copy.deepcopy`, so it takes the place of the source wherever the model refers to it: under each
name, in lists, as the owner of a bound method, as the model itself. A norm that is a call is replaced by rewriting the code that calls it.
"""

from __future__ import annotations

import operator
from collections.abc import Iterable, Mapping
from typing import Any, TypeVar

from torch import fx, nn
from torch.nn.parameter import is_lazy

from normswap.detect.functional import Found
from normswap.detect.handwritten import find
from normswap.detect.sites import Plan, Site, Swap
from normswap.detect.super_calls import put_under_super
from normswap.errors import SwapError
from normswap.models.copying import copy_with
from normswap.models.own_code import BASES, TENSORS, base_forward, base_of, graphs_of, rewrite

M = TypeVar("M", bound=nn.Module)


def swap(model: nn.Module, plan: Plan, *, std: str | Mapping[str, str] = "log") -> nn.Module:
    """A copy of `model` with each planned swap made; the model itself is not touched.

    std: the form in which layers store their std; one for all, or name -> form. Raises SwapError if the copy is not as planned.
    """
    replacements = {s.site.module: _build(s, std) for s in plan.swaps if s.site.call is None and s.site.module is not None}
    result = copy_replacing(model, replacements)
    _place(result, {s: _build(s, std) for s in plan.swaps if s.site.call is not None})
    return result


def with_layers(model: M, plan: Plan) -> M:
    """`model`, changed in place: each call that the plan swaps becomes a layer that computes the same as the call."""
    _place(model, {s: s.site.module for s in plan.swaps if s.site.call is not None and s.site.module is not None})
    return model


def _build(s: Swap, std: str | Mapping[str, str]) -> nn.Module:
    if s.rule.build is None:
        raise SwapError(f"{s.name}: the rule {s.kind!r} agreed to a swap but has no build function", hint="give the rule a build function")
    return s.rule.build(s.site, std if isinstance(std, str) else std[s.name])


def copy_replacing(model: M, replacements: Mapping[nn.Module, nn.Module]) -> M:
    """A deep copy of `model` with each key of `replacements` replaced by its value. Raises SwapError if the copy came out otherwise."""
    memo: dict[int, Any] = {}
    for source, target in replacements.items():
        memo[id(source)] = target
        for name, parameter in source._parameters.items():
            mine = target._parameters.get(name)
            if parameter is None or mine is None:
                continue
            # A parameter that two replaced layers share stays one parameter.
            if isinstance(memo.setdefault(id(parameter), mine), nn.Parameter):
                target._parameters[name] = memo[id(parameter)]
    copied = copy_with(model, memo)
    for source, target in replacements.items():
        # What a replacement took over from its source (children, hooks, attributes) may refer to any part of the model.
        taken = {name: value for name, value in target.__dict__.items() if name not in ("_parameters", "_buffers")}
        target.__dict__.update(copy_with(taken, memo, f"what belongs to a {type(source).__name__}"))
    _check_copy(model, copied, replacements)
    return copied


def _check_copy(model: nn.Module, copied: nn.Module, replacements: Mapping[nn.Module, nn.Module]) -> None:
    """Raise SwapError unless each name of a source leads to its replacement, and the copy shares no memory with the model."""
    found = dict(copied.named_modules(remove_duplicate=False))
    for name, module in model.named_modules(remove_duplicate=False):
        wanted = replacements.get(module)
        if wanted is not None and found.get(name) is not wanted:
            raise SwapError(
                f"{name or 'the model'} was to become a {type(wanted).__name__}, but the copy of the model holds "
                f"{type(found.get(name)).__name__} there",
                hint=f"does {type(model).__name__} or one of its parts define __deepcopy__ without using the memo?",
            )
    # Compare addresses, as another tensor object (of a scripted part, a view) may lie over the same memory.
    original = {t.data_ptr(): n for n, t in (*model.named_parameters(), *model.named_buffers()) if not is_lazy(t) and t.numel()}
    for name, tensor in (*copied.named_parameters(), *copied.named_buffers()):
        if not tensor.is_leaf:
            raise SwapError(
                f"{name} of the copy is not a leaf tensor, so training the copy would train the original; TorchScript parts are copied so",
                hint="convert the model before a part of it is scripted",
            )
        if not is_lazy(tensor) and tensor.numel() and not tensor.is_meta and tensor.data_ptr() in original:
            raise SwapError(
                f"{name} of the copy is not a copy: it shares memory with {original[tensor.data_ptr()]} of the original",
                hint=f"does {type(model).__name__} or one of its parts define __deepcopy__ to share its tensors?",
            )


def _place(model: nn.Module, layers: Mapping[Swap, nn.Module]) -> None:
    """Rewrite the code of each owner to call the layer, under the name of the site, in place of the norm; drop tensors now unread."""
    owners = dict.fromkeys(s.site.call.owner for s in layers if s.site.call is not None)
    for name in owners:
        owner = model.get_submodule(name)
        mine = {s.site: layer for s, layer in layers.items() if s.site.call is not None and s.site.call.owner == name}
        if any(site.call is not None and site.call.under for site in mine):
            _put_under(owner, name, mine)
            continue
        graphs = graphs_of(owner)
        read_before = {target for graph in graphs.values() for target in _reads(graph)}
        for graph in graphs.values():
            found = find(graph, owner)
            instead: dict[fx.Node, fx.Node] = {}  # end node of a replaced norm, which may be the start of another -> the layer's node
            for site, layer in mine.items():
                numbers = site.call.numbers if site.call is not None else ()
                if any(number >= len(found) or found[number].function != site.function for number in numbers):
                    raise SwapError(
                        f"{site.name} is a call of {site.function}, but the code of {type(owner).__name__} makes no such call there",
                        hint="the plan must be one of the same model",
                    )
                target = site.name[len(name) + 1 :] if name else site.name
                _add(owner, target, layer.train(owner.training))
                for number in numbers:
                    start = instead.get(found[number].start, found[number].start)
                    instead[found[number].end] = _call_instead(graph, found[number], start, target)
            graph.lint()
        for target in read_before - {target for graph in graphs.values() for target in _reads(graph)}:
            _drop_unread(owner, target, graphs.values())
        rewrite(owner, graphs)


def _put_under(owner: nn.Module, name: str, mine: Mapping[Site, nn.Module]) -> None:
    ((site, layer),) = mine.items()
    if f"torch.nn.{getattr(base_of(owner), '__name__', None)}.forward" != site.function:
        raise SwapError(
            f"{site.name} is the {site.function} that the code of a layer calls, but {type(owner).__name__} is not derived from that",
            hint="the plan must be one of the same model",
        )
    put_under_super(owner, site.name[len(name) + 1 :] if name else site.name, layer.train(owner.training))


def _reads(graph: fx.Graph) -> set[str]:
    """The names of the tensors that the code reads; all tensors of the base norm, too, if the code calls `super().forward`."""
    inherited = TENSORS if any(node.target is base_forward for node in graph.nodes) else ()
    return {*inherited, *(str(node.target) for node in graph.nodes if node.op == "get_attr")}


def _add(owner: nn.Module, target: str, layer: nn.Module) -> None:
    if not isinstance(owner, fx.GraphModule):
        owner.add_module(target, layer)
    elif not owner.add_submodule(target, layer):
        raise SwapError(f"{target} is no place for a layer: a part of its path is not a module")


def _call_instead(graph: fx.Graph, found: Found, start: fx.Node, target: str) -> fx.Node:
    # The layer is called where the first node of the norm reads x: later nodes may overwrite x, like `x.relu_()` before the weight.
    first = next((node for node in graph.nodes if node in found.inside and start in node.all_input_nodes), found.end)
    with graph.inserting_before(first):
        call = graph.call_module(target, (start,))
    call.meta = dict(found.end.meta)
    found.end.replace_all_uses_with(call)
    for node in reversed([node for node in graph.nodes if node in found.inside or node.op == "get_attr"]):
        unread = [user for user in node.users if user.target is operator.getitem and not user.users]
        for user in unread:
            graph.erase_node(user)
        if not node.users:
            graph.erase_node(node)
    return call


def _drop_unread(owner: nn.Module, target: str, graphs: Iterable[fx.Graph]) -> None:
    """Delete a tensor that only the replaced norms read, unless it belongs to another module that may still be called."""
    place, _, attribute = target.rpartition(".")
    called = {str(node.target) for graph in graphs for node in graph.nodes if node.op == "call_module"}
    others = place and not isinstance(owner, fx.GraphModule)
    if others or any(place == name or place.startswith(f"{name}.") for name in called):
        return
    holder = owner.get_submodule(place)
    if isinstance(holder, BASES):  # the methods of torch's norms expect the attributes to exist
        for tensors in (holder._parameters, holder._buffers):
            if attribute in tensors:
                tensors[attribute] = None
    elif hasattr(holder, attribute):
        delattr(holder, attribute)
