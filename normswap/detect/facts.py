"""(model, Plan) -> Facts: what `inspect` prints about each norm besides the decision. Changes nothing, and decides nothing.

Hooks on every module and a TorchFunctionMode watch one forward pass in eval mode, on a copy that shares only the parameters. It shows the
shapes that reach each norm, the modules that call it, and what overwrites its output. Everything else is read from the layer's tensors.
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, fx, nn

from normswap.detect import functional
from normswap.detect.handwritten import HAND_WRITTEN
from normswap.detect.hazards import Contents, Hazard, Momentum, contents_of, contents_of_call, hazards_of
from normswap.detect.producers import why_hooked
from normswap.detect.sites import Forward, Plan, Site, Skip, Swap
from normswap.errors import SwapError, described
from normswap.models.copying import copy_for_running
from normswap.models.torch_private import StorageWeakRef, storage_key, written
from normswap.models.watching import Watcher, tensors_in

_PRODUCES = re.compile(r"(conv(_transpose)?[123]d|convolution|linear|addmm)(\.\w+)?$")  # torch's functions and aten's

_UNSEEN = "no call of it was seen in the watched forward pass"


@dataclass(frozen=True)
class Facts:
    """The facts about one norm.

    name            as in the plan
    shapes          of its input in one forward, each once, in the order of the calls; empty if none was seen
    callers         the modules whose forward calls it, each once
    channels, eps   momentum: a number, "cumulative" for BatchNorm's None, or None if it has none
    batches         how many batches the running statistics have seen (num_batches_tracked)
    dead_channels   channels whose running std is about 0, `zero_weights` those whose weight is; see `hazards.ABOUT_ZERO`
    folds_into      the conv or linear that feeds it alone, if a swap of it could be folded in there; else None, and `why_not_folded`
    couples_to      the producer that a swap of it would be coupled to; else None, and `why_not_coupled`
    approximate     kept by an exact conversion, but swapped by an approximate one
    to_rmsnorm      whether `to="rmsnorm"` makes an RMSNorm of it, exactly; `why_not_rmsnorm` if not. None: it is no LayerNorm
    written_by      what overwrites its output in place: qualified names of modules, or functions
    unseen          why the watched forward pass shows no call of it, though the plan has calls; else None
    warnings        its hazards

    None: does not apply, or is not known.
    """

    name: str
    shapes: tuple[tuple[int, ...], ...] = ()
    callers: tuple[str, ...] = ()
    channels: int | None = None
    eps: float | None = None
    momentum: Momentum = None
    batches: int | None = None
    dead_channels: int | None = None
    zero_weights: int | None = None
    folds_into: str | None = None
    why_not_folded: str | None = None
    couples_to: str | None = None
    why_not_coupled: str | None = None
    approximate: bool = False
    to_rmsnorm: bool | None = None
    why_not_rmsnorm: str | None = None
    written_by: tuple[str, ...] = ()
    unseen: str | None = None
    warnings: tuple[Hazard, ...] = ()


@dataclass
class _Calls:
    """The calls of one site in the watched forward."""

    shapes: list[tuple[int, ...]] = field(default_factory=list)
    callers: list[str] = field(default_factory=list)
    written_by: dict[str, str] = field(default_factory=dict)  # qualified name -> how a message calls it
    contents: Contents | None = None  # of a call in code


def facts(model: nn.Module, plan: Plan, forward: Callable[[], Forward | None]) -> tuple[Facts, ...]:
    """The facts about every site of `plan`, in the order of the watched forward pass; sites that it did not reach come last.

    plan: made with approximate=True, so that the facts show which swaps are approximate. forward: gives the arguments of one forward
    pass, or None. A model that cannot be copied or run raises nothing: `unseen` says why, and shapes are unknown.
    """
    decisions: list[Swap | Skip] = [*plan.swaps, *plan.skips]
    arguments = forward() if decisions else None
    seen, failed = _watched(model, [d.site for d in decisions], arguments)
    samples = next((tensor.shape[0] for tensor in tensors_in(arguments) if tensor.dim()), 0)
    found = {d.name: _facts(model, d, seen.get(d.name), samples, failed) for d in decisions}
    return tuple(found[name] for name in (*seen, *(name for name in found if name not in seen)))


def _facts(model: nn.Module, decision: Swap | Skip, calls: _Calls | None, samples: int, failed: str | None) -> Facts:
    site = decision.site
    written_out = "it is written out in code, of which a watched forward pass shows no call"
    unseen = None if calls or site.calls == 0 else failed or (written_out if site.function == HAND_WRITTEN else _UNSEEN)
    calls = calls or _Calls()
    contents = calls.contents or (contents_of(site.module) if site.module is not None else Contents())
    shapes = tuple(dict.fromkeys(calls.shapes))
    into, why_not = _fold(model, decision, shapes)
    alone = _why_not_coupled(model, decision, None if into is not None else why_not)
    return Facts(
        site.name,
        shapes=shapes,
        callers=tuple(dict.fromkeys(calls.callers)),
        channels=contents.channels,
        eps=contents.eps,
        momentum=contents.momentum,
        batches=contents.batches,
        dead_channels=contents.dead_channels,
        zero_weights=contents.zero_weights,
        folds_into=into,
        why_not_folded=why_not,
        couples_to=site.producer if alone is None else None,
        why_not_coupled=alone,
        approximate=isinstance(decision, Swap) and decision.preserves == "approximate",
        written_by=tuple(calls.written_by),
        unseen=unseen,
        warnings=hazards_of(contents, site.calls, shapes, samples, tuple(calls.written_by.values())),
    )


# --- the layer that the norm could be folded into -----------------------------------------------------------------------------------


def _fold(model: nn.Module, decision: Swap | Skip, shapes: Sequence[tuple[int, ...]]) -> tuple[str | None, str | None]:
    """(the layer that a swap could be folded into, None), or (None, why there is none)."""
    if isinstance(decision, Skip):
        return None, "it stays as it is"
    if decision.calls is not None and decision.calls > 1:
        return None, f"it is called {decision.calls} times"
    if decision.producer is not None:
        name, space = decision.producer, _space(model.get_submodule(decision.producer))
    elif isinstance(model, fx.GraphModule) and (source := _source(model, decision.site)) is not None:
        name, space = source
    else:
        return None, "no conv or linear layer feeds it and nothing else" if decision.calls else "no call of it is known"
    assert decision.rule.build is not None
    layer = decision.rule.build(decision.site, "log")  # only the rule knows which axes hold the channels
    axes: tuple[int, ...] = getattr(layer, "channel_axis", ())
    output = -1 - space  # the axis on which a conv or linear puts its channels, from the end
    if len(axes) == 1 and (axes[0] == output or {axes[0] - len(shape) for shape in shapes if axes[0] >= 0} == {output}):
        return name, None
    if len(axes) == 1 and axes[0] >= 0 and not shapes and space:
        return name, None  # without a known shape, assume one batch axis before the channels
    return (
        None,
        f"its channels are not known to be those of {name}" if not shapes else f"its channels lie on another axis than those of {name}",
    )


def _why_not_coupled(model: nn.Module, decision: Swap | Skip, why_not_folded: str | None) -> str | None:
    """Why a swap of the norm would not be coupled to a producer, as far as the plan and the shapes tell; None if it would."""
    if isinstance(decision, Skip):
        return why_not_folded
    if decision.producer is None:
        return decision.why_no_producer
    return why_hooked(decision.producer, model.get_submodule(decision.producer)) or why_not_folded


def _space(producer: nn.Module) -> int:
    """How many axes of a producer's output come after its channels."""
    return len(getattr(producer, "kernel_size", ()))


