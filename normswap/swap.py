"""(model, Plan) -> a new model with the planned swaps made; and back again. The only writer of modules and graphs.

Every replacement goes into the memo of one `copy.deepcopy`, so it stands wherever the model refers to the source: under each of its
names, in lists, as the owner of a bound method, as the model itself. Functional calls are rewritten in the copy of the graph.
"""

from __future__ import annotations

import operator
from collections.abc import Callable, Mapping
from typing import Any, TypeVar, cast

import torch
from torch import Tensor, fx, nn
from torch.nn.parameter import is_lazy

from normswap import functional, numerics
from normswap.batchless import BatchlessNorm, Source
from normswap.errors import SwapError
from normswap.plan import Plan, Swap
from normswap.sharing import carry, copy_with

M = TypeVar("M", bound=nn.Module)


def swap(model: nn.Module, plan: Plan, *, std: str | Mapping[str, str] = "log") -> nn.Module:
    """A copy of `model` with each planned swap made; the model itself is not touched.

    std: how the layers store it; one form, or one for each name. Raises SwapError if the copy is not as planned.
    """
    replacements = {s.site.module: _build(s, std) for s in plan.swaps if s.site.module is not None}
    result = _replaced(model, replacements)
    calls = [s for s in plan.swaps if s.site.module is None]
    if calls:
        if not isinstance(result, fx.GraphModule):
            raise SwapError(f"{calls[0].name} is a call in a graph, but the model is a {type(result).__name__}; expected a GraphModule")
        _rewrite(result, calls, std)
    return result


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


def _rewrite(graph_module: fx.GraphModule, calls: list[Swap], std: str | Mapping[str, str]) -> None:
    """Turn each functional call into a call of a new submodule, and drop the tensors that nothing reads any more."""
    nodes = {node.name: node for node in graph_module.graph.nodes}
    targets: dict[tuple[Any, ...], str] = {}
    for s in calls:
        assert s.site.arguments is not None
        node = nodes[s.site.arguments["node"]]
        # Calls with the same tensors were one layer before they were traced, and are one again.
        tensors = (id(s.site.arguments[name]) for name in ("running_mean", "running_var", "weight", "bias"))
        layer = (*tensors, s.site.arguments["eps"])
        if layer not in targets:
            targets[layer] = _free_name(graph_module, f"{node.name}_batchless")
            graph_module.add_submodule(targets[layer], _build(s, std))
        target, source = targets[layer], s.site.arguments["input"]
        with graph_module.graph.inserting_before(node):
            call = graph_module.graph.call_module(target, (nodes[source.name],))
        call.meta = dict(node.meta)
        _replace_uses(node, call, s.name)
        graph_module.graph.erase_node(node)
    for node in reversed(list(graph_module.graph.nodes)):
        if node.op == "get_attr" and not node.users:
            graph_module.graph.erase_node(node)
            _drop_unread(graph_module, str(node.target))
    graph_module.graph.lint()
    graph_module.recompile()


def _replace_uses(node: fx.Node, call: fx.Node, name: str) -> None:
    """Let every user of the call's output read `call`; the functional aten forms return (output, statistics...)."""
    getitems = [user for user in node.users if user.target is operator.getitem]
    if not getitems or not functional.returns_a_tuple(cast("Callable[..., Any]", node.target)):
        node.replace_all_uses_with(call)
        return
    for user in getitems:
        if user.args[1] == 0:
            user.replace_all_uses_with(call)
        elif user.users:
            raise SwapError(f"{name}: the graph reads the batch statistics that this call returns; expected only its output to be read")
        node.graph.erase_node(user)


def _free_name(module: nn.Module, base: str) -> str:
    number, name = 0, base
    while hasattr(module, name):
        number += 1
        name = f"{base}_{number}"
    return name


def _drop_unread(graph_module: fx.GraphModule, target: str) -> None:
    """Delete a parameter or buffer that only erased nodes read, unless it belongs to a module that is called."""
    if any(node.op == "get_attr" and node.target == target for node in graph_module.graph.nodes):
        return
    owner_name, _, attribute = target.rpartition(".")
    owner = graph_module.get_submodule(owner_name)
    called = any(
        node.op == "call_module" and (owner_name == node.target or owner_name.startswith(f"{node.target}."))
        for node in graph_module.graph.nodes
    )
    if not called and hasattr(owner, attribute):
        delattr(owner, attribute)


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
    unknown = [name for layer, name in layers.items() if layer.source is None]
    if unknown and not skip:
        raise SwapError(
            f"{', '.join(unknown)} cannot be reverted: no source layer with statistics was recorded",
            hint="skip=True reverts the others and leaves these",
        )
    return _replaced(model, {layer: _source_of(layer, layer.source) for layer in layers if layer.source is not None})


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
    for name in ("weight", "bias", "running_mean", "running_var", "num_batches_tracked"):
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
    carry(layer, module)
    return module


def _follow(dtype: torch.dtype, layer: BatchlessNorm) -> torch.dtype:
    """The recorded dtype, or that of the layer if the model was moved to another since."""
    moved = layer.mean.dtype != torch.promote_types(dtype, torch.float32)
    return layer.mean.dtype if moved and dtype.is_floating_point else dtype


def _recorded_or_trained(layer: BatchlessNorm, source: Source) -> tuple[Tensor, Tensor, float]:
    mean, std = layer.statistics()
    recorded_mean, recorded_var = cast("Tensor | None", layer.source_mean), cast("Tensor | None", layer.source_var)
    if recorded_mean is None or recorded_var is None:
        var, eps = numerics.variance_of_std(std, source.eps)
        return mean, var, eps
    stored = numerics.parameter_of(numerics.std_of_variance(recorded_var, source.eps), layer.std)
    # As it was stored at the swap: rounded to float32 or wider. Both may have been widened since, so recorded_var's dtype is no witness.
    as_swapped = stored.to(torch.promote_types(source.buffers["running_var"], torch.float32)).to(layer.std_parameter.dtype)
    same_mean = recorded_mean.to(mean.dtype) == mean
    same_std = as_swapped == layer.std_parameter
    # Only a channel that was trained can ask for eps = 0: a dead one (variance 0) may miss eps by a rounding.
    _, eps = numerics.variance_of_std(std[~same_std], source.eps)
    trained = std.double().square() - eps
    # With eps = 0 the recorded variance no longer gives the recorded std, so all of them are then the trained form.
    var = torch.where(same_std, recorded_var.double(), trained) if eps == source.eps else trained
    return torch.where(same_mean, recorded_mean.to(mean.dtype), mean), var, eps
