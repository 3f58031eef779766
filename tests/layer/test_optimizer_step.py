"""How the statistics step when an optimizer does, and what of a training loop makes no difference to it."""

from __future__ import annotations

import contextlib
import copy
import io
import pickle
from collections.abc import Callable
from typing import Any, Literal

import pytest
import torch
from batchless_net import ACCUMULATED, ADAMW, SGD, Net, assert_tracks, batches, one_step, statistics, train
from torch import Tensor, nn
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn
from torch.utils.checkpoint import checkpoint

import normswap
from normswap.errors import UsageError
from normswap.layer import optimizer_step
from normswap.layer.batchless_norm import BatchlessNorm
from normswap.layer.formulas import STD_FORMS, StdForm
from normswap.layer.run import pace_of
from normswap.models.copying import copy_for_running

OPTIMIZERS: list[tuple[Callable[..., torch.optim.Optimizer], dict[str, Any]]] = [
    (SGD, {"lr": 0.01, "momentum": 0.9}),
    (SGD, {"lr": 1e-4, "momentum": 0.9, "nesterov": True, "weight_decay": 0.1}),
    (SGD, {"lr": 0.0}),
    (ADAMW, {"lr": 1e-3}),
    (ADAMW, {"lr": 1e-3, "weight_decay": 0.5, "amsgrad": True}),
    (ADAMW, {"lr": 1e-3, "fused": True}),
    (torch.optim.Adam, {"lr": 1e-2, "foreach": True}),
    (torch.optim.RMSprop, {"lr": 1e-3, "momentum": 0.9}),
    (torch.optim.Adagrad, {"lr": 1e-2}),
    (torch.optim.Adadelta, {}),
    (torch.optim.NAdam, {}),
    (torch.optim.RAdam, {}),
    (torch.optim.Adamax, {}),
    (torch.optim.ASGD, {}),
    (torch.optim.Rprop, {}),
]
# A channel far from where it starts, one with a std that is far smaller, and one nearby. The variance of the second has the longest way,
# from 1 to 1e-4: what 0.9^130 leaves of the 1 is one percent of that.
MEANS, STDS, STEPS = torch.tensor([100.0, 0.0, -3.0]), torch.tensor([10.0, 0.01, 2.0]), 130
LBFGS = [{"lr": 0.1}, {"lr": 0.1, "line_search_fn": "strong_wolfe"}]


# --- the running averages of BatchNorm ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("std_form", STD_FORMS)
@pytest.mark.parametrize("momentum", [0.1, 0.01, 0.0])
@pytest.mark.parametrize("aux", ["auto", "explicit"])
def test_the_statistics_are_batch_norms_running_averages(aux: Any, momentum: float, std_form: StdForm) -> None:
    """Step for step, in float64: its mean, and its variance around the mean so far, plus eps. Whatever the optimizer does."""
    net = Net(aux=aux, momentum=momentum, std=std_form, dtype=torch.float64)
    net.head.double()
    optimizer = ADAMW(normswap.param_groups(net, lr=0.1, weight_decay=0.3))
    mean, var = torch.zeros(3, dtype=torch.float64), torch.ones(3, dtype=torch.float64)
    for x in batches(3.0, 2.0, 12):
        x = x.double()
        square = (x - mean.view(3, 1)).square().mean((0, 2)) + 1e-5
        mean, var = (1 - momentum) * mean + momentum * x.mean((0, 2)), (1 - momentum) * var + momentum * square
        train(net, optimizer, iter([x]))
        m, s = statistics(net)
        torch.testing.assert_close(m, mean, rtol=1e-11, atol=1e-12)
        torch.testing.assert_close(s.square(), var, rtol=1e-10, atol=1e-11)


@pytest.mark.parametrize(("cls", "options"), OPTIMIZERS)
def test_param_groups_track(cls: Any, options: dict[str, Any]) -> None:
    net = Net()
    rest = {name: value for name, value in options.items() if name not in ("lr", "weight_decay")}
    groups = normswap.param_groups(net, lr=options.get("lr", 1e-3), weight_decay=options.get("weight_decay", 0.0))
    train(net, cls(groups, **rest), batches(MEANS, STDS, STEPS))
    assert_tracks(net, MEANS, STDS)


