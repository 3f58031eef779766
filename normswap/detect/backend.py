"""Data that the back-ends of `trace` share: the names of a model's modules, and a record of the norms that one back-end saw."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass, field

from torch import nn

from normswap.detect.calls import Hit
from normswap.detect.producers import ELSEWHERE, Source, base_of, is_plain, why_unfit
from normswap.models.copying import shared_parameters, unclear_names


@dataclass
class Seen:
    """The record of one back-end. Each module stands under its first name; a hit is a normalization in the code of a module."""

    order: list[str | int] = field(default_factory=list)  # in execution order: names of norms (first call), numbers of hits
    calls: Counter[str] = field(default_factory=Counter)
    unclear: set[str] = field(default_factory=set)  # names of norms inside a module that was not traced into
    sources: dict[str, Source] = field(default_factory=dict)
    readers: dict[str, list[str]] = field(default_factory=dict)
    hits: list[Hit] = field(default_factory=list)
    suspects: dict[str, None] = field(default_factory=dict)  # names of modules whose code scales by the root of a mean or variance

    def read(self, name: str, reader: str) -> None:
        """Record that `reader`, described in words, reads a tensor of the norm `name` instead of calling the norm."""
        if reader not in self.readers.setdefault(name, []):
            self.readers[name].append(reader)

    def call(self, name: str, source: Source = ELSEWHERE) -> None:
        """Record a call of the norm `name`, whose input comes from `source`."""
        if name not in self.calls:
            self.order.append(name)
        self.calls[name] += 1
        self.sources[name] = source

    def source(self, name: str) -> Source:
        """Where the input of the norm `name` comes from, if it is called once."""
        if name in self.unclear:
            return Source(None, "it is in a module whose code was not traced")
        if (calls := self.calls[name]) == 1:
            return self.sources[name]
        return Source(None, f"it is called {calls} times in one forward pass" if calls else "no forward pass reaches it")

    def hit(self, owner: str, function: str, source: Source = ELSEWHERE) -> int:
        """Record a normalization in the code of `owner`, and return the number of the hit."""
        self.order.append(len(self.hits))
        self.hits.append(Hit(owner, function, source))
        return len(self.hits) - 1


class Names:
    """The names of every module of one model, which modules are norms, and which parameters modules share.

    decided: first name of every norm -> whether the norm is one site; if not, each normalization in its code is a site.
    """

    def __init__(self, model: nn.Module, decided: Mapping[str, bool]) -> None:
        self.all: dict[int, list[str]] = {}
        self.modules: dict[int, nn.Module] = {}
        self.parents: dict[int, list[nn.Module]] = {}
        for name, module in model.named_modules(remove_duplicate=False):
            self.all.setdefault(id(module), []).append(name)
            self.modules[id(module)] = module
        for module in self.modules.values():
            for child in module.children():
                self.parents.setdefault(id(child), []).append(module)
        # A norm that holds another norm (a wrapper around a BatchNorm) and the norm inside it are both listed.
        self.listed = {key: module for key, module in self.modules.items() if self.all[key][0] in decided}
        self.norms = {key: module for key, module in self.listed.items() if decided[self.all[key][0]]}
        self.shared = shared_parameters(model)
        self.unclear = unclear_names(model)
        # Why each conv or linear layer is no producer, or None: decided before a back-end adds hooks of its own or removes the user's.
        self.unfit = {key: self._why_unfit(module) for key, module in self.modules.items() if base_of(module) is not None}
        # The running statistics: tensors that a norm has and its replacement does not.
        self.statistics = {
            id(tensor): module
            for module in self.norms.values()
            for name, tensor in module._buffers.items()
            if tensor is not None and name not in ("weight", "bias")
        }

    def first(self, module: nn.Module) -> str:
        """The first of its names, in the order of `named_modules`."""
        return self.all[id(module)][0]

    def is_plain_producer(self, module: nn.Module) -> bool:
        """Whether the module is a conv or linear layer that runs the code of torch's class and may be a producer."""
        return is_plain(module) and self.unfit[id(module)] is None

    def _why_unfit(self, module: nn.Module) -> str | None:
        """Why a conv or linear layer of this model is no producer, as a clause about the layer; None if it may be one."""
        if id(module) in self.unclear:
            return f"which {self.unclear[id(module)]}"
        tied = self.tied(module)
        return f"which shares a parameter: {' and '.join(tied)} are one tensor" if tied else why_unfit(module)

    def tied(self, module: nn.Module) -> tuple[str, ...]:
        """All names of the first parameter of `module` that another module shares; empty if there is none."""
        own = module.parameters(recurse=False)
        return next((tuple(self.shared[id(parameter)]) for parameter in own if id(parameter) in self.shared), ())

    def inside(self, module: nn.Module) -> list[nn.Module]:
        """The norms among a module and its descendants."""
        return [part for part in module.modules() if id(part) in self.listed]
