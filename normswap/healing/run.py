"""The loop: batches in, gradients by the distance to the original, a step, and now and then a measurement on held-out batches.

    all norms and all outputs -> loss -> Adam, clipped, warm-up and cosine      in eval mode: no dropout, and no statistics move
    every 20th of the budget  -> distance on held-out batches -> the best weights are kept, and the state is written
    distance far above best   -> back to the best weights, with half the rate; after the third time the healing ends as diverged

With several processes (`torch.distributed`), each takes its share of the batches of a step, and the gradients are summed, so that two
processes with half of the batches each do what one does with all.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

from normswap.errors import UsageError, described, kind_of
from normswap.files import atomic
from normswap.healing.distance import Scales, Seen, Side, positions
from normswap.healing.schedule import Budget, factor
from normswap.healing.state import Point, State, load, save
from normswap.layer.batchless_norm import BatchlessNorm
from normswap.models.torch_private import multiplies_bfloat16

Loss = Callable[[Any, Any, Any], Tensor]
Progress = Callable[[float, int, int], None]

MEASUREMENTS = 20  # along the budget
WORSE, FLOOR = 4.0, 0.1  # a distance above both WORSE times the smallest one and FLOOR goes back; a high rate alone may double it
PATIENCE = 3  # roll backs, after which it has diverged
CACHE = 1 << 28  # bytes of the original's outputs on the held-out batches that are kept; larger ones are computed for each measurement
ROUNDING = 0.05  # the largest distance of the original in bfloat16 to itself, with which training in bfloat16 is worth its speed
CLIP = 1.0  # of the norm of all gradients
BETAS = (0.9, 0.98)
NORMS = 2.0  # the learning rate of norms and embeddings, as a multiple of the others'


@dataclass(frozen=True)
class Settings:
    """How to heal. lr: of linears and convs. accumulate: batches in a step, of all processes together. loss: the user's own, added."""

    budget: Budget
    lr: float
    accumulate: int = 1
    loss: Loss | None = None


@dataclass(frozen=True)
class Outcome:
    """What came of it; the model has the best weights. ended: the data ended before the budget."""

    curve: tuple[Point, ...]
    epochs: int
    rolled_back: int
    diverged: bool
    ended: bool


def run(
    student: nn.Module,
    teacher: nn.Module,
    data: Iterable[Any],
    held_out: Sequence[Any],
    settings: Settings,
    *,
    skip: int = 0,
    checkpoint: Path | None = None,
    progress: Progress = lambda distance, done, total: None,
) -> Outcome:
    """Train `student`, in place, towards `teacher`. Both are in eval mode.

    skip: batches at the beginning of the data that are not trained on, as they are held out. progress(distance, done, total) is called
    after each step, with seconds or tokens of the budget.
    """
    axes = {name: m.channel_axis for name, m in student.named_modules() if isinstance(m, BatchlessNorm)}
    names = [name for name, module in teacher.named_modules() if name in axes]
    with torch.enable_grad(), Side(student, names) as ours, Side(teacher, names) as theirs:
        return _Healing(ours, theirs, Scales(axes), held_out, settings, checkpoint, progress).run(data, skip)


