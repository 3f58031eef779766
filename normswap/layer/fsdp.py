"""Parameters that FSDP2 splits between processes: between passes each process has a part of them, a DTensor.

A DTensor has the operations of a tensor, so the code of a step is the same for both. Some operations communicate with the other processes,
so all processes have to step the layers in the same order.
"""

from __future__ import annotations

import sys
from typing import Any

from torch import Tensor


def is_part(t: Tensor | None) -> bool:
    """Whether a tensor is a DTensor."""
    module = _module()
    return module is not None and isinstance(t, module.DTensor)


def whole(t: Any) -> Any:
    """A DTensor with all its values in every process (parts of unequal sizes can neither be split nor stacked); a tensor as it is."""
    return t.redistribute(placements=[_module().Replicate()] * t.device_mesh.ndim) if is_part(t) else t


def _module() -> Any:
    """torch.distributed.tensor, or None if nobody has imported it, as there is no DTensor then. To import it here would take long."""
    return sys.modules.get("torch.distributed.tensor")
