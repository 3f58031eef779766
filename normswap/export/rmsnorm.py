"""`fold --to rmsnorm`: each LayerNormalization of an ONNX graph whose input can lose its mean becomes an RMSNormalization.

`detect/centred.py` finds what has to lose its mean, and asks the graph here, by the rules of `folding/channels.py`. Constants lose theirs
once, in float64; what has none is cut, by a ReduceMean and a Sub. A LayerNorm that an exporter has written in operators (ReduceMean, Sub,
Pow ...) needs its first two no more: any x - mean(x) is x where x has no mean.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING

import numpy as np

from normswap.detect.centred import IS_INPUT, IS_OUTPUT, Part, read_by, solve, written_by
from normswap.export.names import unused

if TYPE_CHECKING:
    import onnx_ir as ir

    from normswap.folding import Affine, Constants, Outcome
    from normswap.folding.affine import Array
    from normswap.folding.basis import Slot

    Pair = tuple[Slot, int]

LAYER_NORM, RMS_NORM = "LayerNormalization", "RMSNormalization"
CENTRING = ("ReduceMean", "Sub")  # the operators of x - mean(x)
HOW = "rmsnorm"


@dataclass(frozen=True, eq=False)
class Norm:
    """A LayerNormalization over one axis, or a ReduceMean and the Subs that take it from what it is the mean of.

    why  that its mean stays, whatever its input is, as a clause about the norm
    """

    name: str
    nodes: tuple[ir.Node, ...]
    axis: int = 0
    why: str | None = None

    @property
    def x(self) -> ir.Value:
        value = self.nodes[0].inputs[0]
        assert value is not None
        return value

    @property
    def is_one_operator(self) -> bool:
        return self.nodes[0].op_type == LAYER_NORM


@dataclass
class Made:
    """What was done. outcomes: one for each norm. biases: of the new norms, which have none, as affines that are yet to be folded."""

    outcomes: list[Outcome] = field(default_factory=list)
    biases: list[Affine] = field(default_factory=list)
    notes: tuple[str, ...] = ()

    @property
    def operators(self) -> int:
        """How many RMSNormalizations there are now."""
        return sum(outcome.left == (RMS_NORM,) for outcome in self.outcomes)


def find(graph: ir.Graph, constants: Constants, taken: Sequence[str]) -> list[Norm]:
    """The norms of a graph that take the mean out of their input, each under a name that is not taken."""
    names, found = set(taken), []
    for node in graph.all_nodes():
        norm = None
        if node.domain == "" and node.op_type == LAYER_NORM:
            norm = _operator(node, constants)
        elif node.domain == "" and node.op_type == CENTRING[0]:
            norm = _spelled_out(node, constants)
        if norm is not None:
            name = unused(norm.name, names)
            names.add(name)
            found.append(replace(norm, name=name))
    return found


def convert(graph: ir.Graph, norms: Sequence[Norm], constants: Constants, kept: Mapping[str, str], refused: str | None) -> Made:
    """Make each norm an RMSNorm that can be one.

    kept: those that stay, by name, and why. refused: why RMSNormalization cannot be written, where it cannot.
    """
    from normswap.folding import Outcome

    reasons: dict[Norm, str | None] = {}
    for norm in norms:
        reasons[norm] = kept.get(norm.name) or norm.why or (refused if norm.is_one_operator else None)
    wanted = {norm: (norm.x, norm.axis) for norm in norms if reasons[norm] is None}
    centred = solve(_Graph(constants, norms), wanted)
    reasons |= {norm: None if reason is None else f"{reason}; leave it" for norm, reason in centred.reasons.items()}
    writer = _Writer(graph, constants)
    with np.errstate(over="ignore"):  # a constant that its dtype cannot hold is found by measuring, and rolled back
        for part in centred.parts:
            writer.centre(part)
    made = Made(notes=writer.notes())
    for norm, reason in reasons.items():
        if reason is not None:
            made.outcomes.append(Outcome(norm.name, left=(LAYER_NORM,) if norm.is_one_operator else CENTRING, reason=reason))
        elif norm.is_one_operator:
            made.biases += writer.rms_norm(norm)
            made.outcomes.append(Outcome(norm.name, HOW, left=(RMS_NORM,)))
        else:
            made.biases += writer.without_centring(norm)
            made.outcomes.append(Outcome(norm.name, HOW))
    return made


# --- the norms --------------------------------------------------------------------------------------------------------------------------


def _operator(node: ir.Node, constants: Constants) -> Norm:
    from normswap.folding.find import NO_RANK

    x, name = node.inputs[0], str(node.name or node.outputs[0].name)
    shape = None if x is None else x.shape
    rank = 0 if shape is None else len(shape)
    axis = node.attributes.get_int("axis", -1) % max(rank, 1)
    why = _unfit(x, axis, constants)
    if not rank:
        why = NO_RANK
    elif axis != rank - 1:
        why = f"it normalizes over {rank - axis} axes; leave it"
    elif any(value.uses() or value.is_graph_output() for value in node.outputs[1:]):
        why = "the mean or the deviation that it takes out is read as well; leave it"
    return Norm(name, (node,), axis, why)


def _spelled_out(node: ir.Node, constants: Constants) -> Norm | None:
    """x - ReduceMean(x), and nothing else reads the mean: how LayerNorm starts where it is written in operators."""
    from normswap.folding.channels import axes_of
    from normswap.folding.find import NO_RANK

    x, mean = node.inputs[0], node.outputs[0]
    axes = axes_of(node, constants)
    subs = list(dict.fromkeys(mean.consumers()))
    if axes is None or len(axes) != 1 or not node.attributes.get_int("keepdims", 1) or mean.is_graph_output() or not subs:
        return None
    if any(sub.op_type != CENTRING[1] or sub.domain != "" or sub.inputs[0] is not x or sub.inputs[1] is not mean for sub in subs):
        return None
    name = str(node.name or mean.name)
    if x is None or x.shape is None:
        return Norm(name, (node, *subs), why=NO_RANK)
    why = _unfit(x, axes[0] % len(x.shape), constants)
    if any(sub.outputs[0].is_graph_output() for sub in subs):
        why = "its result is an output of the model; leave it"
    return Norm(name, (node, *subs), axes[0] % len(x.shape), why)


def _unfit(x: ir.Value | None, axis: int, constants: Constants) -> str | None:
    from normswap.folding.channels import is_floating

    if not is_floating(x) or x is None or x.shape is None:
        return "the type of its input is not known, or not a floating-point type"
    if constants.of(x) is not None:
        return "its input is a constant; leave it"
    size = x.shape[axis]
    return None if isinstance(size, int) and size > 1 else "the number of its channels is 1, or is not known; leave it"


# --- the graph, as the search asks about it ---------------------------------------------------------------------------------------------


class _Graph:
    def __init__(self, constants: Constants, norms: Sequence[Norm]) -> None:
        self.constants = constants
        self.centrings = {node: norm for norm in norms if not norm.is_one_operator for node in norm.nodes}

    def operands(self, pair: Pair) -> list[Pair] | None:
        from normswap.folding.basis import Use
        from normswap.folding.channels import needed

        slot, axis = pair
        if isinstance(slot, Use):
            return []
        node = slot.producer()
        if self.constants.of(slot) is not None:
            return [] if node is None or node.op_type == "Constant" else None
        if node is None:
            return None
        if node in self.centrings and node.op_type == CENTRING[1] and self.centrings[node].axis == axis:
            return []  # x - mean(x)
        found = needed(node, slot.index() or 0, axis, self.constants)
        return None if found is None else [(self._slot(node, place), a) for place, a in found]

    def _slot(self, node: ir.Node, place: int) -> Slot:
        """What is at an input: a value, or a constant of which this input may have a copy of its own."""
        from normswap.folding.basis import Use
        from normswap.folding.find import SPARE

        value = node.inputs[place]
        assert value is not None
        array = self.constants.of(value)
        return Use(node, place) if array is not None and (array.nbytes <= SPARE or self._is_private(value)) else value

    def _is_private(self, value: ir.Value) -> bool:
        """Whether nothing else reads a constant, or what is large of that which it is computed from."""
        from normswap.folding.find import SPARE

        if len(value.uses()) != 1 or value.is_graph_output():
            return False
        node = value.producer()
        arrays = [] if node is None else [(given, self.constants.of(given)) for given in node.inputs if given is not None]
        return all(array is None or array.nbytes <= SPARE or self._is_private(given) for given, array in arrays)

    def results(self, pair: Pair) -> list[Pair] | str:
        from normswap.folding.affine import called
        from normswap.folding.basis import Use
        from normswap.folding.channels import is_blind

        slot, axis = pair
        if isinstance(slot, Use):
            return self._through(slot.node, [slot.place], axis)
        if slot.is_graph_output():
            return IS_OUTPUT
        results: list[Pair] = []
        for node in dict.fromkeys(slot.consumers()):
            if is_blind(node, slot, axis, self.constants) or self._is_centring(node, slot, axis):
                continue
            found = self._through(node, [place for place, value in enumerate(node.inputs) if value is slot], axis)
            if not found:
                return read_by(called(node))
            results += found
        return list(dict.fromkeys(results))

    def _is_centring(self, node: ir.Node, value: ir.Value, axis: int) -> bool:
        norm = self.centrings.get(node)
        return norm is not None and norm.x is value and norm.axis == axis

    def _through(self, node: ir.Node, places: Sequence[int], axis: int) -> list[Pair]:
        """The outputs that are centred if these inputs are, and others with them; none if the node sees the mean of one of them."""
        from normswap.folding.channels import needed

        found: list[Pair] = []
        for index, y in enumerate(node.outputs):
            for each in range(0 if y.shape is None else len(y.shape)):
                operands = needed(node, index, each, self.constants)
                if operands is not None and all((place, axis) in operands for place in places):
                    found.append((y, each))
        return found

    def can_cut(self, pair: Pair) -> bool:
        from normswap.folding.basis import Use
        from normswap.folding.channels import is_floating

        return not isinstance(pair[0], Use) and is_floating(pair[0]) and self._varies(pair[0])

    def _varies(self, value: ir.Value) -> bool:
        """Whether a value depends on an input of the model. What does not is a weight, of which no run should take the mean anew."""
        if value.is_graph_input():
            return value.const_value is None
        pending, seen = [value], {value}
        while pending:
            node = pending.pop().producer()
            for given in () if node is None else node.inputs:
                if given is not None and given not in seen:
                    if given.is_graph_input() and given.const_value is None:
                        return True
                    seen.add(given)
                    pending.append(given)
            if node is not None and ((not node.inputs and node.op_type != "Constant") or _has_a_graph(node)):
                return True  # RandomNormal, or an If, whose branches may read anything
        return False

    def not_written(self, pair: Pair) -> str:
        from normswap.folding.affine import called
        from normswap.folding.basis import Use

        value = pair[0]
        assert not isinstance(value, Use)
        node = value.producer()
        if not self._varies(value):
            if self.constants.of(value) is not None:
                return f"its stream is written with {value.name}, of which others read a part or another form"
            return f"its stream is written with {value.name}, which {self.constants.why_not(value)}"
        return IS_INPUT if node is None else written_by(called(node))


def _has_a_graph(node: ir.Node) -> bool:
    import onnx_ir as ir

    return any(attribute.type in (ir.AttributeType.GRAPH, ir.AttributeType.GRAPHS) for attribute in node.attributes.values())


# --- the rewrite ------------------------------------------------------------------------------------------------------------------------


class _Writer:
    def __init__(self, graph: ir.Graph, constants: Constants) -> None:
        self.graph, self.constants = graph, constants
        self.names = {str(node.name) for node in graph.all_nodes()}
        self.made, self.cuts = dict[tuple["ir.Value", int], "ir.Value"](), list[str]()

    def notes(self) -> tuple[str, ...]:
        if not self.made and not self.cuts:
            return ()
        taken = f"the mean was taken out of {len(self.made)} constants (weights, biases, tables)"
        return (f"{taken}, and at run time out of {' and '.join(self.cuts)}" if self.cuts else taken,)

    def centre(self, part: Part[Slot]) -> None:
        from normswap.folding.basis import Use

        for slot, axis in part.pairs:
            if isinstance(slot, Use):
                value = slot.node.inputs[slot.place]
                assert value is not None
                slot.node.replace_input_with(slot.place, self._without_mean(value, axis))
            elif self.constants.of(slot) is not None:
                new = self._without_mean(slot, axis)
                for node, place in list(slot.uses()):
                    node.replace_input_with(place, new)
        for slot, axis in part.cuts:
            assert not isinstance(slot, Use)
            self._cut(slot, axis)

    def _without_mean(self, value: ir.Value, axis: int) -> ir.Value:
        """A constant without its mean, computed in float64 and rounded once."""
        from normswap.folding.affine import factor_of, slices

        if (value, axis) in self.made:
            return self.made[value, axis]
        array, source = self.constants.of(value), self.constants.exact(value)
        assert array is not None
        assert source is not None
        mean: Array = source.mean(axis, dtype=np.float64, keepdims=True)
        wide = np.float32 if array.dtype == np.float16 else array.dtype
        result = np.empty(array.shape, wide)
        for part in slices(array):
            result[part] = source[part].astype(np.float64) - factor_of(mean, part)
        self.made[value, axis] = self.constants.instead(value, result, f"{value.name}_centred")
        return self.made[value, axis]

    def _cut(self, value: ir.Value, axis: int) -> None:
        import onnx_ir as ir

        axes = [axis]
        named = self.constants.opset >= 18  # from there on the axes are an input
        inputs = [value, self.constants.add("centring.axes", np.asarray(axes, np.int64))] if named else [value]
        attributes = [] if named else [ir.AttrInt64s("axes", axes)]
        readers = list(value.uses())
        mean = self._node(CENTRING[0], inputs, [*attributes, ir.AttrInt64("keepdims", 1)], f"{value.name}.mean")
        centred = self._node(CENTRING[1], [value, mean.outputs[0]], [], f"{value.name}.centred")
        centred.outputs[0].shape, centred.outputs[0].type = value.shape, value.type
        mean.outputs[0].type = value.type
        if value.shape is not None:
            mean.outputs[0].shape = ir.Shape([1 if a == axis else size for a, size in enumerate(value.shape)])
        producer = value.producer()
        if producer is not None:
            producer.append([mean, centred])
        else:
            owner = value.graph
            assert owner is not None
            owner.insert_before(owner[0], [mean, centred])
        for node, place in readers:
            node.replace_input_with(place, centred.outputs[0])
        self.cuts.append(str(value.name))

    def rms_norm(self, norm: Norm) -> Iterator[Affine]:
        """Write a norm as RMSNormalization, and a sum with its bias; that sum, if the bias is a constant."""
        import onnx_ir as ir

        from normswap.folding.affine import replace_value
        from normswap.folding.find import SPARE, affine_of

        (node,) = norm.nodes
        y = node.outputs[0]
        weight, bias = (*node.inputs, None)[1:3]
        attributes = [ir.AttrInt64("axis", -1), ir.AttrFloat32("epsilon", node.attributes.get_float("epsilon", 1e-5))]
        if "stash_type" in node.attributes:
            attributes.append(ir.AttrInt64("stash_type", node.attributes.get_int("stash_type")))
        made = self._node(RMS_NORM, [norm.x, weight], attributes, f"{norm.name}.rms")
        node.prepend(made)
        array = self.constants.of(bias)
        last = made
        if bias is not None and (array is None or array.any()):
            last = self._node("Add", [made.outputs[0], bias], [], f"{norm.name}.bias")
            node.prepend(last)
        for each in {made, last}:
            each.outputs[0].shape, each.outputs[0].type = norm.x.shape, norm.x.type
        replace_value(y, last.outputs[0], [node])
        made.name = node.name or made.name
        if last is not made and array is not None:
            yield replace(affine_of([last], self.constants), name=f"{norm.name}.bias", spare=SPARE)

    def without_centring(self, norm: Norm) -> Iterator[Affine]:
        """Remove the difference from the mean; the sum with the bias, if the rest of a LayerNorm is behind it, in operators."""
        from normswap.folding.affine import replace_value
        from normswap.folding.find import SPARE, affine_of, gain_of

        mean, *subs = norm.nodes
        x = mean.inputs[0]
        assert x is not None
        tails = [gain_of(reader, self.constants) for sub in subs for reader in sub.outputs[0].consumers()]
        for sub in subs:
            replace_value(sub.outputs[0], x, [sub])
        assert mean.graph is not None
        mean.graph.remove(mean, safe=True)
        for _, bias in (tail for tail in tails if len(tail) > 1):
            yield replace(affine_of([bias], self.constants), name=f"{norm.name}.bias", spare=SPARE)

    def _node(self, op_type: str, inputs: Sequence[ir.Value | None], attributes: Sequence[ir.Attr], wish: str) -> ir.Node:
        import onnx_ir as ir

        name = unused(wish, self.names)
        self.names.add(name)  # onnxruntime wants each node to have a name of its own
        node = ir.Node("", op_type, inputs, attributes, name=name)
        node.outputs[0].name = self.constants.fresh(f"{name}_output")
        return node
