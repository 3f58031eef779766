r"""Least squares with a ridge, from sums over rows: which linear map of u comes closest to v?

For rows u (inputs,) and v (outputs,), one pair per sample or token, B and t minimize

    sum |v - B u - t|^2 + ridge |B|^2          B = V (U + ridge I)^-1,  t = mean_v - B mean_u
                                               U = sum (u - mean_u)(u - mean_u)^T,  V = sum (v - mean_v)(u - mean_u)^T

so B is 0 where the data say nothing. The ridge is a share of the mean of U's diagonal; `RIDGES` are tried, and the one is taken that comes
closest on rows that were held out. Sums are float64; products of a block of rows float32, or float64 if u is.

Source: ridge regression, Hoerl & Kennard 1970; the closed form of target-space training, see docs/approximate.md.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor

RIDGES = (1e-4, 1e-3, 1e-2, 1e-1, 1.0)
BLOCK = 1 << 22  # elements of u that are multiplied at a time
HELD_OUT = 5  # every fifth sample is held out
LEAST = 0.2  # see `Joint.solve`


@dataclass
class Sums:
    """The sums over some rows. Everything is relative to an origin near the means, as a difference of large numbers loses digits.

    uu: (inputs, inputs)   uv: (inputs, outputs)   vv: (outputs,), the diagonal alone   u, v: the sums of rows
    centred: False for a map without t; the origin is then 0
    """

    count: int
    centred: bool
    origin_u: Tensor
    origin_v: Tensor
    u: Tensor
    v: Tensor
    uu: Tensor
    uv: Tensor
    vv: Tensor

    @classmethod
    def at(cls, u: Tensor, v: Tensor, *, centred: bool = True) -> Sums:
        """No rows yet; the origin is that of the first rows u (rows, inputs) and v (rows, outputs) that will be added."""
        origins = [t.double().sum(0) / max(len(t), 1) * centred for t in (u, v)]
        i, o = u.shape[1], v.shape[1]
        zeros = [torch.zeros(*size, dtype=torch.float64, device=u.device) for size in ((i,), (o,), (i, i), (i, o), (o,))]
        return cls(0, centred, *origins, *zeros)

    def empty(self) -> Sums:
        """No rows yet, with the same origin."""
        return Sums(
            0, self.centred, self.origin_u, self.origin_v, *(torch.zeros_like(t) for t in (self.u, self.v, self.uu, self.uv, self.vv))
        )

    def add(self, u: Tensor, v: Tensor) -> None:
        """Include rows u (rows, inputs) and v (rows, outputs)."""
        step = max(1, BLOCK // max(1, u.shape[1]))
        for start in range(0, len(u), step):
            du, dv = u[start : start + step] - self.origin_u, v[start : start + step] - self.origin_v
            if u.dtype != torch.float64:
                du, dv = du.float(), dv.float()
            self.count += len(du)
            self.u += du.sum(0, dtype=torch.float64)
            self.v += dv.sum(0, dtype=torch.float64)
            self.uu += du.T @ du
            self.uv += du.T @ dv
            self.vv += dv.square().sum(0, dtype=torch.float64)

    def __add__(self, other: Sums) -> Sums:
        """The sums over the rows of both, which have one origin."""
        sums = (getattr(self, name) + getattr(other, name) for name in ("u", "v", "uu", "uv", "vv"))
        return Sums(self.count + other.count, self.centred, self.origin_u, self.origin_v, *sums)

    @property
    def central(self) -> tuple[Tensor, Tensor, Tensor]:
        """(uu, uv, vv) about the means, or about 0 for a map without t."""
        if not self.centred:
            return self.uu, self.uv, self.vv
        n = max(self.count, 1)
        uu = torch.addr(self.uu, self.u, self.u, alpha=-1 / n)
        return uu, torch.addr(self.uv, self.u, self.v, alpha=-1 / n), self.vv - self.v.square() / n

    @property
    def means(self) -> tuple[Tensor, Tensor]:
        """(mean of u, mean of v), or 0 for a map without t."""
        n = max(self.count, 1) if self.centred else math.inf
        return self.origin_u + self.u / n, self.origin_v + self.v / n


@dataclass(frozen=True)
class Map:
    """v ~ u B^T + t.  matrix: B^T (inputs, outputs), offset: t (outputs,); float64"""

    matrix: Tensor
    offset: Tensor

    @classmethod
    def none(cls, sums: Sums) -> Map:
        """B = 0, t = 0: everything stays."""
        return cls(torch.zeros_like(sums.uv), torch.zeros_like(sums.v))

    def left(self, sums: Sums) -> float:
        """The sum of |v - B u - t|^2 over the rows of `sums`."""
        uu, uv, vv = sums.central
        mean_u, mean_v = sums.means
        square = vv - 2 * (self.matrix * uv).sum(0) + (self.matrix * (uu @ self.matrix)).sum(0)
        return float((square.clamp(min=0) + sums.count * (mean_v - mean_u @ self.matrix - self.offset).square()).sum())


def solve(sums: Sums, ridge: float) -> Map:
    """The map for a ridge, as a share of the mean of the diagonal of U."""
    uu, uv, _ = sums.central
    matrix: Tensor = torch.cholesky_solve(uv, factor(uu, ridge))
    mean_u, mean_v = sums.means
    return Map(matrix, mean_v - mean_u @ matrix)


def factor(uu: Tensor, ridge: float) -> Tensor:
    """The Cholesky factor of U with its ridge."""
    mean = uu.diagonal().mean().clamp(min=1e-300)
    found: Tensor = torch.linalg.cholesky(uu + ridge * mean * torch.eye(len(uu), dtype=uu.dtype, device=uu.device))
    return found


def best(fit: Sums, held_out: Sums, base: float) -> Map | None:
    """The map from all rows with the ridge that leaves least of those held out; None if none leaves less than `base`."""
    left, ridge = min((solve(fit, ridge).left(held_out), ridge) for ridge in RIDGES)
    return solve(fit + held_out, ridge) if left < base else None


@dataclass
class Joint:
    """Sums for v = y - s x, where s, one number per output, is not known yet.

    both: the `Sums` of x and y side by side as v      xy: the sum of x y, per output, relative to the origin
    """

    both: Sums
    xy: Tensor

    @classmethod
    def at(cls, u: Tensor, x: Tensor, y: Tensor) -> Joint:
        """No rows yet, as `Sums.at`."""
        return cls(Sums.at(u, torch.cat([x, y], 1)), torch.zeros(x.shape[1], dtype=torch.float64, device=x.device))

    def empty(self) -> Joint:
        """No rows yet, with the same origin."""
        return Joint(self.both.empty(), torch.zeros_like(self.xy))

    def add(self, u: Tensor, x: Tensor, y: Tensor) -> None:
        """Include rows u (rows, inputs), x and y (rows, outputs)."""
        self.both.add(u, torch.cat([x, y], 1))
        origin_x, origin_y = self.both.origin_v.chunk(2)
        self.xy += ((x - origin_x) * (y - origin_y)).sum(0)

    def __add__(self, other: Joint) -> Joint:
        return Joint(self.both + other.both, self.xy + other.xy)

    def at_scale(self, s: Tensor) -> Sums:
        """The `Sums` of v = y - s x."""
        both = self.both
        (origin_x, origin_y), (x, y), (xx, yy) = (t.chunk(2) for t in (both.origin_v, both.v, both.vv))
        ux, uy = both.uv.chunk(2, 1)
        of_v = origin_y - s * origin_x, both.u, y - s * x, both.uu, uy - s * ux, yy - 2 * s * self.xy + s.square() * xx
        return Sums(both.count, True, both.origin_u, *of_v)

    def solve(self, ridge: float | None) -> tuple[Map, Tensor]:
        """(the map, s) that leave least for this ridge; None: with B = 0, so the line of y over x alone.

        A constant x has s = 0. Where s would fall below a fifth of that for B = 0, so that u would stand in for x, it stays at the latter.
        """
        uu, uv, vv = self.both.central
        x, y = self.both.v.chunk(2)
        xx, xy = vv.chunk(2)[0], self.xy - x * y / max(self.both.count, 1)
        s = alone = torch.where(xx > 0, xy / xx, 0.0)
        matrix = torch.zeros_like(uv.chunk(2, 1)[0])
        if ridge is not None:
            by_x, by_y = torch.cholesky_solve(uv, factor(uu, ridge)).chunk(2, 1)
            ux, _ = uv.chunk(2, 1)
            left_xx, left_xy = xx - (ux * by_x).sum(0), xy - (ux * by_y).sum(0)
            s = torch.where(left_xx > 0, left_xy / left_xx, 0.0)
            s = torch.where(s / alone > LEAST, s, alone)  # where alone is 0, too: the quotient is then NaN or infinite
            matrix = by_y - s * by_x
        mean_u, mean_v = self.at_scale(s).means
        return Map(matrix, mean_v - mean_u @ matrix), s


def best_jointly(fit: Joint, held_out: Joint) -> tuple[Map, Tensor] | None:
    """(the map, s) from all rows, with the ridge that leaves least of those held out; None if none leaves less than B = 0."""

    def left(ridge: float | None) -> float:
        found, s = fit.solve(ridge)
        return found.left(held_out.at_scale(s))

    least, ridge = min((left(ridge), ridge) for ridge in RIDGES)
    if least >= left(None):
        return None
    found, s = (fit + held_out).solve(ridge)
    return found, torch.where(s == 0, math.inf, s)
