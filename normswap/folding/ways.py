r"""Where an affine y = s x + t may go, if not into the layer right before it: the ways to make it vanish, each a change of basis.

    into_consumers    into all that reads y; nothing before y changes

        z = W y + b = (W s) x + (b + W t)

    stream_shift      its scale into what reads y, its shift into what x is computed from: a ReLU is in between

        x = x' - t / s,  relu(y) = relu(s x') = s relu(x')

    threshold         through a ReLU, which becomes the maximum of x and a constant per channel, into the layers that read that

        relu(y) = s max(x, -t / s) + t,  W relu(y) + b = (W s) max(x, -t / s) + (b + W t)

    into_producers    into all that x is computed from: sums, concatenations, means, and a ReLU if s > 0, which becomes a maximum

        x = W u + b + V v,  y = (W s) u + (V s) v + b s + t        s relu(h) + t = max(s h + t, t)

    scale_alone       its scale, into what reads y or what x is computed from, so that an Add remains

        y = s (x + t / s)

Each goes on through what lies between, as far as every operator there can follow (`operator_rules.py`). Linear layers end it, and one that
sees zeros around its input takes no shift. None adds an operator. Where s must be positive and is negative, x is stored as -x if all that
reads it can follow. stream_shift is precise only if t / s is not much larger than x: digits that x' = x + t / s spends on t / s are lost
to x (`spread.check`). In a pre-activation network x is the residual stream: the last bias of the branch that was added to it becomes b + t
/ s, and that of the next branch b - t / s. into_producers stores the residual stream of a post-norm transformer in another scale: every
layer that reads it is multiplied by the product of the scales so far, and every layer that writes it is divided by it.

All of them raise Conflict where they are not exact, or not precise.
"""

from __future__ import annotations

import contextlib

import numpy as np

from normswap.folding.affine import Affine, Array
from normswap.folding.basis import Bases, Basis, Change, Conflict
from normswap.folding.operator_rules import run


def into_consumers(affine: Affine, bases: Bases) -> Change:
    change = Change(bases)
    change.gone.add(affine)
    change.hold(affine.x)
    change.set(affine.y, bases.of(affine.x).then(affine.scale, affine.shift))
    return run(change)


def stream_shift(affine: Affine, bases: Bases) -> Change:
    scale, shift = affine.scale, affine.shift
    if ((scale == 0) & (shift != 0)).any():
        raise Conflict("its scale is 0 in some channels and its shift is not")
    offset = np.where(scale == 0, 0.0, -shift / np.where(scale == 0, 1.0, scale))
    stored = _oriented(bases.of(affine.x).scale, scale)
    change = Change(bases)
    change.gone.add(affine)
    change.set(affine.x, Basis(stored, offset))
    change.set(affine.y, Basis(scale * stored, np.zeros_like(shift)))
    return run(change)


def threshold(affine: Affine, bases: Bases) -> Change:
    old = bases.of(affine.x)
    try:
        return _threshold(affine, bases, old)
    except Conflict:
        turned = old.scaled(_oriented(old.scale, affine.scale))
        if turned.agrees(old):
            raise
        with contextlib.suppress(Conflict):  # the first Conflict is the one to report
            return _threshold(affine, bases, turned)
        raise


def _threshold(affine: Affine, bases: Bases, basis: Basis) -> Change:
    change = Change(bases, thresholds=True)
    change.gone.add(affine)
    change.set(affine.x, basis)
    change.set(affine.y, basis.then(affine.scale, affine.shift))
    return run(change)


def into_producers(affine: Affine, bases: Bases) -> Change:
    change = Change(bases, thresholds=True)
    change.gone.add(affine)
    change.hold(affine.y)
    change.set(affine.x, bases.of(affine.y).before(affine.scale, affine.shift))
    return run(change)


def scale_alone(affine: Affine, bases: Bases) -> Change:
    if not affine.scale.all():
        raise Conflict("its scale is 0 in some channels")
    x, y = bases.of(affine.x), bases.of(affine.y)
    forward, back = Change(bases), Change(bases)
    try:
        forward.hold(affine.x)
        forward.set(affine.y, Basis(affine.scale * x.scale, np.zeros_like(y.shift)))
        return run(forward)
    except Conflict:
        back.hold(affine.y)
        back.set(affine.x, x.scaled(y.scale / affine.scale))
        return run(back)


def _oriented(stored: Array, scale: Array) -> Array:
    """`stored`, with the sign that makes scale * stored positive."""
    return np.where(scale * stored < 0, -stored, stored)
