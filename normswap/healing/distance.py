r"""How far a converted model is from its original on a batch: at each norm, and at the outputs.

    error(y, t) = mean over samples and positions of |y - t|^2 / V        V: the variance of t, summed over channels

y is what a norm, or the model, puts out in the converted model, and t the same of the original. V is measured once, on the held-out
batches. Of (N, T, ...), positions where a batch's "attention_mask" is 0 do not count.

    loss        mean over norms of error  +  mean over outputs of error          what the converted model is trained by
    distance    sqrt(mean over outputs and batches of error)                     what says how far it is: .1 is a tenth of what t varies by

Sources: hints at inner layers, Romero et al., "FitNets", arXiv:1412.6550; docs/heal.md has what each term was worth.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Collection, Iterator, Mapping, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from normswap.errors import UsageError
from normswap.models.batches import arguments_of, mask_of, told
from normswap.models.torch_private import tree_map_only
from normswap.models.watching import tensors_in

CONSTANT = 1e-12  # a variance below this share of the mean square is that of one sample, or of a constant: the mean square stands in


class Seen(NamedTuple):
    """What one forward pass put out.

    norms    by the name of a norm, its output in each call
    outputs  the floating tensors that the model returns, in order
    result   what the model returns
    """

    norms: Mapping[str, Sequence[Tensor]]
    outputs: Sequence[Tensor]
    result: Any


class Errors(NamedTuple):
    """The mean error of the norms and that of the outputs, for one batch."""

    norms: Tensor
    outputs: Tensor


class Side:
    """A model, and hooks that see what its norms put out. To be used as a context."""

    def __init__(self, model: nn.Module, norms: Collection[str]) -> None:
        self.model, self.norms = model, norms
        self._seen: dict[str, list[Tensor]] = {}
        self._handles: list[Any] = []

    def __enter__(self) -> Side:
        modules = dict(self.model.named_modules())
        self._handles = [modules[name].register_forward_hook(functools.partial(self._see, name)) for name in self.norms]
        return self

    def __exit__(self, *error: object) -> None:
        for handle in self._handles:
            handle.remove()

    def _see(self, name: str, module: nn.Module, args: tuple[Any, ...], output: Any) -> None:
        if isinstance(output, Tensor):  # a norm that is fused with a sum returns two
            self._seen.setdefault(name, []).append(output)

    def __call__(self, batch: Any) -> Seen:
        """Run the model on clones of what the batch has, as a model may write into its inputs."""
        args, kwargs = tree_map_only(Tensor, torch.clone, arguments_of(batch, self.model))
        self._seen = {}
        with told("data"):
            result = self.model(*args, **kwargs)
        outputs = [t for t in tensors_in(result) if t.is_floating_point() and t.dim()]
        if not outputs:
            raise UsageError("the model returns no floating tensor, so there is no output to bring close to the original's")
        return Seen(self._seen, outputs, result)


class Scales:
    """What the original's norms and outputs vary by, over the batches that it was given: sum over channels of the variance."""

    def __init__(self, axes: Mapping[str, tuple[int, ...]]) -> None:
        self.axes = axes  # by the name of a norm, the axes of its channels
        self._sums: dict[tuple[str, int], list[Any]] = {}  # (name, number of the call), "" for outputs -> [rows, sum t, sum t^2]
        self._scale = functools.cache(self._measured)  # which nothing is added to once it is read

    def add(self, teacher: Seen, batch: Any) -> None:
        """Add what the original put out for one batch."""
        for key, t in _named(teacher):
            t, channels = _counted(t, mask_in(batch), self._axes(key))
            free = [axis for axis in range(t.dim()) if axis not in channels]
            t = t.double()
            new = [math.prod(t.shape[axis] for axis in free), t.sum(free), t.square().sum()]
            self._sums[key] = new if key not in self._sums else [old + more for old, more in zip(self._sums[key], new, strict=True)]

    def errors(self, student: Seen, teacher: Seen, batch: Any) -> Errors:
        """The errors of one batch."""
        mask, targets = mask_in(batch), dict(_named(teacher))
        found: dict[bool, list[Tensor]] = {True: [], False: []}
        for key, y in _named(student):
            if key not in targets:
                continue
            (y, channels), (t, _) = (_counted(each, mask, self._axes(key)) for each in (y, targets[key]))
            rows = max(t.numel() // math.prod(t.shape[axis] for axis in channels), 1)  # of a batch of padding none counts
            difference = y - t if y.dtype == torch.float64 else y.float() - t.float()
            found[bool(key[0])].append(difference.square().sum() / (rows * self._scale(key)))
        outputs = torch.stack(found[False]).mean()
        return Errors(torch.stack(found[True]).mean() if found[True] else torch.zeros_like(outputs), outputs)

    def _axes(self, key: tuple[str, int]) -> tuple[int, ...]:
        return self.axes[key[0]] if key[0] else (-1,)

    def _measured(self, key: tuple[str, int]) -> float:
        rows, total, squares = self._sums[key]
        square, variance = float(squares) / rows, float(squares) / rows - float((total / rows).square().sum())
        return variance if variance > CONSTANT * square else square or 1.0


def _named(seen: Seen) -> Iterator[tuple[tuple[str, int], Tensor]]:
    for name, calls in (*seen.norms.items(), ("", seen.outputs)):
        yield from (((name, number), t) for number, t in enumerate(calls))


def _counted(t: Tensor, mask: Tensor | None, axes: tuple[int, ...]) -> tuple[Tensor, set[int]]:
    """(the positions of t that count, the axes of its channels)."""
    channels = {axis % t.dim() for axis in axes} if t.dim() > 1 else set()
    if mask is not None and t.shape[: mask.dim()] == mask.shape and channels.isdisjoint(range(mask.dim())):
        return t[mask.to(t.device)], {axis - mask.dim() + 1 for axis in channels}
    return t, channels


def mask_in(batch: Any) -> Tensor | None:
    """Which positions of a batch count; None for all."""
    return mask_of(batch) if isinstance(batch, Mapping) else None


def positions(batch: Any, model: nn.Module) -> int:
    """How many positions of a batch count: tokens of integer inputs (N, T), otherwise samples."""
    args, kwargs = arguments_of(batch, model)
    mask = mask_of(kwargs)
    if mask is not None:
        return int(mask.sum())
    first = next((t for t in tensors_in((args, dict(kwargs))) if t.dim()), None)
    if first is None:
        return 1
    return first.numel() if not first.is_floating_point() else len(first)
