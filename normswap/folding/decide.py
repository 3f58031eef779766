"""Decides for every affine of a graph where it goes, then rewrites the graph once."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace

import numpy as np
import onnx_ir as ir

from normswap.folding import einsum, into_consumers, into_producer, into_producers, remainder, scale_alone, spread, stream_shift, threshold
from normswap.folding.affine import Affine, Constants, replacement
from normswap.folding.basis import Bases, Basis, Change, Conflict, Imprecise
from normswap.folding.linear import FLOATS, describe
from normswap.parity.taps import Tap

Attempt = Callable[[Affine, Bases], Change]
ATTEMPTS: tuple[tuple[str, Attempt], ...] = (
    ("into_consumers", into_consumers.attempt),
    ("stream_shift", stream_shift.attempt),
    ("threshold", threshold.attempt),
    ("into_producers", into_producers.attempt),
)
TOLD = ("threshold", "into_producers")  # whose refusals make up the reason: those that can do the most, forwards and backwards


@dataclass(frozen=True)
class Fate:
    """Where one affine went.

    how     the rewrite that it went by, "" if none
    into    the layers whose weights or biases took it, by the names of their nodes
    left    the operators that remain of it
    reason  why anything remains, else ""
    rewritten  whether what remains of it is computed by other nodes than before
    takes, gives   the values of the graph that hold what the affine takes and gives, and in which basis; for `taps`. None of what it took
            if that is not computed any more
    """

    name: str
    how: str = ""
    into: tuple[str, ...] = ()
    left: tuple[str, ...] = ()
    reason: str = ""
    takes: tuple[ir.Value, Basis] | None = field(default=None, repr=False, compare=False)
    gives: tuple[ir.Value, Basis] | None = field(default=None, repr=False, compare=False)
    rewritten: bool = field(default=False, repr=False, compare=False)

    @property
    def touched(self) -> bool:
        """Whether anything of it went somewhere."""
        return bool(self.how or self.into)


def taps(fates: Sequence[Fate]) -> tuple[tuple[Fate, ...], tuple[Tap, ...]]:
    """(the fates without the values of the graph, which may go now; where to find in the file what each affine takes and gives)."""
    calls: Counter[str] = Counter()
    found = []
    for fate in fates:
        calls[fate.name] += 1
        for given, place in ((True, fate.takes), (False, fate.gives)):
            if place is not None:
                value, basis = place
                found.append(Tap(fate.name, calls[fate.name], str(value.name), given, basis.scale, basis.shift))
    return tuple(replace(fate, takes=None, gives=None) for fate in fates), tuple(found)


def fold(
    graph: ir.Graph,
    affines: Sequence[Affine],
    constants: Constants,
    undone: Mapping[str, str] | None = None,
    *,
    blocked: bool = False,
) -> list[Fate]:
    """Make every affine vanish where that is exact, and as small as it can be elsewhere. `affines` are in the order of the graph.

    undone: affines that stay as they are, by name, and why: nothing may change around them, either.
    blocked: let no ReLU on (N, C, H, W) become a maximum. onnxruntime on a CPU stores what lies between convolutions in blocks of channels
    (NCHWc); it takes a BatchNormalization and its ReLU there in one step, but leaves that layout for a maximum and comes back after it.
    """
    undone = {} if undone is None else undone
    fates: dict[Affine, Fate] = {}
    given = {affine: affine.x for affine in affines}
    nowhere: set[Affine] = set()  # those of which what they took is not computed any more
    slots = {affine: affine.y for affine in affines}  # whose basis is that of what the affine gives
    with np.errstate(all="ignore"):  # infinite statistics are the model's own; the rewrites decline them
        for affine in affines:
            x = affine.x
            layer = into_producer.fold(affine, constants) if affine.name not in undone else None
            if layer is not None:
                slots[affine] = x
                nowhere.add(affine)
                fates[affine] = Fate(affine.name, "into_producer", (layer,))
        unfit = {a: undone[a.name] for a in affines if a.name in undone}
        stay = {node: affine for affine in unfit for node in affine.nodes}
        unfit |= {a: reason for a in affines if a not in fates and a not in unfit and (reason := _unfit(a)) is not None}
        left = [affine for affine in affines if affine not in fates and affine not in unfit]
        bases = Bases(constants, {node: affine for affine in left for node in affine.nodes}, undone=stay, blocked=blocked)
        for affine in left:
            fates[affine] = _decide(affine, bases)
        for affine in left:
            if not fates[affine].how and not fates[affine].into and not _touched(affine, bases):
                layer = into_producer.fold(affine, constants, adding=True)
                if layer is not None:
                    nowhere.add(affine)
                    fates[affine] = Fate(affine.name, "", (layer,), ("Add",), fates[affine].reason)
        left = [affine for affine in left if not fates[affine].left]
        pending = [(affine, *remainder.scale_and_shift(affine, bases.of(affine.x), bases.of(affine.y))) for affine in left]
        spread.write(bases)
        names = {str(node.name) for node in graph.all_nodes()}
        for affine, scale, shift in pending:
            if affine in bases.gone and affine.has_two_names():
                remainder.write(affine, np.ones((1,) * scale.ndim), np.zeros((1,) * shift.ndim), constants, names)
            elif affine in bases.gone:
                affine.replace_by(affine.x)
            else:
                fates[affine] = replace(fates[affine], left=remainder.write(affine, scale, shift, constants, names))
        for affine, reason in unfit.items():
            operations = [node for node in affine.nodes if node.op_type != "Cast"]
            known = all(node.domain == "" for node in operations)  # then it is left as it is
            types = tuple(node.op_type for node in operations)
            if not known:
                types = remainder.write(affine, affine.scale, affine.shift, constants, names)
            fates[affine] = Fate(affine.name, left=types, reason=reason)
    same = Basis(np.ones(()), np.zeros(()))

    def held(value: ir.Value) -> tuple[ir.Value, Basis]:
        return replacement(value), bases.known.get(value, same)

    by_value = {affine.y: affine for affine in affines}
    return [
        replace(
            fates[a],
            takes=None if a in nowhere else held(_source(given[a], by_value, slots)),
            gives=held(slots[a]),
            rewritten=a.nodes[0].graph is None,
        )
        for a in affines
    ]


def _source(value: ir.Value, by_value: Mapping[ir.Value, Affine], slots: Mapping[Affine, ir.Value]) -> ir.Value:
    """The slot of a value that an affine takes: that of the affine which gives it, if one does."""
    affine = by_value.get(value)
    return value if affine is None else slots[affine]


def _touched(affine: Affine, bases: Bases) -> bool:
    """Whether x, y or anything that x is computed from by its layer is stored otherwise."""
    slots, value = [affine.x, affine.y], affine.x
    while (node := value.producer()) is not None and node.inputs and node.inputs[0] is not None and node not in bases.affines:
        value = node.inputs[0]
        slots.append(value)
        if describe(node, bases.constants) is not None:
            break
    return any(slot in bases.known for slot in slots)


def _decide(affine: Affine, bases: Bases) -> Fate:
    reasons: list[str] = []
    for how, attempt in ATTEMPTS:
        try:
            return _accepted(affine, how, attempt(affine, bases))
        except Conflict as conflict:
            if how in TOLD or isinstance(conflict, Imprecise):
                reasons.append(str(conflict))
    reason = "; ".join(dict.fromkeys(reasons))
    if not remainder.batch_normalizes(affine):
        try:
            return Fate(affine.name, reason=reason, into=_accepted(affine, "scale_alone", scale_alone.attempt(affine, bases)).into)
        except Conflict:
            pass
    return Fate(affine.name, reason=reason)


def _accepted(affine: Affine, how: str, change: Change) -> Fate:
    constants = change.bases.constants
    takes = [node for node in change.nodes if node not in change.bases.affines]
    if affine.spare is not None:
        more = sum(layer.copied for node in takes if (layer := describe(node, constants)) is not None)
        if more > affine.spare:
            raise Conflict(f"{more / 1000:,.0f} kB of weights that others use, too, would be stored a second time")
    change.accept()
    layers = (node.name for node in takes if einsum.holds_a_constant(node, constants) or describe(node, constants) is not None)
    return Fate(affine.name, how, tuple(str(name) for name in layers))


def _unfit(affine: Affine) -> str | None:
    """Why no change of basis can be made of it, if so."""
    x, y = affine.x, affine.y
    if x.dtype is None or x.dtype != y.dtype or x.dtype.numpy().name not in FLOATS or x.shape is None or y.shape is None:
        return "its input and output are not of one floating-point type and known shape"
    if not affine.is_closed():
        return "something else reads a part of it"
    sizes = [size if isinstance(size, int) else None for size in x.shape]
    for array in (affine.scale, affine.shift):
        if array.ndim == len(sizes) and any(a > 1 and size is None for a, size in zip(array.shape, sizes, strict=True)):
            return "the size of an axis along which it varies is not known"
        if array.ndim != len(sizes) or any(a > 1 and a != size for a, size in zip(array.shape, sizes, strict=True)):
            return "it repeats its input along an axis"
        if not np.isfinite(array).all():
            return "its numbers are not finite"
    return None
