"""Healing: an approximate conversion is trained towards the original, without labels, until its outputs are close again."""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Generic, Literal, TypeVar

import torch
from torch import nn
from torch.export import ExportedProgram

from normswap.api.convert import Conversion, couple
from normswap.api.neighbours import Neighbours
from normswap.api.sensitivity import NEIGHBOURS, number_of
from normswap.errors import NormswapError, UsageError, one_of
from normswap.healing import run
from normswap.healing.losses import KL, kl
from normswap.healing.run import Loss, Settings
from normswap.healing.schedule import Budget
from normswap.healing.state import Point
from normswap.layer.batchless_norm import BatchlessNorm
from normswap.models.batches import arguments_of, check_batches, no_batch, samples_in
from normswap.models.copying import copy_with, set_eval, uncompiled
from normswap.models.programs import Model, as_module
from normswap.models.watching import buffers_kept
from normswap.swap.calibrate import calibrate

M = TypeVar("M", bound=nn.Module)
Metric = Callable[[nn.Module], float]
HELD_OUT = 128  # samples, where none are given
LR = 2e-4


class DivergedError(NormswapError):
    """Exit 3: the distance to the original grew again and again. `healing` has the best state that was reached."""

    exit_code = 3

    def __init__(self, message: str, healing: Healing[Any], *, hint: str | None = None) -> None:
        super().__init__(message, hint=hint)
        self.healing = healing


@dataclass(frozen=True)
class Healing(Generic[M]):
    """A healed model and how it came about.

    model        a copy of the model that was given, with the best weights: those of the smallest `Point.score`
    curve        the measurements on the held-out batches, the first before any step: see `normswap.healing.state.Point`
    metric       the metric of the original, of the model that was given, and of the healed one; None without one
    epochs       how often the data ended and began again: what is repeated is learnt by heart
    rolled_back  how often the distance grew so much that the best weights were taken again, with half the rate
    ended        whether the data ended before the budget
    """

    model: M = field(repr=False)
    curve: tuple[Point, ...]
    metric: tuple[float, float, float] | None
    epochs: int
    rolled_back: int
    diverged: bool
    ended: bool

    @property
    def before(self) -> float:
        """The distance of the model that was given: sqrt(mean over outputs of |y - t|^2 / variance of t), 0 if y is the original's t."""
        return self.curve[0].distance

    @property
    def after(self) -> float:
        """The distance of the healed model."""
        return min(self.curve, key=lambda point: point.score).distance


def heal(
    model: M | Conversion[M],
    teacher: Model,
    data: Iterable[Any],
    *,
    minutes: float | None = None,
    tokens: int | None = None,
    held_out: Sequence[Any] | None = None,
    loss: Loss | Literal["kl"] | None = None,
    metric: Metric | Literal["neighbours"] | None = None,
    lr: float = LR,
    accumulate: int = 1,
    checkpoint: str | Path | None = None,
    progress: run.Progress = lambda distance, done, total: None,
) -> Healing[M]:
    """A copy of the converted `model`, trained without labels to put out what `teacher`, its original, puts out. Neither is touched.

        loss = mean over norms of |y - t|^2 / V(t)  +  mean over outputs of |y - t|^2 / V(t)  (+ loss(batch, output, teacher's output))

    y: what a norm, or the model, puts out; t: the same of the teacher; V: its variance. Both run in eval mode.

    data: batches as for `convert`, best fresh ones without end. Where they end they begin again, if they can.
    minutes, tokens: when to end, by the clock or by positions that count (tokens of integer inputs, else samples); at least one. The
        learning rate follows the one that is further: it rises over the first tenth and falls as a cosine to 0.
    held_out: batches by which the distance is measured; None: the first of the data, 128 samples, which are not trained on. If the data
        come in another order each time, give some.
    loss: a term of your own, with the batch, the output of the model, and that of the teacher. Or "kl", for outputs that are scores of
        classes or tokens: the KL divergence of their softmax, see `normswap.healing.losses.kl`.
    metric: takes a model, returns a number; measured before and after. Or "neighbours", as in `sensitivity`, on the held-out batches.
    lr: of Adam, for linears and convs; norms and embeddings get twice as much.
    accumulate: batches in a step, of all processes together. Under `torchrun` each process takes its share of them.
    checkpoint: a file that is written as it goes, and deleted at the end. If it is there, the healing goes on from it. The data must
        then be the same, in the same order.
    progress: called after each step with (the distance, done, total), in seconds of the budget or tokens.

    Raises UsageError if there is no budget, there are no data, or they do not fit; DivergedError, which has the best state, if the distance
    grew four times to four times the smallest one. Source: docs/heal.md.
    """
    settings = settings_of(minutes=minutes, tokens=tokens, lr=lr, accumulate=accumulate, loss=loss)
    path = None if checkpoint is None else Path(checkpoint)
    healing = healed(model, teacher, data, settings, held_out=held_out, metric=metric, checkpoint=path, progress=progress)
    if path is not None:
        path.unlink(missing_ok=True)
    if healing.diverged:
        raise diverged(healing)
    return healing


