"""Where what a norm takes and gives is to be found in an ONNX file in which that norm was folded."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import numpy as np
import numpy.typing as npt


def key(name: str, call: int, *, input: bool = False) -> str:
    """What a tapped value is called; what follows the last "@" is not the norm's name."""
    return f"{name}@{call} in" if input else f"{name}@{call}"


@dataclass(frozen=True)
class Tap:
    """What a call of a norm takes or gives, v, from a value of the file, v': folding may have stored it in another basis
    (`folding/basis.py`).

        v = scale * v' + shift

    name   of the norm; call: which call of it, from 1
    value  the name of v' in the file
    input  whether it is what the norm takes
    scale, shift   float64, with as many dimensions as v', size 1 where they do not vary
    """

    name: str
    call: int
    value: str
    input: bool = False
    scale: npt.NDArray[Any] = field(default_factory=lambda: np.ones(()), repr=False, compare=False)
    shift: npt.NDArray[Any] = field(default_factory=lambda: np.zeros(()), repr=False, compare=False)

    @property
    def key(self) -> str:
        return key(self.name, self.call, input=self.input)

    def original(self, stored: npt.NDArray[Any]) -> npt.NDArray[Any]:
        """v, in the dtype of v'."""
        with np.errstate(all="ignore"):  # what is not finite is for the comparison to say
            return np.asarray(stored.astype(np.float64) * self.scale + self.shift).astype(stored.dtype)
