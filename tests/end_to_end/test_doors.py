"""Every door to the auxiliary loss, wherever a training loop takes it: the gradients of the formulas, for every parameter.

Doors: injected by itself (aux="auto"), `loss + aux_loss(model)`, the callbacks of transformers and of Lightning. CONTEXTS in doors.py says
what each of them must stand, and there are two processes. The reference is in doors.py too: the formulas of the method, without the layer.

What else peers do wrong here, each reproduced once, and the test that holds it:

    R16  an activation in place after the norm               test_injection  test_in_place_activations
    R18  a full backward hook, and such an activation        test_injection  test_full_backward_hooks_do_what_they_do_on_batch_norm
    R19  deepcopy after a forward pass (EMA)                 test_injection  test_copies_after_a_forward_pass
    R20  checkpoints, reentrant and not                      test_injection  test_checkpoints; here
    R21  per-sample gradients by vmap                        test_injection  test_per_sample_gradients
    R23  the keys of the norms of a ResNet-50, all 53        test_micro      test_norm_keys_of_a_resnet
    R24  no weight decay of the Trainer of transformers      test_trainers   test_weight_decay_of_transformers_does_not_reach_the_statistics
                                                                             test_weight_decay_of_transformers_on_the_weights_of_norms
    R25  channels last and bf16 stay what they are           test_injection  test_bf16_autocast
    R29  1 x 64, 8 x 8 and 64 x 1 samples, one gradient      test_injection  test_micro_batches_add_up; test_batch_norm_does_not
    R30  torch.compile(fullgraph=True)                       test_injection  test_compiles_whole; here
    R31  any scale, accumulation, number of processes        test_injection  test_grad_scaler, test_accumulation; here
"""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from doors import CONTEXTS, ON_TWO, Cell, cells, reference, trained
from torch import Tensor
from warm import Warm

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
def on_two(tmp_path_factory: pytest.TempPathFactory, warm: Warm) -> list[dict[str, tuple[dict[str, Tensor], dict[str, Tensor]]]]:
    directory = tmp_path_factory.mktemp("two")
    script = Path(__file__).parents[1] / "support" / "doors.py"
    warm.together(script, directory, [[str(rank), str(directory)] for rank in (0, 1)])
    return [torch.load(directory / f"{rank}.pt") for rank in (0, 1)]


@pytest.mark.parametrize("cell", ON_TWO, ids=str)
def test_two_processes(cell: Cell, on_two: list[dict[str, tuple[dict[str, Tensor], dict[str, Tensor]]]]) -> None:
    for found in on_two:
        assert_holds(cell, found[str(cell)])
    (_, first), (_, second) = (found[str(cell)] for found in on_two)
    assert all(torch.equal(first[name], second[name]) for name in first)
