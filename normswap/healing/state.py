"""The file that an interrupted healing goes on from: weights, the optimizer's moments, the place in the data, and what was measured.

It is written whole or not at all at each measurement, so after Ctrl-C, a kill or a crash the same call goes on from the last one and,
with a budget of tokens, computes the same numbers. It is read with `weights_only=True`, so it can hold no code.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from normswap.errors import LoadError, UsageError, first_line
from normswap.files import atomic

FORMAT = 1


@dataclass(frozen=True)
class Point:
    """One measurement.

    tokens, seconds   used so far
    loss              the mean since the last one; nan at first
    distance          to the original, on the held-out batches
    score             distance^2, plus the user's own loss on these batches if there is one; the weights of the smallest are the best
    """

    step: int
    tokens: int
    seconds: float
    loss: float
    distance: float
    score: float


@dataclass
class State:
    """Where a healing is.

    settings     what must be the same when it goes on
    epoch, seen  how often the data ended, and how many batches were taken since
    slower       what the learning rate is multiplied by, after roll backs
    weights      the trained tensors by name       best: those of the smallest score
    """

    settings: dict[str, Any]
    weights: dict[str, Tensor]
    best: dict[str, Tensor]
    optimizer: dict[str, Any]
    step: int = 0
    tokens: int = 0
    seconds: float = 0.0
    epoch: int = 0
    seen: int = 0
    slower: float = 1.0
    rolled_back: int = 0
    curve: list[Point] = field(default_factory=list)

    @property
    def least(self) -> float:
        """The smallest distance so far."""
        return min(point.distance for point in self.curve)


def save(state: State, path: Path) -> None:
    content = {name: getattr(state, name) for name in State.__dataclass_fields__}
    content["curve"] = [asdict(point) for point in state.curve]
    with atomic.file(path) as partial, atomic.writing(path.name):
        torch.save({"format": FORMAT, **content}, partial)


def load(path: Path, settings: Mapping[str, Any]) -> State | None:
    """The state in a file; None if there is none. Raises LoadError for another file, UsageError for the state of another healing."""
    if not path.exists():
        return None
    hint = f"delete {path} to begin anew"
    try:
        content = torch.load(path, weights_only=True, map_location="cpu")
        if not isinstance(content, dict) or content.pop("format", None) != FORMAT:
            raise ValueError("another program wrote it, or another version of normswap")
        state = State(**{**content, "curve": [Point(**point) for point in content["curve"]]})
    except Exception as error:  # torch.load and pickle raise anything
        raise LoadError(f"{path} is not the state of a healing: {first_line(error)}", hint=hint) from error
    for name, value in settings.items():
        if state.settings.get(name) != value:
            raise UsageError(f"{path} is of a healing with {name} {state.settings.get(name)!r}, and this one has {value!r}", hint=hint)
    return state
