"""Data that the back-ends of `trace` share: the names of a model's modules, and a record of the norms that one back-end saw."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass, field

from torch import nn

from normswap.detect.calls import Hit
from normswap.layer.producer import PRODUCERS
from normswap.models.copying import shared_parameters, unclear_names
from normswap.models.torch_private import CONV_FORWARD


@dataclass
class Seen:
    """The record of one back-end. Each module stands under its first name; a hit is a normalization in the code of a module."""

    order: list[str | int] = field(default_factory=list)  # in execution order: names of norms (first call), numbers of hits
    calls: Counter[str] = field(default_factory=Counter)
    unclear: set[str] = field(default_factory=set)  # names of norms inside a module that was not traced into
    producers: dict[str, str | None] = field(default_factory=dict)
    readers: dict[str, list[str]] = field(default_factory=dict)
    hits: list[Hit] = field(default_factory=list)
    suspects: dict[str, None] = field(default_factory=dict)  # names of modules whose code scales by the root of a mean or variance

    def read(self, name: str, reader: str) -> None:
        """Record that `reader`, described in words, reads a tensor of the norm `name` instead of calling the norm."""
        if reader not in self.readers.setdefault(name, []):
            self.readers[name].append(reader)

    def call(self, name: str, producer: str | None) -> None:
        """Record a call of the norm `name`, whose input is the output of `producer` (None: of no single layer)."""
        if name not in self.calls:
            self.order.append(name)
        self.calls[name] += 1
        self.producers[name] = producer if self.calls[name] == 1 else None

    def hit(self, owner: str, function: str, producer: str | None = None) -> int:
        """Record a normalization in the code of `owner`, and return the number of the hit."""
        self.order.append(len(self.hits))
        self.hits.append(Hit(owner, function, producer))
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

    def may_produce(self, module: nn.Module) -> bool:
        """Whether the module is a conv or linear layer that returns exactly W x + b, with a W that no other module shares."""
        cls = type(module)  # a subclass that only has another __init__, like torchvision's Conv3DSimple, computes the same as its base
        base = next((b for b in PRODUCERS if isinstance(module, b)), None)
        same = base is not None and all(getattr(cls, f, None) is getattr(base, f, None) for f in ("forward", CONV_FORWARD))
        plain = same and "forward" not in module.__dict__ and not hasattr(module, "parametrizations")
        own = not self.tied(module) and id(module) not in self.unclear
        return plain and own and not module._forward_hooks and "weight" in module._parameters

    def tied(self, module: nn.Module) -> tuple[str, ...]:
        """All names of the first parameter of `module` that another module shares; empty if there is none."""
        own = module.parameters(recurse=False)
        return next((tuple(self.shared[id(parameter)]) for parameter in own if id(parameter) in self.shared), ())

    def inside(self, module: nn.Module) -> list[nn.Module]:
        """The norms among a module and its descendants."""
        return [part for part in module.modules() if id(part) in self.listed]
