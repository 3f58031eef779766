"""Measures what rounding can do to a model: copies of the model, and of its inputs, whose numbers are moved a little at random.

How far the outputs of such copies differ is the effect of rounding alone.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from normswap.layer.batchless_norm import PARAMETER_OF_FORM, BatchlessNorm
from normswap.models.copying import copy_for_running, to_float64
from normswap.parity.probes import Probe, Runner
from normswap.parity.run_torch import float64_mode, module_runner

Amount = Callable[[Tensor], float]  # tensor -> the largest relative change of its elements


def float64_runner(model: nn.Module, sites: Sequence[str], probes: Sequence[Probe], amount: Amount | None = None) -> Runner:
    """Runs the copy that `moved_model` makes of a module."""
    return module_runner(moved_model(model, amount), sites, float64_mode(model, probes))


def moved_model(model: nn.Module, amount: Amount | None = None) -> nn.Module:
    """A copy in eval mode, in float64, with each floating number moved at random by up to `amount` of its size (None: not moved).

    A BatchlessNorm that has stored its unrounded statistics gets them in place of the rounded ones: the comparison in float64 is of the
    swap, not of the dtype in which its result is stored.
    """
    generator = torch.Generator().manual_seed(0)

    def moved(tensor: Tensor) -> Tensor:
        value = to_float64(tensor.detach())
        share = amount(tensor) if amount is not None and value.is_floating_point() else 0.0
        if share == 0.0 or not value.numel():
            return value
        size = value.abs().nan_to_num(0.0, 0.0, 0.0)
        size = torch.maximum(size, size.mean()).masked_fill(value == value.round(), 0.0)  # a whole number was not rounded
        return value + share * size * (2 * torch.rand(value.shape, generator=generator, dtype=value.dtype) - 1).to(value.device)

    if amount is None:
        copied = copy_for_running(model, to_float64)
    else:
        copied = copy_for_running(model, moved, lambda parameter: nn.Parameter(moved(parameter), requires_grad=False))
    for module, source in zip(copied.modules(), model.modules(), strict=False):
        if isinstance(module, BatchlessNorm) and isinstance(source, BatchlessNorm):
            remembered = source.unrounded()
            if remembered is not None:
                setattr(module, PARAMETER_OF_FORM[module.std], nn.Parameter(remembered, requires_grad=False))
    return copied


def rounded_by(model: nn.Module, shared: Sequence[Tensor], eps: float, *, shared_by: float = 0.0) -> Amount:
    """The relative rounding that each tensor of a model may contain from when it was stored.

    It is half of eps; but `shared_by` for a tensor that is equal to one of `shared`, or whose unrounded values a BatchlessNorm has stored.
    """
    known: dict[tuple[Any, ...], list[Tensor]] = {}
    for tensor in shared:
        known.setdefault((tensor.dtype, tuple(tensor.shape)), []).append(tensor)
    remembered = {id(m.std_parameter) for m in model.modules() if isinstance(m, BatchlessNorm) and m.unrounded() is not None}

    def amount(tensor: Tensor) -> float:
        alike = known.get((tensor.dtype, tuple(tensor.shape)), ())
        return shared_by if id(tensor) in remembered or any(torch.equal(tensor, other) for other in alike) else eps / 2

    return amount


def moved_probe(probe: Probe, size: float, seed: int, like: Probe | None = None) -> Probe:
    """The probe with each floating number of its inputs moved at random by up to `size` times itself.

    like: a probe; then by up to `size` times the largest number of the same input of `like`, if that is larger. A model may compute a mean
    over its inputs, which would hide changes in the last digits of small numbers.
    """
    generator = torch.Generator().manual_seed(seed)
    largest = iter([float(t.abs().max()) if t.is_floating_point() and t.numel() else 0.0 for t in (like or probe).tensors()])

    def moved(tensor: Tensor) -> Tensor:
        least = next(largest) if like is not None else 0.0
        if not tensor.is_floating_point():
            return tensor
        share = size * (2 * torch.rand(tensor.shape, generator=generator, dtype=torch.float64) - 1).to(tensor.device)
        return (tensor.double() + share * tensor.double().abs().clamp(min=least)).to(tensor.dtype)

    return Probe(probe.name, *probe.mapped(moved))
