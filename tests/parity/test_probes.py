"""The inputs at which models are judged."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from normswap.parity.probes import Probe, probes


def made(*args: Any, **kwargs: Any) -> dict[str, Probe]:
    return {probe.name: probe for probe in probes(args, kwargs)}


def test_six_from_a_batch() -> None:
    x = torch.randn(2, 3, 5)
    found = made(x)
    assert list(found) == ["example", "batch 1", "batch 3", "batch 1 x 0.001", "batch 1 x 1000", "batch 1, all 3"]
    assert [len(p.args[0]) for p in found.values()] == [2, 1, 3, 1, 1, 1]
    assert [p.like_example for p in found.values()] == [True, *[False] * 5]
    assert [name for name, p in found.items() if p.flat] == ["batch 1, all 3"]
    assert [name for name, p in found.items() if p.scaled] == ["batch 1 x 0.001", "batch 1 x 1000", "batch 1, all 3"]
    assert found["batch 1, all 3"].args[0].unique().tolist() == [3]
    assert found["example"].args[0] is x
    one = found["batch 1"].args[0]
    assert torch.equal(found["batch 1 x 1000"].args[0], one * 1e3)
    assert torch.equal(found["batch 1 x 0.001"].args[0], one * 1e-3)
    assert not torch.equal(one, x[:1])


@pytest.mark.parametrize(("batch", "like"), [(1, set(made(torch.randn(1, 4))) - {"batch 2"}), (3, {"example", "batch 3"})])
def test_like_example_is_about_shapes(batch: int, like: set[str]) -> None:
    assert {name for name, probe in made(torch.randn(batch, 4)).items() if probe.like_example} == like


def test_a_batch_of_one_is_not_made_again() -> None:
    found = made(torch.randn(1, 3, 5))
    assert list(found) == ["example", "batch 2", "batch 1 x 0.001", "batch 1 x 1000", "batch 1, all 3"]
    assert [len(p.args[0]) for p in found.values()] == [1, 2, 1, 1, 1]


def test_they_are_the_same_every_time() -> None:
    x = torch.randn(2, 3)
    torch.manual_seed(5)
    before = torch.get_rng_state()
    a, b = made(x), made(x)
    assert torch.equal(torch.get_rng_state(), before)
    assert all(torch.equal(a[name].args[0], b[name].args[0]) for name in a)


def test_floats_keep_their_values_and_integers_their_rows() -> None:
    x, tokens, mask = torch.tensor([[0.0, 0.25], [1.0, 0.5]]), torch.tensor([[4, 5, 6], [7, 8, 9]]), torch.tensor([[True], [False]])
    for probe in list(made(x, tokens, mask=mask).values())[1:3]:
        assert set(probe.args[0].flatten().tolist()) <= {0.0, 0.25, 0.5, 1.0}
        rows = probe.args[1].tolist()
        assert rows == [[4, 5, 6], [7, 8, 9], [4, 5, 6]][: len(rows)]
        assert probe.kwargs["mask"].tolist() == [[True], [False], [True]][: len(rows)]


def test_only_floats_are_scaled() -> None:
    found = made(torch.randn(2, 3), torch.ones(2, dtype=torch.int64), torch.randn(2, dtype=torch.complex64))["batch 1 x 1000"]
    one = made(torch.randn(2, 3), torch.ones(2, dtype=torch.int64), torch.randn(2, dtype=torch.complex64))["batch 1"]
    assert torch.equal(found.args[1], one.args[1])
    assert found.args[2].abs().item() > 1


def test_without_a_common_batch_axis_only_the_values_change() -> None:
    a, b, tokens = torch.randn(2, 3), torch.randn(4), torch.arange(5)
    found = made(a, b, tokens)
    assert list(found) == ["example", "seed 1", "seed 3", "seed 1 x 0.001", "seed 1 x 1000", "seed 1, all 3"]
    assert all(p.like_example for p in found.values())
    assert [t.shape for t in found["seed 3"].tensors()] == [a.shape, b.shape, tokens.shape]
    assert not torch.equal(found["seed 1"].args[0], a)
    assert torch.equal(found["seed 1"].args[2], tokens)


def test_scalars_do_not_take_part_in_the_batch() -> None:
    found = made(torch.randn(2, 3), torch.tensor(0.7), 4, None)["batch 3"]
    assert (found.args[0].shape, found.args[1].item(), *found.args[2:]) == ((3, 3), pytest.approx(0.7), 4, None)


def test_containers_keep_their_form() -> None:
    found = made([torch.randn(2, 3), {"a": torch.randn(2, 5)}], last=(torch.ones(2),))["batch 3"]
    (first, second), last = found.args[0], found.kwargs["last"]
    assert [t.shape for t in (first, second["a"], last[0])] == [(3, 3), (3, 5), (3,)]
    assert [t.shape for t in found.tensors()] == [(3, 3), (3, 5), (3,)]


@pytest.mark.parametrize("blank", [torch.zeros(2, 3, 4), torch.full((2, 3, 4), 0.5)])
def test_a_blank_example_is_replaced_by_noise(blank: Tensor) -> None:
    """One value tells no two models apart that agree at it."""
    found = made(blank)
    assert torch.equal(found["example"].args[0], blank)
    assert all(len(found[name].args[0].unique()) > 1 for name in ("batch 1", "batch 3", "batch 1 x 0.001", "batch 1 x 1000"))


def test_a_blank_mask_next_to_a_drawn_example_stays() -> None:
    found = made(torch.randn(2, 3), torch.ones(2, 3))
    assert all(bool((found[name].args[1] == 1).all()) for name in ("batch 1", "batch 3"))


@pytest.mark.parametrize("empty", [torch.zeros(0, 3), torch.zeros(0, 3, dtype=torch.int64)])
def test_an_empty_example(empty: Tensor) -> None:
    assert [p.args[0].shape for p in made(empty).values() if not p.flat] == [(0, 3), (1, 3), (3, 3), (1, 3), (1, 3)]


def test_integers_alone_are_never_flat() -> None:
    assert not any(p.flat for p in made(torch.tensor([[4, 5], [6, 7]])).values())
    found = made(torch.randn(2, 3), torch.tensor([[4, 5], [6, 7]]))["batch 1, all 3"]
    assert (found.args[0].unique().tolist(), found.args[1].tolist()) == ([3], [[4, 5]])


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64])
def test_the_dtype_is_the_examples(dtype: torch.dtype) -> None:
    for x in (torch.randn(2, 3).to(dtype), torch.zeros(2, 3, dtype=dtype)):
        assert {p.args[0].dtype for p in made(x).values()} == {dtype}


def test_mapped_reaches_every_tensor() -> None:
    probe = Probe("p", (torch.ones(1), [torch.ones(2)]), {"k": torch.ones(3)})
    args, kwargs = probe.mapped(lambda t: t * 2)
    assert [float(t.sum()) for t in (args[0], args[1][0], kwargs["k"])] == [2, 4, 6]
    assert float(probe.args[0]) == 1
