"""A module that is run is left as it was, and its outputs are named."""

from __future__ import annotations

import copy

import pytest
import torch
from comparing import Net, Pair, Raises, Result, X, compared
from torch import Tensor, nn

from normswap.errors import UsageError
from normswap.parity.measure import KEPT
from normswap.parity.probes import Probe
from normswap.parity.run_torch import module_runner


def test_outputs_are_named_by_their_path() -> None:
    parity = compared(Net(lambda m, y: {"a": Result(y, Pair(y, [y]))}))
    assert [d.name for d in parity.outputs] == [
        "output['a'].logits",
        "output['a'].extra.a",
        "output['a'].extra.b[0]",
    ]


class Restless(nn.Module):
    """Dropout, a buffer that every forward changes, and an input that it writes into."""

    count: Tensor

    def __init__(self) -> None:
        super().__init__()
        self.net, self.drop = Net(), nn.Dropout(0.5)
        self.register_buffer("count", torch.zeros(()))
        self.plain = torch.ones(1)

    def forward(self, x: Tensor) -> Tensor:
        self.count += 1
        x.mul_(2)
        return self.drop(self.net(x)) + self.count + self.plain


def test_nothing_outside_changes() -> None:
    reference, candidate, x = Restless().train(), Restless().train(), X.clone()
    before = [copy.deepcopy(m.state_dict()) for m in (reference, candidate)]
    torch.manual_seed(11)
    state, dtype = torch.get_rng_state(), torch.get_default_dtype()
    assert compared(reference, candidate, x, sites=("net.bn1",))
    assert torch.equal(torch.get_rng_state(), state)
    assert torch.get_default_dtype() == dtype
    assert torch.equal(x, X)
    for model, saved in zip((reference, candidate), before, strict=True):
        assert all(torch.equal(v, saved[k]) and v.dtype == saved[k].dtype for k, v in model.state_dict().items())
        assert all(m.training for m in model.modules())
        assert not any(m._forward_hooks for m in model.modules())
        assert all(p.grad is None and p.requires_grad for p in model.parameters())


def test_the_default_dtype_and_generator_come_back_after_an_error() -> None:
    state = torch.get_rng_state()
    with pytest.raises(UsageError):
        compared(Raises())
    assert torch.get_default_dtype() == torch.float32
    assert torch.equal(torch.get_rng_state(), state)


@pytest.mark.parametrize("shape", [(2, 3, 5), (1, 4096), (1, 4097), (1, 8191), (1, 14, 768), (1, 16, 768), (3, 64, 32, 32), (1, 8, 8, 513)])
def test_kept_values_are_few_and_see_every_channel(shape: tuple[int, ...]) -> None:
    for axis in (1, -1):
        index = torch.arange(shape[axis], dtype=torch.float64).view([-1 if a == axis % len(shape) else 1 for a in range(len(shape))])
        _, kept = module_runner(nn.Sequential(nn.Identity()), ("0",))(Probe("p", (index.expand(shape),), {}))
        (values,) = kept.values()
        assert values.numel() <= KEPT
        assert values.numel() >= min(KEPT // 2 - 1, index.expand(shape).numel())
        if shape[axis] <= 1024:
            assert len(values.unique()) == shape[axis]
