"""The largest set of values of a graph that can lose their mean over the channels, whatever the graph is made of.

A value is centred if it is replaced by C v = v - mean of v over its channels. It can be if

    read     everything that reads it does not see its mean (a LayerNorm over these channels, a softmax), or passes it on to a value that is
             centred as well. An output of the model is seen
    written  everything that it is made of is centred: at last parameters, which are centred once and for all. Or it is cut: the mean is
             taken out of it there

`solve` starts from all that are connected with the input of a LayerNorm, and takes away. A connected part of the set stays if it takes the
centring out of more LayerNorms than it puts cuts in. `streams.py` asks it about torch's operators, `export/rmsnorm.py` about ONNX's.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Hashable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Generic, Protocol, TypeVar

V = TypeVar("V", bound=Hashable)
K = TypeVar("K", bound=Hashable)


class Graph(Protocol[V]):
    """What `solve` asks about pairs (a value, its axis of channels)."""

    def operands(self, pair: tuple[V, int], /) -> Sequence[tuple[V, int]] | None:
        """The pairs that have to be centred for this one to be: none for a parameter; None if there are none that do it."""

    def results(self, pair: tuple[V, int], /) -> Sequence[tuple[V, int]] | str:
        """The pairs that have to be centred if this one is, or the reason if something sees its mean."""

    def can_cut(self, pair: tuple[V, int], /) -> bool:
        """Whether the mean can be taken out of the value itself."""

    def not_written(self, pair: tuple[V, int], /) -> str:
        """Why its operands are None, a clause about a LayerNorm."""


@dataclass(frozen=True)
class Part(Generic[V]):
    """A connected part of the pairs that are centred. cuts: those of them that are cut."""

    pairs: tuple[tuple[V, int], ...]
    cuts: tuple[tuple[V, int], ...]


@dataclass
class Centred(Generic[V, K]):
    """What is centred. reasons: why the input of a LayerNorm is not, a clause about the norm; None if it is."""

    parts: list[Part[V]] = field(default_factory=list)
    reasons: dict[K, str | None] = field(default_factory=dict)


def solve(graph: Graph[V], inputs: Mapping[K, tuple[V, int]]) -> Centred[V, K]:
    """inputs: the pairs that LayerNorms normalize, by a key for each norm."""
    return _Search(graph, inputs.values()).solve(inputs)


def read_by(where: str) -> str:
    return f"its stream is also read by {where}, where its mean may count"


def written_by(where: str) -> str:
    return f"its stream is written by {where}, which has no weight to take the mean out of"


IS_OUTPUT = "its stream is an output of the model, of which the mean would be missing"
IS_INPUT = "its stream starts from an input"


class _Search(Generic[V]):
    def __init__(self, graph: Graph[V], starts: Iterable[tuple[V, int]]) -> None:
        self.graph = graph
        self.operands: dict[tuple[V, int], Sequence[tuple[V, int]] | None] = {}
        self.results: dict[tuple[V, int], Sequence[tuple[V, int]] | str] = {}
        self.why: dict[tuple[V, int], str] = {}
        self.on: dict[tuple[V, int], None] = {}
        queue = list(starts)
        while queue:
            pair = queue.pop()
            if pair not in self.on:
                self.on[pair] = None
                operands, results = self.operands[pair], self.results[pair] = graph.operands(pair), graph.results(pair)
                queue += [*(operands or ()), *(() if isinstance(results, str) else results)]
        self.cuttable = {pair: graph.can_cut(pair) for pair in self.on}

    def solve(self, inputs: Mapping[K, tuple[V, int]]) -> Centred[V, K]:
        self._take_away()
        found, dropped = Centred[V, K](), set[tuple[V, int]]()
        for pairs in self._parts():
            readers = [key for key, pair in inputs.items() if pair in pairs]
            cuts = [pair for pair in pairs if not self._made_of_centred(pair)]
            if readers and len(cuts) < len(readers):
                found.parts.append(Part(tuple(pairs), tuple(cuts)))
            else:
                reason = self._too_many(cuts, len(readers))
                for pair in pairs:
                    self.why.setdefault(pair, reason)
                dropped.update(pairs)
        found.reasons = {key: None if pair in self.on and pair not in dropped else self.why[pair] for key, pair in inputs.items()}
        return found

    def _made_of_centred(self, pair: tuple[V, int]) -> bool:
        operands = self.operands[pair]
        return operands is not None and all(each in self.on for each in operands)

    def _take_away(self) -> None:
        """Take away each pair for which the rules do not hold, with the reason, until none is left of these."""
        axes = Counter(value for value, _ in self.on)
        for pair in [pair for pair in self.on if axes[pair[0]] > 1]:
            self.why.setdefault(pair, "its stream is normalized over more than one of its axes")
            del self.on[pair]
        changed = True
        while changed:
            changed = False
            for pair in list(self.on):
                reason = self._why_not(pair)
                if reason is not None:
                    self.why.setdefault(pair, reason)
                    del self.on[pair]
                    changed = True

    def _why_not(self, pair: tuple[V, int]) -> str | None:
        results = self.results[pair]
        if isinstance(results, str):
            return results
        lost = next((each for each in results if each not in self.on), None)
        if lost is not None:
            return self.why[lost]
        return None if self.cuttable[pair] or self._made_of_centred(pair) else self._why_not_written(pair)

    def _why_not_written(self, pair: tuple[V, int]) -> str:
        lost = next((each for each in self.operands[pair] or () if each not in self.on), None)
        return self.graph.not_written(pair) if lost is None else self.why[lost]

    def _too_many(self, cuts: Sequence[tuple[V, int]], readers: int) -> str:
        why = next((self._why_not_written(pair) for pair in cuts), "")
        many = "a centring of its own" if len(cuts) == 1 else f"{len(cuts)} centrings"
        norms = "one LayerNorm" if readers == 1 else f"{readers} LayerNorms"
        return f"it would take {many} to save that of {norms}: {why}"

    def _parts(self) -> list[list[tuple[V, int]]]:
        """The connected parts of the set."""
        first = {pair: pair for pair in self.on}

        def root(pair: tuple[V, int]) -> tuple[V, int]:
            while first[pair] != pair:
                first[pair] = first[first[pair]]
                pair = first[pair]
            return pair

        for pair in self.on:
            for each in self.operands[pair] or ():
                if each in self.on:
                    first[root(each)] = root(pair)
        parts: dict[tuple[V, int], list[tuple[V, int]]] = {}
        for pair in self.on:
            parts.setdefault(root(pair), []).append(pair)
        return list(parts.values())
