"""Makes Sites of the normalizations that a back-end saw in the code of modules, and decides which of them can be replaced.

The module whose code normalizes, the owner, is traced alone (`models/own_code.py`), so that the rest of the model need not be traceable.
The normalizations in the owner's graph (`handwritten.find`) are matched with the hits of the back-end by their order.
"""

from __future__ import annotations

import contextlib
import dataclasses
import inspect
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import fx, nn

from normswap.detect.functional import Found, Shapes
from normswap.detect.handwritten import HAND_WRITTEN, find
from normswap.detect.producers import ELSEWHERE, Source
from normswap.detect.sites import Call, Forward, Site
from normswap.detect.super_calls import under_super
from normswap.errors import SwapError
from normswap.models.copying import copy_for_running
from normswap.models.own_code import NotTraceableError, base_forward, base_of, graphs_of, place_of
from normswap.models.watching import Watcher


@dataclass(frozen=True)
class Hit:
    """One call of a normalizing function, or one square root that may belong to a hand-written norm, seen in the code of `owner`."""

    owner: str
    function: str
    source: Source = ELSEWHERE


def call_sites(
    model: nn.Module,
    hits: Sequence[Hit],
    names: Mapping[str, Sequence[str]],
    forward: Callable[[], Forward | None],
    *,
    idle: Sequence[str] = (),
    suspects: Sequence[str] = (),
) -> tuple[list[tuple[int, Site]], list[str]]:
    """(number of its first hit, Site) for every normalization in an owner's code; and a note on every suspect without a hand-written norm.

    model: a copy in eval mode that nobody else uses, which may be traced and run. names: owner -> all its names. forward: gives the
    arguments of a forward pass; called only if the shape of an input must be known. idle: owners whose code was not run; their sites come
    last. suspects: owners whose code scales by the root of a mean or variance, as hand-written norms do.
    """
    owners = list(dict.fromkeys((*(hit.owner for hit in hits), *suspects, *idle)))
    found: dict[str, list[Found]] = {}
    why_not: dict[str, str] = {}
    for owner in owners:
        module = model.get_submodule(owner)
        try:
            found[owner] = _agreed(module, None)
        except NotTraceableError as error:
            why_not[owner] = str(error)
    vague = [owner for owner, calls in found.items() if any(call.needs_shape for call in calls)]
    if vague:
        arguments = forward()
        shapes = {} if arguments is None else _observe(model, vague, arguments)
        unseen: Shapes | None = None if arguments is None else {}
        found.update({owner: _agreed(model.get_submodule(owner), shapes.get(owner, unseen)) for owner in vague})
    sites: list[tuple[int, Site]] = []
    for owner in owners:
        mine = [(i, hit) for i, hit in enumerate(hits) if hit.owner == owner]
        if owner in found:
            sites += [
                (len(hits) if first is None else first, site)
                for first, site in _sites(model.get_submodule(owner), owner, names[owner][1:], found[owner], mine, owner in idle)
            ]
        else:
            sites += _unreplaceable(owner, type(model.get_submodule(owner)).__name__, mine, why_not[owner])
    silent = [owner for owner in suspects if not any(call.function == HAND_WRITTEN for call in found.get(owner, ()))]
    return sites, [_suspicion(model.get_submodule(owner), owner, why_not.get(owner)) for owner in silent]


def _suspicion(module: nn.Module, name: str, why_not: str | None) -> str:
    where = f"{type(module).__name__} ({name})" if name else type(module).__name__
    why = f"its code cannot be rewritten because {why_not}" if why_not else "it does not have a form that normswap knows"
    return (
        f"the code of {where} scales by the root of a mean or variance, or by a norm, as a normalization written by hand does; "
        f"it is not listed, as {why}. If it is a normalization, make it a layer with Norm in the name of its class"
    )


def writes_its_own(module: nn.Module) -> bool:
    """Whether the class of the module is not torch's, and a normalization in its code can be replaced."""
    if isinstance(module, torch.jit.ScriptModule) or type(module).forward.__module__.startswith("torch."):
        return False
    try:
        return any(call.layer is not None or call.needs_shape for call in _agreed(copy_for_running(module), None))
    except (NotTraceableError, SwapError):
        return False


def _agreed(module: nn.Module, shapes: Shapes | None) -> list[Found]:
    """The normalizations in a module's code in eval mode, which must be the same in train mode.

    A class derived from a norm of torch may have code that torch.fx cannot trace: if that code only calls `super().forward`, it can stay,
    and the one normalization found is the call of `super().forward`.
    """
    derived = base_of(module) is not None and not type(module).forward.__module__.startswith("torch.")
    try:
        return _in_graphs(module, shapes, at_ranks=not derived)
    except NotTraceableError:
        if not derived:
            raise
        if under_super(module).why_not is not None:
            return _in_graphs(module, shapes)
    graph = fx.Graph()
    x = graph.placeholder("x")
    graph.output(graph.create_node("call_function", base_forward, (x, ""), name="norm"))
    return [dataclasses.replace(found, under=True) for found in find(graph, module)]


def _in_graphs(module: nn.Module, shapes: Shapes | None, *, at_ranks: bool = True) -> list[Found]:
    each = [find(graph, module, shapes if not training else None) for training, graph in graphs_of(module, at_ranks=at_ranks).items()]
    for other in each[1:]:
        same = [f.function for f in other] == [f.function for f in each[0]]
        if not same or any(a.tensors != b.tensors for a, b in zip(*each, strict=True) if a.layer is not None and b.layer is not None):
            raise NotTraceableError("it normalizes differently in train and in eval mode")
    return each[0]


