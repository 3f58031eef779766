"""The training run of a layer: what is warned of at a step, how backward passes are counted, and what each thread leaves."""

from __future__ import annotations

import copy
import linecache
import sys
import threading
import warnings
from collections.abc import Callable
from typing import Any

import pytest
import torch
from batchless_net import ACCUMULATED, ADAMW, SGD, Net, batches, one_step, statistics
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode
from torch.utils.checkpoint import checkpoint

import normswap
from fixtures.nets import randomise
from normswap.errors import UsageError
from normswap.layer import gradient_scale
from normswap.layer.batchless_norm import BatchlessNorm
from normswap.layer.run import Passes

F64 = torch.float64
BATCHES = [torch.randn(n, 3, 7, 8, dtype=F64, generator=torch.Generator().manual_seed(n)) for n in (4, 5, 3)]
SCALED = r"a GradScaler that normswap\.attach was not given .* Say normswap\.attach\(model, scaler=\.\.\.\)"
CHANGED = r"were changed between backward and step, as clip_grad_norm_ does.* Clip the other parameters only"
UNGROUPED = r'stats="raw" like any weight.* Give it normswap\.param_groups\(model, lr=\.\.\.\)'
UNSCALED = r"steps without the GradScaler that normswap\.attach was given.* Say scaler\.scale\(loss\)\.backward\(\) and scaler\.step"
LOST = r"aux_loss was called, but backward did not go through it.* before backward: loss \+ normswap\.aux_loss\(model\)"
UNREACHED = r"called in train mode since the last step, but no gradient came back to it.* Freeze them if that is meant"
FORGOTTEN = r"aux_loss was not called since the last forward pass.* loss \+ normswap\.aux_loss\(model\)"


# --- what `attach` does not know is warned of -------------------------------------------------------------------------------------------


@pytest.mark.parametrize("set_to_none", [True, False])
def test_accumulation_that_attach_does_not_know(set_to_none: bool) -> None:
    attached, silent = Net(), Net()
    silent.load_state_dict(attached.state_dict())
    normswap.attach(attached, accumulate=4)
    for net in (attached, silent):
        optimizer = SGD(net.parameters(), lr=0.0)
        for _ in range(2):
            if net is attached:
                one_step(net, k=4, optimizer=optimizer, to_none=set_to_none)
            else:
                with pytest.warns(UserWarning, match=ACCUMULATED) as caught:
                    one_step(net, k=4, optimizer=optimizer, to_none=set_to_none)
                assert linecache.getline(caught[0].filename, caught[0].lineno).strip() == "optimizer.step()"  # of the loop
    torch.testing.assert_close(statistics(silent), statistics(attached))


def test_an_incomplete_accumulation_is_as_the_loss_has_it() -> None:
    net = Net()
    normswap.attach(net, accumulate=4)
    one_step(net, k=2)  # the loop divides by 2 here; in its last window it would by 4
    torch.testing.assert_close(statistics(net)[0], torch.full((3,), 0.15), rtol=0.1, atol=0)


def zeros(net: Net) -> None:
    for p in net.parameters():
        p.grad = torch.zeros_like(p)


@pytest.mark.parametrize("throw_away", [nn.Module.zero_grad, lambda net: net.zero_grad(set_to_none=False), zeros])
@pytest.mark.parametrize("aux", ["auto", "explicit"])
def test_passes_are_counted_from_the_last_gradient(aux: str, throw_away: Callable[[Net], None]) -> None:
    """Another model's loss goes through this one (a GAN's generator), and its gradient is thrown away."""
    plain, net = Net(aux=aux), Net(aux=aux)
    for _ in range(3):
        net.loss(torch.randn(4, 3, 8)).backward()
        throw_away(net)
        one_step(net)
        one_step(plain)
    assert torch.equal(statistics(net)[0], statistics(plain)[0])
    assert torch.equal(statistics(net)[1], statistics(plain)[1])


def test_a_gradient_that_was_written_to_is_not_thrown_away() -> None:
    net = Net()
    for _ in range(2):
        net.loss(torch.randn(4, 3, 8)).backward()
        nn.utils.clip_grad_norm_(net.parameters(), 1.0)
    with pytest.warns(UserWarning, match=ACCUMULATED), pytest.warns(UserWarning, match=CHANGED):
        SGD(net.parameters(), lr=0.0).step()


