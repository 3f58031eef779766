"""Swaps inside a user's class that is derived from a norm of torch: its `super().forward(x)` calls the new layer, and its code stays.

    class Guarded(nn.BatchNorm2d):
        def forward(self, x):
            if x.numel() > 0:                 # depends on the data, or on a mask, a rank, the mode: no graph holds all of it
                return super().forward(x)
            return x.new_empty(x.shape)

`put_under_super` lets `super().forward` call a layer instead: the object's class becomes one that is derived from its own, with a class
between the user's and torch's in the order in which Python looks methods up. Every guard and every branch runs as it was written, in eval
and in train mode, and at every batch size. The tensors that the norm had are gone from the object (its weight and bias are the layer's),
so code that would read the statistics fails loudly.

`under_super` says, before anything is changed, why such a swap would not be faithful: the code reads the statistics itself, calls a
normalizing function besides, or computes something else in a trial.
"""

from __future__ import annotations

import copy
import inspect
import types
import warnings
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, cast

import torch
from torch import Tensor, nn
from torch.nn.modules.lazy import LazyModuleMixin

from normswap.detect.functional import FUNCTIONS
from normswap.errors import described
from normswap.models.own_code import TENSORS, as_base, base_of, over_layer
from normswap.models.torch_private import tree_leaves
from normswap.models.watching import manual_seed

_STATISTICS = frozenset({"running_mean", "running_var", "num_batches_tracked"})
_AFFINE = frozenset({"weight", "bias"})
_EVERYTHING = frozenset({"__dict__", "_buffers", "_parameters", "state_dict", "named_buffers", "buffers"})
LAYER = "norm"
_FUNCTIONS = frozenset(name.rpartition(".")[2] for name, _ in FUNCTIONS.values())


def put_under_super(module: nn.Module, name: str, layer: nn.Module) -> None:
    """Make the `super().forward` in the class of `module` call `layer`, which becomes the child `name` of `module`. In place."""
    for tensor in TENSORS:
        module._parameters.pop(tensor, None)
        module._buffers.pop(tensor, None)
    module.add_module(name, layer)
    over_layer(module, name)


# --- whether the swap is faithful -------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Answer:
    """Whether a layer can take the place of `super().forward` in one module.

    why_not      a clause about the module's code that follows "because"; None if a layer can
    passes_on    whether, in every trial, super().forward got the module's own input
    """

    why_not: str | None
    passes_on: bool = False


def under_super(module: nn.Module) -> Answer:
    """Whether a layer can take the place of `super().forward` in a class that is derived from a norm of torch. Changes nothing."""
    base = base_of(module)
    if base is None or "forward" in module.__dict__:
        return Answer("its forward is not that of a class derived from a norm of torch")
    if isinstance(module, LazyModuleMixin) or hasattr(module, "parametrizations"):
        return Answer("it is lazy or parametrized")
    keeps = getattr(module, "running_mean", None) is not None
    names = own_names(type(module), base)
    if names is None:
        return Answer("its forward is no function of Python")
    reads = sorted(names & (_STATISTICS | _EVERYTHING | (frozenset() if keeps else _AFFINE)))
    if reads:
        return Answer(f"its code reads {_listed(reads)} itself")
    calls = sorted(names & (_FUNCTIONS | (frozenset() if keeps else {base.__name__})))
    if calls:
        return Answer(f"its code calls {_listed(calls)} itself")
    return _tried(module, base)


def _listed(names: list[str]) -> str:
    return " and ".join(filter(None, (", ".join(names[:-1]), names[-1])))


def own_names(cls: type, base: type) -> set[str] | None:
    """Every attribute, global and string constant in the `forward` of a class derived from `base`, and in the methods that it may call.

    Without those of `base` and its bases. None if such a forward is no function of Python, so that nobody knows.
    """
    names = set[str]()
    for function in _functions(cls, base):
        if not isinstance(function, types.FunctionType):
            return None
        names |= _named_in(function.__code__)
    return names


