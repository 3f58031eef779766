"""The back-end "walk" of `trace`: records norms, their order, calls, producers and readers in one watched forward pass.

It does not see code that this pass does not execute, nor what code computes from Python numbers taken out of a tensor.
"""

from __future__ import annotations

import dataclasses
from collections import Counter
from collections.abc import Callable, Mapping, MutableMapping, Sequence
from dataclasses import dataclass
from typing import Any

from torch import Tensor, nn
from torch.utils.weak import WeakTensorKeyDictionary

from normswap.detect import functional
from normswap.detect.backend import Names, Seen
from normswap.detect.handwritten import ELEMENTWISE, HAND_WRITTEN, LENGTHS, REDUCTIONS, SCALES
from normswap.detect.producers import ELSEWHERE, OTHER_INPUT, Product, product_of, source_of, why_holding, why_other, why_several
from normswap.models.watching import Watcher, tensors_in


@dataclass
class _Output:
    """The result of a call of a conv or linear function in the code of `maker`, and how often it was read.

    why_not: why it is not the W x + b of `maker`, or `maker` no producer, as a clause about `maker`; else None.
    """

    maker: nn.Module
    why_not: str | None
    uses: int = 0


# Functions that return no tensor but read a tensor's values, so they count as uses. Others that return no tensor (shape, dtype) do not.
_VALUES = frozenset({"item", "tolist", "numpy", "__bool__", "__float__", "__int__", "__index__", "__array__", "__contains__"})

_ROOTS = frozenset({"rsqrt", "sqrt", "std", "rsqrt_", "sqrt_"})


def _may_be_root(function: str, args: tuple[Any, ...]) -> bool:
    """Whether the call may be the square root of a hand-written norm; the graph of the calling module decides whether it is."""
    return function in _ROOTS or (function in ("pow", "__pow__") and any(a in (0.5, -0.5) for a in args if type(a) is float))


_STATISTIC, _ROOT = 1, 2


def _plain_name(function: str) -> str:
    """The name of an operation without reflected and in-place forms: `__rtruediv__` is truediv, `mul_` is mul."""
    name = function.strip("_")
    return name[1:] if name in ("rmul", "rdiv", "rtruediv", "radd") else name


