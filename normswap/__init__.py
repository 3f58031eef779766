"""normswap swaps the normalization of a trained PyTorch model for Batchless normalization, without changing an output.

    conversion = normswap.convert(model)        # .model .plan .parity; the original is untouched

Everything that is public is in `__all__`, by task. A name is imported when it is first used, so `import normswap` costs nothing.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from normswap.api.convert import Conversion as Conversion
    from normswap.api.convert import convert as convert
    from normswap.api.convert import couple as couple
    from normswap.api.convert import inspect as inspect
    from normswap.api.convert import plan as plan
    from normswap.api.directory import load as load
    from normswap.api.directory import save as save
    from normswap.api.export import export_onnx as export_onnx
    from normswap.api.fold import fold_onnx as fold_onnx
    from normswap.api.heal import DivergedError as DivergedError
    from normswap.api.heal import Healing as Healing
    from normswap.api.heal import heal as heal
    from normswap.api.landscape import Landscape as Landscape
    from normswap.api.landscape import landscape as landscape
    from normswap.api.sensitivity import Sensitivity as Sensitivity
    from normswap.api.sensitivity import sensitivity as sensitivity
    from normswap.api.verify import verify as verify
    from normswap.detect.facts import Facts as Facts
    from normswap.detect.sites import Plan as Plan
    from normswap.detect.sites import Rule as Rule
    from normswap.detect.sites import Site as Site
    from normswap.detect.sites import Skip as Skip
    from normswap.detect.sites import Swap as Swap
    from normswap.errors import NormswapError as NormswapError
    from normswap.export.any_file import Folded as Folded
    from normswap.export.to_onnx import Export as Export
    from normswap.layer.batchless_norm import BatchlessNorm as BatchlessNorm
    from normswap.parity.result import Parity as Parity
    from normswap.parity.result import ParityError as ParityError
    from normswap.rules import DEFAULT_RULES as DEFAULT_RULES
    from normswap.rules.batch_norm import why_not_statistics as why_not_statistics
    from normswap.rules.plain import why_not_plain as why_not_plain
    from normswap.rules.user_rules import batchless_from_data as batchless_from_data
    from normswap.rules.user_rules import batchless_from_statistics as batchless_from_statistics
    from normswap.swap.revert import revert as revert
    from normswap.training.centring import keep_centred as keep_centred
    from normswap.training.drift import Drift as Drift
    from normswap.training.drift import drift as drift
    from normswap.training.groups import norm_keys as norm_keys
    from normswap.training.groups import param_groups as param_groups
    from normswap.training.loss import attach as attach
    from normswap.training.loss import aux_loss as aux_loss
    from normswap.training.loss import masked as masked
    from normswap.training.micro import MicroBatches as MicroBatches
    from normswap.training.micro import backward_in_micro_batches as backward_in_micro_batches
    from normswap.training.opacus import for_opacus as for_opacus

_HOMES = {
    # decide
    "plan": "api.convert",
    "inspect": "api.convert",
    "sensitivity": "api.sensitivity",
    "landscape": "api.landscape",
    "Plan": "detect.sites",
    "Site": "detect.sites",
    "Swap": "detect.sites",
    "Skip": "detect.sites",
    "Facts": "detect.facts",
    "Sensitivity": "api.sensitivity",
    "Landscape": "api.landscape",
    # convert
    "convert": "api.convert",
    "heal": "api.heal",
    "revert": "swap.revert",
    "save": "api.directory",
    "load": "api.directory",
    "Conversion": "api.convert",
    "Healing": "api.heal",
    "DivergedError": "api.heal",
    "NormswapError": "errors",
    # train
    "couple": "api.convert",
    "param_groups": "training.groups",
    "norm_keys": "training.groups",
    "attach": "training.loss",
    "aux_loss": "training.loss",
    "masked": "training.loss",
    "keep_centred": "training.centring",
    "MicroBatches": "training.micro",
    "backward_in_micro_batches": "training.micro",
    "for_opacus": "training.opacus",
    "drift": "training.drift",
    "Drift": "training.drift",
    # judge
    "verify": "api.verify",
    "Parity": "parity.result",
    "ParityError": "parity.result",
    # export
    "export_onnx": "api.export",
    "fold_onnx": "api.fold",
    "Export": "export.to_onnx",
    "Folded": "export.any_file",
    # extend
    "BatchlessNorm": "layer.batchless_norm",
    "Rule": "detect.sites",
    "DEFAULT_RULES": "rules",
    "batchless_from_data": "rules.user_rules",
    "batchless_from_statistics": "rules.user_rules",
    "why_not_plain": "rules.plain",
    "why_not_statistics": "rules.batch_norm",
}

__all__ = [*_HOMES, "__version__"]
__version__: str


def __getattr__(name: str) -> Any:
    if name == "__version__":
        from normswap.versions import version_of

        value: Any = version_of(__name__)
    elif name in _HOMES:
        value = getattr(importlib.import_module(f"{__name__}.{_HOMES[name]}"), name)
    else:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted(__all__)
