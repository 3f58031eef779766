"""How far the statistics of each layer are from those of its input, read from the gradients of one step; and a log of it."""

from __future__ import annotations

import csv
import io
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import NamedTuple, Protocol

import torch
from torch import Tensor, nn

from normswap.errors import UsageError
from normswap.layer import formulas
from normswap.layer.batchless_norm import BatchlessNorm
from normswap.training.loss import layers_of

PREFIX = "normswap/"
DEAD = 1e-4  # of the variance that the statistics say


class LayerDrift(NamedTuple):
    """How far one layer's statistics are off, over the samples of one step, with z = (x - mean) / std; scalars on the layer's device.

    mean_z         the root mean square, over channels, of the mean of z: 0 where the mean fits
    mean_z2        the mean, over channels, of the mean of z^2: 1 where the statistics fit; above 1 the std is too small, below it too large
    dead_channels  how many channels vary by less than 1 % of their std, so that their normalized input is a constant
    limit_hits     the share of samples that the sample limit scaled down in the last forward pass; None for a layer without a limit
    """

    mean_z: Tensor
    mean_z2: Tensor
    dead_channels: Tensor
    limit_hits: Tensor | None = None


class Writer(Protocol):
    """What `Drift.to_tensorboard` calls: torch.utils.tensorboard.SummaryWriter has it."""

    def add_scalar(self, tag: str, scalar_value: float, global_step: int | None = None) -> None: ...


class Drift(Mapping[str, LayerDrift]):
    """The LayerDrift of each layer by its name, and its ways out: `to_dict`, `to_csv`, `to_tensorboard`."""

    def __init__(self, layers: Mapping[str, LayerDrift]) -> None:
        self._layers = dict(layers)

    def __getitem__(self, name: str) -> LayerDrift:
        return self._layers[name]

    def __iter__(self) -> Iterator[str]:
        return iter(self._layers)

    def __len__(self) -> int:
        return len(self._layers)

    def __repr__(self) -> str:
        return f"{type(self).__name__}({self.to_dict()!r})"

    def scalars(self, prefix: str = PREFIX) -> dict[str, Tensor]:
        """Each figure by "normswap/LAYER/figure", on its device; without the limit hits of layers that have no limit."""
        return {
            f"{prefix}{name}/{what}": value
            for name, layer in self._layers.items()
            for what, value in layer._asdict().items()
            if value is not None
        }

    def to_dict(self) -> dict[str, dict[str, float]]:
        """Each figure as a number, by layer; copied from the device in one piece."""
        scalars = self.scalars("")
        values = torch.stack([value.double() for value in scalars.values()]).tolist() if scalars else []
        found: dict[str, dict[str, float]] = {name: {} for name in self._layers}
        for key, value in zip(scalars, values, strict=True):
            name, _, what = key.rpartition("/")
            found[name][what] = value
        return found

    def to_csv(self, path: str | Path, step: int) -> None:
        """Add a line for each layer to a CSV file, which is made, with a header, where there is none: for `normswap watch`.

        Raises UsageError for a file that begins with another header.
        """
        path, header = Path(path), ("step", "layer", *LayerDrift._fields)
        text = io.StringIO()
        writer = csv.writer(text, lineterminator="\n")
        if not path.exists() or not path.stat().st_size:
            writer.writerow(header)
        else:
            with path.open(encoding="utf-8", newline="") as file:
                first = next(csv.reader(file), [])
            if tuple(first) != header:
                raise UsageError(f"{path} begins with {','.join(first)[:80]!a}; expected {','.join(header)}", hint="choose another file")
        for name, figures in self.to_dict().items():
            writer.writerow([step, name, *(f"{figures[what]:.6g}" if what in figures else "" for what in LayerDrift._fields)])
        with path.open("a", encoding="utf-8", newline="") as file:
            file.write(text.getvalue())  # in one piece, so that who watches sees whole lines

    def to_tensorboard(self, writer: Writer, step: int) -> None:
        """Add each figure as a scalar, "normswap/LAYER/figure"."""
        for name, figures in self.to_dict().items():
            for what, value in figures.items():
                writer.add_scalar(f"{PREFIX}{name}/{what}", value, step)


@torch.no_grad()
def drift(model: nn.Module) -> Drift:
    """How far the statistics of every layer are off that have a gradient. Call it after the last backward of a step and before the step.

    It is computed from the gradients of mean and std, which tell the first two moments of z (`formulas.nll_gradients`) over all
    micro-batches and processes. The gradients have to be as backward left them: unscaled, not clipped, and after `attach`. Layers that are
    frozen, in eval mode or converted with aux="none" have no gradient, and are left out. Nothing is copied to the host before the result
    is asked for numbers.

    Raises UsageError if the model has no BatchlessNorm layer.
    """
    return Drift({name: found for name, layer in layers_of(model).items() if (found := _of(layer)) is not None})


def _of(layer: BatchlessNorm) -> LayerDrift | None:
    mean, parameter = layer.mean, layer.std_parameter
    if layer.aux == "none" or mean.grad is None or parameter.grad is None:
        return None
    std = layer.statistics()[1]
    f = layer._eps / std.square()
    modes = {"stats": layer.stats, "reduction": layer.reduction}
    d, r = formulas.misfit_of((mean.grad, parameter.grad), f, std, parameter, layer.std, **modes)  # type: ignore[arg-type]
    if layer.stats == "raw":  # the natural gradient is the mean over the calls already
        d, r = d / layer.calls, r / layer.calls
    z, z2 = d / std, 1 + r
    factor = layer.run.factor if layer.limits_samples else None
    if factor is not None and torch._C._functorch.is_functorch_wrapped_tensor(factor):
        factor = None  # it comes from a forward pass in a transform of torch.func, and cannot be read outside of that
    return LayerDrift(
        z.square().mean().sqrt(),
        z2.mean(),
        (z2 - z.square() < DEAD).sum().to(r.dtype),
        None if factor is None else (factor < 1).to(r.dtype).mean(),
    )
