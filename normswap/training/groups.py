"""Parameter groups for any optimizer of torch, and the state-dict keys of norms for federated training."""

from __future__ import annotations

from typing import Any

from torch import fx, nn
from torch.nn.modules.batchnorm import _NormBase

from normswap.errors import UsageError
from normswap.layer.batchless_norm import BatchlessNorm
from normswap.layer.export_operator import adopt, inject_operator
from normswap.layer.optimizer_step import MARK, PACE, STATISTICS
from normswap.layer.run import Layer, pace_of, watch_passes
from normswap.training.loss import check_is_module, layers_of


def param_groups(model: nn.Module, *, lr: float, weight_decay: float = 0.0, batch: int | None = None) -> list[dict[str, Any]]:
    """Every trainable parameter of `model`, exactly once, in groups for an optimizer:  torch.optim.AdamW(param_groups(model, lr=1e-3)).

        1  weights of two or more dimensions                    lr, weight_decay
        2  biases, and the weights of norms                     lr, no weight decay
        3  statistics of the layers, one group per momentum     lr = momentum, no weight decay, no momentum

    batch: the number of samples in a step, over all micro-batches and processes. Below 8 the statistics are averaged over more steps, with
    `momentum` times sqrt(batch / 8). None keeps the momentum.

    Empty groups are left out. The statistics' groups have the key "normswap". With stats="natural" the layers step their statistics
    themselves when the optimizer steps (`layer.optimizer_step`); with stats="raw" the optimizer steps them, at `lr`.

    Raises UsageError if the model has no BatchlessNorm layer, or for a batch below 1.
    """
    if batch is not None and (isinstance(batch, bool) or not isinstance(batch, int) or batch < 1):
        raise UsageError(f"batch is {batch!r}; expected the number of samples in a step, at least 1")
    rates: dict[nn.Parameter, float] = {}
    for layer in _in_graph(model) or layers_of(model).values():
        if layer.aux == "auto":
            watch_passes(layer)
        layer.run.pace = pace_of(batch)
        momentum = layer.momentum * layer.run.pace
        for parameter in (layer.mean, layer.std_parameter):
            rates.setdefault(parameter, momentum if layer.stats == "natural" and layer.aux != "none" else lr)
        for own in (layer.input_mean, layer.trend):
            if own is not None:
                rates.setdefault(own, momentum)
    trained = [p for p in model.parameters() if p.requires_grad]
    others = [p for p in trained if p not in rates]
    groups = [
        {"params": [p for p in others if p.dim() > 1], "lr": lr, "weight_decay": weight_decay},
        {"params": [p for p in others if p.dim() <= 1], "lr": lr, "weight_decay": 0.0},
    ]
    for rate in sorted(set(rates.values())):
        statistics = [p for p in trained if rates.get(p) == rate]
        fixed: dict[str, Any] = {"lr": rate, "weight_decay": 0.0, "momentum": 0.0, MARK: STATISTICS, PACE: pace_of(batch)}
        groups.append({"params": statistics, **fixed})
    groups = [group for group in groups if group["params"]]
    if not groups:
        raise UsageError(f"{type(model).__name__} has no parameter that requires a gradient", hint="nothing to train: requires_grad_(True)")
    return groups


def norm_keys(model: nn.Module) -> list[str]:
    """The state-dict keys of every BatchlessNorm of `model`, and of every BatchNorm that is left, under all their names.

    For federated training that keeps the norms of each client local (FedBN): chosen by class, so that no layer is missed for its name. The
    keys of an activation inside such a layer are not among them.
    """
    check_is_module(model)
    keys = []
    for name, module in model.named_modules(remove_duplicate=False):
        if isinstance(module, (BatchlessNorm, _NormBase)):
            keys += [f"{name}.{key}" if name else key for key in (*module._parameters, *module._buffers)]
    found = set(keys)
    return [key for key in model.state_dict() if key in found]


def _in_graph(model: nn.Module) -> list[Layer]:
    """The statistics that the graph of an exported program names, if `model` is the module of one."""
    found: list[Layer] = []
    if isinstance(model, fx.GraphModule) and not any(isinstance(module, BatchlessNorm) for module in model.modules()):
        for node in model.graph.nodes:
            if node.target is inject_operator():
                mean, parameter = (model.get_parameter(node.args[i].target) for i in (1, 2))
                layer = adopt(mean, parameter, *node.args[5:])
                found += [layer] if layer is not None else []
    return found