class _Healing:
    """One run of the loop."""

    def __init__(
        self,
        ours: Side,
        theirs: Side,
        scales: Scales,
        held_out: Sequence[Any],
        settings: Settings,
        checkpoint: Path | None,
        progress: Progress,
    ) -> None:
        self.ours, self.theirs, self.scales, self.held_out = ours, theirs, scales, held_out
        self.settings, self.checkpoint, self.progress = settings, checkpoint, progress
        self.workers = dist.get_world_size() if dist.is_initialized() else 1
        self.rank = dist.get_rank() if dist.is_initialized() else 0
        self.fast = False  # whether steps are in bfloat16; measurements never are
        self.weights = trained(ours.model, max(positions(batch, ours.model) for batch in held_out))
        self._device = next(iter(self.weights.values())).device
        self.optimizer = self._new_optimizer()
        self.losses: list[Tensor] = []

    def run(self, data: Iterable[Any], skip: int) -> Outcome:
        self._targets = [self._target(batch) for batch in self.held_out]
        if (reason := self.scales.why_unknown()) is not None:
            raise UsageError(reason, hint="give other data, or held_out=...: batches like those that the model is used on")
        self.fast = multiplies_bfloat16() and self._close_in_bfloat16()
        self.state = self._begin()
        began = time.perf_counter() - self.state.seconds
        ended, diverged = False, self.state.rolled_back > PATIENCE
        groups = self._groups(data, skip)
        while not diverged and (used := self._used()) < 1:
            group = next(groups, None)
            if group is None:
                ended = True
                break
            if not self._step(group):
                diverged = not self._roll_back()
                continue
            self.state.seconds = self._agreed(time.perf_counter() - began)
            self._show()
            if math.floor(self._used() * MEASUREMENTS) > math.floor(used * MEASUREMENTS):
                diverged = not self._measure()
                self.state.seconds = self._agreed(time.perf_counter() - began)
                self._keep()
            atomic.raise_if_interrupted()
        if not diverged and self.state.curve[-1].step < self.state.step:
            self._measure()
        self._load(self.state.best)
        return Outcome(tuple(self.state.curve), self.state.epoch, self.state.rolled_back, diverged, ended)

    # --- one step ---------------------------------------------------------------------------------------------------------------------

    def _step(self, group: Sequence[tuple[Any, int]]) -> bool:
        """Train on these batches, each with the number of its positions; False, with nothing changed, if the gradient is not finite."""
        total = sum(count for _, count in group)
        loss = torch.zeros((), device=self._device)
        for weight in self.weights.values():
            weight.grad = None
        for batch, count in group[self.rank :: self.workers]:
            found = self._loss(batch) * (count / max(total, 1))
            if not found.requires_grad:
                raise UsageError(
                    "the outputs of the model have no gradient, so it cannot be trained",
                    hint="does its forward run in torch.no_grad() or torch.inference_mode(), or detach what it returns?",
                )
            found.backward()  # type: ignore[no-untyped-call]
            loss += found.detach()
        gradients = [torch.zeros_like(weight) if weight.grad is None else weight.grad for weight in self.weights.values()]
        self._summed([loss, *gradients])
        for weight, gradient in zip(self.weights.values(), gradients, strict=True):
            weight.grad = gradient
        norm = torch.nn.utils.clip_grad_norm_(self.weights.values(), CLIP)
        if not torch.isfinite(norm):
            return False
        state = self.state
        state.step, state.tokens = state.step + 1, state.tokens + total
        for rate in self.optimizer.param_groups:
            rate["lr"] = self.settings.lr * rate["times"] * state.slower * factor(self._used())
        self.optimizer.step()
        self.losses.append(loss)
        return True

    def _loss(self, batch: Any) -> Tensor:
        with torch.no_grad():
            teacher = self.theirs(batch, fast=self.fast)
        student = self.ours(batch, fast=self.fast)
        loss = self.scales.errors(student, teacher, batch).both
        return loss if self.settings.loss is None else loss + _own(self.settings.loss, batch, student, teacher)

    def _close_in_bfloat16(self) -> bool:
        """Whether a step runs in bfloat16, and whether the original there is close to what it is in full precision, on one batch."""
        batch = self.held_out[0]
        try:
            with torch.no_grad():
                teacher = self.theirs(batch, fast=True)
                rounding = self.scales.errors(teacher, self.theirs(batch), batch).both
            self.scales.errors(self.ours(batch, fast=True), teacher, batch).both.backward()  # type: ignore[no-untyped-call]
        except Exception:  # the model may mix what is rounded with what is not
            return False
        return bool(rounding <= ROUNDING**2)

    # --- measured ---------------------------------------------------------------------------------------------------------------------

    def _measure(self) -> bool:
        """Measure the distance, and keep the weights if they are the best; go back if they are much worse. False: it has diverged."""
        state = self.state
        loss = torch.stack(self.losses).mean().item() if self.losses else math.nan
        self.losses.clear()
        error, own = self._on_held_out()
        distance, score = math.sqrt(error), error + own
        if not state.curve:
            _check_finite("the distance to the original", distance, "calibrate on more or other data")
            _check_finite("loss", own, "it has to be finite where the models are close")
        if state.curve and not distance <= max(WORSE * state.least, FLOOR):
            return self._roll_back()
        if not state.curve or score <= min(point.score for point in state.curve):
            state.best = {name: weight.detach().clone() for name, weight in self.weights.items()}
        state.curve.append(Point(state.step, state.tokens, round(state.seconds, 3), loss, distance, score))
        return True

    @torch.no_grad()
    def _target(self, batch: Any) -> Seen | None:
        """What the original puts out for a held-out batch, of which the scales are measured, too; None if that is large."""
        teacher = self.theirs(batch)
        self.scales.add(teacher, batch)
        bytes_of_all = len(self.held_out) * sum(t.numel() * t.element_size() for t in teacher.outputs)
        return teacher._replace(norms={}) if bytes_of_all < CACHE else None

    @torch.no_grad()
    def _on_held_out(self) -> tuple[float, float]:
        """(the error of the outputs, the user's own loss) on the held-out batches."""
        sums = torch.zeros(3, dtype=torch.float64, device=self._device)
        shares = list(zip(self.held_out, self._targets, strict=True))[self.rank :: self.workers]
        for batch, target in shares:
            student, teacher = self.ours(batch)._replace(norms={}), target or self.theirs(batch)
            count = positions(batch, self.ours.model)
            error, own = self.scales.errors(student, teacher, batch).outputs, self.settings.loss
            mine = torch.zeros_like(error) if own is None else _own(own, batch, student, teacher)
            sums += torch.stack([error.double() * count, mine.double() * count, torch.full_like(sums[0], count)])
        self._summed([sums])
        error, mine = (sums[:2] / sums[2].clamp(min=1)).tolist()
        return error, mine

    def _roll_back(self) -> bool:
        """Go back to the best weights, with half the rate; False if that was done too often."""
        state = self.state
        state.rolled_back += 1
        state.slower /= 2
        self._load(state.best)
        self.optimizer = self._new_optimizer()
        self.losses.clear()
        return state.rolled_back <= PATIENCE

    def _used(self) -> float:
        return self.settings.budget.used(self.state.seconds, self.state.tokens)

    def _show(self) -> None:
        budget, state = self.settings.budget, self.state
        if budget.minutes is not None:
            self.progress(state.curve[-1].distance, min(int(state.seconds), int(60 * budget.minutes)), int(60 * budget.minutes))
        elif budget.tokens is not None:
            self.progress(state.curve[-1].distance, min(state.tokens, budget.tokens), budget.tokens)

    # --- begun and kept ---------------------------------------------------------------------------------------------------------------

    def _begin(self) -> State:
        """The state in the checkpoint, or the first one."""
        settings = {
            "budget": asdict(self.settings.budget),
            "lr": self.settings.lr,
            "accumulate": self.settings.accumulate,
            "loss": None if (own := self.settings.loss) is None else getattr(own, "__qualname__", type(own).__qualname__),
            "weights": {name: list(weight.shape) for name, weight in self.weights.items()},
        }
        state = None if self.checkpoint is None else load(self.checkpoint, settings)
        if state is not None:
            self._load(state.weights)
            self.optimizer.load_state_dict(state.optimizer)
            return state
        if self.workers > 1:
            for weight in self.weights.values():  # calibration sums in another order on each machine
                dist.broadcast(weight.detach(), 0)
        self.state = State(settings, {}, {}, {})
        self._measure()
        return self.state

    def _keep(self) -> None:
        if self.checkpoint is not None and self.rank == 0:
            self.state.weights = {name: weight.detach() for name, weight in self.weights.items()}
            self.state.optimizer = self.optimizer.state_dict()
            save(self.state, self.checkpoint)

    @torch.no_grad()
    def _load(self, weights: Mapping[str, Tensor]) -> None:
        for name, weight in self.weights.items():
            weight.copy_(weights[name])

    def _new_optimizer(self) -> torch.optim.Optimizer:
        norms = {id(p) for m in self.ours.model.modules() if isinstance(m, (BatchlessNorm, nn.Embedding)) for p in m.parameters(False)}
        groups = [
            {"params": [p for p in self.weights.values() if (id(p) in norms) is of_norms], "times": times, "lr": 0.0}
            for of_norms, times in ((False, 1.0), (True, NORMS))
        ]
        return torch.optim.Adam([group for group in groups if group["params"]], betas=BETAS, fused=True)

    # --- data and processes -----------------------------------------------------------------------------------------------------------

    def _groups(self, data: Iterable[Any], skip: int) -> Iterator[list[tuple[Any, int]]]:
        """The batches of each step, each with its number of positions, over and over. A resumed run passes over those that it has seen."""
        state, group = self.state, list[tuple[Any, int]]()
        passed = state.seen
        while True:
            number, counted = -1, passed
            if hasattr(data, "set_epoch"):  # as PyTorch's samplers have it
                data.set_epoch(state.epoch)
            for number, batch in enumerate(data):
                if number < skip or number - skip < passed:
                    continue
                state.seen += 1
                group.append((batch, positions(batch, self.ours.model)))
                counted += group[-1][1]
                if len(group) == self.settings.accumulate:
                    yield group
                    group = []
            if number < skip or isinstance(data, Iterator):  # nothing to train on, or it cannot begin again
                if number < skip and not state.step:
                    raise UsageError("all of the data are held out, and none are left to train on", hint=_MORE)
                if group:
                    yield group
                return
            if not counted:
                raise UsageError("the data hold no position that counts, so there is nothing to train on", hint="are all batches padding?")
            state.epoch, state.seen, passed = state.epoch + 1, 0, 0

    def _summed(self, tensors: Sequence[Tensor]) -> None:
        if self.workers > 1:
            for tensor in tensors:
                dist.all_reduce(tensor)

    def _agreed(self, seconds: float) -> float:
        """The first process's clock."""
        if self.workers > 1:
            shared = torch.tensor([seconds], dtype=torch.float64, device=self._device)
            dist.broadcast(shared, 0)
            return float(shared)
        return seconds


