"""The KL divergence that healing can add: the right value, of the right tensor, over the positions that count."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor
from transformers.modeling_outputs import CausalLMOutput

from normswap.errors import UsageError
from normswap.healing.losses import kl

Y, T = torch.randn(2, 3, 7, 5, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
MASK = torch.tensor([[1, 1, 1, 1, 1, 0, 0], [1, 1, 0, 0, 0, 0, 0], [1, 1, 1, 1, 1, 1, 1]])


def _by_hand(y: Tensor, t: Tensor) -> Tensor:
    p, q = (each.exp() / each.exp().sum(-1, keepdim=True) for each in (t, y))
    return (p * (p / q).log()).sum(-1)


@pytest.mark.parametrize(
    "wrap",
    [
        lambda y: y,
        lambda y: CausalLMOutput(logits=y),
        lambda y: {"other": y.square(), "logits": y},
        lambda y: (torch.arange(3), y, y.square()),
    ],
    ids=["tensor", "of transformers", "dict", "tuple"],
)
def test_it_is_the_divergence_of_the_logits(wrap: Any) -> None:
    assert kl(Y, wrap(Y), wrap(T)).item() == pytest.approx(_by_hand(Y, T).mean().item(), rel=1e-12)
    assert kl(Y, wrap(T), wrap(T)).item() == pytest.approx(0, abs=1e-15)


def test_positions_that_are_masked_do_not_count() -> None:
    batch = {"input_ids": torch.zeros(3, 7), "attention_mask": MASK}
    expected = _by_hand(Y, T)[MASK.bool()].mean().item()
    assert kl(batch, Y, T).item() == pytest.approx(expected, rel=1e-12)
    assert expected != pytest.approx(_by_hand(Y, T).mean().item(), rel=1e-2)
    assert kl({**batch, "attention_mask": MASK * 0}, Y, T).item() == 0  # a batch of padding alone
    one_each = kl(batch, Y[:, 0], T[:, 0]).item()  # a classifier of sequences has one row of scores for each
    assert one_each == pytest.approx(_by_hand(Y[:, 0], T[:, 0]).mean().item(), rel=1e-12)


def test_classes_that_are_ruled_out_do_not_count() -> None:
    y, t = (torch.cat([each, torch.full_like(each[..., :2], -torch.inf)], -1) for each in (Y, T))
    y.requires_grad_()
    found = kl(y, y, t)
    assert found.item() == pytest.approx(_by_hand(Y, T).mean().item(), rel=1e-12)
    (gradient,) = torch.autograd.grad(found, y)
    expected = (torch.softmax(Y, -1) - torch.softmax(T, -1)) / 21
    torch.testing.assert_close(gradient[..., :5], expected, rtol=0, atol=1e-16)  # a few roundings of float64 at .03
    assert not gradient[..., 5:].any()


def test_a_model_without_scores_is_told_so() -> None:
    with pytest.raises(UsageError, match="the loss kl compares scores of classes, and the model returns no floating tensor of them"):
        kl(Y, torch.arange(3), torch.arange(3))
