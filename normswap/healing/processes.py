"""Several processes that heal one model together, as `torchrun` starts them."""

from __future__ import annotations

import contextlib
import os
from collections.abc import Iterator

import torch.distributed as dist


@contextlib.contextmanager
def joined() -> Iterator[int]:
    """Join the processes that `torchrun` started, for the block; yields the number of this one, 0 if it is alone."""
    if int(os.environ.get("WORLD_SIZE", "1")) < 2 or dist.is_initialized():
        yield dist.get_rank() if dist.is_initialized() else 0
        return
    dist.init_process_group("gloo")  # the command heals on the CPU
    try:
        yield dist.get_rank()
    finally:
        dist.destroy_process_group()
