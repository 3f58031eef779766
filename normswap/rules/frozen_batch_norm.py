"""FrozenBatchNorm2d of torchvision, transformers' detectors, detectron2 ... -> BatchlessNorm, exactly.

    y = x * scale + (bias - running_mean * scale),  scale = weight / sqrt(running_var + eps)

is BatchNorm in eval mode: the formula and shapes of `batch_norm.py`. Its tensors are buffers, so the parameters come out frozen too.

torchvision's layer is recognised by its class. Any other layer that has running statistics and is not a BatchNorm of torch is run on random
data (`recognise.py`): it has to compute this formula in train and in eval mode. eps may be a number in its code.

Source: torchvision/ops/misc.py. torchvision is not imported, for the reason given in `batch_norm_act.py`.
"""

from __future__ import annotations

import sys
from typing import Any, cast

import torch
from torch import Tensor, nn

from normswap.detect.sites import Rule, Site
from normswap.layer.batchless_norm import BatchlessNorm
from normswap.models.torch_private import AnyBatchNorm, AnyInstanceNorm
from normswap.rules import plain
from normswap.rules.batch_norm import from_statistics, why_not_statistics
from normswap.rules.recognise import recognise_frozen


def _class() -> type[nn.Module] | None:
    return getattr(sys.modules.get("torchvision.ops.misc"), "FrozenBatchNorm2d", None)


def recognises(site: Site) -> bool:
    cls = _class()
    return (cls is not None and isinstance(site.module, cls)) or _computes_it(site.module)


def _computes_it(module: nn.Module | None) -> bool:
    if isinstance(module, (AnyBatchNorm, AnyInstanceNorm, torch.jit.ScriptModule)) or module is None or list(module.children()):
        return False
    statistics = (getattr(module, "running_mean", None), getattr(module, "running_var", None))
    if not all(isinstance(t, Tensor) and not t.is_meta for t in statistics):
        return False
    return recognise_frozen(module) is not None


def check(site: Site) -> str | None:
    module, cls = cast(Any, site.module), _class()
    forward = cls.forward if cls is not None and isinstance(module, cls) else type(module).forward
    return plain.why_not_plain(site, {forward}) or why_not_statistics(module.running_mean, module.running_var, _eps(module))


def _eps(module: nn.Module) -> float:
    cls = _class()
    found = cast(float, module.eps) if cls is not None and isinstance(module, cls) else recognise_frozen(module)
    assert found is not None
    return found


def build(site: Site, std: str) -> nn.Module:
    module = cast(nn.Module, site.module)
    return from_statistics(module, BatchlessNorm, std, eps=_eps(module))


RULE = Rule("frozen_batch_norm", recognises, check, build)
