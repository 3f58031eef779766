"""Runs a torch module at a probe, in its own dtype or in float64."""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterable, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from normswap.errors import SwapError
from normswap.models.float64 import in_float64
from normswap.models.torch_private import is_functorch_wrapped, keystr, tree_flatten_with_path
from normswap.models.watching import forward, held
from normswap.parity.limits import coarsest
from normswap.parity.measure import sampled
from normswap.parity.probes import Probe, Runner, Values


class DtypeRecorder(TorchFunctionMode):
    """Collects the dtypes in which a model computes, including those of autocast regions inside it."""

    def __init__(self, dtypes: set[torch.dtype]) -> None:
        super().__init__()
        self.dtypes = dtypes

    def __torch_function__(self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Mapping[str, Any] | None = None) -> Any:
        result = func(*args, **(kwargs or {}))
        if isinstance(result, Tensor):
            self.dtypes.add(result.dtype)
        return result


class OwnTensors(TorchFunctionMode):
    """Raises SwapError if a copy of a model reads a tensor of the original. foreign: id -> name of the original's tensors."""

    def __init__(self, foreign: Mapping[int, str]) -> None:
        super().__init__()
        self.foreign = foreign

    def __torch_function__(self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Mapping[str, Any] | None = None) -> Any:
        kwargs = kwargs or {}
        for value in (*args, *kwargs.values()):
            for tensor in value if isinstance(value, (list, tuple)) else (value,):
                if isinstance(tensor, Tensor) and id(tensor) in self.foreign:
                    raise SwapError(
                        f"it still uses {self.foreign[id(tensor)]} of the original, which a function that was made inside the model holds "
                        "(a lambda or a closure): copying a model does not copy such functions; make it a method"
                    )
        return func(*args, **kwargs)


def module_runner(
    model: nn.Module,
    sites: Sequence[str],
    mode: Callable[[], AbstractContextManager[Any]] = nullcontext,
) -> Runner:
    """Runs a model that nobody else uses: without gradients, with the generator seeded and then restored.

    sites: names of modules whose outputs are returned, too. mode: makes the context of each forward pass, for example `float64_mode`,
    `DtypeRecorder` or `OwnTensors`.
    """
    kept: Values = {}
    calls: dict[str, int] = {}

    def keep(name: str) -> Callable[..., None]:
        def record(module: nn.Module, args: Any, output: Any) -> None:
            # A tensor inside a vmap does not outlive it; the parts of a nested tensor have no common shape.
            if isinstance(output, Tensor) and not is_functorch_wrapped(output) and not output.is_nested:
                calls[name] = calls.get(name, 0) + 1
                kept[f"{name}@{calls[name]}"] = sampled(output)

        return record

    modules = dict(model.named_modules(remove_duplicate=False))
    for name in sites:
        if name in modules:
            modules[name].register_forward_hook(keep(name))

    def run(probe: Probe) -> tuple[Values, Values]:
        kept.clear()
        calls.clear()
        output = forward(model, probe.args, probe.kwargs, mode(), seed=0)
        return named_tensors(output), dict(kept)

    return run


def tensors_of(model: nn.Module) -> list[Tensor]:
    """The parameters and buffers."""
    return [*model.parameters(), *model.buffers()]


def own_dtype(model: nn.Module, probes: Iterable[Probe]) -> torch.dtype:
    """The coarsest floating dtype of a model's parameters and buffers, or, if it has none, of its inputs."""
    return coarsest(t.dtype for t in tensors_of(model) or [t for probe in probes for t in probe.tensors()])


def float64_mode(model: nn.Module, probes: Iterable[Probe]) -> Callable[[], AbstractContextManager[Any]]:
    """Makes a context in which the model computes in float64."""
    return functools.partial(in_float64, own_dtype(model, probes))


def named_tensors(output: Any, path: str = "output", within: tuple[int, ...] = ()) -> Values:
    """path -> tensor, for each tensor and number in a model's output, in order; also inside objects and mappings of any class."""
    found: Values = {}
    for keys, leaf in tree_flatten_with_path(output)[0]:
        name = f"{path}{keystr(keys)}"
        if isinstance(leaf, Tensor):
            found[name] = leaf.detach() if leaf.layout is torch.strided else leaf.detach().to_dense()
        elif isinstance(leaf, (bool, int, float)):
            found[name] = torch.tensor(leaf, dtype=torch.float64 if isinstance(leaf, float) else None)
        elif id(leaf) not in within:
            for key, value in held(leaf).items():
                step = f"[{key!r}]" if isinstance(leaf, Mapping) else f".{key}"
                found |= named_tensors(value, f"{name}{step}", (*within, id(leaf)))
    return found
