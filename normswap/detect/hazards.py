"""The tensors and settings of one norm, and the hazards that follow from them: each a fixed code and a clause about the norm.

    called_repeatedly         one norm, several calls in a forward
    never_called              no forward in eval mode calls it
    never_updated             running mean 0 and variance 1 in every channel, as initialised
    not_counted               num_batches_tracked is 0 although the statistics are not the initial ones
    no_running_statistics     BatchNorm without running statistics (track_running_stats=False)
    tracking_switched_off     BatchNorm with running statistics, and track_running_stats=False set later
    batch_statistics          a call with training=True in eval mode
    cumulative_momentum       momentum=None
    one_value_per_channel     BatchNorm whose input has one value per channel and sample
    not_finite                NaN or infinity among its tensors
    written_in_place          the next operation overwrites its output

docs/inspect.md says what each means to the user.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal

from torch import Tensor, nn
from torch.nn.parameter import is_lazy

from normswap.detect.functional import KINDS
from normswap.models.own_code import BASES
from normswap.models.torch_private import AnyBatchNorm

# A channel's std or weight is "about 0" below this share of the layer's median: for the layers that follow, the channel is constant.
ABOUT_ZERO = 1e-4

Momentum = float | Literal["cumulative"] | None

_TENSORS = ("running_mean", "running_var", "weight", "bias")
_EPS = ("eps", "variance_epsilon", "epsilon")  # the second is transformers'


@dataclass(frozen=True)
class Hazard:
    """One warning: a code that does not change between versions, and a clause about the norm."""

    code: str
    text: str


@dataclass(frozen=True)
class Contents:
    """The tensors and settings of a norm layer, or of one call of a normalizing function.

    batch      whether it is a BatchNorm layer, whose train mode takes its statistics over the batch
    tracked    whether there are running statistics; `tensors` lacks tensors without values (meta, lazy)
    tracking   BatchNorm's track_running_stats; None for any other norm
    training   whether a call of batch_norm has training=True, and so uses the batch's statistics
    scales     whether the output is multiplied by the weight itself, not by 1 + weight or the like
    """

    tensors: Mapping[str, Tensor] = field(default_factory=dict)
    eps: float | None = None
    momentum: Momentum = None
    batches: int | None = None
    batch: bool = False
    tracked: bool = False
    tracking: bool | None = None
    training: bool = False
    scales: bool = False

    @property
    def channels(self) -> int | None:
        return next((self.tensors[name].numel() for name in ("running_var", "weight", "bias") if name in self.tensors), None)

    @property
    def dead_channels(self) -> int | None:
        """Channels whose running std is about 0."""
        var = self.tensors.get("running_var")
        return None if var is None else about_zero(var.double().clamp(min=0).sqrt())

    @property
    def zero_weights(self) -> int | None:
        """Channels whose weight is about 0."""
        weight = self.tensors.get("weight")
        return None if weight is None or not self.scales else about_zero(weight.double().abs())


def about_zero(values: Tensor) -> int:
    """How many of the values (all >= 0) are at most ABOUT_ZERO times the median of the positive ones."""
    positive = values[(values > 0) & values.isfinite()]
    return int((values <= (ABOUT_ZERO * positive.median() if positive.numel() else 0)).sum())


def contents_of(module: nn.Module) -> Contents:
    """The contents of a norm layer, which is not changed."""
    batch = isinstance(module, AnyBatchNorm)
    batches = _known(getattr(module, "num_batches_tracked", None))
    momentum = getattr(module, "momentum", None)
    var = getattr(module, "running_var", None)
    return Contents(
        tensors={name: tensor for name in _TENSORS if (tensor := _known(getattr(module, name, None))) is not None},
        eps=next((_number(getattr(module, name)) for name in _EPS if hasattr(module, name)), None),
        momentum="cumulative" if batch and momentum is None else _number(momentum),
        batches=int(batches) if batches is not None and batches.numel() == 1 else None,
        batch=batch,
        tracked=var is not None,
        tracking=bool(module.track_running_stats) if batch else None,
        scales=isinstance(module, BASES) or isinstance(var, Tensor),
    )


def contents_of_call(function: str, arguments: Mapping[str, Any]) -> Contents:
    """The contents of one call of a normalizing function. arguments: as `functional.bind` names them."""
    return Contents(
        tensors={name: tensor for name in _TENSORS if (tensor := _known(arguments.get(name))) is not None},
        eps=_number(arguments.get("eps")),
        momentum=_number(arguments.get("momentum")),
        tracked=arguments.get("running_mean") is not None,
        training=KINDS.get(function) == "batch_norm" and bool(arguments.get("training", False)),
        scales=True,
    )


def _known(value: Any) -> Tensor | None:
    """The value if it is a tensor whose elements can be read; else None."""
    if not isinstance(value, Tensor) or is_lazy(value) or value.is_meta or value.is_quantized:
        return None
    return value.detach()


def _number(value: Any) -> float | None:
    return float(value) if isinstance(value, (int, float)) and not isinstance(value, bool) else None


def hazards_of(
    contents: Contents, calls: int | None, shapes: Sequence[Sequence[int]], samples: int, writers: Sequence[str]
) -> tuple[Hazard, ...]:
    """Every hazard of one norm.

    calls: in one forward pass of `samples` samples; shapes: of the norm's inputs (N, C, *space); writers: what overwrites its output.
    """
    checks = (_initial_statistics, _no_running_statistics, _cumulative_momentum, _not_finite)
    found = (_calls(calls), *(check(contents) for check in checks), _one_value(contents, shapes, samples), _written(writers))
    return tuple(hazard for hazard in found if hazard is not None)


def _calls(calls: int | None) -> Hazard | None:
    if calls == 0:
        return Hazard("never_called", "is not called by a forward pass in eval mode, so nothing measured says anything about it")
    if calls is not None and calls > 1:
        return Hazard(
            "called_repeatedly",
            f"is called {calls} times in one forward: all calls share one set of statistics, and train mode mixes what it sees in each",
        )
    return None


def _initial_statistics(contents: Contents) -> Hazard | None:
    mean, var = contents.tensors.get("running_mean"), contents.tensors.get("running_var")
    if mean is not None and var is not None and mean.numel() > 0 and bool((mean == 0).all()) and bool((var == 1).all()):
        return Hazard(
            "never_updated",
            "has running_mean 0 and running_var 1 in every channel, as they are initialised: it was never trained, "
            "or its statistics were not loaded",
        )
    if contents.batches == 0 and var is not None:
        return Hazard(
            "not_counted",
            "has num_batches_tracked 0, yet statistics that are not the initial ones: something set them without counting (weights "
            "converted from elsewhere, for one), and a swap takes them as they are",
        )
    return None


def _no_running_statistics(contents: Contents) -> Hazard | None:
    if contents.training:
        return Hazard(
            "batch_statistics",
            "is called with training=True in a forward pass in eval mode: the output for one sample depends on the others",
        )
    if contents.batch and not contents.tracked:
        return Hazard(
            "no_running_statistics",
            "keeps no running statistics (track_running_stats=False): it normalizes by each batch's own, in eval mode too, so the output "
            "for one sample depends on the others",
        )
    if contents.tracking is False:
        return Hazard(
            "tracking_switched_off",
            "has running statistics, but track_running_stats=False: eval mode uses them, train mode no longer updates them",
        )
    return None


def _cumulative_momentum(contents: Contents) -> Hazard | None:
    if contents.momentum != "cumulative" or not contents.tracked:
        return None
    return Hazard(
        "cumulative_momentum",
        "has momentum=None: its statistics are the plain average of all batches so far, so training on moves them less and less"
        + (", and the next batch replaces them, as num_batches_tracked is 0" if contents.batches == 0 else ""),
    )


def _not_finite(contents: Contents) -> Hazard | None:
    counts = {name: int((~tensor.isfinite()).sum()) for name, tensor in contents.tensors.items()}
    bad = [f"{count} of {contents.tensors[name].numel()} values of {name}" for name, count in counts.items() if count]
    return Hazard("not_finite", f"has {', '.join(bad)} that are not finite") if bad else None


def _one_value(contents: Contents, shapes: Sequence[Sequence[int]], samples: int) -> Hazard | None:
    # If N is larger than the number of samples, each sample has several values: a model may flatten its tokens into N.
    if not contents.batch or not any(math.prod(shape[2:]) == 1 and shape[0] <= samples for shape in shapes):
        return None
    return Hazard(
        "one_value_per_channel",
        "gets one value per channel and sample: train mode takes its variance over the batch alone and raises for a batch of 1, "
        "while eval mode runs",
    )


def _written(writers: Sequence[str]) -> Hazard | None:
    if not writers:
        return None
    return Hazard(
        "written_in_place",
        f"has its output overwritten in place by {', '.join(sorted(set(writers)))}: a swap keeps that safe, as BatchlessNorm "
        "returns a new tensor too; but a hook or feature extractor that keeps the output sees it after the write",
    )
