"""Stand-ins for torch's wrappers of a model in training: `nn.DataParallel`, `DistributedDataParallel`, `AveragedModel`.

A pickle of one is read as the model inside. The wrapper itself is not made, as a DistributedDataParallel needs the process group of its
training run. A `Wrapper` takes its place and keeps the model; other objects that belong to it become a `Discarded`, which keeps nothing.
No code of torch's wrappers runs.
"""

from __future__ import annotations

import re
from typing import Any

from torch import nn

from normswap.errors import LoadError
from normswap.models.wellformed import every_module

WRAPPERS = frozenset(
    {
        "torch.nn.parallel.data_parallel.DataParallel",
        "torch.nn.parallel.distributed.DistributedDataParallel",
        "torch.optim.swa_utils.AveragedModel",
    }
)
# settings of DistributedDataParallel, as each version of torch has them
DISCARDED = re.compile(r"torch\.(nn\.parallel\.distributed|distributed\.algorithms\.join)\.\w+")


class Wrapper(nn.Module):
    """Stands in for a wrapper: keeps the model as `module`, and nothing else from the file."""

    def __setstate__(self, state: dict[str, Any]) -> None:
        nn.Module.__init__(self)
        module = state.get("_modules", {}).get("module")
        if isinstance(module, nn.Module):
            self.module = module


class Discarded:
    """Stands in for an object that a wrapper needs: accepts any arguments and state, and keeps nothing."""

    def __new__(cls, *args: Any) -> Discarded:
        return object.__new__(cls)

    def __setstate__(self, state: Any) -> None:
        pass


def stand_in(path: str) -> type[Wrapper] | type[Discarded] | None:
    """The stand-in for the class of this name; None if it is not a wrapper and does not belong to one."""
    return Wrapper if path in WRAPPERS else Discarded if DISCARDED.fullmatch(path) else None


def without_stand_ins(found: Any, file: str) -> Any:
    """The object from a file with each wrapper, at any depth of a model or as a value of a dict, replaced by the model inside."""
    if isinstance(found, dict):
        for key, value in found.items():
            if isinstance(value, nn.Module):
                found[key] = without_stand_ins(value, file)
        return found
    found = _inside(found, file)
    if isinstance(found, nn.Module):
        for _, module in list(every_module(found)):  # attributes from a file may be of any type
            children = vars(module).get("_modules")
            if isinstance(children, dict):
                children.update({key: _inside(child, file) for key, child in children.items()})
    return found


def _inside(found: Any, file: str) -> Any:
    seen = set[int]()
    while isinstance(found, Wrapper):
        if id(found) in seen or "module" not in found._modules:
            raise LoadError(f"{file} is damaged: it wraps no model", hint="copy or save it again")
        seen.add(id(found))
        found = found.module
    return found
