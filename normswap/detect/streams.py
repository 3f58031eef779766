"""Which values of a model can lose their mean over the channels, so that the LayerNorms that read them need not take it out themselves.

`centred.py` has what that means, and finds the largest set of values for which it holds. Here is what it needs to know about torch: what an
operator of a recorded forward pass reads and writes (`channels.needed`), that a gain (LayerScale) goes into the weight before it first, and
that a value is cut by a hook of the module that makes or takes it.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field

from torch import nn

from normswap.detect.centred import IS_INPUT, IS_OUTPUT, read_by, solve, written_by
from normswap.detect.channels import Pair, is_blind, needed
from normswap.models.copying import shared_parameters
from normswap.models.recording import Op, Record, Value
from normswap.models.torch_private import HOOKS

# What the operators do that read or write streams most often, in words.
_WORDS = {
    **dict.fromkeys(("mm", "addmm", "bmm", "baddbmm"), "a matrix product"),
    **dict.fromkeys(("view", "_unsafe_view", "reshape", "cat"), "which joins or splits its channels"),
    "convolution": "a convolution",
    "native_layer_norm": "a LayerNorm, whose gains give each position another mean",
    **dict.fromkeys(("mul", "mul_"), "a product"),
}


@dataclass(frozen=True)
class Cut:
    """Where a hook centres a value: module `name`, its output, or its input `place` (a number or a name). axis: from the end."""

    name: str
    place: str | int | None
    axis: int


@dataclass(frozen=True)
class Fold:
    """A gain that goes into the parameters that make what it multiplies. rows: (parameter, axis of the channels)."""

    gain: str
    rows: tuple[tuple[str, int], ...]


@dataclass
class Streams:
    """What has to change, and which LayerNorms then read centred values.

    centred   (name of a parameter, axis): of which the mean over the axis is taken out
    folds     gains that go into other parameters before that, and become 1
    cuts      where a hook centres a value
    reasons   id of an operator native_layer_norm -> why its input is not centred, a clause about the norm; None if it is
    """

    centred: list[tuple[str, int]] = field(default_factory=list)
    folds: list[Fold] = field(default_factory=list)
    cuts: list[Cut] = field(default_factory=list)
    reasons: dict[int, str | None] = field(default_factory=dict)


def streams(model: nn.Module, record: Record, wanted: Iterable[Op]) -> Streams:
    """The streams of a model, from a record of one forward pass of it. wanted: the calls native_layer_norm that are worth the effort."""
    return _Graph(model, record).streams(list(wanted))


class _Graph:
    """A recorded forward pass, as `centred.solve` asks about it."""

    def __init__(self, model: nn.Module, record: Record) -> None:
        self.names = {id(p): name for name, p in reversed(list(model.named_parameters()))}
        self.shared = shared_parameters(model)
        self.times = Counter(call.name for call in record.calls)
        self.hooked = {name for name, m in model.named_modules() if any(getattr(m, h) for h in HOOKS if h != "_is_full_backward_hook")}
        self.folds: dict[Pair, tuple[list[Pair], Value]] = {}  # result of a product with a gain -> (pairs of parameters, the gain)
        self.into: dict[int, Pair] = {}  # id of an operator before such a product -> the result of the product
        for op in record.ops:
            if op.name in ("mul", "mul_"):
                self._find_fold(op)

    # --- the gains -----------------------------------------------------------------------------------------------------------------

    def _find_fold(self, op: Op) -> None:
        result = op.outputs[0]
        for axis in range(len(result.shape)):
            sides = [(v, axis - len(result.shape) + len(v.shape)) for v in op.args[:2] if isinstance(v, Value)]
            if len(sides) != 2 or not all(a >= 0 and v.shape[a] == result.shape[axis] > 1 for v, a in sides):
                continue
            for gain, data in (sides, reversed(sides)):
                found, passed = self._alone(gain), set[int]()
                if found is None or found[0].shape[found[1]] != _size(found[0]):
                    continue
                pairs = self._made_of(data, passed)
                if pairs is not None:
                    self.folds[result, axis] = (pairs, found[0])
                    self.into.update(dict.fromkeys(passed, (result, axis)))
                    return

    def _alone(self, pair: Pair, passed: set[int] | None = None) -> Pair | None:
        """The parameter that a pair is, moved about, if nothing else reads it on the way; None if there is none."""
        while (op := pair[0].op) is not None:
            found = needed(op, pair[0].index, pair[1]) if len(op.inputs) == 1 and self._once(pair[0]) else None
            if found is None or len(found) != 1:
                return None
            if passed is not None:
                passed.add(id(op))
            (pair,) = found
        return pair if self._once(pair[0]) and self._is_own(pair[0]) else None

    def _made_of(self, pair: Pair, passed: set[int]) -> list[Pair] | None:
        """The parameters of the product that makes a pair, and that nothing else reads. passed: the ids of the operators on the way."""
        while (op := pair[0].op) is not None and self._once(pair[0]):
            found = needed(op, pair[0].index, pair[1])
            passed.add(id(op))
            if op.name in ("mm", "addmm", "convolution", "bmm", "baddbmm"):
                ends = [self._alone(each, passed) for each in found or ()]
                return None if not ends or None in ends else [end for end in ends if end is not None]
            if found is None or len(found) != 1 or len(op.inputs) != 1:
                return None
            (pair,) = found
        return None

    def _once(self, value: Value) -> bool:
        return len(value.uses) == 1 and not value.spoiled and not value.is_output

    def _is_own(self, value: Value) -> bool:
        """Whether a value is a parameter that can be changed: one of the model's, in one place."""
        return value.tensor is not None and id(value.tensor) in self.names and id(value.tensor) not in self.shared and value.floating

    # --- one value -----------------------------------------------------------------------------------------------------------------

    def operands(self, pair: Pair) -> list[Pair] | None:
        value, axis = pair
        if pair in self.folds:
            return self.folds[pair][0]
        if value.op is None:
            return [] if self._is_own(value) else None
        return needed(value.op, value.index, axis)

    def results(self, pair: Pair) -> list[Pair] | str:
        value = pair[0]
        if value.spoiled:
            return "its stream is written into through a view, or read by code outside torch"
        if value.is_output:
            return IS_OUTPUT
        if self.hooked and (seen := [c.name for c in (*value.returned, *(c for c, _ in value.taken)) if c.name in self.hooked]):
            return f"its stream is seen by hooks of {seen[0] or 'the model'}"
        results: list[Pair] = []
        for op, _ in value.uses:
            found = self._through(op, pair)
            if found is None:
                return read_by(_where(op))
            results += found
        return list(dict.fromkeys(results))

    def not_written(self, pair: Pair) -> str:
        op, value = pair[0].op, pair[0]
        if op is not None:
            return written_by(_where(op))
        return IS_INPUT if value.tensor is None else "its stream starts from a tensor that modules share, or that is no parameter"

    def can_cut(self, pair: Pair) -> bool:
        return self._cut(pair) is not None

    def _through(self, op: Op, pair: Pair) -> list[Pair] | None:
        value, axis = pair
        if id(op) in self.into:
            result = self.into[id(op)]
            return [result] if pair in self.folds[result][0] else None
        if is_blind(op, value, axis):
            return []
        count = sum(v is value for v in op.inputs)
        found = []
        for output in op.outputs:
            for each in range(len(output.shape)):
                operands = needed(op, output.index, each) if output.op is op else None
                if operands is not None and sum(o == pair for o in operands) >= count:
                    found.append((output, each))
        return found or None

    def _cut(self, pair: Pair) -> Cut | None:
        value, axis = pair
        from_end = axis - len(value.shape)
        made_in = value.op.stack if value.op is not None else ()
        for call in value.returned:
            inside = any(call in op.stack for op, _ in value.uses)
            if call.alone and call in made_in and self.times[call.name] == 1 and call.name and not inside:
                return Cut(call.name, None, from_end)
        for call, place in value.taken:
            if call in made_in or self.times[call.name] != 1 or sum(c is call for c, _ in value.taken) != 1:
                continue
            if all(call in op.stack for op, _ in value.uses):
                return Cut(call.name, place, from_end)
        return None

    # --- all of them ---------------------------------------------------------------------------------------------------------------

    def streams(self, wanted: Sequence[Op]) -> Streams:
        centred = solve(self, {id(op): (op.args[0], len(op.args[0].shape) - 1) for op in wanted})
        found = Streams(reasons=centred.reasons)
        for part in centred.parts:
            self._add(found, part.pairs, [cut for pair in part.cuts if (cut := self._cut(pair)) is not None])
        return found

    def _add(self, found: Streams, part: Sequence[Pair], cuts: Iterable[Cut]) -> None:
        found.cuts += cuts
        for pair in part:
            if pair in self.folds:
                rows, gain = self.folds[pair]
                found.folds.append(Fold(self._name(gain), tuple((self._name(v), axis) for v, axis in rows)))
            if pair[0].op is None and self._is_own(pair[0]):
                found.centred.append((self._name(pair[0]), pair[1]))

    def _name(self, value: Value) -> str:
        return self.names[id(value.tensor)]


def _where(op: Op) -> str:
    """An operator in a reason: the module that calls it, and what it does."""
    name = op.stack[-1].name if op.stack else ""
    return f"{name or 'the model itself'} ({_WORDS.get(op.name, op.name.strip('_'))})"


def _size(value: Value) -> int:
    size = 1
    for each in value.shape:
        size *= each
    return size
