"""Norms that no BatchlessNorm can replace: the plan lists each under its kind, with the reason, and they stay as they are.

    affine           y = w x + b: no statistics are computed (MobileBERT's NoNorm). Found by running the layer (`recognise.py`)
    conditioned      the output depends on more than the input: a gate (Mamba 2), a condition (adaptive LayerNorm), a scale (I-BERT)
    reshaping        the output does not have the shape of the input, or is not one tensor (xLSTM's norm of heads, which joins them)
    response_norm    y = x + w x g / mean_c(g) + b,  g = |x| over space: a gate by the layer's own response (ConvNeXt V2's GRN)
    local_response_norm   y = x / (k + a/n sum x^2)^b over n neighbouring channels (AlexNet, GoogLeNet)
    evo_norm         y = w x sigmoid(v x) / std + b: normalization and activation in one formula (EvoNorm)
    filter_response_norm  y = max(w x / rms + b, t): the threshold t is a parameter of the layer (FilterResponseNormTlu2d)
    unknown          any other layer whose class is named like a norm, and that no other rule recognises

The first three are recognised by their signature and by what they compute. The others are recognised by the name of the class: a name
only chooses the reason, it never causes a swap. The rules in `CALLS` are for calls of normalizing functions for which there is no layer.

Sources: Woo et al. 2023, arXiv:2301.00808; Krizhevsky et al. 2012; Liu et al. 2020, arXiv:2004.02967; Singh & Krishnan 2020,
arXiv:1911.09737.
"""

from __future__ import annotations

import re
from collections.abc import Callable
from typing import cast

import torch
from torch import nn

from normswap.detect.functional import KINDS
from normswap.detect.sites import Rule, Site
from normswap.layer.batchless_norm import BatchlessNorm
from normswap.rules import plain
from normswap.rules.recognise import recognise, returns_otherwise

# "norm" in the name of a class, but not "normalize" (as in transforms of images); or a common acronym.
_NAME = re.compile(r"(?i:norm(?!alize))|(BN|LN|GN|FRN|GRN|LRN)(\d[dD])?$")
_NORMS = (nn.LayerNorm, nn.GroupNorm, nn.RMSNorm, nn.LocalResponseNorm)  # whatever a subclass of these is called


def is_called_a_norm(site: Site) -> bool:
    """Whether the site is a layer that is derived from a norm of torch, or whose class is named like a norm.

    A layer with a child that has parameters, or is itself named like a norm, is not one but a container, like ConvNormAct.
    """
    module = site.module
    if module is None or isinstance(module, BatchlessNorm) or not (isinstance(module, _NORMS) or _NAME.search(_class_name(module))):
        return False
    if type(module).__module__ == nn.utils.parametrizations.__name__:  # spectral_norm and weight_norm, which normalize weights
        return False
    return not any(_computes(child) for child in module.modules() if child is not module)


def _class_name(module: nn.Module) -> str:
    return module.original_name if isinstance(module, torch.jit.ScriptModule) else type(module).__name__


def _computes(child: nn.Module) -> bool:
    quantised = type(child).__module__.startswith(("torch.ao.", "torchao."))  # its weights are packed, and are not parameters
    return quantised or any(True for _ in child.parameters(recurse=False)) or bool(_NAME.search(_class_name(child)))


def _rule(kind: str, why: Callable[[nn.Module], str | None]) -> Rule:
    """The rule for layers named like norms for which `why` returns a reason: a clause that follows "which"."""

    def recognises(site: Site) -> bool:
        scripted = isinstance(site.module, torch.jit.ScriptModule)
        return not scripted and is_called_a_norm(site) and why(cast(nn.Module, site.module)) is not None

    def check(site: Site) -> str:
        module = cast(nn.Module, site.module)
        return f"is a {type(module).__name__}, which {why(module)}"

    return Rule(kind, recognises, check)


def _affine(module: nn.Module) -> str | None:
    if any(buffer.is_floating_point() for buffer in module.buffers()):  # these may be running statistics
        return None
    found = recognise(module)
    is_affine = found is not None and found.kind == "affine"
    return "multiplies and adds and takes no statistics, so there is nothing to replace; leave it" if is_affine else None


def _conditioned(module: nn.Module) -> str | None:
    more = plain.further_inputs(module)
    rest = "besides its input, as BatchlessNorm does not; leave it, or split it into the normalization and the rest"
    return f"takes {more} {rest}" if more else None


def _reshaping(module: nn.Module) -> str | None:
    how = returns_otherwise(module)
    return f"{how}; leave it, or move that out of the layer" if how else None


def _named(pattern: str, why: str) -> Callable[[nn.Module], str | None]:
    name = re.compile(pattern)
    return lambda module: why if name.search(type(module).__name__) else None


RULES: tuple[Rule, ...] = (
    _rule("affine", _affine),
    _rule("conditioned_norm", _conditioned),
    _rule("reshaping_norm", _reshaping),
    _rule(
        "response_norm",
        _named(
            r"GRN(\dd)?$|GlobalResponseNorm",
            "multiplies each channel by its share in the response of all channels over space: a gate on each sample, and no mean and std; "
            "leave it",
        ),
    ),
    _rule(
        "local_response_norm",
        _named(
            r"LocalResponseNorm|LRN(\dd)?$",
            "divides by a power of the energy of neighbouring channels at the same place: no mean and std of a channel; leave it",
        ),
    ),
    _rule(
        "evo_norm",
        _named(
            r"EvoNorm",
            "normalizes and activates in one formula, so that what is left without the statistics is no multiplication and addition; "
            "leave it",
        ),
    ),
    _rule(
        "filter_response_norm",
        _named(
            r"FilterResponseNorm.*Tlu|FRN",
            "ends in a threshold of its own parameters, so that what is left without the statistics is no multiplication and addition; "
            "leave it, or move the threshold out of the layer",
        ),
    ),
)


def _why_unknown(site: Site) -> str:
    cls = type(site.module)
    if isinstance(site.module, torch.jit.ScriptModule):
        return f"is TorchScript ({_class_name(site.module)}), which cannot be replaced; convert the model before it is scripted"
    return f"{cls.__module__}.{cls.__qualname__} is not a normalization that normswap knows; to swap it, {plain.OWN_RULE}"


UNKNOWN = Rule("unknown", is_called_a_norm, _why_unknown)


def _calls_of(kind: str) -> Callable[[Site], bool]:
    return lambda site: site.module is None and site.function is not None and KINDS.get(site.function) == kind


def _why_no_layer(site: Site) -> str:
    return site.obstacle or f"is a call of {site.function} that no layer stands for; make it a layer"


CALLS = tuple(Rule(kind, _calls_of(kind), _why_no_layer) for kind in dict.fromkeys(KINDS.values()))
