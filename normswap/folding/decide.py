"""Decides for every affine of a graph where it goes, then rewrites the graph once."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace

import numpy as np
import onnx_ir as ir

from normswap.folding import einsum, into_producer, ways, write
from normswap.folding.affine import Affine, Constants
from normswap.folding.basis import Bases, Change, Conflict, Imprecise
from normswap.folding.linear import FLOATS, describe

Attempt = Callable[[Affine, Bases], Change]
ATTEMPTS: tuple[tuple[str, Attempt], ...] = (
    ("into_consumers", ways.into_consumers),
    ("stream_shift", ways.stream_shift),
    ("threshold", ways.threshold),
    ("into_producers", ways.into_producers),
)
REASONS_FROM = ("threshold", "into_producers")  # the attempts whose Conflicts are reported: they can do the most, forwards and backwards


@dataclass(frozen=True)
class Outcome:
    """Where one affine went.

    how     the rewrite that folded it, "" if none
    into    the layers whose weights or biases took it, by the names of their nodes
    left    the operators that remain of it
    reason  why anything remains, else ""
    rewritten  whether what remains of it is computed by other nodes than before
    """

    name: str
    how: str = ""
    into: tuple[str, ...] = ()
    left: tuple[str, ...] = ()
    reason: str = ""
    rewritten: bool = field(default=False, repr=False, compare=False)

    @property
    def touched(self) -> bool:
        """Whether anything of the affine was folded."""
        return bool(self.how or self.into)


def fold(
    graph: ir.Graph,
    affines: Sequence[Affine],
    constants: Constants,
    kept: Mapping[str, str] | None = None,
    *,
    spatial_thresholds: bool = True,
) -> list[Outcome]:
    """Fold every affine where that is exact, and write what is left with as few operators as possible. affines: in the graph's order.

    kept: affines that stay as they are, by name, and why. Nothing around them may change, either.
    spatial_thresholds: whether a ReLU on (N, C, H, W) may become a maximum. onnxruntime on a CPU stores what lies between convolutions in
    blocks of channels (NCHWc); it takes a BatchNormalization and its ReLU there in one step, but leaves that layout for a maximum and comes
    back after it.
    """
    kept = {} if kept is None else kept
    outcomes: dict[Affine, Outcome] = {}
    with np.errstate(all="ignore"):  # a model may have infinite statistics; the rewrites refuse them
        for affine in affines:
            layer = into_producer.fold(affine, constants) if affine.name not in kept else None
            if layer is not None:
                outcomes[affine] = Outcome(affine.name, "into_producer", (layer,))
        unfit = {a: kept[a.name] for a in affines if a.name in kept}
        stay = {node: affine for affine in unfit for node in affine.nodes}
        unfit |= {a: reason for a in affines if a not in outcomes and a not in unfit and (reason := _unfit(a)) is not None}
        left = [affine for affine in affines if affine not in outcomes and affine not in unfit]
        bases = Bases(
            constants, {node: affine for affine in left for node in affine.nodes}, kept=stay, spatial_thresholds=spatial_thresholds
        )
        for affine in left:
            outcomes[affine] = _decide(affine, bases)
        for affine in left:
            if not outcomes[affine].how and not outcomes[affine].into and not _touched(affine, bases):
                layer = into_producer.fold(affine, constants, adding=True)
                if layer is not None:
                    outcomes[affine] = Outcome(affine.name, "", (layer,), ("Add",), outcomes[affine].reason)
        left = [affine for affine in left if not outcomes[affine].left]
        pending = [(affine, *write.scale_and_shift(affine, bases.of(affine.x), bases.of(affine.y))) for affine in left]
        write.write_operators(bases)
        names = {str(node.name) for node in graph.all_nodes()}
        for affine, scale, shift in pending:
            if affine in bases.gone and affine.has_two_names():
                write.write_remainder(affine, np.ones((1,) * scale.ndim), np.zeros((1,) * shift.ndim), constants, names)
            elif affine in bases.gone:
                affine.replace_by(affine.x)
            else:
                outcomes[affine] = replace(outcomes[affine], left=write.write_remainder(affine, scale, shift, constants, names))
        for affine, reason in unfit.items():
            operations = [node for node in affine.nodes if node.op_type != "Cast"]
            known = all(node.domain == "" for node in operations)  # operators of ONNX are left as they are
            types = tuple(node.op_type for node in operations)
            if not known:
                types = write.write_remainder(affine, affine.scale, affine.shift, constants, names)
            outcomes[affine] = Outcome(affine.name, left=types, reason=reason)
    return [replace(outcomes[affine], rewritten=affine.nodes[0].graph is None) for affine in affines]


def _touched(affine: Affine, bases: Bases) -> bool:
    """Whether the basis of x, of y or of a value on the way from the input of the layer before x to x has changed."""
    slots, value = [affine.x, affine.y], affine.x
    while (node := value.producer()) is not None and node.inputs and node.inputs[0] is not None and node not in bases.affines:
        value = node.inputs[0]
        slots.append(value)
        if describe(node, bases.constants) is not None:
            break
    return any(slot in bases.known for slot in slots)


def _decide(affine: Affine, bases: Bases) -> Outcome:
    reasons: list[str] = []
    for how, attempt in ATTEMPTS:
        try:
            return _accepted(affine, how, attempt(affine, bases))
        except Conflict as conflict:
            if how in REASONS_FROM or isinstance(conflict, Imprecise):
                reasons.append(str(conflict))
    reason = "; ".join(dict.fromkeys(reasons))
    if not write.batch_normalizes(affine):
        try:
            return Outcome(affine.name, reason=reason, into=_accepted(affine, "scale_alone", ways.scale_alone(affine, bases)).into)
        except Conflict:
            pass
    return Outcome(affine.name, reason=reason)


def _accepted(affine: Affine, how: str, change: Change) -> Outcome:
    constants = change.bases.constants
    takes = [node for node in change.nodes if node not in change.bases.affines]
    if affine.spare is not None:
        more = sum(layer.copied for node in takes if (layer := describe(node, constants)) is not None)
        if more > affine.spare:
            raise Conflict(f"{more / 1000:,.0f} kB of weights that others use, too, would be stored a second time")
    change.accept()
    layers = (node.name for node in takes if einsum.holds_a_constant(node, constants) or describe(node, constants) is not None)
    return Outcome(affine.name, how, tuple(str(name) for name in layers))


def _unfit(affine: Affine) -> str | None:
    """Why no change of basis can make the affine vanish; None if one may."""
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