def test_what_came_after_the_thrown_away_is_accumulation() -> None:
    net = Net()
    for _ in range(3):
        net.zero_grad(set_to_none=False)
        net.loss(torch.randn(4, 3, 8)).backward()
    with pytest.warns(UserWarning, match=ACCUMULATED):
        one_step(net)


SCALERS = [
    (SGD, {}, False),
    (SGD, {}, True),
    (ADAMW, {}, False),
    (ADAMW, {"fused": True}, False),
    (ADAMW, {"fused": True}, True),
    (SGD, {"fused": True}, False),
]


@pytest.mark.parametrize("attached", [True, False])
@pytest.mark.parametrize(("cls", "options", "unscale"), SCALERS)
def test_a_grad_scaler(cls: Any, options: dict[str, Any], unscale: bool, attached: bool) -> None:
    plain, net = Net(), Net()
    one_step(plain)
    scaler = torch.amp.GradScaler("cpu", init_scale=65536.0)
    optimizer = cls(net.parameters(), lr=0.0, **options)
    if attached:
        normswap.attach(net, scaler=scaler)
        one_step(net, scaler=scaler, optimizer=optimizer, unscale=unscale)
    else:
        with pytest.warns(UserWarning, match=SCALED):
            one_step(net, scaler=scaler, optimizer=optimizer, unscale=unscale)
    torch.testing.assert_close(statistics(net), statistics(plain), rtol=1e-5, atol=1e-6)


def test_a_scaler_and_accumulation() -> None:
    plain, net = Net(), Net()
    one_step(plain)
    scaler = torch.amp.GradScaler("cpu", init_scale=1024.0)
    with pytest.warns(UserWarning, match=ACCUMULATED), pytest.warns(UserWarning, match=SCALED):
        one_step(net, k=4, scaler=scaler)
    torch.testing.assert_close(statistics(net), statistics(plain), rtol=1e-5, atol=1e-6)


