r"""Stores the values of a graph scaled and shifted, so that an affine disappears that cannot be multiplied into its neighbour.

This is a diagonal change of basis. Every value v of the graph is stored as v', with

    v = a v' + c        a, c: arrays that broadcast against v, in float64; at first a = 1, c = 0

The operators around a value then compute with v' instead of v. What they do to a and c is in `operator_rules.py` and `layouts.py`, a rule
for each:

    a linear layer      takes any a and c on either side into its weight and bias: this is where a change ends
    ReLU, pooling       have the same a and c on both sides: this is how it travels
    a sum               has the same a on all sides, and the c of its result is the sum of the others
    anything else       has a = 1, c = 0 on all sides

An affine y = s x + t is gone once y' = x', that is, a_y = s a_x and c_y = s c_x + t. `Change` is one attempt to get there. It starts with
the bases that `ways.py` sets and follows the rules. It ends with every operator's rule kept, or raises Conflict and changes nothing. The
graph itself is rewritten once, after the last attempt (`write.py`), so every weight is computed from the original one and rounded once.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import NamedTuple

import numpy as np
import onnx_ir as ir

from normswap.folding.affine import Affine, Array, Constants, called

SAME = 1e-12  # the relative difference below which two bases, computed in float64 in two ways, are equal
ZERO = 1e-13  # a sum that is smaller than this times the sum of its terms' magnitudes is 0


class Conflict(Exception):
    """A change of basis is not exact here; the message says why, as a clause."""


class Imprecise(Conflict):
    """A change of basis would be exact, but cost digits."""


class Use(NamedTuple):
    """A constant as one input of one node: every use of it has a basis of its own."""

    node: ir.Node
    place: int


Slot = ir.Value | Use


@dataclass(frozen=True)
class Basis:
    """v = scale * v' + shift. Both have as many dimensions as v, of size 1 where they do not vary."""

    scale: Array
    shift: Array

    @classmethod
    def identity(cls, rank: int) -> Basis:
        return cls(np.ones((1,) * rank), np.zeros((1,) * rank))

    @property
    def rank(self) -> int:
        return self.scale.ndim

    def then(self, scale: Array, shift: Array) -> Basis:
        """The basis of w = scale * v + shift with w' = v', where this is the basis of v."""
        return Basis(scale * self.scale, total(scale * self.shift, shift))

    def before(self, scale: Array, shift: Array) -> Basis:
        """The basis of v with v' = w', where this is the basis of w = scale * v + shift: the inverse of `then`."""
        if not scale.all():
            raise Conflict(f"its scale is 0 in {_channels(scale == 0)}")
        return Basis(self.scale / scale, total(self.shift, -shift) / scale)

    def scaled(self, scale: Array) -> Basis:
        return Basis(scale, self.shift)

    def shifted(self, shift: Array) -> Basis:
        return Basis(self.scale, shift)

    def is_identity(self) -> bool:
        return not self.shift.any() and bool((self.scale == 1).all())

    def agrees(self, other: Basis) -> bool:
        return close(self.scale, other.scale) and close(self.shift, other.shift)

    def along(self, axis: int, size: int) -> tuple[Array, Array]:
        """(scale, shift) as vectors of `size`."""
        vectors = []
        for array in (self.scale, self.shift):
            channels = array.shape[axis]
            if array.size != channels or channels not in (1, size):
                raise Conflict("it does not vary along the channels alone")
            vectors.append(np.broadcast_to(array.reshape(channels), (size,)))
        return vectors[0], vectors[1]


def total(*terms: Array) -> Array:
    """The sum of the terms, and exactly 0 where they cancel."""
    result = sum(terms, np.zeros(()))
    return np.where(np.abs(result) <= ZERO * sum(np.abs(term) for term in terms), 0.0, result)


def close(a: Array, b: Array) -> bool:
    if a is b or (a.shape == b.shape and bool((a == b).all())):  # the most frequent case, and quick to test
        return True
    size = max(float(np.abs(a).max(initial=0)), float(np.abs(b).max(initial=0)))
    return bool(np.all(np.abs(a - b) <= SAME * np.maximum(np.maximum(np.abs(a), np.abs(b)), ZERO * size)))


def _channels(which: Array) -> str:
    count = int(np.count_nonzero(which))
    return f"{count} of {which.size} channels" if which.size > 1 else "its only channel"


