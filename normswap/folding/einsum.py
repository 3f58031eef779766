r"""How an affine moves through an Einsum, as its equation says.

    y[out] = sum over the others of  x[letters_x] w[letters_w]        w a constant

With x = a x' + c, y = p y' + q and w stored as w' = w a / p, which has the letters that w has:

    y'[out] = sum x'[letters_x] w'[letters_w]        a varies along letters of w alone, p likewise
    q = sum c[letters_x] w[letters_w]

So w takes any scale along the letters that it shares with x or y, and a shift of x becomes a shift of y, as there is no bias. An equation
with one term moves values and adds them up: a moves likewise, and so does c where nothing is added up.
"""

from __future__ import annotations

import string
from collections.abc import Sequence

import numpy as np
import onnx_ir as ir

from normswap.folding.affine import Array, Constants, called
from normswap.folding.basis import Basis, Change, Conflict, give_shift, rank_of


def spread(node: ir.Node, change: Change) -> None:
    """The rule of Einsum. Raises Conflict where an equation cannot be followed."""
    constants = [change.bases.constants.of(value) for value in node.inputs]
    terms, out = _letters(node, constants)
    if len(terms) == 1:
        return _moved(node, terms[0], out, change)
    if len(terms) != 2 or (constants[0] is None) == (constants[1] is None):
        several = "more than two values" if len(terms) > 2 else "values that depend on the input"
        raise Conflict(f"{called(node)} multiplies {several}")
    place = 0 if constants[1] is None else 1
    array = constants[place]
    assert array is not None
    return _linear(node, change, terms[1 - place], terms[place], out, place, array)


def holds_a_constant(node: ir.Node, constants: Constants) -> bool:
    """Whether an Einsum is a layer: one of its inputs is a constant, which a fold may go into."""
    return node.op_type == "Einsum" and node.domain == "" and any(constants.of(value) is not None for value in node.inputs)


def _letters(node: ir.Node, constants: Sequence[Array | None]) -> tuple[list[str], str]:
    """The letters of each term and of the result; an ellipsis becomes capital letters that the equation does not use."""
    equation = node.attributes.get_string("equation").replace(" ", "")
    left, arrow, out = equation.partition("->")
    terms = left.split(",")
    if not arrow:
        letters = left.replace(",", "").replace("...", "")
        out = ("..." if "..." in left else "") + "".join(sorted(letter for letter in set(letters) if letters.count(letter) == 1))
    free = [letter for letter in string.ascii_uppercase if letter not in equation]
    with_dots = [index for index, term in enumerate(terms) if "..." in term]
    if len(with_dots) > 1 or any(constants[index] is not None for index in with_dots):
        raise Conflict(f"{called(node)} has an equation that no fold is known through")
    for index in with_dots:
        value = node.inputs[index]
        assert value is not None
        count = rank_of(value) - len(terms[index].replace("...", ""))
        terms[index], out = (text.replace("...", "".join(free[:count])) for text in (terms[index], out))
    if any(len(set(term)) < len(term) for term in (*terms, out)):
        raise Conflict(f"{called(node)} takes a diagonal")
    return terms, out


def _moved(node: ir.Node, letters_x: str, out: str, change: Change) -> None:
    x, y = change.bases.slot(node, 0), node.outputs[0]
    forward = change.fixed(x)
    basis = change.of(x if forward else y)
    summed = [axis for axis, letter in enumerate(letters_x) if letter not in out]
    if summed and basis.shift.any():
        raise Conflict(f"{called(node)} adds up a shift as often as there are values")
    if forward and any(basis.scale.shape[axis] > 1 for axis in summed):
        raise Conflict(f"{called(node)} adds up what would be scaled differently")
    source, target = (letters_x, out) if forward else (out, letters_x)
    change.set(y if forward else x, Basis(*(_aligned(array, source, target) for array in (basis.scale, basis.shift))))


def _linear(node: ir.Node, change: Change, letters_x: str, letters_w: str, out: str, place: int, array: Array) -> None:
    x, use, y = change.bases.slot(node, 1 - place), change.bases.slot(node, place), node.outputs[0]
    if any(letter not in letters_w + out for letter in letters_x):
        raise Conflict(f"{called(node)} adds up an axis of its input alone")
    _along(node, change.of(x), letters_x, letters_w)
    shared = "".join(letter for letter in out if letter in letters_w)
    answer = _aligned(_response(change.of(x).shift, array, letters_x, letters_w, out), shared, out)
    give_shift(node, answer, change)
    change.hold(x)
    _along(node, change.of(y), out, letters_w)
    if not change.of(y).scale.all() or not change.of(x).scale.all():
        raise Conflict(f"{called(node)} would be divided by 0")
    scale = _aligned(change.of(y).scale, out, letters_w) / _aligned(change.of(x).scale, letters_x, letters_w)
    change.set(use, Basis(scale, np.zeros((1,) * len(letters_w))))


def _along(node: ir.Node, basis: Basis, letters: str, letters_w: str) -> None:
    for array in (basis.scale, basis.shift):
        if any(size > 1 and letter not in letters_w for letter, size in zip(letters, array.shape, strict=True)):
            raise Conflict(f"{called(node)} has a constant that does not vary along the channels")


def _aligned(array: Array, source: str, target: str) -> Array:
    """`array`, which has the axes `source`, with the axes `target`. It has size 1 along the axes that are in one of them alone."""
    kept = [axis for axis, letter in enumerate(source) if letter in target]
    letters = [source[axis] for axis in kept]
    array = array.reshape([array.shape[axis] for axis in kept])
    array = array.transpose([letters.index(letter) for letter in target if letter in letters])
    return np.expand_dims(array, tuple(axis for axis, letter in enumerate(target) if letter not in letters))


def _response(shift: Array, array: Array, letters_x: str, letters_w: str, out: str) -> Array:
    """The shift of the result that a shift of x becomes, along the letters that the result shares with the constant."""
    shared = "".join(letter for letter in letters_x if letter in letters_w)
    sizes = [array.shape[letters_w.index(letter)] for letter in shared]
    spread_out = np.broadcast_to(_aligned(shift, letters_x, shared), sizes)
    result = "".join(letter for letter in out if letter in letters_w)
    return np.asarray(np.einsum(f"{shared},{letters_w}->{result}", spread_out, array.astype(np.float64)))
