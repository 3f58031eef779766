"""The linears around a layer, found by watching one forward pass: which one makes its input, and which ones read its output."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from normswap.models.copying import shared_parameters
from normswap.models.torch_private import written
from normswap.models.watching import forward, input_of, tensors_in

WIDEST = 8192  # inputs of a linear that may be found: what is summed of them has this number squared
ADD = ("add", "__add__", "__radd__", "add_", "__iadd__")


class Around(NamedTuple):
    """The linears around one layer, by name.

    producer   whose output is the layer's input x or one of the two parts of a sum that is; None if there is none
    alone      whether nothing but the layer reads x
    part       what is read of the layer's output, as in `y[:, 0]` for the first token, if nothing else is; None for all of it
    readers    those that read the layer's output, or that part of it; empty if anything else reads it, too
    """

    producer: str | None
    alone: bool
    readers: tuple[str, ...]
    part: tuple[Any, ...] | None = None


class _Pick(NamedTuple):
    """A reader that takes a part of a tensor: which, and what it becomes."""

    part: tuple[Any, ...]
    result: Any


class Wiring(TorchFunctionMode):
    """Watches a forward pass of a model in which each of `modules` is called, and finds what is around them.

    A tensor is known by its memory and shape, so that a dropout that does nothing does not hide it. A linear counts if it is used once, as
    a module, and shares no parameter.

    order   the names of `modules` in the order in which they are called
    """

    def __init__(self, model: nn.Module, modules: Mapping[str, nn.Module]) -> None:
        super().__init__()
        shared = shared_parameters(model)
        self.modules = modules
        self.order: list[str] = []
        self._linears = {name: m for name, m in model.named_modules() if _counts(m, shared)}
        self._owners = {id(p): name for name, m in self._linears.items() for p in m.parameters()}
        self._inside = 0  # how many of `modules` and of the linears are running
        self._alive: list[Tensor] = []  # so that no memory is used twice
        self._made: dict[Any, str] = {}  # tensor -> the linear that made it
        self._uses = dict.fromkeys(self._linears, 0)
        self._sums: dict[Any, list[Any]] = {}
        self._readers: dict[Any, list[str | _Pick | None]] = {}
        self._at: dict[str, tuple[Any, Any]] = {}  # name -> (x, y)
        self._untold = False  # whether there are tensors that do not tell if they were written into

    def run(self, model: nn.Module, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> dict[str, Around]:
        """What is around each module, by name."""
        handles: list[Any] = []
        for name, module in self.modules.items():
            handles += [module.register_forward_pre_hook(self._enter), module.register_forward_hook(self._leave(name), with_kwargs=True)]
        for name, module in self._linears.items():
            handles += [
                module.register_forward_pre_hook(self._reads(name), with_kwargs=True),
                module.register_forward_hook(self._makes(name)),
            ]
        try:
            for t in tensors_in(forward(model, args, kwargs, within=self)):
                self._readers.setdefault(_key(t), []).append(None)
        finally:
            for handle in handles:
                handle.remove()
        return {name: Around(None, False, ()) if self._untold else self._around(*at) for name, at in self._at.items()}

    def _around(self, x: Any, y: Any) -> Around:
        made = [self._made[part] for part in (x, *self._sums.get(x, ())) if part in self._made and part[1] == x[1]]
        made = [name for name in made if self._uses[name] == 1]
        readers, part = self._readers.get(y, []), None
        if len(readers) == 1 and isinstance(readers[0], _Pick):
            part, readers = readers[0].part, self._readers.get(readers[0].result, [])
        linears = tuple(name for name in readers if isinstance(name, str) and self._uses[name] == 1)
        return Around(made[-1] if made else None, len(self._readers.get(x, [])) <= 1, linears if len(linears) == len(readers) else (), part)

    def _enter(self, module: nn.Module, args: tuple[Any, ...]) -> None:
        self._inside += 1

    def _leave(self, name: str) -> Callable[..., None]:
        def hook(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], output: Tensor) -> None:
            self._inside -= 1
            self.order.append(name)
            x = input_of(args, kwargs)
            self._alive += (x, output)
            self._at[name] = _key(x), _key(output)
            self._readers.setdefault(_key(x), []).append(None)

        return hook

    def _reads(self, name: str) -> Callable[..., None]:
        def hook(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
            self._inside += 1
            self._uses[name] += 1
            self._readers.setdefault(_key(input_of(args, kwargs)), []).append(name)

        return hook

    def _makes(self, name: str) -> Callable[..., None]:
        def hook(module: nn.Module, args: tuple[Any, ...], output: Tensor) -> None:
            self._inside -= 1
            self._alive.append(output)
            self._made[_key(output)] = name

        return hook

    def __torch_function__(self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Mapping[str, Any] | None = None) -> Any:
        if self._inside:
            return func(*args, **(kwargs or {}))
        read = list(tensors_in((args, kwargs)))
        if any(t.is_inference() for t in read):
            self._untold = True
            return func(*args, **(kwargs or {}))
        versions = [written(t) for t in read]
        result = func(*args, **(kwargs or {}))
        keys, made = [_key(t) for t in read], list(tensors_in(result))
        changed = [key for key, t, version in zip(keys, read, versions, strict=True) if written(t) != version]
        if not changed and (not made or (len(made) == 1 and _key(made[0]) in keys)):
            return result  # it asks for a size or the like, or does nothing
        self._alive += made
        picks = getattr(func, "__name__", "") == "__getitem__" and len(read) == len(made) == 1 and _keeps_samples(args[1])
        reader = _Pick(args[1], _key(made[0])) if picks else None
        for key, t in zip(keys, read, strict=True):
            self._readers.setdefault(key, []).append(reader)
            if id(t) in self._owners:  # a weight that is used without its module
                self._uses[self._owners[id(t)]] += 2
        for key in changed:
            for known in (self._made, self._sums, self._readers):  # of what was there before
                known.pop(key, None)
        if getattr(func, "__name__", "") in ADD and len(keys) == 2 and not kwargs:
            self._sums[_key(made[0])] = keys
        return result


def weight_of(linear: nn.Module) -> Tensor:
    """The weight W of a linear that was found, (outputs, inputs): itself or a view of it."""
    weight: Any = linear.weight
    return weight.T if _is_transposed(linear) else weight  # type: ignore[no-any-return]


def _counts(module: nn.Module, shared: Mapping[int, Any]) -> bool:
    plain = type(module) is nn.Linear or _is_transposed(module)
    weight = module._parameters.get("weight")
    if not plain or weight is None or module._forward_hooks or module._forward_pre_hooks:
        return False
    return weight_of(module).shape[1] <= WIDEST and not any(id(p) in shared for p in module.parameters())


def _is_transposed(module: nn.Module) -> bool:
    """Whether a module is the linear of transformers that GPT-2 is made of, whose weight is (inputs, outputs)."""
    return type(module).__name__ == "Conv1D" and type(module).__module__.partition(".")[0] == "transformers"


def _keeps_samples(index: Any) -> bool:
    """Whether an index takes all samples, and the same part of each."""
    return isinstance(index, tuple) and len(index) > 1 and index[0] == slice(None) and all(isinstance(i, (int, slice)) for i in index)


def _key(t: Tensor) -> tuple[Any, ...]:
    place = t.data_ptr() if t.layout is torch.strided else id(t)  # others have no memory of their own
    return place, tuple(t.shape)
