"""The data of a plan: the norms found in a model, and the decision about each, made before anything is changed. All frozen.

    Site   one normalization of the model, with all its names and calls
    Trace  every Site of a model, and what found them
    Rule   how one kind of source norm becomes a BatchlessNorm, or why it cannot
    Swap   a Site that will be replaced          Skip   a Site that stays, and the reason: the two kinds of Decision
    Plan   every Site of the model, each as a Swap or a Skip

The classes hold data and look-ups, nothing else.
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
    """The place of a normalization that is not a module: in the code of the module `owner`.

    numbers: its indices in the list that `handwritten.find` returns for that code; several, if they have the same tensors and settings.
    under: whether the code stays as it is, and its `super().forward` is made to call the layer.
    """

    owner: str
    numbers: tuple[int, ...]
    under: bool = False


@dataclass(frozen=True)
class Site:
    """One normalization found in a model: a module, a functional call, or a form written by hand.

    name      first qualified name in `named_modules` order ("" if the model itself is the norm); of a call, `<owner>.<node>`, the name
              that the layer in its place will have
    aliases   every other name by which the same object is reachable
    module    the norm as found; for a call, a layer that computes the same from the same tensors; None if there can be none
    parents   the classes of the modules that hold it as a child
    readers   code that reads its tensors directly instead of calling it
    calls     how often one forward pass in eval mode executes it; None if no back-end could run or trace a forward pass
    producer  the qualified name of the conv or linear layer whose output only this norm reads; None if there is none, and then
              `why_no_producer` says why, as a clause about the norm
    function  for a call, the dotted name of the function ("torch.nn.functional.batch_norm") or "hand-written"; None for a module
    call      for a call that has a layer, where it stands
    obstacle  why it cannot be swapped, whatever it computes: a call has no layer, or get_submodule cannot find the module; else None
    tied      all names of a parameter that this norm shares with other modules; empty if it shares none
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
    why_no_producer: str | None = None

    @property
    def names(self) -> tuple[str, ...]:
        return (self.name, *self.aliases)


@dataclass(frozen=True)
class Trace:
    """Every site of a model, in execution order; sites that no forward pass reaches come last.

    backend   what found the calls: "graph" (the model is a GraphModule), "fx", "walk" (hooks on one forward pass) or "names" (no forward
              pass could be run: modules only)
    notes     why the back-ends before this one failed, and which code may normalize unseen; one sentence each
    """

    sites: tuple[Site, ...]
    backend: str
    notes: tuple[str, ...] = ()


@dataclass(frozen=True)
class Rule:
    """How one kind of source norm is recognised, judged and rebuilt.

    recognises(site) -> bool           whether the site is of the kind that this rule is for
    check(site)      -> str | None     why this norm must stay as it is, as a clause about the norm; None if it can be swapped
    build(site, std) -> nn.Module      the replacement; called only if `check` returned None; the field is None for a rule that never swaps
    inexact(site) -> str               why the replacement only approximates the source; the field is None for an exact rule
    preserves                          "exact": the same function in eval mode up to rounding; "approximate": it needs data
    spec                               the "package.module:NAME" under which `load` finds a user's rule again; None for normswap's rules
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
    """The decision about a site: a Swap or a Skip."""

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

    @property
    def why_no_producer(self) -> str | None:
        return self.site.why_no_producer


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
    """Every normalization of one model, each swapped or skipped, in the order of the Trace; `backend` and `notes` are the Trace's.

    order: the names of all of them in the order of the Trace.
    """

    swaps: tuple[Swap, ...]
    skips: tuple[Skip, ...]
    backend: str
    notes: tuple[str, ...] = ()
    order: tuple[str, ...] = ()

    @property
    def decisions(self) -> tuple[Swap | Skip, ...]:
        """The swaps and skips together, in `order`; what is not in it comes last."""
        place = {name: i for i, name in enumerate(self.order)}
        return tuple(sorted((*self.swaps, *self.skips), key=lambda decision: place.get(decision.name, len(place))))

    @property
    def paired(self) -> int:
        """How many of the swaps have a producer; `why_no_producer` of the others says why they have none."""
        return sum(swap.producer is not None for swap in self.swaps)
