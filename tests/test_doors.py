"""Every door to the auxiliary loss, wherever a training loop takes it: the gradients of the formulas, for every parameter.

Doors: injected by itself (aux="auto"), `loss + aux_loss(model)`, the callbacks of transformers and of Lightning. CONTEXTS in doors.py says
what each of them must stand, and there are two processes. The reference is in doors.py too: the formulas of the method, without the layer.
"""

from __future__ import annotations

import sys
from pathlib import Path

import pytest
import torch
from doors import CONTEXTS, ON_TWO, Cell, cells, reference, trained
from test_distributed import run
from torch import Tensor

# The largest error of a tensor, against its largest element. bf16: two layers of activations with 8 bits each.
TOLERANCE = {"float32": 1e-5, "bf16": 3e-2}


def assert_same(found: dict[str, Tensor], expected: dict[str, Tensor], tolerance: float) -> None:
    assert found.keys() == expected.keys()
    for name, tensor in expected.items():
        error = float((found[name].double() - tensor).abs().max() / tensor.abs().max())
        assert error <= tolerance, f"{name}: {error:.1e}"


def assert_holds(cell: Cell, found: tuple[dict[str, Tensor], dict[str, Tensor]]) -> None:
    for mine, expected in zip(found, reference(cell.net, cell.stats), strict=True):
        assert_same(mine, expected, TOLERANCE.get(cell.context, 1e-12))


@pytest.mark.parametrize("cell", cells(CONTEXTS), ids=str)
def test_one_device(cell: Cell) -> None:
    """Warnings are errors here: nothing is left for the step to put right."""
    assert_holds(cell, trained(cell))


@pytest.fixture(scope="module")
def on_two(tmp_path_factory: pytest.TempPathFactory) -> list[dict[str, tuple[dict[str, Tensor], dict[str, Tensor]]]]:
    directory = tmp_path_factory.mktemp("two")
    run([[sys.executable, str(Path(__file__).parent / "doors.py"), str(rank), str(directory)] for rank in (0, 1)])
    return [torch.load(directory / f"{rank}.pt") for rank in (0, 1)]


@pytest.mark.parametrize("cell", ON_TWO, ids=str)
def test_two_processes(cell: Cell, on_two: list[dict[str, tuple[dict[str, Tensor], dict[str, Tensor]]]]) -> None:
    for found in on_two:
        assert_holds(cell, found[str(cell)])
    (_, first), (_, second) = (found[str(cell)] for found in on_two)
    assert all(torch.equal(first[name], second[name]) for name in first)
