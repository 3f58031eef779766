"""Measured again, before a difference is called a failure: what rounding by itself does to a model.

rounding   a candidate in float64 whose own tensors were rounded when they were stored: each is moved by up to half a unit in the last place
choice     the reference in float64 with its tensors and inputs moved by CHOICE of their size, CHOICES times: a model that makes a choice
           between equals (nms, top-k) moves far more, sometimes
noise      the reference in its own dtype at inputs moved by a few units in the last place: one error alone may be a small one by chance
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from normswap.layer.batchless_norm import PARAMETER_OF_FORM, BatchlessNorm
from normswap.models.copying import copy_for_running, to_float64
from normswap.parity.probes import Probe
from normswap.parity.runners import Runner, Values

CHOICE = 2.0**-50
CHOICES = 8
SAMPLES = 3
INPUT_ULPS = 4

Amount = Callable[[Tensor], float]  # by how much of its size a tensor is moved at most


class Key(NamedTuple):
    """One tensor at one probe: an output, or the output of a tapped layer; in float64 or not."""

    probe: str
    name: str
    tapped: bool = False
    float64: bool = False

    def wide(self) -> Key:
        return self._replace(float64=True)


@dataclass(frozen=True)
class Rerun:
    """How to run a reference again.

    wide: in float64; given the tensors of a candidate, with its own moved: by CHOICE, or as far as they may have been rounded if the
    candidate does not have them. own: in its own dtype.
    """

    wide: Callable[[Sequence[Tensor] | None], Runner]
    own: Callable[[], Runner]


def error(candidate: Tensor, truth: Tensor, unusable: Tensor | None, least: float = 0.0) -> tuple[float, float, float, int]:
    """(max_abs, max_rel, rel_l2, non-finite mismatches) of a candidate against a truth of the same shape. least: of the scale."""
    wide = torch.complex128 if truth.is_complex() else torch.float64
    a, b = candidate.to("cpu", wide).reshape(-1), truth.to("cpu", wide).reshape(-1)
    overflows = torch.zeros_like(b, dtype=torch.bool) if unusable is None else unusable.reshape(-1)
    usable = b.isfinite() & ~overflows
    # Where the reference itself overflows, the candidate has to overflow too; where the function is infinite or NaN, it has to be the same;
    # elsewhere it must not.
    mismatches = int(((a.isfinite() != usable) | ~(usable | overflows | same(a, b))).sum())
    both = usable & a.isfinite()
    if not bool(both.any()):
        return (0.0, 0.0, 0.0, mismatches) if a.numel() == 0 else (math.nan, math.nan, math.nan, mismatches)
    difference, reference = (a - b)[both], b[both]
    return (
        difference.abs().max().item(),
        ratio(difference.abs().max().item(), max(reference.abs().max().item(), least)),
        ratio(difference.norm().item(), reference.norm().item()),
        mismatches,
    )


def same(a: Tensor, b: Tensor) -> Tensor:
    return (a == b) | (a.isnan() & b.isnan())


def ratio(error: float, scale: float) -> float:
    return 0.0 if error == 0 else error / scale if scale > 0 else math.inf


def own_dtype(model: nn.Module, asked: Sequence[Probe]) -> torch.dtype:
    """The coarsest of its weights, or, if it has none, of what it is given."""
    tensors = [*model.parameters(), *model.buffers()] or [t for probe in asked for t in probe.tensors()]
    floating = {t.dtype for t in tensors} & {torch.float64, torch.float32, torch.float16, torch.bfloat16}
    return max(floating or {torch.float32}, key=lambda dtype: torch.finfo(dtype).eps)


def widened(probe: Probe) -> Probe:
    """The probe with its inputs in float64."""
    args, kwargs = probe.mapped(to_float64)
    return replace(probe, args=args, kwargs=kwargs)


def nudged(model: nn.Module, amount: Amount | None) -> nn.Module:
    """A copy in eval mode, for float64, of which each floating tensor was moved by up to `amount` of its size; None: as it is.

    Statistics of a BatchlessNorm that are the rounded ones of a recorded source are those of the source again: float64 decides about the
    swap, and not about the dtype in which its result is stored.
    """
    generator = torch.Generator().manual_seed(0)

    def moved(tensor: Tensor) -> Tensor:
        wide = to_float64(tensor.detach())
        size = amount(tensor) if amount is not None and wide.is_floating_point() else 0.0
        if size == 0.0 or not wide.numel():
            return wide
        finite = wide.abs().nan_to_num(0.0, 0.0, 0.0)
        reach = torch.maximum(finite, finite.mean()).masked_fill(wide == wide.round(), 0.0)  # a whole number was not rounded
        return wide + size * reach * (2 * torch.rand(wide.shape, generator=generator, dtype=wide.dtype) - 1).to(wide.device)

    if amount is None:
        twin = copy_for_running(model, to_float64)
    else:
        twin = copy_for_running(model, moved, lambda parameter: nn.Parameter(moved(parameter), requires_grad=False))
    for module, source in zip(twin.modules(), model.modules(), strict=False):
        if isinstance(module, BatchlessNorm) and isinstance(source, BatchlessNorm):
            exact = source.unrounded()
            if exact is not None:
                setattr(module, PARAMETER_OF_FORM[module.std], nn.Parameter(exact, requires_grad=False))
    return twin


def rounded_by(model: nn.Module, shared: Sequence[Tensor], eps: float, least: float = 0.0) -> Amount:
    """By how much of its size each tensor of a model may have been rounded: half of `eps`, and by `least` what is one of `shared`."""
    known: dict[tuple[Any, ...], list[Tensor]] = {}
    for tensor in shared:
        known.setdefault((tensor.dtype, tuple(tensor.shape)), []).append(tensor)
    recorded = {id(m.std_parameter) for m in model.modules() if isinstance(m, BatchlessNorm) and m.unrounded() is not None}

    def amount(tensor: Tensor) -> float:
        alike = known.get((tensor.dtype, tuple(tensor.shape)), ())
        return least if id(tensor) in recorded or any(torch.equal(tensor, other) for other in alike) else eps / 2

    return amount


def tensors(model: nn.Module) -> list[Tensor]:
    return [*model.parameters(), *model.buffers()]


def moved(probe: Probe, size: float, seed: int, like: Probe | None = None) -> Probe:
    """The probe with each floating number of its inputs moved by up to `size` of itself, or of the largest one of the same input of `like`.

    A model may take a mean from its inputs, and next to that the last digits of small ones are none.
    """
    generator = torch.Generator().manual_seed(seed)
    reach = iter([float(t.abs().max()) if t.is_floating_point() and t.numel() else 0.0 for t in (like or probe).tensors()])

    def elsewhere(tensor: Tensor) -> Tensor:
        largest = next(reach) if like is not None else 0.0
        if not tensor.is_floating_point():
            return tensor
        noise = size * (2 * torch.rand(tensor.shape, generator=generator, dtype=torch.float64) - 1).to(tensor.device)
        return (tensor.double() + noise * tensor.double().abs().clamp(min=largest)).to(tensor.dtype)

    return Probe(probe.name, *probe.mapped(elsewhere))


def movement(
    now: Mapping[str, tuple[Values, Values]], before: Mapping[str, tuple[Values, Values]], least: Mapping[Key, float]
) -> dict[Key, float]:
    """By row, how far a model that was nudged is from what it gave before; infinite if that has another shape or is not finite."""
    found: dict[Key, float] = {}
    for probe, parts in before.items():
        for part, tapped in ((0, False), (1, True)):
            for name, value in parts[part].items():
                key = Key(probe, name, tapped, True)
                mine = now[probe][part].get(name)
                if mine is None or mine.shape != value.shape:
                    found[key] = math.inf
                    continue
                _, relative, _, mismatches = error(mine, value, None, least.get(key, 0.0))
                found[key] = math.inf if mismatches else 0.0 if math.isnan(relative) else relative
    return found


def noise_again(
    wide: Runner | None, own: Runner, held: Sequence[Probe], names: Mapping[str, tuple[Sequence[str], Sequence[str]]]
) -> dict[Key, float]:
    """By row, the largest error of a model in its own precision, at SAMPLES inputs that are the probe's but for the last digits.

    wide: the model in float64; without it the error is the distance from what the model gives at the probe itself.
    """
    found: dict[Key, float] = {}
    for probe in held:
        at_probe = own(probe) if wide is None else None
        size = INPUT_ULPS * max((torch.finfo(t.dtype).eps for t in probe.tensors() if t.is_floating_point()), default=0.0)
        for seed in range(SAMPLES):
            near = moved(probe, size, seed)
            truths = at_probe or wide(widened(near))  # type: ignore[misc]
            values = own(near)
            for part, tapped in ((0, False), (1, True)):
                for name, truth, value in zip(names[probe.name][part], truths[part].values(), values[part].values(), strict=False):
                    if truth.shape == value.shape:
                        noise = error(value, truth, None)[1]
                        key = Key(probe.name, name, tapped)
                        found[key] = max(found.get(key, 0.0), 0.0 if math.isnan(noise) else noise)
    return found
