"""Layers that are called norms and for which a BatchlessNorm cannot stand: listed under what they are, with the reason, and left.

    affine           y = w x + b: no statistics are taken (MobileBERT's NoNorm). Found by running the layer (`probing.py`).
    conditioned      the output depends on more than the input: a gate (Mamba 2), a condition (adaptive LayerNorm), a scale (I-BERT)
    reshaping        the output has not the shape of the input, or is not one tensor (xLSTM's norm of heads, which joins them)
    response_norm    y = x + w x g / mean_c(g) + b,  g = |x| over space: a gate by the layer's own response (ConvNeXt V2's GRN)
    local_response_norm   y = x / (k + a/n sum x^2)^b over n neighbouring channels (AlexNet, GoogLeNet)
    evo_norm         y = w x sigmoid(v x) / std + b: normalization and activation in one formula (EvoNorm)
    filter_response_norm  y = max(w x / rms + b, t): a threshold of the layer's own (FilterResponseNormTlu2d)

The first three are found by what the layer is and does. The others go by the name of the class: a name decides about a reason only,
never about a swap.

Sources: Woo et al. 2023, arXiv:2301.00808; Krizhevsky et al. 2012; Liu et al. 2020, arXiv:2004.02967; Singh & Krishnan 2020,
arXiv:1911.09737.
"""

from __future__ import annotations

import re
from collections.abc import Callable
from typing import cast

import torch
from torch import nn

from normswap.detect.sites import Rule, Site
from normswap.rules import plain, unknown
from normswap.rules.recognise import probe, returns_otherwise


def _rule(kind: str, speaks: Callable[[nn.Module], bool], why: Callable[[nn.Module], str]) -> Rule:
    def recognises(site: Site) -> bool:
        scripted = isinstance(site.module, torch.jit.ScriptModule)
        return not scripted and unknown.recognises(site) and speaks(cast(nn.Module, site.module))

    def check(site: Site) -> str:
        module = cast(nn.Module, site.module)
        return f"is a {type(module).__name__}, which {why(module)}"

    return Rule(kind, recognises, check)


def _named(kind: str, pattern: str, why: str) -> Rule:
    name = re.compile(pattern)
    return _rule(kind, lambda module: bool(name.search(type(module).__name__)), lambda module: why)


def _affine(module: nn.Module) -> bool:
    if any(buffer.is_floating_point() for buffer in module.buffers()):  # which may be statistics
        return False
    found = probe(module)
    return found is not None and found.kind == "affine"


RULES: tuple[Rule, ...] = (
    _rule("affine", _affine, lambda module: "multiplies and adds and takes no statistics, so there is nothing to replace; leave it"),
    _rule(
        "conditioned_norm",
        lambda module: bool(plain.further_inputs(module)),
        lambda module: (
            f"takes {plain.further_inputs(module)} besides its input, as BatchlessNorm does not; "
            "leave it, or split it into the normalization and the rest"
        ),
    ),
    _rule(
        "reshaping_norm",
        lambda module: bool(returns_otherwise(module)),
        lambda module: f"{returns_otherwise(module)}; leave it, or move that out of the layer",
    ),
    _named(
        "response_norm",
        r"GRN(\dd)?$|GlobalResponseNorm",
        "multiplies each channel by its share in the response of all channels over space: a gate on each sample, and no mean and std; "
        "leave it",
    ),
    _named(
        "local_response_norm",
        r"LocalResponseNorm|LRN(\dd)?$",
        "divides by a power of the energy of neighbouring channels at the same place: no mean and std of a channel; leave it",
    ),
    _named(
        "evo_norm",
        r"EvoNorm",
        "normalizes and activates in one formula, so that what is left without the statistics is no multiplication and addition; leave it",
    ),
    _named(
        "filter_response_norm",
        r"FilterResponseNorm.*Tlu|FRN",
        "ends in a threshold of its own parameters, so that what is left without the statistics is no multiplication and addition; "
        "leave it, or move the threshold out of the layer",
    ),
)
