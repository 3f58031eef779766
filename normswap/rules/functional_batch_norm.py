"""A call of F.batch_norm, torch.batch_norm or aten's batch_norm in a graph -> BatchlessNorm, exactly.

With training=False the call computes     weight * (x - running_mean) / sqrt(running_var + eps) + bias,     as `batch_norm.py` has it.
The graph becomes a call of a BatchlessNorm that holds the tensors the call was given.
Shapes: x (N, C, *space); running_mean, running_var, weight, bias (C,).

A call in the Python code of a module cannot be rewritten without rewriting that code; it is skipped.
"""

from __future__ import annotations

from typing import Any, cast

from torch import Tensor, fx, nn
from torch.nn.modules.batchnorm import _BatchNorm

from normswap.batchless import BatchlessNorm
from normswap.functional import KINDS
from normswap.plan import Rule, Site
from normswap.rules.batch_norm import from_statistics, why_not_statistics

IN_CODE = (
    "is a call of {function} in the code of a module, which can only be replaced in a traced model; "
    "make it a layer, or convert the model's torch.fx graph or exported program"
)


class BatchNormCall(_BatchNorm):
    """BatchNorm that, like the function, does not ask for the rank of its input. What `revert` gives back for a call."""

    def _check_input_dim(self, input: Tensor) -> None:
        pass


def recognises(site: Site) -> bool:
    return site.function is not None and KINDS[site.function] == "batch_norm"


def check(site: Site) -> str | None:
    if site.arguments is None:
        return IN_CODE.format(function=site.function)
    arguments = site.arguments
    training = arguments.get("training", False)
    if isinstance(training, fx.Node):
        return f"takes a training flag that the graph computes ({training}), so it is not a constant"
    if training and arguments.get("running_mean") is not None:
        return "normalizes by each batch's own statistics (training=True was traced); trace the model in eval mode"
    for name in ("running_mean", "running_var", "weight", "bias"):
        value = arguments.get(name)
        if value is not None and not isinstance(value, Tensor):
            return f"takes a {name} that the graph computes ({value}), so it is not a constant"
    if not isinstance(arguments["eps"], (int, float)):
        return f"takes an eps that the graph computes ({arguments['eps']}), so it is not a constant"
    return why_not_statistics(arguments.get("running_mean"), arguments.get("running_var"), arguments["eps"])


def build(site: Site, std: str) -> nn.Module:
    arguments = cast("dict[str, Any]", site.arguments)
    # Held as the layer that makes this call, so that one function builds, records and can revert both.
    layer = BatchNormCall(arguments["running_mean"].shape[0], eps=arguments["eps"], affine=False)
    for name in ("running_mean", "running_var"):
        setattr(layer, name, arguments[name].detach())
    layer.num_batches_tracked = None
    for name in ("weight", "bias"):
        value = arguments[name]
        if value is not None:
            layer.register_parameter(name, value if isinstance(value, nn.Parameter) else nn.Parameter(value.detach(), requires_grad=False))
    layer.affine = layer.weight is not None
    layer.eval()
    return from_statistics(layer, BatchlessNorm, std)


RULE = Rule("functional_batch_norm", recognises, check, build)
