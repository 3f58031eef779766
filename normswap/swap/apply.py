"""(model, Plan) -> a new model with the planned swaps made; and back again. The only writer of modules and graphs.

Every replacement goes into the memo of one `copy.deepcopy`, so it stands wherever the model refers to the source: under each of its
names, in lists, as the owner of a bound method, as the model itself. Calls are rewritten in the copy of the module whose code they are in.
"""

from __future__ import annotations

import operator
from collections.abc import Iterable, Mapping
from typing import Any, TypeVar, cast

import torch
from torch import Tensor, fx, nn
from torch.nn.parameter import is_lazy

from normswap.detect.handwritten import Found, find
from normswap.detect.sites import Plan, Site, Swap
from normswap.detect.super_calls import put_under_super
from normswap.errors import SwapError
from normswap.layer import coupling, formulas
from normswap.layer.batchless_norm import BatchlessNorm, Source
from normswap.models.copying import copy_hooks, copy_with, on_meta
from normswap.models.own_code import BASES, TENSORS, base_forward, base_of, graphs_of, rewrite

M = TypeVar("M", bound=nn.Module)


def swap(model: nn.Module, plan: Plan, *, std: str | Mapping[str, str] = "log") -> nn.Module:
    """A copy of `model` with each planned swap made; the model itself is not touched.

    std: how the layers store it; one form, or one for each name. Raises SwapError if the copy is not as planned.
    """
    replacements = {s.site.module: _build(s, std) for s in plan.swaps if s.site.call is None and s.site.module is not None}
    result = _replaced(model, replacements)
    _place(result, {s: _build(s, std) for s in plan.swaps if s.site.call is not None})
    return result


def with_layers(model: M, plan: Plan) -> M:
    """`model`, a copy that nobody else uses, with the layer that stands for a call in the place of each call that the plan swaps."""
    _place(model, {s: s.site.module for s in plan.swaps if s.site.call is not None and s.site.module is not None})
    return model


def _build(s: Swap, std: str | Mapping[str, str]) -> nn.Module:
    if s.rule.build is None:
        raise SwapError(f"{s.name}: the rule {s.kind!r} agreed to a swap but cannot build one", hint="give the rule a build function")
    return s.rule.build(s.site, std if isinstance(std, str) else std[s.name])


def _replaced(model: M, replacements: dict[nn.Module, nn.Module]) -> M:
    """A deep copy of `model` in which each key is its value, wherever it stands."""
    memo: dict[int, Any] = {}
    for source, target in replacements.items():
        memo[id(source)] = target
        for name, parameter in source._parameters.items():
            mine = target._parameters.get(name)
            if parameter is None or mine is None:
                continue
            # A weight that two layers share stays one weight.
            if isinstance(memo.setdefault(id(parameter), mine), nn.Parameter):
                target._parameters[name] = memo[id(parameter)]
    copied = copy_with(model, memo)
    for source, target in replacements.items():
        # What a replacement took over from its source (children, hooks, attributes) may refer to any part of the model.
        taken = {name: value for name, value in target.__dict__.items() if name not in ("_parameters", "_buffers")}
        target.__dict__.update(copy_with(taken, memo, f"what belongs to a {type(source).__name__}"))
    _check(model, copied, replacements)
    return copied


def _check(model: nn.Module, copied: nn.Module, replacements: dict[nn.Module, nn.Module]) -> None:
    """Hold the copy to the plan: under each name of a source stands its replacement, and nothing else moved."""
    found = dict(copied.named_modules(remove_duplicate=False))
    for name, module in model.named_modules(remove_duplicate=False):
        wanted = replacements.get(module)
        if wanted is not None and found.get(name) is not wanted:
            raise SwapError(
                f"{name or 'the model'} was to become a {type(wanted).__name__}, but the copy of the model holds "
                f"{type(found.get(name)).__name__} there",
                hint=f"does {type(model).__name__} or one of its parts define __deepcopy__ without using the memo?",
            )
    # By address, as a tensor that is wrapped anew (a scripted part, a view) is another object over the same memory.
    original = {t.data_ptr(): n for n, t in (*model.named_parameters(), *model.named_buffers()) if not is_lazy(t) and t.numel()}
    for name, tensor in (*copied.named_parameters(), *copied.named_buffers()):
        if not tensor.is_leaf:
            raise SwapError(
                f"{name} of the copy is not a leaf, so that training the copy would train the original: TorchScript parts are copied so",
                hint="convert the model before a part of it is scripted",
            )
        if not is_lazy(tensor) and tensor.numel() and not tensor.is_meta and tensor.data_ptr() in original:
            raise SwapError(
                f"{name} of the copy is not a copy: it shares memory with {original[tensor.data_ptr()]} of the original",
                hint=f"does {type(model).__name__} or one of its parts define __deepcopy__ to share its tensors?",
            )


def _place(model: nn.Module, layers: Mapping[Swap, nn.Module]) -> None:
    """Let the code that makes each call, an owner's, call the layer instead, under the name of the site; drop what it reads no more."""
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
            instead: dict[fx.Node, fx.Node] = {}  # of the ends that are gone, which may be where the next call starts
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
    """The tensors that the code reads, those of the norm that a class is derived from included while it calls that."""
    inherited = TENSORS if any(node.target is base_forward for node in graph.nodes) else ()
    return {*inherited, *(str(node.target) for node in graph.nodes if node.op == "get_attr")}


