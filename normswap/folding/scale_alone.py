r"""Fold the scale of an affine where its shift cannot go, so that an Add remains instead of a Mul and an Add.

    y = s x + t = s (x + t / s)

Exact if s is not 0. Into what reads y, or into what x is computed from: then y = x' + t.
"""

from __future__ import annotations

import numpy as np

from normswap.folding.affine import Affine
from normswap.folding.basis import Bases, Basis, Change, Conflict


def attempt(affine: Affine, bases: Bases) -> Change:
    """Raises Conflict where it is not exact."""
    if not affine.scale.all():
        raise Conflict("its scale is 0 in some channels")
    x, y = bases.of(affine.x), bases.of(affine.y)
    forward = Change(bases)
    try:
        forward.hold(affine.x)
        forward.set(affine.y, Basis(affine.scale * x.scale, np.zeros_like(y.shift)))
        forward.run()
        return forward
    except Conflict:
        back = Change(bases)
        back.hold(affine.y)
        back.set(affine.x, x.scaled(y.scale / affine.scale))
        back.run()
        return back
