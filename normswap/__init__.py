"""normswap: swap the normalization of a trained PyTorch model for Batchless normalization, without changing an output.

    conversion = normswap.convert(model)        # .model .plan .parity; the original is untouched

Everything that is public is listed in `__all__`. Names are imported when they are first used, so `import normswap` costs nothing.
"""

from __future__ import annotations

import importlib
import sys
import types
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from normswap.batchless import BatchlessNorm as BatchlessNorm
    from normswap.commands.directory import load as load
    from normswap.commands.directory import save as save
    from normswap.commands.export import export_onnx as export_onnx
    from normswap.commands.verify import verify as verify
    from normswap.errors import NormswapError as NormswapError
    from normswap.errors import ParityError as ParityError
    from normswap.export import Export as Export
    from normswap.facts import Facts as Facts
    from normswap.landscape import Landscape as Landscape
    from normswap.landscape import landscape as landscape
    from normswap.parity import Parity as Parity
    from normswap.pipeline import Conversion as Conversion
    from normswap.pipeline import convert as convert
    from normswap.pipeline import couple as couple
    from normswap.pipeline import inspect as inspect
    from normswap.pipeline import plan as plan
    from normswap.plan import Plan as Plan
    from normswap.plan import Rule as Rule
    from normswap.plan import Site as Site
    from normswap.plan import Skip as Skip
    from normswap.plan import Swap as Swap
    from normswap.rules import DEFAULT_RULES as DEFAULT_RULES
    from normswap.rules.batch_norm import why_not_statistics as why_not_statistics
    from normswap.rules.own import batchless_from_data as batchless_from_data
    from normswap.rules.own import batchless_from_statistics as batchless_from_statistics
    from normswap.rules.tensors import why_not_plain as why_not_plain
    from normswap.sensitivity import Sensitivity as Sensitivity
    from normswap.sensitivity import sensitivity as sensitivity
    from normswap.swap import revert as revert
    from normswap.training.groups import norm_keys as norm_keys
    from normswap.training.groups import param_groups as param_groups
    from normswap.training.loss import attach as attach
    from normswap.training.loss import aux_loss as aux_loss
    from normswap.training.loss import masked as masked
    from normswap.training.micro import MicroBatches as MicroBatches
    from normswap.training.micro import backward_in_micro_batches as backward_in_micro_batches
    from normswap.training.private import for_opacus as for_opacus

_HOMES = {
    "BatchlessNorm": "batchless",
    "Conversion": "pipeline",
    "DEFAULT_RULES": "rules",
    "Export": "export",
    "Facts": "facts",
    "Landscape": "landscape",
    "MicroBatches": "training.micro",
    "NormswapError": "errors",
    "Parity": "parity",
    "ParityError": "errors",
    "Plan": "plan",
    "Rule": "plan",
    "Site": "plan",
    "Sensitivity": "sensitivity",
    "Skip": "plan",
    "Swap": "plan",
    "batchless_from_data": "rules.own",
    "batchless_from_statistics": "rules.own",
    "attach": "training.loss",
    "aux_loss": "training.loss",
    "backward_in_micro_batches": "training.micro",
    "convert": "pipeline",
    "couple": "pipeline",
    "export_onnx": "commands.export",
    "for_opacus": "training.private",
    "inspect": "pipeline",
    "landscape": "landscape",
    "load": "commands.directory",
    "masked": "training.loss",
    "norm_keys": "training.groups",
    "param_groups": "training.groups",
    "plan": "pipeline",
    "revert": "swap",
    "save": "commands.directory",
    "sensitivity": "sensitivity",
    "verify": "commands.verify",
    "why_not_plain": "rules.tensors",
    "why_not_statistics": "rules.batch_norm",
}

__all__ = list(_HOMES)


class _Package(types.ModuleType):
    """The package, with its public names computed on first use.

    They are properties because some of them (`plan`, `verify`, `save`, `load`) are also names of submodules: importing a submodule sets it
    as an attribute of the package, and would replace the function. A property stands above that.
    """

    def __dir__(self) -> list[str]:
        return sorted({*super().__dir__(), *__all__})


def _public(name: str, home: str) -> property:
    def get(package: types.ModuleType) -> Any:
        return getattr(importlib.import_module(f"{__name__}.{home}"), name)

    def ignore(package: types.ModuleType, submodule: types.ModuleType) -> None:
        pass

    return property(get, ignore)


for _name, _home in _HOMES.items():
    setattr(_Package, _name, _public(_name, _home))
sys.modules[__name__].__class__ = _Package
