"""Probes: the inputs at which two models are compared, made from one set of example inputs.

    the example inputs; a seeded batch of 1 and one of 3, or only one of 2 if the example is a batch of 1
    the batch of 1 with its floats x 1e-3, which leaves little but the biases, and x 1e3
    for ONNX files also: the batch of 1 with its floats all 3, at which sums cancel, and errors in the padding at borders show

Seeded floats are drawn from the example's own values, so ranges and masks stay the same; integers are whole rows of the example. If every
floating tensor of the example holds only one value (`torch.zeros(1, 3, 224, 224)`), different models may agree on it: then floats are drawn
from a normal distribution. The batch is the first axis if all tensors have the same size there; otherwise shapes stay and only the values
are drawn anew.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from normswap.models.copying import to_float64
from normswap.models.torch_private import tree_flatten, tree_map_only, tree_unflatten

LARGE = " x 1000"  # the end of the name of the probe with large inputs
FLAT = 3.0
Arguments = tuple[tuple[Any, ...], Mapping[str, Any]]
Values = dict[str, Tensor]


@dataclass(frozen=True)
class Probe:
    """One set of arguments for a forward pass.

    like_example   whether it has the example's shapes
    scaled         whether its floats are larger or smaller than the example's
    flat           whether its floats are all the same, so that sums cancel and borders show; for ONNX files, whose weights are new
    """

    name: str
    args: tuple[Any, ...]
    kwargs: Mapping[str, Any]
    like_example: bool = True
    scaled: bool = False
    flat: bool = False

    def mapped(self, function: Callable[[Tensor], Tensor]) -> Arguments:
        """The arguments with `function` applied to each tensor."""
        return _mapped((self.args, self.kwargs), function)

    def in_float64(self) -> Probe:
        args, kwargs = self.mapped(to_float64)
        return replace(self, args=args, kwargs=kwargs)

    def tensors(self) -> list[Tensor]:
        return [leaf for leaf in tree_flatten((self.args, dict(self.kwargs)))[0] if isinstance(leaf, Tensor)]


# Runs a model at one probe and returns (the model's outputs by name, the outputs of the compared layers by "name@call").
Runner = Callable[[Probe], tuple[Values, Values]]


def probes(args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> Iterator[Probe]:
    """All probes for one set of example inputs, of which the example itself is the first."""
    leaves, _ = tree_flatten((args, dict(kwargs)))
    batches = {leaf.shape[0] for leaf in leaves if isinstance(leaf, Tensor) and leaf.dim() > 0}
    batch = batches.pop() if len(batches) == 1 else None  # without one common first axis there is no batch axis to vary
    yield Probe("example", args, kwargs)
    single = _seeded(args, kwargs, batch, 1, seed=1)
    many = 2 if batch == 1 else 3
    one, more = (f"batch {n}" if batch is not None else f"seed {n}" for n in (1, many))
    if batch != 1:  # a batch of 1 is what the example is
        yield Probe(one, *single, like_example=batch is None)
    yield Probe(more, *_seeded(args, kwargs, batch, many, seed=2), like_example=batch in (None, many))
    for factor in (1e-3, 1e3):
        scaled = _mapped(single, functools.partial(_scaled, factor=factor))
        yield Probe(f"{one} x {factor:g}", *scaled, like_example=batch in (None, 1), scaled=True)
    if any(isinstance(leaf, Tensor) and leaf.is_floating_point() for leaf in leaves):
        same = _mapped(single, functools.partial(_filled, value=FLAT))
        yield Probe(f"{one}, all {FLAT:g}", *same, like_example=batch in (None, 1), scaled=True, flat=True)


def resized(args: tuple[Any, ...], kwargs: Mapping[str, Any], free: Sequence[Mapping[int, str]]) -> Iterator[tuple[str, Probe]]:
    """(axis, probe) for each dynamic axis except the batch: the example with twice the size on that axis, and with half of it.

    free: for each tensor of the arguments, number -> name of its dynamic axes. Values are repeated, or left out.
    """
    leaves, spec = tree_flatten((args, dict(kwargs)))
    tensors = [i for i, leaf in enumerate(leaves) if isinstance(leaf, Tensor)]
    axes = {name: leaves[i].shape[axis] for i, found in zip(tensors, free, strict=True) for axis, name in found.items() if axis}
    for name, size in axes.items():
        for other in dict.fromkeys((2 * size, max(size // 2, 1))):
            changed = list(leaves)
            for i, found in zip(tensors, free, strict=True):
                for axis in (axis for axis, known in found.items() if known == name):
                    changed[i] = changed[i].index_select(axis, torch.arange(other, device=changed[i].device) % size)
            resized_args, resized_kwargs = tree_unflatten(changed, spec)
            yield name, Probe(f"{name} {other}", resized_args, resized_kwargs, like_example=False)


def _mapped(arguments: Arguments, function: Callable[[Tensor], Tensor]) -> Arguments:
    args, kwargs = tree_map_only(Tensor, function, (arguments[0], dict(arguments[1])))
    return args, kwargs


def _scaled(tensor: Tensor, factor: float) -> Tensor:
    return tensor * factor if tensor.is_floating_point() or tensor.is_complex() else tensor


def _filled(tensor: Tensor, value: float) -> Tensor:
    return torch.full_like(tensor, value) if tensor.is_floating_point() else tensor


def _seeded(args: tuple[Any, ...], kwargs: Mapping[str, Any], batch: int | None, size: int, *, seed: int) -> Arguments:
    generator = torch.Generator().manual_seed(seed)
    tensors = [leaf for leaf in tree_flatten((args, dict(kwargs)))[0] if isinstance(leaf, Tensor)]
    blank = all(bool((t == t.reshape(-1)[:1]).all()) for t in tensors if t.is_floating_point() and t.dim() and t.numel())

    def redraw(tensor: Tensor) -> Tensor:
        resized = tensor.dim() > 0 and batch is not None
        shape = (size, *tensor.shape[1:]) if resized else tuple(tensor.shape)
        if tensor.numel() == 0:
            return tensor.new_zeros(shape)
        if blank and tensor.is_floating_point() and tensor.dim():
            return torch.randn(shape, generator=generator).to(tensor)
        if tensor.is_floating_point() or tensor.is_complex():
            index = torch.randint(tensor.numel(), (math.prod(shape),), generator=generator)
            return tensor.detach().reshape(-1)[index.to(tensor.device)].reshape(shape)
        return tensor[torch.arange(size, device=tensor.device) % tensor.shape[0]] if resized else tensor

    return _mapped((args, kwargs), redraw)
