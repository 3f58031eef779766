"""Who moves a weight, and who else writes to mean and std: what coupled layers follow, and what they leave as it is."""

from __future__ import annotations

import copy
import gc
import io
import pickle
import weakref
from collections.abc import Callable
from typing import Any

import pytest
import torch
from producers import F64, KINDS, close, pair_of
from torch import Tensor, nn
from torch.optim.swa_utils import AveragedModel

import normswap
from normswap.layer.formulas import STD_FORMS, StdForm
from normswap.layer.producer import filters, groups_of, response


def trained(kind: str = "conv2d", **options: Any) -> tuple[Any, Tensor, torch.optim.Optimizer]:
    """A pair that has made a step, its data and its optimizer."""
    source, x = pair_of(kind)
    model: Any = normswap.convert(source, x[:3], calibration=[x], **options).model.train()
    optimizer = torch.optim.SGD(normswap.param_groups(model, lr=0.05), momentum=0.9)
    train(model, x, optimizer)
    return model, x, optimizer


def train(model: Any, x: Tensor, optimizer: torch.optim.Optimizer) -> None:
    optimizer.zero_grad()
    model(x).square().mean().backward()
    optimizer.step()


def c_and_s(model: Any) -> tuple[Tensor, Tensor]:
    """c and s, by their formulas."""
    conv, norm = model[0], model[1]
    rows = filters(conv, F64).detach()
    output_mean = response(rows, norm.input_mean.detach(), groups_of(conv)) + (0 if conv.bias is None else conv.bias.detach())
    mean, std = (t.detach() for t in norm.statistics())
    return (mean - output_mean) / rows.norm(dim=1), std / rows.norm(dim=1)


@torch.no_grad()
def move(model: Any) -> None:
    """As somebody does who moves a weight by hand."""
    generator = torch.Generator().manual_seed(7)
    for p in model[0].parameters():
        p.mul_(1.3).add_(0.2 * torch.randn(p.shape, generator=generator, dtype=p.dtype))


# --- what is followed ---------------------------------------------------------------------------------------------------------------------


def in_a_pass(model: Any, x: Tensor) -> Any:
    model(x)
    return model


def in_a_pass_apart(model: Any, x: Tensor) -> Any:
    model[0].register_forward_hook(lambda *_: None)
    return in_a_pass(model, x)


def in_a_step(model: Any, x: Tensor) -> Any:
    torch.optim.SGD(model[0].parameters(), lr=0.0).step()
    return model


def in_eval_mode(model: Any, x: Tensor) -> Any:
    return model.eval().train()


def in_a_state(model: Any, x: Tensor) -> Any:
    other, _, _ = trained()
    other.load_state_dict(model.state_dict())
    return other


def in_a_pickle(model: Any, x: Tensor) -> Any:
    return pickle.loads(pickle.dumps(model))


def in_a_file(model: Any, x: Tensor) -> Any:
    file = io.BytesIO()
    torch.save(model, file)
    file.seek(0)
    return torch.load(file, weights_only=False)


SEEN: list[Callable[[Any, Tensor], Any]] = [
    *(in_a_pass, in_a_pass_apart, in_a_step, in_eval_mode, in_a_state, in_a_pickle, in_a_file),
    lambda model, x: copy.deepcopy(model),
]


@pytest.mark.parametrize("seen", SEEN)
def test_a_weight_that_was_moved_by_hand_is_followed_wherever_one_looks(seen: Callable[[Any, Tensor], Any]) -> None:
    model, x, _ = trained()
    before, mean = c_and_s(model), model[1].mean.detach().clone()
    move(model)
    for found, expected in zip(c_and_s(seen(model, x)), before, strict=True):
        close(found, expected, 1e-11)
    assert (model[1].mean - mean).abs().max() > 1e-3