def test_another_scaler_than_the_one_it_was_attached_to() -> None:
    plain, net = Net(), Net()
    one_step(plain)
    normswap.attach(net, scaler=torch.amp.GradScaler("cpu", init_scale=8.0))
    with pytest.warns(UserWarning, match=SCALED):
        one_step(net, scaler=torch.amp.GradScaler("cpu", init_scale=1024.0))
    torch.testing.assert_close(statistics(net), statistics(plain), rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("scale", [65536.0, 1000.0])
@pytest.mark.parametrize("clip", [False, True])
def test_a_scaler_whose_step_is_not_called(clip: bool, scale: float) -> None:
    """Only its unscale_, as where somebody steps by himself; and the clipping that is the reason to call it. Values tell, not callers."""
    plain, net = Net(), Net()
    one_step(plain)
    scaler, optimizer = torch.amp.GradScaler("cpu", init_scale=scale), SGD(net.parameters(), lr=0.0)
    scaler.scale(net.loss(next(batches(3.0, 2.0, 1)))).backward()
    scaler.unscale_(optimizer)
    if clip:
        nn.utils.clip_grad_norm_(net.parameters(), 1e-3)
    with pytest.warns(UserWarning, match=CHANGED if clip else SCALED):
        optimizer.step()
    torch.testing.assert_close(statistics(net), statistics(plain), rtol=1e-5, atol=1e-6)


def test_a_scaler_where_the_means_are_right() -> None:
    """Their gradients are 0, whatever they are divided by."""
    plain, net = Net(), Net()
    x = torch.randn(4, 3, 8)
    x = 2 * torch.cat([x, -x])
    scaler, optimizer = torch.amp.GradScaler("cpu", init_scale=1024.0), SGD(net.parameters(), lr=0.0)
    plain.loss(x).backward()
    SGD(plain.parameters(), lr=0.0).step()
    scaler.scale(net.loss(x)).backward()
    with pytest.warns(UserWarning, match=SCALED):
        scaler.step(optimizer)
    torch.testing.assert_close(statistics(net), statistics(plain), rtol=1e-5, atol=1e-6)


def test_a_device_that_is_not_waited_for_is_asked_at_the_next_step(monkeypatch: pytest.MonkeyPatch) -> None:
    """In between the statistics do not move."""
    monkeypatch.setattr(gradient_scale, "AT_ONCE", ())
    plain, net, calm = Net(), Net(), Net()
    before = statistics(net)
    optimizers = [SGD(each.parameters(), lr=0.0) for each in (plain, net, calm)]
    scaler = torch.amp.GradScaler("cpu", init_scale=65536.0)
    one_step(net, scaler=scaler, optimizer=optimizers[1])
    torch.testing.assert_close(statistics(net), before, rtol=1e-3, atol=1e-3)
    for _ in range(2):
        with pytest.warns(UserWarning, match=SCALED):
            one_step(net, scaler=scaler, optimizer=optimizers[1])
        one_step(plain, optimizer=optimizers[0])
        one_step(calm, optimizer=optimizers[2])
    torch.testing.assert_close(statistics(net), statistics(plain), rtol=1e-3, atol=1e-3)
    assert torch.equal(statistics(calm)[0], statistics(plain)[0])


@pytest.mark.parametrize("twice", [False, True])
def test_writes_that_leave_the_values_are_not_warned_of(twice: bool) -> None:
    """As that of a Trainer, which measures the norm of all gradients by clipping it to infinity."""
    net = Net()
    net.loss(torch.randn(4, 3, 8) + 1).backward()
    if twice:
        for p in net.parameters():
            p.grad = p.grad.clone()  # type: ignore[union-attr]
    nn.utils.clip_grad_norm_(net.parameters(), float("inf"))
    SGD(net.parameters(), lr=0.1).step()


@pytest.mark.parametrize(("cls", "options", "unscale"), SCALERS)
def test_a_step_that_the_scaler_skips(cls: Any, options: dict[str, Any], unscale: bool) -> None:
    net = Net()
    scaler = torch.amp.GradScaler("cpu", init_scale=1024.0)
    normswap.attach(net, scaler=scaler)
    before = copy.deepcopy(net.state_dict())
    optimizer = cls(net.parameters(), lr=0.1, **options)
    scaler.scale(net.loss(torch.randn(4, 3, 8)) * float("inf")).backward()
    if unscale:
        scaler.unscale_(optimizer)
    scaler.step(optimizer)
    scaler.update()
    assert all(torch.equal(value, before[name]) for name, value in net.state_dict().items())
    assert scaler.get_scale() == 512.0


@pytest.mark.parametrize("attached", [True, False])
def test_a_scaler_that_is_disabled(attached: bool) -> None:
    """As in a loop that is written for both: GradScaler(enabled=use_amp)."""
    plain, net = Net(), Net()
    one_step(plain)
    scaler = torch.amp.GradScaler("cpu", enabled=False)
    if attached:
        normswap.attach(net, scaler=scaler)
    one_step(net, scaler=scaler)
    assert torch.equal(statistics(net)[0], statistics(plain)[0])


@pytest.mark.parametrize("stats", ["natural", "raw"])
@pytest.mark.parametrize("scaled", [True, False])
def test_a_scaler_that_is_attached_and_that_does_not_make_the_step(scaled: bool, stats: str) -> None:
    """Left behind by another loop: the term is multiplied by a scale that nobody takes away."""
    plain, net = Net(stats=stats), Net(stats=stats)
    one_step(plain, optimizer=SGD(normswap.param_groups(plain, lr=0.1)))
    scaler, optimizer = torch.amp.GradScaler("cpu", init_scale=1024.0), SGD(normswap.param_groups(net, lr=0.1))
    normswap.attach(net, scaler=scaler)
    loss = net.loss(next(batches(3.0, 2.0, 1)))
    (scaler.scale(loss) if scaled else loss).backward()
    with pytest.warns(UserWarning, match=UNSCALED):
        optimizer.step()
    torch.testing.assert_close(statistics(net), statistics(plain))


def test_gradients_that_the_scaler_has_unscaled() -> None:
    plain, net = Net(), Net()
    one_step(plain)
    scaler, optimizer = torch.amp.GradScaler("cpu", init_scale=1024.0), SGD(net.parameters(), lr=0.0)
    normswap.attach(net, scaler=scaler)
    scaler.scale(net.loss(next(batches(3.0, 2.0, 1)))).backward()
    scaler.unscale_(optimizer)
    optimizer.step()
    torch.testing.assert_close(statistics(net), statistics(plain))


def halved(net: Net) -> None:
    for p in net.parameters():
        p.grad = p.grad / 2  # type: ignore[operator]


@pytest.mark.parametrize("change", [halved, lambda net: nn.utils.clip_grad_value_(net.parameters(), 0.01)])
def test_other_changes_of_the_gradients(change: Callable[[Net], None]) -> None:
    net = Net()
    net.loss(torch.randn(4, 3, 8) + 1).backward()
    change(net)
    with pytest.warns(UserWarning, match=CHANGED):
        SGD(net.parameters(), lr=0.1).step()


@pytest.mark.parametrize("scaled", [False, True])
def test_clipping_the_statistics_too(scaled: bool) -> None:
    net = Net()
    scaler = torch.amp.GradScaler("cpu", init_scale=8.0) if scaled else None
    if scaler:
        normswap.attach(net, scaler=scaler)
    with pytest.warns(UserWarning, match=CHANGED):
        one_step(net, clip=True, scaler=scaler, unscale=scaled)


@pytest.mark.parametrize("scaled", [False, True])
def test_clipping_the_others_only(scaled: bool) -> None:
    net = Net()
    scaler = torch.amp.GradScaler("cpu", init_scale=8.0) if scaled else None
    if scaler:
        normswap.attach(net, scaler=scaler)
    optimizer = SGD(normswap.param_groups(net, lr=0.1))
    one_step(net, scaler=scaler, optimizer=optimizer, clip="head", unscale=scaled)


@pytest.mark.parametrize("cls", [SGD, ADAMW, torch.optim.Adam, torch.optim.Adagrad, torch.optim.RMSprop, torch.optim.LBFGS])
def test_raw_statistics_given_like_any_weight(cls: Any) -> None:
    net = Net(stats="raw")
    optimizer = cls(net.parameters(), lr=1e-3)

    def closure() -> Tensor:
        optimizer.zero_grad()
        loss = net.loss(torch.randn(4, 3, 8))
        loss.backward()
        return loss

    with pytest.warns(UserWarning, match=UNGROUPED):
        optimizer.step(closure)


@pytest.mark.parametrize("k", [1, 4])
def test_raw_statistics_in_their_group_are_the_optimizers(k: int) -> None:
    net = Net(stats="raw")
    optimizer = SGD(normswap.param_groups(net, lr=0.5, weight_decay=0.1), momentum=0.9)
    before = net.norm.mean.detach().clone()
    (x,) = batches(3.0, 2.0, 1)
    if k > 1:
        with pytest.warns(UserWarning, match=ACCUMULATED):
            one_step(net, k=k, optimizer=optimizer)
    else:
        one_step(net, optimizer=optimizer)
    torch.testing.assert_close(net.norm.mean.detach(), before + 0.5 * x.mean((0, 2)) / 3)


def test_an_explicit_term_that_nobody_reads() -> None:
    net = Net(aux="explicit")
    optimizer = SGD(net.parameters(), lr=0.1)
    net(torch.randn(4, 3, 8)).sum().backward()
    with pytest.warns(UserWarning, match=FORGOTTEN):
        optimizer.step()
    one_step(net)


def test_an_explicit_term_that_is_read_and_not_added() -> None:
    net = Net(aux="explicit")
    optimizer = SGD(net.parameters(), lr=0.1)
    loss = net(torch.randn(4, 3, 8)).sum()
    normswap.aux_loss(net)
    loss.backward()
    with pytest.warns(UserWarning, match=LOST):
        optimizer.step()
    one_step(net)


class Reversible(torch.autograd.Function):
    """Code of somebody's own that runs a part of a model without gradients, and again in backward, as a reentrant checkpoint does."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, net: Net) -> Tensor:
        ctx.net, ctx.x = net, x.detach()
        return net(x)  # type: ignore[no-any-return]

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor | None, None]:  # type: ignore[override]
        x = ctx.x.requires_grad_()
        with torch.enable_grad():
            ctx.net(x).backward(gradient)
        return x.grad, None


def test_an_explicit_term_in_a_function_of_autograd() -> None:
    """It counts once, and not where there are no gradients at all."""
    plain, net, x = Net(aux="explicit"), Net(aux="explicit"), torch.randn(4, 3, 8)
    net.load_state_dict(plain.state_dict())
    plain.loss(x).backward()
    for off in (torch.no_grad, torch.inference_mode):
        with off():
            net(3 * x)
    loss = Reversible.apply(x.clone().requires_grad_(), net).square().mean()  # type: ignore[no-untyped-call]
    (loss + normswap.aux_loss(net)).backward()
    for p, expected in zip(net.parameters(), plain.parameters(), strict=True):
        torch.testing.assert_close(p.grad, expected.grad)


def without_gradients(net: Net, x: Tensor) -> Tensor:
    with torch.no_grad():
        return net.norm(x)  # type: ignore[no-any-return]


@pytest.mark.parametrize("hidden", [without_gradients, lambda net, x: net.norm(x).detach()])
def test_statistics_that_no_gradient_reaches(hidden: Callable[[Net, Tensor], Tensor]) -> None:
    """A head on features, where BatchNorm would have moved."""
    net, x = Net(), torch.randn(4, 3, 8)
    optimizer = SGD(net.parameters(), lr=0.1)
    net.head(hidden(net, x).mean(2)).sum().backward()
    with pytest.warns(UserWarning, match=UNREACHED):
        optimizer.step()
    net.zero_grad()
    net.eval()
    net.head(hidden(net, x).mean(2)).sum().backward()
    optimizer.step()


def test_statistics_that_need_no_gradient() -> None:
    """Frozen ones, a pass without gradients beside one with, another model's step, and a step of nothing."""
    net, x = Net(), torch.randn(4, 3, 8)
    without_gradients(net, x)
    SGD(net.parameters(), lr=0.1).step()
    net.head(x.mean(2)).sum().backward()
    SGD(net.head.parameters(), lr=0.1).step()
    net.zero_grad()
    one_step(net)
    net.norm.requires_grad_(False)
    net.head(without_gradients(net, x).mean(2)).sum().backward()
    SGD(net.parameters(), lr=0.1).step()


@pytest.mark.parametrize("aux", ["auto", "explicit"])
def test_replicas_of_data_parallel(aux: str) -> None:
    """As nn.parallel.replicate makes them on several GPUs: their gradients would be added up."""

    def replica(layer: nn.Module) -> nn.Module:
        copied = layer._replicate_for_data_parallel()
        for name, p in layer.named_parameters():
            setattr(copied, name, p * 1)
        return copied

    layer, x = BatchlessNorm(3, aux=aux), torch.randn(4, 3, 8)
    with pytest.raises(UsageError, match=r"^nn.DataParallel adds up the gradients .*\nhint: use torch.nn.parallel.DistributedDataParallel"):
        replica(layer)(x)
    expected = layer.eval()(x)
    assert torch.equal(replica(layer)(x), expected)
    layer.train()
    layer.mean.requires_grad_(False)
    layer.log_std.requires_grad_(False)
    assert torch.equal(replica(layer)(x), expected)


def test_the_warning_is_shown_once_by_default() -> None:
    net = Net()
    with warnings.catch_warnings(record=True) as caught:
        warnings.resetwarnings()
        warnings.simplefilter("default")
        for _ in range(3):
            one_step(net, k=2)
    assert len(caught) == 1


# --- one model in several threads: each sees what its own forward pass left ------------------------------------------------


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


def test_hooks_of_several_threads_at_once() -> None:
    """Autograd lets them run at once: what is kept last has the gradients of all, or the step would take it for a clipped one."""
    parameter = nn.Parameter(torch.ones(5, dtype=F64))
    passes, interval = Passes(parameter), sys.getswitchinterval()
    sys.setswitchinterval(1e-6)
    try:
        for _ in range(100):
            assert in_threads(lambda number: (parameter * (number + 1)).sum().backward()) == []
            assert passes.count == 3
            assert passes.kept is not None
            assert torch.equal(passes.kept, torch.full((5,), 6.0, dtype=F64))
            parameter.grad = None
    finally:
        sys.setswitchinterval(interval)


@pytest.mark.parametrize("options", [{}, {"coupling": "none"}, {"aux": "explicit"}, {"aux": "explicit", "coupling": "none"}], ids=str)
def test_only_functions_of_python_record_a_history_of_the_statistics(options: dict[str, Any]) -> None:
    """An operator of torch lets go of Python's lock while it records one; beside such a function two threads wait for each other."""
    recorded: list[object] = []

    class Watch(TorchFunctionMode):
        def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
            result = func(*args, **(kwargs or {}))
            if isinstance(result, Tensor) and result.requires_grad and any(a is s for a in args for s in watched):
                recorded.append(func)
            return result

    model = net(**options).train()
    watched = [p for layer in model.modules() if isinstance(layer, BatchlessNorm) for p in (layer.mean, layer.std_parameter)]
    with Watch():
        loss = model(BATCHES[0]).square().mean()
        if "aux" in options:
            loss = loss + normswap.aux_loss(model)
        loss.backward()
        assert watched[1].exp().requires_grad
    assert recorded == [Tensor.exp]


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


# --- once for all layers of a step, by name ---------------------------------------------------------------------------------------------


def deep(**options: Any) -> nn.Sequential:
    """Three converted BatchNorms, the first two in a block of their own."""
    block = nn.Sequential(nn.Conv1d(3, 4, 2), nn.BatchNorm1d(4), nn.Conv1d(4, 6, 3), nn.BatchNorm1d(6))
    model = randomise(nn.Sequential(block, nn.Conv1d(6, 5, 2), nn.BatchNorm1d(5)), 0).eval()
    return normswap.convert(model, torch.randn(2, 3, 9), **options).model.train()


def warned(model: nn.Module, losses: list[Callable[[Tensor], Tensor]], clip: float | None = None) -> list[str]:
    """What a step of `model` warns of, each at the line of the step."""
    optimizer = SGD(model.parameters(), lr=1e-3)
    for loss in losses:
        loss(torch.randn(4, 3, 9)).square().mean().backward()
    if clip is not None:
        torch.nn.utils.clip_grad_norm_(model.parameters(), clip)
    with pytest.warns(UserWarning, match="BatchlessNorm") as caught:
        optimizer.step()
    assert {linecache.getline(each.filename, each.lineno).strip() for each in caught} == {"optimizer.step()"}
    return sorted(str(each.message) for each in caught)


@pytest.mark.parametrize(
    ("options", "passes", "text"),
    [
        ({}, 2, "have reached the statistics of 3 BatchlessNorm layers (first: 0.1) since the last step than normswap.attach"),
        ({"stats": "raw"}, 1, "weight decay and momentum: those of 3 BatchlessNorm layers (first: 0.1). Give it normswap.param_groups("),
        ({"aux": "explicit"}, 1, "so the statistics of 3 BatchlessNorm layers (first: 0.1) stay as they are. Add it to the loss"),
    ],
)
def test_one_warning_for_all_layers_of_a_step(options: dict[str, Any], passes: int, text: str) -> None:
    model = deep(**options)
    (message,) = warned(model, passes * [model])
    assert text in message


def test_no_gradient_came_back_to_them() -> None:
    model = deep(coupling="none")
    head = nn.Linear(2, 1)
    model.add_module("head", head)
    (message,) = warned(model, [lambda x: head(model[2](model[1](model[0](x))).detach().mean(1)[:, :2])])
    assert message.startswith(
        "an optimizer holds the statistics of 3 BatchlessNorm layers (first: 0.1) that were called in train mode since the last step, "
        "but no gradient came back to them, as under torch.no_grad"
    )


def test_a_single_layer_is_named_and_two_kinds_of_trouble_are_two_warnings() -> None:
    model = deep(coupling="none")
    losses = [model[0], lambda x: model[0](x) + model[2](torch.randn(4, 5, 9)).detach().mean()]
    assert [message[:77] for message in warned(model, losses)] == [
        "an optimizer holds the statistics of a BatchlessNorm (2) that was called in t",
        "more backward passes have reached the statistics of 2 BatchlessNorm layers (f",
    ]


def test_what_is_looked_at_apart_is_warned_of_once_and_a_copy_has_no_names_until_it_is_given_to_normswap() -> None:
    """The scale of gradients in float32 and in float64 is looked at apart."""
    model = copy.deepcopy(deep(coupling="none"))
    model[2].double()
    for layers in ("3 BatchlessNorm layers", "3 BatchlessNorm layers (first: 0.1)"):
        model.zero_grad()
        (message,) = warned(model, [lambda x: model[2](model[1](model[0](x)).double())], clip=1e-3)
        assert message.startswith(f"the gradients of the statistics of {layers} were changed between backward and step")
        normswap.attach(model)


def test_a_loaded_model_has_names(tmp_path: Any) -> None:
    def build() -> nn.Module:
        return nn.Sequential(nn.ReLU(), nn.Sequential(nn.Conv1d(3, 4, 2), nn.BatchNorm1d(4)))

    normswap.save(normswap.convert(randomise(build(), 0).eval(), torch.randn(2, 3, 9)), tmp_path / "out")
    model = normswap.load(tmp_path / "out", build).train()
    (message,) = warned(model, [model, model])
    assert "the statistics of a BatchlessNorm (1.1) since the last step" in message
