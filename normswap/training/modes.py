"""How the layers of a converted model train: set once, after the swap."""

from __future__ import annotations

from collections.abc import Iterable

from torch import nn

from normswap.detect.sites import Swap
from normswap.layer import optimizer_step
from normswap.layer.batchless_norm import MOMENTUM, Aux, BatchlessNorm
from normswap.layer.formulas import Stats


def prepare(model: nn.Module, original: nn.Module, swaps: Iterable[Swap], *, aux: Aux, stats: Stats) -> None:
    """Set how the new BatchlessNorm layers of `model` train. Those that `original` had keep what they have.

    A layer takes the momentum of the layer that it was made from (where that is None, a cumulative average, BatchNorm's default), and the
    number of its calls in one forward pass.
    """
    known = {name for name, module in original.named_modules() if isinstance(module, BatchlessNorm)}
    calls = {swap.name: swap.calls for swap in swaps}
    for name, layer in model.named_modules():
        if not isinstance(layer, BatchlessNorm) or name in known:
            continue
        layer.aux, layer.stats = aux, stats
        momentum = None if layer.source is None else layer.source.attributes.get("momentum")
        layer.momentum = float(momentum) if isinstance(momentum, (int, float)) else MOMENTUM
        layer.calls = calls.get(name) or 1
        optimizer_step.watch(layer)
