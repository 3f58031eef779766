r"""Fold the scale of an affine into what reads it, and its shift into what comes before it: a ReLU is in between.

    y = s x + t,  z = relu(y)        x = x' - t / s        z = relu(s x') = s relu(x')

In a pre-activation network x is the residual stream. The last bias of the branch that was added to it becomes b + t / s, and that of the
next branch b - t / s; where the stream begins, the layer before it takes the shift. No operator is added.

Exact if s is not 0 and has one sign per channel in all readers of x: where it is negative, the stream is stored as -x. Precise only if the
shift is not much larger than the stream: digits of x' = x + t / s that are spent on t / s are lost to x. The limit, which `operators.check`
holds every change of basis to, is LIMIT times the root mean square of x, from the norm's own statistics, or from 1 / s if there are none.
"""

from __future__ import annotations

import numpy as np

from normswap.folding.affine import Affine, Array
from normswap.folding.basis import Bases, Basis, Change, Conflict


def attempt(affine: Affine, bases: Bases) -> Change:
    """Raises Conflict where it is not exact, or not precise."""
    scale, shift, old = affine.scale, affine.shift, bases.of(affine.x)
    if ((scale == 0) & (shift != 0)).any():
        raise Conflict("its scale is 0 in some channels and its shift is not")
    offset = np.where(scale == 0, 0.0, -shift / np.where(scale == 0, 1.0, scale))
    stored = oriented(old.scale, scale)
    change = Change(bases)
    change.gone.add(affine)
    change.set(affine.x, Basis(stored, offset))
    change.set(affine.y, Basis(scale * stored, np.zeros_like(shift)))
    change.run()
    return change


def oriented(stored: Array, scale: Array) -> Array:
    """`stored`, with the sign that makes scale * stored positive."""
    return np.where(scale * stored < 0, -stored, stored)
