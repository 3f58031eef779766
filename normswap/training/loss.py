"""The auxiliary loss, which trains the statistics of BatchlessNorm layers: its explicit form, the scale of its automatic one, masks."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.amp.grad_scaler import GradScaler

from normswap.errors import UsageError
from normswap.layer.batchless_norm import BatchlessNorm
from normswap.layer.train_pass import signed


def check_is_module(model: object) -> None:
    """Raise UsageError for what is no module, such as a Conversion."""
    if not isinstance(model, nn.Module):
        raise UsageError(f"a {type(model).__name__} has no layers", hint="give the model: conversion.model, or program.module()")


def layers_of(model: nn.Module) -> dict[str, BatchlessNorm]:
    """Every BatchlessNorm of a model under its first name, which warnings then use. Raises UsageError if there is none."""
    check_is_module(model)
    found = {name: module for name, module in model.named_modules() if isinstance(module, BatchlessNorm)}
    if not found:
        raise UsageError(
            f"{type(model).__name__} has no BatchlessNorm layer",
            hint="normswap.convert(model).model has; in the module of an exported program the term is a part of the graph",
        )
    for name, layer in found.items():
        layer.run.name = name
    return found


def aux_loss(model: nn.Module) -> Tensor:
    """The sum of the NLL of every layer, over its calls since aux_loss was last called: a scalar to add to the loss of the task.

        loss = task(model(x)) + normswap.aux_loss(model)

    For a model that was converted with aux="explicit". The gradient of the sum reaches the mean and the std of each layer and nothing else;
    `stats` decides its form. Calls of a layer in eval mode or under `torch.no_grad` do not count, nor those that a checkpoint repeats in
    backward. Called twice in a row, it gives the same sum; the next forward pass starts a new one.

    Raises UsageError for a model whose layers add the term themselves (aux="auto": it would count twice), for one that has none, and if
    there was no forward pass in train mode.
    """
    layers = layers_of(model)
    for name, layer in layers.items():
        if layer.aux == "auto":
            raise UsageError(
                f'{name or "the model"} has aux="auto": it adds its term by itself in backward, so that it would count twice',
                hint='leave aux_loss out, or convert with aux="explicit"',
            )
    if all(layer.aux == "none" for layer in layers.values()):
        raise UsageError('every layer has aux="none", so there is no auxiliary loss', hint='convert with aux="explicit"')
    forwards = [layer.run.to_read() for layer in layers.values()]
    terms = [term for forward in forwards for term in forward.terms]
    trained = [layer for layer in layers.values() if layer.mean.requires_grad or layer.std_parameter.requires_grad]
    if not terms and trained:
        raise UsageError(
            "there was no forward pass in train mode with gradients, so there is no auxiliary loss",
            hint="call model.train(), then the model, then aux_loss(model); a copy of a model starts without a forward pass",
        )
    for forward in forwards:
        forward.read = True
    values = [_with_gradients(term.value, term.parameters, term.gradients) for term in terms]
    return torch.stack([v.to(values[0].device, values[0].dtype) for v in values]).sum() if values else torch.zeros(())


class _WithGradients(torch.autograd.Function):
    """A scalar as a function of parameters whose gradients are given: apply(value, *parameters, *gradients)."""

    generate_vmap_rule = True

    @staticmethod
    @signed
    def forward(value: Tensor, *parameters_and_gradients: Tensor) -> Tensor:
        return value.clone()

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Any) -> None:
        ctx.save_for_backward(*inputs[1 + len(inputs) // 2 :])

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor | None, ...]:
        given = ctx.saved_tensors
        return None, *(by * gradient for by in given), *(None for _ in given)


def _with_gradients(value: Tensor, parameters: Sequence[Tensor], gradients: Sequence[Tensor]) -> Tensor:
    """The scalar `value`, with `gradients` as its gradients by the parameters. No activation is saved for backward."""
    return _WithGradients.apply(value, *parameters, *gradients)  # type: ignore[no-any-return, no-untyped-call]


def attach(model: nn.Module, *, scaler: GradScaler | None = None, accumulate: int = 1) -> None:
    """Tell the layers of a model with aux="auto" how its loss is scaled before backward, so that their term has weight 1 per step.

    scaler: the GradScaler that scales the loss. Its scale is read in backward; autograd raises an error if `scaler.update()` came between
    forward and backward. accumulate: the number of backward passes per step, where the loss is divided by it. Each call sets both: one
    that is not given gets its default. A copy of the model, or a loaded one, needs a call of its own.

    Without a call the step corrects the gradients, and warns. Raises UsageError for a model with another `aux`, whose term is in the loss.
    """
    layers = [layer for layer in layers_of(model).values() if layer.aux == "auto"]
    if not layers:
        raise UsageError(
            'no layer of this model has aux="auto": there is nothing to attach',
            hint="the term of aux_loss is part of the loss, and scaled with it",
        )
    if isinstance(accumulate, bool) or not isinstance(accumulate, int) or accumulate < 1:
        raise UsageError(f"accumulate is {accumulate!r}; expected the number of backward passes per step, at least 1")
    if scaler is not None and not isinstance(scaler, GradScaler):
        raise UsageError(f"scaler is a {type(scaler).__name__}; expected a torch.amp.GradScaler")
    for layer in layers:
        run = layer.run
        run.scaler, run.scale, run.accumulate, run.share = scaler, None, accumulate, 1 / accumulate
        if scaler is not None and scaler.is_enabled():
            # A scaler makes the tensor that holds its scale when it is first used, and changes it in place from then on.
            scaler.scale(torch.zeros(1, device=layer.mean.device))
            run.scale = scaler._scale


@contextlib.contextmanager
def masked(model: nn.Module, mask: Tensor) -> Iterator[None]:
    """A context in which the statistics of `model` learn only from the positions where `mask` is True: not from padding.

    mask: bool; its axes are the first of those of each layer's input that are not channels: (N, T) for an input (N, C, T) or (N, T, C), or
    (N,) to leave out whole samples. The outputs of the layers do not depend on it. Put the forward pass into the context (with
    checkpoints, the backward pass too). A layer whose input has another length, after a stride for instance, raises ValueError.
    """
    layers = list(layers_of(model).values())
    before = [layer.run.mask for layer in layers]
    for layer in layers:
        layer.run.mask = mask
    try:
        yield
    finally:
        for layer, old in zip(layers, before, strict=True):
            layer.run.mask = old
