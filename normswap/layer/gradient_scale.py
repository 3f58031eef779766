"""What happened to the gradients of the statistics between backward and step, seen by the values of one of them in each layer.

    kept    what backward left in the gradient of the mean: n times what it should be (S, where `attach` named a scaler)
    grad    what an optimizer finds there, which divides it by g (a GradScaler leaves that to fused optimizers; else g = 1)

grad = r kept with one r for all layers, where a GradScaler or `clip_grad_norm_` has been at work. The step multiplies by  g / (r S), and
warns. On a CPU that is known at once. Elsewhere the CPU would have to wait for the answer: it is read at the next step, and from then on
at each. So there, one step may go by in which the statistics move less than they should.
"""

from __future__ import annotations

import functools
from collections.abc import Iterable
from dataclasses import dataclass, field
from typing import Any, NamedTuple, cast

import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensor
from torch.optim.optimizer import Optimizer

from normswap.layer import foreach, run
from normswap.layer.fsdp import is_part
from normswap.layer.run import Layer, Passes, Warnings

AT_ONCE = ("cpu",)  # the devices that have the answer at once
CLOSE = 1e-3  # how far a gradient may be from what it should be, as a part of the largest


@dataclass
class Checks:
    """What a step leaves for the next one, where the CPU is not to wait. open: what was not read yet; wait: whether it has to."""

    open: list[Tensor] = field(default_factory=list)
    wait: bool = False


class Witness(NamedTuple):
    """One gradient of a layer, as it is and as backward left it."""

    layer: Layer
    grad: Tensor
    kept: Tensor


def is_replaced(layer: Layer) -> bool:
    """Whether Opacus has replaced the gradients whose backward passes are counted."""
    return any(getattr(p, "summed_grad", None) is not None for p in (layer.mean, layer.std_parameter))


def corrections(optimizer: Optimizer, layers: Iterable[Layer], checks: Checks, warnings: Warnings) -> dict[Layer, float]:
    """What to multiply the gradients of each layer's statistics by; 1 of a layer that is left out. Adds a warning where it is not 1."""
    found: dict[Layer, float] = {}
    checks.wait |= any(bool(each) for each in checks.open)
    checks.open.clear()
    witnesses = [witness for layer in layers if (witness := _witness(layer)) is not None]
    for alike in foreach.group_by(witnesses, lambda w: (id(w.layer.run.scale), w.layer.stats, w.grad.device, w.grad.dtype)):
        factor = _correction(optimizer, alike, checks, warnings)
        if factor != 1:
            found.update((witness.layer, factor) for witness in alike)
    return found


def _witness(layer: Layer) -> Witness | None:
    passes = layer.run.passes
    parameter = None if passes is None else passes.parameter()
    if layer.aux != "auto" or passes is None or not passes.count or parameter is None or is_replaced(layer):
        return None
    return None if parameter.grad is None or passes.kept is None else Witness(layer, _local(parameter.grad), _local(passes.kept))


def _local(t: Any) -> Tensor:
    return cast(Tensor, t.to_local()) if is_part(t) else t


def _correction(optimizer: Optimizer, witnesses: list[Witness], checks: Checks, warnings: Warnings) -> float:
    """The factor for layers that share a scale."""
    layer = witnesses[0].layer
    grad, kept = (foreach.stack([getattr(w, name).flatten() for w in witnesses]) for name in ("grad", "kept"))
    scales = layer.run.scale, cast("Tensor | None", getattr(optimizer, "grad_scale", None))
    attached, given = (None if scale is None else scale.to(grad.device) for scale in scales)
    if not grad.numel():
        return 1.0
    due = grad if attached is None else grad * attached
    due = due if given is None else due / given
    off = (due - kept).abs().max() > CLOSE * kept.abs().max()
    if grad.device.type not in AT_ONCE and not checks.wait:
        checks.open.append(off)
        return 1.0
    if isinstance(off, FakeTensor) or not bool(off):
        return 1.0
    r = float((grad * kept).sum() / kept.square().sum())
    uniform = r != 0 and bool((grad - r * kept).abs().max() <= CLOSE * grad.abs().max())
    changed = any(cast(Passes, w.layer.run.passes).changed(_gradient(w), _unscaling(grad.device)) for w in witnesses)
    if changed or not uniform:  # by something else than a GradScaler, which leaves no trace but the values
        if layer.stats == "raw":
            return 1.0  # which the optimizer steps like weights, with their clipping
        text = run.CHANGED
    else:
        text = run.UNSCALED if attached is not None and given is None and abs(r - 1) < CLOSE else run.SCALED
    warnings.add(text, (w.layer for w in witnesses))
    return (1.0 if given is None else given.item()) / (r * (1.0 if attached is None else attached.item())) if uniform else 1.0


def _gradient(witness: Witness) -> Tensor:
    parameter = cast(Passes, witness.layer.run.passes).parameter()
    return cast(Tensor, cast(Tensor, parameter).grad)


@functools.cache
def _unscaling(device: torch.device) -> int:
    """By how much GradScaler.unscale_ raises the version of a gradient: by 0 in torch 2.13, although it writes to it."""
    grad, found, inverse = torch.ones(1, device=device), torch.zeros((), device=device), torch.ones((), device=device)
    torch._amp_foreach_non_finite_check_and_unscale_([grad], found, inverse)
    return grad._version
