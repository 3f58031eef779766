"""Training a model with RMSNorm as it would train with LayerNorm: the weights that write its stream stay without a mean."""

from __future__ import annotations

from typing import TYPE_CHECKING, TypeVar

from torch import nn
from torch.nn.utils import parametrize

from normswap.errors import UsageError
from normswap.layer.rms_norm import Centred

if TYPE_CHECKING:
    from collections.abc import Iterable

M = TypeVar("M", bound=nn.Module)


def keep_centred(model: M, weights: Iterable[tuple[str, int]]) -> M:
    """Keep the mean out of the weights that write the stream of a model converted with to="rmsnorm" while it trains, in place.

        W = C V          C V = V - mean of V over the channels that it writes

    Each weight W becomes a parametrization of torch with the new parameter V, and the model then trains as it would have with LayerNorm:
    the same outputs and the same steps of every optimizer, but where something else takes the stream off its mean 0: a dropout of single
    channels, or a gain (LayerScale) that trains.

    weights: (name of a parameter, axis), as `Conversion.centred` gives them. A gain that went into a weight is 1: freeze it.
    Make the optimizer after this call. `normswap.save` writes plain weights W; `remove_parametrizations` of torch makes them plain here.
    Returns the model. Raises UsageError for a name that is no parameter of it.
    """
    named = dict(model.named_parameters())
    weights = list(weights)
    for name, _ in weights:
        if name not in named:
            raise UsageError(
                f"{name} is no parameter of the {type(model).__name__}",
                hint='give the model of a conversion with to="rmsnorm", and that conversion\'s `centred`, once',
            )
    for name, axis in weights:
        owner, _, own_name = name.rpartition(".")
        parametrize.register_parametrization(model.get_submodule(owner), own_name, Centred(axis))
    return model
