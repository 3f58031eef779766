"""What the back-ends of `trace` share: the names of a model's modules, and a record of what one back-end saw."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass, field

from torch import nn

from normswap.detect.calls import Hit
from normswap.models.copying import shared_parameters, unclear_names
from normswap.models.torch_private import CONV_FORWARD

PRODUCERS = (nn.Conv1d, nn.Conv2d, nn.Conv3d, nn.ConvTranspose1d, nn.ConvTranspose2d, nn.ConvTranspose3d, nn.Linear)


@dataclass
class Seen:
    """What one back-end saw. Modules are known by their first name; a hit is a normalization in the code of a module."""

    order: list[str | int] = field(default_factory=list)  # names of norms at their first execution, and the numbers of hits
    calls: Counter[str] = field(default_factory=Counter)
    unclear: set[str] = field(default_factory=set)  # names of norms inside something that was not looked into
    producers: dict[str, str | None] = field(default_factory=dict)
    readers: dict[str, list[str]] = field(default_factory=dict)
    hits: list[Hit] = field(default_factory=list)
    suspects: dict[str, None] = field(default_factory=dict)  # modules whose code scales by the root of a mean or variance

    def read(self, name: str, reader: str) -> None:
        """`reader`, in words, reads a tensor of the norm `name` instead of calling it."""
        if reader not in self.readers.setdefault(name, []):
            self.readers[name].append(reader)

    def call(self, name: str, producer: str | None) -> None:
        """The norm `name` is called on what `producer` alone gives it."""
        if name not in self.calls:
            self.order.append(name)
        self.calls[name] += 1
        self.producers[name] = producer if self.calls[name] == 1 else None

    def hit(self, owner: str, function: str, producer: str | None = None) -> int:
        """The code of `owner` normalizes; gives the number of the hit."""
        self.order.append(len(self.hits))
        self.hits.append(Hit(owner, function, producer))
        return len(self.hits) - 1


class Names:
    """The names of every module of one model, which of them are norms, and what is shared among them.

    decided: first name of every norm -> whether it is one call; where it is not, the calls in its code are listed instead.
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
        # A norm inside a norm (the BatchNorm that a wrapper holds) is the inner one's business: the rule for the outer one decides.
        self.listed = {key: module for key, module in self.modules.items() if self.all[key][0] in decided}
        self.norms = {key: module for key, module in self.listed.items() if decided[self.all[key][0]]}
        self.shared = shared_parameters(model)
        self.unclear = unclear_names(model)
        # The tensors that a norm has and its replacement has not.
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
        """Whether the module is a conv or linear whose output is W x + b and nothing else, with a W of its own."""
        cls = type(module)  # a subclass that only builds itself otherwise, like torchvision's Conv3DSimple, is as plain as its base
        base = next((b for b in PRODUCERS if isinstance(module, b)), None)
        same = base is not None and all(getattr(cls, f, None) is getattr(base, f, None) for f in ("forward", CONV_FORWARD))
        plain = same and "forward" not in module.__dict__ and not hasattr(module, "parametrizations")
        own = not self.tied(module) and id(module) not in self.unclear
        return plain and own and not module._forward_hooks and "weight" in module._parameters

    def tied(self, module: nn.Module) -> tuple[str, ...]:
        """All names of the first of its parameters that is held elsewhere, too."""
        own = module.parameters(recurse=False)
        return next((tuple(self.shared[id(parameter)]) for parameter in own if id(parameter) in self.shared), ())

    def inside(self, module: nn.Module) -> list[nn.Module]:
        """The norms in a module, itself included."""
        return [part for part in module.modules() if id(part) in self.listed]
