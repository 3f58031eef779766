"""Training a converted model: the auxiliary loss, parameter groups, masks, micro-batches, callbacks.

The mechanism is in `layer`: `train_pass` (what a layer does in train mode) and `optimizer_step` (optimizers); here are its doors.

    normswap.training.huggingface.NormswapCallback     of the Trainer of transformers; extra: normswap[trainer]
    normswap.training.lightning.NormswapCallback       of the Trainer of Lightning; extra: normswap[lightning]

The modules of the callbacks are imported when they are first used, as they import what they are for.
"""

from __future__ import annotations

import importlib
import types
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from normswap.training import huggingface as huggingface
    from normswap.training import lightning as lightning


def __getattr__(name: str) -> types.ModuleType:
    if name in ("huggingface", "lightning"):
        return importlib.import_module(f"{__name__}.{name}")
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