@dataclass
class Bases:
    """The bases of the values of one graph, the affines that are gone, and what else a rule has to know."""

    constants: Constants
    affines: Mapping[ir.Node, Affine]  # by each of their nodes
    kept: Mapping[ir.Node, Affine] = field(default_factory=dict)  # the affines around which nothing may change
    known: dict[Slot, Basis] = field(default_factory=dict)
    gone: set[Affine] = field(default_factory=set)
    spatial_thresholds: bool = True  # whether a ReLU on (N, C, H, W) may become a maximum with a constant

    def of(self, slot: Slot) -> Basis:
        found = self.known.get(slot)
        return Basis.identity(rank_of(slot)) if found is None else found

    def slot(self, node: ir.Node, index: int) -> Slot:
        value = node.inputs[index]
        if value is None:
            raise Conflict(f"{called(node)} is next to it, which lacks an input")
        return value if self.constants.of(value) is None else Use(node, index)


class Change:
    """One attempt to change bases. `thresholds` says whether a ReLU may become max(x, a constant per channel)."""

    def __init__(self, bases: Bases, *, thresholds: bool = False) -> None:
        self.bases, self.thresholds = bases, thresholds
        self.new: dict[Slot, Basis] = {}
        self.gone: set[Affine] = set()
        self.nodes: dict[ir.Node, None] = {}  # the nodes around which a basis has changed
        self.queue: deque[ir.Node] = deque()  # those of them whose rule has to run

    def of(self, slot: Slot) -> Basis:
        found = self.new.get(slot)
        return self.bases.of(slot) if found is None else found

    def fixed(self, slot: Slot) -> bool:
        return slot in self.new

    def is_gone(self, affine: Affine) -> bool:
        return affine in self.gone or affine in self.bases.gone

    def hold(self, slot: Slot) -> None:
        """Let the value keep its basis."""
        self.set(slot, self.of(slot))

    def set(self, slot: Slot, basis: Basis) -> None:
        """Give the value this basis, and queue the nodes that compute or read it. Raises Conflict if that is not possible."""
        if not (np.isfinite(basis.scale).all() and np.isfinite(basis.shift).all()):
            raise Conflict("its numbers would overflow")
        if slot in self.new:
            if not self.new[slot].agrees(basis):
                raise Conflict("two paths would have to be scaled or shifted differently")
            return
        old = self.bases.of(slot)
        if old.agrees(basis):
            self.new[slot] = old  # and not `basis`: that may repeat one number along an axis, which other neighbours cannot follow
            return
        self.new[slot] = basis
        if isinstance(slot, ir.Value):
            if slot.is_graph_input() or slot.is_initializer():
                raise Conflict("an input of the model is next to it")
            if slot.is_graph_output():
                raise Conflict("an output of the model is next to it")
            producer = slot.producer()
            self.queue.extend(node for node in (producer, *slot.consumers()) if node is not None)
        else:
            self.queue.append(slot.node)

    def accept(self) -> None:
        self.bases.known.update(self.new)
        self.bases.gone |= self.gone


Rule = Callable[[ir.Node, Change], None]  # sets the other bases around a node as its operator asks; raises Conflict


def give_shift(node: ir.Node, shift: Array, change: Change) -> None:
    """Give the output of a layer without a bias the shift that comes from its input. Raises Conflict if it has another."""
    y = node.outputs[0]
    if not change.fixed(y):
        change.set(y, change.of(y).shifted(shift if shift.any() else np.zeros((1,) * shift.ndim)))
    elif not close(*np.broadcast_arrays(shift, change.of(y).shift)):
        raise Conflict(f"{called(node)} has no bias to take a shift")


def rank_of(slot: Slot) -> int:
    value = slot.node.inputs[slot.place] if isinstance(slot, Use) else slot
    if value is None or value.shape is None:
        raise Conflict("a value of unknown shape is next to it")
    return len(value.shape)


def sizes_of(slot: Slot) -> tuple[int | str | None, ...]:
    """The size of each axis of the value: a number, a name, or None."""
    value = slot.node.inputs[slot.place] if isinstance(slot, Use) else slot
    if value is None or value.shape is None:
        raise Conflict("a value of unknown shape is next to it")
    return tuple(size if isinstance(size, int) else size.value for size in value.shape)


# -- what several rules need --------------------------------------------------------------------------------------------------------------

Ask = Callable[[ir.Node, Basis, Constants], None]


def same_on_both_sides(ask: Ask) -> Rule:
    """The rule of an operator whose input and output have one basis, if `ask` raises no Conflict about it."""

    def rule(node: ir.Node, change: Change) -> None:
        x, y = change.bases.slot(node, 0), node.outputs[0]
        basis = change.of(x) if change.fixed(x) else change.of(y)
        ask(node, basis, change.bases.constants)
        change.set(y, basis)
        change.set(x, basis)

    return rule


def need_positive(scale: Array, node: ir.Node) -> None:
    """Raise Conflict if a scale is negative."""
    if (scale < 0).any():
        count = int(np.count_nonzero(scale < 0))
        raise Conflict(f"{called(node)} is next to it and {count} of {scale.size} scales are negative")
