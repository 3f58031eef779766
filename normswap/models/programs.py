"""Turns an ExportedProgram into its graph module, and a rewritten graph module into an ExportedProgram again."""

from __future__ import annotations

import itertools
from typing import Any, TypeVar, cast

import torch
from torch import nn
from torch.export import Dim, ExportedProgram

from normswap.errors import SwapError, UsageError
from normswap.models import wellformed
from normswap.models.inputs import Inputs
from normswap.models.torch_private import tree_map

Model = nn.Module | ExportedProgram
M = TypeVar("M", bound=Model)


def as_module(model: nn.Module | ExportedProgram) -> nn.Module:
    """The model itself, or the graph module of an ExportedProgram. Raises SwapError for names or nesting that `wellformed` refuses."""
    if isinstance(model, ExportedProgram):
        names = itertools.chain(model.state_dict, model.constants)
        if (problem := wellformed.problem_of_names(names)) is not None:
            raise SwapError(f"the program {problem[0]}", hint=problem[1])
        return model.module()
    if not isinstance(model, nn.Module):
        raise UsageError(
            f"a model is a torch.nn.Module or an ExportedProgram, not {type(model).__name__}: {str(model)[:60]!r}",
            hint="give its model: conversion.model" if isinstance(getattr(model, "model", None), nn.Module) else None,
        )
    if (problem := wellformed.problem(model)) is not None:
        raise SwapError(f"the model {problem[0]}", hint=problem[1])
    return model


def inputs_in(program: ExportedProgram) -> Inputs | None:
    """The example inputs that a program was exported with; None if it has stored none."""
    stored = program.example_inputs
    return Inputs(tuple(stored[0]), dict(stored[1]), "program") if stored else None


def like(model: M, swapped: nn.Module, inputs: Inputs) -> M:
    """`swapped`, exported again with the same dynamic axes if `model` is an ExportedProgram."""
    if not isinstance(model, ExportedProgram):
        return cast(M, swapped)
    try:
        program = torch.export.export(swapped, inputs.args, dict(inputs.kwargs), dynamic_shapes=_dynamic_shapes(model, inputs))
    except Exception as error:  # torch.export raises what its tracer raises
        raise SwapError(f"the rewritten program cannot be exported again: {str(error).splitlines()[0]}") from error
    return cast(M, program)


def _dynamic_shapes(program: ExportedProgram, inputs: Inputs) -> Any:
    """Dim.DYNAMIC for every axis of an input that is dynamic in the program."""
    names = set(program.graph_signature.user_inputs)
    values = iter([node.meta.get("val") for node in program.graph.nodes if node.op == "placeholder" and node.name in names])

    def axes(leaf: Any) -> dict[int, Any] | None:
        if not isinstance(leaf, torch.Tensor):
            return None
        value = next(values)
        return {axis: Dim.DYNAMIC for axis, size in enumerate(getattr(value, "shape", ())) if isinstance(size, torch.SymInt)}

    shapes = tree_map(axes, (inputs.args, dict(inputs.kwargs)))
    args, kwargs = cast("tuple[tuple[Any, ...], dict[str, Any]]", shapes)
    return {**dict(zip(_positional_names(program, len(args)), args, strict=True)), **kwargs}


def _positional_names(program: ExportedProgram, count: int) -> list[str]:
    import inspect

    parameters = list(inspect.signature(program.module().forward).parameters)
    return parameters[:count]
