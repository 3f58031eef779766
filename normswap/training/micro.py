"""A large batch in micro-batches: the same gradient, a part of the memory."""

from __future__ import annotations

import contextlib
import warnings
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.amp.grad_scaler import GradScaler
from torch.nn.modules.batchnorm import _BatchNorm

from normswap.errors import UsageError
from normswap.training.loss import check_is_module, layers_of


@dataclass(frozen=True)
class MicroBatches:
    """What `backward_in_micro_batches` did.

    loss              of the whole batch, detached
    sizes             the number of samples of each micro-batch, in order
    activation_bytes  the most that autograd kept for one backward pass, besides the parameters, the buffers and the batch
    """

    loss: Tensor
    sizes: tuple[int, ...]
    activation_bytes: int


def backward_in_micro_batches(
    model: nn.Module,
    loss: Callable[..., Tensor],
    *batch: Tensor,
    size: int | None = None,
    max_bytes: int | None = None,
    scaler: GradScaler | None = None,
) -> MicroBatches:
    """Add the gradient of `loss(*batch)` to the parameters of `model`, a micro-batch at a time.

        result = normswap.backward_in_micro_batches(model, lambda x, y: cross_entropy(model(x), y), images, labels, max_bytes=2**30)
        optimizer.step()

    loss: takes the same rows of each tensor of `batch`, and is a mean over samples (with aux="explicit", plus `aux_loss(model)`). A
    micro-batch counts as its share of the samples, so the sizes need not divide the batch. Give size, the samples of a micro-batch, or
    max_bytes, the most that autograd may keep for one backward pass: then the first micro-batch is one sample, and the others are as large
    as that lets them be, by the line through what the first and the last kept. What each one keeps is counted before its backward pass,
    and a forward pass that keeps more is thrown away and run again with fewer samples. scaler: the GradScaler that was given to `attach`.

    The result is the gradient of the whole batch up to rounding, as no layer mixes samples; a BatchNorm in train mode does, and a warning
    says so. A DistributedDataParallel model is synchronised once, in the last micro-batch.

    Raises UsageError unless there is one of size and max_bytes and a batch, and if one sample keeps more than max_bytes (what came before
    it has then been added to the gradients).
    """
    check_is_module(model)
    if not batch or any(not isinstance(t, Tensor) or t.dim() == 0 or len(t) != len(batch[0]) for t in batch) or not len(batch[0]):
        raise UsageError("a batch is one or more tensors with the same number of samples, at least one, in dimension 0")
    if (size is None) == (max_bytes is None) or (size if max_bytes is None else max_bytes) < 1:  # type: ignore[operator]
        raise UsageError(f"size is {size} and max_bytes is {max_bytes}; expected one of them, at least 1")
    mixing = next((name for name, m in model.named_modules() if isinstance(m, _BatchNorm) and m.training), None)
    if mixing is not None:
        warnings.warn(f"{mixing or 'the model'} is a BatchNorm in train mode: it sees one micro-batch at a time", UserWarning, stacklevel=2)
    runs = [layer.run for layer in layers_of(model).values()]
    before = [(run.share, run.passes.count if run.passes is not None else 0) for run in runs]
    total, done, most = len(batch[0]), 0, 0
    losses: list[Tensor] = []
    sizes: list[int] = []
    fit = None if max_bytes is None else _Fit(max_bytes)
    try:
        while done < total:
            rows = slice(done, done + (fit.size if fit is not None else size or 1))
            part = [t[rows] for t in batch]
            share = len(part[0]) / total
            for run, (whole, _) in zip(runs, before, strict=True):
                run.share = whole * share
            last = rows.stop >= total
            with contextlib.nullcontext() if last else getattr(model, "no_sync", contextlib.nullcontext)():
                with kept_for_backward((*model.parameters(), *model.buffers(), *batch)) as kept:
                    value = loss(*part) * share
                keeps = sum(kept.values())
                if fit is not None and not fit.takes(len(part[0]), keeps):
                    if len(part[0]) == 1:
                        raise UsageError(
                            f"sample {done} of the batch alone keeps {keeps} bytes for backward, more than max_bytes = {max_bytes}"
                        )
                    del value  # and what it keeps, before the forward pass runs again
                    continue
                most = max(most, keeps)
                (value if scaler is None else scaler.scale(value)).backward()  # type: ignore[no-untyped-call]
            losses.append(value.detach())
            sizes.append(len(part[0]))
            done += len(part[0])
            del value  # the next forward pass would run beside it
    finally:
        for run, (share, passes) in zip(runs, before, strict=True):
            run.share = share
            if run.passes is not None:  # all micro-batches count as one backward pass
                run.passes.count = min(run.passes.count, passes + 1)
    return MicroBatches(torch.stack(losses).sum(), tuple(sizes), most)


class _Fit:
    """How many samples are tried next, so that they keep no more than max_bytes.

    What a model keeps grows by so much for each sample, on top of what does not depend on them: a line. Two measurements give it, that of
    one sample and the last one.
    """

    def __init__(self, max_bytes: int) -> None:
        self.max_bytes, self.size, self.one, self.grows = max_bytes, 1, 0, True

    def takes(self, samples: int, keeps: int) -> bool:
        """Whether this many bytes are not too many. Chooses the next size: fewer samples if they are."""
        fits = keeps <= self.max_bytes
        if samples == 1:
            self.one = self.one or keeps
            guess = self.max_bytes // max(keeps, 1)
        else:
            guess = 1 + (self.max_bytes - self.one) * (samples - 1) // max(keeps - self.one, 1)
        self.grows = self.grows and fits  # where it is no line, what has just been too large is not tried again
        self.size = max(1, guess if self.grows else min(guess, self.size, samples if fits else samples - 1))
        return fits


@contextlib.contextmanager
def kept_for_backward(besides: Iterable[Tensor]) -> Iterator[dict[int, int]]:
    """The bytes of each storage that autograd keeps within this context, leaving out the storages of `besides`, which exist anyway."""
    own = {t.untyped_storage()._cdata for t in besides}
    kept: dict[int, int] = {}

    def pack(tensor: Tensor) -> Any:
        storage = tensor.untyped_storage()
        if storage._cdata not in own:
            kept[storage._cdata] = storage.nbytes()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        yield kept