def _source(model: fx.GraphModule, site: Site) -> tuple[str, int] | None:
    """(name, axes after the channels) of the conv or linear call with a constant weight whose output only this functional norm reads."""
    node = next((node for node in model.graph.nodes if node.name == site.name.rpartition(".")[2]), None)
    source = node.args[0] if node is not None and node.args else None
    if not isinstance(source, fx.Node) or source.op != "call_function" or len(source.users) != 1:
        return None
    if not _PRODUCES.match(getattr(source.target, "__name__", "")):
        return None
    constants = [str(a.target) for a in source.all_input_nodes if a.op == "get_attr"]
    if not constants:
        return None
    owner = constants[0].rpartition(".")[0]
    ranks = [getattr(model.get_submodule(c.rpartition(".")[0]), c.rpartition(".")[2]).dim() for c in constants]
    return owner or source.name, max(0, max(ranks) - 2)  # a weight has two axes more than there are after the channels


# --- one watched forward ------------------------------------------------------------------------------------------------------------


def _watched(model: nn.Module, sites: Sequence[Site], arguments: Forward | None) -> tuple[dict[str, _Calls], str | None]:
    """(the calls of each site that the forward pass reached, why the pass was not run or stopped early, or None)."""
    if arguments is None:
        return {}, "no example inputs are known, so no forward pass was watched"
    try:
        copied = copy_for_running(model)
    except SwapError as error:
        return {}, error.message
    watch = _Watch(copied, sites)
    _, failed = watch.run(*arguments)
    return watch.result(), None if failed is None else f"the watched forward pass stopped before it: {described(failed)}"


_Key = str | tuple[str, str]  # the name of a site that is a module; (owner, function) of a call in code


