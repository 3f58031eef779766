"""A module that calls itself a norm and that no other rule knows: listed, and left as it is.

Recognised by the class, a subclass of torch's, or by its name: "norm" in it (but not "normalize", which is of images), or a customary
acronym; and by having no child that computes something of its own, so that containers such as ConvNormAct are not taken for a norm.
"""

from __future__ import annotations

import re

import torch
from torch import nn

from normswap.detect.sites import Rule, Site
from normswap.layer.batchless_norm import BatchlessNorm
from normswap.rules.plain import OWN_RULE

_NAME = re.compile(r"(?i:norm(?!alize))|(BN|LN|GN|FRN|GRN|LRN)(\d[dD])?$")

# A subclass with a forward of its own, whatever it is called.
_NORMS = (nn.LayerNorm, nn.GroupNorm, nn.RMSNorm, nn.LocalResponseNorm)


def recognises(site: Site) -> bool:
    module = site.module
    if module is None or isinstance(module, BatchlessNorm) or not (isinstance(module, _NORMS) or _NAME.search(_class_name(module))):
        return False
    if type(module).__module__ == nn.utils.parametrizations.__name__:  # spectral_norm and weight_norm: of weights
        return False
    return not any(_computes(child) for child in module.modules() if child is not module)


def _class_name(module: nn.Module) -> str:
    return module.original_name if isinstance(module, torch.jit.ScriptModule) else type(module).__name__


def _computes(child: nn.Module) -> bool:
    quantised = type(child).__module__.startswith(("torch.ao.", "torchao."))  # its weights are packed away and are no parameters
    return quantised or any(True for _ in child.parameters(recurse=False)) or bool(_NAME.search(_class_name(child)))


def check(site: Site) -> str:
    cls = type(site.module)
    if isinstance(site.module, torch.jit.ScriptModule):
        return f"is TorchScript ({_class_name(site.module)}), which cannot be replaced; convert the model before it is scripted"
    return f"{cls.__module__}.{cls.__qualname__} is not a normalization that normswap knows; to swap it, {OWN_RULE}"


RULE = Rule("unknown", recognises, check)