@pytest.mark.parametrize(("cls", "options"), OPTIMIZERS)
def test_so_does_the_loop_of_a_user_who_never_heard_of_it(cls: Any, options: dict[str, Any]) -> None:
    net = Net()
    train(net, cls(net.parameters(), **options), batches(MEANS, STDS, STEPS))
    assert_tracks(net, MEANS, STDS)


@pytest.mark.parametrize("options", LBFGS)
def test_so_does_an_optimizer_that_evaluates_the_loss_several_times(options: dict[str, Any]) -> None:
    net = Net()
    optimizer = torch.optim.LBFGS(net.parameters(), max_iter=5, **options)
    for x in batches(MEANS, STDS, STEPS):

        def closure(x: Tensor = x) -> Tensor:
            optimizer.zero_grad()
            loss = net.loss(x)
            loss.backward()
            return loss

        optimizer.step(closure)  # type: ignore[arg-type]
    assert_tracks(net, MEANS, STDS)


def test_plain_sgd_by_hand_is_the_average_to_first_order() -> None:
    """No optimizer of torch, so nothing steps by itself: the gradient is that of the average, at lr = momentum."""
    net, x = Net(dtype=torch.float64), torch.randn(5, 3, 8, dtype=torch.float64) * 1.01 + 0.01
    net.head.double()
    net.loss(x).backward()
    with torch.no_grad():
        for p in (net.norm.mean, net.norm.std_parameter):
            p -= 0.1 * p.grad  # type: ignore[operator]
    m, s = statistics(net)
    torch.testing.assert_close(m, 0.1 * x.mean((0, 2)), rtol=1e-12, atol=1e-13)
    torch.testing.assert_close(s.square(), 0.9 + 0.1 * (x.square().mean((0, 2)) + 1e-5), rtol=0, atol=1e-3)


def test_a_dead_channel_keeps_a_std() -> None:
    """Its variance goes to eps, as BatchNorm's does, and not to 0."""
    net = Net()
    train(net, SGD(net.parameters(), 0.01), iter([torch.zeros(4, 3, 8)] * 300))
    torch.testing.assert_close(statistics(net)[1], torch.full((3,), 1e-5).sqrt())


def test_many_calls_before_one_step_do_not_break_the_variance() -> None:
    net = Net()
    x = torch.randn(4, 3, 8) * 1e-3
    sum(net.loss(x) for _ in range(40)).backward()  # type: ignore[union-attr, arg-type]
    SGD(net.parameters(), 0.01).step()
    assert bool(torch.isfinite(statistics(net)[1]).all())


def test_a_schedule_does_not_reach_the_statistics() -> None:
    net = Net()
    optimizer = SGD(normswap.param_groups(net, lr=0.1))
    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: 0.0)
    head = net.head.weight.detach().clone()
    for x in batches(100.0, 10.0):
        train(net, optimizer, iter([x]))
        schedule.step()
    assert torch.equal(net.head.weight, head)
    assert_tracks(net, 100.0, 10.0)


def test_the_optimizer_keeps_nothing_of_the_statistics_and_grad_comes_back() -> None:
    net = Net()
    optimizer = ADAMW(net.parameters(), lr=0.1)
    net.loss(torch.randn(4, 3, 8)).backward()
    before = copy.deepcopy(net.norm.mean.grad)
    optimizer.step()
    assert net.norm.mean.grad is not None
    assert torch.equal(net.norm.mean.grad, before)  # type: ignore[arg-type]
    assert not optimizer.state[net.norm.mean]
    assert net.head.weight in optimizer.state
    optimizer.load_state_dict(optimizer.state_dict())


def test_closures() -> None:
    """The gradients come when step calls the closure (Lightning does so always)."""
    found = []
    for positional in (True, False, None):
        torch.manual_seed(0)
        net = Net()
        optimizer = SGD(net.parameters(), lr=0.1, momentum=0.9)
        for x in batches(3.0, 2.0, 4):

            def closure(x: Tensor = x, net: Net = net, optimizer: Any = optimizer) -> Tensor:
                optimizer.zero_grad()
                loss = net.loss(x)
                loss.backward()
                return loss

            if positional is None:
                closure()
                optimizer.step()
            else:
                loss = optimizer.step(closure) if positional else optimizer.step(closure=closure)
                assert isinstance(loss, Tensor)
        found.append([p.detach() for p in net.parameters()])
    assert all(torch.equal(a, b) for other in found[1:] for a, b in zip(found[0], other, strict=True))


