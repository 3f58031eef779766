"""Records every operator that one forward pass executes, and how values pass between operators and modules.

An operator is one of aten's, as torch dispatches it: `linear` is a transposition and a product, whatever the model's Python looks like. A
value is one state of one tensor: after an operator has written into a tensor, the tensor is another value.
"""

from __future__ import annotations

import weakref
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode
from torch.utils.weak import WeakTensorKeyDictionary

from normswap.models.torch_private import OpOverload, TorchDispatchMode, name_in_aten, storage_key, tree_map_only, writes_into
from normswap.models.watching import forward, tensors_in


@dataclass(eq=False)
class Value:
    """One state of a tensor. Compared by identity.

    op, index  the operator that made it, and the number of its result; None for parameters, inputs and constants
    floating   whether its dtype is
    tensor     of a parameter or buffer of the model: that tensor; else None
    uses       (operator, number of the argument's place among the tensors it reads)
    returned   module calls that returned exactly this value; taken: (call, name or number of the argument) of those that it was given to
    spoiled    whether something reads it, or changes it, in a way that is not recorded
    """

    shape: tuple[int, ...]
    floating: bool
    op: Op | None = None
    index: int = 0
    tensor: Tensor | None = None
    uses: list[tuple[Op, int]] = field(default_factory=list)
    returned: list[ModuleCall] = field(default_factory=list)
    taken: list[tuple[ModuleCall, str | int]] = field(default_factory=list)
    is_output: bool = False
    spoiled: bool = False


@dataclass(eq=False)
class Op:
    """One executed operator. args, kwargs: with a Value in the place of each tensor. stack: the module calls that it runs in."""

    name: str
    args: tuple[Any, ...]
    kwargs: Mapping[str, Any]
    stack: tuple[ModuleCall, ...]
    inputs: list[Value] = field(default_factory=list)
    outputs: list[Value] = field(default_factory=list)


@dataclass(eq=False)
class ModuleCall:
    """One call of a module, under the first of its names."""

    module: nn.Module
    name: str
    alone: bool = False  # whether it returned one tensor, and nothing else


@dataclass
class Record:
    ops: list[Op]
    calls: list[ModuleCall]
    values: list[Value]
    failed: Exception | None = None


class Recorder(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """Records one forward pass of a model that nobody else uses."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.model = model
        self.names = {id(module): name for name, module in reversed(list(model.named_modules()))}
        self.own = {id(t): t for t in (*model.parameters(), *model.buffers())}
        self.values = WeakTensorKeyDictionary()
        self.record = Record([], [], [])
        self.stack: list[ModuleCall] = []
        self.in_storage: dict[int, list[weakref.ref[Tensor]]] = {}

    def run(self, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> Record:
        """Run the pass. What was seen of a pass that raised is in the record, too, with the exception in `failed`."""
        handles: list[Any] = []
        for module in self.model.modules():
            if not isinstance(module, torch.jit.ScriptModule):
                handles.append(module.register_forward_pre_hook(self._enter, with_kwargs=True, prepend=True))
                handles.append(module.register_forward_hook(self._leave))
        try:
            with _slow_attention(), _Taken(self):
                output = forward(self.model, args, kwargs, within=self)
            for tensor in tensors_in(output):
                self._of(tensor).is_output = True
        except Exception as error:  # the user's model may raise anything
            self.record.failed = error
        finally:
            for handle in handles:
                handle.remove()
        return self.record

    def _of(self, tensor: Tensor) -> Value:
        known = self.values.get(tensor)  # type: ignore[no-untyped-call]
        if known is None:
            known = self._new(tensor, Value(tuple(tensor.shape), tensor.is_floating_point(), tensor=self.own.get(id(tensor))))
        return known  # type: ignore[no-any-return]

    def _new(self, tensor: Tensor, value: Value) -> Value:
        self.values[tensor] = value
        self.record.values.append(value)
        if tensor.layout is torch.strided:
            self.in_storage.setdefault(storage_key(tensor), []).append(weakref.ref(tensor))
        else:
            value.spoiled = True
        return value

    def _enter(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        call = ModuleCall(module, self.names[id(module)])
        self.record.calls.append(call)
        self.stack.append(call)
        places: list[tuple[str | int, Any]] = [*enumerate(args), *kwargs.items()]
        for place, given in places:
            if isinstance(given, Tensor):
                self._of(given).taken.append((call, place))

    def _leave(self, module: nn.Module, args: tuple[Any, ...], output: Any) -> None:
        call = self.stack.pop()
        call.alone = isinstance(output, Tensor)
        for tensor in tensors_in(output):
            self._of(tensor).returned.append(call)

    def __torch_dispatch__(self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Mapping[str, Any] | None = None) -> Any:
        kwargs = dict(kwargs or {})
        if isinstance(func, OpOverload) and torch.is_inference_mode_enabled():
            with self:  # in which torch dispatches `linear` whole
                result = func.decompose(*args, **kwargs)
            if result is not NotImplemented:
                return result
        op = Op(name_in_aten(func) if isinstance(func, OpOverload) else str(func), (), {}, tuple(self.stack))
        given = list(tensors_in((args, kwargs)))
        op.inputs = [self._of(tensor) for tensor in given]
        op.args, op.kwargs = tree_map_only(Tensor, self._of, (args, kwargs))
        for number, value in enumerate(op.inputs):
            value.uses.append((op, number))
        result = func(*args, **kwargs)
        written = [t for t in writes_into(func, args, kwargs) if isinstance(t, Tensor)] if isinstance(func, OpOverload) else given
        for tensor in written:
            for other in (reference() for reference in self.in_storage.get(storage_key(tensor), ())):
                if other is not None and other is not tensor:
                    self._of(other).spoiled = True
        outputs = list(tensors_in(result))
        for number, tensor in enumerate(outputs):
            if any(tensor is t for t in written) or tensor not in self.values:
                op.outputs.append(self._new(tensor, Value(tuple(tensor.shape), tensor.is_floating_point(), op, number)))
            else:  # it returns its argument
                op.outputs.append(self.values[tensor])
        for tensor in written:
            if not any(tensor is out for out in outputs):
                self._of(tensor).spoiled = True
        self.record.ops.append(op)
        return result


class _Taken(TorchFunctionMode):
    """Marks the tensors whose numbers leave torch, for Python or numpy, without an operator that would be recorded."""

    def __init__(self, recorder: Recorder) -> None:
        super().__init__()
        self.recorder = recorder

    def __torch_function__(self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Mapping[str, Any] | None = None) -> Any:
        if getattr(func, "__name__", "") in _LEAVING and args and isinstance(args[0], Tensor):
            self.recorder._of(args[0]).spoiled = True
        return func(*args, **(kwargs or {}))


_LEAVING = frozenset({"numpy", "__array__", "tolist", "__dlpack__"})


@contextmanager
def _slow_attention() -> Iterator[None]:
    """Without the fused function for a whole layer of attention, which hides what is in it."""
    before = torch.backends.mha.get_fastpath_enabled()
    torch.backends.mha.set_fastpath_enabled(False)
    try:
        yield
    finally:
        torch.backends.mha.set_fastpath_enabled(before)