@pytest.mark.parametrize("form", STD_FORMS)
@pytest.mark.parametrize("kind", KINDS)
def test_the_way_does_not_matter(kind: str, form: StdForm) -> None:
    """Moved at once, or in three parts of which each is followed by something else, and back again."""
    model, x, _ = trained(kind, std=form)
    other = copy.deepcopy(model)
    start = {name: t.clone() for name, t in model.state_dict().items()}
    model(x)
    other(x)
    move(model)
    model(x)
    with torch.no_grad():
        for look in (in_a_pass, in_a_step, in_a_pass):
            for p, q in zip(other[0].parameters(), model[0].parameters(), strict=True):
                p.lerp_(q, 0.5 if look is not in_a_step else 1.7)
            look(other, x)
        for p, q in zip(other[0].parameters(), model[0].parameters(), strict=True):
            p.copy_(q)
        other(x)
        for name, t in model.state_dict().items():
            close(other.state_dict()[name], t, 1e-11)
        for name, p in model[0].named_parameters():
            p.copy_(start[f"0.{name}"])
        for name, t in model.state_dict().items():
            close(t, start[name], 1e-11)


class WritesData(torch.optim.Optimizer):
    """As many older optimizers do: no version tells that a weight has moved."""

    def __init__(self, parameters: Any) -> None:
        super().__init__(parameters, {})

    def step(self, closure: Any = None) -> None:  # type: ignore[override]
        for group in self.param_groups:
            for p in group["params"]:
                if p.grad is not None:
                    p.data.add_(p.grad, alpha=-0.1)


def test_an_optimizer_that_writes_data() -> None:
    model, x, _ = trained(aux="none")
    before, weight = c_and_s(model), model[0].weight.detach().clone()
    optimizer = WritesData([*model[0].parameters()])
    for _ in range(3):
        train(model, x, optimizer)
        for found, expected in zip(c_and_s(model), before, strict=True):
            close(found, expected, 1e-11)
    assert (model[0].weight - weight).abs().max() > 1e-3


def test_several_optimizers_are_one() -> None:
    """One for the weights, one for the rest, in either order; statistics step before weights as they do in one."""
    model, x, _ = trained()
    other = copy.deepcopy(model)
    parts = [other[0].parameters(), [p for name, p in other.named_parameters() if not name.startswith("0.")]]
    one, two, three = (torch.optim.SGD(p, lr=0.05) for p in (model.parameters(), parts[0], parts[1]))
    for _ in range(3):
        one.zero_grad()
        model(x).square().mean().backward()
        one.step()
        two.zero_grad()
        three.zero_grad()
        other(x).square().mean().backward()
        three.step()
        two.step()
    for name, t in model.state_dict().items():
        close(other.state_dict()[name], t, 1e-11)


# --- what is not --------------------------------------------------------------------------------------------------------------------------


def another() -> Any:
    model, x, optimizer = trained()
    train(model, x, optimizer)
    move(model)
    return model


def loads(model: Any, state: dict[str, Tensor], x: Tensor) -> None:
    model.load_state_dict(state)


def loads_the_norm_first(model: Any, state: dict[str, Tensor], x: Tensor) -> None:
    for n in (1, 0, 2):
        model[n].load_state_dict({name[2:]: t for name, t in state.items() if name.startswith(f"{n}.")})


def loads_new_parameters(model: Any, state: dict[str, Tensor], x: Tensor) -> None:
    model.load_state_dict({name: t.clone() for name, t in state.items()}, assign=True)


def loads_in_eval_mode(model: Any, state: dict[str, Tensor], x: Tensor) -> None:
    model.eval()
    loads(model, state, x)
    model(x)
    model.train()


@torch.no_grad()
def copies(model: Any, state: dict[str, Tensor], x: Tensor) -> None:
    """As averages of weights are put into a model."""
    for name, p in model.named_parameters():
        p.copy_(state[name])


@torch.no_grad()
def copies_the_function(model: Any, state: dict[str, Tensor], x: Tensor) -> None:
    """Without what training adds."""
    for name, p in model.named_parameters():
        if name in ("1.input_mean", "1.trend"):
            state[name] = p.clone()
        else:
            p.copy_(state[name])
    state["1.steps"] = model[1].steps.clone()