def test_an_optimizer_whose_step_calls_that_of_its_parent() -> None:
    class Mine(SGD):
        def step(self, closure: Any = None) -> Any:
            return super().step(closure)

    found = []
    for cls in (SGD, Mine):
        net = Net()
        train(net, cls(net.parameters(), lr=0.0), batches(3.0, 2.0, 5))
        found.append(statistics(net))
    assert torch.equal(found[0][0], found[1][0])
    assert torch.equal(found[0][1], found[1][1])


def test_statistics_that_no_optimizer_holds_stay() -> None:
    net = Net()
    train(net, SGD(net.head.parameters(), lr=0.1), batches(3.0, 2.0, 5))
    assert torch.equal(statistics(net)[0], torch.zeros(3))


def test_one_frozen_statistic() -> None:
    net = Net()
    net.norm.mean.requires_grad_(False)
    train(net, SGD(net.parameters(), lr=0.1), batches(3.0, 2.0, 50))
    m, s = statistics(net)
    assert torch.equal(m, torch.zeros(3))
    torch.testing.assert_close(s, torch.full((3,), 13.0).sqrt(), rtol=0.1, atol=0)


def test_aux_none_leaves_everything_to_the_optimizer() -> None:
    net, x = Net(aux="none"), torch.randn(4, 3, 8)
    (net(x).sum() + net.norm.nll(x)).backward()
    expected = net.norm.mean.detach() - 0.5 * net.norm.mean.grad  # type: ignore[operator]
    SGD(net.parameters(), lr=0.5).step()
    torch.testing.assert_close(net.norm.mean.detach(), expected)


# --- what surrounds a step ---------------------------------------------------------------------------------------------------------------

ONE = next(batches(3.0, 2.0, 1))


def abandons_the_loss(net: Net) -> None:
    net.loss(3 * ONE)
    with torch.inference_mode():
        net.norm(3 * ONE)


def breaks_in_a_mask(net: Net) -> None:
    with contextlib.suppress(RuntimeError), normswap.masked(net, torch.zeros(16, dtype=torch.bool)):
        raise RuntimeError


def breaks_in_micro_batches(net: Net) -> None:
    def loss(x: Tensor) -> Tensor:
        if net.norm.mean.grad is not None:
            raise RuntimeError
        return net.loss(x)

    with contextlib.suppress(RuntimeError):
        normswap.backward_in_micro_batches(net, loss, ONE, size=4)
    assert net.norm.mean.grad is not None
    net.zero_grad()


def is_averaged(net: Net) -> None:
    average = AveragedModel(net, multi_avg_fn=get_ema_multi_avg_fn(0.5))
    net.loss(3 * ONE).backward()
    net.zero_grad()
    average.update_parameters(net)
    average.module.loss(3 * ONE).backward()


def trains_frozen(net: Net) -> None:
    net.norm.requires_grad_(False)
    net.loss(3 * ONE).backward()
    SGD(net.parameters(), lr=0.0).step()
    net.zero_grad()
    net.norm.requires_grad_(True)


def is_pickled_between_passes(net: Net) -> None:
    """The copy has neither the gradient nor the count of what it was copied from."""
    net.loss(ONE).backward()
    for copied in (copy.deepcopy(net), pickle.loads(pickle.dumps(net))):
        one_step(copied)
        assert_averaged(copied)
    net.zero_grad()


def is_halved(net: Net) -> None:
    net.half().float()


def is_on_meta(net: Net) -> None:
    state = net.state_dict()
    net.to("meta").to_empty(device="cpu").load_state_dict(state)


def is_assigned(net: Net) -> None:
    net.load_state_dict({name: t.clone() for name, t in net.state_dict().items()}, assign=True)


