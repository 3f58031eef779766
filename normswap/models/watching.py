"""Runs one forward pass of a model without side effects, and can report which modules and functions it calls.

`forward` runs the pass. A `Watcher` also reports which modules run, inside which other modules, and which functions of torch they call.
"""

from __future__ import annotations

import dataclasses
import random
from collections.abc import Callable, Collection, Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager, nullcontext
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn.parameter import is_lazy
from torch.overrides import TorchFunctionMode

from normswap.models.copying import uncompiled
from normswap.models.torch_private import tree_leaves, tree_map_only


def forward(
    model: nn.Module,
    args: tuple[Any, ...],
    kwargs: Mapping[str, Any],
    within: AbstractContextManager[Any] | None = None,
    *,
    seed: int | None = None,
) -> Any:
    """The output of one forward pass, without gradients, uncompiled, on clones of the inputs, as a model may write into them.

    within: a context, such as a function mode, in which the model runs. seed: of torch's generators for the pass; None: they go on from
    where they are. All random states are restored. Exceptions of the model propagate.
    """
    with torch.no_grad(), _random_states_kept(model, args, kwargs), uncompiled():
        args, kwargs = tree_map_only(Tensor, torch.clone, (args, dict(kwargs)))
        with within or nullcontext():
            if seed is not None:
                manual_seed(seed)
            return model(*args, **kwargs)


@contextmanager
def buffers_kept(model: nn.Module, but: type[nn.Module]) -> Iterator[None]:
    """Restore what the model's forward passes in the block write into its buffers (a counter, a cache). but: modules whose buffers stay."""
    modules = [m for m in model.modules() if not isinstance(m, (but, torch.jit.ScriptModule))]
    kept = [(m, name, b, b.detach().clone()) for m in modules for name, b in m._buffers.items() if b is not None and not is_lazy(b)]
    try:
        yield
    finally:
        with torch.no_grad():
            for module, name, buffer, value in kept:
                if not torch.equal(buffer, value):
                    buffer.copy_(value)
                module._buffers[name] = buffer


def manual_seed(seed: int) -> None:
    """torch.manual_seed, of the devices that are in use.

    That of torch also notes the seed for an accelerator that has not been used yet, which would then start with it and not with the user's.
    And to note it, it formats the whole stack, which takes longer than a forward pass of a small model.
    """
    if torch.cuda.is_initialized() or torch.xpu.is_initialized() or torch.backends.mps.is_available():  # type: ignore[no-untyped-call]
        torch.manual_seed(seed)
    else:
        torch.default_generator.manual_seed(seed)


@contextmanager
def _random_states_kept(model: nn.Module, *given: Any) -> Iterator[None]:
    """Restore the random states of Python, numpy, and torch on the CPU and on the devices of the model and its inputs."""
    states = random.getstate(), np.random.get_state()
    tensors = (*model.parameters(), *model.buffers(), *tensors_in(given)) if torch.cuda.is_initialized() else ()  # type: ignore[no-untyped-call]
    try:
        with torch.random.fork_rng({tensor.device.index for tensor in tensors if tensor.is_cuda}):
            yield
    finally:
        random.setstate(states[0])
        np.random.set_state(states[1])


def held(leaf: Any) -> Mapping[Any, Any]:
    """What an object holds that is no container of torch's: a dataclass its fields, a mapping its items, another its attributes."""
    if isinstance(leaf, (Tensor, type, nn.Module)):
        return {}
    if dataclasses.is_dataclass(leaf):
        return {field.name: getattr(leaf, field.name) for field in dataclasses.fields(leaf)}
    if isinstance(leaf, Mapping):
        return leaf
    return vars(leaf) if hasattr(leaf, "__dict__") and not callable(leaf) else {}


def tensors_in(value: Any, seen: set[int] | None = None) -> Iterator[Tensor]:
    """The tensors in nested containers and in objects of any class, which models may take and return. seen: the ids of these objects."""
    seen = set() if seen is None else seen
    for leaf in tree_leaves(value):
        if isinstance(leaf, Tensor):
            yield leaf
        elif (parts := held(leaf)) and id(leaf) not in seen:
            seen.add(id(leaf))
            yield from tensors_in(list(parts.values()), seen)


def input_of(args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> Tensor:
    """What a layer of one input is called on, also if by keyword."""
    return args[0] if args else next(iter(kwargs.values()))  # type: ignore[no-any-return]


class Watcher(TorchFunctionMode):
    """Watches one forward pass of a model that nobody else uses. A subclass overrides `entered`, `left` and `called`.

    stack   the modules whose forward is running, the outermost first
    opaque  the ids of modules that are seen as a whole: nothing that happens inside them is reported
    """

    def __init__(self, model: nn.Module, opaque: Collection[int] = ()) -> None:
        super().__init__()
        self.model, self.opaque = model, opaque
        self.stack: list[nn.Module] = []

    def entered(self, module: nn.Module, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> None:
        """The forward of a module is about to run; it is not on the stack yet."""

    def left(self, module: nn.Module, output: Any) -> None:
        """The forward of a module has returned; the module is no longer on the stack."""

    def called(self, function: Callable[..., Any], args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> Any:
        """The code of a module calls a function of torch. Has to make the call, and to return its result."""
        return function(*args, **kwargs)

    def run(self, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> tuple[Any, Exception | None]:
        """Run the pass; (the output, None), or (None, the exception that the model raised)."""
        handles: list[Any] = []
        for module in self.model.modules():
            if not isinstance(module, torch.jit.ScriptModule):
                handles.append(module.register_forward_pre_hook(self._enter, with_kwargs=True))
                handles.append(module.register_forward_hook(self._leave, always_call=True))
        try:
            return forward(self.model, args, kwargs, within=self), None
        except Exception as error:  # the user's model may raise anything
            return None, error
        finally:
            for handle in handles:
                handle.remove()

    def _hidden(self) -> bool:
        return any(id(module) in self.opaque for module in self.stack)

    def _enter(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        if not self._hidden():
            self.entered(module, args, kwargs)
        self.stack.append(module)

    def _leave(self, module: nn.Module, args: tuple[Any, ...], output: Any) -> None:
        if self.stack and self.stack[-1] is module:  # if an earlier pre-hook raised, this hook runs without `_enter`
            self.stack.pop()
        if not self._hidden():
            self.left(module, output)

    def __torch_function__(self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Mapping[str, Any] | None = None) -> Any:
        return func(*args, **(kwargs or {})) if self._hidden() else self.called(func, args, kwargs or {})
