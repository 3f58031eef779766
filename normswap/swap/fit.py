"""One layer that is calibrated: what is recorded of its input and its target, and how the fit is stored in it.

Per channel, over all rows that were recorded,

    mean, std        those of the layer's input x
    weight, bias     the least-squares fit of weight * (x - mean) / std + bias to what the source put out in the original model
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field, replace
from typing import Literal

import torch
from torch import Tensor, nn

from normswap.layer import formulas
from normswap.layer.batchless_norm import BatchlessNorm, BatchlessNormAct
from normswap.swap.moments import Moments, histogram, sample

FLAT = 1e-6  # a channel is constant if its std is at most this share of the layer's largest std, or of its own mean

# Thresholds beyond which a Fit has a remark.
POOR = 0.5  # error
OUTLIERS = 30.0  # max_kurtosis
FIRST = 5.0  # first_position
FEW = 100  # samples


@dataclass(frozen=True)
class Fit:
    """How well one layer could be calibrated.

    error           relative l2 distance of the layer's output to its source's, on the calibration data
    samples         how many values each channel's statistics rest on
    flat_channels   channels whose std is (almost) 0     max_kurtosis   the largest kurtosis of a channel; 3 is normal
    first_position  rms of x at position 0 of a sequence over the rms elsewhere, large if position 0 is an outlier; None without a sequence
    repaired        the linear layers around it whose weights were repaired
    how             "fit" (a layer without statistics), "exact" or "adapt" (re-estimated)
    channels        how many the layer has     kept_channels   how many kept the statistics they had
    remarks         the numbers that are bad, in words; empty if none is
    histogram       counts of (x - mean) / std of part of the data, see `moments.histogram`; empty if there are none
    """

    name: str
    stratum: int
    error: float
    samples: int
    flat_channels: int
    max_kurtosis: float
    first_position: float | None
    how: str = "fit"
    channels: int = 0
    kept_channels: int = 0
    remarks: tuple[str, ...] = ()
    repaired: tuple[str, ...] = ()
    histogram: tuple[int, ...] = ()


@dataclass
class Fitting:
    name: str
    layer: BatchlessNorm
    source: nn.Module
    moments: Moments
    how: Literal["fit", "exact", "adapt"] = "fit"
    calls: int = 0  # in one forward pass
    stratum: int = 0
    done: bool = False
    kept: int = 0
    repaired: tuple[str, ...] = ()
    inside: bool = False  # whether the source is running, as a part of the original model
    before_act: Tensor | None = None  # the input of the source's own activation (or dropout) in the original model
    sampled: list[Tensor] = field(default_factory=list)  # rows of its input, for the histogram
    first: list[float] = field(default_factory=lambda: [0.0, 0.0])  # sum of squares and count at position 0
    total: list[float] = field(default_factory=lambda: [0.0, 0.0])


def record(site: Fitting, x: Tensor, y: Tensor, mask: Tensor | None) -> None:
    axes = [axis % x.dim() for axis in site.layer.channel_axis]
    rows_x, rows_y = (t.movedim(axes, list(range(-len(axes), 0))).reshape(-1, site.moments.mean.numel()) for t in (x, y))
    sequence = x.dim() == 3 and axes == [2]
    masked = mask is not None and sequence and mask.shape == x.shape[:2]
    if masked:
        assert mask is not None
        keep = mask.reshape(-1).to(rows_x.device)
        rows_x, rows_y = rows_x[keep], rows_y[keep]
    if sequence:
        first = x[:, 0].double()
        site.first[0] += first.square().sum().item()
        site.first[1] += first.numel()
        site.total[0] += rows_x.double().square().sum().item()
        site.total[1] += rows_x.numel()
    site.moments.add(rows_x, rows_y)
    sample(rows_x, site.sampled)


def part_after(site: Fitting) -> nn.Module | None:
    """The first child (dropout or activation) that the source applies to its normalized x and the new layer keeps; None without one."""
    parts = [site.source._modules.get(name) for name in ("drop", "act", "activation")] if isinstance(site.layer, BatchlessNormAct) else []
    return next((part for part in parts if part is not None), None)


@torch.no_grad()
def store(site: Fitting) -> None:
    """Store the statistics of the data in the layer, then the weight and bias that, with the stored statistics, give the fitted affine."""
    layer = site.layer
    mean, std = _pooled(site.moments, layer)
    before = [t.clone() for t in (layer.mean, layer.std_parameter, layer.weight, layer.bias) if t is not None]
    flat = _is_flat(mean, std)
    scale, shift = (t.to(layer.mean.device) for t in site.moments.line()) if site.how == "fit" else _map(layer)
    layer.set_statistics(mean, torch.where(std > 0, std, 1.0))  # a constant channel has scale 0, so any std will do
    if site.how != "adapt":
        assert layer.weight is not None
        assert layer.bias is not None
        stored = [t.expand(layer.sizes) for t in layer.statistics(torch.float64)]
        weight, bias = formulas.affine_under(scale.reshape(layer.sizes), shift.reshape(layer.sizes), *stored)
        layer.weight.copy_(weight)
        layer.bias.copy_(bias)
    if site.how != "fit":
        after = [t for t in (layer.mean, layer.std_parameter, layer.weight, layer.bias) if t is not None]
        for old, new in zip(before, after, strict=True):
            new.copy_(torch.where(flat, old, new))
        site.kept = int(flat.expand(layer.sizes).sum())
    site.done = True


def _pooled(moments: Moments, layer: BatchlessNorm) -> tuple[Tensor, Tensor]:
    """(mean, std) of x in the shape and on the device of the layer's mean; pooled over channels that share statistics."""
    mean, square = (t.reshape(layer.sizes) for t in (moments.mean, moments.std**2 + moments.mean**2))
    shared = [axis for axis, (size, own) in enumerate(zip(layer.sizes, layer.mean.shape, strict=True)) if own != size]
    if not shared:
        return mean.to(layer.mean.device), moments.std.reshape(layer.sizes).to(layer.mean.device)
    pooled = mean.mean(shared, keepdim=True)
    std = (square.mean(shared, keepdim=True) - pooled**2).clamp(min=0).sqrt()
    return pooled.to(layer.mean.device), std.to(layer.mean.device)