class _Watch(Watcher):
    """Records the calls of each site in one forward pass. model: a copy that nobody else uses."""

    def __init__(self, model: nn.Module, sites: Sequence[Site]) -> None:
        self.sites = sites
        self.names = {id(module): name for name, module in model.named_modules()}
        in_code = {site.name for site in sites if site.function is not None}
        modules = dict(model.named_modules(remove_duplicate=False))
        self.norms = {id(modules[site.name]): site.name for site in sites if site.name in modules and site.name not in in_code}
        super().__init__(model, opaque=self.norms.keys())
        self.calls: list[tuple[_Key, _Calls]] = []
        # storage of a norm's output -> (weak reference, version, calls). The weak reference keeps the address from being reused, and does
        # not keep the data alive.
        self.outputs: dict[int, tuple[StorageWeakRef, int, _Calls]] = {}

    def result(self) -> dict[str, _Calls]:
        """site name -> its calls, in the order of the first calls."""
        names = {key: self._names_of(key, count) for key, count in Counter(key for key, _ in self.calls).items()}
        taken = Counter[_Key]()
        found: dict[str, _Calls] = {}
        for key, call in self.calls:
            if names[key]:
                name = names[key][taken[key] % len(names[key])]
                taken[key] += 1
                into = found.setdefault(name, _Calls(contents=call.contents))
                into.shapes += call.shapes
                into.callers += call.callers
                into.written_by.update(call.written_by)
        return found

    def _names_of(self, key: _Key, count: int) -> list[str]:
        """The names of the sites under one key, in the order of their calls; empty if `count` calls cannot be assigned to them."""
        if isinstance(key, str):
            return [key]
        owner, function = key
        graph = self.model.graph if isinstance(self.model, fx.GraphModule) else None
        mine = [s.name for s in self.sites if _is_call(s, function) and (graph or s.name.rpartition(".")[0] == owner)]
        if graph is not None:
            order = {node.name: index for index, node in enumerate(graph.nodes)}
            mine.sort(key=lambda name: order.get(name.rpartition(".")[2], len(order)))
        else:
            mine.sort(key=_natural)
        return mine if len(mine) in (1, count) else []

    def _owner(self) -> str:
        return self.names.get(id(self.stack[-1]), "") if self.stack else ""

    def entered(self, module: nn.Module, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> None:
        if id(module) in self.norms:
            self._call(self.norms[id(module)], (args, kwargs))

    def left(self, module: nn.Module, output: Any) -> None:
        if id(module) in self.norms:
            self._put_out(output, self.calls[-1][1])

    def called(self, function: Callable[..., Any], args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> Any:
        norm = functional.name_of(function)
        contents = contents_of_call(norm, functional.bind(function, args, kwargs)) if norm else None  # before it may update statistics
        result = function(*args, **kwargs)
        for tensor in tensors_in((args, kwargs)):
            self._read(tensor, function)
        if norm is not None:
            self._put_out(result, self._call((self._owner(), norm), (args, kwargs), contents))
        return result

    def _call(self, key: _Key, given: Any, contents: Contents | None = None) -> _Calls:
        x = next(tensors_in(given), None)
        seen = _Calls([] if x is None else [tuple(x.shape)], [self._owner()], contents=contents)
        self.calls.append((key, seen))
        return seen

    def _put_out(self, output: Any, calls: _Calls) -> None:
        """Remember the storage and the version counter of a norm's output; views of the output share both."""
        tensor = next(tensors_in(output), None)
        if tensor is not None and _has_storage(tensor):
            reference = StorageWeakRef(tensor.untyped_storage())  # type: ignore[no-untyped-call]
            self.outputs[storage_key(tensor)] = (reference, written(tensor), calls)

    def _read(self, tensor: Tensor, function: Callable[..., Any]) -> None:
        """Record `function`, which has just run on `tensor`, as a writer if `tensor` is a norm's output whose version has changed."""
        known = self.outputs.get(storage_key(tensor)) if self.outputs and _has_storage(tensor) else None
        if known is None or written(tensor) == known[1]:
            return
        reference, _, seen = known
        self.outputs[storage_key(tensor)] = (reference, written(tensor), seen)
        innermost = self.stack[-1] if self.stack else self.model
        name, what = self._owner(), function.__name__.partition(".")[0]
        if next(innermost.children(), None) is None and innermost is not self.model:
            seen.written_by[name] = type(innermost).__name__
        else:
            seen.written_by[f"{name}.{what}" if name else what] = what


def _is_call(site: Site, function: str) -> bool:
    """Whether a call of `function` may be one of the site: `site.function` is it, or a `torch.nn.*.forward` of the same kind of norm."""
    endings = tuple(f"{functional.KINDS.get(function, '?').replace('_', '')}{space}.forward" for space in ("", "1d", "2d", "3d"))
    return site.function is not None and (site.function == function or site.function.lower().endswith(endings))


def _has_storage(tensor: Tensor) -> bool:
    """Whether the tensor is strided and has a version counter."""
    return not tensor.is_inference() and tensor.layout is torch.strided


def _natural(name: str) -> list[tuple[str, int]]:
    return [(text, int(number or 0)) for text, number in re.findall(r"(\D+)(\d*)", name)]
