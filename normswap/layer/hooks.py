"""The two hooks of a producer, the conv or linear that a layer is coupled to: around its forward pass in train mode.

    Before   `Interception` begins, where the two can be computed as one (`BatchlessNorm.fuses`, `pair`); elsewhere the mean of the
             producer's input is recorded for the norm
    After    it ends

The producer stays what it is: its class, its keys, its other hooks and its code, which may pad or otherwise prepare its input. Only its
call of a convolution with its own weight is computed in another way.
"""

from __future__ import annotations

import weakref
from collections.abc import Mapping
from types import MappingProxyType
from typing import Any

import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from normswap.layer import pair
from normswap.layer.producer import channel_mean, without_autocast


class _Hook:
    """An object, so that copies and pickles keep it.

    It refers to the norm weakly, as the norm refers to the producer. A reference cycle would keep an unused copy of a model alive until the
    garbage collector runs, and a copy that shares the model's parameters would take part in optimizer steps until then.
    """

    def __init__(self, norm: Any) -> None:
        self._norm = weakref.ref(norm)

    @property
    def norm(self) -> Any:
        return self._norm()

    def __getstate__(self) -> dict[str, Any]:
        return {"norm": self.norm}

    def __setstate__(self, state: dict[str, Any]) -> None:
        norm = state["norm"]
        self._norm = (lambda: None) if norm is None else weakref.ref(norm)  # type: ignore[assignment]


class Before(_Hook):
    """The forward pre-hook."""

    def __call__(self, producer: nn.Module, args: tuple[Any, ...], kwargs: Mapping[str, Any] = MappingProxyType({})) -> None:
        # kwargs has a default, as torch.ao.quantization registers the hook at the quantization-aware layer without with_kwargs.
        norm = self.norm
        if norm is None or not norm.measures_input:
            return
        x = args[0] if args else kwargs["input"]
        if norm.fuses(producer):
            norm.run.here.interception = interception = Interception(producer, norm, x)
            interception.__enter__()  # type: ignore[no-untyped-call]
        else:
            norm.run.record_call(input_mean=channel_mean(producer, x, norm.run.mask))


class After(_Hook):
    """The forward hook, which is called also if the forward pass fails."""

    def __call__(self, producer: nn.Module, args: Any, output: Any) -> None:
        norm = self.norm
        if norm is None or torch.compiler.is_compiling():
            return
        here = norm.run.here
        interception, here.interception = here.interception, None
        if interception is not None:
            interception.__exit__(None, None, None)
            # A producer that did not fail and did not call a convolution with its weight as it is. (Of one that failed, output is None.)
            if output is not None and not interception.computed:
                norm.run.record_call(input_mean=channel_mean(producer, interception.x, norm.run.mask))


def hooked(producer: nn.Module, norm: nn.Module) -> bool:
    """Whether hooks of others may see or change what passes between a producer and its norm."""
    ours = [hook for hook in producer._forward_hooks.values() if isinstance(hook, After)]
    if len(ours) != 1 or ours[0].norm is not norm:
        return True  # another norm is coupled to it, too
    of_producer = len(producer._forward_hooks) > 1, producer._backward_hooks, producer._backward_pre_hooks
    of_norm = norm._forward_pre_hooks, norm._backward_hooks, norm._backward_pre_hooks
    return any(of_producer) or any(of_norm) or torch.nn.modules.module._has_any_global_hook()  # type: ignore[no-untyped-call]


def others(module: nn.Module) -> bool:
    """Whether a module has forward hooks besides those of coupled norms."""
    return any(not isinstance(hook, After) for hook in module._forward_hooks.values())


def release(producer: nn.Module, norm: object = None) -> None:
    """Remove the hooks of `norm` from a producer; None: those of all norms that are no longer coupled to it."""
    for hooks in (producer._forward_pre_hooks, producer._forward_hooks):
        for key, hook in list(hooks.items()):
            if isinstance(hook, _Hook) and (hook.norm is norm or (norm is None and getattr(hook.norm, "producer", None) is not producer)):
                del hooks[key]
                producer._forward_pre_hooks_with_kwargs.pop(key, None)
                producer._forward_hooks_always_called.pop(key, None)


class Interception(TorchFunctionMode):
    """While a producer runs, its call of a convolution or linear with its own weight is computed as the pass of the pair."""

    def __init__(self, producer: nn.Module, norm: Any, x: Tensor) -> None:
        super().__init__()
        self.producer, self.norm, self.x, self.computed = producer, norm, x, False

    def __torch_function__(self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        found = pair.call_of(func, args, kwargs)
        if found is None or found[1] is not self.producer.weight:
            return func(*args, **kwargs)
        x, weight, bias, call = found
        device = x.device.type
        if torch.is_autocast_enabled(device):
            x = x.to(torch.get_autocast_dtype(device))
        single = call.dims > 0 and x.dim() == call.dims + 1  # one sample, without an axis for samples
        with without_autocast(device):
            seen = channel_mean(self.producer, self.x)
            y: Tensor = self.norm.paired(x[None] if single else x, weight, bias, call, seen)
        y = y[0] if single else y
        self.computed = True
        self.norm.run.record_call(pair=y)
        return y