_MORE = "the first 128 samples are held out, as whole batches: give more and smaller batches, x.split(32) of one tensor, or held_out=..."


def _check_finite(what: str, number: float, hint: str) -> None:
    if not math.isfinite(number):
        raise UsageError(f"{what} is {number} on the held-out batches, before any step", hint=hint)


def _own(loss: Loss, batch: Any, student: Seen, teacher: Seen) -> Tensor:
    """The user's own loss. Raises UsageError if it raises, or is no number."""
    try:
        found = loss(batch, student.result, teacher.result)
    except Exception as error:  # it is the user's code
        raise UsageError(f"loss raised {described(error)}", hint="it is called with a batch, the output, and the original's") from error
    if not isinstance(found, (Tensor, float, int)) or (isinstance(found, Tensor) and found.numel() != 1):
        what = f"a tensor of shape {tuple(found.shape)}" if isinstance(found, Tensor) else kind_of(found)
        raise UsageError(f"loss returned {what}; expected one number", hint="return a mean or a sum")
    return torch.as_tensor(found, device=student.outputs[0].device).reshape(())


def trained(model: nn.Module, count: int) -> dict[str, nn.Parameter]:
    """The parameters that are trained, by name. count: the positions of a batch.

    Not the statistics of the norms, as weight and bias can do what they could. Not a table with more rows than a batch has positions, if
    it is an embedding alone, as most of its rows would get no gradient in a step, and Adam would move them all the same.
    """
    tables = {id(m.weight) for m in model.modules() if isinstance(m, nn.Embedding) and m.num_embeddings > count}
    readers = {id(p) for m in model.modules() if not isinstance(m, nn.Embedding) for p in m.parameters(False)}
    still = tables - readers
    for layer in (m for m in model.modules() if isinstance(m, BatchlessNorm)):
        still |= {id(p) for p in (layer.mean, layer.std_parameter)}
    found = {name: p for name, p in model.named_parameters() if p.requires_grad and id(p) not in still}
    if not found:
        raise UsageError("no parameter of the model may be trained", hint="model.requires_grad_(True) allows all")
    half = [name for name, p in found.items() if p.dtype in (torch.float16, torch.bfloat16)]
    if half:
        raise UsageError(f"{half[0]} is {found[half[0]].dtype}, in which small steps are lost", hint="model.float(), and back at the end")
    return found