def _functions(cls: type, base: type) -> Iterator[Any]:
    """The functions behind `forward` in the user's classes (those before `base`), and behind every method that it may call, undecorated."""
    own = cls.__mro__[: cls.__mro__.index(base)]
    queue, seen = ["forward"], set[str]()
    while queue:
        name = queue.pop()
        if name in seen:
            continue
        seen.add(name)
        for holder in own:
            member = vars(holder).get(name)
            member = member.fget if isinstance(member, property) else getattr(member, "__func__", member)
            if (name == "forward" and member is not None) or isinstance(member, types.FunctionType):
                function = inspect.unwrap(member)
                yield function
                queue += sorted(_named_in(function.__code__)) if isinstance(function, types.FunctionType) else []


def _named_in(code: types.CodeType) -> set[str]:
    """Every attribute, global and string constant in code: of `x.running_mean` and of getattr(x, "running_mean") alike."""
    names = {*code.co_names, *(value for value in code.co_consts if isinstance(value, str))}
    for value in code.co_consts:
        if isinstance(value, types.CodeType):
            names |= _named_in(value)
    return names


def _tried(module: nn.Module, base: type[nn.Module]) -> Answer:
    """Try the swap with the norm itself as the layer: outputs must equal those of the unchanged module, in eval and in train mode."""
    try:
        plain, over = copy.deepcopy(module), copy.deepcopy(module)
        layer = as_base(over, base)
        put_under_super(over, LAYER, layer)
    except Exception as error:  # the user's class may raise anything
        return Answer(f"a copy of it cannot be made to try it ({described(error)})")
    for part in (*plain.modules(), *over.modules()):
        part._forward_hooks.clear()
        part._forward_pre_hooks.clear()
    given: list[Any] = []
    layer.register_forward_pre_hook(lambda _, args: given.append(args[0]))
    taken, passes_on = False, True
    for shape in _shapes(layer):
        for training in (False, True):
            x = torch.randn(shape, generator=torch.Generator().manual_seed(0)).to(_like(layer))
            given.clear()
            expected, found = (_run(part.train(training), x) for part in (plain, over))
            if expected is None:  # another shape was expected
                break
            if found is None or not _same(expected, found):
                return Answer("its code reaches the norm otherwise than by super().forward(x)")
            if not given:
                mode = "train" if training else "eval"
                return Answer(f"its code does not call super().forward in {mode} mode" + (" as it does in eval mode" if training else ""))
            taken = True
            passes_on = passes_on and all(value is x for value in given)
    if not taken:
        return Answer("it takes none of the inputs that it was tried with")
    return Answer(None, passes_on)


def _shapes(layer: nn.Module) -> Iterator[tuple[int, ...]]:
    size = getattr(layer, "normalized_shape", None)
    if size is not None:
        yield from ((3, 5, *size), (1, 5, *size), (3, *size), (3, 2, 4, *size))
        return
    channels = cast(int, getattr(layer, "num_features", None) or getattr(layer, "num_channels", 0))
    for batch in (3, 1):
        yield from ((batch, channels, *space) for space in ((4, 2), (5,), (), (2, 3, 2)))


def _like(layer: nn.Module) -> Tensor:
    tensors = (t for t in (*layer.buffers(), *layer.parameters()) if t.is_floating_point())
    return next(tensors, torch.zeros(()))


def _run(module: nn.Module, x: Tensor) -> list[Any] | None:
    """The tensors that a module returns for x itself, not for a clone: it is seen whether x reaches the norm. None if it fails."""
    devices = [x.device] if x.device.type == "cuda" else []
    with torch.no_grad(), torch.random.fork_rng(devices), warnings.catch_warnings():
        warnings.simplefilter("ignore")
        manual_seed(0)
        try:
            return tree_leaves(module(x))
        except Exception:  # the user's code may raise anything
            return None


def _same(expected: list[Any], found: list[Any]) -> bool:
    def same(a: Any, b: Any) -> bool:
        if isinstance(a, Tensor) and isinstance(b, Tensor):
            return a.shape == b.shape and a.dtype == b.dtype and torch.allclose(a, b, rtol=0, atol=0, equal_nan=True)
        return type(a) is type(b)

    return len(expected) == len(found) and all(map(same, expected, found))
