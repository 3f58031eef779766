"""A batch of calibration data: what the model gets of it, which positions count, and what is said if the model does not take it."""

from __future__ import annotations

import contextlib
import inspect
from collections.abc import Iterator, Mapping
from typing import Any

from torch import Tensor, nn

from normswap.errors import UsageError, described, kind_of

MASK = "attention_mask"


class Unreadable(Exception):
    """The input of a layer is a tensor whose values calibration cannot read."""


def mask_of(kwargs: Mapping[str, Any]) -> Tensor | None:
    """Which positions of a batch count, from its attention mask; None for all."""
    mask = kwargs.get(MASK)
    return mask.bool() if isinstance(mask, Tensor) else None


@contextlib.contextmanager
def told(what: str = "calibration data") -> Iterator[None]:
    """Raise what the model raises on the data as a UsageError."""
    try:
        yield
    except Unreadable as error:
        raise UsageError(str(error), hint="exclude it from the conversion") from error
    except Exception as error:  # the user's model may raise anything
        raise UsageError(
            f"the model does not take the {what}: {described(error)}",
            hint="a batch is a tensor, a tuple of arguments, or a dict of keyword arguments",
        ) from error


def check_batches(data: Any, what: str = "the data are") -> None:
    """Raise UsageError for one batch in the place of an iterable of them, and for what is no iterable."""
    iterable = hasattr(type(data), "__iter__") or hasattr(type(data), "__getitem__")
    if isinstance(data, (Tensor, Mapping, str, bytes)) or not iterable:
        raise UsageError(f"{what} {kind_of(data)}; expected an iterable of batches", hint="a single batch: [batch]")


def no_batch(what: str = "the calibration data") -> UsageError:
    """What is raised for data without any."""
    return UsageError(f"{what} hold no batch", hint="give at least one; some hundred samples are better")


def samples_in(args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> int:
    """How many samples a model is called on: the length of its first tensor; 0 if it gets none."""
    return next((len(t) for t in (*args, *kwargs.values()) if isinstance(t, Tensor) and t.dim()), 0)


def arguments_of(batch: Any, model: nn.Module) -> tuple[tuple[Any, ...], Mapping[str, Any]]:
    """(args, kwargs) for a batch. Of a tuple, like a data set's (input, label), the model gets only as many elements as it takes."""
    if isinstance(batch, Mapping):
        return (), batch
    if not isinstance(batch, (tuple, list)):
        return (batch,), {}
    parameters = [p for p in inspect.signature(model.forward).parameters.values() if p.kind in (p.POSITIONAL_ONLY, p.POSITIONAL_OR_KEYWORD)]
    variadic = any(p.kind is p.VAR_POSITIONAL for p in inspect.signature(model.forward).parameters.values())
    return tuple(batch) if variadic else tuple(batch)[: len(parameters)], {}
