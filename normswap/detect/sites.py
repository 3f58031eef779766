"""What is found in a model, and what is decided before anything is changed: frozen data.

    Site   one normalization of the model, with all its names and calls
    Trace  every Site of a model, and what found them
    Rule   how one kind of source norm becomes a BatchlessNorm, or why it cannot
    Swap   a Site that will be replaced          Skip   a Site that stays, and the reason: the two kinds of Decision
    Plan   every Site of the model, each as a Swap or a Skip

There is no behaviour here beyond lookup.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, Literal

from torch import nn

Preserves = Literal["exact", "approximate"]
Forward = tuple[tuple[Any, ...], Mapping[str, Any]]  # the arguments of one forward pass


@dataclass(frozen=True)
class Call:
    """Where a normalization stands that is no module: in the code of the module `owner`.

    numbers: which of the normalizations that `handwritten.find` finds in that code; several, if they have the same tensors and settings.
    under: the code stays as it is, and its `super().forward` comes to call the layer.
    """

    owner: str
    numbers: tuple[int, ...]
    under: bool = False


@dataclass(frozen=True)
class Site:
    """One normalization found in a model: a module, a functional call, or a form written by hand.

    name      first qualified name in `named_modules` order ("" if the model itself is the norm); of a call, `<owner>.<node>`, which is
              where the layer will stand that takes its place
    aliases   every other name by which the same object is reachable
    module    the norm as found; for a call, a layer that computes the same from the same tensors; None if there can be none
    parents   the classes of the modules that hold it as a child
    readers   code that reads its tensors directly instead of calling it
    calls     how often one forward in eval mode executes it; None when no back-end could run or trace a forward
    producer  the qualified name of the conv or linear whose output goes to this norm and nowhere else; None if there is none
    function  for a call, the dotted name of the function ("torch.nn.functional.batch_norm") or "hand-written"; None for a module
    call      for a call that has a layer, where it stands
    obstacle  why it can be no swap, whatever it computes: of a call that has no layer, of a module that its name does not lead to
    tied      the names of a parameter of its own that other modules hold too; empty if none is shared
    """

    name: str
    aliases: tuple[str, ...]
    module: nn.Module | None
    calls: int | None
    parents: tuple[type[nn.Module], ...] = ()
    readers: tuple[str, ...] = ()
    producer: str | None = None
    function: str | None = None
    call: Call | None = None
    obstacle: str | None = None
    tied: tuple[str, ...] = ()

    @property
    def names(self) -> tuple[str, ...]:
        return (self.name, *self.aliases)


@dataclass(frozen=True)
class Trace:
    """Every site of a model, in execution order, then those that no forward pass reaches.

    backend   what found the call sites: "graph" (the model is one), "fx", "walk" (hooks on one forward pass) or "names" (no forward
              pass could be run: modules only)
    notes     what the back-ends tried first could not do, one sentence each
    """

    sites: tuple[Site, ...]
    backend: str
    notes: tuple[str, ...] = ()


@dataclass(frozen=True)
class Rule:
    """How one kind of source norm is recognised, judged and rebuilt.

    recognises(site) -> bool           is this the kind of norm this rule speaks for?
    check(site)      -> str | None     why it must stay as it is, in a sentence about this model, or None
    build(site, std) -> nn.Module      the replacement, called only when `check` returned None; None if it never does
    inexact(site) -> str               why the replacement only approximates the source, without what to do next; None for an exact rule
    preserves                          "exact": the same function in eval mode up to rounding; "approximate": it needs data
    spec                               of a rule that is not normswap's: the "package.module:NAME" under which `load` finds it again

    A rule for a module is asked about modules only as they are; the class alone decides `recognises` for a tracer's leaf.
    """

    kind: str
    recognises: Callable[[Site], bool]
    check: Callable[[Site], str | None]
    build: Callable[[Site, str], nn.Module] | None = None
    inexact: Callable[[Site], str] | None = None
    spec: str | None = None

    @property
    def preserves(self) -> Preserves:
        return "exact" if self.inexact is None else "approximate"


@dataclass(frozen=True)
class Decision:
    """What becomes of a site: a Swap or a Skip."""

    site: Site

    @property
    def name(self) -> str:
        return self.site.name

    @property
    def aliases(self) -> tuple[str, ...]:
        return self.site.aliases

    @property
    def calls(self) -> int | None:
        return self.site.calls

    @property
    def producer(self) -> str | None:
        return self.site.producer


@dataclass(frozen=True)
class Swap(Decision):
    """A site that will be replaced by a BatchlessNorm."""

    rule: Rule

    @property
    def kind(self) -> str:
        return self.rule.kind

    @property
    def preserves(self) -> Preserves:
        return self.rule.preserves


@dataclass(frozen=True)
class Skip(Decision):
    """A site that stays as it is, and why."""

    kind: str
    reason: str


@dataclass(frozen=True)
class Plan:
    """Every normalization of one model, each swapped or skipped, in the order of the Trace; `backend` and `notes` are the Trace's."""

    swaps: tuple[Swap, ...]
    skips: tuple[Skip, ...]
    backend: str
    notes: tuple[str, ...] = ()
