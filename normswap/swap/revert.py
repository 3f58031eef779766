"""A model with BatchlessNorm layers -> a new model with the layers that they were made from: the inverse of `apply.py`."""

from __future__ import annotations

from typing import TypeVar, cast

import torch
from torch import Tensor, nn

from normswap.errors import SwapError
from normswap.layer import formulas, hooks
from normswap.layer.batchless_norm import BatchlessNorm, Source
from normswap.models.copying import copy_hooks, on_meta
from normswap.models.own_code import TENSORS
from normswap.swap.apply import copy_replacing

M = TypeVar("M", bound=nn.Module)


def revert(model: M, *, skip: bool = False) -> M:
    """A new model in which every BatchlessNorm is the layer it was made from.

    A channel whose statistics have not changed since the swap gets the original ones bit for bit; a channel that was trained gets
    running_mean = mean, running_var = std^2 - eps (and eps = 0 for the layer if some std^2 < eps).

    Raises SwapError if a layer was not made from one with running statistics; with skip=True such layers stay.
    """
    if not isinstance(model, nn.Module):
        raise SwapError(
            f"a {type(model).__name__} cannot be reverted: it is not an nn.Module",
            hint="give its model: conversion.model; of an exported program, keep the original one",
        )
    layers = {m: name for name, m in model.named_modules() if isinstance(m, BatchlessNorm)}
    valueless = next((name for layer, name in layers.items() if on_meta(layer)), None)
    if valueless is not None:
        raise SwapError(f"{valueless or 'the model'} is on the meta device: it has no values to revert to", hint="load the weights first")
    unknown = [name for layer, name in layers.items() if layer.source is None]
    if unknown and not skip:
        own = {name: layer.own_rule[0] for layer, name in layers.items() if layer.source is None and layer.own_rule is not None}
        by_rules = "; ".join(f"{name} was made by your rule {kind!r}" for name, kind in own.items())
        raise SwapError(
            f"{', '.join(unknown)} cannot be reverted: no source layer with statistics was recorded" + (f" ({by_rules})" if own else ""),
            hint="use the original model: the converted one does not hold what these layers replaced; --skip (skip=True in Python) reverts "
            "the others and leaves these",
        )
    reverted = copy_replacing(model, {layer: _source_of(layer, layer.source) for layer in layers if layer.source is not None})
    for module in reverted.modules():
        hooks.release(module)
    return reverted


@torch.no_grad()
def _source_of(layer: BatchlessNorm, source: Source) -> nn.Module:
    """The layer that a BatchlessNorm was made from, with the statistics, weight and bias that the BatchlessNorm has now."""
    mean, var, eps = _recorded_or_trained(layer, source)
    tensors: dict[str, Tensor | None] = {
        "running_mean": mean,
        "running_var": var,
        "num_batches_tracked": cast("Tensor | None", layer.source_batches),
        "weight": layer.weight,
        "bias": layer.bias,
    }
    module = source.cls.__new__(source.cls)
    nn.Module.__init__(module)
    module.__dict__.update({**source.attributes, "eps": eps})
    for name in TENSORS:
        tensor = tensors[name]
        dtype = source.parameters.get(name) or source.buffers.get(name)
        value = None if tensor is None or dtype is None else tensor.detach().to(_dtype_now(dtype, layer)).clone()
        if name in source.buffers or (name not in source.parameters and name not in ("weight", "bias")):
            module.register_buffer(name, value)
        else:
            trainable = tensor is not None and tensor.requires_grad
            module.register_parameter(name, None if value is None else nn.Parameter(value, requires_grad=trainable))
    for name, child in layer._modules.items():
        module.add_module(name, child)
    copy_hooks(layer, module)
    return module


def _dtype_now(dtype: torch.dtype, layer: BatchlessNorm) -> torch.dtype:
    """The recorded dtype, or that of the layer if the model was converted to another dtype since the swap."""
    moved = layer.mean.dtype != torch.promote_types(dtype, torch.float32)
    return layer.mean.dtype if moved and dtype.is_floating_point else dtype


def _recorded_or_trained(layer: BatchlessNorm, source: Source) -> tuple[Tensor, Tensor, float]:
    """(running_mean, running_var, eps): as recorded for each channel that has not changed, else computed from the trained mean and std."""
    mean, std = layer.statistics()
    recorded_mean, recorded_var = cast("Tensor | None", layer.source_mean), cast("Tensor | None", layer.source_var)
    if recorded_mean is None or recorded_var is None:
        var, eps = formulas.variance_of_std(std, source.eps)
        return mean, var, eps
    same_mean = recorded_mean.to(mean.dtype) == mean
    same_std = layer.as_recorded()
    # Only trained channels may require eps = 0: in an unchanged channel with variance 0, std^2 may be below eps through rounding.
    _, eps = formulas.variance_of_std(std[~same_std], source.eps)
    trained = std.double().square() - eps
    # With eps = 0 the recorded variance no longer gives the recorded std, so every channel then gets the trained form.
    var = torch.where(same_std, recorded_var.double(), trained) if eps == source.eps else trained
    return torch.where(same_mean, recorded_mean.to(mean.dtype), mean), var, eps
