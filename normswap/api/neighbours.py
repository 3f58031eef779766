"""The metric for embeddings: how many samples keep the nearest neighbour that they have in the original model.

    e_i = output of sample i                nearest(i) = argmax over j != i of  e_i . e_j / (|e_i| |e_j|)
    agreement = the share of samples i, of all batches, for which nearest(i) is the same in both models: 1 of the original itself

The embedding is the first floating output with one row per sample. Of one with a sequence, (N, T, C), it is the mean over T, without the
positions where the batch's "attention_mask" is 0, as sentence encoders are used; other outputs are taken whole, (N, ...) as (N, C).
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from normswap.errors import UsageError
from normswap.models.batches import MASK, arguments_of, samples_in
from normswap.models.copying import copy_for_running
from normswap.parity.probes import Probe
from normswap.parity.run_torch import module_runner

ROWS = 1024  # of the matrix of cosines that are in memory at once


class Neighbours:
    """The agreement of a model with the original, by calling it with the model. Runs the original once, when it is first called.

    Raises UsageError if the original has no output with a row per sample, or the data hold fewer than three samples, for which
    no neighbour tells anything.
    """

    def __init__(self, original: nn.Module, batches: Sequence[Any]) -> None:
        self.original, self.batches = original, batches
        self.expected: Tensor | None = None

    def __call__(self, model: nn.Module) -> float:
        if self.expected is None:
            self.expected = nearest(embeddings(copy_for_running(self.original), self.batches))
        found = nearest(embeddings(model, self.batches))
        return (found == self.expected).double().mean().item()


def embeddings(model: nn.Module, batches: Sequence[Any]) -> Tensor:
    """One row per sample of all batches, in float64."""
    run = module_runner(model, ())
    found = []
    for number, batch in enumerate(batches, 1):
        probe = Probe(f"batch {number}", *arguments_of(batch, model))
        samples = samples_in(probe.args, probe.kwargs)
        outputs = (t for t in run(probe)[0].values() if t.is_floating_point() and t.dim() > 1 and len(t) == samples)
        embedding = next(outputs, None)
        if embedding is None:
            raise UsageError(
                f"the metric neighbours needs an output with one row for each sample, and the model has none on batch {number}",
                hint="give a metric of your own: --metric package.module:callable",
            )
        found.append(_row_each(embedding.double().cpu(), probe.kwargs.get(MASK)))
    rows = torch.cat(found)
    if len(rows) < 3:
        raise UsageError(f"the metric neighbours compares samples, and the data hold {len(rows)}", hint="give some hundred")
    return rows


def nearest(rows: Tensor) -> Tensor:
    """The index of the nearest other row by cosine, for each row."""
    unit = torch.nn.functional.normalize(rows, dim=1)
    found = []
    for start in range(0, len(unit), ROWS):
        cosines = unit[start : start + ROWS] @ unit.T
        cosines[torch.arange(len(cosines)), torch.arange(start, start + len(cosines))] = -torch.inf
        found.append(cosines.argmax(1))
    return torch.cat(found)


def _row_each(embedding: Tensor, mask: Any) -> Tensor:
    if embedding.dim() != 3:
        return embedding.flatten(1)
    if isinstance(mask, Tensor) and mask.shape == embedding.shape[:2]:
        weights = mask.to(embedding.device, embedding.dtype)[..., None]
        return (embedding * weights).sum(1) / weights.sum(1).clamp(min=1)
    return embedding.mean(1)
