r"""Fold an affine through a ReLU into the layers that read that: the ReLU becomes the maximum of x and a constant per channel.

    y = s x + t,  z = relu(y) = s max(x, -t / s) + t,  W z + b = (W * s) max(x, -t / s) + (b + W t)

Max takes the place of Relu; no operator is added. Exact if s >= 0, or the values before it can all be stored with the other sign, and if
every layer that reads z is linear and sees no zeros around its input: 1x1 convolutions, linear layers, means over space before those.
s may be small: the error is that of adding t.
"""

from __future__ import annotations

import contextlib

from normswap.folding.affine import Affine
from normswap.folding.basis import Bases, Basis, Change, Conflict
from normswap.folding.stream_shift import oriented


def attempt(affine: Affine, bases: Bases) -> Change:
    """Raises Conflict where it is not exact."""
    old = bases.of(affine.x)
    try:
        return _attempt(affine, bases, old)
    except Conflict:
        turned = old.scaled(oriented(old.scale, affine.scale))
        if turned.agrees(old):
            raise
        with contextlib.suppress(Conflict):  # then the first one is the reason
            return _attempt(affine, bases, turned)
        raise


def _attempt(affine: Affine, bases: Bases, basis: Basis) -> Change:
    change = Change(bases, thresholds=True)
    change.gone.add(affine)
    change.set(affine.x, basis)
    change.set(affine.y, basis.then(affine.scale, affine.shift))
    change.run()
    return change