@torch.no_grad()
def copies_and_goes_back(model: Any, state: dict[str, Tensor], x: Tensor) -> None:
    """As for a validation with averaged weights, in train mode."""
    own = {name: p.clone() for name, p in model.named_parameters()}
    copies(model, own, x)
    model(x)
    copies(model, state, x)


def points_elsewhere(model: Any, state: dict[str, Tensor], x: Tensor) -> None:
    for name, p in model.named_parameters():
        p.data = state[name].clone()


def moves_to_another_dtype(model: Any, state: dict[str, Tensor], x: Tensor) -> None:
    loads(model, state, x)
    model.half().double()
    loads(model, state, x)


@pytest.mark.parametrize(
    "write",
    [
        loads,
        loads_the_norm_first,
        loads_new_parameters,
        loads_in_eval_mode,
        copies,
        copies_the_function,
        copies_and_goes_back,
        points_elsewhere,
        moves_to_another_dtype,
    ],
)
@pytest.mark.parametrize("goes_on", [True, False])
def test_mean_and_std_that_somebody_else_has_written_stay(write: Any, goes_on: bool) -> None:
    """And the next step is that of a model that was always so."""
    model, x, _ = trained()
    state = copy.deepcopy(another().state_dict())
    write(model, state, x)
    fresh: Any = normswap.convert(pair_of("conv2d")[0], x[:3]).model.train()
    fresh.load_state_dict(state)
    if goes_on:
        close(model(x), fresh(x))
        for each in (model, fresh):
            train(each, x, torch.optim.SGD(normswap.param_groups(each, lr=0.05)))
    for name, t in fresh.state_dict().items():
        close(model.state_dict()[name], t, 1e-12)


def test_an_average_of_models_is_one_of_ordinary_layers() -> None:
    model, x, optimizer = trained()
    average = AveragedModel(model)
    seen = []
    for _ in range(3):
        train(model, x, optimizer)
        average.update_parameters(model)
        average.train()(x)
        seen.append({name: p.detach().clone() for name, p in model.named_parameters()})
    for name, p in average.module.named_parameters():
        close(p.detach(), torch.stack([each[name] for each in seen]).mean(0), 1e-12)


@pytest.mark.parametrize("how", ["frozen", "eval", "by hand", "weight_norm"])
def test_a_weight_that_moves_while_the_statistics_do_not_follow(how: str) -> None:
    model, x, _ = trained()
    mean = model[1].mean.detach().clone()
    if how == "frozen":
        model[1].requires_grad_(False)
        train(model, x, torch.optim.SGD(model[0].parameters(), lr=0.1))
        model[1].requires_grad_(True)
    elif how == "eval":
        model.eval()
        train(model, x, torch.optim.SGD(model[0].parameters(), lr=0.1))
        model.train()
    elif how == "by hand":
        move(model.eval())
        model.train()
    else:
        nn.utils.parametrizations.weight_norm(model[0])
        train(model, x, torch.optim.SGD(model[0].parameters(), lr=0.1))
        nn.utils.parametrize.remove_parametrizations(model[0], "weight")
    model(x)
    assert torch.equal(model[1].mean, mean)


def test_other_weights_for_the_time_of_a_call() -> None:
    model, x, _ = trained()
    state = {name: t.clone() for name, t in model.state_dict().items()}
    model(x)
    other = {"0.weight": 2 * model[0].weight.detach()}
    torch.func.functional_call(model, other, (x,))
    model(x)
    for name, t in model.state_dict().items():
        assert torch.equal(t, state[name]), name


def test_a_weight_that_was_replaced() -> None:
    model, x, _ = trained()
    mean = model[1].mean.detach().clone()
    model[0].weight = nn.Parameter(3 * model[0].weight.detach())
    model(x)
    torch.optim.SGD(model[0].parameters(), lr=0.0).step()
    assert torch.equal(model[1].mean, mean)


def test_an_optimizer_keeps_no_model_alive() -> None:
    model, _, optimizer = trained()
    gone = weakref.ref(model[1])
    del model
    gc.collect()
    assert gone() is None
    optimizer.step()