def has_a_parametrization(net: Net) -> None:
    nn.utils.parametrizations.weight_norm(net.head)


def looks_at_gradients(net: Net) -> None:
    for p in net.parameters():
        p.register_hook(lambda grad: None)
    net.head.register_full_backward_hook(lambda module, by_input, by_output: None)


def assert_averaged(net: Net, steps: int = 1) -> None:
    mean, var = torch.zeros(3), torch.ones(3)
    for _ in range(steps):
        square = (ONE - mean.view(3, 1)).square().mean((0, 2)) + 1e-5
        mean, var = 0.9 * mean + 0.1 * ONE.mean((0, 2)), 0.9 * var + 0.1 * square
    m, s = statistics(net)
    torch.testing.assert_close(m, mean, rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(s.square(), var, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize(
    "before",
    [
        abandons_the_loss,
        breaks_in_a_mask,
        breaks_in_micro_batches,
        is_averaged,
        trains_frozen,
        is_pickled_between_passes,
        is_halved,
        is_on_meta,
        is_assigned,
        has_a_parametrization,
        looks_at_gradients,
    ],
)
def test_a_step_is_the_average_whatever_came_before(before: Callable[[Net], None]) -> None:
    net = Net()
    before(net)
    one_step(net)
    assert_averaged(net)


def saved_on_the_host(net: Net) -> Tensor:
    with torch.autograd.graph.save_on_cpu():
        return net.loss(ONE)


def with_a_penalty(net: Net) -> Tensor:
    x = ONE.clone().requires_grad_()
    loss = net.loss(x)
    (by_x,) = torch.autograd.grad(loss, x, create_graph=True)
    return loss + by_x.square().sum()


@pytest.mark.parametrize("loss", [saved_on_the_host, with_a_penalty])
def test_a_step_is_the_average_whatever_the_loss(loss: Callable[[Net], Tensor]) -> None:
    net = Net()
    loss(net).backward()
    SGD(net.parameters(), lr=0.0).step()
    assert_averaged(net)


@pytest.mark.parametrize("reentrant", [True, False])
def test_a_checkpoint_in_micro_batches(reentrant: bool) -> None:
    net = Net()

    def loss(x: Tensor) -> Tensor:
        hidden = checkpoint(net.norm, x.clone().requires_grad_(), use_reentrant=reentrant)
        return net.head(hidden.mean(2)).square().mean()  # type: ignore[no-any-return]

    normswap.backward_in_micro_batches(net, loss, ONE, size=5)
    SGD(net.parameters(), lr=0.0).step()
    assert_averaged(net)


def test_a_graph_that_is_walked_twice_counts_as_two_passes() -> None:
    net = Net()
    loss = net.loss(ONE)
    loss.backward(retain_graph=True)
    loss.backward()
    with pytest.warns(UserWarning, match=ACCUMULATED):
        SGD(net.parameters(), lr=0.0).step()
    assert_averaged(net)


@pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::FutureWarning")
@pytest.mark.parametrize("whole", [True, False])
def test_a_compiled_step(whole: bool) -> None:
    net = Net()
    optimizer = SGD(net.parameters(), lr=0.0)

    def backward() -> None:
        net.loss(ONE).backward()

    if not whole:
        backward()

    @torch.compile(backend="aot_eager")
    def step() -> None:
        if whole:
            backward()
        optimizer.step()

    step()
    assert_averaged(net)


def test_an_optimizer_that_goes_on_from_its_state() -> None:
    net, other = Net(), Net()
    optimizers = [ADAMW(normswap.param_groups(n, lr=0.0)) for n in (net, other)]
    one_step(net, optimizer=optimizers[0])
    other.load_state_dict(net.state_dict())
    optimizers[1].load_state_dict(optimizers[0].state_dict())
    one_step(other, optimizer=optimizers[1])
    assert_averaged(other, steps=2)


def test_an_optimizer_that_steps_statistics_in_backward_is_refused() -> None:
    net = Net()
    optimizers = {p: SGD([p], lr=0.1) for p in net.parameters()}
    for p in net.parameters():
        p.register_post_accumulate_grad_hook(lambda p: optimizers[p].step())
    with pytest.raises(UsageError, match="steps some of the statistics of a BatchlessNorm in the middle of a backward pass"):
        net.loss(ONE).backward()


@pytest.mark.parametrize("training", [True, False])
def test_a_whole_model_may_step_in_the_backward_pass_of_another(training: bool) -> None:
    """In a hook: all that the step takes is there."""
    found = []
    for inside in (True, False):
        torch.manual_seed(0)
        net = Net().train(training)
        step = SGD(normswap.param_groups(net, lr=0.1))

        def learn(net: Net = net, step: SGD = step) -> None:
            with torch.enable_grad():
                net.loss(ONE).backward()
            step.step()

        if inside:
            other = torch.ones(3, requires_grad=True)
            other.register_hook(lambda grad, learn=learn: learn())  # type: ignore[no-untyped-call]
            other.sum().backward()
        else:
            learn()
        found.append(net.state_dict())
    for name, value in found[0].items():
        torch.testing.assert_close(value, found[1][name], rtol=0, atol=0)


def test_an_optimizer_that_steps_weights_in_backward_is_not() -> None:
    net = Net()
    other = copy.deepcopy(net)
    for each in (net, other):
        groups = normswap.param_groups(each, lr=0.1)
        weights = [p for g in groups if "normswap" not in g for p in g["params"]]
        optimizers = {p: SGD([p], lr=0.1) for p in weights}
        rest = SGD([g for g in groups if "normswap" in g], lr=0.1)
        for p in weights if each is net else ():
            p.register_post_accumulate_grad_hook(lambda p, optimizers=optimizers: optimizers[p].step())
        each.loss(ONE).backward()
        rest.step()
        for p in weights if each is other else ():
            optimizers[p].step()
    for name, value in other.state_dict().items():
        torch.testing.assert_close(net.state_dict()[name], value, rtol=0, atol=0)


# --- parameter groups --------------------------------------------------------------------------------------------------------------------


def converted() -> nn.Module:
    torch.manual_seed(0)
    model = nn.Sequential(
        nn.Conv2d(2, 4, 3), nn.BatchNorm2d(4), nn.Conv2d(4, 3, 2), nn.BatchNorm2d(3, momentum=0.03), nn.BatchNorm2d(3, momentum=None)
    )
    model[0].weight.requires_grad_(False)
    return normswap.convert(model.eval(), torch.randn(2, 2, 6, 7), coupling="none").model.train()


def test_every_trainable_parameter_exactly_once() -> None:
    model = converted()
    groups = normswap.param_groups(model, lr=0.3, weight_decay=0.01)
    given = [p for group in groups for p in group["params"]]
    assert len(given) == len({id(p) for p in given})
    assert {id(p) for p in given} == {id(p) for p in model.parameters() if p.requires_grad}
    assert [(g["lr"], g["weight_decay"], g.get("momentum"), g.get("normswap"), len(g["params"])) for g in groups] == [
        (0.3, 0.01, None, None, 1),
        (0.3, 0.0, None, None, 8),
        (0.03, 0.0, 0.0, "statistics", 2),
        (0.1, 0.0, 0.0, "statistics", 4),
    ]


def test_no_decay_reaches_a_norm() -> None:
    model = converted()
    layers = [m for m in model.modules() if isinstance(m, BatchlessNorm)]
    norms = {id(p) for layer in layers for p in layer.parameters()}
    for group in normswap.param_groups(model, lr=0.3, weight_decay=0.01):
        assert group["weight_decay"] == 0 or not {id(p) for p in group["params"]} & norms


def test_tied_and_raw_parameters() -> None:
    net = Net(stats="raw")
    net.tied = net.head
    groups = normswap.param_groups(net, lr=0.3)
    assert [(len(g["params"]), g["lr"]) for g in groups] == [(1, 0.3), (3, 0.3), (2, 0.3)]


@pytest.mark.parametrize(("batch", "pace"), [(1, 8**-0.5), (2, 0.5), (8, 1.0), (64, 1.0), (None, 1.0)])
def test_a_small_batch_slows_the_statistics(batch: int | None, pace: float) -> None:
    net = Net(dtype=torch.float64)
    net.head.double()
    normswap.param_groups(net, lr=0.3, batch=2)  # what was said last holds
    groups = normswap.param_groups(net, lr=0.3, batch=batch)
    assert groups[-1]["lr"] == pytest.approx(0.1 * pace)
    x = torch.randn(5, 3, 8, dtype=torch.float64) + 2
    train(net, SGD(groups), iter([x]))
    m, s = statistics(net)
    torch.testing.assert_close(m, 0.1 * pace * x.mean((0, 2)))
    torch.testing.assert_close(s.square(), 1 + 0.1 * pace * (x.square().mean((0, 2)) + 1e-5 - 1))
    assert net.norm.momentum == 0.1


@pytest.mark.parametrize("batch", [0, -1, True, 2.0])
def test_a_batch_that_is_none(batch: Any) -> None:
    with pytest.raises(UsageError, match=f"batch is {batch!r}; expected the number of samples"):
        normswap.param_groups(Net(), lr=0.3, batch=batch)


@pytest.mark.parametrize(
    ("model", "message"),
    [
        (nn.Linear(2, 3), "Linear has no BatchlessNorm layer"),
        (Net().requires_grad_(False), "Net has no parameter that requires a gradient"),
    ],
)
def test_param_groups_refuses(model: nn.Module, message: str) -> None:
    with pytest.raises(UsageError, match=message):
        normswap.param_groups(model, lr=0.1)


# --- what a conversion sets and a directory keeps -----------------------------------------------------------------------------------------


def test_a_layer_takes_the_momentum_of_its_source() -> None:
    assert [m.momentum for m in converted().modules() if isinstance(m, BatchlessNorm)] == [0.1, 0.03, 0.1]


def test_a_second_conversion_changes_nothing() -> None:
    model = normswap.convert(nn.Sequential(nn.Conv1d(2, 3, 1), nn.BatchNorm1d(3)).eval(), torch.randn(2, 2, 5), aux="explicit").model
    again = normswap.convert(model, torch.randn(2, 2, 5)).model
    assert again[1].aux == "explicit"


def test_layers_step_in_the_order_of_the_optimizer(monkeypatch: pytest.MonkeyPatch) -> None:
    """And not as they come out of a set of weak references: with FSDP, a step may ask the other processes."""
    layers = [BatchlessNorm(2, aux="auto") for _ in range(30)]
    order: list[Any] = []
    monkeypatch.setattr(optimizer_step, "_accumulated", lambda layer: order.append(layer) or 1.0)
    for wanted in (layers, layers[::-1]):
        order.clear()
        step = SGD([p for layer in wanted for p in layer.parameters()], lr=0.1)
        sum(layer(torch.ones(3, 2)).sum() for layer in layers).backward()  # type: ignore[union-attr]
        step.step()
        assert [id(layer) for layer in order] == [id(layer) for layer in wanted]


def test_a_copy_that_shares_the_parameters_does_not_step_in_the_place_of_the_model() -> None:
    """As the copies do that `convert` measures, until the garbage collector finds them."""
    torch.manual_seed(3)
    source = nn.Sequential(nn.Conv1d(2, 3, 1), nn.BatchNorm1d(3), nn.ReLU(), nn.Conv1d(3, 5, 2), nn.BatchNorm1d(5)).eval()
    x = torch.randn(4, 2, 7) * 3 + 1
    models = [normswap.convert(source, x).model.train() for _ in range(2)]
    copies = [copy_for_running(models[0]) for _ in range(20)]
    for model in models:
        step = SGD(normswap.param_groups(model, lr=0.1))
        model(x).square().mean().backward()
        step.step()
    assert all(layer.stepped and layer.steps == 1 for model in models for layer in (model[1], model[4]))
    assert not any(layer.stepped for copied in copies for layer in (copied[1], copied[4]))
    for one, other in zip(models[0].state_dict().values(), models[1].state_dict().values(), strict=True):
        assert torch.equal(one, other)


def test_saved_and_loaded(tmp_path: Any) -> None:
    def factory() -> nn.Module:
        return nn.Sequential(nn.Conv1d(2, 3, 1), nn.BatchNorm1d(3, momentum=0.05))

    conversion = normswap.convert(factory().eval(), torch.randn(2, 2, 5), aux="explicit", stats="raw")
    normswap.save(conversion, tmp_path / "it")
    layer = normswap.load(tmp_path / "it", factory)[1]  # type: ignore[index]
    assert (layer.aux, layer.stats, layer.momentum, layer.calls) == ("explicit", "raw", 0.05, 1)


def test_trained_and_reverted() -> None:
    """BatchNorm again, with the statistics that the training left: its running averages."""
    torch.manual_seed(0)
    source = nn.Sequential(nn.Conv1d(2, 3, 1), nn.BatchNorm1d(3)).eval().requires_grad_(False)
    source[1].requires_grad_()
    model = normswap.convert(source, torch.randn(2, 2, 5)).model.train()
    x = torch.randn(16, 2, 50)
    optimizer = SGD(normswap.param_groups(model, lr=0.0))
    for _ in range(60):
        optimizer.zero_grad()
        model(x).sum().backward()
        optimizer.step()
        with torch.no_grad():
            source.train()(x)
    reverted = normswap.revert(model)
    for name in ("running_mean", "running_var"):
        torch.testing.assert_close(getattr(reverted[1], name), getattr(source[1], name), rtol=2e-2, atol=1e-3)  # type: ignore[index]


# -- copies of a model and its optimizer -------------------------------------------------------------------------------------------------


def saved_and_loaded(both: Any) -> Any:
    file = io.BytesIO()
    torch.save(both, file)
    file.seek(0)
    return torch.load(file, weights_only=False)


def state_loaded(both: Any) -> Any:
    """As a run that goes on from a checkpoint, and does not say the batch again."""
    model, optimizer = copy.deepcopy(both[0]), both[1]
    again = torch.optim.SGD(normswap.param_groups(model, lr=0.5), momentum=0.9)
    again.load_state_dict(copy.deepcopy(optimizer.state_dict()))
    return model, again


COPIES = {
    "deepcopy": copy.deepcopy,
    "pickle": lambda both: pickle.loads(pickle.dumps(both)),
    "torch.save": saved_and_loaded,
    "the state dict of the optimizer": state_loaded,
}


@pytest.mark.parametrize("coupling", ["auto", "none"])
@pytest.mark.parametrize("batch", [1, 4, None])
@pytest.mark.parametrize("how", COPIES)
def test_a_copy_of_model_and_optimizer_goes_on_at_the_same_pace(how: str, batch: int | None, coupling: Literal["auto", "none"]) -> None:
    torch.manual_seed(1)
    source = nn.Sequential(nn.Conv1d(2, 3, 2), nn.BatchNorm1d(3), nn.ReLU(), nn.Conv1d(3, 4, 2), nn.BatchNorm1d(4)).eval()
    model = normswap.convert(source, torch.randn(2, 2, 6), coupling=coupling).model.train()
    optimizer = torch.optim.SGD(normswap.param_groups(model, lr=0.01, batch=batch), momentum=0.9)

    def trained(model: nn.Module, optimizer: torch.optim.Optimizer) -> dict[str, list[Any]]:
        generator = torch.Generator().manual_seed(8)
        for _ in range(3):
            optimizer.zero_grad()
            model(torch.randn(3, 2, 6, generator=generator)).square().mean().backward()
            optimizer.step()
        return {name: t.tolist() for name, t in model.state_dict().items()}

    trained(model, optimizer)
    copied = COPIES[how]((model, optimizer))
    assert trained(*copied) == trained(model, optimizer)
    assert {m.run.pace for m in copied[0].modules() if isinstance(m, BatchlessNorm)} == {pace_of(batch)}


def test_a_copy_of_the_model_alone_keeps_the_pace_until_it_is_given_another() -> None:
    model = normswap.convert(nn.Sequential(nn.Linear(2, 3), nn.BatchNorm1d(3)).eval(), torch.randn(4, 2)).model
    normswap.param_groups(model, lr=0.1, batch=2)
    copied = copy.deepcopy(model)
    assert copied[1].run.pace == 0.5
    normswap.param_groups(copied, lr=0.1)
    assert (model[1].run.pace, copied[1].run.pace) == (0.5, 1.0)
