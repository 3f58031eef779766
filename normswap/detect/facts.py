"""(model, Plan) -> Facts: what `inspect` says about each norm besides the decision. Changes nothing, and decides nothing.

One forward pass in eval mode, on a copy that shares only the parameters, is watched by hooks on every module and a TorchFunctionMode on
every function: the shapes that reach each norm, who calls it, and what overwrites its output. Everything else is read off the layer.
"""

from __future__ import annotations

import contextlib
import random
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from torch import Tensor, fx, nn
from torch.multiprocessing.reductions import StorageWeakRef
from torch.overrides import TorchFunctionMode
from torch.utils._pytree import tree_leaves

from normswap.detect import functional
from normswap.detect.handwritten import HAND_WRITTEN
from normswap.detect.hazards import Held, Momentum, Trap, given_to, held_by, traps
from normswap.detect.sites import Forward, Plan, Site, Skip, Swap
from normswap.errors import SwapError, described
from normswap.models.copying import copy_for_running, uncompiled

_PRODUCES = re.compile(r"(conv(_transpose)?[123]d|convolution|linear|addmm)(\.\w+)?$")  # torch's functions and aten's

_UNSEEN = "no call of it was seen in the watched forward pass"


@dataclass(frozen=True)
class Facts:
    """What is known of one norm.

    name            as in the plan
    shapes          of its input in one forward, each once, in the order of the calls; empty if none was seen
    callers         the modules whose forward calls it, each once
    channels, eps   momentum: a number, "cumulative" for BatchNorm's None, or None if it has none
    batches         how many batches the running statistics have seen (num_batches_tracked)
    dead_channels   channels whose running std is about 0, `zero_weights` those whose weight is; see `traps.ABOUT_ZERO`
    folds_into      the conv or linear that feeds it alone, if a swap of it could be folded in there; else None, and `why_not_folded`
    approximate     kept by an exact conversion, but swapped by an approximate one
    written_by      what overwrites its output in place: qualified names of modules, or functions
    unseen          why no call of it was watched, though the plan has calls, or None
    warnings        the traps that it is in

    None stands for what does not apply or is not known.
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
    approximate: bool = False
    written_by: tuple[str, ...] = ()
    unseen: str | None = None
    warnings: tuple[Trap, ...] = ()


@dataclass
class _Seen:
    """The calls of one site in the watched forward."""

    shapes: list[tuple[int, ...]] = field(default_factory=list)
    callers: list[str] = field(default_factory=list)
    written_by: dict[str, str] = field(default_factory=dict)  # qualified name -> how a message calls it
    held: Held | None = None


def facts(model: nn.Module, plan: Plan, forward: Callable[[], Forward | None]) -> tuple[Facts, ...]:
    """The facts about every site of `plan`, in the order of the watched forward, then those that it did not reach.

    plan: one with the approximate swaps, so that they can be told apart. forward: gives the arguments of one forward pass, or None.
    Raises nothing for a model that cannot be copied or run: then `unseen` says why, and shapes are unknown.
    """
    decisions: list[Swap | Skip] = [*plan.swaps, *plan.skips]
    arguments = forward() if decisions else None
    seen, failed = _watched(model, [d.site for d in decisions], arguments)
    samples = next((tensor.shape[0] for tensor in _tensors(arguments) if tensor.dim()), 0)
    found = {d.name: _facts(model, d, seen.get(d.name), samples, failed) for d in decisions}
    return tuple(found[name] for name in (*seen, *(name for name in found if name not in seen)))


def _facts(model: nn.Module, decision: Swap | Skip, seen: _Seen | None, samples: int, failed: str | None) -> Facts:
    held = seen.held if seen else None
    if held is None and decision.site.module is not None:
        held = held_by(decision.site.module)
    shapes = tuple(dict.fromkeys(seen.shapes)) if seen else ()
    into, why_not = _fold(model, decision, shapes)
    written_out = decision.site.function == HAND_WRITTEN
    none = "it is written out in code, of which a watched forward pass shows no call" if written_out else _UNSEEN
    unseen = None if seen or decision.calls == 0 else failed or none
    return Facts(
        decision.name,
        shapes=shapes,
        callers=tuple(dict.fromkeys(seen.callers)) if seen else (),
        channels=held.channels if held else None,
        eps=held.eps if held else None,
        momentum=held.momentum if held else None,
        batches=held.batches if held else None,
        dead_channels=held.dead_channels if held else None,
        zero_weights=held.zero_weights if held else None,
        folds_into=into,
        why_not_folded=why_not,
        approximate=isinstance(decision, Swap) and decision.preserves == "approximate",
        written_by=tuple(seen.written_by) if seen else (),
        unseen=unseen,
        warnings=traps(held, decision.calls, shapes, samples, tuple(seen.written_by.values()) if seen else ()),
    )


# --- what it could fold into --------------------------------------------------------------------------------------------------------


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
    layer = decision.rule.build(decision.site, "log")  # which axes hold its channels, the rule alone knows
    axes: tuple[int, ...] = getattr(layer, "channel_axis", ())
    output = -1 - space  # the axis on which a conv or linear puts its channels, from the end
    if len(axes) == 1 and (axes[0] == output or {axes[0] - len(shape) for shape in shapes if axes[0] >= 0} == {output}):
        return name, None
    if len(axes) == 1 and axes[0] >= 0 and not shapes and space:
        return name, None  # a batch of images, as nothing says otherwise
    return (
        None,
        f"its channels are not known to be those of {name}" if not shapes else f"its channels lie on another axis than those of {name}",
    )


def _space(producer: nn.Module) -> int:
    """How many axes of a producer's output come after its channels."""
    return len(getattr(producer, "kernel_size", ()))


