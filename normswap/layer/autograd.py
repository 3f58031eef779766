"""What makes a torch.autograd.Function cheap enough to be called in every layer."""

from __future__ import annotations

import inspect
from collections.abc import Callable
from typing import Any, TypeVar

Static = TypeVar("Static", bound=Callable[..., Any])


def signed(forward: Static) -> Static:
    """forward, which knows its signature: `Function.apply` asks for it at each call, and to find out takes longer than all the rest."""
    forward.__signature__ = inspect.signature(forward)  # type: ignore[attr-defined]
    return forward
