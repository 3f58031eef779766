"""What a training loop needs for a converted model: auxiliary loss, parameter groups, masks, micro-batches, Opacus, drift, callbacks.

How a layer trains is in `layer`; this room may import `layer`, `models` and `detect`. The callbacks for the Trainers of transformers and of
Lightning, `huggingface.NormswapCallback` and `lightning.NormswapCallback`, are imported at first use, as they need those packages.
"""

import importlib
import types


def __getattr__(name: str) -> types.ModuleType:
    if name in ("huggingface", "lightning"):
        return importlib.import_module(f"{__name__}.{name}")
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
