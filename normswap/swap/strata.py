"""A TorchFunctionMode that shows which layers feed which: it labels the output of a layer, and every tensor computed from that output."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from torch import Tensor
from torch.overrides import TorchFunctionMode

from normswap.models.watching import tensors_in


class StratumLabels(TorchFunctionMode):
    """Labels each tensor with the number of the last stratum that it depends on. Tensors are kept alive, so that no id is reused."""

    def __init__(self) -> None:
        super().__init__()
        self.labels: dict[int, tuple[Tensor, int]] = {}

    def of(self, value: Any) -> int:
        """The last stratum that any tensor in `value` depends on; 0 for none."""
        return max((self.labels[id(t)][1] for t in tensors_in(value) if id(t) in self.labels), default=0)

    def mark(self, value: Any, label: int) -> None:
        """Label the tensors in `value` with the stratum `label`."""
        self.labels.update((id(tensor), (tensor, label)) for tensor in tensors_in(value))

    def __torch_function__(self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Mapping[str, Any] | None = None) -> Any:
        kwargs = kwargs or {}
        result = func(*args, **kwargs)
        label = self.of((args, kwargs))
        if label:
            self.mark(result, label)
            if args and getattr(func, "__name__", "") in ("__setitem__",):
                self.mark(args[0], label)
        return result
