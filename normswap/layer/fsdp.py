"""Parameters that FSDP2 keeps in parts, a part in each process: between passes they are DTensors.

Their operations are those of tensors, so that what steps them is written once. Some ask the other processes, so that all processes have to
step the layers in one order.
"""

from __future__ import annotations

import sys
from typing import Any

from torch import Tensor


def is_part(t: Tensor | None) -> bool:
    """Whether it is a DTensor."""
    module = _module()
    return module is not None and isinstance(t, module.DTensor)


def whole(t: Any) -> Any:
    """t; of a DTensor, all of it in every process, still as one: parts of unequal sizes can neither be split nor joined."""
    return t.redistribute(placements=[_module().Replicate()] * t.device_mesh.ndim) if is_part(t) else t


def _module() -> Any:
    """None before it is imported, which takes long: there is no DTensor then."""
    return sys.modules.get("torch.distributed.tensor")
