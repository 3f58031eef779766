"""Differentially private training with Opacus: a copy of a converted model that Opacus accepts."""

from __future__ import annotations

import copy
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor, nn

from normswap.errors import UsageError
from normswap.layer import formulas
from normswap.layer.batchless_norm import BatchlessNorm, BatchlessNormAct
from normswap.training.loss import check_is_module, layers_of


class PrivateNorm(BatchlessNorm):
    """A BatchlessNorm under the hooks of Opacus, which see its input and its output."""

    forward = BatchlessNorm.forward  # not that of the class it is mixed with below

    def __call__(self, *args: Any, **kwargs: Any) -> Tensor:
        if self.run.mask is not None:
            raise UsageError(
                "the per-sample gradients of Opacus are computed in backward, without the mask of normswap.masked",
                hint="freeze the statistics, and leave normswap.masked out",
            )
        # A backward hook hands out a view, into which a residual connection must not add in place. The copy is no view.
        return super().__call__(*args, **kwargs).clone()  # type: ignore[no-any-return]

    def buffers(self, recurse: bool = True) -> Iterator[Tensor]:
        # Opacus refuses layers with buffers, as training may change them without noise. Those of this layer never change.
        return iter(())


class PrivateNormAct(PrivateNorm, BatchlessNormAct):
    """A BatchlessNormAct under the hooks of Opacus: its dropout and activation run after the hooks."""

    def __call__(self, *args: Any, **kwargs: Any) -> Tensor:
        return self.act(self.drop(super().__call__(*args, **kwargs)))  # type: ignore[no-any-return]


@torch.no_grad()
def per_sample_gradients(layer: BatchlessNorm, x: Tensor, by_output: Tensor) -> dict[nn.Parameter, Tensor]:
    """The gradient of each sample by each trained parameter of the layer: (samples, *shape of the parameter).

        weight   sum((x - mean) / std  by_output)        over all axes that are neither sample nor channel
        bias     sum(by_output)
        mean, std   the gradients of the NLL of that sample (`formulas.nll_gradients`), whatever by_output is

    x (N, ...): the input. by_output: the gradient by the layer's output, of the same shape.
    """
    mean, std, parameter = (
        t.view(formulas.axes_shape(t.shape, layer.channel_axis, x.dim())) for t in (layer.mean, layer.statistics()[1], layer.std_parameter)
    )
    settings = layer._settings()
    misfit = formulas.misfit(formulas.sums(x, mean, kept=[0]), std, eps=layer._eps)
    by_mean, by_parameter = formulas.nll_gradients(misfit, std, parameter, layer.std, stats=settings.stats, reduction=settings.reduction)
    found = {layer.mean: by_mean * settings.share, layer.std_parameter: by_parameter * settings.share}
    if layer.weight is not None and layer.bias is not None:
        channels = {axis % x.dim() for axis in layer.channel_axis}
        rest = [axis for axis in range(1, x.dim()) if axis not in channels]
        for of, values in ((layer.weight, (x.to(std.dtype) - mean) / std * by_output), (layer.bias, by_output.to(std.dtype))):
            found[of] = values.sum(rest) if rest else values
    return {of: value.reshape(len(x), *of.shape) for of, value in found.items() if of.requires_grad}


def _sampler(layer: nn.Module, activations: list[Tensor], backprops: Tensor) -> dict[nn.Parameter, Tensor]:
    assert isinstance(layer, BatchlessNorm)
    return per_sample_gradients(layer, activations[0], backprops)


def for_opacus(model: nn.Module) -> nn.Module:
    """A copy of a converted model, in train mode, for `opacus.PrivacyEngine.make_private`. `model` is left as it is.

        private = normswap.for_opacus(conversion.model)
        private, optimizer, loader = PrivacyEngine().make_private(module=private, optimizer=SGD(private.parameters(), lr=.1), ...)
        ...
        conversion.model.load_state_dict(private.to_standard_module().state_dict())      # the same keys

    The copy has the same function, parameters and state dict. What differs: activations do not work in place, as they would change what the
    hooks of Opacus see, and the layers copy their output. Opacus computes the per-sample gradients of the layers by `per_sample_gradients`.
    The statistics are clipped and get noise like weights, and step as always (`layer.optimizer_step`), so that epsilon covers them.

    Raises UsageError if Opacus is not installed, if the model has no BatchlessNorm, or one whose statistics are trained but get no gradient
    by themselves (aux is not "auto"), or one whose channels lie on axis 0, where Opacus expects the samples.
    """
    try:
        from opacus.grad_sample import register_grad_sampler
    except ImportError as error:
        raise UsageError("private training needs Opacus, which is not installed", hint="pip install 'normswap[private]'") from error
    check_is_module(model)
    private = copy.deepcopy(model).train()
    for name, layer in layers_of(private).items():
        trained = any(p.requires_grad for p in (layer.mean, layer.std_parameter))
        if trained and layer.aux != "auto":
            raise UsageError(
                f"the statistics of {name or 'the model'} are trained, with aux={layer.aux!r}: they would get noise and no gradient",
                hint='convert with aux="auto", or freeze them: requires_grad_(False)',
            )
        if 0 in layer.channel_axis:
            raise UsageError(f"the channels of {name or 'the model'} lie on axis 0, where Opacus expects the samples")
        # A coupled layer changes the gradient of its producer, which Opacus takes from its own hooks; a trend comes from many samples.
        layer.make_plain()
        layer.__class__ = PrivateNormAct if isinstance(layer, BatchlessNormAct) else PrivateNorm
    for module in private.modules():
        if getattr(module, "inplace", False) is True:
            module.inplace = False  # type: ignore[assignment]
    register_grad_sampler([PrivateNorm, PrivateNormAct])(_sampler)
    return private