def _add(owner: nn.Module, target: str, layer: nn.Module) -> None:
    if not isinstance(owner, fx.GraphModule):
        owner.add_module(target, layer)
    elif not owner.add_submodule(target, layer):
        raise SwapError(f"{target} is no place for a layer: a part of its path is not a module")


def _call_instead(graph: fx.Graph, found: Found, start: fx.Node, target: str) -> fx.Node:
    # Where the first of its nodes reads x: what comes later may overwrite x, as `x.relu_()` between the norm and its weight does.
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
    """Delete a tensor that only calls read which are there no more, unless it is another module's and somebody may call that."""
    place, _, attribute = target.rpartition(".")
    called = {str(node.target) for graph in graphs for node in graph.nodes if node.op == "call_module"}
    others = place and not isinstance(owner, fx.GraphModule)
    if others or any(place == name or place.startswith(f"{name}.") for name in called):
        return
    holder = owner.get_submodule(place)
    if isinstance(holder, BASES):  # whose own methods expect the attributes to be there
        for tensors in (holder._parameters, holder._buffers):
            if attribute in tensors:
                tensors[attribute] = None
    elif hasattr(holder, attribute):
        delattr(holder, attribute)


def revert(model: M, *, skip: bool = False) -> M:
    """A new model in which every BatchlessNorm is the layer it was made from.

    Where a channel's statistics are still those that were recorded, they come back bit for bit; a trained one has
    running_mean = mean, running_var = std^2 - eps (and eps = 0 for the layer if some std^2 < eps).

    Raises SwapError, naming them, for layers that were not made from a layer with statistics, unless `skip=True` leaves them.
    """
    if not isinstance(model, nn.Module):
        raise SwapError(
            f"a {type(model).__name__} has no layers to give back", hint="an exported program: keep the one that it was made from"
        )
    layers = {m: name for name, m in model.named_modules() if isinstance(m, BatchlessNorm)}
    valueless = next((name for layer, name in layers.items() if on_meta(layer)), None)
    if valueless is not None:
        raise SwapError(f"{valueless or 'the model'} is on the meta device: it has no values to give back", hint="load the weights first")
    unknown = [name for layer, name in layers.items() if layer.source is None]
    if unknown and not skip:
        own = {name: layer.own_rule[0] for layer, name in layers.items() if layer.source is None and layer.own_rule is not None}
        by_rules = "; ".join(f"{name} was made by your rule {kind!r}" for name, kind in own.items())
        raise SwapError(
            f"{', '.join(unknown)} cannot be reverted: no source layer with statistics was recorded" + (f" ({by_rules})" if own else ""),
            hint="keep the original model: nothing in the converted one tells what stood there; --skip (skip=True in Python) reverts the "
            "others and leaves these",
        )
    reverted = _replaced(model, {layer: _source_of(layer, layer.source) for layer in layers if layer.source is not None})
    for module in reverted.modules():
        coupling.release(module)
    return reverted


@torch.no_grad()
def _source_of(layer: BatchlessNorm, source: Source) -> nn.Module:
    mean, var, eps = _recorded_or_trained(layer, source)
    tensors: dict[str, Tensor | None] = {
        "running_mean": mean,
        "running_var": var,
        "num_batches_tracked": cast("Tensor | None", layer.source_batches),
        "weight": layer.weight,
        "bias": layer.bias,
    }
    module = source.cls.__new__(source.cls)
    nn.Module.__init__(module)
    module.__dict__.update({**source.attributes, "eps": eps})
    for name in TENSORS:
        tensor = tensors[name]
        dtype = source.parameters.get(name) or source.buffers.get(name)
        value = None if tensor is None or dtype is None else tensor.detach().to(_follow(dtype, layer)).clone()
        if name in source.buffers or (name not in source.parameters and name not in ("weight", "bias")):
            module.register_buffer(name, value)
        else:
            trainable = tensor is not None and tensor.requires_grad
            module.register_parameter(name, None if value is None else nn.Parameter(value, requires_grad=trainable))
    for name, child in layer._modules.items():
        module.add_module(name, child)
    copy_hooks(layer, module)
    return module


def _follow(dtype: torch.dtype, layer: BatchlessNorm) -> torch.dtype:
    """The recorded dtype, or that of the layer if the model was moved to another since."""
    moved = layer.mean.dtype != torch.promote_types(dtype, torch.float32)
    return layer.mean.dtype if moved and dtype.is_floating_point else dtype


def _recorded_or_trained(layer: BatchlessNorm, source: Source) -> tuple[Tensor, Tensor, float]:
    mean, std = layer.statistics()
    recorded_mean, recorded_var = cast("Tensor | None", layer.source_mean), cast("Tensor | None", layer.source_var)
    if recorded_mean is None or recorded_var is None:
        var, eps = formulas.variance_of_std(std, source.eps)
        return mean, var, eps
    same_mean = recorded_mean.to(mean.dtype) == mean
    same_std = layer.as_recorded()
    # Only a channel that was trained can ask for eps = 0: a dead one (variance 0) may miss eps by a rounding.
    _, eps = formulas.variance_of_std(std[~same_std], source.eps)
    trained = std.double().square() - eps
    # With eps = 0 the recorded variance no longer gives the recorded std, so all of them are then the trained form.
    var = torch.where(same_std, recorded_var.double(), trained) if eps == source.eps else trained
    return torch.where(same_mean, recorded_mean.to(mean.dtype), mean), var, eps
