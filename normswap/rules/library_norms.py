"""Norms that a library or the user wrote -> BatchlessNorm, approximately, from calibration data: recognised by what they compute.

Two kinds are run on random data (`recognise.py`), and swapped like torch's norm with the same formula (`per_sample.py`):

    flavour         a layer whose class is named like a norm: timm's LayerNorm2d and RmsNorm, its GroupNorm1 and LayerNormAct2d,
                    torchvision's LayerNorm2d, the RMSNorms of transformers. Its dropout and activation (`drop`, `act`, `activation`) stay
    hand_written    operations in a module's code that look like a norm. `detect/handwritten.py` makes a layer of them

A layer that computes none of the known formulas stays as it is.
"""

from __future__ import annotations

from typing import cast

import torch
from torch import nn

from normswap.detect.handwritten import HandwrittenNorm
from normswap.detect.sites import Rule, Site
from normswap.rules import plain
from normswap.rules.kept import is_called_a_norm
from normswap.rules.per_sample import inexact, uncalibrated
from normswap.rules.recognise import AFTER, recognise


def build(site: Site, std: str) -> nn.Module:
    """The layer for either kind, with the channels on the axes on which `recognise` found them."""
    module = cast(nn.Module, site.module)
    found = recognise(module)
    assert found is not None
    after = any(isinstance(module._modules.get(name), nn.Module) for name in AFTER)
    sizes, axes = ((v,) if isinstance(v, int) else v for v in (found.channels, found.axis))
    return uncalibrated(module, (sizes, axes), std, after=after)


def is_flavour(site: Site) -> bool:
    """Whether the site is a layer named like a norm that computes a known formula and takes x as its only input."""
    if not is_called_a_norm(site) or isinstance(site.module, torch.jit.ScriptModule):
        return False
    found = recognise(cast(nn.Module, site.module))
    return found is not None and found.kind != "affine" and not plain.further_inputs(cast(nn.Module, site.module))


def check_flavour(site: Site) -> str | None:
    """Why the layer has to stay: its number of channels is unknown, or it may compute more than the formula; None if it can be swapped."""
    module = cast(nn.Module, site.module)
    found = recognise(module)
    assert found is not None
    if not found.sized:
        return (
            f"is a {type(module).__name__} without a weight or a size of its own, so only its input tells how many channels it has; "
            f"give it a weight of ones, or {plain.OWN_RULE}"
        )
    return plain.why_not_plain(site, {type(module).forward}, known=None)


def is_hand_written(site: Site) -> bool:
    """Whether the site is a layer that was made of code that looks like a norm."""
    return isinstance(site.module, HandwrittenNorm)


def check_hand_written(site: Site) -> str | None:
    """Why the code has to stay: it computes no known formula, or its number of channels is unknown; None if it can be swapped."""
    module = cast(nn.Module, site.module)
    found = recognise(module)
    if found is not None and found.sized and found.kind != "affine":
        return None
    looks = "is code that looks like a normalization (it scales by the root of a mean or variance)"
    has_a_size = getattr(module, "input_shape", None) is not None or any(True for _ in module.parameters())
    if not has_a_size and (found is None or found.kind != "affine"):
        return f"{looks}, whose number of channels only its input tells; give example inputs of fixed sizes that reach it"
    return f"{looks} and is not one that normswap knows; leave it, or make it a layer of its own and {plain.OWN_RULE}"


HAND_WRITTEN = Rule("hand_written", is_hand_written, check_hand_written, build, inexact)
RULE = Rule("flavour", is_flavour, check_flavour, build, inexact)
