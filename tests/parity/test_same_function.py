"""The same function: what rounding excuses, and that it excuses nothing that is wrong."""

from __future__ import annotations

import pytest
import torch
from comparing import LARGER, fused, net

import normswap
from normswap.parity.judge import compare, judge
from normswap.parity.limits import SAME


def test_a_conversion_is_held_to_1e_9_although_its_statistics_are_rounded() -> None:
    parity = normswap.convert(net(), LARGER).parity
    rows = [d for d in (*parity.all_outputs, *parity.sites) if d.float64]
    assert {d.tolerance for d in rows} == {SAME}
    assert max(d.max_rel for d in rows) < 1e-13


@pytest.mark.parametrize("eps", [0.0, 1.1e-5])
def test_another_eps_is_another_function_however_little_it_moves(eps: float) -> None:
    """In float32 it is hidden by rounding."""
    reference, candidate = net(), net()
    with torch.no_grad():
        for model in (reference, candidate):
            model[1].running_var.fill_(30.0)  # type: ignore[union-attr]
    candidate[1].eps = eps  # type: ignore[assignment]
    parity = compare(judge(reference, (LARGER,), {}), candidate)
    assert not parity
    assert all(d.passed for d in parity.all_outputs if not d.float64)
    assert any(not d.passed for d in parity.all_outputs if d.float64)


@pytest.mark.parametrize("seed", range(4))
def test_weights_that_were_rounded_are_the_same_function(seed: int) -> None:
    reference, candidate = net(seed), fused(net(seed))
    for a, b in ((reference, candidate), (candidate, reference)):
        parity = compare(judge(a, (LARGER,), {}), b)
        assert parity, parity.outputs
        wide = [d for d in parity.all_outputs if d.float64]
        assert all(SAME < d.tolerance < 1e-5 for d in wide)
    with torch.no_grad():
        candidate[3].weight[2] *= 1 + 1e-4  # type: ignore[index]
    assert not compare(judge(reference, (LARGER,), {}), candidate)
