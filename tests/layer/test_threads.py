"""One model in several threads: each sees what its own forward pass left."""

from __future__ import annotations

import copy
import threading
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import normswap
from fixtures.nets import randomise
from normswap.errors import UsageError

F64 = torch.float64
BATCHES = [torch.randn(n, 3, 7, 8, dtype=F64, generator=torch.Generator().manual_seed(n)) for n in (4, 5, 3)]


def net(**options: Any) -> nn.Module:
    torch.manual_seed(2)
    model = nn.Sequential(nn.Conv2d(3, 6, 3), nn.BatchNorm2d(6), nn.ReLU(), nn.Conv2d(6, 5, 2), nn.BatchNorm2d(5), nn.Flatten())
    return normswap.convert(randomise(model, 3).to(F64).eval(), BATCHES[0], **options).model


def in_threads(work: Callable[[int], object], count: int = 3) -> list[BaseException]:
    """What was raised."""
    raised: list[BaseException] = []

    def run(number: int) -> None:
        try:
            work(number)
        except BaseException as error:
            raised.append(error)

    threads = [threading.Thread(target=run, args=(number,)) for number in range(count)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    return raised


def together(model: nn.Module, count: int = 3) -> nn.Module:
    """Whoever has called a conv of `model` waits until all have, so that each norm comes after the convs of all."""
    for module in model.modules():
        if isinstance(module, nn.Conv2d):
            barrier = threading.Barrier(count)
            module.register_forward_hook(lambda *_, barrier=barrier: (barrier.wait(60), None)[1])
    return model


def test_in_eval_mode() -> None:
    model = together(net())
    found: list[Tensor | None] = [None] * 3
    assert in_threads(lambda i: found.__setitem__(i, model(BATCHES[i]))) == []
    alone = net()
    assert all(torch.equal(y, alone(x)) for y, x in zip(found, BATCHES, strict=True) if y is not None)
    assert None not in found


@pytest.mark.parametrize("options", [{}, {"coupling": "none"}, {"aux": "explicit"}, {"aux": "explicit", "coupling": "none"}], ids=str)
def test_a_step_of_three_threads_is_that_of_one(options: dict[str, Any]) -> None:
    """Their gradients add up, and each takes note of its own inputs."""
    alone = net(**options).train()
    shared = together(copy.deepcopy(alone))
    steps = {model: torch.optim.SGD(normswap.param_groups(model, lr=0.05), momentum=0.9) for model in (alone, shared)}
    if "aux" not in options:
        for model in steps:
            normswap.attach(model, accumulate=3)

    def work(model: nn.Module, number: int) -> None:
        loss = model(BATCHES[number]).square().mean()
        if "aux" in options:
            loss = loss + normswap.aux_loss(model)
            assert torch.equal(normswap.aux_loss(model), normswap.aux_loss(model))
        (loss / 3).backward()

    for _ in range(3):
        for number in range(3):
            work(alone, number)
        assert in_threads(lambda number: work(shared, number)) == []
        for step in steps.values():
            step.step()
            step.zero_grad()
    for name, tensor in alone.state_dict().items():
        torch.testing.assert_close(shared.state_dict()[name], tensor, rtol=1e-12, atol=1e-12)


def test_the_loss_of_a_forward_pass_in_another_thread() -> None:
    model = net(aux="explicit").train()
    expected = copy.deepcopy(model)
    expected(BATCHES[0])
    assert in_threads(lambda _: model(BATCHES[0]), 1) == []
    assert torch.equal(normswap.aux_loss(model), normswap.aux_loss(expected))


def test_losses_of_several_other_threads() -> None:
    model = net(aux="explicit").train()
    assert in_threads(lambda number: model(BATCHES[number]), 2) == []
    with pytest.raises(UsageError, match="2 other threads have called the model, and this one has not: it is not clear whose"):
        normswap.aux_loss(model)


def test_threads_that_have_ended_are_forgotten() -> None:
    model = net().train()
    for _ in range(5):
        assert in_threads(lambda _: model(BATCHES[0]).sum().backward(), 2) == []
    assert len(model[1].run.others) <= 4  # type: ignore[index,union-attr]


def test_a_producer_that_was_called_in_another_thread_only() -> None:
    model = net().train()
    assert in_threads(lambda _: model[0](BATCHES[0]), 1) == []  # type: ignore[index]
    with pytest.raises(UsageError, match="coupled to a Conv2d that was not called before it"):
        model[1](torch.randn(4, 6, 5, 6, dtype=F64))  # type: ignore[index]


@pytest.mark.parametrize("reentrant", [False, True])
def test_a_checkpoint_in_another_thread(reentrant: bool) -> None:
    """The norm runs again in backward, its conv does not: in whichever thread that is."""
    from torch.utils.checkpoint import checkpoint

    class Net(nn.Module):
        def __init__(self, again: bool) -> None:
            super().__init__()
            self.layers, self.again = net().train(), again

        def forward(self, x: Tensor) -> Tensor:
            conv, norm, *rest = self.layers.children()
            h = conv(x)
            y: Tensor = checkpoint(norm, h, use_reentrant=reentrant) if self.again else norm(h)  # type: ignore[no-untyped-call]
            for layer in rest:
                y = layer(y)
            return y

    grads = []
    for again in (False, True):
        model = Net(again)
        losses: list[Tensor] = []
        assert in_threads(lambda _, model=model, losses=losses: losses.append(model(BATCHES[1]).square().mean()), 1) == []  # type: ignore[misc]
        losses[0].backward()
        grads.append({name: None if p.grad is None else p.grad.clone() for name, p in model.named_parameters()})
    assert grads[0].keys() == grads[1].keys()
    for name, grad in grads[0].items():
        torch.testing.assert_close(grads[1][name], grad)
