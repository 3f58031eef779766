r"""How far a converted model is from its original on a batch: at each norm, and at the outputs.

    error(y, t) = mean over samples and positions of |y - t|^2 / V        V: the variance of t, summed over channels

y is what a norm, or the model, puts out in the converted model, and t the same of the original. V is measured once, on the held-out
batches. Of (N, T, ...), positions where a batch's "attention_mask" is 0 do not count. Numbers of t that are not finite (a masked logit)
count as if y were the same.

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
from normswap.models.torch_private import in_bfloat16, tree_map_only
from normswap.models.watching import tensors_in

CONSTANT = 1e-12  # a variance below this share of the mean square is that of one sample, or of a constant: the mean square stands in


class Seen(NamedTuple):
    """What one forward pass put out.

    norms    by the name of a norm, its output in each call
    outputs  the floating tensors that the model returns, in order; a complex one as its real and imaginary parts
    result   what the model returns
    """

    norms: Mapping[str, Sequence[Tensor]]
    outputs: Sequence[Tensor]
    result: Any


class Errors(NamedTuple):
    """The mean error of the norms and that of the outputs, for one batch."""

    norms: Tensor
    outputs: Tensor

    @property
    def both(self) -> Tensor:
        return self.norms + self.outputs


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

    def __call__(self, batch: Any, *, fast: bool = False) -> Seen:
        """Run the model on clones of what the batch has, as a model may write into its inputs. fast: in bfloat16, but for its outputs."""
        args, kwargs = tree_map_only(Tensor, torch.clone, arguments_of(batch, self.model))
        self._seen = {}
        with told("data"):
            if fast:
                with in_bfloat16():
                    result = tree_map_only(Tensor, _widened, self.model(*args, **kwargs))
            else:
                result = self.model(*args, **kwargs)
        outputs = [_real(t) for t in tensors_in(result) if t.layout is torch.strided and t.dim()]
        outputs = [t for t in outputs if t.is_floating_point()]
        if not outputs:
            raise UsageError("the model returns no floating tensor of samples, so there is no output to bring close to the original's")
        return Seen(self._seen, outputs, result)


class Scales:
    """What the original's norms and outputs vary by, over the batches that it was given: sum over channels of the variance."""

    def __init__(self, axes: Mapping[str, tuple[int, ...]]) -> None:
        self.axes = axes  # by the name of a norm, the axes of its channels
        self._sums: dict[tuple[str, int], list[Any]] = {}  # (name, number of the call), "" for outputs -> [rows, sum t, sum t^2, finite]
        self._loose: set[tuple[str, int]] = set()  # those whose last axis has another size in each batch (places, in a map of attention)
        self._scale = functools.cache(self._measured)  # which nothing is added to once it is read

    def add(self, teacher: Seen, batch: Any) -> None:
        """Add what the original put out for one batch."""
        for key, t in _named(teacher):
            t, channels = counted(t, mask_in(batch), self._axes(key))
            free = [axis for axis in range(t.dim()) if axis not in channels]
            finite = t.isfinite()
            t = t.double().where(finite, 0)
            rows = math.prod(t.shape[axis] for axis in free) if t.numel() else 0
            both = [*([self._sums[key]] if key in self._sums else []), [rows, t.sum(free), t.square().sum(), int(finite.sum())]]
            if len({sums[1].shape for sums in both}) > 1:
                self._loose.add(key)
                both = [[sums[0] * sums[1].numel(), sums[1].sum(), *sums[2:]] for sums in both]
            self._sums[key] = [sum(parts) for parts in zip(*both, strict=True)]

    def errors(self, student: Seen, teacher: Seen, batch: Any) -> Errors:
        """The errors of one batch."""
        mask, targets = mask_in(batch), dict(_named(teacher))
        found: dict[bool, list[Tensor]] = {True: [], False: []}
        for key, y in _named(student):
            if key not in targets or not self._sums.get(key, [0])[0]:  # nothing is known of what it varies by
                continue
            if y.shape != targets[key].shape:
                what = f"{key[0]} puts out" if key[0] else "the model returns"
                raise UsageError(
                    f"{what} a tensor of shape {tuple(y.shape)}, and in the original one of shape {tuple(targets[key].shape)}",
                    hint="is it the original that the model was converted from?",
                )
            (y, channels), (t, _) = (counted(each, mask, self._axes(key)) for each in (y, targets[key]))
            rows = max(t.numel() // max(math.prod(t.shape[axis] for axis in channels), 1), 1)  # of a batch of padding none counts
            difference = y - t if y.dtype == torch.float64 else y.float() - t.float()
            if not t.sum().isfinite():  # one pass over t, where looking at each number takes five
                difference = difference.where(t.isfinite(), 0)
            found[bool(key[0])].append(difference.square().sum() / (rows * self._scale(key)))
        device = student.outputs[0].device
        return Errors(*(torch.stack(found[norms]).mean() if found[norms] else torch.zeros((), device=device) for norms in (True, False)))

    def why_unknown(self) -> str | None:
        """Why the outputs cannot be brought close to the original's, as a sentence; None if they can."""
        outputs = [sums for (name, _), sums in self._sums.items() if not name]
        if not any(rows for rows, *_ in outputs):
            return "the held-out batches hold no position that counts"
        if any(rows and not finite for rows, *_, finite in outputs):
            return "an output of the original has no finite number on the held-out batches"
        return None

    def _axes(self, key: tuple[str, int]) -> tuple[int, ...]:
        return self.axes[key[0]] if key[0] else () if key in self._loose else (-1,)

    def _measured(self, key: tuple[str, int]) -> float:
        rows, total, squares, _ = self._sums[key]
        square, variance = float(squares) / rows, float(squares) / rows - float((total / rows).square().sum())
        return variance if variance > CONSTANT * square else square or 1.0


def _widened(t: Tensor) -> Tensor:
    return t.float() if t.dtype == torch.bfloat16 else t


def _real(t: Tensor) -> Tensor:
    return torch.view_as_real(t.resolve_conj()) if t.is_complex() else t


def _named(seen: Seen) -> Iterator[tuple[tuple[str, int], Tensor]]:
    for name, calls in (*seen.norms.items(), ("", seen.outputs)):
        yield from (((name, number), t) for number, t in enumerate(calls))


def counted(t: Tensor, mask: Tensor | None, axes: tuple[int, ...]) -> tuple[Tensor, set[int]]:
    """(the positions of t that count, the axes of its channels)."""
    channels = {axis % t.dim() for axis in axes} if t.dim() > 1 else set()
    if mask is not None and t.shape == mask.shape:  # a number for each position
        return t[mask.to(t.device)], set()
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