@torch.inference_mode(False)  # in which nothing can be trained
def healed(
    model: M | Conversion[M],
    teacher: Model,
    data: Iterable[Any],
    settings: Settings,
    *,
    held_out: Sequence[Any] | None,
    metric: Metric | Literal["neighbours"] | None,
    checkpoint: Path | None,
    progress: run.Progress,
) -> Healing[M]:
    """`heal`, but what diverged is returned, too, and the checkpoint stays: the caller deletes it when the result is where it belongs."""
    module = _module_of(model)
    original = as_module(teacher)
    if isinstance(metric, str):
        one_of("metric", metric, (NEIGHBOURS,))
    data, batches, skip = _held_out(data, held_out, module)
    measure: Metric | None = Neighbours(original, batches) if isinstance(metric, str) else metric
    norms = [name for name, m in module.named_modules() if isinstance(m, BatchlessNorm)]
    student: Any = copy_with(module, {})
    reference = set_eval(copy_with(original, {}))
    modes = {name: m.training for name, m in student.named_modules()}
    set_eval(student)
    coupled = [m for m in student.modules() if isinstance(m, BatchlessNorm) and m.producer is not None]
    for layer in coupled:
        layer.make_plain()
    given = None if measure is None else (number_of(measure, reference), number_of(measure, student))
    with uncompiled(), buffers_kept(student, BatchlessNorm):
        outcome = run.run(student, reference, data, batches, settings, skip=skip, checkpoint=checkpoint, progress=progress)
    # The layers' statistics are those of what they get now; weight and bias make up for the difference.
    calibrate(student, copy_with(student, {}), (), batches, reestimate=dict.fromkeys(norms, "exact"))
    metrics = None if measure is None or given is None else (*given, number_of(measure, student))
    for name, m in student.named_modules():
        m.training = modes[name]
    if coupled:
        args, kwargs = arguments_of(batches[0], student)
        couple(student, dict(kwargs) or args, calibration=batches)
    return Healing(student, outcome.curve, metrics, outcome.epochs, outcome.rolled_back, outcome.diverged, outcome.ended)


def diverged(healing: Healing[Any]) -> DivergedError:
    """What is raised for a healing that diverged."""
    return DivergedError(
        f"healing diverged: the distance to the original rose {healing.rolled_back} times, the smallest was {healing.after:.3g}",
        healing,
        hint="a smaller learning rate: --lr, lr=...; the best state that was reached is kept",
    )


def settings_of(
    *, minutes: float | None, tokens: int | None, lr: float | None, accumulate: int, loss: Loss | Literal["kl"] | None = None
) -> Settings:
    """How to heal. lr: None for the usual one. Raises UsageError for a number that is not above 0, and without a budget."""
    lr = LR if lr is None else lr
    if minutes is None and tokens is None:
        raise UsageError("healing needs a budget", hint="give minutes=... or tokens=...")
    if (minutes is not None and not 0 < minutes < math.inf) or (tokens is not None and not 1 <= tokens < math.inf):
        raise UsageError(f"the budget is {minutes} minutes and {tokens} tokens; expected numbers above 0")
    if not 0 < lr < math.inf or not (accumulate >= 1 and accumulate % 1 == 0):
        raise UsageError(f"lr is {lr} and accumulate {accumulate}; expected numbers above 0, and a whole one for accumulate")
    if isinstance(loss, str):
        one_of("loss", loss, (KL,))
    return Settings(Budget(minutes, tokens), lr, int(accumulate), kl if isinstance(loss, str) else loss)


def _module_of(model: nn.Module | Conversion[Any]) -> nn.Module:
    given = model.model if isinstance(model, Conversion) else model
    if isinstance(given, ExportedProgram):
        raise UsageError(
            "an exported program cannot be healed: it has no layers to train", hint="convert the nn.Module, and export it healed"
        )
    return as_module(given)


def _held_out(data: Iterable[Any], held_out: Sequence[Any] | None, module: nn.Module) -> tuple[Iterable[Any], list[Any], int]:
    """(the data, the held-out batches, how many of the first batches are not trained on)."""
    check_batches(data)
    if held_out is not None:
        check_batches(held_out, "held_out is")
        if not (batches := list(held_out)):
            raise UsageError("held_out holds no batch", hint="give at least one; 128 samples are better")
        return data, batches, 0
    found: list[Any] = []
    source = iter(data)
    samples = 0
    for batch in source:
        found.append(batch)
        samples += max(samples_in(*arguments_of(batch, module)), 1)
        if samples >= HELD_OUT:
            break
    if not found:
        raise no_batch("the data")
    if source is data:
        return itertools.chain(found, source), found, len(found)
    return data, found, len(found)
