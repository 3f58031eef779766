"""What the callbacks of all trainers share: attach the layers, warn about the optimizer, clip gradients, read the drift."""

from __future__ import annotations

import warnings
from collections.abc import Iterable, Mapping
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.amp.grad_scaler import GradScaler, OptState

from normswap.errors import UsageError, listed
from normswap.layer.batchless_norm import BatchlessNorm
from normswap.layer.optimizer_step import MARK, STATISTICS
from normswap.training.drift import PREFIX, drift
from normswap.training.loss import attach, layers_of


class Advice(NamedTuple):
    """What warnings advise the user of one trainer to do.

    groups     how to give the trainer an optimizer of `param_groups`
    unclipped  the setting with which the trainer does not clip gradients
    clipped    the setting with which it clips them
    """

    groups: str
    unclipped: str
    clipped: str


def check_max_norm(max_grad_norm: float | None) -> None:
    if max_grad_norm is not None and not max_grad_norm > 0:
        raise UsageError(f"max_grad_norm is {max_grad_norm!r}; expected a number above 0, or None for no clipping")


def attach_if_automatic(model: nn.Module, *, scaler: GradScaler | None = None, accumulate: int = 1) -> None:
    """Call `attach` if a layer has aux="auto". An explicit term is part of the loss, and needs no call."""
    if any(layer.aux == "auto" for layer in layers_of(model).values()):
        attach(model, scaler=scaler, accumulate=accumulate)


def warn_about_optimizers(model: nn.Module, optimizers: Iterable[Any], advice: Advice, *, clips: bool) -> None:
    """Warn of what a trainer would do to the statistics of `model` that `param_groups` prevents. clips: whether it clips gradients.

    Statistics with stats="natural" may be in any group: the layers step them, and no weight decay reaches them.
    """
    groups: dict[nn.Parameter, Mapping[str, Any]] = {p: g for o in optimizers for g in o.param_groups for p in g["params"]}
    trained = {name: layer for name, layer in layers_of(model).items() if layer.aux != "none" and _trains(layer)}
    left = [name for name, layer in trained.items() if not any(p in groups for p in _statistics(layer))]
    if left:
        _warn(
            f"no optimizer holds the statistics of {_names(left)}, so they stay as they are. {advice.groups}. "
            "Or freeze them, if that is meant: layer.mean.requires_grad_(False), and its std"
        )
    raw = [(name, p) for name, layer in trained.items() if layer.stats == "raw" for p in _statistics(layer)]
    like_weights = {name: groups[p] for name, p in raw if p in groups and groups[p].get(MARK) != STATISTICS}
    if like_weights:
        decays = sorted({float(group.get("weight_decay") or 0.0) for group in like_weights.values()})
        _warn(
            f'the statistics of {_names(like_weights)} were converted with stats="raw" and are in a group with weights, '
            f'with weight_decay {", ".join(map(str, decays))}. {advice.groups}. Or convert with stats="natural"'
        )
    if clips and trained:
        _warn(
            f"{advice.clipped} clips the gradients of all parameters together. Those of the statistics have the units of the activations "
            f"and may be most of the norm. Say {advice.unclipped} and NormswapCallback(max_grad_norm=...), which clips the others only"
        )


def warn_about_decay(model: nn.Module, optimizer: Any, advice: Advice) -> None:
    """Warn of weight decay on the weights and biases of norms."""
    decays = {id(p) for group in optimizer.param_groups if group.get("weight_decay") for p in group["params"]}
    decayed = [name for name, layer in layers_of(model).items() if any(id(p) in decays for p in (layer.weight, layer.bias))]
    if decayed:
        _warn(f"weight decay reaches the weights of {_names(decayed)}, which are norms. {advice.groups}")


def before_step(
    model: nn.Module, optimizer: torch.optim.Optimizer, scaler: GradScaler | None, *, max_grad_norm: float | None, share: float = 1.0
) -> dict[str, Tensor]:
    """Right before an optimizer step: unscale the gradients, clip all but those of the statistics, and return what to log.

    share: the number of backward passes since the last step, over the `accumulate` of `attach`; the automatic term is divided by it.
    """
    if scaler is not None and scaler.is_enabled() and scaler._per_optimizer_states[id(optimizer)]["stage"] is OptState.READY:
        scaler.unscale_(optimizer)
    layers = layers_of(model)
    if share != 1:
        _multiply_gradients([layer for layer in layers.values() if layer.aux == "auto"], 1 / share)
    values = drift(model).scalars()
    if max_grad_norm is not None:
        own = {id(p) for layer in layers.values() for p in (*_statistics(layer), layer.input_mean, layer.trend)}
        others = [p for group in optimizer.param_groups for p in group["params"] if id(p) not in own]
        values[f"{PREFIX}grad_norm"] = torch.nn.utils.clip_grad_norm_(others, max_grad_norm)
    return values


@torch.no_grad()
def _multiply_gradients(layers: Iterable[BatchlessNorm], factor: float) -> None:
    for layer in layers:
        passes = layer.run.passes
        for parameter in (*_statistics(layer), layer.input_mean):  # not the trend, whose gradient comes from the loss
            if parameter is not None and parameter.grad is not None:
                parameter.grad.mul_(factor)
        if passes is not None and passes.kept is not None:
            passes.kept.mul_(factor)  # do not warn of this change, but of any other


def _statistics(layer: BatchlessNorm) -> tuple[nn.Parameter, nn.Parameter]:
    return layer.mean, layer.std_parameter


def _trains(layer: BatchlessNorm) -> bool:
    return any(p.requires_grad for p in _statistics(layer))


def _names(names: Iterable[str]) -> str:
    return listed([name or "the model" for name in names])


def _warn(message: str) -> None:
    warnings.warn(message, UserWarning, stacklevel=2)