class Walk(Watcher):
    """Watches one forward pass of a model: norm calls, functional norms, and who else uses a conv's output."""

    def __init__(self, model: nn.Module, names: Names) -> None:
        super().__init__(model, opaque=names.norms.keys())
        self.names, self.seen = names, Seen()
        self.hooked = {key for key, module in names.norms.items() if module._forward_pre_hooks}  # before this pass puts its own hooks there
        self.parameters = {id(p): key for key in names.unfit for p in names.modules[key].parameters(recurse=False)}
        self.outputs: MutableMapping[Tensor, _Output] = WeakTensorKeyDictionary()
        # tensors that depend on parameters and buffers alone: a weight that is standardised is not an activation
        self.fixed: MutableMapping[Tensor, None] = WeakTensorKeyDictionary()
        self.fixed.update(dict.fromkeys((*model.parameters(), *model.buffers())))
        self.roots: MutableMapping[Tensor, int] = WeakTensorKeyDictionary()  # tensor -> _STATISTIC of activations, or _ROOT of one
        self.runs: Counter[int] = Counter()  # id of a module -> calls of a conv or linear function in its code
        self.other_reads: Counter[int] = Counter()  # id of a conv or linear layer -> how often code reads a parameter of it besides
        # name of a norm or number of a hit -> the result that it reads, and the norm or the module that calls it
        self.fed: dict[str | int, tuple[_Output, nn.Module]] = {}

    def result(self, output: Any) -> Seen:
        """Everything that was seen. output: of the model; returning a tensor counts as a use of it."""
        self._use(output)
        for place, (given, reader) in self.fed.items():
            maker = given.maker
            several = why_several(self.runs[id(maker)], self.other_reads[id(maker)], given.uses)
            source = source_of(self.names.first(maker), given.why_not or why_holding(maker, reader) or several)
            if isinstance(place, int):
                self.seen.hits[place] = dataclasses.replace(self.seen.hits[place], source=source)
            else:
                self.seen.sources[place] = source
        return self.seen

    def _use(self, value: Any) -> None:
        for tensor in tensors_in(value):
            if tensor in self.outputs:
                self.outputs[tensor].uses += 1

    def _feed(self, place: str | int, given: Any, reader: nn.Module) -> None:
        """Remember the result of a conv or linear function, if any, that a norm is called on.

        place: the name of the norm, or the number of the hit. reader: the norm, or the module that calls it.
        """
        first = next(tensors_in(given), None)
        if first is not None and first in self.outputs:
            self.fed[place] = self.outputs[first], reader

    def entered(self, module: nn.Module, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> None:
        if id(module) in self.names.norms:
            self._use((args, kwargs))
            hooked = id(module) in self.hooked
            self.seen.call(self.names.first(module), OTHER_INPUT if hooked else ELSEWHERE)
            if not hooked:
                self._feed(self.names.first(module), (args, kwargs), module)

    def called(self, function: Callable[..., Any], args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> Any:
        given = list(tensors_in((args, kwargs)))
        owner = self.names.first(self.stack[-1]) if self.stack else ""
        for tensor in given:
            if id(tensor) in self.names.statistics:
                self.seen.read(self.names.first(self.names.statistics[id(tensor)]), f"the forward of {owner or type(self.model).__name__}")
        fixed = bool(given) and all(tensor in self.fixed for tensor in given)
        norm = functional.name_of(function)
        if norm and not fixed:
            self._feed(self.seen.hit(owner, norm), (args, kwargs), self.stack[-1] if self.stack else self.model)
        elif not fixed and _may_be_root(function.__name__, args):
            self.seen.hit(owner, HAND_WRITTEN)
        result = function(*args, **kwargs)
        if fixed:
            self.fixed.update(dict.fromkeys(tensors_in(result)))
        elif not norm:
            self._suspect(owner, function.__name__, args, given, result)
        if result is None or function.__name__ in _VALUES or next(tensors_in(result), None) is not None:
            self._use(given)
            # A function that returns its argument reads no values, as a cast to the same dtype, unless it writes in place.
            if function.__name__.endswith("_") or not any(result is tensor for tensor in given):
                self._multiply(product_of(function.__name__, args, kwargs), given, result)
        return result

    def _multiply(self, product: Product | None, given: Sequence[Tensor], result: Any) -> None:
        """Record a call of a conv or linear function, if `product` is one, and which layers' parameters the function reads otherwise."""
        maker = self.stack[-1] if self.stack else self.model
        if product is not None and isinstance(result, Tensor):
            self.runs[id(maker)] += 1
            why_not = why_other(maker, product)
            self.outputs[result] = _Output(maker, self.names.unfit.get(id(maker)) or why_not)
            if why_not is None:
                given = [tensor for tensor in given if tensor is not product.weight and tensor is not product.bias]
        self.other_reads.update(self.parameters[id(tensor)] for tensor in given if id(tensor) in self.parameters)

    def _suspect(self, owner: str, function: str, args: tuple[Any, ...], given: list[Tensor], result: Any) -> None:
        """Mark statistics of activations and their roots, and `owner` as a suspect if a root scales a tensor."""
        name = _plain_name(function)
        marks = [0 if tensor in self.fixed else self.roots.get(tensor, 0) for tensor in given]
        if name in SCALES and len(given) == 2 and _ROOT in marks and not all(marks) and not any(tensor in self.fixed for tensor in given):
            self.seen.suspects[owner] = None
            return
        # x minus its mean is not a statistic: a result is one only if all its inputs that are not fixed are.
        others = [mark for tensor, mark in zip(given, marks, strict=True) if tensor not in self.fixed]
        mark = max(others, default=0) if name in ELEMENTWISE and all(others) else 0
        if name in REDUCTIONS:
            mark = _ROOT if name in ("std", "std_mean") else _STATISTIC
        elif name in LENGTHS or (mark and _may_be_root(name, args)):
            mark = _ROOT
        if mark:
            self.roots.update(dict.fromkeys(tensors_in(result), mark))