def _source(model: fx.GraphModule, site: Site) -> tuple[str, int] | None:
    """The call of a conv or linear function, with a constant weight, that feeds a functional norm of a graph and nothing else."""
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


def _watched(model: nn.Module, sites: Sequence[Site], arguments: Forward | None) -> tuple[dict[str, _Seen], str | None]:
    """What was seen of each site that was reached, and why not more was."""
    if arguments is None:
        return {}, "no example inputs are known, so no forward pass was watched"
    try:
        copied = copy_for_running(model)
    except SwapError as error:
        return {}, error.message
    watch = _Watch(copied, sites)
    failed = watch.run(*arguments)
    return watch.result(), None if failed is None else f"the watched forward pass stopped before it: {described(failed)}"


@contextlib.contextmanager
def _random_state_kept() -> Iterator[None]:
    state = random.getstate(), np.random.get_state()
    try:
        with torch.random.fork_rng():
            yield
    finally:
        random.setstate(state[0])
        np.random.set_state(state[1])


class _Watch(TorchFunctionMode):
    """Watches one forward pass of a model that nobody else uses."""

    def __init__(self, model: nn.Module, sites: Sequence[Site]) -> None:
        super().__init__()
        self.model, self.sites = model, sites
        self.names = {id(module): name for name, module in model.named_modules()}
        in_code = {site.name for site in sites if site.function is not None}
        modules = dict(model.named_modules(remove_duplicate=False))
        self.norms = {id(modules[site.name]): site.name for site in sites if site.name in modules and site.name not in in_code}
        self.stack: list[nn.Module] = []
        self.calls: list[tuple[str, _Seen]] = []  # the site of a module, or "owner function" of a call in code
        # Where each norm's output lies, at which version. The weak reference keeps the address from being used again, not the data.
        self.outputs: dict[int, tuple[StorageWeakRef, int, _Seen]] = {}

    def run(self, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> Exception | None:
        for module in self.model.modules():
            if not isinstance(module, torch.jit.ScriptModule):
                module.register_forward_pre_hook(self._enter, with_kwargs=True)
                module.register_forward_hook(self._leave, with_kwargs=True, always_call=True)
        try:
            with _random_state_kept(), torch.no_grad(), uncompiled(), self:
                self.model(*args, **kwargs)
        except Exception as error:  # the user's model may raise anything; what was seen until then stays true
            return error
        return None

    def result(self) -> dict[str, _Seen]:
        """By site, what was seen of it, in the order of the first calls."""
        groups: dict[str, list[_Seen]] = {}
        for key, call in self.calls:
            groups.setdefault(key, []).append(call)
        names = {key: self._names_of(key, len(calls)) for key, calls in groups.items()}
        taken = dict.fromkeys(groups, 0)
        found: dict[str, _Seen] = {}
        for key, call in self.calls:
            if names[key]:
                name = names[key][taken[key] % len(names[key])]
                taken[key] += 1
                into = found.setdefault(name, _Seen(held=call.held))
                into.shapes += call.shapes
                into.callers += call.callers
                into.written_by.update(call.written_by)
        return found

    def _names_of(self, key: str, count: int) -> list[str]:
        """The sites that `count` calls under one key belong to, in the order of the calls; none if that is not clear."""
        if not key.startswith(_CODE):
            return [key]
        owner, _, function = key.removeprefix(_CODE).partition(" ")
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

    def _inside_norm(self) -> bool:
        return any(id(module) in self.norms for module in self.stack)

    def _enter(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        if id(module) in self.norms and not self._inside_norm():
            given = next(_tensors((args, kwargs)), None)
            shapes = [] if given is None else [tuple(given.shape)]
            self.calls.append((self.norms[id(module)], _Seen(shapes, [self._owner()])))
        self.stack.append(module)

    def _leave(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], output: Any) -> None:
        if self.stack:
            self.stack.pop()
        if id(module) in self.norms and not self._inside_norm():
            self._put_out(output, self.calls[-1][1])

    def __torch_function__(self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Mapping[str, Any] | None = None) -> Any:
        kwargs = kwargs or {}
        if self._inside_norm():
            return func(*args, **kwargs)
        function = functional.name_of(func)
        held = given_to(function, functional.bind(func, args, kwargs)) if function else None  # before the call may update statistics
        result = func(*args, **kwargs)
        for tensor in _tensors((args, kwargs)):
            self._read(tensor, func)
        if function is not None:
            given = next(_tensors((args, kwargs)), None)
            seen = _Seen([] if given is None else [tuple(given.shape)], [self._owner()], held=held)
            self.calls.append((f"{_CODE}{self._owner()} {function}", seen))
            self._put_out(result, seen)
        return result

    def _put_out(self, output: Any, seen: _Seen) -> None:
        tensor = next(_tensors(output), None)
        storage = None if tensor is None else _storage(tensor)
        if tensor is not None and storage is not None:
            reference = StorageWeakRef(storage)  # type: ignore[no-untyped-call]
            self.outputs[reference.cdata] = (reference, tensor._version, seen)

    def _read(self, tensor: Tensor, func: Any) -> None:
        """A function was given this tensor; if it wrote to it, its version counter says so, and views share the counter."""
        storage = _storage(tensor) if self.outputs else None
        known = None if storage is None else self.outputs.get(storage._cdata)
        if storage is None or known is None or tensor._version == known[1]:
            return
        reference, _, seen = known
        self.outputs[storage._cdata] = (reference, tensor._version, seen)
        innermost = self.stack[-1] if self.stack else self.model
        name, what = self._owner(), func.__name__.partition(".")[0]
        if next(innermost.children(), None) is None and innermost is not self.model:
            seen.written_by[name] = type(innermost).__name__
        else:
            seen.written_by[f"{name}.{what}" if name else what] = what


def _is_call(site: Site, function: str) -> bool:
    """Whether a call of `function` may be one of the site: of what it names, or of what the `super().forward` that it names calls."""
    endings = tuple(f"{functional.KINDS.get(function, '?').replace('_', '')}{space}.forward" for space in ("", "1d", "2d", "3d"))
    return site.function is not None and (site.function == function or site.function.lower().endswith(endings))


_CODE = "\0"  # no module is called so


def _storage(tensor: Tensor) -> Any:
    """Where its data lies, or None where there is no such thing, or no version of it."""
    if tensor.is_inference() or tensor.layout is not torch.strided:
        return None
    return tensor.untyped_storage()


def _tensors(value: Any) -> Iterator[Tensor]:
    return (leaf for leaf in tree_leaves(value) if isinstance(leaf, Tensor))


def _natural(name: str) -> list[tuple[str, int]]:
    return [(text, int(number or 0)) for text, number in re.findall(r"(\D+)(\d*)", name)]
