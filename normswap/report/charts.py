"""The charts of the page, as inline SVG: all of them are here, and nothing else.

A chart has no fixed width: positions are percentages, sizes of text and dots are pixels, so it is as wide as the page and stays legible.
Colours are classes of the page's style sheet. Each chart has a sentence for those who cannot see it.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

from markupsafe import Markup

from normswap.errors import shown
from normswap.report.words import figure

BOTTOM, TOP = -18, 0  # the decades of a scale: from below the rounding of float64 to the size of the output itself
_LABELLED = 300  # bars: with more, each would be thinner than what a pointer can hit


@dataclass(frozen=True)
class Bar:
    """One layer of a chart: its error, the noise of the original and what is allowed; `fate` is the class that colours it."""

    name: str
    error: float
    noise: float
    allowed: float
    fate: str


@dataclass(frozen=True)
class Axis:
    """A logarithmic axis from 10 ** low to 10 ** high."""

    low: int
    high: int

    def at(self, value: float) -> float:
        """The position of a value, in per cent of the axis. NaN and infinity are at its end, 0 at its start."""
        if not math.isfinite(value):
            return 100.0
        decades = math.log10(value) if value > 0 else -math.inf
        return round(100 * min(max((decades - self.low) / (self.high - self.low), 0.0), 1.0), 2)

    @property
    def ticks(self) -> list[tuple[float, str]]:
        """(position, label) of about six powers of ten."""
        step = max(1, math.ceil((self.high - self.low) / 6))
        return [(self.at(10.0**power), f"1e{power}" if power else "1") for power in range(self.low, self.high + 1, step)]


SCALE = Axis(BOTTOM, TOP)


def scale(error: float, noise: float, allowed: float, *, passed: bool) -> Markup:
    """One comparison on SCALE: a dot for the error, a ring for the noise, a band up to what is allowed."""
    says = (
        f"error {figure(error)}, allowed {figure(allowed) if math.isfinite(allowed) else 'any'}, rounding of the original {figure(noise)}"
    )
    lines = "".join(f'<line class="grid" x1="{x}%" x2="{x}%" y1="0" y2="100%"/>' for x, _ in SCALE.ticks)
    end = f"{SCALE.at(allowed)}%"
    band = f'<rect class="allowed" width="{end}" height="100%" rx="3"/>{lines}<line class="limit" x1="{end}" x2="{end}" y1="0" y2="100%"/>'
    return Markup(
        f'<svg class="scale" height="22" role="img" aria-label="{says}">{band if math.isfinite(allowed) else lines}'
        f'<circle class="noise" cx="{SCALE.at(noise)}%" cy="50%" r="7"/>'
        f'<circle class="{"good" if passed else "failed"}" cx="{SCALE.at(error)}%" cy="50%" r="4.5"/></svg>'
    )


def axis_of(bars: Iterable[Bar]) -> Axis:
    """An axis in whole decades on which every positive, finite number of the bars lies."""
    numbers = [n for bar in bars for n in (bar.error, bar.noise, bar.allowed) if 0 < n < math.inf]
    if not numbers:
        return SCALE
    low, high = math.floor(math.log10(min(numbers))), math.ceil(math.log10(max(numbers)))
    return Axis(max(low - 1, BOTTOM - 2), max(high, low + 1))


def errors(bars: Sequence[Bar], axis: Axis) -> Markup:
    """A bar for the error of each layer, before a pale one for the noise of the original and under a line for what is allowed."""
    slot = 100 / len(bars)
    worst = max(bars, key=lambda bar: math.inf if math.isnan(bar.error) else bar.error)
    says = (
        f"Errors of {len(bars)} layers in the order of execution, on a logarithmic scale from {figure(10.0**axis.low)} to "
        f"{figure(10.0**axis.high)}. The largest is {figure(worst.error)}, at {worst.name}."
    )
    parts = [f'<line class="grid" x1="0" x2="100%" y1="{100 - y:g}%" y2="{100 - y:g}%"/>' for y, _ in axis.ticks]
    thin = len(bars) > _LABELLED
    for i, bar in enumerate(bars):
        x, error, noise = f"{(i + 0.5) * slot:.2f}", 100 - axis.at(bar.error), 100 - axis.at(bar.noise)
        title = ""
        if not thin:
            title = Markup("<title>{}: error {}, rounding of the original {}</title>").format(
                shown(bar.name, line=True), figure(bar.error), figure(bar.noise)
            )
        parts.append(f"<g>{title}")
        ends = f'x1="{i * slot:.2f}%" x2="{(i + 1) * slot:.2f}%"'
        behind = f'<line class="noise" x1="{x}%" x2="{x}%" y1="100%" y2="{noise:g}%" style="{_wide(slot, 0.8, 40)}"/>'
        before = f'<line class="noise" {ends} y1="{noise:g}%" y2="{noise:g}%"/>'  # where a bar is too thin to stand before another
        solid = f'<line class="{bar.fate}" x1="{x}%" x2="{x}%" y1="100%" y2="{error:g}%" style="{_wide(slot, 1.6 if thin else 0.4, 20)}"/>'
        parts += [solid, before] if thin else [behind, solid]
        if math.isfinite(bar.allowed):
            limit = 100 - axis.at(bar.allowed)
            parts.append(f'<line class="limit" {ends} y1="{limit:g}%" y2="{limit:g}%"/>')
        parts.append("</g>")
    return Markup('<svg class="bars" height="220" role="img" aria-label="{}">{}</svg>').format(
        shown(says, line=True), Markup("".join(parts))
    )


def _wide(slot: float, share: float, most: int) -> str:
    """The width of a bar: a share of its slot, which is given in per cent of the chart, and not more than `most` pixels."""
    # A percentage of a stroke is one of the chart's diagonal over the root of 2; for a wide chart that is about 0.7 of its width.
    return f"stroke-width:min({most}px,{slot * share * 1.35:.3f}%)"


def histogram(counts: Sequence[int], span: float) -> Markup:
    """Counts in bins from -span to span, and the standard normal distribution of the same area as a line."""
    total, width = sum(counts), 2 * span / len(counts)
    normal = [math.exp(-((k / 10) ** 2) / 2) / math.sqrt(2 * math.pi) for k in range(-int(10 * span), int(10 * span) + 1)]
    density = [count / total / width for count in counts]
    top = max(*density, *normal)
    bars = "".join(
        f'<rect class="noise" x="{100 * i / len(counts):.2f}" width="{92 / len(counts):.2f}" '
        f'y="{60 - 58 * d / top:.2f}" height="{58 * d / top:.2f}"/>'
        for i, d in enumerate(density)
    )
    line = " ".join(f"{100 * k / (len(normal) - 1):.2f},{60 - 58 * d / top:.2f}" for k, d in enumerate(normal))
    beyond = (counts[0] + counts[-1]) / total
    says = f"Distribution of the normalized input against a Gaussian, from -{span:g} to {span:g}; {beyond:.1%} lie in the bins at the ends."
    return Markup(
        f'<svg class="histogram" viewBox="0 0 100 60" preserveAspectRatio="none" role="img" aria-label="{says}">{bars}'
        f'<polyline class="normal" points="{line}"/></svg>'
    )
