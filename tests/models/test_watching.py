"""One forward pass: it leaves nothing behind, and a Watcher sees the modules and functions of it, and no more than it should."""

from __future__ import annotations

import contextlib
import random
from collections import UserDict
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from normswap.models.watching import Watcher, forward, tensors_in


class Restless(nn.Module):
    """Draws from every generator, and writes into its input."""

    def __init__(self) -> None:
        super().__init__()
        self.inner = nn.Sequential(nn.Linear(3, 5), nn.Tanh())

    def forward(self, x: Tensor, *, scale: Tensor | None = None) -> Tensor:
        x.mul_(2)
        drawn = random.random() + np.random.rand() + torch.rand(())
        return torch.relu(self.inner(x)) + drawn


class Seen(Watcher):
    def __init__(self, model: nn.Module, opaque: tuple[int, ...] = ()) -> None:
        super().__init__(model, opaque)
        self.events: list[tuple[str, str, int]] = []

    def entered(self, module: nn.Module, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> None:
        self.events.append(("entered", type(module).__name__, len(self.stack)))

    def left(self, module: nn.Module, output: Any) -> None:
        self.events.append(("left", type(module).__name__, len(self.stack)))

    def called(self, function: Callable[..., Any], args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> Any:
        if function.__name__ in ("relu", "tanh", "linear"):
            self.events.append(("called", function.__name__, len(self.stack)))
        return super().called(function, args, kwargs)


def test_a_forward_pass_leaves_nothing_behind() -> None:
    model, x, scale = Restless(), torch.ones(2, 3), torch.ones(1, requires_grad=True)
    before = random.getstate(), torch.get_rng_state(), np.random.get_state()[1].copy()  # type: ignore[index]
    output = forward(model, (x,), {"scale": scale})
    assert torch.equal(x, torch.ones(2, 3))
    assert not output.requires_grad
    assert random.getstate() == before[0]
    assert torch.equal(torch.get_rng_state(), before[1])
    assert np.array_equal(np.random.get_state()[1], before[2])  # type: ignore[index]


def test_an_accelerator_that_nobody_uses_keeps_the_seed_that_the_user_gave(monkeypatch: pytest.MonkeyPatch) -> None:
    seeds: list[int] = []
    monkeypatch.setattr(torch.cuda, "manual_seed_all", seeds.append)
    outputs = []
    for used in (False, True):
        monkeypatch.setattr(torch.cuda, "is_initialized", lambda used=used: used)
        outputs.append(forward(nn.Dropout(0.5), (torch.ones(64),), {}, seed=3))
        assert seeds == ([3] if used else [])
    assert torch.equal(*outputs)
    assert 0 < int((outputs[0] == 0).sum()) < 64


def test_modules_and_functions_are_seen_in_order_and_at_their_depth() -> None:
    watch = Seen(Restless())
    output, failed = watch.run((torch.ones(2, 3),), {})
    assert (output.shape, failed) == ((2, 5), None)
    assert watch.events == [
        ("entered", "Restless", 0),
        ("entered", "Sequential", 1),
        ("entered", "Linear", 2),
        ("called", "linear", 3),
        ("left", "Linear", 2),
        ("entered", "Tanh", 2),
        ("called", "tanh", 3),
        ("left", "Tanh", 2),
        ("left", "Sequential", 1),
        ("called", "relu", 1),
        ("left", "Restless", 0),
    ]
    assert not watch.stack


def test_nothing_inside_an_opaque_module_is_seen() -> None:
    model = Restless()
    watch = Seen(model, (id(model.inner),))
    watch.run((torch.ones(2, 3),), {})
    assert [event[:2] for event in watch.events] == [
        ("entered", "Restless"),
        ("entered", "Sequential"),
        ("left", "Sequential"),
        ("called", "relu"),
        ("left", "Restless"),
    ]


def test_what_the_model_raises_is_returned_and_the_hooks_are_gone() -> None:
    model = Restless()
    watch = Seen(model)
    output, failed = watch.run((torch.ones(2, 4),), {})
    assert (output, type(failed)) == (None, RuntimeError)
    assert ("entered", "Linear", 2) in watch.events
    assert not watch.stack
    assert not any(part._forward_hooks or part._forward_pre_hooks for part in model.modules())


def test_a_module_whose_own_hook_raises_was_never_on_the_stack() -> None:
    class Forgiving(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.picky = nn.Linear(3, 5)
            self.picky.register_forward_pre_hook(self.refuse)

        def refuse(self, *given: Any) -> None:
            raise ValueError

        def forward(self, x: Tensor) -> Tensor:
            with contextlib.suppress(ValueError):
                self.picky(x)
            return torch.relu(x)

    watch = Seen(Forgiving())
    assert watch.run((torch.ones(2, 3),), {})[1] is None
    assert ("called", "relu", 1) in watch.events


def test_tensors_are_found_in_containers_and_dataclasses() -> None:
    @dataclass
    class Output:
        logits: Tensor
        rest: list[Any]

    a, b, c = torch.zeros(1), torch.zeros(2), torch.zeros(3)
    assert [t.numel() for t in tensors_in({"a": [a, 7], "b": Output(b, [c, "x"])})] == [1, 2, 3]
    assert [t.numel() for t in tensors_in(Output(a, [Output(b, [c])]))] == [1, 2, 3]


def test_tensors_are_found_in_objects_of_any_class_but_modules_once() -> None:
    class Holder:
        pass

    holder, layer = Holder(), nn.Linear(2, 2)
    holder.own, holder.more, holder.layer = torch.zeros(1), UserDict(x=torch.zeros(2)), layer  # type: ignore[attr-defined]
    holder.self = holder  # type: ignore[attr-defined]
    assert [t.numel() for t in tensors_in([holder, layer, Holder, len, holder, 3, None])] == [1, 2]