def _map(layer: BatchlessNorm) -> tuple[Tensor, Tensor]:
    """(scale, shift) of the layer in float64, in the shape of its channels."""
    mean, std = layer.statistics(torch.float64)
    weight, bias = (None if t is None else t.double() for t in (layer.weight, layer.bias))
    scale, shift = formulas.affine_of(mean, std, weight, bias)
    return scale.expand(layer.sizes), shift.expand(layer.sizes)


def _is_flat(mean: Tensor, std: Tensor) -> Tensor:
    return std <= FLAT * torch.maximum(std.max(), mean.abs())


@torch.no_grad()
def fit_of(site: Fitting) -> Fit:
    moments = site.moments
    flat = _is_flat(moments.mean, moments.std)
    kurtosis = moments.kurtosis[~flat]
    rest = site.total[1] - site.first[1]
    elsewhere = ((site.total[0] - site.first[0]) / rest) ** 0.5 if rest > 0 else 0.0
    scale, shift = (t.reshape(-1).cpu() for t in _map(site.layer))
    mean, std = (t.expand(site.layer.sizes).reshape(-1).cpu() for t in site.layer.statistics())
    fit = Fit(
        name=site.name,
        stratum=site.stratum,
        error=moments.error(scale, shift),
        samples=moments.count,
        flat_channels=int(flat.sum()),
        max_kurtosis=kurtosis.max().item() if kurtosis.numel() else float("nan"),
        first_position=(site.first[0] / site.first[1]) ** 0.5 / elsewhere if elsewhere > 0 else None,
        how=site.how,
        channels=len(flat),
        kept_channels=site.kept,
        repaired=site.repaired,
        histogram=histogram(site.sampled, mean, std, flat),
    )
    return replace(fit, remarks=tuple(_remarks(fit)))


def _remarks(fit: Fit) -> Iterator[str]:
    if fit.error > POOR:
        yield f"its output is {fit.error:.0%} away from the original layer's"
    if fit.flat_channels:
        kept = ", and keep the statistics they had" if fit.kept_channels else ""
        yield f"{fit.flat_channels} of {fit.channels} channels do not vary{kept}"
    if fit.max_kurtosis > OUTLIERS:
        yield f"a few outliers make up the variance of a channel (kurtosis {fit.max_kurtosis:.0f}; 3 is normal)"
    if fit.first_position is not None and fit.first_position > FIRST:
        yield f"position 0 of the sequence is an outlier, {fit.first_position:.0f} times as large as the others"
    if fit.samples < FEW:
        yield f"its statistics rest on {fit.samples} values per channel"
