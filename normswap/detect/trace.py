"""model -> Trace: every normalization of the model, in execution order, with its calls and its producer.

Back-ends, in the order in which they are tried; each sees all that the next one sees:

    graph   the model is a torch.fx.GraphModule: its own graph is read
    fx      torch.fx.symbolic_trace with every norm as a leaf; needs no inputs
    walk    one forward pass, watched by hooks on every module and a TorchFunctionMode on every function call
    names   no forward pass can be run: norm modules only, calls unknown

The norm modules themselves come from `named_modules`, so none is lost whatever a back-end sees. Everything runs on a copy in eval mode that
shares only the parameters, with the random state restored: tracing may leave proxies behind, and a forward pass may change buffers.

Code that reads the running statistics of a norm instead of calling it would find none in a BatchlessNorm, so every back-end looks for such
readers: get_attr nodes in a graph, the tracer's attribute look-ups, the functions of a forward pass. A BatchlessNorm has weight and bias,
so code may read these.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator

import torch
from torch import fx, nn

from normswap.detect.backend import Names, Seen
from normswap.detect.calls import call_sites, writes_its_own
from normswap.detect.fx_backend import Tracer, see_graph
from normswap.detect.producers import Source
from normswap.detect.sites import Forward, Site, Trace
from normswap.detect.walk_backend import Walk
from normswap.errors import SwapError, described
from normswap.models.copying import copy_for_running
from normswap.models.own_code import is_emptied

# None if the module is not a norm, else whether a rule can replace the whole module.
IsNorm = Callable[[Site], bool | None]


def _decided(model: nn.Module, is_norm: IsNorm) -> dict[str, bool]:
    """First name of every norm -> whether the norm is one site.

    It is not if no rule replaces the whole module, but a normalization in its code can be replaced. The names hold for copies, too.
    """
    answers = ((name, module, is_norm(Site(name, (), module, None))) for name, module in model.named_modules() if not is_emptied(module))
    return {name: answer or not writes_its_own(module) for name, module, answer in answers if answer is not None}


def trace(model: nn.Module, forward: Callable[[], Forward | None], is_norm: IsNorm) -> Trace:
    """Find every norm of `model`. forward: gives the arguments of a forward pass; called if there is no graph, or shapes are needed."""
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
    names = Names(model, decided)
    notes: list[str] = []
    if names.unclear:
        notes.append("torch.fx cannot trace the model: it calls modules by their names, and a child's own name has a dot in it")
    elif isinstance(model, fx.GraphModule):
        return _result(names, see_graph(model, model.graph, names), "graph", notes, model, forward)
    if id(model) in names.norms:
        whole = Seen()
        whole.call("")
        return _result(names, whole, "fx", notes, model, forward)
    if names.unclear:
        pass
    elif "forward" in model.__dict__:
        notes.append("torch.fx cannot trace the model: it reads the forward of the class, and this object has one of its own")
    else:
        copied = copy_for_running(model)
        tracer = Tracer(copied, Names(copied, decided))
        for name, module in copied.named_modules():
            if not tracer.is_leaf_module(module, name):  # hooks of other modules would run on proxies, and might keep them
                module._forward_hooks.clear()
                module._forward_pre_hooks.clear()
        try:
            with torch.random.fork_rng():
                graph = tracer.trace(copied)
        except Exception as error:  # tracing runs the user's code on proxies, which may raise anything at all
            notes.append(f"torch.fx could not trace the model: {described(error)}")
        else:
            return _result(names, see_graph(copied, graph, tracer.names, tracer.seen), "fx", notes, copy_for_running(model), forward)
    arguments = forward()
    if arguments is None:
        notes.append(
            "no example inputs are known, so no forward pass was watched: calls and functional norms are unknown; give example inputs"
        )
        return _result(names, None, "names", notes, model, forward)
    copied = copy_for_running(model)  # a new one: the tracer may have left proxies in the other
    watch = Walk(copied, Names(copied, decided))
    output, failed = watch.run(*arguments)
    if failed is not None:
        notes.append(
            f"the forward pass stopped early, so calls after that point were not seen: {described(failed)}; give inputs that it takes"
        )
    return _result(names, watch.result(output), "walk", notes, copy_for_running(model), forward)


def _result(
    names: Names, seen: Seen | None, backend: str, notes: list[str], model: nn.Module, forward: Callable[[], Forward | None]
) -> Trace:
    """The Trace from what a back-end saw. model: a copy, or the GraphModule itself, that may be traced and run to make sites of calls."""
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
        source = Source(None, "no forward pass was seen") if seen is None else seen.source(first)
        found[first] = Site(
            name=first,
            aliases=tuple(aliases),
            module=module,
            calls=None if seen is None or first in seen.unclear or isinstance(module, torch.jit.ScriptModule) else seen.calls[first],
            parents=tuple(type(parent) for parent in names.parents.get(key, ())),
            readers=(*(() if seen is None else seen.readers.get(first, ())), *_fast_paths(module, names.parents.get(key, ()))),
            tied=names.tied(module),
            producer=source.producer,
            why_no_producer=source.why_not,
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
    """Readers, in words, of the tensors of a norm in a TransformerEncoderLayer: in eval mode its fused function may read them."""
    for parent in parents:
        if isinstance(parent, nn.TransformerEncoderLayer) and norm in (parent.norm1, parent.norm2):
            attention = parent.self_attn
            if parent.activation_relu_or_gelu and attention.batch_first and attention.in_proj_bias is not None:
                yield (
                    f"the fast path of {type(parent).__name__} (set its activation_relu_or_gelu = 0, and use_nested_tensor = False of the "
                    "encoder, to do without it)"
                )
