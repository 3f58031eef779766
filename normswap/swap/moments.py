"""Streaming moments of the input x and the output y of a norm: the numbers do not depend on how the data are split into batches.

For rows (x, y) with one value per channel: the count n, the means, and the central sums

    M2 = sum (x - mean)^2,  M3, M4 likewise,  Y2 = sum (y - mean_y)^2,  XY = sum (x - mean)(y - mean_y)

of two parts combine exactly into those of the whole. With d = mean_b - mean_a and n = n_a + n_b:

    M2 = M2_a + M2_b + d^2 n_a n_b / n                     XY likewise with d_x d_y
    M3 = M3_a + M3_b + d^3 n_a n_b (n_a - n_b) / n^2 + 3 d (n_a M2_b - n_b M2_a) / n
    M4 = M4_a + M4_b + d^4 n_a n_b (n_a^2 - n_a n_b + n_b^2) / n^3 + 6 d^2 (n_a^2 M2_b + n_b^2 M2_a) / n^2 + 4 d (n_a M3_b - n_b M3_a) / n

Everything is float64. Sources: Chan, Golub & LeVeque 1983; Pebay, SAND2008-6212.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

CHUNK = 1 << 22  # elements converted to float64 at a time
BINS, SPAN = 32, 4.0  # of a histogram
ROWS, ELEMENTS = 32, 1 << 17  # that are kept for a histogram: rows of one call, elements of all


@dataclass
class Moments:
    """The moments of one norm; every tensor has the shape (channels,). All are 0 until the first `add`."""

    count: int
    mean: Tensor
    mean_y: Tensor
    m2: Tensor
    m3: Tensor
    m4: Tensor
    y2: Tensor
    xy: Tensor

    @classmethod
    def empty(cls, channels: int) -> Moments:
        return cls(0, *(torch.zeros(channels, dtype=torch.float64) for _ in range(7)))

    def add(self, x: Tensor, y: Tensor) -> None:
        """Include the rows of x and y, both (rows, channels) of any float dtype."""
        step = max(1, CHUNK // max(1, x.shape[1]))
        for start in range(0, len(x), step):
            self._merge(_of(x[start : start + step], y[start : start + step]))

    def _merge(self, b: Moments) -> None:
        a, n = self, self.count + b.count
        if b.count == 0:
            return
        d, e = b.mean - a.mean, b.mean_y - a.mean_y
        na, nb = float(a.count), float(b.count)
        m2 = a.m2 + b.m2 + d**2 * (na * nb / n)
        m3 = a.m3 + b.m3 + d**3 * (na * nb * (na - nb) / n**2) + 3 * d * (na * b.m2 - nb * a.m2) / n
        m4 = (
            a.m4
            + b.m4
            + d**4 * (na * nb * (na**2 - na * nb + nb**2) / n**3)
            + 6 * d**2 * (na**2 * b.m2 + nb**2 * a.m2) / n**2
            + 4 * d * (na * b.m3 - nb * a.m3) / n
        )
        self.y2 = a.y2 + b.y2 + e**2 * (na * nb / n)
        self.xy = a.xy + b.xy + d * e * (na * nb / n)
        self.m2, self.m3, self.m4 = m2, m3, m4
        self.mean, self.mean_y = a.mean + d * (nb / n), a.mean_y + e * (nb / n)
        self.count = n

    @property
    def std(self) -> Tensor:
        """The std of x, with the count as divisor: (x - mean) / std has variance 1."""
        return (self.m2 / self.count).sqrt()

    @property
    def kurtosis(self) -> Tensor:
        """m4 / m2^2: 3 for a normal distribution, large where a few outliers make up the variance; NaN for a constant channel."""
        return self.count * self.m4 / self.m2**2

    def line(self) -> tuple[Tensor, Tensor]:
        """The least-squares line of y over x, per channel: (scale, shift) of  y ~ x * scale + shift.

            scale = XY / M2,  shift = mean_y - mean * scale

        A constant channel gets scale 0.
        """
        scale = torch.where(self.m2 > 0, self.xy / self.m2, 0.0)
        return scale, self.mean_y - self.mean * scale

    def error(self, scale: Tensor, shift: Tensor) -> float:
        """sqrt(sum (x * scale + shift - y)^2 / sum y^2) over all rows and channels. scale, shift: (channels,)."""
        offset = self.mean * scale + shift - self.mean_y
        residual = (scale**2 * self.m2 - 2 * scale * self.xy + self.y2).clamp(min=0) + self.count * offset**2
        total = (self.y2 + self.count * self.mean_y**2).sum()
        return (residual.sum() / total).sqrt().item() if total > 0 else 0.0


def _of(x: Tensor, y: Tensor) -> Moments:
    x, y = x.to("cpu", torch.float64), y.to("cpu", torch.float64)
    mean, mean_y = x.mean(0), y.mean(0)
    d, e = x - mean, y - mean_y
    square = d * d
    return Moments(len(x), mean, mean_y, square.sum(0), (square * d).sum(0), (square * square).sum(0), (e * e).sum(0), (d * e).sum(0))


def sample(x: Tensor, kept: list[Tensor]) -> None:
    """Add about ROWS evenly spaced rows of x, (rows, channels), to `kept`, until that has ELEMENTS elements. They are copies."""
    if sum(rows.numel() for rows in kept) < ELEMENTS:
        kept.append(x[:: len(x) // ROWS + 1].to("cpu", torch.float32, copy=True))


def histogram(kept: Sequence[Tensor], mean: Tensor, std: Tensor, flat: Tensor) -> tuple[int, ...]:
    """Counts of (x - mean) / std over the channels that are not `flat`, in BINS bins from -SPAN to SPAN.

    What is beyond is in the bins at the ends. mean, std, flat: (channels,). Empty if every channel is flat.
    """
    if not kept or flat.all():
        return ()
    z = (torch.cat(tuple(kept))[:, ~flat] - mean[~flat].float()) / std[~flat].float()
    return tuple(int(count) for count in torch.histc(z.nan_to_num(SPAN).clamp(-SPAN, SPAN), BINS, -SPAN, SPAN))
