"""Stand-ins for what torch wraps a model in to train it: `nn.DataParallel`, `DistributedDataParallel`, `AveragedModel`.

A pickle of one is read as the model inside. Nothing of the wrapper itself is made: to restore a DistributedDataParallel takes the process
group that it trained in. In its place stands a `Wrapper`, which keeps its one child; what else belongs to it becomes a `Discarded`,
which keeps nothing. None of their code runs, and none of torch's for them.
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
    """Holds the model as `module`, and nothing else of what the file says."""

    def __setstate__(self, state: dict[str, Any]) -> None:
        nn.Module.__init__(self)
        module = state.get("_modules", {}).get("module")
        if isinstance(module, nn.Module):
            self.module = module


class Discarded:
    """Takes whatever it is made from, and forgets it."""

    def __new__(cls, *args: Any) -> Discarded:
        return object.__new__(cls)

    def __setstate__(self, state: Any) -> None:
        pass


def stand_in(path: str) -> type[Wrapper] | type[Discarded] | None:
    """What a class of this name is read as, if it is a wrapper or belongs to one."""
    return Wrapper if path in WRAPPERS else Discarded if DISCARDED.fullmatch(path) else None


def without_stand_ins(found: Any, file: str) -> Any:
    """What a file holds, with the model in the place of each wrapper: the whole of it, a part, or a value of the dict that was saved."""
    if isinstance(found, dict):
        for key, value in found.items():
            if isinstance(value, nn.Module):
                found[key] = without_stand_ins(value, file)
        return found
    found = _inside(found, file)
    if isinstance(found, nn.Module):
        for _, module in list(every_module(found)):  # which the file may have put together as no constructor does
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