def _sites(
    owner: nn.Module, name: str, aliases: Sequence[str], found: list[Found], hits: list[tuple[int, Hit]], idle: bool
) -> list[tuple[int | None, Site]]:
    # If all of the code ran each time, the k-th of n calls was seen as the k-th, n + k-th, ... hit; if it did not, no count is known.
    seen: dict[int, list[tuple[int, Hit]]] = {}
    for hand_written in (False, True):
        numbers = [i for i, f in enumerate(found) if (f.function == HAND_WRITTEN) == hand_written]
        mine = [hit for hit in hits if (hit[1].function == HAND_WRITTEN) == hand_written]
        whole = bool(numbers) and len(mine) % len(numbers) == 0
        seen.update({number: mine[k :: len(numbers)] if whole else [] for k, number in enumerate(numbers)})
    groups: dict[Any, list[int]] = {}
    for i, call in enumerate(found):
        groups.setdefault(call.key, []).append(i)
    sites, taken = [], set[str]()
    for numbers in groups.values():
        call = found[numbers[0]]
        executed = [hit for number in numbers for hit in seen[number]]
        own = _free(owner, _prefix(call) + call.name, taken)
        first = min((i for i, _ in executed), default=hits[0][0] if hits else None)
        several = Source(None, "it is not known to be called once in a forward pass")
        source = executed[0][1].source if len(executed) == 1 else several
        site = Site(
            name=f"{name}.{own}" if name else own,
            aliases=tuple(f"{alias}.{own}" for alias in aliases),
            module=call.layer,
            calls=0 if idle else len(executed) or None,
            producer=source.producer,
            why_no_producer=source.why_not,
            function=call.function,
            call=Call(name, tuple(numbers), call.under) if call.layer is not None else None,
            obstacle=call.obstacle,
        )
        sites.append((first, site))
    return sites


def _unreplaceable(owner: str, owner_class: str, hits: list[tuple[int, Hit]], why: str) -> list[tuple[int, Site]]:
    """One site for each function call that was seen, with `why` as the obstacle. Hits that may be hand-written norms become no sites."""
    sites, taken = [], set[str]()
    for i, hit in hits:
        if hit.function != HAND_WRITTEN:
            own = _free(nn.Module(), hit.function.rpartition(".")[2], taken)
            obstacle = f"is a call of {hit.function} in the code of {owner_class}, which cannot be rewritten because {why}; make it a layer"
            site = Site(
                name=f"{owner}.{own}" if owner else own,
                aliases=(),
                module=None,
                calls=1,
                producer=hit.source.producer,
                why_no_producer=hit.source.why_not,
                function=hit.function,
                obstacle=obstacle,
            )
            sites.append((i, site))
    return sites


def _prefix(call: Found) -> str:
    """The path, with a dot at its end, of the submodule whose code makes the call; empty for the owner itself and for a GraphModule."""
    place = place_of(call.end) if call.end.graph.owning_module is not None else ""
    return f"{place}." if place else ""


def _free(owner: nn.Module, name: str, taken: set[str]) -> str:
    """`name`, or `name` with the first number behind it, that is not an attribute of `owner` and is not taken."""
    number, free = 0, name
    while free in taken or _holds(owner, free):
        number += 1
        free = f"{name}_{number}"
    taken.add(free)
    return free


def _holds(owner: nn.Module, path: str) -> bool:
    place, _, name = path.rpartition(".")
    try:
        return hasattr(owner.get_submodule(place), name)
    except AttributeError:
        return False


def _observe(model: nn.Module, owners: Sequence[str], arguments: Forward) -> dict[str, Shapes]:
    """owner -> node name -> shape, from one forward pass, in which each owner's graph is also run on the inputs of the owner."""
    watch = _GraphsBeside(model, {id(model.get_submodule(owner)): owner for owner in owners})
    watch.run(*arguments)
    return watch.shapes


class _GraphsBeside(Watcher):
    """Records shapes by running each owner's graph on the inputs of the owner's first call. owners: id -> name."""

    def __init__(self, model: nn.Module, owners: Mapping[int, str]) -> None:
        super().__init__(model)
        self.owners = owners
        self.shapes: dict[str, Shapes] = {}

    def entered(self, module: nn.Module, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> None:
        owner = self.owners.get(id(module))
        if owner is None or owner in self.shapes:
            return
        graph_module = module if isinstance(module, fx.GraphModule) else fx.GraphModule(module, graphs_of(module)[False])
        interpreter = _ShapesOf(graph_module)
        self.shapes[owner] = interpreter.shapes
        # `base_forward` cannot be run and raises; the shapes of all nodes before it have been recorded by then.
        with contextlib.suppress(Exception):
            interpreter.run(*_positional(module, args, kwargs))


def _positional(module: nn.Module, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> tuple[Any, ...]:
    bound = inspect.signature(module.forward).bind(*args, **kwargs)
    bound.apply_defaults()
    return bound.args


class _ShapesOf(fx.Interpreter):
    def __init__(self, module: fx.GraphModule) -> None:
        super().__init__(module)
        self.shapes: dict[str, tuple[Any, ...]] = {}

    def run_node(self, n: fx.Node) -> Any:
        value = super().run_node(n)
        if isinstance(value, torch.Tensor):
            self.shapes[n.name] = tuple(value.shape)
        return value
